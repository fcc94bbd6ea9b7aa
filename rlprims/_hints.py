"""What to write instead of a call that was given a batch."""

import inspect
from collections.abc import Iterator, Mapping

from rlprims._contracts import Contract, Shape, mismatch

Contracts = Mapping[str, Contract]
Shapes = Mapping[str, Shape]


def vmap_hint(
    name: str,
    signature: inspect.Signature,
    contracts: Contracts,
    shapes: Shapes,
    order: tuple[str, ...],
) -> str:
    """Writes the `jax.vmap` call to make, if one extra leading axis is all."""
    for batched in _batches(contracts, shapes):
        sizes = {shape[0] for shape in batched.values()}
        peeled = dict(shapes) | {k: shape[1:] for k, shape in batched.items()}
        if len(sizes) == 1 and not mismatch(contracts, peeled):
            call = _vmap_call(name, signature, batched, order)
            timed = any("T" in contracts[k].text for k in batched)
            hint = f" For a batch of {sizes.pop()}, use {call}.{_TIME if timed else ''}"
            return hint if call else ""
    return ""


_TIME = " If time comes first, as in [T, B], map axis 1: in_axes=1, out_axes=1."


def _batches(contracts: Contracts, shapes: Shapes) -> Iterator[dict[str, Shape]]:
    """Yields which arguments may have a batch axis: what must, then what may."""
    limited = {k: c.specs for k, c in contracts.items() if c.rank is not None}
    ranks = {k: {len(x.dims) for x in limited[k]} for k in shapes if k in limited}
    more = {k: x for k, x in shapes.items() if len(x) - 1 in ranks.get(k, ())}
    must = {k: x for k, x in more.items() if len(x) not in ranks[k]}
    either = {k: x for k, x in more.items() if len(x) > 1}  # as in `f[T]|f[T,K]`
    sizes = {x[0] for x in (must or either).values()}
    long = {k: x for k, x in shapes.items() if x and {x[0]} == sizes}
    free = {k: x for k, x in long.items() if k not in ranks}
    yield must | free | {k: x for k, x in long.items() if k in either}
    yield must | free
    yield must | long


def _vmap_call(
    name: str, signature: inspect.Signature, batched: Shapes, order: tuple[str, ...]
) -> str:
    """Writes the `jax.vmap` call over the arguments that have a batch axis.

    There is none if of a named tuple only some fields have one.
    """
    parts = {parameter: [] for parameter in signature.parameters}
    for key in order:
        parts[key.split(".")[0]].append(key)
    given = [k for k in parts if parts[k]]
    whole = {k for k in given if {*parts[k]} <= batched.keys()}
    if any(key.split(".")[0] not in whole for key in batched):
        return ""
    by_name = [k for k, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
    leading = zip(parts, given, strict=False)
    args = [k for k, other in leading if k == other and k not in by_name]
    kwargs = [k for k in given if k not in args]
    bound = "".join(f", {k}={k}" for k in kwargs if k not in whole)
    axes = tuple(0 if k in whole else None for k in args)
    fn = f"functools.partial({name}{bound})" if bound else name
    in_axes = f", in_axes={axes}" if None in axes else ""
    passed = args + [f"{k}={k}" for k in kwargs if k in whole]
    return f"jax.vmap({fn}{in_axes})({', '.join(passed)})"

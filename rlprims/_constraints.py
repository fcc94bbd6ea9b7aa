"""Constraints as arguments: lists, of any length, of divergences and their penalties.

`constrained` is `checked` for functions that take such a list, as `kl_constraints`.
How many there are, and of which kind, decides the contracts: they are written once for
each combination.
"""

import collections
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

from rlprims._checks import Arg, Flag, checked

P = ParamSpec("P")
R = TypeVar("R")


class LagrangePenalty(NamedTuple):
    """A limit, and the multiplier that keeps it.

    Attributes:
        alpha: multiplier, or temperature, `f[]`: what to learn. A limit on each of `D`
            dimensions may have one for each, `f[D]`, and one on each entry of a batch
            one for each entry.
        epsilon: the limit, `f[]`, in nats, not negative.
        per_dimension: whether the last axis of the divergences is of dimensions, each
            of which is limited by itself, `b[]`: a Python `bool` where it matters.

    Example:
        >>> LagrangePenalty(jnp.float32(1.0), 0.1).per_dimension
        False
    """

    alpha: Annotated[Arg, "f[]"]
    epsilon: Annotated[Arg, "f[]", "[0, inf]"]
    per_dimension: Flag = False


Constraint = tuple[Arg, LagrangePenalty]
Constraints = Sequence[Constraint]


def renamed(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Gives a function the name that its caller knows it by, for errors."""

    def rename(fn: Callable[P, R]) -> Callable[P, R]:
        fn.__name__ = name
        return fn

    return rename


def constrained(
    fn: Callable[P, R],
    kl: str = "kl_constraints[{}][0]",
    penalty: str = "kl_constraints[{}][1]",
) -> Callable[P, R]:
    """Makes `fn` keep its contracts, and those of the pairs in `kl_constraints`.

    It is `checked` once for each list of kinds of constraints, and receives them as
    one named tuple: see `pairs`. Errors call a pair `kl` and `penalty`.
    """
    inner, signature, name = typing.cast(Any, fn), inspect.signature(fn), fn.__name__
    paths = {"kl": kl, "alpha": f"{penalty}.alpha", "epsilon": f"{penalty}.epsilon"}

    @functools.cache
    def program(kinds: tuple[bool, ...]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def twin(**kwargs: Any) -> Any:
            return inner(**kwargs)

        twin.__annotations__ = fn.__annotations__ | {"kl_constraints": _record(kinds)}
        return checked(twin)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:
            return program(())(*args, **kwargs)  # which says what is wrong
        constraints = given.get("kl_constraints", ())
        _refuse_what_are_no_constraints(name, constraints, kl, penalty)
        refuse_what_is_no_function(name, given.get("projection_operator", abs))
        record = _record(tuple(penalty.per_dimension for _, penalty in constraints))
        flat = [x for kl, penalty in constraints for x in (kl, *penalty)]
        given["kl_constraints"] = record(*flat)
        try:
            return program(record.kinds)(**given)
        except (TypeError, ValueError) as error:
            path = lambda found: paths[found[1]].format(found[2])
            text = _FIELD.sub(path, str(error))
            if text == str(error):
                raise
            raise type(error)(text) from None

    return wrapper


def pairs(constraints: Any) -> Iterator[Constraint]:
    """Yields the constraints that `constrained` has put into one named tuple."""
    for kl, *penalty in zip(*[iter(constraints)] * 4, strict=True):
        yield kl, LagrangePenalty(*penalty)


_FIELD = re.compile(r"\bkl_constraints\.([a-z]+)_(\d+)")


@functools.cache
def _record(kinds: tuple[bool, ...]) -> Any:
    """Makes the named tuple, with contracts, that constraints of these kinds go in."""
    contracts: dict[str, Any] = {}
    for i, per_dimension in enumerate(kinds):
        own = f"D{i}" if per_dimension else "..."
        dims = f"...,{own}" if per_dimension else own
        contracts |= {
            f"kl_{i}": Annotated[Arg, f"f[{dims}]"],
            f"alpha_{i}": Annotated[Arg, f"f[]|f[{own}]"],
            f"epsilon_{i}": Annotated[Arg, "f[]", "[0, inf]"],
            f"per_dimension_{i}": bool,
        }
    record: Any = collections.namedtuple("KLConstraints", list(contracts))
    record.__annotations__, record.kinds = contracts, kinds
    return record


def refuse_what_is_no_function(fn: str, projection_operator: Any) -> None:
    if not callable(projection_operator):
        raise TypeError(
            f"{fn}: projection_operator must be a function, got "
            f"{type(projection_operator).__name__}."
        )


def _refuse_what_are_no_constraints(
    fn: str, constraints: Any, kl: str, penalty: str
) -> None:
    def refuse(what: str, wanted: str, got: Any) -> None:
        raise TypeError(f"{fn}: {what} must be {wanted}, got {type(got).__name__}.")

    pair_of = "(kl, LagrangePenalty)"
    if not isinstance(constraints, list | tuple) or hasattr(constraints, "_fields"):
        refuse("kl_constraints", f"a list of pairs {pair_of}", constraints)
    for i, pair in enumerate(constraints):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            refuse(f"kl_constraints[{i}]", f"a pair {pair_of}", pair)
        if not isinstance(pair[1], LagrangePenalty):
            refuse(penalty.format(i), "of type LagrangePenalty", pair[1])
        if not isinstance(pair[1].per_dimension, bool):
            what = f"{penalty.format(i)}.per_dimension"
            wanted = "a Python bool, fixed while tracing"
            refuse(what, wanted, pair[1].per_dimension)

"""Contracts on shapes and dtypes, declared in annotations and kept by `checked`.

A public function annotates each array with a contract in the notation JAX uses to
print array types, with letters standing for sizes::

    f[]        a floating-point scalar
    i[]        an integer scalar
    b[T]       a boolean vector
    k[]        one random key, of the new style or the old
    f[A]       a floating-point vector; every `A` in one call is the same size
    f[T+1,A]   one more row than the `T` of the other arguments
    f[]|f[T]   either of the two
    f[...,A]   any leading axes; every `...` in one call is the same shape
    f[N,...]   any axes after the first, as of an ensemble of `N`

`checked` then does the rest, so that a body is only its equation. It

*   compiles the function once for each combination of shapes and dtypes, so that a
    call outside `jax.jit` is as cheap as any compiled call;
*   refuses wrong shapes and dtypes in words that name the argument, while tracing:
    compiled code holds no trace of the checks;
*   hands the body arrays of one floating dtype, at least 32 bits wide, and returns
    the promoted dtype of the floating-point arrays that came in. A Python scalar
    adapts to the arrays and never widens them.

An interval after a contract, as in `Annotated[Arg, "f[]", "[0, 1]"]`, bounds its
values. A Python number outside is refused. The value of an array is unknown while
tracing, so there a floating-point number outside becomes NaN.

The word "running" after a contract, as in `Annotated[Arg, "f[]", "running"]`, marks a
statistic that a state carries from call to call. It is at least 32 bits wide, coming in
and going out, and up to that width it has no say in the dtype of the result.

A parameter without a contract is a Python value, fixed while tracing. So is a Python
`bool` or `int` where the annotation names that type beside the contract. One that is
annotated `Literal[…]` must be one of the values listed.

A parameter may be a named tuple whose fields have contracts: each is then an argument
like any other, called `state.mean` in errors.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import GetAttrKey

from rlprims._contracts import Contract, Interval, Shape, mismatch
from rlprims._hints import vmap_hint

P = ParamSpec("P")
R = TypeVar("R")
# A caller may pass anything array-like and the body receives an `Array`. No one type
# says both, so type checkers are told nothing and the contract beside it says it all.
Arg = Any
Flag = Annotated[bool | Array, "b[]"]

_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex, type(None))
_NUMBERS = (int, float, np.number)
_WORDS = {
    "f": "floating-point",
    "i": "an integer",
    "b": "boolean",
    "k": "a random key",
}
_REMEDIES = {
    "f": "convert it with jnp.asarray({}, jnp.float32)",
    "i": "convert it with jnp.asarray({}, jnp.int32)",
    "b": "compare it, as in {} != 0",
    "k": "make one with jax.random.key(seed)",
}


def checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes `fn` keep the contracts in its annotations; see the top of this module."""
    read = _reader(fn)
    call = functools.cache(lambda: read().call())

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        return call()(*args, **kwargs)

    typing.cast(Any, wrapper).__contracts__ = lambda: read().contracts
    return wrapper


def checked_as(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns `checked`, under the name that a caller knows the function by."""

    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        fn.__name__ = name
        return checked(fn)

    return decorate


def bounded(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes `fn` refuse Python numbers outside its intervals, and nothing else.

    This is for what builds functions and has no arrays to compute with.
    """
    read = _reader(fn)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        read().refuse_out_of_bounds(read().bind(args, kwargs))
        return fn(*args, **kwargs)

    return wrapper


def _reader(fn: Callable[..., Any]) -> Callable[[], "_Checked"]:
    """Returns what reads the contracts of `fn` when first asked, to import quickly."""
    return functools.cache(lambda: _Checked(fn))


class _Checked:
    """A function with its contracts read."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.name = fn, fn.__name__
        self.signature = inspect.signature(fn)
        hints = typing.get_type_hints(fn, include_extras=True)
        parameters = self.signature.parameters
        self.records = {k: r for k in parameters if (r := _record(hints.get(k)))}
        self.inputs: dict[str, Contract] = {}
        for name in parameters:
            fields = _fields(name, self.records[name]) if name in self.records else {}
            for key, hint in (fields or {name: hints.get(name)}).items():
                if contract := Contract.of(hint):
                    self.inputs[key] = contract
        result = Contract.of(hints.get("return"))
        self.contracts = self.inputs | ({"return": result} if result else {})
        self.intervals = {k: c.interval for k, c in self.inputs.items() if c.interval}
        self.running = [k for k, c in self.inputs.items() if c.running]
        kept = self.running + _running_fields(hints.get("return"))
        self.kept = {GetAttrKey(k.split(".")[-1]) for k in kept}
        self.ints = [k for k in parameters if hints.get(k) is int]
        self.choices = {
            k: typing.get_args(hints[k])
            for k in parameters
            if typing.get_origin(hints.get(k)) is typing.Literal
        }
        self.keyword_only = [
            k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY
        ]
        self.defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty
        }

    def call(self) -> Callable[..., Any]:
        """Returns the function that stands in for the one given."""
        parameters = self.signature.parameters
        allowed, required = parameters.keys(), parameters.keys() - self.defaults.keys()
        positional = [name for name in parameters if name not in self.keyword_only]
        # A `bool` is fixed everywhere: where a number is wanted, so as to be refused.
        fixed = {
            name: {type(None), bool, *contract.fixed}
            for name, contract in self.inputs.items()
        }
        compiled = jax.jit(self.traced(), static_argnums=0)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(positional, args, strict=False)) | kwargs
            if len(given) != len(args) + len(kwargs) or not (
                required <= given.keys() <= allowed
            ):
                given = self.bind(args, kwargs)
            given = self.opened(given)
            self.refuse_out_of_bounds(given)
            self.refuse_what_is_no_int(given)
            self.refuse_what_is_no_choice(given)
            static, dynamic = [], {}
            for name, value in given.items():
                if name not in fixed or type(value) in fixed[name]:
                    static.append((name, type(value), value))  # as True equals 1
                elif type(value) is int and self.inputs[name].kind == "f":
                    dynamic[name] = float(value)  # it may be too long for an integer
                else:
                    dynamic[name] = value
            try:
                return compiled(tuple(static), dynamic)
            except (OverflowError, TypeError, ValueError) as error:
                self.refuse_what_is_no_array(given)
                if str(error).startswith(f"{self.name}: "):
                    # One of ours: raised anew, without JAX's frames and its notes.
                    raise type(error)(str(error)) from None
                raise

        return wrapper

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Pairs arguments with parameters as Python does; errors name the function."""
        try:
            return self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}.") from None

    def opened(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Replaces each named tuple by its fields."""
        flat = dict(given)
        for name, record in self.records.items():
            value: Any = flat.get(name)
            if isinstance(value, record):
                del flat[name]
                flat |= {f"{name}.{k}": x for k, x in value._asdict().items()}
            elif name in flat and (value is not None or not self.optional(name)):
                raise TypeError(
                    f"{self.name}: {name} must be of type {record.__name__}, got "
                    f"{type(value).__name__}."
                )
        return flat

    def closed(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Puts the fields of each named tuple together again."""
        given = {k: x for k, x in flat.items() if "." not in k}
        for name, record in self.records.items():
            fields = {
                k: flat[f"{name}.{k}"] for k in record._fields if f"{name}.{k}" in flat
            }
            if fields:
                given[name] = record(**fields)
        return given

    def traced(self) -> Callable[..., Any]:
        """Returns what is compiled: check, cast, compute, cast back."""

        def run(
            static: tuple[tuple[str, type, Any], ...], dynamic: dict[str, Any]
        ) -> Any:
            given = {name: value for name, _, value in static} | dynamic
            self.refuse_what_is_no_array(given)
            values = self.defaults | given
            arrays = {
                name: jnp.asarray(values[name])
                for name, contract in self.inputs.items()
                if values.get(name) is not None
                and type(values[name]) not in contract.fixed
            }
            self.check_dtypes(arrays, given)
            self.check_shapes(arrays, tuple(given))
            floats = [k for k in arrays if self.inputs[k].kind == "f"]
            wide = [k for k in floats if arrays[k].dtype.itemsize > 4]
            say = [k for k in floats if k not in self.running or k in wide]
            result, compute = _dtypes([arrays[k] for k in say or floats])
            cast = {
                name: _bounded(_cast(arrays[name], compute), self.inputs[name].interval)
                for name in floats
            }
            output = self.fn(**self.closed(given | arrays | cast))
            return jax.tree.map_with_path(
                lambda path, x: (
                    x if self.kept & {*path} else _restore(x, compute, result)
                ),
                output,
            )

        run.__name__ = run.__qualname__ = self.name
        return run

    def refuse_out_of_bounds(self, given: Mapping[str, Any]) -> None:
        for name, interval in self.intervals.items():
            value = given.get(name)
            if isinstance(value, _NUMBERS) and not interval.holds(value):
                raise ValueError(
                    f"{self.name}: {name} must be in {interval.text}, got {value}."
                )

    def refuse_what_is_no_array(self, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if name in self.inputs and not isinstance(value, _ARRAYS):
                raise TypeError(
                    f"{self.name}: {name} must be an array or a number, got "
                    f"{type(value).__name__}; convert it with jnp.asarray({name})."
                ) from None
            if name not in self.inputs and isinstance(value, jax.Array | np.ndarray):
                raise TypeError(
                    f"{self.name}: {name} must be fixed while tracing, got an array."
                ) from None
            if isinstance(value, np.ndarray) and value.dtype.kind in "OSUMm":
                raise TypeError(
                    f"{self.name}: {name} must be an array of numbers, got one of "
                    f"{value.dtype}."
                ) from None
            longest = jnp.iinfo(int)
            if type(value) is int and not longest.min <= value <= longest.max:
                raise ValueError(
                    f"{self.name}: {name} must fit into {longest.dtype}, got {value}."
                ) from None

    def refuse_what_is_no_int(self, given: Mapping[str, Any]) -> None:
        for name in self.ints:
            if name in given and type(given[name]) is not int:
                raise TypeError(
                    f"{self.name}: {name} must be a Python int, fixed while tracing, "
                    f"got {type(given[name]).__name__}."
                )

    def refuse_what_is_no_choice(self, given: Mapping[str, Any]) -> None:
        for name, choices in self.choices.items():
            value = given.get(name, choices[0])
            if type(value) is not type(choices[0]) or value not in choices:
                raise ValueError(
                    f"{self.name}: {name} must be one of "
                    f"{', '.join(map(repr, choices))}, got {value!r}."
                )

    def check_dtypes(
        self, arrays: Mapping[str, Array], given: Mapping[str, Any]
    ) -> None:
        for name, value in given.items():
            if name in self.inputs and value is None and not self.optional(name):
                raise TypeError(f"{self.name}: {name} must be an array, got None.")
        for name, array in arrays.items():
            kind = self.inputs[name].kind
            if not _has_kind(array, kind):
                raise TypeError(
                    f"{self.name}: {name} must be {_WORDS[kind]}, got {array.dtype}; "
                    f"{_REMEDIES[kind].format(name)}."
                )

    def check_shapes(self, arrays: Mapping[str, Array], order: tuple[str, ...]) -> None:
        shapes = {k: _shape(array, self.inputs[k].kind) for k, array in arrays.items()}
        problem = mismatch(self.inputs, shapes)
        if problem:
            hint = vmap_hint(self.name, self.signature, self.inputs, shapes, order)
            raise ValueError(f"{self.name}: {problem}{hint}")

    def optional(self, name: str) -> bool:
        return self.defaults.get(name, ...) is None


def _record(hint: Any) -> Any:
    """Returns the named tuple in a type hint, if its fields have contracts."""
    for kind in (hint, *typing.get_args(hint)):
        if hasattr(kind, "_fields") and any(
            map(Contract.of, _fields("", kind).values())
        ):
            return kind
    return None


def _fields(name: str, record: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(record, include_extras=True)
    return {f"{name}.{k}": hints[k] for k in record._fields}


def _running_fields(hint: Any) -> list[str]:
    """Returns the fields that are statistics, if `hint` is a named tuple of them."""
    fields = _fields("", record) if (record := _record(hint)) else {}
    return [k for k, x in fields.items() if (c := Contract.of(x)) and c.running]


def _is_new_key(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _has_kind(array: Array, kind: str) -> bool:
    integer = jnp.issubdtype(array.dtype, jnp.integer)
    match kind:
        case "f":  # an integer without a dtype of its own is a plain Python 0 or 1
            return jnp.issubdtype(array.dtype, jnp.floating) or (
                integer and array.weak_type
            )
        case "i":
            return integer
        case "b":
            return array.dtype == np.bool_
        case _:  # an old key is the raw bits of a new one
            return _is_new_key(array) or (array.dtype == np.uint32 and array.ndim > 0)


def _shape(array: Array, kind: str) -> Shape:
    old_key = kind == "k" and not _is_new_key(array)
    return array.shape[:-1] if old_key else array.shape


def _dtypes(floats: list[Array]) -> tuple[np.dtype | None, np.dtype | None]:
    """Returns the dtypes of the result and of the computation; `None` if all adapt."""
    strong = [array.dtype for array in floats if not array.weak_type]
    if not strong:
        return None, None
    with jax.numpy_dtype_promotion("standard"):
        result = functools.reduce(jnp.promote_types, strong)
    return result, result if result.itemsize >= 4 else np.dtype(np.float32)


def _cast(array: Array, compute: np.dtype | None) -> Array:
    # Times 1.0 makes a Python integer floating-point without giving it a dtype.
    return array * 1.0 if compute is None else array.astype(compute)


def _bounded(array: Array, interval: Interval | None) -> Array:
    return jnp.where(interval.holds(array), array, jnp.nan) if interval else array


def _restore(x: Any, compute: np.dtype | None, result: np.dtype | None) -> Any:
    if compute == result or getattr(x, "dtype", None) != compute:
        return x
    return x.astype(result)

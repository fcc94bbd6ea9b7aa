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

A parameter without a contract is a Python value, fixed while tracing. So is a Python
`bool` or `int` where the annotation names that type beside the contract. One that is
annotated `Literal[…]` must be one of the values listed.
"""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

P = ParamSpec("P")
R = TypeVar("R")
Shape = tuple[int, ...]
Sizes = dict[str, Any]  # what each letter, and `...`, stands for in one call

# A caller may pass anything array-like and the body receives an `Array`. No one type
# says both, so type checkers are told nothing and the contract beside it says it all.
Arg = Any
Flag = Annotated[bool | Array, "b[]"]

_DIM = r"(?:[A-Za-z]\w*(?:[+-]\d+)?|\d+)"
_SPEC = re.compile(rf"([fibk])\[((?:\.\.\.|{_DIM})(?:,{_DIM})*)?\]")
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


class Spec(NamedTuple):
    """One alternative of a contract, such as `f[T,A]`."""

    kind: str
    dims: tuple[str, ...]

    def bind(self, shape: Shape, sizes: Sizes) -> Sizes | None:
        """Returns `sizes` extended so that `shape` fits, or `None` if it cannot."""
        sizes, dims = dict(sizes), self.dims
        if dims[:1] == ("...",):
            dims = dims[1:]
            lead = shape[: max(len(shape) - len(dims), 0)]
            shape = shape[len(lead) :]
            if sizes.setdefault("...", lead) != lead:
                return None
        if len(shape) != len(dims):
            return None
        for dim, size in zip(dims, shape, strict=True):
            letter, sign, offset = re.split(r"([+-]|$)", dim, maxsplit=1)
            base = size - int(sign + (offset or "0"))
            wanted = int(letter) if letter.isdigit() else sizes.setdefault(letter, base)
            if base != wanted or base < 0:
                return None
        return sizes


class Interval(NamedTuple):
    """Bounds on values, such as `(0, 1]`."""

    text: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> "Interval":
        """Reads `text`; a mistake in it shows up when the module is imported."""
        if not re.fullmatch(r"[\[(][^,]+,[^,]+[\])]", text):
            raise ValueError(f"not an interval: {text!r}")
        low, high = text[1:-1].split(",")
        return cls(text, float(low), float(high))

    def holds(self, x: Any) -> Any:
        """Tells whether `x`, a number or an array, lies within; NaN does not."""
        above = x > self.low if self.text[0] == "(" else x >= self.low
        below = x < self.high if self.text[-1] == ")" else x <= self.high
        return above & below


class Contract(NamedTuple):
    """What one argument, or the result, must look like."""

    text: str
    specs: tuple[Spec, ...]
    fixed: tuple[type, ...] = ()  # Python types that stay Python values
    interval: Interval | None = None

    @property
    def kind(self) -> str:
        """The letter of the dtype, which all alternatives share."""
        return self.specs[0].kind

    @property
    def rank(self) -> int | None:
        """The largest rank allowed, `None` if any is."""
        if any("..." in spec.dims for spec in self.specs):
            return None
        return max(len(spec.dims) for spec in self.specs)

    @classmethod
    def parse(
        cls, text: str, interval: str = "", fixed: tuple[type, ...] = ()
    ) -> "Contract":
        """Reads `text`; a mistake in it shows up when the module is imported."""
        specs = []
        for part in text.split("|"):
            match = _SPEC.fullmatch(part)
            if match is None:
                raise ValueError(f"not a contract: {text!r}")
            specs.append(
                Spec(match[1], tuple(filter(None, (match[2] or "").split(","))))
            )
        if len({spec.kind for spec in specs}) > 1:
            raise ValueError(f"a contract has one dtype: {text!r}")
        bounds = Interval.parse(interval) if interval else None
        return cls(text, tuple(specs), fixed, bounds)

    @classmethod
    def of(cls, hint: Any) -> "Contract | None":
        """Reads the contract in a type hint, if there is one."""
        args = typing.get_args(hint)
        if hasattr(hint, "__metadata__"):
            named = typing.get_args(args[0])
            fixed = tuple(kind for kind in (bool, int) if kind in named)
            return cls.parse(*hint.__metadata__, fixed=fixed)
        return next(filter(None, map(cls.of, args)), None)  # as in Annotated[…] | None


def checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes `fn` keep the contracts in its annotations; see the top of this module."""
    return typing.cast(Callable[P, R], functools.wraps(fn)(_Checked(fn).call()))


def bounded(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes `fn` refuse Python numbers outside its intervals, and nothing else.

    This is for what builds functions and has no arrays to compute with.
    """
    contracts = _Checked(fn)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        contracts.refuse_out_of_bounds(contracts.bind(args, kwargs))
        return fn(*args, **kwargs)

    return wrapper


class _Checked:
    """A function with its contracts read."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.name = fn, fn.__name__
        self.signature = inspect.signature(fn)
        hints = typing.get_type_hints(fn, include_extras=True)
        contracts = {name: Contract.of(hint) for name, hint in hints.items()}
        self.contracts = {name: c for name, c in contracts.items() if c}
        parameters = self.signature.parameters
        self.inputs = {k: self.contracts[k] for k in parameters if k in self.contracts}
        self.intervals = {k: c.interval for k, c in self.inputs.items() if c.interval}
        self.ints = [k for k in parameters if hints.get(k) is int]
        self.choices = {
            k: typing.get_args(hints[k])
            for k in parameters
            if typing.get_origin(hints.get(k)) is typing.Literal
        }
        self.defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty
        }

    def call(self) -> Callable[..., Any]:
        """Returns the function that stands in for the one given."""
        parameters = self.signature.parameters
        allowed, required = parameters.keys(), parameters.keys() - self.defaults.keys()
        positional = [name for name in parameters if not self.keyword_only(name)]
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
            self.refuse_out_of_bounds(given)
            self.refuse_what_is_no_int(given)
            self.refuse_what_is_no_choice(given)
            static, dynamic = [], {}
            for name, value in given.items():
                if name not in fixed or type(value) in fixed[name]:
                    static.append((name, type(value), value))  # as True equals 1
                else:
                    dynamic[name] = value
            try:
                return compiled(tuple(static), dynamic)
            except (TypeError, ValueError) as error:
                self.refuse_what_is_no_array(given)
                if str(error).startswith(f"{self.name}: "):
                    # One of ours: raised anew, without JAX's frames and its notes.
                    raise type(error)(str(error)) from None
                raise

        typing.cast(Any, wrapper).__contracts__ = self.contracts
        return wrapper

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Pairs arguments with parameters as Python does; errors name the function."""
        try:
            return self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}.") from None

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
                if values[name] is not None and type(values[name]) not in contract.fixed
            }
            self.check_dtypes(arrays, given)
            self.check_shapes(arrays, tuple(given))
            floats = [k for k in arrays if self.inputs[k].kind == "f"]
            result, compute = _dtypes([arrays[k] for k in floats])
            cast = {
                name: _bounded(_cast(arrays[name], compute), self.inputs[name].interval)
                for name in floats
            }
            output = self.fn(**(given | arrays | cast))
            return jax.tree.map(lambda x: _restore(x, compute, result), output)

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
            if isinstance(value, np.ndarray) and value.dtype.kind in "OSUMm":
                raise TypeError(
                    f"{self.name}: {name} must be an array of numbers, got one of "
                    f"{value.dtype}."
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
            optional = self.defaults.get(name, ...) is None
            if name in self.inputs and value is None and not optional:
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
        problem = self.mismatch(shapes)
        if problem:
            raise ValueError(f"{self.name}: {problem}{self.vmap_hint(shapes, order)}")

    def mismatch(self, shapes: Mapping[str, Shape]) -> str:
        """Describes the first argument that breaks its contract; empty if none does."""
        sizes: Sizes = {}
        for name, shape in shapes.items():
            contract = self.inputs[name]
            bound = (spec.bind(shape, sizes) for spec in contract.specs)
            match = next((b for b in bound if b is not None), None)
            if match is None:
                known = [f"{k} = {v}" for k, v in sizes.items() if k in contract.text]
                where = f" with {', '.join(known)}" if known else ""
                return f"{name} has shape {shape}, expected {contract.text}{where}."
            sizes = match
        return ""

    def vmap_hint(self, shapes: Mapping[str, Shape], order: tuple[str, ...]) -> str:
        """Writes the `jax.vmap` call to make, if one extra leading axis is all."""
        batched = {
            name: shape
            for name, shape in shapes.items()
            if self.inputs[name].rank is not None
            and len(shape) == 1 + typing.cast(int, self.inputs[name].rank)
        }
        sizes = {shape[0] for shape in batched.values()}
        batched |= {  # of any rank, and as long as the batch
            name: shape
            for name, shape in shapes.items()
            if self.inputs[name].rank is None and {*shape[:1]} == sizes
        }
        peeled = dict(shapes) | {name: shape[1:] for name, shape in batched.items()}
        if len(sizes) != 1 or self.mismatch(peeled):
            return ""
        names = [name for name in self.signature.parameters if name in order]
        leading = dict(zip(self.signature.parameters, names, strict=False))
        args = [k for k, v in leading.items() if k == v and not self.keyword_only(k)]
        kwargs = [name for name in names if name not in args]
        bound = "".join(f", {k}={k}" for k in kwargs if k not in batched)
        axes = tuple(0 if name in batched else None for name in args)
        fn = f"functools.partial({self.name}{bound})" if bound else self.name
        in_axes = f", in_axes={axes}" if None in axes else ""
        passed = args + [f"{k}={k}" for k in kwargs if k in batched]
        call = f"jax.vmap({fn}{in_axes})({', '.join(passed)})"
        timed = any("T" in self.inputs[name].text for name in batched)
        other = " If time comes first, as in [T, B], map axis 1: in_axes=1, out_axes=1."
        return f" For a batch of {sizes.pop()}, use {call}.{other if timed else ''}"

    def keyword_only(self, name: str) -> bool:
        parameter = self.signature.parameters[name]
        return parameter.kind is inspect.Parameter.KEYWORD_ONLY


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

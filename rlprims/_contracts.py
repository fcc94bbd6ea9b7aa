"""The notation of contracts on shapes, dtypes and values, as `_checks` explains it."""

import re
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

Shape = tuple[int, ...]
Sizes = dict[str, Any]  # what each letter, and `...`, stands for in one call

_DIM = r"(?:[A-Za-z]\w*(?:[+-]\d+)?|\d+|\.\.\.)"
_SPEC = re.compile(rf"([fibk])\[(?!.*\.{{3}}.*\.{{3}})({_DIM}(?:,{_DIM})*)?\]")


class Spec(NamedTuple):
    """One alternative of a contract, such as `f[T,A]`."""

    kind: str
    dims: tuple[str, ...]

    def bind(self, shape: Shape, sizes: Sizes) -> Sizes | None:
        """Returns `sizes` extended so that `shape` fits, or `None` if it cannot."""
        sizes, dims = dict(sizes), self.dims
        if "..." in dims:
            start = dims.index("...")
            stop = start + max(len(shape) - len(dims) + 1, 0)
            if sizes.setdefault("...", shape[start:stop]) != shape[start:stop]:
                return None
            dims, shape = dims[:start] + dims[start + 1 :], shape[:start] + shape[stop:]
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
        """Reads `text`; a mistake in it shows up at the first call."""
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
    running: bool = False  # a statistic, kept in single precision at least

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
        """Reads `text`; a mistake in it shows up at the first call."""
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
            texts = [x for x in hint.__metadata__ if x != "running"]
            running = len(texts) < len(hint.__metadata__)
            return cls.parse(*texts, fixed=fixed)._replace(running=running)
        return next(filter(None, map(cls.of, args)), None)  # as in Annotated[…] | None


def mismatch(contracts: Mapping[str, Contract], shapes: Mapping[str, Shape]) -> str:
    """Describes the first argument that breaks its contract; empty if none does."""
    sizes: Sizes = {}
    for name, shape in shapes.items():
        contract = contracts[name]
        bound = (spec.bind(shape, sizes) for spec in contract.specs)
        match = next((b for b in bound if b is not None), None)
        if match is None:
            known = [f"{k} = {v}" for k, v in sizes.items() if k in contract.text]
            where = f" with {', '.join(known)}" if known else ""
            return f"{name} has shape {shape}, expected {contract.text}{where}."
        sizes = match
    return ""

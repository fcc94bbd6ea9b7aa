"""Array operations that the primitives are written in.

Each settles, in one place, a question that array code leaves open: what an index
beyond the end picks, which axes two arrays share, and what becomes of NaN in an entry
that counts for nothing.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked

__all__ = [
    "batched_index",
    "contain_nonfinite",
    "lhs_broadcast",
    "one_hot",
    "replace_masked",
]


def batched_index(values: Arg, indices: Arg, keepdims: bool = False) -> Array:
    r"""Picks one entry of the last axis for each index, such as an action's value.

    .. math::
        y_{...} = \text{values}_{...,\,\text{indices}_{...}}

    An index outside `[0, A)` is a mistake that cannot be refused while tracing. It
    does not count from the end nor fall on the nearest entry: it picks NaN, and passes
    no gradient. Integers and booleans have no NaN, so there it picks the lowest
    integer (the highest, if unsigned) or `True`.

    Args:
        values: what to pick from, `[...,A]`, of any dtype.
        indices: the entry to pick from each vector, integers `[...]`, in `[0, A)`.
        keepdims: whether to keep the last axis, at size 1; a Python `bool`.

    Returns:
        The entries, `[...]`, or `[...,1]` if `keepdims`, in the dtype and the units of
        `values`.

    Raises:
        ValueError: if the shape of `indices` is not that of the leading axes of
            `values`, or `A` is 0.
        TypeError: if `indices` is not an integer.

    Example:
        >>> q = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> batched_index(q, jnp.array([0, 1])).tolist()
        [1.0, 4.0]
        >>> batched_index(q, jnp.array([-1, 2])).tolist()
        [nan, nan]
    """
    values, indices = jnp.asarray(values), jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"batched_index: indices must be an integer, got {indices.dtype}; "
            "convert it with jnp.asarray(indices, jnp.int32)."
        )
    if values.shape[-1:] in ((), (0,)):
        raise ValueError(
            f"batched_index: values has shape {values.shape}, expected [...,A] with "
            "A > 0."
        )
    if indices.shape != values.shape[:-1]:
        raise ValueError(
            f"batched_index: indices has shape {indices.shape}, expected [...] with "
            f"... = {values.shape[:-1]}, as values has shape {values.shape}."
        )
    return _pick(values, indices, keepdims)


@functools.partial(jax.jit, static_argnames="keepdims")
def _pick(values: Array, indices: Array, keepdims: bool) -> Array:
    size = values.shape[-1]
    where = indices.astype(int)  # so that `size` fits, whatever the dtype was
    where = jnp.where((where >= 0) & (where < size), where, size)[..., None]
    picked = jnp.take_along_axis(values, where, axis=-1, mode="fill")
    return picked if keepdims else picked[..., 0]


def contain_nonfinite(value: Array, weight: Array) -> Array:
    """Replaces what is not finite by zero wherever its weight is zero.

    A product `weight * value` should ignore `value` where `weight` is zero, yet
    `0 * inf` and `0 * nan` are NaN, and so are their derivatives. Such values are
    common: a terminal state where no action is legal is worth `max(-inf) = -inf`, and
    padding can hold anything. A finite value is left alone, so that the derivative of
    the product with respect to the weight stays right.

    Args:
        value: an array of any shape.
        weight: an array that broadcasts against `value`.

    Returns:
        `value`, with zeros for NaN and infinities where `weight` is zero.

    Example:
        >>> value, weight = jnp.array([jnp.inf, 2.0]), jnp.array([0.0, 0.0])
        >>> (weight * contain_nonfinite(value, weight)).tolist()
        [0.0, 0.0]
    """
    return jnp.where((weight == 0) & ~jnp.isfinite(value), 0, value)


def weighted(value: Array, weight: Array) -> Array:
    """Multiplies, with nothing from where the weight is zero."""
    return weight * contain_nonfinite(value, weight)


def guarded(fn: Callable[[Array], Array], x: Array) -> Array:
    """Applies `fn`, with no gradient where the result is not finite.

    Such a result may yet be multiplied by zero, but a gradient of zero times a slope
    that is not finite would be NaN. The result may add axes to those of `x`, or lack
    the last of them.
    """
    result = fn(jax.lax.stop_gradient(x))
    added = tuple(range(x.ndim, result.ndim))
    finite = jnp.isfinite(result).all(axis=added)
    safe = fn(jnp.where(lhs_broadcast(finite, x), x, 0))
    return jnp.where(lhs_broadcast(finite, result), safe, result)


def lhs_broadcast(source: Arg, target: Arg) -> Array:
    """Appends axes of size 1 to `source` until it has the rank of `target`.

    NumPy aligns axes from the right. A reward or a mask of `[T, B]` goes with
    observations of `[T, B, ...]` from the left: this lines it up, ready to broadcast.

    Args:
        source: the array to extend, of any dtype; each of its axes must be as long as
            that axis of `target`, or have size 1.
        target: the array whose rank to reach; its values and dtype are not used.

    Returns:
        `source`, with axes of size 1 appended.

    Raises:
        ValueError: if the axes of `source` do not match the leading ones of `target`.

    Example:
        >>> lhs_broadcast(jnp.array([1.0, 2.0]), jnp.zeros((2, 3))).tolist()
        [[1.0], [2.0]]
    """
    _check_leading("lhs_broadcast", source=source, target=target)
    added = jnp.ndim(target) - jnp.ndim(source)
    return jnp.reshape(jnp.asarray(source), jnp.shape(source) + (1,) * added)


@checked
def one_hot(
    indices: Annotated[Arg, "i[...]"], num_classes: int, dtype: Any = jnp.float32
) -> Annotated[Array, "f[...,A]"]:
    r"""Encodes each index as a vector with a 1 at that index and zeros elsewhere.

    .. math::
        y_{...,a} = [\text{indices}_{...} = a]

    An index outside `[0, num_classes)` gives zeros everywhere, so that -1 can stand
    for "none", such as the action before the first.

    Args:
        indices: the indices to encode, `i[...]`, in `[0, num_classes)`.
        num_classes: the length of each vector, a Python `int`.
        dtype: the dtype of the result, which may be integer or boolean too.

    Returns:
        The vectors, `f[...,A]` with `A = num_classes`, or as `dtype` says.

    Raises:
        ValueError: if `num_classes` is negative.
        TypeError: if `indices` is not an integer, or `num_classes` no Python `int`.

    Example:
        >>> one_hot(jnp.array([1, -1]), 3).tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if num_classes < 0:
        raise ValueError(f"one_hot: num_classes must not be negative: {num_classes}.")
    # An index of 8 bits cannot be compared with 256 classes, so it is widened first.
    return jax.nn.one_hot(indices.astype(int), num_classes, dtype=dtype)


def replace_masked(data: Arg, replacement: Arg | None, mask: Arg) -> Array:
    """Replaces `data` where `mask` is true, as where padding or resets must not show.

    The mask covers leading axes: one of `[T, B]` replaces whole observations in data
    of `[T, B, ...]`. Data that is replaced has no effect, NaN included, and gets a
    gradient of exactly zero; so does a replacement that is not used.

    Args:
        data: an array of any shape and dtype.
        replacement: what to put there: an array of the shape of `data`, a scalar, or
            `None` for zeros.
        mask: true where to replace, boolean; each of its axes must be as long as that
            axis of `data`, or have size 1 and count for the whole of it.

    Returns:
        `data` with replacements, in its shape and the promoted dtype of the two.

    Raises:
        ValueError: if the shape of `replacement` is neither that of `data` nor `()`,
            or the axes of `mask` do not match the leading ones of `data`.
        TypeError: if `mask` is not boolean.

    Example:
        >>> data, mask = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([True, False])
        >>> replace_masked(data, None, mask).tolist()
        [[0.0, 0.0], [3.0, 4.0]]
    """
    data, mask = jnp.asarray(data), jnp.asarray(mask)
    new = jnp.zeros_like(data) if replacement is None else jnp.asarray(replacement)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"replace_masked: mask must be boolean, got {mask.dtype}; "
            "compare it, as in mask != 0."
        )
    if new.shape not in ((), data.shape):
        raise ValueError(
            f"replace_masked: replacement has shape {new.shape}, expected "
            f"{data.shape}, the shape of data, or ()."
        )
    _check_leading("replace_masked", mask=mask, data=data)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.where(lhs_broadcast(mask, data), new, data)


def best_value(q: Array, discount: Array, mask: Array | None) -> Array:
    """Returns the maximum over legal actions, finite where the discount is zero."""
    legal = q if mask is None else jnp.where(mask, q, -jnp.inf)
    return greatest(contain_nonfinite(legal, discount[..., None]))


def greatest(
    x: Array,
    axis: int = -1,
    *,
    where: Array | None = None,
    initial: float | None = None,
    keepdims: bool = False,
) -> Array:
    """Returns the maximum along an axis, NaN if there is one.

    That of XLA loses NaN in large arrays on CPUs.
    """
    top = jnp.max(x, axis, where=where, initial=initial, keepdims=keepdims)
    unknown = jnp.any(jnp.isnan(x), axis, where=where, keepdims=keepdims)
    return jnp.where(unknown, jnp.nan, top)


def root(x: Array) -> Array:
    """Returns the square root, whose derivative at zero is taken to be zero."""
    zero = jax.lax.stop_gradient(x)
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), zero)


def keep_where(mask: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """Puts zeros where `mask`, over leading axes, is false; `None` keeps everything.

    What is left out is cut off before anything is computed with it, so that not even
    NaN reaches a result or a gradient. Zero is also a valid action, key or discount.
    """
    if mask is None:
        return arrays
    return tuple(jnp.where(lhs_broadcast(mask, x), x, 0) for x in arrays)


def _check_leading(fn: str, **arrays: Array) -> None:
    """Checks that the first array has the leading axes of the second, or size 1."""
    (source, target), (short, full) = arrays, map(jnp.shape, arrays.values())
    pairs = zip(short, full, strict=False)
    if len(short) > len(full) or any(size not in (1, axis) for size, axis in pairs):
        raise ValueError(
            f"{fn}: {source} has shape {short}, expected leading axes of {full}, the "
            f"shape of {target}."
        )

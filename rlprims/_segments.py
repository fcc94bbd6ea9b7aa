"""Sums over the members of a group, or the tokens of a sequence, along the last axis.

`ids` say which segment each element belongs to, in `[0, N)` where the axis has `N`
elements, of which there may be fewer segments; any other makes what is computed for
that element NaN, and leaves it out of the rest. They need not be in order. Where they
are `None`, all of the axis is one segment.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from rlprims.arrays import greatest, keep_where


def known(
    values: Array, ids: Array | None, mask: Array | None
) -> tuple[Array, Array | None]:
    """Puts zeros where `mask` is false, for what may be NaN or no segment at all."""
    kept = keep_where(mask, values)[0]
    return kept, None if ids is None else keep_where(mask, ids)[0]


def totals(values: Array, ids: Array | None) -> Array:
    """Returns the sum over each segment, `[...,N]`, or `[...,1]` of the whole axis."""
    if ids is None:
        return jnp.sum(values, axis=-1, keepdims=True)
    return _by_segment(jax.ops.segment_sum, values, ids)


def highest(values: Array, ids: Array | None) -> Array:
    """Returns the largest of each segment, as `totals` does."""
    if ids is None:
        return greatest(values, initial=-jnp.inf, keepdims=True)
    return _by_segment(jax.ops.segment_max, values, ids)


def own(of_segments: Array, ids: Array | None, like: Array) -> Array:
    """Returns at each element what its segment has, in the shape of `like`."""
    if ids is None:
        return jnp.broadcast_to(of_segments, like.shape)
    size = of_segments.shape[-1]
    where = ids.astype(int)  # so that `size` fits, whatever the dtype was
    where = jnp.where((where >= 0) & (where < size), where, size)
    return jnp.take_along_axis(of_segments, where, axis=-1, mode="fill")


def own_total(values: Array, ids: Array | None) -> Array:
    """Returns at each element the sum over its segment."""
    return own(totals(values, ids), ids, values)


def counted(values: Array, mask: Array | None) -> Array:
    """Returns 1 for each element that counts and 0 for the others, in floats."""
    return jnp.ones_like(values) if mask is None else mask.astype(values.dtype)


def shares(counts: Array, ids: Array | None) -> Array:
    """Returns what part of its segment each element is: in sum 1 for each segment."""
    return counts / jnp.maximum(own_total(counts, ids), 1)


def number_of(counts: Array, ids: Array | None) -> Array:
    """Returns the number of segments of which anything counts."""
    return jnp.sum(totals(counts, ids) > 0, dtype=counts.dtype)


def own_mean(values: Array, ids: Array | None, mask: Array | None) -> Array:
    """Returns at each element the mean over what counts of its segment, or else 0."""
    (values,) = keep_where(mask, values)
    number = own_total(counted(values, mask), ids)
    return own_total(values, ids) / jnp.maximum(number, 1)


def centered(values: Array, ids: Array | None, mask: Array | None) -> Array:
    """Subtracts the mean of each segment: exactly 0 if all of it is the same.

    Values are taken relative to the highest of the segment first: these differences
    are exact where it matters, and so is a mean of zeros.
    """
    counting = values if mask is None else jnp.where(mask, values, -jnp.inf)
    start = jax.lax.stop_gradient(own(highest(counting, ids), ids, values))
    (below,) = keep_where(mask, values - start)
    (result,) = keep_where(mask, below - own_mean(below, ids, mask))
    return result


def _by_segment(reduce: Callable[..., Array], values: Array, ids: Array) -> Array:
    size = values.shape[-1]
    one = lambda values, ids: reduce(values, ids.astype(int), size)
    return jnp.vectorize(one, signature="(n),(n)->(n)")(values, ids)

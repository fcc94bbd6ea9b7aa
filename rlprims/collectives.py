"""Operations across the devices, or the batch, that a function is mapped over."""

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg

__all__ = ["AllSum"]


@dataclasses.dataclass(frozen=True)
class AllSum:
    r"""Sums an array over its axes, and over an axis that the caller is mapped over.

    .. math::
        y = \sum_{d} \sum_{i} x^{(d)}_i

    where :math:`d` runs over the devices, or the entries of the batch, of
    `axis_name`. A loss that normalises over a batch needs it, to see all of a batch
    that is split over devices.

    It is immutable and compares by value, so that it can be a static argument.

    Args:
        axis_name: the name of the mapped axis, of `jax.shard_map`, `jax.vmap` or
            `jax.pmap`, or a tuple of names; `None` to sum over no such axis. Not an
            integer, which JAX would take for an axis of the array.

    Raises:
        TypeError: if `axis_name` is an integer.

    Example:
        >>> AllSum()(jnp.array([1.0, 2.0])).item()
        3.0
        >>> per_row = jax.vmap(AllSum("batch"), axis_name="batch")
        >>> per_row(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [10.0, 10.0]
    """

    axis_name: Hashable | None = None

    def __post_init__(self) -> None:
        name = self.axis_name
        if any(
            isinstance(x, int) for x in (name if isinstance(name, tuple) else [name])
        ):
            raise TypeError(
                f"AllSum: axis_name must be the name of a mapped axis, got {name!r}."
            )

    def __call__(self, x: Arg, axis: int | Sequence[int] | None = None) -> Array:
        """Sums `x` over `axis`, and over the mapped axis.

        Args:
            x: an array of any shape, or a number; each of those mapped over has the
                same shape.
            axis: the axis or axes of `x` to sum over; `None` for all.

        Returns:
            The sum, in the dtype of `x`, and the same for everything mapped over;
            bfloat16 and float16 are added up in float32 and rounded once. Booleans and
            small integers are counted in 32 bits.

        Raises:
            TypeError: if `x` is not an array or a number.
            ValueError: if `x` has no such axis.
            NameError: if no axis of that name is mapped over.
        """
        dtype = getattr(x, "dtype", None)
        half = dtype in (jnp.bfloat16, jnp.float16)
        try:
            axes = axis if isinstance(axis, int | None) else tuple(axis)
            total = jnp.sum(x, axes, dtype=jnp.float32 if half else None)
            if self.axis_name is not None:
                total = jax.lax.psum(total, self.axis_name)
        except (NameError, TypeError, ValueError) as error:
            kinds = (NameError, TypeError, ValueError)
            kind = next(kind for kind in kinds if isinstance(error, kind))
            raise kind(f"AllSum: {error}") from None
        return total.astype(dtype) if half else total


def gathered(axis_name: Hashable | None, x: Array) -> Array:
    """Returns `x` of all along `axis_name`, on a first axis; the same for each.

    Unlike `jax.lax.all_gather`, `jax.shard_map` knows that it is the same.
    """
    if axis_name is None:
        return x[None]
    name = AllSum(axis_name).axis_name  # refused if it is none
    empty = jnp.zeros((jax.lax.axis_size(name), *x.shape), x.dtype)
    return jax.lax.psum(empty.at[jax.lax.axis_index(name)].set(x), name)


def maximum_over(axis_name: Hashable | None, x: Array) -> Array:
    """Returns the largest `x` along `axis_name`, held constant if it has a name."""
    if axis_name is None:
        return x
    return jax.lax.pmax(jax.lax.stop_gradient(x), AllSum(axis_name).axis_name)

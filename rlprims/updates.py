"""Updates that happen now and then, such as that of a target network.

Both functions compute with both trees and keep one, so they cost the same at every
step and can be compiled into one.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg, bounded
from rlprims.arrays import lhs_broadcast
from rlprims.trees import Tree, as_array, select

__all__ = ["conditional_update", "periodic_update"]


def conditional_update(new_tensors: Tree, old_tensors: Tree, is_time: Arg) -> Tree:
    """Replaces the arrays of a tree by new ones if it is time, and keeps them if not.

    Args:
        new_tensors: the tree of arrays to update to.
        old_tensors: the tree to update, of that structure, with the same shapes and
            dtypes. A Python number adapts to the dtype of the array it stands for.
        is_time: whether to update, boolean: a scalar, or an array whose shape starts
            the shape of every array in the trees, as for a population.

    Returns:
        `new_tensors` where it is time, `old_tensors` elsewhere. No array changes its
        dtype, and what is not taken has no effect, NaN included, and a gradient of
        exactly zero.

    Raises:
        ValueError: if the structures, or two shapes, differ.
        TypeError: if two dtypes differ, `is_time` is not boolean, or something is not
            an array.

    Example:
        >>> online, target = {"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}
        >>> conditional_update(online, target, is_time=False)["w"].tolist()
        [2.0]
    """
    trees = {"new_tensors": new_tensors, "old_tensors": old_tensors}
    return select("conditional_update", {"is_time": is_time}, trees)


@bounded
def periodic_update(
    new_tensors: Tree,
    old_tensors: Tree,
    steps: Arg,
    update_period: Annotated[Arg, "i[]|i[...]", "[1, 2147483647]"],
) -> Tree:
    """Replaces the arrays of a tree by new ones once in a number of steps.

    It is time wherever `steps` is a multiple of `update_period`, 0 included: so at the
    very first step too, where a counter starts from 0.

    Args:
        new_tensors: the tree of arrays to update to.
        old_tensors: the tree to update, of that structure, with the same shapes and
            dtypes. A Python number adapts to the dtype of the array it stands for.
        steps: how many steps there have been, an integer: a scalar, or an array whose
            shape starts the shape of every array in the trees, as for a population.
        update_period: the number of steps from one update to the next, an integer, at
            least 1: a scalar, or an array in the shape of `steps`. An array of it that
            is below 1 makes NaN of what is floating-point, and updates nothing else.

    Returns:
        `new_tensors` where it is time, `old_tensors` elsewhere, in the same dtypes.

    Raises:
        ValueError: if the structures, or two shapes, differ, `update_period` is a
            Python number below 1 or beyond 32 bits, or `steps` does not fit into the
            integers of JAX: 32 bits, or 64 if they are enabled.
        TypeError: if two dtypes differ, `steps` or `update_period` is not an integer,
            or something is not an array.

    Example:
        >>> online, target = {"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}
        >>> for steps in range(4):
        ...     print(periodic_update(online, target, steps, 3)["w"].tolist())
        [1.0]
        [2.0]
        [2.0]
        [1.0]
    """
    trees = {"new_tensors": new_tensors, "old_tensors": old_tensors}
    count, period = _integer("steps", steps), _integer("update_period", update_period)
    if period.shape not in ((), count.shape):
        raise ValueError(
            f"periodic_update: update_period has shape {period.shape}, expected that "
            f"of steps, {count.shape}, or ()."
        )
    updated = select("periodic_update", {"steps": _is_multiple(count, period)}, trees)
    if isinstance(update_period, int | np.integer):  # and so at least 1
        return updated
    return _or_nan(updated, period >= 1)


def _integer(name: str, x: Arg) -> Array:
    try:
        array = as_array("periodic_update", name, x)
    except OverflowError:  # of a Python integer
        array = jnp.zeros((), int)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"periodic_update: {name} must be an integer, got {array.dtype}; convert "
            f"it with jnp.asarray({name}, jnp.int32)."
        )
    if isinstance(x, int | np.integer | np.ndarray):
        widest = jnp.iinfo(array.dtype)
        if np.any((x < widest.min) | (x > widest.max)):
            raise ValueError(
                f"periodic_update: {name} must fit into {widest.dtype}, got {x}."
            )
    return array


@jax.jit
def _is_multiple(count: Array, period: Array) -> Array:
    """Tells whether `count` is a multiple of `period`, whatever their dtypes."""
    widest = jax.dtypes.canonicalize_dtype(np.uint64)  # holds both without their signs
    count, size = jnp.abs(count).astype(widest), jnp.maximum(period, 1).astype(widest)
    return (period >= 1) & (count % size == 0)


@jax.jit
def _or_nan(tree: Tree, valid: Array) -> Tree:
    """Makes NaN of floating-point numbers where `valid`, over leading axes, is not."""
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    kept = lambda x: jnp.where(lhs_broadcast(valid, x), x, jnp.nan)
    return jax.tree.map(lambda x: kept(x) if floats(x) else x, tree)

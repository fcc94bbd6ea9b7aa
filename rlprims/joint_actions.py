"""Actions made of several parts, chosen together: a direction and a force, say.

Where the parts are independent given the observation, log-probabilities add up, and
with them everything in `surrogates` and `kl_estimators` is ready for such actions.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["joint_log_prob"]


def joint_log_prob(log_probs: Any, *, batch_ndim: int) -> Array:
    r"""Adds up the log-probabilities of the parts of an action, chosen independently.

    .. math::
        \log \pi(a) = \sum_i \log \pi_i(a_i)

    The parts lie along the axes of each array behind the first `batch_ndim`, and in a
    tree of such arrays: of a discrete and a continuous choice, or of many agents.
    Entropies and divergences of independent parts add up in the same way. A part that
    an action does not have, such as where to move for one that does not, is 0.

    Args:
        log_probs: a tree of arrays, `f[...]` followed by any axes of parts, in nats.
        batch_ndim: the number of axes in `...`, which all arrays have in common; 0 for
            one action. A Python `int`.

    Returns:
        The sum for each action, `f[...]`, in the promoted dtype of the arrays; bfloat16
        and float16 are added up in float32 and rounded once.

    Raises:
        ValueError: if there is no array, or one does not start with the axes of the
            first.
        TypeError: if an array is not floating-point, or `batch_ndim` no Python `int`.

    Example:
        >>> log_probs = {"move": jnp.array([-1.0, -2.0]), "aim": jnp.full((2, 3), -0.5)}
        >>> joint_log_prob(log_probs, batch_ndim=1).tolist()
        [-2.5, -3.5]
    """
    parts = _parts(log_probs, batch_ndim)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*parts)
        wide = jnp.promote_types(dtype, jnp.float32)
        sums = [jnp.sum(x.astype(wide), axis=range(batch_ndim, x.ndim)) for x in parts]
    return functools.reduce(operator.add, sums).astype(dtype)


def _parts(log_probs: Any, batch_ndim: int) -> list[Array]:
    """Returns the arrays of a tree, checked."""
    if type(batch_ndim) is not int:
        raise TypeError(
            "joint_log_prob: batch_ndim must be a Python int, got "
            f"{type(batch_ndim).__name__}."
        )
    leaves = [
        (f"log_probs{jax.tree_util.keystr(path)}", jnp.asarray(x))
        for path, x in jax.tree.leaves_with_path(log_probs)
    ]
    if not leaves:
        raise ValueError("joint_log_prob: log_probs has no array in it.")
    lead = leaves[0][1].shape[:batch_ndim]
    for name, x in leaves:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"joint_log_prob: {name} must be floating-point, got {x.dtype}; "
                "convert it with jnp.asarray(x, jnp.float32)."
            )
        if x.ndim < batch_ndim or x.shape[:batch_ndim] != lead:
            raise ValueError(
                f"joint_log_prob: {name} has shape {x.shape}, expected {batch_ndim} "
                f"leading axes of {lead}."
            )
    return [x for _, x in leaves]

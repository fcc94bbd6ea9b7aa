"""What a recurrent network is given beside the features of an observation.

An agent that sees only part of the state remembers better if it is told what it just
did and what that earned.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import one_hot

__all__ = ["embed_oar"]


@checked
def embed_oar(
    features: Annotated[Arg, "f[...,D]"],
    action: Annotated[Arg, "i[...]"],
    reward: Annotated[Arg, "f[...]"],
    num_actions: int,
) -> Annotated[Array, "f[...,E]"]:
    r"""Appends the last action and reward to the features of an observation.

    .. math::
        y = \bigl[\, \text{features}, \; \text{one\_hot}(\text{action}), \;
            \tanh(\text{reward}) \,\bigr]

    The features are of the observation that the reward came with, and the action led
    to. On the first step of an episode there is neither action nor reward: give a
    reward of 0 and always the same action.

    Args:
        features: features of observations, `f[...,D]`.
        action: the actions before them, `i[...]`, in `[0, num_actions)`. Outside, the
            entries of the action are NaN.
        reward: the rewards of these actions, `f[...]`; squashed, so that a large one
            does not drown the features.
        num_actions: how many actions :math:`A` there are, a Python `int`, at least 1.

    Returns:
        The embeddings, `f[...,E]` with `E = D + A + 1`.

    Raises:
        ValueError: if a shape breaks its contract, or `num_actions` is below 1.
        TypeError: if `features` or `reward` is not floating-point, `action` is not an
            integer, or `num_actions` no Python `int`.

    Example:
        >>> embed_oar(jnp.array([0.5]), 1, 0.0, 3).tolist()
        [0.5, 0.0, 1.0, 0.0, 0.0]

    References:
        Kapturowski et al., `Recurrent Experience Replay in Distributed Reinforcement
        Learning <https://openreview.net/forum?id=r1lyTjAqYX>`_, 2019.
    """
    if num_actions < 1:
        raise ValueError(f"embed_oar: num_actions must be at least 1: {num_actions}.")
    encoded = one_hot(action, num_actions, features.dtype)
    taken = jnp.where(encoded.any(axis=-1, keepdims=True), encoded, jnp.nan)
    return jnp.concatenate([features, taken, jnp.tanh(reward)[..., None]], axis=-1)

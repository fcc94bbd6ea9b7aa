r"""Exploration that keeps to what it tries, so as to get further than one step.

An ε-greedy agent that tries something new mostly undoes it one step later. Here, an
action that was chosen at random is held for a random number of steps, most often one
and at times very many, before the agent decides anew.

What is held from step to step is a `HeldAction`, one for each environment.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import one_hot
from rlprims.categorical import draw, which_legal
from rlprims.distributions import epsilon_greedy_probs

__all__ = ["HeldAction", "temporally_extended_epsilon_greedy"]


class HeldAction(NamedTuple):
    """The action of the step before, and for how long to repeat it.

    Start with `HeldAction(jnp.full(shape, -1), jnp.zeros(shape, int))`, of the shape
    `()` for one environment.

    Attributes:
        action: the action of the step before, `i[...]`; -1 before the first.
        steps_left: for how many more steps to take it, `i[...]`, at least 0.
    """

    action: Annotated[Arg, "i[...]"]
    steps_left: Annotated[Arg, "i[...]"]


@checked
def temporally_extended_epsilon_greedy(
    key: Annotated[Arg, "k[]"],
    preferences: Annotated[Arg, "f[...,A]"],
    state: HeldAction,
    *,
    epsilon: Annotated[Arg, "f[]|f[...]", "[0, 1]"],
    max_duration: int,
    duration_exponent: Annotated[Arg, "f[]", "[0, inf)"] = 2.0,
    first: Annotated[Arg | None, "b[...]"] = None,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> tuple[Annotated[Array, "i[...]"], HeldAction]:
    r"""Draws actions that are greedy, or random and held for a while: εz-greedy.

    .. math::
        a_t = \begin{cases}
            a_{t-1} & \text{while a hold lasts, else} \\
            \text{a random action, for } n \text{ steps}
                & \text{with probability } \epsilon \\
            \text{a best action} & \text{otherwise,}
        \end{cases}
        \qquad P(n) \propto n^{-\mu}, \quad 1 \le n \le n_{\max}

    A hold lasts `n` steps in all, the first of them included, whatever the preferences
    become. It ends early where its action is no longer legal, or the episode: a new
    decision is made there and then. With :math:`n_{\max} = 1`, this is
    `epsilon_greedy`, which breaks ties between best actions at random too. The smaller
    :math:`\mu` is, the longer holds are; a zeta distribution, which has no
    :math:`n_{\max}`, needs one above 1.

    Args:
        key: a random key, `k[]`; one is enough for any number of environments.
        preferences: preferences, such as action values, `f[...,A]`.
        state: what was held after the step before.
        epsilon: the probability :math:`\epsilon` of a random action where none is held,
            `f[]|f[...]`, dimensionless, in `[0, 1]`.
        max_duration: the most steps :math:`n_{\max}` that an action is held for, a
            Python `int`, at least 1; a table of as many numbers is made at each step.
        duration_exponent: the exponent :math:`\mu` of durations, `f[]`, dimensionless,
            at least 0.
        first: whether this is the first step of an episode, `b[...]`, where nothing is
            held any more. It is nowhere if `None`.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The actions, `i[...]`, in `[0, A)`, or -1 where no action is legal, or a best
        one is wanted and a preference is NaN. And what to pass on to the next step: the
        same actions, `i[...]`, and how many more steps they are held for, `i[...]`.

    Raises:
        ValueError: if a shape breaks its contract, `epsilon` or `duration_exponent` is
            a Python number out of range, or `max_duration` is below 1.
        TypeError: if an argument has the wrong dtype, `state` is no `HeldAction`, or
            `max_duration` no Python `int`.

    Example:
        >>> key, q = jax.random.key(0), jnp.array([0.0, 1.0, 0.0])
        >>> action, state = temporally_extended_epsilon_greedy(
        ...     key, q, HeldAction(2, 3), epsilon=0.0, max_duration=100
        ... )
        >>> action.item(), state.steps_left.item()
        (2, 2)
        >>> action, state = temporally_extended_epsilon_greedy(
        ...     key, q, HeldAction(2, 0), epsilon=0.0, max_duration=100
        ... )
        >>> action.item(), state.steps_left.item()
        (1, 0)

    References:
        Dabney, Ostrovski and Barreto, `Temporally-Extended ε-Greedy Exploration
        <https://arxiv.org/abs/2006.01782>`_, 2020.
    """
    if max_duration < 1:
        raise ValueError(
            "temporally_extended_epsilon_greedy: max_duration must be at least 1: "
            f"{max_duration}."
        )
    numbers_key, action_key = jax.random.split(key)
    shape = (2, *preferences.shape[:-1])
    chance, quantile = jax.random.uniform(numbers_key, shape, preferences.dtype)
    explores, known = chance < epsilon, ~jnp.isnan(epsilon + duration_exponent)
    # As an ε of one or zero, which is NaN where a setting is out of range.
    switch = jnp.where(known, explores.astype(preferences.dtype), jnp.nan)
    probs = epsilon_greedy_probs(preferences, switch[..., None], mask)
    fresh = draw(action_key, jnp.log(probs))
    duration = _duration(quantile, duration_exponent, max_duration)
    duration = jnp.where(explores & (fresh >= 0), duration, 1)

    holds = _holds(state, which_legal(preferences, mask), first)
    action = jnp.where(holds, state.action.astype(int), fresh)
    steps_left = jnp.where(holds, state.steps_left.astype(int), duration) - 1
    return action, HeldAction(action, steps_left)


def _holds(state: HeldAction, legal: Array, first: Array | None) -> Array:
    """Tells where an action is held still."""
    possible = one_hot(state.action, legal.shape[-1], bool) & legal
    holds = (state.steps_left > 0) & possible.any(axis=-1)
    return holds if first is None else holds & ~first


def _duration(quantile: Array, exponent: Array, longest: int) -> Array:
    """Returns the greatest duration that more than this share of all attain."""
    durations = jnp.arange(longest, 0, -1, dtype=quantile.dtype)
    # The shares that attain each, the longest first: small numbers are added up first.
    attained = jnp.cumsum(jax.nn.softmax(-exponent * jnp.log(durations)))
    fewer = jnp.searchsorted(attained / attained[-1], quantile, side="right")
    return (longest - fewer).astype(int)

r"""Choices among arms whose rewards are only known by trying them.

A bandit has `A` arms, along the last axis, and pays a reward for each pull. What is
known of an arm is the mean of its rewards and how many there were. `ucb_scores` adds to
the mean how far the truth may lie above it: to pull the arm of the highest score is to
be optimistic where little is known.

Where rewards change with time, old ones mislead. `RecentPulls` remembers the last ones
alone, `update_recent_pulls` adds one, and `recent_means_and_counts` gives what
`ucb_scores` takes: together they are sliding-window UCB. Agent57 has such a bandit
choose between its policies, and at times pulls a random arm, which is `epsilon_greedy`
over the scores. One step of such a bandit is::

    scores = ucb_scores(*recent_means_and_counts(pulls, num_arms), exploration=1.0)
    arm = epsilon_greedy(0.5).sample(key, scores)
    pulls = update_recent_pulls(pulls, arm, reward)  # once the reward is known
"""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import lhs_broadcast, one_hot, root, weighted
from rlprims.categorical import which_legal

__all__ = [
    "RecentPulls",
    "recent_means_and_counts",
    "ucb_scores",
    "update_recent_pulls",
]


class RecentPulls(NamedTuple):
    """The last `W` pulls of a bandit, or of several along leading axes.

    Start with `RecentPulls(jnp.full(W, -1), jnp.zeros(W))`.

    Attributes:
        arms: which arms were pulled, `i[...,W]`, the oldest first; -1 for none yet.
        rewards: the reward of each pull, `f[...,W]`.
    """

    arms: Annotated[Arg, "i[...,W]"]
    rewards: Annotated[Arg, "f[...,W]", "running"]


@checked
def ucb_scores(
    mean_reward: Annotated[Arg, "f[...,A]"],
    count: Annotated[Arg, "f[...,A]", "[0, inf)"],
    *,
    exploration: Annotated[Arg, "f[]|f[...]", "[0, inf)"] = 2**0.5,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...,A]"]:
    r"""Computes upper confidence bounds of the mean rewards of arms, as in UCB1.

    .. math::
        \bar r_a + c \sqrt{\frac{\log N}{n_a}}, \qquad N = \sum_b n_b

    An arm that was never pulled scores infinity, so that each is tried once. UCB1 is
    the default, :math:`c = \sqrt 2`, for rewards between 0 and 1; for rewards in an
    interval of length :math:`B` it is :math:`c = B \sqrt 2`. The arm to pull is that of
    the highest score: `greedy` breaks ties at random, `jnp.argmax` takes the first.

    With a mask, :math:`N` counts pulls of legal arms alone.

    Args:
        mean_reward: the mean reward :math:`\bar r_a` of each arm, `f[...,A]`; that of
            an arm never pulled does not count, NaN included.
        count: how often each was pulled, `f[...,A]`, at least 0; discounted counts are
            fine.
        exploration: the width :math:`c` of the bounds, `f[]|f[...]`, in units of
            reward, at least 0.
        mask: whether each arm is legal, `b[...,A]`; all are if `None`. The others
            score minus infinity.

    Returns:
        The scores, `f[...,A]`, in units of reward.

    Raises:
        ValueError: if a shape breaks its contract, or `exploration` is a Python number,
            and negative or infinite.
        TypeError: if an argument is not floating-point, or `mask` is not boolean.

    Example:
        >>> mean_reward, count = jnp.array([0.5, 0.25, 0.0]), jnp.array([1.0, 0.0, 0.0])
        >>> ucb_scores(mean_reward, count).tolist()  # the logarithm of 1 is 0
        [0.5, inf, inf]

    References:
        Auer, Cesa-Bianchi and Fischer, `Finite-time Analysis of the Multiarmed Bandit
        Problem <https://doi.org/10.1023/A:1013689704352>`_, 2002.
    """
    legal = which_legal(count, mask)
    count = jnp.where(legal, count, 0)
    total, pulled = jnp.sum(count, axis=-1, keepdims=True), count != 0
    logs = jnp.log(jnp.maximum(total, 1))
    width = lhs_broadcast(exploration, count) * root(logs / jnp.where(pulled, count, 1))
    scores = jnp.where(pulled, mean_reward + width, jnp.inf)
    return jnp.where(legal, scores, -jnp.inf)


@checked
def update_recent_pulls(
    state: RecentPulls,
    arm: Annotated[Arg, "i[...]"],
    reward: Annotated[Arg, "f[...]"],
    *,
    mask: Annotated[Arg | None, "b[...]"] = None,
) -> RecentPulls:
    r"""Adds a pull to those that are remembered, and forgets the oldest.

    .. math::
        (x_1, \dots, x_W) \to (x_2, \dots, x_W, x), \qquad x = (\text{arm}, r)

    Args:
        state: the pulls before.
        arm: the arm that was pulled, `i[...]`, in `[0, A)`; a pull of any other takes
            its place among the last, and is no arm's.
        reward: its reward, `f[...]`.
        mask: whether there was a pull, `b[...]`, as where each of several bandits
            waits for an episode to end; the state stays where there was none. All
            count if `None`.

    Returns:
        The last pulls, with their arms, `i[...,W]`, and rewards, `f[...,W]`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype, or is no state.

    Example:
        >>> pulls = RecentPulls(jnp.full(2, -1), jnp.zeros(2))
        >>> for arm, reward in ((0, 1.0), (2, 5.0), (1, 3.0)):
        ...     pulls = update_recent_pulls(pulls, arm, reward)
        >>> pulls.arms.tolist(), pulls.rewards.tolist()
        ([2, 1], [5.0, 3.0])

    References:
        Garivier and Moulines, `On Upper-Confidence Bound Policies for Non-Stationary
        Bandit Problems <https://arxiv.org/abs/0805.3415>`_, 2008.
    """
    pulled = jnp.ones(arm.shape, bool) if mask is None else mask

    def shifted(old: Array, new: Array) -> Array:
        latest = new[..., None].astype(old.dtype)
        moved = jnp.concatenate([old[..., 1:], latest], axis=-1)
        return jnp.where(pulled[..., None], moved, old)

    return RecentPulls(shifted(state.arms, arm), shifted(state.rewards, reward))


@checked
def recent_means_and_counts(
    state: RecentPulls, num_arms: int
) -> tuple[Annotated[Array, "f[...,A]"], Annotated[Array, "f[...,A]"]]:
    r"""Computes the mean reward and the number of the recent pulls of each arm.

    .. math::
        n_a = \sum_{i = 1}^{W} [\text{arm}_i = a], \qquad
        \bar r_a = \frac{1}{n_a} \sum_{i = 1}^{W} [\text{arm}_i = a] \, r_i

    They are what `ucb_scores` takes, whose scores are then those of sliding-window UCB:
    of `t` pulls in all, :math:`\min(t, W)` are remembered, which is the sum of these
    counts. They are summed anew at each call, so that no error builds up and a reward
    of NaN is gone as soon as its pull is forgotten.

    Args:
        state: the last pulls, of which those of no arm in `[0, A)` are ignored.
        num_arms: how many arms there are, a Python `int`.

    Returns:
        The mean reward of each arm, `f[...,A]` with `A = num_arms`, in units of reward,
        which is 0 for an arm without a recent pull; and the number of its pulls,
        `f[...,A]`.

    Raises:
        ValueError: if a shape breaks its contract, or `num_arms` is negative.
        TypeError: if a field has the wrong dtype, `state` is no state, or `num_arms` no
            Python `int`.

    Example:
        >>> arms, rewards = jnp.array([-1, 1, 0, 1]), jnp.array([0.0, 3.0, 5.0, 4.0])
        >>> pulls = RecentPulls(arms, rewards)
        >>> mean_reward, count = recent_means_and_counts(pulls, 3)
        >>> mean_reward.tolist(), count.tolist()
        ([5.0, 3.5, 0.0], [1.0, 2.0, 0.0])

    References:
        Garivier and Moulines, `On Upper-Confidence Bound Policies for Non-Stationary
        Bandit Problems <https://arxiv.org/abs/0805.3415>`_, 2008.

        Puigdomènech Badia et al., `Agent57: Outperforming the Atari Human Benchmark
        <https://arxiv.org/abs/2003.13350>`_, 2020, for a bandit over policies.
    """
    if num_arms < 0:
        raise ValueError(
            f"recent_means_and_counts: num_arms must not be negative: {num_arms}."
        )
    picks = one_hot(state.arms, num_arms, state.rewards.dtype)
    rewards = weighted(state.rewards[..., None], picks)
    total, count = jnp.sum(rewards, axis=-2), jnp.sum(picks, axis=-2)
    return total / jnp.maximum(count, 1), count

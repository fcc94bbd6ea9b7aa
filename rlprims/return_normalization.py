r"""Scales of returns, to divide advantages, rewards or errors by.

A learning rate, or the weight of an entropy bonus, suits one scale of the rewards. What
to divide by differs in what it measures and in what it is applied to:

================================  ==========================  ========================
scale                             measures                    divides
================================  ==========================  ========================
`update_return_range`             5th to 95th percentile of   advantages (DreamerV3)
                                  returns, averaged
`scale_rewards`                   deviation of a running sum  rewards, before anything
                                  of discounted rewards       else sees them (PPO)
`return_based_scale`              deviation of the targets    temporal-difference
                                  of one step                 errors
================================  ==========================  ========================

None of them shifts: to subtract a number from rewards changes which policy is best
where episodes differ in length. `normalization` adapts the network instead, and leaves
the rewards as they are.
"""

from collections.abc import Hashable
from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import keep_where, root, weighted
from rlprims.collectives import gathered
from rlprims.moving_averages import merged
from rlprims.running_statistics import (
    RunningStatistics,
    merged_statistics,
    moments,
)

__all__ = [
    "ReturnRange",
    "RewardScale",
    "normalize_by_return_range",
    "return_based_scale",
    "scale_rewards",
    "update_return_range",
]


class ReturnRange(NamedTuple):
    """How widely returns are spread, averaged over batches.

    Start with `ReturnRange(0.0, 0.0)`.

    Attributes:
        range: the average distance of the two percentiles, `f[]`, in units of reward.
        weight: the sum of the weights of all batches so far, `f[]`, in `[0, 1]`: it is
            one minus the decay to the power of their number.
    """

    range: Annotated[Arg, "f[]", "running"]
    weight: Annotated[Arg, "f[]", "[0, 1]", "running"]


class RewardScale(NamedTuple):
    """Discounted sums of the rewards of each environment, and their statistics.

    Start with `RewardScale(jnp.zeros(shape))`, where there is one entry for each
    environment. As long as few sums have been seen, such as the first of a single
    environment, their variance may be far too small and the rewards come out large:
    clip them, or start with a mean and a variance that count for several.

    Attributes:
        total: the discounted sum of the rewards of the episode so far, times the
            discount that comes next, `f[...]`, in units of reward.
        mean: the mean of all such sums so far, `f[]`, in units of reward.
        variance: the mean square of their distance from it, `f[]`.
        count: how many there were, `f[]`, not negative.
    """

    total: Annotated[Arg, "f[...]", "running"]
    mean: Annotated[Arg, "f[]", "running"] = 0.0
    variance: Annotated[Arg, "f[]", "running"] = 0.0
    count: Annotated[Arg, "f[]", "[0, inf)", "running"] = 0.0


@checked
def update_return_range(
    state: ReturnRange,
    returns: Annotated[Arg, "f[...]"],
    *,
    decay: Annotated[Arg, "f[]", "[0, 1)"] = 0.99,
    low: Annotated[Arg, "f[]", "[0, 1]"] = 0.05,
    high: Annotated[Arg, "f[]", "[0, 1]"] = 0.95,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> ReturnRange:
    r"""Moves the average range of returns towards that of a batch.

    .. math::
        S_n = \frac{\sum_{i \le n} \text{decay}^{n - i} \bigl(
                \operatorname{Per}(R_i, \text{high}) -
                \operatorname{Per}(R_i, \text{low})\bigr)}
            {\sum_{i \le n} \text{decay}^{n - i}}

    The percentiles leave rare, large returns out, and are interpolated between the two
    nearest returns. The sum below makes the average unbiased from the first batch on;
    the authors' code starts from zero instead.

    Args:
        state: the average of the batches before.
        returns: returns :math:`R`, such as λ-returns, `f[...]`, in units of reward.
        decay: the weight of a batch relative to the next, `f[]`, in `[0, 1)`.
        low: where the range starts, `f[]`, a share of the returns, in `[0, 1]`.
        high: where it ends, `f[]`, a share of the returns, in `[0, 1]`.
        mask_t: whether each return counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`. If none does, the state stays.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the returns are split; `None` if they are not. They are gathered, so
            that the percentiles are those of all, exactly.

    Returns:
        The next range, `f[]`, and the next sum of weights, `f[]`.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of its range.
        TypeError: if an argument has the wrong dtype, or is no state.

    Example:
        >>> state = update_return_range(ReturnRange(0.0, 0.0), jnp.arange(101.0))
        >>> round(state.range.item(), 3)
        90.0

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    (start, end), number = _percentiles(returns, (low, high), mask_t, axis_name)
    kept = jnp.where(number > 0, decay, 1)
    weight = 1 - kept * (1 - state.weight)
    step = (1 - kept) / jnp.where(weight == 0, 1, weight)
    none = jnp.zeros_like(start)
    spread, _ = merged(state.range, none, end - start, none, step)
    return ReturnRange(spread, weight)


@checked
def normalize_by_return_range(
    state: ReturnRange,
    x: Annotated[Arg, "f[...]"],
    *,
    min_range: Annotated[Arg, "f[]", "(0, inf)"] = 1.0,
) -> Annotated[Array, "f[...]"]:
    r"""Divides advantages by the range of returns, unless that is small.

    .. math::
        \frac{x}{\max(\text{min\_range}, S)}

    Small returns are not blown up: where rewards are rare and all that an agent gets is
    noise, noise should stay small.

    Args:
        state: the range :math:`S` of returns, from `update_return_range`.
        x: advantages, or returns, `f[...]`, in units of reward.
        min_range: the least to divide by, `f[]`, in units of reward, positive.

    Returns:
        The scaled numbers, `f[...]`, which with the default are `x` before there are
        any returns.

    Raises:
        ValueError: if a shape breaks its contract, or `min_range` is a Python number
            that is not positive.
        TypeError: if an argument is not floating-point, or is no state.

    Example:
        >>> state = ReturnRange(jnp.array(4.0), jnp.array(0.5))
        >>> normalize_by_return_range(state, jnp.array([2.0, -8.0])).tolist()
        [0.5, -2.0]

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    unknown = jnp.isnan(state.weight)
    return x / jnp.where(unknown, jnp.nan, jnp.maximum(min_range, state.range))


@checked
def return_based_scale(
    r_t: Annotated[Arg, "f[...]"],
    discount_t: Annotated[Arg, "f[...]"],
    returns: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the typical size of temporal-difference errors, to divide them by.

    .. math::
        \sigma = \sqrt{\operatorname{Var}[R]
            + \operatorname{Var}[\gamma] \, \mathbb{E}[G^2]}

    It is known before anything is learnt: it is made of rewards, discounts and returns,
    and no prediction. Discounts vary where episodes end.

    Args:
        r_t: rewards :math:`R`, `f[...]`.
        discount_t: discounts :math:`\gamma`, `f[...]`, dimensionless, 0 at a
            termination.
        returns: returns :math:`G`, `f[...]`, in units of reward.
        mask_t: whether each step counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the steps are split; `None` if they are not.

    Returns:
        The scale, `f[]`, in units of reward; 0 where neither rewards nor discounts
        vary, as of a single step, or if no step counts. Bound it from below.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> r_t, discount_t = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0])
        >>> return_based_scale(r_t, discount_t, jnp.array([4.0, 4.0])).item()
        2.0

    References:
        Schaul et al., `Return-based Scaling: Yet Another Normalisation Trick for Deep
        RL <https://arxiv.org/abs/2105.05347>`_, 2021.
    """
    mask = None if mask_t is None else mask_t.ravel()
    of = lambda x: moments(x.ravel(), mask, axis_name)
    rewards, discounts, (mean, variance, _) = map(of, (r_t, discount_t, returns))
    return root(rewards.variance + discounts.variance * (variance + mean**2))


@checked
def scale_rewards(
    state: RewardScale,
    r_t: Annotated[Arg, "f[...]"],
    discount_t: Annotated[Arg, "f[...]"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf)"] = 1e-8,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    truncation_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> tuple[Annotated[Array, "f[...]"], RewardScale]:
    r"""Divides the rewards of one step by the deviation of sums of discounted rewards.

    .. math::
        S_t = \gamma_{t-1} S_{t-1} + r_t, \qquad
        y_t = \frac{r_t}{\sqrt{\operatorname{Var}[S_0, \dots, S_t] + \epsilon}}

    The sums run forwards in time, from the start of an episode. The variance is that of
    all sums so far in all environments, these included. Scan over time for a whole
    trajectory.

    Args:
        state: the sums of each environment so far, and their statistics.
        r_t: the reward of each environment, `f[...]`.
        discount_t: the discount after it, `f[...]`, dimensionless, in `[0, 1]`: 0 at a
            termination, where the sum starts anew.
        epsilon: what is added to the variance, `f[]`, in squared units of reward, not
            negative. With zero, rewards become 0 while there is no variance.
        mask_t: whether this step of each environment counts, `b[...]`: where it does
            not, the reward becomes 0 and the sum stays. All count if `None`.
        truncation_t: whether a time limit cut the episode after the step, `b[...]`:
            the sum starts anew. None was if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the environments are split; `None` if they are not.

    Returns:
        The scaled rewards, `f[...]`, dimensionless, and the next state, of which the
        sums are `f[...]`, and their mean, variance and count `f[]` each.

    Raises:
        ValueError: if a shape breaks its contract, or `epsilon` is a Python number
            below 0.
        TypeError: if an argument has the wrong dtype, or is no state.

    Example:
        >>> state = RewardScale(jnp.zeros(2))
        >>> rewards, state = scale_rewards(
        ...     state, jnp.array([1.0, 5.0]), jnp.ones(2), epsilon=0.0
        ... )
        >>> rewards.tolist(), state.total.tolist()
        ([0.5, 2.5], [1.0, 5.0])

    References:
        Engstrom et al., `Implementation Matters in Deep Policy Gradients: A Case Study
        on PPO and TRPO <https://arxiv.org/abs/2005.12729>`_, 2020.
    """
    r_t, discount_t = keep_where(mask_t, r_t, discount_t)
    sums = state.total + r_t
    mask = None if mask_t is None else mask_t.ravel()
    seen = moments(sums.ravel(), mask, axis_name)
    seen = merged_statistics(RunningStatistics(*state[1:]), seen)
    deviation = root(seen.variance + epsilon)
    scaled = r_t / jnp.where(deviation == 0, jnp.inf, deviation)
    after = (
        discount_t if truncation_t is None else jnp.where(truncation_t, 0, discount_t)
    )
    total = weighted(sums, after)
    total = total if mask_t is None else jnp.where(mask_t, total, state.total)
    return scaled, RewardScale(total, *seen)


def _percentiles(
    x: Array,
    shares: tuple[Array, ...],
    mask: Array | None,
    axis_name: Hashable | None,
) -> tuple[Array, Array]:
    """Returns percentiles of what counts, and how many that are; zeros of nothing."""
    x, one = keep_where(mask, x, jnp.ones_like(x))
    x, counts = gathered(axis_name, x), gathered(axis_name, one) > 0
    number = jnp.sum(counts)
    # What does not count comes last, and so does one more that is always there.
    last = jnp.where(number > 0, jnp.inf, 0).astype(x.dtype)
    ordered = jnp.sort(jnp.append(jnp.where(counts, x, last), last))
    places = jnp.stack(shares) * jnp.maximum(number - 1, 0).astype(x.dtype)
    below = jnp.floor(places).astype(int)
    above = jnp.minimum(below + 1, jnp.maximum(number - 1, 0))
    start, end = ordered[below], ordered[above]
    between = start + weighted(end - start, places - jnp.floor(places))
    unknown = jnp.isnan(x).any() | jnp.isnan(places)
    return jnp.where(unknown, jnp.nan, between), number

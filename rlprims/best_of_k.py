r"""Success within `k` attempts: how often, and rewards whose gradient raises it.

A model that may answer `k` times succeeds if one of its answers is right. Rewarding
every right answer raises the mean instead, which a policy maximises by giving one and
the same answer `k` times. `pass_at_k` measures success within `k` from any number of
samples; `pass_at_k_rewards` turns the rewards of these samples into ones whose policy
gradient is that of the best of `k`. Neither is biased.
"""

from typing import Annotated, Literal

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims._segments import centered, counted, known, own_total
from rlprims.arrays import keep_where

__all__ = ["pass_at_k", "pass_at_k_rewards"]


@checked
def pass_at_k(
    num_samples: Annotated[Arg, "i[...]"],
    num_correct: Annotated[Arg, "i[...]"],
    k: int,
) -> Annotated[Array, "f[...]"]:
    r"""Estimates how likely it is that one of `k` attempts succeeds.

    It is the fraction of subsets of :math:`k` samples that hold a correct one, which
    is an unbiased estimate. The obvious one, :math:`1 - (1 - c/n)^k`, is too low.

    .. math::
        1 - \binom{n - c}{k} \Big/ \binom{n}{k}
        = 1 - \prod_{i=0}^{k-1} \Bigl(1 - \frac{c}{n - i}\Bigr)

    It is computed in logarithms, so that a small probability keeps all its digits.

    Args:
        num_samples: how many attempts were made, :math:`n`, `i[...]`, at least `k`.
        num_correct: how many of them succeeded, :math:`c`, `i[...]`, in `[0, n]`.
        k: how many attempts are allowed, a Python `int` of at least 1.

    Returns:
        The estimates, `f[...]`, probabilities; NaN where `num_samples` is less than
        `k`, or `num_correct` not in `[0, n]`.

    Raises:
        ValueError: if a shape breaks its contract, or `k` is less than 1.
        TypeError: if a number is not an integer, or `k` no Python `int`.

    Example:
        >>> round(pass_at_k(4, 1, 2).item(), 4)  # three of the six pairs
        0.5

    References:
        Chen et al., `Evaluating Large Language Models Trained on Code
        <https://arxiv.org/abs/2107.03374>`_, 2021.
    """
    _check_k("pass_at_k", k)
    number, correct = num_samples.astype(float), num_correct.astype(float)
    left = jnp.maximum(number[..., None] - _up_to(k, number), 1)
    fractions = jnp.clip(correct[..., None] / left, 0, 1)
    estimate = -jnp.expm1(jnp.sum(jnp.log1p(-fractions), axis=-1))
    within = (correct >= 0) & (correct <= number) & (number >= k)
    return jnp.where(within, estimate, jnp.nan)


@checked
def pass_at_k_rewards(
    rewards: Annotated[Arg, "f[...,N]"],
    group_ids: Annotated[Arg | None, "i[...,N]"] = None,
    *,
    k: int,
    baseline: Literal["none", "leave_one_out"] = "leave_one_out",
    mask: Annotated[Arg | None, "b[...,N]"] = None,
) -> Annotated[Array, "f[...,N]"]:
    r"""Computes rewards whose policy gradient is that of the best of `k` samples.

    The policy gradient of the largest of :math:`k` rewards, which is pass@k where
    rewards are 0 or 1, is estimated from all subsets of :math:`k` of the :math:`n`
    samples of a group:

    .. math::
        s_i = \binom{n}{k}^{-1} \sum_{i \in I,\, |I| = k}
            \Bigl(\max_{j \in I} r_j - b_{I,i}\Bigr), \qquad
        \mathbb{E}\Bigl[\sum_i s_i \nabla \log \pi(x_i)\Bigr]
            = \nabla \, \mathbb{E}\Bigl[\max_{j \le k} r_j\Bigr]

    where :math:`b` is 0 without a baseline. With it, :math:`b_{I,i}` is the largest
    reward of the others in :math:`I`, so that a sample is rewarded for being better
    than those with which it was drawn; the paper calls this "loo minus one". For
    `k = 1` there are no others in :math:`I`, and the baseline is the mean of the rest
    of the group, as in `leave_one_out_advantages`.

    They go into a policy gradient as they are, added up over the samples of a group.
    The time it takes grows with the square of the last axis: prefer a row for each
    group to one long row.

    Args:
        rewards: the reward of each sample, `f[...,N]`.
        group_ids: the group of each sample, `i[...,N]`, in `[0, N)`; outside, the
            result is NaN. Each row is a group if `None`.
        k: how many attempts are allowed, a Python `int` of at least 1.
        baseline: `"leave_one_out"` to subtract the best of the others, which leaves
            the expected gradient as it is, or `"none"`.
        mask: whether each sample counts, `b[...,N]`: the others are as if left out,
            NaN included. All count if `None`.

    Returns:
        The rewards, `f[...,N]`, in the units of `rewards`; 0 where masked, and in a
        group of fewer than `k` samples, of which there is no subset.

    Raises:
        ValueError: if a shape breaks its contract, `k` is less than 1, or `baseline`
            is unknown.
        TypeError: if `rewards` are not floating-point, `group_ids` no integers, or
            `k` no Python `int`.

    Example:
        >>> pass_at_k_rewards(jnp.array([0.0, 0.0, 3.0]), k=2).tolist()
        [0.0, 0.0, 2.0]
        >>> plain = pass_at_k_rewards(jnp.array([0.0, 0.0, 3.0]), k=2, baseline="none")
        >>> plain.tolist()
        [1.0, 1.0, 2.0]

    References:
        Walder and Karkhanis, `Pass@K Policy Optimization: Solving Harder
        Reinforcement Learning Problems <https://arxiv.org/abs/2505.15201>`_, 2025.
    """
    _check_k("pass_at_k_rewards", k)
    rewards, group_ids = known(rewards, group_ids, mask)
    number = own_total(counted(rewards, mask), group_ids)
    below = _below(rewards, group_ids, mask)
    rank = jnp.sum(below, axis=-1, dtype=rewards.dtype)
    if baseline == "none":
        others = (rewards * _portion(rank - 1, number, k, 2))[..., None, :]
        best = jnp.sum(jnp.where(below.mT, others, 0), axis=-1)
        result = rewards * _portion(rank, number, k, 1) + best
    elif k == 1:
        result = centered(rewards, group_ids, mask) / jnp.maximum(number - 1, 1)
    else:
        portion = _portion(rank, number, k, 2)[..., None, :]
        lead = rewards[..., :, None] - rewards[..., None, :]
        result = jnp.sum(jnp.where(below, portion * lead, 0), axis=-1)
    # Nothing is below or above NaN, so that it must be brought back to the result.
    unknown = jnp.isnan(own_total(rewards, group_ids))
    result = jnp.where(number < k, 0, jnp.where(unknown, jnp.nan, result))
    return keep_where(mask, result)[0]


def _below(values: Array, ids: Array | None, mask: Array | None) -> Array:
    """Tells at `[..., i, j]` whether j counts, in the group of i, and ranks below it.

    Of equal values the first ranks lower.
    """
    pair = lambda x: (x[..., :, None], x[..., None, :])
    one, other = pair(values)
    lead = (None,) * (values.ndim - 1)
    earlier = jnp.tri(values.shape[-1], k=-1, dtype=bool)[lead]
    below = (other < one) | ((other == one) & earlier)
    for group in (ids, mask):
        if group is not None:
            mine, its = pair(group)
            below &= mine == its
    return below


def _portion(below: Array, number: Array, k: int, fixed: int) -> Array:
    """Returns the portion of all subsets of `k` that consist of samples `below`.

    But for `fixed` samples that are given: C(below, k - fixed) / C(number, k).
    """
    if k < fixed:
        return jnp.zeros_like(below)
    i = _up_to(k, below)
    among = jnp.where(i < fixed, k - i, below[..., None] - (i - fixed))
    return jnp.prod(among / jnp.maximum(number[..., None] - i, 1), axis=-1)


def _up_to(k: int, like: Array) -> Array:
    """Returns 0, 1, ..., k - 1 along an axis after those of `like`."""
    return jnp.arange(k, dtype=like.dtype).reshape(*(1 for _ in like.shape), k)


def _check_k(fn: str, k: int) -> None:
    if k < 1:
        raise ValueError(f"{fn}: k must be at least 1, got {k}.")

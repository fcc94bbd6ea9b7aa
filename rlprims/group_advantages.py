r"""Advantages of whole samples against one another, in place of a learnt critic.

A language model answers each prompt several times, and each answer gets one reward.
How good an answer is, compared with the others to the same prompt, is its advantage:

=================================  ==================================================
function                           advantage of sample `i` of a group
=================================  ==================================================
`group_relative_advantages`        `(r_i - mean(r)) / std(r)`: GRPO
`group_centered_advantages`        `r_i - mean(r)`: Dr. GRPO
`leave_one_out_advantages`         `r_i - mean of the others`: RLOO
`reinforce_plus_plus_advantages`   over the whole batch, token by token: REINFORCE++
=================================  ==================================================

Samples lie along the last axis. Where every prompt has as many samples, each row is a
group. Where they differ, the samples of all prompts lie in one row, in any order, with
`group_ids`: numbers in `[0, N)`, where the row has `N` samples. A sample with any other
number belongs to no group, and its advantage is NaN.

A group whose rewards are all the same says nothing about which answer is better: its
advantages are exactly 0, whatever the rounding of a mean. So is that of a sample which
has no other to be compared with. `mask` leaves samples out, as if they had not been
drawn.
"""

from collections.abc import Hashable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims._segments import (
    centered,
    counted,
    highest,
    known,
    own,
    own_total,
    totals,
)
from rlprims.arrays import keep_where
from rlprims.standardization import standardize_advantages, standardized

__all__ = [
    "group_centered_advantages",
    "group_relative_advantages",
    "leave_one_out_advantages",
    "reinforce_plus_plus_advantages",
]


@checked
def group_centered_advantages(
    rewards: Annotated[Arg, "f[...,N]"],
    group_ids: Annotated[Arg | None, "i[...,N]"] = None,
    *,
    mask: Annotated[Arg | None, "b[...,N]"] = None,
) -> Annotated[Array, "f[...,N]"]:
    r"""Computes how far each reward is above the mean of its group, as Dr. GRPO does.

    Unlike `group_relative_advantages` it does not divide by the standard deviation,
    which would give prompts that are nearly always, or nearly never, answered well a
    larger weight than the others.

    .. math::
        A_i = r_i - \frac{1}{|G|} \sum_{j \in G} r_j

    where :math:`G` is the group of sample :math:`i`.

    Args:
        rewards: the reward of each sample, `f[...,N]`.
        group_ids: the group of each sample, `i[...,N]`, in `[0, N)`; outside, the
            advantage is NaN. Each row is a group if `None`.
        mask: whether each sample counts, `b[...,N]`: the others are as if left out,
            NaN included. All count if `None`.

    Returns:
        The advantages, `f[...,N]`, in units of reward; 0 where masked.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `rewards` are not floating-point, or `group_ids` no integers.

    Example:
        >>> group_centered_advantages(jnp.array([1.0, 0.0, 0.0, 3.0])).tolist()
        [0.0, -1.0, -1.0, 2.0]

    References:
        Liu et al., `Understanding R1-Zero-Like Training: A Critical Perspective
        <https://arxiv.org/abs/2503.20783>`_, 2025.
    """
    rewards, group_ids = known(rewards, group_ids, mask)
    return centered(rewards, group_ids, mask)


@checked
def group_relative_advantages(
    rewards: Annotated[Arg, "f[...,N]"],
    group_ids: Annotated[Arg | None, "i[...,N]"] = None,
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf]"] = 0.0,
    ddof: Literal[0, 1] = 0,
    mask: Annotated[Arg | None, "b[...,N]"] = None,
) -> Annotated[Array, "f[...,N]"]:
    r"""Computes rewards standardised within their group, as GRPO does.

    .. math::
        A_i = \frac{r_i - \bar r_G}{\sigma_G + \epsilon}, \qquad
        \bar r_G = \frac{1}{|G|} \sum_{j \in G} r_j, \qquad
        \sigma_G^2 = \frac{1}{|G| - \text{ddof}} \sum_{j \in G} (r_j - \bar r_G)^2

    where :math:`G` is the group of sample :math:`i`. The advantage is 0 where the
    standard deviation is.

    The paper divides by "the standard deviation", without :math:`\epsilon`, as is the
    default here. Much code divides by the sample's, `ddof=1`, and adds 1e-4 or 1e-6.
    For groups that are split over devices see `standardize_advantages_by_group`.

    Args:
        rewards: the reward of each sample, `f[...,N]`.
        group_ids: the group of each sample, `i[...,N]`, in `[0, N)`; outside, the
            advantage is NaN. Each row is a group if `None`.
        epsilon: what to add to the standard deviation, `f[]`, in units of reward, not
            negative.
        ddof: what to take off the number of samples in the variance, 0 or 1, fixed
            while tracing.
        mask: whether each sample counts, `b[...,N]`: the others are as if left out,
            NaN included. All count if `None`.

    Returns:
        The advantages, `f[...,N]`, dimensionless; 0 where masked.

    Raises:
        ValueError: if a shape breaks its contract, `epsilon` is a Python number below
            0, or `ddof` neither 0 nor 1.
        TypeError: if `rewards` are not floating-point, or `group_ids` no integers.

    Example:
        >>> rewards, ids = jnp.array([1.0, 5.0, 3.0, 5.0]), jnp.array([0, 1, 0, 1])
        >>> group_relative_advantages(rewards, ids).tolist()
        [-1.0, 0.0, 1.0, 0.0]

    References:
        Shao et al., `DeepSeekMath: Pushing the Limits of Mathematical Reasoning in
        Open Language Models <https://arxiv.org/abs/2402.03300>`_, 2024, section 4.1.2.
    """
    rewards, group_ids = known(rewards, group_ids, mask)

    def pooled(kind: str, x: Array) -> Array:
        of_group = totals if kind == "sum" else highest
        return own(of_group(x, group_ids), group_ids, x)

    return standardized(rewards, pooled, epsilon, ddof, mask)


@checked
def leave_one_out_advantages(
    rewards: Annotated[Arg, "f[...,N]"],
    group_ids: Annotated[Arg | None, "i[...,N]"] = None,
    *,
    mask: Annotated[Arg | None, "b[...,N]"] = None,
) -> Annotated[Array, "f[...,N]"]:
    r"""Computes how far each reward is above the mean of the others, as RLOO does.

    The others know nothing of this sample, so that their mean is a baseline which
    leaves the expected policy gradient as it is. The mean of all, which
    `group_centered_advantages` takes off, shrinks it by :math:`1 - 1/|G|`.

    .. math::
        A_i = r_i - \frac{1}{|G| - 1} \sum_{j \in G,\, j \ne i} r_j

    where :math:`G` is the group of sample :math:`i`. A sample without others has no
    baseline, and its advantage is 0: it is not learnt from.

    Args:
        rewards: the reward of each sample, `f[...,N]`.
        group_ids: the group of each sample, `i[...,N]`, in `[0, N)`; outside, the
            advantage is NaN. Each row is a group if `None`.
        mask: whether each sample counts, `b[...,N]`: the others are as if left out,
            NaN included. All count if `None`.

    Returns:
        The advantages, `f[...,N]`, in units of reward; 0 where masked.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `rewards` are not floating-point, or `group_ids` no integers.

    Example:
        >>> leave_one_out_advantages(jnp.array([1.0, 2.0, 6.0])).tolist()
        [-3.0, -1.5, 4.5]

    References:
        Ahmadian et al., `Back to Basics: Revisiting REINFORCE-Style Optimization for
        Learning from Human Feedback in LLMs <https://arxiv.org/abs/2402.14740>`_,
        2024.
        Kool et al., `Buy 4 REINFORCE Samples, Get a Baseline for Free!
        <https://openreview.net/forum?id=r1lgTGL5DE>`_, 2019.
    """
    rewards, group_ids = known(rewards, group_ids, mask)
    number = own_total(counted(rewards, mask), group_ids)
    scale = number / jnp.maximum(number - 1, 1)
    return scale * centered(rewards, group_ids, mask)


@checked
def reinforce_plus_plus_advantages(
    rewards: Annotated[Arg, "f[...]"],
    kl_t: Annotated[Arg, "f[...,T]"],
    *,
    beta: Annotated[Arg, "f[]", "[0, inf]"],
    epsilon: Annotated[Arg, "f[]", "[0, inf]"] = 0.0,
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[...,T]"]:
    r"""Computes advantages of tokens, standardised over the batch, as REINFORCE++ does.

    The reward comes after the last token, and each token costs its divergence from the
    reference policy. What is left to earn at a token is standardised over all tokens
    of all sequences, whatever their prompt.

    .. math::
        A_t = \frac{R_t - \bar R}{\sigma_R + \epsilon}, \qquad
        R_t = r - \beta \sum_{s=t}^{T} \text{kl}_s

    The variant with a baseline takes `group_centered_advantages` for rewards. Where
    all returns are the same the advantages are 0.

    Args:
        rewards: the reward of each sequence, `f[...]`.
        kl_t: estimated divergence of the policy from the reference at each token,
            `f[...,T]`, in nats; see `kl_estimators`.
        beta: what a nat costs, `f[]`, in units of reward, not negative.
        epsilon: what to add to the standard deviation, `f[]`, in units of reward, not
            negative; the paper adds nothing.
        mask_t: whether each token counts, `b[...,T]`: the others, such as prompts and
            padding, are as if left out, NaN included. All count if `None`.
        axis_name: the mapped axis, or axes, over which the batch is split; `None` if
            it is not.

    Returns:
        The advantages, `f[...,T]`, dimensionless; 0 where masked.

    Raises:
        ValueError: if a shape breaks its contract, or `beta` or `epsilon` is a Python
            number below 0.
        TypeError: if an argument is not floating-point.

    Example:
        >>> rewards, kl = jnp.array([1.0, 3.0]), jnp.zeros((2, 2))
        >>> reinforce_plus_plus_advantages(rewards, kl, beta=0.1).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]

    References:
        Hu, `REINFORCE++: A Simple and Efficient Approach for Aligning LLMs
        <https://arxiv.org/abs/2501.03262>`_, 2025.
    """
    (kl_t,) = keep_where(mask_t, kl_t)
    costs = beta * jax.lax.cumsum(kl_t, axis=kl_t.ndim - 1, reverse=True)
    returns = rewards[..., None] - costs
    return standardize_advantages(
        returns, epsilon=epsilon, mask_t=mask_t, axis_name=axis_name
    )

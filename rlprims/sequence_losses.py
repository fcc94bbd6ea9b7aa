r"""Policy losses of sequences of tokens, which weigh a whole sequence by one ratio.

A language model is rewarded for a sequence. Rather than that of each token, as in
`token_losses`, these losses take one ratio for all, the geometric mean of
:math:`\rho_t = \pi(y_t) / \mu(y_t)`, and differ in what they clip:

===================  =================================================================
loss                 for an advantage `A`
===================  =================================================================
`gspo_loss`          `-A exp(clip(mean of log ρ_t))`
`gspo_token_loss`    the same value, with a gradient for each token's own advantage
`gmpo_loss`          `-A exp(mean of clip(log ρ_t))`
===================  =================================================================

Where each row is a sequence, `mask_t` tells its tokens from prompt and padding. Where
sequences are packed into one row, `segment_ids`, numbers in `[0, T)`, tell them apart.
An advantage belongs to a row, `f[...]`, or to a token, `f[...,T]`. By default
advantages and `behaviour_log_prob_t` are constants when differentiating, so that on
the policy's own samples the latter may be `log_prob_t` itself.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims._segments import counted, known, number_of, own_mean, shares
from rlprims.arrays import keep_where, weighted
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced
from rlprims.surrogates import (
    clip_range,
    clipped_objective,
    log_ratios_and_advantages,
    ratios,
)
from rlprims.token_losses import per_token

__all__ = ["gmpo_loss", "gspo_loss", "gspo_token_loss"]


@checked
def gmpo_loss(
    log_prob_t: Annotated[Arg, "f[...,T]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...,T]"],
    adv: Annotated[Arg, "f[...]|f[...,T]"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf]"] = 0.4,
    epsilon_high: Annotated[Arg | None, "f[]", "[0, inf]"] = None,
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    segment_ids: Annotated[Arg | None, "i[...,T]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...,T]"]:
    r"""Computes the loss of GMPO, of the geometric mean of clipped ratios.

    A geometric mean over a sequence is less sensitive to the ratio of one token than
    the arithmetic mean that GRPO takes, which allows a wider clip. That is in
    logarithms here: ratios count up to :math:`e^{\pm\epsilon}`.

    .. math::
        L = -A \exp\Bigl(\frac{1}{|y|} \sum_t l_t\Bigr), \qquad
        l_t = \begin{cases}
            \min(\log \rho_t, \epsilon_\text{high}) & A \ge 0 \\
            \max(\log \rho_t, -\epsilon) & A < 0
        \end{cases}

    Args:
        log_prob_t: log-probability of each token under the policy to improve,
            `f[...,T]`, in nats.
        behaviour_log_prob_t: that under the policy that drew it, `f[...,T]`, in nats.
        adv: advantage of each sequence, `f[...]|f[...,T]`: the same for all tokens of
            one.
        epsilon: how far a token's log-ratio may usefully go down, `f[]`, in nats, not
            negative.
        epsilon_high: how far it may go up, `f[]`, in nats; `epsilon` if `None`.
        mask_t: whether each token counts, `b[...,T]`: the others are as if left out,
            NaN included. All count if `None`.
        segment_ids: the sequence of each token in its row, `i[...,T]`, in `[0, T)`;
            outside, the result is NaN. Each row is a sequence if `None`.
        use_stop_gradient: whether advantages and `behaviour_log_prob_t` are constants
            when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the sequences, or `"none"`.

    Returns:
        The loss, `f[]`, or at each token that of its sequence, `f[]|f[...,T]`, in units
        of the advantage.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number is below 0.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> log_probs, old = jnp.array([-1.0, -2.0]), jnp.array([-2.0, -1.0])
        >>> round(gmpo_loss(log_probs, old, 1.0).item(), 4)  # -exp((0.4 - 1) / 2)
        -0.7408

    References:
        Zhao et al., `Geometric-Mean Policy Optimization
        <https://arxiv.org/abs/2507.20673>`_, 2025.
    """
    adv = per_token(adv, log_prob_t)
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv, mask_t, use_stop_gradient
    )
    low, high = clip_range(epsilon, epsilon_high)
    sign = jnp.where(adv < 0, -1, jnp.ones_like(adv))
    bounded = sign * clipped_objective(log_ratios, sign, low, high)
    losses = -adv * jnp.exp(own_mean(bounded, segment_ids, mask_t))
    return _over_sequences(losses, segment_ids, mask_t, reduction)


@checked
def gspo_loss(
    log_prob_t: Annotated[Arg, "f[...,T]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...,T]"],
    adv: Annotated[Arg, "f[...]|f[...,T]"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf]"],
    epsilon_high: Annotated[Arg | None, "f[]", "[0, inf]"] = None,
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    segment_ids: Annotated[Arg | None, "i[...,T]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...,T]"]:
    r"""Computes the loss of GSPO, which clips a sequence as a whole.

    The reward is that of a sequence, and so is the ratio by which it is weighed: the
    geometric mean of those of its tokens, to be on one scale for all lengths.

    .. math::
        L = -\min\bigl(s A, \;
            \operatorname{clip}(s, 1 - \epsilon, 1 + \epsilon_\text{high}) A\bigr),
        \qquad
        s = \exp\Bigl(\frac{1}{|y|} \sum_t \log \frac{\pi(y_t)}{\mu(y_t)}\Bigr)

    Args:
        log_prob_t: log-probability of each token under the policy to improve,
            `f[...,T]`, in nats.
        behaviour_log_prob_t: that under the policy that drew it, `f[...,T]`, in nats.
        adv: advantage of each sequence, `f[...]|f[...,T]`: the same for all tokens of
            one.
        epsilon: how far the ratio may usefully go below 1, `f[]`, dimensionless, not
            negative; the paper's 3e-4 is far below that of a token.
        epsilon_high: how far it may go above, `f[]`; `epsilon` if `None`.
        mask_t: whether each token counts, `b[...,T]`: the others are as if left out,
            NaN included. All count if `None`.
        segment_ids: the sequence of each token in its row, `i[...,T]`, in `[0, T)`;
            outside, the result is NaN. Each row is a sequence if `None`.
        use_stop_gradient: whether advantages and `behaviour_log_prob_t` are constants
            when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the sequences, or `"none"`.

    Returns:
        The loss, `f[]`, or at each token that of its sequence, `f[]|f[...,T]`, in units
        of the advantage.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number its interval.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> log_probs, old = jnp.array([0.5, 0.5]), jnp.array([0.5, 4.5])
        >>> round(gspo_loss(log_probs, old, 1.0, epsilon=0.2).item(), 4)  # -exp(-2)
        -0.1353

    References:
        Zheng et al., `Group Sequence Policy Optimization
        <https://arxiv.org/abs/2507.18071>`_, 2025, section 4.1.
    """
    adv = per_token(adv, log_prob_t)
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv, mask_t, use_stop_gradient
    )
    low, high = clip_range(epsilon, epsilon_high)
    means = own_mean(log_ratios, segment_ids, mask_t)
    gains = clipped_objective(ratios(means), adv, 1 + low, 1 + high)
    return _over_sequences(-gains, segment_ids, mask_t, reduction)


@checked
def gspo_token_loss(
    log_prob_t: Annotated[Arg, "f[...,T]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...,T]"],
    adv: Annotated[Arg, "f[...]|f[...,T]"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf]"],
    epsilon_high: Annotated[Arg | None, "f[]", "[0, inf]"] = None,
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    segment_ids: Annotated[Arg | None, "i[...,T]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...,T]"]:
    r"""Computes the loss of GSPO-token, with an advantage for each token.

    Each token is weighed by the ratio of its sequence, as in `gspo_loss`, but that is
    a constant when differentiating, and the gradient is that of the token itself.
    Where all tokens of a sequence have one advantage, the means over each sequence,
    `"sequence_mean"` of `aggregate_tokens`, have the value and the gradient of
    `gspo_loss`.

    .. math::
        L_t = -\min\bigl(s_t A_t, \;
            \operatorname{clip}(s_t, 1 - \epsilon, 1 + \epsilon_\text{high}) A_t\bigr),
        \qquad
        s_t = \perp\!(s) \, \frac{\pi(y_t)}{\perp\!(\pi(y_t))}

    where :math:`\perp` holds a factor constant, and :math:`s` is the ratio of the
    sequence.

    Args:
        log_prob_t: log-probability of each token under the policy to improve,
            `f[...,T]`, in nats.
        behaviour_log_prob_t: that under the policy that drew it, `f[...,T]`, in nats.
        adv: advantage of each sequence or token, `f[...]|f[...,T]`.
        epsilon: how far the ratio may usefully go below 1, `f[]`, dimensionless, not
            negative.
        epsilon_high: how far it may go above, `f[]`; `epsilon` if `None`.
        mask_t: whether each token counts, `b[...,T]`: the others are as if left out,
            NaN included. All count if `None`.
        segment_ids: the sequence of each token in its row, `i[...,T]`, in `[0, T)`;
            outside, the result is NaN. Each row is a sequence if `None`.
        use_stop_gradient: whether the ratio of the sequence, advantages and
            `behaviour_log_prob_t` are constants when differentiating, `b[]`. If not,
            the gradient is that of the value.
        reduction: `"mean"` or `"sum"` over the tokens that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each token, `f[]|f[...,T]`, in units of the advantage.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number its interval.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> log_probs, adv = jnp.array([-1.0, -2.0]), jnp.array([1.0, 3.0])
        >>> loss = lambda x: gspo_token_loss(x, log_probs, adv, epsilon=0.2)
        >>> jax.grad(loss)(log_probs).tolist()
        [-0.5, -1.5]

    References:
        Zheng et al., `Group Sequence Policy Optimization
        <https://arxiv.org/abs/2507.18071>`_, 2025, section 4.3.
    """
    adv = per_token(adv, log_prob_t)
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv, mask_t, use_stop_gradient
    )
    (log_prob,) = keep_where(mask_t, log_prob_t)
    means = own_mean(log_ratios, segment_ids, mask_t)
    one = log_prob - stop_gradient_if(use_stop_gradient, log_prob)
    moving = ratios(stop_gradient_if(use_stop_gradient, means) + one)
    low, high = clip_range(epsilon, epsilon_high)
    gains = clipped_objective(moving, adv, 1 + low, 1 + high)
    return reduced(-gains, mask_t, reduction)


def _over_sequences(
    losses: Array, ids: Array | None, mask: Array | None, reduction: Reduction
) -> Array:
    """Reduces losses that are the same at all tokens of a sequence."""
    if reduction == "none":
        return reduced(losses, mask, reduction)
    losses, ids = known(losses, ids, mask)
    counts = counted(losses, mask)
    total = jnp.sum(weighted(losses, shares(counts, ids)))
    return total / (
        jnp.maximum(number_of(counts, ids), 1) if reduction == "mean" else 1
    )

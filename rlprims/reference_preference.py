r"""Losses from preferences, relative to a reference policy: DPO and what followed it.

Of two answers, or of one, somebody said which is good. The policy itself stands for a
reward, the logarithm of its probability relative to that of a reference policy, and
its margin is how much higher that is for the chosen answer than for the rejected one:

================  ====================================================================
loss              of the margin `h`
================  ====================================================================
`dpo_loss`        `-log σ(h)`
`hinge_dpo_loss`  `max(0, 1 - h)`
`ipo_loss`        a square: the margin has an optimum
`kto_loss`        of single answers, good or bad, and not of pairs
================  ====================================================================

Losses without a reference policy are in `preference`.

Log-probabilities are of whole answers: sums over their tokens, or means for a loss that
is normalised by length, as `sequence_log_probs` gives them. They may have any shape, of
which each entry is one pair. By default those of the reference policy are constants
when differentiating. `mask` leaves pairs out.
"""

from collections.abc import Hashable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims._segments import counted
from rlprims.arrays import keep_where
from rlprims.collectives import AllSum
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced
from rlprims.preference import log_sigmoid_loss

__all__ = [
    "dpo_loss",
    "hinge_dpo_loss",
    "ipo_loss",
    "kto_loss",
    "kto_reference_point",
]
# Beyond this an exponential may overflow, in a product if not by itself.
_STEEPEST = 80.0


@checked
def dpo_loss(
    chosen_log_prob: Annotated[Arg, "f[...]"],
    rejected_log_prob: Annotated[Arg, "f[...]"],
    reference_chosen_log_prob: Annotated[Arg, "f[...]"],
    reference_rejected_log_prob: Annotated[Arg, "f[...]"],
    *,
    beta: Annotated[Arg, "f[]", "[0, inf]"],
    label_smoothing: Annotated[Arg, "f[]", "[0, 1]"] = 0.0,
    divergence: Literal["alpha", "jensen_shannon"] = "alpha",
    alpha: Annotated[Arg, "f[]", "[0, 1]"] = 0.0,
    mask: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of direct preference optimisation, DPO.

    It fits the model of Bradley and Terry to rewards that the policy itself implies:
    those for which it is best, when it pays for its divergence from the reference.

    .. math::
        L = -(1 - \epsilon) \log \sigma(h) - \epsilon \log \sigma(-h), \qquad
        h = \beta f'\Bigl(\frac{\pi(y_w)}{\pi_\text{ref}(y_w)}\Bigr)
            - \beta f'\Bigl(\frac{\pi(y_l)}{\pi_\text{ref}(y_l)}\Bigr)

    for the divergences of :math:`f`-DPO. An :math:`\alpha`-divergence has
    :math:`f'(u) = (1 - u^{-\alpha}) / \alpha`: at 0, where it is :math:`\log u`, it is
    the reverse Kullback-Leibler divergence of DPO itself, and at 1 the forward one.
    That of Jensen and Shannon has :math:`f'(u) = \log 2u / (1 + u)`. Where
    :math:`u^{-\alpha}` is above :math:`e^{80}` it counts as that, without a gradient.

    Args:
        chosen_log_prob: log-probability of the preferred answer of each pair under the
            policy, `f[...]`, in nats.
        rejected_log_prob: that of the other answer, `f[...]`, in nats.
        reference_chosen_log_prob: log-probability of the preferred answer under the
            reference policy, `f[...]`, in nats.
        reference_rejected_log_prob: that of the other answer, `f[...]`, in nats.
        beta: what a nat of divergence costs, :math:`\beta`, `f[]`, in units of
            reward, not negative.
        label_smoothing: how often preferences are taken to be the wrong way round,
            :math:`\epsilon`, `f[]`, in `[0, 1]`.
        divergence: `"alpha"` or `"jensen_shannon"`.
        alpha: which :math:`\alpha`-divergence, `f[]`, in `[0, 1]`.
        mask: whether each pair counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        use_stop_gradient: whether the reference policy is a constant when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the pairs that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each pair, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, a Python number its interval, or
            `divergence` is unknown.
        TypeError: if an argument is not floating-point, or `mask` not boolean.

    Example:
        >>> dpo_loss(-1.0, -9001.0, -1.0, -1.0, beta=0.1).item()
        0.0
        >>> dpo_loss(-901.0, -1.0, -1.0, -1.0, beta=0.1).item()
        90.0

    References:
        Rafailov et al., `Direct Preference Optimization: Your Language Model is
        Secretly a Reward Model <https://arxiv.org/abs/2305.18290>`_, 2023, eq. 7.
        Wang et al., `Beyond Reverse KL: Generalizing Direct Preference Optimization
        with Diverse Divergence Constraints <https://arxiv.org/abs/2309.16240>`_, 2023.
    """
    chosen, rejected = _log_ratios(
        mask,
        chosen_log_prob,
        rejected_log_prob,
        reference_chosen_log_prob,
        reference_rejected_log_prob,
        stop=use_stop_gradient,
    )
    if divergence == "alpha":
        slope = lambda log_ratio: _alpha_slope(log_ratio, alpha)
    else:
        slope = lambda log_ratio: -jax.nn.softplus(-log_ratio)  # but for log 2
    margin = beta * (slope(chosen) - slope(rejected))
    return reduced(log_sigmoid_loss(margin, label_smoothing), mask, reduction)


@checked
def hinge_dpo_loss(
    chosen_log_prob: Annotated[Arg, "f[...]"],
    rejected_log_prob: Annotated[Arg, "f[...]"],
    reference_chosen_log_prob: Annotated[Arg, "f[...]"],
    reference_rejected_log_prob: Annotated[Arg, "f[...]"],
    *,
    beta: Annotated[Arg, "f[]", "[0, inf]"],
    mask: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the hinge loss of the margin by which the chosen answer is preferred.

    Unlike `dpo_loss` it leaves a pair alone once the margin is 1. It is the loss of
    SLiC-HF, of log-probabilities relative to those of a reference policy; SLiC-HF has
    none, which is a reference of zeros, and a margin of :math:`1 / \beta` nats.

    .. math::
        L = \max(0, 1 - h), \qquad
        h = \beta \log \frac{\pi(y_w)}{\pi_\text{ref}(y_w)}
            - \beta \log \frac{\pi(y_l)}{\pi_\text{ref}(y_l)}

    Args:
        chosen_log_prob: log-probability of the preferred answer of each pair under the
            policy, `f[...]`, in nats.
        rejected_log_prob: that of the other answer, `f[...]`, in nats.
        reference_chosen_log_prob: log-probability of the preferred answer under the
            reference policy, `f[...]`, in nats.
        reference_rejected_log_prob: that of the other answer, `f[...]`, in nats.
        beta: scale of the margin, :math:`\beta`, `f[]`, per nat, not negative.
        mask: whether each pair counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        use_stop_gradient: whether the reference policy is a constant when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the pairs that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each pair, `f[]|f[...]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract, or `beta` is a Python number below
            0.
        TypeError: if an argument is not floating-point, or `mask` not boolean.

    Example:
        >>> hinge_dpo_loss(-1.0, -2.0, -1.0, -1.0, beta=0.5).item()
        0.5

    References:
        Zhao et al., `SLiC-HF: Sequence Likelihood Calibration with Human Feedback
        <https://arxiv.org/abs/2305.10425>`_, 2023.
    """
    chosen, rejected = _log_ratios(
        mask,
        chosen_log_prob,
        rejected_log_prob,
        reference_chosen_log_prob,
        reference_rejected_log_prob,
        stop=use_stop_gradient,
    )
    losses = jnp.maximum(0, 1 - beta * (chosen - rejected))
    return reduced(losses, mask, reduction)


@checked
def ipo_loss(
    chosen_log_prob: Annotated[Arg, "f[...]"],
    rejected_log_prob: Annotated[Arg, "f[...]"],
    reference_chosen_log_prob: Annotated[Arg, "f[...]"],
    reference_rejected_log_prob: Annotated[Arg, "f[...]"],
    *,
    beta: Annotated[Arg, "f[]", "(0, inf]"],
    mask: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of identity preference optimisation, IPO.

    Where answers are always preferred the same way, `dpo_loss` is least at an infinite
    margin, whatever the reference policy. Here the margin has an optimum.

    .. math::
        L = \Bigl(\log \frac{\pi(y_w)}{\pi_\text{ref}(y_w)}
            - \log \frac{\pi(y_l)}{\pi_\text{ref}(y_l)}
            - \frac{1}{2 \beta}\Bigr)^2

    The paper adds up log-probabilities over an answer; much code takes their mean.

    Args:
        chosen_log_prob: log-probability of the preferred answer of each pair under the
            policy, `f[...]`, in nats.
        rejected_log_prob: that of the other answer, `f[...]`, in nats.
        reference_chosen_log_prob: log-probability of the preferred answer under the
            reference policy, `f[...]`, in nats.
        reference_rejected_log_prob: that of the other answer, `f[...]`, in nats.
        beta: how strongly the policy is held to the reference, `f[]`, per nat,
            positive; :math:`\tau` in the paper.
        mask: whether each pair counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        use_stop_gradient: whether the reference policy is a constant when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the pairs that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each pair, `f[]|f[...]`, in squared nats.

    Raises:
        ValueError: if a shape breaks its contract, or `beta` is a Python number and not
            positive.
        TypeError: if an argument is not floating-point, or `mask` not boolean.

    Example:
        >>> ipo_loss(-1.0, -4.0, -1.0, -1.0, beta=0.5).item()  # (3 - 1)²
        4.0

    References:
        Azar et al., `A General Theoretical Paradigm to Understand Learning from Human
        Preferences <https://arxiv.org/abs/2310.12036>`_, 2023, eq. 17.
    """
    chosen, rejected = _log_ratios(
        mask,
        chosen_log_prob,
        rejected_log_prob,
        reference_chosen_log_prob,
        reference_rejected_log_prob,
        stop=use_stop_gradient,
    )
    return reduced((chosen - rejected - 1 / (2 * beta)) ** 2, mask, reduction)


@checked
def kto_loss(
    log_prob: Annotated[Arg, "f[...]"],
    reference_log_prob: Annotated[Arg, "f[...]"],
    desirable: Annotated[Arg, "b[...]"],
    reference_point: Annotated[Arg, "f[]"],
    *,
    beta: Annotated[Arg, "f[]", "[0, inf]"],
    desirable_weight: Annotated[Arg, "f[]", "[0, inf]"] = 1.0,
    undesirable_weight: Annotated[Arg, "f[]", "[0, inf]"] = 1.0,
    mask: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of KTO, which learns from answers that are good or bad.

    It needs no pairs. An answer is worth what it gains over a point of reference, and
    as in prospect theory it matters less and less the further away it is.

    .. math::
        L = \begin{cases}
            \lambda_D \, \bigl(1 - \sigma(\beta (r - z_0))\bigr)
                & \text{if desirable} \\
            \lambda_U \, \bigl(1 - \sigma(\beta (z_0 - r))\bigr)
                & \text{otherwise}
        \end{cases} \qquad
        r = \log \frac{\pi(y)}{\pi_\text{ref}(y)}

    Args:
        log_prob: log-probability of each answer under the policy, `f[...]`, in nats.
        reference_log_prob: that under the reference policy, `f[...]`, in nats.
        desirable: whether the answer is good, `b[...]`.
        reference_point: what a log-ratio is compared with, :math:`z_0`, `f[]`, in
            nats; see `kto_reference_point`.
        beta: how soon the value of an answer saturates, `f[]`, per nat, not negative.
        desirable_weight: weight of good answers, :math:`\lambda_D`, `f[]`,
            dimensionless, not negative.
        undesirable_weight: weight of bad ones, :math:`\lambda_U`, `f[]`, not negative.
        mask: whether each answer counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        use_stop_gradient: whether the reference policy and the reference point are
            constants when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the answers that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each answer, `f[]|f[...]`, in units of the weights.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number is below 0.
        TypeError: if `desirable` or `mask` is not boolean, or another argument is not
            floating-point.

    Example:
        >>> log_probs, good = jnp.array([-1.0, -1.0]), jnp.array([True, False])
        >>> kto_loss(log_probs, log_probs, good, 0.0, beta=0.1).item()
        0.5

    References:
        Ethayarajh, Xu, Muennighoff, Jurafsky and Kiela, `KTO: Model Alignment as
        Prospect Theoretic Optimization <https://arxiv.org/abs/2402.01306>`_, 2024.
    """
    log_prob, *held = keep_where(mask, log_prob, reference_log_prob)
    reference, point = stop_gradient_if(use_stop_gradient, (*held, reference_point))
    gain = beta * (log_prob - reference - point)
    good = desirable_weight * jax.nn.sigmoid(-gain)
    bad = undesirable_weight * jax.nn.sigmoid(gain)
    return reduced(jnp.where(desirable, good, bad), mask, reduction)


@checked
def kto_reference_point(
    log_prob: Annotated[Arg, "f[...]"],
    reference_log_prob: Annotated[Arg, "f[...]"],
    *,
    mask: Annotated[Arg | None, "b[...]"] = None,
    stop_target_gradients: Flag = True,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[]"]:
    r"""Estimates the divergence from the reference policy, for `kto_loss`.

    .. math::
        z_0 = \max\Bigl(0, \; \frac{1}{m} \sum_i
            \log \frac{\pi(y'_i \mid x_i)}{\pi_\text{ref}(y'_i \mid x_i)}\Bigr)

    where :math:`y'_i` is the answer to another prompt of the batch, such as the next.
    That is cheap, since nothing is drawn, and biased; but it is not a mean over the
    very answers that are compared with it.

    Args:
        log_prob: log-probability of each mismatched answer under the policy, `f[...]`,
            in nats.
        reference_log_prob: that under the reference policy, `f[...]`, in nats.
        mask: whether each answer counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        stop_target_gradients: whether the result is a constant when differentiating,
            `b[]`, as the paper has it.
        axis_name: the mapped axis, or axes, over which the batch is split; `None` if
            it is not.

    Returns:
        The reference point, `f[]`, in nats, at least 0; 0 if no answer counts.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point, or `mask` not boolean.

    Example:
        >>> kto_reference_point(jnp.array([-1.0, -4.0]), jnp.array([-4.0, -5.0])).item()
        2.0

    References:
        Ethayarajh, Xu, Muennighoff, Jurafsky and Kiela, `KTO: Model Alignment as
        Prospect Theoretic Optimization <https://arxiv.org/abs/2402.01306>`_, 2024.
    """
    (log_ratios,) = keep_where(mask, log_prob - reference_log_prob)
    total = AllSum(axis_name)
    number = jnp.maximum(total(counted(log_ratios, mask)), 1)
    point = jnp.maximum(0, total(log_ratios) / number)
    return stop_gradient_if(stop_target_gradients, point)


def _log_ratios(
    mask: Array | None, *log_probs: Array, stop: Flag
) -> tuple[Array, Array]:
    """Returns those of the chosen and the rejected answers, to the reference policy."""
    chosen, rejected, *held = keep_where(mask, *log_probs)
    reference_chosen, reference_rejected = stop_gradient_if(stop, held)
    return chosen - reference_chosen, rejected - reference_rejected


def _alpha_slope(log_ratio: Array, alpha: Array) -> Array:
    """Returns the derivative of an alpha-divergence: the log-ratio for alpha 0."""
    limit, power = alpha == 0, jnp.where(alpha == 0, 1, alpha)
    exponent = jnp.minimum(-power * log_ratio, _STEEPEST)
    return jnp.where(limit, log_ratio, -jnp.expm1(exponent) / power)

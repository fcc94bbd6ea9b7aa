r"""Policy losses of tokens: what follows the clip of PPO in language models.

All of them weigh how far a token has become likelier than it was when it was drawn,
:math:`\rho_t = \pi(y_t) / \mu(y_t)`, by an advantage. They differ in what they do once
:math:`\rho` is far from 1:

==============  ======================================================================
loss            where the ratio is far from 1
==============  ======================================================================
`grpo_loss`     the gradient of the token ends, in the direction that lowers the loss
`cispo_loss`    the gradient goes on, with a bounded weight
`sapo_loss`     the gradient fades out, on both sides
==============  ======================================================================

Those of `sequence_losses` weigh a sequence by one ratio instead.

An advantage belongs to a token, `f[...,T]`, or to a sequence, `f[...]`, and to all of
its tokens. By default advantages and `behaviour_log_prob_t` are constants when
differentiating, so that on the policy's own samples the latter may be `log_prob_t`
itself. `mask_t` leaves out prompt and padding.

The mean is over all tokens, as in DAPO. For another take `reduction="none"`, and then
`aggregate_tokens`: for GRPO as published its `"sequence_mean"`. Penalties of a token,
such as its divergence from a reference policy, are added in between.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where, weighted
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced
from rlprims.surrogates import (
    clip_range,
    clipped_objective,
    log_ratios_and_advantages,
    ratios,
)

__all__ = ["cispo_loss", "grpo_loss", "sapo_loss"]

# Beyond this log-ratio a sigmoid of the ratio is flat, and the ratio may overflow.
_FLAT = 80.0


@checked
def cispo_loss(
    log_prob_t: Annotated[Arg, "f[...,T]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...,T]"],
    adv: Annotated[Arg, "f[...]|f[...,T]"],
    *,
    ratio_max: Annotated[Arg, "f[]", "[0, inf]"],
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...,T]"]:
    r"""Computes the loss of CISPO, which bounds the weight of a token, not its ratio.

    A clip that ends a token's gradient, as in `grpo_loss`, silences rare tokens at
    which reasoning turns. Here each keeps its gradient, with a bounded weight.

    .. math::
        L_t = -\perp\!\bigl(\min(\rho_t, \rho_{\max})\, A_t\bigr) \log \pi(y_t), \qquad
        \rho_t = \frac{\pi(y_t)}{\mu(y_t)}

    where :math:`\perp` holds a factor constant.

    Args:
        log_prob_t: log-probability of each token under the policy to improve,
            `f[...,T]`, in nats.
        behaviour_log_prob_t: that under the policy that drew it, `f[...,T]`, in nats.
        adv: advantage of each sequence or token, `f[...]|f[...,T]`.
        ratio_max: largest weight :math:`\rho_{\max}`, `f[]`, dimensionless, not
            negative; :math:`1 + \epsilon_\text{high}` in the paper.
        mask_t: whether each token counts, `b[...,T]`: the others are as if left out,
            NaN included. All count if `None`.
        use_stop_gradient: whether the factor is a constant when differentiating,
            `b[]`, as the paper has it.
        reduction: `"mean"` or `"sum"` over the tokens that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each token, `f[]|f[...,T]`, in units of the advantage
        times nats.

    Raises:
        ValueError: if a shape breaks its contract, or `ratio_max` is a Python number
            below 0.
        TypeError: if an argument is not floating-point, or `mask_t` not boolean.

    Example:
        >>> log_probs, old = jnp.array([-1.0]), jnp.array([-90.0])
        >>> cispo_loss(log_probs, old, 2.0, ratio_max=3.0).item()
        6.0

    References:
        MiniMax, `MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning
        Attention <https://arxiv.org/abs/2506.13585>`_, 2025.
    """
    (log_prob,) = keep_where(mask_t, log_prob_t)
    adv = per_token(adv, log_prob_t)
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv, mask_t, False
    )
    weights = jnp.exp(jnp.minimum(log_ratios, jnp.log(ratio_max)))
    factors = stop_gradient_if(use_stop_gradient, weights * adv)
    return reduced(-weighted(log_prob, factors), mask_t, reduction)


@checked
def grpo_loss(
    log_prob_t: Annotated[Arg, "f[...,T]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...,T]"],
    adv: Annotated[Arg, "f[...]|f[...,T]"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf]"],
    epsilon_high: Annotated[Arg | None, "f[]", "[0, inf]"] = None,
    ratio_max: Annotated[Arg | None, "f[]", "[0, inf]"] = None,
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...,T]"]:
    r"""Computes the clipped loss of tokens of GRPO, DAPO and INTELLECT-2.

    .. math::
        L_t = -\min\bigl(\min(\rho_t, \rho_{\max}) A_t, \;
            \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon_\text{high}) A_t
            \bigr), \qquad
        \rho_t = \frac{\pi(y_t)}{\mu(y_t)}

    GRPO clips as PPO does. DAPO clips higher above than below,
    :math:`\epsilon_\text{high} > \epsilon`, so that unlikely tokens can become
    likely. Neither bounds the loss of a token with a negative advantage that has
    become much likelier; :math:`\rho_{\max}`, larger than
    :math:`1 + \epsilon_\text{high}`, does, and its gradient ends there.

    Args:
        log_prob_t: log-probability of each token under the policy to improve,
            `f[...,T]`, in nats.
        behaviour_log_prob_t: that under the policy that drew it, `f[...,T]`, in nats.
        adv: advantage of each sequence or token, `f[...]|f[...,T]`.
        epsilon: how far a ratio may usefully go below 1, `f[]`, dimensionless, not
            negative.
        epsilon_high: how far it may go above, `f[]`; `epsilon` if `None`.
        ratio_max: the largest ratio that counts where the advantage is negative,
            `f[]`; no limit if `None`. It is `dual_clip` of `ppo_clip_loss`.
        mask_t: whether each token counts, `b[...,T]`: the others are as if left out,
            NaN included. All count if `None`.
        use_stop_gradient: whether advantages and `behaviour_log_prob_t` are constants
            when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the tokens that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each token, `f[]|f[...,T]`, in units of the advantage.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number its interval.
        TypeError: if an argument is not floating-point, or `mask_t` not boolean.

    Example:
        >>> log_probs, old, adv = jnp.log(jnp.array([0.5])), jnp.zeros(1), jnp.ones(1)
        >>> grpo_loss(log_probs, old, adv, epsilon=0.2).item()
        -0.5
        >>> round(grpo_loss(log_probs, old, -adv, epsilon=0.2).item(), 4)
        0.8

    References:
        Shao et al., `DeepSeekMath: Pushing the Limits of Mathematical Reasoning in
        Open Language Models <https://arxiv.org/abs/2402.03300>`_, 2024, section 4.1.
        Yu et al., `DAPO: An Open-Source LLM Reinforcement Learning System at Scale
        <https://arxiv.org/abs/2503.14476>`_, 2025, whose bounds are 0.2 and 0.28.
        Prime Intellect, `INTELLECT-2: A Reasoning Model Trained Through Globally
        Decentralized Reinforcement Learning <https://arxiv.org/abs/2505.07291>`_, 2025.
    """
    adv = per_token(adv, log_prob_t)
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv, mask_t, use_stop_gradient
    )
    low, high = clip_range(epsilon, epsilon_high)
    gains = clipped_objective(ratios(log_ratios), adv, 1 + low, 1 + high, ratio_max)
    return reduced(-gains, mask_t, reduction)


@checked
def sapo_loss(
    log_prob_t: Annotated[Arg, "f[...,T]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...,T]"],
    adv: Annotated[Arg, "f[...]|f[...,T]"],
    *,
    temperature: Annotated[Arg, "f[]", "(0, inf]"] = 1.0,
    negative_temperature: Annotated[Arg, "f[]", "(0, inf]"] = 1.05,
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...,T]"]:
    r"""Computes the loss of SAPO, with a soft gate in place of a clip.

    Near a ratio of 1 the gradient is that of the ratio; away from it, on both sides,
    it fades out, and the sooner the larger :math:`\tau`.

    .. math::
        L_t = -\frac{4}{\tau} \, \sigma\bigl(\tau (\rho_t - 1)\bigr) \, A_t, \qquad
        \tau = \begin{cases}
            \text{temperature} & A_t > 0 \\
            \text{negative\_temperature} & A_t \le 0
        \end{cases}

    Args:
        log_prob_t: log-probability of each token under the policy to improve,
            `f[...,T]`, in nats.
        behaviour_log_prob_t: that under the policy that drew it, `f[...,T]`, in nats.
        adv: advantage of each sequence or token, `f[...]|f[...,T]`.
        temperature: how soon the gradient fades where the advantage is positive,
            `f[]`, dimensionless, positive.
        negative_temperature: the same where it is not, `f[]`, positive.
        mask_t: whether each token counts, `b[...,T]`: the others are as if left out,
            NaN included. All count if `None`.
        use_stop_gradient: whether advantages and `behaviour_log_prob_t` are constants
            when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the tokens that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each token, `f[]|f[...,T]`, in units of the advantage.

    Raises:
        ValueError: if a shape breaks its contract, or a temperature is a Python number
            and not positive.
        TypeError: if an argument is not floating-point, or `mask_t` not boolean.

    Example:
        >>> sapo_loss(jnp.zeros(1), jnp.zeros(1), 1.0).item()  # -4 · 0.5
        -2.0

    References:
        Gao et al., `Soft Adaptive Policy Optimization
        <https://arxiv.org/abs/2511.20347>`_, 2025.
    """
    adv = per_token(adv, log_prob_t)
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv, mask_t, use_stop_gradient
    )
    tau = jnp.where(adv > 0, temperature, negative_temperature)
    excess = jnp.expm1(jnp.minimum(log_ratios, _FLAT))
    return reduced(-4 / tau * jax.nn.sigmoid(tau * excess) * adv, mask_t, reduction)


# What losses of sequences share


def per_token(adv: Array, tokens: Array) -> Array:
    """Gives each token the advantage of its sequence, unless it has one already."""
    return (
        adv
        if adv.ndim == tokens.ndim
        else jnp.broadcast_to(adv[..., None], tokens.shape)
    )

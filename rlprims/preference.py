r"""Losses from preferences between two answers, without a reference policy.

`bradley_terry_loss` teaches a reward model which of two answers was preferred. The
others train a policy to prefer it too, by its own log-probabilities:

======================  ==============================================================
loss                    of a pair
======================  ==============================================================
`bradley_terry_loss`    `-log σ` of a difference of rewards
`simpo_loss`            `-log σ` of a difference of log-probabilities, less a margin
`orpo_loss`             `-log σ` of a difference of log-odds, and the likelihood
======================  ==============================================================

Those that hold the policy to a reference are in `reference_preference`.

Answers differ in length, and the mean log-probability of a token, `sequence_log_probs`
with `reduction="mean"`, does not favour short ones. Arguments may have any shape, of
which each entry is one pair. `mask` leaves pairs out.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import keep_where, weighted
from rlprims.losses import Reduction, reduced

__all__ = ["bradley_terry_loss", "orpo_loss", "simpo_loss"]


@checked
def bradley_terry_loss(
    chosen_reward: Annotated[Arg, "f[...]"],
    rejected_reward: Annotated[Arg, "f[...]"],
    *,
    margin: Annotated[Arg, "f[]|f[...]"] = 0.0,
    centering_coefficient: Annotated[Arg, "f[]", "[0, inf]"] = 0.0,
    mask: Annotated[Arg | None, "b[...]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of a reward model that shall explain preferences.

    In the model of Bradley and Terry an answer is preferred with a probability that
    is a sigmoid of how far its reward is above that of the other.

    .. math::
        L = -\log \sigma(r_w - r_l - m) + c \, (r_w + r_l)^2

    Only differences of rewards matter to the first term. The second, which is not in
    the papers but in much code, keeps rewards near zero.

    Args:
        chosen_reward: reward of the preferred answer of each pair, `f[...]`.
        rejected_reward: reward of the other answer, `f[...]`, in the same units.
        margin: by how much the first shall be higher, `f[]|f[...]`, in the same units:
            more, where an answer is much better than the other.
        centering_coefficient: weight of the second term, :math:`c`, `f[]`, per squared
            unit of reward, not negative.
        mask: whether each pair counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the pairs that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each pair, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or `centering_coefficient` is a
            Python number below 0.
        TypeError: if an argument is not floating-point, or `mask` not boolean.

    Example:
        >>> bradley_terry_loss(-45.0, 45.0).item()
        90.0

    References:
        Christiano et al., `Deep Reinforcement Learning from Human Preferences
        <https://arxiv.org/abs/1706.03741>`_, 2017.
        Touvron et al., `Llama 2: Open Foundation and Fine-Tuned Chat Models
        <https://arxiv.org/abs/2307.09288>`_, 2023, for the margin.
    """
    chosen, rejected = keep_where(mask, chosen_reward, rejected_reward)
    (margin,) = (margin,) if margin.ndim < chosen.ndim else keep_where(mask, margin)
    penalties = weighted((chosen + rejected) ** 2, centering_coefficient)
    losses = log_sigmoid_loss(chosen - rejected - margin) + penalties
    return reduced(losses, mask, reduction)


@checked
def orpo_loss(
    chosen_log_prob: Annotated[Arg, "f[...]"],
    rejected_log_prob: Annotated[Arg, "f[...]"],
    *,
    beta: Annotated[Arg, "f[]", "[0, inf]"],
    mask: Annotated[Arg | None, "b[...]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of ORPO, of odds ratios, which needs no reference policy.

    To the negative log-likelihood of the preferred answer, as in supervised
    fine-tuning, it adds a penalty unless the odds of the other answer are lower.

    .. math::
        L = -\log p_w - \beta \log \sigma\Bigl(
            \log \frac{p_w}{1 - p_w} - \log \frac{p_l}{1 - p_l}\Bigr)

    where :math:`p` is the geometric mean of the probabilities of the tokens.

    The odds keep their digits where a probability is near 1. One that is 1, or above
    it by rounding, counts as the next lower one, without a gradient of its odds.

    Args:
        chosen_log_prob: mean log-probability of a token of the preferred answer of each
            pair, `f[...]`, in nats, not positive.
        rejected_log_prob: that of the other answer, `f[...]`, in nats, not positive.
        beta: weight of the odds ratio, `f[]`, dimensionless, not negative;
            :math:`\lambda` in the paper.
        mask: whether each pair counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the pairs that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each pair, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or `beta` is a Python number below
            0.
        TypeError: if an argument is not floating-point, or `mask` not boolean.

    Example:
        >>> round(orpo_loss(-1.0, -1.0, beta=1.0).item(), 4)  # 1 + log 2
        1.6931

    References:
        Hong, Lee and Thorne, `ORPO: Monolithic Preference Optimization without
        Reference Model <https://arxiv.org/abs/2403.07691>`_, 2024, eq. 6.
    """
    chosen, rejected = keep_where(mask, chosen_log_prob, rejected_log_prob)
    penalties = log_sigmoid_loss(_log_odds(chosen) - _log_odds(rejected))
    return reduced(weighted(penalties, beta) - chosen, mask, reduction)


@checked
def simpo_loss(
    chosen_log_prob: Annotated[Arg, "f[...]"],
    rejected_log_prob: Annotated[Arg, "f[...]"],
    *,
    beta: Annotated[Arg, "f[]", "[0, inf]"],
    margin: Annotated[Arg, "f[]"],
    label_smoothing: Annotated[Arg, "f[]", "[0, 1]"] = 0.0,
    mask: Annotated[Arg | None, "b[...]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of SimPO, whose reward is the mean log-probability itself.

    That is also what decides which answer is generated, and it needs no reference
    policy. The preferred answer has to be ahead by a margin.

    .. math::
        L = -(1 - \epsilon) \log \sigma(h) - \epsilon \log \sigma(-h), \qquad
        h = \frac{\beta}{|y_w|} \log \pi(y_w)
            - \frac{\beta}{|y_l|} \log \pi(y_l) - \gamma

    Args:
        chosen_log_prob: mean log-probability of a token of the preferred answer of each
            pair, `f[...]`, in nats.
        rejected_log_prob: that of the other answer, `f[...]`, in nats.
        beta: scale of the reward, :math:`\beta`, `f[]`, per nat, not negative.
        margin: how far the preferred answer shall be ahead, :math:`\gamma`, `f[]`, in
            units of reward.
        label_smoothing: how often preferences are taken to be the wrong way round,
            :math:`\epsilon`, `f[]`, in `[0, 1]`; 0 in the paper.
        mask: whether each pair counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the pairs that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each pair, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number its interval.
        TypeError: if an argument is not floating-point, or `mask` not boolean.

    Example:
        >>> simpo_loss(-41.0, -1.0, beta=2.0, margin=10.0).item()
        90.0

    References:
        Meng, Xia and Chen, `SimPO: Simple Preference Optimization with a
        Reference-Free Reward <https://arxiv.org/abs/2405.14734>`_, 2024, eq. 6.
    """
    chosen, rejected = keep_where(mask, chosen_log_prob, rejected_log_prob)
    lead = beta * (chosen - rejected) - margin
    return reduced(log_sigmoid_loss(lead, label_smoothing), mask, reduction)


def log_sigmoid_loss(lead: Array, label_smoothing: Arg = 0.0) -> Array:
    """Returns the cross-entropy of a preference, which is wrong with a probability."""
    return jax.nn.softplus(-lead) + weighted(lead, label_smoothing)


def _log_odds(log_prob: Array) -> Array:
    """Returns `log p / (1 - p)`, finite where p is 1."""
    nearly_one = -jnp.finfo(log_prob.dtype).tiny
    log_prob = jnp.where(log_prob >= 0, nearly_one, log_prob)
    return log_prob - jax.nn.log1mexp(-log_prob)

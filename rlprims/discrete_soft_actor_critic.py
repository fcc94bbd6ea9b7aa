r"""Soft actor-critic for a finite number of actions.

What `soft_actor_critic` averages over by drawing an action is summed over all of them
here, weighed by the probabilities of the policy. So the policy learns without the
derivative of the critic, and the losses take its logits:

===============================  ==========================  =======================
function                         trains                      held constant
===============================  ==========================  =======================
`discrete_sac_critic_errors`     the critics, by `q_tm1`     the target
`discrete_sac_actor_loss`        the policy, by `logits_t`   `q_t`, the temperature
`discrete_sac_temperature_loss`  the temperature             `logits_t`
===============================  ==========================  =======================

A mask of legal actions gives what leaving the others out would give. An action without
probability counts for nothing, whatever its value: `0 log 0 = 0`. Where no action is
legal there is no policy, and the result is NaN.

An ensemble of critics lies along the first axis, actions lie along the last, and the
minimum of the ensemble counts. For another reduction, pass its result as an ensemble of
one, `value[None]`.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import batched_index, contain_nonfinite, keep_where
from rlprims.categorical import masked_log_softmax, weighted_sum
from rlprims.ensembles import ensemble_td_learning, minimum_of
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced
from rlprims.policy_gradients import log_policy
from rlprims.soft_actor_critic import sac_temperature_loss

__all__ = [
    "discrete_sac_actor_loss",
    "discrete_sac_critic_errors",
    "discrete_sac_temperature_loss",
    "discrete_target_entropy",
    "soft_state_value",
]

Logits = Annotated[Arg, "f[...,A]"]
Temperature = Annotated[Arg, "f[]|f[...]", "[0, inf)"]
LegalMask = Annotated[Arg | None, "b[...,A]"]
Loss = Annotated[Array, "f[]|f[...]"]


@checked
def discrete_sac_actor_loss(
    logits_t: Logits,
    q_t: Annotated[Arg, "f[N,...,A]"],
    *,
    temperature: Temperature,
    mask: LegalMask = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of a policy over a finite number of actions.

    .. math::
        L = \sum_a \pi_t(a) \bigl(\alpha \log \pi_t(a) - \min_i q_{i, t}(a)\bigr),
        \qquad \pi_t = \operatorname{softmax}(\text{logits}_t)

    It is minus the `soft_state_value`, and least where
    :math:`\pi_t \propto \exp(\min_i q_{i, t} / \alpha)`. Gradients flow to the logits
    alone unless told otherwise.

    Args:
        logits_t: logits of the policy, `f[...,A]`.
        q_t: action values, by each of `N` critics, `f[N,...,A]`, in units of return.
        temperature: price :math:`\alpha` of entropy, `f[]|f[...]`, in units of return
            per nat, at least 0.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether action values and the temperature are constants when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and negative.
        TypeError: if a mask is not boolean, or another argument is not floating-point.

    Example:
        >>> logits, q_t = jnp.zeros((1, 2)), jnp.array([[[4.0, 2.0]]])
        >>> discrete_sac_actor_loss(logits, q_t, temperature=0.0).item()
        -3.0

    References:
        Christodoulou, `Soft Actor-Critic for Discrete Action Settings
        <https://arxiv.org/abs/1910.07207>`_, 2019.
    """
    logits_t, value_t = keep_where(mask_t, logits_t, minimum_of(q_t))
    log_pi = log_policy(logits_t, mask, True if mask_t is None else mask_t)
    fixed = stop_gradient_if(use_stop_gradient, (value_t, temperature))
    return reduced(-_soft_value(log_pi, *fixed), mask_t, reduction)


@checked
def discrete_sac_critic_errors(
    q_tm1: Annotated[Arg, "f[N,...,A]"],
    a_tm1: Annotated[Arg, "i[...]"],
    r_t: Annotated[Arg, "f[...]"],
    discount_t: Annotated[Arg, "f[...]"],
    q_t: Annotated[Arg, "f[M,...,A]"],
    logits_t: Logits,
    *,
    temperature: Temperature,
    mask: LegalMask = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[N,...]"]:
    r"""Computes the errors of the critics of a policy over finitely many actions.

    .. math::
        \delta_i = r_t + \gamma_t \sum_a \pi_t(a) \bigl(\min_j q_{j, t}(a)
            - \alpha \log \pi_t(a)\bigr) - q_{i, t-1}(a_{t-1}), \qquad
            \pi_t = \operatorname{softmax}(\text{logits}_t)

    Args:
        q_tm1: action values in the state left, by each of `N` critics, `f[N,...,A]`, in
            units of return.
        a_tm1: action taken there, `i[...]`, in `[0, A)`; any other makes its errors
            NaN.
        r_t: rewards that followed, `f[...]`.
        discount_t: discounts that followed, `f[...]`, dimensionless, in `[0, 1]`; 0 on
            termination, where `q_t`, `logits_t` and `mask` may be anything.
        q_t: action values in the state reached, by each of `M` target critics,
            `f[M,...,A]`, in units of return.
        logits_t: logits of the present policy there, `f[...,A]`.
        temperature: price :math:`\alpha` of entropy, `f[]|f[...]`, in units of return
            per nat, at least 0.
        mask: whether each action is legal in the state reached, `b[...,A]`; all are if
            `None`.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The errors of each critic, target minus prediction, `f[N,...]`, in units of
        return.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and negative.
        TypeError: if `a_tm1` is not an integer, `mask` is not boolean, or another
            argument is not floating-point.

    Example:
        >>> q_tm1, q_t = jnp.array([[1.0, 2.0]]), jnp.array([[4.0, 2.0]])
        >>> # 1 + 0.5 * (4 + 2) / 2 - 2
        >>> discrete_sac_critic_errors(
        ...     q_tm1, 1, 1.0, 0.5, q_t, jnp.zeros(2), temperature=0.0
        ... ).tolist()
        [0.5]

    References:
        Christodoulou, `Soft Actor-Critic for Discrete Action Settings
        <https://arxiv.org/abs/1910.07207>`_, 2019.
    """
    taken = batched_index(q_tm1, jnp.broadcast_to(a_tm1, q_tm1.shape[:-1]))
    value_t = contain_nonfinite(minimum_of(q_t), discount_t[..., None])
    v_t = _soft_value(log_policy(logits_t, mask, discount_t != 0), value_t, temperature)
    stop = stop_target_gradients
    return ensemble_td_learning(taken, r_t, discount_t, v_t, stop_target_gradients=stop)


@checked
def discrete_sac_temperature_loss(
    temperature: Annotated[Arg, "f[]|f[...]"],
    logits_t: Logits,
    *,
    target_entropy: Annotated[Arg, "f[]|f[...]"],
    mask: LegalMask = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of the temperature of a policy over finitely many actions.

    .. math::
        L = \alpha \bigl(H(\pi_t) - \bar H\bigr), \qquad
        \pi_t = \operatorname{softmax}(\text{logits}_t)

    It is `sac_temperature_loss`, averaged over actions instead of drawing one.

    Args:
        temperature: what to learn, :math:`\alpha`, `f[]|f[...]`, in units of return per
            nat; popular code passes its logarithm.
        logits_t: logits of the policy, `f[...,A]`.
        target_entropy: target :math:`\bar H`, `f[]|f[...]`, in nats.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether all but the temperature is constant when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a mask is not boolean, or another argument is not floating-point.

    Example:
        >>> logits = jnp.array([[0.0, -jnp.inf]])  # which has no entropy
        >>> discrete_sac_temperature_loss(3.0, logits, target_entropy=0.5).item()
        -1.5

    References:
        Christodoulou, `Soft Actor-Critic for Discrete Action Settings
        <https://arxiv.org/abs/1910.07207>`_, 2019.
    """
    (logits_t,) = keep_where(mask_t, logits_t)
    log_pi = masked_log_softmax(logits_t, mask)
    return sac_temperature_loss(
        temperature,
        weighted_sum(log_pi, jnp.exp(log_pi)),
        target_entropy=target_entropy,
        mask_t=mask_t,
        use_stop_gradient=use_stop_gradient,
        reduction=reduction,
    )


@checked
def discrete_target_entropy(
    num_actions: Annotated[Arg, "i[...]", "[1, inf)"],
    *,
    fraction: Annotated[Arg, "f[]", "[0, 1]"] = 0.98,
) -> Annotated[Array, "f[...]"]:
    r"""Computes how random a policy over a finite number of actions should be.

    .. math::
        \bar H = \kappa \log n

    With a mask of legal actions, `mask.sum(-1)` are the numbers to give: a target for
    all actions is out of reach where few are legal, and drives the temperature up for
    ever.

    Args:
        num_actions: number :math:`n` of legal actions, `i[...]`, at least 1; of none
            the target is NaN.
        fraction: part :math:`\kappa` of the greatest entropy, that of a uniform policy,
            `f[]`, dimensionless, in `[0, 1]`; the paper has 0.98.

    Returns:
        The targets, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or an argument is a Python number
            out of range.
        TypeError: if `num_actions` is not an integer, or `fraction` is not
            floating-point.

    Example:
        >>> round(discrete_target_entropy(2).item(), 4)  # 0.98 log 2
        0.6793
        >>> discrete_target_entropy(jnp.array([1, 0])).tolist()
        [0.0, nan]

    References:
        Christodoulou, `Soft Actor-Critic for Discrete Action Settings
        <https://arxiv.org/abs/1910.07207>`_, 2019.
    """
    with jax.numpy_dtype_promotion("standard"):  # which leaves a Python number weak
        number = num_actions * jnp.ones_like(fraction)
    return fraction * jnp.log(jnp.where(number > 0, number, jnp.nan))


@checked
def soft_state_value(
    q: Annotated[Arg, "f[...,A]"],
    logits: Logits,
    *,
    temperature: Temperature,
    mask: LegalMask = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the value of states to a policy that is paid for its entropy.

    .. math::
        v = \sum_a \pi(a) \bigl(q(a) - \alpha \log \pi(a)\bigr), \qquad
        \pi = \operatorname{softmax}(\text{logits}), \quad 0 \log 0 = 0

    Gradients flow to all arguments.

    Args:
        q: action values, `f[...,A]`, in units of return; of an ensemble, such as their
            minimum. Those of actions without probability may be anything.
        logits: logits of the policy, `f[...,A]`; one of minus infinity rules its action
            out.
        temperature: price :math:`\alpha` of entropy, `f[]|f[...]`, in units of return
            per nat, at least 0.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The values, `f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and negative.
        TypeError: if `mask` is not boolean, or another argument is not floating-point.

    Example:
        >>> q, logits = jnp.array([4.0, 2.0]), jnp.zeros(2)
        >>> round(soft_state_value(q, logits, temperature=1.0).item(), 4)  # 3 + log 2
        3.6931

    References:
        Christodoulou, `Soft Actor-Critic for Discrete Action Settings
        <https://arxiv.org/abs/1910.07207>`_, 2019.
    """
    return _soft_value(masked_log_softmax(logits, mask), q, temperature)


def _soft_value(log_pi: Array, q: Array, temperature: Array) -> Array:
    pi = jnp.exp(log_pi)
    return weighted_sum(q, pi) - temperature * weighted_sum(log_pi, pi)

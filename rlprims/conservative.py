r"""Conservative Q-learning: critics that value what is not in the data by less.

A critic that learns from a fixed set of data overestimates some of the actions that are
not in it, and the policy finds them. Conservative Q-learning (CQL) adds a penalty to
the loss of the critic, which pushes the soft maximum over all actions down and the
action in the data up:

.. math::
    L = \frac12 \delta^2 + \alpha \Bigl(\log \sum_a e^{q_t(a)} - q_t(a_t)\Bigr)

`cql_penalty` is the term in brackets for a finite number of actions. For continuous
ones the sum is an integral, and `continuous_cql_penalty` estimates it from actions that
were drawn from several distributions, such as a uniform one and the policy.

The weight :math:`\alpha` is a number of one's own, or a multiplier that
`cql_lagrange_losses` learns, to hold the penalty at a threshold. `calibrated_q` stops
pushing where a value is below that of the policy that acted, as in Cal-QL.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import batched_index, guarded, keep_where, weighted
from rlprims.categorical import masked_log_softmax, scaled_logits, which_legal
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced

__all__ = [
    "calibrated_q",
    "continuous_cql_penalty",
    "cql_lagrange_losses",
    "cql_penalty",
]

Temperature = Annotated[Arg, "f[]", "(0, inf)"]
Mask = Annotated[Arg | None, "b[...]"]
Loss = Annotated[Array, "f[]|f[...]"]


@checked
def calibrated_q(
    q_t: Annotated[Arg, "f[...,N]"],
    reference_v_t: Annotated[Arg, "f[...]"],
    *,
    use_stop_gradient: Flag = True,
) -> Annotated[Array, "f[...,N]"]:
    r"""Raises values to at least that of a reference policy, for a penalty to push on.

    .. math::
        \max\bigl(q_{i, t}, V^\mu_t\bigr)

    In the penalty of conservative Q-learning, values of the policy's actions that are
    below the reference are not pushed down further: they stay on the scale of true
    returns, which learning online afterwards needs. Popular code does this to the
    actions of the policy alone, as the paper has it, and not to uniform ones:

    >>> q_policy, q_uniform = jnp.array([1.0, 5.0]), jnp.array([0.5, 2.0])
    >>> jnp.concatenate([calibrated_q(q_policy, 3.0), q_uniform]).tolist()
    [3.0, 5.0, 0.5, 2.0]

    These are `q_samples` for `continuous_cql_penalty`.

    Args:
        q_t: values of `N` actions of the policy, `f[...,N]`, in units of return.
        reference_v_t: values of states under the reference policy, :math:`V^\mu_t`,
            `f[...]`, in units of return: returns of the data, say. Minus infinity
            changes nothing.
        use_stop_gradient: whether to hold `reference_v_t` constant, `b[]`.

    Returns:
        The values, `f[...,N]`, in units of return. No gradient flows to those that were
        raised.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> calibrated_q(jnp.array([1.0, 5.0]), 3.0).tolist()
        [3.0, 5.0]

    References:
        Nakamoto et al., `Cal-QL: Calibrated Offline RL Pre-Training for Efficient
        Online Fine-Tuning <https://arxiv.org/abs/2303.05479>`_, 2023.
    """
    floor = stop_gradient_if(use_stop_gradient, reference_v_t)[..., None]
    return jnp.maximum(q_t, floor)


@checked
def continuous_cql_penalty(
    q_t: Annotated[Arg, "f[...]"],
    q_samples: Annotated[Arg, "f[...,N]"],
    log_probs: Annotated[Arg, "f[...,N]"],
    *,
    temperature: Temperature = 1.0,
    mask_t: Mask = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the conservative penalty on a critic of continuous actions.

    .. math::
        L = \tau \log \Bigl(\frac1N \sum_i
            \frac{e^{q_t(a_i) / \tau}}{\mu_i(a_i)}\Bigr) - q_t(a_t)

    The sum estimates the integral of :math:`e^{q / \tau}` over all actions, from
    actions :math:`a_i` drawn from distributions with densities :math:`\mu_i`. Those may
    differ: draw as many from each and put them side by side, as a uniform distribution,
    the policy here and the policy in the next state. The log-density of a uniform one
    is `-jnp.log(maximum - minimum).sum()`.

    Popular code leaves out :math:`1 / N`, which adds :math:`\tau \log N` to the
    penalty: nothing to its gradient, but a threshold for `cql_lagrange_losses` has to
    be higher by as much. It also divides log-densities by :math:`\tau`, which
    estimates another integral unless the temperature is 1.

    Args:
        q_t: values of the actions in the data, `f[...]`, in units of return.
        q_samples: values of `N` sampled actions, by the same critic, `f[...,N]`, in
            units of return; minus infinity leaves one out of the sum.
        log_probs: log-densities of these actions, each under the distribution that it
            was drawn from, `f[...,N]`, in nats.
        temperature: temperature :math:`\tau` of the soft maximum, `f[]`, in units of
            return, positive; the paper has 1.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether `log_probs` are constants when differentiating,
            `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The penalty, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and not positive.
        TypeError: if an argument is not floating-point.

    Example:
        >>> q_samples, log_probs = jnp.zeros(2), jnp.log(jnp.array([0.5, 0.25]))
        >>> penalty = continuous_cql_penalty(1.0, q_samples, log_probs)
        >>> round(penalty.item(), 4)  # log((2 + 4) / 2) - 1
        0.0986

    References:
        Kumar, Zhou, Tucker and Levine, `Conservative Q-Learning for Offline
        Reinforcement Learning <https://arxiv.org/abs/2006.04779>`_, 2020.
    """
    arrays = keep_where(mask_t, q_t, q_samples, log_probs)
    taken, values, log_mu = arrays
    log_mu = stop_gradient_if(use_stop_gradient, log_mu)
    log_ratios = scaled_logits(values, None, temperature) - log_mu
    log_mean = guarded(_log_mean_exp, log_ratios)
    return reduced(temperature * log_mean - taken, mask_t, reduction)


@checked
def cql_lagrange_losses(
    penalty_t: Annotated[Arg, "f[...]"],
    multiplier: Annotated[Arg, "f[]|f[...]"],
    *,
    threshold: Annotated[Arg, "f[]|f[...]"],
    mask_t: Mask = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> tuple[Loss, Loss]:
    r"""Computes the losses that hold a conservative penalty at a threshold.

    .. math::
        L_q = \perp\!(\alpha) \, (p_t - \tau), \qquad
        L_\alpha = -\alpha \, \bigl(\perp\!(p_t) - \tau\bigr)

    where :math:`\perp` holds constant. The first is for the critic, beside its error.
    The second is for the multiplier, which rises where the penalty exceeds the
    threshold and falls where it does not. Pass the exponential of what is learned, or
    its softplus, to keep the multiplier positive; popular code also limits it.

    Args:
        penalty_t: penalties :math:`p_t`, `f[...]`, in units of return: `cql_penalty`
            with `reduction="none"`, or its mean.
        multiplier: what to learn, :math:`\alpha`, `f[]|f[...]`, in units of return; 0
            leaves the penalty out.
        threshold: penalty to aim at, :math:`\tau`, `f[]|f[...]`, in units of return.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether each loss holds the variable of the other constant,
            and the threshold, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss of the critic and that of the multiplier, each `f[]`, or of each step,
        `f[]|f[...]`, in squared units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> losses = cql_lagrange_losses(jnp.array([3.0, 5.0]), 2.0, threshold=1.0)
        >>> [loss.item() for loss in losses]  # 2 * (4 - 1), and minus that
        [6.0, -6.0]

    References:
        Kumar, Zhou, Tucker and Levine, `Conservative Q-Learning for Offline
        Reinforcement Learning <https://arxiv.org/abs/2006.04779>`_, 2020.
    """
    fixed = stop_gradient_if(use_stop_gradient, threshold)
    (excess,) = keep_where(mask_t, penalty_t - fixed)
    price, cost = stop_gradient_if(use_stop_gradient, (multiplier, excess))
    of_critic, of_multiplier = weighted(excess, price), weighted(-cost, multiplier)
    losses = reduced(of_critic, mask_t, reduction)
    return losses, reduced(of_multiplier, mask_t, reduction)


@checked
def cql_penalty(
    q_t: Annotated[Arg, "f[...,A]"],
    a_t: Annotated[Arg, "i[...]"],
    *,
    temperature: Temperature = 1.0,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
    mask_t: Mask = None,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the conservative penalty on a critic of finitely many actions.

    .. math::
        L = \tau \log \sum_a e^{q_t(a) / \tau} - q_t(a_t)

    It is the negative log-likelihood of the data under the softmax policy of the
    critic, times :math:`\tau`: never negative, and 0 where the action in the data is
    better than the others by far, or the only one. Nothing is held constant.

    Args:
        q_t: action values, `f[...,A]`, in units of return.
        a_t: actions in the data, `i[...]`, in `[0, A)`; any other makes the penalty
            NaN.
        temperature: temperature :math:`\tau` of the soft maximum, `f[]`, in units of
            return, positive; the paper has 1.
        mask: whether each action is legal, `b[...,A]`; all are if `None`. Where none
            is, the penalty is NaN without a gradient; where the action in the data is
            not, it is infinite.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The penalty, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and not positive.
        TypeError: if `a_t` is not an integer, a mask is not boolean, or another
            argument is not floating-point.

    Example:
        >>> q_t, a_t = jnp.log(jnp.array([[1.0, 3.0]])), jnp.array([0])
        >>> round(cql_penalty(q_t, a_t).item(), 4)  # log 4 - log 1
        1.3863

    References:
        Kumar, Zhou, Tucker and Levine, `Conservative Q-Learning for Offline
        Reinforcement Learning <https://arxiv.org/abs/2006.04779>`_, 2020, eq. 4.
    """
    q_t, a_t = keep_where(mask_t, q_t, a_t)
    if mask_t is not None:  # all zeros are a policy too, where steps do not count
        mask = which_legal(q_t, mask) | ~mask_t[..., None]
    log_pi = masked_log_softmax(q_t, mask, temperature)
    return reduced(-temperature * batched_index(log_pi, a_t), mask_t, reduction)


def _log_mean_exp(x: Array) -> Array:
    """Along the last axis."""
    return jax.nn.logsumexp(x, axis=-1) - jnp.log(jnp.asarray(x.shape[-1], x.dtype))

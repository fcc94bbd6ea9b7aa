r"""Errors of action values that are soft, or that widen the gap between actions.

`action_values` has the rules whose target takes the best action. Here the maximum is
softened, or the target takes away from actions that are not the best:

=======================  ==========================================  ==================
rule                     value of the state reached                  added to the reward
=======================  ==========================================  ==================
`soft_q_learning`        soft maximum, with an entropy bonus         nothing
`munchausen_q_learning`  soft maximum, with an entropy bonus         log-policy, scaled
`advantage_learning`     maximum                                     advantage, scaled
=======================  ==========================================  ==================

The soft maximum :math:`\tau \log \sum_a e^{q(a) / \tau}` lies above the maximum, by at
most :math:`\tau \log A`. `mellowmax` has a mean in place of the sum and lies below it.

An action that is not legal has a `mask` of false, or a value of minus infinity, and is
as if left out. After a termination, where the discount is zero, the next values may be
anything. What an error subtracts the prediction from is held constant when
differentiating unless asked otherwise.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import (
    batched_index,
    best_value,
    contain_nonfinite,
    greatest,
    weighted,
)
from rlprims.categorical import masked_log_softmax, which_legal
from rlprims.gradients import td_error

__all__ = [
    "advantage_learning",
    "mellowmax",
    "munchausen_q_learning",
    "soft_q_learning",
]


@checked
def mellowmax(
    values: Annotated[Arg, "f[...,A]"],
    *,
    omega: Annotated[Arg, "f[]|f[...]", "(-inf, inf)"],
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes a smooth maximum that contracts: the log of a mean of exponentials.

    .. math::
        \text{mm}_\omega(x) = \frac1\omega \log\Bigl(\frac1A
            \sum_a e^{\omega x(a)}\Bigr)

    It lies between the mean, which it is at :math:`\omega = 0`, and the maximum, where
    it goes as :math:`\omega` grows. Below 0 it goes to the minimum. Unlike that of
    values weighted by a softmax, its Bellman operator is a contraction.

    Args:
        values: values :math:`x(a)`, `f[...,A]`. Minus infinity is for an action that
            is not legal, and does not count in `A` either.
        omega: how close to the maximum, :math:`\omega`, `f[]|f[...]`, in the inverse of
            the units of `values`, finite.
        mask: whether each action is legal, `b[...,A]`; all are if `None`. Where none
            is, the result is minus infinity, without a gradient.

    Returns:
        The smooth maxima, `f[...]`, in the units of `values`.

    Raises:
        ValueError: if a shape breaks its contract, or `omega` is a Python number and
            not finite.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> values = jnp.array([1.0, 3.0])
        >>> [round(mellowmax(values, omega=x).item(), 3) for x in (0.0, 1.0, 90.0)]
        [2.0, 2.434, 2.992]

    References:
        Asadi and Littman, `An Alternative Softmax Operator for Reinforcement Learning
        <https://arxiv.org/abs/1612.05628>`_, 2017.
    """
    legal = which_legal(values, mask) & (values != -jnp.inf)
    omega = jnp.broadcast_to(omega, values.shape[:-1])
    sign = jnp.where(omega < 0, -jnp.ones_like(omega), 1)
    signed = sign[..., None] * jnp.where(legal, values, 0)
    best = sign * _mellow_best(signed, legal, sign * omega)
    return jnp.where(legal.any(axis=-1), best, -jnp.inf)


@checked
def soft_q_learning(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_t: Annotated[Arg, "f[A]"],
    *,
    temperature: Annotated[Arg, "f[]", "(0, inf)"],
    mask: Annotated[Arg | None, "b[A]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the soft Q-learning error of one transition.

    .. math::
        \delta = r_t + \gamma_t \, \tau \log \sum_a e^{q_t(a) / \tau}
            - q_{t-1}(a_{t-1})

    The soft maximum is the value of the best policy, a softmax of :math:`q_t / \tau`,
    if its entropy is worth :math:`\tau` for each nat.

    Args:
        q_tm1: action values in the state left, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`; outside, the error is NaN.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        q_t: action values in the state reached, `f[A]`, in units of return; those of
            the target network as a rule.
        temperature: softness :math:`\tau`, `f[]`, in units of return per nat, positive.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`. If none is, the error is NaN unless the discount is 0.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and not positive; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([4.0, 4.0])
        >>> error = soft_q_learning(q_tm1, 1, 0.0, 1.0, q_t, temperature=1.0)
        >>> round(error.item(), 4)  # 4 + log 2 - 2
        2.6931

    References:
        Haarnoja, Tang, Abbeel and Levine, `Reinforcement Learning with Deep
        Energy-Based Policies <https://arxiv.org/abs/1702.08165>`_, 2017.
    """
    v_t = _soft_best(q_t, temperature, discount_t, mask)
    target = r_t + weighted(v_t, discount_t)
    return td_error(batched_index(q_tm1, a_tm1), target, stop_target_gradients)


@checked
def munchausen_q_learning(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    target_q_tm1: Annotated[Arg, "f[A]"],
    target_q_t: Annotated[Arg, "f[A]"],
    *,
    temperature: Annotated[Arg, "f[]", "(0, inf)"] = 0.03,
    munchausen_weight: Annotated[Arg, "f[]", "[0, 1]"] = 0.9,
    min_log_policy: Annotated[Arg, "f[]", "[-inf, 0]"] = -1.0,
    mask_tm1: Annotated[Arg | None, "b[A]"] = None,
    mask: Annotated[Arg | None, "b[A]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the Munchausen Q-learning error of one transition.

    It is soft Q-learning with the scaled log-policy of the action taken added to the
    reward, so that the policy is kept near to what it was.

    .. math::
        \delta = r_t + \alpha \, \max\bigl(\tau \log \pi_{t-1}(a_{t-1}), l_0\bigr)
            + \gamma_t \sum_a \pi_t(a) \bigl[\bar q_t(a) - \tau \log \pi_t(a)\bigr]
            - q_{t-1}(a_{t-1}), \qquad \pi = \text{softmax}(\bar q / \tau)

    The sum is computed as the soft maximum that it equals. Where the paper clips to
    :math:`[l_0, 0]`, the upper bound holds by itself. The defaults are those of the
    paper, for rewards clipped to `[-1, 1]`.

    Args:
        q_tm1: action values in the state left, to correct, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`; outside, the error is NaN.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        target_q_tm1: the target network's action values :math:`\bar q_{t-1}` in the
            state left, `f[A]`, in units of return.
        target_q_t: those in the state reached, :math:`\bar q_t`, `f[A]`.
        temperature: softness of the policies, :math:`\tau`, `f[]`, in units of return
            per nat, positive.
        munchausen_weight: weight :math:`\alpha` of the log-policy, `f[]`,
            dimensionless, in `[0, 1]`; at 0 this is `soft_q_learning`.
        min_log_policy: the least that the log-policy counts, times the temperature,
            :math:`l_0`, `f[]`, in units of return, not positive.
        mask_tm1: whether each action is legal in the state left, `b[A]`; all are if
            `None`. If the action taken is not, the error is NaN.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`. If none is, the error is NaN unless the discount is 0.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number is out of its
            interval; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1, target_q = jnp.array([1.0, 2.0]), jnp.array([4.0, 0.0])
        >>> args = q_tm1, 1, 0.0, 0.5, target_q, target_q
        >>> round(munchausen_q_learning(*args).item(), 4)  # 0.9 * -1 + 0.5 * 4 - 2
        -0.9

    References:
        Vieillard, Pietquin and Geist, `Munchausen Reinforcement Learning
        <https://arxiv.org/abs/2007.14430>`_, 2020.
    """
    log_pi = masked_log_softmax(target_q_tm1, mask_tm1, temperature)
    log_pi = batched_index(jnp.where(log_pi == -jnp.inf, jnp.nan, log_pi), a_tm1)
    bonus = weighted(
        jnp.maximum(temperature * log_pi, min_log_policy), munchausen_weight
    )
    v_t = _soft_best(target_q_t, temperature, discount_t, mask)
    target = r_t + bonus + weighted(v_t, discount_t)
    return td_error(batched_index(q_tm1, a_tm1), target, stop_target_gradients)


@checked
def advantage_learning(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    target_q_tm1: Annotated[Arg, "f[A]"],
    target_q_t: Annotated[Arg, "f[A]"],
    *,
    action_gap_scale: Annotated[Arg, "f[]", "[0, 1)"],
    mask_tm1: Annotated[Arg | None, "b[A]"] = None,
    mask: Annotated[Arg | None, "b[A]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the advantage learning error of one transition.

    The target of Q-learning is lowered by what the action taken lacks to the best one,
    which widens the gap between the best action and the others. The best action stays
    the best.

    .. math::
        \delta = r_t + \gamma_t \max_a \bar q_t(a)
            - \alpha \bigl[\max_a \bar q_{t-1}(a) - \bar q_{t-1}(a_{t-1})\bigr]
            - q_{t-1}(a_{t-1})

    Args:
        q_tm1: action values in the state left, to correct, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`; outside, the error is NaN.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        target_q_tm1: action values in the state left that the target is made of,
            :math:`\bar q_{t-1}`, `f[A]`, in units of return: those of the target
            network, or `q_tm1` again without one.
        target_q_t: those in the state reached, :math:`\bar q_t`, `f[A]`.
        action_gap_scale: weight :math:`\alpha` of the gap, `f[]`, dimensionless, in
            `[0, 1)`; at 0 this is `q_learning`.
        mask_tm1: whether each action is legal in the state left, `b[A]`; all are if
            `None`.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `action_gap_scale` is a Python
            number outside `[0, 1)`; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1, target_q = jnp.array([1.0, 2.0]), jnp.array([4.0, 0.0])
        >>> args = q_tm1, 1, 0.0, 0.5, target_q, target_q
        >>> advantage_learning(*args, action_gap_scale=0.5).item()  # 2 - 0.5 * 4 - 2
        -2.0

    References:
        Bellemare, Ostrovski, Guez, Thomas and Munos, `Increasing the Action Gap: New
        Operators for Reinforcement Learning <https://arxiv.org/abs/1512.04860>`_, 2015.
    """
    taken = contain_nonfinite(batched_index(target_q_tm1, a_tm1), action_gap_scale)
    gap = best_value(target_q_tm1, action_gap_scale, mask_tm1) - taken
    v_t = best_value(target_q_t, discount_t, mask)
    target = r_t + discount_t * v_t - action_gap_scale * gap
    return td_error(batched_index(q_tm1, a_tm1), target, stop_target_gradients)


def _soft_best(
    q: Array, temperature: Array, discount: Array, mask: Array | None
) -> Array:
    """Returns the soft maximum over legal actions, finite where the discount is 0."""
    legal = q if mask is None else jnp.where(mask, q, -jnp.inf)
    legal = contain_nonfinite(legal, discount)
    log_probs = masked_log_softmax(legal, None, temperature)
    return greatest(legal) - temperature * jnp.max(log_probs, axis=-1)


def _mellow_best(x: Array, legal: Array, omega: Array) -> Array:
    """Returns the log of the mean exponential, for `omega` not negative.

    No digits cancel: neither where nearly all exponentials are 1, nor where nearly all
    are 0. At 0 it has the limit, and the derivative there.
    """
    share = jnp.where(legal, 1, 0) / jnp.maximum(jnp.sum(legal, -1, keepdims=True), 1)
    mean = lambda x: jnp.sum(x * share.astype(x.dtype), axis=-1)
    best = greatest(x, where=legal, initial=-jnp.inf)
    best = jnp.where(legal.any(axis=-1), best, 0)
    gaps = jnp.where(legal, x - best[..., None], 0)
    flat = -omega * jnp.min(gaps, axis=-1) < jnp.sqrt(jnp.finfo(x.dtype).eps)
    scale = jnp.where(flat, 1, omega)
    excess = mean(jnp.expm1(scale[..., None] * gaps))
    small = jnp.exp(scale[..., None] * gaps)
    log_mean = jnp.where(excess < -0.5, jnp.log(mean(small)), jnp.log1p(excess))
    near = jnp.where(flat[..., None], gaps, 0)
    series = mean(near) + omega / 2 * (mean(near**2) - mean(near) ** 2)
    return best + jnp.where(flat, series, log_mean / scale)

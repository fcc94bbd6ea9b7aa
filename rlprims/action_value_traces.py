"""Temporal-difference errors for action values, along a trajectory.

Each is a multistep target minus the value of the action taken. The targets differ in
the value they bootstrap from and in how far they trust what followed: Sarsa(λ) takes
the actions as they came, Peng's Q(λ) too but bootstraps from the best one, Retrace
corrects for the policy that took them: it trusts what followed an action as far as the
evaluated policy, too, was likely to take it.

`truncation_t` and `mask_t` mean what they mean for returns.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import (
    batched_index,
    best_value,
    contain_nonfinite,
    guarded,
    keep_where,
    weighted,
)
from rlprims.gradients import td_error
from rlprims.off_policy import (
    general_off_policy_returns_from_action_values,
    general_off_policy_returns_from_q_and_v,
    trust,
)
from rlprims.recurrences import followed
from rlprims.returns import lambda_returns

__all__ = ["q_lambda", "retrace", "retrace_continuous", "sarsa_lambda"]


@checked
def sarsa_lambda(
    q_tm1: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    q_t: Annotated[Arg, "f[T,A]"],
    a_t: Annotated[Arg, "i[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    stop_target_gradients: Flag = True,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Sarsa(λ) along a trajectory.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t
            + \gamma_t \bigl[(1 - \lambda_t) \, q_t(a_t) + \lambda_t \, G_t\bigr],
        \qquad G_T = q_T(a_T)

    Args:
        q_tm1: action values at times `0..T-1`, `f[T,A]`, in units of return.
        a_tm1: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        q_t: action values at times `1..T`, `f[T,A]`, in units of return.
        a_t: actions taken at times `1..T`, `i[T]`, in `[0, A)`.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1 = q_t = jnp.array([[1.0, 2.0], [4.0, 2.0]])
        >>> a_tm1, a_t = jnp.array([1, 0]), jnp.array([0, 0])
        >>> r_t, discount_t = jnp.ones(2), jnp.full(2, 0.5)
        >>> sarsa_lambda(q_tm1, a_tm1, r_t, discount_t, q_t, a_t, 1.0).tolist()
        [0.5, -1.0]

    References:
        Rummery and Niranjan, On-line Q-learning Using Connectionist Systems, 1994.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 12.19.
    """
    q_tm1, a_tm1, discount_t, q_t, a_t = keep_where(
        mask_t, q_tm1, a_tm1, discount_t, q_t, a_t
    )
    v_t = contain_nonfinite(batched_index(q_t, a_t), discount_t)
    returns = lambda_returns(
        r_t, discount_t, v_t, lambda_, truncation_t=truncation_t, mask_t=mask_t
    )
    return td_error(batched_index(q_tm1, a_tm1), returns, stop_target_gradients)


@checked
def q_lambda(
    q_tm1: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    q_t: Annotated[Arg, "f[T,A]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    stop_target_gradients: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Peng's Q(λ) along a trajectory.

    For Watkins' Q(λ), set `lambda_` to 0 at the steps after which the action taken was
    not the best one.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t
            \Bigl[(1 - \lambda_t) \max_a q_t(a) + \lambda_t \, G_t\Bigr],
        \qquad G_T = \max_a q_T(a)

    Args:
        q_tm1: action values at times `0..T-1`, `f[T,A]`, in units of return.
        a_tm1: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        q_t: action values at times `1..T`, `f[T,A]`, in units of return.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        mask: whether each action is legal at times `1..T`, `b[T,A]`; all are if `None`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1 = q_t = jnp.array([[1.0, 2.0], [4.0, 2.0]])
        >>> a_tm1, r_t, discount_t = jnp.array([1, 0]), jnp.ones(2), jnp.full(2, 0.5)
        >>> q_lambda(q_tm1, a_tm1, r_t, discount_t, q_t, 1.0).tolist()
        [0.5, -1.0]

    References:
        Kozuno et al., `Revisiting Peng's Q(λ) for Modern Reinforcement Learning
        <https://arxiv.org/abs/2103.00107>`_, 2021.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 12.18.
    """
    q_tm1, a_tm1, discount_t, q_t = keep_where(mask_t, q_tm1, a_tm1, discount_t, q_t)
    v_t = best_value(q_t, discount_t, mask)
    returns = lambda_returns(
        r_t, discount_t, v_t, lambda_, truncation_t=truncation_t, mask_t=mask_t
    )
    return td_error(batched_index(q_tm1, a_tm1), returns, stop_target_gradients)


@checked
def retrace(
    q_tm1: Annotated[Arg, "f[T,A]"],
    q_t: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    a_t: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    pi_t: Annotated[Arg, "f[T,A]"],
    mu_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    eps: Annotated[Arg, "f[]"] = 1e-8,
    stop_target_gradients: Flag = True,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Retrace(λ) along a trajectory.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t \Bigl[\sum_a \pi_t(a) \, q_t(a)
            + c_t \, \bigl(G_t - q_t(a_t)\bigr)\Bigr], \qquad
        c_t = \lambda_t \min\Bigl(1, \frac{\pi_t(a_t)}{\mu_t}\Bigr), \quad c_T = 0

    The ratio of two probabilities is right however small they are; it is 1 where only
    :math:`\mu_t` is 0, and 0 wherever :math:`\pi_t(a_t)` is 0.

    Args:
        q_tm1: action values at times `0..T-1`, `f[T,A]`, in units of return.
        q_t: action values at times `1..T`, `f[T,A]`, in units of return.
        a_tm1: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        a_t: actions taken at times `1..T`, `i[T]`, in `[0, A)`; the last is not used.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        pi_t: probabilities of the actions under the evaluated policy at times `1..T`,
            `f[T,A]`.
        mu_t: probabilities with which the actions `a_t` were taken, `f[T]`; the last
            is not used.
        lambda_: trust in what followed on policy, `f[]|f[T]`, dimensionless, from none
            (0), which is expected Sarsa, to full (1).
        eps: not used, whatever it is, `f[]`. RLax adds it to :math:`\mu_t`, so as not
            to divide by zero, which makes rare actions count for less.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1 = q_t = jnp.array([[2.0, 0.0], [4.0, 0.0]])
        >>> a_tm1 = a_t = jnp.array([0, 0])
        >>> pi_t, mu_t = jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([1.0, 1.0])
        >>> r_t, discount_t = jnp.ones(2), jnp.full(2, 0.5)
        >>> retrace(
        ...     q_tm1, q_t, a_tm1, a_t, r_t, discount_t, pi_t, mu_t, 1.0
        ... ).tolist()
        [-0.25, -1.0]

    References:
        Munos, Stepleton, Harutyunyan and Bellemare, `Safe and Efficient Off-Policy
        Reinforcement Learning <https://arxiv.org/abs/1606.02647>`_, 2016.
    """
    a_t, pi_t, mu_t = keep_where(mask_t, a_t, pi_t, mu_t)
    return corrected_errors(
        q_tm1,
        q_t,
        a_tm1,
        a_t,
        r_t,
        discount_t,
        pi_t,
        trust(batched_index(pi_t, a_t), mu_t),
        lambda_,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )


@checked
def retrace_continuous(
    q_tm1: Annotated[Arg, "f[T]"],
    q_t: Annotated[Arg, "f[T-1]"],
    v_t: Annotated[Arg, "f[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    log_rhos: Annotated[Arg, "f[T-1]"],
    lambda_: Annotated[Arg, "f[]|f[T-1]"],
    stop_target_gradients: Flag = True,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Retrace(λ) from the values of the actions taken alone.

    Where actions are continuous, the value of a state is not a sum over them and has
    to be given, as does the density ratio of each action taken.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}, \qquad
        G_{t-1} = r_t + \gamma_t \bigl[v_t + c_t \, (G_t - q_t)\bigr], \qquad
        c_t = \lambda_t \min(1, e^{\text{log\_rhos}_t}), \quad c_T = 0

    Args:
        q_tm1: values of the actions taken at times `0..T-1`, `f[T]`, in units of
            return.
        q_t: values of the actions taken at times `1..T-1`, `f[T-1]`, in units of
            return.
        v_t: state values under the evaluated policy at times `1..T`, `f[T]`, in
            units of return.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        log_rhos: logarithms of the importance ratios at times `1..T-1`, `f[T-1]`,
            dimensionless: of how much likelier the evaluated policy was to take the
            action taken.
        lambda_: trust in what followed on policy, `f[]|f[T-1]`, dimensionless, from
            none (0) to full (1).
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1, q_t, v_t = jnp.array([2.0, 4.0]), jnp.array([4.0]), jnp.ones(2)
        >>> r_t, discount_t, log_rhos = jnp.ones(2), jnp.full(2, 0.5), jnp.zeros(1)
        >>> retrace_continuous(q_tm1, q_t, v_t, r_t, discount_t, log_rhos, 1.0).tolist()
        [-1.75, -2.5]

    References:
        Munos, Stepleton, Harutyunyan and Bellemare, `Safe and Efficient Off-Policy
        Reinforcement Learning <https://arxiv.org/abs/1606.02647>`_, 2016.
    """
    (q_tm1,) = keep_where(mask_t, q_tm1)
    used = contain_nonfinite(
        guarded(_clipped_ratio, log_rhos),
        followed(discount_t, truncation_t, mask_t)[:-1],
    )
    returns = general_off_policy_returns_from_q_and_v(
        q_t,
        v_t,
        r_t,
        discount_t,
        weighted(used, lambda_),
        truncation_t=truncation_t,
        mask_t=mask_t,
    )
    return td_error(q_tm1, returns, stop_target_gradients)


# What all of them share that take the values of all actions


def corrected_errors(
    q_tm1: Array,
    q_t: Array,
    a_tm1: Array,
    a_t: Array,
    r_t: Array,
    discount_t: Array,
    pi_t: Array,
    trust_t: Array,
    lambda_: Array,
    stop_target_gradients: bool | Array,
    *,
    truncation_t: Array | None,
    mask_t: Array | None,
) -> Array:
    """Returns off-policy corrected returns less the values of the actions taken.

    The corrections are `lambda_ * trust_t`, of which neither is used at the end.
    """
    q_tm1, a_tm1 = keep_where(mask_t, q_tm1, a_tm1)
    used = contain_nonfinite(trust_t, followed(discount_t, truncation_t, mask_t))
    returns = general_off_policy_returns_from_action_values(
        q_t,
        a_t,
        r_t,
        discount_t,
        weighted(used, lambda_),
        pi_t,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )
    return td_error(batched_index(q_tm1, a_tm1), returns, stop_target_gradients)


def _clipped_ratio(log_rho: Array) -> Array:
    """Returns `min(1, exp(log_rho))`, which cannot overflow."""
    return jnp.exp(jnp.minimum(log_rho, 0))

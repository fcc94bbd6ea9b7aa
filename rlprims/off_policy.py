"""Returns that correct for actions another policy took.

A trajectory gathered by one policy can evaluate another: each step on, the correction
`c_t` says how far the trajectory is still to be trusted. The choice of `c_t` makes the
algorithm: `λ` gives Q(λ) with off-policy corrections, `λ min(1, π/μ)` Retrace(λ), and
`λ π` tree backup.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import batched_index, contain_nonfinite, keep_where
from rlprims.gradients import stop_gradient_if
from rlprims.recurrences import backward_recurrence, uncut

__all__ = [
    "general_off_policy_returns_from_action_values",
    "general_off_policy_returns_from_q_and_v",
]


@checked
def general_off_policy_returns_from_q_and_v(
    q_t: Annotated[Arg, "f[T-1]"],
    v_t: Annotated[Arg, "f[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    c_t: Annotated[Arg, "f[T-1]"],
    stop_target_gradients: Flag = False,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes off-policy corrected returns from action values and state values.

    .. math::
        G_{t-1} = r_t + \gamma_t \bigl[v_t + c_t \, (G_t - q_t)\bigr], \qquad c_T = 0

    Args:
        q_t: values of the actions taken at times `1..T-1`, `f[T-1]`, in units of
            return.
        v_t: state values under the evaluated policy at times `1..T`, `f[T]`, in
            units of return.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        c_t: corrections at times `1..T-1`, `f[T-1]`, dimensionless.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no return sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`; estimates of the
        values of the actions taken there, and 0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_t, v_t, r_t = jnp.array([2.0]), jnp.array([1.0, 4.0]), jnp.ones(2)
        >>> general_off_policy_returns_from_q_and_v(
        ...     q_t, v_t, r_t, jnp.full(2, 0.5), jnp.array([0.5])
        ... ).tolist()
        [1.75, 3.0]

    References:
        Munos, Stepleton, Harutyunyan and Bellemare, `Safe and Efficient Off-Policy
        Reinforcement Learning <https://arxiv.org/abs/1606.02647>`_, 2016.
    """
    q, c = jnp.append(q_t, 0), jnp.append(c_t, 0)
    returns = corrected_returns(q, v_t, r_t, discount_t, c, truncation_t, mask_t)
    return stop_gradient_if(stop_target_gradients, returns)


@checked
def general_off_policy_returns_from_action_values(
    q_t: Annotated[Arg, "f[T,A]"],
    a_t: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    c_t: Annotated[Arg, "f[T]"],
    pi_t: Annotated[Arg, "f[T,A]"],
    stop_target_gradients: Flag = False,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes off-policy corrected returns from the values of all actions.

    The state value is the expectation of the action values under the evaluated
    policy. An action of probability 0 counts for nothing, whatever its value.

    .. math::
        G_{t-1} = r_t + \gamma_t \Bigl[\sum_a \pi_t(a) \, q_t(a)
            + c_t \, \bigl(G_t - q_t(a_t)\bigr)\Bigr], \qquad c_T = 0

    Args:
        q_t: action values at times `1..T`, `f[T,A]`, in units of return.
        a_t: actions taken at times `1..T`, `i[T]`, in `[0, A)`; the last is not used.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        c_t: corrections at times `1..T`, `f[T]`, dimensionless; the last is not used.
        pi_t: probabilities of the actions under the evaluated policy at times `1..T`,
            `f[T,A]`.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own state value, and no return sees beyond.
            None was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`; estimates of the
        values of the actions taken there, and 0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_t = jnp.array([[2.0, 0.0], [4.0, 0.0]])
        >>> pi_t = jnp.array([[0.5, 0.5], [1.0, 0.0]])
        >>> a_t, half = jnp.array([0, 0]), jnp.full(2, 0.5)
        >>> general_off_policy_returns_from_action_values(
        ...     q_t, a_t, jnp.ones(2), half, half, pi_t
        ... ).tolist()
        [1.75, 3.0]

    References:
        Munos, Stepleton, Harutyunyan and Bellemare, `Safe and Efficient Off-Policy
        Reinforcement Learning <https://arxiv.org/abs/1606.02647>`_, 2016.
        Harutyunyan, Bellemare, Stepleton and Munos, `Q(λ) with Off-Policy Corrections
        <https://arxiv.org/abs/1602.04951>`_, 2016.
    """
    q_t, a_t, discount_t, pi_t = keep_where(mask_t, q_t, a_t, discount_t, pi_t)
    v_t = expected_value(q_t, pi_t, discount_t)
    c = jnp.where(jnp.arange(len(c_t)) < len(c_t) - 1, c_t, 0)
    returns = corrected_returns(
        batched_index(q_t, a_t), v_t, r_t, discount_t, c, truncation_t, mask_t
    )
    return stop_gradient_if(stop_target_gradients, returns)


def trust(pi: Array, mu: Array) -> Array:
    """Returns `min(1, pi / mu)`, and 0 where `pi` is 0, however small `mu` is."""
    ratio = pi / jnp.where(pi < mu, mu, 1)
    clipped = jnp.where((pi >= mu) & (pi > 0), 1, ratio)
    return jnp.where(jnp.isnan(mu), mu, clipped)


def expected_value(q: Array, pi: Array, discount: Array) -> Array:
    """Returns the mean value of the actions, finite where the discount is zero."""
    pi = contain_nonfinite(pi, discount[:, None])
    weights = discount[:, None] * pi
    return jnp.sum(pi * contain_nonfinite(q, weights), axis=-1)


def corrected_returns(
    q: Array,
    v: Array,
    r: Array,
    discount: Array,
    c: Array,
    truncation_t: Array | None,
    mask_t: Array | None,
) -> Array:
    """Solves `G_{t-1} = r_t + discount_t (v_t + c_t (G_t - q_t))`, where `c_T = 0`."""
    q, v, r, discount = keep_where(mask_t, q, v, r, discount)
    c = contain_nonfinite(uncut(c, truncation_t, mask_t), discount)
    q = contain_nonfinite(q, discount * c)
    bootstrap = contain_nonfinite(v, discount) - c * q
    return backward_recurrence(r + discount * bootstrap, discount * c, mask_t=mask_t)

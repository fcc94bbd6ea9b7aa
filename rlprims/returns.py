"""Multistep estimates of the return, and of the advantage over a value.

A trajectory of `T` transitions starts in states `0..T-1` and gives rewards, discounts
and values at times `1..T`. Its end need not be the end of an episode: every estimator
bootstraps there from the last value. A zero discount marks a termination, which may
fall anywhere inside; nothing that comes after it, not even NaN, reaches an estimate
from before. At a time limit the discount stays positive, and the value to bootstrap
from is that of the final observation.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import contain_nonfinite
from rlprims.gradients import stop_gradient_if
from rlprims.recurrences import backward_recurrence

__all__ = [
    "discounted_returns",
    "importance_corrected_td_errors",
    "lambda_returns",
    "n_step_bootstrapped_returns",
    "truncated_generalized_advantage_estimation",
]

Maps = tuple[Array, Array]  # `u` and `a` of the maps `x -> u_t + a_t x`


@checked
def lambda_returns(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    stop_target_gradients: Flag = False,
) -> Annotated[Array, "f[T]"]:
    r"""Computes :math:`\lambda`-returns, truncated at the end of the trajectory.

    Which algorithm this serves depends on the values: state values give TD(λ), the
    value of the action taken Sarsa(λ), the maximum over actions Peng's Q(λ).

    .. math::
        G_{t-1} = r_t + \gamma_t \bigl[(1 - \lambda_t) \, v_t + \lambda_t \, G_t\bigr],
        \qquad G_T = v_T

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: values at times `1..T`, `f[T]`, in units of return.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> lambda_returns(jnp.ones(2), jnp.full(2, 0.5), jnp.full(2, 4.0)).tolist()
        [2.5, 3.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 12.18.
    """
    inputs = r_t + _weighted(v_t, discount_t * (1 - lambda_))
    returns = backward_recurrence(inputs, discount_t * lambda_, _last(v_t))
    return stop_gradient_if(stop_target_gradients, returns)


@checked
def discounted_returns(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[]|f[T]"],
    stop_target_gradients: Flag = False,
) -> Annotated[Array, "f[T]"]:
    r"""Computes discounted returns, with a bootstrap at the end of the trajectory.

    .. math::
        G_{t-1} = r_t + \gamma_t \, G_t, \qquad G_T = v_T

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: the value at time `T`, or values at times `1..T` of which only the last
            is used, `f[]|f[T]`, in units of return.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> discounted_returns(jnp.ones(2), jnp.full(2, 0.5), 4.0).tolist()
        [2.5, 3.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 12.17.
    """
    returns = backward_recurrence(r_t, discount_t, _last(v_t))
    return stop_gradient_if(stop_target_gradients, returns)


@checked
def n_step_bootstrapped_returns(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    n: Annotated[int | Array, "i[]", "[1, inf)"],
    lambda_t: Annotated[Arg, "f[]|f[T]"] = 1.0,
    stop_target_gradients: Flag = False,
) -> Annotated[Array, "f[T]"]:
    r"""Computes returns over `n` rewards, then bootstrapped.

    Within `n` steps of the end of the trajectory, the return runs to the end and
    bootstraps from the last value there. With `lambda_t` below 1 these are
    λ-returns, truncated after `n` steps.

    .. math::
        G_{t-1}^{(n)} = r_t + \gamma_t \bigl[(1 - \lambda_t) \, v_t
            + \lambda_t \, G_t^{(n-1)}\bigr], \qquad G_t^{(0)} = v_t

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: values at times `1..T`, `f[T]`, in units of return.
        n: number of rewards in each return, `i[]`, at least 1; may exceed `T`. A
            Python `int` is fixed while tracing; an array may be traced, and is not
            checked.
        lambda_t: mixing between bootstrapping at once (0) and after `n` steps (1),
            `f[]|f[T]`, dimensionless.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`.

    Raises:
        ValueError: if a shape breaks its contract, or `n` is below 1.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> r_t, v_t = jnp.ones(3), jnp.array([2.0, 4.0, 8.0])
        >>> n_step_bootstrapped_returns(r_t, jnp.full(3, 0.5), v_t, 2).tolist()
        [2.5, 3.5, 5.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018,
        eq. 7.1 (eq. 12.9 for the λ-return so truncated).
    """
    steps = len(r_t)
    if isinstance(n, int):
        n = min(n, steps)
    else:
        n = jnp.minimum(n, jnp.asarray(steps, n.dtype)).astype(jnp.int32)
    inputs = r_t + _weighted(v_t, discount_t * (1 - lambda_t))
    total, decay = _compose_steps(inputs, discount_t * lambda_t, n)
    ends = jnp.minimum(jnp.arange(steps, dtype=jnp.int32) + n, steps) - 1
    returns = total + _weighted(v_t[ends], decay)
    return stop_gradient_if(stop_target_gradients, returns)


@checked
def truncated_generalized_advantage_estimation(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    values: Annotated[Arg, "f[T+1]"],
    stop_target_gradients: Flag = False,
) -> Annotated[Array, "f[T]"]:
    r"""Computes generalized advantage estimates, truncated with the trajectory.

    As a rule the result is a constant in a policy-gradient loss: then pass
    `stop_target_gradients=True`, since by default gradients flow to the values.

    .. math::
        \delta_{t-1} = r_t + \gamma_t \, v_t - v_{t-1}, \qquad
        A_{t-1} = \delta_{t-1} + \gamma_t \lambda_t \, A_t, \qquad A_T = 0

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        lambda_: mixing between one-step errors (0) and the whole trajectory (1),
            `f[]|f[T]`, dimensionless.
        values: values at times `0..T`, `f[T+1]`, in units of return.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.

    Returns:
        Advantages at times `0..T-1`, `f[T]`, in the units of `r_t`.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> r_t, values = jnp.ones(2), jnp.array([1.0, 2.0, 4.0])
        >>> truncated_generalized_advantage_estimation(
        ...     r_t, jnp.full(2, 0.5), 0.5, values
        ... ).tolist()
        [1.25, 1.0]

    References:
        Schulman et al., `High-Dimensional Continuous Control Using Generalized
        Advantage Estimation <https://arxiv.org/abs/1506.02438>`_, 2015, eq. 16.
    """
    errors = r_t + _weighted(values[1:], discount_t) - values[:-1]
    advantages = backward_recurrence(errors, discount_t * lambda_)
    return stop_gradient_if(stop_target_gradients, advantages)


@checked
def importance_corrected_td_errors(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    rho_tm1: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    values: Annotated[Arg, "f[T+1]"],
    stop_target_gradients: Flag = False,
) -> Annotated[Array, "f[T]"]:
    r"""Computes multistep errors with per-decision importance sampling.

    The ratios correct each step for the difference between the policy that acted and
    the one evaluated. They are not clipped, so the variance can be large.

    .. math::
        \delta_{t-1} = r_t + \gamma_t \, v_t - v_{t-1}, \qquad
        e_{t-1} = \rho_{t-1} \bigl[\delta_{t-1} + \gamma_t \lambda_t \, e_t\bigr],
        \qquad e_T = 0

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        rho_tm1: importance ratios at times `0..T-1`, `f[T]`, dimensionless: how much
            likelier the evaluated policy was to take the action taken.
        lambda_: mixing between one-step errors (0) and the whole trajectory (1),
            `f[]|f[T]`, dimensionless.
        values: values at times `0..T`, `f[T+1]`, in units of return.
        stop_target_gradients: whether the targets are constants when
            differentiating, `b[]`; by default they are not.

    Returns:
        Errors at times `0..T-1`, `f[T]`, in the units of `r_t`; add the values at
        times `0..T-1` for targets.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> r_t, rho_tm1, values = jnp.ones(2), jnp.array([2.0, 1.0]), jnp.zeros(3)
        >>> importance_corrected_td_errors(
        ...     r_t, jnp.full(2, 0.5), rho_tm1, 1.0, values
        ... ).tolist()
        [3.0, 1.0]

    References:
        Precup, Sutton and Singh, `Eligibility Traces for Off-Policy Policy Evaluation
        <http://incompleteideas.net/papers/PSS-00.pdf>`_, 2000.
        Sutton, Mahmood, Precup and van Hasselt, `A new Q(λ) with interim forward view
        and Monte Carlo equivalence <https://proceedings.mlr.press/v32/sutton14>`_,
        2014.
    """
    errors = r_t + _weighted(values[1:], discount_t) - values[:-1]
    decays = rho_tm1 * discount_t * lambda_
    corrected = backward_recurrence(_weighted(errors, rho_tm1), decays)
    return stop_gradient_if(stop_target_gradients, corrected)


def _weighted(value: Array, weight: Array) -> Array:
    """Multiplies, with nothing from where the weight is zero."""
    return weight * contain_nonfinite(value, weight)


def _last(v_t: Array) -> Array:
    """Returns the value to bootstrap from at the end of the trajectory."""
    return (
        v_t if v_t.ndim == 0 else v_t[-1] if len(v_t) else jnp.zeros_like(v_t, shape=())
    )


def _compose_steps(u: Array, a: Array, n: int | Array) -> Maps:
    """Composes each of the maps `x -> u_t + a_t x` with the `n - 1` that follow it.

    Beyond the end stands the identity. Spans of 1, 2, 4, … maps are built by doubling
    and those that `n` has in binary joined, which takes `O(log n)` operations.
    """
    span, joined = (u, a), (jnp.zeros_like(u), jnp.ones_like(a))
    for bit in range(len(u).bit_length()):
        longer = _compose(span, joined, 2**bit)
        joined = _choose((n >> bit) & 1 == 1, longer, joined)
        span = _compose(span, span, 2**bit)
    return joined


def _choose(flag: bool | Array, yes: Maps, no: Maps) -> Maps:
    if isinstance(flag, bool):
        return yes if flag else no
    return jnp.where(flag, yes[0], no[0]), jnp.where(flag, yes[1], no[1])


def _compose(early: Maps, late: Maps, shift: int) -> Maps:
    """Composes each map in `early` with the one `shift` places on in `late`."""
    (u, a), (late_u, late_a) = early, late
    late_u = jnp.pad(late_u[shift:], (0, min(shift, len(u))))
    late_a = jnp.pad(late_a[shift:], (0, min(shift, len(u))), constant_values=1)
    return u + _weighted(late_u, a), _weighted(late_a, a)

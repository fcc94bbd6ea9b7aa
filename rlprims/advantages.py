"""Multistep estimates of the advantage: of how much better an action was than expected.

An advantage is a sum of temporal-difference errors, each decayed by the steps before
it. The value of the state that a step leaves, `v_tm1`, and that of the state it
reaches, `v_t`, are given apart: at a time limit the next state in the trajectory is
the first of another episode, and only `v_t` knows the final observation. Where both
come in one array, `values`, they can only be told apart if nothing was cut.

`truncation_t` and `mask_t` mean what they mean for returns.
"""

from typing import Annotated

from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where, weighted
from rlprims.gradients import stop_gradient_if
from rlprims.recurrences import backward_recurrence, uncut

__all__ = [
    "generalized_advantage_estimation",
    "importance_corrected_td_errors",
    "truncated_generalized_advantage_estimation",
]


@checked
def generalized_advantage_estimation(
    v_tm1: Annotated[Arg, "f[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes generalized advantage estimates from values before and after each step.

    .. math::
        \delta_{t-1} = r_t + \gamma_t \, v_t - v_{t-1}, \qquad
        A_{t-1} = \delta_{t-1} + \gamma_t \lambda_t \, A_t, \qquad A_T = 0

    With :math:`A_t = 0` after a truncated step too. In an unbroken trajectory `v_t[k]`
    and `v_tm1[k+1]` are values of one state, and these are the estimates of
    `truncated_generalized_advantage_estimation`.

    Args:
        v_tm1: values at times `0..T-1`, `f[T]`, in units of return.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: values of the states reached at times `1..T`, `f[T]`, in units of return;
            at a truncated step of the final observation, before any reset.
        lambda_: mixing between one-step errors (0) and the whole trajectory (1),
            `f[]|f[T]`, dimensionless.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no estimate sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to block gradients through the result, `b[]`, as
            is right in a policy-gradient loss; here, unlike in RLax's function, by
            default.

    Returns:
        Advantages at times `0..T-1`, `f[T]`, in the units of `r_t`; 0 at steps that
        do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> v_tm1, v_t = jnp.array([1.0, 100.0]), jnp.array([2.0, 4.0])
        >>> generalized_advantage_estimation(
        ...     v_tm1, jnp.ones(2), jnp.full(2, 0.5), v_t, 0.5,
        ...     truncation_t=jnp.array([True, False]),
        ... ).tolist()  # 1 + 0.5 * 2 - 1 and 1 + 0.5 * 4 - 100
        [1.0, -97.0]

    References:
        Schulman et al., `High-Dimensional Continuous Control Using Generalized
        Advantage Estimation <https://arxiv.org/abs/1506.02438>`_, 2015, eq. 16.
    """
    v_tm1, r_t, discount_t, v_t = keep_where(mask_t, v_tm1, r_t, discount_t, v_t)
    decays = discount_t * uncut(lambda_, truncation_t, mask_t)
    errors = r_t + weighted(v_t, discount_t) - v_tm1
    advantages = backward_recurrence(errors, decays, mask_t=mask_t)
    return stop_gradient_if(stop_target_gradients, advantages)


@checked
def truncated_generalized_advantage_estimation(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    values: Annotated[Arg, "f[T+1]"],
    stop_target_gradients: Flag = False,
    *,
    v_t: Annotated[Arg | None, "f[T]"] = None,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
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
        v_t: values of the states reached at times `1..T`, `f[T]`, in units of return;
            `values[1:]` if `None`. Needed with `truncation_t`, since after a time limit
            `values` goes on with the next episode.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no estimate sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Advantages at times `0..T-1`, `f[T]`, in the units of `r_t`; 0 at steps that
        do not count.

    Raises:
        ValueError: if a shape breaks its contract, or `truncation_t` comes without
            `v_t`; use `jax.vmap` for batches.
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
    if v_t is None:
        v_t = _following(
            "truncated_generalized_advantage_estimation", values, truncation_t
        )
    return generalized_advantage_estimation(
        values[:-1],
        r_t,
        discount_t,
        v_t,
        lambda_,
        truncation_t=truncation_t,
        mask_t=mask_t,
        stop_target_gradients=stop_target_gradients,
    )


@checked
def importance_corrected_td_errors(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    rho_tm1: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    values: Annotated[Arg, "f[T+1]"],
    stop_target_gradients: Flag = False,
    *,
    v_t: Annotated[Arg | None, "f[T]"] = None,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
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
        v_t: values of the states reached at times `1..T`, `f[T]`, in units of return;
            `values[1:]` if `None`. Needed with `truncation_t`, since after a time limit
            `values` goes on with the next episode.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no estimate sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Errors at times `0..T-1`, `f[T]`, in the units of `r_t`, 0 at steps that do not
        count; add the values at times `0..T-1` for targets.

    Raises:
        ValueError: if a shape breaks its contract, or `truncation_t` comes without
            `v_t`; use `jax.vmap` for batches.
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
    if v_t is None:
        v_t = _following("importance_corrected_td_errors", values, truncation_t)
    v_tm1, r_t, discount_t, rho_tm1, v_t = keep_where(
        mask_t, values[:-1], r_t, discount_t, rho_tm1, v_t
    )
    decays = rho_tm1 * discount_t * uncut(lambda_, truncation_t, mask_t)
    errors = weighted(r_t + weighted(v_t, discount_t) - v_tm1, rho_tm1)
    corrected = backward_recurrence(errors, decays, mask_t=mask_t)
    return stop_gradient_if(stop_target_gradients, corrected)


def _following(name: str, values: Array, truncation_t: Array | None) -> Array:
    """Returns the values after each step, unless some are those of other episodes."""
    if truncation_t is not None:
        raise ValueError(
            f"{name}: truncation_t needs v_t, the values of the states reached, since "
            "after a time limit values goes on with the next episode."
        )
    return values[1:]

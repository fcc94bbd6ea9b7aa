r"""V-trace: actor-critic targets from the trajectories of another policy.

An actor runs behind the learner, so its actions came from an older policy. Each step
has an importance ratio, how much likelier the learner was to take the action taken, and
V-trace clips it twice. How far a value moves is clipped at :math:`\bar\rho`, which
decides what values are learned; how far back it reaches is clipped at 1, which decides
only how fast:

.. math::
    \rho_{t-1} = \min(\bar\rho, \text{rho}_{t-1}), \qquad
    c_{t-1} = \min(1, \text{rho}_{t-1})

The *leaky* form mixes in the ratio as it came, and `alpha` of 1 is V-trace itself:

.. math::
    \rho_{t-1} = (1 - \alpha) \, \text{rho}_{t-1}
        + \alpha \min(\bar\rho, \text{rho}_{t-1}), \qquad c_{t-1} \text{ likewise}

An infinite ratio is clipped like any by V-trace, but stays infinite in a mixture with
`alpha` below 1. The step's error is then infinite too, with the sign of what it weighs,
and NaN where that is zero or two infinities that differ in sign.

The value of the state that a step leaves, `v_tm1`, and that of the state it reaches,
`v_t`, are given apart, since after a time limit the next state in the trajectory is
another episode's. `truncation_t` and `mask_t` mean what they mean for returns.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where, weighted
from rlprims.gradients import stop_gradient_if, td_error
from rlprims.recurrences import backward_recurrence, passing_over, uncut

__all__ = [
    "VTraceOutput",
    "leaky_vtrace",
    "leaky_vtrace_td_error_and_advantage",
    "vtrace",
    "vtrace_td_error_and_advantage",
]


class VTraceOutput(NamedTuple):
    """What an actor-critic learns from a trajectory.

    Attributes:
        errors: V-trace targets minus values at times `0..T-1`, `f[T]`, in units of
            return, to train the values with.
        pg_advantage: advantages of the actions taken there, `f[T]`, in units of
            return, each times its clipped ratio, to train the policy with.
        q_estimate: estimates of the values of those actions, `f[T]`, in units of
            return.
    """

    errors: Annotated[Array, "f[T]"]
    pg_advantage: Annotated[Array, "f[T]"]
    q_estimate: Annotated[Array, "f[T]"]


@checked
def vtrace(
    v_tm1: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    rho_tm1: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    clip_rho_threshold: Annotated[Arg, "f[]|f[T]", "[0, inf]"] = 1.0,
    stop_target_gradients: Flag = True,
    sample_mask: Annotated[Arg | None, "b[T]"] = None,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes V-trace errors of values along a trajectory.

    .. math::
        \delta_{t-1} = r_t + \gamma_t \, v_t - v_{t-1}, \qquad
        e_{t-1} = \rho_{t-1} \, \delta_{t-1}
            + \gamma_t \, c_{t-1} \, \lambda_t \, e_t, \qquad e_T = 0

    Args:
        v_tm1: values at times `0..T-1`, `f[T]`, in units of return.
        v_t: values of the states reached at times `1..T`, `f[T]`, in units of return;
            at a truncated step of the final observation, before any reset.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        rho_tm1: importance ratios at times `0..T-1`, `f[T]`, dimensionless: how much
            likelier the evaluated policy was to take the action taken.
        lambda_: mixing between one-step errors (0) and the whole trajectory (1),
            `f[]|f[T]`, dimensionless.
        clip_rho_threshold: upper bound on the ratio that weighs each error,
            `f[]|f[T]`, dimensionless, in `[0, inf]`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        sample_mask: another name of `mask_t`, `b[T]`, which RLax uses.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors at times `0..T-1`, targets minus values, `f[T]`, in units of return;
        0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract, or both `sample_mask` and `mask_t`
            are given; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> v_tm1, v_t, half = jnp.zeros(2), jnp.zeros(2), jnp.full(2, 0.5)
        >>> vtrace(v_tm1, v_t, jnp.ones(2), half, jnp.array([0.5, 2.0])).tolist()
        [0.75, 1.0]

    References:
        Espeholt et al., `IMPALA: Scalable Distributed Deep-RL with Importance Weighted
        Actor-Learner Architectures <https://arxiv.org/abs/1802.01561>`_, 2018, eq. 1,
        with the recursion of remark 1 and the :math:`\lambda` of remark 2.
    """
    return leaky_vtrace_td_error_and_advantage(
        v_tm1,
        v_t,
        r_t,
        discount_t,
        rho_tm1,
        lambda_=lambda_,
        clip_rho_threshold=clip_rho_threshold,
        stop_target_gradients=stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=_one_of("vtrace", sample_mask, mask_t),
    ).errors


@checked
def leaky_vtrace(
    v_tm1: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    rho_tm1: Annotated[Arg, "f[T]"],
    alpha_: Annotated[Arg, "f[]|f[T]", "[0, 1]"] = 1.0,
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    clip_rho_threshold: Annotated[Arg, "f[]|f[T]", "[0, inf]"] = 1.0,
    stop_target_gradients: Flag = True,
    sample_mask: Annotated[Arg | None, "b[T]"] = None,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes V-trace errors with ratios that are only partly clipped.

    .. math::
        \delta_{t-1} = r_t + \gamma_t \, v_t - v_{t-1}, \qquad
        e_{t-1} = \rho_{t-1} \, \delta_{t-1}
            + \gamma_t \, c_{t-1} \, \lambda_t \, e_t, \qquad e_T = 0

    with the leaky :math:`\rho` and :math:`c` above. Clipping makes the errors of little
    variance and late to see what lies ahead; less of it, the other way round.

    Args:
        v_tm1: values at times `0..T-1`, `f[T]`, in units of return.
        v_t: values of the states reached at times `1..T`, `f[T]`, in units of return;
            at a truncated step of the final observation, before any reset.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        rho_tm1: importance ratios at times `0..T-1`, `f[T]`, dimensionless: how much
            likelier the evaluated policy was to take the action taken.
        alpha_: mixing between ratios as they came (0) and clipped ones (1),
            `f[]|f[T]`, dimensionless, in `[0, 1]`.
        lambda_: mixing between one-step errors (0) and the whole trajectory (1),
            `f[]|f[T]`, dimensionless.
        clip_rho_threshold: upper bound on the ratio that weighs each error,
            `f[]|f[T]`, dimensionless, in `[0, inf]`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        sample_mask: another name of `mask_t`, `b[T]`, which RLax uses.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors at times `0..T-1`, targets minus values, `f[T]`, in units of return;
        0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract, or both `sample_mask` and `mask_t`
            are given; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> v_tm1, v_t, half = jnp.zeros(2), jnp.zeros(2), jnp.full(2, 0.5)
        >>> leaky_vtrace(
        ...     v_tm1, v_t, jnp.ones(2), half, jnp.array([0.5, 2.0]), alpha_=0.5
        ... ).tolist()
        [0.875, 1.5]

    References:
        Zahavy et al., `A Self-Tuning Actor-Critic Algorithm
        <https://arxiv.org/abs/2002.12928>`_, 2020, where the two ratios have an
        :math:`\alpha` each.
    """
    return leaky_vtrace_td_error_and_advantage(
        v_tm1,
        v_t,
        r_t,
        discount_t,
        rho_tm1,
        alpha_,
        lambda_,
        clip_rho_threshold,
        stop_target_gradients=stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=_one_of("leaky_vtrace", sample_mask, mask_t),
    ).errors


@checked
def vtrace_td_error_and_advantage(
    v_tm1: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    rho_tm1: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    clip_rho_threshold: Annotated[Arg, "f[]|f[T]", "[0, inf]"] = 1.0,
    clip_pg_rho_threshold: Annotated[Arg, "f[]|f[T]", "[0, inf]"] = 1.0,
    stop_target_gradients: Flag = True,
    sample_mask: Annotated[Arg | None, "b[T]"] = None,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> VTraceOutput:
    r"""Computes V-trace errors of values, and advantages of the actions taken.

    With the errors :math:`e` of `vtrace` and :math:`\rho'` a ratio clipped for the
    policy gradient:

    .. math::
        q_{t-1} = r_t + \gamma_t \, (v_t + \lambda_t \, e_t), \qquad
        A_{t-1} = \rho'_{t-1} \, (q_{t-1} - v_{t-1})

    Args:
        v_tm1: values at times `0..T-1`, `f[T]`, in units of return.
        v_t: values of the states reached at times `1..T`, `f[T]`, in units of return;
            at a truncated step of the final observation, before any reset.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        rho_tm1: importance ratios at times `0..T-1`, `f[T]`, dimensionless: how much
            likelier the evaluated policy was to take the action taken.
        lambda_: mixing between one-step errors (0) and the whole trajectory (1),
            `f[]|f[T]`, dimensionless.
        clip_rho_threshold: upper bound on the ratio that weighs each error,
            `f[]|f[T]`, dimensionless, in `[0, inf]`.
        clip_pg_rho_threshold: upper bound on the ratio that weighs each advantage,
            `f[]|f[T]`, dimensionless, in `[0, inf]`.
        stop_target_gradients: whether to hold constant the targets, the advantages and
            the estimates, `b[]`.
        sample_mask: another name of `mask_t`, `b[T]`, which RLax uses.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no result sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        A `VTraceOutput` of `errors`, `pg_advantage` and `q_estimate` at times `0..T-1`,
        each `f[T]`, in units of return, and 0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract, or both `sample_mask` and `mask_t`
            are given; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> v_tm1, v_t, half = jnp.zeros(2), jnp.zeros(2), jnp.full(2, 0.5)
        >>> rho_tm1 = jnp.array([0.5, 2.0])
        >>> out = vtrace_td_error_and_advantage(v_tm1, v_t, jnp.ones(2), half, rho_tm1)
        >>> out.errors.tolist(), out.pg_advantage.tolist(), out.q_estimate.tolist()
        ([0.75, 1.0], [0.75, 1.0], [1.5, 1.0])

    References:
        Espeholt et al., `IMPALA: Scalable Distributed Deep-RL with Importance Weighted
        Actor-Learner Architectures <https://arxiv.org/abs/1802.01561>`_, 2018, eqs. 1
        and 4.
    """
    return leaky_vtrace_td_error_and_advantage(
        v_tm1,
        v_t,
        r_t,
        discount_t,
        rho_tm1,
        lambda_=lambda_,
        clip_rho_threshold=clip_rho_threshold,
        clip_pg_rho_threshold=clip_pg_rho_threshold,
        stop_target_gradients=stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=_one_of("vtrace_td_error_and_advantage", sample_mask, mask_t),
    )


@checked
def leaky_vtrace_td_error_and_advantage(
    v_tm1: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    rho_tm1: Annotated[Arg, "f[T]"],
    alpha: Annotated[Arg, "f[]|f[T]", "[0, 1]"] = 1.0,
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    clip_rho_threshold: Annotated[Arg, "f[]|f[T]", "[0, inf]"] = 1.0,
    clip_pg_rho_threshold: Annotated[Arg, "f[]|f[T]", "[0, inf]"] = 1.0,
    stop_target_gradients: Flag = True,
    sample_mask: Annotated[Arg | None, "b[T]"] = None,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> VTraceOutput:
    r"""Computes leaky V-trace errors, and advantages of the actions taken.

    With the errors :math:`e` of `leaky_vtrace` and :math:`\rho'` a leaky ratio for the
    policy gradient:

    .. math::
        q_{t-1} = r_t + \gamma_t \, (v_t + \lambda_t \, e_t), \qquad
        A_{t-1} = \rho'_{t-1} \, (q_{t-1} - v_{t-1})

    Args:
        v_tm1: values at times `0..T-1`, `f[T]`, in units of return.
        v_t: values of the states reached at times `1..T`, `f[T]`, in units of return;
            at a truncated step of the final observation, before any reset.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        rho_tm1: importance ratios at times `0..T-1`, `f[T]`, dimensionless: how much
            likelier the evaluated policy was to take the action taken.
        alpha: mixing between ratios as they came (0) and clipped ones (1),
            `f[]|f[T]`, dimensionless, in `[0, 1]`.
        lambda_: mixing between one-step errors (0) and the whole trajectory (1),
            `f[]|f[T]`, dimensionless.
        clip_rho_threshold: upper bound on the ratio that weighs each error,
            `f[]|f[T]`, dimensionless, in `[0, inf]`.
        clip_pg_rho_threshold: upper bound on the ratio that weighs each advantage,
            `f[]|f[T]`, dimensionless, in `[0, inf]`.
        stop_target_gradients: whether to hold constant the targets, the advantages and
            the estimates, `b[]`.
        sample_mask: another name of `mask_t`, `b[T]`, which RLax uses.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no result sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        A `VTraceOutput` of `errors`, `pg_advantage` and `q_estimate` at times `0..T-1`,
        each `f[T]`, in units of return, and 0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract, or both `sample_mask` and `mask_t`
            are given; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> v_tm1, v_t, half = jnp.zeros(2), jnp.zeros(2), jnp.full(2, 0.5)
        >>> rho_tm1, r_t = jnp.array([0.5, 2.0]), jnp.ones(2)
        >>> out = leaky_vtrace_td_error_and_advantage(
        ...     v_tm1, v_t, r_t, half, rho_tm1, alpha=0.5
        ... )
        >>> out.errors.tolist(), out.pg_advantage.tolist(), out.q_estimate.tolist()
        ([0.875, 1.5], [0.875, 1.5], [1.75, 1.0])

    References:
        Zahavy et al., `A Self-Tuning Actor-Critic Algorithm
        <https://arxiv.org/abs/2002.12928>`_, 2020, where the ratios have an
        :math:`\alpha` each.
    """
    mask_t = _one_of("leaky_vtrace_td_error_and_advantage", sample_mask, mask_t)
    v_tm1, v_t, r_t, discount_t, rho_tm1 = keep_where(
        mask_t, v_tm1, v_t, r_t, discount_t, rho_tm1
    )
    lambda_t = uncut(lambda_, truncation_t, mask_t)
    rho, c = (_leaky(rho_tm1, bound, alpha) for bound in (clip_rho_threshold, 1.0))
    steps = weighted(r_t + weighted(v_t, discount_t) - v_tm1, rho)
    decays = weighted(c, discount_t * lambda_t).at[-1:].set(0)  # nothing follows
    errors = backward_recurrence(*passing_over(mask_t, steps, decays))
    following = jnp.append(errors, 0)[1:]
    q_estimate = r_t + weighted(v_t + weighted(following, lambda_t), discount_t)
    rho_pg = _leaky(rho_tm1, clip_pg_rho_threshold, alpha)
    advantages = weighted(q_estimate - v_tm1, rho_pg)
    # A prediction of zero, with the gradient of the value, rounds no error off.
    zero = v_tm1 - jax.lax.stop_gradient(v_tm1)
    errors = td_error(zero, zero + errors, stop_target_gradients)
    held = stop_gradient_if(stop_target_gradients, (advantages, q_estimate))
    return VTraceOutput(*keep_where(mask_t, errors, *held))


def _leaky(rho: Array, bound: Arg, alpha: Array) -> Array:
    """Mixes ratios with clipped ones; infinite ratios too."""
    return weighted(rho, 1 - alpha) + weighted(jnp.minimum(bound, rho), alpha)


def _one_of(name: str, sample_mask: Array | None, mask_t: Array | None) -> Array | None:
    """Returns the mask, which has two names."""
    if sample_mask is None or mask_t is None:
        return mask_t if sample_mask is None else sample_mask
    raise ValueError(f"{name}: sample_mask and mask_t are one thing: give one of them.")

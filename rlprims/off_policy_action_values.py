"""Temporal-difference errors of one policy's action values, from another's actions.

`retrace`, among the traces of action values, corrects for the policy that acted, and
bounds the correction. These are its relatives, which differ in how far they follow the
actions that were taken, and what they need to know of the policy that took them:

==================================  ===========================  =====================
errors                              trust in what followed       the acting policy is
==================================  ===========================  =====================
`tree_backup`                       `λ π(a)`                     not needed
`off_policy_q_lambda`               `λ`                          not needed, but near
`q_sigma`                           `λ [σ ρ + (1 - σ) π(a)]`     known
`per_decision_importance_sampling`  `λ ρ`                        known
==================================  ===========================  =====================

All but the last bootstrap from the mean value of the actions under the evaluated
policy, where actions of probability 0, as those that are not legal, count for nothing.

`truncation_t` and `mask_t` mean what they mean for returns.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.action_value_traces import corrected_errors
from rlprims.arrays import batched_index, contain_nonfinite, keep_where, weighted
from rlprims.gradients import td_error
from rlprims.off_policy import corrected_returns, expected_value
from rlprims.recurrences import followed
from rlprims.returns import lambda_returns

__all__ = [
    "off_policy_q_lambda",
    "per_decision_importance_sampling",
    "q_sigma",
    "tree_backup",
]


@checked
def tree_backup(
    q_tm1: Annotated[Arg, "f[T,A]"],
    q_t: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    a_t: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    pi_t: Annotated[Arg, "f[T,A]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of tree backup along a trajectory.

    The target follows an action as far as the evaluated policy would have taken it,
    and bootstraps from the values of the others. Nothing needs to be known of the
    policy that acted, and there are no ratios of large variance; yet where the
    evaluated policy is spread over many actions, little is seen of what followed.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t \Bigl[\sum_a \pi_t(a) \, q_t(a)
            + \lambda_t \, \pi_t(a_t) \, \bigl(G_t - q_t(a_t)\bigr)\Bigr]

    with no correction at the end, :math:`G_{T-1} = r_T + \gamma_T \sum_a \pi_T(a) \,
    q_T(a)`. The policy that is greedy with respect to `q_t` gives multistep
    Q-learning, `watkins_q_lambda`.

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
        lambda_: trust in what followed, `f[]|f[T]`, dimensionless, from none (0), which
            is expected Sarsa, to full (1).
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1 = q_t = jnp.array([[2.0, 0.0], [4.0, 0.0]])
        >>> a_tm1 = a_t = jnp.array([0, 0])
        >>> pi_t = jnp.array([[0.5, 0.5], [1.0, 0.0]])
        >>> r_t, discount_t = jnp.ones(2), jnp.full(2, 0.5)
        >>> tree_backup(q_tm1, q_t, a_tm1, a_t, r_t, discount_t, pi_t).tolist()
        [-0.25, -1.0]

    References:
        Precup, Sutton and Singh, `Eligibility Traces for Off-Policy Policy Evaluation
        <http://incompleteideas.net/papers/PSS-00.pdf>`_, 2000.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018,
        eq. 7.16.
    """
    a_t, pi_t = keep_where(mask_t, a_t, pi_t)
    return corrected_errors(
        q_tm1,
        q_t,
        a_tm1,
        a_t,
        r_t,
        discount_t,
        pi_t,
        batched_index(pi_t, a_t),
        lambda_,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )


@checked
def off_policy_q_lambda(
    q_tm1: Annotated[Arg, "f[T,A]"],
    q_t: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    a_t: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    pi_t: Annotated[Arg, "f[T,A]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Q(λ) with off-policy corrections along a trajectory.

    What is corrected are the rewards, by the values of the actions taken, and not the
    probabilities of the actions: the target follows the trajectory whoever acted. It
    converges only where `lambda_` is small or the two policies are near each other;
    `retrace` does whatever they are. For optimal values, let the evaluated policy be
    greedy with respect to `q_t`.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t \Bigl[\sum_a \pi_t(a) \, q_t(a)
            + \lambda_t \, \bigl(G_t - q_t(a_t)\bigr)\Bigr]

    with no correction at the end, :math:`G_{T-1} = r_T + \gamma_T \sum_a \pi_T(a) \,
    q_T(a)`.

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
        lambda_: trust in what followed, `f[]|f[T]`, dimensionless, from none (0), which
            is expected Sarsa, to full (1).
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1 = q_t = jnp.array([[2.0, 0.0], [4.0, 0.0]])
        >>> a_tm1 = a_t = jnp.array([0, 0])
        >>> pi_t = jnp.array([[0.5, 0.5], [1.0, 0.0]])
        >>> r_t, discount_t = jnp.ones(2), jnp.full(2, 0.5)
        >>> off_policy_q_lambda(
        ...     q_tm1, q_t, a_tm1, a_t, r_t, discount_t, pi_t, 1.0
        ... ).tolist()
        [0.0, -1.0]

    References:
        Harutyunyan, Bellemare, Stepleton and Munos, `Q(λ) with Off-Policy Corrections
        <https://arxiv.org/abs/1602.04951>`_, 2016.
    """
    return corrected_errors(
        q_tm1,
        q_t,
        a_tm1,
        a_t,
        r_t,
        discount_t,
        pi_t,
        jnp.ones_like(r_t),
        lambda_,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )


@checked
def q_sigma(
    q_tm1: Annotated[Arg, "f[T,A]"],
    q_t: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    a_t: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    pi_t: Annotated[Arg, "f[T,A]"],
    rho_t: Annotated[Arg, "f[T]"],
    sigma: Annotated[Arg, "f[]|f[T]", "[0, 1]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    *,
    control_variate: bool = False,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Q(σ) along a trajectory.

    Each step samples the next action (:math:`\sigma_t = 1`), takes the mean over all of
    them (0), or mixes both. All zeros give `tree_backup`, all ones
    `per_decision_importance_sampling`, which is Sarsa where the evaluated policy acted.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t
            \bigl[b_t + \lambda_t c_t \, \bigl(G_t - q_t(a_t)\bigr)\bigr], \qquad
        G_T = q_T(a_T)

    .. math::
        b_t = (1 - \sigma_t) \sum_a \pi_t(a) \, q_t(a) + \sigma_t \, \rho_t \, q_t(a_t),
        \qquad c_t = (1 - \sigma_t) \, \pi_t(a_t) + \sigma_t \, \rho_t

    On policy this is the paper's algorithm. Off policy the paper multiplies the whole
    error by the ratios of all its steps; here, as in the book, each ratio weighs only
    what came after its action. With `control_variate`, as in the book too, all of
    :math:`b_t` is the mean value: what is left out has mean zero, and its variance goes
    with it.

    Args:
        q_tm1: action values at times `0..T-1`, `f[T,A]`, in units of return.
        q_t: action values at times `1..T`, `f[T,A]`, in units of return.
        a_tm1: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        a_t: actions taken at times `1..T`, `i[T]`, in `[0, A)`. Without
            `control_variate` the last is used, and those at truncated steps: sample an
            action there, or set `sigma` to 0.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        pi_t: probabilities of the actions under the evaluated policy at times `1..T`,
            `f[T,A]`.
        rho_t: importance ratios of the actions `a_t`, `f[T]`, dimensionless: how much
            likelier the evaluated policy was to take them; ones if it did.
        sigma: how far to sample, :math:`\sigma_t`, `f[]|f[T]`, dimensionless, in
            `[0, 1]`. Where it is 0 the ratio is not used.
        lambda_: trust in what followed, `f[]|f[T]`, dimensionless, from none (0) to
            full (1).
        control_variate: whether to bootstrap from the mean value where the next action
            is sampled too; a Python `bool`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract, or `sigma` is a Python number
            outside `[0, 1]`; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1 = q_t = jnp.array([[2.0, 0.0], [4.0, 0.0]])
        >>> a_tm1 = a_t = jnp.array([0, 0])
        >>> pi_t, rho_t = jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.ones(2)
        >>> r_t, discount_t = jnp.ones(2), jnp.full(2, 0.5)
        >>> transitions = q_tm1, q_t, a_tm1, a_t, r_t, discount_t, pi_t, rho_t
        >>> q_sigma(*transitions, 0.0).tolist()  # as tree_backup
        [-0.25, -1.0]
        >>> q_sigma(*transitions, 1.0).tolist()  # as sarsa_lambda
        [0.5, -1.0]

    References:
        De Asis, Hernandez-Garcia, Holland and Sutton, `Multi-step Reinforcement
        Learning: A Unifying Algorithm <https://arxiv.org/abs/1703.01327>`_, 2017.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018,
        eq. 7.17, with control variates.
    """
    sigma = jnp.broadcast_to(sigma, r_t.shape)
    q_tm1, q_t, a_tm1, a_t, discount_t, pi_t, rho_t, sigma = keep_where(
        mask_t, q_tm1, q_t, a_tm1, a_t, discount_t, pi_t, rho_t, sigma
    )
    passed = followed(discount_t, truncation_t, mask_t)
    rho_t = contain_nonfinite(rho_t, passed if control_variate else discount_t)
    pi_taken = contain_nonfinite(batched_index(pi_t, a_t), passed)
    q_taken, v_t = batched_index(q_t, a_t), expected_value(q_t, pi_t, discount_t)
    sampled, averaged = weighted(rho_t, sigma), 1 - sigma
    trust_t = weighted(sampled + weighted(pi_taken, averaged), lambda_)
    if not control_variate:
        q_known = contain_nonfinite(q_taken, discount_t)
        v_t = weighted(v_t, averaged) + weighted(q_known, sampled)
    returns = corrected_returns(
        q_taken,
        v_t,
        r_t,
        discount_t,
        trust_t.at[-1:].set(0),
        truncation_t,
        mask_t,
    )
    return td_error(batched_index(q_tm1, a_tm1), returns, stop_target_gradients)


@checked
def per_decision_importance_sampling(
    q_tm1: Annotated[Arg, "f[T,A]"],
    q_t: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    a_t: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    rho_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes errors of action values with per-decision importance sampling.

    Each reward is weighted by the ratios of the actions that led to it and by no
    later ones, nor by that of the first action, which is given. The targets are
    unbiased, and their variance grows with the product of the ratios: `retrace` clips
    them. For state values, `importance_corrected_td_errors` does the same.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t \, \rho_t
            \bigl[(1 - \lambda_t) \, q_t(a_t) + \lambda_t \, G_t\bigr],
        \qquad G_T = q_T(a_T)

    Args:
        q_tm1: action values at times `0..T-1`, `f[T,A]`, in units of return.
        q_t: action values at times `1..T`, `f[T,A]`, in units of return.
        a_tm1: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        a_t: actions taken at times `1..T`, `i[T]`, in `[0, A)`. The last is
            used, and those at truncated steps: sample an action there.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        rho_t: importance ratios of the actions `a_t`, `f[T]`, dimensionless: how much
            likelier the evaluated policy was to take them; ones give `sarsa_lambda`.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1 = q_t = jnp.array([[2.0, 0.0], [4.0, 0.0]])
        >>> a_tm1 = a_t = jnp.array([0, 0])
        >>> r_t, discount_t = jnp.ones(2), jnp.full(2, 0.5)
        >>> rho_t = jnp.array([2.0, 1.0])
        >>> per_decision_importance_sampling(
        ...     q_tm1, q_t, a_tm1, a_t, r_t, discount_t, rho_t
        ... ).tolist()  # 1 + 0.5 * 2 * (1 + 0.5 * 4) - 2 and 1 + 0.5 * 4 - 4
        [2.0, -1.0]

    References:
        Precup, Sutton and Singh, `Eligibility Traces for Off-Policy Policy Evaluation
        <http://incompleteideas.net/papers/PSS-00.pdf>`_, 2000.
    """
    q_tm1, q_t, a_tm1, a_t, discount_t, rho_t = keep_where(
        mask_t, q_tm1, q_t, a_tm1, a_t, discount_t, rho_t
    )
    returns = lambda_returns(
        r_t,
        weighted(rho_t, discount_t),
        batched_index(q_t, a_t),
        lambda_,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )
    return td_error(batched_index(q_tm1, a_tm1), returns, stop_target_gradients)

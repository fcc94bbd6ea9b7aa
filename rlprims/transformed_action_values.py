"""Temporal-difference errors for action values on a transformed scale.

Each is a rule of `action_value_traces`, or n-step Q-learning, with targets that
`nonlinear_bellman` builds: action values are transformed, rewards are not. With the
`IDENTITY_PAIR`, the default, it is that rule itself.

`truncation_t` and `mask_t` mean what they mean for returns.
"""

from typing import Annotated

from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import (
    batched_index,
    best_value,
    contain_nonfinite,
    keep_where,
    weighted,
)
from rlprims.gradients import td_error
from rlprims.nonlinear_bellman import (
    transformed_general_off_policy_returns_from_action_values,
    transformed_lambda_returns,
    transformed_n_step_returns,
)
from rlprims.off_policy import trust
from rlprims.recurrences import followed
from rlprims.transform_pairs import IDENTITY_PAIR, TxPair, as_pair

__all__ = [
    "transformed_n_step_q_learning",
    "transformed_q_lambda",
    "transformed_retrace",
]


@checked
def transformed_n_step_q_learning(
    q_tm1: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    target_q_t: Annotated[Arg, "f[T,A]"],
    a_t: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    n: Annotated[int | Array, "i[]", "[1, inf)"],
    stop_target_gradients: Flag = True,
    tx_pair: TxPair = IDENTITY_PAIR,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of n-step Q-learning with transformed action values.

    With the best actions of another network in `a_t`, it is double Q-learning.

    .. math::
        \delta_{t-1} = h\bigl(G_{t-1}^{(n)}\bigr) - q_{t-1}(a_{t-1}), \qquad
        G_{t-1}^{(n)} = r_t + \gamma_t \, G_t^{(n-1)}, \qquad
        G_t^{(0)} = h^{-1}(q_t(a_t))

    Args:
        q_tm1: transformed action values at times `0..T-1`, `f[T,A]`.
        a_tm1: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        target_q_t: transformed action values at times `1..T`, `f[T,A]`.
        a_t: actions to bootstrap from at times `1..T`, `i[T]`, in `[0, A)`.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        n: number of rewards in each target, `i[]`, at least 1; may exceed `T`. A
            Python `int` is fixed while tracing; an array may be traced, and is not
            checked.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        tx_pair: the transform :math:`h` and its inverse, fixed while tracing.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of transformed return;
        0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract, or `n` is below 1.
        TypeError: if a dtype breaks its contract, or `tx_pair` is no pair.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> q, a, r_t = jnp.array([[2.0, 0.0]]), jnp.array([0]), jnp.array([5.0])
        >>> transformed_n_step_q_learning(
        ...     q, a, q, a, r_t, jnp.ones(1), 1, tx_pair=square
        ... ).tolist()  # the root of 5 + 4, less 2
        [1.0]

    References:
        Kapturowski et al., `Recurrent Experience Replay in Distributed Reinforcement
        Learning <https://openreview.net/forum?id=r1lyTjAqYX>`_, 2019.
        Van Hasselt et al., `General non-linear Bellman equations
        <https://arxiv.org/abs/1907.03687>`_, 2019.
    """
    tx_pair = as_pair("transformed_n_step_q_learning", tx_pair)
    q_tm1, a_tm1, target_q_t, a_t = keep_where(mask_t, q_tm1, a_tm1, target_q_t, a_t)
    v_t = batched_index(target_q_t, a_t)
    returns = transformed_n_step_returns(
        tx_pair, r_t, discount_t, v_t, n, truncation_t=truncation_t, mask_t=mask_t
    )
    return td_error(batched_index(q_tm1, a_tm1), returns, stop_target_gradients)


@checked
def transformed_q_lambda(
    q_tm1: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    q_t: Annotated[Arg, "f[T,A]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    stop_target_gradients: Flag = True,
    tx_pair: TxPair = IDENTITY_PAIR,
    *,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Peng's Q(λ) with transformed action values.

    .. math::
        \delta_{t-1} = h(G_{t-1}) - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t \Bigl[(1 - \lambda_t) \, h^{-1}(\max_a q_t(a))
            + \lambda_t \, G_t\Bigr], \qquad G_T = h^{-1}(\max_a q_T(a))

    Args:
        q_tm1: transformed action values at times `0..T-1`, `f[T,A]`.
        a_tm1: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        q_t: transformed action values at times `1..T`, `f[T,A]`.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        tx_pair: the transform :math:`h` and its inverse, fixed while tracing.
        mask: whether each action is legal at times `1..T`, `b[T,A]`; all are if `None`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of transformed return;
        0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract, or `tx_pair` is no pair.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> q, a, r_t = jnp.array([[2.0, 0.0]]), jnp.array([0]), jnp.array([5.0])
        >>> transformed_q_lambda(
        ...     q, a, r_t, jnp.ones(1), q, 1.0, tx_pair=square
        ... ).tolist()  # the root of 5 + 4, less 2
        [1.0]

    References:
        Van Hasselt et al., `General non-linear Bellman equations
        <https://arxiv.org/abs/1907.03687>`_, 2019.
        Kozuno et al., `Revisiting Peng's Q(λ) for Modern Reinforcement Learning
        <https://arxiv.org/abs/2103.00107>`_, 2021.
    """
    tx_pair = as_pair("transformed_q_lambda", tx_pair)
    q_tm1, a_tm1, discount_t, q_t = keep_where(mask_t, q_tm1, a_tm1, discount_t, q_t)
    v_t = best_value(q_t, discount_t, mask)
    returns = transformed_lambda_returns(
        tx_pair, r_t, discount_t, v_t, lambda_, truncation_t=truncation_t, mask_t=mask_t
    )
    return td_error(batched_index(q_tm1, a_tm1), returns, stop_target_gradients)


@checked
def transformed_retrace(
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
    tx_pair: TxPair = IDENTITY_PAIR,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Retrace(λ) with transformed action values.

    .. math::
        \delta_{t-1} = h(G_{t-1}) - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t \Bigl[\sum_a \pi_t(a) \, h^{-1}(q_t(a))
            + c_t \, \bigl(G_t - h^{-1}(q_t(a_t))\bigr)\Bigr]

    with the :math:`c_t` of `retrace`.

    Args:
        q_tm1: transformed action values at times `0..T-1`, `f[T,A]`.
        q_t: transformed action values at times `1..T`, `f[T,A]`.
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
            (0) to full (1).
        eps: not used, whatever it is, `f[]`; see `retrace`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        tx_pair: the transform :math:`h` and its inverse, fixed while tracing.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of transformed return;
        0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract, or `tx_pair` is no pair.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> q, a, r_t = jnp.array([[2.0, 0.0]]), jnp.array([0]), jnp.array([2.0])
        >>> pi_t, ones = jnp.array([[0.5, 0.5]]), jnp.ones(1)
        >>> transformed_retrace(
        ...     q, q, a, a, r_t, ones, pi_t, ones, 1.0, tx_pair=square
        ... ).tolist()  # the root of 2 + 0.5 * 4, less 2
        [0.0]

    References:
        Munos, Stepleton, Harutyunyan and Bellemare, `Safe and Efficient Off-Policy
        Reinforcement Learning <https://arxiv.org/abs/1606.02647>`_, 2016.
        Van Hasselt et al., `General non-linear Bellman equations
        <https://arxiv.org/abs/1907.03687>`_, 2019.
    """
    tx_pair = as_pair("transformed_retrace", tx_pair)
    q_tm1, a_tm1, a_t, pi_t, mu_t = keep_where(mask_t, q_tm1, a_tm1, a_t, pi_t, mu_t)
    trusted = trust(batched_index(pi_t, a_t), mu_t)
    used = contain_nonfinite(trusted, followed(discount_t, truncation_t, mask_t))
    returns = transformed_general_off_policy_returns_from_action_values(
        tx_pair,
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

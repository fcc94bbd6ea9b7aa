"""Temporal-difference errors for state values.

Each is a target minus a prediction: the derivative of half its square is the update
that the books write, since the target is held constant unless asked otherwise.
"""

from typing import Annotated

from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import best_value, keep_where, weighted
from rlprims.gradients import td_error
from rlprims.returns import lambda_returns

__all__ = ["qv_max", "td_lambda", "td_learning"]


@checked
def td_learning(
    v_tm1: Annotated[Arg, "f[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    v_t: Annotated[Arg, "f[]"],
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the temporal-difference error of one transition, TD(0).

    .. math::
        \delta = r_t + \gamma_t \, v_t - v_{t-1}

    Args:
        v_tm1: value of the state left, `f[]`, in units of return.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        v_t: value of the state reached, `f[]`, in units of return.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> float(td_learning(2.0, 1.0, 0.5, 4.0))  # 1 + 0.5 * 4 - 2
        1.0

    References:
        Sutton, `Learning to Predict by the Methods of Temporal Differences
        <https://doi.org/10.1007/BF00115009>`_, 1988.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 6.5.
    """
    target = r_t + weighted(v_t, discount_t)
    return td_error(v_tm1, target, stop_target_gradients)


@checked
def td_lambda(
    v_tm1: Annotated[Arg, "f[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    stop_target_gradients: Flag = True,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of TD(λ) along a trajectory: λ-returns minus values.

    .. math::
        \delta_{t-1} = G_{t-1} - v_{t-1}, \qquad
        G_{t-1} = r_t + \gamma_t \bigl[(1 - \lambda_t) \, v_t + \lambda_t \, G_t\bigr],
        \qquad G_T = v_T

    Args:
        v_tm1: values at times `0..T-1`, `f[T]`, in units of return.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: values at times `1..T`, `f[T]`, in units of return.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
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
        >>> v_tm1, v_t = jnp.array([1.0, 2.0]), jnp.array([2.0, 4.0])
        >>> td_lambda(v_tm1, jnp.ones(2), jnp.full(2, 0.5), v_t, 1.0).tolist()
        [1.5, 1.0]

    References:
        Sutton, `Learning to Predict by the Methods of Temporal Differences
        <https://doi.org/10.1007/BF00115009>`_, 1988.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 12.18.
    """
    (v_tm1,) = keep_where(mask_t, v_tm1)
    returns = lambda_returns(
        r_t, discount_t, v_t, lambda_, truncation_t=truncation_t, mask_t=mask_t
    )
    return td_error(v_tm1, returns, stop_target_gradients)


@checked
def qv_max(
    v_tm1: Annotated[Arg, "f[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_t: Annotated[Arg, "f[A]"],
    stop_target_gradients: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[A]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the QVMAX error: a state value learned from the best action value.

    .. math::
        \delta = r_t + \gamma_t \max_a q_t(a) - v_{t-1}

    Args:
        v_tm1: value of the state left, `f[]`, in units of return.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        q_t: action values in the state reached, `f[A]`, in units of return.
        stop_target_gradients: whether to hold the target constant, `b[]`.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> float(qv_max(2.0, 1.0, 0.5, jnp.array([4.0, 3.0])))  # 1 + 0.5 * 4 - 2
        1.0

    References:
        Wiering and van Hasselt, `The QV Family Compared to Other Reinforcement Learning
        Algorithms <https://doi.org/10.1109/ADPRL.2009.4927532>`_, 2009.
    """
    v_t = best_value(q_t, discount_t, mask)
    return td_error(v_tm1, r_t + discount_t * v_t, stop_target_gradients)

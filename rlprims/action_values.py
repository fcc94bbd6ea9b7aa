"""Temporal-difference errors for action values, of one transition.

Each is a target minus a prediction, the value of the action taken. The target is held
constant when differentiating unless asked otherwise. What the rules differ in is the
value they give the next state: that of the action taken there (Sarsa), an expectation
(Expected Sarsa), a maximum (Q-learning), or a maximum whose action another set of
values selects (double Q-learning).

The value of an action outside `[0, A)` is NaN, rather than that of another. After a
termination, where the discount is zero, the next action and its value may be anything.
Where a rule takes a maximum, an action that is not legal has a `mask` of false, or a
value of minus infinity.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import batched_index, best_value, contain_nonfinite, weighted
from rlprims.categorical import best_action
from rlprims.gradients import td_error

__all__ = [
    "double_q_learning",
    "expected_sarsa",
    "persistent_q_learning",
    "q_learning",
    "qv_learning",
    "sarsa",
]


@checked
def sarsa(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_t: Annotated[Arg, "f[A]"],
    a_t: Annotated[Arg, "i[]"],
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the Sarsa error of one transition and the action after it.

    .. math::
        \delta = r_t + \gamma_t \, q_t(a_t) - q_{t-1}(a_{t-1})

    Args:
        q_tm1: action values in the state left, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        q_t: action values in the state reached, `f[A]`, in units of return.
        a_t: action taken in the state reached, `i[]`, in `[0, A)`.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([4.0, 3.0])
        >>> float(sarsa(q_tm1, 1, 0.5, 0.5, q_t, 0))  # 0.5 + 0.5 * 4 - 2
        0.5

    References:
        Rummery and Niranjan, On-line Q-learning Using Connectionist Systems, 1994.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 6.7.
    """
    v_t = contain_nonfinite(batched_index(q_t, a_t), discount_t)
    return td_error(
        batched_index(q_tm1, a_tm1), r_t + discount_t * v_t, stop_target_gradients
    )


@checked
def expected_sarsa(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_t: Annotated[Arg, "f[A]"],
    probs_a_t: Annotated[Arg, "f[A]"],
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the Expected Sarsa error of one transition.

    .. math::
        \delta = r_t + \gamma_t \sum_a \pi_t(a) \, q_t(a) - q_{t-1}(a_{t-1})

    Args:
        q_tm1: action values in the state left, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        q_t: action values in the state reached, `f[A]`, in units of return.
        probs_a_t: probabilities of the actions in the state reached, `f[A]`; an action
            of probability 0 counts for nothing, whatever its value.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([4.0, 2.0])
        >>> probs_a_t = jnp.array([0.5, 0.5])
        >>> float(expected_sarsa(q_tm1, 1, 1.0, 0.5, q_t, probs_a_t))  # 1 + 0.5 * 3 - 2
        0.5

    References:
        van Seijen, van Hasselt, Whiteson and Wiering, `A Theoretical and Empirical
        Analysis of Expected Sarsa <https://doi.org/10.1109/ADPRL.2009.4927542>`_, 2009.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 6.9.
    """
    q_t = contain_nonfinite(q_t, discount_t * probs_a_t)
    v_t = jnp.sum(probs_a_t * q_t)
    return td_error(
        batched_index(q_tm1, a_tm1), r_t + discount_t * v_t, stop_target_gradients
    )


@checked
def q_learning(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_t: Annotated[Arg, "f[A]"],
    stop_target_gradients: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[A]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the Q-learning error of one transition.

    .. math::
        \delta = r_t + \gamma_t \max_a q_t(a) - q_{t-1}(a_{t-1})

    Args:
        q_tm1: action values in the state left, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`.
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
        >>> q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([4.0, 3.0])
        >>> float(q_learning(q_tm1, 1, 0.5, 0.5, q_t))  # 0.5 + 0.5 * 4 - 2
        0.5

    References:
        Watkins and Dayan, `Q-learning <https://doi.org/10.1007/BF00992698>`_, 1992.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 6.8.
    """
    v_t = best_value(q_t, discount_t, mask)
    return td_error(
        batched_index(q_tm1, a_tm1), r_t + discount_t * v_t, stop_target_gradients
    )


@checked
def double_q_learning(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_t_value: Annotated[Arg, "f[A]"],
    q_t_selector: Annotated[Arg, "f[A]"],
    stop_target_gradients: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[A]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the double Q-learning error of one transition.

    One set of action values selects the action and another values it, so that the
    maximum over noisy values does not overestimate. In deep double Q-learning the
    online network selects and the target network values.

    .. math::
        \delta = r_t + \gamma_t \, q_t^\text{value}\Bigl(\arg\max_a
            q_t^\text{selector}(a)\Bigr) - q_{t-1}(a_{t-1})

    Args:
        q_tm1: action values in the state left, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        q_t_value: action values in the state reached, which the selected action is
            valued by, `f[A]`, in units of return.
        q_t_selector: action values in the state reached, which select the action,
            `f[A]`; the first of equals is selected.
        stop_target_gradients: whether to hold the target constant, `b[]`.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1, value = jnp.array([1.0, 2.0]), jnp.array([4.0, 3.0])
        >>> selector = jnp.array([0.0, 1.0])
        >>> float(double_q_learning(q_tm1, 1, 0.5, 0.5, value, selector))
        0.0

    References:
        van Hasselt, `Double Q-learning <https://papers.nips.cc/paper/3964>`_, 2010.
        van Hasselt, Guez and Silver, `Deep Reinforcement Learning with Double
        Q-learning <https://arxiv.org/abs/1509.06461>`_, 2015.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 6.10.
    """
    v_t = batched_index(q_t_value, best_action(q_t_selector, mask))
    target = r_t + weighted(v_t, discount_t)
    return td_error(batched_index(q_tm1, a_tm1), target, stop_target_gradients)


@checked
def persistent_q_learning(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_t: Annotated[Arg, "f[A]"],
    action_gap_scale: Annotated[Arg, "f[]"],
    stop_target_gradients: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[A]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the persistent Q-learning error of one transition.

    The target mixes the best next action with repeating the last one, which widens
    the gap between the values of the best action and the others.

    .. math::
        \delta = r_t + \gamma_t \Bigl[(1 - \alpha) \max_a q_t(a)
            + \alpha \, q_t(a_{t-1})\Bigr] - q_{t-1}(a_{t-1})

    Args:
        q_tm1: action values in the state left, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        q_t: action values in the state reached, `f[A]`, in units of return.
        action_gap_scale: weight :math:`\alpha` of repeating the action, `f[]`,
            dimensionless, in `[0, 1]`; at 0 this is Q-learning.
        stop_target_gradients: whether to hold the target constant, `b[]`.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`.

    Returns:
        The error, target minus prediction, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([4.0, 2.0])
        >>> # 1 + 0.5 * (0.5 * 4 + 0.5 * 2) - 2
        >>> float(persistent_q_learning(q_tm1, 1, 1.0, 0.5, q_t, 0.5))
        0.5

    References:
        Bellemare, Ostrovski, Guez, Thomas and Munos, `Increasing the Action Gap: New
        Operators for Reinforcement Learning <https://arxiv.org/abs/1512.04860>`_, 2015.
    """
    best = best_value(q_t, discount_t, mask)
    same = contain_nonfinite(batched_index(q_t, a_tm1), discount_t)
    v_t = weighted(best, 1 - action_gap_scale) + weighted(same, action_gap_scale)
    return td_error(
        batched_index(q_tm1, a_tm1), r_t + discount_t * v_t, stop_target_gradients
    )


@checked
def qv_learning(
    q_tm1: Annotated[Arg, "f[A]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    v_t: Annotated[Arg, "f[]"],
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the QV-learning error: an action value learned from a state value.

    .. math::
        \delta = r_t + \gamma_t \, v_t - q_{t-1}(a_{t-1})

    Args:
        q_tm1: action values in the state left, `f[A]`, in units of return.
        a_tm1: action taken there, `i[]`, in `[0, A)`.
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
        >>> q_tm1 = jnp.array([1.0, 2.0])
        >>> float(qv_learning(q_tm1, 1, 0.5, 0.5, 4.0))  # 0.5 + 0.5 * 4 - 2
        0.5

    References:
        Wiering and van Hasselt, `The QV Family Compared to Other Reinforcement Learning
        Algorithms <https://doi.org/10.1109/ADPRL.2009.4927532>`_, 2009.
    """
    target = r_t + weighted(v_t, discount_t)
    return td_error(batched_index(q_tm1, a_tm1), target, stop_target_gradients)

r"""Learning from a fixed set of data, without a value that no data supports.

A critic errs most for actions that nobody has tried, and whatever maximises over its
values finds these errors. Offline, no new data corrects them. This module has the ways
out that keep the critic honest by where it looks:

*   `iql_value_loss` and `xql_value_loss` take the maximum over the actions that *are*
    in the data: they fit the value of a state to an upper expectile, or to the soft
    maximum, of the values of its actions. The policy then imitates good actions; see
    `advantage_weights`.
*   `td3_bc_actor_loss`, `rebrac_actor_loss` and `rebrac_critic_errors` let a
    deterministic policy climb its critic, at a price on the distance from the action
    in the data.

`conservative` has the third way, to push values of other actions down. Components of an
action lie along the last axis.
"""

import functools
from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import contain_nonfinite, guarded, keep_where, weighted
from rlprims.ensembles import ensemble_td_learning, minimum_of
from rlprims.gradients import stop_gradient_if
from rlprims.kl_estimators import k3
from rlprims.losses import Reduction, expectile_loss, reduced

__all__ = [
    "iql_value_loss",
    "rebrac_actor_loss",
    "rebrac_critic_errors",
    "td3_bc_actor_loss",
    "xql_value_loss",
]

Values = Annotated[Arg, "f[...]"]
Components = Annotated[Arg, "f[...,A]"]
Mask = Annotated[Arg | None, "b[...]"]
Loss = Annotated[Array, "f[]|f[...]"]


@checked
def iql_value_loss(
    v_t: Values,
    q_t: Values,
    *,
    expectile: Annotated[Arg, "f[]|f[...]", "[0, 1]"],
    mask_t: Mask = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of state values in implicit Q-learning.

    .. math::
        L = \bigl|\tau - 1[u < 0]\bigr| \, u^2, \qquad u = q_t(a_t) - v_t

    An expectile above 0.5 lets values rise towards the best of the actions in the data,
    without asking what others are worth. Critics then learn from `td_learning`, with
    these values of the state reached. With several critics, give the least of their
    values, as `jnp.min(q_t, axis=0)`.

    Args:
        v_t: state values, `f[...]`, in units of return.
        q_t: values of the actions in the data, by a target critic, `f[...]`, in units
            of return.
        expectile: weight :math:`\tau` of actions that are better than the value,
            `f[]|f[...]`, dimensionless, in `[0, 1]`; the paper has 0.7 and 0.9.
        mask_t: whether each state counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold `q_t` constant, `b[]`.
        reduction: `"mean"` or `"sum"` over the states that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each state, `f[]|f[...]`, in squared units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `expectile` is a Python number
            outside `[0, 1]`.
        TypeError: if an argument is not floating-point.

    Example:
        >>> v_t, q_t = jnp.zeros(2), jnp.array([2.0, -2.0])
        >>> iql_value_loss(v_t, q_t, expectile=0.75).item()  # (3 + 1) / 2
        2.0

    References:
        Kostrikov, Nair and Levine, `Offline Reinforcement Learning with Implicit
        Q-Learning <https://arxiv.org/abs/2110.06169>`_, 2021, eq. 5.
    """
    v_t, q_t = keep_where(mask_t, v_t, stop_gradient_if(stop_target_gradients, q_t))
    return reduced(expectile_loss(v_t, q_t, expectile), mask_t, reduction)


@checked
def rebrac_actor_loss(
    q_t: Values,
    a_t: Components,
    behaviour_a_t: Components,
    *,
    penalty_weight: Annotated[Arg, "f[]", "[0, inf)"],
    mask_t: Mask = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of the policy of ReBRAC.

    .. math::
        L = \beta \, \lVert \pi(s_t) - a_t \rVert^2 - q_t(\pi(s_t))

    Gradients flow to the policy through its action and through the value of that
    action. Differentiate with respect to the parameters of the policy alone, as those
    of the critic would move too. Popular code divides values by the mean of their sizes
    first, as `td3_bc_actor_loss` does: that with `alpha = 1 / penalty_weight`, times
    `penalty_weight`, is the result.

    Args:
        q_t: values of the policy's actions, `f[...]`, in units of return.
        a_t: actions of the policy, :math:`\pi(s_t)`, `f[...,A]`.
        behaviour_a_t: actions in the data, :math:`a_t`, `f[...,A]`, in units of `a_t`.
        penalty_weight: price :math:`\beta` of the squared distance, `f[]`, in units of
            return per squared unit of action, at least 0.
        mask_t: whether each action counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether `behaviour_a_t` and `penalty_weight` are constants
            when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the actions that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each action, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `penalty_weight` is a Python
            number and negative.
        TypeError: if an argument is not floating-point.

    Example:
        >>> a_t, behaviour_a_t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]])
        >>> rebrac_actor_loss(
        ...     jnp.array([3.0]), a_t, behaviour_a_t, penalty_weight=0.5
        ... ).item()  # 0.5 * (1 + 4) - 3
        -0.5

    References:
        Tarasov et al., `Revisiting the Minimalist Approach to Offline Reinforcement
        Learning <https://arxiv.org/abs/2305.09836>`_, 2023.
    """
    q_t, a_t, data = keep_where(mask_t, q_t, a_t, behaviour_a_t)
    data, weight = stop_gradient_if(use_stop_gradient, (data, penalty_weight))
    return reduced(_distance_penalty(a_t, data, weight) - q_t, mask_t, reduction)


@checked
def rebrac_critic_errors(
    q_tm1: Annotated[Arg, "f[N,...]"],
    r_t: Values,
    discount_t: Values,
    q_t: Annotated[Arg, "f[M,...]"],
    a_t: Components,
    behaviour_a_t: Components,
    *,
    penalty_weight: Annotated[Arg, "f[]", "[0, inf)"],
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[N,...]"]:
    r"""Computes the errors of the critics of ReBRAC.

    .. math::
        \delta_i = r_t + \gamma_t \bigl(\min_j q_{j, t}(\pi(s_t))
            - \beta \, \lVert \pi(s_t) - a_t \rVert^2\bigr) - q_{i, t-1}

    What the next action would cost the policy lowers the value of the state reached.
    All critics share the target.

    Args:
        q_tm1: values of the action taken, by each of `N` critics, `f[N,...]`, in units
            of return.
        r_t: rewards that followed, `f[...]`.
        discount_t: discounts that followed, `f[...]`, dimensionless, in `[0, 1]`; 0 on
            termination, where what follows may be anything.
        q_t: values of the policy's next action, by each of `M` target critics,
            `f[M,...]`, in units of return.
        a_t: next actions of the policy, :math:`\pi(s_t)`, `f[...,A]`.
        behaviour_a_t: next actions in the data, :math:`a_t`, `f[...,A]`, in units of
            `a_t`.
        penalty_weight: price :math:`\beta` of the squared distance, `f[]`, in units of
            return per squared unit of action, at least 0.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The errors of each critic, target minus prediction, `f[N,...]`, in units of
        return.

    Raises:
        ValueError: if a shape breaks its contract, or `penalty_weight` is a Python
            number and negative.
        TypeError: if an argument is not floating-point.

    Example:
        >>> a_t, behaviour_a_t = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> rebrac_critic_errors(  # 1 + 0.5 * (4 - 0.5 * 2) - 1
        ...     *(jnp.array([1.0]), 1.0, 0.5, jnp.array([4.0, 6.0])),
        ...     *(a_t, behaviour_a_t),
        ...     penalty_weight=0.5,
        ... ).tolist()
        [1.5]

    References:
        Tarasov et al., `Revisiting the Minimalist Approach to Offline Reinforcement
        Learning <https://arxiv.org/abs/2305.09836>`_, 2023.
    """
    penalty = _distance_penalty(a_t, behaviour_a_t, penalty_weight, discount_t)
    v_t, stop = minimum_of(q_t) - penalty, stop_target_gradients
    return ensemble_td_learning(q_tm1, r_t, discount_t, v_t, stop_target_gradients=stop)


@checked
def td3_bc_actor_loss(
    q_t: Values,
    a_t: Components,
    behaviour_a_t: Components,
    *,
    alpha: Annotated[Arg, "f[]", "[0, inf)"] = 2.5,
    mask_t: Mask = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of the policy of TD3+BC.

    .. math::
        L = \lVert \pi(s_t) - a_t \rVert^2 - \lambda \, q_t(\pi(s_t)), \qquad
        \lambda = \frac{\alpha}{\frac1T \sum_t |q_t|}

    Dividing by the mean size of values, over all that count, makes :math:`\alpha`
    independent of the scale of rewards. The paper writes the values of the actions in
    the data there; its code takes those of the policy's, as here. Where all values are
    0 nothing is divided.

    Gradients flow to the policy through its action and through the value of that
    action. Differentiate with respect to the parameters of the policy alone, as those
    of the critic would move too.

    Popular code differs in one point: it takes the mean of the squared distance over
    components of an action, and not the sum. This with `alpha` times `A`, over `A`, is
    the result.

    Args:
        q_t: values of the policy's actions, by one critic, `f[...]`, in units of
            return.
        a_t: actions of the policy, :math:`\pi(s_t)`, `f[...,A]`.
        behaviour_a_t: actions in the data, :math:`a_t`, `f[...,A]`, in units of `a_t`.
        alpha: how much values count, :math:`\alpha`, `f[]`, in squared units of action,
            at least 0; 0 is behaviour cloning.
        mask_t: whether each action counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether :math:`\lambda` and `behaviour_a_t` are constants
            when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the actions that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each action, `f[]|f[...]`, in squared units of action.

    Raises:
        ValueError: if a shape breaks its contract, or `alpha` is a Python number and
            negative.
        TypeError: if an argument is not floating-point.

    Example:
        >>> q_t, a_t = jnp.array([1.0, 3.0]), jnp.array([[1.0], [2.0]])
        >>> td3_bc_actor_loss(  # [1, 4] - 4 / 2 * [1, 3]
        ...     q_t, a_t, jnp.zeros((2, 1)), alpha=4.0, reduction="none"
        ... ).tolist()
        [-1.0, -2.0]

    References:
        Fujimoto and Gu, `A Minimalist Approach to Offline Reinforcement Learning
        <https://arxiv.org/abs/2106.06860>`_, 2021.
    """
    q_t, a_t, data = keep_where(mask_t, q_t, a_t, behaviour_a_t)
    size = reduced(jnp.abs(q_t), mask_t, "mean")
    fixed = data, alpha / jnp.where(size == 0, 1, size)
    data, weight = stop_gradient_if(use_stop_gradient, fixed)
    losses = _distance_penalty(a_t, data, jnp.ones_like(weight)) - weight * q_t
    return reduced(losses, mask_t, reduction)


@checked
def xql_value_loss(
    v_t: Values,
    q_t: Values,
    *,
    temperature: Annotated[Arg, "f[]|f[...]", "(0, inf)"],
    max_exponent: Annotated[Arg, "f[]", "(0, inf]"] = jnp.inf,
    mask_t: Mask = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of state values in extreme Q-learning: Gumbel regression.

    .. math::
        L = e^z - z - 1, \qquad z = \frac{q_t(a_t) - v_t}{\beta}

    It is least where the value is the soft maximum :math:`\beta \log E[e^{q / \beta}]`
    of the actions in the data, weighed by how often they were taken.

    One action much better than the value has a huge exponential. Beyond `max_exponent`,
    :math:`c`, the loss goes on as a straight line, so that its slope by :math:`z` is
    :math:`e^c - 1` at most:

    .. math::
        L = e^c (1 + z - c) - z - 1 \quad \text{if } z > c

    Popular code replaces such :math:`z` by :math:`c`, which leaves the worst errors
    without any gradient, and scales the losses of a batch by its greatest exponential.
    Here only a loss that overflows has none.

    Args:
        v_t: state values, `f[...]`, in units of return.
        q_t: values of the actions in the data, by a target critic, `f[...]`, in units
            of return.
        temperature: temperature :math:`\beta`, `f[]|f[...]`, in units of return,
            positive.
        max_exponent: where the loss turns linear, :math:`c`, `f[]`, dimensionless,
            positive; infinity for the loss of the paper.
        mask_t: whether each state counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold `q_t` constant, `b[]`.
        reduction: `"mean"` or `"sum"` over the states that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each state, `f[]|f[...]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of its range.
        TypeError: if an argument is not floating-point.

    Example:
        >>> v_t, q_t = jnp.zeros(2), 2 * jnp.log(jnp.array([1.0, 2.0]))
        >>> loss = xql_value_loss(v_t, q_t, temperature=2.0, reduction="sum")
        >>> round(loss.item(), 4)  # 2 - log 2 - 1
        0.3069

    References:
        Garg, Hejna, Geist and Ermon, `Extreme Q-Learning: MaxEnt RL without Entropy
        <https://arxiv.org/abs/2301.02328>`_, 2023.
    """
    v_t, q_t = keep_where(mask_t, v_t, stop_gradient_if(stop_target_gradients, q_t))
    loss_of = functools.partial(_gumbel_loss, max_exponent=max_exponent)
    losses = guarded(loss_of, (q_t - v_t) / temperature)
    return reduced(losses, mask_t, reduction)


def _gumbel_loss(z: Array, max_exponent: Array) -> Array:
    near = jnp.minimum(z, max_exponent)
    excess = jnp.where(z > max_exponent, z - near, 0)
    return k3(near) + weighted(jnp.expm1(near), excess)


def _distance_penalty(
    a: Array, b: Array, price: Array, weight: Array | None = None
) -> Array:
    """Returns the price of squared distances, finite where it will count for nothing.

    That is where the price is zero, or the weight that the result is to have.
    """
    counts = price if weight is None else price * weight
    counts = jnp.broadcast_to(counts, a.shape[:-1])[..., None]
    squares = contain_nonfinite(a - b, counts) ** 2
    return weighted(jnp.sum(squares, axis=-1), price)

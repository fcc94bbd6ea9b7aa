"""Control by continuous actions, with a deterministic policy and a critic.

The critic learns from targets (`smoothed_target_action`, `clipped_double_q_learning`)
and the policy from the slope of the critic at its action, which bounds on actions turn
(`inverted_gradients`). In twin delayed deep deterministic policy gradients (TD3), for
one batch of transitions:

1.  the next action is that of the target policy, smoothed by noise:
    `a_t = smoothed_target_action(key, policy(s_t), minimum=-1.0, maximum=1.0)`;
2.  both critics learn from the lesser of both target critics there:
    `l2_loss(clipped_double_q_learning(q_tm1, r_t, discount_t, q_t)).mean()`;
3.  now and then the policy learns from `-q.mean()`, or from
    `inverted_gradients_dpg_loss`, which keeps actions within bounds.

An ensemble of critics lies along the first axis, where `jax.vmap` over parameters puts
it; the components of an action lie along the last. `soft_actor_critic` has the same
for policies that draw their actions, and `ensembles` has targets other than the least.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where, weighted
from rlprims.ensembles import ensemble_td_learning, minimum_of
from rlprims.exploration import gaussian_noise
from rlprims.gaussians import each, half_width
from rlprims.losses import Reduction, reduced
from rlprims.policy_gradients import dpg_loss

__all__ = [
    "clipped_double_q_learning",
    "inverted_gradients",
    "inverted_gradients_dpg_loss",
    "smoothed_target_action",
]

Components = Annotated[Arg, "f[...,A]"]
Bound = Annotated[Arg, "f[]|f[A]"]


@checked
def clipped_double_q_learning(
    q_tm1: Annotated[Arg, "f[N,...]"],
    r_t: Annotated[Arg, "f[...]"],
    discount_t: Annotated[Arg, "f[...]"],
    q_t: Annotated[Arg, "f[M,...]"],
    *,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[N,...]"]:
    r"""Computes the errors of critics that learn from the least of their targets.

    .. math::
        \delta_i = r_t + \gamma_t \min_j q_{j, t} - q_{i, t-1}

    All critics share the target. The loss of TD3 is `l2_loss` of the errors, summed
    over critics. For a reduction other than the minimum, `ensemble_td_learning` takes
    its result.

    Args:
        q_tm1: values of the action taken, by each of `N` critics, `f[N,...]`, in units
            of return.
        r_t: rewards that followed, `f[...]`.
        discount_t: discounts that followed, `f[...]`, dimensionless, in `[0, 1]`; 0 on
            termination, where `q_t` may be anything.
        q_t: values of the next action, by each of `M` target critics, `f[M,...]`, in
            units of return.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The errors of each critic, target minus prediction, `f[N,...]`, in units of
        return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> q_tm1, q_t = jnp.array([[1.0], [2.0]]), jnp.array([[4.0], [6.0]])
        >>> r_t, discount_t = jnp.array([1.0]), jnp.array([0.5])
        >>> clipped_double_q_learning(q_tm1, r_t, discount_t, q_t).tolist()
        [[2.0], [1.0]]

    References:
        Fujimoto et al., `Addressing Function Approximation Error in Actor-Critic
        Methods <https://arxiv.org/abs/1802.09477>`_, 2018, algorithm 1.
    """
    return ensemble_td_learning(
        q_tm1,
        r_t,
        discount_t,
        minimum_of(q_t),
        stop_target_gradients=stop_target_gradients,
    )


@checked
def inverted_gradients(
    a_t: Components, dqda_t: Components, *, minimum: Bound, maximum: Bound
) -> Annotated[Array, "f[...,A]"]:
    r"""Scales the slope of a critic by the room that each action has to follow it.

    .. math::
        g = \frac{\partial q}{\partial a} \cdot \begin{cases}
            (\text{maximum} - a) / (\text{maximum} - \text{minimum})
                & \text{if } \partial q / \partial a > 0 \\
            (a - \text{minimum}) / (\text{maximum} - \text{minimum})
                & \text{otherwise}
            \end{cases}

    A slope fades as the action nears the bound that it points to, and turns round
    beyond it, so that a policy without a squashing output stays within bounds and
    leaves them alone as soon as the slope allows.

    Args:
        a_t: actions of the policy, `f[...,A]`; they may lie beyond the bounds.
        dqda_t: derivatives of the action value with respect to `a_t`, `f[...,A]`, in
            units of return per unit of action.
        minimum: least action, `f[]|f[A]`, in the units of `a_t`.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`; with
            bounds that leave no room the result is NaN.

    Returns:
        The slopes to follow, `f[...,A]`, in the units of `dqda_t`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> action, slope = jnp.array([0.5, 0.5, 2.0]), jnp.array([8.0, -8.0, 8.0])
        >>> inverted_gradients(action, slope, minimum=-1.0, maximum=1.0).tolist()
        [2.0, -6.0, -4.0]

    References:
        Hausknecht and Stone, `Deep Reinforcement Learning in Parameterized Action Space
        <https://arxiv.org/abs/1511.04143>`_, 2015.
    """
    low, high = each(minimum, a_t), each(maximum, a_t)
    room = jnp.where(dqda_t > 0, high - a_t, a_t - low)
    return weighted(dqda_t, room / (2 * half_width(low, high)))


@checked
def inverted_gradients_dpg_loss(
    a_t: Components,
    dqda_t: Components,
    *,
    minimum: Bound,
    maximum: Bound,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes a loss that moves actions up the slope of a critic, within bounds.

    .. math::
        L = \sum_{i=1}^A \tfrac12 \bigl(\perp\!(a_{t,i} + g_{t,i}) - a_{t,i}\bigr)^2

    where :math:`g_t` are the `inverted_gradients` of the slope and :math:`\perp` holds
    a target constant. The gradient with respect to the action is :math:`-g_t`, and
    the value of the loss means little. This is `dpg_loss` of that slope, summed over
    the components of an action.

    Args:
        a_t: actions of the policy, `f[...,A]`.
        dqda_t: derivatives of the action value with respect to `a_t`, `f[...,A]`, in
            units of return per unit of action.
        minimum: least action, `f[]|f[A]`, in the units of `a_t`.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.
        mask_t: whether each action counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the target is a constant when differentiating, `b[]`.
            If it is not, gradients flow to `dqda_t` and to the room that `a_t` has, and
            those to `a_t` itself cancel.
        reduction: `"mean"` or `"sum"` over the actions that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each action, `f[]|f[...]`, in squared units of `dqda_t`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> action, slope = jnp.array([[0.5, 0.5]]), jnp.array([[8.0, -8.0]])
        >>> bounds = {"minimum": -1.0, "maximum": 1.0}
        >>> loss = lambda a: inverted_gradients_dpg_loss(a, slope, **bounds)
        >>> jax.grad(loss)(action).tolist()
        [[-2.0, 6.0]]

    References:
        Silver, Lever, Heess, Degris, Wierstra and Riedmiller, `Deterministic Policy
        Gradient Algorithms <https://proceedings.mlr.press/v32/silver14>`_, 2014.
        Hausknecht and Stone, `Deep Reinforcement Learning in Parameterized Action Space
        <https://arxiv.org/abs/1511.04143>`_, 2015.
    """
    a_t, dqda_t = keep_where(mask_t, a_t, dqda_t)
    dqda_t = inverted_gradients(a_t, dqda_t, minimum=minimum, maximum=maximum)
    loss = lambda a, dqda: dpg_loss(a, dqda, use_stop_gradient=use_stop_gradient)
    losses = jnp.vectorize(loss, signature="(a),(a)->(a)")(a_t, dqda_t)
    return reduced(jnp.sum(losses, axis=-1), mask_t, reduction)


@checked
def smoothed_target_action(
    key: Annotated[Arg, "k[]"],
    action: Components,
    *,
    sigma: Annotated[Arg, "f[]|f[A]", "[0, inf)"] = 0.2,
    noise_clip: Annotated[Arg, "f[]|f[A]", "[0, inf]"] = 0.5,
    minimum: Bound,
    maximum: Bound,
) -> Annotated[Array, "f[...,A]"]:
    r"""Adds clipped noise to the actions of a target policy.

    .. math::
        a = \operatorname{clip}\bigl(\pi(s) + \operatorname{clip}(\epsilon, -c, c), \,
            \text{minimum}, \text{maximum}\bigr), \qquad
        \epsilon \sim \mathcal{N}(0, \sigma^2)

    Similar actions should have similar values. A critic whose targets average over
    actions near that of the policy has no narrow peaks for the policy to exploit.

    Args:
        key: a random key, `k[]`; one is enough for any number of actions.
        action: actions of the target policy, `f[...,A]`.
        sigma: standard deviation of the noise, `f[]|f[A]`, in the units of `action`, at
            least 0. The paper has 0.2 for actions in `[-1, 1]`, and its code multiplies
            by the greatest action: for other bounds, multiply by half their distance.
        noise_clip: largest size of the noise, :math:`c`, `f[]|f[A]`, in the same units,
            not negative; infinity for no limit. The paper has 0.5, to be scaled alike.
        minimum: least action, `f[]|f[A]`, in the same units.
        maximum: greatest action, `f[]|f[A]`, in the same units, at least `minimum`; if
            it is less, the result is NaN.

    Returns:
        The actions, `f[...,A]`, within the bounds.

    Raises:
        ValueError: if a shape breaks its contract, or `sigma` or `noise_clip` is a
            Python number out of range.
        TypeError: if `key` is not a random key, or another argument is not
            floating-point.

    Example:
        >>> key, action = jax.random.key(0), jnp.array([0.5, 3.0])
        >>> bounds = {"minimum": -1.0, "maximum": 1.0}
        >>> smoothed_target_action(key, action, sigma=0.0, **bounds).tolist()
        [0.5, 1.0]

    References:
        Fujimoto et al., `Addressing Function Approximation Error in Actor-Critic
        Methods <https://arxiv.org/abs/1802.09477>`_, 2018, section 5.3.
    """
    stddev, limit = each(sigma, action), each(noise_clip, action)
    low, high = each(minimum, action), each(maximum, action)
    noise = jnp.clip(gaussian_noise(key, action, stddev), -limit, limit)
    return jnp.where(low <= high, jnp.clip(action + noise, low, high), jnp.nan)

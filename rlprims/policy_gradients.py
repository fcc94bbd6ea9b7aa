"""Losses whose gradient improves a policy, averaged over the steps of a trajectory.

Each is to be minimised. What they need to know about an action differs:

*   `policy_gradient_loss` and `clipped_surrogate_pg_loss` the advantage of the action
    taken, estimated from what followed;
*   `dpg_loss`, for continuous actions, the slope of the critic;
*   the losses of `regret_policy_gradients` the values of all actions, from a critic.

By default these numbers are constants when differentiating: the gradient is then that
of the policy alone. `entropy_loss` is added to any of them to keep exploring. The
losses of `surrogates` take log-probabilities, of actions of any kind.

A mask of legal actions gives what leaving the others out would give: they have
probability zero and their logits and values have no effect, NaN included. Where no
action is legal there is no policy, and the loss is NaN. So is the mean over no steps.

`mask_t` leaves whole steps out: the mean is over the others, and 0 if there are none.
With `reduction="none"` the loss of each step comes back, to be weighted and summed at
will.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import (
    batched_index,
    contain_nonfinite,
    greatest,
    keep_where,
    weighted,
)
from rlprims.categorical import masked_log_softmax, weighted_sum, which_legal
from rlprims.gradients import stop_gradient_if, td_error
from rlprims.losses import Reduction, l2_loss, reduced
from rlprims.surrogates import clipped_objective

__all__ = [
    "clipped_surrogate_pg_loss",
    "dpg_loss",
    "entropy_loss",
    "policy_gradient_loss",
]


@checked
def clipped_surrogate_pg_loss(
    prob_ratios_t: Annotated[Arg, "f[T]"],
    adv_t: Annotated[Arg, "f[T]"],
    epsilon: Annotated[Arg, "f[]|f[T]", "[0, inf]"],
    use_stop_gradient: Flag = True,
    *,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[T]"]:
    r"""Computes the clipped surrogate loss of proximal policy optimisation.

    A policy improved for several steps on the same data drifts from the one that
    gathered it. This loss stops rewarding a step once it has moved the probability of
    its action by a factor of `epsilon` in the direction that its advantage asks for;
    moving the other way is never free.

    .. math::
        L = -\frac1T \sum_t \min\bigl(\rho_t A_t, \;
            \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) \, A_t\bigr)

    At the very edge, where there is no derivative, the gradient is the mean of those
    on both sides. An infinite ratio counts as `1 + epsilon` where the advantage is not
    negative, and makes the loss infinite where it is.

    Args:
        prob_ratios_t: probabilities of the actions taken at times `0..T-1` under the
            policy to improve, relative to the one that acted,
            :math:`\rho_t`, `f[T]`, dimensionless.
        adv_t: advantages :math:`A_t` of these actions, `f[T]`, in units of return.
        epsilon: how far a ratio may usefully go from 1, `f[]|f[T]`, dimensionless, not
            negative.
        use_stop_gradient: whether the advantages are constants when differentiating,
            `b[]`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[T]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `epsilon` is a Python number
            below 0; use `jax.vmap` for batches.
        TypeError: if an argument is not floating-point.

    Example:
        >>> ratios, advantages = jnp.array([2.0, 2.0]), jnp.array([4.0, -1.0])
        >>> clipped_surrogate_pg_loss(ratios, advantages, 0.5).item()  # (-6 + 2) / 2
        -2.0

    References:
        Schulman, Wolski, Dhariwal, Radford and Klimov, `Proximal Policy Optimization
        Algorithms <https://arxiv.org/abs/1707.06347>`_, 2017, eq. 7.
    """
    ratios, adv = keep_where(mask_t, prob_ratios_t, adv_t)
    adv = stop_gradient_if(use_stop_gradient, adv)
    gains = clipped_objective(ratios, adv, 1 - epsilon, 1 + epsilon)
    return reduced(-gains, mask_t, reduction)


@checked
def dpg_loss(
    a_t: Annotated[Arg, "f[A]"],
    dqda_t: Annotated[Arg, "f[A]"],
    dqda_clipping: Annotated[Arg | None, "f[]", "[0, inf]"] = None,
    use_stop_gradient: Flag = True,
) -> Annotated[Array, "f[A]"]:
    r"""Computes a loss whose gradient is that of deterministic policy gradients.

    The policy's action moves up the slope of the critic: the gradient of the loss with
    respect to the action is minus that slope, so that descending the loss ascends the
    value. The value of the loss itself means little.

    .. math::
        L = \tfrac12 \bigl(\perp\!(a_t + g_t) - a_t\bigr)^2, \qquad
        g_t = \frac{\partial q}{\partial a_t}
            \min\Bigl(1, \frac{c}{\lVert \partial q / \partial a_t \rVert_2}\Bigr)

    where :math:`\perp` holds a target constant.

    Args:
        a_t: action of the policy, one number for each of its `A` dimensions, `f[A]`.
        dqda_t: derivative of the action value with respect to `a_t`, `f[A]`, in units
            of return per unit of action.
        dqda_clipping: largest Euclidean norm of that derivative, :math:`c`, `f[]`, in
            its units, not negative; longer ones are shortened. `None` for no limit.
        use_stop_gradient: whether the target `a_t + dqda_t` is a constant when
            differentiating, `b[]`. If it is not, the gradient flows to `dqda_t`, and
            that to `a_t` cancels.

    Returns:
        The loss of each dimension of the action, `f[A]`, to be summed, in squared
        units of `dqda_t`.

    Raises:
        ValueError: if a shape breaks its contract, or `dqda_clipping` is a Python
            number below 0; use `jax.vmap` for batches.
        TypeError: if an argument is not floating-point.

    Example:
        >>> action, slope = jnp.array([1.0, 1.0]), jnp.array([2.0, -4.0])
        >>> jax.grad(lambda a: dpg_loss(a, slope).sum())(action).tolist()
        [-2.0, 4.0]

    References:
        Silver, Lever, Heess, Degris, Wierstra and Riedmiller, `Deterministic Policy
        Gradient Algorithms <https://proceedings.mlr.press/v32/silver14>`_, 2014.
    """
    dqda = dqda_t if dqda_clipping is None else _shorten(dqda_t, dqda_clipping)
    # Adding the action to the target and taking it off again would round `dqda`.
    still = td_error(a_t, a_t, use_stop_gradient)
    return l2_loss(stop_gradient_if(use_stop_gradient, dqda) + still)


@checked
def entropy_loss(
    logits_t: Annotated[Arg, "f[T,A]"],
    w_t: Annotated[Arg, "f[T]"],
    *,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[T]"]:
    r"""Computes the negative entropy of a policy, to be minimised.

    Added to a policy loss, with a small weight, it keeps the policy from settling on
    one action too soon.

    .. math::
        L = \frac1T \sum_t w_t \sum_a \pi_t(a) \log \pi_t(a), \qquad
        \pi_t = \operatorname{softmax}(\text{logits}_t), \quad 0 \log 0 = 0

    Args:
        logits_t: logits of the policy at times `0..T-1`, `f[T,A]`; one of minus
            infinity rules its action out.
        w_t: weight of each step, `f[T]`, dimensionless; 0 leaves the step out, NaN
            included, though it still counts in `T`.
        mask: whether each action is legal, `b[T,A]`; all are if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[T]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if an argument is not floating-point, or `mask` is not boolean.

    Example:
        >>> logits = jnp.array([[0.0, 0.0], [0.0, -jnp.inf]])
        >>> round(entropy_loss(logits, jnp.ones(2)).item(), 4)  # -(log 2 + 0) / 2
        -0.3466

    References:
        Williams and Peng, `Function Optimization using Connectionist Reinforcement
        Learning Algorithms <https://doi.org/10.1080/09540099108946587>`_, 1991.
    """
    logits_t, w_t = keep_where(mask_t, logits_t, w_t)
    log_pi = log_policy(logits_t, mask, w_t != 0)
    losses = w_t * weighted_sum(log_pi, jnp.exp(log_pi))
    return reduced(losses, mask_t, reduction)


@checked
def policy_gradient_loss(
    logits_t: Annotated[Arg, "f[T,A]"],
    a_t: Annotated[Arg, "i[T]"],
    adv_t: Annotated[Arg, "f[T]"],
    w_t: Annotated[Arg, "f[T]"],
    use_stop_gradient: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[T]"]:
    r"""Computes the policy-gradient loss of the actions taken.

    With returns for advantages this is REINFORCE. Subtracting a baseline that does not
    depend on the action leaves the expected gradient as it is and makes it less noisy.

    .. math::
        L = -\frac1T \sum_t w_t A_t \log \pi_t(a_t), \qquad
        \pi_t = \operatorname{softmax}(\text{logits}_t)

    Args:
        logits_t: logits of the policy at times `0..T-1`, `f[T,A]`; one of minus
            infinity rules its action out.
        a_t: actions taken at these times, `i[T]`, in `[0, A)`; any other makes the
            loss NaN, and one that is ruled out makes it infinite.
        adv_t: advantages :math:`A_t` of these actions, `f[T]`, in units of return.
        w_t: weight of each step, `f[T]`, dimensionless; 0 leaves the step out, NaN
            included, though it still counts in `T`.
        use_stop_gradient: whether the advantages are constants when differentiating,
            `b[]`.
        mask: whether each action is legal, `b[T,A]`; all are if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[T]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if `a_t` is not an integer, `mask` is not boolean, or another
            argument is not floating-point.

    Example:
        >>> logits, adv, w = jnp.zeros((1, 2)), jnp.array([4.0]), jnp.ones(1)
        >>> jax.grad(policy_gradient_loss)(logits, jnp.array([1]), adv, w).tolist()
        [[2.0, -2.0]]

    References:
        Williams, `Simple Statistical Gradient-Following Algorithms for Connectionist
        Reinforcement Learning <https://doi.org/10.1007/BF00992696>`_, 1992.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 13.8,
        and eq. 13.11 with a baseline.
    """
    logits_t, a_t, adv_t, w_t = keep_where(mask_t, logits_t, a_t, adv_t, w_t)
    adv = stop_gradient_if(use_stop_gradient, contain_nonfinite(adv_t, w_t))
    log_pi_a = batched_index(log_policy(logits_t, mask, w_t != 0), a_t)
    return reduced(-adv * weighted(log_pi_a, w_t), mask_t, reduction)


def log_policy(logits: Array, mask: Array | None, counts: Array | bool) -> Array:
    """Returns log-probabilities, finite in steps that do not count and define none."""
    legal = which_legal(logits, mask)
    best = greatest(logits, where=legal, initial=-jnp.inf)
    needed = counts | jnp.isfinite(best)
    (logits,) = keep_where(needed, logits)
    return masked_log_softmax(logits, legal | ~needed[..., None])


def _shorten(vector: Array, limit: Array) -> Array:
    """Scales a vector down to a norm of `limit`; its square may be out of range."""
    _, exponent = jnp.frexp(jnp.max(jnp.abs(vector), initial=0))
    scaled = jnp.ldexp(vector, -exponent)
    square = jnp.sum(scaled**2)
    fits = jnp.ldexp(jnp.sqrt(square), exponent) <= limit
    norm = jnp.sqrt(jnp.where(fits, 1, square))
    return jnp.where(fits, vector, scaled * (jnp.where(fits, 1, limit) / norm))

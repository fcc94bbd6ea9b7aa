"""Policy-gradient losses from the values of all actions.

A critic that values every action says how much better than the policy each one is,
its advantage, and no action need be sampled. The losses differ in what they do about
it: `qpg_loss` weighs advantages with the policy, `rm_loss` only the positive ones, the
regrets, and `rpg_loss` sums the regrets unweighted.

Masks of legal actions and of steps mean what they mean in `policy_gradients`.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where
from rlprims.categorical import masked_log_softmax, weighted_sum, which_legal
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced

__all__ = ["qpg_loss", "rm_loss", "rpg_loss"]


@checked
def qpg_loss(
    logits_t: Annotated[Arg, "f[T,A]"],
    q_t: Annotated[Arg, "f[T,A]"],
    use_stop_gradient: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[T]"]:
    r"""Computes the policy-gradient loss over all actions, not just the one taken.

    The gradient weighs each action by its advantage over the policy. It is exact where
    the action values are, with no noise from sampling an action.

    .. math::
        L = -\frac1T \sum_t \sum_a \pi_t(a) \perp\!A_t(a), \qquad
        A_t(a) = q_t(a) - \sum_b \pi_t(b) \, q_t(b)

    where :math:`\perp` holds the advantages constant. The loss itself is always zero,
    which is why without that its gradient is zero too.

    Args:
        logits_t: logits of the policy at times `0..T-1`, `f[T,A]`; one of minus
            infinity rules its action out.
        q_t: action values at these times, `f[T,A]`, in units of return; those of
            actions of probability 0 may be infinite or NaN.
        use_stop_gradient: whether the advantages are constants when differentiating,
            by the logits too, `b[]`.
        mask: whether each action is legal, `b[T,A]`; all are if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[T]`, in units of return; zero but for
        rounding.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if `logits_t` or `q_t` is not floating-point, or `mask` is not
            boolean.

    Example:
        >>> logits, q = jnp.zeros((1, 2)), jnp.array([[3.0, 1.0]])
        >>> jax.grad(qpg_loss)(logits, q).tolist()
        [[-0.5, 0.5]]

    References:
        Srinivasan et al., `Actor-Critic Policy Optimization in Partially Observable
        Multiagent Environments <https://arxiv.org/abs/1810.09026>`_, 2018.
    """
    logits_t, q_t = keep_where(mask_t, logits_t, q_t)
    pi = _policy(logits_t, mask)
    adv = stop_gradient_if(use_stop_gradient, _advantages(pi, q_t))
    return reduced(-weighted_sum(adv, pi), mask_t, reduction)


@checked
def rm_loss(
    logits_t: Annotated[Arg, "f[T,A]"],
    q_t: Annotated[Arg, "f[T,A]"],
    use_stop_gradient: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[T]"]:
    r"""Computes the regret-matching policy-gradient loss, over all actions.

    As in regret matching, only actions better than the policy count: the policy is
    drawn to them in proportion to its regret of not taking them, and is not pushed
    away from the others.

    .. math::
        L = -\frac1T \sum_t \sum_a \pi_t(a) \perp\!\bigl[A_t(a)\bigr]^+, \qquad
        A_t(a) = q_t(a) - \sum_b \pi_t(b) \, q_t(b), \quad [x]^+ = \max(x, 0)

    where :math:`\perp` holds the regrets constant.

    Args:
        logits_t: logits of the policy at times `0..T-1`, `f[T,A]`; one of minus
            infinity rules its action out.
        q_t: action values at these times, `f[T,A]`, in units of return; those of
            actions of probability 0 may be infinite or NaN.
        use_stop_gradient: whether the regrets are constants when differentiating, by
            the logits too, `b[]`.
        mask: whether each action is legal, `b[T,A]`; all are if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[T]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if `logits_t` or `q_t` is not floating-point, or `mask` is not
            boolean.

    Example:
        >>> logits, q = jnp.zeros((1, 2)), jnp.array([[3.0, 1.0]])
        >>> rm_loss(logits, q).item()  # -0.5 * (3 - 2)
        -0.5

    References:
        Srinivasan et al., `Actor-Critic Policy Optimization in Partially Observable
        Multiagent Environments <https://arxiv.org/abs/1810.09026>`_, 2018.
    """
    logits_t, q_t = keep_where(mask_t, logits_t, q_t)
    pi = _policy(logits_t, mask)
    regrets = stop_gradient_if(use_stop_gradient, jax.nn.relu(_advantages(pi, q_t)))
    return reduced(-weighted_sum(regrets, pi), mask_t, reduction)


@checked
def rpg_loss(
    logits_t: Annotated[Arg, "f[T,A]"],
    q_t: Annotated[Arg, "f[T,A]"],
    use_stop_gradient: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[T]"]:
    r"""Computes the regret policy-gradient loss, the total regret over all actions.

    The regret of an action is how much better than the policy it is. Unlike in
    `rm_loss` every action counts in full, however unlikely the policy makes it, one
    whose logit is minus infinity included. Leave such an action out with `mask`.

    .. math::
        L = \frac1T \sum_t \sum_a
            \Bigl[q_t(a) - \sum_b \pi_t(b) \, q_t(b)\Bigr]^+, \qquad [x]^+ = \max(x, 0)

    Args:
        logits_t: logits of the policy at times `0..T-1`, `f[T,A]`; one of minus
            infinity gives its action probability 0.
        q_t: action values at these times, `f[T,A]`, in units of return.
        use_stop_gradient: whether the action values are constants when
            differentiating, `b[]`.
        mask: whether each action is legal, `b[T,A]`; all are if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[T]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if `logits_t` or `q_t` is not floating-point, or `mask` is not
            boolean.

    Example:
        >>> logits, q = jnp.zeros((1, 2)), jnp.array([[3.0, 1.0]])
        >>> rpg_loss(logits, q).item()  # (3 - 2) + 0
        1.0

    References:
        Srinivasan et al., `Actor-Critic Policy Optimization in Partially Observable
        Multiagent Environments <https://arxiv.org/abs/1810.09026>`_, 2018.
    """
    logits_t, q_t = keep_where(mask_t, logits_t, q_t)
    q = jnp.where(which_legal(q_t, mask), q_t, -jnp.inf)
    q = stop_gradient_if(use_stop_gradient, q)
    regrets = jax.nn.relu(_advantages(_policy(logits_t, mask), q))
    return reduced(jnp.sum(regrets, axis=-1), mask_t, reduction)


def _policy(logits: Array, mask: Array | None) -> Array:
    return jnp.exp(masked_log_softmax(logits, mask))


def _advantages(pi: Array, q: Array) -> Array:
    """Returns how much better than the policy each action is."""
    return q - weighted_sum(q, pi)[:, None]

r"""Limits on how far a policy moves, kept by multipliers that are learnt with it.

An update that should raise a return `J`, but move the policy by no more than `epsilon`
in Kullback-Leibler divergence, is the saddle point of a Lagrangian:

.. math::
    \max_\theta \min_{\alpha \ge 0} \;
        J(\theta) + \alpha \bigl(\epsilon - \text{KL}(\theta)\bigr)

Gradient descent on two losses finds it. The first penalises the divergence, at the
current price `alpha`; the second, the dual, raises that price while the divergence is
above `epsilon` and lowers it while it is below. Each holds the other's variable
constant, unless told otherwise.

A `LagrangePenalty` is such a limit with its price. Nothing keeps a price that descends
a gradient from turning negative, so a `projection_operator` maps it to where it may
be, as `functools.partial(jnp.clip, min=1e-10)` does. That operator, like any Python
function here, is fixed while tracing, and known by its identity: make it once, since
one that is made anew for each call outside `jax.jit` is compiled anew each time.

Constraints come as a list of pairs, each of divergences and their penalty. There may
be any number of them, none included: a Gaussian policy usually has one for its mean
and one for its covariance.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag
from rlprims._constraints import (
    Constraint,
    Constraints,
    LagrangePenalty,
    constrained,
    pairs,
    renamed,
)
from rlprims.arrays import contain_nonfinite, keep_where, lhs_broadcast, weighted
from rlprims.collectives import AllSum
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction

__all__ = [
    "LagrangePenalty",
    "compute_parametric_kl_penalty_and_dual_loss",
    "kl_alpha_loss",
    "kl_constraint_loss",
]

AxisName = Any  # of `jax.pmap` and its like: one, a tuple of them, or None
Projection = Callable[[Array], Array]
POSITIVE = functools.partial(jnp.clip, min=1e-10)  # once, so as to compile once


@constrained
def compute_parametric_kl_penalty_and_dual_loss(
    kl_constraints: Constraints,
    projection_operator: Projection,
    use_stop_gradient: Flag = True,
) -> tuple[Array, Array]:
    r"""Computes the penalties and the dual losses of all constraints, each summed.

    .. math::
        L_{\text{KL}} = \sum_i \perp\!(\alpha_i) \, \text{KL}_i, \qquad
        L_\alpha = \sum_i \alpha_i \bigl(\epsilon_i - \perp\!(\text{KL}_i)\bigr)

    where :math:`\perp` holds constant and :math:`\alpha_i` is projected. With
    `per_dimension` both are summed over the dimensions too.

    Args:
        kl_constraints: pairs of divergences, `f[...]`, or `f[...,D]` if of each
            dimension, and their `LagrangePenalty`. Without any, the losses are 0.
        projection_operator: function that maps multipliers to where they may be, in
            the same shape; a Python value.
        use_stop_gradient: whether each loss holds the variable of the other constant,
            `b[]`.

    Returns:
        The penalty, `f[...]`, and the dual loss, `f[...]`, in nats times multiplier,
        of each entry of the batch.

    Raises:
        ValueError: if a shape breaks its contract, or an `epsilon` is a Python number
            below 0.
        TypeError: if `kl_constraints` is no list of such pairs, one of their arrays is
            not floating-point, or `per_dimension` is traced.

    Example:
        >>> constraints = [(jnp.array([3.0]), LagrangePenalty(jnp.float32(2.0), 1.0))]
        >>> penalty, dual = compute_parametric_kl_penalty_and_dual_loss(
        ...     constraints, jax.nn.relu
        ... )
        >>> penalty.tolist(), dual.tolist()  # 2 * 3 and 2 * (1 - 3)
        ([6.0], [-4.0])

    References:
        Abdolmaleki et al., `Relative Entropy Regularized Policy Iteration
        <https://arxiv.org/abs/1812.02256>`_, 2018.
        Song et al., `V-MPO: On-Policy Maximum a Posteriori Policy Optimization for
        Discrete and Continuous Control <https://arxiv.org/abs/1909.12238>`_, 2019,
        eq. 5.
    """
    constraints = pairs(kl_constraints)
    return penalties(constraints, projection_operator, use_stop_gradient)[:2]


def kl_constraint_loss(
    kl: Arg,
    penalty: LagrangePenalty,
    projection_operator: Projection,
    use_stop_gradient: Flag = True,
) -> tuple[Array, Array, Array]:
    r"""Computes the penalty and the dual loss of one constraint.

    .. math::
        L_{\text{KL}} = \perp\!(\alpha) \, \text{KL}, \qquad
        L_\alpha = \alpha \bigl(\epsilon - \perp\!(\text{KL})\bigr)

    where :math:`\perp` holds constant and :math:`\alpha` is projected. With
    `per_dimension` both are summed over the dimensions.

    Args:
        kl: divergences, `f[...]`, or `f[...,D]` if of each dimension, in nats.
        penalty: the limit and its multiplier, a `LagrangePenalty`.
        projection_operator: function that maps multipliers to where they may be, in
            the same shape; a Python value.
        use_stop_gradient: whether each loss holds the variable of the other constant,
            `b[]`.

    Returns:
        The penalty, `f[...]`, the dual loss, `f[...]`, in nats times multiplier, and
        the projected multiplier, in the shape of `penalty.alpha`.

    Raises:
        ValueError: if a shape breaks its contract, or `penalty.epsilon` is a Python
            number below 0.
        TypeError: if `penalty` is no `LagrangePenalty`, an array is not
            floating-point, or `penalty.per_dimension` is traced.

    Example:
        >>> penalty = LagrangePenalty(jnp.array([2.0, 0.0]), 1.0, per_dimension=True)
        >>> losses = kl_constraint_loss(jnp.array([3.0, 9.0]), penalty, jax.nn.relu)
        >>> [loss.tolist() for loss in losses]
        [6.0, -4.0, [2.0, 0.0]]

    References:
        Abdolmaleki et al., `Relative Entropy Regularized Policy Iteration
        <https://arxiv.org/abs/1812.02256>`_, 2018.
    """
    return _one_constraint([(kl, penalty)], projection_operator, use_stop_gradient)


@constrained
def kl_alpha_loss(
    restarting_weights: Annotated[Arg, "f[...]", "[0, inf]"],
    kl_constraints: Constraints = (),
    axis_name: AxisName = None,
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    reduction: Reduction = "mean",
) -> tuple[Array, Array]:
    r"""Computes the penalties and the dual losses of a batch, as weighted means.

    .. math::
        L_{\text{KL}} = \frac{\sum_t w_t \sum_i \perp\!(\alpha_i) \text{KL}_{i,t}}
                         {\sum_t w_t}, \qquad
        L_\alpha = \frac{\sum_t w_t \sum_i
            \alpha_i \bigl(\epsilon_i - \perp\!(\text{KL}_{i,t})\bigr)}{\sum_t w_t}

    The multipliers are taken as they are: project them first.

    Args:
        restarting_weights: weight of each step, :math:`w_t`, `f[...]`, dimensionless,
            not negative; 0 leaves the step out, NaN included, as one that starts an
            episode.
        kl_constraints: pairs of divergences, `f[...]`, or `f[...,D]` if of each
            dimension, and their `LagrangePenalty`.
        axis_name: axis, or axes, of `jax.pmap`, `jax.shard_map` or `jax.vmap` that the
            steps are spread over too; a Python value.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` by weight, 0 if no step has any; `"sum"`, weighted; or
            `"none"`, the weighted losses of each step.

    Returns:
        The penalty and the dual loss, each `f[]`, or of each step, `f[...]`, in nats
        times multiplier.

    Raises:
        ValueError: if a shape breaks its contract, or an `epsilon` is a Python number
            below 0.
        TypeError: if `kl_constraints` is no list of such pairs, an array is not
            floating-point, or `per_dimension` is traced.

    Example:
        >>> constraint = jnp.array([3.0, 9.0]), LagrangePenalty(jnp.float32(2.0), 1.0)
        >>> losses = kl_alpha_loss(jnp.array([1.0, 0.0]), [constraint])
        >>> [loss.item() for loss in losses]
        [6.0, -4.0]

    References:
        Song et al., `V-MPO: On-Policy Maximum a Posteriori Policy Optimization for
        Discrete and Continuous Control <https://arxiv.org/abs/1909.12238>`_, 2019,
        eq. 5.
    """
    (weights,) = keep_where(mask_t, restarting_weights)
    constraints = pairs(kl_constraints)
    *losses, _ = penalties(constraints, _as_it_is, True, 0.0, (weights, weights))
    losses = [weights * loss for loss in losses]
    total = AllSum(axis_name)
    if reduction != "none":
        losses = [total(loss) for loss in losses]
    if reduction == "mean":
        whole = total(weights)
        losses = [loss / jnp.where(whole == 0, 1, whole) for loss in losses]
    return losses[0], losses[1]


@functools.partial(constrained, kl="kl", penalty="penalty")
@renamed("kl_constraint_loss")
def _one_constraint(
    kl_constraints: Constraints,
    projection_operator: Projection,
    use_stop_gradient: Flag,
) -> tuple[Array, Array, Array]:
    constraints = pairs(kl_constraints)
    return penalties(constraints, projection_operator, use_stop_gradient)


# What the losses share


def _as_it_is(alpha: Array) -> Array:
    return alpha


def penalties(
    constraints: Iterable[Constraint],
    project: Projection,
    stop: Flag,
    zero: Arg = 0.0,
    weights: tuple[Arg, Arg] = (1.0, 1.0),
) -> tuple[Array, Array, Array]:
    """Returns the penalty and the dual loss of all constraints, and the last price.

    Without any, that is `zero`. Both losses have yet to be weighed: where its weight
    will be zero, a divergence that is not finite counts as zero.
    """
    kl_loss = alpha_loss = alpha = jnp.asarray(zero)
    for kl, penalty in constraints:
        alpha = project(penalty.alpha)
        price = jnp.broadcast_to(alpha, kl.shape)
        of_cost, of_slack = (
            contain_nonfinite(kl, lhs_broadcast(weight, kl)) for weight in weights
        )
        cost = weighted(of_cost, stop_gradient_if(stop, price))
        slack = weighted(penalty.epsilon - stop_gradient_if(stop, of_slack), price)
        axis = -1 if penalty.per_dimension else ()
        kl_loss += jnp.sum(cost, axis=axis)
        alpha_loss += jnp.sum(slack, axis=axis)
    return kl_loss, alpha_loss, alpha

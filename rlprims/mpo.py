r"""Maximum a posteriori policy optimisation, from samples of actions and their values.

The update has two steps. The first improves the policy without parameters: it gives
each action sampled at a state a weight that grows with its value, as much as a limit
on the divergence from the sampling policy allows. The second fits the parameters to
the weighted actions, by maximum likelihood, with a limit of its own on how far the
policy moves (see `lagrange`):

.. math::
    \psi_i = \frac{\exp(q_i / \eta)}{\sum_j \exp(q_j / \eta)}, \qquad
    L = -\sum_i \psi_i \log \pi_\theta(a_i)

The temperature :math:`\eta` is the multiplier of the first limit. It is learnt as well,
by descending the dual

.. math::
    g(\eta) = \eta \epsilon + \eta \log \frac1N \sum_i \exp(q_i / \eta)

whose gradient, :math:`\epsilon - \text{KL}(\psi \,\|\, 1/N)`, is zero where the weights
diverge from uniform ones by exactly :math:`\epsilon`.
"""

import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked_as
from rlprims._constraints import (
    Constraints,
    LagrangePenalty,
    constrained,
    pairs,
    refuse_what_is_no_function,
    renamed,
)
from rlprims.arrays import contain_nonfinite, lhs_broadcast, weighted
from rlprims.gradients import stop_gradient_if
from rlprims.importance_weights import exponential_weights
from rlprims.lagrange import POSITIVE, Projection, penalties

__all__ = ["MpoOutputs", "mpo_compute_weights_and_temperature_loss", "mpo_loss"]


class MpoOutputs(NamedTuple):
    """What `mpo_loss` and `vmpo_loss` consist of, before their weights.

    Attributes:
        temperature_loss: the dual of the temperature, of each entry of the batch;
            one for all in `vmpo_loss`.
        policy_loss: the weighted negative log-likelihood, of each entry.
        kl_loss: the penalty on how far the policy moves, of each entry.
        alpha_loss: the dual loss of its multipliers, of each entry.
        normalized_weights: the weight of each sample.
        num_samples: how many samples there are: for `vmpo_loss`, in all that were
            chosen.
    """

    temperature_loss: Array
    policy_loss: Array
    kl_loss: Array
    alpha_loss: Array
    normalized_weights: Array
    num_samples: Array | int


class _Temperature(NamedTuple):
    """A `LagrangePenalty` whose multiplier is shared, or one for each entry."""

    alpha: Annotated[Arg, "f[]|f[...]"]
    epsilon: Annotated[Arg, "f[]", "[0, inf]"]


def mpo_compute_weights_and_temperature_loss(
    sample_q_values: Arg,
    temperature_constraint: LagrangePenalty,
    projection_operator: Projection,
    sample_axis: int = 0,
) -> tuple[Array, Array, int]:
    r"""Computes the weights of sampled actions, and the loss of the temperature.

    .. math::
        \psi_i = \frac{\exp(q_i / \eta)}{\sum_j \exp(q_j / \eta)}, \qquad
        L_\eta = \eta \epsilon + \eta \log \frac1N \sum_i \exp(q_i / \eta)

    where the temperature :math:`\eta` is projected. Nothing is held constant: the
    gradient of both flows to the values and to the temperature. A value of minus
    infinity rules its action out, though it counts in `N`.

    Args:
        sample_q_values: values of `N` actions at each entry of a batch, `f[...]`, with
            the samples along `sample_axis`, in units of return.
        temperature_constraint: the limit on the divergence of the weights from uniform
            ones, and the temperature, a `LagrangePenalty`; its `alpha` is `f[]`, or
            one for each entry, in units of return.
        projection_operator: function that maps temperatures to where they may be,
            above 0, in the same shape; a Python value.
        sample_axis: axis of the samples, a Python `int`.

    Returns:
        The loss of each entry, `f[...]` without the axis of samples, in units of
        return; the weights, in the shape of `sample_q_values`, which sum to one over
        that axis; and `N`, an `int`.

    Raises:
        ValueError: if a shape breaks its contract, there is no such axis or it is
            empty, or `temperature_constraint.epsilon` is a Python number below 0.
        TypeError: if an array is not floating-point, `temperature_constraint` is no
            `LagrangePenalty`, or `sample_axis` is no Python `int`.

    Example:
        >>> q, limit = jnp.log(jnp.array([1.0, 3.0])), LagrangePenalty(1.0, 0.5)
        >>> loss, weights, n = mpo_compute_weights_and_temperature_loss(
        ...     q, limit, jax.nn.relu
        ... )
        >>> weights.round(4).tolist(), round(loss.item(), 4), n  # 0.5 + log 2
        ([0.25, 0.75], 1.1931, 2)

    References:
        Abdolmaleki et al., `Maximum a Posteriori Policy Optimisation
        <https://arxiv.org/abs/1806.06920>`_, 2018.
    """
    fn = "mpo_compute_weights_and_temperature_loss"
    refuse_what_is_no_function(fn, projection_operator)
    (q,) = _samples_last(fn, sample_axis, sample_q_values=sample_q_values)
    temperature = _opened(fn, temperature_constraint)
    loss, weights = _weights_and_loss(q, temperature, projection_operator)
    return loss, _moved(weights, -1, sample_axis), q.shape[-1]


def mpo_loss(
    sample_log_probs: Arg,
    sample_q_values: Arg,
    temperature_constraint: LagrangePenalty,
    kl_constraints: Constraints,
    projection_operator: Projection = POSITIVE,
    policy_loss_weight: Arg = 1.0,
    temperature_loss_weight: Arg = 1.0,
    kl_loss_weight: Arg = 1.0,
    alpha_loss_weight: Arg = 1.0,
    sample_axis: int = 0,
    use_stop_gradient: Flag = True,
) -> tuple[Array, MpoOutputs]:
    r"""Computes the loss of maximum a posteriori policy optimisation.

    .. math::
        L = -w_\pi \sum_i \psi_i \log \pi(a_i) + w_\eta L_\eta
            + w_{\text{KL}} L_{\text{KL}} + w_\alpha L_\alpha

    with the weights :math:`\psi` and the loss of the temperature :math:`L_\eta` of
    `mpo_compute_weights_and_temperature_loss`, and the penalty and dual loss of
    `compute_parametric_kl_penalty_and_dual_loss`. An action of weight zero does not
    count, even if its log-probability is minus infinity, nor does an entry in a loss
    that its weight there is zero for, NaN included.

    Args:
        sample_log_probs: log-probabilities of `N` actions at each entry of a batch,
            under the policy to improve, `f[...]`, with the samples along
            `sample_axis`, in nats.
        sample_q_values: values of these actions, `f[...]` in the same shape, in units
            of return. The actions are samples of the policy to move from.
        temperature_constraint: the limit on the divergence of the weights from uniform
            ones, and the temperature, a `LagrangePenalty`; its `alpha` is `f[]`, or
            one for each entry, in units of return.
        kl_constraints: pairs of the divergences between the two policies, `f[...]`
            without the axis of samples, or `f[...,D]` if of each dimension, and their
            `LagrangePenalty`. There may be none.
        projection_operator: function that maps multipliers to where they may be, in
            the same shape; a Python value, fixed while tracing. By default
            `functools.partial(jnp.clip, min=1e-10)`.
        policy_loss_weight: weight :math:`w_\pi`, `f[]`, or of each entry, `f[...]`.
        temperature_loss_weight: weight :math:`w_\eta`, `f[]|f[...]`.
        kl_loss_weight: weight :math:`w_{\text{KL}}`, `f[]|f[...]`.
        alpha_loss_weight: weight :math:`w_\alpha`, `f[]|f[...]`.
        sample_axis: axis of the samples, a Python `int`.
        use_stop_gradient: whether the action values are constants when
            differentiating, the weights of the actions too, and in each of the losses
            of a multiplier all else, `b[]`.

    Returns:
        The loss of each entry, `f[...]`, to be averaged, and the `MpoOutputs`.

    Raises:
        ValueError: if a shape breaks its contract, there is no such axis or it is
            empty, or an `epsilon` is a Python number below 0.
        TypeError: if an array is not floating-point, a penalty is no
            `LagrangePenalty`, or `sample_axis` is no Python `int`.

    Example:
        >>> q, log_probs = jnp.log(jnp.array([1.0, 3.0])), jnp.array([-4.0, -8.0])
        >>> loss, outputs = mpo_loss(log_probs, q, LagrangePenalty(1.0, 0.5), [])
        >>> round(outputs.policy_loss.item(), 4)  # 4 / 4 + 8 * 3 / 4
        7.0

    References:
        Abdolmaleki et al., `Maximum a Posteriori Policy Optimisation
        <https://arxiv.org/abs/1806.06920>`_, 2018.
        Abdolmaleki et al., `Relative Entropy Regularized Policy Iteration
        <https://arxiv.org/abs/1812.02256>`_, 2018, for several constraints.
    """
    samples = {"sample_log_probs": sample_log_probs, "sample_q_values": sample_q_values}
    log_probs, q = _samples_last("mpo_loss", sample_axis, **samples)
    loss, outputs = _mpo_loss(
        log_probs,
        q,
        _opened("mpo_loss", temperature_constraint),
        kl_constraints,
        projection_operator,
        policy_loss_weight,
        temperature_loss_weight,
        kl_loss_weight,
        alpha_loss_weight,
        use_stop_gradient,
    )
    weights = _moved(outputs.normalized_weights, -1, sample_axis)
    return loss, outputs._replace(normalized_weights=weights, num_samples=q.shape[-1])


Weight = Annotated[Arg, "f[]|f[...]"]


@constrained
@renamed("mpo_loss")
def _mpo_loss(
    sample_log_probs: Annotated[Arg, "f[...,N]"],
    sample_q_values: Annotated[Arg, "f[...,N]"],
    temperature_constraint: _Temperature,
    kl_constraints: Constraints,
    projection_operator: Projection,
    policy_loss_weight: Weight,
    temperature_loss_weight: Weight,
    kl_loss_weight: Weight,
    alpha_loss_weight: Weight,
    use_stop_gradient: Flag,
) -> tuple[Array, MpoOutputs]:
    to_policy = lhs_broadcast(policy_loss_weight, sample_q_values)
    to_temperature = lhs_broadcast(temperature_loss_weight, sample_q_values)
    # Values that no loss counts may be anything. Minus infinity only says what it says.
    counts = (to_policy != 0) | (to_temperature != 0) | (sample_q_values == -jnp.inf)
    q = jnp.where(counts | jnp.isfinite(sample_q_values), sample_q_values, 0)
    q = stop_gradient_if(use_stop_gradient, q)
    temperature_loss, weights = _tempered(
        q, temperature_constraint, projection_operator
    )
    weights = stop_gradient_if(use_stop_gradient, weights)
    log_probs, used = (
        contain_nonfinite(x, to_policy) for x in (sample_log_probs, weights)
    )
    policy_loss = -jnp.sum(weighted(log_probs, used), axis=-1)
    kl_loss, alpha_loss, _ = penalties(
        pairs(kl_constraints),
        projection_operator,
        use_stop_gradient,
        jnp.zeros_like(policy_loss),
        (kl_loss_weight, alpha_loss_weight),
    )
    outputs = MpoOutputs(
        temperature_loss, policy_loss, kl_loss, alpha_loss, weights, q.shape[-1]
    )
    loss = weighed(
        outputs,
        policy_loss_weight,
        temperature_loss_weight,
        kl_loss_weight,
        alpha_loss_weight,
    )
    return loss, outputs


def weighed(
    outputs: MpoOutputs, policy: Arg, temperature: Arg, kl: Arg, alpha: Arg
) -> Array:
    """Returns the weighted sum of the losses."""
    return (
        weighted(outputs.policy_loss, policy)
        + weighted(outputs.temperature_loss, temperature)
        + weighted(outputs.kl_loss, kl)
        + weighted(outputs.alpha_loss, alpha)
    )


@checked_as("mpo_compute_weights_and_temperature_loss")
def _weights_and_loss(
    sample_q_values: Annotated[Arg, "f[...,N]"],
    temperature_constraint: _Temperature,
    projection_operator: Projection,
) -> tuple[Array, Array]:
    return _tempered(sample_q_values, temperature_constraint, projection_operator)


def _tempered(
    q: Array, constraint: _Temperature, project: Projection
) -> tuple[Array, Array]:
    """Returns the loss of the temperature and the weights of the samples."""
    temperature = jnp.broadcast_to(project(constraint.alpha), q.shape[:-1])
    weights, log_sum = exponential_weights(q, jnp.ones_like(q), temperature)
    return temperature * (constraint.epsilon - math.log(q.shape[-1])) + log_sum, weights


_moved = jax.jit(jnp.moveaxis, static_argnums=(1, 2))


def _opened(fn: str, penalty: LagrangePenalty) -> _Temperature:
    if not isinstance(penalty, LagrangePenalty):
        raise TypeError(
            f"{fn}: temperature_constraint must be of type LagrangePenalty, got "
            f"{type(penalty).__name__}."
        )
    return _Temperature(penalty.alpha, penalty.epsilon)


def _samples_last(fn: str, axis: int, **samples: Arg) -> list[Array]:
    """Moves the axis of the samples to the end, once it is known to be one."""
    if type(axis) is not int:
        raise TypeError(
            f"{fn}: sample_axis must be a Python int, fixed while tracing, got "
            f"{type(axis).__name__}."
        )
    shapes = {name: getattr(x, "shape", ()) for name, x in samples.items()}
    first, shape = next(iter(shapes.items()))
    for name, other in shapes.items():
        if other != shape:
            raise ValueError(
                f"{fn}: {name} has shape {other}, expected {shape}, the shape of "
                f"{first}."
            )
    if not -len(shape) <= axis < len(shape) or not shape[axis]:
        raise ValueError(
            f"{fn}: {first} has shape {shape}, expected samples along axis {axis}."
        )
    return [_moved(x, axis, -1) for x in samples.values()]

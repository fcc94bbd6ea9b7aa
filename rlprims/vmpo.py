r"""V-MPO: maximum a posteriori policy optimisation on-policy, from advantages.

Here nothing is sampled anew: the steps of a batch of trajectories are the samples, and
their advantages take the place of action values (see `mpo`). Of these steps, only the
better half, or another fraction, is learnt from:

.. math::
    \psi_t = \frac{\rho_t \exp(A_t / \eta)}
                  {\sum_{t' \in \text{top}} \rho_{t'} \exp(A_{t'} / \eta)}, \qquad
    L = -\sum_{t \in \text{top}} \psi_t \log \pi_\theta(a_t)

Steps may lie along any axes, such as `[T, B]`: all of them are one batch. With
`axis_name`, so are those of all devices, and each gets what one device that held all
the data would give it. As usual, gradients are then averaged over the devices.

A step may count for less, or for nothing:

*   a restarting weight of 0 leaves it out, as the first of an episode, whose action
    was not chosen;
*   an importance weight of 0 leaves it in the number of samples, but gives it nothing
    to say: it is chosen last, and its advantage has no effect;
*   `mask_t` leaves it out of everything, as padding is.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims._constraints import (
    Constraints,
    LagrangePenalty,
    constrained,
    pairs,
    refuse_what_is_no_function,
)
from rlprims.arrays import contain_nonfinite, keep_where, weighted
from rlprims.collectives import AllSum, gathered
from rlprims.gradients import stop_gradient_if
from rlprims.importance_weights import exponential_weights
from rlprims.lagrange import POSITIVE, AxisName, Projection, penalties
from rlprims.mpo import MpoOutputs, Weight, weighed

__all__ = [
    "get_top_k_weights",
    "vmpo_compute_weights_and_temperature_loss",
    "vmpo_loss",
]

Steps = Annotated[Arg, "f[...]"]
Weights = Annotated[Arg, "f[...]", "[0, inf]"]
Fraction = Annotated[Arg, "f[]", "(0, 1]"]
Mask = Annotated[Arg | None, "b[...]"]


@checked
def get_top_k_weights(
    top_k_fraction: Fraction,
    restarting_weights: Weights,
    scaled_advantages: Steps,
    axis_name: AxisName = None,
    use_stop_gradient: Flag = True,
    *,
    mask_t: Mask = None,
) -> Annotated[Array, "f[...]"]:
    r"""Weighs the best steps of a batch, and leaves the others out.

    .. math::
        w_t [A_t \ge A_{(k)}], \qquad
        k = \max(1, \lfloor \text{top\_k\_fraction} \cdot n \rfloor)

    with :math:`A_{(k)}` the `k`-th largest advantage of the `n` steps of positive
    weight. Where several are equal to it, all are chosen. An advantage of NaN counts
    as the largest, so that it shows.

    Args:
        top_k_fraction: fraction of the steps to choose, `f[]`, dimensionless, in
            `(0, 1]`; it may be traced.
        restarting_weights: weight of each step, :math:`w_t`, `f[...]`, dimensionless,
            not negative; 0 leaves the step out, NaN included, as one that starts an
            episode.
        scaled_advantages: advantages, on any scale, `f[...]`.
        axis_name: axis, or axes, of `jax.pmap`, `jax.shard_map` or `jax.vmap` that the
            steps are spread over too; a Python value.
        use_stop_gradient: whether the advantages are constants when differentiating,
            `b[]`. The choice of steps has no gradient anyway.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The weights of the steps that are chosen, and 0 for the others, `f[...]`.

    Raises:
        ValueError: if a shape breaks its contract, or `top_k_fraction` is a Python
            number outside `(0, 1]`.
        TypeError: if an argument is not floating-point, or `mask_t` is not boolean.

    Example:
        >>> restarting, advantages = jnp.array([1.0, 1, 1, 1, 0]), jnp.arange(5.0)
        >>> get_top_k_weights(0.5, restarting, advantages).tolist()
        [0.0, 0.0, 1.0, 1.0, 0.0]

    References:
        Song et al., `V-MPO: On-Policy Maximum a Posteriori Policy Optimization for
        Discrete and Continuous Control <https://arxiv.org/abs/1909.12238>`_, 2019.
    """
    (weights,) = keep_where(mask_t, restarting_weights)
    advantages = stop_gradient_if(use_stop_gradient, scaled_advantages)
    top = _top(advantages, weights != 0, top_k_fraction, axis_name)
    return jnp.where(top, weights, 0) + 0 * top_k_fraction  # which is NaN if it is


@checked
def vmpo_compute_weights_and_temperature_loss(
    advantages: Steps,
    restarting_weights: Weights,
    importance_weights: Weights,
    temperature_constraint: LagrangePenalty,
    projection_operator: Projection,
    top_k_fraction: Fraction,
    axis_name: AxisName = None,
    use_stop_gradient: Flag = True,
    *,
    mask_t: Mask = None,
) -> tuple[
    Annotated[Array, "f[]"], Annotated[Array, "f[...]"], Annotated[Array, "f[]"]
]:
    r"""Computes the weights of steps, and the loss of the temperature.

    .. math::
        \psi_t = \frac{w_t \rho_t \exp(A_t / \eta)}
                      {\sum_{t'} w_{t'} \rho_{t'} \exp(A_{t'} / \eta)}, \qquad
        L_\eta = \eta \epsilon + \eta \log \frac{
            \sum_t w_t \rho_t \exp(A_t / \eta)}{\sum_t w_t}

    with :math:`w_t` of `get_top_k_weights` and the temperature :math:`\eta` projected.
    If no step has any weight, the loss and the weights are 0.

    Args:
        advantages: advantages :math:`A_t` of the actions taken, `f[...]`, in units of
            return.
        restarting_weights: weight of each step, `f[...]`, dimensionless, not negative;
            0 leaves the step out, NaN included, as one that starts an episode.
        importance_weights: probability of each step relative to that under the policy
            that acted, :math:`\rho_t`, `f[...]`, not negative; a step of 0 counts as a
            sample, but its advantage has no effect, NaN included.
        temperature_constraint: the limit on the divergence of the weights from uniform
            ones, and the temperature, a `LagrangePenalty` whose `alpha` is `f[]`, in
            units of return.
        projection_operator: function that maps the temperature to where it may be,
            above 0; a Python value, fixed while tracing.
        top_k_fraction: fraction of the steps to learn from, `f[]`, dimensionless, in
            `(0, 1]`; it may be traced.
        axis_name: axis, or axes, of `jax.pmap`, `jax.shard_map` or `jax.vmap` that the
            steps are spread over too; a Python value.
        use_stop_gradient: whether advantages, importance weights and the result's
            weights are constants when differentiating, `b[]`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        The loss of the temperature, `f[]`, in units of return; the weights,
        `f[...]`, which sum to one; and the number of samples, `f[]`, the sum of
        :math:`w_t`.

    Raises:
        ValueError: if a shape breaks its contract, or `top_k_fraction` or
            `temperature_constraint.epsilon` is a Python number out of its range.
        TypeError: if an array is not floating-point, `mask_t` is not boolean, or
            `temperature_constraint` is no `LagrangePenalty`.

    Example:
        >>> advantages, ones = jnp.log(jnp.array([1.0, 3.0, 0.5, 0.1])), jnp.ones(4)
        >>> loss, weights, n = vmpo_compute_weights_and_temperature_loss(
        ...     advantages, ones, ones, LagrangePenalty(1.0, 0.5), jax.nn.relu, 0.5
        ... )
        >>> weights.round(4).tolist(), round(loss.item(), 4), n.item()  # 0.5 + log 2
        ([0.25, 0.75, 0.0, 0.0], 1.1931, 2.0)

    References:
        Song et al., `V-MPO: On-Policy Maximum a Posteriori Policy Optimization for
        Discrete and Continuous Control <https://arxiv.org/abs/1909.12238>`_, 2019,
        eq. 3 and 4, and appendix E for importance weights.
    """
    importance, adv = stop_gradient_if(
        use_stop_gradient, (importance_weights, advantages)
    )
    importance, restarting = keep_where(mask_t, importance, restarting_weights)
    rank = jnp.where(importance == 0, -jnp.inf, adv)
    kept = get_top_k_weights(top_k_fraction, restarting, rank, axis_name)
    fn = "vmpo_compute_weights_and_temperature_loss"
    refuse_what_is_no_function(fn, projection_operator)
    temperature = projection_operator(temperature_constraint.alpha)
    counts = kept * jnp.where(kept == 0, 0, importance)
    weights, log_sum = exponential_weights(
        jnp.ravel(adv), jnp.ravel(counts), temperature, axis_name
    )
    total = AllSum(axis_name)
    samples, used = total(kept), total(counts)
    log_samples = jnp.log(jnp.where(samples == 0, 1, samples))
    loss = temperature * (temperature_constraint.epsilon - log_samples) + log_sum
    loss, weights = (jnp.where(used == 0, 0, x) for x in (loss, weights))
    weights = stop_gradient_if(use_stop_gradient, weights)
    return loss, weights.reshape(adv.shape), samples


@constrained
def vmpo_loss(
    sample_log_probs: Steps,
    advantages: Steps,
    temperature_constraint: LagrangePenalty,
    kl_constraints: Constraints,
    projection_operator: Projection = POSITIVE,
    restarting_weights: Annotated[Arg | None, "f[...]", "[0, inf]"] = None,
    importance_weights: Annotated[Arg | None, "f[...]", "[0, inf]"] = None,
    top_k_fraction: Fraction = 0.5,
    policy_loss_weight: Weight = 1.0,
    temperature_loss_weight: Weight = 1.0,
    kl_loss_weight: Weight = 1.0,
    alpha_loss_weight: Weight = 1.0,
    axis_name: AxisName = None,
    use_stop_gradient: Flag = True,
    *,
    mask_t: Mask = None,
) -> tuple[Array, MpoOutputs]:
    r"""Computes the loss of V-MPO, at each step.

    .. math::
        L_t = -w_\pi N \psi_t \log \pi(a_t) + w_\eta L_\eta
            + w_{\text{KL}} L_{\text{KL},t} + w_\alpha L_{\alpha,t}

    with the weights :math:`\psi_t` and the loss of the temperature :math:`L_\eta` of
    `vmpo_compute_weights_and_temperature_loss`, and the penalty and dual loss of
    `compute_parametric_kl_penalty_and_dual_loss`. The number of steps, `N`, makes the
    mean over them the loss to minimise. A step with a restarting weight of 0 counts in
    `N`, and the policy's divergence there is limited too. Where one of the weights
    :math:`w` is zero, what is not finite in its loss counts as zero.

    Args:
        sample_log_probs: log-probabilities of the actions taken, under the policy to
            improve, `f[...]`, in nats; where the weight of the step is zero, they do
            not count, NaN included.
        advantages: advantages of these actions, `f[...]`, in units of return.
        temperature_constraint: the limit on the divergence of the weights from uniform
            ones, and the temperature, a `LagrangePenalty` whose `alpha` is `f[]`, in
            units of return.
        kl_constraints: pairs of the divergences between the policy that acted and the
            one to improve, `f[...]`, or `f[...,D]` if of each dimension, and their
            `LagrangePenalty`. There may be none.
        projection_operator: function that maps multipliers to where they may be, in
            the same shape; a Python value, fixed while tracing. By default
            `functools.partial(jnp.clip, min=1e-10)`.
        restarting_weights: weight of each step, `f[...]`, dimensionless, not negative;
            0 where an episode starts. All are 1 if `None`.
        importance_weights: probability of each step relative to that under the policy
            that acted, `f[...]`, not negative. All are 1 if `None`.
        top_k_fraction: fraction of the steps to learn from, `f[]`, dimensionless, in
            `(0, 1]`; it may be traced.
        policy_loss_weight: weight :math:`w_\pi`, `f[]`, or of each step, `f[...]`.
        temperature_loss_weight: weight :math:`w_\eta`, `f[]|f[...]`.
        kl_loss_weight: weight :math:`w_{\text{KL}}`, `f[]|f[...]`.
        alpha_loss_weight: weight :math:`w_\alpha`, `f[]|f[...]`.
        axis_name: axis, or axes, of `jax.pmap`, `jax.shard_map` or `jax.vmap` that the
            steps are spread over too; a Python value.
        use_stop_gradient: whether advantages, importance weights and the weights of
            the steps are constants when differentiating, and in each of the losses of
            a multiplier all else, `b[]`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included, and have a loss of 0; divide by the number of those
            that count, on all devices. All count if `None`.

    Returns:
        The loss of each step, `f[...]`, to be averaged, and the `MpoOutputs`.

    Raises:
        ValueError: if a shape breaks its contract, or `top_k_fraction` or an `epsilon`
            is a Python number out of its range.
        TypeError: if an array is not floating-point, `mask_t` is not boolean, or a
            penalty is no `LagrangePenalty`.

    Example:
        >>> log_probs, advantages = jnp.array([-4.0, -8.0]), jnp.array([2.0, 1.0])
        >>> temperature = LagrangePenalty(1.0, 0.5)
        >>> loss, outputs = vmpo_loss(log_probs, advantages, temperature, [])
        >>> outputs.policy_loss.tolist()  # of the better half
        [8.0, 0.0]

    References:
        Song et al., `V-MPO: On-Policy Maximum a Posteriori Policy Optimization for
        Discrete and Continuous Control <https://arxiv.org/abs/1909.12238>`_, 2019.
    """
    ones = jnp.ones_like(advantages)
    (steps,) = keep_where(mask_t, ones)
    temperature_loss, weights, samples = vmpo_compute_weights_and_temperature_loss(
        advantages,
        ones if restarting_weights is None else restarting_weights,
        ones if importance_weights is None else importance_weights,
        temperature_constraint,
        projection_operator,
        top_k_fraction,
        axis_name,
        use_stop_gradient,
        mask_t=mask_t,
    )
    log_probs = contain_nonfinite(sample_log_probs, policy_loss_weight)
    policy_loss = -weighted(log_probs, weights) * AllSum(axis_name)(steps)
    kl_loss, alpha_loss, _ = penalties(
        pairs(kl_constraints),
        projection_operator,
        use_stop_gradient,
        jnp.zeros_like(advantages),
        (steps * kl_loss_weight, steps * alpha_loss_weight),
    )
    kl_loss, alpha_loss = keep_where(mask_t, kl_loss, alpha_loss)
    outputs = MpoOutputs(
        temperature_loss, policy_loss, kl_loss, alpha_loss, weights, samples
    )
    loss = weighed(
        outputs,
        policy_loss_weight,
        temperature_loss_weight,
        kl_loss_weight,
        alpha_loss_weight,
    )
    (loss,) = keep_where(mask_t, loss)
    return loss, outputs


def _top(values: Array, valid: Array, fraction: Array, axis_name: AxisName) -> Array:
    """Tells which values are among the given fraction of the valid ones."""
    keys = jnp.where(valid, _in_order(values), 0)
    count = AllSum(axis_name)(jnp.where(valid, 1.0, 0.0).astype(fraction.dtype))
    # A fraction such as 0.29 is rounded, and must still give 29 of 100.
    slack = 1 + 4 * jnp.finfo(fraction.dtype).eps
    k = jnp.minimum(jnp.floor(fraction * count * slack), count)
    k = jnp.maximum(k, 1).astype(jnp.int32)
    pool = jnp.ravel(gathered(axis_name, keys))
    return valid & (keys >= _kth_largest(pool, k))


def _in_order(values: Array) -> Array:
    """Maps numbers to positive integers in the same order, with NaN above all."""
    values = jnp.where(jnp.isnan(values), jnp.inf, values)
    size = 8 * values.dtype.itemsize
    unsigned = {32: jnp.uint32, 64: jnp.uint64}[size]
    bits = jax.lax.bitcast_convert_type(values, unsigned)
    sign = unsigned(1 << (size - 1))
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(bits == sign, sign, ordered)  # minus 0 is 0


def _kth_largest(keys: Array, k: Array) -> Array:
    """Returns the `k`-th largest of unsigned integers, `k` at least 1."""
    if not keys.size:
        return jnp.zeros((), keys.dtype)
    return jax.lax.platform_dependent(
        keys, k, cpu=_kth_largest_by_bits, default=_kth_largest_by_sorting
    )


def _kth_largest_by_bits(keys: Array, k: Array) -> Array:
    """Finds it bit by bit, from the highest: the fastest way on a CPU by far."""
    size = 8 * keys.dtype.itemsize

    def narrow(i: Array, found: Array) -> Array:
        bit = jnp.ones_like(found) << (size - 1 - i).astype(found.dtype)
        enough = jnp.sum(keys >= (found | bit), dtype=k.dtype) >= k
        return jnp.where(enough, found | bit, found)

    # Inside `shard_map` this zero must vary over the devices that the keys vary over.
    zero = jnp.sum(keys[:0], dtype=keys.dtype) + (0 * k).astype(keys.dtype)
    return jax.lax.fori_loop(0, size, narrow, zero)


def _kth_largest_by_sorting(keys: Array, k: Array) -> Array:
    return jnp.sort(keys)[keys.size - k]

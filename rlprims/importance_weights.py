"""Weights that make samples of one distribution speak for another.

What was drawn from a policy that acted, averaged with the ratios of probabilities as
weights, estimates a mean under another policy. The estimate is unbiased, and as noisy
as the weights are uneven. Each function here trades one for the other:

*   `truncated_importance_weights` bounds the weights from above: biased, of bounded
    variance, and every sample counts;
*   `masked_importance_weights` drops samples whose weight is out of bounds;
*   `self_normalized_importance_weights` makes the weights sum to one: biased by an
    amount that vanishes as samples are added;
*   `effective_sample_size` says how many even samples the weights are worth.

All take logarithms of ratios, differences of log-probabilities, which do not overflow.
By default the weights are constants when differentiating, as in a policy gradient that
they correct. A sample that `mask_t` leaves out has weight zero, NaN included.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import guarded, keep_where
from rlprims.collectives import AllSum, maximum_over
from rlprims.gradients import stop_gradient_if

__all__ = [
    "effective_sample_size",
    "masked_importance_weights",
    "self_normalized_importance_weights",
    "truncated_importance_weights",
]


@checked
def truncated_importance_weights(
    log_ratio_t: Annotated[Arg, "f[...]"],
    *,
    max_weight: Annotated[Arg, "f[]", "[0, inf]"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
) -> Annotated[Array, "f[...]"]:
    r"""Computes importance weights that are bounded from above.

    .. math::
        w_t = \min\bigl(e^{\text{log\_ratio}_t}, \; \text{max\_weight}\bigr)

    Args:
        log_ratio_t: logarithms of the importance ratios, `f[...]`, dimensionless:
            log-probabilities under the policy to evaluate less those under the one that
            acted.
        max_weight: the largest weight, `f[]`, dimensionless, in `[0, inf]`.
        mask_t: whether each sample counts, `b[...]`; the weight of the others is 0. All
            count if `None`.
        use_stop_gradient: whether the weights are constants when differentiating,
            `b[]`. If not, a weight that was truncated has no gradient.

    Returns:
        The weights, `f[...]`, dimensionless, in `[0, max_weight]`.

    Raises:
        ValueError: if a shape breaks its contract, or `max_weight` is a Python number
            below 0.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> log_ratio_t = jnp.array([0.0, 200.0])
        >>> truncated_importance_weights(log_ratio_t, max_weight=2.0).tolist()
        [1.0, 2.0]

    References:
        Espeholt et al., `IMPALA: Scalable Distributed Deep-RL with Importance Weighted
        Actor-Learner Architectures <https://arxiv.org/abs/1802.01561>`_, 2018, for the
        steps of a trajectory.
        Yao et al., `Your Efficient RL Framework Secretly Brings You Off-Policy RL
        Training <https://fengyao.notion.site/off-policy-rl>`_, 2025, for the tokens of
        a language model.
    """
    (log_ratio_t,) = keep_where(mask_t, log_ratio_t)
    weights = jnp.minimum(guarded(jnp.exp, log_ratio_t), max_weight)
    (weights,) = keep_where(mask_t, weights)
    return stop_gradient_if(use_stop_gradient, weights)


@checked
def masked_importance_weights(
    log_ratio_t: Annotated[Arg, "f[...]"],
    *,
    min_weight: Annotated[Arg, "f[]", "[0, inf]"],
    max_weight: Annotated[Arg, "f[]", "[0, inf]"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
) -> Annotated[Array, "f[...]"]:
    r"""Computes importance weights, and zero for those out of bounds.

    A sample on which two policies differ too much says more about the difference than
    about the reward: where both should be the same, as one model in two programs, it is
    better dropped than truncated.

    .. math::
        w_t = e^{\text{log\_ratio}_t} \,
            1\bigl[\text{min\_weight} \le e^{\text{log\_ratio}_t}
                \le \text{max\_weight}\bigr]

    Args:
        log_ratio_t: logarithms of the importance ratios, `f[...]`, dimensionless:
            log-probabilities under the policy to evaluate less those under the one that
            acted.
        min_weight: the smallest weight that is kept, `f[]`, dimensionless, in
            `[0, inf]`.
        max_weight: the largest weight that is kept, `f[]`, dimensionless, in
            `[0, inf]`. If it is below `min_weight`, none is.
        mask_t: whether each sample counts, `b[...]`; the weight of the others is 0. All
            count if `None`.
        use_stop_gradient: whether the weights are constants when differentiating,
            `b[]`. If not, a weight that was dropped has no gradient.

    Returns:
        The weights, `f[...]`, dimensionless: 0, or between the bounds.

    Raises:
        ValueError: if a shape breaks its contract, or a bound is a Python number below
            0.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> log_ratio_t = jnp.array([0.0, 200.0])
        >>> masked_importance_weights(
        ...     log_ratio_t, min_weight=0.5, max_weight=2.0
        ... ).tolist()
        [1.0, 0.0]

    References:
        Ling Team, `Every Step Evolves: Scaling Reinforcement Learning for
        Trillion-Scale Thinking Model <https://arxiv.org/abs/2510.18855>`_, 2025.
    """
    (log_ratio_t,) = keep_where(mask_t, log_ratio_t)
    weights = guarded(jnp.exp, log_ratio_t)
    beyond = (weights < min_weight) | (weights > max_weight)
    unknown = jnp.isnan(min_weight + max_weight)
    weights = jnp.select([unknown, beyond], [jnp.nan, 0], weights)
    (weights,) = keep_where(mask_t, weights)
    return stop_gradient_if(use_stop_gradient, weights)


@checked
def self_normalized_importance_weights(
    log_ratios: Annotated[Arg, "f[...,N]"],
    *,
    mask: Annotated[Arg | None, "b[...,N]"] = None,
    use_stop_gradient: Flag = True,
    axis_name: Any = None,
) -> Annotated[Array, "f[...,N]"]:
    r"""Computes importance weights that sum to one.

    .. math::
        w_i = \frac{e^{\text{log\_ratios}_i}}{\sum_j e^{\text{log\_ratios}_j}}

    A factor that all ratios share, such as a constant that a density is not normalised
    by, has no effect. The sum of the weights times what was observed is the weighted
    importance sampling estimate, which lies within the range of what was observed.

    Args:
        log_ratios: logarithms of the importance ratios of `N` samples, `f[...,N]`,
            dimensionless; minus infinity for a sample that is impossible under the
            distribution to evaluate.
        mask: whether each sample counts, `b[...,N]`; the weight of the others is 0. All
            count if `None`.
        use_stop_gradient: whether the weights are constants when differentiating,
            `b[]`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the samples are split; `None` if they are not.

    Returns:
        The weights, `f[...,N]`, dimensionless, summing to 1; all 0 where no sample
        counts, or those that do are impossible.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> log_ratios = jnp.array([500.0, 500.0, -jnp.inf])
        >>> self_normalized_importance_weights(log_ratios).tolist()
        [0.5, 0.5, 0.0]

    References:
        Precup, Sutton and Singh, `Eligibility Traces for Off-Policy Policy Evaluation
        <http://incompleteideas.net/papers/PSS-00.pdf>`_, 2000.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, section
        5.5, where this is weighted importance sampling.
    """
    weights, _ = _normalized(log_ratios, mask, axis_name)
    return stop_gradient_if(use_stop_gradient, weights)


@checked
def effective_sample_size(
    log_ratios: Annotated[Arg, "f[...,N]"],
    *,
    mask: Annotated[Arg | None, "b[...,N]"] = None,
    axis_name: Any = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes how many samples of equal weight the weighted ones are worth.

    .. math::
        n = \frac{\bigl(\sum_i w_i\bigr)^2}{\sum_i w_i^2}, \qquad
        w_i = e^{\text{log\_ratios}_i}

    It is the number of samples if all weights are equal, and 1 if one of them
    outweighs the others. Divided by the number of samples it is a fraction, often
    watched to see how far a policy has moved from the one that gathered the data. A
    factor that all weights share has no effect.

    Args:
        log_ratios: logarithms of the importance ratios, or of other weights, of `N`
            samples, `f[...,N]`, dimensionless; minus infinity for a weight of 0.
        mask: whether each sample counts, `b[...,N]`; all do if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the samples are split; `None` if they are not.

    Returns:
        The effective number of samples, `f[...]`, from 1 to the number that count; 0
        where no sample counts, or none of those that do has any weight.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> effective_sample_size(jnp.array([500.0, 500.0, -jnp.inf])).item()
        2.0

    References:
        Metelli, Papini, Faccio and Restelli, `Policy Optimization via Importance
        Sampling <https://arxiv.org/abs/1809.06098>`_, 2018.
    """
    weights, exist = _normalized(log_ratios, mask, axis_name)
    squares = AllSum(axis_name)(weights**2, axis=-1)
    return jnp.where(exist, 1 / jnp.where(exist, squares, 1), 0)


def _normalized(
    log_ratios: Array, mask: Array | None, axis_name: Any
) -> tuple[Array, Array]:
    """Returns weights that sum to one, and whether there are any above zero."""
    counts = log_ratios != -jnp.inf
    counts = counts if mask is None else counts & mask
    exist = AllSum(axis_name)(counts, axis=-1) > 0
    heat = jnp.ones_like(log_ratios, shape=log_ratios.shape[:-1])
    weights, _ = exponential_weights(
        log_ratios, counts.astype(log_ratios.dtype), heat, axis_name
    )
    return jnp.where(exist[..., None], weights, 0), exist


def exponential_weights(
    values: Array, counts: Array, temperature: Array, axis_name: Any = None
) -> tuple[Array, Array]:
    """Returns weights proportional to `counts * exp(values / temperature)`.

    They are normalised over the last axis, and over the devices along `axis_name`. The
    other result is the logarithm of what they are divided by, times the temperature.
    What counts for zero has no effect, NaN included. If nothing is left, both are NaN.
    """
    heat = temperature[..., None]
    best = jnp.max(values, axis=-1, keepdims=True, where=counts != 0, initial=-jnp.inf)
    best = maximum_over(axis_name, jax.lax.stop_gradient(best))
    gaps = values - jnp.where(best == -jnp.inf, 0, best)
    # No gap that counts is above zero. One that does not may be anything, and is cut
    # off where its exponential would leave the range of numbers.
    bounded = gaps < 80 * heat
    real = (values != -jnp.inf) & ((counts != 0) | bounded)
    exps = jnp.where(real, counts * jnp.exp(jnp.where(real, gaps, 0) / heat), 0)
    whole = AllSum(axis_name)(exps, axis=-1)[..., None]
    known = jnp.where(whole == 0, 1, whole)
    log_sum = jnp.where(whole == 0, jnp.nan, best + heat * jnp.log(known))
    return jnp.where(whole == 0, jnp.nan, exps / known), log_sum[..., 0]

r"""Statistics of all data so far, to put what is new on their scale.

Observations and returns arrive in batches, on several devices. `RunningStatistics` are
the mean and the variance of every sample that was seen, each counted once, however they
were split: `update_running_statistics` adds a batch to them, and
`merge_running_statistics` adds up those of two streams.
`normalize_by_running_statistics` gives numbers a mean of zero and a variance of one.

`MinMaxStatistics` are the smallest and the largest number seen. They put values between
0 and 1 where no one knows the range beforehand, as for the values in a tree search.

Nothing forgets what is old here: `moving_averages` does. A variance is a sum of
squared deviations, never a difference of two large numbers. All of it is kept in single
precision at least, whatever the dtype of the data.
"""

from collections.abc import Hashable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import greatest, keep_where, lhs_broadcast, root
from rlprims.collectives import AllSum, maximum_over
from rlprims.moving_averages import merged

__all__ = [
    "MinMaxStatistics",
    "RunningStatistics",
    "merge_running_statistics",
    "normalize_by_min_max",
    "normalize_by_running_statistics",
    "update_min_max",
    "update_running_statistics",
]


class RunningStatistics(NamedTuple):
    """Mean and variance of the samples so far, each entry of a sample by itself.

    Start with `RunningStatistics(jnp.zeros(shape), jnp.zeros(shape))` for samples of
    that shape, with a count of zero.

    Attributes:
        mean: their mean, `f[...]`, in units of the data.
        variance: the mean square of their distance from it, `f[...]`, in squared units.
        count: how many there were, `f[]`, not negative. Where it is so large that a
            batch adds less than a rounding error, in single precision 17 million
            batches of the same size, it stays, and the statistics become moving ones.
    """

    mean: Annotated[Arg, "f[...]", "running"]
    variance: Annotated[Arg, "f[...]", "running"]
    count: Annotated[Arg, "f[]", "[0, inf)", "running"] = 0.0


class MinMaxStatistics(NamedTuple):
    """The smallest and the largest sample so far, each entry of one by itself.

    Start with `MinMaxStatistics(jnp.full(shape, jnp.inf), jnp.full(shape, -jnp.inf))`,
    or with bounds that are known.

    Attributes:
        minimum: the smallest, `f[...]`, in units of the data; infinity before any.
        maximum: the largest, `f[...]`, in the same units; minus infinity before any.
    """

    minimum: Annotated[Arg, "f[...]", "running"]
    maximum: Annotated[Arg, "f[...]", "running"]


@checked
def update_running_statistics(
    state: RunningStatistics,
    x: Annotated[Arg, "f[N,...]"],
    *,
    mask: Annotated[Arg | None, "b[N]"] = None,
    axis_name: Hashable | None = None,
) -> RunningStatistics:
    r"""Adds a batch of samples to the statistics of all before.

    .. math::
        m' = m + \frac{n'}{n + n'} (\bar x - m), \qquad
        v' = \frac{n v + n' \, \overline{(x - \bar x)^2}}{n + n'}
            + \frac{n n'}{(n + n')^2} (\bar x - m)^2

    where :math:`n` samples were seen before and :math:`n'` are new. The result does not
    depend on how samples are split into batches, but for rounding.

    Args:
        state: the statistics of what was seen before, of one sample's shape.
        x: new samples, `f[N,...]`.
        mask: whether each sample counts, `b[N]`: the others are as if left out, NaN
            included. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which a batch is split, and the state is the same; `None` if it is not.

    Returns:
        The mean and the variance of all samples so far, `f[...]`, and their number,
        `f[]`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype, or is no state.

    Example:
        >>> state = RunningStatistics(jnp.zeros(1), jnp.zeros(1))
        >>> state = update_running_statistics(state, jnp.array([[1.0], [3.0]]))
        >>> state = update_running_statistics(state, jnp.array([[2.0], [2.0]]))
        >>> state.mean.item(), state.variance.item(), state.count.item()
        (2.0, 0.5, 4.0)

    References:
        Chan, Golub and LeVeque, `Algorithms for Computing the Sample Variance:
        Analysis and Recommendations
        <https://doi.org/10.1080/00031305.1983.10483115>`_, 1983.
    """
    return merged_statistics(state, moments(x, mask, axis_name))


@checked
def merge_running_statistics(
    state: RunningStatistics, other: RunningStatistics
) -> RunningStatistics:
    r"""Computes the statistics of two streams of samples together.

    .. math::
        m = \frac{n_1 m_1 + n_2 m_2}{n_1 + n_2}, \qquad
        v = \frac{n_1 v_1 + n_2 v_2}{n_1 + n_2}
            + \frac{n_1 n_2}{(n_1 + n_2)^2} (m_2 - m_1)^2

    They must have no sample in common: it would count twice. Statistics of no samples
    have no effect.

    Args:
        state: the statistics of one stream.
        other: those of the other, of samples of the same shape and units.

    Returns:
        The mean and the variance of all samples, `f[...]`, and their number, `f[]`; as
        in `state` if there are no samples.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype, or is no state.

    Example:
        >>> one = RunningStatistics(jnp.array(1.0), jnp.array(0.0), 2.0)
        >>> two = RunningStatistics(jnp.array(3.0), jnp.array(0.0), 2.0)
        >>> both = merge_running_statistics(one, two)
        >>> both.mean.item(), both.variance.item(), both.count.item()
        (2.0, 1.0, 4.0)

    References:
        Chan, Golub and LeVeque, `Algorithms for Computing the Sample Variance:
        Analysis and Recommendations
        <https://doi.org/10.1080/00031305.1983.10483115>`_, 1983.
    """
    return merged_statistics(state, other)


@checked
def normalize_by_running_statistics(
    state: RunningStatistics,
    x: Annotated[Arg, "f[N,...]"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf)"] = 1e-8,
    max_abs: Annotated[Arg | None, "f[]", "[0, inf]"] = None,
) -> Annotated[Array, "f[N,...]"]:
    r"""Shifts and scales numbers by the statistics of those so far, and clips them.

    .. math::
        y = \operatorname{clip}\Bigl(\frac{x - m}{\sqrt{v + \epsilon}},
            -\text{max\_abs}, \, \text{max\_abs}\Bigr)

    Before there are any samples, the numbers are only clipped.

    Args:
        state: the mean :math:`m` and the variance :math:`v`, of one sample's shape.
        x: samples to normalise, `f[N,...]`.
        epsilon: what is added to the variance, `f[]`, in squared units of `x`, not
            negative. With zero, what has no variance becomes 0.
        max_abs: the largest size of the result, `f[]`, dimensionless, not negative;
            `None` not to clip. A number that is clipped has no gradient.

    Returns:
        The normalised samples, `f[N,...]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number
            below 0.
        TypeError: if an argument is not floating-point, or is no state.

    Example:
        >>> state = RunningStatistics(jnp.array(2.0), jnp.array(4.0), 9.0)
        >>> normalize_by_running_statistics(
        ...     state, jnp.array([4.0, 92.0]), epsilon=0.0, max_abs=10.0
        ... ).tolist()
        [1.0, 10.0]

    References:
        Engstrom et al., `Implementation Matters in Deep Policy Gradients: A Case Study
        on PPO and TRPO <https://arxiv.org/abs/2005.12729>`_, 2020, where it is done to
        observations.
    """
    deviation = root(state.variance + epsilon)
    deviation = jnp.where(deviation == 0, jnp.inf, deviation)
    known = [state.count == 0, state.count > 0]
    shift = jnp.select(known, [jnp.zeros_like(state.mean), state.mean], jnp.nan)
    scaled = (x - shift[None]) / jnp.where(state.count == 0, 1, deviation)[None]
    return scaled if max_abs is None else jnp.clip(scaled, -max_abs, max_abs)


@checked
def update_min_max(
    state: MinMaxStatistics,
    x: Annotated[Arg, "f[N,...]"],
    *,
    mask: Annotated[Arg | None, "b[N]"] = None,
    axis_name: Hashable | None = None,
) -> MinMaxStatistics:
    r"""Widens a range to hold a batch of samples too.

    .. math::
        \text{minimum}' = \min(\text{minimum}, \min_n x_n), \qquad
        \text{maximum}' = \max(\text{maximum}, \max_n x_n)

    Args:
        state: the range of what was seen before, of one sample's shape.
        x: new samples, `f[N,...]`.
        mask: whether each sample counts, `b[N]`: the others are as if left out, NaN
            included. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which a batch is split, and the state is the same; `None` if it is not. With
            a name, the samples are constants when differentiating.

    Returns:
        The smallest and the largest of all samples so far, `f[...]`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype, or is no state.

    Example:
        >>> state = MinMaxStatistics(jnp.array(jnp.inf), jnp.array(-jnp.inf))
        >>> state = update_min_max(state, jnp.array([2.0, 5.0, 3.0]))
        >>> state.minimum.item(), state.maximum.item()
        (2.0, 5.0)

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    low = -largest(-x, mask, axis_name)
    high = largest(x, mask, axis_name)
    return MinMaxStatistics(
        jnp.minimum(state.minimum, low), jnp.maximum(state.maximum, high)
    )


@checked
def normalize_by_min_max(
    state: MinMaxStatistics, x: Annotated[Arg, "f[N,...]"]
) -> Annotated[Array, "f[N,...]"]:
    r"""Scales numbers so that the range seen so far becomes the unit interval.

    .. math::
        y = \begin{cases}
            \dfrac{x - \text{minimum}}{\text{maximum} - \text{minimum}} &
                \text{maximum} > \text{minimum} \\
            x & \text{otherwise}
        \end{cases}

    Until two different samples have been seen, there is no range and the numbers stay
    as they are.

    Args:
        state: the range, of one sample's shape.
        x: samples to scale, `f[N,...]`. Numbers outside the range become negative, or
            greater than one.

    Returns:
        The scaled samples, `f[N,...]`, dimensionless once there is a range.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point, or is no state.

    Example:
        >>> state = MinMaxStatistics(jnp.array(2.0), jnp.array(6.0))
        >>> normalize_by_min_max(state, jnp.array([2.0, 3.0, 6.0])).tolist()
        [0.0, 0.25, 1.0]

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    none = state.maximum <= state.minimum
    low, high = jnp.where(none, 0, state.minimum), jnp.where(none, 1, state.maximum)
    return (x - low[None]) / (high - low)[None]


# What the statistics are made of


def moments(
    x: Array, mask: Array | None, axis_name: Hashable | None
) -> RunningStatistics:
    """Returns the moments over the first axis, and over all devices.

    They are those of distances from the largest entry, so that what is all the same has
    a variance of exactly zero. Of nothing, all are zero.
    """
    total = AllSum(axis_name)
    x, one = keep_where(mask, x, jnp.ones_like(x, shape=x.shape[:1]))
    count = total(one, axis=0)
    shift = jnp.where(count > 0, largest(x, mask, axis_name), 0)
    shift = jax.lax.stop_gradient(shift)
    (distances,) = keep_where(mask, x - shift[None])
    mean = total(distances, axis=0) / jnp.maximum(count, 1)
    (errors,) = keep_where(mask, distances - mean[None])
    variance = total(errors**2, axis=0) / jnp.maximum(count, 1)
    return RunningStatistics(shift + mean, variance, count)


def largest(x: Array, mask: Array | None, axis_name: Hashable | None) -> Array:
    """Returns the maximum over the first axis and all devices, or minus infinity."""
    if mask is not None:
        x = jnp.where(lhs_broadcast(mask, x), x, -jnp.inf)
    return maximum_over(axis_name, greatest(x, axis=0, initial=-jnp.inf))


def merged_statistics(
    one: RunningStatistics, two: RunningStatistics
) -> RunningStatistics:
    count = one.count + two.count
    weight = two.count / jnp.where(count == 0, 1, count)
    mean, variance = merged(*one[:2], *two[:2], weight)
    return RunningStatistics(mean, variance, count)

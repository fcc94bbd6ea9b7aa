r"""Two-hot codes: a number as weights on the two bins it lies between.

To predict a number by classification, place bins along the line. A number between two
neighbouring bins is shared between them, the nearer one getting more, so that the mean
of the bins under these weights is the number again:

.. math::
    x = p_k b_k + p_{k+1} b_{k+1}, \qquad p_k + p_{k+1} = 1

Any distribution over the bins decodes to its mean. Bins are either spaced evenly from
`min_value` to `max_value`, or arbitrary numbers in increasing order (`..._nonlinear`).
A number outside them is taken for the nearest bin.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import contain_nonfinite

__all__ = [
    "transform_from_2hot",
    "transform_from_2hot_nonlinear",
    "transform_to_2hot",
    "transform_to_2hot_nonlinear",
]

P = ParamSpec("P")
R = TypeVar("R")


def _refuses_empty_ranges(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes `fn` refuse a range that no bins fit into.

    `checked` compiles, and compiled code does not know its numbers: what a Python
    number can tell is told before.
    """
    names = tuple(inspect.signature(fn).parameters)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        low, high = given.get("min_value"), given.get("max_value")
        if (
            isinstance(low, int | float)
            and isinstance(high, int | float)
            and not -math.inf < low < high < math.inf
        ):
            raise ValueError(
                f"{fn.__name__}: min_value must be below max_value and both finite, "
                f"got {low} and {high}."
            )
        num_bins = given.get("num_bins", 2)
        if type(num_bins) is not int:
            raise TypeError(
                f"{fn.__name__}: num_bins must be a Python int, got "
                f"{type(num_bins).__name__}."
            )
        if num_bins < 2:
            raise ValueError(
                f"{fn.__name__}: num_bins must be at least 2, got {num_bins}."
            )
        return fn(*args, **kwargs)

    return wrapper


@_refuses_empty_ranges
@checked
def transform_to_2hot(
    scalar: Annotated[Arg, "f[...]"],
    min_value: Annotated[Arg, "f[]"],
    max_value: Annotated[Arg, "f[]"],
    num_bins: int,
) -> Annotated[Array, "f[...,K]"]:
    r"""Computes two-hot codes on evenly spaced bins.

    .. math::
        b_k = b_0 + \frac{k}{K - 1} (b_{K-1} - b_0), \qquad
        p_k = \max\left(0, 1 - \frac{|x - b_k|}{b_1 - b_0}\right)

    Args:
        scalar: numbers :math:`x`, `f[...]`. One outside the range is taken for its
            nearer end, with derivative 0; NaN gives NaN.
        min_value: the first bin :math:`b_0`, `f[]`, in the units of `scalar`.
        max_value: the last bin :math:`b_{K-1}`, `f[]`, above `min_value`. One below it
            gives NaN, or an error if both are Python numbers.
        num_bins: how many bins :math:`K`, an `int`, at least 2.

    Returns:
        Weights, `f[...,K]`, dimensionless: two neighbours share 1, or one bin has it
        all if the number is a bin. Their derivative with respect to the number is
        minus and plus one over the distance of the bins; on a bin it is the one from
        above, on the last bin from below.

    Raises:
        ValueError: if a shape breaks its contract, there are fewer than 2 bins or the
            range is empty.
        TypeError: if an argument is not floating-point or `num_bins` no `int`.

    Example:
        >>> transform_to_2hot(0.25, -1.0, 1.0, 5).tolist()
        [0.0, 0.0, 0.5, 0.5, 0.0]

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    weights = _two_hot(scalar, _uniform_bins(min_value, max_value, num_bins))
    return jnp.where(min_value <= max_value, weights, jnp.nan)


@_refuses_empty_ranges
@checked
def transform_from_2hot(
    probs: Annotated[Arg, "f[...,K]"],
    min_value: Annotated[Arg, "f[]"],
    max_value: Annotated[Arg, "f[]"],
    num_bins: int,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the means of distributions over evenly spaced bins.

    .. math::
        x = \sum_k p_k b_k, \qquad
        b_k = b_0 + \frac{k}{K - 1} (b_{K-1} - b_0)

    Args:
        probs: probabilities :math:`p_k`, `f[...,K]`, dimensionless; not normalised
            here. A distribution that is symmetric about 0 decodes to exactly 0.
        min_value: the first bin :math:`b_0`, `f[]`.
        max_value: the last bin :math:`b_{K-1}`, `f[]`, above `min_value`. One below it
            gives NaN, or an error if both are Python numbers.
        num_bins: how many bins :math:`K`, an `int`, at least 2.

    Returns:
        The means, `f[...]`, in the units of the bins.

    Raises:
        ValueError: if a shape breaks its contract, `probs` has not `num_bins` columns,
            there are fewer than 2 bins or the range is empty.
        TypeError: if an argument is not floating-point or `num_bins` no `int`.

    Example:
        >>> transform_from_2hot(jnp.array([0.0, 0.0, 0.5, 0.5, 0.0]), -1, 1, 5).item()
        0.25

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    _refuse_other_sizes("transform_from_2hot", probs, num_bins)
    means = mean_of_bins(probs, _uniform_bins(min_value, max_value, num_bins))
    return jnp.where(min_value <= max_value, means, jnp.nan)


@checked
def transform_to_2hot_nonlinear(
    scalar: Annotated[Arg, "f[...]"],
    bins: Annotated[Arg, "f[K]"],
) -> Annotated[Array, "f[...,K]"]:
    r"""Computes two-hot codes on arbitrary bins.

    .. math::
        p_k = \frac{b_{k+1} - x}{b_{k+1} - b_k}, \qquad
        p_{k+1} = \frac{x - b_k}{b_{k+1} - b_k}, \qquad
        b_k \le x < b_{k+1}

    Args:
        scalar: numbers :math:`x`, `f[...]`. One outside the bins is taken for the
            nearer end, with derivative 0; NaN gives NaN.
        bins: at least 2 numbers :math:`b_k` in increasing order, `f[K]`, in the units
            of `scalar`; in any other order the result is NaN. Equal bins are allowed,
            and so are infinite ones at the ends, which only infinite numbers put
            weight on.

    Returns:
        Weights, `f[...,K]`, dimensionless: two neighbours share 1, or one bin has it
        all if the number is a bin. Their derivative with respect to the number is
        minus and plus one over the distance of the bins; on a bin it is the one from
        above, on the last bin from below.

    Raises:
        ValueError: if a shape breaks its contract or there are fewer than 2 bins.
        TypeError: if an argument is not floating-point.

    Example:
        >>> bins = jnp.array([-1.0, 0.0, 4.0])
        >>> transform_to_2hot_nonlinear(jnp.array([1.0, 9.0]), bins).tolist()
        [[0.0, 0.75, 0.25], [0.0, 0.0, 1.0]]

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    _refuse_single_bins("transform_to_2hot_nonlinear", bins)
    return jnp.where(is_increasing(bins), _two_hot(scalar, bins), jnp.nan)


@checked
def transform_from_2hot_nonlinear(
    probs: Annotated[Arg, "f[...,K]"],
    bins: Annotated[Arg, "f[K]"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes the means of distributions over arbitrary bins.

    .. math::
        x = \sum_k p_k b_k

    Args:
        probs: probabilities :math:`p_k`, `f[...,K]`, dimensionless; not normalised
            here. A distribution that is symmetric about 0 decodes to exactly 0.
        bins: at least 2 numbers :math:`b_k`, `f[K]`; one without probability counts
            for nothing, even if it is infinite or NaN.

    Returns:
        The means, `f[...]`, in the units of the bins.

    Raises:
        ValueError: if a shape breaks its contract or there are fewer than 2 bins.
        TypeError: if an argument is not floating-point.

    Example:
        >>> probs, bins = jnp.array([0.0, 0.75, 0.25]), jnp.array([-1.0, 0.0, 4.0])
        >>> transform_from_2hot_nonlinear(probs, bins).item()
        1.0

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    _refuse_single_bins("transform_from_2hot_nonlinear", bins)
    return mean_of_bins(probs, bins)


def _refuse_single_bins(name: str, bins: Array) -> None:
    if len(bins) < 2:
        raise ValueError(f"{name}: bins must be at least 2, got {len(bins)}.")


def _refuse_other_sizes(name: str, probs: Array, num_bins: int) -> None:
    if probs.shape[-1] != num_bins:
        raise ValueError(
            f"{name}: probs has shape {probs.shape}, expected f[...,K] with "
            f"K = num_bins = {num_bins}."
        )


def _uniform_bins(low: Array, high: Array, num_bins: int) -> Array:
    """Returns evenly spaced bins: means of the ends, weighted by the steps between.

    Each end is split into two halves of its digits, so that its products with the
    number of steps are exact (below 4096 bins). However a compiler joins products and
    sums, a bin is then the same number in every program, its mirror image is its exact
    negative on a symmetric range, and no digits cancel.
    """
    right = jnp.arange(num_bins, dtype=low.dtype)
    left = right[::-1]
    digits = jnp.finfo(low.dtype)
    ends = jnp.stack([low, high])
    coarse = jax.lax.stop_gradient(
        jax.lax.reduce_precision(ends, digits.nexp, digits.nmant // 2)
    )
    fine = ends - coarse
    inner = coarse[0] * left + coarse[1] * right + (fine[0] * left + fine[1] * right)
    bins = jnp.where(right == 0, low, inner / (num_bins - 1))
    return jnp.where(left == 0, high, bins)


@functools.partial(jnp.vectorize, excluded={1}, signature="()->(k)")
def _two_hot(x: Array, bins: Array) -> Array:
    """Returns the two-hot code of one number."""
    num_bins = len(bins)
    k = jnp.searchsorted(bins, x, side="right", method="compare_all") - 1
    k = jnp.clip(k, 0, num_bins - 2)
    p_low, p_high = interpolation_weights(x, bins[k], bins[k + 1])
    one_hot = functools.partial(jax.nn.one_hot, num_classes=num_bins, dtype=x.dtype)
    weights = one_hot(k) * p_low + one_hot(k + 1) * p_high
    return jnp.where(jnp.isnan(x), x, weights)


# What projections and losses are made of too


def is_increasing(x: Array) -> Array:
    """Whether no entry is below the one before, or NaN next to another."""
    return jnp.all(x[1:] >= x[:-1])


def interpolation_weights(x: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Returns the weights of `low` and `high` that make `x`, or the nearer of them."""
    # Unlike `jnp.clip`, this has the derivative of its argument at the ends too.
    x = jnp.where(x < low, low, jnp.where(x > high, high, x))
    below, above, width = x - low, high - x, jnp.where(high > low, high - low, jnp.inf)
    # The smaller weight is computed and the larger one is what remains: no digits
    # are lost next to a bin, and together they are exactly 1.
    low_is_nearer = (below <= above) | jnp.isneginf(x)
    small = jnp.where(low_is_nearer, below, above) / width
    small = jnp.where(jnp.isinf(x), 0, small)  # then it is on an infinite bin
    p_low = jnp.where(low_is_nearer, 1 - small, small)
    p_high = jnp.where(low_is_nearer, small, 1 - small)
    return p_low, p_high


@functools.partial(jnp.vectorize, excluded={1}, signature="(k)->()")
def mean_of_bins(probs: Array, bins: Array) -> Array:
    """Returns the mean of one distribution, summing bins in pairs from both ends.

    Where the two are each other's negative, `p' b' + p b = (p' - p) b' + p (b' + b)`
    is exactly 0 if their probabilities are equal, however the compiler rounds.
    """
    bins = contain_nonfinite(bins, probs)
    half = len(bins) // 2
    p_low, b_low = probs[:half], bins[:half]
    p_high, b_high = probs[::-1][:half], bins[::-1][:half]
    middle = jnp.sum(probs[half : len(bins) - half] * bins[half : len(bins) - half])
    total = b_low + b_high
    pairs = jnp.where(
        total == 0,
        (p_high - p_low) * b_high + p_low * total,
        p_high * b_high + p_low * b_low,
    )
    return jnp.sum(pairs) + middle

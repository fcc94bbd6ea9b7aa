r"""Values learned by classification: a number as a histogram, and its cross-entropy.

A network predicts logits of `K` bins in place of a number. The number to predict
becomes a histogram, the prediction is trained by cross-entropy from it, and decoded by
its mean. Two ways to make the histogram are here:

*   **HL-Gauss** spreads the number: the histogram is that of a Gaussian around it, of
    standard deviation `sigma`. Bins are intervals, given by their `K + 1` edges.
*   **Two-hot** shares it between the two bins that it lies between, which are points
    (`rlprims.two_hot`).

The support is where the bins are. A Gaussian reaches beyond it, and is cut off there:
what counts is the probability of each bin, given that one of them is hit. So it is for
numbers that lie outside themselves, which move the histogram into the outermost bin the
farther they are. Nothing is clipped, and no mass is lost.
"""

import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where
from rlprims.categorical import categorical_cross_entropy
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced
from rlprims.two_hot import (
    is_increasing,
    mean_of_bins,
    transform_to_2hot_nonlinear,
)

__all__ = [
    "hl_gauss_decode",
    "hl_gauss_encode",
    "hl_gauss_loss",
    "two_hot_loss",
]


@checked
def hl_gauss_encode(
    targets: Annotated[Arg, "f[...]"],
    edges: Annotated[Arg, "f[K+1]"],
    *,
    sigma: Annotated[Arg, "f[]|f[...]", "[0, inf]"],
) -> Annotated[Array, "f[...,K]"]:
    r"""Computes histograms of Gaussians around numbers.

    .. math::
        p_k = \frac{\Phi\bigl((e_{k+1} - x) / \sigma\bigr)
                - \Phi\bigl((e_k - x) / \sigma\bigr)}
            {\Phi\bigl((e_K - x) / \sigma\bigr) - \Phi\bigl((e_0 - x) / \sigma\bigr)}

    with :math:`\Phi` the cumulative distribution of the standard Gaussian. No digits
    cancel, in bins much narrower than :math:`\sigma` and in the tails neither; a target
    so far out of the support that the denominator is too small to represent has its
    histogram too. Code in use takes the differences as they stand, and gives `0 / 0`
    there, or clips targets to the support, which moves them.

    Args:
        targets: numbers :math:`x`, `f[...]`. One outside the edges is used as it is;
            at infinity all is in the outermost bin. NaN gives NaN.
        edges: where bins begin and end, :math:`e_0..e_K`, `f[K+1]`, in the units of
            `targets`, evenly spaced or not, in increasing order, else the result is
            NaN.
        sigma: standard deviation :math:`\sigma`, `f[]|f[...]`, in the units of
            `targets`, not negative; 0.75 of the width of a bin is common. At 0 the
            target's own bin has it all, or on an edge both bins a half. At infinity
            each bin has its share of the support.

    Returns:
        Probabilities of the bins, `f[...,K]`, dimensionless; they sum to 1.

    Raises:
        ValueError: if a shape breaks its contract, there are fewer than 2 edges, or
            `sigma` is a Python number below 0.
        TypeError: if an argument is not floating-point.

    Example:
        >>> edges = jnp.array([0.0, 1.0, 2.0, 3.0])
        >>> hl_gauss_encode(jnp.array([1.5, 9.0]), edges, sigma=0.01).tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    References:
        Imani and White, `Improving Regression Performance with Distributional Losses
        <https://arxiv.org/abs/1806.04613>`_, 2018.
        Farebrother et al., `Stop Regressing: Training Value Functions via
        Classification for Scalable Deep RL <https://arxiv.org/abs/2403.03950>`_, 2024.
    """
    _refuse_no_bins("hl_gauss_encode", edges)
    probs = _histogram(targets, jnp.broadcast_to(sigma, targets.shape), edges)
    return jnp.where(is_increasing(edges), probs, jnp.nan)


@checked
def hl_gauss_decode(
    probs: Annotated[Arg, "f[...,K]"], edges: Annotated[Arg, "f[K+1]"]
) -> Annotated[Array, "f[...]"]:
    r"""Computes the means of histograms, as if each bin were its centre.

    .. math::
        x = \sum_k p_k \, \frac{e_k + e_{k+1}}2

    Args:
        probs: probabilities of the bins :math:`p_k`, `f[...,K]`, dimensionless, such as
            a softmax of logits; not normalised here. A distribution that is symmetric
            about 0 decodes to exactly 0.
        edges: where bins begin and end, :math:`e_0..e_K`, `f[K+1]`.

    Returns:
        The means, `f[...]`, in the units of `edges`: never beyond the centres of the
        outermost bins.

    Raises:
        ValueError: if a shape breaks its contract or there are fewer than 2 edges.
        TypeError: if an argument is not floating-point.

    Example:
        >>> edges = jnp.array([0.0, 1.0, 2.0, 3.0])
        >>> hl_gauss_decode(jnp.array([0.0, 0.5, 0.5]), edges).item()
        2.0

    References:
        Farebrother et al., `Stop Regressing: Training Value Functions via
        Classification for Scalable Deep RL <https://arxiv.org/abs/2403.03950>`_, 2024.
    """
    _refuse_no_bins("hl_gauss_decode", edges)
    return mean_of_bins(probs, edges[:-1] / 2 + edges[1:] / 2)


@checked
def hl_gauss_loss(
    logits: Annotated[Arg, "f[...,K]"],
    targets: Annotated[Arg, "f[...]"],
    edges: Annotated[Arg, "f[K+1]"],
    *,
    sigma: Annotated[Arg, "f[]|f[...]", "[0, inf]"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the cross-entropy of predicted bins from a Gaussian's histogram.

    .. math::
        L = -\sum_k p_k(x) \log q_k, \qquad q = \text{softmax}(\text{logits})

    with :math:`p(x)` from `hl_gauss_encode`.

    Args:
        logits: predicted logits of the bins, `f[...,K]`.
        targets: numbers :math:`x` to predict, `f[...]`.
        edges: where bins begin and end, `f[K+1]`, in the units of `targets`, in
            increasing order, else the loss is NaN.
        sigma: standard deviation of the Gaussian, `f[]|f[...]`, in the units of
            `targets`, not negative; 0.75 of the width of a bin is common.
        mask_t: whether each target counts, `b[...]`: the others, padding say, are as
            if left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the histograms constant, `b[]`.
        reduction: `"mean"` or `"sum"` over what counts, or `"none"`.

    Returns:
        The loss, `f[]`, or of each target, `f[]|f[...]`, in nats: a cross-entropy, so
        that it does not vanish where prediction and target agree.

    Raises:
        ValueError: if a shape breaks its contract, there are fewer than 2 edges, or
            `sigma` is a Python number below 0.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> logits, edges = jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> round(hl_gauss_loss(logits, 0.5, edges, sigma=0.1).item(), 4)  # log 2
        0.6931

    References:
        Imani and White, `Improving Regression Performance with Distributional Losses
        <https://arxiv.org/abs/1806.04613>`_, 2018.
        Farebrother et al., `Stop Regressing: Training Value Functions via
        Classification for Scalable Deep RL <https://arxiv.org/abs/2403.03950>`_, 2024.
    """
    _refuse_no_bins("hl_gauss_loss", edges)
    logits, targets = keep_where(mask_t, logits, targets)
    probs = hl_gauss_encode(targets, edges, sigma=sigma)
    probs = stop_gradient_if(stop_target_gradients, probs)
    return reduced(categorical_cross_entropy(probs, logits), mask_t, reduction)


@checked
def two_hot_loss(
    logits: Annotated[Arg, "f[...,K]"],
    targets: Annotated[Arg, "f[...]"],
    bins: Annotated[Arg, "f[K]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the cross-entropy of predicted bins from two-hot codes.

    .. math::
        L = -\sum_k p_k(x) \log q_k, \qquad q = \text{softmax}(\text{logits})

    with :math:`p(x)` from `transform_to_2hot_nonlinear`, and decoded by
    `transform_from_2hot_nonlinear`. Bins may be even, as those of
    `jnp.linspace(-1.0, 1.0, 51)`, or not.

    Args:
        logits: predicted logits of the bins, `f[...,K]`.
        targets: numbers :math:`x` to predict, `f[...]`. One outside the bins is taken
            for the nearer end.
        bins: at least 2 numbers in increasing order, `f[K]`, in the units of
            `targets`; in any other order the loss is NaN.
        mask_t: whether each target counts, `b[...]`: the others, padding say, are as
            if left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the codes constant, `b[]`.
        reduction: `"mean"` or `"sum"` over what counts, or `"none"`.

    Returns:
        The loss, `f[]`, or of each target, `f[]|f[...]`, in nats: a cross-entropy, so
        that it does not vanish where prediction and target agree.

    Raises:
        ValueError: if a shape breaks its contract or there are fewer than 2 bins.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> logits, bins = jnp.array([0.0, 0.0]), jnp.array([-1.0, 4.0])
        >>> round(two_hot_loss(logits, 1.0, bins).item(), 4)  # log 2
        0.6931

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    if len(bins) < 2:
        raise ValueError(f"two_hot_loss: bins must be at least 2, got {len(bins)}.")
    logits, targets = keep_where(mask_t, logits, targets)
    codes = transform_to_2hot_nonlinear(targets, bins)
    codes = stop_gradient_if(stop_target_gradients, codes)
    return reduced(categorical_cross_entropy(codes, logits), mask_t, reduction)


def _refuse_no_bins(name: str, edges: Array) -> None:
    if len(edges) < 2:
        raise ValueError(f"{name}: edges must be at least 2, got {len(edges)}.")


# Masses of a Gaussian. Lengths are in units of sigma, and `u` is that from the point of
# the support nearest to the mean, which lies `beyond` it: 0 if within the support. The
# density there, and a constant, divided out, it is
#     exp(-u^2 / 2 - |u| * beyond),
# which is 1 at `u = 0` and falls from there on, however far away the mean is.

_FAR = 40.0  # where the density is too small to represent, even in double precision
_FARTHEST = 1e9  # no mean is farther beyond, and no sigma more times the support
# For as many digits as a number of so many bytes has: points of a quadrature, and terms
# of a continued fraction.
_POINTS, _TERMS = {4: 4, 8: 8}, {4: 6, 8: 20}


@functools.partial(jnp.vectorize, excluded={2}, signature="(),()->(k)")
def _histogram(x: Array, sigma: Array, edges: Array) -> Array:
    """Returns the histogram of a Gaussian."""
    # Unlike `jnp.clip`, this has the derivative of its argument at the ends too.
    nearest = jnp.where(x < edges[0], edges[0], jnp.where(x > edges[-1], edges[-1], x))
    sigma = jnp.where(sigma * sigma < jnp.finfo(sigma.dtype).tiny, 0, sigma)
    sigma = jnp.minimum(sigma, _FARTHEST * (edges[-1] - edges[0]))
    u = _in_units(edges - nearest, sigma, _FAR)
    beyond = jnp.abs(_in_units(x - nearest, sigma, _FARTHEST))
    width = _in_units(jnp.diff(edges), sigma, 2 * _FAR)
    masses = _masses(u[:-1], u[1:], width, beyond)
    return masses / jnp.sum(masses)


def _in_units(length: Array, sigma: Array, most: float) -> Array:
    """Returns `length / sigma`, or `most` where it is longer, with no gradient."""
    longer = jnp.abs(length) > most * sigma
    ratio = jnp.where(longer, 0, length) / jnp.where(sigma == 0, 1, sigma)
    return jnp.where(longer, jnp.copysign(most, length), ratio)


def _masses(low: Array, high: Array, width: Array, beyond: Array) -> Array:
    """Returns the integral of the density from `low` to `high`.

    It is the difference of tails, or of both tails from the whole, unless these are
    nearly the same: over so short a way a quadrature is exact to the last digit.
    """
    right, around = low >= 0, (low < 0) & (high > 0)
    near, far = jnp.where(right, low, -high), jnp.where(right, high, -low)
    steepness = jnp.where(around, 0, near) + beyond + width / 2
    tails = _tail(jnp.stack([jnp.where(around, -near, near), far]), beyond)
    to_far = jnp.where(around, math.sqrt(2 * math.pi) - tails[0], tails[0])
    wide = to_far - tails[1]
    return jnp.where(width * steepness < 0.5, _quadrature(low, width, beyond), wide)


def _quadrature(low: Array, width: Array, beyond: Array) -> Array:
    rule = np.polynomial.legendre.leggauss(_POINTS[low.dtype.itemsize])
    nodes, weights = jnp.asarray(rule, low.dtype)[..., None] / 2
    u = jnp.abs(low[None] + width[None] * (nodes + 0.5))
    return width * jnp.sum(jnp.exp(-u * (u / 2 + beyond)) * weights, axis=0)


def _tail(u: Array, beyond: Array) -> Array:
    """Returns the integral of the density from `u`, which is not negative, on."""
    return jnp.exp(-u * (u / 2 + beyond)) * _mills_ratio(u + beyond)


def _mills_ratio(x: Array) -> Array:
    """Returns a Gaussian's tail from `x`, which is not negative, over its density."""
    small, large = jnp.minimum(x, 6), jnp.maximum(x, 6)
    ratio = jnp.exp(small * small / 2) * jax.lax.erfc(small / math.sqrt(2))
    fraction = large  # Laplace's, continued
    for k in range(_TERMS[x.dtype.itemsize], 0, -1):
        fraction = large + k / fraction
    return jnp.where(x < 6, ratio * math.sqrt(math.pi / 2), 1 / fraction)

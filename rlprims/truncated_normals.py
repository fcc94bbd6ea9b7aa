r"""Policies over continuous actions within bounds, of truncated normal distributions.

Of a normal distribution only what lies within the bounds of the environment is kept,
and nothing piles up there, as where draws are clipped. The mean before truncation `mu`
may lie outside: the closer to it the likelier is an action, so that the likeliest of
all is `mu`, or the bound next to it. The further outside, the more it is like an
exponential distribution, and where `sigma` is large, like a uniform one.

Components of an action lie along the last axis, after any leading axes, and are
independent; probabilities are those of whole actions. Everything is computed from
integrals of the density relative to its greatest value, so that none of it rounds to
zero however far outside `mu` is. Bounds that leave no room between them give NaN.
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.beta_policies import BoundedSample
from rlprims.gaussians import each

__all__ = [
    "truncated_normal_entropy",
    "truncated_normal_log_prob",
    "truncated_normal_sample_and_log_prob",
]

Components = Annotated[Arg, "f[...,A]"]
Scale = Annotated[Arg, "f[]|f[A]|f[...,A]", "(0, inf)"]
Bound = Annotated[Arg, "f[]|f[A]"]
Measure = Annotated[Array, "f[...]"]


@checked
def truncated_normal_entropy(
    mu: Components, sigma: Scale, *, minimum: Bound = -1.0, maximum: Bound = 1.0
) -> Measure:
    r"""Computes the entropy of a truncated normal policy.

    .. math::
        H = \sum_{i=1}^A \log \sigma_i Z_i \sqrt{2 \pi}
            + \frac{\mathbb{E}[(a_i - \mu_i)^2]}{2 \sigma_i^2}

    where :math:`Z` is the part of the normal distribution within the bounds. It is
    computed relative to the likeliest action, and stays right wherever `mu` is.

    Args:
        mu: mean before truncation, `f[...,A]`, in the units of the environment.
        sigma: standard deviation before it, `f[]|f[A]|f[...,A]`, in the same units,
            positive.
        minimum: least action, `f[]|f[A]`, in the same units.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        The entropy, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or `sigma` is a Python number
            outside `(0, inf)`.
        TypeError: if an argument is not floating-point.

    Example:
        >>> mu = jnp.array([100.0])  # next to the maximum, like an exponential
        >>> round(truncated_normal_entropy(mu, 1.0).item(), 2)  # 1 - log 99
        -3.6
    """
    scale, sides = _sides(mu, sigma, minimum, maximum)
    mass = sum(_integral(*side) for side in sides)
    cost = sum(_integral(*side, weight=lambda x: x) for side in sides)
    return jnp.sum(jnp.log(scale) + jnp.log(mass) + cost / mass, axis=-1)


@checked
def truncated_normal_log_prob(
    action: Components,
    mu: Components,
    sigma: Scale,
    *,
    minimum: Bound = -1.0,
    maximum: Bound = 1.0,
) -> Measure:
    r"""Computes the log-probability of actions under a truncated normal policy.

    .. math::
        \log \pi(a) &= \sum_{i=1}^A -\frac{(a_i - \mu_i)^2}{2 \sigma_i^2}
            - \log \sigma_i Z_i \sqrt{2 \pi} \\
        Z &= \Phi \Bigl( \frac{\text{maximum} - \mu}{\sigma} \Bigr)
            - \Phi \Bigl( \frac{\text{minimum} - \mu}{\sigma} \Bigr)

    With `mu` far outside, both terms of the first line are huge and :math:`Z` rounds to
    0. It is computed relative to the likeliest action instead, with an integral in the
    place of :math:`Z`, and keeps its digits and its gradients wherever `mu` is.

    Args:
        action: actions in the units of the environment, `f[...,A]`, within the bounds;
            beyond them the result is NaN.
        mu: mean before truncation, `f[...,A]`, in the same units.
        sigma: standard deviation before it, `f[]|f[A]|f[...,A]`, in the same units,
            positive.
        minimum: least action, `f[]|f[A]`, in the same units.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        The logarithms of the probability densities, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or `sigma` is a Python number
            outside `(0, inf)`.
        TypeError: if an argument is not floating-point.

    Example:
        >>> action, mu = jnp.array([1.0]), jnp.array([1001.0])
        >>> round(truncated_normal_log_prob(action, mu, 1.0).item(), 4)  # log 1000
        6.9078
    """
    low, high = each(minimum, action), each(maximum, action)
    scale, sides = _sides(mu, sigma, minimum, maximum)
    near = jnp.clip(mu, low, high)
    z, beyond = (action - near) / scale, (near - mu) / scale
    z = jnp.where((low <= action) & (action <= high), z, jnp.nan)
    log_mass = jnp.log(sum(_integral(*side) for side in sides))
    return -jnp.sum(z * (z / 2 + beyond) + log_mass + jnp.log(scale), axis=-1)


@checked
def truncated_normal_sample_and_log_prob(
    key: Annotated[Arg, "k[]"],
    mu: Components,
    sigma: Scale,
    *,
    minimum: Bound = -1.0,
    maximum: Bound = 1.0,
) -> BoundedSample:
    r"""Draws actions from a truncated normal policy, with their log-probabilities.

    .. math::
        a = F^{-1}(u), \qquad u \sim \operatorname{Uniform}(0, 1), \qquad
        F(a) = \frac1Z \int_{\text{minimum}}^a
            \mathcal{N}(x; \mu, \sigma^2) \, \mathrm{d} x

    The equation is solved in numbers, wherever `mu` is, where the inverse of the normal
    distribution function would round to a bound. Gradients flow through the draw to
    `mu` and `sigma`. The log-probability is that of `truncated_normal_log_prob`,
    computed from the draw before it is rounded.

    Args:
        key: a random key, `k[]`; one is enough for any number of actions.
        mu: mean before truncation, `f[...,A]`, in the units of the environment.
        sigma: standard deviation before it, `f[]|f[A]|f[...,A]`, in the same units,
            positive.
        minimum: least action, `f[]|f[A]`, in the same units.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        A `BoundedSample` of actions, `f[...,A]`, in the units of the bounds, and their
        log-probabilities, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or `sigma` is a Python number
            outside `(0, inf)`.
        TypeError: if `key` is not a random key, or another argument is not
            floating-point.

    Example:
        >>> key, mu = jax.random.key(0), jnp.array([0.5, -3.0])
        >>> action, log_prob = truncated_normal_sample_and_log_prob(key, mu, 1.0)
        >>> bool(jnp.allclose(log_prob, truncated_normal_log_prob(action, mu, 1.0)))
        True
    """
    low, high = each(minimum, mu), each(maximum, mu)
    scale, (below, above) = _sides(mu, sigma, minimum, maximum)
    left, right = _integral(*below), _integral(*above)
    excess = jax.random.uniform(key, mu.shape, mu.dtype) * (left + right) - left
    side = [jnp.where(excess < 0, x, y) for x, y in zip(below, above, strict=True)]
    z = _where_integral_is(jnp.abs(excess), *side)
    action = jnp.clip(mu, low, high) + jnp.where(excess < 0, -z, z) * scale
    log_density = -z * (side[0] + z / 2) - jnp.log(left + right) - jnp.log(scale)
    return BoundedSample(jnp.clip(action, low, high), jnp.sum(log_density, axis=-1))


# Integrals of a normal density from its greatest value within bounds, where it is one

_REACH = 80.0  # twice the logarithm of what is too small to count


def _sides(
    mu: Array, sigma: Array, minimum: Array, maximum: Array
) -> tuple[Array, tuple[tuple[Array, Array], tuple[Array, Array]]]:
    """Returns the scale, and to either side the slope there and the bound's distance.

    The slope is minus that of the log-density. Distances are in standard deviations.
    """
    scale, low, high = each(sigma, mu), each(minimum, mu), each(maximum, mu)
    scale = jnp.where(low < high, scale, jnp.nan)
    near = jnp.clip(mu, low, high)
    distances = (
        near - low,
        high - near,
        jnp.maximum(mu - high, 0),
        jnp.maximum(low - mu, 0),
    )
    to_low, to_high, below, above = (_in_units(x, scale) for x in distances)
    return scale, ((below, to_low), (above, to_high))


def _in_units(distance: Array, scale: Array) -> Array:
    """Divides, with no gradient where a bound is infinitely far."""
    finite = jnp.isfinite(distance)
    return jnp.where(finite, jnp.where(finite, distance, 0) / scale, distance)


def _integral(
    slope: Array, length: Array, weight: Callable[[Array], Array] = jnp.ones_like
) -> Array:
    """Integrates `exp(-x)` times the weight of `x = slope * z + z**2 / 2` over `z`."""
    reach = jnp.minimum(length, _reach(slope))

    def term(node: Array, part: Array) -> Array:
        z = reach * node
        x = z * (slope + z / 2)
        return part * weight(x) * jnp.exp(-x)

    nodes, parts = (jnp.asarray(x, slope.dtype) for x in _rule())
    return reach / 2 * jnp.sum(jax.vmap(term)((1 + nodes) / 2, parts), axis=0)


@functools.cache
def _rule() -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes in `[-1, 1]` and their weights: those of Gauss and Legendre."""
    return np.polynomial.legendre.leggauss(32)


def _reach(slope: Array) -> Array:
    """Returns where the rest of the integral is too small to count."""
    slope = jax.lax.stop_gradient(slope)
    return _REACH / (slope + jnp.hypot(slope, math.sqrt(_REACH)))


def _where_integral_is(goal: Array, slope: Array, length: Array) -> Array:
    """Returns the length for which `_integral` is the goal: bisects, then refines.

    Newton's steps from a constant have the right derivatives too.
    """
    reach = jax.lax.stop_gradient(jnp.minimum(length, _reach(slope)))

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        beyond = _integral(slope, middle) < goal
        return jnp.where(beyond, middle, ends[0]), jnp.where(beyond, ends[1], middle)

    def refine(_: int, z: Array) -> Array:
        step = (goal - _integral(slope, z)) * jnp.exp(z * (slope + z / 2))
        return jnp.clip(z + step, low, high)

    low, high = jax.lax.fori_loop(0, 8, halve, (0 * reach, reach))
    return jax.lax.fori_loop(0, 4, refine, (low + high) / 2)

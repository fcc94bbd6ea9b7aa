r"""Policies over continuous actions within bounds, of Beta distributions.

The Beta distribution of a component, stretched to the bounds of the environment, has
two concentrations: with both above 1 it has one peak inside, with both at 1 it is
uniform, and below 1 it favours the bounds. Networks put out `1 + softplus(x)`, say. Its
mean divides the interval as the concentrations divide their sum:

    >>> from rlprims import rescale_action
    >>> alpha, beta = jnp.array([3.0]), jnp.array([1.0])
    >>> rescale_action((alpha - beta) / (alpha + beta), 0.0, 10.0).tolist()
    [7.5]

Components of an action lie along the last axis, after any leading axes, and are
independent; probabilities are those of whole actions. Nothing is squashed, so that an
action tells its own probability. A draw close to a bound may round to it: the
log-probability of an action at a bound is that of the nearest number inside, so that it
is finite. Beyond the bounds it is NaN, and so is all of bounds that leave no room.
"""

import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.gaussians import each, half_width
from rlprims.kl_estimators import k3

__all__ = [
    "BoundedSample",
    "beta_entropy",
    "beta_kl_divergence",
    "beta_log_prob",
    "beta_sample_and_log_prob",
]

Components = Annotated[Arg, "f[...,A]"]
Concentration = Annotated[Arg, "f[...,A]", "(0, inf)"]
Bound = Annotated[Arg, "f[]|f[A]"]
Measure = Annotated[Array, "f[...]"]


class BoundedSample(NamedTuple):
    """Actions that were drawn, and how likely they are.

    Attributes:
        action: the actions, `f[...,A]`, within their bounds.
        log_prob: logarithms of their probability densities, `f[...]`, in nats.

    Example:
        >>> key, ones = jax.random.key(0), jnp.ones((5, 2))
        >>> beta_sample_and_log_prob(key, ones, ones).action.shape
        (5, 2)
    """

    action: Annotated[Array, "f[...,A]"]
    log_prob: Annotated[Array, "f[...]"]


@checked
def beta_entropy(
    alpha: Concentration,
    beta: Concentration,
    *,
    minimum: Bound = -1.0,
    maximum: Bound = 1.0,
) -> Measure:
    r"""Computes the entropy of a Beta policy.

    .. math::
        H = \sum_{i=1}^A \log w_i B(\alpha_i, \beta_i)
            - (\alpha_i - 1) \psi(\alpha_i) - (\beta_i - 1) \psi(\beta_i)
            + (\alpha_i + \beta_i - 2) \psi(\alpha_i + \beta_i)

    where :math:`w = \text{maximum} - \text{minimum}`. These terms cancel all but
    completely where concentrations are large; it is computed from what is left. It is
    greatest, :math:`\log w`, for the uniform distribution.

    Args:
        alpha: concentration :math:`\alpha` towards the maximum, `f[...,A]`,
            dimensionless, positive.
        beta: concentration :math:`\beta` towards the minimum, `f[...,A]`,
            dimensionless, positive.
        minimum: least action, `f[]|f[A]`, in the units of the environment.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        The entropy, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or a concentration is a Python
            number that is not positive.
        TypeError: if an argument is not floating-point.

    Example:
        >>> ones = jnp.ones(1)
        >>> round(beta_entropy(ones, ones, minimum=0.0, maximum=2.0).item(), 4)
        0.6931
    """
    of_parts = (alpha - 1) * _slope(alpha) + (beta - 1) * _slope(beta)
    of_total = (alpha + beta - 2) * _slope(alpha + beta)
    width = 2 * half_width(each(minimum, alpha), each(maximum, alpha))
    log_scale = jnp.log(width) + sum(_log_means(alpha, beta)) - _log_peak(alpha, beta)
    return jnp.sum(log_scale - of_parts + of_total, axis=-1)


@checked
def beta_kl_divergence(
    alpha_0: Concentration,
    beta_0: Concentration,
    alpha_1: Concentration,
    beta_1: Concentration,
) -> Measure:
    r"""Computes the Kullback-Leibler divergence of one Beta policy from another.

    .. math::
        \sum_{i=1}^A D(\alpha_{0,i}, \alpha_{1,i}) + D(\beta_{0,i}, \beta_{1,i})
            - D(\alpha_{0,i} + \beta_{0,i}, \alpha_{1,i} + \beta_{1,i}),
        \qquad D(x, y) = \log \frac{\Gamma(y)}{\Gamma(x)} - (y - x) \, \psi(x)

    It is the same whatever bounds both share. It is computed so that a divergence
    between near neighbours, such as one policy and the next, does not drown in
    rounding.

    Args:
        alpha_0: concentration towards the maximum, of the distribution to average
            over, `f[...,A]`, dimensionless, positive.
        beta_0: its concentration towards the minimum, `f[...,A]`, likewise.
        alpha_1: concentration towards the maximum, of the other distribution,
            `f[...,A]`, likewise.
        beta_1: its concentration towards the minimum, `f[...,A]`, likewise.

    Returns:
        The divergence, `f[...]`, in nats, at least 0 but for rounding.

    Raises:
        ValueError: if a shape breaks its contract, or a concentration is a Python
            number that is not positive.
        TypeError: if an argument is not floating-point.

    Example:
        >>> one, two = jnp.array([1.0]), jnp.array([2.0])
        >>> round(beta_kl_divergence(one, one, two, one).item(), 4)  # 1 - log 2
        0.3069
    """
    of_totals = _gamma_divergence(alpha_0 + beta_0, alpha_1 + beta_1)
    of_parts = _gamma_divergence(alpha_0, alpha_1) + _gamma_divergence(beta_0, beta_1)
    return jnp.sum(of_parts - of_totals, axis=-1)


@checked
def beta_log_prob(
    action: Components,
    alpha: Concentration,
    beta: Concentration,
    *,
    minimum: Bound = -1.0,
    maximum: Bound = 1.0,
) -> Measure:
    r"""Computes the log-probability of actions under a Beta policy.

    .. math::
        \log \pi(a) = \sum_{i=1}^A (\alpha_i - 1) \log x_i
            + (\beta_i - 1) \log (1 - x_i) - \log w_i B(\alpha_i, \beta_i),
        \qquad x = \frac{a - \text{minimum}}{w}

    where :math:`w = \text{maximum} - \text{minimum}`. It is computed from how far the
    action is from the mean, so that large concentrations cost no digits. At a bound it
    is that of the nearest number inside, with no gradient to the action.

    Args:
        action: actions in the units of the environment, `f[...,A]`, within the bounds.
        alpha: concentration :math:`\alpha` towards the maximum, `f[...,A]`,
            dimensionless, positive.
        beta: concentration :math:`\beta` towards the minimum, `f[...,A]`,
            dimensionless, positive.
        minimum: least action, `f[]|f[A]`, in the same units.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        The logarithms of the probability densities, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or a concentration is a Python
            number that is not positive.
        TypeError: if an argument is not floating-point.

    Example:
        >>> action, alpha, beta = jnp.array([0.0]), jnp.array([2.0]), jnp.array([2.0])
        >>> round(beta_log_prob(action, alpha, beta).item(), 4)  # log 3 / 4
        -0.2877
    """
    low, high = each(minimum, action), each(maximum, action)
    logs = _log_shares(action, low, high)
    return _beta_log_density(*logs, alpha, beta, half_width(low, high))


@checked
def beta_sample_and_log_prob(
    key: Annotated[Arg, "k[]"],
    alpha: Concentration,
    beta: Concentration,
    *,
    minimum: Bound = -1.0,
    maximum: Bound = 1.0,
) -> BoundedSample:
    r"""Draws actions from a Beta policy, together with their log-probabilities.

    .. math::
        a = \text{minimum} + (\text{maximum} - \text{minimum}) \frac{g}{g + h},
        \qquad g \sim \operatorname{Gamma}(\alpha), \quad
        h \sim \operatorname{Gamma}(\beta)

    The log-probability is that of `beta_log_prob`, computed from the draw before it is
    rounded, so that it is right even of an action that rounds to a bound. Gradients
    flow through the draw to both concentrations: those of :math:`g` and :math:`h` at
    quantiles that stay what they are. In single precision they are too small where a
    concentration is below about 0.1, as JAX's derivative of such draws is.

    Args:
        key: a random key, `k[]`; one is enough for any number of actions.
        alpha: concentration :math:`\alpha` towards the maximum, `f[...,A]`,
            dimensionless, positive.
        beta: concentration :math:`\beta` towards the minimum, `f[...,A]`,
            dimensionless, positive.
        minimum: least action, `f[]|f[A]`, in the units of the environment.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        A `BoundedSample` of actions, `f[...,A]`, in the units of the bounds, and their
        log-probabilities, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or a concentration is a Python
            number that is not positive.
        TypeError: if `key` is not a random key, or another argument is not
            floating-point.

    Example:
        >>> key, alpha, beta = jax.random.key(0), jnp.full(2, 3.0), jnp.full(2, 1.5)
        >>> action, log_prob = beta_sample_and_log_prob(key, alpha, beta)
        >>> bool(jnp.allclose(log_prob, beta_log_prob(action, alpha, beta)))
        True
    """
    low, high = each(minimum, alpha), each(maximum, alpha)
    logs = jax.random.loggamma(key, jnp.stack([alpha, beta]), dtype=alpha.dtype)
    log_x, log_y = jax.nn.log_softmax(logs, axis=0)
    action = jnp.clip(jnp.exp(log_x) * high + jnp.exp(log_y) * low, low, high)
    half = half_width(low, high)
    log_prob = _beta_log_density(log_x, log_y, alpha, beta, half)
    return BoundedSample(jnp.where(low < high, action, jnp.nan), log_prob)


# What is left of gamma functions where large terms cancel

_LOG_TAU = math.log(2 * math.pi)


def _stirling_error(x: Array) -> Array:
    """Returns the logarithm of the gamma function less Stirling's formula."""
    large = x > 10
    inverse = 1 / jnp.where(large, x, x + 10)
    series = jnp.zeros_like(x)
    for c in (1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12):
        series = series * inverse**2 + c
    below = jnp.where(large, 1, x)
    steps = jax.vmap(lambda k: (below + k + 0.5) * jnp.log1p(1 / (below + k)) - 1)
    rest = jnp.sum(steps(jnp.arange(10, dtype=x.dtype)), axis=0)
    return series * inverse + jnp.where(large, 0, rest)


def _slope(x: Array) -> Array:
    """Returns the digamma function less the logarithm."""
    return jax.jvp(_stirling_error, (x,), (jnp.ones_like(x),))[1] - 1 / (2 * x)


def _gamma_divergence(x: Array, y: Array) -> Array:
    """Returns what `log_gamma(y)` is above its tangent at `x`."""
    log_ratio = jnp.log(y / x)
    slope = _slope(x) + 1 / (2 * x)
    rest = _stirling_error(y) - _stirling_error(x) - (y - x) * slope
    return y * k3(-log_ratio) + k3(log_ratio) / 2 + rest


def _log_means(alpha: Array, beta: Array) -> tuple[Array, Array]:
    """Returns logarithms of the mean shares on either side."""
    return -jnp.log1p(beta / alpha), -jnp.log1p(alpha / beta)


def _log_peak(alpha: Array, beta: Array) -> Array:
    """Returns the logarithm of `x (1 - x)` times the density, at the mean `x`."""
    total = alpha + beta
    logs = jnp.log(alpha) + jnp.log(beta) - jnp.log(total) - _LOG_TAU
    errors = _stirling_error(alpha) + _stirling_error(beta) - _stirling_error(total)
    return logs / 2 - errors


def _beta_log_density(
    log_x: Array, log_y: Array, alpha: Array, beta: Array, half: Array
) -> Array:
    """Returns log-probabilities, from logarithms of the shares on either side."""
    log_mean_x, log_mean_y = _log_means(alpha, beta)
    off = alpha * k3(log_x - log_mean_x) + beta * k3(log_y - log_mean_y)
    log_volume = log_x + log_y + jnp.log(2 * half)
    return jnp.sum(_log_peak(alpha, beta) - off - log_volume, axis=-1)


def _log_shares(action: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Returns logarithms of how far an action is from either bound, to their distance.

    Of an action at a bound, those of the nearest number inside; beyond it, NaN.
    """
    width = 2 * half_width(low, high)
    x = jnp.where(action == low, _nearest(low, high), action - low) / width
    y = jnp.where(action == high, _nearest(high, low), high - action) / width
    log_x = jnp.where(x < y, jnp.log(x), jnp.log1p(-jnp.minimum(y, 0.5)))
    log_y = jnp.where(y < x, jnp.log(y), jnp.log1p(-jnp.minimum(x, 0.5)))
    return log_x, log_y


def _nearest(bound: Array, other: Array) -> Array:
    """Returns how far the nearest number from a bound is, on the side of the other."""
    bound, other = jax.lax.stop_gradient((bound, other))
    step = jnp.abs(jnp.nextafter(bound, other) - bound)
    return jnp.maximum(step, jnp.finfo(bound.dtype).tiny)

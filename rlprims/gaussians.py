"""Policies over continuous actions, as objects to sample from and measure.

A Gaussian policy has a mean `mu` and a standard deviation `sigma` for each of the `N`
components of an action, which are independent. `gaussian_diagonal` takes them as they
are. `squashed_gaussian` takes what a network puts out, any numbers, brings both into a
range, and squashes what is drawn into the bounds of the environment. Each is a
`ContinuousDistribution`, whose functions take components along the last axis, after
any leading axes; probabilities are those of the whole action. A `sigma` without the
leading axes, `f[N]` or `f[]`, is shared by all actions, as one that is a parameter and
not a prediction.

A standard deviation out of range is refused if it is a Python number; the value of an
array is unknown while tracing, so there the result is NaN.
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, bounded, checked, checked_as

__all__ = [
    "ContinuousDistribution",
    "gaussian_diagonal",
    "multivariate_normal_kl_divergence",
    "squashed_gaussian",
]

Key = Annotated[Arg, "k[]"]
Components = Annotated[Arg, "f[...,N]"]
Scale = Annotated[Arg, "f[]|f[N]|f[...,N]", "(0, inf)"]
ScaleOrZero = Annotated[Arg, "f[]|f[N]|f[...,N]", "[0, inf)"]
Spread = Annotated[Arg, "f[]|f[N]|f[...,N]"]  # mapped to a scale
Bound = Annotated[Arg, "f[]|f[N]"]
LogScale = Annotated[Arg, "f[]"]
Measure = Annotated[Array, "f[...]"]


class ContinuousDistribution(NamedTuple):
    """Functions of a distribution that `mu`, `f[...,N]`, and a `sigma` determine.

    That `sigma` is `f[]|f[N]|f[...,N]`.

    Attributes:
        sample: takes a random key, `k[]`, `mu` and `sigma`; draws actions, `f[...,N]`.
        prob: takes actions, `f[...,N]`, `mu` and `sigma`; returns the probability
            densities of these actions, `f[...]`.
        logprob: takes the same; returns the logarithms of the densities, `f[...]`, in
            nats.
        entropy: takes `mu` and `sigma`; returns the entropy, `f[...]`, in nats.
        kl_to_standard_normal: takes `mu` and `sigma`; returns the Kullback-Leibler
            divergence from the distribution with mean 0 and standard deviation 1,
            `f[...]`, in nats.
        kl: takes `mu_0`, `sigma_0`, `mu_1` and `sigma_1` of two distributions; returns
            the divergence of the first from the second, `f[...]`, in nats.

    Example:
        >>> policy, mu = gaussian_diagonal(), jnp.array([0.0, 2.0])
        >>> policy.kl(mu, 1.0, jnp.zeros(2), 1.0).item()
        2.0
    """

    sample: Callable[..., Array]
    prob: Callable[..., Array]
    logprob: Callable[..., Array]
    entropy: Callable[..., Array]
    kl_to_standard_normal: Callable[..., Array]
    kl: Callable[..., Array]


@bounded
def gaussian_diagonal(sigma: ScaleOrZero | None = None) -> ContinuousDistribution:
    r"""Builds the normal distribution of independent components.

    .. math::
        \log \pi(a) = -\sum_{i=1}^N \Bigl(
            \frac{(a_i - \mu_i)^2}{2 \sigma_i^2}
            + \log \sigma_i + \tfrac12 \log 2\pi \Bigr)

    Args:
        sigma: the standard deviation, `f[]|f[N]|f[...,N]`, in the units of actions, at
            least 0; `None` if every method is to be given its own.

    Returns:
        A `ContinuousDistribution` of `mu` and `sigma`. All of its methods but `kl` use
        this `sigma` if they are given none. A `sigma` of 0 can be sampled, and nothing
        else.

    Raises:
        ValueError: if `sigma` is a Python number, and negative or infinite.

    Example:
        >>> policy, mu = gaussian_diagonal(), jnp.array([1.0, 2.0])
        >>> round(float(policy.logprob(mu, mu, 1.0)), 4)  # -log(2 * pi)
        -1.8379
        >>> gaussian_diagonal(0.0).sample(jax.random.key(0), mu).tolist()
        [1.0, 2.0]
    """
    return ContinuousDistribution(
        sample=lambda key, mu, sigma=sigma: _sample(key, mu, sigma),
        prob=lambda sample, mu, sigma=sigma: _prob(sample, mu, sigma),
        logprob=lambda sample, mu, sigma=sigma: _logprob(sample, mu, sigma),
        entropy=lambda mu, sigma=sigma: _entropy(mu, sigma),
        kl_to_standard_normal=lambda mu, sigma=sigma: _kl_to_normal(mu, sigma),
        kl=multivariate_normal_kl_divergence,
    )


def squashed_gaussian(
    sigma_min: LogScale = -4, sigma_max: LogScale = 0.0
) -> ContinuousDistribution:
    r"""Builds a normal distribution that is squashed into the bounds of actions.

    What is drawn before squashing, :math:`u`, is normal with a mean in `[-1, 1]` and a
    standard deviation whose logarithm lies in `[sigma_min, sigma_max]`:

    .. math::
        u &\sim \mathcal{N}\bigl(\tanh \mu, \, \sigma^2\bigr), \qquad
        \log \sigma = \text{sigma\_min} + \tfrac12 (\tanh s + 1)
            (\text{sigma\_max} - \text{sigma\_min}) \\
        a &= m + h \tanh u, \qquad
        m, h = \tfrac12 (\text{maximum} \pm \text{minimum}) \\
        \log \pi(a) &= \log \mathcal{N}(u) - \sum_{i=1}^N \log h_i (1 - \tanh^2 u_i)

    where :math:`s` is the `sigma` that methods take. That and `mu` may be any numbers,
    such as outputs of a network.

    A draw far out rounds to a bound, which no draw can reach. The log-probability of
    an action at a bound is that of the nearest number inside, in the precision of the
    action, so that it is finite and has a gradient. Beyond the bounds it is NaN.

    Args:
        sigma_min: the least logarithm of the standard deviation before squashing,
            `f[]`, dimensionless.
        sigma_max: the greatest, `f[]`, dimensionless.

    Returns:
        A `ContinuousDistribution` of `mu` and `sigma`, whose `sample`, `prob` and
        `logprob` take an `action_spec` as their last argument: anything with the
        attributes `minimum` and `maximum`, `f[]|f[N]`, in the units of actions, such
        as a bounded array of dm_env. Its `entropy` is that before squashing, as after
        it there is no closed form; both `kl` are the same before and after, where the
        standard normal is squashed too.

    Raises:
        ValueError: if both are Python numbers and `sigma_min` exceeds `sigma_max`.

    Example:
        >>> import types
        >>> spec = types.SimpleNamespace(minimum=0.0, maximum=10.0)
        >>> mu, sigma = jnp.zeros(1), jnp.array([-jnp.inf])
        >>> policy = squashed_gaussian(sigma_min=-50.0)
        >>> policy.sample(jax.random.key(0), mu, sigma, spec).tolist()
        [5.0]

    References:
        Haarnoja et al., `Soft Actor-Critic: Off-Policy Maximum Entropy Deep
        Reinforcement Learning with a Stochastic Actor
        <https://arxiv.org/abs/1801.01290>`_, 2018.
    """
    limits = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    if all(isinstance(x, (int, float)) for x in limits.values()) and not (
        sigma_min <= sigma_max
    ):
        raise ValueError(
            "squashed_gaussian: sigma_min must not exceed sigma_max, got "
            f"{sigma_min} and {sigma_max}."
        )

    def sample(key: Arg, mu: Arg, sigma: Arg, action_spec: Any) -> Array:
        minimum, maximum = _bounds("sample", action_spec, mu, sigma)
        return _squashed_sample(key, mu, sigma, minimum, maximum, **limits)

    def measure(name: str, actions: Arg, mu: Arg, sigma: Arg, spec: Any) -> Array:
        fn = {"prob": _squashed_prob, "logprob": _squashed_logprob}[name]
        minimum, maximum = _bounds(name, spec, actions)
        dtype = getattr(minimum, "dtype", None)
        return fn(actions, mu, sigma, minimum, maximum, **limits, rounded_to=dtype)

    return ContinuousDistribution(
        sample=sample,
        prob=lambda sample, mu, sigma, action_spec: measure(
            "prob", sample, mu, sigma, action_spec
        ),
        logprob=lambda sample, mu, sigma, action_spec: measure(
            "logprob", sample, mu, sigma, action_spec
        ),
        entropy=functools.partial(_squashed_entropy, **limits),
        kl_to_standard_normal=functools.partial(_squashed_kl_to_normal, **limits),
        kl=functools.partial(_squashed_kl, **limits),
    )


@checked
def multivariate_normal_kl_divergence(
    mu_0: Components, sigma_0: Scale, mu_1: Components, sigma_1: Scale
) -> Measure:
    r"""Computes the Kullback-Leibler divergence of one diagonal Gaussian from another.

    .. math::
        \tfrac12 \sum_{i=1}^N \Bigl( r_i^2 - 1 - \log r_i^2
            + \frac{(\mu_{0,i} - \mu_{1,i})^2}{\sigma_{1,i}^2} \Bigr),
        \qquad r_i = \frac{\sigma_{0,i}}{\sigma_{1,i}}

    It is computed so that a divergence between near neighbours, such as one policy and
    the next, does not drown in rounding.

    Args:
        mu_0: mean of the distribution to average over, `f[...,N]`.
        sigma_0: its standard deviation, not variance, `f[]|f[N]|f[...,N]`, in the
            units of `mu_0`, positive.
        mu_1: mean of the other distribution, `f[...,N]`, in the same units.
        sigma_1: its standard deviation, `f[]|f[N]|f[...,N]`, in the same units,
            positive.

    Returns:
        The divergence, `f[...]`, in nats, at least 0.

    Raises:
        ValueError: if a shape breaks its contract, or a standard deviation is a Python
            number outside `(0, inf)`.
        TypeError: if an argument is not floating-point.

    Example:
        >>> mu_0, mu_1 = jnp.array([0.0, 3.0]), jnp.array([1.0, 3.0])
        >>> multivariate_normal_kl_divergence(mu_0, 0.5, mu_1, 0.5).item()
        2.0

    References:
        Song et al., `V-MPO: On-Policy Maximum a Posteriori Policy Optimization for
        Discrete and Continuous Control <https://arxiv.org/abs/1909.12238>`_, 2019.
    """
    scale_0, scale_1 = each(sigma_0, mu_0), each(sigma_1, mu_1)
    log_ratio = jnp.log(scale_0 / scale_1)
    excess = jnp.expm1(2 * log_ratio) - 2 * log_ratio
    return jnp.sum(excess + ((mu_0 - mu_1) / scale_1) ** 2, axis=-1) / 2


# The methods of a diagonal Gaussian


@checked_as("gaussian_diagonal.sample")
def _sample(key: Key, mu: Components, sigma: ScaleOrZero) -> Components:
    return _draw(key, mu, sigma)


@checked_as("gaussian_diagonal.prob")
def _prob(sample: Components, mu: Components, sigma: Scale) -> Measure:
    return jnp.exp(log_density(sample, mu, sigma))


@checked_as("gaussian_diagonal.logprob")
def _logprob(sample: Components, mu: Components, sigma: Scale) -> Measure:
    return log_density(sample, mu, sigma)


@checked_as("gaussian_diagonal.entropy")
def _entropy(mu: Components, sigma: Scale) -> Measure:
    return jnp.sum(jnp.log(each(sigma, mu)) + (1 + _LOG_TAU) / 2, axis=-1)


@checked_as("gaussian_diagonal.kl_to_standard_normal")
def _kl_to_normal(mu: Components, sigma: Scale) -> Measure:
    return multivariate_normal_kl_divergence(mu, sigma, jnp.zeros_like(mu), 1.0)


_LOG_TAU = math.log(2 * math.pi)


def each(sigma: Array, mu: Array) -> Array:
    """Returns a scale for each component."""
    return jnp.broadcast_to(sigma, mu.shape)


def _draw(key: Array, mu: Array, sigma: Array) -> Array:
    noise = jax.random.normal(key, mu.shape, mu.dtype)
    return mu + each(sigma, mu) * noise


def log_density(x: Array, mu: Array, sigma: Array) -> Array:
    scale = each(sigma, mu)
    return log_density_of_noise((x - mu) / scale, scale)


def log_density_of_noise(noise: Array, scale: Array) -> Array:
    """Returns the log-density of what is `scale` times standard noise off its mean."""
    return jnp.sum(-(noise**2) / 2 - jnp.log(scale) - _LOG_TAU / 2, axis=-1)


# From any number into bounds, and back


def half_width(low: Array, high: Array) -> Array:
    """Returns half the distance of bounds, NaN where they leave no room."""
    return jnp.where(low < high, (high - low) / 2, jnp.nan)


def stretched(y: Array, low: Array, high: Array) -> Array:
    """Maps `[-1, 1]` to `[low, high]`, both ends exactly."""
    inside = (1 + y) / 2 * high + (1 - y) / 2 * low
    return jnp.where(low < high, inside, jnp.nan)


def squashed(u: Array, low: Array, high: Array) -> Array:
    return jnp.clip(stretched(jnp.tanh(u), low, high), low, high)


def unsquashed(sample: Array, low: Array, high: Array, rounded_to: Any) -> Array:
    """Returns what was squashed: of a bound, what gives the nearest number inside."""
    y = (sample - (high + low) / 2) / half_width(low, high)
    dtypes = {sample.dtype, jnp.dtype(rounded_to or sample.dtype)}
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    y = jnp.where(jnp.abs(y) < 1, y, jnp.sign(y) * (1 - eps / 2))
    return jnp.arctanh(jnp.where((low <= sample) & (sample <= high), y, jnp.nan))


def log_volume(u: Array, low: Array, high: Array) -> Array:
    """Returns by how much `squashed` stretches volumes at `u`, as a logarithm."""
    # log(1 - tanh(u)**2), where the difference would be zero
    log_slope = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
    return jnp.sum(log_slope + jnp.log(half_width(low, high)), axis=-1)


# The methods of a squashed Gaussian


@checked_as("squashed_gaussian.sample")
def _squashed_sample(
    key: Key,
    mu: Components,
    sigma: Spread,
    minimum: Bound,
    maximum: Bound,
    *,
    sigma_min: LogScale,
    sigma_max: LogScale,
) -> Components:
    u = _draw(key, *_normal(mu, sigma, sigma_min, sigma_max))
    return squashed(u, each(minimum, mu), each(maximum, mu))


@checked_as("squashed_gaussian.prob")
def _squashed_prob(
    sample: Components,
    mu: Components,
    sigma: Spread,
    minimum: Bound,
    maximum: Bound,
    *,
    sigma_min: LogScale,
    sigma_max: LogScale,
    rounded_to: Any = None,
) -> Measure:
    normal = _normal(mu, sigma, sigma_min, sigma_max)
    return jnp.exp(_squashed(sample, *normal, minimum, maximum, rounded_to))


@checked_as("squashed_gaussian.logprob")
def _squashed_logprob(
    sample: Components,
    mu: Components,
    sigma: Spread,
    minimum: Bound,
    maximum: Bound,
    *,
    sigma_min: LogScale,
    sigma_max: LogScale,
    rounded_to: Any = None,
) -> Measure:
    normal = _normal(mu, sigma, sigma_min, sigma_max)
    return _squashed(sample, *normal, minimum, maximum, rounded_to)


@checked_as("squashed_gaussian.entropy")
def _squashed_entropy(
    mu: Components, sigma: Spread, *, sigma_min: LogScale, sigma_max: LogScale
) -> Measure:
    return _entropy(*_normal(mu, sigma, sigma_min, sigma_max))


@checked_as("squashed_gaussian.kl_to_standard_normal")
def _squashed_kl_to_normal(
    mu: Components, sigma: Spread, *, sigma_min: LogScale, sigma_max: LogScale
) -> Measure:
    return _kl_to_normal(*_normal(mu, sigma, sigma_min, sigma_max))


@checked_as("squashed_gaussian.kl")
def _squashed_kl(
    mu_0: Components,
    sigma_0: Spread,
    mu_1: Components,
    sigma_1: Spread,
    *,
    sigma_min: LogScale,
    sigma_max: LogScale,
) -> Measure:
    normal = functools.partial(_normal, sigma_min=sigma_min, sigma_max=sigma_max)
    return multivariate_normal_kl_divergence(
        *normal(mu_0, sigma_0), *normal(mu_1, sigma_1)
    )


def _normal(
    mu: Array, sigma: Array, sigma_min: Array, sigma_max: Array
) -> tuple[Array, Array]:
    """Returns the mean and the standard deviation before squashing."""
    span = jnp.where(sigma_min <= sigma_max, sigma_max - sigma_min, jnp.nan)
    part = jax.nn.sigmoid(2 * each(sigma, mu))  # (tanh(sigma) + 1) / 2
    return jnp.tanh(mu), jnp.exp(sigma_min + span * part)


def _squashed(
    sample: Array,
    loc: Array,
    scale: Array,
    minimum: Array,
    maximum: Array,
    rounded_to: Any,
) -> Array:
    """Returns log-probabilities of actions that were rounded to a dtype."""
    low, high = each(minimum, loc), each(maximum, loc)
    u = unsquashed(sample, low, high, rounded_to)
    return log_density(u, loc, scale) - log_volume(u, low, high)


def _bounds(name: str, action_spec: Any, *like: Arg) -> tuple[Arg, Arg]:
    """Reads bounds, in the dtype of the actions, so as neither to widen nor to miss."""
    bounds = [getattr(action_spec, name, None) for name in ("minimum", "maximum")]
    if any(bound is None for bound in bounds):
        raise TypeError(
            f"squashed_gaussian.{name}: action_spec must have the attributes minimum "
            f"and maximum, got {type(action_spec).__name__}."
        )
    floats = [x for x in like if hasattr(x, "dtype")]
    floats = [x for x in floats if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:  # which is refused where the arguments are
        return bounds[0], bounds[1]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*floats)
    return jnp.asarray(bounds[0], dtype), jnp.asarray(bounds[1], dtype)

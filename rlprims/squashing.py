r"""Actions within bounds: normal draws, squashed by a hyperbolic tangent.

The policy of soft actor-critic draws :math:`u` from a normal distribution, whose mean
and standard deviation are what a network puts out, and acts by :math:`\tanh u`,
stretched from `[-1, 1]` to the bounds of the environment. Components of an action lie
along the last axis, after any leading axes; probabilities are those of whole actions.

A draw far out rounds to a bound, so that an action does not tell what was drawn. The
log-probability of an action is therefore computed from the draw before squashing, and
stays finite and differentiable wherever that is. Keep it, beside the action, where the
log-probability is needed again, as for a ratio of two policies; of an action that came
alone, `unsquash_action` finds it as well as rounding lets it.

`squashed_gaussian` has the same draws, for a mean and a spread that it squashes first.

Bounds that leave no room between them give NaN.
"""

from typing import Annotated, NamedTuple

import jax
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.gaussians import (
    each,
    half_width,
    log_density,
    log_density_of_noise,
    log_volume,
    squashed,
    stretched,
    unsquashed,
)

__all__ = [
    "TanhGaussianSample",
    "normalize_action",
    "rescale_action",
    "tanh_gaussian_log_prob",
    "tanh_gaussian_sample_and_log_prob",
    "unsquash_action",
]

Components = Annotated[Arg, "f[...,A]"]
Scale = Annotated[Arg, "f[]|f[A]|f[...,A]", "(0, inf)"]
Bound = Annotated[Arg, "f[]|f[A]"]


class TanhGaussianSample(NamedTuple):
    """Actions that were drawn, and how likely they are.

    Attributes:
        action: the actions, `f[...,A]`, within their bounds.
        log_prob: logarithms of their probability densities, `f[...]`, in nats.
        pre_tanh: what was drawn before squashing, `f[...,A]`, for
            `tanh_gaussian_log_prob` under another policy.

    Example:
        >>> key, mu = jax.random.key(0), jnp.full(1, 100.0)
        >>> tanh_gaussian_sample_and_log_prob(key, mu, 1.0).action.tolist()
        [1.0]
    """

    action: Annotated[Array, "f[...,A]"]
    log_prob: Annotated[Array, "f[...]"]
    pre_tanh: Annotated[Array, "f[...,A]"]


@checked
def normalize_action(
    action: Components, minimum: Bound, maximum: Bound
) -> Annotated[Array, "f[...,A]"]:
    r"""Brings actions from their bounds to `[-1, 1]`.

    .. math::
        y = \frac{2 a - \text{maximum} - \text{minimum}}
            {\text{maximum} - \text{minimum}}

    It undoes `rescale_action`. Both bounds are met exactly, and what lies beyond them
    stays beyond.

    Args:
        action: actions in the units of the environment, `f[...,A]`.
        minimum: least action, `f[]|f[A]`, in the same units.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        The actions, `f[...,A]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> normalize_action(jnp.array([0.0, 5.0, 10.0]), 0.0, 10.0).tolist()
        [-1.0, 0.0, 1.0]
    """
    low, high = each(minimum, action), each(maximum, action)
    return ((action - low) - (high - action)) / (2 * half_width(low, high))


@checked
def rescale_action(
    action: Components, minimum: Bound, maximum: Bound
) -> Annotated[Array, "f[...,A]"]:
    r"""Brings actions from `[-1, 1]` to the bounds of the environment.

    .. math::
        a = \tfrac12 (1 + y) \, \text{maximum} + \tfrac12 (1 - y) \, \text{minimum}

    Both bounds are met exactly, and what lies beyond -1 or 1 stays beyond them: nothing
    is clipped. Volumes grow, so that log-probabilities fall:

    .. math::
        \log \pi(a) = \log \pi(y)
            - \sum_{i=1}^A \log \tfrac12 (\text{maximum}_i - \text{minimum}_i)

    Args:
        action: actions :math:`y` in `[-1, 1]`, `f[...,A]`, dimensionless.
        minimum: least action, `f[]|f[A]`, in the units of the environment.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        The actions, `f[...,A]`, in the units of the bounds.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> rescale_action(jnp.array([-1.0, 0.0, 1.0]), 0.0, 10.0).tolist()
        [0.0, 5.0, 10.0]
    """
    return stretched(action, each(minimum, action), each(maximum, action))


@checked
def tanh_gaussian_log_prob(
    pre_tanh: Components,
    mu: Components,
    sigma: Scale,
    *,
    minimum: Bound = -1.0,
    maximum: Bound = 1.0,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the log-probability of actions from what they were before squashing.

    .. math::
        \log \pi(a) &= \log \mathcal{N}(u; \mu, \sigma^2)
            - \sum_{i=1}^A \bigl(\log (1 - \tanh^2 u_i) + \log h_i\bigr), \qquad
            h = \tfrac12 (\text{maximum} - \text{minimum}) \\
        \log (1 - \tanh^2 u_i) &= 2 \, (\log 2 - u_i - \operatorname{softplus}(-2 u_i))

    The second line is how the first is computed, as :math:`\tanh^2 u` rounds to 1 for
    a `u` of 10. Popular code adds a small number within the logarithm instead, which
    limits what saturation adds to the log-probability and takes away its gradient.

    Args:
        pre_tanh: what was drawn before squashing, :math:`u`, `f[...,A]`.
        mu: mean of the draws, `f[...,A]`, dimensionless.
        sigma: their standard deviation, `f[]|f[A]|f[...,A]`, dimensionless, positive.
        minimum: least action, `f[]|f[A]`, in the units of the environment.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        The logarithms of the probability densities, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or `sigma` is a Python number
            outside `(0, inf)`.
        TypeError: if an argument is not floating-point.

    Example:
        >>> u = jnp.zeros(1)
        >>> round(tanh_gaussian_log_prob(u, u, 1.0).item(), 4)  # -log(2 * pi) / 2
        -0.9189
        >>> round(tanh_gaussian_log_prob(u, u, 1.0, minimum=-2, maximum=2).item(), 4)
        -1.6121

    References:
        Haarnoja et al., `Soft Actor-Critic: Off-Policy Maximum Entropy Deep
        Reinforcement Learning with a Stochastic Actor
        <https://arxiv.org/abs/1801.01290>`_, 2018, appendix C.
    """
    low, high = each(minimum, mu), each(maximum, mu)
    return log_density(pre_tanh, mu, sigma) - log_volume(pre_tanh, low, high)


@checked
def tanh_gaussian_sample_and_log_prob(
    key: Annotated[Arg, "k[]"],
    mu: Components,
    sigma: Scale,
    *,
    minimum: Bound = -1.0,
    maximum: Bound = 1.0,
) -> TanhGaussianSample:
    r"""Draws actions within bounds, together with their log-probabilities.

    .. math::
        u = \mu + \sigma \epsilon, \qquad \epsilon \sim \mathcal{N}(0, 1), \qquad
        a = m + h \tanh u, \qquad
        m, h = \tfrac12 (\text{maximum} \pm \text{minimum})

    The log-probability is that of `tanh_gaussian_log_prob`, computed from the noise
    itself, so that :math:`(u - \mu) / \sigma` does not drown in the rounding of a large
    mean. Gradients flow through the draw to `mu` and `sigma`, as the actor loss of soft
    actor-critic needs.

    Args:
        key: a random key, `k[]`; one is enough for any number of actions.
        mu: mean before squashing, `f[...,A]`, dimensionless.
        sigma: standard deviation before squashing, `f[]|f[A]|f[...,A]`, dimensionless,
            positive.
        minimum: least action, `f[]|f[A]`, in the units of the environment.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        A `TanhGaussianSample` of actions, `f[...,A]`, in the units of the bounds, their
        log-probabilities, `f[...]`, in nats, and the draws before squashing.

    Raises:
        ValueError: if a shape breaks its contract, or `sigma` is a Python number
            outside `(0, inf)`.
        TypeError: if `key` is not a random key, or another argument is not
            floating-point.

    Example:
        >>> key, mu = jax.random.key(0), jnp.zeros(2)
        >>> action, log_prob, u = tanh_gaussian_sample_and_log_prob(key, mu, 0.5)
        >>> bool(jnp.allclose(log_prob, tanh_gaussian_log_prob(u, mu, 0.5)))
        True

    References:
        Haarnoja et al., `Soft Actor-Critic: Off-Policy Maximum Entropy Deep
        Reinforcement Learning with a Stochastic Actor
        <https://arxiv.org/abs/1801.01290>`_, 2018, appendix C.
    """
    scale, low, high = each(sigma, mu), each(minimum, mu), each(maximum, mu)
    noise = jax.random.normal(key, mu.shape, mu.dtype)
    u = mu + scale * noise
    log_prob = log_density_of_noise(noise, scale) - log_volume(u, low, high)
    return TanhGaussianSample(squashed(u, low, high), log_prob, u)


@checked
def unsquash_action(
    action: Components, minimum: Bound, maximum: Bound
) -> Annotated[Array, "f[...,A]"]:
    r"""Finds what gives an action once it is squashed into its bounds.

    .. math::
        u = \operatorname{artanh} \frac{2 a - \text{maximum} - \text{minimum}}
            {\text{maximum} - \text{minimum}}

    Of an action at a bound, which no finite :math:`u` reaches, it is what gives the
    nearest number inside, in single precision for arrays of single or half precision.
    Beyond the bounds it is NaN.

    Args:
        action: actions in the units of the environment, `f[...,A]`, within the bounds.
        minimum: least action, `f[]|f[A]`, in the same units.
        maximum: greatest action, `f[]|f[A]`, in the same units, above `minimum`.

    Returns:
        The numbers before squashing, `f[...,A]`, dimensionless, as
        `tanh_gaussian_log_prob` takes them.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> unsquash_action(jnp.array([5.0, 11.0]), 0.0, 10.0).tolist()
        [0.0, nan]
    """
    return unsquashed(action, each(minimum, action), each(maximum, action), None)

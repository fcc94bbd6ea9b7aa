"""Noise that makes an agent try what its policy alone would not.

Each function takes a random key and gives the same noise for the same key. One key is
enough for any number of actions, which get noise of their own.

`add_gaussian_noise` and `add_ornstein_uhlenbeck_noise` add to continuous actions: what
they return may lie beyond the bounds of the environment, and is for the caller to
clip. `colored_noise` is drawn for a whole episode of them, before it starts.
`add_dirichlet_noise` mixes into the probabilities of a finite number of actions, and
`add_factorized_noise` adds to the parameters of a noisy network.
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import lhs_broadcast, weighted
from rlprims.categorical import which_legal

__all__ = [
    "add_dirichlet_noise",
    "add_factorized_noise",
    "add_gaussian_noise",
    "add_ornstein_uhlenbeck_noise",
    "colored_noise",
    "ornstein_uhlenbeck_noise",
]

Key = Annotated[Arg, "k[]"]
Deviation = Annotated[Arg, "f[]|f[...]", "[0, inf)"]
Damping = Annotated[Arg, "f[]|f[...]", "[0, 1]"]


@checked
def add_gaussian_noise(
    key: Key, action: Annotated[Arg, "f[...]"], stddev: Deviation
) -> Annotated[Array, "f[...]"]:
    r"""Adds to each component of an action noise that is independent of all other.

    .. math::
        a + \sigma \epsilon, \qquad \epsilon \sim \mathcal{N}(0, 1)

    Args:
        key: a random key, `k[]`.
        action: actions, `f[...]`.
        stddev: standard deviation :math:`\sigma` of the noise, `f[]|f[...]`, in the
            units of `action`, at least 0.

    Returns:
        The noisy actions, `f[...]`.

    Raises:
        ValueError: if a shape breaks its contract, or `stddev` is a Python number, and
            negative or infinite.
        TypeError: if `action` or `stddev` is not floating-point, or `key` is not a
            random key.

    Example:
        >>> add_gaussian_noise(jax.random.key(0), jnp.array([1.0, 2.0]), 0.0).tolist()
        [1.0, 2.0]

    References:
        Fujimoto et al., `Addressing Function Approximation Error in Actor-Critic
        Methods <https://arxiv.org/abs/1802.09477>`_, 2018.
    """
    return action + gaussian_noise(key, action, stddev)


@checked
def add_ornstein_uhlenbeck_noise(
    key: Key,
    action: Annotated[Arg, "f[...]"],
    noise_tm1: Annotated[Arg, "f[...]"],
    damping: Damping,
    stddev: Deviation,
) -> Annotated[Array, "f[...]"]:
    r"""Adds to an action noise that is correlated with that of the step before.

    .. math::
        a + n_t, \qquad n_t = (1 - \text{damping}) \, n_{t-1} + \sigma \epsilon,
        \quad \epsilon \sim \mathcal{N}(0, 1)

    The noise itself, which the next step needs, is `ornstein_uhlenbeck_noise` with the
    same key. An agent can as well call that, and add.

    Args:
        key: a random key, `k[]`.
        action: actions, `f[...]`.
        noise_tm1: the noise of the step before, `f[...]`, in the units of `action`;
            zeros on the first step of an episode.
        damping: the part of the noise that each step forgets, `f[]|f[...]`,
            dimensionless, in `[0, 1]`: with 1, this is `add_gaussian_noise`.
        stddev: standard deviation :math:`\sigma` of what each step adds, `f[]|f[...]`,
            in the units of `action`, at least 0.

    Returns:
        The noisy actions, `f[...]`.

    Raises:
        ValueError: if a shape breaks its contract, or `damping` or `stddev` is a
            Python number out of range.
        TypeError: if an argument is not floating-point, or `key` is not a random key.

    Example:
        >>> key, action, noise = jax.random.key(0), jnp.ones(2), jnp.array([0.0, 2.0])
        >>> add_ornstein_uhlenbeck_noise(key, action, noise, 0.25, 0.0).tolist()
        [1.0, 2.5]

    References:
        Uhlenbeck and Ornstein, `On the Theory of the Brownian Motion
        <https://doi.org/10.1103/PhysRev.36.823>`_, 1930.
    """
    return action + _ornstein_uhlenbeck(key, noise_tm1, damping, stddev)


@checked
def ornstein_uhlenbeck_noise(
    key: Key,
    noise_tm1: Annotated[Arg, "f[...]"],
    *,
    damping: Damping,
    stddev: Deviation,
) -> Annotated[Array, "f[...]"]:
    r"""Draws noise that is correlated with that of the step before.

    .. math::
        n_t = (1 - \text{damping}) \, n_{t-1} + \sigma \epsilon,
        \qquad \epsilon \sim \mathcal{N}(0, 1)

    In the long run its variance is
    :math:`\sigma^2 / (1 - (1 - \text{damping})^2)`.

    Args:
        key: a random key, `k[]`.
        noise_tm1: the noise of the step before, `f[...]`, in the units of actions;
            zeros on the first step of an episode.
        damping: the part of the noise that each step forgets, `f[]|f[...]`,
            dimensionless, in `[0, 1]`.
        stddev: standard deviation :math:`\sigma` of what each step adds, `f[]|f[...]`,
            in the units of actions, at least 0.

    Returns:
        The noise of this step, `f[...]`, to add to the action and to keep.

    Raises:
        ValueError: if a shape breaks its contract, or `damping` or `stddev` is a
            Python number out of range.
        TypeError: if an argument is not floating-point, or `key` is not a random key.

    Example:
        >>> key, noise = jax.random.key(0), jnp.array([0.0, 2.0])
        >>> ornstein_uhlenbeck_noise(key, noise, damping=0.25, stddev=0.0).tolist()
        [0.0, 1.5]

    References:
        Uhlenbeck and Ornstein, `On the Theory of the Brownian Motion
        <https://doi.org/10.1103/PhysRev.36.823>`_, 1930.
    """
    return _ornstein_uhlenbeck(key, noise_tm1, damping, stddev)


@checked
def colored_noise(
    key: Key,
    stddev: Annotated[Arg, "f[...]", "[0, inf)"],
    num_steps: int,
    *,
    exponent: Annotated[Arg, "f[]|f[...]"] = 1.0,
) -> Annotated[Array, "f[T,...]"]:
    r"""Draws a sequence of noise whose power falls with a power of the frequency.

    .. math::
        n_t = \sigma \sum_{k = 0}^{T - 1} \sqrt{T s_k} \, w_k \, e^{2 \pi i k t / T},
        \qquad s_k \propto \max(1, \min(k, T - k))^{-\beta},
        \quad \sum_{k = 0}^{T - 1} s_k = 1

    where :math:`w_k = \frac1T \sum_t \epsilon_t e^{-2 \pi i k t / T}` are the
    frequencies of white noise. An exponent :math:`\beta` of 0 leaves it white; pink
    noise, with 1, and red noise, with 2, take ever longer to change. The law would give
    infinite power to `k = 0`, the constant part of the sequence: it gets that of the
    lowest frequency above it, so that white noise is white.

    Each number is normal, with a mean of 0 and a variance of exactly
    :math:`\sigma^2 \sum_k s_k = \sigma^2` at every step. The package `colorednoise`
    leaves the constant part out of the sum that it divides by, so that its variance is
    greater: by 7% for pink noise of 1000 steps, and by 30% for red.

    Were the sequence to go on, it would start again, so that its end is close to its
    start: draw one for each episode.

    Args:
        key: a random key, `k[]`.
        stddev: standard deviation :math:`\sigma` of the noise of each component of an
            action, `f[...]`, in the units of actions, at least 0.
        num_steps: how long the sequence is, a Python `int`, at least 1: as long as an
            episode.
        exponent: the exponent :math:`\beta`, `f[]|f[...]`, dimensionless.

    Returns:
        Noise of all steps, `f[T,...]` with `T = num_steps`, in the units of actions, to
        add to the actions at these steps. It is independent between components.

    Raises:
        ValueError: if a shape breaks its contract, `stddev` is a Python number, and
            negative or infinite, or `num_steps` is below 1.
        TypeError: if `stddev` or `exponent` is not floating-point, `key` is not a
            random key, or `num_steps` no Python `int`.

    Example:
        >>> key = jax.random.key(0)
        >>> colored_noise(key, jnp.ones(2), 5).shape
        (5, 2)
        >>> white = colored_noise(key, jnp.ones(2), 5, exponent=0.0)
        >>> bool(jnp.allclose(white, jax.random.normal(key, (5, 2)), atol=1e-5))
        True

    References:
        Eberhard et al., `Pink Noise Is All You Need: Colored Noise Exploration in Deep
        Reinforcement Learning <https://openreview.net/forum?id=hQ9V5QN27eS>`_, 2023.
    """
    if num_steps < 1:
        raise ValueError(f"colored_noise: num_steps must be at least 1: {num_steps}.")
    white = jax.random.normal(key, (num_steps, *stddev.shape), stddev.dtype)
    steps = np.arange(num_steps)
    frequencies = np.maximum(np.minimum(steps, num_steps - steps), 1)
    logs = lhs_broadcast(jnp.asarray(np.log(frequencies), white.dtype), white)
    exponents = jnp.broadcast_to(exponent, (1, *stddev.shape))
    log_shares = jax.nn.log_softmax(-exponents * logs, axis=0)
    gains = math.sqrt(num_steps) * jnp.exp(log_shares / 2)
    waves = jnp.fft.rfft(white, axis=0)
    waves *= gains[: len(waves)].astype(waves.dtype)
    return stddev[None] * jnp.fft.irfft(waves, num_steps, axis=0)


@checked
def add_dirichlet_noise(
    key: Key,
    prior: Annotated[Arg, "f[...,A]"],
    dirichlet_alpha: Annotated[Arg, "f[]|f[A]", "(0, inf)"],
    dirichlet_fraction: Annotated[Arg, "f[]", "[0, 1]"],
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...,A]"]:
    r"""Mixes random probabilities into the prior of a search.

    .. math::
        (1 - x) \, p + x \, \eta, \qquad \eta \sim \text{Dirichlet}(\alpha)

    where :math:`x` is the fraction. The smaller :math:`\alpha` is, the fewer actions
    share the noise. With a mask the noise is among legal actions alone, and the result
    is 0 for the others, whatever their prior. Where no action is legal, it is NaN.

    The derivative with respect to :math:`\alpha` is that of a sample whose quantile
    stays what it is. In single precision it is too small where :math:`\alpha` is below
    about 0.03, as JAX's derivative of such draws is.

    Args:
        key: a random key, `k[]`.
        prior: probabilities of actions, `f[...,A]`, dimensionless.
        dirichlet_alpha: concentration :math:`\alpha` of the noise, `f[]|f[A]`,
            dimensionless, positive: less than 1 favours few actions, and more than 1
            spreads over all.
        dirichlet_fraction: the part :math:`x` that is noise, `f[]`, dimensionless, in
            `[0, 1]`.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The noisy probabilities, `f[...,A]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract, or `dirichlet_alpha` or
            `dirichlet_fraction` is a Python number out of range.
        TypeError: if `prior` or a setting is not floating-point, `key` is not a random
            key, or `mask` is not boolean.

    Example:
        >>> key, prior = jax.random.key(0), jnp.array([0.25, 0.75])
        >>> add_dirichlet_noise(key, prior, 0.3, 0.0).tolist()
        [0.25, 0.75]
        >>> prior, mask = jnp.array([0.0, 1.0]), jnp.array([False, True])
        >>> add_dirichlet_noise(key, prior, 0.3, 0.5, mask=mask).tolist()
        [0.0, 1.0]

    References:
        Silver et al., `Mastering the Game of Go without Human Knowledge
        <https://doi.org/10.1038/nature24270>`_, 2017.
    """
    legal = which_legal(prior, mask)
    alphas = jnp.broadcast_to(dirichlet_alpha, prior.shape)
    logs = jax.random.loggamma(key, alphas, dtype=prior.dtype)
    noise = jax.nn.softmax(jnp.where(legal, logs, -jnp.inf), axis=-1)
    kept = weighted(jnp.where(legal, prior, 0), 1 - dirichlet_fraction)
    return dirichlet_fraction * noise + kept


@checked
def add_factorized_noise(
    key: Key,
    kernel: Annotated[Arg, "f[D,N]"],
    bias: Annotated[Arg, "f[N]"],
    kernel_stddev: Annotated[Arg, "f[D,N]"],
    bias_stddev: Annotated[Arg, "f[N]"],
) -> tuple[Annotated[Array, "f[D,N]"], Annotated[Array, "f[N]"]]:
    r"""Adds to the parameters of a linear layer noise that inputs and outputs share.

    .. math::
        w_{ij} + \sigma_{ij} f(\epsilon_i) f(\epsilon'_j), \qquad
        b_j + \sigma'_j f(\epsilon'_j), \qquad
        f(x) = \operatorname{sgn}(x) \sqrt{\lvert x \rvert},
        \quad \epsilon, \epsilon' \sim \mathcal{N}(0, 1)

    The layer computes `x @ kernel + bias` with what this returns. It takes `D + N`
    draws in place of one for each parameter. A network of such layers explores by
    itself, as it learns how much noise each parameter is to have: gradients reach all
    four.

    The noise that a deviation multiplies has a mean of zero, and a variance of
    :math:`2 / \pi` for the kernel and of :math:`\sqrt{2 / \pi}` for the bias, not one.

    Args:
        key: a random key, `k[]`.
        kernel: means of the weights from `D` inputs to `N` outputs, `f[D,N]`.
        bias: means of the biases, `f[N]`.
        kernel_stddev: what the noise of each weight is multiplied by, `f[D,N]`, in the
            units of `kernel`; learnt, so that it may be negative.
        bias_stddev: the same for each bias, `f[N]`, in the units of `bias`.

    Returns:
        The noisy kernel, `f[D,N]`, and the noisy bias, `f[N]`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point, or `key` is not a random key.

    Example:
        >>> kernel, bias = jnp.array([[1.0], [2.0]]), jnp.array([3.0])
        >>> noisy = add_factorized_noise(
        ...     jax.random.key(0), kernel, bias, 0 * kernel, 0 * bias
        ... )
        >>> noisy[0].tolist(), noisy[1].tolist()
        ([[1.0], [2.0]], [3.0])

    References:
        Fortunato et al., `Noisy Networks for Exploration
        <https://arxiv.org/abs/1706.10295>`_, 2017.
    """
    num_inputs, num_outputs = kernel.shape
    noise = jax.random.normal(key, (num_inputs + num_outputs,), kernel.dtype)
    roots = jnp.sign(noise) * jnp.sqrt(jnp.abs(noise))
    inputs, outputs = jnp.split(roots, [num_inputs])
    noisy_kernel = kernel + kernel_stddev * jnp.outer(inputs, outputs)
    return noisy_kernel, bias + bias_stddev * outputs


def gaussian_noise(key: Array, like: Array, stddev: Array) -> Array:
    return stddev * jax.random.normal(key, like.shape, like.dtype)


def _ornstein_uhlenbeck(
    key: Array, noise_tm1: Array, damping: Array, stddev: Array
) -> Array:
    fresh = gaussian_noise(key, noise_tm1, stddev)
    return weighted(noise_tm1, 1 - damping) + fresh

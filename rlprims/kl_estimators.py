r"""Divergences of policies, estimated from the log-probabilities of samples.

The Kullback-Leibler divergence of one policy from another is a sum over all actions.
Over sequences, or where a policy can only be sampled, it is estimated from the actions
drawn. With :math:`\delta = \log \pi_{\text{ref}}(a) - \log \pi(a)` for an action
:math:`a` drawn from :math:`\pi`, the estimates of
:math:`\text{KL}(\pi \,\|\, \pi_{\text{ref}})` differ, and their gradients more than
their values:

==================  ==========================  =======  =============================
estimate            value                       bias     gradient, on average, is of
==================  ==========================  =======  =============================
`kl_estimate_k1`    :math:`-\delta`             none     nothing: it is zero
`kl_estimate_k2`    :math:`\delta^2 / 2`        small    `KL(policy, reference)`
`kl_estimate_k3`    :math:`e^\delta-1-\delta`   none     `KL(reference, policy)`
==================  ==========================  =======  =============================

The gradients are those that actions drawn from the policy itself give, held constant as
samples. k1 may be added to the reward; as a loss it does nothing but add noise.
`importance_corrected_kl_estimate_k3` takes actions drawn from another policy, and both
its value and its gradient are those of `KL(policy, reference)`.

`approximate_kl` tells how far a policy has moved from the one that acted, as PPO does
to stop in time.

Where neither policy could have drawn the action, the difference of two infinities, the
estimate is NaN; `mask_t` leaves such a sample out.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import contain_nonfinite, guarded, keep_where
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced

__all__ = [
    "approximate_kl",
    "importance_corrected_kl_estimate_k3",
    "kl_estimate_k1",
    "kl_estimate_k2",
    "kl_estimate_k3",
]


@checked
def kl_estimate_k1(
    log_prob_t: Annotated[Arg, "f[...]"],
    reference_log_prob_t: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "none",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Estimates a divergence by differences of log-probabilities, known as k1.

    .. math::
        k_1 = \log \pi(a) - \log \pi_{\text{ref}}(a), \qquad
        \mathbb{E}_{a \sim \pi}[k_1] = \text{KL}(\pi \,\|\, \pi_{\text{ref}})

    It is unbiased, and often negative. Its gradient is that of :math:`\log \pi(a)`,
    which is zero on average over the actions of the policy: put k1 into the reward, and
    not into the loss.

    Args:
        log_prob_t: log-probabilities of the actions drawn, under the policy that drew
            them, `f[...]`, in nats.
        reference_log_prob_t: the same under the policy to stay near, `f[...]`.
        mask_t: whether each sample counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the reference is a constant when differentiating,
            `b[]`.
        reduction: `"none"`, or `"mean"` or `"sum"` over the samples that count.

    Returns:
        The estimates, 0 where they do not count, or what they are reduced to,
        `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a log-probability is not floating-point.

    Example:
        >>> kl_estimate_k1(jnp.array([-1.0, -2.0]), jnp.array([-3.0, -1.0])).tolist()
        [2.0, -1.0]

    References:
        Schulman, `Approximating KL Divergence
        <http://joschu.net/blog/kl-approx.html>`_, 2020.
    """
    difference = _difference(
        reference_log_prob_t, log_prob_t, mask_t, use_stop_gradient
    )
    return reduced(k1(difference), mask_t, reduction)


@checked
def kl_estimate_k2(
    log_prob_t: Annotated[Arg, "f[...]"],
    reference_log_prob_t: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "none",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Estimates a divergence by half the squared difference, known as k2.

    .. math::
        k_2 = \tfrac12 \bigl(\log \pi(a) - \log \pi_{\text{ref}}(a)\bigr)^2, \qquad
        \mathbb{E}_{a \sim \pi}[\nabla k_2] =
            \nabla \text{KL}(\pi \,\|\, \pi_{\text{ref}})

    It is biased but never negative, and close for policies that are. Its gradient, on
    average over the actions of the policy, is exactly that of the divergence: of the
    three it is the one to minimise.

    Args:
        log_prob_t: log-probabilities of the actions drawn, under the policy that drew
            them, `f[...]`, in nats.
        reference_log_prob_t: the same under the policy to stay near, `f[...]`.
        mask_t: whether each sample counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the reference is a constant when differentiating,
            `b[]`.
        reduction: `"none"`, or `"mean"` or `"sum"` over the samples that count.

    Returns:
        The estimates, 0 where they do not count, or what they are reduced to,
        `f[]|f[...]`, in nats. An infinite one has no gradient.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a log-probability is not floating-point.

    Example:
        >>> kl_estimate_k2(jnp.array([-1.0, -2.0]), jnp.array([-3.0, -1.0])).tolist()
        [2.0, 0.5]

    References:
        Schulman, `Approximating KL Divergence
        <http://joschu.net/blog/kl-approx.html>`_, 2020.
    """
    difference = _difference(
        reference_log_prob_t, log_prob_t, mask_t, use_stop_gradient
    )
    return reduced(k2(difference), mask_t, reduction)


@checked
def kl_estimate_k3(
    log_prob_t: Annotated[Arg, "f[...]"],
    reference_log_prob_t: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "none",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Estimates a divergence without bias and never negative, known as k3.

    .. math::
        k_3 = e^\delta - 1 - \delta, \qquad
        \delta = \log \pi_{\text{ref}}(a) - \log \pi(a), \qquad
        \mathbb{E}_{a \sim \pi}[k_3] = \text{KL}(\pi \,\|\, \pi_{\text{ref}})

    Its gradient, on average over the actions of the policy, is that of the divergence
    the other way round, :math:`\text{KL}(\pi_{\text{ref}} \,\|\, \pi)`. Near zero,
    where the terms of the equation cancel and popular code gives noise and negative
    numbers, a series keeps all digits.

    Args:
        log_prob_t: log-probabilities of the actions drawn, under the policy that drew
            them, `f[...]`, in nats.
        reference_log_prob_t: the same under the policy to stay near, `f[...]`.
        mask_t: whether each sample counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the reference is a constant when differentiating,
            `b[]`.
        reduction: `"none"`, or `"mean"` or `"sum"` over the samples that count.

    Returns:
        The estimates, 0 where they do not count, or what they are reduced to,
        `f[]|f[...]`, in nats. They grow exponentially with :math:`\delta`; one that
        overflows has no gradient.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a log-probability is not floating-point.

    Example:
        >>> k3 = kl_estimate_k3(jnp.array([-2.0, -3.0]), jnp.array([-2.0, -2.0]))
        >>> [round(x, 4) for x in k3.tolist()]  # and e - 2
        [0.0, 0.7183]

    References:
        Schulman, `Approximating KL Divergence
        <http://joschu.net/blog/kl-approx.html>`_, 2020.
        Shao et al., `DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open
        Language Models <https://arxiv.org/abs/2402.03300>`_, 2024, which minimises it.
    """
    difference = _difference(
        reference_log_prob_t, log_prob_t, mask_t, use_stop_gradient
    )
    return reduced(k3(difference), mask_t, reduction)


@checked
def importance_corrected_kl_estimate_k3(
    log_prob_t: Annotated[Arg, "f[...]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...]"],
    reference_log_prob_t: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "none",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Estimates a divergence from the actions of another policy, without bias.

    .. math::
        \frac{\pi(a)}{\mu(a)} \bigl(e^\delta - 1 - \delta\bigr), \qquad
        \delta = \log \pi_{\text{ref}}(a) - \log \pi(a)

    The average over actions of :math:`\mu` is
    :math:`\text{KL}(\pi \,\|\, \pi_{\text{ref}})` whatever :math:`\pi` is, so that its
    gradient is that of the divergence too. This needs the gradient of the ratio, which
    flows: with :math:`\mu = \pi` held constant, it is what `kl_estimate_k3` lacks.

    Args:
        log_prob_t: log-probabilities of the actions drawn, under the policy to improve,
            :math:`\pi`, `f[...]`, in nats.
        behaviour_log_prob_t: the same under the policy that drew them, :math:`\mu`,
            `f[...]`.
        reference_log_prob_t: the same under the policy to stay near, `f[...]`.
        mask_t: whether each sample counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether both other policies are constants when
            differentiating, `b[]`.
        reduction: `"none"`, or `"mean"` or `"sum"` over the samples that count.

    Returns:
        The estimates, never negative, 0 where they do not count, or what they are
        reduced to, `f[]|f[...]`, in nats. Where the policy to improve rules the action
        out, it is the limit :math:`\pi_{\text{ref}}(a) / \mu(a)`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a log-probability is not floating-point.

    Example:
        >>> log_prob = jnp.log(jnp.array([0.5, 0.0]))
        >>> behaviour, reference = jnp.log(0.25), jnp.log(0.5)
        >>> importance_corrected_kl_estimate_k3(
        ...     log_prob, jnp.full(2, behaviour), jnp.full(2, reference)
        ... ).tolist()
        [0.0, 2.0]

    References:
        DeepSeek-AI, `DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models
        <https://arxiv.org/abs/2512.02556>`_, 2025.
    """
    log_prob, behaviour, reference = keep_where(
        mask_t, log_prob_t, behaviour_log_prob_t, reference_log_prob_t
    )
    behaviour, reference = stop_gradient_if(use_stop_gradient, (behaviour, reference))
    estimates = _corrected_k3(log_prob - behaviour, reference - behaviour)
    return reduced(estimates, mask_t, reduction)


@checked
def approximate_kl(
    log_prob_t: Annotated[Arg, "f[...]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...]"],
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Estimates how far a policy has moved from the one that acted.

    .. math::
        \text{KL}(\mu \,\|\, \pi) \approx
            \frac1T \sum_t \rho_t - 1 - \log \rho_t, \qquad
        \rho_t = \frac{\pi(a_t)}{\mu(a_t)}, \quad a_t \sim \mu

    With k3, the sum above, it is unbiased and never negative. With k1, :math:`-\log
    \rho_t`, it is unbiased, noisier, and negative now and then, so that an update that
    stops when it passes a limit may not stop. k2 is :math:`\tfrac12 \log^2 \rho_t`. The
    samples are of the policy that acted, which comes first in the divergence: not the
    direction of `kl_estimate_k3`.

    Args:
        log_prob_t: log-probabilities of the actions taken, under the policy to improve,
            :math:`\pi`, `f[...]`, in nats.
        behaviour_log_prob_t: the same under the policy that acted, :math:`\mu`,
            `f[...]`.
        estimator: `"k1"`, `"k2"` or `"k3"`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the policy that acted is a constant when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The estimate, `f[]`, or that of each step, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or there is no such estimator.
        TypeError: if a log-probability is not floating-point.

    Example:
        >>> log_prob, behaviour = jnp.array([-3.0, -2.0]), jnp.array([-2.0, -2.0])
        >>> approximate_kl(log_prob, behaviour, estimator="k1").item()
        0.5

    References:
        Schulman, `Approximating KL Divergence
        <http://joschu.net/blog/kl-approx.html>`_, 2020.
    """
    behaviour, log_prob = keep_where(mask_t, behaviour_log_prob_t, log_prob_t)
    difference = log_prob - stop_gradient_if(use_stop_gradient, behaviour)
    estimate = {"k1": k1, "k2": k2, "k3": k3}[estimator]
    return reduced(estimate(difference), mask_t, reduction)


# What the estimates are made of


def _difference(
    reference: Array, log_prob: Array, mask: Array | None, stop: Flag
) -> Array:
    """Returns the log-probability under the reference, relative to the policy's."""
    log_prob, reference = keep_where(mask, log_prob, reference)
    return stop_gradient_if(stop, reference) - log_prob


def k1(difference: Array) -> Array:
    return -difference


def k2(difference: Array) -> Array:
    return guarded(lambda x: x**2 / 2, difference)


@jax.custom_jvp
def k3(difference: Array) -> Array:
    """Returns `exp(x) - 1 - x` with all digits, as a series where the terms cancel."""
    x = jnp.clip(difference, -1, 1)
    series = jnp.ones_like(x)
    for n in range(18, 2, -1):
        series = 1 + x / n * series
    near = x**2 / 2 * series
    far = jnp.expm1(difference) - jnp.minimum(difference, 1e3)  # never inf - inf
    return jnp.where(jnp.abs(difference) < 1, near, far)


@k3.defjvp
def _k3_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return k3(x), _if_finite(jnp.expm1(x)) * dx


@jax.custom_jvp
def _corrected_k3(log_ratio: Array, log_reference: Array) -> Array:
    """Returns `r k3(log(p / r))`, with `r` and `p` relative to the policy that acted.

    Where `p` is the larger it is written as `p (1 - (1 + x) / exp(x))`, which does not
    overflow, nor needs `r` to be above zero.
    """
    ratio, reference = jnp.exp(log_ratio), jnp.exp(log_reference)
    x = log_reference - log_ratio
    large, small = jnp.maximum(x, 1), jnp.minimum(x, 1)
    far = _product(reference, 1 - _product(1 + large, jnp.exp(-large)))
    return jnp.where(x > 1, far, _product(ratio, k3(small)))


@_corrected_k3.defjvp
def _corrected_k3_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    log_ratio, log_reference = primals
    ratio, reference = jnp.exp(log_ratio), jnp.exp(log_reference)
    by_ratio = _if_finite(ratio * (log_ratio - log_reference))
    by_reference = _if_finite(reference - ratio)
    tangent = by_ratio * tangents[0] + by_reference * tangents[1]
    return _corrected_k3(log_ratio, log_reference), tangent


def _product(x: Array, y: Array) -> Array:
    """Multiplies, with nothing from what a zero cuts off, on either side."""
    return contain_nonfinite(x, y) * contain_nonfinite(y, x)


def _if_finite(slope: Array) -> Array:
    return jnp.where(jnp.isfinite(slope), slope, 0)

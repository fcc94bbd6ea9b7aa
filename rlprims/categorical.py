"""Probabilities, logits and samples of a finite number of actions.

Actions lie along the last axis, and any axes may lead. Logits are turned into
probabilities by a softmax, so that adding the same number to all of them changes
nothing, and minus infinity rules an action out.

Every function takes a `mask` of legal actions, true where legal. The result is that of
leaving the other actions out: they have probability zero, are never drawn, and their
logits have no effect and no gradient, NaN included. Where no action is legal there is
no distribution, and the result is NaN with a gradient of zero; what is drawn from it
is -1, an action that does not exist and whose value `batched_index` gives as NaN.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import batched_index, greatest, weighted

__all__ = [
    "categorical_cross_entropy",
    "categorical_importance_sampling_ratios",
    "categorical_kl_divergence",
    "categorical_sample",
]


@checked
def categorical_sample(
    key: Annotated[Arg, "k[]"],
    probs: Annotated[Arg, "f[...,A]"],
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "i[...]"]:
    r"""Draws an index from each vector of probabilities.

    .. math::
        P(i) = \frac{\text{probs}_i}{\sum_j \text{probs}_j}

    The probabilities need not sum to one. Where they give no distribution, as they are
    all zero, or one of them is negative or not finite, the index is -1.

    Args:
        key: a random key, `k[]`; one is enough for any number of draws.
        probs: probabilities, `f[...,A]`, dimensionless.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The indices, `i[...]`, in `[0, A)`, or -1.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `probs` is not floating-point, `key` is not a random key, or
            `mask` is not boolean.

    Example:
        >>> probs = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        >>> categorical_sample(jax.random.key(0), probs).tolist()
        [1, 0, -1]
    """
    weights = jnp.where(probs < 0, jnp.nan, probs)
    weights = jnp.where(which_legal(probs, mask), weights, 0)
    return draw(key, jnp.log(weights / jnp.sum(weights, axis=-1, keepdims=True)))


@checked
def categorical_cross_entropy(
    labels: Annotated[Arg, "f[...,A]"],
    logits: Annotated[Arg, "f[...,A]"],
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the cross-entropy of a softmax from given probabilities.

    .. math::
        -\sum_i \text{labels}_i \log \pi(i),
        \qquad \pi = \text{softmax}(\text{logits})

    It is linear in `labels`, which are not normalised, and differentiable in them. A
    label of zero adds nothing, even where the logit is minus infinity.

    Args:
        labels: target probabilities, `f[...,A]`, dimensionless.
        logits: predicted logits, `f[...,A]`.
        mask: whether each action is legal, `b[...,A]`; all are if `None`. The labels
            of the others are ignored.

    Returns:
        The cross-entropy, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `labels` or `logits` is not floating-point, or `mask` is not
            boolean.

    Example:
        >>> labels, logits = jnp.array([0.0, 1.0]), jnp.array([0.0, 90.0])
        >>> float(categorical_cross_entropy(labels, logits))
        0.0

    References:
        Bellemare, Dabney and Munos, `A Distributional Perspective on Reinforcement
        Learning <https://arxiv.org/abs/1707.06887>`_, 2017.
    """
    log_probs = masked_log_softmax(logits, mask)
    # What is not legal counts as zero, unless nothing is: then it counts as NaN.
    labels = jnp.where(which_legal(labels, mask), labels, jnp.exp(log_probs))
    return weighted_sum(-log_probs, labels)


@checked
def categorical_kl_divergence(
    p_logits: Annotated[Arg, "f[...,A]"],
    q_logits: Annotated[Arg, "f[...,A]"],
    temperature: Annotated[Arg, "f[]", "(0, inf]"] = 1.0,
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the Kullback-Leibler divergence of one softmax from another.

    .. math::
        \sum_i p(i) \log \frac{p(i)}{q(i)},
        \qquad p = \text{softmax}(\text{p\_logits} / \text{temperature}),
        \quad q = \text{softmax}(\text{q\_logits} / \text{temperature})

    An action that `p` excludes by a logit of minus infinity adds nothing, whatever
    `q` says; one that only `q` excludes makes the divergence infinite.

    Args:
        p_logits: logits of the distribution to average over, `f[...,A]`.
        q_logits: logits of the other distribution, `f[...,A]`.
        temperature: what to divide both by, `f[]`, in units of logits, positive.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The divergence, `f[...]`, in nats, at least 0 but for rounding.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and not positive.
        TypeError: if logits or `temperature` are not floating-point, or `mask` is not
            boolean.

    Example:
        >>> p_logits, q_logits = jnp.array([90.0, 0.0]), jnp.array([0.0, 0.0])
        >>> round(float(categorical_kl_divergence(p_logits, q_logits)), 4)  # log 2
        0.6931

    References:
        Song et al., `V-MPO: On-Policy Maximum a Posteriori Policy Optimization for
        Discrete and Continuous Control <https://arxiv.org/abs/1909.12238>`_, 2019,
        eq. 5, which limits it between one policy and the next.
    """
    p_log_probs = masked_log_softmax(p_logits, mask, temperature)
    q_log_probs = masked_log_softmax(q_logits, mask, temperature)
    return weighted_sum(p_log_probs - q_log_probs, jnp.exp(p_log_probs))


@checked
def categorical_importance_sampling_ratios(
    pi_logits_t: Annotated[Arg, "f[...,A]"],
    mu_logits_t: Annotated[Arg, "f[...,A]"],
    a_t: Annotated[Arg, "i[...]"],
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes how much likelier actions are under one softmax than under another.

    .. math::
        \rho_t = \frac{\pi(a_t)}{\mu(a_t)},
        \qquad \pi = \text{softmax}(\text{pi\_logits}_t),
        \quad \mu = \text{softmax}(\text{mu\_logits}_t)

    The ratio is taken between logarithms, so that it is right even where both
    probabilities are too small to represent. It is NaN, without a gradient, where both
    are exactly zero, as for an action that is not legal.

    Args:
        pi_logits_t: logits of the policy to evaluate, at times `t`, `f[...,A]`.
        mu_logits_t: logits of the policy that acted, `f[...,A]`.
        a_t: actions that it took, `i[...]`, in `[0, A)`; outside, the ratio is NaN.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The ratios, `f[...]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if logits are not floating-point, `a_t` is not an integer, or
            `mask` is not boolean.

    Example:
        >>> pi_logits, mu_logits = jnp.array([0.0, 90.0]), jnp.array([0.0, 0.0])
        >>> float(categorical_importance_sampling_ratios(pi_logits, mu_logits, 1))
        2.0

    References:
        Precup, Sutton and Singh, `Eligibility Traces for Off-Policy Policy Evaluation
        <http://incompleteideas.net/papers/PSS-00.pdf>`_, 2000.
    """
    log_pi, log_mu = (
        masked_log_softmax(pi_logits_t, mask),
        masked_log_softmax(mu_logits_t, mask),
    )
    never = (log_pi == -jnp.inf) & (log_mu == -jnp.inf)
    log_ratios = jnp.where(never, jnp.nan, log_pi - log_mu)
    return jnp.exp(batched_index(log_ratios, a_t))


# What policies and their losses are made of too


def masked_log_softmax(
    logits: Array, mask: Array | None, temperature: Arg = 1.0
) -> Array:
    """Returns log-probabilities: `-inf` of what is not legal, NaN if nothing is."""
    return jax.nn.log_softmax(scaled_logits(logits, mask, temperature), axis=-1)


def scaled_logits(logits: Array, mask: Array | None, temperature: Arg) -> Array:
    """Returns logits over the temperature, `-inf` of what is not legal."""
    # What has no probability becomes zero before the division, so that none of it
    # reaches the derivative with respect to the temperature.
    possible = which_legal(logits, mask) & (logits != -jnp.inf)
    scaled = jnp.where(possible, logits, 0) / temperature
    return jnp.where(possible, scaled, -jnp.inf)


def which_legal(numbers: Array, mask: Array | None) -> Array:
    return jnp.ones(numbers.shape, bool) if mask is None else mask


def best_action(values: Array, mask: Array | None) -> Array:
    """Returns the first legal action of highest value, or -1 where there is none.

    A value of `-inf` is that of an action that is not legal. Where a legal one is NaN,
    none is known to be best.
    """
    values = jnp.where(which_legal(values, mask), values, -jnp.inf)
    exists = greatest(values) > -jnp.inf
    return jnp.where(exists, jnp.argmax(values, axis=-1), -1)


def draw(key: Array, log_probs: Array) -> Array:
    """Draws an index from each distribution, or -1 where it is none."""
    undefined = jnp.isnan(log_probs).any(axis=-1)
    return jnp.where(undefined, -1, jax.random.categorical(key, log_probs))


def weighted_sum(values: Array, weights: Array) -> Array:
    """Returns the weighted sum, where a weight of zero cuts its value off."""
    return jnp.sum(weighted(values, weights), axis=-1)

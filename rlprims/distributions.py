"""Policies over a finite number of actions, as objects to sample from and measure.

A policy maps what a network puts out, one number for each action, to probabilities.
`softmax` takes the numbers for logits; `greedy` and `epsilon_greedy` take them for
preferences, such as action values. Each is a `DiscreteDistribution`, whose functions
take the numbers along the last axis, after any leading axes, and a `mask` of legal
actions, with the same meaning as in `categorical`.

A temperature, ε or clip out of range is refused if it is a Python number; the value of
an array is unknown while tracing, so there the result is NaN.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, bounded, checked_as
from rlprims.arrays import batched_index, contain_nonfinite, greatest
from rlprims.categorical import (
    categorical_kl_divergence,
    draw,
    masked_log_softmax,
    weighted_sum,
    which_legal,
)

__all__ = [
    "DiscreteDistribution",
    "clipped_entropy_softmax",
    "epsilon_greedy",
    "greedy",
    "softmax",
]

Key = Annotated[Arg, "k[]"]
Numbers = Annotated[Arg, "f[...,A]"]
Actions = Annotated[Arg, "i[...]"]
Mask = Annotated[Arg | None, "b[...,A]"]
Temperature = Annotated[Arg, "f[]", "(0, inf]"]
Epsilon = Annotated[Arg, "f[]", "[0, 1]"]
EntropyClip = Annotated[Arg, "f[]", "[0, inf]"]


class DiscreteDistribution(NamedTuple):
    """Functions of a distribution that logits or preferences, `f[...,A]`, determine.

    Each takes a keyword `mask` of legal actions too, `b[...,A]`.

    Attributes:
        sample: takes a random key, `k[]`, and logits; draws actions, `i[...]`.
        probs: takes logits; returns probabilities, `f[...,A]`.
        logprob: takes actions, `i[...]`, and logits; returns the log-probabilities of
            these actions, `f[...]`, in nats.
        entropy: takes logits; returns the entropy, `f[...]`, in nats.
        kl: takes logits of two distributions; returns the Kullback-Leibler divergence
            of the first from the second, `f[...]`, in nats.

    Example:
        >>> policy = epsilon_greedy(0.5)
        >>> policy.probs(jnp.array([1.0, 2.0])).tolist()
        [0.25, 0.75]
    """

    sample: Callable[..., Array]
    probs: Callable[..., Array]
    logprob: Callable[..., Array]
    entropy: Callable[..., Array]
    kl: Callable[..., Array]


@bounded
def softmax(temperature: Temperature = 1.0) -> DiscreteDistribution:
    r"""Builds the distribution with probabilities proportional to exponentials.

    .. math::
        \pi(a) = \frac{\exp(\text{logits}_a / \text{temperature})}
                      {\sum_b \exp(\text{logits}_b / \text{temperature})}

    A logit of minus infinity has the same effect as an action that is not legal.

    Args:
        temperature: what to divide the logits by, `f[]`, in units of logits, positive:
            towards 0 the distribution becomes greedy, towards infinity uniform.

    Returns:
        A `DiscreteDistribution` of `logits`.

    Raises:
        ValueError: if `temperature` is a Python number and not positive.

    Example:
        >>> logits, mask = jnp.array([3.0, 3.0, 9.0]), jnp.array([True, True, False])
        >>> softmax().probs(logits, mask=mask).tolist()
        [0.5, 0.5, 0.0]
    """
    kl = categorical_kl_divergence
    methods = _softmax_sample, _softmax_probs, _softmax_logprob, _softmax_entropy, kl
    bound = (functools.partial(fn, temperature=temperature) for fn in methods)
    return DiscreteDistribution(*bound)


@bounded
def clipped_entropy_softmax(
    temperature: Temperature = 1.0, entropy_clip: EntropyClip = 1.0
) -> DiscreteDistribution:
    r"""Builds a `softmax` whose entropy counts only up to a fraction of its maximum.

    .. math::
        \min\bigl(H(\pi), \, \text{entropy\_clip} \cdot \log A\bigr)

    As a bonus, this entropy rewards a policy for not being deterministic, and stops
    short of pushing it towards the uniform one: beyond the clip it has no gradient.
    With a mask, `A` counts the legal actions alone.

    Args:
        temperature: what to divide the logits by, `f[]`, in units of logits, positive.
        entropy_clip: the fraction of the greatest entropy to clip at, `f[]`,
            dimensionless, at least 0; from 1 on, nothing is clipped.

    Returns:
        A `DiscreteDistribution` of `logits`. Its `sample`, `probs` and `logprob` take
        an `action_spec` that they ignore, as policies over continuous actions need one.

    Raises:
        ValueError: if `temperature` is a Python number and not positive, or
            `entropy_clip` is one and negative.

    Example:
        >>> policy = clipped_entropy_softmax(entropy_clip=0.5)
        >>> round(float(policy.entropy(jnp.zeros(4))), 4)  # 0.5 * log 4
        0.6931
    """
    plain = softmax(temperature)
    return DiscreteDistribution(
        sample=lambda key, logits, action_spec=None, *, mask=None: plain.sample(
            key, logits, mask=mask
        ),
        probs=lambda logits, action_spec=None, *, mask=None: plain.probs(
            logits, mask=mask
        ),
        logprob=lambda sample, logits, action_spec=None, *, mask=None: plain.logprob(
            sample, logits, mask=mask
        ),
        entropy=functools.partial(
            _clipped_entropy, temperature=temperature, entropy_clip=entropy_clip
        ),
        kl=plain.kl,
    )


def greedy() -> DiscreteDistribution:
    r"""Builds the distribution that is uniform over the most preferred actions.

    .. math::
        \pi(a) \propto [\text{preferences}_a = \max_b \text{preferences}_b]

    Exact ties share the probability, so that equal values favour no action. The
    gradient with respect to preferences is zero. A NaN among them, at a legal action,
    makes everything NaN.

    Returns:
        A `DiscreteDistribution` of `preferences`.

    Example:
        >>> greedy().probs(jnp.array([1.0, 2.0, 2.0])).tolist()
        [0.0, 0.5, 0.5]
    """
    return epsilon_greedy(0.0)


@bounded
def epsilon_greedy(epsilon: Epsilon | None = None) -> DiscreteDistribution:
    r"""Builds the distribution that is greedy, but uniform with probability `epsilon`.

    .. math::
        \pi(a) = \frac{\epsilon}{A} + (1 - \epsilon) \,
                 \frac{[a \in \text{best}]}{|\text{best}|},
        \qquad \text{best} = \arg\max_b \text{preferences}_b

    With a mask, both parts are over legal actions alone. Without one, a preference of
    minus infinity keeps its share of `epsilon`.

    Args:
        epsilon: the probability of choosing at random, `f[]`, dimensionless, in
            `[0, 1]`; `None` if every method is to be given its own.

    Returns:
        A `DiscreteDistribution` of `preferences`, whose methods take an `epsilon` as
        their next argument, to use in place of this one.

    Raises:
        ValueError: if `epsilon` is a Python number outside `[0, 1]`.

    Example:
        >>> preferences = jnp.array([1.0, 3.0, 2.0, 0.0])
        >>> epsilon_greedy(0.5).probs(preferences).tolist()
        [0.125, 0.625, 0.125, 0.125]
        >>> epsilon_greedy().probs(preferences, 0.0).tolist()
        [0.0, 1.0, 0.0, 0.0]
    """
    return DiscreteDistribution(
        sample=lambda key, preferences, epsilon=epsilon, *, mask=None: (
            _epsilon_greedy_sample(key, preferences, epsilon, mask=mask)
        ),
        probs=lambda preferences, epsilon=epsilon, *, mask=None: _epsilon_greedy_probs(
            preferences, epsilon, mask=mask
        ),
        logprob=lambda sample, preferences, epsilon=epsilon, *, mask=None: (
            _epsilon_greedy_logprob(sample, preferences, epsilon, mask=mask)
        ),
        entropy=lambda preferences, epsilon=epsilon, *, mask=None: (
            _epsilon_greedy_entropy(preferences, epsilon, mask=mask)
        ),
        kl=lambda p_preferences, q_preferences, epsilon=epsilon, *, mask=None: (
            _epsilon_greedy_kl(p_preferences, q_preferences, epsilon, mask=mask)
        ),
    )


# The methods of a softmax


@checked_as("softmax.sample")
def _softmax_sample(
    key: Key, logits: Numbers, *, temperature: Temperature, mask: Mask = None
) -> Annotated[Array, "i[...]"]:
    return draw(key, masked_log_softmax(logits, mask, temperature))


@checked_as("softmax.probs")
def _softmax_probs(
    logits: Numbers, *, temperature: Temperature, mask: Mask = None
) -> Annotated[Array, "f[...,A]"]:
    return jnp.exp(masked_log_softmax(logits, mask, temperature))


@checked_as("softmax.logprob")
def _softmax_logprob(
    sample: Actions, logits: Numbers, *, temperature: Temperature, mask: Mask = None
) -> Annotated[Array, "f[...]"]:
    return batched_index(masked_log_softmax(logits, mask, temperature), sample)


@checked_as("softmax.entropy")
def _softmax_entropy(
    logits: Numbers, *, temperature: Temperature, mask: Mask = None
) -> Annotated[Array, "f[...]"]:
    log_probs = masked_log_softmax(logits, mask, temperature)
    return weighted_sum(-log_probs, jnp.exp(log_probs))


@checked_as("clipped_entropy_softmax.entropy")
def _clipped_entropy(
    logits: Numbers,
    *,
    temperature: Temperature,
    entropy_clip: EntropyClip,
    mask: Mask = None,
) -> Annotated[Array, "f[...]"]:
    count = jnp.sum(which_legal(logits, mask), axis=-1, dtype=logits.dtype)
    most = entropy_clip * jnp.log(count)
    entropy = _softmax_entropy(logits, temperature=temperature, mask=mask)
    return jnp.minimum(entropy, most)


# The methods of ε-greedy


@checked_as("epsilon_greedy.sample")
def _epsilon_greedy_sample(
    key: Key, preferences: Numbers, epsilon: Epsilon, *, mask: Mask = None
) -> Annotated[Array, "i[...]"]:
    return draw(key, _log(epsilon_greedy_probs(preferences, epsilon, mask)))


@checked_as("epsilon_greedy.probs")
def _epsilon_greedy_probs(
    preferences: Numbers, epsilon: Epsilon, *, mask: Mask = None
) -> Annotated[Array, "f[...,A]"]:
    return epsilon_greedy_probs(preferences, epsilon, mask)


@checked_as("epsilon_greedy.logprob")
def _epsilon_greedy_logprob(
    sample: Actions, preferences: Numbers, epsilon: Epsilon, *, mask: Mask = None
) -> Annotated[Array, "f[...]"]:
    return batched_index(_log(epsilon_greedy_probs(preferences, epsilon, mask)), sample)


@checked_as("epsilon_greedy.entropy")
def _epsilon_greedy_entropy(
    preferences: Numbers, epsilon: Epsilon, *, mask: Mask = None
) -> Annotated[Array, "f[...]"]:
    probs = epsilon_greedy_probs(preferences, epsilon, mask)
    return weighted_sum(-_log(probs), probs)


@checked_as("epsilon_greedy.kl")
def _epsilon_greedy_kl(
    p_preferences: Numbers,
    q_preferences: Numbers,
    epsilon: Epsilon,
    *,
    mask: Mask = None,
) -> Annotated[Array, "f[...]"]:
    p = epsilon_greedy_probs(p_preferences, epsilon, mask)
    q = epsilon_greedy_probs(q_preferences, epsilon, mask)
    return weighted_sum(_log(p) - _log(q), p)


def epsilon_greedy_probs(
    preferences: Array, epsilon: Array, mask: Array | None
) -> Array:
    """Returns probabilities: zero of what is not legal, NaN if nothing is."""
    legal = which_legal(preferences, mask)
    best = greatest(preferences, where=legal, initial=-jnp.inf, keepdims=True)
    choose = functools.partial(_uniform, dtype=preferences.dtype)
    follow = contain_nonfinite(choose(legal & (preferences == best)), 1 - epsilon)
    return epsilon * choose(legal) + (1 - epsilon) * follow


def _uniform(chosen: Array, dtype: Any) -> Array:
    """Returns equal probabilities of what is chosen, NaN if nothing is."""
    count = jnp.sum(chosen, axis=-1, keepdims=True, dtype=dtype)
    # XLA turns a boolean divided by a number into a choice, and so 0 / 0 into 0.
    return jnp.where(count == 0, jnp.nan, chosen.astype(dtype) / count)


def _log(probs: Array) -> Array:
    """Returns logarithms, without a derivative where they are `-inf`."""
    impossible = probs == 0
    return jnp.where(impossible, -jnp.inf, jnp.log(jnp.where(impossible, 1, probs)))

r"""Log-probabilities of tokens, and how losses of tokens become one number.

A language model gives logits for each position of each sequence. `token_log_probs`
reads off what the losses need, without a second array of the size of the vocabulary.
`sequence_log_probs` adds it up over a sequence, for the losses of `preference`.
`aggregate_tokens` is the other end: sequences differ in length, and whether long ones
count for more is a choice that published methods make differently.

Tokens lie along the last axis. Where each row is a sequence, `mask_t` tells its tokens
from prompt and padding. Where sequences are packed into one row, one after another,
`segment_ids` tell them apart: numbers in `[0, T)`, where the row has `T` tokens.
"""

import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims._segments import counted, known, number_of, shares
from rlprims.arrays import batched_index, keep_where, weighted
from rlprims.categorical import scaled_logits

__all__ = ["aggregate_tokens", "sequence_log_probs", "token_log_probs"]


@checked
def aggregate_tokens(
    values_t: Annotated[Arg, "f[...,T]"],
    aggregation: Literal[
        "token_mean", "sequence_mean", "constant_length"
    ] = "token_mean",
    *,
    length: Annotated[Arg, "f[]", "(0, inf]"] = 1.0,
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    segment_ids: Annotated[Arg | None, "i[...,T]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Averages what belongs to tokens, such as losses, over a batch of sequences.

    Let sequence :math:`i` of :math:`S` have :math:`n_i` tokens that count:

    .. math::
        \text{token\_mean} &= \frac{\sum_i \sum_t x_{i,t}}{\sum_i n_i} \\
        \text{sequence\_mean} &= \frac1S \sum_i \frac{1}{n_i} \sum_t x_{i,t} \\
        \text{constant\_length} &= \frac1S \sum_i \frac{1}{\text{length}}
            \sum_t x_{i,t}

    GRPO takes the mean of each sequence, so that a token of a long sequence counts
    for less; DAPO counts all tokens alike; Dr. GRPO divides by one length for all,
    whatever the sequences, of the longest that may be generated, say. With a length
    of 1, as it is by default, that is the mean of the sums of sequences.

    A sequence of which no token counts is left out of :math:`S`; some code counts it.
    The result is 0 if no token is left.

    Args:
        values_t: what to average, `f[...,T]`.
        aggregation: `"token_mean"`, `"sequence_mean"` or `"constant_length"`.
        length: what `"constant_length"` divides the sums by, `f[]`, in tokens,
            positive.
        mask_t: whether each token counts, `b[...,T]`: the others are as if left out,
            NaN included. All count if `None`.
        segment_ids: the sequence of each token in its row, `i[...,T]`, in `[0, T)`;
            outside, the result is NaN. Each row is a sequence if `None`.

    Returns:
        The average over everything, `f[]`, in the units of `values_t`.

    Raises:
        ValueError: if a shape breaks its contract, `length` is a Python number and
            not positive, or `aggregation` is unknown.
        TypeError: if `values_t` are not floating-point, `mask_t` is not boolean, or
            `segment_ids` are no integers.

    Example:
        >>> losses, ids = jnp.array([8.0, 2.0, 2.0, 0.0]), jnp.array([0, 1, 1, 1])
        >>> aggregate_tokens(losses, "token_mean", segment_ids=ids).item()
        3.0
        >>> aggregate_tokens(jnp.array([[8.0], [2.0]]), "sequence_mean").item()
        5.0

    References:
        Yu et al., `DAPO: An Open-Source LLM Reinforcement Learning System at Scale
        <https://arxiv.org/abs/2503.14476>`_, 2025.
        Liu et al., `Understanding R1-Zero-Like Training: A Critical Perspective
        <https://arxiv.org/abs/2503.20783>`_, 2025.
    """
    values_t, segment_ids = known(values_t, segment_ids, mask_t)
    counts = counted(values_t, mask_t)
    part, sequences = shares(counts, segment_ids), number_of(counts, segment_ids)
    weights, number = {
        "token_mean": (counts, jnp.sum(counts)),
        "sequence_mean": (part, sequences),
        "constant_length": (counts / length, sequences),
    }[aggregation]
    weights = jnp.where(jnp.isnan(part), part, weights)  # of no sequence at all
    return jnp.sum(weighted(values_t, weights)) / jnp.maximum(number, 1)


@checked
def sequence_log_probs(
    log_prob_t: Annotated[Arg, "f[...,T]"],
    *,
    mask_t: Annotated[Arg | None, "b[...,T]"] = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> Annotated[Array, "f[...]"]:
    r"""Computes the log-probability of each sequence, or its mean over the tokens.

    .. math::
        \log \pi(y) = \sum_t \log \pi(y_t \mid y_{<t}), \qquad
        \text{or} \quad \frac{1}{|y|} \sum_t \log \pi(y_t \mid y_{<t})

    The mean does not favour short sequences: `simpo_loss` and `orpo_loss` take it, and
    other losses do to be normalised by length.

    Args:
        log_prob_t: log-probability of each token, `f[...,T]`, in nats.
        mask_t: whether each token belongs to the sequence, `b[...,T]`: the others, such
            as prompt and padding, are as if left out, NaN included. All do if `None`.
        reduction: `"sum"` or `"mean"` over the tokens.

    Returns:
        The log-probabilities, `f[...]`, in nats; 0 where there are no tokens.

    Raises:
        ValueError: if a shape breaks its contract, or `reduction` is unknown.
        TypeError: if `log_prob_t` is not floating-point, or `mask_t` not boolean.

    Example:
        >>> log_probs, mask = jnp.array([-1.0, -3.0, jnp.nan]), jnp.arange(3) < 2
        >>> sequence_log_probs(log_probs, mask_t=mask, reduction="mean").item()
        -2.0

    References:
        Meng, Xia and Chen, `SimPO: Simple Preference Optimization with a
        Reference-Free Reward <https://arxiv.org/abs/2405.14734>`_, 2024, eq. 3.
    """
    (log_prob_t,) = keep_where(mask_t, log_prob_t)
    total = jnp.sum(log_prob_t, axis=-1)
    if reduction == "sum":
        return total
    return total / jnp.maximum(jnp.sum(counted(log_prob_t, mask_t), axis=-1), 1)


@checked
def token_log_probs(
    logits_t: Annotated[Arg, "f[...,V]"],
    tokens_t: Annotated[Arg, "i[...]"],
    *,
    temperature: Annotated[Arg | None, "f[]", "(0, inf]"] = None,
    mask: Annotated[Arg | None, "b[...,V]"] = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the log-probability of each token, from the logits of a vocabulary.

    .. math::
        \log \pi(a) = z_a - \log \sum_v e^{z_v}, \qquad
        z = \text{logits} / \text{temperature}

    The logits of a batch are the largest array of a training step, and their
    log-softmax would be another. Here only the sum is taken, and what is kept for the
    gradient are the logits themselves: the gradient is the only other array of their
    size. (What leaves tokens out, scales or widens logits may need one more.)

    Args:
        logits_t: logits of the tokens of a vocabulary, `f[...,V]`; one of minus
            infinity rules its token out.
        tokens_t: the token at each position, `i[...]`, in `[0, V)`; outside, the
            result is NaN.
        temperature: what the logits are divided by, `f[]`, in units of logits,
            positive: that with which the tokens were drawn; 1 if `None`.
        mask: which tokens are legal, `b[...,V]`; all are if `None`.
        mask_t: whether each position counts, `b[...]`; at the others the result is 0,
            whatever the logits and the token, NaN included. All count if `None`.

    Returns:
        The log-probabilities, `f[...]`, in nats; minus infinity for a token that is
        ruled out, and NaN, without a gradient, where all of them are.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and not positive.
        TypeError: if the logits are not floating-point, the tokens no integers, or a
            mask not boolean.

    Example:
        >>> logits = jnp.array([[0.0, 90.0], [0.0, 90.0]])
        >>> token_log_probs(logits, jnp.array([0, 1])).tolist()
        [-90.0, 0.0]

    References:
        Shao et al., `DeepSeekMath: Pushing the Limits of Mathematical Reasoning in
        Open Language Models <https://arxiv.org/abs/2402.03300>`_, 2024, section 4.1,
        whose losses are made of them.
    """
    logits, tokens = logits_t, tokens_t.astype(int)
    if temperature is not None or mask is not None:
        logits = scaled_logits(logits, mask, 1 if temperature is None else temperature)
    exists = (tokens >= 0) & (tokens < logits.shape[-1])
    counts = exists if mask_t is None else exists & mask_t
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    shift = jnp.where(jnp.isfinite(highest), highest, 0)
    log_probs = _picked(logits, tokens) - shift - _log_total(logits, shift, counts)
    return keep_where(mask_t, log_probs)[0]


# Derivatives as JAX has them would keep a softmax, and scatter the picked entries into
# an array of zeros. These compute from the logits what they need, when they need it.
_later = functools.partial(jax.checkpoint, prevent_cse=False)


@jax.custom_jvp
def _picked(logits: Array, tokens: Array) -> Array:
    return batched_index(logits, tokens)


@_picked.defjvp
def _picked_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Any]
) -> tuple[Array, Array]:
    @_later
    def slope(tokens: Array, dlogits: Array) -> Array:
        every = jax.lax.broadcasted_iota(int, dlogits.shape, dlogits.ndim - 1)
        return jnp.sum(jnp.where(every == tokens[..., None], dlogits, 0), axis=-1)

    return _picked(*primals), slope(primals[1], tangents[0])


@jax.custom_jvp
def _log_total(logits: Array, shift: Array, counts: Array) -> Array:
    """Returns the logarithm of the sum of exponentials, less a constant shift.

    It has no derivative where nothing counts, nor where all logits are `-inf`.
    """
    return jnp.log(jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1))


@_log_total.defjvp
def _log_total_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Any, Any]
) -> tuple[Array, Array]:
    result = _log_total(*primals)

    @_later
    def slope(
        logits: Array, shift: Array, counts: Array, total: Array, dlogits: Array
    ) -> Array:
        counts &= total != -jnp.inf
        logits, dlogits = keep_where(counts, logits, dlogits)
        shift, total = (x[..., None] for x in keep_where(counts, shift, total))
        return jnp.sum(jnp.exp(logits - shift - total) * dlogits, axis=-1)

    return result, slope(*primals, result, tangents[0])

r"""Prioritised replay: which of the things remembered to learn from, and by how much.

A replay buffer that draws some transitions more often than others needs three numbers
for each. None of them depends on how the buffer is stored or drawn from:

*   its priority, how much there is to learn from it: `proportional_priorities` or
    `rank_priorities` of TD errors, `sequence_priorities` of whole sequences;
*   its probability of being drawn, `prioritized_probabilities`;
*   its weight in the loss, `prioritized_importance_weights`, which undoes the bias of
    drawing it so often.

`pal_loss` does without: it is a loss for uniform draws, whose expected gradient is that
of a Huber loss under prioritised ones. `actor_epsilons` is how the actors of Ape-X
differ, so that there is something new to remember.

A slot that holds nothing yet is left out by `mask`. The exponent of the weights often
rises to 1 while learning: a linear schedule of optax does that.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from rlprims._checks import Arg, checked
from rlprims.arrays import greatest, keep_where, weighted
from rlprims.importance_weights import exponential_weights
from rlprims.losses import Reduction, reduced

__all__ = [
    "actor_epsilons",
    "pal_loss",
    "prioritized_importance_weights",
    "prioritized_probabilities",
    "proportional_priorities",
    "rank_priorities",
    "sequence_priorities",
]

# Priorities


@checked
def proportional_priorities(
    td_errors: Annotated[Arg, "f[...]"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf)"] = 0.0,
    min_priority: Annotated[Arg, "f[]", "[0, inf)"] = 0.0,
    mask: Annotated[Arg | None, "b[...]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes priorities that are the sizes of TD errors.

    .. math::
        p_i = \max(|\delta_i| + \epsilon, \; p_{\min})

    Both settings keep a transition whose error is 0 from never being drawn again.
    Prioritised experience replay adds a small :math:`\epsilon`. LAP, which goes with
    `huber_loss`, has a `min_priority` of 1 in place of it: all errors for which that
    loss is quadratic are drawn alike. The exponent of either is applied by
    `prioritized_probabilities`: for LAP, :math:`\max(|\delta|, 1)^\alpha` is
    :math:`\max(|\delta|^\alpha, 1)`.

    Args:
        td_errors: TD errors :math:`\delta`, `f[...]`.
        epsilon: what is added to each, `f[]`, in the units of `td_errors`, at least 0.
        min_priority: the lowest priority, :math:`p_{\min}`, `f[]`, in the units of
            `td_errors`, at least 0.
        mask: whether each error counts, `b[...]`; the priority of the others is 0, NaN
            included. All count if `None`.

    Returns:
        The priorities, `f[...]`, in the units of `td_errors`.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number
            below 0.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> td_errors = jnp.array([-4.0, 0.25, 0.0])
        >>> proportional_priorities(td_errors, epsilon=0.25).tolist()
        [4.25, 0.5, 0.25]
        >>> proportional_priorities(td_errors, min_priority=1.0).tolist()  # LAP
        [4.0, 1.0, 1.0]

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015.
        Fujimoto, Meger and Precup, `An Equivalence between Loss Functions and
        Non-Uniform Sampling in Experience Replay
        <https://arxiv.org/abs/2007.06049>`_, 2020, for LAP.
    """
    (sizes,) = keep_where(mask, jnp.abs(td_errors))
    (priorities,) = keep_where(mask, jnp.maximum(sizes + epsilon, min_priority))
    return priorities


@checked
def rank_priorities(
    td_errors: Annotated[Arg, "f[N]"],
    *,
    mask: Annotated[Arg | None, "b[N]"] = None,
) -> Annotated[Array, "f[N]"]:
    r"""Computes priorities that depend on the order of TD errors alone.

    .. math::
        p_i = \frac{1}{\text{rank}(i)}

    where the largest :math:`|\delta_i|` has rank 1. No error is so large that it
    crowds out the others. Of equal errors the first has the better rank.

    The ranks are those among the errors given, and exact. The paper lets them grow
    stale in a buffer, to sort it seldom.

    Args:
        td_errors: TD errors :math:`\delta` of all that may be drawn, `f[N]`. One that
            is NaN has the priority NaN, and comes last.
        mask: whether each error counts, `b[N]`; the others have no rank and priority
            0, NaN included. All count if `None`.

    Returns:
        The priorities, `f[N]`, dimensionless, in `[0, 1]`. They have no gradient.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> td_errors, mask = jnp.array([1.0, -3.0, 7.0]), jnp.array([1, 1, 0]) > 0
        >>> rank_priorities(td_errors, mask=mask).tolist()
        [0.5, 1.0, 0.0]

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015.
    """
    sizes = stop_gradient(jnp.abs(td_errors))
    descending = -sizes if mask is None else jnp.where(mask, -sizes, jnp.inf)
    ranks = jnp.argsort(jnp.argsort(descending, stable=True)) + 1
    priorities = jnp.where(jnp.isnan(sizes), jnp.nan, 1 / ranks.astype(sizes.dtype))
    return keep_where(mask, priorities)[0]


@checked
def sequence_priorities(
    td_errors_t: Annotated[Arg, "f[T]"],
    *,
    max_priority_weight: Annotated[Arg, "f[]", "[0, 1]"] = 0.9,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the priority of a sequence from the TD errors of its steps.

    .. math::
        p = \eta \max_t |\delta_t| + (1 - \eta) \frac1T \sum_t |\delta_t|

    A mean alone would let one large error vanish among many small ones, and all long
    sequences have much the same.

    Args:
        td_errors_t: TD errors :math:`\delta_t`, `f[T]`.
        max_priority_weight: how much the largest counts against the mean,
            :math:`\eta`, `f[]`, dimensionless, in `[0, 1]`.
        mask_t: whether each step counts, `b[T]`: the others, such as padding and the
            steps of a burn-in, are as if left out, NaN included. All count if `None`.

    Returns:
        The priority, `f[]`, in the units of `td_errors_t`; 0 if no step counts.

    Raises:
        ValueError: if a shape breaks its contract, or `max_priority_weight` is a
            Python number outside `[0, 1]`; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> td_errors_t = jnp.array([1.0, -3.0, jnp.nan])
        >>> mask_t = jnp.array([True, True, False])
        >>> sequence_priorities(
        ...     td_errors_t, max_priority_weight=0.5, mask_t=mask_t
        ... ).item()  # 0.5 * 3 + 0.5 * 2
        2.5

    References:
        Kapturowski et al., `Recurrent Experience Replay in Distributed Reinforcement
        Learning <https://openreview.net/forum?id=r1lyTjAqYX>`_, 2019.
    """
    (sizes,) = keep_where(mask_t, jnp.abs(td_errors_t))
    count = len(sizes) if mask_t is None else jnp.sum(mask_t, dtype=sizes.dtype)
    mean = jnp.sum(sizes) / jnp.maximum(count, 1)
    largest = jnp.max(sizes, initial=0)
    eta = max_priority_weight
    return weighted(largest, eta) + weighted(mean, 1 - eta)


# Probabilities and weights


@checked
def prioritized_probabilities(
    priorities: Annotated[Arg, "f[N]", "[0, inf)"],
    *,
    priority_exponent: Annotated[Arg, "f[]", "[0, inf)"],
    mask: Annotated[Arg | None, "b[N]"] = None,
) -> Annotated[Array, "f[N]"]:
    r"""Computes how likely each slot of a replay buffer is to be drawn.

    .. math::
        P_i = \frac{p_i^\alpha}{\sum_j p_j^\alpha}

    They are computed from logarithms, so that no power overflows or vanishes. What the
    formula leaves open:

    *   :math:`0^0` is 1: with an exponent of 0 all filled slots are drawn alike, those
        of priority 0 too;
    *   where every filled slot has priority 0, all filled slots are drawn alike, as
        nothing tells them apart;
    *   where no slot is filled, all probabilities are 0.

    Args:
        priorities: priorities :math:`p` of all slots, `f[N]`, finite and at least 0,
            in any unit.
        priority_exponent: how much priorities count, :math:`\alpha`, `f[]`,
            dimensionless, at least 0: uniform with 0, proportional with 1.
        mask: whether each slot is filled, `b[N]`; the probability of the others is 0,
            whatever their priority, NaN included. All are filled if `None`.

    Returns:
        The probabilities, `f[N]`, dimensionless, summing to 1, or all 0.

    Raises:
        ValueError: if a shape breaks its contract, or `priority_exponent` is a Python
            number below 0.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> priorities = jnp.array([9.0, 1.0, 0.0])
        >>> prioritized_probabilities(
        ...     priorities, priority_exponent=0.5
        ... ).round(2).tolist()
        [0.75, 0.25, 0.0]

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015.
    """
    filled = jnp.ones(priorities.shape, bool) if mask is None else mask
    (priorities,) = keep_where(filled, priorities)
    zero = priorities == 0
    never = zero & (priority_exponent != 0) & ~jnp.all(zero)
    scores = priority_exponent * jnp.log(jnp.where(zero, 1, priorities))
    scores = jnp.where(never, -jnp.inf, scores)
    counts, heat = filled.astype(scores.dtype), jnp.ones_like(priority_exponent)
    probabilities, _ = exponential_weights(scores, counts, heat)
    return keep_where(filled, probabilities)[0]


@checked
def prioritized_importance_weights(
    probabilities: Annotated[Arg, "f[...]", "[0, 1]"],
    *,
    importance_exponent: Annotated[Arg, "f[]", "[0, inf)"],
    reference_probability: Annotated[Arg | None, "f[]", "(0, 1]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the weights in the loss of transitions that were drawn by priority.

    .. math::
        w_i = \frac{(N P_i)^{-\beta}}{\max_j (N P_j)^{-\beta}}
            = \Bigl(\frac{\min_j P_j}{P_i}\Bigr)^\beta

    With :math:`\beta = 1` the weighted gradient is that of uniform draws, up to its
    size. The size :math:`N` of the buffer cancels. The paper divides by the largest
    weight, so that weights only ever scale an update down, and leaves open the largest
    of what; popular code takes either of

    *   those drawn, which is the default as it needs nothing else: the largest weight
        of every batch is 1, but the weight of one transition depends on which others
        were drawn with it;
    *   those in the whole buffer: pass the smallest probability in it, of a filled
        slot and above 0, as the `reference_probability`.

    For weights that are not divided, :math:`(N P_i)^{-\beta}`, pass :math:`1 / N`.

    Args:
        probabilities: the probability :math:`P` of each transition drawn, `f[...]`,
            dimensionless, in `[0, 1]`. What has probability 0 cannot have been drawn:
            its weight is 0 and it does not count, so that it can stand for padding.
        importance_exponent: how much of the bias to undo, :math:`\beta`, `f[]`,
            dimensionless, at least 0: none of it with 0, and all of it with 1.
        reference_probability: the probability whose weight is 1, `f[]`,
            dimensionless, in `(0, 1]`; that of the least likely of `probabilities` if
            `None`.

    Returns:
        The weights, `f[...]`, dimensionless; at most 1 if no probability is below the
        reference.

    Raises:
        ValueError: if a shape breaks its contract, or an argument is a Python number
            out of range.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> probabilities = jnp.array([0.5, 0.125, 0.25])
        >>> prioritized_importance_weights(
        ...     probabilities, importance_exponent=1.0
        ... ).tolist()
        [0.25, 1.0, 0.5]
        >>> prioritized_importance_weights(
        ...     probabilities, importance_exponent=1.0, reference_probability=0.0625
        ... ).tolist()
        [0.125, 0.5, 0.25]

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015.
    """
    drawn = probabilities != 0
    probabilities = jnp.where(drawn, probabilities, 2)  # which is never the least
    if reference_probability is None:
        reference_probability = -greatest(-probabilities.ravel(), initial=-2.0)
    ratios = reference_probability / probabilities
    return jnp.where(drawn, ratios**importance_exponent, 0)


# A loss in place of priorities


@checked
def pal_loss(
    td_errors: Annotated[Arg, "f[...]"],
    *,
    priority_exponent: Annotated[Arg, "f[]", "[0, inf)"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the prioritised approximation loss (PAL) of TD errors.

    .. math::
        L_i = \frac1\lambda \begin{cases}
            \tfrac12 \delta_i^2 & |\delta_i| \le 1 \\
            |\delta_i|^{1 + \alpha} / (1 + \alpha) & \text{otherwise}
        \end{cases}, \qquad
        \lambda = \frac1N \sum_j \max(|\delta_j|^\alpha, 1)

    For transitions drawn uniformly it does, in expectation, what LAP does by drawing
    them with probabilities :math:`p_i / \sum_j p_j`, where :math:`p_i =
    \max(|\delta_i|^\alpha, 1)`, and taking their `huber_loss`. That has the slope
    :math:`h_i = \max(-1, \min(\delta_i, 1))`, and the slope of :math:`L_i` is
    :math:`p_i h_i / \lambda`, where :math:`\lambda = \frac1N \sum_j p_j`. Hence

    .. math::
        \sum_i \frac{p_i}{\sum_j p_j} \, h_i \nabla \delta_i
            = \frac1N \sum_i \frac{p_i h_i}{\lambda} \nabla \delta_i

    which holds for a constant :math:`\lambda`: so it always is when differentiating.
    It is that of the batch, in place of the buffer. The value, but not the slope, jumps
    where :math:`|\delta| = 1`, as in the paper.

    Args:
        td_errors: TD errors :math:`\delta`, `f[...]`.
        priority_exponent: how much large errors count, :math:`\alpha`, `f[]`,
            dimensionless, at least 0: with 0 the slopes are those of `huber_loss`, and
            with 1 those of `l2_loss` over :math:`\lambda`.
        mask_t: whether each error counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the errors that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each error, `f[]|f[...]`, in units of `td_errors` to the
        power of 2 where they are small.

    Raises:
        ValueError: if a shape breaks its contract, or `priority_exponent` is a Python
            number below 0.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> td_errors = jnp.array([1.0, -3.0])
        >>> pal_loss(td_errors, priority_exponent=1.0, reduction="none").tolist()
        [0.25, 2.25]

    References:
        Fujimoto, Meger and Precup, `An Equivalence between Loss Functions and
        Non-Uniform Sampling in Experience Replay
        <https://arxiv.org/abs/2007.06049>`_, 2020.
    """
    (td_errors,) = keep_where(mask_t, td_errors)
    small = jnp.abs(td_errors) <= 1
    sizes = jnp.abs(jnp.where(small, 1, td_errors))
    powers = jnp.exp(priority_exponent * jnp.log(sizes))  # NaN if the exponent is
    large = sizes * powers / (1 + priority_exponent)
    losses = jnp.where(small, 0.5 * jnp.where(small, td_errors, 0) ** 2, large)
    scale = stop_gradient(reduced(powers, mask_t, "mean"))
    return reduced(losses / scale, mask_t, reduction)


# Actors


@checked
def actor_epsilons(
    actor_index: Annotated[Arg, "i[...]"],
    num_actors: Annotated[Arg, "i[]", "[1, inf)"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, 1]"] = 0.4,
    exponent: Annotated[Arg, "f[]", "[0, inf)"] = 7.0,
) -> Annotated[Array, "f[...]"]:
    r"""Computes how often each actor of Ape-X takes a random action.

    .. math::
        \epsilon_i = \epsilon^{1 + \alpha \frac{i}{N - 1}}

    The first actor explores the most and the last the least, each all along, so that
    together they fill the buffer with all kinds of behaviour. A single actor has the
    :math:`\epsilon` of the first.

    Args:
        actor_index: which actor, :math:`i`, `i[...]`, in `[0, num_actors)`; the result
            is NaN for any other.
        num_actors: the number :math:`N` of actors, `i[]`, at least 1. An array may be
            traced, and is not checked.
        epsilon: the probability of a random action of the first actor, `f[]`,
            dimensionless, in `[0, 1]`.
        exponent: how much less the last actor explores, :math:`\alpha`, `f[]`,
            dimensionless, at least 0.

    Returns:
        The probabilities of a random action, `f[...]`, dimensionless, for
        `epsilon_greedy`.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of range.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> actor_epsilons(jnp.arange(3), 3, epsilon=0.5, exponent=2.0).tolist()
        [0.5, 0.25, 0.125]

    References:
        Horgan et al., `Distributed Prioritized Experience Replay
        <https://arxiv.org/abs/1803.00933>`_, 2018.
    """
    index, number = (x.astype(epsilon.dtype) for x in (actor_index, num_actors))
    exists = (index >= 0) & (index < number)
    part = jnp.where(exists, index, 0) / jnp.maximum(number - 1, 1)
    return jnp.where(exists, epsilon ** (1 + exponent * part), jnp.nan)

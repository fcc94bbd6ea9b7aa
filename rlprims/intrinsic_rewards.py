r"""Rewards that an agent gives itself for what is new to it.

`episodic_memory_intrinsic_rewards` pays for observations that are unlike those
remembered. Embeddings of observations are compared with their nearest neighbours in a
memory, and the reward falls with how similar they are. The memory is a ring: it starts
empty, and once it is full the newest embeddings replace the oldest. Start a new one
for each episode to reward what is new within the episode.

All of it is held in an `IntrinsicRewardState`, which each call takes and returns. A
slot of the memory that holds infinity is empty.

`never_give_up_rewards` multiplies such rewards by how new an observation is over the
whole life of the agent, as the error of a prediction tells; see `curiosity`. What is
known from earlier episodes is then worth no more than novelty within this one:

    >>> error_t = jnp.array([1.0, 3.0, 8.0])  # of random network distillation
    >>> errors = RunningStatistics(jnp.array(2.0), jnp.array(1.0), 50.0)
    >>> never_give_up_rewards(errors, jnp.array([0.5, 0.5, 0.5]), error_t).tolist()
    [0.5, 1.0, 2.5]
"""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import keep_where, root, weighted
from rlprims.memory import knn_query
from rlprims.running_statistics import (
    RunningStatistics,
    normalize_by_running_statistics,
)

__all__ = [
    "IntrinsicRewardState",
    "episodic_memory_intrinsic_rewards",
    "never_give_up_rewards",
]

# So many distances are counted to the last one in single precision. Beyond them the
# mean is a moving one, which forgets.
_MOST_DISTANCES = 2**24


class IntrinsicRewardState(NamedTuple):
    """What was seen, and how far apart it was.

    Attributes:
        memory: embeddings seen before, `f[M,D]`, infinite where there is none.
        next_memory_index: the slot to write next, `i[]`, in `[0, M)`.
        distance_sum: sum of the squared distances to neighbours so far, `f[]`, in
            single precision at least: it soon outgrows half.
        distance_count: the number of them, `i[]`.
    """

    memory: Annotated[Arg, "f[M,D]"]
    next_memory_index: Annotated[Arg, "i[]"] = 0
    distance_sum: Annotated[Arg, "f[]", "running"] = 0
    distance_count: Annotated[Arg, "i[]"] = 0


@checked
def episodic_memory_intrinsic_rewards(
    embeddings: Annotated[Arg, "f[B,D]"],
    num_neighbors: int,
    reward_scale: Annotated[Arg, "f[]"],
    intrinsic_reward_state: IntrinsicRewardState | None = None,
    constant: Annotated[Arg, "f[]", "[0, inf)"] = 1e-3,
    epsilon: Annotated[Arg, "f[]", "(0, inf)"] = 1e-4,
    cluster_distance: Annotated[Arg, "f[]", "[0, inf]"] = 8e-3,
    max_similarity: Annotated[Arg, "f[]", "[0, inf]"] = 8.0,
    max_memory_size: int = 30000,
    *,
    distance_constant: Annotated[Arg | None, "f[]", "[0, inf)"] = None,
) -> tuple[Annotated[Array, "f[B]"], IntrinsicRewardState]:
    r"""Rewards embeddings for being far from their neighbours in a memory.

    .. math::
        s_b = \sqrt{\sum_k \frac{\epsilon}{\epsilon + \max\Bigl(
            \frac{d_{bk}^2}{\overline{d^2} + c'} - \xi, \, 0\Bigr)}} + c,
        \qquad
        r_b = \begin{cases}
            \text{reward\_scale} / s_b & s_b \le \text{max\_similarity} \\
            0 & \text{otherwise}
        \end{cases}

    The :math:`d_{bk}` are Euclidean distances to the nearest neighbours in the memory
    as it was before this batch, and :math:`\overline{d^2}` is the mean of their squares
    over all calls, this one included. Where this mean is far above the constant `c'`,
    the rewards do not depend on the scale of the embeddings. An empty slot is no
    neighbour: it adds nothing to either sum. Only the last 17 million distances, or
    about as many, count towards the mean.

    The kernel of the paper divides by the mean alone: :math:`c'` is 0. By default it is
    :math:`c`, as in RLax, so that noise is not new where all distances are tiny. And a
    batch is compared with the memory before it, where the paper takes observations one
    at a time: scan over batches of one to do the same.

    The first call, without a state, starts from a memory of `num_neighbors` zeros.

    Args:
        embeddings: what to reward, and remember, `f[B,D]`. Where it is not finite, the
            reward is NaN, and it is no neighbour of others.
        num_neighbors: how many neighbours to compare with, a Python `int` from 1 to
            `max_memory_size`.
        reward_scale: what to multiply the rewards by, `f[]`, in units of reward.
        intrinsic_reward_state: what was seen before; `None` to start.
        constant: :math:`c`, `f[]`, not negative, which keeps the rewards finite.
        epsilon: :math:`\epsilon`, `f[]`, dimensionless, positive: the relative
            squared distance at which a neighbour counts half.
        cluster_distance: :math:`\xi`, `f[]`, dimensionless, not negative: the relative
            squared distance up to which points are the same.
        max_similarity: the similarity above which there is no reward, `f[]`,
            dimensionless, not negative.
        max_memory_size: the number of slots of the memory, a Python `int`, that of
            the state if there is one.
        distance_constant: :math:`c'`, `f[]`, in units of squared distance, not
            negative; `constant` if `None`.

    Returns:
        The rewards, `f[B]`, in units of `reward_scale`, and the next state: a memory
        `f[M,D]` with `M = max_memory_size`, an index `i[]`, and a sum and a number of
        distances, `f[]` and `i[]`.

    Raises:
        ValueError: if a shape breaks its contract, the memory has not
            `max_memory_size` slots, or a setting is a Python number out of its range.
        TypeError: if an argument has the wrong dtype, or is no state.

    Example:
        >>> memory = jnp.array([[0.0, 0.0], [jnp.inf, jnp.inf]])
        >>> rewards, state = episodic_memory_intrinsic_rewards(
        ...     jnp.array([[0.0, 0.0], [3.0, 4.0]]), num_neighbors=1, reward_scale=1.0,
        ...     intrinsic_reward_state=IntrinsicRewardState(memory), max_memory_size=2
        ... )
        >>> bool(rewards[0] < 1.0), bool(rewards[1] > 100.0)
        (True, True)
        >>> state.distance_sum.item(), state.distance_count.item()
        (25.0, 2)

    References:
        Puigdomènech Badia et al., `Never Give Up: Learning Directed Exploration
        Strategies <https://arxiv.org/abs/2002.06038>`_, 2020.
    """
    if not 1 <= num_neighbors <= max_memory_size:
        raise ValueError(
            "episodic_memory_intrinsic_rewards: num_neighbors must be in "
            f"[1, {max_memory_size}], up to max_memory_size, got {num_neighbors}."
        )
    state = intrinsic_reward_state
    if state is None:
        state = _start(embeddings, num_neighbors, max_memory_size)
    if state.memory.shape[0] != max_memory_size:
        raise ValueError(
            "episodic_memory_intrinsic_rewards: intrinsic_reward_state.memory has "
            f"shape {state.memory.shape}, expected f[M,D] with M = max_memory_size = "
            f"{max_memory_size}."
        )
    squares = -knn_query(state.memory, embeddings, num_neighbors).neighbor_neg_distances
    near = jnp.isfinite(squares)
    (squares,) = keep_where(near, squares)
    total, count = _counted(state, jnp.sum(squares), jnp.sum(near))
    typical = total / jnp.maximum(count, 1).astype(total.dtype)
    typical += constant if distance_constant is None else distance_constant
    ratios = squares / jnp.where(typical == 0, 1, typical)
    kernels = epsilon / (epsilon + jnp.maximum(ratios - cluster_distance, 0))
    (kernels,) = keep_where(near, kernels)
    similarity = root(jnp.sum(kernels, axis=1)) + constant
    rewards = jnp.where(similarity > max_similarity, 0, reward_scale / similarity)
    known = jnp.isfinite(embeddings).all(axis=1) & ~jnp.isnan(max_similarity)
    rewards = jnp.where(known, rewards, jnp.nan)
    memory, index = _written(state.memory, state.next_memory_index, embeddings)
    return rewards, IntrinsicRewardState(memory, index, total, count)


@checked
def never_give_up_rewards(
    state: RunningStatistics,
    r_t: Annotated[Arg, "f[N,...]"],
    error_t: Annotated[Arg, "f[N,...]"],
    *,
    max_modulation: Annotated[Arg, "f[]", "[1, inf]"] = 5.0,
    mask_t: Annotated[Arg | None, "b[N,...]"] = None,
) -> Annotated[Array, "f[N,...]"]:
    r"""Multiplies episodic rewards by how new observations are to the agent.

    .. math::
        r'_t = r_t \min(\max(\alpha_t, 1), L), \qquad
        \alpha_t = 1 + \frac{e_t - m}{\sqrt v}

    where :math:`m` and :math:`v` are the mean and the variance of all errors so far.
    An error below the mean changes nothing: a reward never becomes smaller.

    Args:
        state: the statistics of the errors, from `update_running_statistics`. Those of
            a single number are for errors of `f[N]`.
        r_t: episodic rewards, such as those of `episodic_memory_intrinsic_rewards`,
            `f[N,...]`, in units of reward.
        error_t: errors :math:`e` of a prediction of the same observations, such as the
            `prediction_error_rewards` of random network distillation, `f[N,...]`.
        max_modulation: the most to multiply by :math:`L`, `f[]`, dimensionless, at
            least 1.
        mask_t: whether each step counts, `b[N,...]`: the others, padding say, have a
            reward of 0, whatever they hold. All count if `None`.

    Returns:
        The rewards, `f[N,...]`, in units of reward. They are `r_t` where errors have no
        variance, and before there are any.

    Raises:
        ValueError: if a shape breaks its contract, or `max_modulation` is a Python
            number below 1.
        TypeError: if an argument has the wrong dtype, or is no state.

    Example:
        >>> state = RunningStatistics(jnp.array(2.0), jnp.array(4.0), 9.0)
        >>> r_t, error_t = jnp.array([3.0, 3.0, 3.0]), jnp.array([4.0, 0.0, 90.0])
        >>> never_give_up_rewards(state, r_t, error_t).tolist()
        [6.0, 3.0, 15.0]

    References:
        Puigdomènech Badia et al., `Never Give Up: Learning Directed Exploration
        Strategies <https://arxiv.org/abs/2002.06038>`_, 2020.
    """
    r_t, error_t = keep_where(mask_t, r_t, error_t)
    deviations = normalize_by_running_statistics(state, error_t, epsilon=0.0)
    alpha = 1 + jnp.where(state.count == 0, 0, deviations)
    return weighted(jnp.clip(alpha, 1, max_modulation), r_t)


def _start(embeddings: Array, num_neighbors: int, size: int) -> IntrinsicRewardState:
    """Returns an empty memory, but for zeros to compare the first embeddings with."""
    empty = jnp.arange(size)[:, None] >= num_neighbors
    memory = jnp.where(empty, jnp.inf, jnp.zeros((size, embeddings.shape[1])))
    zero = jnp.zeros((), int)
    sums = jnp.zeros((), embeddings.dtype)
    return IntrinsicRewardState(memory.astype(embeddings.dtype), zero, sums, zero)


def _counted(
    state: IntrinsicRewardState, total: Array, count: Array
) -> tuple[Array, Array]:
    """Adds distances to those before, all of which lose weight if they are too many."""
    total = state.distance_sum + total
    count = state.distance_count + count.astype(state.distance_count.dtype)
    many = count > _MOST_DISTANCES
    return jnp.where(many, total / 2, total), jnp.where(many, count // 2, count)


def _written(memory: Array, index: Array, new: Array) -> tuple[Array, Array]:
    """Writes into a ring, from an index on; the newest stay if there are too many."""
    size, number = memory.shape[0], new.shape[0]
    kept = min(size, number)
    slots = (index + (number - kept) + jnp.arange(kept, dtype=index.dtype)) % size
    return memory.at[slots].set(new[number - kept :]), (index + number) % size

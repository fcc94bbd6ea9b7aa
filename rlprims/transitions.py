r"""Trajectories made into what a replay buffer stores, or takes out of it.

*   `n_step_transitions` folds `n` rewards into one, for each step to start from;
*   `split_burn_in` sets apart the steps of a sequence that only warm up the state of a
    recurrent network;
*   `hindsight_goal_indices` picks the goals that a trajectory has achieved, to learn
    from it as if one of them had been asked for.

A trajectory may hold several episodes, and padding: a zero discount marks a
termination, `truncation_t` a time limit, and `mask_t` what to leave out, as everywhere
in this package. Nothing is folded or picked across the end of an episode.
"""

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.recurrences import last_steps, numbered
from rlprims.returns import n_step_bootstrapped_returns

__all__ = [
    "NStepTransitions",
    "hindsight_goal_indices",
    "n_step_transitions",
    "split_burn_in",
]

Tree = Any
Strategy = Literal["future", "final", "episode"]


class NStepTransitions(NamedTuple):
    """Transitions over several steps, one for each step to start from.

    Attributes:
        r_t: sums of rewards, `f[T]`, each discounted to the start.
        discount_t: products of discounts, `f[T]`, dimensionless: what the value to
            bootstrap from counts for. They are 0 where the episode terminates.
        last_t: the last step folded in, `i[T]`: the value to bootstrap from is that of
            the observation after this step.
    """

    r_t: Annotated[Array, "f[T]"]
    discount_t: Annotated[Array, "f[T]"]
    last_t: Annotated[Array, "i[T]"]


@checked
def n_step_transitions(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    n: Annotated[int | Array, "i[]", "[1, inf)"],
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> NStepTransitions:
    r"""Folds the rewards of `n` steps into one, for each step to start from.

    .. math::
        R_t = \sum_{i < m} \Bigl(\prod_{j < i} \gamma_{t + j}\Bigr) r_{t + i}, \qquad
        D_t = \prod_{j < m} \gamma_{t + j}, \qquad e_t = t + m - 1

    where :math:`m` is `n`, or less where the episode ends before: at a termination, at
    a time limit, or at the end of the trajectory. At the last two the transition is
    merely shorter, and bootstraps from the observation after step :math:`e_t`.

    With the value :math:`v_{e_t}` of that observation, :math:`R_t + D_t \, v_{e_t}` is
    what `n_step_bootstrapped_returns` gives: what is folded once and stored can be
    bootstrapped from a network that has changed since. To look up the observation,
    index with the result: `jax.tree.map(lambda x: x[result.last_t], observation_t)`.

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        n: number of steps to fold, `i[]`, at least 1; may exceed `T`. A Python `int`
            is fixed while tracing; an array may be traced, and is not checked.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            nothing is folded beyond. None was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included, and not counted in `n`. All count if `None`.

    Returns:
        Rewards in the units of `r_t`, `f[T]`; discounts, dimensionless, `f[T]`; and
        the last steps, `i[T]`. At steps that do not count, 0, 0 and the step itself.

    Raises:
        ValueError: if a shape breaks its contract, or `n` is below 1; use `jax.vmap`
            for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> discount_t = jnp.array([0.5, 0.5, 0.0, 0.5])
        >>> folded = n_step_transitions(jnp.ones(4), discount_t, 2)
        >>> folded.r_t.tolist(), folded.discount_t.tolist(), folded.last_t.tolist()
        ([1.5, 1.5, 1.0, 1.0], [0.25, 0.0, 0.0, 0.5], [1, 2, 2, 3])

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 7.1.
    """
    none, one, here = jnp.zeros_like(r_t), jnp.ones_like(r_t), jnp.arange(len(r_t))
    ends = _ends(discount_t, truncation_t, mask_t)

    def fold(r_t: Array, discount_t: Array, v_t: Array, cut_t: Array | None) -> Array:
        return n_step_bootstrapped_returns(
            r_t, discount_t, v_t, n, truncation_t=cut_t, mask_t=mask_t
        )

    rewards = fold(r_t, discount_t, none, truncation_t)
    discounts = fold(none, discount_t, one, truncation_t)
    # Without discounts, what is bootstrapped from shows: here, the number of the step.
    last_t = fold(none, one, here.astype(r_t.dtype), ends).astype(here.dtype)
    last_t = last_t if mask_t is None else jnp.where(mask_t, last_t, here)
    return NStepTransitions(rewards, discounts, last_t)


def split_burn_in(tree: Tree, burn_in: int) -> tuple[Tree, Tree]:
    r"""Splits a stored sequence into its burn-in and the steps to learn from.

    .. math::
        x_{0 \dots T-1} \; \to \; x_{0 \dots b-1}, \; x_{b \dots T-1}

    A recurrent network whose stored state is out of date is unrolled over the first
    steps of a sequence for the sake of the state alone. That state is a constant when
    differentiating::

        warm_up, learn = split_burn_in(sequence, burn_in)
        _, state = unroll(params, warm_up, stored_state)
        outputs, _ = unroll(params, learn, jax.lax.stop_gradient(state))

    Args:
        tree: arrays of any dtype, time first, `[T,...]`, with the same `T`.
        burn_in: the number of steps :math:`b` in the burn-in, a Python `int`, at least
            0 and below `T`.

    Returns:
        The tree with the first `burn_in` steps of each array, and that with the
        others. A NumPy array stays one, and is not copied.

    Raises:
        ValueError: if `burn_in` is negative or leaves nothing to learn from, or
            something in `tree` has no time axis or one of another length.
        TypeError: if `burn_in` is no Python `int`.

    Example:
        >>> sequence = {"r_t": jnp.array([1.0, 2.0, 3.0])}
        >>> warm_up, learn = split_burn_in(sequence, 1)
        >>> warm_up["r_t"].tolist(), learn["r_t"].tolist()
        ([1.0], [2.0, 3.0])

    References:
        Kapturowski et al., `Recurrent Experience Replay in Distributed Reinforcement
        Learning <https://openreview.net/forum?id=r1lyTjAqYX>`_, 2019.
    """
    if type(burn_in) is not int:
        raise TypeError(
            "split_burn_in: burn_in must be a Python int, fixed while tracing, got "
            f"{type(burn_in).__name__}."
        )
    steps = None
    for path, x in jax.tree.leaves_with_path(tree):
        shape, name = np.shape(x), f"tree{jax.tree_util.keystr(path)}"
        steps = shape[0] if shape and steps is None else steps
        if shape[:1] != (steps,):
            expected = "[T,...]" + (f" with T = {steps}" if steps is not None else "")
            raise ValueError(
                f"split_burn_in: {name} has shape {shape}, expected {expected}."
            )
    if burn_in < 0 or (steps is not None and burn_in >= steps):
        raise ValueError(
            f"split_burn_in: burn_in must be in [0, T) with T = {steps}, got {burn_in}."
        )
    tree = jax.tree.map(lambda x: x if hasattr(x, "shape") else np.asarray(x), tree)
    return tuple(
        jax.tree.map(lambda x, part=part: x[part], tree)
        for part in (slice(burn_in), slice(burn_in, None))
    )


@checked
def hindsight_goal_indices(
    key: Annotated[Arg, "k[]"],
    discount_t: Annotated[Arg, "f[T]"],
    *,
    relabel_probability: Annotated[Arg, "f[]|f[T]", "[0, 1]"],
    strategy: Strategy = "future",
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "i[T]"]:
    r"""Draws for each step one of its episode, whose outcome is to be its goal.

    .. math::
        g_t \sim \begin{cases}
            \text{Uniform}\{t, \dots, e_t\} & \text{future} \\
            e_t & \text{final} \\
            \text{Uniform}\{b_t, \dots, e_t\} & \text{episode}
        \end{cases}

    where the episode of step :math:`t` begins with step :math:`b_t` and ends with
    :math:`e_t`. The outcome of a step is the goal achieved in the observation after
    it, so that in the future of a step is its own. The observation that an episode
    starts with is no outcome. An episode that goes on beyond the trajectory ends, here,
    with the trajectory.

    A step keeps its goal with probability `1 - relabel_probability`, which gives -1.
    The paper stores `k` copies with new goals beside each transition: a probability of
    `k / (1 + k)` is that mixture, in expectation. What reward the new goal gives is
    for the caller to compute::

        relabelled = index_t >= 0
        goal_t = replace_masked(goal_t, achieved_t[index_t], relabelled)
        r_t = reward(achieved_t, goal_t)

    Args:
        key: a random key, `k[]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless; 0 on termination,
            which is all that is looked at.
        relabel_probability: how likely a step is to get a new goal, `f[]|f[T]`,
            dimensionless, in `[0, 1]`. Of a traced number out of range, all goals stay.
        strategy: `"future"`, `"final"` or `"episode"`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`.
            None was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, give -1 and
            are not picked. All count if `None`.

    Returns:
        The step whose outcome is the new goal, `i[T]`, in `[0, T)`; -1 where the goal
        stays.

    Raises:
        ValueError: if a shape breaks its contract, `strategy` is not one of the three,
            or `relabel_probability` is a Python number outside `[0, 1]`.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> discount_t = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])
        >>> hindsight_goal_indices(
        ...     jax.random.key(0), discount_t, relabel_probability=1.0, strategy="final"
        ... ).tolist()
        [2, 2, 2, 4, 4]

    References:
        Andrychowicz et al., `Hindsight Experience Replay
        <https://arxiv.org/abs/1707.01495>`_, 2017.
    """
    counts, number, order = numbered(mask_t, len(discount_t))
    ends = last_steps(discount_t, truncation_t, mask_t)
    last, is_last = number[ends], ends == jnp.arange(len(ends))
    first = jnp.append(0, jax.lax.cummax(jnp.where(is_last, number + 1, 0)))[:-1]
    low = {"future": number, "final": last, "episode": first}[strategy]
    draw_key, keep_key = jax.random.split(key)
    drawn = jax.random.randint(draw_key, number.shape, low, last + 1)
    relabelled = jax.random.bernoulli(keep_key, relabel_probability, number.shape)
    return jnp.where(counts & relabelled, order[drawn], -1)


def _ends(discount_t: Array, truncation_t: Array | None, mask_t: Array | None) -> Array:
    """Returns where an episode ends, either way; padding knows of time limits alone."""
    terminated = discount_t == 0 if mask_t is None else (discount_t == 0) & mask_t
    return terminated if truncation_t is None else terminated | truncation_t

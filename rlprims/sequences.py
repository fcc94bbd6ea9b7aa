"""Trajectories cut into pieces, and step types that tell where episodes end."""

import functools
from typing import Annotated

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg, bounded, checked

__all__ = [
    "extract_subsequences",
    "fix_step_type_on_interruptions",
    "sample_start_indices",
]


@bounded
def extract_subsequences(
    trajectories: Arg,
    start_indices: Arg,
    subsequence_len: Annotated[int, "i[]", "[0, inf)"] = 1,
    max_valid_start_idx: Annotated[int | Array, "i[]", "[0, inf)"] | None = None,
) -> Array:
    r"""Cuts subsequences of one length out of each trajectory of a batch.

    .. math::
        y_{l,b,n} = x_{\,s_{b,n} + l,\; b}

    A start index that is negative, or so late that its subsequence would run off the
    end, is a mistake that cannot be refused while tracing. The subsequence is then NaN
    throughout, and passes no gradient. Integers and booleans have no NaN, so there it
    holds the lowest integer (the highest, if unsigned) or `True`.

    Args:
        trajectories: a batch of trajectories, time first, `[T,B,...]`, of any dtype.
        start_indices: the times :math:`s_{b,n}` at which the subsequences of each
            trajectory start, integers `[B,N]`, in `[0, max_valid_start_idx]`.
        subsequence_len: the length `L` of each subsequence, a Python `int`.
        max_valid_start_idx: the last time at which one may start: a Python `int`, at
            most `T - L`, or an array `i[]`, which may be traced; `None` for `T - L`.

    Returns:
        The subsequences, `[L,B,N,...]`, in the dtype and the units of `trajectories`.

    Raises:
        ValueError: if a shape breaks its contract, or `subsequence_len` or
            `max_valid_start_idx` is negative or too large for `T` steps.
        TypeError: if `start_indices` is not an integer, or `subsequence_len` no Python
            `int`.

    Example:
        >>> trajectories = jnp.array([[0.0], [1.0], [2.0], [3.0]])
        >>> starts = jnp.array([[0, 2, 3]])
        >>> extract_subsequences(trajectories, starts, 2)[:, 0].tolist()
        [[0.0, 2.0, nan], [1.0, 3.0, nan]]
    """
    data, starts = jnp.asarray(trajectories), jnp.asarray(start_indices)
    last = _last_start(data, starts, subsequence_len, max_valid_start_idx)
    return _extract(data, starts, last, subsequence_len)


@checked
def fix_step_type_on_interruptions(
    step_type: Annotated[Arg, "i[T]|i[T,B]"],
) -> Annotated[Array, "i[T]|i[T,B]"]:
    r"""Marks the step before each restart as the last of its episode.

    An environment that is interrupted starts anew without having finished: a `MID` step
    is followed by a `FIRST` one. That `MID` becomes `LAST`, so that no computation runs
    on from one episode into the next.

    .. math::
        y_t = \begin{cases}
            \text{LAST} & s_t = \text{MID} \text{ and } s_{t+1} = \text{FIRST} \\
            s_t & \text{otherwise}
        \end{cases}

    Its discount shows that this is a truncation: it is not 0. The final step is left as
    it is, since what follows is not known, and so is a `FIRST` step before another: an
    episode of one observation has no transition.

    Args:
        step_type: step types of dm_env (`FIRST` is 0, `MID` 1 and `LAST` 2), time
            first, `i[T]|i[T,B]`.

    Returns:
        The step types, `i[T]|i[T,B]`, in the same dtype.

    Raises:
        ValueError: if `step_type` has no time axis, or more than one batch axis.
        TypeError: if `step_type` is not an integer.

    Example:
        >>> fix_step_type_on_interruptions(jnp.array([0, 1, 1, 0, 1, 2])).tolist()
        [0, 1, 2, 0, 1, 2]
    """
    first, mid, last = map(int, dm_env.StepType)
    restarts = (step_type[:-1] == mid) & (step_type[1:] == first)
    return step_type.at[:-1].set(jnp.where(restarts, last, step_type[:-1]))


@checked
def sample_start_indices(
    rng_key: Annotated[Arg, "k[]"],
    batch_size: int,
    num_start_indices: int,
    max_valid_start_idx: Annotated[int | Array, "i[]", "[0, inf)"],
) -> Annotated[Array, "i[B,N]"]:
    r"""Draws times at which subsequences start, without replacement.

    Each trajectory of a batch gets its own draw, in random order, of which every
    selection is equally likely.

    .. math::
        s_{b,1}, \dots, s_{b,N} \sim \text{Uniform}\{0, \dots,
            \text{max\_valid\_start\_idx}\}, \qquad s_{b,i} \ne s_{b,j}

    Args:
        rng_key: a random key, `k[]`.
        batch_size: the number `B` of trajectories, a Python `int`.
        num_start_indices: the number `N` of start indices for each, a Python `int`.
        max_valid_start_idx: the last time at which a subsequence may start, `i[]`. A
            Python `int` is fixed while tracing, and at least `N - 1`. An array may be
            traced: then the draws are others for one key, and all -1, which is no time,
            where it is below `N - 1`.

    Returns:
        The start indices, `i[B,N]`.

    Raises:
        ValueError: if there are not `num_start_indices` different times, or a number is
            negative.
        TypeError: if a dtype breaks its contract, or a size is no Python `int`.

    Example:
        >>> starts = sample_start_indices(jax.random.key(0), 1, 4, 3)
        >>> sorted(starts[0].tolist())
        [0, 1, 2, 3]
    """
    _check_draws(batch_size, num_start_indices, max_valid_start_idx)
    last, shape = max_valid_start_idx, (num_start_indices,)

    def draw(key: Array) -> Array:
        if isinstance(last, int):
            return jax.random.choice(key, last + 1, shape, replace=False)
        # Wide enough for one more, whatever the dtype was.
        return _draw_one_by_one(key, last.astype(int) + 1, num_start_indices)

    return jax.vmap(draw)(jax.random.split(rng_key, batch_size))


def _draw_one_by_one(key: Array, size: Array, count: int) -> Array:
    """Draws `count` of the numbers below `size`, each from those still left."""
    order = jnp.arange(count)
    if count == 0:
        return order
    ranks = jax.random.randint(key, (count,), 0, jnp.maximum(size - order, 1))

    def step(drawn: Array, draw: tuple[Array, Array]) -> tuple[Array, None]:
        place, rank = draw  # the number drawn is the one with `rank` others left below
        taken_below = jnp.sum(jnp.sort(drawn) - order <= rank, dtype=rank.dtype)
        return drawn.at[place].set(rank + taken_below), None

    none = jnp.where(ranks < 0, ranks, jnp.iinfo(ranks.dtype).max)
    drawn, _ = jax.lax.scan(step, none, (order, ranks))
    return jnp.where(size >= count, drawn, -1)


@functools.partial(jax.jit, static_argnames="length")
def _extract(data: Array, starts: Array, last: Array, length: int) -> Array:
    starts = starts.astype(int)  # so that sums fit, whatever the dtype was
    valid = (starts >= 0) & (starts <= last)
    offsets = jnp.arange(length)[:, None, None]
    times = jnp.where(valid, starts, len(data))[None] + offsets
    pick = functools.partial(jnp.take, axis=0, mode="fill")
    return jax.vmap(pick, (1, 1), 1)(data, times)


def _last_start(
    data: Array, starts: Array, length: int, max_valid: int | Array | None
) -> Array:
    """Checks what `extract_subsequences` is given; returns the last valid start."""
    if data.ndim < 2:
        raise ValueError(
            f"extract_subsequences: trajectories has shape {data.shape}, expected "
            "[T,B,...]."
        )
    if starts.ndim != 2 or len(starts) != data.shape[1]:
        raise ValueError(
            f"extract_subsequences: start_indices has shape {starts.shape}, expected "
            f"[B,N] with B = {data.shape[1]}, as trajectories has shape {data.shape}."
        )
    if not jnp.issubdtype(starts.dtype, jnp.integer):
        raise TypeError(
            f"extract_subsequences: start_indices must be an integer, got "
            f"{starts.dtype}; convert it with jnp.asarray(start_indices, jnp.int32)."
        )
    if type(length) is not int:
        raise TypeError(
            "extract_subsequences: subsequence_len must be a Python int, fixed while "
            f"tracing, got {type(length).__name__}."
        )
    last = len(data) - length
    if last < 0:
        raise ValueError(
            f"extract_subsequences: subsequence_len must be at most T = {len(data)}, "
            f"got {length}."
        )
    if max_valid is None:
        return jnp.asarray(last)
    if jnp.shape(max_valid) != ():
        raise ValueError(
            "extract_subsequences: max_valid_start_idx has shape "
            f"{jnp.shape(max_valid)}, expected i[]."
        )
    if not jnp.issubdtype(jnp.result_type(max_valid), jnp.integer):
        raise TypeError(
            "extract_subsequences: max_valid_start_idx must be an integer, got "
            f"{jnp.result_type(max_valid)}; convert it with "
            "jnp.asarray(max_valid_start_idx, jnp.int32)."
        )
    if isinstance(max_valid, int | np.integer) and max_valid > last:
        raise ValueError(
            "extract_subsequences: max_valid_start_idx must be at most T - "
            f"subsequence_len = {last}, got {max_valid}."
        )
    return jnp.minimum(last, jnp.asarray(max_valid).astype(int))


def _check_draws(batch_size: int, count: int, max_valid: int | Array) -> None:
    fn = "sample_start_indices"
    for name, size in {"batch_size": batch_size, "num_start_indices": count}.items():
        if size < 0:
            raise ValueError(f"{fn}: {name} must not be negative: {size}.")
    if isinstance(max_valid, int) and count > max_valid + 1:
        raise ValueError(
            f"{fn}: num_start_indices must be at most max_valid_start_idx + 1 = "
            f"{max_valid + 1}, got {count}."
        )

r"""Points that cover the unit interval, and indices drawn by weight.

A uniform number picks an index in proportion to its weight: lay the weights end to end,
and take the one on which the number falls, as a fraction of their total. A batch needs
`B` such numbers, and there are three ways to get them:

*   `"independent"`: each anywhere in `[0, 1)`, on its own.
*   `"stratified"`: one in each of `B` equal parts of the interval, at random.
*   `"systematic"`: one in each part, all at the same distance from its start.

With each of them, an index of probability :math:`p` comes up :math:`B p` times on
average. They differ in how far it strays from that, the less so the further down the
list: in a systematic batch it comes up :math:`\lfloor B p \rfloor` or
:math:`\lceil B p \rceil` times.

`sample_points` draws the numbers and `sample_indices` the indices. Where a few of many
weights change between draws, as in prioritised replay, `rlprims.sum_trees` draws
without looking at all of them.
"""

from typing import Annotated, Any

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims._strata import Method, draw_cells, placed
from rlprims.sum_trees import create_sum_tree, draw

__all__ = ["sample_indices", "sample_points"]


@checked
def sample_points(
    key: Annotated[Arg, "k[]"],
    num_samples: int,
    *,
    method: Method = "stratified",
    dtype: Any = jnp.float32,
) -> Annotated[Array, "f[B]"]:
    r"""Draws points from the unit interval, spread as evenly as `method` says.

    .. math::
        x_k = \begin{cases}
            u_k & \text{independent} \\
            (k + u_k) / B & \text{stratified} \\
            (k + u) / B & \text{systematic}
        \end{cases}
        \qquad u, u_k \sim U([0, 1)), \quad k = 0, \ldots, B - 1

    Rounding takes no point out of its part of the interval,
    :math:`[k / B, (k + 1) / B)`, whose ends are rounded to `dtype`. None is 1.

    Args:
        key: a random key, `k[]`.
        num_samples: how many points `B` to draw, a Python `int`, from 1 to as many as
            `dtype` can tell apart, :math:`2^{23}` in single precision.
        method: `"independent"`, `"stratified"` or `"systematic"`.
        dtype: the dtype of the result, floating-point, of 32 bits at least.

    Returns:
        The points, `f[B]` with `B = num_samples`, dimensionless, in `[0, 1)`: in
        increasing order, or in none where they are independent.

    Raises:
        ValueError: if `num_samples` is out of range, or `method` is none of the three.
        TypeError: if `key` is not a random key, `num_samples` no Python `int`, or
            `dtype` not floating-point or too narrow.

    Example:
        >>> points = sample_points(jax.random.key(0), 4)
        >>> jnp.floor(4 * points).tolist()
        [0.0, 1.0, 2.0, 3.0]

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015, whose batches are stratified.
    """
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 4:
        raise TypeError(
            "sample_points: dtype must be floating-point, of 32 bits at least, got "
            f"{jnp.dtype(dtype)}."
        )
    return placed(*draw_cells("sample_points", key, num_samples, method, dtype))


@checked
def sample_indices(
    key: Annotated[Arg, "k[]"],
    weights: Annotated[Arg, "f[N]", "[0, inf)"],
    num_samples: int,
    *,
    method: Method = "independent",
) -> Annotated[Array, "i[B]"]:
    r"""Draws indices in proportion to weights, with replacement.

    .. math::
        i_k = \min \Bigl\{ i : \sum_{j \le i} w_j > x_k \sum_j w_j \Bigr\}

    where the points :math:`x_k` are those of `sample_points`. An index of weight zero
    is never drawn, whatever the rounding: nor is one whose weight is below the smallest
    normal number, about 1e-38 in single precision. To resample the particles of a
    filter or a search, let `method` be `"systematic"` and `num_samples` be `N`.

    A weight that is NaN, negative or infinite is a mistake that cannot be refused while
    tracing. Then, and where no weight is positive, every index is -1.

    Args:
        key: a random key, `k[]`.
        weights: the weight of each index, `f[N]`, not negative, with any sum that does
            not overflow. Probabilities will do.
        num_samples: how many indices `B` to draw, a Python `int`, at least 1.
        method: how to draw the points: `"independent"`, `"stratified"` or
            `"systematic"`.

    Returns:
        The indices, `i[B]` with `B = num_samples`, in `[0, N)`: in increasing order, or
        in none where the points are independent.

    Raises:
        ValueError: if a shape breaks its contract, `num_samples` is out of range, or
            `method` is none of the three.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> weights = jnp.array([2.0, 0.0, 1.0, 1.0])
        >>> sample_indices(jax.random.key(0), weights, 4, method="systematic").tolist()
        [0, 0, 2, 3]

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015, whose batches are stratified.
    """
    tree = create_sum_tree(weights)
    return draw("sample_indices", key, tree, num_samples, method)

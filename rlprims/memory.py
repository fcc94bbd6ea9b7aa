r"""Nearest neighbours in a memory of points.

`knn_query` compares each of `Q` query points with each of `M` points in memory. Its
results are those of computing every distance and sorting them, but the squared
Euclidean distance, its default, is not computed that way:

.. math::
    \lVert q - x \rVert^2 = \lVert q \rVert^2 - 2 \, q^\top x + \lVert x \rVert^2

turns almost all of the work into one product of matrices. Rounding makes these
distances inexact, within bounds that are known. So they only choose candidates, among
which exact distances decide, and wherever the bounds leave open whether a neighbour was
missed, the distances from that query point to all of the memory are computed.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked

__all__ = ["KNNQueryResult", "knn_query"]

Metric = Callable[[Array, Array], Array]


class KNNQueryResult(NamedTuple):
    """The `K` nearest neighbours of each of `Q` query points, the nearest first.

    Attributes:
        neighbors: the points themselves, `f[Q,K,D]`.
        neighbor_indices: where in the memory they are, `i[Q,K]`.
        neighbor_neg_distances: minus their distances, `f[Q,K]`.
    """

    neighbors: Annotated[Array, "f[Q,K,D]"]
    neighbor_indices: Annotated[Array, "i[Q,K]"]
    neighbor_neg_distances: Annotated[Array, "f[Q,K]"]


@checked
def knn_query(
    data: Annotated[Arg, "f[M,D]"],
    query_points: Annotated[Arg, "f[Q,D]"],
    num_neighbors: int,
    metric: Metric | None = None,
) -> KNNQueryResult:
    r"""Finds the points that are nearest to each query point.

    .. math::
        \text{neighbors}_{qk} = x_{i_{qk}}, \qquad
        d(q, x_{i_{q1}}) \le \dots \le d(q, x_{i_{qK}}) \le d(q, x_j)
        \quad \text{for all other } j

    Of points at the same distance, the first comes first. A point whose distance is
    not a number counts as infinitely far away. The neighbours and their distances have
    gradients; which neighbours they are has none.

    Args:
        data: the points to search, `f[M,D]`.
        query_points: the points to find the neighbours of, `f[Q,D]`, in the units of
            `data`.
        num_neighbors: how many neighbours to find, a Python `int` from 1 to `M`.
        metric: a function of a query point and a point of `data`, both `f[D]`, that
            returns their distance, `f[]`; `None` for the squared Euclidean distance.
            It is fixed while tracing: each new function is compiled anew.

    Returns:
        A `KNNQueryResult` of the neighbours, `f[Q,K,D]`, their indices, `i[Q,K]`, and
        minus their distances, `f[Q,K]`, where `K = num_neighbors`.

    Raises:
        ValueError: if a shape breaks its contract, or there are not `num_neighbors`
            points.
        TypeError: if `data` or `query_points` is not floating-point, `num_neighbors` is
            not a Python `int`, or `metric` no function that returns `f[]`.

    Example:
        >>> data = jnp.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
        >>> result = knn_query(data, jnp.array([[0.0, 0.0]]), num_neighbors=2)
        >>> result.neighbor_indices.tolist(), result.neighbor_neg_distances.tolist()
        ([[0, 2]], [[-0.0, -1.0]])

    References:
        Puigdomènech Badia et al., `Never Give Up: Learning Directed Exploration
        Strategies <https://arxiv.org/abs/2002.06038>`_, 2020.
    """
    size = data.shape[0]
    if not 1 <= num_neighbors <= size:
        raise ValueError(
            f"knn_query: num_neighbors must be in [1, {size}], the number of points in "
            f"data, got {num_neighbors}."
        )
    fixed = jax.lax.stop_gradient((data, query_points))
    if metric is None:
        metric = _squared_distance
        indices = _candidates(*fixed, num_neighbors)
    else:
        _refuse_what_is_no_metric(metric, data.dtype, data.shape[1:])
        indices = _nearest(_distances(metric, *fixed), num_neighbors)
    indices = jnp.sort(indices)  # so that the first of equals comes first
    pairs = jax.vmap(jax.vmap(metric, (None, 0)))
    order = _nearest(pairs(fixed[1], fixed[0][indices]), num_neighbors)
    indices = jnp.take_along_axis(indices, order, axis=1)
    neighbors = data[indices]
    return KNNQueryResult(neighbors, indices, -pairs(query_points, neighbors))


def _refuse_what_is_no_metric(metric: Any, dtype: Any, shape: Any) -> None:
    if not callable(metric):
        raise TypeError(
            f"knn_query: metric must be a function, got {type(metric).__name__}."
        )
    point = jax.ShapeDtypeStruct(shape, dtype)
    result = jax.eval_shape(metric, point, point)
    is_array = isinstance(result, jax.ShapeDtypeStruct)
    if not is_array or result.shape or not jnp.issubdtype(result.dtype, jnp.floating):
        got = f"{result.dtype}{[*result.shape]}" if is_array else type(result).__name__
        raise TypeError(f"knn_query: metric must return f[] for two points, got {got}.")


def _candidates(data: Array, queries: Array, num_neighbors: int) -> Array:
    """Returns indices that include those of the nearest neighbours, `[Q,C]`."""
    size, many = data.shape[0], queries.shape[0] > 4  # to prepare pays off for many
    count = min(size, 4 * num_neighbors + 8)
    if not many or count == size:
        return _nearest(_distances(_squared_distance, data, queries), num_neighbors)
    low, error = _bounds(data, queries)
    lowest, candidates = jax.lax.top_k(-low, count)
    # As many points as are wanted are no farther than this, and all that were left out
    # no nearer than the last candidate may be. (A slice instead of a choice or a
    # minimum makes XLA sort the whole memory.)
    wanted = jnp.arange(count)[None] < num_neighbors
    high = 2 * jax.vmap(jnp.take)(error, candidates) - lowest
    certain = jnp.where(wanted, high, -jnp.inf).max(axis=1) < -jnp.min(lowest, axis=1)

    def search(state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Computes all distances from the first query point in doubt."""
        candidates, certain = state
        first = jnp.argmin(certain)
        distances = _distances(_squared_distance, data, queries[first][None])
        found = _nearest(distances, count)[0]
        return candidates.at[first].set(found), certain.at[first].set(True)

    in_doubt = lambda state: ~jnp.all(state[1])
    return jax.lax.while_loop(in_doubt, search, (candidates, certain))[0]


def _bounds(data: Array, queries: Array) -> tuple[Array, Array]:
    """Returns lower bounds on squared distances and half of their slack, `[Q,M]`.

    That is the largest rounding error that a sum of so many products can have.
    """
    product = jnp.matmul(queries, data.T, precision=jax.lax.Precision.HIGHEST)
    x, q = jnp.sum(data**2, axis=1), jnp.sum(queries**2, axis=1)
    squares = q[:, None] + x[None]
    info = jnp.finfo(data.dtype)
    error = (data.shape[1] + 8) * info.eps * squares
    low = squares - 2 * product - error
    # What overflows is far from everything that does not, by a wide margin. Nothing is
    # known of a query point that is almost as large, or is not a number.
    low = jnp.where(jnp.isfinite(x)[None], low, info.max / 2)
    return jnp.where(q[:, None] < info.max / 256, low, -jnp.inf), error


def _distances(metric: Metric, data: Array, queries: Array) -> Array:
    """Returns the distances of all pairs, `[Q,M]`."""
    return jax.vmap(jax.vmap(metric, (None, 0)), (0, None))(queries, data)


def _squared_distance(x: Array, y: Array) -> Array:
    """Computes a squared distance, without a derivative where it is infinite."""
    difference = x - y
    infinite = ~jnp.isfinite(difference)
    difference = jnp.where(infinite, jax.lax.stop_gradient(difference), difference)
    return jnp.sum(difference**2)


def _nearest(distances: Array, number: int) -> Array:
    """Returns the indices of the smallest distances of each row, in order."""
    far = jnp.where(jnp.isnan(distances), jnp.inf, distances)
    return jax.lax.top_k(-far, number)[1]

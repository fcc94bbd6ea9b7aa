r"""A sum tree, which draws from many weights of which a few change at a time.

Prioritised replay draws each transition in proportion to its priority and then gives
new priorities to those it drew. A sum tree keeps the sums of pairs of priorities, the
sums of pairs of these, and so on up to the total, so that both take
:math:`O(\log N)` steps instead of :math:`O(N)`:

>>> tree = create_sum_tree(jnp.zeros(1000))
>>> tree = update_sum_tree(tree, jnp.array([0, 7, 9]), jnp.array([1.0, 4.0, 5.0]))
>>> tree.total.item(), find_in_sum_tree(tree, jnp.array([0.5, 1.0, 9.9])).tolist()
(10.0, [0, 7, 9])

`sample_sum_tree` draws a batch, and `update_sum_tree` sets the priorities that come of
it. The priorities themselves are `tree.priorities`. The least of those above zero, from
which the largest importance weight follows, is
`jnp.min(tree.priorities, where=tree.priorities > 0, initial=jnp.inf)`: no tree keeps
it, so that takes a look at all `N`.

Every sum is computed from its two parts, never by adding a change to it. Whatever
was updated, and how often, the sums are those of a tree made anew from the same
priorities, bit by bit. A priority of zero is never drawn, however sums are rounded.

A tree is a named tuple of two arrays, so it can be saved, mapped by `jax.vmap`, or
carried through `jax.lax.scan` like any state. An update outside `jax.jit` copies it.
Inside, it changes in place where JAX may reuse the memory: in a loop, or if the tree is
donated (`donate_argnums`).
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims._strata import Method, draw_cells

__all__ = [
    "SumTree",
    "SumTreeSample",
    "create_sum_tree",
    "find_in_sum_tree",
    "sample_sum_tree",
    "update_sum_tree",
]


class SumTree(NamedTuple):
    """Priorities, and the sums that lead to them.

    The root is node 1 and the children of node `k` are nodes `2k` and `2k + 1`. The
    last `N` of the nodes `1..2N-1` are the priorities, in an order such that those
    under any node lie next to one another.

    Attributes:
        priorities: the priority of each index, `f[N]`, not negative, in any unit.
        sums: the sums at nodes `1..N-1`, `f[N]`, in the same unit; before them, at
            index 0, the total.
    """

    priorities: Annotated[Arg, "f[N]", "running"]
    sums: Annotated[Arg, "f[N]", "running"]

    @property
    def total(self) -> Array:
        """The sum of all priorities; of each tree, where there is a batch of them."""
        return self.sums[..., 0]


class SumTreeSample(NamedTuple):
    """A batch drawn from a sum tree.

    Attributes:
        indices: which priorities were drawn, `i[B]`, in `[0, N)`; -1 if none can be.
        probabilities: the probability of each, `f[B]`, dimensionless: its priority over
            the total.
    """

    indices: Annotated[Array, "i[B]"]
    probabilities: Annotated[Array, "f[B]"]


@checked
def create_sum_tree(
    priorities: Annotated[Arg, "f[N]", "[0, inf)", "running"],
) -> SumTree:
    r"""Makes a sum tree of priorities, such as zeros for a memory that is empty.

    .. math::
        s_k = s_{2k} + s_{2k + 1}, \qquad s_1 = \sum_i p_i

    A priority below the smallest normal number, about 1e-38 in single precision, counts
    as zero. One that is negative, infinite or NaN becomes NaN, and so does every sum of
    it, until it is updated: nothing can be drawn while the total is NaN.

    Args:
        priorities: the priority of each index, `f[N]`, not negative, in any unit. Their
            number `N`, the capacity of the tree, need not be a power of two.

    Returns:
        The tree, of `f[N]` priorities and as many sums, in single precision at least.

    Raises:
        ValueError: if a shape breaks its contract, or `N` is not from 1 to 2^30.
        TypeError: if `priorities` is not floating-point.

    Example:
        >>> tree = create_sum_tree(jnp.array([1.0, 2.0, 0.0, 4.0]))
        >>> tree.sums.tolist()
        [7.0, 7.0, 3.0, 4.0]

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015.
    """
    if not 1 <= priorities.size <= 2**30:
        raise ValueError(
            f"create_sum_tree: priorities has shape {priorities.shape}, expected f[N] "
            "with N from 1 to 2^30."
        )
    level = priorities = _normal(priorities)
    sums = []
    for depth in range(_depth(priorities), 0, -1):
        paired = 2 * level.size - 2**depth  # above the rest, there are leaves
        pairs = level[:paired:2] + level[1:paired:2]
        sums.append(pairs)
        level = jnp.concatenate([pairs, level[paired:]])
    return SumTree(priorities, jnp.concatenate([level, *reversed(sums)]))


@checked
def update_sum_tree(
    tree: SumTree,
    indices: Annotated[Arg, "i[B]"],
    priorities: Annotated[Arg, "f[B]", "[0, inf)"],
) -> SumTree:
    r"""Sets the priorities at some indices, and the sums above them.

    .. math::
        p'_{i_k} = \text{priorities}_k, \qquad s'_k = s'_{2k} + s'_{2k + 1}

    Of several equal indices, the last one wins, on every device. An index outside
    `[0, N)` updates nothing, so that -1 can stand for padding: it does not count from
    the end nor fall on the nearest. As in `create_sum_tree`, a priority that is tiny
    counts as zero, and one that is no proper priority becomes NaN.

    Args:
        tree: the tree to update.
        indices: where to set priorities, `i[B]`, in `[0, N)`.
        priorities: what to set them to, `f[B]`, not negative, in the unit of the
            priorities in `tree`.

    Returns:
        The tree with the new priorities, `f[N]`, and their sums, `f[N]`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype, or is no tree.

    Example:
        >>> tree = create_sum_tree(jnp.array([1.0, 2.0, 0.0, 4.0]))
        >>> indices, priorities = jnp.array([2, 0, 2]), jnp.array([9.0, 3.0, 5.0])
        >>> tree = update_sum_tree(tree, indices, priorities)
        >>> tree.priorities.tolist(), tree.total.item()
        ([3.0, 2.0, 5.0, 4.0], 14.0)

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015.
    """
    size, (leaves, sums) = len(tree.priorities), tree
    indices = indices.astype(int)  # so that `size` fits, whatever the dtype was
    indices = jnp.where((indices >= 0) & (indices < size), indices, size)
    order = jnp.argsort(indices, stable=True)
    indices, priorities = indices[order], _normal(priorities)[order]
    latest = (indices != jnp.roll(indices, -1)).at[-1:].set(True)
    leaves = leaves.at[jnp.where(latest, indices, size)].set(priorities, mode="drop")
    nodes = _leaf(jnp.minimum(indices, size - 1), size)  # adds up nothing new at worst

    def add_up(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        nodes, sums = state[0] // 2, state[1]  # of node 0, any sum will do for now
        left, right = _children(SumTree(leaves, sums), nodes)
        return nodes, sums.at[nodes].set(left + right)

    # Inside `shard_map` the sums must vary over the devices that the leaves vary over.
    state = nodes, sums.at[0].set(leaves[0])
    sums = jax.lax.fori_loop(0, _depth(leaves), add_up, state)[1]
    return SumTree(leaves, sums.at[0].set(leaves[0] if size == 1 else sums[1]))


@checked
def find_in_sum_tree(
    tree: SumTree, values: Annotated[Arg, "f[B]", "[0, inf)"]
) -> Annotated[Array, "i[B]"]:
    r"""Finds the priority on which each value falls, with all of them end to end.

    .. math::
        i_k = \min \Bigl\{ i : \sum_{j \le i} p_j > v_k \Bigr\}

    A priority of zero is never found. Sums are rounded, but a value near the boundary
    between two priorities falls on one of the priorities above zero all the same.

    Args:
        tree: the tree to search.
        values: what to look for, `f[B]`, from zero to less than the total, in the unit
            of the priorities.

    Returns:
        The indices, `i[B]`, in `[0, N)`; -1 for a value that is not in range or NaN,
        and for each one if the total is not finite.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point, or is no tree.

    Example:
        >>> tree = create_sum_tree(jnp.array([1.0, 2.0, 0.0, 4.0]))
        >>> find_in_sum_tree(tree, jnp.array([0.0, 1.0, 3.0, 7.0])).tolist()
        [0, 1, 3, -1]

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015.
    """
    inside = (values < tree.total) & (tree.total < jnp.inf)  # and NaN is not
    return jnp.where(inside, _descend(tree, values, jnp.zeros_like(values)), -1)


@checked
def sample_sum_tree(
    key: Annotated[Arg, "k[]"],
    tree: SumTree,
    num_samples: int,
    *,
    method: Method = "stratified",
) -> SumTreeSample:
    r"""Draws indices in proportion to their priorities, with replacement.

    .. math::
        i_k = \min \Bigl\{ i : \sum_{j \le i} p_j > x_k \sum_j p_j \Bigr\}, \qquad
        P(i) = \frac{p_i}{\sum_j p_j}

    where the points :math:`x_k` are those of `rlprims.sample_points`. As in the paper,
    they are stratified: one in each of `B` equal parts of the total. Each index comes
    up :math:`B P(i)` times on average, with every method. A priority of zero is never
    drawn. Points have more digits here than one number holds, so that even in single
    precision each of a million priorities has its due, but for the rounding of sums.

    Args:
        key: a random key, `k[]`.
        tree: the tree to draw from.
        num_samples: how many indices `B` to draw, a Python `int`, at least 1.
        method: how to draw the points: `"independent"`, `"stratified"` or
            `"systematic"`.

    Returns:
        The indices, `i[B]` with `B = num_samples`, and their probabilities, `f[B]`,
        dimensionless. Where the total is zero, NaN or infinite, each index is -1 and
        its probability NaN.

    Raises:
        ValueError: if a shape breaks its contract, `num_samples` is out of range, or
            `method` is none of the three.
        TypeError: if an argument has the wrong dtype, or is no tree.

    Example:
        >>> tree = create_sum_tree(jnp.array([1.0, 1.0, 0.0, 2.0]))
        >>> sample = sample_sum_tree(jax.random.key(0), tree, 4)
        >>> sample.indices.tolist(), sample.probabilities.tolist()
        ([0, 1, 3, 3], [0.25, 0.25, 0.5, 0.5])

    References:
        Schaul, Quan, Antonoglou and Silver, `Prioritized Experience Replay
        <https://arxiv.org/abs/1511.05952>`_, 2015.
    """
    indices = draw("sample_sum_tree", key, tree, num_samples, method)
    total = jnp.where(indices < 0, jnp.nan, tree.total)
    return SumTreeSample(indices, tree.priorities[indices] / total)


def draw(name: str, key: Array, tree: SumTree, count: int, method: Method) -> Array:
    """Draws indices for the function of that name; -1 if none can be drawn."""
    total = tree.total
    cell, fraction, cells = draw_cells(name, key, count, method, total.dtype)
    # Tiny sums are scaled, exactly, so that parts of them do not vanish.
    scale = jnp.where(total < 2.0**-60, 2.0**60, jnp.ones_like(total))
    width = scale * total / cells
    indices = _descend(tree, cell * width, fraction * width, scale)
    return jnp.where((total > 0) & (total < jnp.inf), indices, -1)


# Nodes


def _normal(x: Array) -> Array:
    """Puts zeros for positive numbers so small that a device may take them for zero."""
    return jnp.where(x < jnp.finfo(x.dtype).tiny, 0, x)


def _depth(leaves: Array) -> int:
    """Returns how many levels the deepest priorities are below the root."""
    return (leaves.size - 1).bit_length()


def _leaf(indices: Array, size: int) -> Array:
    """Returns the nodes of priorities: the first of them are one level deeper."""
    deepest = 1 << (size - 1).bit_length()
    return size + (indices + deepest - size) % size


def _children(tree: SumTree, nodes: Array) -> tuple[Array, Array]:
    """Returns what the children of nodes hold; of a priority, anything."""
    size = len(tree.priorities)
    deepest = 1 << _depth(tree.priorities)

    def held(nodes: Array) -> Array:
        leaves = tree.priorities[(nodes - deepest) % size]
        return jnp.where(nodes < size, tree.sums[nodes % size], leaves)

    return held(2 * nodes), held(2 * nodes + 1)


def _descend(
    tree: SumTree, start: Array, offset: Array, scale: Array | float = 1.0
) -> Array:
    """Returns the index that `start + offset` falls on, of sums times `scale`.

    The two are kept apart, as their sum would lose the end of the offset. The way down
    leads through positive sums alone.
    """
    size, depth = len(tree.priorities), _depth(tree.priorities)

    def step(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        nodes, start, offset = state
        left, right = _children(tree, nodes)
        gap = scale * left - start
        turn = (right > 0) & (offset >= gap)  # where `right` is zero, `left` is not
        down = nodes < size
        nodes = jnp.where(down, 2 * nodes + turn.astype(int), nodes)
        start = jnp.where(down & turn, jnp.maximum(-gap, 0), start)
        offset = jnp.where(down & turn, offset - jnp.maximum(gap, 0), offset)
        return nodes, start, offset

    # Inside `shard_map` each of these must vary over the devices that any varies over.
    never = (tree.total < 0) & (tree.total > 0)
    offset = jnp.where(never, start, offset)
    start = jnp.where(never, offset, start)
    state = jnp.where(offset < 0, 0, 1), start, offset
    return (jax.lax.fori_loop(0, depth, step, state)[0] - (1 << depth)) % size

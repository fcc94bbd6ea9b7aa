"""Trees of arrays: nested containers, such as parameters or a batch of observations.

A tree is what JAX calls a pytree: arrays in dicts, lists, tuples, named tuples and
registered classes. `None` is an empty tree, so it holds nothing and stays as it is.
The functions here do to every array of a tree what another function does to one, and
say which array it was that did not fit:

==============================  ====================================================
to have                         use
==============================  ====================================================
a function of trees             `tree_fn`, `tree_map_zipped`
one of two trees, by a flag     `tree_select`
parts of a tree overwritten     `tree_replace_masked`
a random key for each array     `tree_split_key`
a tree for each time step       `tree_split_leaves`
the batch axis at the end       `transpose_first_axis_to_last`, and back
==============================  ====================================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg
from rlprims.arrays import lhs_broadcast, replace_masked

__all__ = [
    "transpose_first_axis_to_last",
    "transpose_last_axis_to_first",
    "tree_fn",
    "tree_map_zipped",
    "tree_replace_masked",
    "tree_select",
    "tree_split_key",
    "tree_split_leaves",
]

Tree = Any


def transpose_first_axis_to_last(tree: Tree) -> Tree:
    """Moves the first axis of every array behind the others.

    Args:
        tree: arrays of any dtype, with at least one axis each.

    Returns:
        The tree, with arrays of `[A,...]` turned into `[...,A]`. A NumPy array stays
        one, and is not copied.

    Raises:
        ValueError: if something in `tree` has no axis.

    Example:
        >>> tree = {"a": jnp.zeros((2, 3, 4))}
        >>> transpose_first_axis_to_last(tree)["a"].shape
        (3, 4, 2)
    """
    move = lambda x, rank: x.transpose((*range(1, rank), 0))
    return _transposed("transpose_first_axis_to_last", tree, move)


def transpose_last_axis_to_first(tree: Tree) -> Tree:
    """Moves the last axis of every array before the others.

    Args:
        tree: arrays of any dtype, with at least one axis each.

    Returns:
        The tree, with arrays of `[...,A]` turned into `[A,...]`. A NumPy array stays
        one, and is not copied.

    Raises:
        ValueError: if something in `tree` has no axis.

    Example:
        >>> tree = {"a": jnp.zeros((2, 3, 4))}
        >>> transpose_last_axis_to_first(tree)["a"].shape
        (4, 2, 3)
    """
    move = lambda x, rank: x.transpose((rank - 1, *range(rank - 1)))
    return _transposed("transpose_last_axis_to_first", tree, move)


def tree_fn(fn: Callable[..., Any], **unmapped_kwargs: Any) -> Callable[..., Tree]:
    """Turns a function of arrays into one of trees.

    The first tree decides the structure. Where it holds an array, another tree may
    hold a whole tree, which `fn` then gets in one piece, as with `jax.tree.map`.

    Args:
        fn: a function of one array or more.
        **unmapped_kwargs: keyword arguments, the same in every call of `fn`.

    Returns:
        A function of as many trees, which raises a ValueError if their structures do
        not fit that of the first.

    Example:
        >>> scale = tree_fn(lambda x, y, by: (x + y) * by, by=10)
        >>> scale({"a": 1, "b": 2}, {"a": 3, "b": 4})
        {'a': 40, 'b': 60}
    """

    def of_trees(tree: Tree, *trees: Tree) -> Tree:
        leaves, treedef = jax.tree.flatten(tree)
        columns = [leaves]
        for place, other in enumerate(trees, start=2):
            columns.append(_fitted("tree_fn", f"tree {place}", other, treedef))
        results = [fn(*xs, **unmapped_kwargs) for xs in zip(*columns, strict=True)]
        return jax.tree.unflatten(treedef, results)

    return of_trees


def tree_map_zipped(fn: Callable[..., Any], nests: Sequence[Tree]) -> Tree:
    """Applies a function to the arrays that stand in one place in each of the trees.

    Args:
        fn: a function of as many arrays as there are trees.
        nests: a list or tuple of trees of one structure.

    Returns:
        A tree of that structure, with the results; `nests` itself if it is empty.

    Raises:
        ValueError: if the structures differ.

    Example:
        >>> tree_map_zipped(max, [{"a": 1, "b": 2}, {"a": 0, "b": 3}])
        {'a': 1, 'b': 3}
    """
    if len(nests) == 0:
        return nests
    named = {f"nests[{place}]": nest for place, nest in enumerate(nests)}
    check_structures("tree_map_zipped", named)
    return jax.tree.map(fn, *nests)


def tree_replace_masked(
    tree_data: Tree, tree_replacement: Tree | None, mask: Arg
) -> Tree:
    """Replaces data where `mask` is true, in every array of a tree.

    It is `replace_masked` for each array: the mask covers leading axes, and what is
    replaced has no effect, NaN included, and a gradient of exactly zero.

    Args:
        tree_data: arrays of any shape and dtype.
        tree_replacement: a tree of that structure with what to put there: arrays of
            the shapes in `tree_data`, scalars, or `None` for zeros. `None` by itself
            puts zeros everywhere.
        mask: true where to replace, boolean; each of its axes must be as long as that
            axis of every array in `tree_data`, or have size 1.

    Returns:
        `tree_data` with replacements.

    Raises:
        ValueError: if the structures differ, or a shape does not fit.
        TypeError: if `mask` is not boolean, or something is not an array.

    Example:
        >>> data, mask = {"a": jnp.array([1.0, 2.0])}, jnp.array([True, False])
        >>> tree_replace_masked(data, None, mask)["a"].tolist()
        [0.0, 2.0]
    """
    fn = "tree_replace_masked"
    data, treedef = arrays_of(fn, "tree_data", tree_data), jax.tree.structure(tree_data)
    news = [None] * len(data)
    if tree_replacement is not None:
        news = _fitted(fn, "tree_replacement", tree_replacement, treedef)
    rows = zip(data.items(), news, strict=True)
    results = [_replaced(fn, place, x, new, mask) for (place, x), new in rows]
    return jax.tree.unflatten(treedef, results)


def tree_select(pred: Arg, on_true: Tree, on_false: Tree) -> Tree:
    """Selects one of two trees, or the parts of each that a mask names.

    A mask covers leading axes: one of `[B]` selects whole observations from arrays of
    `[B, ...]`. What is not selected has no effect, NaN included, and gets a gradient
    of exactly zero.

    Args:
        pred: true for `on_true`, boolean: a scalar, or an array whose shape starts the
            shape of every array in the trees.
        on_true: a tree of arrays.
        on_false: a tree of that structure, with the same shapes and dtypes. A Python
            number adapts to the dtype of the array it stands for.

    Returns:
        The tree selected. No array changes its dtype.

    Raises:
        ValueError: if the structures, or two shapes, differ.
        TypeError: if two dtypes differ, `pred` is not boolean, or something is not an
            array.

    Example:
        >>> one, two = {"a": jnp.array([1.0, 1.0])}, {"a": jnp.array([2.0, 2.0])}
        >>> tree_select(jnp.array([True, False]), one, two)["a"].tolist()
        [1.0, 2.0]
    """
    trees = {"on_true": on_true, "on_false": on_false}
    return select("tree_select", {"pred": pred}, trees)


def tree_split_key(rng_key: Arg, tree_like: Tree) -> tuple[Array, Tree]:
    """Splits a random key into one to go on with and one for each array of a tree.

    Args:
        rng_key: one random key, of the new style or the old.
        tree_like: the tree whose structure to follow; what it holds is not used.

    Returns:
        The key to go on with, and a tree of keys in the structure of `tree_like`.

    Raises:
        TypeError: if `rng_key` is not one random key.

    Example:
        >>> key, keys = tree_split_key(jax.random.key(0), {"w": 0.0, "b": 0.0})
        >>> sorted(keys)
        ['b', 'w']
    """
    key = as_array("tree_split_key", "rng_key", rng_key)
    new = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim != (not new) or not (new or key.dtype == np.uint32):
        raise TypeError(
            f"tree_split_key: rng_key must be one random key, got {key.dtype} of shape "
            f"{key.shape}; make one with jax.random.key(seed)."
        )
    treedef = jax.tree.structure(tree_like)
    following, *keys = jax.random.split(key, treedef.num_leaves + 1)
    return following, jax.tree.unflatten(treedef, keys)


def tree_split_leaves(
    tree_like: Tree, axis: int = 0, keepdim: bool = False
) -> tuple[Tree, ...]:
    """Splits a tree of arrays into a tree for each index of an axis.

    This turns a trajectory, with time in an axis of every array, into its steps.

    Args:
        tree_like: arrays of any dtype, all of one length along `axis`.
        axis: the axis to split; a negative one counts from the end.
        keepdim: whether to keep that axis, at size 1.

    Returns:
        As many trees as the axis is long; none if `tree_like` holds no array. NumPy
        arrays stay NumPy arrays, and are not copied.

    Raises:
        ValueError: if an array has no such axis, or lengths along it differ.

    Example:
        >>> first, second = tree_split_leaves({"a": jnp.array([1.0, 2.0])})
        >>> second["a"].item()
        2.0
    """
    leaves, treedef = jax.tree.flatten(tree_like)
    _check_lengths(tree_like, axis)
    columns = [_pieces(leaf, axis, keepdim) for leaf in leaves]
    return tuple(
        jax.tree.unflatten(treedef, pieces) for pieces in zip(*columns, strict=True)
    )


# What functions of trees share: `fn` is the function that errors speak of


def check_structures(fn: str, trees: Mapping[str, Tree]) -> Any:
    """Returns the one structure of trees that are given by name."""
    (first, like), *others = [
        (k, jax.tree.structure(tree)) for k, tree in trees.items()
    ]
    for name, treedef in others:
        if treedef != like:
            raise ValueError(
                f"{fn}: {name} has structure {treedef}, expected {like}, that of "
                f"{first}."
            )
    return like


def as_array(fn: str, name: str, x: Any) -> Array:
    """Converts what should be an array, of whatever dtype."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(
            f"{fn}: {name} must be an array, got {type(x).__name__}."
        ) from None


def arrays_of(fn: str, name: str, tree: Tree) -> dict[str, Array]:
    """Returns the arrays of a tree by place, such as `on_true['w']`."""
    places = (
        (name + jax.tree_util.keystr(path), x)
        for path, x in jax.tree.leaves_with_path(tree)
    )
    return {place: as_array(fn, place, x) for place, x in places}


def select(fn: str, flag: Mapping[str, Arg], trees: Mapping[str, Tree]) -> Tree:
    """Selects one of two trees by a flag; all three are given by name."""
    [(name, value)], treedef = flag.items(), check_structures(fn, trees)
    pred = as_array(fn, name, value)
    if pred.dtype != np.bool_:
        raise TypeError(
            f"{fn}: {name} must be boolean, got {pred.dtype}; compare it, as in "
            f"{name} != 0."
        )
    columns = [arrays_of(fn, *item).items() for item in trees.items()]
    pairs = [_alike(fn, *pair) for pair in zip(*columns, strict=True)]
    for place, x in columns[0]:
        if x.shape[: pred.ndim] != pred.shape:
            raise ValueError(
                f"{fn}: {name} has shape {pred.shape}, expected leading axes of "
                f"{x.shape}, the shape of {place}."
            )
    return jax.tree.unflatten(treedef, _select(pred, pairs))


@jax.jit
def _select(pred: Array, pairs: list[tuple[Array, Array]]) -> list[Array]:
    return [jnp.where(lhs_broadcast(pred, x), x, y) for x, y in pairs]


def _alike(
    fn: str, one: tuple[str, Array], other: tuple[str, Array]
) -> tuple[Array, Array]:
    """Checks shapes and dtypes; a Python number takes the dtype of the array."""
    (x_name, x), (y_name, y) = one, other
    if x.shape != y.shape:
        raise ValueError(
            f"{fn}: {y_name} has shape {y.shape}, expected {x.shape}, that of {x_name}."
        )
    if x.dtype == y.dtype:
        return x, y
    try:
        with jax.numpy_dtype_promotion("strict"):
            dtype = jnp.result_type(x, y)
    except (TypeError, ValueError):
        raise TypeError(
            f"{fn}: {y_name} has dtype {y.dtype}, expected {x.dtype}, that of "
            f"{x_name}; convert one of them."
        ) from None
    return x.astype(dtype), y.astype(dtype)


def _replaced(fn: str, place: str, data: Array, new: Any, mask: Arg) -> Array:
    """Replaces data in one array; errors say in which."""
    if new is not None:
        new = as_array(fn, place.replace("data", "replacement", 1), new)
    mask = as_array(fn, "mask", mask)
    try:
        return replace_masked(data, new, mask)
    except (TypeError, ValueError) as error:
        raise type(error)(f"tree_{error} This is so for {place}.") from None


def _fitted(fn: str, name: str, tree: Tree, treedef: Any) -> list[Any]:
    """Returns what `tree` holds where a tree of another structure has its leaves."""
    try:
        return treedef.flatten_up_to(tree)
    except (TypeError, ValueError):
        raise ValueError(
            f"{fn}: {name} has structure {jax.tree.structure(tree)}, expected "
            f"{treedef}, that of the first tree."
        ) from None


def _transposed(fn: str, tree: Tree, move: Callable[[Any, int], Any]) -> Tree:
    for path, leaf in jax.tree.leaves_with_path(tree):
        if np.ndim(leaf) == 0:
            place = jax.tree_util.keystr(path)
            raise ValueError(f"{fn}: tree{place} has no axis, expected at least one.")
    return jax.tree.map(lambda x: move(x, x.ndim), tree)


def _pieces(x: Any, axis: int, keepdim: bool) -> list[Any]:
    """Splits an array into what lies at each index of an axis."""
    where = np if isinstance(x, np.ndarray) else jnp
    pieces = where.split(x, x.shape[axis], axis) if x.shape[axis] else []
    return pieces if keepdim else [piece.squeeze(axis) for piece in pieces]


def _check_lengths(tree: Tree, axis: int) -> None:
    """Checks that the arrays of a tree to split have one length along `axis`."""
    lengths = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        place, shape = f"tree_like{jax.tree_util.keystr(path)}", np.shape(leaf)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"tree_split_leaves: {place} has shape {shape}, which has no axis "
                f"{axis}."
            )
        lengths[place] = shape[axis]
        first = next(iter(lengths))
        if lengths[place] != lengths[first]:
            raise ValueError(
                f"tree_split_leaves: {place} has length {shape[axis]} along axis "
                f"{axis}, expected {lengths[first]}, that of {first}."
            )

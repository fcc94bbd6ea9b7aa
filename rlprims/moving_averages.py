r"""Means and variances that follow a stream of data and forget what is old.

Each update moves the moments towards those of a batch, by a weight `w`:

.. math::
    m' = m + w \, (\bar x - m), \qquad
    v' = (1 - w) \bigl(v + w \, (\bar x - m)^2\bigr)
        + w \, \overline{(x - \bar x)^2}

These are the moments of old and new data together, counted `1 - w` and `w`. The
variance is a sum of squares and never a difference of two large numbers, so that it is
right even where it is tiny next to the square of the mean, and at least zero. A weight
of one replaces the moments, which is how an average starts.

`create_ema` makes such averages of whole trees of arrays, with weights that remove the
bias of the start. `normalization` has one for each of several tasks.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, bounded
from rlprims.arrays import contain_nonfinite, weighted

__all__ = ["EmaMoments", "EmaState", "create_ema"]


class EmaMoments(NamedTuple):
    """Mean and variance of the data behind each leaf of a tree.

    Attributes:
        mean: a tree of scalars, `f[]`, in the units of the data.
        variance: a tree of scalars, `f[]`, in squared units of the data.
    """

    mean: Any
    variance: Any


class EmaState(NamedTuple):
    """What an exponential moving average remembers: sums of weighted data.

    Attributes:
        mu: the mean times the sum of all weights so far, a tree of scalars, `f[]`.
        nu: the variance times the sum of all weights so far, a tree of scalars, `f[]`.
        decay_product: one minus the sum of all weights so far, `f[]`, in `[0, 1]`.
    """

    mu: Any
    nu: Any
    decay_product: Any

    def debiased_moments(self) -> EmaMoments:
        """Returns the moments of the data so far; zeros before there is any."""
        total = 1 - self.decay_product
        mean, variance = (
            jax.tree.map(
                lambda x: x / jnp.where(total > 0, total, 1).astype(x.dtype), y
            )
            for y in (self.mu, self.nu)
        )
        return EmaMoments(mean, variance)


Update = Callable[[Any, EmaState], tuple[EmaMoments, EmaState]]


@bounded
def create_ema(
    decay: Annotated[Arg, "f[]", "[0, 1)"] = 0.999,
    pmean_axis_name: Any = None,
) -> tuple[Callable[[Any], EmaState], Update]:
    r"""Builds an exponential moving average of the moments of a tree of arrays.

    Of the batch `n` updates ago, the mean and the variance below count with a weight
    proportional to :math:`\text{decay}^n`. All weights so far are divided by their
    sum, so that the average is unbiased from the first update on.

    .. math::
        m_n = \frac{\sum_{i \le n} \text{decay}^{n - i} \, \bar x_i}
                   {\sum_{i \le n} \text{decay}^{n - i}}, \qquad
        v_n = \frac{\sum_{i \le n} \text{decay}^{n - i} \, \overline{(x_i - m_n)^2}}
                   {\sum_{i \le n} \text{decay}^{n - i}}

    Each leaf has one mean and one variance, over all of its entries. They are kept in
    single precision at least, whatever the dtype of the data: narrower numbers would
    be too coarse for the small steps of an average.

    Args:
        decay: the weight of an update relative to the next, `f[]`, dimensionless, in
            `[0, 1)`.
        pmean_axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`,
            over which a batch is split into equal parts; `None` if it is not.

    Returns:
        Two functions. `init_state(template_tree)` gives the `EmaState` to start from,
        for data in the structure of `template_tree`, whose values are not used.
        `update_moments(tree, state)` takes a batch, a tree of arrays of any shape, and
        gives the `EmaMoments` of all data so far, and the next state.

    Raises:
        ValueError: if `decay` is a Python number outside `[0, 1)`. From
            `update_moments`, if the structure of `tree` is not that of the template,
            or an array is empty.
        TypeError: from either, if a leaf is not an array of real numbers.

    Example:
        >>> init_state, update_moments = create_ema(decay=0.5)
        >>> state = init_state(jnp.zeros(2))
        >>> moments, state = update_moments(jnp.array([1.0, 3.0]), state)
        >>> moments.mean.item(), moments.variance.item()
        (2.0, 1.0)

    References:
        Chan, Golub and LeVeque, `Algorithms for Computing the Sample Variance:
        Analysis and Recommendations
        <https://doi.org/10.1080/00031305.1983.10483115>`_, 1983.
    """

    def init_state(template_tree: Any) -> EmaState:
        _check_leaves("init_state", template_tree)
        zeros = jax.tree.map(lambda x: jnp.zeros((), _wide(x)), template_tree)
        return EmaState(zeros, zeros, jnp.ones(()))

    def update_moments(tree: Any, state: EmaState) -> tuple[EmaMoments, EmaState]:
        _check_leaves("update_moments", tree)
        given, expected = map(jax.tree.structure, (tree, state.mu))
        if given != expected:
            raise ValueError(
                f"update_moments: tree has the structure {given}, expected {expected}, "
                "that of the state."
            )
        return _update(tree, state, decay, pmean_axis_name)

    return init_state, update_moments


@functools.partial(jax.jit, static_argnames="axis_name")
def _update(
    tree: Any, state: EmaState, decay: Arg, axis_name: Any
) -> tuple[EmaMoments, EmaState]:
    """Moves the moments: one program for each structure, whichever average it is."""
    decay = jnp.where((decay >= 0) & (decay < 1), decay, jnp.nan)
    decay = decay.astype(state.decay_product.dtype)
    new = 1 - decay
    decay_product = 1 - (decay * (1 - state.decay_product) + new)
    # The total is what the next update will take it to be, to the last digit, and the
    # sums are made from the moments with it. An error in it then cancels out, where
    # otherwise it would pass for a move of the mean.
    total = 1 - decay_product
    weight = new / total
    old = state.debiased_moments()
    pairs = jax.tree.map(
        lambda x, m, v: merged(m, v, *_moments(x, axis_name), weight.astype(m.dtype)),
        tree,
        *(jax.tree.map(lambda x: x.astype(_wide(x)), moment) for moment in old),
    )
    moments = EmaMoments(
        *(jax.tree.map(lambda _, pair, i=i: pair[i], tree, pairs) for i in range(2))
    )
    mu, nu = jax.tree.map(lambda x: x * total.astype(x.dtype), moments)
    return moments, EmaState(mu, nu, decay_product)


def _moments(x: Any, axis_name: Any) -> tuple[Array, Array]:
    """Returns the mean and the variance of all entries, on all devices."""
    mean = functools.partial(_mean, axis_name=axis_name)
    x = jnp.asarray(x).astype(_wide(x))
    center = mean(x)
    return center, mean((x - center) ** 2)


def _mean(x: Array, axis_name: Any) -> Array:
    mean = jnp.mean(x)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def _wide(x: Any) -> Any:
    """Returns the dtype to average in: that of `x`, or `float32` if it is narrower."""
    dtype = jnp.result_type(x)
    wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 4
    return dtype if wide else jnp.dtype(jnp.float32)


def _check_leaves(fn: str, tree: Any) -> None:
    for path, x in jax.tree.leaves_with_path(tree):
        name = f"{fn}: tree{jax.tree_util.keystr(path)}"
        kind = getattr(x, "dtype", type(x))
        if kind not in (int, float) and not (
            jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating)
        ):
            got = getattr(kind, "__name__", kind)
            raise TypeError(f"{name} must be an array of real numbers, got {got}.")
        if jnp.size(x) == 0:
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}, expected entries in it."
            )


# What every moving average is made of


def merged(
    mean: Array, variance: Array, new_mean: Array, new_variance: Array, weight: Arg
) -> tuple[Array, Array]:
    """Returns the moments of two sets of data together, of which one has `weight`.

    A set without any weight has no effect, however large it is, NaN included.
    """
    kept = 1 - weight
    mean, variance = (contain_nonfinite(x, kept) for x in (mean, variance))
    new_mean, new_variance = (
        contain_nonfinite(x, weight) for x in (new_mean, new_variance)
    )
    step = weight * (new_mean - mean)
    spread = step * (new_mean - mean)
    moved = jnp.where(kept == 0, kept * mean + weight * new_mean, mean + step)
    return moved, weighted(variance + spread, kept) + weight * new_variance

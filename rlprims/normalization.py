r"""Targets on a common scale, whatever the units of the rewards: PopArt.

Returns differ in scale by orders of magnitude, from task to task and while an agent
improves, and no learning rate suits them all. PopArt trains on normalised targets,
:math:`(y - \mu) / \sigma`, and does two things at once when the statistics move:

*   *Art* (`art`) adapts the shift μ and the scale σ to the targets, task by task.
*   *Pop* (`pop`) changes the last, linear layer so that its unnormalised outputs stay
    precisely as they were: what was learnt is not lost.

`popart` bundles both. `unnormalize_linear` reads the layer's output for each task,
before and after `unnormalize`; `normalize` makes the targets for the loss. With one
task, every index is 0.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, bounded, checked, checked_as
from rlprims.arrays import batched_index, keep_where, root
from rlprims.collectives import AllSum
from rlprims.gradients import stop_gradient_if
from rlprims.moving_averages import merged

__all__ = [
    "PopArtOutput",
    "PopArtState",
    "art",
    "normalize",
    "pop",
    "popart",
    "unnormalize",
    "unnormalize_linear",
]


class PopArtState(NamedTuple):
    """Statistics of the targets of each of `N` tasks.

    Keep them in single precision, as `popart` starts them, whatever the targets are:
    half is too coarse for the small steps of an average.

    Attributes:
        shift: their mean, `f[N]`, in units of the targets.
        scale: their standard deviation, clipped, `f[N]`, in the same units.
        second_moment: their mean square, `f[N]`, in squared units: that of `shift`
            plus the variance, which is the square of `scale` unless that is clipped.
    """

    shift: Annotated[Arg, "f[N]"]
    scale: Annotated[Arg, "f[N]"]
    second_moment: Annotated[Arg, "f[N]"]


class PopArtOutput(NamedTuple):
    """Outputs of a network, one for each index of a task.

    Attributes:
        normalized: what the network gives, `f[...]`, dimensionless: for the loss.
        unnormalized: the same in units of the targets, `f[...]`.
    """

    normalized: Annotated[Array, "f[...]"]
    unnormalized: Annotated[Array, "f[...]"]


@checked
def normalize(
    state: PopArtState,
    unnormalized: Annotated[Arg, "f[...]"],
    indices: Annotated[Arg, "i[...]"],
) -> Annotated[Array, "f[...]"]:
    r"""Shifts and scales numbers by the statistics of their tasks.

    .. math::
        y = \frac{x - \mu_i}{\sigma_i}

    Args:
        state: statistics of each task.
        unnormalized: numbers :math:`x`, `f[...]`, in units of the targets.
        indices: the task :math:`i` of each, `i[...]`, in `[0, N)`; outside, the result
            is NaN.

    Returns:
        The normalised numbers, `f[...]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> state = PopArtState(jnp.array([10.0]), jnp.array([2.0]), jnp.array([104.0]))
        >>> normalize(state, jnp.array([14.0, 10.0]), jnp.array([0, 0])).tolist()
        [2.0, 0.0]

    References:
        Hessel et al., `Multi-task Deep Reinforcement Learning with PopArt
        <https://arxiv.org/abs/1809.04474>`_, 2018.
    """
    return (unnormalized - _pick(state.shift, indices)) / _pick(state.scale, indices)


@checked
def unnormalize(
    state: PopArtState,
    normalized: Annotated[Arg, "f[...]"],
    indices: Annotated[Arg, "i[...]"],
) -> Annotated[Array, "f[...]"]:
    r"""Puts normalised numbers back into the units of their tasks.

    .. math::
        x = \sigma_i \, y + \mu_i

    Args:
        state: statistics of each task.
        normalized: numbers :math:`y`, `f[...]`, dimensionless.
        indices: the task :math:`i` of each, `i[...]`, in `[0, N)`; outside, the result
            is NaN.

    Returns:
        The numbers, `f[...]`, in units of the targets.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> state = PopArtState(jnp.array([10.0]), jnp.array([2.0]), jnp.array([104.0]))
        >>> unnormalize(state, jnp.array([2.0, 0.0]), jnp.array([0, 0])).tolist()
        [14.0, 10.0]

    References:
        Hessel et al., `Multi-task Deep Reinforcement Learning with PopArt
        <https://arxiv.org/abs/1809.04474>`_, 2018.
    """
    return _pick(state.scale, indices) * normalized + _pick(state.shift, indices)


@checked
def unnormalize_linear(
    state: PopArtState,
    inputs: Annotated[Arg, "f[...,N]"],
    indices: Annotated[Arg, "i[...]"],
) -> PopArtOutput:
    r"""Picks the output for each task, and puts it into the units of that task.

    .. math::
        \text{normalized} = y_i, \qquad
        \text{unnormalized} = \sigma_i \, y_i + \mu_i

    Args:
        state: statistics of each task.
        inputs: outputs :math:`y` of a network for all tasks, `f[...,N]`,
            dimensionless.
        indices: the task :math:`i` to pick in each row, `i[...]`, in `[0, N)`; outside,
            the result is NaN.

    Returns:
        A `PopArtOutput` of the normalised and the unnormalised outputs, both `f[...]`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> shift, scale = jnp.array([0.0, 10.0]), jnp.array([1.0, 2.0])
        >>> state = PopArtState(shift, scale, jnp.array([1.0, 104.0]))
        >>> both = unnormalize_linear(state, jnp.array([[5.0, 6.0]]), jnp.array([1]))
        >>> both.normalized.tolist(), both.unnormalized.tolist()
        ([6.0], [22.0])

    References:
        Hessel et al., `Multi-task Deep Reinforcement Learning with PopArt
        <https://arxiv.org/abs/1809.04474>`_, 2018.
    """
    normalized = batched_index(inputs, indices)
    return PopArtOutput(normalized, unnormalize(state, normalized, indices))


@checked
def art(
    state: PopArtState,
    targets: Annotated[Arg, "f[...]"],
    indices: Annotated[Arg, "i[...]"],
    step_size: Annotated[Arg, "f[]", "[0, 1]"],
    scale_lb: Annotated[Arg, "f[]", "[0, inf]"],
    scale_ub: Annotated[Arg, "f[]", "[0, inf]"],
    axis_name: Any = None,
    *,
    mask: Annotated[Arg | None, "b[...]"] = None,
    stop_target_gradients: Flag = True,
) -> PopArtState:
    r"""Adapts the statistics of each task to new targets: adaptively rescaling targets.

    .. math::
        \mu_i' = (1 - \beta) \, \mu_i + \beta \, \overline{y}_i, \qquad
        \nu_i' = (1 - \beta) \, \nu_i + \beta \, \overline{y^2}_i, \qquad
        \sigma_i' = \text{clip}\Bigl(\sqrt{\nu_i' - \mu_i'^2}\Bigr)

    The bars are means over the targets of task `i`, so that the step is of the same
    size however many there are, and a task without targets keeps its statistics. The
    variance is not computed as that difference but merged with the spread of the
    targets, which is right even where the mean is large and the scale small. A target
    that is NaN spoils its own task alone.

    Args:
        state: statistics of each task so far.
        targets: what networks are trained towards, `f[...]`, before normalisation.
        indices: the task of each target, `i[...]`, in `[0, N)`. An index outside
            makes everything NaN, since nobody can say whose target it is.
        step_size: weight :math:`\beta` of the new targets, `f[]`, dimensionless, in
            `[0, 1]`.
        scale_lb: lower bound of the scale, `f[]`, in units of the targets, not
            negative; better positive, as targets are divided by the scale.
        scale_ub: upper bound, `f[]`, in the same units; it wins if the bounds cross.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the targets are split; `None` if they are not.
        mask: whether each target counts, `b[...]`; all do if `None`. The others do
            nothing, whatever they and their indices are.
        stop_target_gradients: whether the statistics are constants when
            differentiating, as a Python `bool` or traced, `b[]`.

    Returns:
        A `PopArtState` of statistics, each `f[N]`.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of its range.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> state = PopArtState(jnp.zeros(1), jnp.ones(1), jnp.ones(1))
        >>> targets, indices = jnp.array([8.0, 12.0]), jnp.array([0, 0])
        >>> art(state, targets, indices, 0.5, 0.01, 100.0).shift.tolist()
        [5.0]

    References:
        Van Hasselt et al., `Learning values across many orders of magnitude
        <https://arxiv.org/abs/1602.07714>`_, 2016.
    """
    state, targets = stop_gradient_if(stop_target_gradients, (state, targets))
    new_mean, new_variance, counts, strays = _moments(
        state.shift, targets, indices, axis_name, mask
    )
    variance = _variance(state, scale_lb, scale_ub)
    shift, variance = merged(state.shift, variance, new_mean, new_variance, step_size)
    # A second moment that overflowed would stay infinite for ever.
    most = jnp.finfo(shift.dtype).max
    variance = jnp.minimum(variance, most)
    second_moment = jnp.minimum(variance + shift**2, most)
    scale = jnp.clip(root(variance), scale_lb, scale_ub)
    new = PopArtState(shift, scale, second_moment)
    kept = jax.tree.map(functools.partial(jnp.where, counts > 0), new, state)
    wrong = (strays > 0) | jnp.isnan(step_size + scale_lb + scale_ub)
    return jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), kept)


Params = Mapping[str, Any]


def pop(params: Params, old: PopArtState, new: PopArtState) -> dict[str, Any]:
    r"""Rescales a linear layer so that its unnormalised outputs are preserved.

    .. math::
        w' = \frac{\sigma}{\sigma'} \, w, \qquad
        b' = \frac{\sigma \, b + \mu - \mu'}{\sigma'},
        \qquad\text{so that}\quad
        \sigma' (w' x + b') + \mu' = \sigma (w x + b) + \mu

    Args:
        params: the parameters of the layer by name: weights "w", `f[...,N]`, and
            biases "b", `f[N]`. Others are left as they are.
        old: statistics of each task that the layer was made for.
        new: statistics that it shall be made for.

    Returns:
        The parameters by name, in the dtypes that they came in.

    Raises:
        ValueError: if a shape does not match, or "w" or "b" is missing.
        TypeError: if `params` is not a mapping, or an array is not floating-point.

    Example:
        >>> params = {"w": jnp.array([[4.0]]), "b": jnp.array([1.0])}
        >>> old = PopArtState(jnp.array([0.0]), jnp.array([1.0]), jnp.array([1.0]))
        >>> new = PopArtState(jnp.array([5.0]), jnp.array([2.0]), jnp.array([29.0]))
        >>> {name: x.tolist() for name, x in pop(params, old, new).items()}
        {'w': [[2.0]], 'b': [-2.0]}

    References:
        Van Hasselt et al., `Learning values across many orders of magnitude
        <https://arxiv.org/abs/1602.07714>`_, 2016.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"pop: params must be a mapping from names to arrays, got "
            f"{type(params).__name__}."
        )
    if not {"w", "b"} <= params.keys():
        raise ValueError(f'pop: params must have "w" and "b", got {sorted(params)}.')
    try:
        w, b = _pop(params["w"], params["b"], old, new)
    except (TypeError, ValueError) as error:  # raised anew, in the caller's words
        message = str(error).replace("pop.layer: ", "pop: ")
        raise type(error)(message.split(" For a batch")[0]) from None
    kept = {"w": w, "b": b}
    dtypes = {name: jnp.result_type(params[name]) for name in kept}
    return {**params, **{name: x.astype(dtypes[name]) for name, x in kept.items()}}


Init = Callable[[], PopArtState]
Update = Callable[[Params, PopArtState, Arg, Arg], tuple[dict[str, Any], PopArtState]]


@bounded
def popart(
    num_outputs: int,
    step_size: Annotated[Arg, "f[]", "[0, 1]"],
    scale_lb: Annotated[Arg, "f[]", "[0, inf]"],
    scale_ub: Annotated[Arg, "f[]", "[0, inf]"],
    axis_name: Any = None,
) -> tuple[Init, Update]:
    """Builds the two functions that keep a linear layer and its targets in step.

    Args:
        num_outputs: the number `N` of tasks, a Python `int`.
        step_size: weight of the targets of one update, `f[]`, dimensionless, in
            `[0, 1]`.
        scale_lb: lower bound of the scale, `f[]`, in units of the targets, not
            negative; better positive, as targets are divided by the scale.
        scale_ub: upper bound, `f[]`, in the same units.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the targets are split; `None` if they are not.

    Returns:
        Two functions. `init()` gives the `PopArtState` of targets with mean 0 and
        variance 1. `update(params, state, targets, indices)` gives the parameters
        after `pop`, and the state after `art`; it takes the keyword `mask` of `art`
        too.

    Raises:
        ValueError: if a setting is a Python number out of its range.
        TypeError: if `num_outputs` is not a Python `int`.

    Example:
        >>> init, update = popart(1, step_size=0.5, scale_lb=0.01, scale_ub=100.0)
        >>> params = {"w": jnp.array([[4.0]]), "b": jnp.array([1.0])}
        >>> params, state = update(params, init(), jnp.array([10.0]), jnp.array([0]))
        >>> state.shift.tolist()
        [5.0]

    References:
        Van Hasselt et al., `Learning values across many orders of magnitude
        <https://arxiv.org/abs/1602.07714>`_, 2016.
    """
    if type(num_outputs) is not int or num_outputs < 1:
        kind = TypeError if type(num_outputs) is not int else ValueError
        raise kind(
            "popart: num_outputs must be a Python int, at least 1, got "
            f"{num_outputs!r}."
        )

    def init() -> PopArtState:
        ones = jnp.ones(num_outputs)
        return PopArtState(jnp.zeros(num_outputs), ones, ones)

    def update(
        params: Params,
        state: PopArtState,
        targets: Arg,
        indices: Arg,
        *,
        mask: Arg | None = None,
    ) -> tuple[dict[str, Any], PopArtState]:
        settings = step_size, scale_lb, scale_ub, axis_name
        new = art(state, targets, indices, *settings, mask=mask)
        return pop(params, state, new), new

    return init, update


def _variance(state: PopArtState, scale_lb: Array, scale_ub: Array) -> Array:
    """Returns the variance that a state stands for.

    That is the square of the scale, which has all its digits, unless the scale is
    clipped. Then it is what the second moment says, as far as the bound allows.
    """
    square = state.scale**2
    low = jnp.where(state.scale > scale_lb, square, 0)
    high = jnp.where(state.scale < scale_ub, square, jnp.inf)
    return jnp.clip(state.second_moment - state.shift**2, low, high)


def _moments(
    shift: Array, targets: Array, indices: Array, axis_name: Any, mask: Array | None
) -> tuple[Array, Array, Array, Array]:
    """Returns the mean, variance and number of each task's targets, and of strays.

    Everything is relative to a centre: first the shift, and then the mean.
    """
    size, total = shift.shape[0], AllSum(axis_name)
    counted = jnp.ones(indices.shape, bool) if mask is None else mask
    targets, indices = (
        x.reshape(-1) for x in (*keep_where(mask, targets), indices.astype(int))
    )
    known = (indices >= 0) & (indices < size)
    tasks = jnp.where(known & counted.reshape(-1), indices, size)

    def sums(x: Array) -> Array:
        """Sums over the targets of each task, on all devices."""
        # One more task takes what does not count.
        each = jax.ops.segment_sum(x, tasks, size + 1)[:-1]
        return total(each, axis=())

    ones = jnp.ones_like(targets)
    errors = targets - _pick(shift, tasks, 0.0)
    counts, totals = sums(jnp.stack([ones, errors], axis=-1)).T
    means = totals / jnp.maximum(counts, 1)
    variances = sums((errors - _pick(means, tasks, 0.0)) ** 2) / jnp.maximum(counts, 1)
    strays = total(counted.reshape(-1) & ~known)
    return shift + means, variances, counts, strays


def _pick(values: Array, tasks: Array, otherwise: float = jnp.nan) -> Array:
    """Returns the value of each task, or another where there is no such task."""
    tasks = tasks.astype(int)
    tasks = jnp.where(tasks >= 0, tasks, values.size)
    return values.at[tasks].get(mode="fill", fill_value=otherwise)


@checked_as("pop.layer")
def _pop(
    w: Annotated[Arg, "f[...,N]"],
    b: Annotated[Arg, "f[N]"],
    old: PopArtState,
    new: PopArtState,
) -> tuple[Annotated[Array, "f[...,N]"], Annotated[Array, "f[N]"]]:
    """Computes what `pop` says."""
    ratio = jnp.broadcast_to(old.scale / new.scale, w.shape)
    return w * ratio, (old.scale * b + (old.shift - new.shift)) / new.scale

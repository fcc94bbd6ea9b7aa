"""Auxiliary tasks: rewards of an agent's own making, and a loss to learn from them.

Predicting how to change what is seen, or what a network makes of it, trains a
representation where the rewards of the task are rare. The trajectory holds `T+1`
observations, and a transition lies between each two: where those are of different
episodes, `mask_t` is false and the change between them is no reward.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.action_value_traces import q_lambda
from rlprims.arrays import contain_nonfinite, keep_where
from rlprims.losses import l2_loss

__all__ = ["feature_control_rewards", "pixel_control_loss", "pixel_control_rewards"]

Cumulant = Literal["feature", "absolute_change", "increase", "decrease", "potential"]


@checked
def feature_control_rewards(
    features: Annotated[Arg, "f[T+1,D]"],
    cumulant_type: Cumulant = "absolute_change",
    discount: Annotated[Arg | None, "f[]|f[T]"] = None,
    *,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T,D]"]:
    r"""Computes rewards for changing the features of the observations.

    .. math::
        r_t = \begin{cases}
            \phi_t & \text{feature} \\
            |\phi_t - \phi_{t-1}| & \text{absolute\_change} \\
            \phi_t - \phi_{t-1} & \text{increase} \\
            \phi_{t-1} - \phi_t & \text{decrease} \\
            \gamma_t \phi_t - \phi_{t-1} & \text{potential}
        \end{cases}

    Args:
        features: features :math:`\phi` at times `0..T`, `f[T+1,D]`, in any units, such
            as the activations of a layer.
        cumulant_type: which of the rewards above.
        discount: discounts at times `1..T`, or one for all, `f[]|f[T]`, dimensionless,
            in `[0, 1]`; 0 on termination. Only "potential" uses it, and needs it.
        mask_t: false for a transition that does not count, such as one from an episode
            to the next, `b[T]`; its rewards are 0, whatever the features hold. `None`
            if all count.

    Returns:
        Rewards at times `1..T`, `f[T,D]`, in units of the features.

    Raises:
        ValueError: if a shape breaks its contract, `cumulant_type` is none of the
            above, or "potential" has no `discount`.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> features = jnp.array([[0.0], [2.0], [1.0]])
        >>> feature_control_rewards(features).ravel().tolist()
        [2.0, 1.0]
        >>> feature_control_rewards(features, "potential", 0.5).ravel().tolist()
        [1.0, -1.5]

    References:
        Jaderberg et al., `Reinforcement Learning with Unsupervised Auxiliary Tasks
        <https://arxiv.org/abs/1611.05397>`_, 2016.
    """
    if cumulant_type == "potential" and discount is None:
        raise ValueError(
            "feature_control_rewards: discount must be given for 'potential'."
        )
    before, after = keep_where(mask_t, features[:-1], features[1:])
    match cumulant_type:
        case "feature":
            return after
        case "absolute_change":
            return jnp.abs(after - before)
        case "increase":
            return after - before
        case "decrease":
            return before - after
        case "potential":
            weight = jnp.broadcast_to(jnp.asarray(discount), len(after))[:, None]
            return weight * contain_nonfinite(after, weight) - before


@checked
def pixel_control_rewards(
    observations: Annotated[Arg, "f[T+1,H,W,C]"],
    cell_size: int,
    *,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T,Y,X]"]:
    r"""Computes rewards for changing the pixels of each cell of an image.

    .. math::
        r_{t,y,x} = \frac{1}{n^2 C} \sum_{i,j < n} \sum_c
            \bigl|o_{t,\,ny+i,\,nx+j,\,c} - o_{t-1,\,ny+i,\,nx+j,\,c}\bigr|

    Integers are refused, since differences of `uint8` wrap around: convert them first,
    and divide by 255 if that is to be the unit.

    Args:
        observations: images at times `0..T`, `f[T+1,H,W,C]`, in any units.
        cell_size: the height and width :math:`n` of a cell in pixels, a Python `int`
            that divides those of the image.
        mask_t: false for a transition that does not count, such as one from an episode
            to the next, `b[T]`; its rewards are 0, whatever the images hold. `None` if
            all count.

    Returns:
        Rewards at times `1..T` for each cell, `f[T,Y,X]` with `Y = H / cell_size` and
        `X = W / cell_size`, in units of the observations.

    Raises:
        ValueError: if a shape breaks its contract, or the cells do not fill the image.
        TypeError: if a dtype breaks its contract, or `cell_size` is no Python `int`.

    Example:
        >>> black, white = jnp.zeros((4, 4, 3)), jnp.ones((4, 4, 3))
        >>> half = black.at[:, 2:].set(1.0)
        >>> pixel_control_rewards(jnp.stack([black, half, white]), 2).tolist()
        [[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]

    References:
        Jaderberg et al., `Reinforcement Learning with Unsupervised Auxiliary Tasks
        <https://arxiv.org/abs/1611.05397>`_, 2016.
    """
    rows, columns = _cells("pixel_control_rewards", observations, cell_size)
    before, after = keep_where(mask_t, observations[:-1], observations[1:])
    changes = jnp.mean(jnp.abs(after - before), axis=-1)
    in_cells = (len(changes), rows, cell_size, columns, cell_size)
    return jnp.mean(changes.reshape(in_cells), axis=(2, 4))


@checked
def pixel_control_loss(
    observations: Annotated[Arg, "f[T+1,H,W,C]"],
    actions: Annotated[Arg, "i[T]"],
    action_values: Annotated[Arg, "f[T+1,Y,X,A]"],
    discount_factor: Annotated[Arg, "f[]|f[T]"],
    cell_size: int,
    *,
    stop_target_gradients: Flag = True,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T,Y,X]"]:
    r"""Computes the loss of learning to change the pixels of each cell of an image.

    Each cell is a task of its own, with `pixel_control_rewards` and action values that
    learn from returns over the whole trajectory, bootstrapped at its end.

    .. math::
        L_{t,y,x} = \tfrac12 \bigl(G_{t-1,y,x} - q_{t-1,y,x}(a_{t-1})\bigr)^2, \qquad
        G_{t-1} = r_t + \gamma_t \, G_t, \qquad G_T = \max_a q_T(a)

    Args:
        observations: images at times `0..T`, `f[T+1,H,W,C]`, in any units; not
            integers, whose differences wrap around.
        actions: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        action_values: the value of each action for each cell at times `0..T`,
            `f[T+1,Y,X,A]` with `Y = H / cell_size` and `X = W / cell_size`, in units of
            the observations; minus infinity for an action that is not legal there.
        discount_factor: discounts at times `1..T`, or one for all, `f[]|f[T]`,
            dimensionless, in `[0, 1]`; 0 on termination.
        cell_size: the height and width of a cell in pixels, a Python `int` that divides
            those of the image.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        mask: true for the actions that are legal at times `1..T`, `b[T,A]`; the others
            are as if left out. `None` if all are.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others are as if left out, NaN
            included. A step whose next observation is of another episode must not
            count, and is marked as truncated if nothing else ends the episode. All
            count if `None`.

    Returns:
        The losses of each step and cell, `f[T,Y,X]`, in squared units of the
        observations; 0 at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract, or the cells do not fill the image.
        TypeError: if a dtype breaks its contract, or `cell_size` is no Python `int`.

    Example:
        >>> observations = jnp.array([0.0, 1.0, 1.0]).reshape(3, 1, 1, 1)
        >>> action_values = jnp.zeros((3, 1, 1, 2))
        >>> losses = pixel_control_loss(
        ...     observations, jnp.array([0, 1]), action_values, 0.5, 1
        ... )
        >>> losses.ravel().tolist()
        [0.5, 0.0]

    References:
        Jaderberg et al., `Reinforcement Learning with Unsupervised Auxiliary Tasks
        <https://arxiv.org/abs/1611.05397>`_, 2016.
    """
    cells = _cells("pixel_control_loss", observations, cell_size)
    if action_values.shape[1:3] != cells:
        raise ValueError(
            f"pixel_control_loss: action_values has shape {action_values.shape}, "
            f"expected f[T+1,Y,X,A] with (Y, X) = (H, W) / cell_size = {cells}."
        )
    rewards = pixel_control_rewards(observations, cell_size, mask_t=mask_t)
    discount_t = jnp.broadcast_to(discount_factor, len(actions))

    def errors(q: Array, r_t: Array) -> Array:
        return q_lambda(
            q[:-1],
            actions,
            r_t,
            discount_t,
            q[1:],
            1.0,
            stop_target_gradients,
            mask=mask,
            truncation_t=truncation_t,
            mask_t=mask_t,
        )

    return l2_loss(jax.vmap(jax.vmap(errors, 1, 1), 1, 1)(action_values, rewards))


def _cells(fn: str, observations: Array, cell_size: int) -> tuple[int, int]:
    """Returns how many cells images have from top to bottom, and from left to right."""
    height, width = observations.shape[1:3]
    if cell_size < 1 or height % cell_size or width % cell_size:
        raise ValueError(
            f"{fn}: cell_size must be positive and divide the height and width of the "
            f"images, {height} and {width}, got {cell_size}."
        )
    return height // cell_size, width // cell_size

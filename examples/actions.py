"""What an agent can do: discrete actions, or continuous ones within bounds."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from dm_env import specs
from jax import Array

import rlprims


def number_of(spec: Any) -> int:
    """Returns how many discrete actions there are.

    Raises:
        ValueError: if the actions are no discrete ones.
    """
    if not isinstance(spec, specs.DiscreteArray):
        raise ValueError(f"this agent needs discrete actions, got {spec}")
    return spec.num_values


class Bounds:
    """Where continuous actions lie. Agents act in [-1, 1], environments in these.

    Args:
        spec: of floats of any shape, with finite bounds.

    Attributes:
        size: how many numbers an action has, `A`.
    """

    def __init__(self, spec: specs.Array) -> None:
        floats = np.issubdtype(spec.dtype, np.floating)
        if not (isinstance(spec, specs.BoundedArray) and floats):
            raise ValueError(f"actions must be floats within bounds, got {spec}.")
        self.minimum, self.maximum = (
            np.broadcast_to(bound, spec.shape).astype(np.float32).ravel()
            for bound in (spec.minimum, spec.maximum)
        )
        finite = np.isfinite(self.minimum) & np.isfinite(self.maximum)
        if not np.all(finite & (self.minimum < self.maximum)):
            raise ValueError(
                "the bounds of actions must be finite, with room between them, "
                f"got {spec}."
            )
        self.shape, self.size = spec.shape, self.minimum.size

    def rescale(self, actions: Array) -> Array:
        """Brings actions in [-1, 1], `f[B,A]`, to the bounds and shape they have."""
        low, high = jnp.asarray(self.minimum), jnp.asarray(self.maximum)
        rescaled = rlprims.rescale_action(actions, low, high)
        return rescaled.reshape(-1, *self.shape)

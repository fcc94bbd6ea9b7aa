"""Networks of one observation each, for the agents of `anakin.py`."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class MLP(nn.Module):
    """Dense layers on one flattened observation."""

    hidden: Sequence[int]
    outputs: int
    activation: Callable[[Array], Array] = nn.relu
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Returns the outputs, `f[outputs]`."""
        x = observation.astype(jnp.float32).reshape(-1)
        for units in self.hidden:
            x = nn.Dense(units)(x)
            x = self.activation(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.outputs)(x)


class ActorCritic(nn.Module):
    """A policy and a value that share nothing."""

    hidden: Sequence[int]
    num_actions: int

    @nn.compact
    def __call__(self, observation: Array) -> tuple[Array, Array]:
        """Returns the logits of the actions, `f[A]`, and the value, `f[]`."""
        logits = MLP(self.hidden, self.num_actions, nn.tanh)(observation)
        return logits, MLP(self.hidden, 1, nn.tanh)(observation)[0]

"""What several agents have for a network, unless they are given another one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class Network(NamedTuple):
    """Any pure functions, of any library: of Flax by default."""

    init: Callable[[Array, Array], Any]  # from a key and an observation: parameters
    apply: Callable[..., Any]  # from parameters and an observation: outputs


class QNetwork(nn.Module):
    """Maps an observation to the values of all actions, `f[A]`."""

    num_actions: int
    hidden: int

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Returns the action values."""
        x = observation.astype(jnp.float32).reshape(-1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.num_actions)(x)


class PolicyAndCritic(NamedTuple):
    """Any pure functions, of any library: of Flax by default."""

    init_policy: Callable[[Array, Array], Any]  # from a key and an observation
    policy: Callable[[Any, Array], Any]  # from parameters and an observation
    init_critic: Callable[[Array, Array, Array], Any]  # and from an action, `f[A]`
    critic: Callable[[Any, Array, Array], Any]


class Critic(nn.Module):
    """Maps an observation and an action to their value, `f[]`."""

    hidden: int

    @nn.compact
    def __call__(self, observation: Array, action: Array) -> Array:
        """Returns the value."""
        x = jnp.concatenate([observation.astype(jnp.float32).reshape(-1), action])
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(1)(x)[0]

"""A network with memory: what recurrent agents have around their core.

    network = Recurrent(make_core("lstm", 32), outputs=3)
    carry = network.initial_carry(batch)
    params = network.init(key, carry, observations, first)
    carry, outputs = network.apply(params, carry, observations, first)

Observations have a time axis and a batch axis, `[T,B,...]`. The carry is what the
network remembers: before the first of these steps, and after the last. Its structure is
the core's own business. Where `first: b[T,B]` is true an episode starts, and there the
memory is that of `initial_carry`, whatever it was.

Agents take any object with these three functions as their network.
"""

import math
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from cores import unroll
from jax import Array


class Network(Protocol):
    """What an agent needs of its network: pure functions."""

    def initial_carry(self, batch: int, /) -> Any:
        """Returns the memory of `batch` environments before an episode."""

    def init(self, key: Any, carry: Any, observations: Array, first: Array, /) -> Any:
        """Returns parameters."""

    def apply(
        self, params: Any, carry: Any, observations: Array, first: Array, /
    ) -> Any:
        """Returns the last carry, and outputs `f[T,B,outputs]`."""


class Recurrent(nn.Module):
    """A dense layer, any core, and a linear layer."""

    core: nn.RNNCellBase
    outputs: int
    hidden: int = 32  # units of the dense layer

    @nn.compact
    def __call__(self, carry: Any, observations: Array, first: Array) -> Any:
        """Returns the last carry, and outputs `f[T,B,outputs]`."""
        size = math.prod(observations.shape[first.ndim :])  # also of no steps at all
        x = observations.astype(jnp.float32).reshape(*first.shape, size)
        x = nn.relu(nn.Dense(self.hidden)(x))
        carry, x = unroll(self.core, carry, x, first)
        return carry, nn.Dense(self.outputs)(x)

    @nn.nowrap
    def initial_carry(self, batch: int) -> Any:
        """Returns the memory of `batch` environments before an episode."""
        return self.core.initialize_carry(jax.random.key(0), (batch, self.hidden))

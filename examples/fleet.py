"""Many environments, spread over many devices, that learn as if they were on one.

Each device runs the same program with its share of the environments, under
`jax.shard_map`. Three rules make the number of devices a detail, which changes results
by rounding alone:

*   **Randomness belongs to an environment, not to a device.** Every draw comes from a
    key folded with the number of its environment among all of them, or with that of a
    stratum of environments.
*   **A mean is over all devices.** It is a sum over all, divided by a count over all.
    The gradient of such a mean is the gradient of the whole batch, on every device.
*   **A batch is composed by environment.** Each of them, or each stratum of
    neighbours, gives the same share to it.

A fleet on one device has no `axis_name`, and the same methods.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jittable import Environment
from loop import Timestep

import rlprims


class World(NamedTuple):
    """The environments of one device: `B` of them on a leading axis."""

    states: Any
    timestep: Timestep  # what each said last


@dataclass(frozen=True)
class Fleet:
    """What a device does with its share of the environments.

    Args:
        env: the environment that all are copies of.
        size: how many there are on all devices together, a multiple of the devices.
        axis_name: the axis of the mesh they are spread over; `None` on one device.
    """

    env: Environment
    size: int
    axis_name: str | None = None

    @property
    def total(self) -> rlprims.AllSum:
        """Sums over all that a device has, and over all devices."""
        return rlprims.AllSum(self.axis_name)

    def mean(self, x: Array, mask: Array) -> Array:
        """Returns the mean of what counts on all devices, 0 if nothing does."""
        count = self.total(mask.astype(x.dtype))
        return self.total(jnp.where(mask, x, 0.0)) / jnp.maximum(count, 1.0)

    def numbers(self, count: int) -> Array:
        """Deals `count` things out to the devices; returns the numbers of its own."""
        if self.axis_name is None:
            return jnp.arange(count)
        mine = count // jax.lax.axis_size(self.axis_name)
        return jax.lax.axis_index(self.axis_name) * mine + jnp.arange(mine)

    def keys(self, key: Array, count: int | None = None) -> Array:
        """Returns a key for each thing dealt to this device: each environment, say."""
        numbers = self.numbers(self.size if count is None else count)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

    def own(self, tree: Any) -> Any:
        """Marks arrays as differing from device to device, as loops must be told."""
        if self.axis_name is None:
            return tree
        here = jax.lax.axis_index(self.axis_name) >= 0  # true, and differs in name
        return jax.tree.map(lambda x: jnp.where(here, x, x), tree)

    def start(self, key: Array, count: int | None = None) -> World:
        """Starts an episode everywhere."""
        key_reset, key_step = (self.keys(k, count) for k in jax.random.split(key))
        states = jax.vmap(self.env.reset)(key_reset)
        idle = jnp.zeros(len(key_step), jnp.int32)
        return World(*self.own(jax.vmap(self.env.step)(states, idle, key_step)))

    def step(self, world: World, actions: Array, keys: Array) -> World:
        """Acts everywhere, with a key for each environment."""
        return World(*self.own(jax.vmap(self.env.step)(world.states, actions, keys)))

    def evaluate(self, key: Array, episodes: int, policy: Any) -> Array:
        """Returns the mean return of one episode in each of `episodes` environments.

        Args:
            key: decides how the episodes start.
            episodes: how many, on all devices together.
            policy: a function from an observation to an action.
        """

        def step(carry: Any, key: Array) -> tuple[Any, None]:
            world, returns, playing = carry
            actions = jax.vmap(policy)(world.timestep.observation)
            world = self.step(world, actions, self.keys(key, episodes))
            returns += jnp.where(playing, world.timestep.r_t, 0.0)
            return (world, returns, playing & ~world.timestep.last), None

        key_start, key_steps = jax.random.split(key)
        world = self.start(key_start, episodes)
        nothing = jnp.zeros_like(world.timestep.r_t)
        keys = jax.random.split(key_steps, self.env.episode_steps)
        start = world, nothing, ~world.timestep.last
        (_, returns, _), _ = jax.lax.scan(step, start, keys)
        return self.total(returns) / episodes

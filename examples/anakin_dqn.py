"""Double DQN as one step of a compiled loop, for `anakin.py`.

Paper: van Hasselt, Guez and Silver, "Deep Reinforcement Learning with Double
Q-learning", 2015, https://arxiv.org/abs/1509.06461. dqn.py is the same agent in plain
steps, and says where it deviates. Here, besides:

*   Many environments act at once. An update, or a few, follow every step of them all.
*   A batch is drawn evenly by environment, uniformly in time.
*   The optimiser is Adam.

An agent is an object of three pure functions, for one seed::

    init(key, fleet) -> state                        # of the share of one device
    iterate(state, key, i, fleet) -> (state, count)  # acts and learns
    exploit(params, observation) -> action

`i` is the number of the iteration and the same for all seeds, so that what depends on
it is no choice that `jax.vmap` would have to make both ways. `count` is the number of
transitions. Where `fleet` takes a mean, it is over all devices, which keeps parameters
the same on each.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from anakin_networks import MLP
from fleet import Fleet, World
from jax import Array
from jittable import Environment
from loop import Transition

import rlprims


@dataclass(frozen=True)
class DQNConfig:
    """Flags of double DQN, which learns from a replay."""

    discount: float = 0.99  # of a reward one step later
    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer
    learning_rate: float = 1e-3  # of Adam
    batch_size: int = 128  # transitions to an update
    updates: int = 1  # after every step of all environments
    capacity: int = 65_536  # timesteps kept of all environments together
    target_period: int = 200  # updates of the online network to one of the target
    epsilon: float = 0.05  # share of random actions, after a linear decay from 1
    epsilon_decay: float = 0.3  # length of that decay, as a share of training


class Row(NamedTuple):
    """What a replay keeps: what an environment said, and the action in answer."""

    observation: Array
    r_t: Array
    discount_t: Array
    first: Array
    action: Array


class Chances(NamedTuple):
    """The random part of a step."""

    act: Array  # k[B]
    world: Array  # k[B]
    replay: Array  # u32[updates, transitions, 2]


class DQNState(NamedTuple):
    """All that DQN changes."""

    params: Any
    target_params: Any
    opt_state: Any
    replay: Row  # of arrays of [rows, B], a ring for each environment
    world: World


def dqn_errors(q_values: Any, params: Any, target_params: Any, batch: Any) -> Array:
    """Returns the error of double Q-learning of each transition."""
    q_values = jax.vmap(q_values, in_axes=(None, 0))
    return jax.vmap(rlprims.double_q_learning)(
        q_values(params, batch.obs_tm1),
        batch.a_tm1,
        batch.r_t,
        batch.discount_t,
        q_values(target_params, batch.obs_t),
        q_values(params, batch.obs_t),
    )


class DQN:
    """Double DQN with a replay on the device, `examples/dqn.py` tells more of it."""

    rollout = 16  # steps of each environment to an iteration

    def __init__(self, config: DQNConfig, env: Environment, iterations: int) -> None:
        self.config, self.actions = config, env.action_spec().num_values
        self.blank = jnp.zeros(env.observation_spec().shape, jnp.float32)
        self.network = MLP(config.hidden, self.actions)
        self.optimizer = optax.adam(config.learning_rate)
        steps = iterations * self.rollout
        decay = max(1, round(config.epsilon_decay * steps))
        self.epsilon = optax.linear_schedule(1.0, config.epsilon, decay)

    def init(self, key: Array, fleet: Fleet) -> DQNState:
        """Returns the state before the first step."""
        key_params, key_world = jax.random.split(key)
        params = self.network.init(key_params, self.blank)
        world = fleet.start(key_world)
        saw = world.timestep
        actions = jnp.zeros(saw.first.shape, jnp.int32)
        rows = self.config.capacity // fleet.size
        row = Row(saw.observation, saw.r_t, saw.discount_t, saw.first, actions)
        blank = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), row)
        opt_state = self.optimizer.init(params)
        return DQNState(params, params, opt_state, fleet.own(blank), world)

    def exploit(self, params: Any, observation: Array) -> Array:
        """Returns the best action."""
        return jnp.argmax(self.q_values(params, observation))

    def q_values(self, params: Any, observation: Array) -> Any:
        """Returns the value of every action, `f[A]`."""
        return self.network.apply(params, observation)

    def iterate(
        self, state: DQNState, key: Array, i: Array, fleet: Fleet
    ) -> tuple[DQNState, Array]:
        """Takes a few steps, with random numbers that are drawn together: it is faster.

        Returns:
            The next state, and the number of transitions.
        """
        keys = jax.random.split(key, self.rollout)
        steps = i * self.rollout + jnp.arange(self.rollout)
        chances = jax.vmap(partial(self.chances, fleet))(keys)
        step = partial(self.step, fleet)
        state, counts = jax.lax.scan(step, state, (steps, chances))
        return state, jnp.sum(counts)

    def chances(self, fleet: Fleet, key: Array) -> Chances:
        """Draws what one step needs."""
        key_act, key_world, key_replay = jax.random.split(key, 3)
        updates = jax.random.split(key_replay, self.config.updates)
        keys = jax.vmap(partial(fleet.keys, count=self.config.batch_size))(updates)
        bits = jax.vmap(jax.vmap(partial(jax.random.bits, shape=(2,))))(keys)
        return Chances(fleet.keys(key_act), fleet.keys(key_world), bits)

    def step(
        self, fleet: Fleet, state: DQNState, now: tuple[Array, Chances]
    ) -> tuple[DQNState, Array]:
        """Acts once everywhere, remembers it, and learns from the replay."""
        step, chances = now
        world, saw = state.world, state.world.timestep
        q = jax.vmap(self.q_values, (None, 0))(state.params, saw.observation)
        sample = rlprims.epsilon_greedy(self.epsilon(step)).sample
        actions = jax.vmap(sample)(chances.act, q)
        row = Row(saw.observation, saw.r_t, saw.discount_t, saw.first, actions)
        slot = step % (self.config.capacity // fleet.size)
        replay = jax.tree.map(
            lambda kept, new: jax.lax.dynamic_update_index_in_dim(kept, new, slot, 0),
            state.replay,
            row,
        )
        learner = state.params, state.target_params, state.opt_state
        for u, bits in enumerate(chances.replay):
            batch, mask = self.draw(replay, bits, step, fleet)
            done = step * self.config.updates + u + 1
            learner = self.learn(*learner, batch, mask, done, fleet)
        world = fleet.step(world, actions, chances.world)
        return DQNState(*learner, replay, world), fleet.total(~world.timestep.first)

    def draw(
        self, replay: Row, bits: Array, step: Array, fleet: Fleet
    ) -> tuple[Transition, Array]:
        """Takes one transition from each stratum of environments, `bits` say which.

        With fewer transitions than environments a stratum is several of them, with
        more an environment is several strata.

        Returns:
            The transitions, and whether each is one: a reset is not.
        """
        rows, size = replay.r_t.shape
        within = max(fleet.size // self.config.batch_size, 1)  # environments to each
        column = jnp.arange(len(bits)) * size // len(bits)
        column += (bits[:, 0] % within).astype(jnp.int32)
        known = jnp.minimum(step, rows - 1)  # pairs of neighbours in the ring
        pairs = jnp.maximum(known, 1).astype(jnp.uint32)
        age = (bits[:, 1] % pairs).astype(jnp.int32)
        t, tm1 = (step - age) % rows, (step - age - 1) % rows
        transitions = Transition(
            obs_tm1=replay.observation[tm1, column],
            a_tm1=replay.action[tm1, column],
            r_t=replay.r_t[t, column],
            discount_t=self.config.discount * replay.discount_t[t, column],
            obs_t=replay.observation[t, column],
        )
        return transitions, ~replay.first[t, column] & (known > 0)

    def learn(
        self,
        params: Any,
        target_params: Any,
        opt_state: Any,
        batch: Transition,
        mask: Array,
        done: Array,
        fleet: Fleet,
    ) -> tuple[Any, Any, Any]:
        """Updates the network, and now and then its copy."""

        def loss(params: Any) -> Array:
            errors = dqn_errors(self.q_values, params, target_params, batch)
            return fleet.mean(rlprims.huber_loss(errors), mask)

        updates, opt_state = self.optimizer.update(jax.grad(loss)(params), opt_state)
        params = optax.apply_updates(params, updates)
        target_params = rlprims.periodic_update(
            params, target_params, done, self.config.target_period
        )
        return params, target_params, opt_state

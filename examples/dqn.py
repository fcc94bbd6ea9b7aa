"""Double DQN, on Catch or on any Gymnasium environment with discrete actions.

    python examples/dqn.py
        reaches a return of at least 0.98 in Catch, within 1 minute

Paper: van Hasselt, Guez and Silver, "Deep Reinforcement Learning with Double
Q-learning", 2015, https://arxiv.org/abs/1509.06461. It plays Atari games, this plays
small ones, and so it deviates:

*   Two dense layers see one observation; there, convolutions see four frames.
*   It learns at every step from the first; there, at every fourth, after random play.
*   Replay, target period, decay of ε and step size suit thousands of steps, there
    millions. RMSProp has no momentum.
*   Rewards are not clipped. Evaluation is greedy, there almost.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import console
import jax
import jax.numpy as jnp
import optax
from actions import number_of
from dm_env import specs
from jax import Array
from loop import Metrics, Timestep, Transition
from networks import Network, QNetwork
from sources import Replay, Stored

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains double DQN and draws its learning curve."""

    discount: float = 0.99  # of a reward one step later
    hidden: int = 64  # units in each of the two hidden layers
    learning_rate: float = 5e-4  # of RMSProp
    batch_size: int = 32  # transitions learned from at each step
    capacity: int = 10_000  # transitions kept for replay
    target_period: int = 500  # updates from one copy to the target network to the next
    epsilon: float = 0.05  # share of random actions, after a linear decay from 1
    epsilon_steps: int = 2000  # length of that decay


class Learner(NamedTuple):
    """What learning changes."""

    params: Any
    target_params: Any
    opt_state: Any


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    replay: Stored  # of transitions
    observation: Array  # f[B,...], what the agent saw last
    action: Array  # i[B], and what it did
    steps: Array  # i[]


class DQN:
    """The rules by which the agent acts and learns: pure functions of its state."""

    def __init__(
        self,
        config: Config,
        observations: specs.Array,
        actions: specs.DiscreteArray,
        network: Network | None = None,
    ) -> None:
        default = QNetwork(number_of(actions), config.hidden)
        self.config, self.shape = config, observations.shape
        self.network = network or Network(default.init, default.apply)
        self.replay = Replay(config.capacity, config.batch_size)
        self.epsilon = optax.linear_schedule(1.0, config.epsilon, config.epsilon_steps)
        self.optimizer = optax.rmsprop(
            config.learning_rate, decay=0.95, eps=1e-5, centered=True
        )
        self.key_init, self.key_explore, self.key_replay = jax.random.split(
            jax.random.key(config.seed), 3
        )

    def init(self) -> State:
        """Returns the state before the first step."""
        blank, batch = jnp.zeros(self.shape), self.config.environments
        params = self.network.init(self.key_init, blank)
        target_params = jax.tree.map(jnp.copy, params)
        return State(
            Learner(params, target_params, self.optimizer.init(params)),
            self.replay.init(Transition(blank, 0, 0.0, 0.0, blank)),
            observation=jnp.zeros((batch, *self.shape)),
            action=jnp.zeros(batch, jnp.int32),
            steps=jnp.int32(0),
        )

    def q_values(self, params: Any, observations: Array) -> Any:
        """Returns the values of all actions, `f[B,A]`."""
        return jax.vmap(self.network.apply, in_axes=(None, 0))(params, observations)

    def step(self, state: State, timestep: Timestep) -> tuple[State, Array, Metrics]:
        """Remembers what happened, learns from a batch of memories, and acts."""
        learner, replay, observation, action, steps = state
        transition = Transition(
            observation,
            action,
            timestep.r_t,
            self.config.discount * timestep.discount_t,
            timestep.observation,
        )
        replay = self.replay.add(replay, transition, ~timestep.first)
        batch = self.replay.sample(jax.random.fold_in(self.key_replay, steps), replay)
        learner, metrics = jax.lax.cond(
            steps > 0, self.learn, self.wait, learner, batch, steps
        )
        q_values = self.q_values(learner.params, timestep.observation)
        action = self.explore(q_values, steps)
        observation = timestep.observation.astype(observation.dtype)
        return State(learner, replay, observation, action, steps + 1), action, metrics

    def explore(self, q_values: Array, steps: Array) -> Array:
        """Returns random actions with probability ε, and else the best ones."""
        key = jax.random.fold_in(self.key_explore, steps)
        epsilon = self.epsilon(steps * self.config.environments)
        return rlprims.epsilon_greedy(epsilon).sample(key, q_values)

    def loss(self, params: Any, target_params: Any, batch: Transition) -> Array:
        """Returns the mean Huber loss of the double Q-learning errors."""
        errors = jax.vmap(rlprims.double_q_learning)(
            self.q_values(params, batch.obs_tm1),
            batch.a_tm1,
            batch.r_t,
            batch.discount_t,
            self.q_values(target_params, batch.obs_t),
            self.q_values(params, batch.obs_t),
        )
        return jnp.mean(rlprims.huber_loss(errors))

    def learn(
        self, learner: Learner, batch: Transition, steps: Array
    ) -> tuple[Learner, Metrics]:
        """Follows the gradient of the loss, and now and then moves the target."""
        params, target_params, opt_state = learner
        loss, gradients = jax.value_and_grad(self.loss)(params, target_params, batch)
        updates, opt_state = self.optimizer.update(gradients, opt_state)
        params = optax.apply_updates(params, updates)
        target_params = optax.periodic_update(
            params, target_params, steps, self.config.target_period
        )
        return Learner(params, target_params, opt_state), {"loss": loss}

    def wait(
        self, learner: Learner, batch: Transition, steps: Array
    ) -> tuple[Learner, Metrics]:
        """Learns nothing, as there is nothing to learn from yet."""
        return learner, {"loss": jnp.nan}

    def initial_carry(self, batch: int) -> None:
        """Returns nothing: to exploit takes no memory."""

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the best actions."""
        q_values = self.q_values(state.learner.params, timestep.observation)
        return jnp.argmax(q_values, axis=-1), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, DQN))

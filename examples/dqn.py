"""Double DQN, on Catch or on any Gymnasium environment with discrete actions.

    python examples/dqn.py --seed 1
    python examples/dqn.py --env CartPole-v1 --episodes 300

Paper: van Hasselt, Guez and Silver, "Deep Reinforcement Learning with Double
Q-learning", 2015, https://arxiv.org/abs/1509.06461. It plays Atari games, this plays
small ones, and so it deviates:

*   Two dense layers see one observation; there, convolutions see four frames.
*   It learns at every step from the first; there, at every fourth, after random play.
*   Replay, target period, decay of ε and step size suit thousands of steps, there
    millions. RMSProp has no momentum.
*   Rewards are not clipped. Evaluation is greedy, there almost.

Expect a mean return of 1.0 on Catch after 1000 episodes, in less than half a minute on
two CPU cores. README.md has the measurements, and flags that suit CartPole-v1.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import console
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from dm_env import specs
from jax import Array
from loop import Transition

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains double DQN and draws its learning curve."""

    discount: float = 0.99  # of a reward one step later
    hidden: int = 64  # units in each of the two hidden layers
    learning_rate: float = 5e-4  # of RMSProp
    batch_size: int = 32  # transitions learned from at each step
    capacity: int = 10_000  # transitions kept for replay
    target_period: int = 500  # steps between updates of the target network
    epsilon: float = 0.05  # share of random actions, after a linear decay from 1
    epsilon_steps: int = 2000  # length of that decay


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


class State(NamedTuple):
    """All that learning changes."""

    params: Any
    target_params: Any
    opt_state: Any
    replay: Transition  # of arrays with a leading axis, the last `capacity` transitions
    steps: Array


class DQN:
    """The rules by which the agent acts and learns: pure functions of its state."""

    def __init__(
        self, config: Config, observations: specs.Array, actions: specs.DiscreteArray
    ) -> None:
        self.config = config
        self.shape = observations.shape
        self.network = QNetwork(actions.num_values, config.hidden)
        self.epsilon = optax.linear_schedule(1.0, config.epsilon, config.epsilon_steps)
        self.optimizer = optax.rmsprop(
            config.learning_rate, decay=0.95, eps=1e-5, centered=True
        )
        self.key_init, self.key_explore, self.key_replay = jax.random.split(
            jax.random.key(config.seed), 3
        )

    def init(self) -> State:
        """Returns the state before the first step."""
        size, blank = self.config.capacity, jnp.zeros(self.shape)
        params = self.network.init(self.key_init, blank)
        return State(
            params=params,
            target_params=jax.tree.map(jnp.copy, params),
            opt_state=self.optimizer.init(params),
            replay=jax.tree.map(
                lambda x: jnp.zeros((size, *jnp.shape(x)), jnp.result_type(x)),
                Transition(blank, 0, 0.0, 0.0, blank),
            ),
            steps=jnp.int32(0),
        )

    def q_values(self, params: Any, observation: Array) -> Any:
        """Returns the value of every action, `f[A]`."""
        return self.network.apply(params, observation)

    def explore(self, state: State, observation: Array) -> Array:
        """Returns a random action with probability ε, and else the best one."""
        q_values = self.q_values(state.params, observation)
        key = jax.random.fold_in(self.key_explore, state.steps)
        policy = rlprims.epsilon_greedy(self.epsilon(state.steps))
        return policy.sample(key, q_values)

    def exploit(self, state: State, observation: Array) -> Array:
        """Returns the best action."""
        return jnp.argmax(self.q_values(state.params, observation))

    def loss(self, params: Any, target_params: Any, batch: Transition) -> Array:
        """Returns the mean Huber loss of the double Q-learning errors."""
        q_values = jax.vmap(self.q_values, in_axes=(None, 0))
        errors = jax.vmap(rlprims.double_q_learning)(
            q_values(params, batch.obs_tm1),
            batch.a_tm1,
            batch.r_t,
            batch.discount_t,
            q_values(target_params, batch.obs_t),
            q_values(params, batch.obs_t),
        )
        return jnp.mean(rlprims.huber_loss(errors))

    def learn(self, state: State, transition: Transition) -> State:
        """Remembers a transition, and learns from a batch of those remembered."""
        config, steps = self.config, state.steps + 1
        slot = state.steps % config.capacity
        replay = jax.tree.map(
            lambda kept, new: kept.at[slot].set(new.astype(kept.dtype)),
            state.replay,
            transition._replace(discount_t=config.discount * transition.discount_t),
        )
        key = jax.random.fold_in(self.key_replay, state.steps)
        filled = jnp.minimum(steps, config.capacity)
        chosen = jax.random.randint(key, (config.batch_size,), 0, filled)
        batch = jax.tree.map(lambda kept: kept[chosen], replay)
        gradients = jax.grad(self.loss)(state.params, state.target_params, batch)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        target_params = optax.periodic_update(
            params, state.target_params, steps, config.target_period
        )
        return State(params, target_params, opt_state, replay, steps)


if __name__ == "__main__":
    sys.exit(console.main(Config, DQN))

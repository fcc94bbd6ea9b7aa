"""Rainbow, on Catch or on any environment with discrete actions.

    python examples/rainbow.py
        reaches a return of at least 0.98 in Catch, within 1 minute

It is DQN with six improvements. Each has a flag that turns it off, which leaves the
plainer algorithm:

    --no-double           the network that learns no longer selects the next action
    --no-duelling         one stream to the values of actions, not two
    --no-noisy            explores at random, at a rate ε, not by noise in the weights
    --no-prioritized      draws all that is in replay alike
    --no-distributional   learns mean returns, by Huber's loss; C51, distributions
    --n-steps 1           bootstraps after one step

Paper: Hessel et al., "Rainbow: Combining Improvements in Deep Reinforcement Learning",
2017, https://arxiv.org/abs/1710.02298. It plays Atari games, this plays small ones,
and so it deviates:

*   A dense layer sees one observation; there, convolutions see four frames. It has no
    noise, the layers after it do.
*   The noise is smaller at first. Environments share each draw of it.
*   It learns at every step from the first; there, at every fourth, after random play.
*   Replay, target period, atoms and step size suit thousands of steps and returns
    within 1, there millions and 10. Rewards are not clipped.
*   Priorities follow the cross-entropy that is minimised; there, the Kullback-Leibler
    divergence, which is less by the entropy of the target.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import console
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from actions import number_of
from dm_env import specs
from jax import Array
from loop import Metrics, Timestep, Transition
from n_step import NStep, Window
from networks import Network
from prioritized import Drawn, Prioritized, PrioritizedReplay

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains Rainbow and draws its learning curve."""

    double: bool = True  # one network selects the next action, another evaluates it
    duelling: bool = True  # values of states and advantages of actions, added up
    noisy: bool = True  # explores by noise in the weights, as much as it learns to
    prioritized: bool = True  # draws most often what surprises most
    distributional: bool = True  # learns distributions of returns, as in C51
    n_steps: int = 3  # of rewards in each target
    discount: float = 0.99  # of a reward one step later
    hidden: int = 64  # units in each hidden layer
    learning_rate: float = 5e-4  # of Adam
    batch_size: int = 32  # transitions learned from at each step
    capacity: int = 10_000  # transitions kept for replay
    target_period: int = 200  # updates from one copy to the target network to the next
    atoms: int = 51  # returns that a distribution tells apart
    least: float = -1.0  # of these returns
    greatest: float = 1.0  # of these returns
    noise: float = 0.3  # standard deviation of it at first, by the scale of the weights
    priority_exponent: float = 0.5  # how much a surprise counts in replay
    importance_exponent: float = 0.4  # share of that bias undone at first, and then all
    importance_steps: int = 10_000  # until then
    epsilon: float = 0.05  # if not noisy: share of random actions, after a decay from 1
    epsilon_steps: int = 2000  # length of that decay

    ranges: ClassVar = {
        "least": (-1e9, 1e9),
        "greatest": (-1e9, 1e9),
        "atoms": (2, 2**31),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least >= self.greatest:
            raise ValueError(
                f"greatest must be above least = {self.least}, got {self.greatest}"
            )


class NoisyDense(nn.Module):
    """A dense layer with factorised noise in its weights, if it is given a key.

    Fortunato et al., "Noisy Networks for Exploration", 2017,
    https://arxiv.org/abs/1706.10295.
    """

    features: int
    noise: float

    @nn.compact
    def __call__(self, x: Array, key: Array | None) -> Array:
        """Maps `f[D]` to `f[features]`."""
        scale, shape = len(x) ** -0.5, (len(x), self.features)
        means = lambda key, shape: jax.random.uniform(
            key, shape, jnp.float32, -scale, scale
        )
        deviations = nn.initializers.constant(self.noise * scale)
        kernel = self.param("kernel", means, shape)
        bias = self.param("bias", means, shape[1:])
        kernel_stddev = self.param("kernel_stddev", deviations, shape)
        bias_stddev = self.param("bias_stddev", deviations, shape[1:])
        if key is not None:
            kernel, bias = rlprims.add_factorized_noise(
                key, kernel, bias, kernel_stddev, bias_stddev
            )
        return x @ kernel + bias


class RainbowNetwork(nn.Module):
    """Maps an observation to logits of `N` atoms, or one value, of each action."""

    shape: tuple[int, int]  # A and N
    config: Config

    @nn.compact
    def __call__(self, observation: Array, key: Array | None = None) -> Array:
        """Returns `f[A,N]`, with noise if there is a key."""
        config, (actions, size) = self.config, self.shape
        keys = [None] * 4 if key is None else jax.random.split(key, 4)

        def layer(key: Array | None, features: int, x: Array) -> Array:
            if config.noisy:
                return NoisyDense(features, config.noise)(x, key)
            return nn.Dense(features)(x)

        x = observation.astype(jnp.float32).reshape(-1)
        x = nn.relu(nn.Dense(config.hidden)(x))
        outputs = nn.relu(layer(keys[0], config.hidden, x))
        outputs = layer(keys[1], actions * size, outputs).reshape(self.shape)
        if not config.duelling:
            return outputs
        value = nn.relu(layer(keys[2], config.hidden, x))
        value = layer(keys[3], size, value).reshape(1, size)
        return value + outputs - jnp.mean(outputs, axis=0, keepdims=True)


class Learner(NamedTuple):
    """What learning changes."""

    params: Any
    target_params: Any
    opt_state: Any


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    replay: Prioritized  # of transitions of n steps
    window: Window  # the last n steps, to be folded
    observation: Array  # f[B,...], what the agent saw last
    action: Array  # i[B], and what it did
    steps: Array  # i[]


class Rainbow:
    """The rules by which the agent acts and learns: pure functions of its state."""

    def __init__(
        self,
        config: Config,
        observations: specs.Array,
        actions: specs.DiscreteArray,
        network: Network | None = None,
    ) -> None:
        outputs = config.atoms if config.distributional else 1
        default = RainbowNetwork((number_of(actions), outputs), config)
        self.config, self.shape = config, observations.shape
        self.network = network or Network(default.init, default.apply)
        self.atoms = jnp.linspace(config.least, config.greatest, config.atoms)
        self.replay = PrioritizedReplay(
            config.capacity,
            config.batch_size,
            config.priority_exponent if config.prioritized else 0.0,
        )
        self.n_step = NStep(config.n_steps)
        self.epsilon = optax.linear_schedule(1.0, config.epsilon, config.epsilon_steps)
        self.importance_exponent = optax.linear_schedule(
            config.importance_exponent, 1.0, config.importance_steps
        )
        self.optimizer = optax.adam(config.learning_rate, eps=1.5e-4)
        self.key_init, self.key_explore, self.key_replay, self.key_noise = (
            jax.random.split(jax.random.key(config.seed), 4)
        )

    def init(self) -> State:
        """Returns the state before the first step."""
        blank, batch = jnp.zeros(self.shape), self.config.environments
        params = self.network.init(self.key_init, blank)
        target_params = jax.tree.map(jnp.copy, params)
        observation, action = (
            jnp.zeros((batch, *self.shape)),
            jnp.zeros(batch, jnp.int32),
        )
        zero = jnp.zeros(batch)
        return State(
            Learner(params, target_params, self.optimizer.init(params)),
            self.replay.init(Transition(blank, 0, 0.0, 0.0, blank)),
            self.n_step.init(Transition(observation, action, zero, zero, observation)),
            observation,
            action,
            steps=jnp.int32(0),
        )

    def outputs(self, params: Any, observations: Array, key: Array | None) -> Any:
        """Returns logits or values of all actions, `f[B,A,N]`; noisy with a key."""
        apply = jax.vmap(self.network.apply, in_axes=(None, 0, None))
        return apply(params, observations, key)

    def q_values(self, outputs: Array) -> Array:
        """Returns the values that go with outputs of the network, `f[B,A]`."""
        if self.config.distributional:
            return rlprims.softmax().probs(outputs) @ self.atoms
        return outputs[..., 0]

    def step(self, state: State, timestep: Timestep) -> tuple[State, Array, Metrics]:
        """Remembers what happened, learns from a batch of memories, and acts."""
        learner, replay, window, observation, action, steps = state
        transition = Transition(
            observation,
            action,
            timestep.r_t,
            self.config.discount * timestep.discount_t,
            timestep.observation,
        )
        window, folded, valid = self.n_step.add(
            window, transition, timestep.truncated, ~timestep.first
        )
        replay = self.replay.add(replay, folded, valid)
        drawn = self.replay.sample(
            jax.random.fold_in(self.key_replay, steps),
            replay,
            self.importance_exponent(steps * self.config.environments),
        )
        learner, errors, metrics = jax.lax.cond(
            steps >= self.config.n_steps, self.learn, self.wait, learner, drawn, steps
        )
        replay = self.replay.update_priorities(replay, drawn.slots, errors)
        observation = timestep.observation.astype(observation.dtype)
        action = self.explore(learner.params, observation, steps)
        state = State(learner, replay, window, observation, action, steps + 1)
        return state, action, metrics

    def explore(self, params: Any, observations: Array, steps: Array) -> Array:
        """Returns what noise makes of the best actions, or random ones at a rate ε."""
        key = jax.random.fold_in(self.key_explore, steps)
        q_values = self.q_values(self.outputs(params, observations, key))
        if self.config.noisy:
            return jnp.argmax(q_values, axis=-1)
        epsilon = self.epsilon(steps * self.config.environments)
        return rlprims.epsilon_greedy(epsilon).sample(key, q_values)

    def loss(
        self, params: Any, target_params: Any, drawn: Drawn, keys: Array
    ) -> tuple[Array, Array]:
        """Returns the weighted mean loss, and the errors for priorities, `f[B]`."""
        batch = drawn.rows
        outputs_tm1 = self.outputs(params, batch.obs_tm1, keys[0])
        outputs_t = self.outputs(target_params, batch.obs_t, keys[1])
        # To select by the values that are the target's own is plain Q-learning.
        selector = (
            self.outputs(params, batch.obs_t, keys[2])
            if self.config.double
            else outputs_t
        )
        transitions = batch.a_tm1, batch.r_t, batch.discount_t
        if self.config.distributional:
            learning = rlprims.categorical_double_q_learning
            losses = errors = jax.vmap(learning, (None, 0, 0, 0, 0, None, 0, 0))(
                self.atoms,
                outputs_tm1,
                *transitions,
                self.atoms,
                outputs_t,
                self.q_values(selector),
            )
        else:
            errors = jax.vmap(rlprims.double_q_learning)(
                self.q_values(outputs_tm1),
                *transitions,
                self.q_values(outputs_t),
                self.q_values(selector),
            )
            losses = rlprims.huber_loss(errors)
        return jnp.mean(drawn.weights * losses), errors

    def learn(
        self, learner: Learner, drawn: Drawn, steps: Array
    ) -> tuple[Learner, Array, Metrics]:
        """Follows the gradient of the loss, and now and then moves the target."""
        params, target_params, opt_state = learner
        keys = jax.random.split(jax.random.fold_in(self.key_noise, steps), 3)
        (loss, errors), gradients = jax.value_and_grad(self.loss, has_aux=True)(
            params, target_params, drawn, keys
        )
        updates, opt_state = self.optimizer.update(gradients, opt_state)
        params = optax.apply_updates(params, updates)
        target_params = optax.periodic_update(
            params, target_params, steps, self.config.target_period
        )
        return Learner(params, target_params, opt_state), errors, {"loss": loss}

    def wait(
        self, learner: Learner, drawn: Drawn, steps: Array
    ) -> tuple[Learner, Array, Metrics]:
        """Learns nothing, as there is nothing to learn from yet."""
        return learner, jnp.zeros_like(drawn.weights), {"loss": jnp.nan}

    def initial_carry(self, batch: int) -> None:
        """Returns nothing: to exploit takes no memory."""

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the best actions, without noise."""
        outputs = self.outputs(state.learner.params, timestep.observation, None)
        return jnp.argmax(self.q_values(outputs), axis=-1), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, Rainbow))

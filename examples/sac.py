"""Soft actor-critic, on Pendulum or on any environment with continuous actions.

    python examples/sac.py
        reaches a return of at least -170 in Pendulum-v1, within 1 minute

Papers: Haarnoja et al., "Soft Actor-Critic: Off-Policy Maximum Entropy Deep RL with a
Stochastic Actor", 2018, https://arxiv.org/abs/1801.01290, and "Soft Actor-Critic
Algorithms and Applications", 2018, https://arxiv.org/abs/1812.05905, which learns the
temperature. They make robots walk, this swings up a pendulum, and so it deviates:

*   Layers have 64 units and batches 128 transitions; there, both are 256.
*   Steps are 1e-3 and targets follow at 0.01; there, 3e-4 and 0.005.
*   The first 500 actions are random, and nothing is learned from them until then.
*   The deviation of the policy before squashing is kept within exp(-5) and exp(2).
*   With several environments, it learns once each time that all have taken a step.

Pendulum never terminates: a time limit cuts it short after 200 steps, and the value
goes on beyond it.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import console
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from actions import Bounds
from dm_env import specs
from jax import Array
from loop import Metrics, Timestep, Transition
from networks import Critic, PolicyAndCritic
from sources import Replay, Stored

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains soft actor-critic and draws its learning curve."""

    env: str = "Pendulum-v1"  # see README.md; actions must be continuous
    evaluate_every: int = 1000  # steps from one point of the curve to the next
    discount: float = 0.99  # of a reward one step later
    hidden: int = 64  # units in each of the two hidden layers
    learning_rate: float = 1e-3  # of Adam, for the policy and the critics
    batch_size: int = 128  # transitions learned from at each step
    capacity: int = 50_000  # transitions kept for replay
    random_steps: int = 500  # steps of random actions before any learning
    target_rate: float = 0.01  # by which the target critics follow the critics
    temperature: float = 1.0  # price of entropy at first, in return per nat
    temperature_learning_rate: float = 1e-3  # of Adam, for its logarithm; 0 keeps it

    ranges: ClassVar[dict[str, tuple[float, float]]] = {"temperature": (0, 1000)}


class Policy(nn.Module):
    """Maps an observation to a mean and a deviation before squashing, `f[A]` each."""

    size: int
    hidden: int

    @nn.compact
    def __call__(self, observation: Array) -> tuple[Array, Array]:
        """Returns mean and standard deviation."""
        x = observation.astype(jnp.float32).reshape(-1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        mu, log_sigma = jnp.split(nn.Dense(2 * self.size)(x), 2)
        return mu, jnp.exp(jnp.clip(log_sigma, -5.0, 2.0))


class Params(NamedTuple):
    """What the losses are differentiated by."""

    policy: Any
    critics: Any  # each array with a leading axis, of two
    log_temperature: Array  # f[]


class Learner(NamedTuple):
    """What learning changes."""

    params: Params
    target_critics: Any
    opt_state: Any


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    replay: Stored  # of transitions
    observation: Array  # f[B,...], what the agent saw last
    action: Array  # f[B,A], and what it did, in [-1, 1]
    steps: Array  # i[]


class SAC:
    """The rules by which the agent acts and learns: pure functions of its state."""

    def __init__(
        self,
        config: Config,
        observations: specs.Array,
        actions: specs.Array,
        network: PolicyAndCritic | None = None,
    ) -> None:
        self.config, self.shape = config, observations.shape
        self.bounds = Bounds(actions)
        policy, critic = Policy(self.bounds.size, config.hidden), Critic(config.hidden)
        default = PolicyAndCritic(policy.init, policy.apply, critic.init, critic.apply)
        self.network = network or default
        self.replay = Replay(config.capacity, config.batch_size)
        # Actions lie in [-1, 1] here, and so it is minus the number of components.
        edge = jnp.ones(self.bounds.size)
        self.target_entropy = rlprims.continuous_target_entropy(-edge, edge)
        self.optimizer = optax.multi_transform(
            {
                "networks": optax.adam(config.learning_rate),
                "temperature": optax.adam(config.temperature_learning_rate),
            },
            Params._make(["networks", "networks", "temperature"]),
        )
        self.key_init, self.key_explore, self.key_replay, self.key_learn = (
            jax.random.split(jax.random.key(config.seed), 4)
        )

    def init(self) -> State:
        """Returns the state before the first step."""
        blank, batch = jnp.zeros(self.shape), self.config.environments
        action = jnp.zeros(self.bounds.size)
        key, *keys = jax.random.split(self.key_init, 3)
        init_critics = jax.vmap(self.network.init_critic, in_axes=(0, None, None))
        params = Params(
            self.network.init_policy(key, blank),
            init_critics(jnp.stack(keys), blank, action),
            jnp.log(jnp.float32(self.config.temperature)),
        )
        target_critics = jax.tree.map(jnp.copy, params.critics)
        return State(
            Learner(params, target_critics, self.optimizer.init(params)),
            self.replay.init(Transition(blank, action, 0.0, 0.0, blank)),
            observation=jnp.zeros((batch, *self.shape)),
            action=jnp.zeros((batch, self.bounds.size)),
            steps=jnp.int32(0),
        )

    def policy(self, params: Any, observations: Array) -> Any:
        """Returns mean and deviation before squashing, `f[B,A]` each."""
        return jax.vmap(self.network.policy, in_axes=(None, 0))(params, observations)

    def draw(self, key: Array, params: Any, observations: Array) -> Any:
        """Returns actions in [-1, 1], `f[B,A]`, and their log-probabilities, `f[B]`."""
        mu, sigma = self.policy(params, observations)
        return rlprims.tanh_gaussian_sample_and_log_prob(key, mu, sigma)

    def q_values(self, params: Any, observations: Array, actions: Array) -> Any:
        """Returns what each critic makes of actions in [-1, 1], `f[2,B]`."""
        of_batch = jax.vmap(self.network.critic, in_axes=(None, 0, 0))
        of_both = jax.vmap(of_batch, in_axes=(0, None, None))
        return of_both(params, observations, actions)

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
        key = jax.random.fold_in(self.key_learn, steps)
        learner, metrics = jax.lax.cond(
            ~self.is_random(steps),
            self.learn,
            self.wait,
            learner,
            batch,
            key,
        )
        action = self.explore(learner.params.policy, timestep.observation, steps)
        observation = timestep.observation.astype(observation.dtype)
        state = State(learner, replay, observation, action, steps + 1)
        return state, self.bounds.rescale(action), metrics

    def explore(self, params: Any, observations: Array, steps: Array) -> Array:
        """Draws from the policy, and at first from all actions alike."""
        key = jax.random.fold_in(self.key_explore, steps)
        action = self.draw(key, params, observations).action
        uniform = jax.random.uniform(key, action.shape, action.dtype, -1.0, 1.0)
        return jnp.where(self.is_random(steps), uniform, action)

    def loss(
        self, params: Params, target_critics: Any, batch: Transition, key: Array
    ) -> tuple[Array, Metrics]:
        """Returns the sum of three losses, which teach different parameters."""
        key_tm1, key_t = jax.random.split(key)
        new_tm1 = self.draw(key_tm1, params.policy, batch.obs_tm1)
        new_t = self.draw(key_t, params.policy, batch.obs_t)
        temperature = jnp.exp(params.log_temperature)
        errors = rlprims.sac_critic_errors(
            self.q_values(params.critics, batch.obs_tm1, batch.a_tm1),
            batch.r_t,
            batch.discount_t,
            self.q_values(target_critics, batch.obs_t, new_t.action),
            new_t.log_prob,
            temperature=temperature,
        )
        fixed = jax.lax.stop_gradient(params.critics)
        q_tm1 = self.q_values(fixed, batch.obs_tm1, new_tm1.action)
        losses = {
            "critic_loss": jnp.mean(jnp.sum(rlprims.l2_loss(errors), axis=0)),
            "policy_loss": rlprims.sac_actor_loss(
                new_tm1.log_prob, q_tm1, temperature=temperature
            ),
            "temperature_loss": rlprims.sac_temperature_loss(
                temperature, new_tm1.log_prob, target_entropy=self.target_entropy
            ),
        }
        entropy = -jnp.mean(new_tm1.log_prob)
        seen = {"temperature": temperature, "entropy": entropy}
        return sum(losses.values(), jnp.zeros(())), losses | seen

    def learn(
        self, learner: Learner, batch: Transition, key: Array
    ) -> tuple[Learner, Metrics]:
        """Follows the gradients of the losses; moves the target critics a little."""
        params, target_critics, opt_state = learner
        differentiate = jax.grad(self.loss, has_aux=True)
        gradients, metrics = differentiate(params, target_critics, batch, key)
        updates, opt_state = self.optimizer.update(gradients, opt_state)
        params: Any = optax.apply_updates(params, updates)
        target_critics = optax.incremental_update(
            params.critics, target_critics, self.config.target_rate
        )
        return Learner(params, target_critics, opt_state), metrics

    def wait(
        self, learner: Learner, batch: Transition, key: Array
    ) -> tuple[Learner, Metrics]:
        """Learns nothing, as there is too little to learn from yet."""
        shapes = jax.eval_shape(self.loss, *learner[:2], batch, key)
        return learner, dict.fromkeys(shapes[1], jnp.nan)

    def is_random(self, steps: Array) -> Array:
        """Whether actions are still random, and nothing is learned."""
        return steps * self.config.environments < self.config.random_steps

    def initial_carry(self, batch: int) -> None:
        """Returns nothing: to exploit takes no memory."""

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the mean, squashed, in place of a draw."""
        mu, _ = self.policy(state.learner.params.policy, timestep.observation)
        return self.bounds.rescale(jnp.tanh(mu)), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, SAC))

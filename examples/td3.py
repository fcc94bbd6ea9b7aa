"""TD3, on Pendulum or on any environment with continuous actions.

    python examples/td3.py
        reaches a return of at least -170 in Pendulum-v1, within 1 minute

Paper: Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic
Methods", 2018, https://arxiv.org/abs/1802.09477. It makes robots walk, this swings up a
pendulum, and so it deviates:

*   Layers have 64 units and batches 128 transitions; there, 400 and 300 units, and 100.
*   Targets follow at 0.01, there at 0.005.
*   The first 500 actions are random, and nothing is learned from them until then.
*   With several environments, it learns once each time that all have taken a step.

Noise is measured in actions that go from -1 to 1, whatever those of the environment.

Pendulum never terminates: a time limit cuts it short after 200 steps, and the value
goes on beyond it.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """Trains TD3 and draws its learning curve."""

    env: str = "Pendulum-v1"  # see README.md; actions must be continuous
    evaluate_every: int = 1000  # steps from one point of the curve to the next
    discount: float = 0.99  # of a reward one step later
    hidden: int = 64  # units in each of the two hidden layers
    learning_rate: float = 1e-3  # of Adam, for the policy and for the critics
    batch_size: int = 128  # transitions learned from at each step
    capacity: int = 50_000  # transitions kept for replay
    random_steps: int = 500  # steps of random actions before any learning
    policy_delay: int = 2  # steps between updates of the policy and of all targets
    target_rate: float = 0.01  # by which the targets follow, at each of them
    sigma: float = 0.1  # of the noise by which it explores; actions lie in [-1, 1]
    target_sigma: float = 0.2  # of the noise that smooths the targets
    noise_clip: float = 0.5  # the most of that noise


class Policy(nn.Module):
    """Maps an observation to an action in [-1, 1], `f[A]`."""

    size: int
    hidden: int

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Returns the action."""
        x = observation.astype(jnp.float32).reshape(-1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return jnp.tanh(nn.Dense(self.size)(x))


class Params(NamedTuple):
    """What learning changes, and what the targets are made with."""

    policy: Any
    critics: Any  # each array with a leading axis, of two


class Learner(NamedTuple):
    """All that learning changes."""

    params: Params
    target_params: Params
    opt_state: Params  # of the two optimisers


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    replay: Stored  # of transitions
    observation: Array  # f[B,...], what the agent saw last
    action: Array  # f[B,A], and what it did, in [-1, 1]
    steps: Array  # i[]


class TD3:
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
        self.optimizer = optax.adam(config.learning_rate)
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
        )
        target_params = jax.tree.map(jnp.copy, params)
        opt_state = Params(*map(self.optimizer.init, params))
        return State(
            Learner(params, target_params, opt_state),
            self.replay.init(Transition(blank, action, 0.0, 0.0, blank)),
            observation=jnp.zeros((batch, *self.shape)),
            action=jnp.zeros((batch, self.bounds.size)),
            steps=jnp.int32(0),
        )

    def policy(self, params: Any, observations: Array) -> Any:
        """Returns the actions of a policy, in [-1, 1], `f[B,A]`."""
        return jax.vmap(self.network.policy, in_axes=(None, 0))(params, observations)

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
        learner, metrics = jax.lax.cond(
            ~self.is_random(steps),
            self.learn,
            self.wait,
            learner,
            batch,
            steps,
        )
        action = self.explore(learner.params.policy, timestep.observation, steps)
        observation = timestep.observation.astype(observation.dtype)
        state = State(learner, replay, observation, action, steps + 1)
        return state, self.bounds.rescale(action), metrics

    def explore(self, params: Any, observations: Array, steps: Array) -> Array:
        """Adds noise to the actions of the policy; at first draws from all alike."""
        key = jax.random.fold_in(self.key_explore, steps)
        action = self.policy(params, observations)
        noisy = rlprims.add_gaussian_noise(key, action, self.config.sigma)
        uniform = jax.random.uniform(key, action.shape, action.dtype, -1.0, 1.0)
        random = self.is_random(steps)
        return jnp.where(random, uniform, jnp.clip(noisy, -1.0, 1.0))

    def critic_loss(
        self, critics: Any, target_params: Params, batch: Transition, key: Array
    ) -> Array:
        """Returns the mean squared errors of both critics, added."""
        action = rlprims.smoothed_target_action(
            key,
            self.policy(target_params.policy, batch.obs_t),
            sigma=self.config.target_sigma,
            noise_clip=self.config.noise_clip,
            minimum=-1.0,
            maximum=1.0,
        )
        errors = rlprims.clipped_double_q_learning(
            self.q_values(critics, batch.obs_tm1, batch.a_tm1),
            batch.r_t,
            batch.discount_t,
            self.q_values(target_params.critics, batch.obs_t, action),
        )
        return jnp.mean(jnp.sum(jnp.square(errors), axis=0))

    def policy_loss(self, policy: Any, critics: Any, batch: Transition) -> Array:
        """Returns minus the value of what the policy does, by the first critic."""
        first = jax.tree.map(lambda x: x[:1], critics)
        action = self.policy(policy, batch.obs_tm1)
        return -jnp.mean(self.q_values(first, batch.obs_tm1, action))

    def learn(
        self, learner: Learner, batch: Transition, steps: Array
    ) -> tuple[Learner, Metrics]:
        """Teaches the critics, and every so often the policy and the targets."""
        (policy, critics), target_params, (policy_state, critics_state) = learner
        key = jax.random.fold_in(self.key_learn, steps)
        loss, gradients = jax.value_and_grad(self.critic_loss)(
            critics, target_params, batch, key
        )
        critics, critics_state = self.descend(gradients, critics, critics_state)
        learner = Learner(
            Params(policy, critics), target_params, Params(policy_state, critics_state)
        )
        learner, policy_loss = jax.lax.cond(
            steps % self.config.policy_delay == 0,
            self.improve,
            lambda learner, _: (learner, jnp.nan),
            learner,
            batch,
        )
        return learner, {"critic_loss": loss, "policy_loss": policy_loss}

    def improve(self, learner: Learner, batch: Transition) -> tuple[Learner, Array]:
        """Teaches the policy, and moves all targets a little."""
        (policy, critics), target_params, (policy_state, critics_state) = learner
        loss, gradients = jax.value_and_grad(self.policy_loss)(policy, critics, batch)
        policy, policy_state = self.descend(gradients, policy, policy_state)
        params: Any = Params(policy, critics)
        target_params: Any = optax.incremental_update(
            params, target_params, self.config.target_rate
        )
        opt_state = Params(policy_state, critics_state)
        return Learner(params, target_params, opt_state), loss

    def descend(self, gradients: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """Takes a step of the optimiser."""
        updates, opt_state = self.optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def wait(
        self, learner: Learner, batch: Transition, steps: Array
    ) -> tuple[Learner, Metrics]:
        """Learns nothing, as there is too little to learn from yet."""
        return learner, {"critic_loss": jnp.nan, "policy_loss": jnp.nan}

    def is_random(self, steps: Array) -> Array:
        """Whether actions are still random, and nothing is learned."""
        return steps * self.config.environments < self.config.random_steps

    def initial_carry(self, batch: int) -> None:
        """Returns nothing: to exploit takes no memory."""

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns what the policy does, without noise."""
        action = self.policy(state.learner.params.policy, timestep.observation)
        return self.bounds.rescale(action), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, TD3))

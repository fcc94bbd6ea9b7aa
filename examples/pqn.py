"""PQN: deep Q-learning without replay and without a target network, on CartPole-v1.

    python examples/pqn.py
        reaches a return of at least 475 in CartPole-v1, within 1 minute
    python examples/pqn.py --env Catch --steps 50000 --epsilon-steps 20000
        reaches a return of at least 0.98 in Catch, within 1 minute

Paper: Gallici et al., "Simplifying Deep Temporal Difference Learning". Many
environments take their steps together. After every `rollout` steps the network learns
from these alone, and layer normalization keeps it stable. The targets are those of
Peng's Q(λ), `G[t-1] = r[t] + γ[t] ((1 - λ) max Q[t] + λ G[t])`, which end where an
episode does: with nothing at a termination, with `max Q` at a time limit.

Deviations:

*   The network is two dense layers; for Atari games there, convolutions.
*   The targets are computed once per rollout, before its epochs, by one pass of the
    network that has acted.
*   Hyper-parameters suit a few hundred thousand steps, there millions.
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
from loop import Metrics, Timestep
from networks import Network
from sources import Rollout

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains PQN and draws its learning curve."""

    env: str = "CartPole-v1"  # a Gymnasium id such as this, Catch, or see README.md
    steps: int = 200_000  # to learn from, of all environments together
    environments: int = 32  # that take their steps together
    evaluate_every: int = 20_000  # steps from one point of the curve to the next
    evaluation_episodes: int = 20  # played for each point, without exploring
    discount: float = 0.99  # of a reward one step later
    trace: float = 0.95  # λ: from bootstrapping at once (0) to only in the end (1)
    rollout: int = 32  # steps of each environment to learn from at a time
    epochs: int = 4  # times that each of them is learned from
    minibatches: int = 8  # updates in an epoch
    hidden: int = 64  # units in each of the two hidden layers
    learning_rate: float = 1e-3  # of RAdam; it falls to 0 by the end
    max_gradient: float = 10.0  # norm beyond which gradients are scaled down
    epsilon: float = 0.05  # share of random actions, after a linear decay from 1
    epsilon_steps: int = 100_000  # length of that decay, of all environments together

    ranges: ClassVar = {"max_gradient": (0, float("inf"))}

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.rollout * self.environments
        if size % self.minibatches:
            raise ValueError(
                f"minibatches must divide rollout * environments = {size}, "
                f"got {self.minibatches}"
            )


class QNetwork(nn.Module):
    """Maps an observation to the values of all actions, `f[A]`."""

    num_actions: int
    hidden: int

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Returns the action values."""
        x = observation.astype(jnp.float32).reshape(-1)
        for _ in range(2):
            x = nn.relu(nn.LayerNorm()(nn.Dense(self.hidden)(x)))
        return nn.Dense(self.num_actions)(x)


class Row(NamedTuple):
    """What the rollout keeps of a step, `[B,...]`."""

    obs_tm1: Array
    a_tm1: Array
    r_t: Array
    discount_t: Array
    truncation_t: Array  # whether a time limit cut the episode
    mask_t: Array  # whether it is a step: not the one from an episode to the next


class Batch(NamedTuple):
    """What the network learns from, with one leading axis."""

    obs: Array
    action: Array
    target: Array  # λ-return
    mask: Array  # whether it counts


class Learner(NamedTuple):
    """What learning changes."""

    params: Any
    opt_state: Any


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    rollout: Row  # `[T,B,...]`
    observation: Array  # f[B,...], what the agent saw last
    action: Array  # i[B], and what it did
    steps: Array  # i[], of each environment


class PQN:
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
        self.rollout = Rollout(config.rollout)
        self.epsilon = optax.linear_schedule(1.0, config.epsilon, config.epsilon_steps)
        rollouts = config.steps // (config.rollout * config.environments)
        updates = max(rollouts, 1) * config.epochs * config.minibatches
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_gradient),
            optax.radam(optax.linear_schedule(config.learning_rate, 0.0, updates)),
        )
        self.key_init, self.key_explore, self.key_shuffle = jax.random.split(
            jax.random.key(config.seed), 3
        )

    def init(self) -> State:
        """Returns the state before the first step."""
        batch = self.config.environments
        params = self.network.init(self.key_init, jnp.zeros(self.shape))
        zeros = jnp.zeros(batch)
        blank, action = jnp.zeros((batch, *self.shape)), jnp.zeros(batch, jnp.int32)
        row = Row(blank, action, zeros, zeros, zeros > 0, zeros > 0)
        return State(
            Learner(params, self.optimizer.init(params)),
            self.rollout.init(row),
            observation=blank,
            action=action,
            steps=jnp.int32(0),
        )

    def q_values(self, params: Any, observations: Array) -> Any:
        """Returns the values of all actions, `f[N,A]`."""
        return jax.vmap(self.network.apply, in_axes=(None, 0))(params, observations)

    def step(self, state: State, timestep: Timestep) -> tuple[State, Array, Metrics]:
        """Notes what happened, learns once the rollout is full, and acts."""
        learner, rollout, observation, action, steps = state
        row = Row(
            observation,
            action,
            timestep.r_t,
            self.config.discount * timestep.discount_t,
            timestep.truncated,
            ~timestep.first,
        )
        observation = timestep.observation.astype(observation.dtype)
        rollout = self.rollout.add(rollout, row, steps)
        learner, metrics = jax.lax.cond(
            self.rollout.is_full(steps),
            self.learn,
            self.wait,
            learner,
            rollout,
            observation,
            jax.random.fold_in(self.key_shuffle, steps),
        )
        action = self.explore(self.q_values(learner.params, observation), steps)
        return State(learner, rollout, observation, action, steps + 1), action, metrics

    def explore(self, q_values: Array, steps: Array) -> Array:
        """Returns random actions with probability ε, and else the best ones."""
        key = jax.random.fold_in(self.key_explore, steps)
        epsilon = self.epsilon(steps * self.config.environments)
        return rlprims.epsilon_greedy(epsilon).sample(key, q_values)

    def targets(self, params: Any, rollout: Row, observation: Array) -> Array:
        """Returns the λ-returns of all steps, `f[T,B]`, 0 where they do not count.

        Args:
            params: of the network that the values are from.
            rollout: what happened.
            observation: what was seen after it, `f[B,...]`.
        """
        obs_t = jnp.concatenate([rollout.obs_tm1[1:], observation[None]])
        q_t = jax.vmap(self.q_values, in_axes=(None, 0))(params, obs_t)

        def returns(
            r_t: Array,
            discount_t: Array,
            v_t: Array,
            truncation_t: Array,
            mask_t: Array,
        ) -> Array:
            return rlprims.lambda_returns(
                r_t,
                discount_t,
                v_t,
                self.config.trace,
                truncation_t=truncation_t,
                mask_t=mask_t,
            )

        _, _, r_t, discount_t, truncation_t, mask_t = rollout
        v_t = jnp.max(q_t, axis=-1)
        return jax.vmap(returns, in_axes=1, out_axes=1)(
            r_t, discount_t, v_t, truncation_t, mask_t
        )

    def loss(self, params: Any, batch: Batch) -> Array:
        """Returns the mean of half the squared errors, over what counts."""
        q_values = self.q_values(params, batch.obs)
        predictions = rlprims.batched_index(q_values, batch.action)
        losses = rlprims.l2_loss(predictions, batch.target)
        count = jnp.sum(batch.mask, dtype=losses.dtype)
        return jnp.sum(losses, where=batch.mask) / jnp.maximum(count, 1)

    def learn(
        self, learner: Learner, rollout: Row, observation: Array, key: Array
    ) -> tuple[Learner, Metrics]:
        """Follows the gradient of the loss, minibatch by minibatch."""
        targets = self.targets(learner.params, rollout, observation)
        batch = Batch(rollout.obs_tm1, rollout.a_tm1, targets, rollout.mask_t)
        batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)

        def update(learner: Learner, chosen: Array) -> tuple[Learner, Array]:
            params, opt_state = learner
            part = jax.tree.map(lambda x: x[chosen], batch)
            loss, gradients = jax.value_and_grad(self.loss)(params, part)
            updates, opt_state = self.optimizer.update(gradients, opt_state, params)
            return Learner(optax.apply_updates(params, updates), opt_state), loss

        def epoch(learner: Learner, key: Array) -> tuple[Learner, Array]:
            order = jax.random.permutation(key, len(batch.mask))
            chosen = order.reshape(self.config.minibatches, -1)
            return jax.lax.scan(update, learner, chosen)

        keys = jax.random.split(key, self.config.epochs)
        learner, losses = jax.lax.scan(epoch, learner, keys)
        return learner, {"loss": jnp.mean(losses)}

    def wait(
        self, learner: Learner, rollout: Row, observation: Array, key: Array
    ) -> tuple[Learner, Metrics]:
        """Learns nothing, as the rollout goes on."""
        return learner, {"loss": jnp.nan}

    def initial_carry(self, batch: int) -> None:
        """Returns nothing: to exploit takes no memory."""

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the best actions."""
        q_values = self.q_values(state.learner.params, timestep.observation)
        return jnp.argmax(q_values, axis=-1), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, PQN))

"""R2D2: Q-learning with memory from replayed sequences, on Recall, Catch, and others.

    python examples/r2d2.py
        reaches a return of at least 0.95 in Recall, within 1 minute
    python examples/r2d2.py --core gru
        reaches a return of at least 0.95 in Recall, within 1 minute
    python examples/r2d2.py --core dnc --steps 20000
        reaches a return of at least 0.95 in Recall, within 2 minutes

Paper: Kapturowski et al., "Recurrent Experience Replay in Distributed Reinforcement
Learning", 2019, https://openreview.net/forum?id=r1lyTjAqYX. Replay keeps overlapping
sequences of steps, each with what the core remembered before it. As that is out of date
when a sequence is learned from, the core first burns in over a part of it that nothing
else is learned from. What the core is made of, `--core` alone decides: see `cores.py`.

There, hundreds of actors send sequences to a learner; this acts and learns by turns, on
one device, and so it deviates:

*   The environments act with the newest parameters, there with a copy that is a few
    hundred steps old.
*   Sequences go on over the end of an episode: there the core starts anew, and no
    target sees beyond. In the paper they end with the episode.
*   New sequences have the highest priority so far, there one from errors that the
    actors computed.
*   One dense layer sees one observation; there, convolutions do, and the core also gets
    the last action and reward.
*   The duelling head is linear. Sequences, replay and target period are shorter and the
    step size larger than there, as episodes are short. Losses are means over steps.

Targets of more than one reward are not corrected for the actions that explored, as in
the paper: with `--n 1` they are those of the best policy.

An agent without memory has a return of 0 in Recall.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import console
import jax
import jax.numpy as jnp
import optax
from actions import number_of
from cores import CoreName, make_core
from dm_env import specs
from jax import Array
from loop import Metrics, Timestep
from recurrent import Network, Recurrent
from sequence_replay import Drawn, SequenceReplay, Sequences

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains R2D2 and draws its learning curve."""

    env: str = "Recall"  # Recall, Catch, a Gymnasium id, or see README.md
    steps: int = 40_000  # to learn from, of all environments together
    environments: int = 16  # that take their steps together
    evaluate_every: int = 5000  # steps from one point of the curve to the next
    core: CoreName = "lstm"  # what remembers
    features: int = 32  # units of the core, and of the layer before it
    length: int = 20  # steps of a sequence, with its burn-in
    burn_in: int = 4  # of these, the first so many refresh the core
    period: int = 10  # steps from the start of a sequence to that of the next
    capacity: int = 2000  # sequences kept for replay
    batch_size: int = 32  # sequences learned from at a time
    warm_up: int = 100  # steps of each environment before the first update
    update_period: int = 2  # steps of each environment from one update to the next
    target_period: int = 100  # updates between updates of the target network
    n: int = 5  # rewards in a target
    discount: float = 0.99  # of a reward one step later
    learning_rate: float = 1e-3  # of Adam
    epsilon: float = (
        0.4  # share of random actions in the environment that explores most
    )
    epsilon_exponent: float = 7.0  # how much less the others explore
    priority_exponent: float = 0.9  # how much priorities count
    importance_exponent: float = 0.6  # how much of their bias to undo
    max_priority_weight: float = 0.9  # of the largest error in a priority, not the mean

    ranges: ClassVar = {
        "length": (2, 2**31),
        "burn_in": (0, 2**31),
        "epsilon_exponent": (0, 100),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.burn_in > self.length - 2:
            raise ValueError(
                f"burn_in must leave two steps of length {self.length} to learn from, "
                f"got {self.burn_in}"
            )


class Experience(NamedTuple):
    """What was seen, and done then."""

    timestep: Timestep
    action: Array


class Learner(NamedTuple):
    """What learning changes."""

    params: Any
    target_params: Any
    opt_state: Any
    updates: Array  # i[], how many


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    replay: Sequences  # of experience
    carry: Any  # what the core remembers after the last observation
    steps: Array  # i[]


class R2D2:
    """The rules by which the agent acts and learns: pure functions of its state.

    Args:
        config: the flags.
        observations: what the environment shows.
        actions: what it takes.
        network: from `B` observations to the advantages of `A` actions and a value,
            `f[T,B,A + 1]`.
    """

    def __init__(
        self,
        config: Config,
        observations: specs.Array,
        actions: specs.DiscreteArray,
        network: Network | None = None,
    ) -> None:
        self.config, self.shape = config, observations.shape
        self.network: Network = network or Recurrent(
            make_core(config.core, config.features),
            number_of(actions) + 1,
            config.features,
        )
        self.replay = SequenceReplay(
            config.capacity,
            config.batch_size,
            config.length,
            config.period,
            config.priority_exponent,
        )
        self.optimizer = optax.adam(config.learning_rate, eps=1e-3)
        self.key_init, self.key_explore, self.key_replay = jax.random.split(
            jax.random.key(config.seed), 3
        )

    def init(self) -> State:
        """Returns the state before the first step."""
        batch = self.config.environments
        observation, never = jnp.zeros((batch, *self.shape)), jnp.zeros(batch, bool)
        none = jnp.zeros(batch)
        timestep = Timestep(observation, none, none, never, never)
        carry = self.initial_carry(batch)
        params = self.network.init(self.key_init, carry, observation[None], never[None])
        return State(
            Learner(
                params,
                jax.tree.map(jnp.copy, params),
                self.optimizer.init(params),
                jnp.int32(0),
            ),
            self.replay.init(Experience(timestep, jnp.zeros(batch, jnp.int32)), carry),
            carry,
            steps=jnp.int32(0),
        )

    def q_values(
        self, params: Any, carry: Any, observations: Array, first: Array
    ) -> tuple[Any, Array]:
        """Returns the last carry, and transformed values of all actions, `f[T,B,A]`."""
        carry, outputs = self.network.apply(params, carry, observations, first)
        advantages, values = outputs[..., :-1], outputs[..., -1:]
        return carry, values + advantages - jnp.mean(advantages, -1, keepdims=True)

    def step(self, state: State, timestep: Timestep) -> tuple[State, Array, Metrics]:
        """Acts, remembers, and now and then learns from a batch of sequences."""
        learner, replay, before, steps = state
        carry, (q_values,) = self.q_values(
            learner.params, before, timestep.observation[None], timestep.first[None]
        )
        action = self.explore(q_values, steps)
        replay = self.replay.add(replay, Experience(timestep, action), before, steps)
        warm = steps >= max(self.config.warm_up, self.config.length)
        learner, indices, priorities, metrics = jax.lax.cond(
            warm & (steps % self.config.update_period == 0),
            self.learn,
            self.wait,
            learner,
            replay,
            steps,
        )
        replay = self.replay.update(replay, indices, priorities)
        return State(learner, replay, carry, steps + 1), action, metrics

    def explore(self, q_values: Array, steps: Array) -> Array:
        """Returns random actions with a probability of each environment's own."""
        config = self.config
        epsilons = rlprims.actor_epsilons(
            jnp.arange(config.environments),
            config.environments,
            epsilon=config.epsilon,
            exponent=config.epsilon_exponent,
        )
        keys = jax.random.split(
            jax.random.fold_in(self.key_explore, steps), config.environments
        )
        return jax.vmap(rlprims.epsilon_greedy().sample)(keys, q_values, epsilons)

    def errors(self, q: Array, target_q: Array, sequence: Experience) -> Array:
        """Returns the errors of double Q-learning along a sequence, `f[T - 1]`."""
        timestep = jax.tree.map(lambda x: x[1:], sequence.timestep)
        return rlprims.transformed_n_step_q_learning(
            q[:-1],
            sequence.action[:-1],
            target_q[1:],
            jnp.argmax(q[1:], axis=-1),
            timestep.r_t,
            self.config.discount * timestep.discount_t,
            self.config.n,
            tx_pair=rlprims.SIGNED_HYPERBOLIC_PAIR,
            truncation_t=timestep.truncated,
            mask_t=~timestep.first,
        )

    def loss(self, params: Any, target_params: Any, batch: Drawn) -> Any:
        """Returns the weighted mean of squared errors, and new priorities, `f[N]`."""
        warm_up, rest = rlprims.split_burn_in(batch.rows, self.config.burn_in)

        def after_burn_in(params: Any) -> Array:
            seen = warm_up.timestep
            carry, _ = self.q_values(params, batch.carry, seen.observation, seen.first)
            carry, seen = jax.lax.stop_gradient(carry), rest.timestep
            return self.q_values(params, carry, seen.observation, seen.first)[1]

        q, target_q = after_burn_in(params), after_burn_in(target_params)
        errors = jax.vmap(self.errors, in_axes=1)(q, target_q, rest)
        weights = rlprims.prioritized_importance_weights(
            batch.probabilities, importance_exponent=self.config.importance_exponent
        )
        priorities = jax.vmap(self.priority)(errors, ~rest.timestep.first[1:].T)
        return jnp.mean(weights * jnp.mean(rlprims.l2_loss(errors), axis=1)), priorities

    def priority(self, errors: Array, mask_t: Array) -> Array:
        """Returns how much there is to learn from a sequence."""
        eta = self.config.max_priority_weight
        return rlprims.sequence_priorities(
            errors, max_priority_weight=eta, mask_t=mask_t
        )

    def learn(self, learner: Learner, replay: Sequences, steps: Array) -> Any:
        """Follows the gradient of the loss, and now and then moves the target."""
        params, target_params, opt_state, updates = learner
        batch = self.replay.sample(jax.random.fold_in(self.key_replay, steps), replay)
        (loss, priorities), gradients = jax.value_and_grad(self.loss, has_aux=True)(
            params, target_params, batch
        )
        changes, opt_state = self.optimizer.update(gradients, opt_state)
        params, updates = optax.apply_updates(params, changes), updates + 1
        target_params = optax.periodic_update(
            params, target_params, updates, self.config.target_period
        )
        learner = Learner(params, target_params, opt_state, updates)
        metrics = {"loss": loss, "priority": jnp.mean(priorities)}
        return learner, batch.indices, priorities, metrics

    def wait(self, learner: Learner, replay: Sequences, steps: Array) -> Any:
        """Learns nothing, as it is not due."""
        none = jnp.full(self.config.batch_size, -1)
        metrics = {"loss": jnp.nan, "priority": jnp.nan}
        return learner, none, jnp.zeros(self.config.batch_size), metrics

    def initial_carry(self, batch: int) -> Any:
        """Returns what is remembered before an episode."""
        return self.network.initial_carry(batch)

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the best actions, and what to remember."""
        carry, (q_values,) = self.q_values(
            state.learner.params,
            carry,
            timestep.observation[None],
            timestep.first[None],
        )
        return jnp.argmax(q_values, axis=-1), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, R2D2))

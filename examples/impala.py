"""IMPALA: an actor-critic with memory, on Recall, Catch, or any discrete actions.

    python examples/impala.py
        reaches a return of at least 0.95 in Recall, within 1 minute
    python examples/impala.py --core gru
        reaches a return of at least 0.95 in Recall, within 1 minute
    python examples/impala.py --core dnc
        reaches a return of at least 0.95 in Recall, within 2 minutes
    python examples/impala.py --env Catch --steps 250000
        reaches a return of at least 0.95 in Catch, within 1 minute

Paper: Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
Actor-Learner Architectures", 2018, https://arxiv.org/abs/1802.01561. A rollout keeps
the logits of the policy that acted, and what its core remembered when it began. To
learn, the core is unrolled from there, and starts anew where an episode does. What the
core is made of, `--core` alone decides: see `cores.py`.

There, hundreds of actors send rollouts to a learner; this acts and learns by turns, on
one device, and so it deviates:

*   The policy that acts is never behind the one that learns. Each rollout is learned
    from in `--passes` updates, there in one; from the second on the policies differ,
    and V-trace corrects for it. With one pass it has nothing to correct.
*   One dense layer sees one observation; there, convolutions do, and the core also gets
    the last action and reward.
*   Losses are means over the steps that count, there sums. RMSProp has no ε of 0.1 and
    its step size does not decay. Rewards are not clipped.
*   Evaluation takes the likeliest actions, there ones drawn from the policy.

An agent without memory has a return of 0 in Recall.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from sources import Rollout

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains IMPALA and draws its learning curve."""

    env: str = "Recall"  # Recall, Catch, a Gymnasium id, or see README.md
    steps: int = 60_000  # to learn from, of all environments together
    environments: int = 16  # that take their steps together
    evaluate_every: int = 5000  # steps from one point of the curve to the next
    core: CoreName = "lstm"  # what remembers
    features: int = 32  # units of the core, and of the layer before it
    rollout: int = 20  # steps of each environment to learn from at a time
    passes: int = 2  # updates from each rollout
    discount: float = 0.99  # of a reward one step later
    learning_rate: float = 2e-3  # of RMSProp
    max_gradient: float = 1.0  # norm to which gradients are clipped
    value_weight: float = 0.5  # of the loss of the values
    entropy_weight: float = 0.01  # of the bonus for the entropy of the policy


class Row(NamedTuple):
    """What a rollout keeps of a step."""

    obs_tm1: Array
    first_tm1: Array  # whether the episode started there
    logits_tm1: Array  # of the policy that acted
    a_tm1: Array
    r_t: Array
    discount_t: Array
    mask_t: Array  # false if an episode started instead: no step at all
    truncation_t: Array  # whether a time limit cut the episode after the step


class Learner(NamedTuple):
    """What learning changes."""

    params: Any
    opt_state: Any


class Acted(NamedTuple):
    """What the agent saw last, and what it did."""

    observation: Array  # f[B,...]
    first: Array  # b[B]
    logits: Array  # f[B,A]
    action: Array  # i[B]


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    rollout: Row  # each array [T,B,...]
    start: Any  # the carry before the first observation of the rollout
    carry: Any  # the carry after the last observation
    acted: Acted
    steps: Array  # i[]


class IMPALA:
    """The rules by which the agent acts and learns: pure functions of its state.

    Args:
        config: the flags.
        observations: what the environment shows.
        actions: what it takes.
        network: from `B` observations to the logits of `A` actions and a value,
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
        self.num_actions = number_of(actions)
        self.network: Network = network or Recurrent(
            make_core(config.core, config.features),
            self.num_actions + 1,
            config.features,
        )
        self.rollout = Rollout(config.rollout)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_gradient),
            optax.rmsprop(config.learning_rate, decay=0.99, eps=1e-5),
        )
        self.key_init, self.key_explore = jax.random.split(jax.random.key(config.seed))

    def init(self) -> State:
        """Returns the state before the first step."""
        batch = self.config.environments
        never, none = jnp.zeros(batch, bool), jnp.zeros(batch)
        acted = Acted(
            jnp.zeros((batch, *self.shape)),
            never,
            jnp.zeros((batch, self.num_actions)),
            jnp.zeros(batch, jnp.int32),
        )
        params = self.network.init(
            self.key_init,
            self.initial_carry(batch),
            acted.observation[None],
            acted.first[None],
        )
        return State(
            Learner(params, self.optimizer.init(params)),
            self.rollout.init(Row(*acted, none, none, never, never)),
            start=self.initial_carry(batch),
            carry=self.initial_carry(batch),
            acted=acted,
            steps=jnp.int32(0),
        )

    def evaluate(
        self, params: Any, carry: Any, observations: Array, first: Array
    ) -> tuple[Any, Array, Array]:
        """Returns the last carry, logits `f[T,B,A]` and values `f[T,B]`."""
        carry, outputs = self.network.apply(params, carry, observations, first)
        return carry, outputs[..., :-1], outputs[..., -1]

    def step(self, state: State, timestep: Timestep) -> tuple[State, Array, Metrics]:
        """Notes what happened, learns if the rollout is full, and acts."""
        learner, rollout, start, carry, acted, steps = state
        row = Row(
            *acted,
            timestep.r_t,
            self.config.discount * timestep.discount_t,
            ~timestep.first,
            timestep.truncated,
        )
        rollout = self.rollout.add(rollout, row, steps)
        full = self.rollout.is_full(steps)
        learner, metrics = jax.lax.cond(
            full, self.learn, self.wait, learner, start, rollout, timestep
        )
        # The next rollout begins with this observation, and with the carry before it.
        start = jax.tree.map(lambda new, old: jnp.where(full, new, old), carry, start)
        observation = timestep.observation.astype(acted.observation.dtype)
        carry, (logits,), _ = self.evaluate(
            learner.params, carry, observation[None], timestep.first[None]
        )
        action = self.explore(logits, steps)
        acted = Acted(observation, timestep.first, logits, action)
        return State(learner, rollout, start, carry, acted, steps + 1), action, metrics

    def explore(self, logits: Array, steps: Array) -> Array:
        """Draws actions from the policy."""
        key = jax.random.fold_in(self.key_explore, steps)
        return rlprims.softmax().sample(key, logits)

    def loss(
        self, params: Any, start: Any, rollout: Row, timestep: Timestep
    ) -> tuple[Array, Metrics]:
        """Returns the loss of a rollout that the timestep follows, and its parts."""
        observations = jnp.concatenate([rollout.obs_tm1, timestep.observation[None]])
        first = jnp.concatenate([rollout.first_tm1, timestep.first[None]])
        _, logits, values = self.evaluate(params, start, observations, first)
        sums = jax.vmap(self.losses, in_axes=1)(logits[:-1], values, rollout)
        count = jnp.maximum(1.0, jnp.sum(rollout.mask_t, dtype=jnp.float32))
        policy_loss, value_loss, entropy_loss = (jnp.sum(x) / count for x in sums)
        config = self.config
        loss = (
            policy_loss
            + config.value_weight * value_loss
            + config.entropy_weight * entropy_loss
        )
        return loss, {"loss": loss, "value_loss": value_loss, "entropy": -entropy_loss}

    def losses(
        self, logits_tm1: Array, values: Array, row: Row
    ) -> tuple[Array, Array, Array]:
        """Returns three losses of the trajectory of one environment, as sums."""
        rho_tm1 = rlprims.categorical_importance_sampling_ratios(
            logits_tm1, row.logits_tm1, row.a_tm1
        )
        v_trace = rlprims.vtrace_td_error_and_advantage(
            values[:-1],
            values[1:],
            row.r_t,
            row.discount_t,
            rho_tm1,
            truncation_t=row.truncation_t,
            mask_t=row.mask_t,
        )
        once = jnp.ones_like(row.r_t)
        over_steps: dict[str, Any] = {"mask_t": row.mask_t, "reduction": "sum"}
        policy_loss = rlprims.policy_gradient_loss(
            logits_tm1, row.a_tm1, v_trace.pg_advantage, once, **over_steps
        )
        value_loss = jnp.sum(rlprims.l2_loss(v_trace.errors))
        entropy_loss = rlprims.entropy_loss(logits_tm1, once, **over_steps)
        return policy_loss, value_loss, entropy_loss

    def learn(
        self, learner: Learner, start: Any, rollout: Row, timestep: Timestep
    ) -> tuple[Learner, Metrics]:
        """Follows the gradient of the loss, in several passes over the rollout."""

        def update(learner: Learner, _: None) -> tuple[Learner, Metrics]:
            gradients, metrics = jax.grad(self.loss, has_aux=True)(
                learner.params, start, rollout, timestep
            )
            updates, opt_state = self.optimizer.update(gradients, learner.opt_state)
            params = optax.apply_updates(learner.params, updates)
            return Learner(params, opt_state), metrics

        learner, metrics = jax.lax.scan(update, learner, length=self.config.passes)
        return learner, jax.tree.map(jnp.mean, metrics)

    def wait(
        self, learner: Learner, start: Any, rollout: Row, timestep: Timestep
    ) -> tuple[Learner, Metrics]:
        """Learns nothing, as the rollout is not yet full."""
        return learner, dict.fromkeys(["loss", "value_loss", "entropy"], jnp.nan)

    def initial_carry(self, batch: int) -> Any:
        """Returns what is remembered before an episode."""
        return self.network.initial_carry(batch)

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the likeliest actions, and what to remember."""
        carry, (logits,), _ = self.evaluate(
            state.learner.params,
            carry,
            timestep.observation[None],
            timestep.first[None],
        )
        return jnp.argmax(logits, axis=-1), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, IMPALA))

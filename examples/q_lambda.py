"""Online Q(λ), on Catch or on any environment with discrete actions.

    python examples/q_lambda.py
        reaches a return of at least 0.98 in Catch, within 1 minute

Book: Sutton and Barto, "Reinforcement Learning: An Introduction", 2018,
http://incompleteideas.net/book/the-book-2nd.html, second edition, section 12.10. This
is Watkins' Q(λ): a target follows the trajectory as long as its actions are the best
ones known, and bootstraps where one explored. So the values are those of the best
policy, whatever else is tried. Nothing is remembered for long: it acts for a few steps,
learns from them once, and forgets them. It deviates:

*   A neural network holds the values, there a table or linear features.
*   Targets are λ-returns of the newest `length` steps, the forward view, and an update
    follows the mean error of all of them. There, eligibility traces learn at each step.
    Longer episodes are cut into pieces, and a piece bootstraps where it ends.
*   The optimiser is Adam.
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
from loop import Metrics, Timestep
from networks import Network, QNetwork
from sources import Rollout

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains Watkins' Q(λ) and draws its learning curve."""

    discount: float = 0.99  # of a reward one step later
    lambda_: float = 0.9  # from 0, to bootstrap at once, to 1, as late as can be
    length: int = 10  # steps of each environment from one update to the next
    hidden: int = 64  # units in each of the two hidden layers
    learning_rate: float = 1e-3  # of Adam
    epsilon: float = 0.05  # share of random actions, after a linear decay from 1
    epsilon_steps: int = 2000  # length of that decay


class Row(NamedTuple):
    """What the agent keeps of a step until it learns."""

    obs_tm1: Any
    a_tm1: Any
    r_t: Any
    discount_t: Any
    truncation_t: Any  # whether a time limit ended the episode
    mask_t: Any  # whether it is a step at all, and no reset


class Learner(NamedTuple):
    """What learning changes."""

    params: Any
    opt_state: Any


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    rollout: Row  # [T,B,...], the steps since it last learned
    observation: Array  # f[B,...], what the agent saw last
    action: Array  # i[B], and what it did
    steps: Array  # i[]


class QLambda:
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
        self.rollout = Rollout(config.length)
        self.epsilon = optax.linear_schedule(1.0, config.epsilon, config.epsilon_steps)
        self.optimizer = optax.adam(config.learning_rate)
        self.key_init, self.key_explore = jax.random.split(jax.random.key(config.seed))

    def init(self) -> State:
        """Returns the state before the first step."""
        batch = self.config.environments
        params = self.network.init(self.key_init, jnp.zeros(self.shape))
        observation, action = (
            jnp.zeros((batch, *self.shape)),
            jnp.zeros(batch, jnp.int32),
        )
        zero, no = jnp.zeros(batch), jnp.zeros(batch, bool)
        return State(
            Learner(params, self.optimizer.init(params)),
            self.rollout.init(Row(observation, action, zero, zero, no, no)),
            observation,
            action,
            steps=jnp.int32(0),
        )

    def q_values(self, params: Any, observations: Array) -> Any:
        """Returns the values of all actions, `f[B,A]`."""
        return jax.vmap(self.network.apply, in_axes=(None, 0))(params, observations)

    def step(self, state: State, timestep: Timestep) -> tuple[State, Array, Metrics]:
        """Keeps what happened, learns once there is a trajectory, and acts."""
        learner, rollout, observation, action, steps = state
        row = Row(
            observation,
            action,
            timestep.r_t,
            self.config.discount * timestep.discount_t,
            truncation_t=timestep.truncated,
            mask_t=~timestep.first,
        )
        rollout = self.rollout.add(rollout, row, steps)
        observation = timestep.observation.astype(observation.dtype)
        learner, metrics = jax.lax.cond(
            self.rollout.is_full(steps),
            self.learn,
            self.wait,
            learner,
            rollout,
            observation,
        )
        q_values = self.q_values(learner.params, observation)
        action = self.explore(q_values, steps)
        return State(learner, rollout, observation, action, steps + 1), action, metrics

    def explore(self, q_values: Array, steps: Array) -> Array:
        """Returns random actions with probability ε, and else the best ones."""
        key = jax.random.fold_in(self.key_explore, steps)
        epsilon = self.epsilon(steps * self.config.environments)
        return rlprims.epsilon_greedy(epsilon).sample(key, q_values)

    def loss(self, params: Any, rollout: Row, observation: Array) -> Array:
        """Returns the mean squared error of the values, halved; 0 counts for a reset.

        Args:
            params: of the network.
            rollout: the trajectories, `[T,B,...]`.
            observation: what followed the last step, `f[B,...]`.
        """
        seen = jnp.concatenate([rollout.obs_tm1, observation[jnp.newaxis]])
        q = jax.vmap(self.q_values, in_axes=(None, 0), out_axes=1)(params, seen)
        trajectory = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rollout)  # [B,T,...]

        def errors(q: Array, row: Row) -> Array:
            return rlprims.watkins_q_lambda(
                q[:-1],
                row.a_tm1,
                row.r_t,
                row.discount_t,
                q[1:],
                jnp.roll(row.a_tm1, -1),  # the last is not used
                self.config.lambda_,
                truncation_t=row.truncation_t,
                mask_t=row.mask_t,
            )

        return jnp.mean(rlprims.l2_loss(jax.vmap(errors)(q, trajectory)))

    def learn(
        self, learner: Learner, rollout: Row, observation: Array
    ) -> tuple[Learner, Metrics]:
        """Follows the gradient of the loss."""
        params, opt_state = learner
        loss, gradients = jax.value_and_grad(self.loss)(params, rollout, observation)
        updates, opt_state = self.optimizer.update(gradients, opt_state)
        params = optax.apply_updates(params, updates)
        return Learner(params, opt_state), {"loss": loss}

    def wait(
        self, learner: Learner, rollout: Row, observation: Array
    ) -> tuple[Learner, Metrics]:
        """Learns nothing yet, as the trajectory goes on."""
        return learner, {"loss": jnp.nan}

    def initial_carry(self, batch: int) -> None:
        """Returns nothing: to exploit takes no memory."""

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the best actions."""
        q_values = self.q_values(state.learner.params, timestep.observation)
        return jnp.argmax(q_values, axis=-1), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, QLambda))

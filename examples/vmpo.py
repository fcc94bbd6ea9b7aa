"""V-MPO, on-policy maximum a posteriori policy optimisation, with discrete actions.

    python examples/vmpo.py
        reaches a return of at least 475 in CartPole-v1, within 1 minute

Paper: Song et al., "V-MPO: On-Policy Maximum a Posteriori Policy Optimization for
Discrete and Continuous Control", 2019, https://arxiv.org/abs/1909.12238. The policy
follows the better half of its own actions, weighed by their advantages, as far as a
limit on its divergence allows; that limit and the one on the weights are kept by
multipliers, which are learned too. Deviations:

*   It plays small games with two small networks, one for the policy and one for the
    values; there is no memory, no PopArt and no continuous action.
*   Several gradient steps are taken on each rollout, whole, and then the new policy
    acts. There, each batch is learned from once, and the policy that acts is replaced
    after several batches.
*   Advantages are those of λ-returns, with the λ of `gae_lambda`; 1 gives the n-step
    returns of the paper, which reach to the end of the rollout.
*   Multipliers are the softplus of what is learned, so that they stay positive.
*   Gradients are clipped by their norm.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import console
import jax
import jax.numpy as jnp
import optax
from dm_env import specs
from jax import Array
from loop import Metrics, Timestep
from networks import Network
from policies import Categorical, actor_critic
from sources import Rollout

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains V-MPO and draws its learning curve."""

    env: str = "CartPole-v1"  # a Gymnasium id, Catch, or see README.md
    steps: int = 80_000  # to learn from, of all environments together
    environments: int = 8  # that take their steps together
    evaluate_every: int = 10_000  # steps from one point of the curve to the next
    evaluation_episodes: int = 20  # played for each point, without exploring
    discount: float = 0.98  # of a reward one step later
    gae_lambda: float = 0.95  # decay of the errors that make up an advantage
    hidden: int = 64  # units in each of the two hidden layers
    rollout_length: int = 32  # steps of each environment learned from together
    updates: int = 20  # gradient steps on each rollout, before the new policy acts
    top_fraction: float = 0.5  # of the steps, by advantage, that the policy follows
    temperature: float = 1.0  # to start from, of the weights of these steps
    temperature_limit: float = 0.1  # nats that these weights are from uniform ones
    kl_price: float = 5.0  # to start from, of moving the policy
    kl_limit: float = 0.01  # nats that the policy moves between rollouts
    value_weight: float = 1.0  # of the loss of the values
    learning_rate: float = 1e-3  # of Adam
    max_norm: float = 0.5  # of the gradient of all that is learned

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "temperature": (1e-6, math.inf),
        "temperature_limit": (0, math.inf),
        "kl_price": (1e-6, math.inf),
        "kl_limit": (0, math.inf),
        "value_weight": (0, math.inf),
        "max_norm": (0, math.inf),
    }


class Act(NamedTuple):
    """What the agent saw and did, and from which policy."""

    obs_tm1: Any
    a_tm1: Any
    logits_tm1: Any


class Row(NamedTuple):
    """What is kept of a step: that, and what came of it."""

    obs_tm1: Any
    a_tm1: Any
    logits_tm1: Any
    r_t: Any
    discount_t: Any
    truncation_t: Any  # whether a time limit ended the episode
    mask_t: Any  # whether it was a step, and not the start of an episode


class Params(NamedTuple):
    """What is learned. The softplus of a multiplier is what counts: it is positive."""

    network: Any
    temperature: Array  # f[]
    kl_price: Array  # f[]


class Learner(NamedTuple):
    """What learning changes."""

    params: Any  # `Params`
    opt_state: Any


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    rows: Row  # [T,B,...]
    before: Act  # [B,...], of the step before
    steps: Array  # i[]


METRICS = "loss", "policy_loss", "value_loss", "temperature", "kl", "kl_price"


class VMPO:
    """The rules by which the agent acts and learns: pure functions of its state."""

    def __init__(
        self,
        config: Config,
        observations: specs.Array,
        actions: specs.DiscreteArray,
        network: Network | None = None,
    ) -> None:
        self.config, self.shape = config, observations.shape
        self.policy = Categorical(actions)
        self.network = network or actor_critic(self.policy, config.hidden)
        self.rollout = Rollout(config.rollout_length)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_norm),
            optax.adam(config.learning_rate, eps=1e-5),
        )
        self.key_init, self.key_act = jax.random.split(jax.random.key(config.seed))

    def init(self) -> State:
        """Returns the state before the first step."""
        params = Params(
            self.network.init(self.key_init, jnp.zeros(self.shape)),
            _softplus_inverse(self.config.temperature),
            _softplus_inverse(self.config.kl_price),
        )
        zeros = lambda *shape: jnp.zeros((self.config.environments, *shape))
        blank = lambda: Act(
            zeros(*self.shape),
            self.policy.blank(self.config.environments),
            zeros(self.policy.num_outputs),
        )
        of_step = zeros(), zeros(), zeros() > 0, zeros() > 0
        return State(
            Learner(params, self.optimizer.init(params)),
            self.rollout.init(Row(*blank(), *of_step)),
            blank(),
            steps=jnp.int32(0),
        )

    def apply(self, params: Any, observations: Array) -> tuple[Array, Array]:
        """Returns logits, `f[B,A]`, and values, `f[B]`."""
        return jax.vmap(self.network.apply, in_axes=(None, 0))(params, observations)

    def step(self, state: State, timestep: Timestep) -> tuple[State, Array, Metrics]:
        """Remembers what happened, learns if the rollout is full, and acts."""
        learner, rows, before, steps = state
        observation = timestep.observation.astype(jnp.float32)
        row = Row(
            *before,
            timestep.r_t,
            self.config.discount * timestep.discount_t,
            timestep.truncated,
            ~timestep.first,
        )
        rows = self.rollout.add(rows, row, steps)
        is_time = self.rollout.is_full(steps)
        learner, metrics = jax.lax.cond(
            is_time, self.learn, self.wait, learner, rows, observation
        )
        logits, _ = self.apply(learner.params.network, observation)
        action = self.policy.sample(jax.random.fold_in(self.key_act, steps), logits)
        before = Act(observation, action, logits)
        return State(learner, rows, before, steps + 1), action, metrics

    def learn(
        self, learner: Learner, rows: Row, observation: Array
    ) -> tuple[Learner, Metrics]:
        """Follows the gradient of the loss of a rollout several times."""

        def update(learner: Learner, _: None) -> tuple[Learner, Metrics]:
            params, opt_state = learner
            slope = jax.grad(self.loss, has_aux=True)
            gradients, metrics = slope(params, rows, observation)
            updates, opt_state = self.optimizer.update(gradients, opt_state)
            return Learner(optax.apply_updates(params, updates), opt_state), metrics

        learner, metrics = jax.lax.scan(update, learner, length=self.config.updates)
        return learner, jax.tree.map(jnp.mean, metrics)

    def wait(
        self, learner: Learner, rows: Row, observation: Array
    ) -> tuple[Learner, Metrics]:
        """Learns nothing, as the rollout is not full."""
        return learner, dict.fromkeys(METRICS, jnp.nan)

    def loss(
        self, params: Params, rows: Row, observation: Array
    ) -> tuple[Array, Metrics]:
        """Returns the loss of a rollout, the mean over its steps, and metrics.

        What follows a step is what the next row has seen. That is so at the end of an
        episode too, as the row after it is no step, and is masked.
        """
        config, mask_t = self.config, rows.mask_t
        seen = jnp.concatenate([rows.obs_tm1, observation[None]])
        logits, values = jax.vmap(self.apply, in_axes=(None, 0))(params.network, seen)
        logits = logits[:-1]
        errors = jax.vmap(self.errors, in_axes=1, out_axes=1)(
            rows, values[:-1], values[1:]
        )
        temperature = rlprims.LagrangePenalty(
            params.temperature, config.temperature_limit
        )
        kl_penalty = rlprims.LagrangePenalty(params.kl_price, config.kl_limit)
        kl = self.policy.kl(rows.logits_tm1, logits)
        losses, outputs = rlprims.vmpo_loss(
            self.policy.log_prob(rows.a_tm1, logits),
            errors,
            temperature,
            [(kl, kl_penalty)],
            projection_operator=jax.nn.softplus,
            top_k_fraction=config.top_fraction,
            mask_t=mask_t,
        )
        steps = jnp.maximum(jnp.sum(mask_t, dtype=jnp.float32), 1)
        mean = lambda x: jnp.sum(jnp.where(mask_t, x, 0)) / steps
        value_loss = mean(rlprims.l2_loss(errors))
        loss = mean(losses) + config.value_weight * value_loss
        terms = (
            loss,
            mean(outputs.policy_loss),
            value_loss,
            jax.nn.softplus(params.temperature),
            mean(kl),
            jax.nn.softplus(params.kl_price),
        )
        return loss, dict(zip(METRICS, terms, strict=True))

    def errors(self, rows: Row, v_tm1: Array, v_t: Array) -> Array:
        """Returns λ-returns minus values along the steps of one environment, `f[T]`.

        They are errors of the values, and advantages of the actions.
        """
        return rlprims.td_lambda(
            v_tm1,
            rows.r_t,
            rows.discount_t,
            v_t,
            self.config.gae_lambda,
            truncation_t=rows.truncation_t,
            mask_t=rows.mask_t,
        )

    def initial_carry(self, batch: int) -> None:
        """Returns nothing: to exploit takes no memory."""

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the best actions."""
        observation = timestep.observation.astype(jnp.float32)
        logits, _ = self.apply(state.learner.params.network, observation)
        return self.policy.best(logits), carry


def _softplus_inverse(x: float) -> Array:
    return x + jnp.log(-jnp.expm1(-jnp.float32(x)))


if __name__ == "__main__":
    sys.exit(console.main(Config, VMPO))

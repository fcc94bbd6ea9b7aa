r"""PPO, proximal policy optimisation, with discrete or with continuous actions.

    python examples/ppo.py
        reaches a return of at least 475 in CartPole-v1, within 1 minute
    python examples/ppo.py --env Pendulum-v1 --steps 150000 --rollout-length 256 \
        --minibatches 32 --discount 0.95 --reward-scale 0.1 --normalize-observations \
        --evaluate-every 50000 --evaluation-episodes 100
        reaches a return of at least -200 in Pendulum-v1, within 2 minutes

Paper: Schulman, Wolski, Dhariwal, Radford and Klimov, "Proximal Policy Optimization
Algorithms", 2017, https://arxiv.org/abs/1707.06347, with the loss that clips. The
actions of the environment decide the policy: see `policies.py`. Deviations:

*   Advantages are standardised in each minibatch, gradients are clipped by their norm,
    weights start orthogonal, the step size decays, and there are flags to normalise
    observations and to clip values. Not all of this is in the paper: Engstrom et al.,
    "Implementation Matters in Deep Policy Gradients: A Case Study on PPO and TRPO",
    2020, https://arxiv.org/abs/2005.12729, show what it does.
*   Steps are larger, rollouts shorter and discounts lower, as suits small tasks.
*   Where a time limit ends an episode, its last observation has a value still.
*   An observation is normalised once, when it is seen, by all that were seen until
    then, and kept so. That of a reward is a constant factor, the flag `reward_scale`.
*   A continuous action is drawn on a scale where the bounds are -1 and 1, and clipped
    to them. Its probability and the entropy are those before the clip.
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
from policies import actor_critic, policy_for
from sources import Rollout

import rlprims


@dataclass(frozen=True)
class Config(console.Config):
    """Trains PPO and draws its learning curve."""

    env: str = "CartPole-v1"  # a Gymnasium id, Catch, or see README.md
    steps: int = 80_000  # to learn from, of all environments together
    environments: int = 8  # that take their steps together
    evaluate_every: int = 10_000  # steps from one point of the curve to the next
    evaluation_episodes: int = 20  # played for each point, without exploring
    discount: float = 0.98  # of a reward one step later
    gae_lambda: float = 0.95  # decay of the errors that make up an advantage
    hidden: int = 64  # units in each of the two hidden layers
    rollout_length: int = 64  # steps of each environment learned from together
    epochs: int = 10  # times that each rollout is gone through
    minibatches: int = 8  # that each is shuffled into
    epsilon: float = 0.2  # how far from 1 a ratio of probabilities is rewarded
    value_clip: float = math.inf  # how far from the old a value is; inf is no limit
    value_weight: float = 0.5  # of the loss of the values
    entropy_weight: float = 0.0  # of the entropy bonus
    standardize: bool = True  # advantages, within each minibatch
    learning_rate: float = 1e-3  # of Adam
    decay: bool = True  # of the learning rate, linearly to 0 at the end of the run
    max_norm: float = 0.5  # of the gradient of all parameters
    normalize_observations: bool = False  # by mean and deviation of all so far
    reward_scale: float = 1.0  # factor of rewards, when learning

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "epsilon": (0, math.inf),
        "value_clip": (0, math.inf),
        "value_weight": (0, math.inf),
        "entropy_weight": (0, math.inf),
        "max_norm": (0, math.inf),
        "reward_scale": (0, math.inf),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.rollout_length * self.environments
        if rows % self.minibatches:
            raise ValueError(
                "minibatches must divide rollout_length * environments, which is "
                f"{rows}, got {self.minibatches}"
            )


class Act(NamedTuple):
    """What the agent saw, what it did, and what it thought of both."""

    obs_tm1: Any  # on the scale of the network
    a_tm1: Any
    log_prob_tm1: Any  # of the action
    v_tm1: Any


class Row(NamedTuple):
    """What is kept of a step: that, and what came of it."""

    obs_tm1: Any
    a_tm1: Any
    log_prob_tm1: Any
    v_tm1: Any
    r_t: Any
    discount_t: Any
    truncation_t: Any  # whether a time limit ended the episode
    mask_t: Any  # whether it was a step, and not the start of an episode


class Batch(NamedTuple):
    """Steps in any order, and what there is to learn from each."""

    obs_tm1: Any  # f[N,...]
    a_tm1: Any  # i[N], or f[N,...]
    log_prob_tm1: Any  # f[N], of the policy that acted
    v_tm1: Any  # f[N], of the network that acted
    adv_t: Any  # f[N], the advantage of the action
    return_t: Any  # f[N], what the value should have been
    mask_t: Any  # b[N], whether the step counts


class Learner(NamedTuple):
    """What learning changes."""

    params: Any
    opt_state: Any
    seen: Array  # i[], how many steps it has learned from


class State(NamedTuple):
    """All that a step changes."""

    learner: Learner
    statistics: rlprims.RunningStatistics  # of observations
    rows: Row  # [T,B,...]
    before: Act  # [B,...], of the step before
    steps: Array  # i[]


METRICS = "loss", "policy_loss", "value_loss", "entropy", "kl"


class PPO:
    """The rules by which the agent acts and learns: pure functions of its state."""

    def __init__(
        self,
        config: Config,
        observations: specs.Array,
        actions: specs.Array,
        network: Network | None = None,
    ) -> None:
        self.config, self.shape = config, observations.shape
        self.policy = policy_for(actions)
        self.network = network or actor_critic(self.policy, config.hidden)
        self.rollout = Rollout(config.rollout_length)
        rate = config.learning_rate
        self.rate = optax.linear_schedule(
            rate, 0.0 if config.decay else rate, config.steps
        )
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_norm), optax.scale_by_adam(eps=1e-5)
        )
        self.key_init, self.key_act, self.key_shuffle = jax.random.split(
            jax.random.key(config.seed), 3
        )

    def init(self) -> State:
        """Returns the state before the first step."""
        params = self.network.init(self.key_init, jnp.zeros(self.shape))
        zeros = lambda *shape: jnp.zeros((self.config.environments, *shape))
        blank = lambda: Act(
            zeros(*self.shape),
            self.policy.blank(self.config.environments),
            zeros(),
            zeros(),
        )
        of_step = zeros(), zeros(), zeros() > 0, zeros() > 0
        mean, variance = jnp.zeros(self.shape), jnp.zeros(self.shape)
        return State(
            Learner(params, self.optimizer.init(params), jnp.int32(0)),
            rlprims.RunningStatistics(mean, variance, jnp.zeros(())),
            self.rollout.init(Row(*blank(), *of_step)),
            blank(),
            steps=jnp.int32(0),
        )

    def apply(self, params: Any, observations: Array) -> tuple[Array, Array]:
        """Returns the outputs for the policy, `f[B,K]`, and values, `f[B]`."""
        return jax.vmap(self.network.apply, in_axes=(None, 0))(params, observations)

    def step(self, state: State, timestep: Timestep) -> tuple[State, Array, Metrics]:
        """Remembers what happened, learns if the rollout is full, and acts."""
        learner, statistics, rows, before, steps = state
        seen = timestep.observation.astype(jnp.float32)
        if self.config.normalize_observations:
            statistics = rlprims.update_running_statistics(statistics, seen)
        observation = self.normalized(statistics, seen)
        row = Row(
            *before,
            self.config.reward_scale * timestep.r_t,
            self.config.discount * timestep.discount_t,
            timestep.truncated,
            ~timestep.first,
        )
        rows = self.rollout.add(rows, row, steps)
        is_time = self.rollout.is_full(steps)
        learner, metrics = jax.lax.cond(
            is_time, self.learn, self.wait, learner, rows, observation, steps
        )
        outputs, value = self.apply(learner.params, observation)
        action = self.policy.sample(jax.random.fold_in(self.key_act, steps), outputs)
        log_prob = self.policy.log_prob(action, outputs)
        before = Act(observation, action, log_prob, value)
        state = State(learner, statistics, rows, before, steps + 1)
        return state, self.policy.for_environment(action), metrics

    def normalized(
        self, statistics: rlprims.RunningStatistics, observations: Array
    ) -> Array:
        """Returns observations on the scale of the network."""
        if not self.config.normalize_observations:
            return observations
        return rlprims.normalize_by_running_statistics(
            statistics, observations, max_abs=10.0
        )

    def learn(
        self, learner: Learner, rows: Row, observation: Array, steps: Array
    ) -> tuple[Learner, Metrics]:
        """Goes through a rollout several times, in shuffled minibatches."""
        batch = self.batch(learner.params, rows, observation)
        key = jax.random.fold_in(self.key_shuffle, steps)
        keys = jax.random.split(key, self.config.epochs)
        dealt = jax.vmap(self.deal, in_axes=(0, None))(keys, batch.mask_t)
        learner, metrics = jax.lax.scan(
            lambda learner, chosen: self.update(
                learner, jax.tree.map(lambda x: x[chosen], batch)
            ),
            learner,
            dealt.reshape(-1, dealt.shape[-1]),
        )
        seen = learner.seen + jnp.sum(batch.mask_t, dtype=jnp.int32)
        return learner._replace(seen=seen), jax.tree.map(jnp.mean, metrics)

    def wait(
        self, learner: Learner, rows: Row, observation: Array, steps: Array
    ) -> tuple[Learner, Metrics]:
        """Learns nothing, as the rollout is not full."""
        return learner, dict.fromkeys(METRICS, jnp.nan)

    def batch(self, params: Any, rows: Row, observation: Array) -> Batch:
        """Estimates the advantages of a rollout, and makes one batch of its steps.

        What follows a step is what the next row has seen. That is so at the end of an
        episode too, as the row after it is no step, and is masked.
        """
        _, last = self.apply(params, observation)
        v_t = jnp.concatenate([rows.v_tm1[1:], last[None]])
        adv_t = jax.vmap(self.advantages, in_axes=1, out_axes=1)(rows, v_t)
        batch = Batch(*rows[:4], adv_t, adv_t + rows.v_tm1, rows.mask_t)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)

    def advantages(self, rows: Row, v_t: Array) -> Array:
        """Returns the advantages along the steps of one environment, `f[T]`."""
        return rlprims.generalized_advantage_estimation(
            rows.v_tm1,
            rows.r_t,
            rows.discount_t,
            v_t,
            self.config.gae_lambda,
            truncation_t=rows.truncation_t,
            mask_t=rows.mask_t,
        )

    def deal(self, key: Array, mask_t: Array) -> Array:
        """Deals steps out to minibatches, `i[M,N/M]`, those that count first.

        So each minibatch gets as many that count as the others, or one more.
        """
        draws = jax.random.uniform(key, mask_t.shape)
        order = jnp.argsort(jnp.where(mask_t, draws, 1.0))
        return order.reshape(-1, self.config.minibatches).T

    def update(self, learner: Learner, batch: Batch) -> tuple[Learner, Metrics]:
        """Follows the gradient of the loss of a minibatch."""
        params, opt_state, seen = learner
        gradients, metrics = jax.grad(self.loss, has_aux=True)(params, batch)
        updates, opt_state = self.optimizer.update(gradients, opt_state)
        updates = optax.tree.scale(-jnp.asarray(self.rate(seen)), updates)
        return Learner(optax.apply_updates(params, updates), opt_state, seen), metrics

    def loss(self, params: Any, batch: Batch) -> tuple[Array, Metrics]:
        """Returns the loss of a batch, the mean over the steps that count, and metrics.

        Here the primitives come together: the clipped objective of the policy, the
        squared error of the values, and the entropy.
        """
        config, mask_t = self.config, batch.mask_t
        outputs, v_tm1 = self.apply(params, batch.obs_tm1)
        log_prob, old = self.policy.log_prob(batch.a_tm1, outputs), batch.log_prob_tm1
        entropy = self.policy.entropy(outputs)
        adv_t = batch.adv_t
        if config.standardize:
            adv_t = rlprims.standardize_advantages(adv_t, mask_t=mask_t)
        policy_loss = rlprims.ppo_clip_loss(
            log_prob, old, adv_t, epsilon=config.epsilon, mask_t=mask_t
        )
        clip = config.value_clip
        value_loss = rlprims.clipped_value_loss(
            v_tm1, batch.v_tm1, batch.return_t, epsilon=clip, mask_t=mask_t
        )
        entropy_loss = rlprims.entropy_bonus_loss(entropy, mask_t=mask_t)
        loss = policy_loss + config.value_weight * value_loss
        loss += config.entropy_weight * entropy_loss
        kl = rlprims.approximate_kl(log_prob, old, mask_t=mask_t)
        terms = loss, policy_loss, value_loss, -entropy_loss, kl
        return loss, dict(zip(METRICS, terms, strict=True))

    def initial_carry(self, batch: int) -> None:
        """Returns nothing: to exploit takes no memory."""

    def exploit(self, state: State, carry: Any, timestep: Timestep) -> Any:
        """Returns the best actions."""
        seen = timestep.observation.astype(jnp.float32)
        observation = self.normalized(state.statistics, seen)
        outputs, _ = self.apply(state.learner.params, observation)
        return self.policy.for_environment(self.policy.best(outputs)), carry


if __name__ == "__main__":
    sys.exit(console.main(Config, PPO))

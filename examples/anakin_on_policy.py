"""PQN and PPO as one step of a compiled loop each, for `anakin.py`.

Papers: Gallici et al., "Simplifying Deep Temporal Difference Learning", 2024. Schulman
et al., "Proximal Policy Optimization Algorithms", 2017,
https://arxiv.org/abs/1707.06347, with advantages by Schulman et al., "High-Dimensional
Continuous Control Using Generalized Advantage Estimation", 2015,
https://arxiv.org/abs/1506.02438. Deviations:

*   A minibatch takes the same number of steps of every environment, drawn at random,
    so that it does not depend on the number of devices; there, it is any steps.
*   PQN regresses on targets of the network that acted, computed once for all epochs.
*   Networks are small, and rewards and observations are as they come.

`anakin_dqn.py` says what an agent is.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from anakin_networks import MLP, ActorCritic
from fleet import Fleet, World
from jax import Array
from jittable import Environment

import rlprims

# --- What PQN and PPO share ---------------------------------------------------------


@dataclass(frozen=True)
class OnPolicyConfig:
    """Flags of the agents that learn from what they have just done."""

    discount: float = 0.99  # of a reward one step later
    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer
    learning_rate: float = 1e-3  # of Adam, falling to 0
    rollout: int = 32  # steps of each environment between updates
    epochs: int = 4  # times that each step is learned from
    minibatches: int = 4  # parts of an epoch
    lambda_: float = 0.9  # how far returns look before they rely on values
    max_gradient: float = 0.5  # norm above which a gradient is scaled down


class Rows(NamedTuple):
    """Steps of all environments, `[T, B]`."""

    obs_tm1: Array
    a_tm1: Array
    log_prob_tm1: Array  # of the action
    r_t: Array
    discount_t: Array
    mask_t: Array  # whether it is a transition: a reset is not
    truncation_t: Array


class OnPolicyState(NamedTuple):
    """All that an on-policy agent changes."""

    params: Any
    opt_state: Any
    world: World


class OnPolicy:
    """Rolls out, then goes over what happened a few times."""

    network: Any

    def __init__(self, config: Any, env: Environment, iterations: int) -> None:
        self.config, self.actions = config, env.action_spec().num_values
        self.blank = jnp.zeros(env.observation_spec().shape, jnp.float32)
        self.iterations, self.rollout = iterations, config.rollout
        updates = iterations * config.epochs * config.minibatches
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_gradient),
            optax.adam(optax.linear_schedule(config.learning_rate, 0.0, updates)),
        )

    def explore(self, params: Any, observation: Array, key: Array, i: Array) -> Any:
        """Returns an action to learn from, and its log-probability."""
        raise NotImplementedError

    def targets(self, params: Any, rows: Rows, obs_t: Array, fleet: Fleet) -> Any:
        """Returns what a rollout has to teach, as arrays of `[T, B]`."""
        raise NotImplementedError

    def loss(self, params: Any, rows: Rows, targets: Any, fleet: Fleet) -> Array:
        """Returns the mean loss of a minibatch."""
        raise NotImplementedError

    def init(self, key: Array, fleet: Fleet) -> OnPolicyState:
        """Returns the state before the first step."""
        key_params, key_world = jax.random.split(key)
        params = self.network.init(key_params, self.blank)
        opt_state = self.optimizer.init(params)
        return OnPolicyState(params, opt_state, fleet.start(key_world))

    def iterate(
        self, state: OnPolicyState, key: Array, i: Array, fleet: Fleet
    ) -> tuple[OnPolicyState, Array]:
        """Rolls out once, and learns from it."""
        config, (params, opt_state, world) = self.config, state
        key_act, key_learn = jax.random.split(key)

        def act(world: World, keys: Array) -> tuple[World, Rows]:
            obs = world.timestep.observation
            explore = jax.vmap(self.explore, (None, 0, 0, None))
            actions, log_probs = explore(params, obs, keys[0], i)
            world = fleet.step(world, actions, keys[1])
            _, r_t, discount_t, first, last = world.timestep
            rest = config.discount * discount_t, ~first, last & (discount_t > 0)
            return world, Rows(obs, actions, log_probs, r_t, *rest)

        keys = jax.random.split(key_act, (config.rollout, 2))
        keys = jax.vmap(jax.vmap(fleet.keys))(keys)  # k[T,2,B], drawn together
        world, rows = jax.lax.scan(act, world, keys)
        obs_t = jnp.concatenate([rows.obs_tm1[1:], world.timestep.observation[None]])
        batch = rows, self.targets(params, rows, obs_t, fleet)

        def update(carry: Any, batch: Any) -> tuple[Any, None]:
            params, opt_state = carry
            rows, targets = batch
            gradients = jax.grad(self.loss)(params, rows, targets, fleet)
            updates, opt_state = self.optimizer.update(gradients, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        def epoch(carry: Any, key: Array) -> tuple[Any, None]:
            parts = self.minibatches(batch, key, fleet)
            return jax.lax.scan(update, carry, parts)

        keys = jax.random.split(key_learn, config.epochs)
        (params, opt_state), _ = jax.lax.scan(epoch, (params, opt_state), keys)
        return OnPolicyState(params, opt_state, world), fleet.total(rows.mask_t)

    def minibatches(self, batch: Any, key: Array, fleet: Fleet) -> Any:
        """Splits a rollout at random, every environment evenly: `[M, T/M, B]`."""
        shuffle = jax.vmap(jax.random.permutation, (0, None), out_axes=1)
        order = shuffle(fleet.keys(key), self.config.rollout)
        column = jnp.arange(order.shape[1])[None]
        parts = self.config.minibatches
        return jax.tree.map(
            lambda x: x[order, column].reshape(parts, -1, *x.shape[1:]), batch
        )


# --- PQN ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PQNConfig(OnPolicyConfig):
    """Flags of PQN, which needs neither a replay nor a target network."""

    epsilon: float = 0.05  # share of random actions, after a linear decay from 1
    epsilon_decay: float = 0.3  # length of that decay, as a share of training


def pqn_targets(q_t: Array, rows: Any, lambda_: float) -> Array:
    """Returns λ-returns of Peng's Q(λ), `f[T,B]`, from the values reached, `f[T,B,A]`.

    They are those of `rlprims.q_lambda`, which takes the action values of before too.
    """

    def returns(rows: Any, v_t: Array) -> Array:
        cuts = {"truncation_t": rows.truncation_t, "mask_t": rows.mask_t}
        return rlprims.lambda_returns(rows.r_t, rows.discount_t, v_t, lambda_, **cuts)

    return jax.vmap(returns, 1, 1)(rows, jnp.max(q_t, axis=-1))


class PQN(OnPolicy):
    """Gallici et al., "Simplifying Deep Temporal Difference Learning"."""

    def __init__(self, config: PQNConfig, env: Environment, iterations: int) -> None:
        super().__init__(config, env, iterations)
        self.network = MLP(config.hidden, self.actions, layer_norm=True)
        decay = max(1, round(config.epsilon_decay * iterations))
        self.epsilon = optax.linear_schedule(1.0, config.epsilon, decay)

    def q_values(self, params: Any, observation: Array) -> Any:
        """Returns the value of every action, `f[A]`."""
        return self.network.apply(params, observation)

    def exploit(self, params: Any, observation: Array) -> Array:
        """Returns the best action."""
        return jnp.argmax(self.q_values(params, observation))

    def explore(self, params: Any, observation: Array, key: Array, i: Array) -> Any:
        """Returns a random action with probability ε, and else the best one."""
        q = self.q_values(params, observation)
        action = rlprims.epsilon_greedy(self.epsilon(i)).sample(key, q)
        return action, jnp.zeros_like(q[0])  # nothing asks for its probability

    def targets(self, params: Any, rows: Rows, obs_t: Array, fleet: Fleet) -> Array:
        """Returns λ-returns, computed once for all epochs."""
        q_t = _in_time_and_batch(self.q_values)(params, obs_t)
        return pqn_targets(q_t, rows, self.config.lambda_)

    def loss(self, params: Any, rows: Rows, targets: Array, fleet: Fleet) -> Array:
        """Returns the mean squared error of the values of the actions taken, halved."""
        q_tm1 = _in_time_and_batch(self.q_values)(params, rows.obs_tm1)
        taken = jnp.take_along_axis(q_tm1, rows.a_tm1[..., None], axis=-1)[..., 0]
        return fleet.mean(rlprims.l2_loss(taken, targets), rows.mask_t)


# --- PPO ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """Flags of PPO."""

    lambda_: float = 0.95  # how far advantages look before they rely on values
    clip: float = 0.2  # how far a probability may usefully move, relative to itself
    entropy_weight: float = 0.01  # of what keeps the policy from settling early


class PPOTargets(NamedTuple):
    """What PPO learns from a step."""

    behaviour_v_tm1: Array
    adv_tm1: Array


def ppo_losses(
    logits: Array, v: Array, rows: Any, targets: Any, config: Any, axis_name: Any
) -> Array:
    """Returns the loss of each step: of policy, value and entropy."""
    policy, old_v = rlprims.softmax(), targets.behaviour_v_tm1
    each = {"mask_t": rows.mask_t, "reduction": "none"}
    policy_loss = rlprims.ppo_clip_loss(
        policy.logprob(rows.a_tm1, logits),
        rows.log_prob_tm1,
        rlprims.standardize_advantages(
            targets.adv_tm1, mask_t=rows.mask_t, axis_name=axis_name
        ),
        epsilon=config.clip,
        **each,
    )
    value_loss = rlprims.clipped_value_loss(
        v, old_v, targets.adv_tm1 + old_v, epsilon=config.clip, **each
    )
    entropy_loss = rlprims.entropy_bonus_loss(policy.entropy(logits), **each)
    return policy_loss + value_loss + config.entropy_weight * entropy_loss


class PPO(OnPolicy):
    """Schulman et al., "Proximal Policy Optimization Algorithms", clipped."""

    def __init__(self, config: PPOConfig, env: Environment, iterations: int) -> None:
        super().__init__(config, env, iterations)
        self.network = ActorCritic(config.hidden, self.actions)

    def value(self, params: Any, observation: Array) -> Array:
        """Returns the value of the policy, `f[]`."""
        return self.network.apply(params, observation)[1]

    def exploit(self, params: Any, observation: Array) -> Array:
        """Returns the likeliest action."""
        return jnp.argmax(self.network.apply(params, observation)[0])

    def explore(self, params: Any, observation: Array, key: Array, i: Array) -> Any:
        """Returns an action of the policy."""
        logits, _ = self.network.apply(params, observation)
        action = rlprims.softmax().sample(key, logits)
        return action, rlprims.softmax().logprob(action, logits)

    def targets(
        self, params: Any, rows: Rows, obs_t: Array, fleet: Fleet
    ) -> PPOTargets:
        """Returns advantages, computed once for all epochs."""
        values = _in_time_and_batch(self.value)
        v_tm1, v_t = values(params, rows.obs_tm1), values(params, obs_t)

        def advantages(rows: Rows, v_tm1: Array, v_t: Array) -> Array:
            return rlprims.generalized_advantage_estimation(
                v_tm1,
                rows.r_t,
                rows.discount_t,
                v_t,
                self.config.lambda_,
                truncation_t=rows.truncation_t,
                mask_t=rows.mask_t,
            )

        return PPOTargets(v_tm1, jax.vmap(advantages, 1, 1)(rows, v_tm1, v_t))

    def loss(self, params: Any, rows: Rows, targets: Any, fleet: Fleet) -> Array:
        """Returns the mean over the minibatch."""
        logits, v = _in_time_and_batch(self.network.apply)(params, rows.obs_tm1)
        losses = ppo_losses(logits, v, rows, targets, self.config, fleet.axis_name)
        return fleet.mean(losses, rows.mask_t)


def _in_time_and_batch(fn: Any) -> Any:
    """Maps a function of parameters and one observation over arrays of `[T, B]`."""
    return jax.vmap(jax.vmap(fn, (None, 0)), (None, 0))

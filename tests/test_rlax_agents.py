"""Agents written for RLax learn the same, for a seed, with the import changed.

Three small agents take the library as an argument. With rlprims they learn a corridor;
where RLax is installed too, as by `pip install -e ".[peer]"`, every action and every
parameter is the same with it.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

STATES, ACTIONS, GAMMA = 6, 2, 0.9
RIGHT = 1


class Corridor:
    """Walk right to a reward of 1; the left end pays 0.1, and both end the episode.

    Episodes start in each state in turn.
    """

    def __init__(self):
        self.starts = itertools.cycle(range(STATES - 1))
        self.state = next(self.starts)

    def step(self, action):
        """Returns the whole transition, and starts anew where an episode ends."""
        before, after = self.state, self.state + (1 if action == RIGHT else -1)
        reward = {-1: 0.1, STATES - 1: 1.0}.get(after, 0.0)
        ended = after in {-1, STATES - 1}
        self.state = next(self.starts) if ended else after
        discount = 0.0 if ended else GAMMA
        return before, action, np.float32(reward), np.float32(discount), max(after, 0)


def batch_of(transitions):
    columns = zip(*transitions, strict=True)
    return tuple(np.asarray(column) for column in columns)


def descend(params, grads, rate):
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def dqn(rl, seed):
    """Double Q-learning on tables, with replay and a target table."""

    @jax.jit
    def act(q, key, state):
        return rl.epsilon_greedy(0.3).sample(key, q[state])

    def loss(q, target, s_tm1, a_tm1, r_t, discount_t, s_t):
        errors = jax.vmap(rl.double_q_learning)(
            q[s_tm1], a_tm1, r_t, discount_t, target[s_t], q[s_t]
        )
        return jnp.mean(rl.huber_loss(errors, 1.0))

    @jax.jit
    def update(q, target, step, batch):
        q = descend(q, jax.grad(loss)(q, target, *batch), rate=2.0)
        return q, rl.periodic_update(q, target, step, 10)

    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 400)
    q = target = jnp.zeros((STATES, ACTIONS))
    environment, replay = Corridor(), []
    for key in keys:
        action = int(act(q, key, environment.state))
        replay.append(environment.step(action))
        batch = batch_of([replay[i] for i in rng.integers(len(replay), size=16)])
        q, target = update(q, target, len(replay), batch)
    return {"q": q, "actions": np.array([a for _, a, *_ in replay])}, q


def actor_critic(rl, seed):
    """Advantages and value errors of V-trace, learned from a little late."""

    @jax.jit
    def act(logits, key, state):
        return rl.softmax().sample(key, logits[state])

    def loss(params, behaviour, s_tm1, a_tm1, r_t, discount_t, s_t):
        logits, v = params
        rho_tm1 = rl.categorical_importance_sampling_ratios(
            logits[s_tm1], behaviour[s_tm1], a_tm1
        )
        out = rl.vtrace_td_error_and_advantage(
            v[s_tm1], v[s_t], r_t, discount_t, jax.lax.stop_gradient(rho_tm1), 0.9
        )
        ones = jnp.ones_like(r_t)
        policy = rl.policy_gradient_loss(logits[s_tm1], a_tm1, out.pg_advantage, ones)
        entropy = rl.entropy_loss(logits[s_tm1], ones)
        return policy + 0.5 * jnp.mean(jnp.square(out.errors)) + 0.01 * entropy

    @jax.jit
    def update(params, behaviour, batch):
        return descend(params, jax.grad(loss)(params, behaviour, *batch), rate=1.0)

    keys = jax.random.split(jax.random.key(seed), 1200)
    params = jnp.zeros((STATES, ACTIONS)), jnp.zeros(STATES)
    environment, behaviour, actions, unroll = Corridor(), params[0], [], []
    for key in keys:
        actions.append(int(act(behaviour, key, environment.state)))
        unroll.append(environment.step(actions[-1]))
        if len(unroll) == 12:  # the policy that acts next is one update behind
            behaviour, old = params[0], behaviour
            params, unroll = update(params, old, batch_of(unroll)), []
    return {"params": params, "actions": np.array(actions)}, params[0]


def categorical_dqn(rl, seed):
    """C51 on a table of logits, without a target network."""
    atoms = jnp.linspace(0.0, 1.0, 11)

    @jax.jit
    def act(logits, key, state):
        means = jax.nn.softmax(logits[state]) @ atoms
        return rl.epsilon_greedy(0.3).sample(key, means)

    def loss(logits, s_tm1, a_tm1, r_t, discount_t, s_t):
        error = lambda s, a, r, d, following: rl.categorical_q_learning(
            atoms, logits[s], a, r, d, atoms, logits[following]
        )
        return jnp.mean(jax.vmap(error)(s_tm1, a_tm1, r_t, discount_t, s_t))

    @jax.jit
    def update(logits, batch):
        return descend(logits, jax.grad(loss)(logits, *batch), rate=5.0)

    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 400)
    logits = jnp.zeros((STATES, ACTIONS, len(atoms)))
    environment, replay = Corridor(), []
    for key in keys:
        action = int(act(logits, key, environment.state))
        replay.append(environment.step(action))
        batch = batch_of([replay[i] for i in rng.integers(len(replay), size=16)])
        logits = update(logits, batch)
    actions = np.array([a for _, a, *_ in replay])
    return {"logits": logits, "actions": actions}, jax.nn.softmax(logits) @ atoms


@pytest.mark.parametrize("agent", [dqn, actor_critic, categorical_dqn])
class TestAgents:
    def test_learns_to_walk_right(self, agent):
        _, preferences = agent(rlprims, seed=0)
        inside = np.asarray(preferences)[: STATES - 1]
        assert inside.argmax(axis=-1).tolist() == [RIGHT] * (STATES - 1)

    @pytest.mark.filterwarnings("ignore")
    def test_learns_what_it_learns_with_rlax(self, agent):
        rlax = pytest.importorskip("rlax")
        ours, _ = agent(rlprims, seed=1)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            theirs, _ = agent(rlax, seed=1)
        np.testing.assert_array_equal(ours["actions"], theirs["actions"])
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            ours,
            theirs,
        )

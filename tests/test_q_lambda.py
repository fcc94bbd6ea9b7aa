import jax
import jax.numpy as jnp
import loop
import numpy as np
import probes
import pytest
import q_lambda
from dm_env import specs

pytestmark = pytest.mark.usefixtures("promotion_for_optax")


# --- Probes: environments whose values are known ------------------------------------


@pytest.fixture(scope="module")
def learned_values():
    """Trains one agent on a probe; returns its values as `q[time][sign][action]`."""
    config = q_lambda.Config(
        environments=8,
        length=5,  # cuts the stream into pieces anywhere in an episode
        discount=0.5,
        hidden=32,
        learning_rate=3e-3,
        epsilon=1.0,
    )
    env = probes.constant_reward()
    rules = q_lambda.QLambda(config, env.observation_spec(), env.action_spec())
    agent = loop.Agent(rules)
    init, q_values = jax.jit(rules.init), jax.jit(rules.q_values)
    seen = np.array([[t, s, 0] for t in (0, 1) for s in (-1, 1)], np.float32)

    def learn(make):
        agent.state = init()
        envs = loop.Environments([make(seed) for seed in range(8)])
        loop.Engine(loop.Interaction(envs, agent)).run(4000)
        return np.asarray(q_values(agent.state.learner.params, seen)).reshape(2, 2, 2)

    return learn


@pytest.mark.parametrize(
    "make",
    [
        probes.constant_reward,
        probes.reward_by_observation,
        probes.delayed_reward,
        probes.reward_by_action,
        probes.cut_short,
    ],
    ids=lambda make: make.__name__,
)
def test_the_values_of_each_probe_are_exact(learned_values, make):
    expected = make().action_values(discount=0.5)
    learned = learned_values(make)[: len(expected)]
    np.testing.assert_allclose(learned, expected, atol=0.05)


# --- The loss -----------------------------------------------------------------------


def linear(num_actions):
    """A network without a library: a matrix, and observations as vectors."""
    return q_lambda.Network(
        init=lambda key, x: jax.random.normal(key, (num_actions, *x.shape)),
        apply=lambda params, x: params @ x,
    )


def make_rules(observation_size=4, num_actions=3, network=None, **flags):
    return q_lambda.QLambda(
        q_lambda.Config(**flags),
        specs.Array((observation_size,), np.float32),
        specs.DiscreteArray(num_actions),
        network or linear(num_actions),
    )


def draw_rollout(rng, length=12, batch=3):
    """Steps of several episodes; after some that end comes a reset, which is none."""
    mask_t = rng.random((length, batch)) > 0.2
    last = np.concatenate([~mask_t[1:], rng.random((1, batch)) < 0.3]) & mask_t
    terminated = last & (rng.random((length, batch)) < 0.5)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rollout = q_lambda.Row(
        obs_tm1=normal(length, batch, 4),
        a_tm1=rng.integers(3, size=(length, batch)).astype(np.int32),
        r_t=normal(length, batch),
        discount_t=np.where(terminated, 0, 0.9).astype(np.float32),
        truncation_t=last & ~terminated,
        mask_t=mask_t,
    )
    return rollout, normal(batch, 4)


def watkins_targets(params, rollout, observation, lambda_):
    """Each target, from the definition: along the trajectory until it has to stop."""
    length, batch = rollout.r_t.shape
    seen = np.concatenate([rollout.obs_tm1, observation[None]])
    q = np.einsum("ai,tbi->tba", np.asarray(params, float), seen)
    targets = np.zeros((length, batch))
    for t, b in np.argwhere(rollout.mask_t):
        discount, trust, k = 1.0, 1.0, t
        while True:
            targets[t, b] += discount * trust * rollout.r_t[k, b]
            discount *= rollout.discount_t[k, b]
            best = q[k + 1, b].max()
            stop = k + 1 == length or rollout.truncation_t[k, b] or discount == 0
            follow = 0 if stop else lambda_
            if follow and q[k + 1, b, rollout.a_tm1[k + 1, b]] < best:
                follow = 0
            targets[t, b] += discount * trust * (1 - follow) * best
            trust, k = trust * follow, k + 1
            if not trust:
                break
    return targets, q


def test_targets_follow_the_best_actions_and_end_with_the_episode(rng):
    rules, params = make_rules(lambda_=0.8), rng.normal(size=(3, 4)).astype(np.float32)
    rollout, observation = draw_rollout(rng)
    targets, q = watkins_targets(params, rollout, observation, 0.8)
    taken = np.take_along_axis(q[:-1], rollout.a_tm1[..., None], -1)[..., 0]
    errors = np.where(rollout.mask_t, targets - taken, 0)
    loss, slope = jax.value_and_grad(rules.loss)(params, rollout, observation)
    np.testing.assert_allclose(loss, np.mean(errors**2 / 2), rtol=1e-4)
    # The targets are held constant: only the values of the actions taken are moved.
    one_hot = np.eye(3)[rollout.a_tm1]
    expected = -np.einsum("tb,tba,tbi->ai", errors, one_hot, rollout.obs_tm1)
    np.testing.assert_allclose(slope, expected / errors.size, rtol=1e-3, atol=1e-5)


def test_what_the_loss_is_checked_on_has_every_kind_of_step(rng):
    rollout, _ = draw_rollout(rng)
    assert rollout.truncation_t.any()
    assert (rollout.discount_t == 0).any()
    assert not rollout.mask_t.all()


def test_a_reset_teaches_nothing_whatever_came_with_it(rng):
    rules, params = make_rules(), rng.normal(size=(3, 4)).astype(np.float32)
    rollout, observation = draw_rollout(rng)
    loss = jax.jit(rules.loss)
    spoilt = rollout._replace(
        a_tm1=np.where(rollout.mask_t, rollout.a_tm1, 2 - rollout.a_tm1),
        r_t=np.where(rollout.mask_t, rollout.r_t, np.float32(np.nan)),
    )
    clean = loss(params, rollout, observation)
    np.testing.assert_array_equal(loss(params, spoilt, observation), clean)


# --- The steps ----------------------------------------------------------------------


def stream(rng, steps, batch=2, size=4):
    """Timesteps of episodes of three steps, out of step with one another."""
    for t in range(steps):
        phase = (t + np.arange(batch)) % 4 if t else np.zeros(batch)
        yield loop.Timestep(
            rng.normal(size=(batch, size)).astype(np.float32),
            np.where(phase == 0, 0, t).astype(np.float32),
            np.where((phase == 3) & (t % 2 == 0), 0, 1).astype(np.float32),
            phase == 0,
            phase == 3,
        )


@pytest.fixture(scope="module")
def walked():
    """An agent that has learned from a short stream twice."""
    rules = make_rules(environments=2, length=4, discount=0.5, learning_rate=1e-3)
    agent = loop.Agent(rules)
    before, after, metrics, actions = [], [], [], []
    timesteps = list(stream(np.random.default_rng(0), 11))
    for timestep in timesteps:
        before.append(jax.tree.map(np.array, agent.state))
        done, said = agent.step(timestep)
        after.append(jax.tree.map(np.array, agent.state))
        actions.append(done)
        metrics.append(said)
    return rules, timesteps, before, after, metrics, actions


def test_it_learns_once_from_each_trajectory(walked):
    _, _, before, after, metrics, _ = walked
    learned = [3, 7]
    for t in range(11):
        moved = np.any(before[t].learner.params != after[t].learner.params)
        assert moved == (t in learned)
        assert np.isfinite(metrics[t]["loss"]) == (t in learned)


def test_it_learns_from_what_it_saw_and_did(walked):
    rules, timesteps, before, after, metrics, actions = walked
    seen, taken = np.stack([t.observation for t in timesteps]), np.stack(actions)
    for t in (3, 7):
        rows = slice(t - 3, t + 1)
        now = loop.Timestep(*map(np.stack, zip(*timesteps[rows], strict=True)))
        rollout = q_lambda.Row(
            obs_tm1=np.concatenate([np.zeros((1, 2, 4), np.float32), seen])[rows],
            a_tm1=np.concatenate([np.zeros((1, 2), np.int32), taken])[rows],
            r_t=now.r_t,
            discount_t=0.5 * now.discount_t,
            truncation_t=now.last & (now.discount_t == 1),
            mask_t=~now.first,
        )
        for name, kept, true in zip(
            q_lambda.Row._fields, after[t].rollout, rollout, strict=True
        ):
            np.testing.assert_array_equal(kept, true, err_msg=name)
        loss = rules.loss(before[t].learner.params, rollout, seen[t])
        np.testing.assert_allclose(metrics[t]["loss"], loss, rtol=1e-5)


def test_it_exploits_the_best_actions_it_knows(walked, rng):
    rules, _, _, after, _, _ = walked
    timestep = next(stream(rng, 1))
    actions, carry = rules.exploit(after[-1], rules.initial_carry(2), timestep)
    q = timestep.observation @ after[-1].learner.params.T
    np.testing.assert_array_equal(actions, q.argmax(-1))
    assert carry is None


def test_it_explores_less_and_less():
    rules = make_rules(epsilon=0.2, epsilon_steps=100)
    q_values = jnp.tile(jnp.array([0.0, 1.0, 0.0]), (3000, 1))
    explore = jax.jit(jax.vmap(rules.explore, in_axes=(None, 0)))
    actions = explore(q_values, jnp.array([0, 50, 100, 1000]))
    expected = 1 - np.array([1.0, 0.6, 0.2, 0.2]) * 2 / 3
    np.testing.assert_allclose(np.mean(actions == 1, axis=1), expected, atol=0.03)

import jax
import jax.numpy as jnp
import loop
import numpy as np
import probes
import pytest
import td3
from dm_env import specs
from loop import Timestep, Transition

import rlprims

GAMMA, RATE, RANDOM = 0.5, 0.1, 100
SIGNS = np.array([-1.0, 1.0])


pytestmark = pytest.mark.usefixtures("promotion_for_optax")


@pytest.fixture(scope="module")
def agent():
    """An agent with everything small, compiled once for all tests."""
    config = td3.Config(
        environments=4,
        discount=GAMMA,
        hidden=32,
        learning_rate=5e-3,
        batch_size=64,
        capacity=2000,
        random_steps=4 * RANDOM,
        target_rate=RATE,
    )
    env = probes.constant_reward(continuous=True)
    rules = td3.TD3(config, env.observation_spec(), env.action_spec())
    agent = loop.Agent(rules)
    agent.rules, agent.init = rules, jax.jit(rules.init)
    return agent


# --- Probes: environments whose values are known ------------------------------------


@pytest.fixture(scope="module")
def learned(agent):
    """Trains the agent on a probe.

    Returns what the critics make of an action, as `q[critic][time][sign]`, and the best
    actions, as `a[sign]`.
    """
    times, signs = np.meshgrid([0.0, 1.0], SIGNS, indexing="ij")
    obs = jnp.stack([times, signs, 0 * times], -1).reshape(4, 3).astype(jnp.float32)
    q_values = jax.jit(agent.rules.q_values)

    def learn(probe, steps=300):
        agent.state = agent.init()
        envs = loop.Environments([probe(seed, continuous=True) for seed in range(4)])
        loop.Engine(loop.Interaction(envs, agent)).run(4 * steps)
        critics = agent.state.learner.params.critics
        zeros = np.zeros(4, np.float32)
        best, _ = agent.exploit(None, Timestep(obs, zeros, zeros, zeros, zeros))
        q = lambda action: np.asarray(
            q_values(critics, obs, jnp.full((4, 1), action, jnp.float32))
        ).reshape(2, 2, 2)
        return q, best

    return learn


def test_a_constant_reward_is_the_value_of_what_it_does(learned):
    q, best = learned(probes.constant_reward)
    for i in range(2):
        np.testing.assert_allclose(q(best[i, 0])[:, 0, i], 1.0, atol=0.05)


def test_a_reward_told_by_the_observation_is_the_value(learned):
    q, best = learned(probes.reward_by_observation)
    for i in range(2):
        np.testing.assert_allclose(q(best[i, 0])[:, 0, i], SIGNS[i], atol=0.05)


def test_a_reward_one_step_later_is_discounted_once(learned):
    q, best = learned(probes.delayed_reward)
    for i in range(2):
        np.testing.assert_allclose(q(best[i, 0])[:, 0, i], GAMMA, atol=0.05)
        np.testing.assert_allclose(q(best[2 + i, 0])[:, 1, i], 1.0, atol=0.05)


def test_the_best_action_is_found_and_valued(learned):
    q, best = learned(probes.reward_by_action, steps=600)
    np.testing.assert_allclose(best[:2, 0], SIGNS / 2, atol=0.05)
    for i, action in enumerate(SIGNS / 2):
        np.testing.assert_allclose(q(action)[:, 0, i], 1.0, atol=0.05)


def test_a_stream_cut_short_is_worth_all_of_it(learned):
    q, best = learned(probes.cut_short)
    for i in range(2):
        value = 1 / (1 - GAMMA)
        np.testing.assert_allclose(q(best[i, 0])[:, 0, i], value, atol=0.05)


# --- The losses ---------------------------------------------------------------------


def perceptron(params, x):
    """A network of three layers, read in double precision."""
    for i in range(3):
        layer = params["params"][f"Dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if i < 2 else x
    return x


def q_values(critics, obs, action):
    x = np.concatenate([obs, action], -1)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], critics) for i in range(2)]
    return np.stack([perceptron(one, x)[:, 0] for one in each])


def critic_equation(critics, target, batch, noise):
    """Both critics learn from the lesser of the target critics, near its policy."""
    a_t = np.tanh(perceptron(target.policy, batch.obs_t))
    a_t = np.clip(a_t + np.clip(0.2 * noise, -0.5, 0.5), -1, 1)
    v_t = q_values(target.critics, batch.obs_t, a_t).min(0)
    q = q_values(critics, batch.obs_tm1, batch.a_tm1)
    return np.mean((batch.r_t + batch.discount_t * v_t - q) ** 2, axis=1).sum()


def policy_equation(policy, critics, batch):
    """The policy seeks what the first critic values."""
    action = np.tanh(perceptron(policy, batch.obs_tm1))
    return -np.mean(q_values(critics, batch.obs_tm1, action)[0])


@pytest.fixture(scope="module")
def read(agent):
    """Losses and gradients by the agent, and what the equations say of them."""
    rng, state, rules = np.random.default_rng(0), agent.init(), agent.rules
    params, target = jax.tree.map(
        lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)),
        (state.learner.params, state.learner.target_params),
    )
    normal = lambda *shape: np.float32(rng.normal(size=shape))
    discount_t = np.tile(np.float32([0.5, 0.0, 0.9, 1.0]), 25)
    batch = Transition(
        normal(100, 3), np.tanh(normal(100, 1)), normal(100), discount_t, normal(100, 3)
    )

    @jax.jit
    def learn_from(params, key):
        noise = rlprims.add_gaussian_noise(key, jnp.zeros((100, 1)), 1.0)
        critic = jax.value_and_grad(rules.critic_loss)(
            params.critics, target, batch, key
        )
        policy = jax.value_and_grad(rules.policy_loss)(
            params.policy, params.critics, batch
        )
        return {"critics": critic, "policy": policy}, noise

    with jax.numpy_dtype_promotion("strict"):
        got, noise = learn_from(params, jax.random.key(7))
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    params, target, batch, noise = wide((params, target, batch, noise))
    assert np.sum(np.abs(0.2 * noise) > 0.5) > 0  # some of it is clipped
    equations = {
        "critics": lambda critics: critic_equation(critics, target, batch, noise),
        "policy": lambda policy: policy_equation(policy, params.critics, batch),
    }
    return params, got, equations


@pytest.mark.parametrize("part", ["critics", "policy"])
def test_each_loss_is_what_its_equation_says(read, part):
    params, got, equations = read
    expected = equations[part](getattr(params, part))
    np.testing.assert_allclose(got[part][0], expected, rtol=1e-5)


@pytest.mark.parametrize("part", ["critics", "policy"])
def test_the_gradient_of_each_loss_is_the_slope_of_its_equation(read, part):
    params, got, equations = read
    rng, start = np.random.default_rng(1), getattr(params, part)
    for _ in range(3):
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), start)
        moved = lambda h, way=way: equations[part](
            jax.tree.map(lambda x, d: x + h * d, start, way)
        )
        along = sum(map(np.vdot, jax.tree.leaves(got[part][1]), jax.tree.leaves(way)))
        np.testing.assert_allclose(
            along, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-4
        )


def test_any_pure_functions_serve_as_networks():
    linear = td3.PolicyAndCritic(
        init_policy=lambda key, obs: jnp.float32(1.0),
        policy=lambda w, obs: w * obs,
        init_critic=lambda key, obs, action: jnp.float32(3.0),
        critic=lambda w, obs, action: w * obs[0] + action[0],
    )
    spec = specs.BoundedArray((1,), np.float32, -1.0, 1.0)
    rules = td3.TD3(td3.Config(), specs.Array((1,), np.float32), spec, linear)
    obs, action = jnp.array([[1.0], [2.0]]), jnp.array([[10.0], [20.0]])
    q = rules.q_values(jnp.array([1.0, -1.0]), obs, action)
    np.testing.assert_array_equal(q, [[11.0, 22.0], [9.0, 18.0]])
    state = jax.eval_shape(rules.init)
    assert state.learner.params.critics.shape == (2,)
    number, flag = jnp.zeros(1), jnp.zeros(1, bool)
    timestep = Timestep(jnp.zeros((1, 1)), number, number, flag, flag)
    assert jax.eval_shape(rules.step, state, timestep)[1].shape == (1, 1)


# --- What changes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(agent):
    """States, timesteps, actions and metrics of steps that end episodes both ways."""
    rng, agent.state = np.random.default_rng(2), agent.init()
    history = []
    for step in range(RANDOM + 6):
        first, last = step % 3 == 0, step % 3 == 2
        timestep = Timestep(
            rng.normal(size=(4, 3)).astype(np.float32),
            np.full(4, 0.0 if first else step, np.float32),
            np.where(last & (np.arange(4) % 2 == 0), 0, 1).astype(np.float32),
            np.full(4, first),
            np.full(4, last),
        )
        actions, metrics = agent.step(timestep)
        state = jax.tree.map(np.array, agent.state)
        history.append((state, timestep, actions, metrics))
    return history


def same(x, y):
    return all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(y)))


def test_memories_keep_the_time_limit_apart_from_the_end_and_skip_resets(history):
    state, *_ = history[8]  # three episodes of two transitions each
    rows, size = state.replay.rows, int(state.replay.size)
    assert size == 3 * 2 * 4
    rewards = np.repeat([1.0, 2.0, 4.0, 5.0, 7.0, 8.0], 4)
    np.testing.assert_array_equal(rows.r_t[:size], rewards)
    terminated = [0.0, GAMMA, 0.0, GAMMA]
    discounts = np.tile([[GAMMA] * 4, terminated], (3, 1)).ravel()
    np.testing.assert_array_equal(rows.discount_t[:size], discounts)


def test_memories_hold_what_was_seen_and_done_before_and_what_was_seen_then(history):
    rows = history[-1][0].replay.rows
    first, second = history[3], history[4]
    np.testing.assert_array_equal(rows.obs_tm1[8:12], first[1].observation)
    np.testing.assert_array_equal(rows.a_tm1[8:12], first[2])
    np.testing.assert_array_equal(rows.obs_t[8:12], second[1].observation)


def test_nothing_is_learned_before_the_random_steps_are_over(history):
    before, first = history[RANDOM - 1], history[RANDOM]
    start = history[0][0].learner
    assert same(before[0].learner, start)
    assert np.all(np.isnan([*before[3].values()]))
    assert np.all(np.isfinite([*first[3].values()]))
    changed = jax.tree.map(np.array_equal, first[0].learner.params, start.params)
    assert not any(jax.tree.leaves(changed))


def test_the_policy_and_all_targets_wait_for_every_second_step(history):
    for step in range(RANDOM, RANDOM + 6):
        before, after = history[step - 1][0].learner, history[step][0].learner
        waits = step % 2 == 1
        assert not same(before.params.critics, after.params.critics)
        assert same(before.params.policy, after.params.policy) == waits
        assert same(before.opt_state.policy, after.opt_state.policy) == waits
        assert same(before.target_params.policy, after.target_params.policy) == waits
        assert same(before.target_params.critics, after.target_params.critics) == waits
        assert np.isnan(history[step][3]["policy_loss"]) == waits


def test_to_improve_the_policy_leaves_the_critics_alone(agent, history):
    learner, replay, *_ = history[-1][0]
    batch = jax.tree.map(lambda x: x[:64], replay.rows)
    improved, _ = jax.jit(agent.rules.improve)(learner, batch)
    assert not same(improved.params.policy, learner.params.policy)
    assert same(improved.params.critics, learner.params.critics)
    assert same(improved.opt_state.critics, learner.opt_state.critics)


def test_all_targets_are_exponential_averages_over_every_second_step(history):
    expected = history[0][0].learner.params
    for state, *_ in history[RANDOM::2]:
        now = state.learner.params
        expected = jax.tree.map(lambda e, x: (1 - RATE) * e + RATE * x, expected, now)
        close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, state.learner.target_params, expected)


def test_the_two_critics_and_the_first_actions_differ(history):
    state, *_ = history[0]
    kernel = state.learner.params.critics["params"]["Dense_0"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert len({float(action[0]) for action in history[0][2]}) == 4


def test_it_explores_all_actions_alike_and_then_with_noise_of_its_deviation(agent):
    obs, explore = jnp.zeros((2000, 3)), jax.jit(agent.rules.explore)
    params = agent.init().learner.params.policy
    uniform = explore(params, obs, jnp.int32(RANDOM - 1))
    np.testing.assert_allclose(np.std(uniform), 1 / np.sqrt(3), rtol=0.03)
    noise = explore(params, obs, jnp.int32(RANDOM)) - jax.jit(agent.rules.policy)(
        params, obs
    )
    assert np.std(noise) == pytest.approx(0.1, rel=0.05)
    assert np.mean(noise) == pytest.approx(0.0, abs=0.01)


def test_noise_never_takes_an_action_out_of_bounds(agent):
    params = jax.tree.map(np.array, agent.init().learner.params.policy)
    params["params"]["Dense_2"]["bias"] += 2.0  # close to the bound, tanh(2) = 0.96
    explore = jax.jit(agent.rules.explore)
    actions = explore(params, jnp.zeros((2000, 3)), jnp.int32(RANDOM))
    assert np.max(actions) == 1.0
    assert np.min(actions) < 0.9


def test_to_exploit_is_to_do_as_the_policy_says(agent, history):
    timestep = history[-1][1]
    actions, _ = agent.exploit(None, timestep)
    params = jax.tree.map(np.float64, agent.state.learner.params.policy)
    expected = np.tanh(perceptron(params, timestep.observation))
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)


def test_actions_get_the_bounds_and_the_shape_of_the_environment():
    spec = specs.BoundedArray((1, 2), np.float32, [0.0, -3.0], [10.0, -1.0])
    rules = td3.TD3(td3.Config(), specs.Array((2,), np.float32), spec)
    actions = rules.bounds.rescale(jnp.array([[-1.0, 0.5]]))
    np.testing.assert_allclose(actions, [[[0.0, -1.5]]])


def test_discrete_actions_are_refused():
    with pytest.raises(
        ValueError, match=r"actions must be floats .* got DiscreteArray"
    ):
        td3.TD3(td3.Config(), specs.Array((2,), np.float32), specs.DiscreteArray(2))

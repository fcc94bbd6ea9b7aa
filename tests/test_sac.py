import jax
import jax.numpy as jnp
import loop
import numpy as np
import probes
import pytest
import sac
from actions import Bounds
from dm_env import specs
from loop import Timestep, Transition

import rlprims

GAMMA, RATE, RANDOM = 0.5, 0.1, 20
SIGNS = np.array([-1.0, 1.0])


pytestmark = pytest.mark.usefixtures("promotion_for_optax")


@pytest.fixture(scope="module")
def agent():
    """An agent with everything small, compiled once for all tests."""
    config = sac.Config(
        environments=4,
        discount=GAMMA,
        hidden=16,
        learning_rate=5e-3,
        batch_size=64,
        capacity=2000,
        random_steps=4 * RANDOM,
        target_rate=RATE,
        temperature_learning_rate=0.0,
    )
    env = probes.constant_reward(continuous=True)
    rules = sac.SAC(config, env.observation_spec(), env.action_spec())
    agent = loop.Agent(rules)
    agent.rules, agent.init = rules, jax.jit(rules.init)
    return agent


# --- Probes: environments whose values are known ------------------------------------


@pytest.fixture(scope="module")
def learned(agent):
    """Trains the agent at a fixed temperature on a probe.

    Returns what the critics make of an action, as `q[critic][time][sign]`, and the best
    actions, as `a[sign]`.
    """
    rules = agent.rules
    times, signs = np.meshgrid([0.0, 1.0], SIGNS, indexing="ij")
    obs = jnp.stack([times, signs, 0 * times], -1).reshape(4, 3).astype(jnp.float32)
    q_values = jax.jit(rules.q_values)

    def learn(probe, temperature, steps=300):
        state = agent.init()
        params = state.learner.params._replace(
            log_temperature=jnp.log(jnp.float32(temperature))
        )
        agent.state = state._replace(learner=state.learner._replace(params=params))
        envs = loop.Environments([probe(seed, continuous=True) for seed in range(4)])
        loop.Engine(loop.Interaction(envs, agent)).run(4 * steps)
        critics = agent.state.learner.params.critics
        zeros = np.zeros(4, np.float32)
        best, _ = agent.exploit(None, Timestep(obs, zeros, zeros, zeros, zeros))
        q = lambda action: np.asarray(
            q_values(critics, obs, jnp.full((4, 1), action, jnp.float32))
        ).reshape(2, 2, 2)
        return q, best[:2, 0]

    return learn


def most_entropy():
    """Returns the entropy of the most random of squashed Gaussians, in nats."""
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    sigma = np.linspace(0.5, 1.5, 2001)[:, None]
    u = sigma * x
    log_slope = 2 * (np.log(2) - np.logaddexp(u, -u))  # of the squashing
    of_normal = 0.5 * np.log(2 * np.pi * np.e * sigma[:, 0] ** 2)
    return np.max(of_normal + log_slope @ weight / weight.sum())


def test_the_most_random_policy_is_almost_uniform():
    assert np.log(2) - 0.01 < most_entropy() < np.log(2)


def test_a_constant_reward_is_the_value(learned):
    q, _ = learned(probes.constant_reward, temperature=0.5)
    for action in [-0.7, 0.0, 0.7]:
        np.testing.assert_allclose(q(action)[:, 0], 1.0, atol=0.05)


def test_a_reward_told_by_the_observation_is_the_value(learned):
    q, _ = learned(probes.reward_by_observation, temperature=0.5)
    for action in [-0.7, 0.0, 0.7]:
        np.testing.assert_allclose(q(action)[:, 0], [SIGNS] * 2, atol=0.05)


def test_a_reward_one_step_later_is_discounted_once_with_the_entropy_there(learned):
    q, _ = learned(probes.delayed_reward, temperature=0.5)
    value = GAMMA * (1 + 0.5 * most_entropy())
    for action in [-0.7, 0.0, 0.7]:
        np.testing.assert_allclose(q(action)[:, 1], 1.0, atol=0.05)
        np.testing.assert_allclose(q(action)[:, 0], value, atol=0.05)


def test_at_a_low_temperature_the_best_action_is_found_and_valued(learned):
    q, best = learned(probes.reward_by_action, temperature=0.01)
    np.testing.assert_allclose(best, SIGNS / 2, atol=0.05)
    for i, action in enumerate(SIGNS / 2):
        np.testing.assert_allclose(q(action)[:, 0, i], 1.0, atol=0.05)


def test_a_stream_cut_short_is_worth_all_of_it_with_the_entropy_on_the_way(learned):
    q, _ = learned(probes.cut_short, temperature=0.5)
    # v = q + temperature * entropy and q = 1 + γ v
    value = (1 + GAMMA * 0.5 * most_entropy()) / (1 - GAMMA)
    for action in [-0.7, 0.0, 0.7]:
        np.testing.assert_allclose(q(action)[:, 0], value, atol=0.05)


# --- The losses ---------------------------------------------------------------------

LOSSES = {  # and what they teach
    "critic_loss": "critics",
    "policy_loss": "policy",
    "temperature_loss": "log_temperature",
}


def perceptron(params, x):
    """A network of three layers, read in double precision."""
    for i in range(3):
        layer = params["params"][f"Dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if i < 2 else x
    return x


def draw(params, obs, noise):
    """Draws from the policy: actions, and their log-probabilities."""
    mu, log_sigma = np.split(perceptron(params, obs), 2, axis=-1)
    action = np.tanh(mu + np.exp(log_sigma) * noise)
    log_normal = -0.5 * noise**2 - log_sigma - 0.5 * np.log(2 * np.pi)
    return action, np.sum(log_normal - np.log(1 - action**2), axis=-1)


def q_values(critics, obs, action):
    x = np.concatenate([obs, action], -1)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], critics) for i in range(2)]
    return np.stack([perceptron(one, x)[:, 0] for one in each])


def equations(params, fixed, target_critics, batch, noise):
    """The losses of the paper; each part sees the others as they are in `fixed`."""
    alpha = np.exp(fixed.log_temperature)
    a_t, log_prob_t = draw(fixed.policy, batch.obs_t, noise[1])
    v_t = q_values(target_critics, batch.obs_t, a_t).min(0) - alpha * log_prob_t
    target = batch.r_t + batch.discount_t * v_t
    q = q_values(params.critics, batch.obs_tm1, batch.a_tm1)
    a_tm1, log_prob_tm1 = draw(params.policy, batch.obs_tm1, noise[0])
    q_new = q_values(fixed.critics, batch.obs_tm1, a_tm1).min(0)
    log_prob_fixed = draw(fixed.policy, batch.obs_tm1, noise[0])[1]
    return {
        "critic_loss": np.mean(0.5 * (target - q) ** 2, axis=1).sum(),
        "policy_loss": np.mean(alpha * log_prob_tm1 - q_new),
        "temperature_loss": np.mean(
            -np.exp(params.log_temperature) * (log_prob_fixed - 1.0)
        ),
    }


@pytest.fixture(scope="module")
def read(agent):
    """Losses and gradients by the agent, and what the equations say of them."""
    rng, state, key = np.random.default_rng(0), agent.init(), jax.random.key(7)
    shaken = lambda tree: jax.tree.map(
        lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), tree
    )
    params, target = shaken(state.learner.params), shaken(state.learner.target_critics)
    normal = lambda *shape: np.float32(rng.normal(size=shape))
    discount_t = np.float32([0.5, 0.0, 0.5, 0.9, 0.0, 0.5, 1.0, 0.5])
    batch = Transition(
        normal(8, 3), np.tanh(normal(8, 1)), normal(8), discount_t, normal(8, 3)
    )

    @jax.jit
    def learn_from(params, key):
        def losses(params):
            seen = agent.rules.loss(params, target, batch, key)[1]
            losses = {name: seen[name] for name in LOSSES}
            return losses, losses

        unit = rlprims.tanh_gaussian_sample_and_log_prob
        mu = jnp.zeros((8, 1))
        noise = [unit(k, mu, 1.0).pre_tanh for k in jax.random.split(key)]
        return *jax.jacrev(losses, has_aux=True)(params), noise

    with jax.numpy_dtype_promotion("strict"):
        slopes, losses, noise = learn_from(params, key)
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    params64 = wide(params)
    given = wide((target, batch, noise))
    said = lambda moved: equations(moved, params64, *given)
    return params64, losses, wide(slopes), said


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_what_its_equation_says(read, name):
    params, losses, _, said = read
    np.testing.assert_allclose(losses[name], said(params)[name], rtol=1e-5)


@pytest.mark.parametrize(("name", "part"), LOSSES.items())
def test_the_gradient_of_each_loss_is_the_slope_of_its_equation(read, name, part):
    params, _, slopes, said = read
    rng, slope = np.random.default_rng(1), getattr(slopes[name], part)
    for _ in range(3):
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), getattr(params, part))
        moved = lambda h, way=way: said(
            params._replace(
                **{
                    part: jax.tree.map(
                        lambda x, d: x + h * d, getattr(params, part), way
                    )
                }
            )
        )[name]
        along = sum(map(np.vdot, jax.tree.leaves(slope), jax.tree.leaves(way)))
        np.testing.assert_allclose(
            along, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-4
        )


@pytest.mark.parametrize(("name", "part"), LOSSES.items())
def test_no_gradient_of_a_loss_reaches_another_part(read, name, part):
    _, _, slopes, _ = read
    for other, slope in slopes[name]._asdict().items():
        reached = any(np.any(x != 0) for x in jax.tree.leaves(slope))
        assert reached == (other == part)


def test_the_policy_should_have_an_entropy_of_minus_one_nat_a_component():
    spec = specs.BoundedArray((3,), np.float32, -5.0, 5.0)
    rules = sac.SAC(sac.Config(), specs.Array((2,), np.float32), spec)
    assert rules.target_entropy == -3.0


def test_any_pure_functions_serve_as_networks():
    linear = sac.PolicyAndCritic(
        init_policy=lambda key, obs: jnp.ones(2),
        policy=lambda w, obs: (w[:1] * obs, jnp.exp(w[1:])),
        init_critic=lambda key, obs, action: jnp.float32(3.0),
        critic=lambda w, obs, action: w * obs[0] + action[0],
    )
    spec = specs.BoundedArray((1,), np.float32, -1.0, 1.0)
    rules = sac.SAC(sac.Config(), specs.Array((1,), np.float32), spec, linear)
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
    assert all(map(np.array_equal, *map(jax.tree.leaves, (before[0].learner, start))))
    assert np.all(np.isnan([*before[3].values()]))
    assert np.all(np.isfinite([*first[3].values()]))
    changed = jax.tree.map(np.array_equal, first[0].learner.params, start.params)
    assert not any(jax.tree.leaves(changed._replace(log_temperature=False)))


def test_target_critics_are_exponential_averages_of_the_critics(history):
    expected = history[0][0].learner.params.critics
    for state, *_ in history[RANDOM:]:
        now = state.learner.params.critics
        expected = jax.tree.map(lambda e, x: (1 - RATE) * e + RATE * x, expected, now)
        same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        jax.tree.map(same, state.learner.target_critics, expected)


def test_the_two_critics_and_their_first_actions_differ(history):
    state, *_ = history[0]
    kernel = state.learner.params.critics["params"]["Dense_0"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert len({float(action[0]) for action in history[0][2]}) == 4


def test_it_explores_all_actions_alike_and_then_draws_from_its_policy(agent):
    rules, obs = agent.rules, jnp.zeros((2000, 3))
    params = agent.init().learner.params.policy
    explore = jax.jit(rules.explore)
    uniform = explore(params, obs, jnp.int32(RANDOM - 1))
    drawn = explore(params, obs, jnp.int32(RANDOM))
    np.testing.assert_allclose(np.std(uniform), 1 / np.sqrt(3), rtol=0.03)
    mu, sigma = (np.asarray(x[0, 0]) for x in jax.jit(rules.policy)(params, obs))
    u = np.arctanh(np.asarray(drawn, np.float64).clip(-1 + 1e-7, 1 - 1e-7))
    np.testing.assert_allclose(np.median(u), mu, atol=0.1)
    assert np.mean(np.abs(u - mu) < sigma) == pytest.approx(0.683, abs=0.03)


def test_to_exploit_is_to_squash_the_mean(agent, history):
    timestep = history[-1][1]
    actions, _ = agent.exploit(None, timestep)
    params = jax.tree.map(np.float64, agent.state.learner.params.policy)
    mu = perceptron(params, timestep.observation)[:, :1]
    np.testing.assert_allclose(actions, np.tanh(mu), rtol=1e-5, atol=1e-6)


# --- Bounds -------------------------------------------------------------------------


def test_actions_are_brought_to_the_bounds_and_the_shape_of_the_environment():
    low, high = np.array([[0.0], [-3.0]]), np.array([[10.0], [-1.0]])
    bounds = Bounds(specs.BoundedArray((2, 1), np.float32, low, high))
    actions = bounds.rescale(jnp.array([[-1.0, -1.0], [0.0, 0.5], [1.0, 1.0]]))
    expected = [[[0.0], [-3.0]], [[5.0], [-1.5]], [[10.0], [-1.0]]]
    assert bounds.size == 2
    np.testing.assert_allclose(actions, expected)


def test_one_bound_for_all_components_and_actions_that_are_numbers_are_fine():
    bounds = Bounds(specs.BoundedArray((), np.float64, -2.0, 2.0))
    np.testing.assert_allclose(bounds.rescale(jnp.array([[0.5], [1.0]])), [1.0, 2.0])


@pytest.mark.parametrize(
    "spec",
    [
        specs.DiscreteArray(2),
        specs.Array((1,), np.float32),
        specs.BoundedArray((1,), np.float32, -np.inf, 1.0),
        specs.BoundedArray((2,), np.float32, [0.0, 1.0], 1.0),
    ],
    ids=["discrete", "unbounded", "infinite", "no room"],
)
def test_actions_without_bounds_of_their_own_are_refused(spec):
    with pytest.raises(ValueError, match=r"actions .* got \w*Array"):
        sac.SAC(sac.Config(), specs.Array((2,), np.float32), spec)

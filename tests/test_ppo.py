"""PPO, on probes whose values are known, and against a plain reading of the paper."""

import itertools

import jax
import jax.numpy as jnp
import loop
import numpy as np
import policies
import ppo
import probes
import pytest
from dm_env import specs

SIGNS = (-1.0, 1.0)
FLAGS = {
    "discount": 0.5,
    "hidden": 16,
    "environments": 16,
    "rollout_length": 8,
    "minibatches": 2,
    "epochs": 4,
    "learning_rate": 2e-2,
    "steps": 3000,
}
SCALED = {"normalize_observations": True, "reward_scale": 0.25}


pytestmark = pytest.mark.usefixtures("promotion_for_optax")


def make_rules(env, **flags):
    config = ppo.Config(**flags)
    return ppo.PPO(config, env.observation_spec(), env.action_spec())


class Trained:
    """One compiled agent, which learns one probe after the other."""

    def __init__(self, continuous, **flags):
        self.continuous = continuous
        self.rules = make_rules(
            probes.constant_reward(continuous=continuous), **FLAGS, **flags
        )
        self.agent = loop.Agent(self.rules)
        self.apply = jax.jit(self.rules.apply)
        self.start = jax.tree.map(np.array, self.agent.state)

    def engine(self, probe):
        self.agent.state = jax.tree.map(jnp.array, self.start)
        envs = [
            probe(seed=seed, continuous=self.continuous)
            for seed in range(FLAGS["environments"])
        ]
        return loop.Engine(loop.Interaction(loop.Environments(envs), self.agent))

    def learn(self, probe):
        """Returns values and outputs of the policy, `[time][sign]`."""
        self.engine(probe).run(FLAGS["steps"])
        seen = np.array([[t, sign, 0] for t in (0, 1) for sign in SIGNS], np.float32)
        state = self.agent.state
        outputs, values = self.apply(
            state.learner.params, self.rules.normalized(state.statistics, seen)
        )
        scale = self.rules.config.reward_scale
        return values.reshape(2, 2) / scale, outputs.reshape(2, 2, -1)


@pytest.fixture(scope="module")
def discrete():
    return Trained(continuous=False)


@pytest.fixture(scope="module")
def continuous():
    return Trained(continuous=True, **SCALED)


# --- Probes -------------------------------------------------------------------------


WITHOUT_ACTIONS = [
    probes.constant_reward,
    probes.reward_by_observation,
    probes.delayed_reward,
    probes.cut_short,
]


def check_values(trained, probe):
    values, _ = trained.learn(probe)
    for time, exact in enumerate(probe().action_values(FLAGS["discount"]).max(-1)):
        np.testing.assert_allclose(values[time], exact, atol=0.05)


@pytest.mark.parametrize("probe", WITHOUT_ACTIONS, ids=lambda p: p.__name__)
def test_values_are_exact_where_actions_have_no_effect(discrete, probe):
    check_values(discrete, probe)


@pytest.mark.parametrize("probe", WITHOUT_ACTIONS, ids=lambda p: p.__name__)
def test_they_are_with_continuous_actions_and_everything_scaled(continuous, probe):
    check_values(continuous, probe)


def test_the_action_that_is_rewarded_becomes_likely_and_its_reward_the_value(discrete):
    values, outputs = discrete.learn(probes.reward_by_action)
    chances = jax.nn.softmax(outputs[0])
    assert chances[0, 0] > 0.9
    assert chances[1, 1] > 0.9
    np.testing.assert_allclose(values[0], 1.0, atol=0.05)


def test_a_continuous_action_goes_where_the_reward_is_greatest(continuous):
    values, outputs = continuous.learn(probes.reward_by_action)
    mu, sigma = continuous.rules.policy.parameters(outputs[0])
    np.testing.assert_allclose(mu[:, 0], [-0.5, 0.5], atol=0.05)
    np.testing.assert_allclose(values[0], 1 - sigma[:, 0] ** 2, atol=0.05)


# --- What the agent keeps -----------------------------------------------------------


def walk(trained, probe, count):
    """Returns timesteps, actions sent, and the states after them."""
    engine, seen = trained.engine(probe), []
    for _ in range(count):
        event = next(engine.events)
        state = jax.tree.map(np.array, trained.agent.state)
        seen.append((event.timestep, engine.events.actions, event.metrics, state))
    return list(zip(*seen, strict=True))


def test_a_row_holds_what_the_network_saw_and_did_and_what_came_of_it(continuous):
    rules, count = continuous.rules, FLAGS["rollout_length"] - 1
    for probe in (probes.delayed_reward, probes.cut_short):
        timesteps, actions, _, states = walk(continuous, probe, count)
        rows = states[-1].rows
        params, policy = states[0].learner.params, rules.policy
        for t, (before, now) in enumerate(itertools.pairwise(timesteps)):
            row = jax.tree.map(lambda x, t=t: x[t + 1], rows)
            normalized = rules.normalized(states[t].statistics, before.observation)
            np.testing.assert_allclose(row.obs_tm1, normalized, rtol=1e-5, atol=1e-5)
            outputs, values = continuous.apply(params, row.obs_tm1)
            np.testing.assert_allclose(row.v_tm1, values, rtol=1e-5)
            log_prob = policy.log_prob(row.a_tm1, outputs)
            np.testing.assert_allclose(row.log_prob_tm1, log_prob, rtol=1e-5)
            sent = np.clip(row.a_tm1, -1, 1)
            np.testing.assert_allclose(sent, actions[t], rtol=1e-5)
            np.testing.assert_array_equal(row.r_t, 0.25 * now.r_t)
            np.testing.assert_array_equal(row.discount_t, 0.5 * now.discount_t)
            np.testing.assert_array_equal(row.mask_t, ~now.first)
            cut = now.last if probe is probes.cut_short else np.zeros_like(now.last)
            np.testing.assert_array_equal(row.truncation_t, cut)


def test_observations_are_normalized_by_mean_and_deviation_of_all_that_were_seen(
    continuous,
):
    timesteps, *_, states = walk(continuous, probes.delayed_reward, 20)
    seen = np.concatenate([t.observation for t in timesteps]).astype(np.float64)
    state, newest = states[-1], timesteps[-1].observation
    np.testing.assert_allclose(state.statistics.mean, seen.mean(0), atol=1e-6)
    np.testing.assert_allclose(state.statistics.variance, seen.var(0), atol=1e-6)
    expected = (newest - seen.mean(0))[:, :2] / seen.std(0)[:2]  # the flag is always 0
    np.testing.assert_allclose(state.before.obs_tm1[:, :2], expected, rtol=1e-4)
    np.testing.assert_array_equal(state.before.obs_tm1[:, 2], 0)


def test_it_learns_when_a_rollout_is_full_and_says_so_then_alone(discrete):
    *_, metrics, states = walk(discrete, probes.constant_reward, 16)
    changed = [
        not np.array_equal(*(jax.tree.leaves(s.learner.params)[0] for s in pair))
        for pair in itertools.pairwise(states)
    ]
    assert [i + 1 for i, new in enumerate(changed) if new] == [7, 15]
    assert [i for i, m in enumerate(metrics) if np.isfinite(m["loss"])] == [7, 15]
    assert len({tuple(m) for m in metrics}) == 1


def test_the_step_size_has_decayed_to_zero_when_the_run_ends(discrete):
    engine = discrete.engine(probes.constant_reward)
    engine.run(FLAGS["steps"] + 200)  # to the end of a rollout
    params = jax.tree.map(np.array, discrete.agent.state.learner.params)
    engine.run(FLAGS["steps"] + 1000)
    after = discrete.agent.state.learner.params
    jax.tree.map(np.testing.assert_array_equal, params, after)
    assert discrete.rules.rate(FLAGS["steps"] // 2) == pytest.approx(1e-2)


# --- What it learns from ------------------------------------------------------------


def rollout(rng, shape=(8, 16)):
    """Rows in which episodes end both ways, and begin."""
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    mask = rng.random(shape) < 0.8
    return ppo.Row(
        normal(*shape, 3),
        rng.integers(2, size=shape),
        -np.abs(normal(*shape)),
        normal(*shape),
        normal(*shape),
        rng.choice([0, 0.5], shape).astype(np.float32),
        mask & (rng.random(shape) < 0.3),
        mask,
    )


def value(params, x):
    """The value, by the layers of the network, in double precision."""
    for i in (3, 4, 5):
        layer = params["params"][f"Dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = x if i == 5 else np.tanh(x)
    return x[..., 0]


def logits(params, x):
    for i in (0, 1, 2):
        layer = params["params"][f"Dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = x if i == 2 else np.tanh(x)
    return x


def random_params(rng, rules):
    shapes = jax.eval_shape(rules.init).learner.params
    return jax.tree.map(
        lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), shapes
    )


def test_advantages_look_as_far_as_the_episode_goes(discrete, rng):
    rules = discrete.rules
    params, rows = random_params(rng, rules), rollout(rng)
    last = rng.normal(size=(16, 3)).astype(np.float32)
    batch = jax.jit(rules.batch)(params, rows, last)
    v_t = np.concatenate([rows.v_tm1[1:], value(params, last)[None]])
    expected = np.zeros((8, 16))
    for b in range(16):
        steps = [t for t in range(8) if rows.mask_t[t, b]]
        for i, t in enumerate(steps):
            weight = 1.0
            for k in steps[i:]:
                error = rows.r_t[k, b] + rows.discount_t[k, b] * v_t[k, b]
                expected[t, b] += weight * (error - rows.v_tm1[k, b])
                weight *= 0.95 * rows.discount_t[k, b]
                if rows.truncation_t[k, b]:
                    break
    expected = np.where(rows.mask_t, expected, 0).ravel()
    np.testing.assert_allclose(batch.adv_t, expected, rtol=1e-4, atol=1e-5)
    counted = rows.mask_t.ravel()
    targets = (expected + rows.v_tm1.ravel())[counted]
    np.testing.assert_allclose(batch.return_t[counted], targets, rtol=1e-4, atol=1e-5)
    for name in ("obs_tm1", "a_tm1", "log_prob_tm1", "v_tm1", "mask_t"):
        flat = np.concatenate(getattr(rows, name))
        np.testing.assert_array_equal(getattr(batch, name), flat)


def test_minibatches_share_out_the_steps_that_count(discrete, rng):
    mask = rng.random(128) < 0.5
    dealt = [np.asarray(discrete.rules.deal(jax.random.key(i), mask)) for i in (0, 1)]
    for hands in dealt:
        assert sorted(hands.ravel()) == list(range(128))
        first, second = mask[hands].sum(1)
        assert first - second in {0, 1}
    assert not np.array_equal(*dealt)


def make_batch(rng, rules, size=64):
    """Steps of which half count."""
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    continuous = isinstance(rules.policy, policies.Gaussian)
    return ppo.Batch(
        normal(size, 3),
        normal(size, 1) if continuous else rng.integers(2, size=size),
        -np.abs(normal(size)),
        normal(size),
        normal(size),
        normal(size),
        rng.permutation(size) < size // 2,
    )


CASES = {
    "discrete, in full": (
        False,
        {"value_clip": 0.3, "value_weight": 0.7, "entropy_weight": 0.1},
    ),
    "continuous, plain": (True, {"standardize": False}),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request):
    """Rules, and the gradient of their loss, compiled."""
    continuous, flags = request.param
    env = probes.constant_reward(continuous=continuous)
    rules = make_rules(env, hidden=8, epsilon=0.3, **flags)
    return rules, jax.jit(jax.value_and_grad(rules.loss, has_aux=True))


def by_hand(rules, params, batch):
    """The loss of Schulman et al. 2017, in double precision, and the entropy."""
    config, counted = rules.config, batch.mask_t
    x = np.float64(batch.obs_tm1)
    if isinstance(rules.policy, policies.Categorical):
        exps = np.exp(logits(params, x))
        probs = exps / exps.sum(-1, keepdims=True)
        log_prob = np.log(probs[np.arange(len(x)), batch.a_tm1])
        entropy = -(probs * np.log(probs)).sum(-1)
    else:
        log_sigma = params["params"]["log_sigma"]
        noise = (batch.a_tm1 - logits(params, x)) / np.exp(log_sigma)
        log_prob = (-(noise**2) / 2 - log_sigma - np.log(2 * np.pi) / 2).sum(-1)
        entropy = np.full(len(x), np.sum(log_sigma + np.log(2 * np.pi * np.e) / 2))
    adv = np.float64(batch.adv_t)
    if config.standardize:
        adv = (adv - adv[counted].mean()) / adv[counted].std()
    ratio = np.exp(log_prob - batch.log_prob_tm1)
    clipped = np.clip(ratio, 1 - config.epsilon, 1 + config.epsilon)
    gain = np.minimum(ratio * adv, clipped * adv)
    v, old, target = value(params, x), batch.v_tm1, batch.return_t
    move = np.clip(v - old, -config.value_clip, config.value_clip)
    error = np.maximum((v - target) ** 2, (old + move - target) ** 2) / 2
    each = -gain + config.value_weight * error - config.entropy_weight * entropy
    return each[counted].mean(), entropy[counted].mean()


def test_the_loss_and_its_gradient_are_those_of_the_paper(case, rng):
    rules, slope = case
    params, batch = random_params(rng, rules), make_batch(rng, rules)
    (loss, metrics), gradient = slope(params, batch)
    exact = jax.tree.map(np.float64, params)
    expected, entropy = by_hand(rules, exact, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], loss)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    up, down = (
        by_hand(
            rules, jax.tree.map(lambda x, d, s=s: x + s * d, exact, direction), batch
        )[0]
        for s in (1e-6, -1e-6)
    )
    products = jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)
    np.testing.assert_allclose(
        sum(jax.tree.leaves(products)), (up - down) / 2e-6, rtol=1e-3
    )


def test_a_masked_step_counts_for_nothing(case, rng):
    rules, slope = case
    params, batch = random_params(rng, rules), make_batch(rng, rules)
    # The others twice: the program is the same, and so is a mean.
    without = jax.tree.map(lambda x: np.tile(x[batch.mask_t].T, 2).T, batch)
    assert without.mask_t.all()
    for one, other in zip(
        jax.tree.leaves(slope(params, batch)),
        jax.tree.leaves(slope(params, without)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# --- Actions and flags --------------------------------------------------------------


def test_actions_are_scaled_to_the_bounds_and_clipped_there():
    low, high = np.float32([[0], [-2]]), np.float32([[10], [2]])
    policy = policies.policy_for(specs.BoundedArray((2, 1), np.float32, low, high))
    actions = jnp.array([[0.0, 0.5], [-3.0, 3.0]])
    sent = policy.for_environment(actions)
    np.testing.assert_array_equal(sent, [[[5.0], [1.0]], [[0.0], [2.0]]])


def test_to_exploit_is_to_take_the_likeliest_action(discrete, continuous):
    for trained in (discrete, continuous):
        (timestep,), *_, (state,) = walk(trained, probes.reward_by_observation, 1)
        seen = trained.rules.normalized(state.statistics, timestep.observation)
        outputs, _ = trained.apply(state.learner.params, seen)
        best = np.clip(outputs[:, :1], -1, 1)
        if not trained.continuous:
            best = outputs.argmax(-1)
        np.testing.assert_allclose(
            trained.agent.exploit(None, timestep)[0], best, rtol=1e-3
        )


@pytest.mark.parametrize(
    "spec",
    [
        specs.Array((2,), np.float32),
        specs.BoundedArray((2,), np.int32, 0, 5),
        specs.BoundedArray((2,), np.float32, 0, np.inf),
    ],
    ids=["no bounds", "integers", "infinite"],
)
def test_actions_of_another_kind_are_refused(spec):
    with pytest.raises(ValueError, match="actions must"):
        policies.policy_for(spec)


def test_a_rollout_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ValueError, match=r"minibatches must divide .* 12, got 5"):
        ppo.Config(environments=4, rollout_length=3, minibatches=5)

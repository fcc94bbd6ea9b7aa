"""The V-MPO agent, on probes whose values are known, and against a plain reading."""

import jax
import jax.numpy as jnp
import loop
import numpy as np
import probes
import pytest
import vmpo

SIGNS = (-1.0, 1.0)
FLAGS = {
    "discount": 0.5,
    "hidden": 16,
    "environments": 16,
    "rollout_length": 8,
    "updates": 8,
    "learning_rate": 1e-2,
    "temperature_limit": 0.5,
    "kl_limit": 0.1,
}
STEPS = 3000


pytestmark = pytest.mark.usefixtures("promotion_for_optax")


def make_rules(env, **flags):
    config = vmpo.Config(**flags)
    return vmpo.VMPO(config, env.observation_spec(), env.action_spec())


class Trained:
    """One compiled agent, which learns one probe after the other."""

    def __init__(self):
        self.rules = make_rules(probes.constant_reward(), **FLAGS)
        self.agent = loop.Agent(self.rules)
        self.apply = jax.jit(self.rules.apply)
        self.start = jax.tree.map(np.array, self.agent.state)

    def engine(self, probe):
        self.agent.state = jax.tree.map(jnp.array, self.start)
        envs = [probe(seed=seed) for seed in range(FLAGS["environments"])]
        return loop.Engine(loop.Interaction(loop.Environments(envs), self.agent))

    def learn(self, probe):
        """Returns values, `[time][sign]`, and chances, `[time][sign][action]`."""
        self.engine(probe).run(STEPS)
        seen = np.array([[t, sign, 0] for t in (0, 1) for sign in SIGNS], np.float32)
        params = self.agent.state.learner.params.network
        logits, values = self.apply(params, seen)
        return values.reshape(2, 2), jax.nn.softmax(logits).reshape(2, 2, 2)


@pytest.fixture(scope="module")
def trained():
    return Trained()


# --- Probes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "probe",
    [
        probes.constant_reward,
        probes.reward_by_observation,
        probes.delayed_reward,
        probes.cut_short,
    ],
    ids=lambda p: p.__name__,
)
def test_values_are_exact_where_actions_have_no_effect(trained, probe):
    values, _ = trained.learn(probe)
    for time, exact in enumerate(probe().action_values(FLAGS["discount"]).max(-1)):
        np.testing.assert_allclose(values[time], exact, atol=0.05)


def test_the_action_that_is_rewarded_becomes_likely_and_its_reward_the_value(trained):
    values, chances = trained.learn(probes.reward_by_action)
    assert chances[0, 0, 0] > 0.9
    assert chances[0, 1, 1] > 0.9
    np.testing.assert_allclose(values[0], 1.0, atol=0.05)


# --- What the agent keeps -----------------------------------------------------------


def walk(trained, probe, count):
    """Returns timesteps, actions sent, metrics, and the states after them."""
    engine, seen = trained.engine(probe), []
    for _ in range(count):
        event = next(engine.events)
        state = jax.tree.map(np.array, trained.agent.state)
        seen.append((event.timestep, engine.events.actions, event.metrics, state))
    return list(zip(*seen, strict=True))


@pytest.mark.parametrize(
    "probe", [probes.delayed_reward, probes.cut_short], ids=lambda p: p.__name__
)
def test_a_row_holds_what_was_seen_and_done_and_what_came_of_it(trained, probe):
    timesteps, actions, _, states = walk(trained, probe, FLAGS["rollout_length"] - 1)
    for t in range(len(timesteps) - 1):
        before, now = timesteps[t], timesteps[t + 1]
        row = jax.tree.map(lambda x, t=t: x[t + 1], states[-1].rows)
        params = states[0].learner.params.network
        logits, _ = trained.apply(params, before.observation)
        np.testing.assert_allclose(row.logits_tm1, logits, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(row.obs_tm1, before.observation)
        np.testing.assert_array_equal(row.a_tm1, actions[t])
        np.testing.assert_array_equal(row.r_t, now.r_t)
        np.testing.assert_array_equal(row.discount_t, 0.5 * now.discount_t)
        np.testing.assert_array_equal(row.mask_t, ~now.first)
        cut = now.last if probe is probes.cut_short else np.zeros_like(now.last)
        np.testing.assert_array_equal(row.truncation_t, cut)


def test_it_learns_when_a_rollout_is_full_and_says_so_then_alone(trained):
    *_, metrics, states = walk(trained, probes.constant_reward, 17)
    kernels = [jax.tree.leaves(s.learner.params.network)[1] for s in states]
    changed = [t for t in range(1, 17) if np.any(kernels[t] != kernels[t - 1])]
    assert changed == [7, 15]
    assert [t for t, m in enumerate(metrics) if np.isfinite(m["loss"])] == [7, 15]
    assert len({tuple(m) for m in metrics}) == 1


def test_the_multipliers_start_where_they_are_told_to(trained):
    params = trained.start.learner.params
    assert jax.nn.softplus(params.temperature) == pytest.approx(1.0, rel=1e-5)
    assert jax.nn.softplus(params.kl_price) == pytest.approx(5.0, rel=1e-5)
    for x in (1e-3, 1.0, 100.0):
        assert jax.nn.softplus(vmpo._softplus_inverse(x)) == pytest.approx(x, rel=1e-5)


def test_to_exploit_is_to_take_the_likeliest_action(trained):
    (timestep,), *_, (state,) = walk(trained, probes.reward_by_observation, 1)
    logits, _ = trained.apply(state.learner.params.network, timestep.observation)
    actions, _ = trained.agent.exploit(None, timestep)
    np.testing.assert_array_equal(actions, logits.argmax(-1))


def test_continuous_actions_are_refused():
    with pytest.raises(ValueError, match="this agent needs discrete actions"):
        make_rules(probes.constant_reward(continuous=True))


# --- The loss -----------------------------------------------------------------------


def make_rows(rng, shape=(6, 4)):
    """A rollout in which episodes begin and end both ways, and what follows it."""
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    mask = rng.random(shape) < 0.8
    rows = vmpo.Row(
        normal(*shape, 3),
        rng.integers(2, size=shape),
        normal(*shape, 2),
        normal(*shape),
        rng.choice([0, 0.5], shape).astype(np.float32),
        mask & (rng.random(shape) < 0.3),
        mask,
    )
    return rows, normal(shape[1], 3)


def random_params(rng, rules):
    shapes = jax.eval_shape(rules.init).learner.params
    return jax.tree.map(lambda x: np.float32(0.5 * rng.normal(size=x.shape)), shapes)


def network(params, x):
    """Logits and values, by the layers of the network."""
    outputs = []
    for layers in ((0, 1, 2), (3, 4, 5)):
        y = x
        for i in layers:
            layer = params["params"][f"Dense_{i}"]
            y = y @ layer["kernel"] + layer["bias"]
            y = y if i == layers[-1] else np.tanh(y)
        outputs.append(y)
    return outputs[0], outputs[1][..., 0]


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand(config, p, h, rows, last):
    """The loss of Song et al. 2019: `p` is what is learned, `h` is held constant."""
    seen = np.concatenate([rows.obs_tm1, last[None]]).astype(np.float64)
    logits, v = network(p.network, seen)
    held_logits, held = network(h.network, seen)
    log_pi, held_log_pi = log_softmax(logits[:-1]), log_softmax(held_logits[:-1])
    old = log_softmax(np.float64(rows.logits_tm1))
    softplus = lambda x: np.log1p(np.exp(np.float64(x)))
    steps = []  # of each that counts: advantage, error, log-probability, divergences
    for b in range(last.shape[0]):
        counted = [t for t in range(len(rows.r_t)) if rows.mask_t[t, b]]
        target = None
        for t in reversed(counted):
            after = held[t + 1, b]
            if not (target is None or rows.truncation_t[t, b]):
                after = (1 - config.gae_lambda) * after + config.gae_lambda * target
            target = rows.r_t[t, b] + rows.discount_t[t, b] * after
            kl = lambda new, t=t, b=b: np.exp(old[t, b]) @ (old[t, b] - new[t, b])
            log_prob = log_pi[t, b, rows.a_tm1[t, b]]
            adv, error = target - held[t, b], target - v[t, b]
            steps.append((adv, error, log_prob, kl(log_pi), kl(held_log_pi)))
    best = sorted(steps, reverse=True)[: int(config.top_fraction * len(steps))]
    advantages = np.array([step[0] for step in best])
    eta, held_eta = softplus(p.temperature), softplus(h.temperature)
    weights = np.exp(advantages / held_eta)
    policy_loss = -weights / weights.sum() @ [step[2] for step in best]
    temperature_loss = eta * config.temperature_limit
    temperature_loss += eta * np.log(np.mean(np.exp(advantages / eta)))
    _, errors, _, kl, held_kl = np.mean(np.array(steps) ** [1, 2, 1, 1, 1], axis=0)
    price, held_price = softplus(p.kl_price), softplus(h.kl_price)
    kl_loss = held_price * kl + price * (config.kl_limit - held_kl)
    value_loss = config.value_weight * errors / 2
    return policy_loss + temperature_loss + kl_loss + value_loss


@pytest.fixture(scope="module")
def slope(trained):
    return jax.jit(jax.value_and_grad(trained.rules.loss, has_aux=True))


def test_the_loss_and_its_gradient_are_those_of_the_paper(trained, slope, rng):
    config = trained.rules.config
    params, (rows, last) = random_params(rng, trained.rules), make_rows(rng)
    (loss, _), gradients = slope(params, rows, last)
    exact = jax.tree.map(np.float64, params)
    np.testing.assert_allclose(
        loss, by_hand(config, exact, exact, rows, last), rtol=1e-4
    )
    for part in vmpo.Params._fields:
        direction = jax.tree.map(lambda x: np.zeros(x.shape), params)
        moved = jax.tree.map(lambda x: rng.normal(size=x.shape), getattr(params, part))
        direction = direction._replace(**{part: moved})
        up, down = (
            by_hand(
                config,
                jax.tree.map(lambda x, d, s=s: x + s * d, exact, direction),
                exact,
                rows,
                last,
            )
            for s in (1e-5, -1e-5)
        )
        products = jax.tree.map(lambda g, d: np.sum(g * d), gradients, direction)
        expected = (up - down) / 2e-5
        total = sum(jax.tree.leaves(products))
        np.testing.assert_allclose(total, expected, rtol=1e-3, err_msg=part)


def test_it_does_not_matter_where_a_masked_step_is_nor_what_it_holds(
    trained, slope, rng
):
    params, (rows, last) = random_params(rng, trained.rules), make_rows(rng)
    ends = np.arange(6)[:, None] == 1  # in all environments, before the masked row
    rows = rows._replace(
        mask_t=np.arange(6)[:, None] != np.full(4, 2),
        discount_t=np.where(ends, 0, rows.discount_t).astype(np.float32),
        truncation_t=rows.truncation_t & ~ends & ~np.roll(ends, 1),
    )
    moved = jax.tree.map(lambda x: x[[2, 0, 1, 3, 4, 5]], rows)
    for x in (moved.r_t, moved.discount_t, moved.logits_tm1):
        x[0] = rng.normal(size=x[0].shape)
    for one, other in zip(
        jax.tree.leaves(slope(params, rows, last)),
        jax.tree.leaves(slope(params, moved, last)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)

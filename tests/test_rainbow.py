import itertools

import jax
import jax.numpy as jnp
import loop
import numpy as np
import probes
import pytest
import rainbow
from dm_env import specs
from n_step import NStep
from prioritized import Drawn, PrioritizedReplay

FLAGS = "double", "duelling", "noisy", "prioritized", "distributional"
ALL_OFF = dict.fromkeys(FLAGS, False) | {"n_steps": 1}


pytestmark = pytest.mark.usefixtures("promotion_for_optax")


def make_rules(network=None, **flags):
    return rainbow.Rainbow(
        rainbow.Config(**flags),
        specs.Array((4,), np.float32),
        specs.DiscreteArray(3),
        network,
    )


# --- Probes: environments whose values are known ------------------------------------


class Wanderer(rainbow.Rainbow):
    """Learns as it should, from actions at random, so that it tries them all."""

    def explore(self, params, observations, steps):
        key = jax.random.fold_in(self.key_explore, steps)
        return jax.random.randint(key, observations.shape[:1], 0, 2)


def make_wanderer(**flags):
    flags = {"environments": 8, "hidden": 16, "atoms": 21, "discount": 0.5} | flags
    flags |= {"least": -2.0, "greatest": 3.0, "capacity": 1000, "target_period": 10}
    flags |= {"learning_rate": 3e-3, "importance_exponent": 1.0, "noise": 0.05}
    env = probes.constant_reward()
    rules = Wanderer(rainbow.Config(**flags), env.observation_spec(), env.action_spec())
    agent = loop.Agent(rules)
    return agent, rules, agent.state


def learned_values(agent, rules, start, make):
    """Trains an agent on a probe; returns its values as `q[time][sign][action]`."""
    agent.state = jax.tree.map(jnp.copy, start)
    envs = loop.Environments([make(seed) for seed in range(8)])
    loop.Engine(loop.Interaction(envs, agent)).run(2400)
    seen = np.array([[t, s, 0] for t in (0, 1) for s in (-1, 1)], np.float32)
    outputs = rules.outputs(agent.state.learner.params, seen, None)
    return np.asarray(rules.q_values(outputs)).reshape(2, 2, 2)


@pytest.fixture(scope="module")
def wanderer():
    """One compiled agent with everything on."""
    return make_wanderer()


PROBES = [
    probes.constant_reward,
    probes.reward_by_observation,
    probes.delayed_reward,
    probes.reward_by_action,
    probes.cut_short,
]


@pytest.mark.parametrize("make", PROBES, ids=lambda make: make.__name__)
def test_the_values_of_each_probe_are_exact(wanderer, make):
    expected = make().action_values(discount=0.5)
    learned = learned_values(*wanderer, make)[: len(expected)]
    np.testing.assert_allclose(learned, expected, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [ALL_OFF, {"n_steps": 1}, *({name: False} for name in FLAGS)],
    ids=["all off", "n_steps", *FLAGS],
)
def test_the_values_are_exact_without_each_part_too(flags):
    wanderer = make_wanderer(**flags)
    for make in PROBES:
        expected = make().action_values(discount=0.5)
        learned = learned_values(*wanderer, make)[: len(expected)]
        np.testing.assert_allclose(learned, expected, atol=0.05, err_msg=make.__name__)


# --- The loss -----------------------------------------------------------------------


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def linear_outputs(params, x, key):
    """A network without a library: a tensor, and noise that is added to its result."""
    y = params @ x
    return y if key is None else y + jax.random.normal(key, y.shape)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("distributional", [True, False], ids=["c51", "mean"])
def test_the_loss_is_the_one_its_flags_ask_for(rng, double, distributional):
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    size, atoms = 20, np.linspace(-1, 2, 7)
    rules = make_rules(
        network=rainbow.Network(lambda key, x: None, linear_outputs),
        double=double,
        distributional=distributional,
        atoms=7,
        greatest=2.0,
    )
    shape = (3, 7, 4) if distributional else (3, 1, 4)
    params, target_params, keys = normal(*shape), normal(*shape), jax.random.key(1)
    keys = jax.random.split(keys, 3)
    batch = loop.Transition(
        obs_tm1=normal(size, 4),
        a_tm1=rng.integers(3, size=size),
        r_t=normal(size),
        discount_t=rng.choice([0.0, 0.5], size=size).astype(np.float32),
        obs_t=normal(size, 4),
    )
    drawn = Drawn(batch, rng.random(size).astype(np.float32), np.arange(size))
    outputs = lambda params, x, key: np.stack(
        [linear_outputs(params, row, key) for row in x]
    ).astype(float)
    out_tm1 = outputs(params, batch.obs_tm1, keys[0])
    out_t = outputs(target_params, batch.obs_t, keys[1])
    online_t = outputs(params, batch.obs_t, keys[2])
    values = lambda x: softmax(x) @ atoms if distributional else x[..., 0]
    best = values(online_t if double else out_t).argmax(-1)

    losses, errors = np.zeros(size), np.zeros(size)
    for i, (action, r, discount) in enumerate(
        zip(batch.a_tm1, batch.r_t, batch.discount_t, strict=True)
    ):
        if distributional:
            target = np.zeros(7)
            for atom, p in zip(atoms, softmax(out_t[i, best[i]]), strict=True):
                place = (np.clip(r + discount * atom, -1, 2) + 1) / 0.5
                for k in range(7):
                    target[k] += p * max(0, 1 - abs(place - k))
            losses[i] = errors[i] = -target @ np.log(softmax(out_tm1[i, action]))
        else:
            errors[i] = r + discount * out_t[i, best[i], 0] - out_tm1[i, action, 0]
            size_of = abs(errors[i])
            losses[i] = size_of**2 / 2 if size_of < 1 else size_of - 1 / 2
    loss, given = rules.loss(params, target_params, drawn, keys)
    np.testing.assert_allclose(given, errors, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, np.mean(drawn.weights * losses), rtol=1e-4)


# --- The network --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duelling", "noisy"),
    [(True, True), (True, False), (False, False)],
    ids=["both", "duelling", "neither"],
)
def test_the_network_is_the_one_its_flags_ask_for(rng, duelling, noisy):
    config = rainbow.Config(duelling=duelling, noisy=noisy, hidden=5)
    network = rainbow.RainbowNetwork((3, 2), config)
    x = rng.normal(size=4).astype(np.float32)
    params = network.init(jax.random.key(0), x)
    layers = params["params"]
    name = "NoisyDense" if noisy else "Dense"
    first = 0 if noisy else 1

    def dense(layer, x):
        return x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])

    def stream(x, i):
        hidden = np.maximum(dense(layers[f"{name}_{first + i}"], x), 0)
        return dense(layers[f"{name}_{first + i + 1}"], hidden)

    hidden = np.maximum(dense(layers["Dense_0"], x), 0)
    expected = stream(hidden, 0).reshape(3, 2)
    if duelling:
        expected += stream(hidden, 2) - expected.mean(0)
    assert len(layers) == (5 if duelling else 3)
    np.testing.assert_allclose(network.apply(params, x), expected, atol=1e-5)
    with_key = network.apply(params, x, jax.random.key(1))
    assert np.array_equal(with_key, network.apply(params, x)) != noisy


def test_noise_is_factorised_and_as_large_as_its_deviations(rng):
    x, layer = np.array([1.0, -2.0, 0.5], np.float32), rainbow.NoisyDense(4, 0.5)
    params = layer.init(jax.random.key(0), x, None)
    given = params["params"]
    np.testing.assert_allclose(given["kernel_stddev"], 0.5 / 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(given["bias_stddev"], 0.5 / 3**0.5, rtol=1e-6)
    assert np.max(np.abs(given["kernel"])) <= 3**-0.5
    keys = jax.random.split(jax.random.key(1), 20_000)
    outputs = jax.vmap(layer.apply, in_axes=(None, None, 0))(params, x, keys)
    plain = layer.apply(params, x, None)
    np.testing.assert_allclose(np.mean(outputs, 0), plain, atol=0.03)
    # The square of f(ε) has the mean (2 / π)^(1/2), for inputs and for outputs.
    root = (2 / np.pi) ** 0.5
    variance = 0.25 / 3 * (root * np.sum(x**2) + 1) * root
    np.testing.assert_allclose(np.var(outputs, 0), variance, rtol=0.06)


# --- Prioritised replay -------------------------------------------------------------


def test_the_newest_have_the_greatest_priority_and_the_oldest_are_replaced():
    replay = PrioritizedReplay(5, 4, 0.5)
    add, stored = jax.jit(replay.add), replay.init(jnp.int32(0))
    rows = lambda *numbers: jnp.array(numbers, jnp.int32)
    yes, no = jnp.array([True, True]), jnp.array([False, True])
    stored = add(stored, rows(1, 2), yes)
    assert stored.tree.priorities.tolist() == [1, 1, 0, 0, 0]
    stored = replay.update_priorities(stored, rows(0, 1), jnp.array([-9.0, 4.0]))
    stored = add(stored, rows(0, 3), no)  # only the second counts
    assert stored.ring.rows.tolist() == [1, 2, 3, 0, 0]
    np.testing.assert_allclose(stored.tree.priorities, [3, 2, 3, 0, 0], rtol=1e-5)
    stored = replay.update_priorities(stored, rows(0, 2), jnp.array([0.25, 0.25]))
    stored = add(stored, rows(4, 5), yes)
    stored = add(stored, rows(6, 7), yes)
    assert stored.ring.rows.tolist() == [6, 7, 3, 4, 5]
    np.testing.assert_allclose(stored.tree.priorities, [2, 2, 0.5, 2, 2], rtol=1e-5)
    np.testing.assert_allclose(stored.tree.total, 8.5, rtol=1e-5)


@pytest.mark.parametrize("exponent", [0.5, 0.0], ids=["prioritised", "uniform"])
def test_rows_are_drawn_and_weighed_by_their_errors(exponent):
    replay = PrioritizedReplay(8, 16, exponent)
    stored = replay.init(jnp.float32(0))
    stored = replay.add(stored, 10 * jnp.arange(5.0), jnp.ones(5, bool))
    errors = np.array([1.0, -4.0, 0.25, 9.0, 0.0], np.float32)
    stored = replay.update_priorities(stored, jnp.arange(5), errors)
    keys = jax.random.split(jax.random.key(0), 500)
    sample = jax.jit(jax.vmap(replay.sample, in_axes=(0, None, None)))
    rows, weights, slots = map(np.asarray, sample(keys, stored, 0.7))
    np.testing.assert_array_equal(rows, 10.0 * slots)
    priorities = (np.abs(errors) + 1e-6) ** exponent
    probabilities = priorities / priorities.sum()
    drawn = np.bincount(slots.ravel(), minlength=5) / slots.size
    np.testing.assert_allclose(drawn, probabilities, atol=0.01)
    expected = (5 * probabilities[slots]) ** -0.7
    expected /= expected.max(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


# --- Folding n steps ----------------------------------------------------------------


def stream(rng, steps, batch=2):
    """Timesteps of episodes of one to five steps, each environment with its own.

    An observation tells the environment, the episode and the step within it.
    """
    place = np.zeros((batch, 3))
    place[:, 0] = np.arange(batch)
    ended = np.ones(batch, bool)
    for t in range(steps):
        first = ended
        place[:, 1] += first & (t > 0)
        place[:, 2] = np.where(first, 0, place[:, 2] + 1)
        ended = ~first & ((rng.random(batch) < 0.3) | (place[:, 2] == 5))
        terminated = ended & (rng.random(batch) < 0.5)
        reward = np.where(first, 0, rng.normal(size=batch))
        yield loop.Timestep(
            place.astype(np.float32),
            reward.astype(np.float32),
            np.where(terminated, 0, 1).astype(np.float32),
            first,
            ended,
        )


def folded_by_hand(timesteps, actions, n, discount):
    """What should be in replay, by environment and start, from whole episodes."""
    rows = {}
    for b, i in np.ndindex(len(actions[0]), len(timesteps) - 1):
        if timesteps[i + 1].first[b]:
            continue
        total, factor, k = 0.0, 1.0, i
        while k < i + n and not (k > i and timesteps[k].last[b]):
            k += 1
            if k == len(timesteps):
                break  # not complete yet
            total += factor * timesteps[k].r_t[b]
            factor *= discount * timesteps[k].discount_t[b]
        if i + n < len(timesteps):
            rows[b, i] = actions[i][b], total, factor, timesteps[k].observation[b]
    return rows


@pytest.mark.parametrize("n", [1, 3])
def test_no_transition_leads_from_one_episode_into_the_next(rng, n):
    timesteps = list(stream(rng, 60, batch=2))
    actions = rng.integers(3, size=(60, 2))
    folding, seen = NStep(n), {}
    blank = np.zeros((2, 3), np.float32)
    zero = np.zeros(2, np.float32)
    row = loop.Transition(blank, np.zeros(2, np.int32), zero, zero, blank)
    window, add = folding.init(row), jax.jit(folding.add)
    for t, timestep in enumerate(timesteps):
        row = loop.Transition(
            timesteps[t - 1].observation if t else blank,
            actions[t - 1],
            timestep.r_t,
            np.float32(0.5) * timestep.discount_t,
            timestep.observation,
        )
        truncated = timestep.last & (timestep.discount_t == 1)
        window, rows, valid = add(window, row, truncated, ~timestep.first)
        for b in np.flatnonzero(valid):
            seen[b, t - n] = jax.tree.map(lambda x, b=b: np.asarray(x[b]), rows)
    expected = folded_by_hand(timesteps, actions, n, 0.5)
    assert seen.keys() == expected.keys()
    for (b, t), row in seen.items():
        np.testing.assert_array_equal(row.obs_tm1, timesteps[t].observation[b])
        assert row.obs_tm1[:2].tolist() == row.obs_t[:2].tolist()  # the same episode
        for kept, true in zip(row[1:], expected[b, t], strict=True):
            np.testing.assert_allclose(kept, true, rtol=1e-5, atol=1e-6)


# --- The steps ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(wanderer):
    """The agent after a short stream, with its states and what it did."""
    agent, rules, start = wanderer
    agent.state = jax.tree.map(jnp.copy, start)
    timesteps = list(stream(np.random.default_rng(0), 25, batch=8))
    states, metrics, actions = [], [], []
    for timestep in timesteps:
        states.append(jax.tree.map(np.array, agent.state))
        done, said = agent.step(timestep)
        actions.append(done)
        metrics.append(said)
    states.append(jax.tree.map(np.array, agent.state))
    return rules, timesteps, states, metrics, actions


def test_the_replay_holds_what_was_seen_and_done_folded(walked):
    _, timesteps, states, _, actions = walked
    expected = folded_by_hand(timesteps, actions, 3, 0.5)
    order = sorted(expected, key=lambda place: place[::-1])  # by time, then environment
    ring = states[-1].replay.ring
    assert ring.size == len(order) > 100
    for slot, (b, t) in enumerate(order):
        row = [np.asarray(x)[slot] for x in ring.rows]
        np.testing.assert_array_equal(row[0], timesteps[t].observation[b])
        for kept, true in zip(row[1:], expected[b, t], strict=True):
            np.testing.assert_allclose(kept, true, rtol=1e-5, atol=1e-6)


def test_it_learns_at_every_step_once_there_is_a_transition(walked):
    _, _, states, metrics, _ = walked
    losses = [float(m["loss"]) for m in metrics]
    assert np.isnan(losses[:3]).all()
    assert np.isfinite(losses[3:]).all()
    for t, (before, after) in enumerate(itertools.pairwise(states)):
        leaves = [jax.tree.leaves(s.learner.params) for s in (before, after)]
        moved = [not np.array_equal(a, b) for a, b in zip(*leaves, strict=True)]
        assert any(moved) == (t >= 3)


def test_the_target_network_is_a_copy_made_every_few_steps(walked):
    _, _, states, _, _ = walked
    for t in range(26):  # the copies are made by steps 10 and 20, counted from 0
        source = states[21 if t > 20 else 11 if t > 10 else 0].learner.params
        jax.tree.map(
            np.testing.assert_array_equal, states[t].learner.target_params, source
        )


def test_what_was_drawn_has_its_error_for_a_priority(walked):
    rules, _, states, _, _ = walked
    before, after = states[-2], states[-1]
    ring = after.replay.ring
    greatest = np.max(before.replay.tree.priorities)
    new = np.arange(before.replay.ring.size, ring.size)
    tree = before.replay.tree.priorities.copy()
    tree[new] = greatest
    changed = np.flatnonzero(tree != after.replay.tree.priorities)
    assert 0 < len(changed) <= 32
    rows = jax.tree.map(lambda x: np.asarray(x)[changed], ring.rows)
    drawn = Drawn(rows, np.ones(len(changed), np.float32), changed)
    key = jax.random.fold_in(rules.key_noise, 24)
    _, errors = rules.loss(
        before.learner.params,
        before.learner.target_params,
        drawn,
        jax.random.split(key, 3),
    )
    np.testing.assert_allclose(
        np.asarray(after.replay.tree.priorities)[changed], errors**0.5, rtol=1e-3
    )


def test_it_exploits_without_noise(walked):
    rules, timesteps, states, _, _ = walked
    actions, carry = rules.exploit(states[-1], rules.initial_carry(8), timesteps[5])
    assert carry is None
    outputs = rules.outputs(states[-1].learner.params, timesteps[5].observation, None)
    best = (softmax(np.asarray(outputs)) @ np.linspace(-2, 3, 21)).argmax(-1)
    np.testing.assert_array_equal(actions, best)


def test_noise_alone_explores_and_with_none_it_is_greedy(wanderer):
    _, rules, start = wanderer
    x, params = jnp.ones((1, 3)), start.learner.params

    @jax.jit
    def explore(stddev):
        def changed(path, p):
            noise = "stddev" in jax.tree_util.keystr(path)
            return jnp.full_like(p, stddev) if noise else p

        noisy = jax.tree.map_with_path(changed, params)
        act = lambda steps: rainbow.Rainbow.explore(rules, noisy, x, steps)[0]
        return jax.vmap(act)(jnp.arange(300))

    best = rules.q_values(rules.outputs(params, x, None)).argmax()
    np.testing.assert_array_equal(explore(0.0), best)
    assert 30 < np.sum(explore(1.0) == best) < 270


def test_without_noise_it_explores_less_and_less():
    network = rainbow.Network(lambda key, x: None, lambda params, x, key: x[:3, None])
    rules = make_rules(network=network, **ALL_OFF, epsilon=0.2, epsilon_steps=100)
    observations = jnp.tile(jnp.array([0.0, 1.0, 0.0, 0.0]), (3000, 1))
    explore = jax.jit(jax.vmap(rules.explore, in_axes=(None, None, 0)))
    actions = explore(None, observations, jnp.array([0, 50, 100, 1000]))
    expected = 1 - np.array([1.0, 0.6, 0.2, 0.2]) * 2 / 3
    np.testing.assert_allclose(np.mean(actions == 1, axis=1), expected, atol=0.03)


def test_the_bias_of_priorities_is_undone_more_and_more():
    rules = make_rules(importance_exponent=0.4, importance_steps=10)
    exponents = [float(rules.importance_exponent(t)) for t in (0, 5, 10, 50)]
    np.testing.assert_allclose(exponents, [0.4, 0.7, 1.0, 1.0], rtol=1e-6)


def test_returns_without_a_range_are_refused():
    with pytest.raises(ValueError, match=r"greatest must be above least = 2.0, got 1"):
        rainbow.Config(least=2.0)

import functools

import impala
import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
import recurrent_cases as cases
from dm_env import specs
from impala import Config, Row
from recurrent_cases import assert_equal, at

OBSERVATIONS, ACTIONS = specs.Array((3,), np.float32), specs.DiscreteArray(2)
T, B = 4, 2


@pytest.fixture(autouse=True)
def many_small_programs(quick_to_compile):
    """They are compiled without optimisation."""


def make_rules(network, **flags):
    small = {"environments": B, "rollout": T, "features": 8, "discount": 0.5}
    return impala.IMPALA(Config(**(small | flags)), OBSERVATIONS, ACTIONS, network)


# --- Probes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_probes():
    """Learns from all probes; returns values `v[time][sign]` and policies of one."""
    rules = make_rules(
        None,
        core="gru",
        environments=16,
        rollout=5,
        learning_rate=5e-3,
        entropy_weight=0.0,
    )
    states = cases.learned(rules, 800)

    def read(name):
        params = at(states.learner.params, list(cases.PROBES).index(name))
        carry = rules.initial_carry(2)
        _, logits, v = rules.evaluate(params, carry, *cases.episode(name))
        return np.asarray(v), np.asarray(jax.nn.softmax(logits))

    return read


@pytest.mark.parametrize("name", cases.PROBES)
def test_the_values_of_a_probe_are_those_that_are_known(on_probes, name):
    values, _ = on_probes(name)
    exact = cases.PROBES[name]().action_values(0.5).max(axis=-1)
    np.testing.assert_allclose(values, exact, atol=0.05)


@pytest.mark.parametrize("name", ["reward_by_action", "reward_by_memory"])
def test_the_policy_of_a_probe_takes_the_best_actions(on_probes, name):
    _, probabilities = on_probes(name)
    best = cases.PROBES[name]().action_values(0.5)[-1].argmax(axis=-1)
    assert np.all(probabilities[-1][[0, 1], best] > 0.95)


# --- Any core -------------------------------------------------------------------------


@functools.cache
def played(name):
    """Returns what an agent saw and became, up to the last step of its third rollout.

    It is the same agent for every core.
    """
    rules = make_rules(cases.network(name))
    timesteps = cases.stream(np.random.default_rng(1), 3 * T, B)
    return rules, timesteps, *cases.played(rules, timesteps)


@pytest.mark.parametrize("name", cases.CORES)
def test_what_is_learned_from_is_what_was_acted_on_whatever_the_core(name):
    """The carry kept with a rollout gives the very logits that were drawn from."""
    rules, timesteps, states, metrics = played(name)
    begin, end = 2 * T - 1, 3 * T - 1
    assert timesteps.first[begin + 1 : end].any()
    assert not timesteps.first[begin].all()
    # The second update came before the first action of this rollout, none since then.
    for t, values in enumerate(metrics):
        due = (t + 1) % T == 0
        assert (np.isfinite if due else np.isnan)(list(values.values())).all()
    state, seen = states[end - 1], at(timesteps, slice(begin, end))
    carry, logits, _ = jax.jit(rules.evaluate)(
        state.learner.params, state.start, seen.observation, seen.first
    )
    kept = state.rollout.logits_tm1[: T - 1]
    assert_equal(logits, np.concatenate([kept, state.acted.logits[None]]))
    assert_equal(carry, state.carry)
    changed = lambda a, b: bool(np.any(a != b))
    both = states[end].learner.params, state.learner.params
    assert all(jax.tree.leaves(jax.tree.map(changed, *both)))


def test_the_name_of_the_core_is_all_it_takes_to_swap_it():
    names = {"gru": "GRUCell", "lstm": "OptimizedLSTMCell", "dnc": "DNC"}
    for name, kind in names.items():
        assert type(make_rules(None, core=name).network.core).__name__ == kind
    with pytest.raises(ValueError, match="one of gru, lstm, dnc; got 'rnn'"):
        make_rules(None, core="rnn")


def test_exploiting_takes_the_likeliest_actions_and_remembers(rng):
    rules = make_rules(cases.Leaky())
    agent, timesteps = loop.Agent(rules), cases.stream(rng, 30, B)
    carry, actions = agent.initial_carry(B), []
    for t in range(30):
        action, carry = agent.exploit(carry, at(timesteps, t))
        actions.append(action)
    end, logits, _ = rules.evaluate(
        agent.state.learner.params,
        agent.initial_carry(B),
        timesteps.observation,
        timesteps.first,
    )
    np.testing.assert_array_equal(actions, np.argmax(logits, axis=-1))
    assert_equal(carry, end)


# --- The rollout and its loss ---------------------------------------------------------


def rollout_of(rng, timesteps):
    """Returns rows by another policy along a stream, and its last timestep."""
    steps, batch = timesteps.first.shape
    before, after = at(timesteps, slice(steps - 1)), at(timesteps, slice(1, steps))
    row = Row(
        before.observation,
        before.first,
        np.float32(rng.normal(size=(steps - 1, batch, 2))),
        rng.integers(2, size=(steps - 1, batch), dtype=np.int32),
        after.r_t,
        0.5 * after.discount_t,
        ~after.first,
        after.last & (after.discount_t > 0),
    )
    return row, at(timesteps, steps - 1)


def test_rows_say_what_was_done_and_what_came_of_it(rng):
    _, timesteps, states, _ = played("odd")
    begin, end = 2 * T - 1, 3 * T - 1
    rows, acted = states[end].rollout, [s.acted for s in states[begin:end]]
    expected, _ = rollout_of(rng, at(timesteps, slice(begin, end + 1)))
    for name in ("obs_tm1", "first_tm1", "r_t", "discount_t", "mask_t", "truncation_t"):
        actual = getattr(rows, name)
        np.testing.assert_array_equal(actual, getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(rows.a_tm1, [a.action for a in acted])
    np.testing.assert_array_equal(rows.logits_tm1, [a.logits for a in acted])
    assert not states[0].rollout.mask_t[0].any()  # nothing came before


def test_actions_are_drawn_from_the_policy():
    rules = make_rules(cases.Linear())
    logits = jnp.log(jnp.array([[0.25, 0.75], [0.9, 0.1]]))
    explore = jax.jit(jax.vmap(rules.explore, in_axes=(None, 0)))
    shares = np.mean(explore(logits, jnp.arange(5000)), axis=0)
    np.testing.assert_allclose(shares, [0.75, 0.1], atol=0.02)


def episodes(mask):
    """Returns the runs of steps that count."""
    steps = np.flatnonzero(mask)
    return np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1)


def v_trace(params, rollout, timestep):
    """Returns errors and advantages `[T,B]` by V-trace, from its sums over time."""
    seen = np.concatenate([rollout.obs_tm1, timestep.observation[None]])
    outputs = np.float64(seen) @ params
    v = outputs[..., 2]
    errors, advantages = np.zeros((2, *rollout.r_t.shape))
    for b in range(v.shape[1]):
        for run in episodes(rollout.mask_t[:, b]):
            rho = np.exp(
                log_prob(outputs[run, b, :2], rollout.a_tm1[run, b])
                - log_prob(
                    np.float64(rollout.logits_tm1[run, b]), rollout.a_tm1[run, b]
                )
            ).clip(max=1)
            r, discount = rollout.r_t[run, b], rollout.discount_t[run, b]
            deltas = rho * (r + discount * v[run + 1, b] - v[run, b])
            for i, t in enumerate(run):
                weights = np.cumprod([1.0, *(discount * rho)[i:-1]])
                errors[t, b] = weights @ deltas[i:]
            after = np.append(errors[run[1:], b], 0.0)
            q = r + discount * (v[run + 1, b] + after)
            advantages[run, b] = rho * (q - v[run, b])
    return errors, advantages


def log_prob(logits, actions):
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, actions[..., None], -1)[..., 0]


def expected_loss(params, at_params, rollout, timestep):
    """Returns the loss at `params`, with the targets of other ones held constant."""
    errors, advantages = v_trace(at_params, rollout, timestep)
    outputs = np.float64(rollout.obs_tm1) @ params
    targets = (np.float64(rollout.obs_tm1) @ at_params)[..., 2] + errors
    logits = outputs[..., :2]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mask = rollout.mask_t
    policy = -np.sum((advantages * log_prob(logits, rollout.a_tm1))[mask])
    value = 0.5 * np.sum((targets - outputs[..., 2])[mask] ** 2)
    entropy = -np.sum((np.exp(log_p) * log_p).sum(-1)[mask])
    return (policy + 0.5 * value - 0.01 * entropy) / np.sum(mask)


def test_the_loss_and_its_gradient_are_those_of_the_paper(rng):
    rules = make_rules(cases.Linear())
    timesteps = cases.stream(rng, 12, B)
    rollout, timestep = rollout_of(rng, timesteps)
    assert rollout.truncation_t.any()
    assert not rollout.mask_t.all()
    params = rng.normal(size=(3, 3))
    (loss, _), gradient = jax.jit(jax.value_and_grad(rules.loss, has_aux=True))(
        jnp.float32(params), jnp.zeros(B), rollout, timestep
    )
    numbers = jax.tree.map(np.asarray, (rollout, timestep))
    expected = lambda x: expected_loss(x, params, *numbers)
    np.testing.assert_allclose(loss, expected(params), rtol=1e-4)
    for index in np.ndindex(3, 3):
        h = np.zeros((3, 3))
        h[index] = 1e-5
        slope = (expected(params + h) - expected(params - h)) / 2e-5
        np.testing.assert_allclose(gradient[index], slope, rtol=1e-3, atol=1e-5)


def test_what_is_learned_of_episodes_in_one_rollout_is_what_is_learned_of_each(rng):
    """The second is reset from whatever the first has left in the core."""
    rules = make_rules(cases.Leaky())
    timesteps = cases.stream(rng, 6, B)._replace(
        first=np.array([[i == 3] * B for i in range(6)]),
        last=np.array([[i == 2] * B for i in range(6)]),
        discount_t=np.ones((6, B), np.float32),
    )
    rollout, timestep = rollout_of(rng, timesteps)
    start, noise = jnp.full((B, 3), 0.3), jnp.full((B, 3), -0.7)
    params = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    learned = jax.jit(jax.value_and_grad(rules.loss, has_aux=True))

    def of(start, begin, end):
        """Learns from some steps, then padding after the observation that follows."""
        some, after = at(rollout, slice(begin, end)), at(timesteps, end)
        pad = jax.tree.map(
            lambda x: jnp.zeros((5 + begin - end, *x.shape[1:]), x.dtype), rollout
        )
        pad = pad._replace(obs_tm1=pad.obs_tm1 + after.observation[None])
        padded = jax.tree.map(lambda *x: jnp.concatenate(x), some, pad)
        (loss, _), gradient = learned(params, start, padded, timestep)
        return loss, gradient

    together, one, other = of(start, 0, 5), of(start, 0, 2), of(noise, 3, 5)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    assert_equal(together, mean)


def test_passes_are_updates_from_the_same_rollout(rng):
    once, twice = (make_rules(cases.Linear(), passes=n) for n in (1, 2))
    rollout, timestep = rollout_of(rng, cases.stream(rng, T + 1, B))
    start, learner = jnp.zeros(B), jax.jit(once.init)().learner
    learn = jax.jit(once.learn)
    after, _ = learn(learner, start, rollout, timestep)
    after, _ = learn(after, start, rollout, timestep)
    both, _ = jax.jit(twice.learn)(learner, start, rollout, timestep)
    assert_equal(both, after)

import functools

import cores
import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
import r2d2
import recurrent_cases as cases
from dm_env import specs
from r2d2 import Config, Experience
from recurrent import Recurrent
from recurrent_cases import assert_equal, at
from sequence_replay import Drawn, SequenceReplay

import rlprims

OBSERVATIONS, ACTIONS = specs.Array((3,), np.float32), specs.DiscreteArray(2)
L, B = 4, 2


@pytest.fixture(autouse=True)
def many_small_programs(quick_to_compile, ordinary_promotion):
    """Compiled without optimisation; and Adam raises a float to an integer power."""


def make_rules(network, **flags):
    small = {
        "environments": B,
        "features": 8,
        "length": L,
        "burn_in": 1,
        "period": 2,
        "capacity": 5,
        "batch_size": 3,
        "discount": 0.5,
    }
    return r2d2.R2D2(Config(**(small | flags)), OBSERVATIONS, ACTIONS, network)


# --- Probes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_probes():
    """Learns from all probes; returns values `q[time][sign][action]` of one.

    With more than one reward in a target, it would learn what random actions earn.
    """
    rules = make_rules(
        None,
        core="gru",
        environments=8,
        length=6,
        period=3,
        n=1,
        capacity=64,
        batch_size=8,
        warm_up=10,
        target_period=10,
        epsilon=1.0,
        epsilon_exponent=0.0,
        learning_rate=5e-3,
    )
    with jax.numpy_dtype_promotion("standard"):
        states = cases.learned(rules, 900)

    def read(name):
        params = at(states.learner.params, list(cases.PROBES).index(name))
        _, q = rules.q_values(params, rules.initial_carry(2), *cases.episode(name))
        return rlprims.SIGNED_HYPERBOLIC_PAIR.apply_inv(q)

    return read


@pytest.mark.parametrize("name", cases.PROBES)
def test_the_values_of_a_probe_are_those_that_are_known(on_probes, name):
    exact = cases.PROBES[name]().action_values(0.5)
    np.testing.assert_allclose(on_probes(name), exact, atol=0.05)


# --- Any core -------------------------------------------------------------------------


@functools.cache
def played(name):
    """Returns what an agent saw and became in a stream, learning from step 10 on.

    It is the same agent for every core.
    """
    flags = {"warm_up": 10, "update_period": 5, "target_period": 2, "capacity": 12}
    rules = make_rules(cases.network(name), **flags)
    timesteps = cases.stream(np.random.default_rng(1), 26, B)
    return rules, timesteps, *cases.played(rules, timesteps)


@pytest.mark.parametrize("name", cases.CORES)
def test_what_is_replayed_is_what_happened_whatever_the_core(name):
    """The carry kept with a sequence is that which the core had before it."""
    rules, timesteps, states, metrics = played(name)
    for t, values in enumerate(metrics):
        due = t >= 10 and t % 5 == 0
        assert (np.isfinite if due else np.isnan)(list(values.values())).all()
    states, after = states[:10], states[10]
    params, kept = states[-1].learner.params, states[-1].replay.stored
    seen = at(timesteps, slice(10))
    unrolled = jax.jit(rules.q_values)
    end, q = unrolled(params, rules.initial_carry(B), seen.observation, seen.first)
    assert_equal(end, states[-1].carry)
    rows, carries = at(kept.rows, slice(kept.size))
    ones = [(start, env) for start in (0, 2, 4, 6) for env in range(B)]
    assert kept.size == len(ones)
    before = [rules.initial_carry(B), *[s.carry for s in states]]
    for i, (start, env) in enumerate(ones):
        steps = slice(start, start + L), env
        assert_equal(at(rows.timestep, i), at(timesteps, steps), rtol=0, atol=0)
        assert_equal(at(carries, i), at(before[start], env), rtol=0, atol=0)
    # From these carries on, the sequences have the values that were acted on.
    time_first = jax.tree.map(lambda x: x[-B:].swapaxes(0, 1), rows.timestep)
    latest = jax.tree.map(lambda x: x[-B:], carries)
    longer = jax.tree.map(  # as long as before, so that nothing is compiled anew
        lambda x: jnp.concatenate([x, jnp.zeros((6, *x.shape[1:]), x.dtype)]),
        time_first,
    )
    _, again = unrolled(params, latest, longer.observation, longer.first)
    assert_equal(again[:L], q[6:])
    changed = jax.tree.map(lambda a, b: np.any(a != b), after.learner.params, params)
    assert all(jax.tree.leaves(changed))


def test_the_target_network_is_a_copy_made_every_few_updates():
    _, _, states, _ = played("odd")
    for t, source in enumerate([0] * 15 + [15] * 10 + [25]):
        learner = states[t].learner
        assert learner.updates == max(0, t // 5 - 1)
        assert_equal(learner.target_params, states[source].learner.params, 0, 0)


def test_the_name_of_the_core_is_all_it_takes_to_swap_it():
    names = {"gru": "GRUCell", "lstm": "OptimizedLSTMCell", "dnc": "DNC"}
    for name, kind in names.items():
        assert type(make_rules(None, core=name).network.core).__name__ == kind
    with pytest.raises(ValueError, match="one of gru, lstm, dnc; got 'rnn'"):
        make_rules(None, core="rnn")


# --- The replay of sequences ----------------------------------------------------------


def number(t, env):
    """Tells a row from all others."""
    return 100.0 * env + t


def filled(replay, steps, each=lambda kept, t: kept):
    """Returns a replay after so many steps of three environments, and `each` after."""
    envs = np.arange(3)
    rows = lambda t: {"x": jnp.asarray(number(t, envs), jnp.float32)}
    carry = lambda t: (jnp.asarray(-number(t, envs), jnp.float32)[:, None],)
    kept, add = replay.init(rows(0), carry(0)), jax.jit(replay.add)
    for t in range(steps):
        kept = add(kept, rows(t), carry(t), jnp.int32(t))
        kept = each(kept, t)
    return kept


@pytest.mark.parametrize(("length", "period"), [(4, 2), (3, 4)])
def test_sequences_start_every_period_and_the_newest_are_kept(length, period):
    ring, count = {}, 0

    def check(kept, t):
        nonlocal count
        if t >= length - 1 and (t + 1 - length) % period == 0:
            for env in range(3):
                ring[count % 7] = (t + 1 - length, env)
                count += 1
        rows, (carry,) = kept.stored.rows
        assert kept.stored.size == len(ring)
        for slot, (start, env) in ring.items():
            expected = number(np.arange(start, start + length), env)
            np.testing.assert_array_equal(rows["x"][slot], expected)
            assert carry[slot].tolist() == [-number(start, env)]
        filled_slots = np.flatnonzero(kept.tree.priorities).tolist()
        assert filled_slots == sorted(ring)
        return kept

    filled(SequenceReplay(7, 1, length, period), 12, check)
    assert count > 7


@pytest.fixture(scope="module")
def seven():
    """A full replay of seven sequences, and its compiled functions."""
    replay = SequenceReplay(7, 2100, length=4, period=2, exponent=0.5)
    return filled(replay, 10), jax.jit(replay.update), jax.jit(replay.sample)


def test_sequences_are_drawn_by_priority_with_the_carry_before_them(seven):
    kept, update, sample = seven
    priorities = jnp.arange(7.0)
    kept = update(kept, jnp.arange(7), priorities)
    untouched = update(kept, jnp.full(7, -1), 100 * priorities)
    assert_equal(untouched, kept, rtol=0, atol=0)
    drawn = sample(jax.random.key(0), kept)
    shares = np.sqrt(np.arange(7)) / np.sqrt(np.arange(7)).sum()
    counts = np.bincount(drawn.indices, minlength=7)
    np.testing.assert_allclose(counts / 2100, shares, atol=2e-3)
    probabilities = shares[drawn.indices]
    np.testing.assert_allclose(drawn.probabilities, probabilities, atol=1e-3)
    rows, (carry,) = kept.stored.rows
    np.testing.assert_array_equal(drawn.rows["x"], rows["x"][drawn.indices].T)
    np.testing.assert_array_equal(drawn.carry[0], carry[drawn.indices])


def test_sequences_without_error_can_still_be_drawn(seven):
    kept, update, sample = seven
    drawn = sample(jax.random.key(0), update(kept, jnp.arange(7), jnp.zeros(7)))
    np.testing.assert_allclose(np.bincount(drawn.indices, minlength=7), 300, atol=1)


def test_new_sequences_are_drawn_as_often_as_the_likeliest_so_far():
    replay = SequenceReplay(9, 1, length=2, period=1, exponent=0.5)
    update = jax.jit(replay.update)

    def rise_and_fall(kept, t):
        if t == 2:
            assert np.flatnonzero(kept.tree.priorities).tolist() == [0, 1, 2, 3, 4, 5]
            kept = update(kept, jnp.array([1]), jnp.array([16.0]))
            kept = update(kept, jnp.array([1]), jnp.array([0.25]))
        return kept

    kept = filled(replay, 4, rise_and_fall)
    expected = [1, 0.5, 1, 1, 1, 1, 4, 4, 4]
    np.testing.assert_allclose(kept.tree.priorities, expected, rtol=1e-5)


def test_a_replay_without_room_for_all_environments_is_refused():
    with pytest.raises(ValueError, match=r"capacity must be 2 or more.*got 1"):
        make_rules(cases.Linear(), capacity=1).init()


def test_no_burn_in_leaves_the_memory_as_it_was():
    network = Recurrent(cores.make_core("gru", 3), outputs=2, hidden=3)
    carry, observations = network.initial_carry(2) + 1.0, jnp.ones((1, 2, 4))
    first = jnp.zeros((1, 2), bool)
    params = network.init(jax.random.key(0), carry, observations, first)
    after, outputs = network.apply(params, carry, observations[:0], first[:0])
    np.testing.assert_array_equal(after, carry)
    assert outputs.shape == (0, 2, 2)


@pytest.mark.parametrize("burn_in", [3, 4, 9])
def test_a_burn_in_that_leaves_no_step_is_refused(burn_in):
    with pytest.raises(ValueError, match="burn_in must leave two steps of length 4"):
        Config(length=4, burn_in=burn_in)


# --- Its loss -------------------------------------------------------------------------


def batch_of(rng, timesteps, carry):
    steps, size = timesteps.first.shape
    actions = rng.integers(2, size=(steps, size), dtype=np.int32)
    shares = np.float32(rng.uniform(0.1, 1.0, size=size))
    rows = Experience(jax.tree.map(jnp.asarray, timesteps), jnp.asarray(actions))
    return Drawn(rows, carry, jnp.arange(size), jnp.asarray(shares))


def h(x):
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 1e-3 * x


def h_inverse(x):
    root = np.sqrt(1 + 4e-3 * (np.abs(x) + 1 + 1e-3))
    return np.sign(x) * (((root - 1) / 2e-3) ** 2 - 1)


def duel(params, observations):
    outputs = np.float64(observations) @ params
    advantages = outputs[..., :2]
    return outputs[..., 2:] + advantages - advantages.mean(-1, keepdims=True)


def expected_errors(params, at_params, target_params, rows, n):
    """Returns errors `[T - 1,N]` at `params`, with targets chosen at other ones."""
    seen = rows.timestep
    q, q_now = (duel(p, seen.observation) for p in (params, at_params))
    target_q = duel(target_params, seen.observation)
    errors = np.zeros((len(q) - 1, q.shape[1]))
    for i in range(q.shape[1]):
        for t in range(len(errors)):
            if seen.first[t + 1, i]:
                continue
            total, weight, end = 0.0, 1.0, t
            while end < min(t + n, len(errors)) and not seen.first[end + 1, i]:
                end += 1
                total += weight * seen.r_t[end, i]
                weight *= 0.5 * seen.discount_t[end, i]
            best = q_now[end, i].argmax()
            target = total + weight * h_inverse(target_q[end, i, best])
            errors[t, i] = h(target) - q[t, i, rows.action[t, i]]
    return errors


def test_the_loss_its_gradient_and_the_priorities_are_those_of_the_paper(rng):
    rules = make_rules(cases.Linear(), length=14, burn_in=2, n=3)
    timesteps = cases.stream(rng, 14, 3)
    assert timesteps.last[3:-1].any()
    batch = batch_of(rng, timesteps, jnp.zeros(3))
    params, target_params = rng.normal(size=(2, 3, 3))
    (loss, priorities), gradient = jax.jit(
        jax.value_and_grad(rules.loss, has_aux=True)
    )(jnp.float32(params), jnp.float32(target_params), batch)
    rest = jax.tree.map(lambda x: np.asarray(x[2:]), batch.rows)
    shares = np.asarray(batch.probabilities)

    def expected(x):
        errors = expected_errors(x, params, target_params, rest, 3)
        weights = (shares.min() / shares) ** 0.6
        return np.mean(weights * np.mean(errors**2 / 2, axis=0))

    np.testing.assert_allclose(loss, expected(params), rtol=1e-3)
    for index in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[index] = 1e-5
        slope = (expected(params + step) - expected(params - step)) / 2e-5
        np.testing.assert_allclose(gradient[index], slope, rtol=2e-3, atol=1e-4)
    errors = np.abs(expected_errors(params, params, target_params, rest, 3))
    counted = ~timesteps.first[3:]
    mean = errors.sum(0) / counted.sum(0)
    np.testing.assert_allclose(priorities, 0.9 * errors.max(0) + 0.1 * mean, rtol=2e-3)


def test_burning_in_gives_a_carry_and_nothing_to_learn_from(rng):
    """The rest is learned from as if the carry after the burn-in had been stored."""
    timesteps, network = cases.stream(rng, 8, 3), cases.Leaky()
    long = make_rules(network, length=8, burn_in=3)
    short = make_rules(network, length=5, burn_in=0)
    batch = batch_of(rng, timesteps, jnp.asarray(rng.normal(size=(3, 3)), jnp.float32))
    params = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    warm_up, rest = (at(batch.rows, steps) for steps in (slice(3), slice(3, 8)))
    seen = warm_up.timestep
    carry, _ = network.apply(params, batch.carry, seen.observation, seen.first)
    learned = lambda rules: jax.jit(jax.value_and_grad(rules.loss, has_aux=True))
    expected = learned(short)(params, params, batch._replace(rows=rest, carry=carry))
    assert_equal(learned(long)(params, params, batch), expected)


# --- Acting ---------------------------------------------------------------------------


def test_each_environment_explores_to_its_own_degree():
    rules = make_rules(cases.Linear(), environments=3)
    q_values = jnp.array([[1.0, 0.0]] * 3)
    explore = jax.jit(jax.vmap(rules.explore, in_axes=(None, 0)))
    others = np.mean(explore(q_values, jnp.arange(5000)), axis=0)
    epsilons = 0.4 ** np.array([1, 1 + 7 / 2, 8])
    np.testing.assert_allclose(others, epsilons / 2, atol=0.015)
    assert others[0] > others[1] > others[2]


def test_exploiting_takes_the_best_actions_and_remembers(rng):
    rules = make_rules(cases.Leaky())
    agent, timesteps = loop.Agent(rules), cases.stream(rng, 30, B)
    carry, actions = agent.initial_carry(B), []
    for t in range(30):
        action, carry = agent.exploit(carry, at(timesteps, t))
        actions.append(action)
    end, q = rules.q_values(
        agent.state.learner.params,
        agent.initial_carry(B),
        timesteps.observation,
        timesteps.first,
    )
    np.testing.assert_array_equal(actions, np.argmax(q, axis=-1))
    assert_equal(carry, end)

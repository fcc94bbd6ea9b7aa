import itertools

import dqn
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import loop
import numpy as np
import probes
import pytest
from catch import Catch


def make_agent(envs, network=None, **flags):
    config = dqn.Config(environments=len(envs), **flags)
    rules = dqn.DQN(config, *envs.specs(), network)
    return loop.Agent(rules), rules


def train(agent, rules, envs, steps):
    agent.state = rules.init()
    loop.Engine(loop.Interaction(envs, agent)).run(steps)
    return agent.state


# --- Probes: environments whose values are known ------------------------------------


@pytest.fixture(scope="module")
def learned_values():
    """Trains the agent on a probe; returns its values as `q[time][sign][action]`."""
    environments = lambda make: loop.Environments(
        [make(seed=seed) for seed in range(4)]
    )
    flags = {"discount": 0.5, "hidden": 32, "learning_rate": 1e-3, "target_period": 10}
    agent, rules = make_agent(environments(probes.cut_short), epsilon=1.0, **flags)

    @jax.jit
    def q_values(params):
        times, signs = jnp.mgrid[:2, -1:2:2].astype(jnp.float32)
        states = jnp.stack([times, signs, jnp.zeros_like(times)], axis=-1)
        return jnp.reshape(rules.q_values(params, states.reshape(4, 3)), (2, 2, 2))

    def learn(make):
        state = train(agent, rules, environments(make), 4000)
        return np.asarray(q_values(state.learner.params))

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
)
def test_the_values_of_a_probe_are_found(learned_values, make):
    exact = make().action_values(discount=0.5)
    np.testing.assert_allclose(learned_values(make)[: len(exact)], exact, atol=0.05)


# --- The agent ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """An agent with everything small: its states, before each step of Catch."""
    envs = loop.Environments([Catch(rows=3, columns=3)])
    agent, rules = make_agent(
        envs, hidden=4, capacity=5, batch_size=3, target_period=3, discount=0.5
    )
    events, states, timesteps = loop.Interaction(envs, agent), [], []
    for _ in range(12):  # an episode is two steps: the third timestep is a new one
        states.append(jax.tree.map(np.array, agent.state))
        timesteps.append(next(events).timestep)
    states.append(jax.tree.map(np.array, agent.state))
    return rules, states, timesteps


def test_the_replay_keeps_the_newest_transitions_and_none_between_episodes(small):
    _, states, timesteps = small
    pairs = [(i, i + 1) for i in range(11) if not timesteps[i + 1].first[0]]
    assert len(pairs) == 8
    replay = states[-1].replay.rows
    for slot, (i, j) in zip([3, 4, 0, 1, 2], pairs[3:], strict=True):
        kept = jax.tree.map(lambda rows, slot=slot: rows[slot], replay)
        np.testing.assert_array_equal(kept.obs_tm1, timesteps[i].observation[0])
        np.testing.assert_array_equal(kept.obs_t, timesteps[j].observation[0])
        assert kept.a_tm1 == states[j].action[0]
        assert kept.r_t == timesteps[j].r_t[0]
        assert kept.discount_t == (0.0 if timesteps[j].last[0] else 0.5)


def test_the_target_network_is_a_copy_made_every_few_steps(small):
    _, states, _ = small
    kernel = lambda params: params["params"]["Dense_0"]["kernel"]
    for i, source in enumerate([0, 0, 0, 0, 4, 4, 4, 7, 7, 7, 10, 10, 10]):
        np.testing.assert_array_equal(
            kernel(states[i].learner.target_params),
            kernel(states[source].learner.params),
            err_msg=str(i),
        )


def test_every_step_but_the_first_learns(small):
    _, states, _ = small
    same = [
        all(
            np.array_equal(a, b)
            for a, b in zip(
                *map(jax.tree.leaves, (before.learner.params, after.learner.params)),
                strict=True,
            )
        )
        for before, after in itertools.pairwise(states)
    ]
    assert same == [True] + [False] * 11


def test_the_loss_selects_with_one_network_and_evaluates_with_the_other(small, rng):
    rules, states, _ = small
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    learner = states[0].learner
    params, target_params = (jax.tree.map(draw, learner.params) for _ in range(2))
    batch = loop.Transition(
        obs_tm1=draw(np.empty((50, 3, 3))),
        a_tm1=rng.integers(3, size=50),
        r_t=draw(np.empty(50)),
        discount_t=rng.choice([0.0, 0.9], size=50).astype(np.float32),
        obs_t=draw(np.empty((50, 3, 3))),
    )

    def q(params, observation):
        x = observation.reshape(-1).astype(np.float64)
        for name in ["Dense_0", "Dense_1", "Dense_2"]:
            layer = params["params"][name]
            x = x @ layer["kernel"] + layer["bias"]
            x = x if name == "Dense_2" else np.maximum(x, 0)
        return x

    losses = []
    for obs_tm1, a_tm1, r_t, discount_t, obs_t in zip(*batch, strict=True):
        best = q(params, obs_t).argmax()
        target = r_t + discount_t * q(target_params, obs_t)[best]
        error = abs(target - q(params, obs_tm1)[a_tm1])
        losses.append(error**2 / 2 if error < 1 else error - 1 / 2)
    loss = rules.loss(params, target_params, batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_the_loss_holds_its_target_constant(small):
    rules, states, _ = small
    learner, replay = states[-1].learner, states[-1].replay
    gradient = jax.grad(rules.loss, argnums=1)
    slopes = gradient(learner.params, learner.target_params, replay.rows)
    assert all(not np.any(slope) for slope in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("epsilon_steps", "steps", "epsilon"),
    [(10**6, 0, 1.0), (10**6, 500_000, 0.6), (50, 50, 0.2)],
    ids=["at first", "halfway", "afterwards"],
)
def test_exploration_decays(epsilon_steps, steps, epsilon):
    envs = loop.Environments([Catch(rows=3, columns=3)])
    config = dqn.Config(epsilon=0.2, epsilon_steps=epsilon_steps)
    rules = dqn.DQN(config, *envs.specs())
    q_values = jnp.tile(jnp.array([0.0, 2.0, 1.0]), (3000, 1))
    actions = jax.jit(rules.explore)(q_values, jnp.int32(steps))
    shares = np.bincount(actions, minlength=3) / len(actions)
    expected = [epsilon / 3, 1 - epsilon + epsilon / 3, epsilon / 3]
    np.testing.assert_allclose(shares, expected, atol=0.04)


@pytest.mark.slow
def test_one_seed_gives_one_learning_curve():
    def losses(agent, rules):
        agent.state = rules.init()
        events = loop.Interaction(loop.Environments([Catch(4, 3, seed=1)]), agent)
        return [float(e.metrics["loss"]) for e in itertools.islice(events, 1, 60)]

    envs = loop.Environments([Catch(4, 3)])
    first, second = (make_agent(envs, seed=seed, hidden=8) for seed in range(2))
    assert losses(*first) == losses(*first)
    assert losses(*first) != losses(*second)


def solves_a_small_game_of_catch(network=None):
    envs = loop.Environments([Catch(5, 3, seed=seed) for seed in range(4)])
    agent, rules = make_agent(
        envs, network, learning_rate=2e-3, target_period=50, epsilon_steps=800
    )
    train(agent, rules, envs, 3000)
    tests = loop.Environments([Catch(5, 3, seed=seed + 100) for seed in range(20)])
    return loop.evaluate(tests, agent) == 1.0


@pytest.mark.slow
def test_a_small_game_of_catch_is_soon_solved():
    assert solves_a_small_game_of_catch()


def haiku_network():
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([64, 64, 3])(x.reshape(-1)))
    )
    return dqn.Network(network.init, network.apply)


def equinox_network():
    def split(key):
        return eqx.partition(eqx.nn.MLP(15, 3, 64, 2, key=key), eqx.is_array)

    _, static = split(jax.random.key(0))
    return dqn.Network(
        init=lambda key, observation: split(key)[0],
        apply=lambda params, x: eqx.combine(params, static)(x.reshape(-1)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("make_network", [haiku_network, equinox_network])
def test_networks_of_other_libraries_learn_as_well(make_network):
    assert solves_a_small_game_of_catch(make_network())

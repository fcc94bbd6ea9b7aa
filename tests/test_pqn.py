import jax
import jax.numpy as jnp
import loop
import numpy as np
import optax
import probes
import pytest
from dm_env import specs
from pqn import PQN, Batch, Config, Learner, Network, Row

DISCOUNT = 0.5


def make_rules(network=None, shape=(3,), **flags):
    config = Config(discount=DISCOUNT, **flags)
    return PQN(config, specs.Array(shape, np.float32), specs.DiscreteArray(2), network)


# --- Probes: environments whose values are known --------------------------------------


@pytest.fixture(scope="module")
def learned_values():
    """Trains one compiled agent on a probe; returns `q[time][sign][action]`."""
    rules = make_rules(
        environments=8,
        rollout=8,
        epochs=4,
        minibatches=2,
        hidden=16,
        learning_rate=2e-2,
        epsilon=1.0,
        steps=1600,
    )
    agent, init = loop.Agent(rules), jax.jit(rules.init)

    def learn(probe):
        agent.state = init()
        envs = loop.Environments([probe(seed=seed) for seed in range(8)])
        loop.Engine(loop.Interaction(envs, agent)).run(rules.config.steps)
        times, signs = np.mgrid[:2, -1:2:2].astype(np.float32)
        times = times if probe is not probes.cut_short else np.zeros_like(times)
        seen = np.stack([times, signs, np.zeros_like(times)], axis=-1)
        return rules.q_values(agent.state.learner.params, seen.reshape(4, 3)).reshape(
            2, 2, 2
        )

    return learn


@pytest.mark.usefixtures("ordinary_promotion")  # which RAdam relies on
@pytest.mark.parametrize(
    "probe",
    [
        probes.constant_reward,
        probes.reward_by_observation,
        probes.delayed_reward,
        probes.reward_by_action,
        probes.cut_short,
    ],
    ids=lambda probe: probe.__name__,
)
def test_it_learns_the_exact_values_of(probe, learned_values):
    exact = probe().action_values(DISCOUNT)
    q = learned_values(probe)[: len(exact)]
    np.testing.assert_allclose(q, exact, atol=0.05)


# --- Targets --------------------------------------------------------------------------


def rows_of(ends, rng):
    """Makes what B environments show of episodes that end as told: `ends[B][T]`.

    After each end, the next row is the start of an episode, which is no step.
    """
    ends = np.array([list(row) for row in ends]).T
    mask = np.ones(ends.shape, bool)
    mask[1:] = ends[:-1] == "."
    return Row(
        obs_tm1=rng.normal(size=(*ends.shape, 3)).astype(np.float32),
        a_tm1=rng.integers(2, size=ends.shape),
        r_t=np.where(mask, rng.normal(size=ends.shape), 0).astype(np.float32),
        discount_t=np.where(ends == "e", 0, DISCOUNT).astype(np.float32),
        truncation_t=ends == "c",
        mask_t=mask,
    )


def first_action_is_best(params, observation):
    """A network that is easy to read: the best value is the sum of what is seen."""
    return params * (observation.sum() - jnp.arange(2.0))


LINEAR = Network(lambda key, observation: jnp.ones(()), first_action_is_best)


@pytest.fixture(scope="module")
def targets_of():
    flags = {"environments": 2, "rollout": 5, "minibatches": 1}
    return jax.jit(make_rules(LINEAR, trace=0.6, **flags).targets)


ENDS = {  # of two environments: "." goes on, "e" terminates, "c" is cut short
    "nowhere": [".....", "....."],
    "by termination": [".e...", "e...."],
    "by truncation": [".c...", "...c."],
    "at once after they start": ["e.e.c", "c.c.."],
    "with the rollout": ["....e", "....c"],
    "in all ways at once": [".e.c.", "c.e.."],
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_targets_are_the_recursion_of_the_paper_in_episodes_that_end(
    ends, rng, targets_of
):
    rows = rows_of(ends, rng)
    last = rng.normal(size=(2, 3)).astype(np.float32)
    actual = targets_of(np.ones((), np.float32), rows, last)

    expected = np.zeros((5, 2))
    best = np.concatenate([rows.obs_tm1[1:], last[None]]).sum(-1)
    for b, row in enumerate(ends):
        for t in reversed(range(5)):
            if t > 0 and row[t - 1] != ".":
                continue  # the start of an episode
            match row[t]:
                case "e":
                    after = 0.0
                case "c":
                    after = best[t, b]
                case ".":
                    on = t + 1 < 5
                    after = 0.4 * best[t, b] + 0.6 * expected[t + 1, b] if on else None
                    after = after if on else best[t, b]
            expected[t, b] = rows.r_t[t, b] + DISCOUNT * after
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_half_the_mean_squared_error_of_what_counts(rng):
    rules = make_rules(LINEAR)
    batch = Batch(
        obs=rng.normal(size=(20, 3)).astype(np.float32),
        action=rng.integers(2, size=20),
        target=rng.normal(size=20).astype(np.float32),
        mask=rng.random(20) < 0.5,
    )
    q = 2 * (batch.obs.sum(-1) - batch.action)
    expected = np.mean(((q - batch.target) ** 2 / 2)[batch.mask])
    assert jax.jit(rules.loss)(np.float32(2), batch) == pytest.approx(
        expected, rel=1e-5
    )


def test_a_batch_in_which_nothing_counts_teaches_nothing():
    batch = Batch(np.ones((4, 3)), np.zeros(4, int), np.ones(4), np.zeros(4, bool))
    loss_and_gradient = jax.jit(jax.value_and_grad(make_rules(LINEAR).loss))
    assert loss_and_gradient(np.float32(2), batch) == (0.0, 0.0)


# --- What is learned from -------------------------------------------------------------


class Recording(PQN):
    """Notes in the optimiser's state which rows each of its updates is made from.

    The gradient of the loss with respect to the parameters is the rows' observations,
    and -1 in place of those that do not count.
    """

    def loss(self, params, batch):
        return params @ jnp.where(batch.mask, batch.obs[:, 0], -1.0)


@pytest.fixture(scope="module")
def minibatches_of():
    """Returns numbers of the rows in each minibatch, `[epochs, minibatches, size]`."""
    config = Config(environments=2, rollout=5, minibatches=5, epochs=3)
    spec, network = specs.Array((1,), np.float32), Network(None, lambda p, o: o + p)
    rules = Recording(config, spec, specs.DiscreteArray(2), network)
    rules.optimizer = optax.GradientTransformation(
        lambda params: (jnp.zeros((15, 2)), jnp.int32(0)),
        lambda gradient, notes, params: (
            jnp.zeros(2),
            (notes[0].at[notes[1]].set(gradient), notes[1] + 1),
        ),
    )
    learn = jax.jit(rules.learn)

    def minibatches_of(ends, seed):
        rows = rows_of(ends, np.random.default_rng(0))
        rows = rows._replace(obs_tm1=np.arange(10, dtype=np.float32).reshape(5, 2, 1))
        start = Learner(jnp.zeros(2), rules.optimizer.init(jnp.zeros(2)))
        (_, (notes, _)), _ = learn(start, rows, np.zeros((2, 1)), jax.random.key(seed))
        return np.asarray(notes).reshape(3, 5, 2)

    return minibatches_of


def test_an_epoch_covers_each_step_that_counts_once(minibatches_of):
    *_, mask = rows_of([".e.c.", "c.e.."], np.random.default_rng(0))
    numbers = np.where(mask, np.arange(10).reshape(5, 2), -1)
    for epoch in minibatches_of([".e.c.", "c.e.."], seed=0):
        assert sorted(epoch.ravel()) == sorted(numbers.ravel())


def test_every_epoch_of_every_rollout_is_shuffled_anew(minibatches_of):
    epochs = [epoch for s in (0, 1) for epoch in minibatches_of([".....", "....."], s)]
    assert len({tuple(epoch.ravel()) for epoch in epochs}) == 6


def test_it_learns_once_the_rollout_is_full_from_what_happened_and_was_seen_after():
    rules = make_rules(LINEAR, environments=2, rollout=3, minibatches=1)
    seen = []

    def learn(learner, rollout, observation, key):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda *x: seen.append(x), rollout, observation, data)
        return learner, {"loss": jnp.float32(0.0)}

    rules.learn = learn
    agent = loop.Agent(rules)
    envs = loop.Environments([probes.cut_short(0), probes.delayed_reward(1)])
    events = loop.Interaction(envs, agent)
    steps, actions, losses = [], [], []
    for _ in range(6):
        event = next(events)
        steps.append(event.timestep)
        actions.append(events.actions)
        losses.append(float(event.metrics["loss"]))
    jax.effects_barrier()
    np.testing.assert_array_equal(losses, [np.nan, np.nan, 0] * 2)
    rows, after, data = seen[1]
    assert data.tolist() != seen[0][-1].tolist()  # it is shuffled anew
    np.testing.assert_array_equal(after, steps[5].observation)
    for t in range(3):
        before, now = steps[t + 2], steps[t + 3]
        np.testing.assert_array_equal(rows.obs_tm1[t], before.observation)
        np.testing.assert_array_equal(rows.a_tm1[t], actions[t + 2])
        np.testing.assert_array_equal(rows.r_t[t], now.r_t)
        np.testing.assert_array_equal(rows.discount_t[t], DISCOUNT * now.discount_t)
    # Cut, reset, cut; and: starts over, goes on, ends.
    assert rows.truncation_t.T.tolist() == [[True, False, True], [False] * 3]
    assert rows.mask_t.T.tolist() == [[True, False, True], [False, True, True]]


# --- Acting ---------------------------------------------------------------------------


def test_epsilon_falls_with_the_steps_of_all_environments_together():
    flags = {"environments": 10, "epsilon": 0.1, "epsilon_steps": 50}
    rules = make_rules(LINEAR, **flags, minibatches=1)
    q_values = np.tile([1.0, 0.0], (2000, 1)).astype(np.float32)
    explore = jax.jit(rules.explore)
    explored = [np.mean(explore(q_values, np.int32(t))) for t in (0, 4, 5, 9)]
    # Half of the random actions are the best one.
    np.testing.assert_allclose(explored, [0.5, 0.14, 0.05, 0.05], atol=0.03)


def test_to_exploit_is_to_take_the_best_action():
    flipped = Network(LINEAR.init, lambda p, o: -first_action_is_best(p, o))
    for network, best in ((LINEAR, 0), (flipped, 1)):
        rules = make_rules(network)
        seen = loop.Timestep(np.ones((4, 3), np.float32), *np.zeros((4, 4), np.float32))
        actions, _ = rules.exploit(rules.init(), rules.initial_carry(4), seen)
        assert actions.tolist() == [best] * 4


@pytest.mark.usefixtures("ordinary_promotion")
def test_the_step_size_falls_to_zero_over_the_updates_of_the_run():
    flags = {"environments": 2, "rollout": 2, "epochs": 3, "minibatches": 2}
    rules = make_rules(LINEAR, steps=8, learning_rate=0.1, **flags)  # 12 updates
    opt_state, sizes = rules.optimizer.init(jnp.ones(())), []
    optimize = jax.jit(rules.optimizer.update)
    for _ in range(13):
        update, opt_state = optimize(np.float32(1), opt_state)
        sizes.append(-float(update))
    assert sizes[0] == pytest.approx(0.1)
    assert sizes[11] > 1e-4
    assert sizes[12] == pytest.approx(0.0, abs=1e-8)


def test_minibatches_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"minibatches must divide .* = 12, got 5"):
        Config(rollout=4, environments=3, minibatches=5)

import itertools
import types

import dm_env
import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
import sources
from dm_env import specs
from loop import Engine, Environments, Every, Interaction


class Counter(dm_env.Environment):
    """Observes a count that never repeats, in episodes of a few steps.

    Args:
        start: the count starts after it.
        length: steps in an episode.
        end: how it ends.
    """

    def __init__(self, start=0, length=3, end=dm_env.termination):
        self.count, self.length, self.end = start, length, end
        self.left, self.actions = 0, []

    def reset(self):
        self.count, self.left = self.count + 1, self.length
        return dm_env.restart(self.observe())

    def step(self, action):
        if not self.left:
            return self.reset()
        self.actions.append(action)
        self.count, self.left = self.count + 1, self.left - 1
        make = dm_env.transition if self.left else self.end
        return make(10.0 * self.count, self.observe())

    def observe(self):
        return np.float32(self.count)

    def save(self):
        return [self.count, self.left]

    def load(self, saved):
        self.count, self.left = saved

    def observation_spec(self):
        return specs.Array((), np.float32)

    def action_spec(self):
        return specs.DiscreteArray(2)


def counting_agent(explore=0, exploit=1):
    """Its state is the number of timesteps it has taken in."""
    everywhere = lambda timestep, action: jnp.full(timestep.first.shape, action)
    return loop.Agent(
        types.SimpleNamespace(
            init=lambda: jnp.int32(0),
            step=lambda state, timestep: (
                state + 1,
                everywhere(timestep, explore),
                {"seen": state, "observed": timestep.observation.sum()},
            ),
            initial_carry=jnp.zeros,
            exploit=lambda state, carry, timestep: (
                everywhere(timestep, exploit),
                carry + 1,
            ),
        )
    )


def timesteps(envs, count):
    found = [envs.reset()]
    while len(found) < count:
        found.append(envs.step(np.zeros(len(envs), int)))
    return jax.tree.map(lambda *rows: np.stack(rows), *found)


# --- The source ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "discount"), [(dm_env.termination, 0.0), (dm_env.truncation, 1.0)]
)
def test_episodes_keep_their_last_observation_and_their_discount(end, discount):
    seen = timesteps(Environments([Counter(length=2, end=end)]), 7)
    assert seen.observation[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert seen.first[:, 0].tolist() == [True, False, False, True, False, False, True]
    assert seen.last[:, 0].tolist() == [False, False, True, False, False, True, False]
    assert seen.r_t[:, 0].tolist() == [0, 20, 30, 0, 50, 60, 0]
    assert seen.discount_t[:, 0].tolist() == [1, 1, discount, 1, 1, discount, 1]


def test_environments_end_their_episodes_each_by_itself():
    envs = Environments([Counter(length=1), Counter(100, length=3)])
    seen = timesteps(envs, 5)
    assert seen.observation.tolist() == [[i + 1, i + 101] for i in range(5)]
    assert seen.first.T.astype(int).tolist() == [[1, 0, 1, 0, 1], [1, 0, 0, 0, 1]]
    assert seen.last.T.astype(int).tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 0]]


def test_each_environment_takes_its_own_action():
    pair = [Counter(), Counter()]
    envs = Environments(pair)
    envs.reset()
    envs.step(np.array([0, 1]))
    assert [env.actions for env in pair] == [[0], [1]]
    envs.step(np.array([[0.5], [0.25]], np.float32))
    assert [env.actions[-1].tolist() for env in pair] == [[0.5], [0.25]]


def test_an_example_has_the_shapes_of_a_timestep_and_takes_no_step():
    envs = Environments([Counter(), Counter()])
    example = envs.example()
    for a, b in zip(example, envs.reset(), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert envs.save() == [[1, 3], [1, 3]]


# --- The iterator -------------------------------------------------------------------


def test_the_agent_sees_every_timestep_once_and_its_actions_are_taken():
    env, agent = Counter(length=2), counting_agent(explore=1)
    events = list(itertools.islice(Interaction(Environments([env]), agent), 7))
    assert [int(event.metrics["seen"]) for event in events] == [*range(7)]
    assert [int(event.metrics["observed"]) for event in events] == [*range(1, 8)]
    assert env.actions == [1] * 4  # none where an episode starts
    assert agent.state == 7


def test_only_transitions_count_as_steps():
    envs = Environments([Counter(length=1), Counter(length=3)])
    events = itertools.islice(Interaction(envs, counting_agent()), 5)
    assert [event.steps for event in events] == [0, 2, 1, 2, 0]


def test_an_interaction_goes_on_from_where_it_was_saved():
    make = lambda: Interaction(
        Environments([Counter(), Counter(7, length=2)]), counting_agent()
    )
    events = make()
    fresh = make().save()
    for _ in range(4):
        next(events)
    saved = events.save()
    expected = [next(events).timestep for _ in range(3)]
    other = make()
    other.load(saved)
    found = [next(other).timestep for _ in range(3)]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    other.load(fresh)
    assert next(other).timestep.first.all()


# --- The engine ---------------------------------------------------------------------


class Sum:
    """A meter: the steps it was shown."""

    def __init__(self):
        self.steps = 0

    def update(self, event):
        self.steps += event.steps

    def save(self):
        return self.steps

    def load(self, saved):
        self.steps = saved


def make_engine(hooks=(), envs=None):
    envs = Environments(envs or [Counter(length=2)])
    return Engine(Interaction(envs, counting_agent()), [Sum()], hooks)


def test_hooks_are_called_before_the_first_event_and_after_each():
    steps = []
    engine = make_engine([lambda engine: steps.append(engine.steps)])
    engine.run(4)
    # Two steps, a reset, two steps.
    assert steps == [0, 0, 1, 2, 2, 3, 4]
    assert engine.meters[0].steps == 4


def test_something_is_done_once_for_each_multiple_of_a_period_and_in_the_end():
    steps = []
    engine = make_engine([Every(3, lambda engine: steps.append(engine.steps))])
    engine.run(8)
    assert steps == [0, 3, 6, 8]


def test_a_period_is_not_missed_when_many_environments_step_over_it():
    steps = []
    every = Every(3, lambda engine: steps.append(engine.steps))
    engine = make_engine([every], [Counter(length=4) for _ in range(4)])
    engine.run(16)
    assert steps == [0, 4, 8, 12, 16]


def test_a_hook_can_stop_a_run():
    def stop(engine):
        engine.stopped = engine.steps == 3

    engine = make_engine([stop])
    engine.run(100)
    assert engine.steps == 3


def test_an_engine_goes_on_without_a_second_beginning():
    steps = []
    first = make_engine()
    first.run(3)
    second = make_engine([Every(2, lambda engine: steps.append(engine.steps))])
    second.load(first.save())
    second.run(6)
    assert steps == [4, 6]
    assert second.meters[0].steps == 6


# --- Evaluation ---------------------------------------------------------------------


def test_evaluation_is_the_mean_return_of_one_episode_each():
    pair = [Counter(length=1), Counter(10, length=2)]
    agent = counting_agent(exploit=1)
    # 10 * 2 and 10 * (12 + 13); the first one plays on meanwhile, which does not count.
    assert loop.evaluate(Environments(pair), agent) == (20 + 250) / 2
    assert {action for env in pair for action in env.actions} == {1}
    assert agent.state == 0


def test_the_best_actions_are_those_of_exploit_with_its_memory():
    agent = counting_agent()
    agent._exploit = lambda state, carry, timestep: (carry, carry + 1)
    act = loop.best_actions(agent)
    assert [act(dm_env.restart(np.float32(0))) for _ in range(3)] == [0, 1, 2]


# --- What is stored -----------------------------------------------------------------


def test_a_replay_keeps_the_newest_rows_and_only_valid_ones(rng):
    replay = sources.Replay(capacity=5, batch_size=1)
    stored, kept = replay.init({"x": jnp.zeros(2), "n": 0}), []
    add = jax.jit(replay.add)
    for start in range(0, 30, 3):
        n = np.arange(start, start + 3)
        valid = rng.random(3) < 0.6
        rows = {"x": np.stack([n, -n], 1).astype(np.float32), "n": n}
        stored = add(stored, rows, valid)
        kept = [*kept, *n[valid].tolist()][-5:]
        size = int(stored.size)
        assert size == len(kept)
        assert sorted(stored.rows["n"][:size].tolist()) == sorted(kept)
        np.testing.assert_array_equal(stored.rows["x"][:, 1], -stored.rows["n"])
    assert stored.rows["n"][int(stored.next) - 1] == kept[-1]


def test_a_replay_draws_each_row_alike_and_no_empty_one():
    replay = sources.Replay(capacity=10, batch_size=6000)
    rows = jnp.arange(1, 5)
    stored = replay.add(replay.init(0), rows, rows > 0)
    drawn = np.bincount(replay.sample(jax.random.key(0), stored), minlength=11)
    assert drawn[0] == drawn[5:].sum() == 0
    # Binomial with a standard deviation of 34.
    np.testing.assert_allclose(drawn[1:5], 1500, atol=135)


def test_a_replay_has_room_for_a_row_of_each_environment():
    replay = sources.Replay(capacity=2, batch_size=1)
    with pytest.raises(ValueError, match="capacity must be 3 or more"):
        replay.add(replay.init(0), jnp.arange(3), jnp.ones(3, bool))


def test_a_rollout_holds_its_rows_in_order_and_says_when_it_is_full():
    rollout = sources.Rollout(3)
    stored, full = rollout.init({"x": jnp.zeros((2, 4))}), []
    for step in range(7):
        stored = rollout.add(stored, {"x": jnp.full((2, 4), step)}, jnp.int32(step))
        full.append(bool(rollout.is_full(jnp.int32(step))))
        if full[-1]:
            assert stored["x"][:, 0, 0].tolist() == [step - 2, step - 1, step]
    assert stored["x"].shape == (3, 2, 4)
    assert full == [False, False, True, False, False, True, False]

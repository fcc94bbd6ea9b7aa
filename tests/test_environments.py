import doctest
import io
import json
import sys
import types

import catch
import cliff
import dm_env
import environments
import episodic
import gymnasium
import numpy as np
import probes
import pytest
import recall
import rendering
from absl.testing import absltest
from catch import Catch
from cliff import Cliff
from dm_env import specs, test_utils
from gym_adapter import GymAdapter
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from probes import Probe
from recall import Recall
from rich.console import Console

LEFT, STAY, RIGHT = range(3)


def play(env, policy):
    """Plays an episode; returns its timesteps."""
    timesteps = [env.reset()]
    while not timesteps[-1].last():
        timesteps.append(env.step(policy(timesteps[-1].observation)))
    return timesteps


def returns(env, policy, episodes=1):
    """Plays episodes; returns their returns."""
    plays = (play(env, policy) for _ in range(episodes))
    return [sum(timestep.reward for timestep in timesteps[1:]) for timesteps in plays]


class Walk(dm_env.Environment):
    """Stands for the environments of others: draws on one generator all its life."""

    def __init__(self, seed=0, length=4):
        self.rng, self.length, self.left = np.random.default_rng(seed), length, 0
        self.place = np.zeros(2)

    def reset(self):
        self.left, self.place = self.length, self.rng.normal(size=2)
        return dm_env.restart(self.observe())

    def step(self, action):
        if not self.left:
            return self.reset()
        self.left -= 1
        self.place = self.place + action + self.rng.normal(size=2)
        make = dm_env.transition if self.left else dm_env.truncation
        return make(float(np.cos(self.place @ action)), self.observe())

    def observe(self):
        return {"place": self.place, "left": self.left, "even": self.left % 2}

    def observation_spec(self):
        return {
            "place": specs.Array((2,), np.float64),
            "left": specs.Array((), np.int64),
            "even": specs.DiscreteArray(2, np.int64),
        }

    def action_spec(self):
        return specs.BoundedArray((2,), np.float64, -1.0, 1.0)

    def close(self):
        self.closed = True


# --- What all keep ------------------------------------------------------------------


KINDS = {
    "Catch": lambda seed: Catch(rows=4, seed=seed),
    "Cliff": lambda seed: Cliff(time_limit=5, seed=seed),
    "Recall": lambda seed: Recall(delay=1, num_cues=3, seed=seed),
    "Probe": probes.reward_by_memory,
    "continuous Probe": lambda seed: probes.reward_by_memory(seed, continuous=True),
    "CartPole": lambda seed: environments.make("CartPole-v1", seed),
    "slippery FrozenLake": lambda seed: environments.make("FrozenLake-v1", seed),
    "Pendulum": lambda seed: GymAdapter(
        gymnasium.make("Pendulum-v1", max_episode_steps=5), seed
    ),
    "Foreign": lambda seed: environments.Foreign(Walk, seed),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def draw_action(rng, spec):
    if isinstance(spec, specs.DiscreteArray):
        return int(rng.integers(spec.num_values))
    return rng.uniform(spec.minimum, spec.maximum, spec.shape).astype(spec.dtype)


def is_same(a, b):
    if a is None or b is None:
        return a is b
    assert a.observation.dtype == b.observation.dtype == np.float32
    return a[:3] == b[:3] and a.observation.tobytes() == b.observation.tobytes()


def through_json(data):
    copy = json.loads(json.dumps(data, allow_nan=False))
    assert copy == data
    return copy


@kinds
def test_a_loaded_environment_goes_on_bit_by_bit_as_the_saved_one(make):
    rng, env, last, ends = np.random.default_rng(0), make(3), None, 0
    actions = [draw_action(rng, env.action_spec()) for _ in range(80)]
    data, timesteps = [], []
    for action in actions:
        data.append(through_json(env.save()))
        timesteps.append(last)
        last = env.step(action)
        ends += last.last()
    assert ends > 1  # so that it was saved before, within and at the end of episodes
    for start in range(30):
        other = make(4)
        assert is_same(other.load(data[start]), timesteps[start])
        assert other.save() == data[start]
        for action, timestep in zip(
            actions[start:60], timesteps[start + 1 : 61], strict=True
        ):
            assert is_same(other.step(action), timestep)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**31 - 1),
    resets=st.lists(st.booleans(), max_size=12),
    used=st.integers(0, 7),
)
def test_resets_in_between_are_kept_and_what_was_before_loading_is_not(
    name, seed, resets, used
):
    make, rng = KINDS[name], np.random.default_rng(0)
    env, other = make(seed), make(0)
    spec, last = env.action_spec(), None
    for reset in resets:
        last = env.reset() if reset else env.step(draw_action(rng, spec))
    for _ in range(used):
        other.step(draw_action(rng, spec))
    assert is_same(other.load(through_json(env.save())), last)
    for _ in range(12):
        action = draw_action(rng, spec)
        assert is_same(other.step(action), env.step(action))


@kinds
def test_one_seed_gives_one_stream_and_another_seed_another(make):
    def stream(seed):
        rng, env = np.random.default_rng(0), make(seed)
        spec = env.action_spec()
        timesteps = [env.step(draw_action(rng, spec)) for _ in range(50)]
        return [(*t[:3], t.observation.tobytes()) for t in timesteps]

    assert stream(1) == stream(1)
    if make is not KINDS["Cliff"]:  # in which nothing is random
        assert stream(1) != stream(2)


@kinds
def test_what_is_saved_does_not_change_with_what_follows(make):
    env = make(0)
    action = env.action_spec().generate_value()
    env.reset(), env.step(action)
    data = env.save()
    copy = through_json(data)
    env.step(action)
    assert data == copy
    assert env.save() != copy


def test_what_another_kind_of_environment_saved_is_refused():
    env = Catch()
    env.reset(), env.step(RIGHT)
    with pytest.raises(ValueError, match="environment of another kind"):
        Cliff().load(env.save())


def test_an_environment_that_does_not_repeat_itself_is_found_out():
    env = environments.Foreign(lambda seed: Walk(seed=None))
    env.reset()
    with pytest.raises(ValueError, match="random that its seed does not decide"):
        env.load(env.save())


def test_an_action_that_was_refused_is_not_repeated():
    env = Catch()
    env.reset()
    with pytest.raises(ValueError, match="action must be"):
        env.step(3)
    assert env.save()["actions"] == []


class TestCliffKeepsThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return Cliff(time_limit=7)


class TestRecallKeepsThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return Recall()


class TestProbesKeepThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return probes.reward_by_memory()


class TestContinuousProbesKeepThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return probes.reward_by_action(continuous=True)


class TestForeignEnvironmentsKeepThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return environments.Foreign(Walk)


class TestPendulumKeepsThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return GymAdapter(gymnasium.make("Pendulum-v1", max_episode_steps=7))


@pytest.mark.parametrize("module", [catch, cliff, episodic, probes, recall])
def test_examples_in_the_docstrings_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# --- By name ------------------------------------------------------------------------


@pytest.fixture
def others(monkeypatch):
    """A module of somebody else, to import from."""
    module = types.ModuleType("others")
    module.Walk, module.walk, module.Object = Walk, lambda: Walk(7), object
    monkeypatch.setitem(sys.modules, "others", module)
    return module


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Catch", Catch),
        ("Cliff", Cliff),
        ("Recall", Recall),
        ("catch:Catch", Catch),
        ("probes:cut_short", Probe),
        ("others:Walk", environments.Foreign),
        ("CartPole-v1", GymAdapter),
        ("gymnasium:CartPole-v1", GymAdapter),  # a module to import, and an id
    ],
)
def test_a_name_gives_an_environment_with_the_seed(others, name, kind):
    env = environments.make(name, 5)
    assert type(env) is kind
    assert env.save()["seed"] == 5


def test_a_factory_gets_the_seed_if_it_takes_one(others):
    place = lambda name, seed: environments.make(name, seed).reset().observation
    expected = lambda seed: Walk(seed).reset().observation["place"].astype(np.float32)
    np.testing.assert_array_equal(place("others:Walk", 2)[-2:], expected(2))
    np.testing.assert_array_equal(place("others:walk", 2)[-2:], expected(7))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Nope-v0", "exist"),
        ("", "Malformed"),
        ("nowhere:Walk", "No module named 'nowhere'"),
        ("others:Run", "no attribute 'Run'"),
        ("others:Object", "it is no dm_env.Environment"),
        ("json:dumps", "missing 1 required"),
        ("bsuite/catch/0", "pip install bsuite"),
        ("others:Text", "observations must be numbers"),
        ("others:Two", "actions must be one array"),
    ],
)
def test_a_name_of_no_use_is_refused_with_the_reason(others, monkeypatch, name, reason):
    monkeypatch.setitem(sys.modules, "bsuite", None)
    others.Text, others.Two = type("Text", (Walk,), {}), type("Two", (Walk,), {})
    others.Text.observation_spec = lambda self: {"text": specs.StringArray(())}
    others.Two.action_spec = lambda self: [specs.DiscreteArray(2)] * 2
    with pytest.raises(ValueError, match="cannot use environment") as refusal:
        environments.make(name, 0)
    assert str(refusal.value).startswith(f"cannot use environment {name!r}: ")
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_experiments_of_bsuite_get_their_settings_and_the_seed(monkeypatch):
    package, sweep = types.ModuleType("bsuite.bsuite"), types.ModuleType("bsuite.sweep")
    package.EXPERIMENT_NAME_TO_ENVIRONMENT = {"walk": Walk}
    sweep.SETTINGS = {"walk/3": {"length": 2, "seed": None}}
    for module in (types.ModuleType("bsuite"), package, sweep):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    env = environments.make("bsuite/walk/3", 5)
    assert len(play(env, lambda _: np.zeros(2))) == 3
    assert env.load(env.save()).last()
    with pytest.raises(ValueError, match="bsuite has no such experiment"):
        environments.make("bsuite/walk/4", 5)


def test_an_experiment_of_bsuite_can_be_saved():
    pytest.importorskip("bsuite")
    env, other = (environments.make("bsuite/catch/0", seed) for seed in (1, 2))
    for _ in range(25):
        env.step(STAY)
    other.load(through_json(env.save()))
    assert all(is_same(env.step(RIGHT), other.step(RIGHT)) for _ in range(50))


def test_observations_of_others_become_one_array_of_floats():
    env = environments.Foreign(lambda seed: Walk(seed, length=3))
    timestep, place = env.reset(), env.env.place.astype(np.float32)
    # In the order of the names: even (one-hot), left, place.
    np.testing.assert_array_equal(timestep.observation, [0.0, 1.0, 3.0, *place])
    assert env.observation_spec().shape == (5,)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int64, np.float32, np.float64, np.bool_]
)
def test_an_observation_that_is_one_array_keeps_its_shape_and_is_a_copy(dtype):
    class Picture(Walk):
        picture = np.ones((1, 3), dtype)
        observe = lambda self: self.picture
        observation_spec = lambda self: specs.Array((1, 3), dtype)

    env = environments.Foreign(Picture)
    observation = env.reset().observation
    Picture.picture[:] = 0
    assert observation.dtype == env.observation_spec().dtype == np.float32
    assert observation.tolist() == [[1.0, 1.0, 1.0]]
    assert env.observation_spec().shape == (1, 3)


def test_what_is_loaded_takes_the_place_of_what_was_there():
    env = environments.Foreign(Walk)
    before = env.env
    env.load(env.save())
    assert before.closed


# --- Catch --------------------------------------------------------------------------


class TestCatchKeepsThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return Catch(rows=4, columns=3)


def chase(board):
    """Plays perfectly: walks towards the ball, which is the highest thing to see."""
    ball, paddle = board.argmax() % board.shape[1], board[-1].argmax()
    return int(np.sign(ball - paddle)) + 1


def test_an_episode_of_catch_ends_when_the_ball_reaches_the_bottom_row():
    env = Catch(rows=10, columns=5)
    env.reset()
    timesteps = [env.step(STAY) for _ in range(9)]
    assert [t.last() for t in timesteps] == [False] * 8 + [True]
    assert [t.discount for t in timesteps] == [1.0] * 8 + [0.0]
    assert [t.reward for t in timesteps[:-1]] == [0.0] * 8


def test_catch_rewards_the_paddle_under_the_ball_and_nothing_else():
    env, rewards = Catch(), {}
    for _ in range(100):
        first = env.reset()
        *_, last = (env.step(STAY) for _ in range(9))
        rewards[int(first.observation[0].argmax())] = last.reward
    assert rewards == {0: -1.0, 1: -1.0, 2: 1.0, 3: -1.0, 4: -1.0}


def test_a_perfect_player_catches_every_ball():
    assert returns(Catch(), chase, 50) == [1.0] * 50


def test_the_ball_of_catch_falls_straight_down_one_row_a_step():
    env = Catch(seed=3)
    first = env.reset()
    column = first.observation[0].argmax()
    for row in range(1, 9):
        assert np.argwhere(env.step(LEFT).observation)[0].tolist() == [row, column]


def test_the_paddle_of_catch_moves_by_one_and_stops_at_the_walls():
    def columns(action):
        env = Catch()
        timesteps = [env.reset(), *(env.step(action) for _ in range(4))]
        return [int(t.observation[-1].argmax()) for t in timesteps]

    assert columns(LEFT) == [2, 1, 0, 0, 0]
    assert columns(STAY) == [2, 2, 2, 2, 2]
    assert columns(RIGHT) == [2, 3, 4, 4, 4]


def test_the_seed_of_catch_decides_its_balls():
    def balls(seed):
        env = Catch(seed=seed)
        return [int(env.reset().observation[0].argmax()) for _ in range(50)]

    assert balls(0) == balls(0)
    assert balls(0) != balls(1)
    assert set(balls(0)) == {0, 1, 2, 3, 4}


def test_catch_never_changes_an_observation_it_has_given():
    env = Catch()
    first = env.reset().observation
    before = first.copy()
    for _ in range(20):
        env.step(LEFT)
    np.testing.assert_array_equal(first, before)


def test_catch_refuses_an_action_it_does_not_have():
    env = Catch()
    env.reset()
    with pytest.raises(ValueError, match=r"action must be 0, 1 or 2, got 3"):
        env.step(3)


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (10, 0)])
def test_catch_refuses_a_board_without_room(rows, columns):
    with pytest.raises(ValueError, match=f"got {rows} x {columns}"):
        Catch(rows, columns)


def test_catch_draws_what_it_observes():
    env = Catch(rows=3, columns=4, seed=1)
    for timestep in map(env.step, [LEFT, RIGHT, RIGHT]):
        drawn = [[mark != "." for mark in line] for line in env.render().split("\n")]
        np.testing.assert_array_equal(drawn, timestep.observation == 1)


# --- Cliff walking ------------------------------------------------------------------


UP, EAST, DOWN, WEST = range(4)


def walk(actions, **options):
    """Walks; returns the cells, the rewards and the last timestep."""
    env = Cliff(**options)
    timesteps = [env.reset(), *map(env.step, actions)]
    for timestep in timesteps:
        assert sorted(timestep.observation.ravel())[-2:] == [0.0, 1.0]
    cells = [np.argwhere(t.observation)[0].tolist() for t in timesteps]
    return cells, [t.reward for t in timesteps[1:]], timesteps[-1]


def test_the_way_along_the_cliff_terminates_at_the_goal_and_returns_minus_13():
    cells, rewards, last = walk([UP, *[EAST] * 11, DOWN])
    assert cells == [[3, 0], *([2, column] for column in range(12)), [3, 11]]
    assert rewards == [-1.0] * 13
    assert last.last()
    assert last.discount == 0.0


@pytest.mark.parametrize("column", range(1, 11))
def test_a_fall_costs_100_and_leads_back_to_the_start_without_an_end(column):
    cells, rewards, last = walk([UP, *[EAST] * column, DOWN])
    assert cells[-2:] == [[2, column], [3, 0]]
    assert rewards == [-1.0] * (column + 1) + [-100.0]
    assert last.mid()
    assert last.discount == 1.0


def test_walls_stop_the_walker():
    cells, rewards, _ = walk([WEST, DOWN, UP, UP, UP, UP, *[EAST] * 12])
    assert cells[:3] == [[3, 0]] * 3
    assert cells[5:7] == [[0, 0]] * 2
    assert cells[-2:] == [[0, 11]] * 2
    assert set(rewards) == {-1.0}


def test_the_time_limit_of_the_cliff_truncates_and_the_goal_terminates_even_then():
    *_, last = walk([UP] * 13, time_limit=13)
    assert (last.last(), last.discount) == (True, 1.0)
    *_, last = walk([UP, *[EAST] * 11, DOWN], time_limit=13)
    assert (last.last(), last.discount) == (True, 0.0)
    assert len(play(Cliff(), lambda _: UP)) == 201


def test_the_cliff_draws_what_it_observes():
    env = Cliff()
    for timestep in map(env.step, [UP, UP, EAST, EAST, DOWN]):
        drawn = [[mark == "@" for mark in line] for line in env.render().split("\n")]
        np.testing.assert_array_equal(drawn, timestep.observation == 1)
    assert (
        env.render().split()[-1] == ("." if drawn[3][0] == 0 else "@") + "x" * 10 + "G"
    )


# --- Recall -------------------------------------------------------------------------


@pytest.mark.parametrize(("delay", "num_cues"), [(0, 2), (5, 2), (3, 4)])
def test_who_remembers_the_cue_returns_one(delay, num_cues):
    env = Recall(delay, num_cues)
    for _ in range(20):
        cue = int(env.reset().observation.argmax())
        timesteps = [env.step(cue) for _ in range(delay + 2)]
        assert [t.reward for t in timesteps] == [0.0] * (delay + 1) + [1.0]
        assert [t.discount for t in timesteps] == [1.0] * (delay + 1) + [0.0]


def test_only_the_first_observation_tells_the_cue():
    env, later, rewards = Recall(delay=3, num_cues=3), set(), {}
    for episode in range(60):
        action = episode % 3
        first, *others, last = play(env, lambda _, action=action: action)
        later.add(tuple(tuple(t.observation.tolist()) for t in [*others, last]))
        cue = int(first.observation.argmax())
        assert first.observation.tolist() == np.eye(4)[cue].tolist()
        rewards[cue, action] = last.reward
    blank, flag = (0.0,) * 4, (0.0, 0.0, 0.0, 1.0)
    assert later == {(blank, blank, blank, flag, blank)}
    assert rewards == {
        (cue, action): 1.0 if cue == action else -1.0
        for cue in range(3)
        for action in range(3)
    }


def test_cues_are_equally_likely():
    env = Recall()
    cues = [env.reset().observation[0] for _ in range(1000)]
    np.testing.assert_allclose(np.mean(cues), 0.5, atol=0.06)


def test_recall_draws_what_can_be_seen():
    env, drawn = Recall(delay=2, num_cues=5), []
    for _ in range(5):
        timestep = env.step(0)
        drawn.append(env.render())
        if timestep.first():
            cue = timestep.observation.argmax()
    assert drawn == [str(cue), ".", ".", "?", "."]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recall(delay=-1), "Recall: delay must be 0 or more, got -1"),
        (lambda: Recall(num_cues=1), "Recall: num_cues must be 2 or more, got 1"),
        (lambda: Cliff(time_limit=0), "Cliff: time_limit must be 1 or more, got 0"),
    ],
)
def test_an_environment_without_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("env", "action", "message"),
    [
        (Cliff(), 4, "Cliff: action must be 0, 1, 2 or 3, got 4"),
        (Recall(num_cues=3), -1, "Recall: action must be 0 to 2, got -1"),
        (probes.cut_short(), 2, "Probe: action must be 0 or 1, got 2"),
        (probes.cut_short(continuous=True), [1.5], r"must lie in \[-1, 1\], got \[1.5"),
    ],
)
def test_an_action_that_there_is_not_is_refused(env, action, message):
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(action)


# --- Probes -------------------------------------------------------------------------


SIGNED = [[1.0, -1.0], [-1.0, 1.0]]
EXACT = {  # with a discount of 0.25: `q[time][sign][action]`
    "constant_reward": [[[1.0, 1.0], [1.0, 1.0]]],
    "reward_by_observation": [[[-1.0, -1.0], [1.0, 1.0]]],
    "delayed_reward": [[[0.25, 0.25], [0.25, 0.25]], [[1.0, 1.0], [1.0, 1.0]]],
    "reward_by_action": [SIGNED],
    "reward_by_memory": [[[0.25, 0.25], [0.25, 0.25]], SIGNED],
    "cut_short": [[[4 / 3, 4 / 3], [4 / 3, 4 / 3]]],
}
each_probe = pytest.mark.parametrize("name", EXACT)


@each_probe
def test_the_exact_values_are_those_worked_out_by_hand(name):
    q = getattr(probes, name)().action_values(0.25)
    np.testing.assert_allclose(q, EXACT[name], rtol=1e-15)


@each_probe
@pytest.mark.parametrize("first_action", [0, 1])
def test_acting_best_after_the_first_action_earns_its_exact_value(name, first_action):
    env, discount = getattr(probes, name)(), 0.25
    q, signs = env.action_values(discount), set()
    for _ in range(20):
        timestep = env.reset()
        sign = int(timestep.observation[1] > 0)
        signs.add(sign)
        rewards, action = [], first_action
        for time in range(100):
            timestep = env.step(action)
            rewards.append(timestep.reward)
            if timestep.last() and timestep.discount == 0:
                break
            if timestep.last():  # cut, where it would have gone on as it began
                env.reset()
            action = q[min(time + 1, len(q) - 1), sign].argmax()
        earned = sum(discount**i * reward for i, reward in enumerate(rewards))
        np.testing.assert_allclose(earned, q[0, sign, first_action], rtol=1e-12)
    assert signs == {0, 1}


@pytest.mark.parametrize("continuous", [False, True])
def test_one_agent_fits_all_probes(continuous):
    envs = [getattr(probes, name)(continuous=continuous) for name in EXACT]
    assert len({repr(env.observation_spec()) for env in envs}) == 1
    assert len({repr(env.action_spec()) for env in envs}) == 1


def test_a_limit_that_cannot_be_seen_changes_nothing_in_the_observation():
    first, last = play(probes.cut_short(), lambda _: 0)
    assert last.discount == 1.0
    np.testing.assert_array_equal(first.observation, last.observation)


def test_the_memory_probe_shows_its_sign_once_and_then_asks_for_it():
    env, shown = probes.reward_by_memory(), set()
    for _ in range(20):
        shown.add(tuple(tuple(t.observation.tolist()) for t in play(env, lambda _: 0)))
    assert shown == {
        ((0.0, sign, 0.0), (1.0, 0.0, 1.0), (2.0, 0.0, 0.0)) for sign in (-1.0, 1.0)
    }


def test_the_best_continuous_action_is_half_the_sign_and_earns_one():
    env = probes.reward_by_action(continuous=True)
    for _ in range(10):
        sign = env.reset().observation[1]
        assert env.step(np.array([sign / 2], np.float32)).reward == 1.0
        env.reset()
    for action in np.linspace(-1, 1, 9, dtype=np.float32):
        sign = env.reset().observation[1]
        reward = env.step(action[None]).reward
        np.testing.assert_allclose(reward, 1 - (action - sign / 2) ** 2, rtol=1e-6)


def test_continuous_probes_have_no_table_of_values():
    with pytest.raises(ValueError, match="there must be two actions"):
        probes.cut_short(continuous=True).action_values(0.5)


# --- Gymnasium ----------------------------------------------------------------------


class TestCartPoleKeepsThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return environments.make("CartPole-v1", 0)


class Script(gymnasium.Env):
    """Says of each step what it is told to."""

    def __init__(self, flags, observations=None, actions=None):
        self.flags, self.taken, self.seeds = flags, [], []
        self.observation_space = observations or spaces.Discrete(3)
        self.action_space = actions or spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.taken.append(action)
        terminated, truncated = self.flags
        return self.observation_space.sample(), 1, terminated, truncated, {}


@pytest.mark.parametrize(
    ("flags", "step_type", "discount"),
    [
        ((False, False), dm_env.StepType.MID, 1.0),
        ((True, False), dm_env.StepType.LAST, 0.0),
        ((False, True), dm_env.StepType.LAST, 1.0),
        ((True, True), dm_env.StepType.LAST, 0.0),
    ],
)
def test_gymnasium_flags_become_a_step_type_and_a_discount(flags, step_type, discount):
    env = GymAdapter(Script(flags))
    env.reset()
    timestep = env.step(0)
    assert (timestep.step_type, timestep.discount) == (step_type, discount)


def test_cartpole_is_truncated_at_its_time_limit_and_terminated_by_a_fall():
    env = GymAdapter(gymnasium.make("CartPole-v1", max_episode_steps=3))
    *_, cut = play(env, lambda _: 0)
    *_, fallen = play(environments.make("CartPole-v1", 0), lambda _: 0)
    assert (cut.discount, fallen.discount) == (1.0, 0.0)
    fall = 0.2095  # this angle is one
    assert abs(fallen.observation[2]) > fall > abs(cut.observation[2])


def test_gymnasium_observations_are_flattened():
    pair = spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2, 2), np.float64)])
    env = GymAdapter(Script((False, False), observations=pair))
    observation = env.reset().observation
    assert observation.shape == env.observation_spec().shape == (7,)
    assert observation.dtype == env.observation_spec().dtype == np.float32
    assert sorted(observation[:3]) == [0.0, 0.0, 1.0]


def test_gymnasium_actions_are_counted_from_zero():
    script = Script((False, False), actions=spaces.Discrete(2, start=5))
    env = GymAdapter(script)
    env.reset()
    env.step(0), env.step(1)
    assert env.action_spec().num_values == 2
    assert script.taken == [5, 6]


def test_continuous_gymnasium_actions_are_handed_on_as_they_come():
    box = spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, np.inf]), dtype=np.float64)
    script = Script((False, False), actions=box)
    env = GymAdapter(script)
    spec = env.action_spec()
    assert (spec.shape, spec.dtype) == ((2,), np.float32)
    np.testing.assert_array_equal(spec.minimum, [-2.0, 0.0])
    np.testing.assert_array_equal(spec.maximum, [2.0, np.inf])
    env.reset()
    env.step(np.array([0.1, -3.0], np.float32))  # the second lies out of bounds
    (taken,) = script.taken
    assert taken.dtype == np.float64
    np.testing.assert_array_equal(taken, np.array([0.1, -3.0], np.float32))


@pytest.mark.parametrize(
    "actions",
    [spaces.MultiDiscrete([2, 3]), spaces.Box(0, 9, (1,), np.int32)],
    ids=["several", "integers"],
)
def test_other_gymnasium_actions_are_refused(actions):
    with pytest.raises(ValueError, match="must be discrete or a Box of floats, got"):
        GymAdapter(Script((False, False), actions=actions))


def test_every_episode_has_a_seed_of_its_own():
    def seeds(seed):
        script = Script((True, False))
        env = GymAdapter(script, seed)
        env.reset(), env.step(0), env.step(0)  # the second step starts an episode
        assert script.taken == [0]
        return script.seeds

    first, second = seeds(7)
    assert first != second
    assert seeds(7) == [first, second]
    assert not {first, second} & set(seeds(8))


def test_gymnasium_seeds_decide_the_episodes():
    start = lambda seed: environments.make("CartPole-v1", seed).reset().observation
    np.testing.assert_array_equal(start(1), start(1))
    assert not np.array_equal(start(1), start(2))


# --- To look at ---------------------------------------------------------------------


class Colors(Script):
    """Paints half black and half white, and the other way round."""

    render_mode = "rgb_array"

    def render(self):
        picture = np.zeros((4, 6, 3), np.uint8)
        picture[:, :3] = 255
        return picture if len(self.taken) % 2 else 255 - picture


def test_an_episode_is_shown_from_its_first_timestep_to_its_last():
    frames = list(rendering.play(Cliff(time_limit=3), lambda timestep: UP))
    rows = [[line[0] for line in drawn.split("\n")].index("@") for drawn in frames]
    assert rows == [3, 2, 1, 0]


def test_the_policy_is_asked_with_the_whole_timestep():
    policy = lambda timestep: int(timestep.first())
    env = Recall(delay=0)
    assert len(list(rendering.play(env, policy))) == 3
    assert env.save()["actions"] == [1, 0]


def test_colors_are_written_as_they_are(tmp_path):
    env = GymAdapter(Colors((False, True)))
    frames = list(rendering.play(env, lambda timestep: 0))
    rendering.save_gif(frames, tmp_path / "a.gif", seconds=0.5)
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.n_frames, picture.info["duration"]) == (2, 500)
        assert picture.info["loop"] == 0
        for i, drawn in enumerate(frames):
            picture.seek(i)
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), drawn)


def test_texts_are_written_mark_by_mark(tmp_path):
    rendering.save_gif(["..x\n...", "...\nx.."], tmp_path / "a.gif")
    darkest = []
    with Image.open(tmp_path / "a.gif") as picture:
        for i in range(2):
            picture.seek(i)
            gray = np.asarray(picture.convert("L"), int)
            assert gray.shape == (48, 72)
            ink = (255 - gray).reshape(2, 24, 3, 24).sum((1, 3))
            assert ink.all()
            darkest.append(np.argwhere(ink == ink.max())[0].tolist())
    assert darkest == [[0, 2], [1, 0]]


def test_frames_are_shown_at_the_terminal():
    file = io.StringIO()
    rendering.show(["..x", ".x."], Console(file=file, force_terminal=True), 0.0)
    assert file.getvalue().index("..x") < file.getvalue().index(".x.")


def test_colors_are_shown_at_the_terminal_two_pixels_a_block():
    block = "\x1b[38;2;1;2;3;48;2;4;5;6m▀\x1b[0m"
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[::2], picture[1::2] = (1, 2, 3), (4, 5, 6)

    def shown(**size):
        file = io.StringIO()
        options = {"force_terminal": True, "color_system": "truecolor", **size}
        rendering.show([picture], Console(file=file, **options), 0.0)
        return file.getvalue()

    assert f"{block * 30}\n" * 9 + block * 30 in shown(width=80, height=24)
    lines = shown(width=80, height=6).splitlines()[:5]  # shrunk until there is room
    assert [line.count("▀") for line in lines] == [15] * 5


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("CartPole-v1", None, "made without render_mode"),
        ("CartPole-v1", "rgb_array", "pip install"),
        ("others:Walk", None, "it gives no text and no picture"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(
    others, monkeypatch, name, mode, reason
):
    monkeypatch.setitem(sys.modules, "pygame", None)
    env = environments.make(name, 0, mode)
    with pytest.raises(ValueError, match="cannot draw this environment") as refusal:
        list(rendering.play(env, lambda timestep: 0))
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)

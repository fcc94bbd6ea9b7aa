import dataclasses
import doctest
import itertools
import math
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import dm_env
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from dm_env import specs, test_utils
from gymnasium import spaces

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import catch
import console
import dqn
import loop
from catch import Catch
from gym_adapter import GymAdapter

SCRIPT = dqn.__file__
LEFT, STAY, RIGHT = range(3)


def make_agent(env, **flags):
    config = dqn.Config(**flags)
    rules = dqn.DQN(config, env.observation_spec(), env.action_spec())
    return loop.Agent(rules), rules


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


def test_catch_examples_in_the_docstring_are_true():
    result = doctest.testmod(catch)
    assert result.attempted > 0
    assert result.failed == 0


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
    assert loop.evaluate(Catch(), chase, 50) == 1.0


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


# --- The loop -----------------------------------------------------------------------


class Counter(dm_env.Environment):
    """Observes a count that never repeats, in episodes of three steps."""

    def __init__(self, end=dm_env.termination):
        self.count, self.left, self.end, self.actions = 0, 0, end, []

    def reset(self):
        self.count, self.left = self.count + 1, 3
        return dm_env.restart(self.count)

    def step(self, action):
        if not self.left:
            return self.reset()
        self.actions.append(action)
        self.count, self.left = self.count + 1, self.left - 1
        make = dm_env.transition if self.left else self.end
        return make(10.0 * self.count, self.count)

    def observation_spec(self):
        return specs.Array((), int)

    def action_spec(self):
        return specs.DiscreteArray(2)


def test_no_transition_leads_from_one_episode_into_the_next():
    env = Counter()
    seen = [(t.obs_tm1, t.obs_t) for _ in range(2) for t in loop.episode(env, int)]
    assert seen == [(1, 2), (2, 3), (3, 4), (5, 6), (6, 7), (7, 8)]


def test_the_last_transition_holds_the_true_last_observation():
    env = Counter()
    *_, last = loop.episode(env, int)
    assert last.obs_t == 4
    assert env.reset().observation == 5


def test_a_transition_holds_the_action_taken_and_the_reward_for_it():
    env = Counter()
    transitions = list(loop.episode(env, lambda observation: observation % 2))
    assert [t.a_tm1 for t in transitions] == env.actions == [1, 0, 1]
    assert [t.r_t for t in transitions] == [20.0, 30.0, 40.0]


@pytest.mark.parametrize(
    ("end", "discounts"),
    [(dm_env.termination, [1.0, 1.0, 0.0]), (dm_env.truncation, [1.0, 1.0, 1.0])],
    ids=["terminated", "truncated"],
)
def test_only_termination_takes_the_discount_to_zero(end, discounts):
    episode = loop.episode(Counter(end), int)
    assert [t.discount_t for t in episode] == discounts


def test_the_learning_curve_counts_and_averages():
    rules = types.SimpleNamespace(  # its state is the number of transitions learned
        init=lambda: jnp.int32(0),
        explore=lambda state, observation: 0,
        exploit=lambda state, observation: 1,
        learn=lambda state, transition: state + 1,
    )
    agent, env, test_env = loop.Agent(rules), Counter(), Counter()
    points = list(loop.learning_curve(agent, env, test_env, 5, 2, 1))
    assert [p.episodes for p in points] == [0, 2, 4, 5]
    assert [p.steps for p in points] == [0, 6, 12, 15]
    # The episodes return 10 (2 + 3 + 4), and 120 more each time.
    assert math.isnan(points[0].training_return)
    assert [p.training_return for p in points[1:]] == [150.0, 390.0, 570.0]
    assert [p.evaluation_return for p in points] == [90.0, 210.0, 330.0, 450.0]
    assert set(env.actions) == {0}
    assert set(test_env.actions) == {1}
    assert agent.state == 15


# --- Probes: environments whose values are known ------------------------------------


class Probe(dm_env.Environment):
    """Shows a time and a random sign; rewards what it is told to.

    Args:
        reward: a function of time, sign and action.
        length: steps in an episode.
        end: how it ends.
        clock: whether the observation tells the time.
    """

    def __init__(self, reward, length=1, end=dm_env.termination, clock=True):
        self.reward, self.length, self.end, self.clock = reward, length, end, clock
        self.rng = np.random.default_rng(0)

    def reset(self):
        self.time, self.sign = 0, self.rng.choice([-1.0, 1.0])
        return dm_env.restart(self.observe())

    def step(self, action):
        reward = self.reward(self.time, self.sign, action)
        self.time += 1
        make = self.end if self.time == self.length else dm_env.transition
        return make(float(reward), self.observe())

    def observe(self):
        return np.array([self.time * self.clock, self.sign], np.float32)

    def observation_spec(self):
        return specs.Array((2,), np.float32)

    def action_spec(self):
        return specs.DiscreteArray(2)


@pytest.fixture(scope="module")
def learned_values():
    """Trains the agent on a probe; returns its values as `q[time][sign][action]`."""
    flags = {"discount": 0.5, "hidden": 32, "learning_rate": 1e-3, "target_period": 10}
    agent, rules = make_agent(Probe(None), epsilon=1.0, **flags)
    times, signs = np.mgrid[:2, -1:2:2].astype(np.float32)
    q_values = lambda time, sign: rules.q_values(
        agent.state.params, jnp.stack([time, sign])
    )

    def learn(env):
        agent.state = rules.init()
        for _ in loop.learning_curve(agent, env, env, 1000, 1000, 1):
            pass
        return np.asarray(jnp.vectorize(q_values, signature="(),()->(a)")(times, signs))

    return learn


def test_a_constant_reward_is_the_value(learned_values):
    q = learned_values(Probe(lambda time, sign, action: 1))
    np.testing.assert_allclose(q[0], 1.0, atol=0.05)


def test_a_reward_told_by_the_observation_is_the_value(learned_values):
    q = learned_values(Probe(lambda time, sign, action: sign))
    np.testing.assert_allclose(q[0], [[-1.0, -1.0], [1.0, 1.0]], atol=0.05)


def test_a_reward_one_step_later_is_discounted_once(learned_values):
    q = learned_values(Probe(lambda time, sign, action: time, length=2))
    np.testing.assert_allclose(q[1], 1.0, atol=0.05)
    np.testing.assert_allclose(q[0], 0.5, atol=0.05)


def test_the_better_action_has_the_higher_value(learned_values):
    q = learned_values(Probe(lambda time, sign, action: sign * (2 * action - 1)))
    np.testing.assert_allclose(q[0], [[1.0, -1.0], [-1.0, 1.0]], atol=0.05)


@pytest.mark.parametrize(
    ("end", "value"),
    [(dm_env.termination, 1.0), (dm_env.truncation, 2.0)],
    ids=["terminated", "truncated"],
)
def test_a_stream_cut_short_is_worth_all_of_it_and_an_ended_one_its_reward(
    learned_values, end, value
):
    q = learned_values(Probe(lambda time, sign, action: 1, end=end, clock=False))
    np.testing.assert_allclose(q[0], value, atol=0.05)  # 2 = 1 / (1 - 0.5)


# --- The agent ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """An agent with everything small, after seven steps of Catch on a 3 x 3 board."""
    env = Catch(rows=3, columns=3)
    agent, rules = make_agent(
        env, hidden=4, capacity=5, batch_size=3, target_period=3, discount=0.5
    )
    states, steps = [], []
    for _ in range(4):
        for transition in loop.episode(env, agent.explore):
            states.append(jax.tree.map(np.array, agent.state))
            steps.append(transition)
            agent.learn(transition)
    states.append(jax.tree.map(np.array, agent.state))
    return rules, states, steps


def test_the_replay_keeps_the_newest_transitions_with_their_discounts(small):
    _, states, steps = small
    replay = states[-1].replay
    newest = [5, 6, 7, 3, 4]  # of eight steps, in a ring of five
    for kept, name in zip(replay, loop.Transition._fields, strict=True):
        expected = np.stack([getattr(steps[i], name) for i in newest])
        scale = 0.5 if name == "discount_t" else 1.0
        np.testing.assert_array_equal(kept, scale * expected, err_msg=name)
    assert replay.discount_t.tolist() == [0.0, 0.5, 0.0, 0.0, 0.5]


def test_the_target_network_is_a_copy_made_every_few_steps(small):
    _, states, _ = small
    kernel = lambda params: params["params"]["Dense_0"]["kernel"]
    for i, source in enumerate([0, 0, 0, 3, 3, 3, 6, 6, 6]):
        np.testing.assert_array_equal(
            kernel(states[i].target_params), kernel(states[source].params)
        )


def test_every_step_learns(small):
    _, states, _ = small
    for before, after in itertools.pairwise(states):
        assert not all(
            np.array_equal(a, b)
            for a, b in zip(
                *map(jax.tree.leaves, (before.params, after.params)), strict=True
            )
        )


def test_the_loss_selects_with_one_network_and_evaluates_with_the_other(small, rng):
    rules, states, _ = small
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    params, target_params = (jax.tree.map(draw, states[0].params) for _ in range(2))
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
    state = states[-1]
    gradient = jax.grad(rules.loss, argnums=1)
    slopes = gradient(state.params, state.target_params, state.replay)
    assert all(not np.any(slope) for slope in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("epsilon_steps", "start", "epsilon"),
    [(10**6, 0, 1.0), (10**6, 500_000, 0.6), (50, 50, 0.2)],
    ids=["at first", "halfway", "afterwards"],
)
def test_exploration_decays(epsilon_steps, start, epsilon):
    env = Catch(rows=3, columns=3)
    agent, rules = make_agent(
        env, hidden=4, epsilon=0.2, epsilon_steps=epsilon_steps, capacity=10
    )
    observation = env.reset().observation
    explore = lambda step: rules.explore(agent.state._replace(steps=step), observation)
    actions = jax.jit(jax.vmap(explore))(start + jnp.arange(2000))
    best = np.mean(actions == agent.exploit(observation))
    np.testing.assert_allclose(best, 1 - epsilon + epsilon / 3, atol=0.04)


@pytest.mark.slow
def test_one_seed_gives_one_learning_curve():
    def curve(seed):
        env, test_env = Catch(rows=4, columns=3), Catch(rows=4, columns=3)
        agent, _ = make_agent(env, seed=seed, hidden=8)
        return [repr(p) for p in loop.learning_curve(agent, env, test_env, 30, 5, 5)]

    assert curve(0) == curve(0)
    assert curve(0) != curve(1)


def test_a_small_game_of_catch_is_soon_solved():
    env = Catch(rows=5, columns=3)
    agent, _ = make_agent(env, learning_rate=1e-3, target_period=50, epsilon_steps=500)
    *_, last = loop.learning_curve(agent, env, Catch(5, 3, seed=1), 300, 300, 100)
    assert last.evaluation_return >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_catch_is_solved_with_the_flags_it_comes_with(seed):
    config = dqn.Config(seed=seed)
    agent, _ = make_agent(env := Catch(seed=seed), seed=seed)
    *_, last = loop.learning_curve(
        agent,
        env,
        Catch(seed=seed + 10_000),
        config.episodes,
        config.evaluate_every,
        config.evaluation_episodes,
    )
    assert config.evaluation_episodes == 100
    assert last.evaluation_return >= 0.95


# --- Gymnasium ----------------------------------------------------------------------


class TestCartPoleKeepsThePromisesOfDmEnv(
    test_utils.EnvironmentTestMixin, absltest.TestCase
):
    def make_object_under_test(self):
        return GymAdapter.make("CartPole-v1")


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
    *_, cut = loop.episode(env, lambda observation: 0)
    *_, fallen = loop.episode(GymAdapter.make("CartPole-v1"), lambda observation: 0)
    assert (cut.discount_t, fallen.discount_t) == (1.0, 0.0)
    assert abs(fallen.obs_t[2]) > 0.2095 > abs(cut.obs_t[2])  # the angle that is a fall


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


def test_only_the_first_episode_is_seeded():
    script = Script((True, False))
    env = GymAdapter(script, seed=7)
    env.reset(), env.step(0), env.step(0)  # the second step starts an episode
    assert script.seeds == [7, None]
    assert script.taken == [0]


def test_gymnasium_seeds_decide_the_episodes():
    start = lambda seed: GymAdapter.make("CartPole-v1", seed).reset().observation
    np.testing.assert_array_equal(start(1), start(1))
    assert not np.array_equal(start(1), start(2))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Nope-v0", "exist"), ("Pendulum-v1", "actions must be discrete")],
)
def test_an_environment_of_no_use_is_refused_with_the_reason(name, reason):
    with pytest.raises(
        ValueError, match=f"cannot use environment '{name}': .*{reason}"
    ):
        GymAdapter.make(name)


# --- The command line ---------------------------------------------------------------


SMALL = [
    "--hidden=4",
    "--capacity=100",
    "--evaluation-episodes=2",
    "--evaluate-every=2",
]


def run(*flags, cwd):
    return subprocess.run(
        [sys.executable, SCRIPT, *flags],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_run_prints_the_backend_and_a_table_and_draws_its_curve(tmp_path):
    result = run(*SMALL, "--episodes=4", "--seed=3", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"backend {jax.default_backend()}" in result.stdout
    assert "mean greedy return" in result.stdout
    assert is_picture(tmp_path / "runs" / "dqn-Catch-seed-3.png")


@pytest.mark.slow
def test_a_run_on_cartpole_draws_its_curve_where_told(tmp_path):
    out = tmp_path / "new" / "curve.png"
    flags = ["--env=CartPole-v1", "--episodes=2", f"--out={out}"]
    result = run(*SMALL, *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert is_picture(out)
    assert list(tmp_path.iterdir()) == [out.parent]


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--no-such-flag"], "--no-such-flag"), (["--env=Nope-v0"], "'Nope-v0'")],
)
def test_a_mistake_in_the_flags_is_one_line(tmp_path, flags, words):
    result = run(*flags, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("dqn.py: ")
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "x"], "invalid literal"),
        (["--seed", "-1"], "seed must lie in [0, 2^31), got -1"),
        (["--seed", str(10**20)], "seed must lie in"),
        (["--seed"], "Missing value"),
        (["--episodes", "0"], "episodes must lie in [1, 2^31), got 0"),
        (["--epsilon", "1.5"], "epsilon must lie in [0, 1], got 1.5"),
        (["--discount", "nan"], "discount must lie in"),
        (["--out", "curve.jpg"], "out must end in .png"),
        (["--out", "/dev/null/curve.png"], "cannot write"),
        (["extra"], "Unrecognized"),
    ],
)
def test_each_mistake_is_named(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["dqn.py", *flags])
    with pytest.raises(SystemExit) as end:
        console.main(dqn.Config, dqn.DQN)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_help_names_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dqn.py", "--help"])
    with pytest.raises(SystemExit) as end:
        console.main(dqn.Config, dqn.DQN)
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(dqn.Config):
        assert "--" + field.name.replace("_", "-") in text


def test_ctrl_c_keeps_the_curve_so_far(tmp_path):
    with subprocess.Popen(
        [sys.executable, SCRIPT, *SMALL, "--episodes=1000000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        killer = threading.Timer(120, process.kill)
        killer.start()
        next(line for line in process.stdout if "     4 episodes" in line)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
        killer.cancel()
    assert (process.returncode, error) == (130, "")
    assert "mean greedy return" in out
    assert is_picture(tmp_path / "runs" / "dqn-Catch-seed-0.png")

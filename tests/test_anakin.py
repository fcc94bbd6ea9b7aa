import math
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import anakin
import anakin_dqn
import anakin_on_policy
import jax
import jax.numpy as jnp
import jittable
import numpy as np
import pytest
from anakin_dqn import DQN, DQNConfig
from anakin_on_policy import PQN, PPOConfig, PQNConfig
from dm_env import specs
from fleet import Fleet
from loop import Timestep

import rlprims

pytestmark = pytest.mark.usefixtures("ordinary_promotion")  # which optax counts on

EXAMPLES = Path(anakin.__file__).parent
AGENTS = "dqn", "pqn", "ppo"
ROLL = {"hidden": (8,), "rollout": 8, "epochs": 2, "minibatches": 2}
TINY = anakin.Config(
    environments=8,
    steps=8 * 32,
    evaluate_every=8 * 16,
    evaluation_episodes=8,
    seeds=2,
    dqn=DQNConfig(hidden=(8,), batch_size=8, capacity=8 * 12, target_period=5),
    pqn=PQNConfig(**ROLL),
    ppo=PPOConfig(**ROLL),
)


def flat(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def check_same(one, other):
    """Whether two trainings differ by rounding alone, and learned something."""
    np.testing.assert_allclose(flat(one.params), flat(other.params), atol=2e-6)
    np.testing.assert_array_equal(one.transitions, other.transitions)
    np.testing.assert_allclose(one.returns, other.returns, atol=1e-6)


# --- Any number of devices ----------------------------------------------------------


def test_four_devices_learn_what_one_learns():
    board = jittable.Catch(rows=4, columns=3)
    one, four = (anakin.train(TINY, board, jax.devices()[:n]) for n in (1, 4))
    check_same(one, four)
    assert (one.transitions[-1] == 8 * 24).all()
    seeds = [leaf.reshape(2, -1) for leaf in jax.tree.leaves(one.params)]
    assert max(np.abs(first - second).max() for first, second in seeds) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_any_number_of_devices_learns_what_one_learns(agent, tmp_path):
    config = replace(TINY, agent=agent)
    one = anakin.train(config, devices=jax.devices()[:1])
    for count in 2, 4:
        check_same(one, anakin.train(config, devices=jax.devices()[:count]))
    (eight,) = train_in_processes(config, 1, 8, tmp_path)
    check_same(one, eight)


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_two_processes_learn_what_one_learns(agent, tmp_path):
    config = replace(TINY, agent=agent)
    one = anakin.train(config, devices=jax.devices()[:1])
    for result in train_in_processes(config, 2, 2, tmp_path):
        check_same(one, result)


SCRIPT = """
import pickle, sys
import anakin, jax
from anakin import Config, DQNConfig, PPOConfig, PQNConfig
config, out, devices, processes, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
if int(processes) > 1:
    address = out.split("@")[1]
    jax.distributed.initialize(address, int(processes), int(process))
assert jax.device_count() == int(devices) * int(processes)
result = anakin.train(eval(config))
with open(out.split("@")[0], "wb") as file:
    pickle.dump(result, file)
"""


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def start(arguments, cwd):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{EXAMPLES.parent}"}
    env["PYTHONPATH"] += f"{os.pathsep}{EXAMPLES}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes):
    """Waits for processes and returns what each printed."""
    printed = [process.communicate(timeout=300) for process in processes]
    for process, (_, problems) in zip(processes, printed, strict=True):
        assert process.returncode == 0, problems
    return [output for output, _ in printed]


def train_in_processes(config, processes, devices, folder):
    """Trains in new processes, of so many devices each; returns all their results."""
    address = free_address()
    files = [folder / f"result-{i}.pickle" for i in range(processes)]
    finish(
        [
            start(
                ["-c", SCRIPT, repr(config), f"{file}@{address}"]
                + [str(number) for number in (devices, processes, i)],
                folder,
            )
            for i, file in enumerate(files)
        ]
    )
    return [pickle.loads(file.read_bytes()) for file in files]


# --- Environments on a fleet --------------------------------------------------------


def test_a_mean_is_over_what_counts_and_zero_if_nothing_does():
    fleet = Fleet(jittable.Catch(), 4)
    x = jnp.array([1.0, 3.0, jnp.nan])
    mean = jax.jit(jax.value_and_grad(fleet.mean))
    value, slope = mean(x, jnp.array([True, True, False]))
    assert value == 2.0
    assert mean(x, jnp.zeros(3, bool))[0] == 0.0
    np.testing.assert_array_equal(slope, [0.5, 0.5, 0.0])


def test_an_evaluation_counts_the_first_episode_alone():
    fleet = Fleet(Probe(), 1)
    score = jax.jit(lambda key: fleet.evaluate(key, 8, lambda observation: 0))
    assert score(jax.random.key(0)) == 1.0


# --- DQN: what is drawn from the replay ---------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Observes a time of its own that never repeats, in episodes of three steps."""

    episode_steps = 3

    def observation_spec(self):
        return specs.Array((2,), np.float32)

    def action_spec(self):
        return specs.DiscreteArray(2)

    def reset(self, key):
        return jax.random.uniform(key), jnp.int32(-1)

    def step(self, state, action, key):
        name, time = state[0], state[1] + 1
        first, last = time % 4 == 0, time % 4 == 3
        return (name, time), Timestep(
            observation=jnp.stack([name, time.astype(jnp.float32)]),
            r_t=jnp.where(first, 0.0, 10.0 * time.astype(jnp.float32)),
            discount_t=jnp.where(last, 0.0, jnp.float32(1.0)),
            first=first,
            last=last,
        )


@pytest.mark.parametrize(
    ("environments", "batch_size"),
    [pytest.param(4, 16, marks=pytest.mark.slow), (8, 4)],
)
def test_what_is_drawn_are_transitions_evenly_by_environment(environments, batch_size):
    flags = DQNConfig(
        hidden=(4,), batch_size=batch_size, capacity=6 * environments, discount=0.5
    )
    fleet, agent = Fleet(Clock(), environments), DQN(flags, Clock(), 10)

    @jax.jit
    def everything(key):
        start = agent.init(key, fleet)
        iterate = lambda state, i: agent.iterate(state, jax.random.key(i), i, fleet)
        state, counts = jax.lax.scan(iterate, start, jnp.arange(2))

        def drawn(key):
            bits = agent.chances(fleet, key).replay[0]
            return agent.draw(state.replay, bits, jnp.int32(31), fleet)

        keys = jax.random.split(key, 200)
        return start.world.timestep.observation[:, 0], counts, jax.vmap(drawn)(keys)

    names, counts, (batch, mask) = everything(jax.random.key(0))
    names = np.asarray(names)
    assert (counts == 12 * environments).all()
    name, time = np.moveaxis(np.asarray(batch.obs_tm1), -1, 0)
    following, later = np.moveaxis(np.asarray(batch.obs_t), -1, 0)
    # The ring holds six timesteps of each environment, and so five pairs.
    assert set(time.ravel()) == {26, 27, 28, 29, 30}
    np.testing.assert_array_equal(later, time + 1)
    np.testing.assert_array_equal(following, name)
    np.testing.assert_array_equal(mask, later % 4 != 0)
    np.testing.assert_array_equal(batch.r_t[mask], 10 * later[np.asarray(mask)])
    np.testing.assert_array_equal(batch.discount_t == 0, later % 4 == 3)
    assert set(np.asarray(batch.discount_t).ravel()) == {0.0, 0.5}
    # Each stratum has its own environments, all of them in turn.
    chosen = np.array([[list(names).index(x) for x in row] for row in name])
    stratum = np.arange(batch_size) * environments // batch_size
    width = max(environments // batch_size, 1)
    assert (chosen // width == stratum // width).all()
    assert set(chosen.ravel()) == set(range(environments))


def test_nothing_is_learned_before_the_first_transition():
    flags = DQNConfig(hidden=(4,), batch_size=4, capacity=16)
    fleet, agent = Fleet(Clock(), 4), DQN(flags, Clock(), 10)
    kept = np.zeros((4, 4), np.float32)
    row = anakin_dqn.Row(np.zeros((4, 4, 2)), kept, kept, kept > 0, kept)
    replay = jax.tree.map(jnp.asarray, row)
    bits = jnp.full((4, 2), 7, jnp.uint32)
    mask = jax.jit(lambda step: agent.draw(replay, bits, step, fleet)[1])
    assert not mask(jnp.int32(0)).any()
    assert mask(jnp.int32(1)).all()


# --- PQN and PPO: what a rollout teaches --------------------------------------------


def test_an_epoch_takes_every_step_once_and_the_same_share_of_each_environment():
    fleet, agent = Fleet(Clock(), 3), PQN(PQNConfig(**ROLL), Clock(), 10)
    steps, environments = jnp.meshgrid(jnp.arange(8), jnp.arange(3), indexing="ij")
    split = jax.jit(lambda batch, key: agent.minibatches(batch, key, fleet))
    parts = split((steps, environments), jax.random.key(0))
    steps, environments = (np.asarray(part) for part in parts)
    assert steps.shape == (2, 4, 3)
    np.testing.assert_array_equal(environments, np.broadcast_to(range(3), (2, 4, 3)))
    for b in range(3):
        assert sorted(steps[:, :, b].ravel()) == list(range(8))
    assert steps[:, :, 0].tolist() != steps[:, :, 1].tolist()


def test_the_targets_of_pqn_are_those_of_q_lambda(rng):
    steps, batch, actions = 6, 3, 4
    q = rng.normal(size=(steps + 1, batch, actions)).astype(np.float32)
    rows = anakin_on_policy.Rows(
        obs_tm1=None,
        a_tm1=rng.integers(actions, size=(steps, batch)),
        log_prob_tm1=None,
        r_t=rng.normal(size=(steps, batch)).astype(np.float32),
        discount_t=rng.choice([0.0, 0.9], size=(steps, batch)).astype(np.float32),
        mask_t=rng.random((steps, batch)) < 0.8,
        truncation_t=rng.random((steps, batch)) < 0.3,
    )
    targets = jax.jit(anakin_on_policy.pqn_targets)(q[1:], rows, 0.7)
    for b in range(batch):
        a_tm1, r_t, discount_t, mask_t, cut = (x[:, b] for x in rows if x is not None)
        errors = rlprims.q_lambda(
            q[:-1, b], a_tm1, r_t, discount_t, q[1:, b], 0.7,
            truncation_t=cut, mask_t=mask_t,
        )  # fmt: skip
        taken = q[:-1, b][np.arange(steps), a_tm1]
        expected = np.where(mask_t, taken + errors, 0)
        np.testing.assert_allclose(targets[:, b], expected, rtol=1e-5, atol=1e-6)


def test_one_network_selects_the_action_that_the_other_evaluates(rng):
    params = {"w": rng.normal(size=(3, 2)).astype(np.float32)}
    batch = anakin_dqn.Transition(
        obs_tm1=rng.normal(size=(5, 3)).astype(np.float32),
        a_tm1=rng.integers(2, size=5),
        r_t=rng.normal(size=5).astype(np.float32),
        discount_t=rng.choice([0.0, 0.9], size=5).astype(np.float32),
        obs_t=rng.normal(size=(5, 3)).astype(np.float32),
    )
    other = {"w": rng.normal(size=(3, 2)).astype(np.float32)}
    q = lambda params, observation: observation @ params["w"]
    errors = anakin_dqn.dqn_errors(q, params, other, batch)
    best = (batch.obs_t @ params["w"]).argmax(axis=1)
    target = batch.r_t + batch.discount_t * (batch.obs_t @ other["w"])[range(5), best]
    taken = (batch.obs_tm1 @ params["w"])[range(5), batch.a_tm1]
    np.testing.assert_allclose(errors, target - taken, rtol=1e-4, atol=1e-5)


# --- Probes: values that are known --------------------------------------------------


class ProbeState(NamedTuple):
    kind: jax.Array
    time: jax.Array


@dataclass(frozen=True)
class Probe:
    """One of three episodes, told by the observation; what is done does not matter.

    With a discount of 0.5, the values are those of `VALUES`: of a reward of 1 and the
    end; of the same one step later, and then; of a reward of 1 for ever, cut short
    after a single step.
    """

    VALUES = (1.0, 0.5, 1.0, 2.0)
    episode_steps = 2

    def observation_spec(self):
        return specs.Array((4,), np.float32)

    def action_spec(self):
        return specs.DiscreteArray(2)

    def reset(self, key):
        return ProbeState(jax.random.randint(key, (), 0, 3), jnp.int32(-1))

    def step(self, state, action, key):
        length = jnp.where(state.kind == 1, 2, 1)
        first = (state.time < 0) | (state.time >= length)
        kind = jnp.where(state.time < 0, state.kind, self.reset(key).kind)
        kind = jnp.where(first, kind, state.kind)
        time = jnp.where(first, 0, state.time + 1)
        last = time == jnp.where(kind == 1, 2, 1)
        # What is seen at a termination must not matter, so it is another's start.
        seen = jnp.where(kind == 1, jnp.where(time == 2, 0, 1 + time), 3 * (kind // 2))
        return ProbeState(kind, time), Timestep(
            observation=jax.nn.one_hot(seen, 4),
            r_t=jnp.where(last & ~first, 1.0, 0.0),
            discount_t=jnp.where(last & (kind != 2), 0.0, jnp.float32(1.0)),
            first=first,
            last=last,
        )


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_values_are_those_of_rewards_now_later_and_for_ever(agent):
    flags = {"discount": 0.5, "hidden": (32,), "learning_rate": 3e-3}
    config = anakin.Config(
        agent=agent,
        environments=16,
        steps=16 * 16 * 150,
        evaluate_every=16 * 16 * 150,
        evaluation_episodes=8,
        dqn=DQNConfig(target_period=10, batch_size=32, **flags),
        pqn=PQNConfig(rollout=16, **flags),
        ppo=PPOConfig(rollout=16, clip=1.0, **flags),
    )
    result = anakin.train(config, Probe(), jax.devices()[:1])
    made = anakin.make_plan(config, Probe(), 1).agent
    params = jax.tree.map(lambda x: x[0], result.params)
    values = made.value if agent == "ppo" else made.q_values
    found = jax.vmap(values, (None, 0))(params, jnp.eye(4))
    expected = np.array(Probe.VALUES).reshape(4, *[1] * (found.ndim - 1))
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=0.05)


# --- Learning -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_catch_is_solved_from_every_seed(agent):
    config = anakin.Config(agent=agent, seeds=3, steps=200_000, evaluate_every=50_000)
    result = anakin.train(config, devices=jax.devices()[:1])
    assert (result.returns[0] < 0.5).all()
    np.testing.assert_array_equal(result.returns[-1], 1.0)
    rows = anakin.curve_rows(result)
    assert [row["steps"] for row in rows] == result.transitions.mean(1).astype(
        int
    ).tolist()
    assert rows[-1]["evaluation_return"] == rows[-1]["evaluation_lowest"] == 1.0


@pytest.mark.slow
def test_a_seed_gives_the_same_alone_and_beside_others():
    two = anakin.train(TINY, devices=jax.devices()[:1])
    alone = anakin.train(replace(TINY, seed=1, seeds=1), devices=jax.devices()[:1])
    beside = jax.tree.map(lambda x: x[1], two.params)
    np.testing.assert_allclose(flat(alone.params), flat(beside), atol=2e-6)


# --- The command line ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "devices", "problem"),
    [
        ({"environments": 6}, 4, "environments must be divisible by devices"),
        ({"evaluation_episodes": 6}, 4, "evaluation_episodes must be divisible"),
        ({"dqn": DQNConfig(batch_size=3)}, 1, "the larger of environments and dqn"),
        ({"dqn": DQNConfig(batch_size=2)}, 4, "dqn.batch_size must be divisible by"),
        ({"dqn": DQNConfig(capacity=15)}, 1, "two timesteps of each of the 8"),
        ({"agent": "ppo", "ppo": PPOConfig(rollout=9)}, 1, "ppo.rollout must be"),
        ({"steps": 0}, 1, r"steps must lie in \[1, 2\^31\), got 0"),
        ({"dqn": DQNConfig(discount=1.5)}, 1, r"dqn.discount must lie in \[0, 1\]"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(flags, devices, problem):
    with pytest.raises(ValueError, match=problem):
        anakin.make_plan(replace(TINY, **flags), jittable.Catch(), devices)


def test_training_is_as_long_as_asked_for_or_a_little_longer():
    for agent, rollout in ("dqn", 16), ("ppo", 8):
        config = replace(TINY, agent=agent, steps=1000, evaluate_every=300)
        plan = anakin.make_plan(config, jittable.Catch(), 1)
        assert plan.per_point == 300 // (8 * rollout)
        steps = plan.iterations * 8 * rollout
        assert 1000 <= steps < 1000 + 300
        assert plan.points == 1 + math.ceil(1000 / (plan.per_point * 8 * rollout))


@pytest.mark.slow
def test_the_script_prints_a_learning_curve(tmp_path):
    flags = ["--agent=ppo", "--steps=4096", "--evaluate-every=2048", "--seeds=2"]
    flags += ["--environments=16", "--evaluation-episodes=16", "--ppo.rollout=8"]
    (printed,) = finish([start([anakin.__file__, *flags], tmp_path)])
    assert "ppo on catch, 2 seed(s), 1 cpu device(s)" in printed
    assert printed.count("│") == 5 * 3  # a line for each point
    assert "transitions of all seeds" in printed


@pytest.mark.slow
def test_two_processes_print_one_curve(tmp_path):
    flags = ["--steps=4096", "--evaluate-every=4096", "--environments=16"]
    flags += ["--evaluation-episodes=16", "--dqn.batch-size=16"]
    flags += [f"--coordinator={free_address()}", "--processes=2"]
    script = [anakin.__file__, *flags]
    first, second = finish(
        [start([*script, f"--process={i}"], tmp_path) for i in (0, 1)]
    )
    assert "dqn on catch, 1 seed(s), 2 cpu device(s)" in first
    assert "mean return" in first
    assert "transitions" not in second  # Gloo has something to say


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--dqn.batch-size=100"], "must be divisible by the smaller"),
        (["--processes=2"], "--coordinator and --processes go together"),
        (["--agent=sac"], "sac"),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_line(flags, problem, tmp_path):
    process = start([anakin.__file__, *flags], tmp_path)
    printed, problems = process.communicate(timeout=100)
    assert process.returncode == 2
    assert not printed
    assert len(problems.splitlines()) == 1
    assert problem in problems

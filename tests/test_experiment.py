import csv
import io
import json
import math

import dqn
import jax
import loggers
import numpy as np
import pytest
from checkpoints import Checkpoints
from experiment import AgentExperiment
from rich.console import Console

SMALL = {
    "hidden": 4,
    "capacity": 100,
    "evaluation_episodes": 2,
    "evaluate_every": 50,
    "checkpoint_every": 30,
    "steps": 200,
}


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(loggers.TensorBoard, "available", lambda: False)


@pytest.fixture(scope="module", autouse=True)
def one_compilation(tmp_path_factory):
    """Runs of the same flags share their programs, in a cache on disk."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def prepare(folder, **flags):
    config = dqn.Config(**SMALL | flags)
    return AgentExperiment(config, folder, "dqn", dqn.DQN)


def run(experiment, stop=lambda: False):
    """Returns what is printed."""
    screen = io.StringIO()
    experiment.run(Console(file=screen, width=200), stop)
    return screen.getvalue()


def stop_at(experiment, steps):
    return lambda: experiment.engine.steps >= steps


def rows(folder):
    """The log, without what the clock says."""
    with (folder / "metrics.csv").open() as file:
        return [
            {name: x for name, x in row.items() if "second" not in name}
            for row in csv.DictReader(file)
        ]


def assert_same_state(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- The folder of a run --------------------------------------------------------------


def test_a_run_leaves_flags_versions_log_and_pictures_in_one_folder(tmp_path):
    experiment = prepare(tmp_path / "run", seed=3, render="gif")
    printed = run(experiment)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["config.json", "curve.png", "episode.gif", "metrics.csv"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["flags"]["seed"] == 3
    assert config["flags"]["hidden"] == 4
    assert config["versions"]["jax"] == jax.__version__
    log = rows(tmp_path / "run")
    assert [row["steps"] for row in log] == ["0", "50", "100", "150", "200"]
    assert [row["episodes"] for row in log] == ["0", "5", "11", "16", "22"]
    assert math.isnan(float(log[0]["loss"]))
    assert all(float(row["loss"]) > 0 for row in log[1:])
    assert {float(row["evaluation_return"]) for row in log} <= {-1.0, 0.0, 1.0}
    assert f"backend {jax.default_backend()}" in printed
    assert "evaluation return" in printed


def test_every_point_of_the_curve_is_of_the_same_episodes(tmp_path):
    experiment = prepare(tmp_path, steps=1)
    run(experiment)
    before = experiment.test_envs.save()
    experiment.loggers = []
    experiment.report(experiment.engine)
    assert experiment.test_envs.save() == before
    assert experiment.at_first != before


def test_seeds_of_environments_differ_from_one_another_and_between_runs(tmp_path):
    def seeds(seed):
        experiment = prepare(tmp_path / str(seed), seed=seed, environments=3)
        training = experiment.engine.events.envs.save()
        return {env["seed"] for env in training + experiment.at_first}

    assert len(seeds(0)) == len(seeds(1)) == 5
    assert not seeds(0) & seeds(1)


# --- To go on -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("environments", [1, 3])
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(tmp_path, environments):
    flags = {"environments": environments}
    whole = prepare(tmp_path / "whole", **flags)
    run(whole)
    kept = {"checkpoint_dir": tmp_path / "kept"} | flags
    for steps in [20, 75, 140, 999]:  # within episodes, between checkpoints
        part = prepare(tmp_path / "part", **kept)
        printed = run(part, stop_at(part, steps))
        assert ("resumes at step" in printed) == (steps > 20)
    assert_same_state(part.agent.state, whole.agent.state)
    assert part.engine.events.envs.save() == whole.engine.events.envs.save()
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")


def test_a_run_stopped_at_the_start_of_an_episode_goes_on_as_well(tmp_path):
    """Nothing counts as a step there, so a checkpoint of so many steps exists."""
    whole = prepare(tmp_path / "whole")
    run(whole)
    kept = {"checkpoint_dir": tmp_path / "kept", "checkpoint_every": 9}
    part = prepare(tmp_path / "part", **kept)
    resets = []

    def at_the_third_reset():
        engine = part.engine
        resets.append(engine.steps == engine.before)
        return sum(resets) == 4  # the first is the beginning

    run(part, at_the_third_reset)
    assert part.engine.steps == 27
    again = prepare(tmp_path / "part", **kept)
    assert again.engine.steps == 27
    run(again)
    assert_same_state(again.agent.state, whole.agent.state)
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")


def test_a_run_killed_between_checkpoints_forgets_the_rows_after_the_last(tmp_path):
    kept = tmp_path / "kept"
    whole = prepare(tmp_path / "whole")
    run(whole)
    killed = prepare(tmp_path / "killed", checkpoint_dir=kept, checkpoint_every=120)

    def kill():
        if killed.engine.steps == 170:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, lambda: kill() is not None)
    assert rows(tmp_path / "killed")[-1]["steps"] == "150"
    again = prepare(tmp_path / "killed", checkpoint_dir=kept, checkpoint_every=120)
    assert again.engine.steps == 120
    run(again)
    assert_same_state(again.agent.state, whole.agent.state)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_a_run_can_be_made_longer(tmp_path):
    kept = {"checkpoint_dir": tmp_path / "kept"}
    run(prepare(tmp_path / "run", **kept))
    longer = prepare(tmp_path / "run", steps=250, **kept)
    assert "resumes at step 200, steps was 200" in run(longer)
    assert longer.engine.steps == 250
    assert [row["steps"] for row in rows(tmp_path / "run")][-2:] == ["200", "250"]


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_flags_that_differ(tmp_path):
    kept = {"checkpoint_dir": tmp_path / "kept"}
    run(prepare(tmp_path / "run", steps=30, **kept))
    for flags, words in [
        ({"hidden": 5}, "hidden was 4 and is 5"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"environments": 2}, "environments was 1 and is 2"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            prepare(tmp_path / "other", **flags, **kept)
        assert "cannot resume from" in str(error.value)
    assert not (tmp_path / "other").exists()
    config = dqn.Config(**SMALL, **kept)
    with pytest.raises(ValueError, match="script was dqn and is ddqn"):
        AgentExperiment(config, tmp_path / "other", "ddqn", dqn.DQN)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "7" / "something").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no checkpoints of a run"):
        prepare(tmp_path / "run", checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_a_flag_that_fits_may_change_and_that_is_said(tmp_path):
    kept = {"checkpoint_dir": tmp_path / "kept"}
    run(prepare(tmp_path / "run", steps=30, **kept))
    changed = prepare(tmp_path / "run", steps=40, learning_rate=0.1, **kept)
    assert "resumes at step 30, learning_rate was 0.0005" in run(changed)


def test_a_run_that_was_done_has_nothing_to_do(tmp_path):
    kept = {"checkpoint_dir": tmp_path / "kept", "steps": 30}
    run(prepare(tmp_path / "run", **kept))
    assert "30 steps are done" in run(prepare(tmp_path / "other", **kept))


def test_a_checkpoint_that_was_never_finished_does_not_count(tmp_path):
    kept = tmp_path / "kept"
    run(prepare(tmp_path / "run", steps=60, checkpoint_dir=kept))
    torn = kept / "90.orbax-checkpoint-tmp-1"
    torn.mkdir()
    (torn / "state").mkdir()
    assert prepare(tmp_path / "run", checkpoint_dir=kept).engine.steps == 60


def test_a_checkpoint_is_arrays_and_json(tmp_path):
    """No pickle: nothing in it says what to execute."""
    kept = tmp_path / "kept"
    experiment = prepare(tmp_path / "run", steps=30, checkpoint_dir=kept)
    run(experiment)
    plain = kept / "30" / "plain" / "metadata"
    assert json.loads(plain.read_text())["engine"]["steps"] == 30
    for path in (kept / "30").rglob("*"):
        if path.is_file():
            assert b"numpy.core" not in path.read_bytes()
            assert not path.read_bytes().startswith(b"\x80\x04")
    flags = {"script": "dqn"} | vars(experiment.config)
    assert Checkpoints(kept, flags).restore(experiment.engine) == {}

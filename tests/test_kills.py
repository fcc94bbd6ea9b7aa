"""A run that is killed again and again ends bit by bit as one that was never killed."""

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
KILLS = 20
FLAGS = ["--checkpoint-every=25", "--evaluate-every=100", "--evaluation-episodes=5"]


def start(script, flags, folder, cache):
    return subprocess.Popen(
        [
            sys.executable,
            str(EXAMPLES / script),
            *FLAGS,
            *flags,
            f"--out={folder / 'run'}",
            f"--checkpoint-dir={folder / 'kept'}",
        ],
        env=os.environ
        | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.DEVNULL,
    )


def newest(folder):
    """The newest complete checkpoint, by its number of steps."""
    kept = folder / "kept"
    names = [path.name for path in kept.iterdir()] if kept.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def result(folder):
    """The log without the clock, and every array of the last checkpoint."""
    with (folder / "run" / "metrics.csv").open() as file:
        log = [
            {name: x for name, x in row.items() if "second" not in name}
            for row in csv.DictReader(file)
        ]
    with ocp.CheckpointManager(folder / "kept") as manager:
        saved = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(), plain=ocp.args.JsonRestore()
            ),
        )
    plain = saved.plain["engine"]
    for meter in plain["meters"]:
        meter.pop("seconds", None)
    return log, plain, jax.tree.map(np.asarray, saved.state)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # on restoring arrays without their structure
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("dqn.py", ["--steps=8000", "--capacity=2000"]),
        ("impala.py", ["--steps=40000", "--environments=4"]),
    ],
)
def test_kills_change_nothing(tmp_path, script, flags):
    whole, killed, cache = (tmp_path / name for name in ("whole", "killed", "cache"))
    assert start(script, flags, whole, cache).wait(300) == 0
    rng = random.Random(0)
    for _ in range(KILLS):
        before, deadline = newest(killed), time.monotonic() + 120
        process = start(script, flags, killed, cache)
        while newest(killed) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None  # still at work
        process.kill()
        process.wait()
        assert newest(killed) > before
    assert start(script, flags, killed, cache).wait(300) == 0
    (log, plain, state), (log_2, plain_2, state_2) = map(result, (whole, killed))
    assert log == log_2
    assert plain == plain_2
    jax.tree.map(np.testing.assert_array_equal, state, state_2)

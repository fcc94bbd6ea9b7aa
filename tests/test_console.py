import dataclasses
import signal
import subprocess
import sys
import threading

import console
import dqn
import jax
import pytest

SCRIPT = dqn.__file__
SMALL = [
    "--hidden=4",
    "--capacity=100",
    "--evaluation-episodes=2",
    "--evaluate-every=20",
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


@pytest.mark.slow
def test_a_run_prints_the_backend_and_a_table_and_draws_its_curve(tmp_path):
    result = run(*SMALL, "--steps=40", "--seed=3", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"backend {jax.default_backend()}" in result.stdout
    assert "evaluation return" in result.stdout
    assert is_picture(tmp_path / "runs" / "dqn-Catch-seed-3" / "curve.png")


@pytest.mark.slow
def test_a_run_on_cartpole_goes_to_the_folder_it_is_told(tmp_path):
    out = tmp_path / "new" / "run"
    flags = ["--env=CartPole-v1", "--steps=40", f"--out={out}"]
    result = run(*SMALL, *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert is_picture(out / "curve.png")
    assert list(tmp_path.iterdir()) == [out.parent]


@pytest.mark.slow
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
        (["--no-such-flag"], "--no-such-flag"),
        (["--env=Nope-v0"], "'Nope-v0'"),
        (["--env=Pendulum-v1"], "this agent needs discrete actions"),
        (["--seed", "x"], "invalid literal"),
        (["--seed", "-1"], "seed must lie in [0, 2^31), got -1"),
        (["--seed", str(10**20)], "seed must lie in"),
        (["--seed"], "Missing value"),
        (["--steps", "0"], "steps must lie in [1, 2^31), got 0"),
        (["--epsilon", "1.5"], "epsilon must lie in [0, 1], got 1.5"),
        (["--discount", "nan"], "discount must lie in"),
        (["--render", "cinema"], "cinema"),
        (["--out", "/dev/null/run"], "cannot write"),
        (["--checkpoint-dir", "/dev/null/kept"], "cannot write"),
        (["extra"], "Unrecognized"),
    ],
)
def test_each_mistake_is_named(monkeypatch, capsys, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dqn.py", *flags])
    with pytest.raises(SystemExit) as end:
        console.main(dqn.Config, dqn.DQN)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_64_bits_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dqn.py"])
    with jax.enable_x64(True), pytest.raises(SystemExit) as end:
        console.main(dqn.Config, dqn.DQN)
    assert end.value.code == 2
    assert "unset JAX_ENABLE_X64" in capsys.readouterr().err


def test_help_names_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dqn.py", "--help"])
    with pytest.raises(SystemExit) as end:
        console.main(dqn.Config, dqn.DQN)
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(dqn.Config):
        assert "--" + field.name.replace("_", "-") in text


def test_ctrl_c_keeps_the_run_so_far(tmp_path):
    with subprocess.Popen(
        [sys.executable, SCRIPT, *SMALL, "--steps=1000000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        killer = threading.Timer(120, process.kill)
        killer.start()
        next(line for line in process.stdout if line.split()[:2] == ["steps", "40"])
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
        killer.cancel()
    assert (process.returncode, error) == (130, "")
    assert "evaluation return" in out
    assert is_picture(tmp_path / "runs" / "dqn-Catch-seed-0" / "curve.png")

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import plot
import pytest
import run_folder
from loggers import CSVFile
from matplotlib.figure import Figure

import rlprims


@dataclasses.dataclass(frozen=True)
class Flags:
    env: str = "Catch"
    seed: int = 0
    rate: float = 0.1
    out: Path | None = None
    sizes: tuple[int, ...] = (32, 32)


def make_run(folder, rows, script="dqn", **flags):
    run_folder.write_config(folder, Flags(**flags), script)
    log = CSVFile(folder / run_folder.METRICS)
    for row in rows:
        log.log(row)
    log.close()
    return folder


def rows(values, start=0, every=10):
    return [
        {
            "steps": start + i * every,
            "training_return": math.nan if i == 0 else -value,
            "evaluation_return": float(value),
        }
        for i, value in enumerate(values)
    ]


def curves(*pairs):
    return [
        (np.array(steps, float), np.array(values, float)) for steps, values in pairs
    ]


# --- The folder -----------------------------------------------------------------------


def test_a_config_tells_flags_script_versions_and_device(tmp_path):
    run_folder.write_config(tmp_path / "new" / "run", Flags(seed=3), "examples/dqn.py")
    record = json.loads((tmp_path / "new" / "run" / "config.json").read_text())
    assert record["script"] == "dqn"
    assert record["flags"] == {
        "env": "Catch",
        "seed": 3,
        "rate": 0.1,
        "out": None,
        "sizes": [32, 32],
    }
    assert (record["backend"], record["device"]) == ("cpu", "cpu")
    versions = record["versions"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["jax"] == jax.__version__
    assert versions["rlprims"] == rlprims.__version__
    assert {"jaxlib", "numpy", "flax", "optax"} <= set(versions)


def test_a_config_tells_no_paths_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, written in (
        (Path("runs/a"), "runs/a"),
        (tmp_path / "runs" / "a", "runs/a"),
        (tmp_path.parent / "secret" / "a", "a"),
    ):
        run_folder.write_config(tmp_path, Flags(out=path), str(tmp_path / "dqn.py"))
        text = (tmp_path / run_folder.CONFIG).read_text()
        assert json.loads(text)["flags"]["out"] == str(Path(written))
        assert str(tmp_path.parent) not in text


def test_what_was_written_is_read(tmp_path):
    make_run(tmp_path, rows([1.0, 2.0, 1 / 3]), seed=5)
    config, columns = run_folder.read(tmp_path)
    assert config["flags"]["seed"] == 5
    assert list(columns) == ["steps", "training_return", "evaluation_return"]
    np.testing.assert_array_equal(columns["steps"], [0.0, 10.0, 20.0])
    np.testing.assert_array_equal(columns["training_return"], [np.nan, -2.0, -1 / 3])
    np.testing.assert_array_equal(columns["evaluation_return"], [1.0, 2.0, 1 / 3])


def test_a_run_can_be_read_while_it_writes(tmp_path):
    make_run(tmp_path, rows([1.0, 2.0]))
    with (tmp_path / run_folder.METRICS).open("a") as file:
        file.write("20,-3")
    np.testing.assert_array_equal(run_folder.read(tmp_path)[1]["steps"], [0.0, 10.0])


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "metrics.csv").unlink(), "has no metrics.csv"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "cannot read the run",
        ),
        (lambda folder: (folder / "metrics.csv").write_text(""), "no rows yet"),
        (lambda folder: (folder / "metrics.csv").write_text("steps"), "no rows yet"),
        (lambda folder: (folder / "metrics.csv").write_text("steps\n"), "no rows yet"),
        (lambda folder: (folder / "metrics.csv").write_text("a\n1\n"), "no rows yet"),
        (
            lambda folder: (folder / "metrics.csv").write_text("steps\nmany\n"),
            "cannot read the run",
        ),
        (
            lambda folder: (folder / "metrics.csv").write_text("steps,a\n1\n1,2\n"),
            "cannot read the run",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_named_with_what_it_lacks(tmp_path, spoil, problem):
    spoil(make_run(tmp_path, rows([1.0])))
    with pytest.raises(ValueError, match=problem) as error:
        run_folder.read(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_points_of_a_curve_are_where_it_has_a_value(tmp_path):
    _, columns = run_folder.read(make_run(tmp_path, rows([1.0, 2.0, 3.0])))
    steps, values = run_folder.points(columns, "training_return")
    np.testing.assert_array_equal(steps, [10.0, 20.0])
    np.testing.assert_array_equal(values, [-2.0, -3.0])


def test_a_learning_curve_is_drawn_where_it_belongs(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path))
    )
    _, columns = run_folder.read(make_run(tmp_path, rows([1.0, 2.0, 4.0])))
    run_folder.draw(columns, "A title", tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "training return": [[10.0, -2.0], [20.0, -4.0]],
        "evaluation return": [[0.0, 1.0], [10.0, 2.0], [20.0, 4.0]],
    }
    assert axes.get_title() == "A title"
    assert matplotlib.image.imread(tmp_path / "curve.png").shape == (480, 840, 4)


# --- Plots of many runs ---------------------------------------------------------------


def about(script="dqn", **flags):
    return {"script": script, "flags": {"env": "Catch", "seed": 0} | flags}


def test_runs_are_one_kind_if_only_seed_and_paths_differ():
    configs = [
        about(seed=i, out=f"runs/{i}", checkpoint_dir=f"c/{i}", rate=0.1)
        for i in range(3)
    ]
    assert plot.group(configs) == {"dqn on Catch": [0, 1, 2]}


def test_runs_of_different_flags_are_named_by_what_differs():
    configs = [
        about(rate=0.1, size=8),
        about(rate=0.2, size=8),
        about(rate=0.1, size=8, seed=1),
    ]
    assert plot.group(configs) == {
        "dqn on Catch, rate=0.1": [0, 2],
        "dqn on Catch, rate=0.2": [1],
    }


def test_only_runs_of_a_script_and_environment_are_told_apart_by_flags():
    configs = [about(rate=0.1), about("ppo", clip=0.2), about(env="Other", rate=0.3)]
    assert plot.group(configs) == {
        "dqn on Catch": [0],
        "ppo on Catch": [1],
        "dqn on Other": [2],
    }


def test_quartiles_are_those_of_the_seeds_at_each_step(rng):
    values = rng.normal(size=(5, 4))
    steps = [0.0, 10.0, 20.0, 30.0]
    grid, actual = plot.quartiles(curves(*((steps, row) for row in values)), 5.0)
    np.testing.assert_array_equal(grid, steps)
    expected = [
        statistics.quantiles(column, n=4, method="inclusive") for column in values.T
    ]
    np.testing.assert_allclose(actual.T, expected)


def test_between_rows_a_curve_is_straight_and_after_the_last_it_no_longer_counts():
    whole, early = ([0, 10, 20, 30], [0, 1, 2, 3]), ([0, 5, 10], [10, 20, 30])
    grid, (_, median, _) = plot.quartiles(curves(whole, early), 4.9)
    np.testing.assert_array_equal(grid, [0, 5, 10, 20, 30])
    np.testing.assert_allclose(median, [5.0, 10.25, 15.5, 2.0, 3.0])


def test_rows_at_nearly_the_same_steps_count_as_the_same():
    near = curves(([0, 100, 203], [0, 1, 2]), ([0, 102, 201], [4, 5, 6]))
    grid, (_, median, _) = plot.quartiles(near, plot.row_spacing(near) / 2)
    np.testing.assert_array_equal(grid, [0, 100, 102, 201, 203])
    np.testing.assert_allclose(median[[0, -1]], [2.0, 4.0])
    axes = Figure().add_subplot()
    assert plot.draw(axes, near, "dqn") == "dqn: 2 seeds"


def test_one_row_is_a_curve_too():
    axes = Figure().add_subplot()
    assert plot.draw(axes, curves(([0], [2.0])), "dqn") == "dqn: 1 seed"
    assert axes.lines[0].get_xydata().tolist() == [[0.0, 2.0]]


def test_seeds_that_stopped_early_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = make_run(tmp_path / "a", rows([0.0, 1.0, 2.0, 3.0]))
    b = make_run(tmp_path / "b", rows([2.0, 3.0, 4.0]), seed=1)
    c = make_run(tmp_path / "c", rows([5.0, 5.0]), rate=0.5)
    plot.compare(plot.Config((a, b, c, a), Path("here.png")))
    assert capsys.readouterr().out.splitlines() == [
        "dqn on Catch, rate=0.1: 2 seeds, 1 stopped early at 20 of 30 steps",
        "dqn on Catch, rate=0.5: 1 seed",
        "here.png",
    ]
    assert matplotlib.image.imread("here.png").ndim == 3


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ("loss", r"one of run \(steps, training_return, evaluation_return\), got loss"),
        ("training_return", "run has no training_return yet"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path, column, problem):
    run = make_run(tmp_path / "run", rows([1.0]))
    with pytest.raises(ValueError, match=problem):
        plot.compare(plot.Config((run,), tmp_path / "x.png", column))


def test_the_plot_is_called_from_the_command_line(tmp_path, capsys, monkeypatch):
    run, out = make_run(tmp_path / "run", rows([1.0, 2.0])), tmp_path / "curves.png"
    flags = ["--out", str(out), "--column", "training_return"]
    monkeypatch.setattr(sys, "argv", ["plot.py", str(run), *flags])
    assert plot.main() == 0
    assert capsys.readouterr().out.splitlines() == ["dqn on Catch: 1 seed", str(out)]
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere"], "nowhere must be the folder of a run, has no config.json"),
        ([], "runs must name the folder of at least one run"),
        (["run", "--column", "loss"], "column must be one of run"),
        (["run", "--out", "no/such/folder.png"], "No such file or directory"),
        (["run", "--out", "curves.odd"], "Format 'odd' is not supported"),
        (["run", "--colour", "red"], "(see --help)"),
    ],
)
def test_mistakes_on_the_command_line_take_one_line_and_status_2(
    tmp_path, capsys, monkeypatch, arguments, problem
):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", rows([1.0]))
    monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        plot.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plot.py: ")
    assert problem in line

import csv
import io
import json
import math
import struct
import sys
import types

import loggers
import numpy as np
import pytest
from loggers import CSVFile, JSONLines, TensorBoard, Terminal
from rich.console import Console

ROWS = [
    {"steps": 0, "training_return": math.nan, "loss, mean": 0.1 + 0.2},
    {"steps": 10, "training_return": -1.0, "loss, mean": math.inf},
    {"steps": 20, "training_return": 1e-300, "loss, mean": -math.inf},
    {"steps": 30, "training_return": 5.0, "loss, mean": 1 / 3},
]


def read_csv(path):
    with path.open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def read_json(path):
    rows = [
        json.loads(x, parse_constant=refuse) for x in path.read_text().split("\n")[:-1]
    ]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


FILES = pytest.mark.parametrize(
    ("kind", "read"), [(CSVFile, read_csv), (JSONLines, read_json)]
)


def write(logger, rows):
    for row in rows:
        logger.log(row)
    logger.close()
    return logger


def same(actual, expected):
    np.testing.assert_equal(actual, expected)  # NaN equals NaN here
    return True


# --- Files ----------------------------------------------------------------------------


@FILES
def test_numbers_come_back_exactly(tmp_path, kind, read):
    write(kind(tmp_path / "log"), ROWS)
    assert same(read(tmp_path / "log"), ROWS)


@FILES
def test_numbers_of_numpy_are_numbers(tmp_path, kind, read):
    row = {"steps": np.int64(3), "a": np.float64(0.1), "b": np.float32(0.5)}
    write(kind(tmp_path / "log"), [row])
    assert read(tmp_path / "log") == [{"steps": 3, "a": 0.1, "b": 0.5}]


@FILES
def test_a_row_is_in_the_file_once_it_was_logged(tmp_path, kind, read):
    logger = kind(tmp_path / "log")
    for i, row in enumerate(ROWS, 1):
        logger.log(row)
        assert same(read(tmp_path / "log"), ROWS[:i])
    logger.close()


def test_csv_and_json_lines_look_as_they_should(tmp_path):
    write(CSVFile(tmp_path / "csv"), ROWS[:2])
    assert (tmp_path / "csv").read_bytes() == (
        b'steps,training_return,"loss, mean"\n0,nan,0.30000000000000004\n10,-1.0,inf\n'
    )
    write(JSONLines(tmp_path / "json"), ROWS[:2])
    assert (tmp_path / "json").read_bytes() == (
        b'{"steps": 0, "training_return": null, "loss, mean": 0.30000000000000004}\n'
        b'{"steps": 10, "training_return": -1.0, "loss, mean": 1e999}\n'
    )


@FILES
def test_a_new_run_starts_a_new_file(tmp_path, kind, read):
    write(kind(tmp_path / "log"), ROWS)
    write(kind(tmp_path / "log"), ROWS[1:2])
    assert same(read(tmp_path / "log"), ROWS[1:2])


def test_rows_of_a_csv_file_have_the_columns_of_the_first(tmp_path):
    logger = CSVFile(tmp_path / "log")
    logger.log({"steps": 0, "loss": 1.0})
    logger.log({"loss": 2.0, "steps": 1})  # in any order
    with pytest.raises(
        ValueError, match=r"columns of .*log \(steps, loss\), got steps"
    ):
        logger.log({"steps": 2})
    logger.close()
    assert read_csv(tmp_path / "log") == [
        {"steps": 0.0, "loss": 1.0},
        {"steps": 1.0, "loss": 2.0},
    ]


# --- Files that go on -----------------------------------------------------------------


@FILES
@pytest.mark.parametrize(
    ("steps", "kept"), [(-1, 0), (0, 1), (10, 2), (19, 2), (99, 4)]
)
def test_rows_beyond_the_checkpoint_are_dropped(tmp_path, kind, read, steps, kept):
    write(kind(tmp_path / "log"), ROWS)
    write(kind(tmp_path / "log", resume_from=steps), ROWS[3:])
    assert same(read(tmp_path / "log"), ROWS[:kept] + ROWS[3:])


@FILES
def test_a_killed_run_that_goes_on_leaves_the_file_of_one_that_was_not(
    tmp_path, kind, read
):
    write(kind(tmp_path / "straight"), ROWS)
    write(kind(tmp_path / "killed"), ROWS[:3])
    write(kind(tmp_path / "killed", resume_from=10), ROWS[2:])
    straight, killed = ((tmp_path / x).read_bytes() for x in ("straight", "killed"))
    assert killed == straight


@FILES
def test_a_file_torn_anywhere_goes_on_from_its_last_whole_line(tmp_path, kind, read):
    path = tmp_path / "log"
    write(kind(path), ROWS[:2])
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1 if kind is CSVFile else 0
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        rows = whole[:size].count(b"\n") - (size >= header > 0)
        write(kind(path, resume_from=10), ROWS[3:])
        assert same(read(path), ROWS[:rows] + ROWS[3:])


@FILES
def test_nothing_was_logged_before_the_first_checkpoint(tmp_path, kind, read):
    write(kind(tmp_path / "log", resume_from=10), ROWS[2:])
    assert same(read(tmp_path / "log"), ROWS[2:])


@FILES
def test_a_kill_while_rows_are_dropped_leaves_the_file_as_it_was(
    tmp_path, kind, read, monkeypatch
):
    def kill(*_):
        raise KeyboardInterrupt

    path = tmp_path / "log"
    write(kind(path), ROWS)
    monkeypatch.setattr(loggers.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        kind(path, resume_from=0)
    monkeypatch.undo()
    assert same(read(path), ROWS)
    write(kind(path, resume_from=0), [])
    assert same(read(path), ROWS[:1])
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


def test_a_csv_file_that_goes_on_keeps_its_columns(tmp_path):
    write(CSVFile(tmp_path / "log"), ROWS[:1])
    logger = CSVFile(tmp_path / "log", resume_from=10)
    with pytest.raises(ValueError, match="row must have the columns"):
        logger.log({"steps": 20})
    logger.close()


def test_a_csv_file_without_steps_cannot_go_on(tmp_path):
    write(CSVFile(tmp_path / "log"), [{"loss": 1.0}])
    with pytest.raises(ValueError, match="must have a column steps, got loss"):
        CSVFile(tmp_path / "log", resume_from=10)


# --- The terminal ---------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(loggers.time, "perf_counter", lambda: now[0])
    return now


def screen(terminal):
    file = io.StringIO()
    return file, Console(file=file, width=100, force_terminal=terminal, no_color=True)


def test_the_terminal_shows_the_main_columns_of_each_row():
    file, console = screen(terminal=False)
    row = {"steps": 5000, "episodes": 9, "evaluation_return": 0.12345, "loss": 777.0}
    terminal = Terminal(10_000, console)
    write(terminal, [row, {"training_return": math.nan}])
    first, second, bar = file.getvalue().splitlines()
    assert first.split() == ["steps", "5,000", "evaluation", "return", "0.1235"]
    assert second.split() == ["training", "return", "nan"]
    assert "5000/10000" in bar
    assert "777" not in file.getvalue()


def test_the_bar_is_seldom_drawn_but_ends_where_the_run_did(clock):
    file, console = screen(terminal=True)
    terminal = Terminal(1000, console)
    drawn = []
    for steps in range(1, 100):
        clock[0] += 0.2
        before = len(file.getvalue())
        terminal.progress(steps)
        if len(file.getvalue()) > before:
            drawn.append(steps)
            assert f" {steps}/1000" in file.getvalue()
    assert drawn == list(range(1, 100, 3))
    terminal.progress(99)
    terminal.close()
    assert " 99/1000" in file.getvalue()


def test_the_bar_of_a_run_that_goes_on_starts_where_it_was():
    file, console = screen(terminal=False)
    Terminal(1000, console, resume_from=400).close()
    assert " 400/1000" in file.getvalue()


def test_names_of_columns_are_not_read_as_markup():
    file, console = screen(terminal=False)
    terminal = Terminal(10, console)
    write(terminal, [{"training_[red]loss": 1.0}])
    assert "training [red]loss" in file.getvalue()


# --- TensorBoard ----------------------------------------------------------------------


def test_tensorboard_that_is_not_installed_says_how_to_install_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    assert not TensorBoard.available()
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        TensorBoard(tmp_path)


def test_tensorboard_gets_every_number_at_its_step(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            calls.append((directory, purge_step))

        def add_scalar(self, *arguments):
            calls.append(arguments)

        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter, __spec__="found")
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    assert TensorBoard.available()
    write(TensorBoard(tmp_path, resume_from=9), ROWS[:2])
    assert calls == [
        (str(tmp_path), 10),
        *[("steps", 0.0, 0), ("loss, mean", 0.1 + 0.2, 0), "flush"],
        *[("steps", 10.0, 10), ("training_return", -1.0, 10)],
        *[("loss, mean", math.inf, 10), "flush", "close"],
    ]


def test_tensorboard_files_hold_the_rows(tmp_path):
    """A record of an event file is a length, a checksum, the event, a checksum."""
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    write(TensorBoard(tmp_path), ROWS[:2])
    (path,) = tmp_path.iterdir()
    data, points = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = events.Event.FromString(data[12 : 12 + length])
        points += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert [point for point in points if point[1] != "loss__mean"] == [
        (0, "steps", 0.0),
        (10, "steps", 10.0),
        (10, "training_return", -1.0),
    ]

"""Where the rows of a run's log go: the terminal, text files, TensorBoard.

A row is a dict of numbers by column name, NaN where there is nothing to tell, such as
`{"steps": 5000, "training_return": -0.2, "loss": 0.03}`. Files are flushed row by row,
so that a run that is killed has logged all that it did. To go on after a checkpoint,
open them with `resume_from`, its number of steps: rows beyond it, and a last line that
was being written when the run was killed, are dropped first.
"""

import csv
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from rich import progress as bars
from rich.console import Console

Row = dict[str, float]


class Logger(Protocol):
    """What every logger does."""

    def log(self, row: Row) -> None:
        """Takes in one more row."""

    def close(self) -> None:
        """Ends the log."""


class Terminal:
    """A progress bar, and above it the main columns: steps, training, evaluation."""

    def __init__(self, total: int, console: Console, resume_from: int = 0) -> None:
        shown = "steps", bars.BarColumn(), bars.MofNCompleteColumn()
        times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
        # No thread draws by itself: it would hold up the run.
        self._bar = bars.Progress(*shown, *times, console=console, auto_refresh=False)
        self._task = self._bar.add_task("", total=total, completed=resume_from)
        self._steps, self._drawn = resume_from, 0.0
        self._bar.start()

    def progress(self, steps: int) -> None:
        """Moves the bar. Cheap enough for every step: it is seldom drawn."""
        self._steps, now = steps, time.perf_counter()
        if now - self._drawn > 0.5:
            self._bar.update(self._task, completed=steps, refresh=True)
            self._drawn = now

    def log(self, row: Row) -> None:
        """Prints one more row."""
        shown = [
            f"{name.replace('_', ' ')} {value:{'9,' if name == 'steps' else '9.4g'}}"
            for name, value in row.items()
            if name == "steps" or name.startswith(("training_", "evaluation_"))
        ]
        self._bar.console.print("  ".join(shown), highlight=False, markup=False)
        self.progress(int(row.get("steps", self._steps)))

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.update(self._task, completed=self._steps)
        self._bar.stop()


class _Lines(Logger):
    """A text file with a row on each line, some of which may be there already."""

    _parse: Callable[[list[str]], Iterable[Any]]  # from lines to rows

    def __init__(self, path: Path, resume_from: int | None = None) -> None:
        self.path = path
        kept: list[Any] = []
        if resume_from is not None and path.exists():
            *lines, _torn = path.read_text("utf-8").split("\n")
            rows = list(self._parse(lines))
            if rows and "steps" not in rows[0]:
                columns = ", ".join(rows[0])
                raise ValueError(f"{path} must have a column steps, got {columns}")
            kept = [row for row in rows if float(row["steps"]) <= resume_from]
        beside = path.with_name(f"{path.name}.new")
        with beside.open("w", encoding="utf-8", newline="") as self._file:
            for row in kept:
                self.log(row)
        os.replace(beside, path)  # at once: a kill leaves the old file or the new one
        self._file = path.open("a", encoding="utf-8", newline="")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class CSVFile(_Lines):
    """Comma-separated values. The first row says which columns there are."""

    _parse = csv.DictReader
    _columns: list[str] | None = None

    def log(self, row: Row) -> None:
        """Writes one more row, which must have the columns of the first."""
        writer = csv.writer(self._file, lineterminator="\n")
        if self._columns is None:
            self._columns = list(row)
            writer.writerow(self._columns)
        if set(row) != set(self._columns):
            columns = f"{self.path} ({', '.join(self._columns)})"
            raise ValueError(
                f"row must have the columns of {columns}, got {', '.join(row)}"
            )
        writer.writerow([row[name] for name in self._columns])
        self._file.flush()


class JSONLines(_Lines):
    """One JSON object on each line. NaN is `null`, and infinity `1e999`."""

    _parse = staticmethod(lambda lines: map(json.loads, lines))

    def log(self, row: Row) -> None:
        """Writes one more row."""
        pairs = [f"{json.dumps(name)}: {_json(value)}" for name, value in row.items()]
        self._file.write(f"{{{', '.join(pairs)}}}\n")
        self._file.flush()


class TensorBoard:
    """Event files for TensorBoard, if tensorboardX is installed."""

    def __init__(self, directory: Path, resume_from: int | None = None) -> None:
        if not self.available():
            raise ValueError("TensorBoard needs tensorboardX: pip install tensorboardX")
        writer = importlib.import_module("tensorboardX").SummaryWriter
        purged = None if resume_from is None else resume_from + 1  # the first to go
        self._writer = writer(str(directory), purge_step=purged)

    @staticmethod
    def available() -> bool:
        """Says whether tensorboardX is installed."""
        return importlib.util.find_spec("tensorboardX") is not None

    def log(self, row: Row) -> None:
        """Adds one more point to the curve of each column, NaN left out."""
        for name, value in row.items():
            if not math.isnan(value):
                self._writer.add_scalar(name, float(value), int(row["steps"]))
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


def _json(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "null"
    return json.dumps(value, default=float).replace("Infinity", "1e999")

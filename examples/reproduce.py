"""Runs every agent as its file says, and writes the table of README.md.

With `--only` some agents, and no table, since the others would be missing from it.

    python examples/reproduce.py
    python examples/reproduce.py --only dqn ppo --seeds 0 1

What each file promises stands at its top: a command, and what it reaches. Each command
runs once for each seed, one after another. The curves go to `examples/curves/`, with
the median and the quartiles of the seeds. The exit status is 1 if a seed fell short.
"""

import ast
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import console
import numpy as np
import plot
import run_folder

EXAMPLES = Path(__file__).parent
PAPER = re.compile(r'(?:Papers?|Book): (.+?), "(.+?)\.?"(?:, (\d{4}), (\S+?))?[.,] ')
PROMISE = re.compile(
    r"^ +(python examples/(\w+)\.py(?:[^\n]|\\\n)*)\n"
    r" +reaches (?:an? )?([a-z ]+) of (at least|at most) (-?[\d.]+) in (\S+), "
    r"within ([\d.]+) minutes?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Config:
    """Runs the agents with several seeds, and writes the table and the curves."""

    only: tuple[str, ...] = ()  # scripts, such as dqn; all by default
    seeds: tuple[int, ...] = (0, 1, 2)  # to run each with
    out: Path = Path("runs/reproduced")  # folder of the runs
    readme: Path = EXAMPLES / "README.md"  # page with the table


class Promise(NamedTuple):
    """What a file says that a command reaches."""

    command: str
    script: str
    column: str  # of the log
    bound: str  # at least, or at most
    value: float
    environment: str
    minutes: float
    paper: str  # as a link, if the file names one

    @property
    def name(self) -> str:
        """Names the curve."""
        chosen = re.findall(r"--(?:core|agent) (\w+)", self.command)
        return "-".join([self.script, self.environment, *chosen]).lower()

    def is_kept_by(self, value: float) -> bool:
        """Whether a result is as good as promised."""
        return value >= self.value if self.bound == "at least" else value <= self.value


class Result(NamedTuple):
    """What one run came to."""

    value: float
    minutes: float  # of the whole command
    steps_per_second: float


def promises(script: Path) -> Iterator[Promise]:
    """Reads what a file says at its top."""
    text = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    papers = PAPER.findall(" ".join(text.split()) + " ")
    for command, name, column, bound, value, environment, minutes in PROMISE.findall(
        text
    ):
        yield Promise(
            " ".join(command.replace("\\\n", " ").split()),
            name,
            "evaluation_" + column.replace(" ", "_"),
            bound,
            float(value),
            environment,
            float(minutes),
            cited(*papers[0]) if papers else "",
        )


def cited(authors: str, title: str, year: str, link: str) -> str:
    """Writes a reference, of which all but the authors and the title may be missing."""
    return f"{authors}, [{title}]({link}), {year}" if link else f"{authors}, {title}"


def run(promise: Promise, seed: int, folder: Path) -> Result:
    """Runs a command with a seed.

    Raises:
        ValueError: if it fails.
    """
    _, *flags = shlex.split(promise.command)
    command = [sys.executable, *flags, f"--seed={seed}", f"--out={folder}"]
    start = time.perf_counter()
    root = EXAMPLES.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL, check=False)
    minutes = (time.perf_counter() - start) / 60
    if done.returncode:
        raise ValueError(f"{promise.command} ended with status {done.returncode}")
    _, columns = run_folder.read(folder)
    last = {name: float(column[-1]) for name, column in columns.items()}
    speed = np.nanmedian(columns["steps_per_second"][1:])
    return Result(last[promise.column], minutes, float(speed))


def row(promise: Promise, results: Sequence[Result]) -> str:
    """Writes a row of the table."""
    command = promise.command.removeprefix("python examples/")
    measured = ", ".join(f"{result.value:.2f}" for result in results)
    minutes = max(result.minutes for result in results)
    speed = np.median([result.steps_per_second for result in results])
    what = promise.column.removeprefix("evaluation_").replace("_", " ")
    cells = [
        f"[`{command}`]({promise.script}.py)",
        promise.environment,
        promise.paper,
        f"{what} {promise.bound} {promise.value:g}",
        measured,
        f"{speed:,.0f}",
        f"{minutes:.1f} of {promise.minutes:g}",
        f"![curve](curves/{promise.name}.png)",
    ]
    return f"| {' | '.join(cells)} |"


def between_marks(page: str, table: str) -> str:
    """Puts a table between the marks of a page."""
    begin, end = "<!-- reproduce.py writes from here -->", "<!-- to here -->"
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"the page has no {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def table(rows: Sequence[str], seeds: Sequence[int]) -> str:
    """Puts the rows under a header, and says where they were measured."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax")
    )
    machine = f"{platform.machine()}, CPython {platform.python_version()}, {versions}"
    names = "command", "environment", "paper", "promised", "reached", "steps/s"
    names = (*names, "minutes, the slowest", "curve")
    listed = ", ".join(map(str, seeds))
    return "\n".join(
        [
            f"| {' | '.join(names)} |",
            "|---" * len(names) + "|",
            *rows,
            "",
            f"Seeds {listed}, each in turn, by `python examples/reproduce.py` on "
            f"{machine}.",
        ]
    )


def main() -> int:
    """Runs what the command line says. Returns 1 if something fell short."""
    config = console.command_line(Config)
    scripts = [
        script
        for script in sorted(EXAMPLES.glob("*.py"))
        if script.name != "reproduce.py" and script.stem in (config.only or script.stem)
    ]
    unknown = set(config.only) - {script.stem for script in scripts}
    if unknown:
        console.fail(f"only must name scripts of examples/, got {', '.join(unknown)}")
    found = [promise for script in scripts for promise in promises(script)]
    rows, short = [], 0
    for promise in found:
        folders = [config.out / promise.name / str(seed) for seed in config.seeds]
        results = []
        for seed, folder in zip(config.seeds, folders, strict=True):
            try:
                result = run(promise, seed, folder)
            except ValueError as error:
                print(error)
                result = Result(np.nan, np.nan, np.nan)
            kept = promise.is_kept_by(result.value)
            short += not kept
            results.append(result)
            print(promise.command, seed, result, "kept" if kept else "SHORT")
        curve = EXAMPLES / "curves" / f"{promise.name}.png"
        curve.parent.mkdir(exist_ok=True)
        if not np.isnan([result.value for result in results]).any():
            plot.compare(plot.Config(tuple(folders), curve, promise.column))
        rows.append(row(promise, results))
    if not config.only:
        page = config.readme.read_text("utf-8")
        written = between_marks(page, table(rows, config.seeds))
        config.readme.write_text(written, "utf-8")
    return min(short, 1)


if __name__ == "__main__":
    sys.exit(main())

"""Compares runs: the median learning curve of each kind, over its seeds.

    python examples/plot.py runs/*/ --out curves.png

Runs that differ in nothing but the seed are of one kind. Each is drawn thinly, below
the median and the band between the quartiles. Between the rows of a run its curve is a
straight line; after its last row it no longer counts.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import console
import numpy as np
import run_folder
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Flags that change what is written, and where, but not what is learned.
IGNORED = ("seed", "out", "checkpoint_dir", "checkpoint_every", "render")

Curve = tuple[np.ndarray, np.ndarray]  # steps, and the value at each


@dataclass(frozen=True)
class Config:
    """Draws the learning curves of runs, grouped by what differs between them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # the folders of runs
    out: Path = Path("curves.png")  # the picture
    column: str = "evaluation_return"  # of the log: what is drawn


def main() -> int:
    """Draws what the command line says; a mistake there ends it with status 2."""
    try:
        compare(console.command_line(Config))
    except (OSError, ValueError) as problem:
        console.fail(str(problem))
    return 0


def compare(config: Config) -> None:
    """Draws the picture, and says what was drawn.

    Raises:
        ValueError: There is no such run, or no such column in its log.
    """
    if not config.runs:
        raise ValueError("runs must name the folder of at least one run")
    configs, curves = [], []
    for folder in dict.fromkeys(folder.resolve() for folder in config.runs):
        about, columns = run_folder.read(folder)
        if config.column not in columns:
            known = ", ".join(columns)
            raise ValueError(
                f"column must be one of {folder.name} ({known}), got {config.column}"
            )
        configs.append(about)
        curves.append(run_folder.points(columns, config.column))
        if not curves[-1][0].size:
            raise ValueError(f"{folder.name} has no {config.column} yet")
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xlabel="environment steps", ylabel=config.column.replace("_", " ")
    )
    groups = group(configs)
    for label, members in groups.items():
        print(draw(axes, [curves[i] for i in members], label))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(config.out)
    print(config.out)


def group(configs: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Puts runs of one kind together, under a label that says what is their own."""
    heads = [
        " on ".join(filter(None, [each["script"], each["flags"].get("env")]))
        for each in configs
    ]
    groups: dict[str, list[int]] = {}
    for i, head in enumerate(heads):
        alike = [c["flags"] for c, h in zip(configs, heads, strict=True) if h == head]
        flags = [
            f"{name}={alike_value}"
            for name, alike_value in configs[i]["flags"].items()
            if name not in IGNORED
            and any(other.get(name) != alike_value for other in alike)
        ]
        groups.setdefault(", ".join([head, *flags]), []).append(i)
    return groups


def draw(axes: Axes, curves: Sequence[Curve], label: str) -> str:
    """Draws the curves of one kind, and returns a line that says which."""
    slack = row_spacing(curves) / 2
    ends = [steps[-1] for steps, _ in curves]
    short = [f"{end:.0f}" for end in sorted(ends) if end + slack < max(ends)]
    seeds = f"{len(curves)} seed{'s' if len(curves) > 1 else ''}"
    if short:
        seeds += f", {len(short)} stopped early"
    grid, (lower, median, upper) = quartiles(curves, slack)
    (line,) = axes.plot(grid, median, label=f"{label} ({seeds})")
    axes.fill_between(grid, lower, upper, color=line.get_color(), alpha=0.2, lw=0)
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*curve, color=line.get_color(), alpha=0.4, lw=0.6)
    at = f" at {', '.join(short)} of {max(ends):.0f} steps" if short else ""
    return f"{label}: {seeds}{at}"


def row_spacing(curves: Sequence[Curve]) -> float:
    """Returns how many steps there usually are between two rows."""
    gaps = np.concatenate([np.diff(steps) for steps, _ in curves])
    return float(np.median(gaps)) if gaps.size else 0.0


def quartiles(curves: Sequence[Curve], slack: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of all curves, and the three quartiles there, `f[3,N]`.

    A curve counts between its first and its last step, and `slack` steps around: not
    every run writes its rows at quite the same steps.
    """
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    values = np.array([np.interp(grid, *curve) for curve in curves])
    for row, (steps, _) in zip(values, curves, strict=True):
        row[(grid < steps[0] - slack) | (grid > steps[-1] + slack)] = np.nan
    return grid, np.nanquantile(values, (0.25, 0.5, 0.75), axis=0)


if __name__ == "__main__":
    sys.exit(main())

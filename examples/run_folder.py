"""The folder of a run: its flags and versions, its log, and the picture of both.

`config.json` says how the run was made, `metrics.csv` has the rows of its log.
"""

import csv
import dataclasses
import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import rlprims

CONFIG = "config.json"
METRICS = "metrics.csv"
PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "flax",
    "optax",
    "orbax-checkpoint",
    "dm-env",
    "gymnasium",
)

Columns = dict[str, np.ndarray]  # the rows of a log, by column name


def write_config(folder: Path, config: Any, script: str) -> None:
    """Writes how a run is made, for whoever wants to make it again.

    Args:
        folder: Made if there is none.
        config: A dataclass: the flags. Of a path outside the working directory only
            the last part is written, since the rest tells of the machine and its user.
        script: Its name or path, of which the name is written.
    """
    device = jax.devices()[0]
    record = {
        "script": Path(script).stem,
        "flags": {
            name: str(value)
            if isinstance(value, float) and math.isinf(value)
            else value
            for name, value in dataclasses.asdict(config).items()
        },
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "versions": _versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{CONFIG}.new"
    beside.write_text(json.dumps(record, indent=2, default=_plain) + "\n", "utf-8")
    os.replace(beside, folder / CONFIG)


def read(folder: Path) -> tuple[dict[str, Any], Columns]:
    """Reads a run's config, and the rows of its log so far.

    Raises:
        ValueError: There is no such run, or nothing in its log yet.
    """
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must be the folder of a run, has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        *whole, _torn = (folder / METRICS).read_text("utf-8").split("\n")
        names, *rows = csv.reader(whole) if whole else [[]]
        values = np.array(rows, float)
    except ValueError as error:
        raise ValueError(f"cannot read the run {folder}: {error}") from None
    if "steps" not in names or not rows:
        raise ValueError(f"{folder / METRICS} has no rows yet")
    return config, dict(zip(names, values.T, strict=True))


def points(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which a column has a value, and the values."""
    there = np.isfinite(columns[name])
    return columns["steps"][there], columns[name][there]


def draw(columns: Columns, title: str, path: Path) -> None:
    """Draws the learning curve: all columns of training and evaluation."""
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="steps")
    for name in columns:
        if name.startswith(("training_", "evaluation_")):
            axes.plot(*points(columns, name), ".-", label=name.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def _versions() -> dict[str, str]:
    installed = {"python": platform.python_version(), "rlprims": rlprims.__version__}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _plain(value: Any) -> str:
    """Writes what JSON does not know as text."""
    if not isinstance(value, Path) or not value.is_absolute():
        return str(value)
    here = Path.cwd()
    return str(value.relative_to(here) if value.is_relative_to(here) else value.name)

"""What the scripts do at the terminal: read flags, show progress, draw the result."""

import contextlib
import io
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import dm_env
import jax
import tyro
from catch import Catch
from gym_adapter import GymAdapter
from loop import Agent, Point, learning_curve
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


@dataclass(frozen=True)
class Config:
    """The flags that every script has."""

    env: str = "Catch"  # Catch, or a Gymnasium id such as CartPole-v1
    seed: int = 0  # one seed, one learning curve
    episodes: int = 1000  # to learn from
    evaluate_every: int = 50  # episodes from one point of the curve to the next
    evaluation_episodes: int = 100  # played for each point, greedily
    out: Path | None = None  # the picture: runs/SCRIPT-ENV-seed-SEED.png by default

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "seed" else 1
            if isinstance(value, int) and not least <= value < 2**31:
                raise ValueError(f"{name} must lie in [{least}, 2^31), got {value}")
            if isinstance(value, float) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if self.out and self.out.suffix != ".png":
            raise ValueError(f"out must end in .png, got {self.out}")


Flags = TypeVar("Flags", bound=Config)
Rules = Callable[[Flags, Any, Any], Any]  # from flags and two specs; see `loop.Agent`


def main(flags: type[Flags], rules: Rules[Flags]) -> int:
    """Trains an agent as the command line says.

    Returns:
        The exit status: 0, or 130 after Ctrl-C, which keeps the curve so far.
    """
    config = command_line(flags)
    script = Path(sys.argv[0]).stem
    name = f"{script}-{config.env.replace('/', '-')}-seed-{config.seed}.png"
    out = config.out or Path("runs", name)
    try:
        env, test_env = (make_env(config.env, config.seed + i) for i in (0, 10_000))
    except ValueError as error:
        fail(str(error))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write {out}: {error.strerror}")
    title = f"{script} on {config.env}, seed {config.seed}"
    terminal = Console()
    terminal.print(f"{title}, backend {jax.default_backend()}")
    start = time.perf_counter()
    with ctrl_c() as pressed:
        points = learning_curve(
            Agent(rules(config, env.observation_spec(), env.action_spec())),
            env,
            test_env,
            config.episodes,
            config.evaluate_every,
            config.evaluation_episodes,
            stop=pressed.is_set,
        )
        curve = list(show_progress(points, config.episodes, terminal))
        seconds = time.perf_counter() - start
        draw(curve, title, out)
        terminal.print(summary(curve, seconds, out))
    return 130 if pressed.is_set() else 0


def command_line(flags: type[Flags]) -> Flags:
    """Reads a dataclass from the command line, a flag for each field."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(flags)
    except SystemExit as end:
        if not end.code:  # after --help
            raise
    # An error comes in a box, between a title and where to find help.
    text = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", " ", printed.getvalue())
    problem = [*re.split("[─-]{9,}", text), text][1]
    fail(f"{problem.strip()} (see --help)")


def fail(problem: str) -> NoReturn:
    """Ends the script over a mistake in its flags, with one line and status 2."""
    print(f"{Path(sys.argv[0]).name}:", *problem.split(), file=sys.stderr)
    sys.exit(2)


def make_env(name: str, seed: int) -> dm_env.Environment:
    """Makes Catch, or a Gymnasium environment by its id."""
    return Catch(seed=seed) if name == "Catch" else GymAdapter.make(name, seed)


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Notes Ctrl-C, which JAX does not take well. The second one does interrupt."""
    pressed = threading.Event()

    def press(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, usual)


def show_progress(
    points: Iterable[Point], episodes: int, terminal: Console
) -> Iterator[Point]:
    """Passes the points of a learning curve on, printing each under a progress bar."""
    with Progress(console=terminal) as progress:
        bar = progress.add_task("episodes", total=episodes)
        for point in points:
            yield point
            progress.update(bar, completed=point.episodes)
            progress.print(
                f"{point.episodes:6} episodes {point.steps:8} steps   mean return "
                f"{point.training_return:7.2f} exploring "
                f"{point.evaluation_return:7.2f} greedy"
            )


def draw(curve: Sequence[Point], title: str, out: Path) -> None:
    """Draws a learning curve."""
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="episodes", ylabel="mean return")
    episodes = [point.episodes for point in curve]
    exploring = [point.training_return for point in curve]
    greedy = [point.evaluation_return for point in curve]
    axes.plot(episodes, exploring, ".-", color="tab:gray", label="exploring")
    axes.plot(episodes, greedy, ".-", color="tab:blue", label="greedy")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(out)


def summary(curve: Sequence[Point], seconds: float, out: Path) -> Table:
    """Makes the table that ends a run."""
    last = curve[-1]
    table = Table(show_header=False)
    for name, value in {
        "mean greedy return": f"{last.evaluation_return:.2f}",
        "episodes": last.episodes,
        "steps": last.steps,
        "seconds": f"{seconds:.1f}",
        "steps per second": f"{last.steps / seconds:.0f}",
        "backend": jax.default_backend(),
        "learning curve": out,
    }.items():
        table.add_row(name, str(value))
    return table

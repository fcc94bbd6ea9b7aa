"""The command line of every script: its flags, its mistakes, and Ctrl-C."""

import contextlib
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import jax.numpy as jnp
import loop
import tyro
from experiment import AgentExperiment, Experiment
from rich.console import Console


@dataclass(frozen=True)
class RunConfig:
    """The flags that every script has."""

    seed: int = 0  # one seed, one learning curve
    steps: int = 10_000  # to learn from, of all environments together
    evaluate_every: int = 500  # steps from one point of the curve to the next
    evaluation_episodes: int = 100  # played for each point, without exploring
    out: Path | None = None  # folder of the run: runs/SCRIPT-ENV-seed-SEED by default
    checkpoint_dir: Path | None = None  # folder of checkpoints: resumes from the last
    checkpoint_every: int = 1000  # steps from one checkpoint to the next

    ranges: ClassVar[dict[str, tuple[float, float]]] = {}  # of flags, where unusual

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool):
                continue
            if isinstance(value, int):
                least, most = self.ranges.get(name, (0 if name == "seed" else 1, 2**31))
                if not least <= value < most:
                    most = "2^31" if most == 2**31 else most
                    raise ValueError(
                        f"{name} must lie in [{least}, {most}), got {value}"
                    )
            if isinstance(value, float):
                least, most = self.ranges.get(name, (0, 1))
                if not least <= value <= most:
                    raise ValueError(
                        f"{name} must lie in [{least}, {most}], got {value}"
                    )

    @property
    def task(self) -> str:
        """What is learned, for titles and the names of folders."""
        raise NotImplementedError


@dataclass(frozen=True)
class Config(RunConfig):
    """The flags that every agent has."""

    env: str = "Catch"  # Catch, a Gymnasium id such as CartPole-v1, or see README.md
    environments: int = 1  # that take their steps together
    render: Literal["no", "terminal", "gif"] = "no"  # an episode, in the end

    @property
    def task(self) -> str:
        """The environment."""
        return self.env


Flags = TypeVar("Flags", bound=RunConfig)
Read = TypeVar("Read")
Rules = Callable[[Flags, Any, Any], loop.Rules]  # from flags and two specs


def main(flags: type[Flags], rules: Rules[Flags]) -> int:
    """Trains an agent as the command line says. Returns the exit status of `run`."""
    return run(
        flags,
        lambda config, folder, script: AgentExperiment(config, folder, script, rules),
    )


def run(flags: type[Flags], prepare: Callable[[Flags, Path, str], Experiment]) -> int:
    """Reads flags, prepares an experiment with them, and runs it.

    Args:
        flags: the flags of the script.
        prepare: from flags, the folder of the run and the name of the script.

    Returns:
        The exit status: 0, or 130 after Ctrl-C, which keeps the run so far.
    """
    config = command_line(flags)
    if jnp.result_type(float) == jnp.float64:
        fail("the examples are programs for 32 bits: unset JAX_ENABLE_X64")
    script = Path(sys.argv[0]).stem
    name = f"{script}-{config.task.replace('/', '-')}-seed-{config.seed}"
    try:
        experiment = prepare(config, config.out or Path("runs", name), script)
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {error.filename}: {error.strerror}")
    with ctrl_c() as pressed:
        experiment.run(Console(), pressed.is_set)
    return 130 if pressed.is_set() else 0


def command_line(flags: type[Read]) -> Read:
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

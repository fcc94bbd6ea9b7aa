"""A run: engine, meters, loggers, checkpoints and pictures, put together.

Everything of a run goes to one folder: `config.json` (flags and versions),
`metrics.csv` (a row for each evaluation), `curve.png`, and what is rendered.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import environments
import jax
import loggers
import loop
import meters
import numpy as np
import rendering
import run_folder
from rich.console import Console
from rich.table import Table


class Experiment:
    """A run, ready to start, or to go on from its last checkpoint.

    Args:
        config: a `console.Config`.
        folder: of the run.
        script: what runs, for `config.json` and the title of the picture.
        events: the iterator to run through.
        measured: meters, which read the columns of the log.
        evaluate: returns columns for a row of the log.

    Raises:
        ValueError: if the checkpoints are of another run.
        OSError: if something cannot be written.
    """

    def __init__(
        self,
        config: Any,
        folder: Path,
        script: str,
        events: Any,
        measured: Sequence[Any],
        evaluate: Callable[[], dict[str, float]],
    ) -> None:
        self.config, self.folder, self.evaluate = config, folder, evaluate
        self.title = f"{script} on {config.task}, seed {config.seed}"
        self.engine = loop.Engine(events, measured)
        self.loggers: list[loggers.Logger] = []
        self.checkpoints, self.resumed = None, None
        if config.checkpoint_dir:
            from checkpoints import Checkpoints  # noqa: PLC0415  (takes a second)

            flags = {"script": script} | vars(config)
            self.checkpoints = Checkpoints(config.checkpoint_dir, flags)
            self.resumed = self.checkpoints.restore(self.engine)
        run_folder.write_config(folder, config, script)

    def run(self, terminal: Console, stop: Callable[[], bool] = lambda: False) -> None:
        """Trains the agent, until it is done or told to stop, and draws the curve."""
        config, engine = self.config, self.engine
        terminal.print(f"{self.title}, backend {jax.default_backend()}")
        if self.resumed is not None:
            changes = [f"{name} was {old}" for name, old in self.resumed.items()]
            terminal.print(f"resumes at step {engine.steps}", *changes, sep=", ")
        resume_from = None if self.resumed is None else engine.steps
        self.loggers = [loggers.CSVFile(self.folder / run_folder.METRICS, resume_from)]
        if loggers.TensorBoard.available():
            self.loggers.append(loggers.TensorBoard(self.folder, resume_from))
        screen = loggers.Terminal(config.steps, terminal, engine.steps)
        self.loggers.append(screen)
        engine.hooks = [
            lambda engine: screen.progress(engine.steps),
            loop.Every(config.evaluate_every, self.report),
        ]
        if self.checkpoints:
            save = self.checkpoints.save
            engine.hooks.append(loop.Every(config.checkpoint_every, save))

        def stop_if_told(engine: loop.Engine) -> None:
            engine.stopped = stop()

        engine.hooks.append(stop_if_told)  # after the others, which it must not change
        try:
            engine.run(config.steps)
        finally:
            for logger in self.loggers:
                logger.close()
        if self.checkpoints:
            self.checkpoints.save(engine)
            self.checkpoints.close()
        try:
            _, columns = run_folder.read(self.folder)
        except ValueError:  # it had been done before, and was logged elsewhere
            terminal.print(f"{engine.steps} steps are done, and none was logged here")
            return
        run_folder.draw(columns, self.title, self.folder / "curve.png")
        terminal.print(self.summary(columns))

    def report(self, engine: loop.Engine) -> None:
        """Evaluates the agent, and logs that with what the meters read."""
        row = {name: x for meter in engine.meters for name, x in meter.read().items()}
        row |= self.evaluate()
        for logger in self.loggers:
            logger.log(row)

    def summary(self, columns: run_folder.Columns) -> Table:
        """Makes the table that ends a run."""
        last = {name: float(column[-1]) for name, column in columns.items()}
        shown = {name: x for name, x in last.items() if name.startswith("evaluation_")}
        table = Table(show_header=False)
        for name, value in {
            **{name.replace("_", " "): f"{x:.2f}" for name, x in shown.items()},
            "episodes": f"{last['episodes']:.0f}",
            "steps": f"{last['steps']:.0f}",
            "seconds": f"{last['seconds']:.1f}",
            "steps per second": f"{last['steps'] / last['seconds']:.0f}",
            "backend": jax.default_backend(),
            "folder": str(self.folder),
        }.items():
            table.add_row(name, value)
        return table


class AgentExperiment(Experiment):
    """A run of an agent in environments.

    Args:
        config: a `console.Config`.
        folder: of the run.
        script: what runs, for `config.json` and the title of the picture.
        rules: the agent, from the flags and the specs of observations and actions.

    Raises:
        ValueError: if there is no such environment, if the agent cannot act in it, if
            it cannot be drawn as asked, or if the checkpoints are of another run.
        OSError: if something cannot be written.
    """

    def __init__(
        self,
        config: Any,
        folder: Path,
        script: str,
        rules: Callable[[Any, Any, Any], loop.Rules],
    ) -> None:
        envs = make_envs(config, config.environments, stream=0)
        self.test_envs = make_envs(config, config.evaluation_episodes, stream=1)
        self.at_first = self.test_envs.save()
        if config.render != "no":  # better refused now than after the run
            self.stage = environments.make(config.env, config.seed, "rgb_array")
            self.stage.reset()
            rendering.frame(self.stage)
        self.agent = loop.Agent(rules(config, *envs.specs()))
        names = self.agent.metric_names(envs.example())
        measured = [meters.Steps(), meters.Return(), *map(meters.Metric, names)]
        events = loop.Interaction(envs, self.agent)
        super().__init__(config, folder, script, events, measured, self.evaluation)

    def evaluation(self) -> dict[str, float]:
        """Plays the same episodes each time, without exploring."""
        self.test_envs.load(self.at_first)
        return {"evaluation_return": loop.evaluate(self.test_envs, self.agent)}

    def run(self, terminal: Console, stop: Callable[[], bool] = lambda: False) -> None:
        """Trains the agent, and shows an episode in the end, if that is asked for."""
        super().run(terminal, stop)
        if self.config.render == "no":
            return
        frames = rendering.play(self.stage, loop.best_actions(self.agent))
        if self.config.render == "gif":
            rendering.save_gif(frames, self.folder / "episode.gif")
        else:
            rendering.show(frames, terminal)


def make_envs(config: Any, count: int, stream: int) -> loop.Environments:
    """Makes environments with seeds of their own."""
    seeds = np.random.SeedSequence([config.seed, stream]).generate_state(count)
    return loop.Environments([environments.make(config.env, int(s)) for s in seeds])

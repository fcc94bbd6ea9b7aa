"""What is measured during a run.

A meter has four methods: `update` takes in each event of the run, `read` returns what
the log is told and starts the next interval, `save` and `load` are for checkpoints. A
run that was killed and resumed logs the same numbers, all but those of the clock.

What is gathered is one thing and how it is summed up another: `Metric("loss")` gives a
mean, `Metric("loss", quantiles(0.1, 0.9))` two quantiles, and `Return` does likewise.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from loop import Event

Summary = Callable[[str, Collection[float]], dict[str, float]]

_LONG_DONE = 1024  # steps after which the device has surely worked out a metric


def mean(name: str, values: Collection[float]) -> dict[str, float]:
    """Returns the mean, or NaN if there are no values."""
    return {name: sum(values) / len(values) if values else math.nan}


def quantiles(*levels: float) -> Summary:
    """Returns what gives quantiles, as `loss_q0.5` and so on, or NaN without values."""
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels must be some numbers in [0, 1], got {levels}")

    def summary(name: str, values: Collection[float]) -> dict[str, float]:
        with np.errstate(invalid="ignore"):  # between infinities
            results = np.quantile([*values] or [math.nan], levels).tolist()
        return dict(zip([f"{name}_q{q:g}" for q in levels], results, strict=True))

    return summary


class Steps:
    """How many steps and episodes there were, in how many seconds, and how fast.

    The seconds are those of the clock on the wall: evaluations count, the time between
    saving and loading does not.
    """

    def __init__(self) -> None:
        self.load({"steps": 0, "episodes": 0, "seconds": 0.0})

    def update(self, event: Event) -> None:
        """Takes in one step of every environment."""
        self.steps += event.steps
        self.episodes += int(np.count_nonzero(event.timestep.last))

    def read(self) -> dict[str, float]:
        """Returns all so far, and `steps_per_second` since the last reading."""
        before, now = self._before, self.save()
        steps, seconds = (now[name] - before[name] for name in ("steps", "seconds"))
        self.load(now)
        return {**now, "steps_per_second": steps / max(seconds, 1e-9)}

    def save(self) -> dict[str, Any]:
        """Returns `steps`, `episodes` (those that ended) and `seconds` so far."""
        seconds = self._before["seconds"] + time.perf_counter() - self._clock
        return {"steps": self.steps, "episodes": self.episodes, "seconds": seconds}

    def load(self, data: dict[str, Any]) -> None:
        """Goes on from what was saved, with a new interval."""
        self.steps, self.episodes = data["steps"], data["episodes"]
        self._before, self._clock = data, time.perf_counter()


class Metric:
    """What a metric of the agent was since the last reading, NaN left out.

    The loop does not wait for the device: metrics are kept as they come, and looked at
    when they are read, or after so many newer ones that they are long done.
    """

    def __init__(self, name: str, summary: Summary = mean) -> None:
        self.name, self.summary = name, summary
        self._values: list[Any] = []  # the last ones may still be on the device

    def update(self, event: Event) -> None:
        """Takes in one step of every environment."""
        if self.name not in event.metrics:
            known = ", ".join(sorted(event.metrics)) or "none"
            got = f"({known}), got {self.name!r}"
            raise ValueError(f"Metric: name must be a metric of the agent {got}")
        self._values.append(event.metrics[self.name])
        if len(self._values) % _LONG_DONE == 0:
            old = slice(-2 * _LONG_DONE, -_LONG_DONE)
            self._values[old] = [float(np.asarray(x)) for x in self._values[old]]

    def read(self) -> dict[str, float]:
        """Returns columns for a row of the log."""
        values = self.save()["values"]
        self._values.clear()
        return self.summary(self.name, values)

    def save(self) -> dict[str, Any]:
        """Returns all that the meter knows, for JSON."""
        values = [float(np.asarray(value)) for value in self._values]
        return {"values": [value for value in values if not math.isnan(value)]}

    def load(self, data: dict[str, Any]) -> None:
        """Becomes the meter that was saved."""
        self._values = list(data["values"])


class Return:
    """What the undiscounted returns of episodes were that ended since the last reading.

    With a `window`, those of the last so many episodes, whenever they ended.
    """

    def __init__(
        self,
        window: int | None = None,
        summary: Summary = mean,
        name: str = "training_return",
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"Return: window must be at least 1, got {window}")
        self.window, self.summary, self.name = window, summary, name
        self.load({"values": [], "running": []})

    def update(self, event: Event) -> None:
        """Takes in one step of every environment."""
        _, r_t, _, first, last = event.timestep
        if not self._running.size:
            self._running = np.zeros(r_t.shape)
        if self._running.shape != r_t.shape:
            shape = self._running.shape
            raise ValueError(f"Return: r_t must keep shape {shape}, got {r_t.shape}")
        self._running += r_t
        if np.count_nonzero(first):
            self._running[first] = 0.0
        if np.count_nonzero(last):
            self._values.extend(self._running[last].tolist())

    def read(self) -> dict[str, float]:
        """Returns columns for a row of the log."""
        columns = self.summary(self.name, self._values)
        if self.window is None:
            self._values.clear()
        return columns

    def save(self) -> dict[str, Any]:
        """Returns all that the meter knows, for JSON."""
        return {"values": list(self._values), "running": self._running.tolist()}

    def load(self, data: dict[str, Any]) -> None:
        """Becomes the meter that was saved."""
        self._values = deque[float](data["values"], maxlen=self.window)
        self._running = np.array(data["running"], float)

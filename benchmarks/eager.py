"""Costs of a call outside `jax.jit`: time, compilations, and memory over 1,000 calls.

Every call gets new values, as in an agent that has not been compiled. The floor is a
`jax.jit` of the same function, called in turn with it.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import machine

import rlprims

CALLS, STEPS, ACTIONS = 1000, 20, 4
COMPILED = "/jax/core/compile/backend_compile_duration"


def arguments(rng: np.random.Generator, *shapes: Any) -> list[Any]:
    """Returns one array for each shape; an `int` stands for an action."""
    return [
        np.int32(rng.integers(ACTIONS))
        if shape is int
        else rng.uniform(size=shape).astype(np.float32)
        for shape in shapes
    ]


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "q_learning": (rlprims.q_learning, (ACTIONS, int, (), (), ACTIONS)),
    "lambda_returns": (rlprims.lambda_returns, (STEPS, STEPS, STEPS)),
    "truncated_generalized_advantage_estimation": (
        rlprims.truncated_generalized_advantage_estimation,
        (STEPS, STEPS, (), STEPS + 1),
    ),
}


def resident_bytes() -> int:
    """Returns the memory of this process, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def microseconds(fn: Callable[..., Any], args: list[Any]) -> float:
    """Returns the time of one finished call."""
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return (time.perf_counter() - start) * 1e6


def main() -> None:
    """Prints one line for each case."""
    compilations = 0

    def count(event: str, *_: Any, **__: Any) -> None:
        nonlocal compilations
        compilations += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)
    for name, (fn, shapes) in CASES.items():
        rng, compiled = np.random.default_rng(0), jax.jit(fn)
        for _ in range(100):  # warm caches and allocators
            microseconds(fn, arguments(rng, *shapes))
            microseconds(compiled, arguments(rng, *shapes))
        before, resident, eager, floor = compilations, resident_bytes(), [], []
        for _ in range(CALLS):
            eager.append(microseconds(fn, arguments(rng, *shapes)))
            floor.append(microseconds(compiled, arguments(rng, *shapes)))
        line = {
            "case": name,
            "eager_us": round(statistics.median(eager), 1),
            "jitted_us": round(statistics.median(floor), 1),
            "compilations": compilations - before,
            "growth_bytes": resident_bytes() - resident,
        }
        print(json.dumps(line | machine()))


if __name__ == "__main__":
    main()

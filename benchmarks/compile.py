"""Seconds to compile `n_step_bootstrapped_returns`, by `n`."""

import functools
import json
import time

import jax
import jax.numpy as jnp
from machine import machine

import rlprims

STEPS, BATCH = 1024, 32


def main() -> None:
    """Prints one line for each `n`."""
    shapes = [jax.ShapeDtypeStruct((STEPS, BATCH), jnp.float32)] * 3
    for n in (1, 5, 20, 100, 400, 1000, 5000):
        returns = functools.partial(rlprims.n_step_bootstrapped_returns, n=n)
        batched = jax.vmap(returns, in_axes=1, out_axes=1)
        start = time.perf_counter()
        lowered = jax.jit(batched).lower(*shapes)
        traced = time.perf_counter()
        lowered.compile()
        line = {
            "case": "n_step_bootstrapped_returns",
            "n": n,
            "trace_s": round(traced - start, 3),
            "compile_s": round(time.perf_counter() - traced, 3),
        }
        print(json.dumps(line | machine()))


if __name__ == "__main__":
    main()

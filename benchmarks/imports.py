"""Time to `import rlprims`, against importing what it stands on.

Fresh processes, interleaved; the interpreter's own start is part of both.
"""

import json
import statistics
import subprocess
import sys
import time

from machine import machine

ROUNDS = 15
VARIANTS = {"base": "import jax, chex, dm_env", "rlprims": "import rlprims"}


def seconds(code: str) -> float:
    """Returns the time a fresh process takes to run `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints one line."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name, code in VARIANTS.items():
            times[name].append(seconds(code))
    ratios = [ours / base for ours, base in zip(*reversed(times.values()), strict=True)]
    medians = {f"{k}_s": round(statistics.median(v), 3) for k, v in times.items()}
    line = medians | {"ratio": round(statistics.median(ratios), 3)}
    print(json.dumps(line | machine()))


if __name__ == "__main__":
    main()

"""Uniform draws, as evenly spread as one likes, in more digits than one number has."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

Method = Literal["independent", "stratified", "systematic"]


def draw_cells(
    name: str, key: Array, count: int, method: Method, dtype: Any
) -> tuple[Array, Array, int]:
    """Draws points in two parts: a cell of the unit interval, and where in the cell.

    The interval has 4096 cells or more, so that the two together place a point more
    finely than one number could. `name` is the function that has them drawn.

    Returns:
        The number of each cell and the fraction of the cell, `f[B]`, and how many cells
        there are.
    """
    most = round(1 / jnp.finfo(dtype).eps)
    if not 1 <= count <= most:
        raise ValueError(f"{name}: num_samples must be in [1, {most}], got {count}.")
    parts = 1 if method == "independent" else count
    each = 1 << max(12 - (parts - 1).bit_length(), 0)  # cells to a part
    shape = (2, 1 if method == "systematic" else count)
    draws = jax.random.uniform(key, shape, dtype)
    coarse, fine = jnp.broadcast_to(draws, (2, count))
    part = jnp.zeros_like(fine) if parts == 1 else jnp.arange(count, dtype=dtype)
    return part * each + jnp.floor(coarse * each), fine, parts * each


def placed(cell: Array, fraction: Array, cells: int) -> Array:
    """Returns the point that far into its cell, and never in the next one."""
    start, end = cell / cells, (cell + 1) / cells
    last = jnp.nextafter(end, jnp.zeros_like(end))
    return jnp.minimum(start + (end - start) * fraction, last)

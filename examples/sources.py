"""What agents learn from: the experience they keep, on the device.

Each source is a few pure functions of what it has stored, for use inside of a step::

    init(row) -> stored             an empty store, for rows like this one
    add(stored, rows, ...) -> stored
    sample(key, stored) -> batch    or, of `Rollout`, the stored rows themselves

A row is any tree of arrays, such as a `loop.Transition`; rows have a leading axis, the
environments they come from. `NStep` stands before a replay, and folds what goes in.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Stored(NamedTuple):
    """A ring of rows: the newest replaces the oldest."""

    rows: Any  # each array with a leading axis, the capacity
    next: Array  # i[], where the next row goes
    size: Array  # i[], how many rows there are


class Replay:
    """Keeps the newest rows and draws from them uniformly, with replacement.

    Args:
        capacity: how many rows to keep.
        batch_size: how many to draw.
    """

    def __init__(self, capacity: int, batch_size: int) -> None:
        self.capacity, self.batch_size = capacity, batch_size

    def init(self, row: Any) -> Stored:
        """Returns an empty store for rows of which `row` is one."""
        rows = jax.tree.map(
            lambda x: jnp.zeros((self.capacity, *jnp.shape(x)), jnp.result_type(x)), row
        )
        return Stored(rows, jnp.int32(0), jnp.int32(0))

    def add(self, stored: Stored, rows: Any, valid: Array) -> Stored:
        """Adds a batch of rows, without those that are not valid: `b[B]`.

        Raises:
            ValueError: if there is no room for a row of each environment.
        """
        if valid.size > self.capacity:
            raise ValueError(
                f"capacity must be {valid.size} or more, a row for each environment; "
                f"got {self.capacity}"
            )
        slots = self.slots(stored, valid)
        kept = jax.tree.map(
            lambda old, new: old.at[slots].set(new.astype(old.dtype), mode="drop"),
            stored.rows,
            rows,
        )
        added = jnp.sum(valid, dtype=jnp.int32)
        return Stored(
            kept,
            (stored.next + added) % self.capacity,
            jnp.minimum(stored.size + added, self.capacity),
        )

    def slots(self, stored: Stored, valid: Array) -> Array:
        """Returns where rows are added; those out of range are left out."""
        slots = (stored.next + jnp.cumsum(valid) - 1) % self.capacity
        return jnp.where(valid, slots, self.capacity)

    def sample(self, key: Array, stored: Stored) -> Any:
        """Draws a batch of rows. There must be one at least."""
        chosen = jax.random.randint(key, (self.batch_size,), 0, stored.size)
        return jax.tree.map(lambda x: x[chosen], stored.rows)


class Rollout:
    """Keeps the last `length` rows of each environment, to learn from once, in order.

    Args:
        length: how many steps, `T`.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def init(self, rows: Any) -> Any:
        """Returns an empty store `[T,B,...]` for batches like `rows: [B,...]`."""
        return jax.tree.map(
            lambda x: jnp.zeros((self.length, *jnp.shape(x)), jnp.result_type(x)), rows
        )

    def add(self, stored: Any, rows: Any, steps: Array) -> Any:
        """Writes the rows of step number `steps`, counted from 0."""
        return jax.tree.map(
            lambda old, new: old.at[steps % self.length].set(new.astype(old.dtype)),
            stored,
            rows,
        )

    def is_full(self, steps: Array) -> Array:
        """Whether the rows of step number `steps` complete the store."""
        return steps % self.length == self.length - 1

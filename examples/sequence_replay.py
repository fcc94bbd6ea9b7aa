"""A replay of sequences of steps, each with what was remembered before it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from sources import Replay, Rollout, Stored

import rlprims


class Sequences(NamedTuple):
    """What `SequenceReplay` keeps."""

    window: Any  # the last rows and carries of each environment, [L,B,...]
    stored: Stored  # sequences: rows [L,...] and the carry before the first of them
    tree: rlprims.SumTree  # how likely each is to be drawn
    largest: Array  # f[], the largest such number so far


class Drawn(NamedTuple):
    """A batch of `N` sequences."""

    rows: Any  # each array [L,N,...]
    carry: Any  # before the first row, [N,...]
    indices: Array  # i[N], where they are stored
    probabilities: Array  # f[N], how likely each was to be drawn


class SequenceReplay:
    """Keeps the newest sequences of rows, and draws them by priority.

    The rows of each environment, in order, are one stream. A sequence of `length` rows
    of it starts every `period` rows, so that those with a shorter period overlap. With
    each is kept the carry of a recurrent network before its first row. New ones are
    drawn as often as the likeliest so far, others in proportion to their priority to
    the power of an exponent.

    Args:
        capacity: how many sequences to keep.
        batch_size: how many to draw.
        length: rows of a sequence, `L`.
        period: rows from the start of one sequence to that of the next.
        exponent: how much priorities count: 0 draws uniformly.
    """

    def __init__(
        self,
        capacity: int,
        batch_size: int,
        length: int,
        period: int,
        exponent: float = 0.9,
    ) -> None:
        self.batch_size, self.length, self.period = batch_size, length, period
        self.exponent = exponent
        self.recent, self.replay = Rollout(length), Replay(capacity, batch_size)

    def init(self, rows: Any, carry: Any) -> Sequences:
        """Returns an empty store for batches like these: `[B,...]`.

        Raises:
            ValueError: if there is no room for a sequence of each environment.
        """
        batch, capacity = len(jax.tree.leaves(rows)[0]), self.replay.capacity
        if capacity < batch:
            raise ValueError(
                f"capacity must be {batch} or more, one sequence for each environment; "
                f"got {capacity}"
            )
        window = self.recent.init((rows, carry))
        sequence = jax.tree.map(lambda x: x[:, 0], window[0])
        stored = self.replay.init((sequence, jax.tree.map(lambda x: x[0], carry)))
        tree = rlprims.create_sum_tree(jnp.zeros(capacity))
        return Sequences(window, stored, tree, jnp.float32(1))

    def add(self, kept: Sequences, rows: Any, carry: Any, steps: Array) -> Sequences:
        """Adds the rows of step number `steps`, counted from 0, and what was before.

        Args:
            kept: what is kept so far.
            rows: a row of each environment, `[B,...]`.
            carry: what the network remembered before these rows, `[B,...]`.
            steps: their number.
        """
        window = self.recent.add(kept.window, (rows, carry), steps)
        oldest = (steps + 1) % self.length
        order = (oldest + jnp.arange(self.length)) % self.length
        sequences = jax.tree.map(lambda x: jnp.swapaxes(x[order], 0, 1), window[0])
        carries = jax.tree.map(lambda x: x[oldest], window[1])
        complete = self.is_complete(steps)
        batch = len(jax.tree.leaves(rows)[0])
        valid = jnp.full(batch, complete)
        slots = self.replay.slots(kept.stored, valid)
        powers = jnp.full(batch, kept.largest)
        return Sequences(
            window,
            self.replay.add(kept.stored, (sequences, carries), valid),
            rlprims.update_sum_tree(kept.tree, slots, powers),
            kept.largest,
        )

    def is_complete(self, steps: Array) -> Array:
        """Whether the rows of step number `steps` are the last of a sequence."""
        starts = steps + 1 - self.length
        return (starts >= 0) & (starts % self.period == 0)

    def sample(self, key: Array, kept: Sequences) -> Drawn:
        """Draws a batch of sequences. There must be one at least."""
        drawn = rlprims.sample_sum_tree(key, kept.tree, self.batch_size)
        rows, carry = jax.tree.map(lambda x: x[drawn.indices], kept.stored.rows)
        rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows)
        return Drawn(rows, carry, drawn.indices, drawn.probabilities)

    def update(self, kept: Sequences, indices: Array, priorities: Array) -> Sequences:
        """Sets priorities, `f[N]`, of sequences drawn; an index of -1 sets none.

        A little is added to each, so that what has no error can be drawn again.
        """
        priorities = rlprims.proportional_priorities(priorities, epsilon=1e-6)
        powers = jnp.where(indices < 0, 0.0, priorities**self.exponent)
        return kept._replace(
            tree=rlprims.update_sum_tree(kept.tree, indices, powers),
            largest=jnp.maximum(kept.largest, jnp.max(powers)),
        )

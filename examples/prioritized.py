"""A replay from which those transitions are drawn most often that surprise most.

Paper: Schaul, Quan, Antonoglou and Silver, "Prioritized Experience Replay", 2015,
https://arxiv.org/abs/1511.05952, with priorities in proportion to errors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from sources import Replay, Stored

import rlprims


class Prioritized(NamedTuple):
    """A ring of rows, and how likely each is to be drawn."""

    ring: Stored
    tree: rlprims.SumTree  # of priorities to the power of the exponent; 0 if empty


class Drawn(NamedTuple):
    """What a prioritised replay draws."""

    rows: Any  # each array with a leading axis, the batch size
    weights: Array  # f[batch_size], importance weights, for the loss
    slots: Array  # i[batch_size], to be named when giving new priorities


class PrioritizedReplay:
    """Keeps the newest rows, and draws those most often that surprise most.

    As `Replay`, but for two things. `sample` takes an exponent too, how much of the
    bias its weights are to undo, and returns weights and slots beside the rows. And
    once their errors are known, `update_priorities` is told.

    Args:
        capacity: how many rows to keep.
        batch_size: how many to draw.
        priority_exponent: how much errors count: 0 is to draw uniformly.
    """

    def __init__(
        self, capacity: int, batch_size: int, priority_exponent: float
    ) -> None:
        self.ring = Replay(capacity, batch_size)
        self.priority_exponent = priority_exponent

    def init(self, row: Any) -> Prioritized:
        """Returns an empty store for rows of which `row` is one."""
        priorities = jnp.zeros(self.ring.capacity)
        return Prioritized(self.ring.init(row), rlprims.create_sum_tree(priorities))

    def add(self, stored: Prioritized, rows: Any, valid: Array) -> Prioritized:
        """Adds a batch of rows, with the greatest priority there is, or 1 at first."""
        ring, tree = stored
        greatest = jnp.where(ring.size > 0, jnp.max(tree.priorities), 1.0)
        slots = self.ring.slots(ring, valid)
        tree = rlprims.update_sum_tree(tree, slots, jnp.full(slots.shape, greatest))
        return Prioritized(self.ring.add(ring, rows, valid), tree)

    def sample(
        self, key: Array, stored: Prioritized, importance_exponent: ArrayLike
    ) -> Drawn:
        """Draws a batch of rows. There must be one at least; else the slots are -1."""
        slots, probabilities = rlprims.sample_sum_tree(
            key, stored.tree, self.ring.batch_size
        )
        return Drawn(
            jax.tree.map(lambda x: x[slots], stored.ring.rows),
            rlprims.prioritized_importance_weights(
                probabilities, importance_exponent=importance_exponent
            ),
            slots,
        )

    def update_priorities(
        self, stored: Prioritized, slots: Array, errors: Array
    ) -> Prioritized:
        """Takes the errors of the rows in these slots for new priorities, `f[B]`."""
        sizes = rlprims.proportional_priorities(errors, epsilon=1e-6)
        priorities = sizes**self.priority_exponent
        tree = rlprims.update_sum_tree(stored.tree, slots, priorities)
        return stored._replace(tree=tree)

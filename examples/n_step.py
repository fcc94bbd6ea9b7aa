"""Transitions of several steps, folded from those of one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from loop import Transition

import rlprims


class Window(NamedTuple):
    """The last `n` steps of each environment, the newest last: `[B,n,...]`."""

    rows: Transition
    truncation_t: Array  # whether a time limit ended the episode
    mask_t: Array  # whether it is a step at all, and no reset


class NStep:
    """Folds transitions of one step into transitions of `n`.

    Each step starts one, which is complete `n - 1` steps later. It is shorter where the
    episode ends before: no transition leads from one episode into the next.

    Args:
        n: how many steps to fold, at least 1. With 1, all stays as it is.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def init(self, rows: Transition) -> Window:
        """Returns an empty window for batches like `rows: [B,...]`."""
        blank = jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x)] * self.n, 1), rows)
        no = lambda: jnp.zeros_like(blank.r_t, bool)
        return Window(blank, no(), no())

    def add(
        self, window: Window, rows: Transition, truncated: Array, valid: Array
    ) -> tuple[Window, Transition, Array]:
        """Takes in a step of each environment.

        Returns:
            The window, the transitions that started `n - 1` steps ago, and which of
            them are valid: in the first steps of all there is none yet.
        """
        window = jax.tree.map(
            lambda old, new: jnp.concatenate(
                [old[:, 1:], new[:, jnp.newaxis].astype(old.dtype)], axis=1
            ),
            window,
            Window(rows, truncated, valid),
        )
        return window, jax.vmap(self._fold)(window), window.mask_t[:, 0]

    def _fold(self, window: Window) -> Transition:
        rows, truncation_t, mask_t = window
        folded = rlprims.n_step_transitions(
            rows.r_t,
            rows.discount_t,
            self.n,
            truncation_t=truncation_t,
            mask_t=mask_t,
        )
        last = folded.last_t[0]
        obs_t = jax.tree.map(lambda x: x[last], rows.obs_t)
        first = jax.tree.map(lambda x: x[0], rows)
        return first._replace(
            r_t=folded.r_t[0], discount_t=folded.discount_t[0], obs_t=obs_t
        )

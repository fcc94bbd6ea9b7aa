"""Catch: a ball falls down a small board, and a paddle must be under it in the end.

The ball starts in a random column of the top row and falls one row a step. The paddle
starts in the middle of the bottom row and moves left, stays or moves right. When the
ball reaches the bottom row the episode ends, with reward +1 if the paddle is under it
and -1 if not. All other rewards are 0. Playing at random returns about -0.6; playing
perfectly returns 1.

    >>> env = Catch(rows=4, columns=3, seed=0)
    >>> first, second = env.reset(), env.step(0)
    >>> env.render().split()
    ['...', '..o', '...', '=..']
"""

from typing import Any

import dm_env
import numpy as np
from dm_env import specs
from episodic import Episodic


class Catch(Episodic):
    """The game of Catch, as a `dm_env.Environment`.

    The observation is the board, `f32[rows, columns]`: 1 where the ball is and where
    the paddle is, 0 elsewhere. Each one is a new array, never changed afterwards.

    Args:
        rows: height of the board, at least 2. An episode lasts `rows - 1` steps.
        columns: width of the board.
        seed: decides the column of every ball to come.
    """

    def __init__(self, rows: int = 10, columns: int = 5, seed: int = 0) -> None:
        if rows < 2 or columns < 1:
            raise ValueError(
                f"Catch: the board must be 2 x 1 or larger, got {rows} x {columns}."
            )
        super().__init__(seed)
        self._rows, self._columns = rows, columns
        self._ball_row = self._ball_column = self._paddle = 0

    def start(self, seed: int) -> np.ndarray:
        """Throws a new ball."""
        rng = np.random.default_rng(seed)
        self._ball_row, self._ball_column = 0, int(rng.integers(self._columns))
        self._paddle = self._columns // 2
        return self._board()

    def act(self, action: int) -> dm_env.TimeStep:
        """Moves the paddle: 0 is left, 1 is stay, 2 is right."""
        if action not in {0, 1, 2}:
            raise ValueError(f"Catch: action must be 0, 1 or 2, got {action}.")
        self._paddle = min(max(self._paddle + int(action) - 1, 0), self._columns - 1)
        self._ball_row += 1
        if self._ball_row == self._rows - 1:
            caught = self._paddle == self._ball_column
            return dm_env.termination(1.0 if caught else -1.0, self._board())
        return dm_env.transition(0.0, self._board())

    def observation_spec(self) -> Any:
        """The board: zeros and ones."""
        shape = self._rows, self._columns
        return specs.BoundedArray(shape, np.float32, 0.0, 1.0, "board")

    def action_spec(self) -> Any:
        """Left, stay, right."""
        return specs.DiscreteArray(3, name="action")

    def reward_spec(self) -> Any:
        """From -1 for a ball missed to 1 for a ball caught."""
        return specs.BoundedArray((), float, -1.0, 1.0, "reward")

    def render(self) -> str:
        """Draws the board: `o` is the ball and `=` the paddle, unless it is behind."""
        cells = np.full((self._rows, self._columns), ".")
        cells[-1, self._paddle] = "="
        cells[self._ball_row, self._ball_column] = "o"
        return "\n".join(map("".join, cells))

    def _board(self) -> np.ndarray:
        board = np.zeros((self._rows, self._columns), np.float32)
        board[-1, self._paddle] = board[self._ball_row, self._ball_column] = 1.0
        return board

"""Cliff walking: the shortest way to the goal leads along the edge of a cliff.

The walker starts in the bottom left corner of a board of 4 x 12 cells and looks for the
goal in the bottom right one. Between them, all along the bottom row, is a cliff. Every
step earns -1; one over the edge earns -100 instead, and takes the walker back to the
start. The episode terminates at the goal, and is truncated by a time limit. Walking
along the edge, the best there is, returns -13.

Source: Sutton and Barto, "Reinforcement Learning: An Introduction", 2nd edition, 2018.

    >>> env = Cliff()
    >>> timesteps = env.reset(), env.step(0)
    >>> env.render().split()[2:]
    ['@...........', '.xxxxxxxxxxG']
"""

from typing import Any

import dm_env
import numpy as np
from dm_env import specs
from episodic import Episodic

ROWS, COLUMNS = 4, 12
START, GOAL = (ROWS - 1, 0), (ROWS - 1, COLUMNS - 1)
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left


class Cliff(Episodic):
    """Cliff walking, as a `dm_env.Environment`.

    The observation is the board, `f32[4, 12]`: 1 where the walker is, 0 elsewhere. It
    does not tell the time.

    Args:
        time_limit: steps after which an episode is truncated.
        seed: decides nothing here, since nothing is random.
    """

    def __init__(self, time_limit: int = 200, seed: int = 0) -> None:
        if time_limit < 1:
            raise ValueError(f"Cliff: time_limit must be 1 or more, got {time_limit}.")
        super().__init__(seed)
        self._time_limit, self._time, self._cell = time_limit, 0, START

    def start(self, seed: int) -> np.ndarray:
        """Puts the walker at the start."""
        self._time, self._cell = 0, START
        return self._board()

    def act(self, action: int) -> dm_env.TimeStep:
        """Walks: 0 is up, 1 is right, 2 is down, 3 is left. Walls stop the walker."""
        if action not in range(len(MOVES)):
            raise ValueError(f"Cliff: action must be 0, 1, 2 or 3, got {action}.")
        (row, column), (down, right) = self._cell, MOVES[int(action)]
        row = min(max(row + down, 0), ROWS - 1)
        column = min(max(column + right, 0), COLUMNS - 1)
        fallen = row == ROWS - 1 and 0 < column < COLUMNS - 1
        self._cell = START if fallen else (row, column)
        self._time += 1
        make = dm_env.transition
        if self._cell == GOAL:
            make = dm_env.termination
        elif self._time == self._time_limit:
            make = dm_env.truncation
        return make(-100.0 if fallen else -1.0, self._board())

    def observation_spec(self) -> Any:
        """The board: zeros and a one."""
        return specs.BoundedArray((ROWS, COLUMNS), np.float32, 0.0, 1.0, "board")

    def action_spec(self) -> Any:
        """Up, right, down, left."""
        return specs.DiscreteArray(len(MOVES), name="action")

    def reward_spec(self) -> Any:
        """-1, or -100 for a fall."""
        return specs.BoundedArray((), float, -100.0, -1.0, "reward")

    def render(self) -> str:
        """Draws the board: `@` is the walker, `G` the goal and `x` the cliff."""
        cells = np.full((ROWS, COLUMNS), ".")
        cells[-1, 1:-1], cells[GOAL], cells[self._cell] = "x", "G", "@"
        return "\n".join(map("".join, cells))

    def _board(self) -> np.ndarray:
        board = np.zeros((ROWS, COLUMNS), np.float32)
        board[self._cell] = 1.0
        return board

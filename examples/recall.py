"""Recall: a cue is shown, and asked for when it can no longer be seen.

The first observation shows one of several cues, at random. A delay follows in which
there is nothing to see, not even the time. Then a flag goes up: the action taken there
earns +1 if it names the cue and -1 if not, and the episode ends. All other rewards are
0, and all other actions are without effect.

An agent that remembers can return 1. One that acts on the present observation alone
returns 0 on average with two cues, and `2 / num_cues - 1` with more, whatever it does.

    >>> env = Recall(delay=1)
    >>> timestep = env.reset()
    >>> timestep.observation.tolist()
    [0.0, 1.0, 0.0]
    >>> [env.step(0).observation.tolist() for _ in range(2)]
    [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    >>> env.step(1).reward
    1.0
"""

from typing import Any

import dm_env
import numpy as np
from dm_env import specs
from episodic import Episodic


class Recall(Episodic):
    """The memory task, as a `dm_env.Environment`.

    The observation is `f32[num_cues + 1]`: the cue, one-hot, at the first step only;
    and the flag.

    Args:
        delay: steps between the cue and the flag. An episode lasts `delay + 2` steps.
        num_cues: how many cues there are, and actions, at least 2.
        seed: decides every cue to come.
    """

    def __init__(self, delay: int = 5, num_cues: int = 2, seed: int = 0) -> None:
        if delay < 0:
            raise ValueError(f"Recall: delay must be 0 or more, got {delay}.")
        if num_cues < 2:
            raise ValueError(f"Recall: num_cues must be 2 or more, got {num_cues}.")
        super().__init__(seed)
        self._delay, self._num_cues = delay, num_cues
        self._cue = self._time = 0

    def start(self, seed: int) -> np.ndarray:
        """Shows a cue."""
        self._cue = int(np.random.default_rng(seed).integers(self._num_cues))
        self._time = 0
        return self._observation()

    def act(self, action: int) -> dm_env.TimeStep:
        """Waits, or names a cue if the flag is up."""
        if action not in range(self._num_cues):
            raise ValueError(
                f"Recall: action must be 0 to {self._num_cues - 1}, got {action}."
            )
        self._time += 1
        if self._time == self._delay + 2:
            right = action == self._cue
            return dm_env.termination(1.0 if right else -1.0, self._observation())
        return dm_env.transition(0.0, self._observation())

    def observation_spec(self) -> Any:
        """The cue and the flag: zeros and ones."""
        shape = (self._num_cues + 1,)
        return specs.BoundedArray(shape, np.float32, 0.0, 1.0, "cue and flag")

    def action_spec(self) -> Any:
        """The cues."""
        return specs.DiscreteArray(self._num_cues, name="action")

    def reward_spec(self) -> Any:
        """1 for the right answer and -1 for a wrong one."""
        return specs.BoundedArray((), float, -1.0, 1.0, "reward")

    def render(self) -> str:
        """Draws what can be seen: the number of the cue, `?` for the flag, or `.`."""
        if self._time == 0:
            return str(self._cue)
        return "?" if self._time == self._delay + 1 else "."

    def _observation(self) -> np.ndarray:
        observation = np.zeros(self._num_cues + 1, np.float32)
        if self._time == 0:
            observation[self._cue] = 1.0
        elif self._time == self._delay + 1:
            observation[-1] = 1.0
        return observation

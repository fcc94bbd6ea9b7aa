"""Environments that can be saved and go on from there.

All that happens in an episode follows from a seed, the number of the episode and the
actions taken in it. So these, which are plain numbers, are what is saved. Loading them
starts the same episode once more and repeats the actions. Then everything goes on, bit
by bit, as it would have, random draws included. A checksum of the observations tells
an environment that does not repeat itself.

    >>> from catch import Catch
    >>> env, other = Catch(seed=3), Catch()
    >>> timesteps = env.reset(), env.step(0)
    >>> data = env.save()
    >>> data["seed"], data["episodes"], data["actions"]
    (3, 1, [0])
    >>> timestep = other.load(data)
    >>> other.render() == env.render()
    True
"""

import abc
import zlib
from typing import Any

import dm_env
import numpy as np

NOT_REPEATED = (
    "load: data comes from an environment of another kind, or from one "
    "in which something is random that its seed does not decide."
)


class Episodic(dm_env.Environment):
    """Counts episodes, seeds each of them, and remembers the actions of the last one.

    A subclass says what happens in an episode, in `start` and `act`.

    Args:
        seed: decides all that is random, in every episode to come.
    """

    def __init__(self, seed: int) -> None:
        self._begin(seed, 0)

    @abc.abstractmethod
    def start(self, seed: int) -> np.ndarray:
        """Starts an episode, all of whose randomness comes from this seed.

        Returns:
            The first observation.
        """

    @abc.abstractmethod
    def act(self, action: Any) -> dm_env.TimeStep:
        """Takes an action, a Python number or a list of them, within an episode."""

    def reset(self) -> dm_env.TimeStep:
        """Starts an episode."""
        sequence = np.random.SeedSequence((self._seed, self._episodes))
        self._begin(self._seed, self._episodes + 1)
        self._over = False
        observation = self.start(int(sequence.generate_state(1)[0]))
        self._checksum = zlib.crc32(observation.tobytes())
        return dm_env.restart(observation)

    def step(self, action: Any) -> dm_env.TimeStep:
        """Takes an action.

        After the end of an episode, and on a new environment, the action is ignored
        and an episode starts.
        """
        if self._over:
            return self.reset()
        action = np.asarray(action).tolist()
        timestep = self.act(action)
        self._actions.append(action)
        self._checksum = zlib.crc32(timestep.observation.tobytes(), self._checksum)
        self._over = timestep.last()
        return timestep

    def save(self) -> dict[str, Any]:
        """Returns where it stands, as numbers and lists that JSON keeps exactly."""
        return {
            "seed": self._seed,
            "episodes": self._episodes,
            "actions": list(self._actions),
            "checksum": self._checksum,
        }

    def load(self, data: dict[str, Any]) -> dm_env.TimeStep | None:
        """Goes to where another environment of this kind was when it was saved.

        Returns:
            The last timestep that the other one gave; None before its first.

        Raises:
            ValueError: if it does not get there.
        """
        timestep = None
        self._begin(data["seed"], data["episodes"])
        if self._episodes:
            self._episodes -= 1
            timestep = self.reset()
        for action in data["actions"]:
            timestep = self.step(action)
        if self.save() != data:
            raise ValueError(NOT_REPEATED)
        return timestep

    def _begin(self, seed: int, episodes: int) -> None:
        self._seed, self._episodes = seed, episodes
        self._actions: list[Any] = []
        self._checksum, self._over = 0, True

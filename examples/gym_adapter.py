"""Gymnasium environments, as `dm_env` ones.

Gymnasium says in two flags what `dm_env` says in a step type and a discount:

    neither                                                   MID,  discount 1
    terminated    the task is over: no reward can follow      LAST, discount 0
    truncated     a time limit cut it short: it would go on   LAST, discount 1
    both          the task is over                            LAST, discount 0

A learner that multiplies what follows by the discount is then right in every case.
"""

from typing import Any

import dm_env
import gymnasium
import numpy as np
from dm_env import specs
from gymnasium import spaces


class GymAdapter(dm_env.Environment):
    """Turns a Gymnasium environment with discrete actions into a `dm_env` one.

    Observations are flattened to a vector, `f32[D]`; discrete ones become one-hot.

    Args:
        env: the environment.
        seed: the seed of the first episode; the others follow from it.
    """

    def __init__(self, env: gymnasium.Env, seed: int = 0) -> None:
        box = spaces.flatten_space(env.observation_space)
        if not isinstance(env.action_space, spaces.Discrete):
            raise ValueError(f"actions must be discrete, got {env.action_space}.")
        if not isinstance(box, spaces.Box):
            raise ValueError(f"cannot flatten {env.observation_space}.")
        self._env, self._actions, self._box = env, env.action_space, box
        self._seed: int | None = seed
        self._over = True

    @classmethod
    def make(cls, name: str, seed: int = 0) -> "GymAdapter":
        """Makes an environment by its Gymnasium id, such as `CartPole-v1`.

        Raises:
            ValueError: if there is none that can be used, saying why.
        """
        try:
            return cls(gymnasium.make(name), seed)
        except (gymnasium.error.Error, ImportError, ValueError) as error:
            raise ValueError(f"cannot use environment {name!r}: {error}") from error

    def reset(self) -> dm_env.TimeStep:
        """Starts an episode."""
        observation, _ = self._env.reset(seed=self._seed)
        self._seed, self._over = None, False
        return dm_env.restart(self._flat(observation))

    def step(self, action: int) -> dm_env.TimeStep:
        """Acts. On a new environment or after the end, it starts an episode instead."""
        if self._over:
            return self.reset()
        observation, reward, terminated, truncated, _ = self._env.step(
            int(action) + int(self._actions.start)
        )
        self._over = terminated or truncated
        make = dm_env.transition
        if self._over:
            make = dm_env.termination if terminated else dm_env.truncation
        return make(float(reward), self._flat(observation))

    def observation_spec(self) -> Any:
        """A vector, within the bounds of the space."""
        low, high = self._box.low, self._box.high
        return specs.BoundedArray(low.shape, np.float32, low, high, "observation")

    def action_spec(self) -> Any:
        """The actions, counted from 0."""
        return specs.DiscreteArray(int(self._actions.n), name="action")

    def close(self) -> None:
        """Frees what the environment holds."""
        self._env.close()

    def _flat(self, observation: object) -> np.ndarray:
        flat = spaces.flatten(self._env.observation_space, observation)
        return np.array(flat, np.float32)

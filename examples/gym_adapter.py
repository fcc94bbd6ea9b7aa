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
from episodic import Episodic
from gymnasium import spaces


class GymAdapter(Episodic):
    """Turns a Gymnasium environment into a `dm_env` one.

    Observations are flattened to a vector, `f32[D]`; discrete ones become one-hot.
    Discrete actions are counted from 0. Those in a `Box` of floats keep their shape and
    bounds, as `f32`, and are handed on as they come, neither scaled nor clipped.

    Every episode is seeded by itself, so that a saved environment can repeat it. What
    an environment keeps from one episode to the next besides its random generator is
    not saved.

    Args:
        env: the environment.
        seed: decides the seed of every episode.
    """

    def __init__(self, env: gymnasium.Env, seed: int = 0) -> None:
        super().__init__(seed)
        box, actions = spaces.flatten_space(env.observation_space), env.action_space
        if not isinstance(box, spaces.Box):
            raise ValueError(f"cannot flatten {env.observation_space}.")
        if not isinstance(actions, spaces.Box | spaces.Discrete) or (
            isinstance(actions, spaces.Box) and actions.dtype.kind != "f"
        ):
            raise ValueError(
                f"actions must be discrete or a Box of floats, got {actions}."
            )
        self._env, self._space, self._box = env, actions, box

    def start(self, seed: int) -> np.ndarray:
        """Starts an episode."""
        observation, _ = self._env.reset(seed=seed)
        return self._flat(observation)

    def act(self, action: Any) -> dm_env.TimeStep:
        """Acts, and reads the two flags."""
        space = self._space
        if isinstance(space, spaces.Box):
            action = np.asarray(action, space.dtype)
        else:
            action = int(action) + int(space.start)
        observation, reward, terminated, truncated, _ = self._env.step(action)
        make = dm_env.transition
        if terminated or truncated:
            make = dm_env.termination if terminated else dm_env.truncation
        return make(float(reward), self._flat(observation))

    def observation_spec(self) -> Any:
        """A vector, within the bounds of the space."""
        return _bounded(self._box, "observation")

    def action_spec(self) -> Any:
        """The actions, counted from 0, or an array within the bounds of the space."""
        space = self._space
        if isinstance(space, spaces.Box):
            return _bounded(space, "action")
        return specs.DiscreteArray(int(space.n), name="action")

    def render(self) -> Any:
        """Draws it: `u8[H, W, 3]` if made with `render_mode="rgb_array"`."""
        if self._env.render_mode is None:
            raise ValueError("cannot draw this environment: made without render_mode.")
        try:
            return self._env.render()
        except gymnasium.error.Error as error:
            raise ValueError(f"cannot draw this environment: {error}") from error

    def close(self) -> None:
        """Frees what the environment holds."""
        self._env.close()

    def _flat(self, observation: object) -> np.ndarray:
        flat = spaces.flatten(self._env.observation_space, observation)
        return np.array(flat, np.float32)


def _bounded(box: spaces.Box, name: str) -> specs.BoundedArray:
    low, high = (np.asarray(x, np.float32) for x in (box.low, box.high))
    # Rounded inwards, so that what lies within these bounds lies within the space.
    low = np.where(low < box.low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > box.high, np.nextafter(high, np.float32(-np.inf)), high)
    return specs.BoundedArray(box.shape, np.float32, low, high, name)

"""Environments by name.

    name                      environment
    Catch, Cliff, Recall      the small ones next to this file
    package.module:Factory    any `dm_env` one: what `Factory(seed=seed)` returns, or
                              `Factory()` if it takes no seed
    bsuite/catch/0            an experiment of bsuite: https://github.com/google-deepmind/bsuite
    CartPole-v1               what Gymnasium has by this id

All of them observe one `f32` array, act by a number or by one array, and can be saved:
`env.save()` returns plain numbers and lists, and `env.load(data)` goes on from there.
"""

import functools
import importlib
import inspect
import zlib
from collections.abc import Callable
from typing import Any

import dm_env
import gymnasium
import numpy as np
import tree
from catch import Catch
from cliff import Cliff
from dm_env import specs
from episodic import NOT_REPEATED, Episodic
from gym_adapter import GymAdapter
from recall import Recall

OURS = {"Catch": Catch, "Cliff": Cliff, "Recall": Recall}


class Foreign(dm_env.Environment):
    """Any other `dm_env` environment: as it is, except that it can be saved.

    What is saved are all actions since it was made; loading makes it anew and repeats
    them. So the seed must decide all that is random in it, and the longer it has been
    used, the longer this takes.

    The observation becomes one array of `f32`: one that is an array keeps its shape,
    a discrete one becomes one-hot, and the parts of any other are flattened and put
    together, those of a dictionary in the order of their names.

    Args:
        make: makes the environment from a seed.
        seed: the seed.
    """

    def __init__(self, make: Callable[[int], Any], seed: int = 0) -> None:
        self._make = make
        self._begin(seed)
        spec = self.env.observation_spec()
        self._parts, self._single = tree.flatten(spec), isinstance(spec, specs.Array)
        if not isinstance(self.action_spec(), specs.Array):
            raise ValueError(f"actions must be one array, got {self.action_spec()}.")
        self._dtype = self.action_spec().dtype
        if any(part.dtype.kind not in "biuf" for part in self._parts):
            raise ValueError(f"observations must be numbers, got {spec}.")
        example = tree.map_structure(lambda part: part.generate_value(), spec)
        self._shape = self._to_floats(example).shape

    def reset(self) -> dm_env.TimeStep:
        """Starts an episode."""
        self._actions.append(None)
        return self._convert(self.env.reset())

    def step(self, action: Any) -> dm_env.TimeStep:
        """Takes an action. What it means after the end of an episode is as it was."""
        action = np.asarray(action, self._dtype)
        timestep = self.env.step(action[()])
        self._actions.append(action.tolist())
        return self._convert(timestep)

    def save(self) -> dict[str, Any]:
        """Returns where it stands, as numbers and lists that JSON keeps exactly."""
        return {
            "seed": self._seed,
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
        self.close()
        self._begin(data["seed"])
        timestep = None
        for action in data["actions"]:
            timestep = self.reset() if action is None else self.step(action)
        if self.save() != data:
            raise ValueError(NOT_REPEATED)
        return timestep

    def observation_spec(self) -> Any:
        """One array of `f32`."""
        return specs.Array(self._shape, np.float32, "observation")

    def action_spec(self) -> Any:
        """As it is."""
        return self.env.action_spec()

    def reward_spec(self) -> Any:
        """As it is."""
        return self.env.reward_spec()

    def discount_spec(self) -> Any:
        """As it is."""
        return self.env.discount_spec()

    def close(self) -> None:
        """Frees what the environment holds."""
        self.env.close()

    def _begin(self, seed: int) -> None:
        self._seed, self._actions, self._checksum = seed, [], 0
        self.env = self._make(seed)
        if not isinstance(self.env, dm_env.Environment):
            raise ValueError(f"it is no dm_env.Environment: {self.env!r}.")

    def _convert(self, timestep: dm_env.TimeStep) -> dm_env.TimeStep:
        observation = self._to_floats(timestep.observation)
        self._checksum = zlib.crc32(observation.tobytes(), self._checksum)
        return timestep._replace(observation=observation)

    def _to_floats(self, observation: Any) -> np.ndarray:
        floats = [
            np.eye(spec.num_values, dtype=np.float32)[part]
            if isinstance(spec, specs.DiscreteArray)
            else np.array(part, np.float32)
            for spec, part in zip(self._parts, tree.flatten(observation), strict=True)
        ]
        return (
            floats[0] if self._single else np.concatenate(list(map(np.ravel, floats)))
        )


def make(name: str, seed: int, render_mode: str | None = None) -> Episodic | Foreign:
    """Makes an environment by its name, as the table above has it.

    Args:
        name: which one.
        seed: decides all that is random in it.
        render_mode: how a Gymnasium one will be drawn, `rgb_array` if at all; the
            others need not know.

    Raises:
        ValueError: if there is none that can be used, saying why in one line.
    """
    module, _, factory = name.partition(":")
    try:
        if name in OURS:
            return OURS[name](seed=seed)
        if name.startswith("bsuite/"):
            return Foreign(_bsuite(name.removeprefix("bsuite/")), seed)
        if factory.isidentifier():  # Gymnasium too has names with a colon
            env = Foreign(
                _seeded(getattr(importlib.import_module(module), factory)), seed
            )
            return env.env if isinstance(env.env, Episodic) else env
        return GymAdapter(gymnasium.make(name, render_mode=render_mode), seed)
    except Exception as error:  # whatever the code of others may raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot use environment {name!r}: {reason}") from error


def _seeded(factory: Callable[..., Any]) -> Callable[[int], Any]:
    """Lets a factory have a seed whether it takes one or not."""
    if "seed" in inspect.signature(factory).parameters:
        return lambda seed: factory(seed=seed)
    return lambda seed: factory()


def _bsuite(name: str) -> Callable[[int], Any]:
    """Returns what makes an experiment of bsuite from a seed."""
    try:
        bsuite, sweep = map(importlib.import_module, ("bsuite.bsuite", "bsuite.sweep"))
    except ImportError as error:
        raise ValueError(f"{error} (pip install bsuite)") from error
    if name not in sweep.SETTINGS:
        raise ValueError("bsuite has no such experiment.")
    experiment = bsuite.EXPERIMENT_NAME_TO_ENVIRONMENT[name.partition("/")[0]]
    return _seeded(functools.partial(experiment, **sweep.SETTINGS[name]))

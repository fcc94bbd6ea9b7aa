"""Probes: environments so small that every value is known.

Each needs one more part of an agent to work than the one before, so that the first to
fail tells where to look. γ is the discount, `q[time][sign][action]` are exact values of
the best policy, and v is the value of acting best.

    factory                what an agent must do       exact values
    constant_reward        regress on a reward         q[0] = 1
    reward_by_observation  tell observations apart     q[0][sign] = sign
    delayed_reward         bootstrap, discount once    q[0] = γ, q[1] = 1
    reward_by_action       tell actions apart          q[0][sign] = -sign, sign; v = 1
    reward_by_memory       remember                    q[0] = γ, q[1] as q[0] above
    cut_short              bootstrap at a time limit   q[0] = 1 / (1 - γ)

All of them show `f32[3]`: the time, 0 or 1; a sign, -1 or 1, drawn for each episode;
and a flag that asks for the sign of the step before. All have two actions, so that one
compiled agent serves them all; where nothing is said of an action, it has no effect.

With `continuous=True` the action is `f32[1]` in [-1, 1] instead. What depends on the
action is then 1 - (a - sign / 2)^2, so that sign / 2 is the best one and v is the same.

    >>> reward_by_action().action_values(discount=0.5)[0].tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    >>> cut_short().action_values(discount=0.5)[0].tolist()
    [[2.0, 2.0], [2.0, 2.0]]
"""

from collections.abc import Callable
from typing import Any

import dm_env
import numpy as np
from dm_env import specs
from episodic import Episodic


class Probe(Episodic):
    """Shows a time and a random sign; rewards what it is told to.

    Args:
        reward: a function of time, sign and action.
        length: steps in an episode.
        truncated: whether a time limit ends it, and not a termination.
        clock: whether the observation tells the time.
        memory: whether the sign is hidden after the first step, and the flag goes up.
        continuous: whether an action is an array, and not 0 or 1.
        seed: decides every sign.
    """

    def __init__(
        self,
        reward: Callable[[int, float, Any], float],
        length: int = 1,
        truncated: bool = False,
        clock: bool = True,
        memory: bool = False,
        continuous: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self._reward, self._length, self._truncated = reward, length, truncated
        self._clock, self._memory, self._continuous = clock, memory, continuous
        self._time, self._sign = 0, 1.0

    def start(self, seed: int) -> np.ndarray:
        """Draws a sign."""
        self._time, self._sign = 0, float(np.random.default_rng(seed).choice([-1, 1]))
        return self._observation()

    def act(self, action: Any) -> dm_env.TimeStep:
        """Rewards the action."""
        number = action[0] if self._continuous else action
        if not (-1 <= number <= 1 if self._continuous else number in {0, 1}):
            wanted = "lie in [-1, 1]" if self._continuous else "be 0 or 1"
            raise ValueError(f"Probe: action must {wanted}, got {action}.")
        reward = float(self._reward(self._time, self._sign, number))
        self._time += 1
        make = dm_env.transition
        if self._time == self._length:
            make = dm_env.truncation if self._truncated else dm_env.termination
        return make(reward, self._observation())

    def observation_spec(self) -> Any:
        """The time, the sign and the flag."""
        return specs.Array((3,), np.float32, "time, sign and flag")

    def action_spec(self) -> Any:
        """0 or 1, or an array with a number from -1 to 1."""
        if self._continuous:
            return specs.BoundedArray((1,), np.float32, -1.0, 1.0, "action")
        return specs.DiscreteArray(2, name="action")

    def render(self) -> str:
        """Writes what can be seen."""
        return "time {:.0f}, sign {:+.0f}, flag {:.0f}".format(*self._observation())

    def action_values(self, discount: float) -> np.ndarray:
        """Returns the exact values of the best policy, `q[time][sign][action]`.

        A stream cut by a time limit goes on as it began, so it is worth in every state
        what it would be worth without the limit.
        """
        if self._continuous:
            raise ValueError("action_values: there must be two actions, not [-1, 1].")
        q = np.array(
            [
                [[self._reward(t, sign, a) for a in (0, 1)] for sign in (-1.0, 1.0)]
                for t in range(self._length)
            ],
            float,
        )
        after = q[-1].max(-1) / (1 - discount) if self._truncated else np.zeros(2)
        for t in reversed(range(self._length)):
            q[t] += discount * after[:, None]
            after = q[t].max(-1)
        return q

    def _observation(self) -> np.ndarray:
        later = self._memory and self._time > 0
        sign = 0.0 if later else self._sign
        flag = later and self._time < self._length
        return np.array([self._time * self._clock, sign, flag], np.float32)


def constant_reward(seed: int = 0, continuous: bool = False) -> Probe:
    """One step, rewarded with 1."""
    return Probe(lambda time, sign, action: 1.0, continuous=continuous, seed=seed)


def reward_by_observation(seed: int = 0, continuous: bool = False) -> Probe:
    """One step, rewarded with the sign."""
    return Probe(lambda time, sign, action: sign, continuous=continuous, seed=seed)


def delayed_reward(seed: int = 0, continuous: bool = False) -> Probe:
    """Two steps, of which the second is rewarded with 1."""
    return Probe(lambda time, sign, action: time, 2, continuous=continuous, seed=seed)


def reward_by_action(seed: int = 0, continuous: bool = False) -> Probe:
    """One step, rewarded with 1 for the action that the sign tells, else with less."""
    match = _closeness if continuous else _agreement
    return Probe(
        lambda time, sign, action: match(sign, action), continuous=continuous, seed=seed
    )


def reward_by_memory(seed: int = 0, continuous: bool = False) -> Probe:
    """Two steps: the second is rewarded by the sign, which only the first shows."""
    match = _closeness if continuous else _agreement
    return Probe(
        lambda time, sign, action: time * match(sign, action),
        length=2,
        memory=True,
        continuous=continuous,
        seed=seed,
    )


def cut_short(seed: int = 0, continuous: bool = False) -> Probe:
    """Rewards of 1 without end, cut after each step by a limit that cannot be seen."""
    return Probe(
        lambda time, sign, action: 1.0,
        truncated=True,
        clock=False,
        continuous=continuous,
        seed=seed,
    )


def _agreement(sign: float, action: int) -> float:
    return sign * (2 * action - 1)


def _closeness(sign: float, action: float) -> float:
    return 1 - (action - sign / 2) ** 2

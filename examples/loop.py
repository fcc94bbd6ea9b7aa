"""How an agent and an environment take turns.

    for transition in episode(env, agent.explore):
        agent.learn(transition)

is the whole of it, with any `dm_env.Environment`. What to keep of a transition, and
what to learn from what is kept, are up to the agent. Three things are easy to get wrong
and are settled here:

*   **An episode keeps its last observation.** It is `obs_t` of the last transition, and
    not the observation that the next episode starts with.
*   **To stop is not to terminate.** The step type says when an episode stops. Whether
    anything could have followed, `discount_t` says: it is 0 after a termination, and 1
    still if a time limit cut the episode short.
*   **No transition leads from one episode into the next.** Each starts with a reset,
    which is not a transition: it has no action and no reward.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import dm_env
import jax
import numpy as np

Policy = Callable[[Any], int]


class Transition(NamedTuple):
    """A step of experience: what was seen and done, and what came of it."""

    obs_tm1: Any
    a_tm1: Any
    r_t: Any
    discount_t: Any
    obs_t: Any


class Point(NamedTuple):
    """A point of a learning curve. Returns are not discounted, and means."""

    episodes: int  # played so far
    steps: int  # taken so far
    training_return: float  # since the last point, exploring; NaN at the first
    evaluation_return: float  # of episodes played now, exploiting


class Agent:
    """The rules of an agent, compiled, and the state they have brought it to.

    The rules are an object with four pure methods::

        init() -> state
        explore(state, observation) -> action to learn from
        exploit(state, observation) -> best action known
        learn(state, transition) -> next state
    """

    def __init__(self, rules: Any) -> None:
        self.state = rules.init()
        self._explore = jax.jit(rules.explore)
        self._exploit = jax.jit(rules.exploit)
        self._learn = jax.jit(rules.learn, donate_argnums=0)  # updates it in place

    def explore(self, observation: Any) -> int:
        """Returns an action to learn from."""
        return int(self._explore(self.state, observation))

    def exploit(self, observation: Any) -> int:
        """Returns the best action known."""
        return int(self._exploit(self.state, observation))

    def learn(self, transition: Transition) -> None:
        """Takes in one more transition."""
        self.state = self._learn(self.state, transition)


def episode(env: dm_env.Environment, policy: Policy) -> Iterator[Transition]:
    """Plays one episode, yielding each transition as it happens."""
    timestep = env.reset()
    while not timestep.last():
        action = policy(timestep.observation)
        before, timestep = timestep, env.step(action)
        yield Transition(
            obs_tm1=before.observation,
            a_tm1=action,
            r_t=timestep.reward,
            discount_t=timestep.discount,
            obs_t=timestep.observation,
        )


def evaluate(env: dm_env.Environment, policy: Policy, episodes: int) -> float:
    """Returns the mean return of a policy."""
    returns = [sum(step.r_t for step in episode(env, policy)) for _ in range(episodes)]
    return float(np.mean(returns))


def learning_curve(
    agent: Agent,
    env: dm_env.Environment,
    test_env: dm_env.Environment,
    episodes: int,
    evaluate_every: int,
    evaluation_episodes: int,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Point]:
    """Trains an agent and yields its learning curve, from untrained to trained.

    At every step it asks `stop` whether to end early.
    """
    untrained = evaluate(test_env, agent.exploit, evaluation_episodes)
    yield Point(0, 0, float("nan"), untrained)
    steps, returns = 0, []
    for played in range(1, episodes + 1):
        rewards = []
        for transition in episode(env, agent.explore):
            if stop():
                return
            agent.learn(transition)
            rewards.append(transition.r_t)
        steps += len(rewards)
        returns.append(sum(rewards))
        if played % evaluate_every == 0 or played == episodes:
            trained = evaluate(test_env, agent.exploit, evaluation_episodes)
            yield Point(played, steps, float(np.mean(returns)), trained)
            returns.clear()

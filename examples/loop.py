"""How agents and environments take turns, and how a run goes on.

    events = Interaction(Environments([Catch()]), Agent(rules))
    Engine(events, meters=[Return()], hooks=[Every(1000, log)]).run(9000)

Five ideas snap together, and each can be replaced by itself:

*   a **source** of experience: `Environments` here, and what agents learn from, in
    `sources.py`;
*   an **iterator** over it: `Interaction`, in which agent and environments take turns;
*   the **engine**, which counts steps and calls **hooks**: to evaluate, log and save;
*   **meters**, in `meters.py`, which watch the events go by;
*   **loggers**, in `loggers.py`, which take what the meters read.

Three things are easy to get wrong and are settled here, by what a `Timestep` is:

*   **An episode keeps its last observation.** A timestep that is `last` shows it; the
    `first` one of the next episode comes after, as a timestep of its own.
*   **To stop is not to terminate.** `last` says that an episode stops. Whether anything
    could have followed, `discount_t` says: it is 0 after a termination, and 1 still if
    a time limit cut the episode short.
*   **No transition leads from one episode into the next.** From `last` to `first` is no
    transition: the action between them is ignored. Where `first` is false, the step
    before and this one are one; `mask_t = ~first` in rlprims' words.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import dm_env
import jax
import numpy as np

Metrics = dict[str, Any]  # scalars by name


class Timestep(NamedTuple):
    """What `B` environments show at a time. Row `b` is environment `b`."""

    observation: Any  # f[B,...]
    r_t: Any  # f[B], the reward for the action before; 0 where first
    discount_t: Any  # f[B], 0 after a termination, else 1
    first: Any  # b[B], an episode starts here
    last: Any  # b[B], an episode ends here

    @property
    def truncated(self) -> Any:
        """Where an episode ends by a time limit, and not by a termination: `b[B]`."""
        return self.last & (self.discount_t > 0)


class Transition(NamedTuple):
    """A step of experience: what was seen and done, and what came of it."""

    obs_tm1: Any
    a_tm1: Any
    r_t: Any
    discount_t: Any
    obs_t: Any


class Event(NamedTuple):
    """What meters see."""

    steps: int  # how many transitions it adds, of all environments together
    timestep: Timestep  # what the agent took in
    metrics: Metrics  # what it says of itself


class Rules(Protocol):
    """What an agent is: pure functions of all that changes, its state."""

    def init(self) -> Any:
        """Returns the state before the first step."""

    def step(self, state: Any, timestep: Timestep) -> tuple[Any, Any, Metrics]:
        """Takes in what happened, learns if it is due, and answers with actions.

        Returns the next state, an action for each environment, and metrics: scalars
        with the same names at each step, NaN where there is nothing to say.
        """
        ...

    def initial_carry(self, batch: int) -> Any:
        """Returns what `exploit` remembers of `batch` environments at first."""

    def exploit(self, state: Any, carry: Any, timestep: Timestep) -> tuple[Any, Any]:
        """Returns the best actions known, and what to remember."""
        ...


class Agent:
    """The rules of an agent, compiled, and the state they have brought it to."""

    def __init__(self, rules: Rules) -> None:
        self.initial_carry = rules.initial_carry
        self.state = jax.jit(rules.init)()
        self._step = jax.jit(rules.step, donate_argnums=0)  # updates it in place
        self._exploit = jax.jit(rules.exploit)

    def step(self, timestep: Timestep) -> tuple[np.ndarray, Metrics]:
        """Takes in a timestep, and returns actions to learn from, and metrics."""
        self.state, actions, metrics = self._step(self.state, timestep)
        return np.asarray(actions), metrics

    def metric_names(self, timestep: Timestep) -> list[str]:
        """Returns the names of the metrics, for a timestep like this one."""
        return list(self._step.eval_shape(self.state, timestep)[2])

    def exploit(self, carry: Any, timestep: Timestep) -> tuple[np.ndarray, Any]:
        """Returns the best actions known, and what to remember."""
        actions, carry = self._exploit(self.state, carry, timestep)
        return np.asarray(actions), carry


class Environments:
    """A source: several environments that take their steps together.

    Args:
        envs: any `dm_env` ones; to save them, as `environments.make` makes them.
    """

    def __init__(self, envs: Sequence[Any]) -> None:
        self._envs = envs

    def __len__(self) -> int:
        return len(self._envs)

    def reset(self) -> Timestep:
        """Starts an episode in each."""
        return _stacked([env.reset() for env in self._envs])

    def step(self, actions: np.ndarray) -> Timestep:
        """Acts in each; those whose episode has ended start the next one instead."""
        chosen = actions if actions.ndim > 1 else actions.tolist()
        pairs = zip(self._envs, chosen, strict=True)
        return _stacked([env.step(action) for env, action in pairs])

    def specs(self) -> tuple[Any, Any]:
        """Returns the specs of the observation and of the action of one of them."""
        return self._envs[0].observation_spec(), self._envs[0].action_spec()

    def example(self) -> Timestep:
        """Returns a timestep of the right shapes, and takes no step."""
        spec, _ = self.specs()
        return _stacked([dm_env.restart(spec.generate_value())] * len(self))

    def save(self) -> list[Any]:
        """Returns the state of each, as plain data."""
        return [env.save() for env in self._envs]

    def load(self, saved: Sequence[Any]) -> None:
        """Goes back to a state that was saved."""
        for env, data in zip(self._envs, saved, strict=True):
            env.load(data)


def _stacked(timesteps: Sequence[dm_env.TimeStep]) -> Timestep:
    first = np.array([t.first() for t in timesteps])
    return Timestep(
        np.stack([t.observation for t in timesteps]),
        np.array([0.0 if t.first() else t.reward for t in timesteps], np.float32),
        np.array([1.0 if t.first() else t.discount for t in timesteps], np.float32),
        first,
        np.array([t.last() for t in timesteps]),
    )


class Interaction:
    """An iterator: environments and an agent take turns, for ever."""

    def __init__(self, envs: Environments, agent: Agent) -> None:
        self.envs, self.agent = envs, agent
        self.actions: np.ndarray | None = None  # that the environments have yet to take

    @property
    def state(self) -> Any:
        """The state of the agent."""
        return self.agent.state

    @state.setter
    def state(self, state: Any) -> None:
        self.agent.state = state

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        actions, envs = self.actions, self.envs
        timestep = envs.reset() if actions is None else envs.step(actions)
        self.actions, metrics = self.agent.step(timestep)
        steps = int(np.sum(~timestep.first))
        return Event(steps, timestep, metrics)

    def save(self) -> dict[str, Any]:
        """Returns all but the state of the agent, as plain data."""
        if self.actions is None:
            return {"envs": self.envs.save(), "actions": None}
        actions, dtype = self.actions.tolist(), self.actions.dtype.name
        return {"envs": self.envs.save(), "actions": actions, "dtype": dtype}

    def load(self, saved: dict[str, Any]) -> None:
        """Goes back to where it was saved."""
        self.envs.load(saved["envs"])
        actions = saved["actions"]
        self.actions = None if actions is None else np.array(actions, saved["dtype"])


class Engine:
    """Runs through events, lets meters see each, and calls hooks after each.

    Args:
        events: what to run through, such as an `Interaction`.
        meters: objects with a method `update(event)`, see `meters.py`.
        hooks: functions of the engine, called in this order. They are called once
            before the first event as well, when no step has been taken.
    """

    def __init__(
        self,
        events: Any,
        meters: Sequence[Any] = (),
        hooks: Sequence[Callable[["Engine"], None]] = (),
    ) -> None:
        self.events, self.meters, self.hooks = events, meters, list(hooks)
        self.steps = 0  # transitions so far, of all environments together
        self.before = -1  # the same, at the event before
        self.until = 0
        self.stopped = False  # a hook may set it

    @property
    def finished(self) -> bool:
        """Whether this event is the last."""
        return self.steps >= self.until or self.stopped

    def run(self, until: int) -> None:
        """Goes on until so many steps have been taken."""
        self.until = until
        if self.before < 0:
            self._call_hooks()
        while not self.finished:
            event = next(self.events)
            self.before, self.steps = self.steps, self.steps + event.steps
            for meter in self.meters:
                meter.update(event)
            self._call_hooks()

    def save(self) -> dict[str, Any]:
        """Returns all but the state of the agent, as plain data."""
        return {
            "steps": self.steps,
            "meters": [meter.save() for meter in self.meters],
            "events": self.events.save(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Goes back to where it was saved."""
        self.before = self.steps = saved["steps"]
        for meter, data in zip(self.meters, saved["meters"], strict=True):
            meter.load(data)
        self.events.load(saved["events"])

    def _call_hooks(self) -> None:
        for hook in self.hooks:
            hook(self)


class Every:
    """A hook that does something every so many steps, at the start, and at the end."""

    def __init__(self, period: int, action: Callable[[Engine], None]) -> None:
        self.period, self.action = period, action

    def __call__(self, engine: Engine) -> None:
        """Acts if the last event has taken the engine past a multiple of the period."""
        passed = engine.steps // self.period > engine.before // self.period
        if passed or engine.finished:
            self.action(engine)


def evaluate(envs: Environments, agent: Agent) -> float:
    """Returns the mean return of one episode in each environment, exploiting."""
    timestep, carry = envs.reset(), agent.initial_carry(len(envs))
    returns, playing = np.zeros(len(envs)), np.ones(len(envs), bool)
    while playing.any():
        actions, carry = agent.exploit(carry, timestep)
        timestep = envs.step(actions)
        returns[playing] += timestep.r_t[playing]
        playing &= ~timestep.last
    return float(np.mean(returns))


def best_actions(agent: Agent) -> Callable[[dm_env.TimeStep], Any]:
    """Returns what an agent does in one environment without exploring."""
    carry = agent.initial_carry(1)

    def act(timestep: dm_env.TimeStep) -> Any:
        nonlocal carry
        actions, carry = agent.exploit(carry, _stacked([timestep]))
        return actions[0]

    return act

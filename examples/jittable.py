"""Catch and CartPole as pure functions, to be compiled together with an agent.

An environment is an object of two pure functions, of one environment each::

    reset(key) -> state                     # an episode is about to start
    step(state, action, key) -> (state, timestep)

`jax.vmap` makes thousands of them, `jax.jit` and `jax.lax.scan` play them without
leaving the device. A timestep is a `loop.Timestep` of one environment, without the
leading axis. They keep the semantics of `dm_env`:

*   The first step after `reset` ignores its action and gives the first timestep.
*   After the last timestep of an episode comes the first one of the next, again
    whatever the action. So the final observation is always there, and the step from one
    to the other is no transition: it is the one whose timestep is `first`.
*   A termination has a discount of 0. A time limit leaves it at 1.

One step in ten of Catch starts an episode, then, and one in 501 of a CartPole that is
held up. Resetting within the same step would save them, at the price of a second
observation beside every first one.

    >>> env = Catch(rows=3, columns=3)
    >>> state = env.reset(jax.random.key(0))
    >>> for key in jax.random.split(jax.random.key(1), 4):
    ...     state, timestep = env.step(state, 1, key)
    ...     print(timestep.first, timestep.last, timestep.discount_t)
    True False 1.0
    False False 1.0
    False True 0.0
    True False 1.0
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from dm_env import specs
from jax import Array
from loop import Timestep


class Environment(Protocol):
    """What an environment has to offer."""

    @property
    def episode_steps(self) -> int:
        """The most transitions that an episode can have."""
        ...

    def observation_spec(self) -> Any:
        """The shape and dtype of an observation."""
        ...

    def action_spec(self) -> Any:
        """The number of actions."""
        ...

    def reset(self, key: Array) -> Any:
        """Returns a state from which any step starts an episode."""
        ...

    def step(self, state: Any, action: Any, key: Array) -> tuple[Any, Timestep]:
        """Acts, or starts an episode if there is none."""
        ...


def _timestep(
    observation: Array, first: Array, r_t: Any, ends: Any, cut: Any = False
) -> Timestep:
    """Returns the timestep of an episode that starts, goes on, ends or is cut short."""
    ends, cut = ~first & jnp.asarray(ends), ~first & jnp.asarray(cut)
    return Timestep(
        observation=observation,
        r_t=jnp.where(first, 0.0, jnp.asarray(r_t, jnp.float32)),
        discount_t=jnp.where(ends, 0.0, jnp.float32(1.0)),
        first=first,
        last=ends | cut,
    )


def _choose(condition: Array, one: Any, other: Any) -> Any:
    """Returns one of two states."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)


class CatchState(NamedTuple):
    """A board of Catch."""

    ball_row: Array
    ball_column: Array
    paddle: Array
    over: Array  # whether the next step starts an episode


@dataclass(frozen=True)
class Catch:
    """The game of catch.py: a ball falls, and a paddle must be under it in the end.

    The observation is the board, `f32[rows, columns]`. Actions are 0 for left, 1 for
    stay and 2 for right.
    """

    rows: int = 10
    columns: int = 5

    def __post_init__(self) -> None:
        if self.rows < 2 or self.columns < 1:
            raise ValueError(
                "Catch: the board must be 2 x 1 or larger, got "
                f"{self.rows} x {self.columns}."
            )

    @property
    def episode_steps(self) -> int:
        """The ball falls one row a step."""
        return self.rows - 1

    def observation_spec(self) -> Any:
        """The board: zeros and ones."""
        shape = self.rows, self.columns
        return specs.BoundedArray(shape, np.float32, 0.0, 1.0, "board")

    def action_spec(self) -> Any:
        """Left, stay, right."""
        return specs.DiscreteArray(3, name="action")

    def reset(self, key: Array) -> CatchState:
        """Places a new ball in a random column."""
        column = jnp.floor(jax.random.uniform(key) * self.columns).astype(jnp.int32)
        paddle = jnp.int32(self.columns // 2)
        return CatchState(jnp.int32(0), column, paddle, jnp.array(True))

    def step(
        self, state: CatchState, action: Any, key: Array
    ) -> tuple[CatchState, Timestep]:
        """Moves the paddle, and the ball by a row."""
        moved = jnp.asarray(action).astype(jnp.int32) - 1
        paddle = jnp.clip(state.paddle + moved, 0, self.columns - 1)
        row = state.ball_row + 1
        over = row == self.rows - 1
        played = CatchState(row, state.ball_column, paddle, over)
        started = self.reset(key)._replace(over=jnp.array(False))
        following = _choose(state.over, started, played)
        caught = jnp.where(paddle == state.ball_column, 1.0, -1.0)
        r_t = jnp.where(over, caught, 0.0)
        return following, _timestep(self._board(following), state.over, r_t, over)

    def _board(self, state: CatchState) -> Array:
        row = jnp.arange(self.rows)[:, None]
        column = jnp.arange(self.columns)[None]
        ball = (row == state.ball_row) & (column == state.ball_column)
        paddle = (row == self.rows - 1) & (column == state.paddle)
        return (ball | paddle).astype(jnp.float32)


class CartPoleState(NamedTuple):
    """A cart with a pole on it."""

    physics: Array  # f[4]: position, velocity, angle and angular velocity
    steps: Array  # so far in this episode
    over: Array  # whether the next step starts an episode


@dataclass(frozen=True)
class CartPole:
    """A pole stands on a cart that is pushed left (0) or right (1) all the time.

    The dynamics, the bounds and the limit are those of Gymnasium's `CartPole-v1`, in
    float32. Every step has a reward of 1. The episode terminates when the cart is more
    than 2.4 from the middle or the pole leans by more than 12 degrees; the limit cuts
    it short.
    """

    limit: int = 500  # steps to an episode

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"CartPole: limit must be at least 1, got {self.limit}.")

    @property
    def episode_steps(self) -> int:
        """The time limit."""
        return self.limit

    def observation_spec(self) -> Any:
        """Position, velocity, angle in radians and angular velocity."""
        return specs.Array((4,), np.float32, "cart and pole")

    def action_spec(self) -> Any:
        """Left, right."""
        return specs.DiscreteArray(2, name="action")

    def reset(self, key: Array) -> CartPoleState:
        """Starts near the middle, almost upright and almost at rest."""
        physics = jax.random.uniform(key, (4,), jnp.float32, -0.05, 0.05)
        return CartPoleState(physics, jnp.int32(0), jnp.array(True))

    def step(
        self, state: CartPoleState, action: Any, key: Array
    ) -> tuple[CartPoleState, Timestep]:
        """Pushes for a fiftieth of a second."""
        physics, steps = self._push(state.physics, action), state.steps + 1
        position, _, angle, _ = physics
        fallen = (jnp.abs(position) > 2.4) | (jnp.abs(angle) > math.radians(12))
        cut = steps >= self.limit
        played = CartPoleState(physics, steps, fallen | cut)
        started = self.reset(key)._replace(over=jnp.array(False))
        following = _choose(state.over, started, played)
        return following, _timestep(following.physics, state.over, 1.0, fallen, cut)

    def _push(self, physics: Array, action: Any) -> Array:
        """Returns where cart and pole are 0.02 seconds later, by a step of Euler's."""
        gravity, pole_mass, mass, half_length, tau = 9.8, 0.1, 1.1, 0.5, 0.02
        _, velocity, angle, angular_velocity = physics
        force = jnp.where(jnp.asarray(action) == 1, 10.0, -10.0)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        moment = pole_mass * half_length
        push = (force + moment * angular_velocity**2 * sin) / mass
        angular_acceleration = (gravity * sin - cos * push) / (
            half_length * (4 / 3 - pole_mass * cos**2 / mass)
        )
        acceleration = push - moment * angular_acceleration * cos / mass
        slopes = (velocity, acceleration, angular_velocity, angular_acceleration)
        return physics + tau * jnp.stack(slopes)


ENVIRONMENTS = {"catch": Catch, "cartpole": CartPole}

"""What both agents with memory are tested on: probes, streams, and cores to swap.

Probes are streams inside of one compiled program, all of them learned from at once.
"""

import functools
from typing import NamedTuple

import cores
import flax.linen as nn
import jax
import jax.numpy as jnp
import loop
import numpy as np
import probes
import pytest
from loop import Timestep
from recurrent import Recurrent

PROBES = {
    name: getattr(probes, name)
    for name in (
        "constant_reward",
        "reward_by_observation",
        "delayed_reward",
        "reward_by_action",
        "reward_by_memory",
        "cut_short",
    )
}
SIGNS, TIMES = (-1.0, 1.0), 2


class Table(NamedTuple):
    """All that can happen in a probe; what it repeats for ever is repeated once."""

    observations: np.ndarray  # f[sign,time,3]
    rewards: np.ndarray  # f[sign,time,action]
    length: np.ndarray  # i[]
    truncated: np.ndarray  # b[]


def tabulated(probe):
    """Plays all there is."""
    observations = np.zeros((2, TIMES + 1, 3), np.float32)
    rewards = np.zeros((2, TIMES, 2), np.float32)
    for sign, action in np.ndindex(2, 2):
        timestep = probe.reset()
        while timestep.observation[1] != SIGNS[sign]:
            timestep = probe.reset()
        time = 0
        observations[sign, 0:] = timestep.observation
        while not timestep.last():
            timestep = probe.step(action)
            rewards[sign, time:, action] = timestep.reward
            time += 1
            observations[sign, time:] = timestep.observation
    return Table(observations, rewards, np.int32(time), np.bool(timestep.discount))


class Scene(NamedTuple):
    """Where some copies of a probe stand."""

    time: jax.Array
    sign: jax.Array
    over: jax.Array


def advance(table, scene, action, key):
    """Takes a step in each copy: an episode starts where one has ended.

    A time limit comes after one step in four on average. So a network that counts them
    has learned from what follows, however many they are.
    """
    key_sign, key_limit = jax.random.split(key)
    first, shape = scene.over, action.shape
    drawn = jax.random.bernoulli(key_sign, shape=shape).astype(jnp.int32)
    sign = jnp.where(first, drawn, scene.sign)
    time = jnp.where(first, 0, scene.time + 1)
    limit = jax.random.bernoulli(key_limit, 0.25, shape) | ~table.truncated
    last = ~first & (time >= table.length) & limit
    before = jnp.minimum(scene.time, TIMES - 1)
    timestep = Timestep(
        table.observations[sign, jnp.minimum(time, TIMES)],
        jnp.where(first, 0.0, table.rewards[sign, before, action]),
        jnp.where(last & ~table.truncated, 0.0, 1.0),
        first,
        last,
    )
    return Scene(time, sign, last), timestep


def learned(rules, steps):
    """Returns what states the agent is in after so many steps of each probe.

    The probes are a batch, in the order of `PROBES`. Only the number of the step is
    the same in all, so that what is due at some steps only is computed at these only.
    """
    tables = [tabulated(make()) for make in PROBES.values()]
    tables = jax.tree.map(lambda *rows: np.stack(rows), *tables)
    batch = rules.config.environments

    def one(table, state, scene, actions, key):
        scene, timestep = advance(table, scene, actions, key)
        state, actions, _ = rules.step(state, timestep)
        return state, scene, actions

    @jax.jit
    def run(tables):
        start = rules.init()
        axes = jax.tree.map(lambda _: 0, start)._replace(steps=None)
        each = jax.vmap(one, in_axes=(0, axes, 0, 0, None), out_axes=(axes, 0, 0))
        copies = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * len(PROBES)))
        scene = Scene(*[jnp.zeros(batch, jnp.int32)] * 2, jnp.ones(batch, bool))
        actions = jnp.zeros(batch, jnp.int32)
        carry = copies(start)._replace(steps=start.steps), *copies((scene, actions))

        def step(carry, key):
            return each(tables, *carry, key), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, carry, keys)[0][0]

    return run(tables)


def episode(name):
    """Returns what an episode of each sign shows: `f[time,sign,3]`, and `first`."""
    table = tabulated(PROBES[name]())
    length = int(table.length)
    first = np.zeros((length, 2), bool)
    first[0] = True
    return table.observations[:, :length].swapaxes(0, 1), first


# --- Streams and cores ----------------------------------------------------------------


def stream(rng, steps, batch):
    """Returns timesteps `[steps,batch,...]` of episodes of many lengths and ends."""
    last, first = np.zeros((2, steps, batch), bool)
    for env in range(batch):
        for t in range(steps):
            first[t, env] = t == 0 or last[t - 1, env]
            last[t, env] = not first[t, env] and rng.random() < 0.4
    terminated = last & (rng.random((steps, batch)) < 0.5)
    return Timestep(
        np.float32(rng.normal(size=(steps, batch, 3))),
        np.where(first, 0, rng.normal(size=(steps, batch))).astype(np.float32),
        np.float32(~terminated),
        first,
        last,
    )


def at(tree, index):
    """Returns some steps of a stream, as arrays of JAX."""
    return jax.tree.map(lambda x: jnp.asarray(x[index]), tree)


def played(rules, timesteps):
    """Returns the states after each step of a stream, and the metrics."""
    agent, states, metrics = loop.Agent(rules), [], []
    for t in range(len(timesteps.r_t)):
        metrics.append(agent.step(at(timesteps, t))[1])
        states.append(jax.tree.map(np.array, agent.state))
    return states, metrics


class Odd(nn.RNNCellBase):
    """A core whose carry is a dictionary in a dictionary, with integers, not zeros."""

    @nn.compact
    def __call__(self, carry, x):
        total = 0.5 * carry["sums"]["total"] + nn.tanh(nn.Dense(3)(x))
        count = carry["count"] + 1
        carry = {"count": count, "sums": {"total": total}}
        share = 1 / count.astype(jnp.float32)
        return carry, jnp.concatenate([total, share[..., None]], axis=-1)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        sums = {"total": jnp.full((*batch, 3), 0.25)}
        return {"count": jnp.full(batch, 3), "sums": sums}

    @property
    def num_feature_axes(self):
        return 1


# Each takes long to compile. The probes are learned from with a GRU, in any case.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gru", "lstm", "dnc")]
CORES = ["odd", *SLOW]


def network(name, outputs=3):
    """Returns a small network; nothing but the name of its core differs."""
    sizes = {"locations": 3, "word_size": 2, "read_heads": 1} if name == "dnc" else {}
    core = Odd() if name == "odd" else cores.make_core(name, 3, **sizes)
    return Recurrent(core, outputs, hidden=4)


class Linear:
    """A network without memory, whose parameters are a matrix."""

    def __init__(self, outputs=3):
        self.outputs = outputs

    def initial_carry(self, batch):
        return jnp.zeros(batch)

    def init(self, key, carry, observations, first):
        return jax.random.normal(key, (observations.shape[-1], self.outputs))

    def apply(self, params, carry, observations, first):
        return carry, observations @ params


class Leaky(Linear):
    """A network that remembers a mean of what it saw, started anew with an episode."""

    def initial_carry(self, batch):
        return jnp.full((batch, 3), 0.5)

    def apply(self, params, carry, observations, first):
        def step(carry, inputs):
            seen, first = inputs
            carry = jnp.where(first[:, None], 0.5, carry)
            carry = 0.5 * carry + jnp.tanh(seen @ params[:, :3])
            return carry, carry @ params

        return jax.lax.scan(step, carry, (observations, first))


def assert_equal(actual, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        actual,
        expected,
    )

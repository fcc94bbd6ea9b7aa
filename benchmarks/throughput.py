"""Environment steps a second: agents compiled with their environments, and peers.

    python benchmarks/throughput.py            # all cases
    python benchmarks/throughput.py dqn-1      # those whose name starts so

Each case plays and learns with the same numbers of environments, units and transitions
to an update, in turn with its peers; figures are medians of five runs. A step that
starts an episode is not counted. Compiling is not timed. Besides the wall clock, the
line has transitions per second of processor time, which other work on the machine
disturbs less.

Peers, each left out if it is not installed: RLax, called by a loop of Python as its
example has one, with a replay in NumPy; Rejax, whose agents are compiled with the
environments of Gymnax (Rejax 0.1.3 needs Gymnax 0.0.9).
"""

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import anakin
import dqn
import loop
from anakin_dqn import DQNConfig
from anakin_networks import MLP
from anakin_on_policy import PPOConfig, PQNConfig
from catch import Catch
from jittable import ENVIRONMENTS

ROUNDS = 5
Run = Callable[[int], tuple[int, int]]  # from a seed to transitions and updates


# --- Contenders ---------------------------------------------------------------------


def compiled_together(config: anakin.Config) -> Run:
    """An agent of `examples/anakin.py`."""
    env = ENVIRONMENTS[config.env]()
    devices = jax.devices()[:1]
    plan = anakin.make_plan(config, env, 1)
    program = jax.jit(anakin.make_program(config, env, plan, devices))
    program = program.lower(np.zeros(1, np.int32)).compile()
    flags = getattr(config, config.agent)
    if isinstance(flags, DQNConfig):
        each = anakin.DQN.rollout * flags.updates
    else:
        each = flags.epochs * flags.minibatches

    def run(seed: int) -> tuple[int, int]:
        _, (seen, _) = program(np.full(1, seed, np.int32))
        return int(seen[-1, 0]), plan.iterations * each

    return run


def loop_of_python(steps: int, hidden: int, batch_size: int) -> Run:
    """`examples/dqn.py`: a compiled call for each step of an environment in Python."""
    network = MLP((hidden,), 3)
    config = dqn.Config(batch_size=batch_size, capacity=16_384, target_period=50)
    envs = loop.Environments([Catch()])
    rules = dqn.DQN(config, *envs.specs(), dqn.Network(network.init, network.apply))
    agent = loop.Agent(rules)
    start = jax.tree.map(jnp.copy, agent.state)

    def run(seed: int) -> tuple[int, int]:
        agent.state = jax.tree.map(jnp.copy, start)
        events = loop.Interaction(loop.Environments([Catch(seed=seed)]), agent)
        loop.Engine(events).run(steps)
        jax.block_until_ready(agent.state)
        return steps, int(agent.state.steps) - 1

    return run


def loop_that_calls_rlax(steps: int, hidden: int, batch_size: int) -> Run:
    """Double DQN on Catch: a step of Python for each step and each update."""
    rlax = importlib.import_module("rlax")

    network = MLP((hidden,), 3)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def act(params: Any, observation: Any, key: Any) -> Any:
        q = network.apply(params, observation)
        return rlax.epsilon_greedy(0.05).sample(key, q)

    def loss(params: Any, target_params: Any, batch: Any) -> Any:
        q = jax.vmap(network.apply, (None, 0))
        obs_tm1, a_tm1, r_t, discount_t, obs_t = batch
        errors = jax.vmap(rlax.double_q_learning)(
            q(params, obs_tm1),
            a_tm1,
            r_t,
            discount_t,
            q(target_params, obs_t),
            q(params, obs_t),
        )
        return jnp.mean(rlax.huber_loss(errors))

    @jax.jit
    def learn(params: Any, target_params: Any, opt_state: Any, batch: Any) -> Any:
        gradients = jax.grad(loss)(params, target_params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def run(seed: int) -> tuple[int, int]:
        env, rng = Catch(seed=seed), np.random.default_rng(seed)
        key, timestep = jax.random.key(seed), env.reset()
        params = network.init(key, timestep.observation)
        target_params, opt_state = params, optimizer.init(params)
        obs_tm1, obs_t = np.zeros((2, steps, 10, 5), np.float32)
        a_tm1, r_t, discount_t = np.zeros((3, steps), np.float32)
        a_tm1 = a_tm1.astype(np.int32)
        for step in range(steps):
            if timestep.last():
                timestep = env.reset()
            key, key_act = jax.random.split(key)
            action = int(act(params, timestep.observation, key_act))
            before, timestep = timestep, env.step(action)
            obs_tm1[step], obs_t[step] = before.observation, timestep.observation
            a_tm1[step], r_t[step] = action, timestep.reward
            discount_t[step] = 0.99 * timestep.discount
            chosen = rng.integers(step + 1, size=batch_size)
            memory = obs_tm1, a_tm1, r_t, discount_t, obs_t
            batch = tuple(kept[chosen] for kept in memory)
            params, opt_state = learn(params, target_params, opt_state, batch)
            target_params = target_params if step % 50 else params
        jax.block_until_ready(params)
        return steps, steps

    return run


def rejax_agent(name: str, updates: int, **config: Any) -> Run:
    """An agent of Rejax, without evaluations, that learns from the first batch on."""
    rejax = importlib.import_module("rejax")

    steps = config["total_timesteps"]
    agent = rejax.get_algo(name).create(
        env="CartPole-v1", eval_freq=steps, skip_initial_evaluation=True, **config
    )
    agent = agent.replace(eval_callback=lambda *_: ())
    program = jax.jit(agent.train).lower(jax.random.key(0)).compile()

    def run(seed: int) -> tuple[int, int]:
        jax.block_until_ready(program(jax.random.key(seed)))
        return steps, updates

    return run


# --- Cases --------------------------------------------------------------------------


class Contender(NamedTuple):
    """Something to measure, and the package it needs."""

    make: Callable[[], Run]
    package: str | None = None


def ours(agent: Any, env: Any, environments: int, steps: int, flags: Any) -> Contender:
    """An agent of this repository; `flags` are its own."""
    config = anakin.Config(
        agent=agent,
        env=env,
        environments=environments,
        steps=steps,
        evaluate_every=steps,
        evaluation_episodes=1,
        **{agent: flags},
    )
    return Contender(partial(compiled_together, config))


def in_python(*args: Any) -> Contender:
    """An example agent in a loop of Python."""
    return Contender(partial(loop_of_python, *args))


def rlax(*args: Any) -> Contender:
    """A loop of Python that calls RLax."""
    return Contender(partial(loop_that_calls_rlax, *args), "rlax")


def rejax(name: str, updates: int, **config: Any) -> Contender:
    """An agent of Rejax."""
    return Contender(partial(rejax_agent, name, updates, **config), "rejax")


SMALL = DQNConfig(hidden=(50,), batch_size=32, capacity=16_384, target_period=50)
WIDE = replace(SMALL, batch_size=256, capacity=131_072)
ONE = replace(SMALL, hidden=(64, 64), batch_size=256, capacity=131_072)
EIGHT = replace(ONE, batch_size=128)
PARTS = {"rollout": 64, "minibatches": 16, "hidden": (64, 64)}
SPLIT = {"num_envs": 64, "num_steps": 64, "num_minibatches": 16}
REPLAY = {"buffer_size": 131_072}
PEER = 4096
ROLL = {"rollout": 32, "epochs": 4, "minibatches": 4, "hidden": (64, 64)}

CASES: dict[str, dict[str, Contender]] = {
    "dqn-1: Catch, 1 environment, hidden 50, 32 transitions every step": {
        "rlprims": ours("dqn", "catch", 1, 40_000, SMALL),
        "rlprims, loop of Python": in_python(4000, 50, 32),
        "rlax, loop of Python": rlax(2000, 50, 32),
    },
    "dqn-32: Catch, 32 environments, hidden 50, 32 transitions every 32 steps": {
        "rlprims": ours("dqn", "catch", 32, 640_000, SMALL),
    },
    "dqn-1024: Catch, 1024 environments, hidden 50, 256 transitions every 1024": {
        "rlprims": ours("dqn", "catch", 1024, 2_048_000, WIDE),
    },
    "dqn-peer-1: CartPole, 1 environment, hidden 64-64, 256 transitions every step": {
        "rlprims": ours("dqn", "cartpole", 1, PEER, ONE),
        "rejax": rejax(
            "dqn", PEER, total_timesteps=PEER, fill_buffer=1, batch_size=256, **REPLAY
        ),
    },
    "dqn-peer-8: CartPole, 8 environments, hidden 64-64, 128 transitions every 8": {
        "rlprims": ours("dqn", "cartpole", 8, 8 * PEER, EIGHT),
        "rejax": rejax(
            "dqn",
            PEER,
            total_timesteps=8 * PEER,
            num_envs=8,
            fill_buffer=1,
            batch_size=128,
            **REPLAY,
        ),
    },
    "pqn-peer: CartPole, 64 environments, 64 steps, 1 epoch of 16 minibatches": {
        "rlprims": ours("pqn", "cartpole", 64, 10 * 4096, PQNConfig(epochs=1, **PARTS)),
        "rejax": rejax("pqn", 160, total_timesteps=10 * 4096, num_epochs=1, **SPLIT),
    },
    "ppo-peer: CartPole, 64 environments, 64 steps, 4 epochs of 16 minibatches": {
        "rlprims": ours("ppo", "cartpole", 64, 5 * 4096, PPOConfig(epochs=4, **PARTS)),
        "rejax": rejax("ppo", 320, total_timesteps=5 * 4096, num_epochs=4, **SPLIT),
    },
    "pqn-1024: Catch, 1024 environments, 32 steps, 4 epochs of 4 minibatches": {
        "rlprims": ours("pqn", "catch", 1024, 4 * 32_768, PQNConfig(**ROLL)),
    },
    "ppo-1024: Catch, 1024 environments, 32 steps, 4 epochs of 4 minibatches": {
        "rlprims": ours("ppo", "catch", 1024, 4 * 32_768, PPOConfig(**ROLL)),
    },
}


# --- Measuring ----------------------------------------------------------------------


def measure(contenders: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Runs contenders in turn, after one run each to warm up."""
    runs = {name: contender.make() for name, contender in contenders.items()}
    rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for seed in range(ROUNDS + 1):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            transitions, updates = run(seed)
            wall = time.perf_counter() - wall
            processor = time.process_time() - processor
            if seed:
                rates[name].append(
                    (transitions / wall, updates / wall, transitions / processor)
                )
    kinds = "steps_per_second", "updates_per_second", "steps_per_processor_second"
    return {
        name: {
            kind: round(statistics.median(values))
            for kind, values in zip(kinds, zip(*measured, strict=True), strict=True)
        }
        for name, measured in rates.items()
    }


def main() -> None:
    """Prints one line for each case, and one for each contender left out."""
    wanted = tuple(sys.argv[1:]) or ("",)
    for case, contenders in CASES.items():
        if not case.startswith(wanted):
            continue
        present, versions = {}, {}
        for name, contender in contenders.items():
            try:
                package = contender.package
                versions |= {package: version(package)} if package else {}
                present[name] = contender
            except PackageNotFoundError:
                print(json.dumps({"case": case, "left_out": name}), flush=True)
        line: dict[str, Any] = {"case": case, "measured": measure(present)}
        load = [round(load, 1) for load in os.getloadavg()]
        print(json.dumps(line | {"load": load} | versions | machine()), flush=True)


if __name__ == "__main__":
    main()

r"""DQN, PQN or PPO with everything on the device: environments, replay, learning.

    python examples/anakin.py --agent dqn
        reaches a return of at least 0.98 in Catch, within 1 minute
    python examples/anakin.py --agent pqn
        reaches a return of at least 0.98 in Catch, within 1 minute
    python examples/anakin.py --agent ppo
        reaches a return of at least 0.98 in Catch, within 1 minute
    python examples/anakin.py --agent ppo --env cartpole --steps 1500000 \
        --evaluate-every 500000
        reaches a return of at least 475 in CartPole, within 1 minute

The whole of training, evaluations included, is one program. `jax.vmap` makes copies of
an environment and of an agent, with a seed for each; `jax.lax.scan` takes them through
time; `jax.shard_map` spreads the environments over devices, and `jax.distributed` over
processes. docs/scaling.md tells how, and anakin_dqn.py and anakin_on_policy.py what the
agents are. The number of devices changes the result by rounding alone: see fleet.py.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import console
import jax
import jax.numpy as jnp
import loggers
import numpy as np
import run_folder
from anakin_dqn import DQN, DQNConfig
from anakin_on_policy import PPO, PQN, PPOConfig, PQNConfig
from fleet import Fleet
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jittable import ENVIRONMENTS, Environment
from rich.console import Console
from rich.table import Table

AXIS = "devices"  # of the mesh: environments are spread over it
AGENTS = {"dqn": DQN, "pqn": PQN, "ppo": PPO}


@dataclass(frozen=True)
class Config:
    """Trains an agent in one program and prints its learning curve."""

    agent: Literal["dqn", "pqn", "ppo"] = "dqn"
    env: Literal["catch", "cartpole"] = "catch"
    seed: int = 0  # the first of the seeds
    seeds: int = 1  # how many agents to train side by side
    steps: int = 500_000  # of all environments together, resets too, for each seed
    environments: int = 128  # on all devices together, for each seed
    evaluate_every: int = 50_000  # steps from one point of the curve to the next
    evaluation_episodes: int = 128  # played for each point, greedily
    out: Path | None = None  # folder of the run: runs/anakin-AGENT-ENV-seed-SEED
    coordinator: str | None = None  # HOST:PORT of process 0, if there are several
    processes: int = 1  # how many run this command, each with its devices
    process: int = 0  # which of them this is
    dqn: DQNConfig = field(default_factory=DQNConfig)
    pqn: PQNConfig = field(default_factory=PQNConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)


class Result(NamedTuple):
    """What training gives. `S` is the number of seeds, `P` that of points."""

    params: Any  # with a leading axis of seeds
    iterations: np.ndarray  # i[P], before each point
    transitions: np.ndarray  # i[P,S], experienced before each point
    returns: np.ndarray  # f[P,S], of the greedy policy


class Plan(NamedTuple):
    """What a configuration comes to, in iterations."""

    agent: Any
    iterations: int
    per_point: int  # iterations from one point of the curve to the next
    points: int  # with the first, before training, and the last, after it

    @property
    def firsts(self) -> np.ndarray:
        """The number of iterations before each point."""
        return np.minimum(self.per_point * np.arange(self.points), self.iterations)


def make_plan(config: Config, env: Environment, devices: int) -> Plan:
    """Checks a configuration and makes its agent.

    Raises:
        ValueError: if a number does not divide as it has to, or is out of range.
    """
    flags = getattr(config, config.agent)
    _check_ranges(vars(config))
    _check_ranges(vars(flags), f"{config.agent}.")
    if config.seed + config.seeds > 2**31:
        raise ValueError(f"seed + seeds must be 2^31 at most, got {config.seed}")
    _check_division("environments", config.environments, "devices", devices)
    episodes = config.evaluation_episodes
    _check_division("evaluation_episodes", episodes, "devices", devices)
    if isinstance(flags, DQNConfig):
        sizes = sorted([config.environments, flags.batch_size])
        _check_division(
            "the larger of environments and dqn.batch_size",
            sizes[1],
            "the smaller",
            sizes[0],
        )
        _check_division("dqn.batch_size", flags.batch_size, "devices", devices)
        if flags.capacity < 2 * config.environments:
            raise ValueError(
                "dqn.capacity must hold two timesteps of each of the "
                f"{config.environments} environments, got {flags.capacity}"
            )
        rollout = DQN.rollout
    else:
        name = f"{config.agent}.rollout"
        rollout = flags.rollout
        _check_division(name, rollout, "minibatches", flags.minibatches)
    steps = config.environments * rollout
    per_point = max(1, config.evaluate_every // steps)
    iterations = -(-config.steps // steps)
    points = -(-iterations // per_point) + 1
    agent = AGENTS[config.agent](flags, env, iterations)
    return Plan(agent, iterations, per_point, points)


def _check_ranges(flags: dict[str, Any], prefix: str = "") -> None:
    """Refuses a number that no flag of its kind can be."""
    for name, value in flags.items():
        least = 0 if name in {"seed", "process"} else 1
        if isinstance(value, int) and not least <= value < 2**31:
            raise ValueError(f"{prefix}{name} must lie in [{least}, 2^31), got {value}")
        most = math.inf if name == "max_gradient" else 1.0
        if isinstance(value, float) and not 0.0 <= value <= most:
            raise ValueError(f"{prefix}{name} must lie in [0, {most:g}], got {value}")
        if isinstance(value, tuple) and min(value, default=1) < 1:
            raise ValueError(f"{prefix}{name} must be 1 or more, got {value}")


def _check_division(name: str, whole: int, by: str, parts: int) -> None:
    if whole % parts:
        raise ValueError(f"{name} must be divisible by {by}, got {whole} and {parts}")


def make_program(
    config: Config, env: Environment, plan: Plan, devices: Sequence[Any]
) -> Callable[[Array], Any]:
    """Returns all of training as a function of the seeds, `i[S]`."""
    agent, per_point = plan.agent, plan.per_point
    axis_name = AXIS if len(devices) > 1 else None
    fleet = Fleet(env, config.environments, axis_name)

    def evaluate(key: Array, params: Any, i: Array) -> Array:
        policy = lambda observation: agent.exploit(params, observation)
        key = jax.random.fold_in(key, i)
        return fleet.evaluate(key, config.evaluation_episodes, policy)

    def iterate(state: Any, key: Array, i: Array) -> Any:
        return agent.iterate(state, jax.random.fold_in(key, i), i, fleet)

    def program(seeds: Array) -> Any:
        key_init, key_train, key_test = jax.vmap(
            lambda seed: jax.random.split(jax.random.key(seed), 3), out_axes=1
        )(seeds)
        scores = jax.vmap(evaluate, (0, 0, None))
        all_iterate = jax.vmap(iterate, (0, 0, None))

        def iteration(i: Array, carry: Any) -> Any:
            state, seen = carry
            state, count = all_iterate(state, key_train, i)
            return state, seen + count

        def point(carry: Any, first: Array) -> tuple[Any, Any]:
            state, seen = carry
            result = seen, scores(key_test, state.params, first)
            end = jnp.minimum(first + per_point, plan.iterations)  # none after the last
            return jax.lax.fori_loop(first, end, iteration, carry), result

        state = jax.vmap(lambda key: agent.init(key, fleet))(key_init)
        firsts = jnp.array(plan.firsts)
        carry = state, jnp.zeros(seeds.shape, jnp.int32)
        (state, _), curve = jax.lax.scan(point, carry, firsts)
        return state.params, curve

    if axis_name is None:
        return program
    mesh = Mesh(np.array(devices), (AXIS,))
    everywhere = PartitionSpec()
    return jax.shard_map(program, mesh=mesh, in_specs=everywhere, out_specs=everywhere)


def train(
    config: Config,
    env: Environment | None = None,
    devices: Sequence[Any] | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Result:
    """Trains an agent for each seed.

    Args:
        config: what to do.
        env: any environment as jittable.py has them; by default, that of `config`.
        devices: those to spread environments over; by default, all there are.
        ready: called when the program is compiled, before it runs.
    """
    env = env or ENVIRONMENTS[config.env]()
    devices = jax.devices() if devices is None else devices
    plan = make_plan(config, env, len(devices))
    program = jax.jit(make_program(config, env, plan, devices))
    seeds = np.arange(config.seed, config.seed + config.seeds, dtype=np.int32)
    compiled = program.lower(seeds).compile()
    ready()
    params, curve = jax.block_until_ready(compiled(seeds))
    seen, returns = (np.asarray(x) for x in curve)
    return Result(jax.tree.map(np.asarray, params), plan.firsts, seen, returns)


def curve_rows(result: Result) -> list[dict[str, float]]:
    """Returns the points of a learning curve, one row each: means over the seeds."""
    return [
        {
            "steps": int(np.mean(transitions)),
            "evaluation_return": float(np.mean(returns)),
            "evaluation_lowest": float(np.min(returns)),
            "evaluation_highest": float(np.max(returns)),
        }
        for transitions, returns in zip(result.transitions, result.returns, strict=True)
    ]


def main() -> int:
    """Trains as the command line says; process 0 shows and writes what came of it."""
    config = console.command_line(Config)
    if (config.coordinator is None) != (config.processes == 1):
        console.fail("--coordinator and --processes go together")
    if config.coordinator:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    started, compiled = time.perf_counter(), []
    try:
        result = train(config, ready=lambda: compiled.append(time.perf_counter()))
        running = time.perf_counter() - compiled[0]
        if jax.process_index() == 0:
            show(config, result, compiled[0] - started, running)
            write(config, result, running)
    except ValueError as error:
        console.fail(str(error))
    except OSError as error:
        console.fail(f"cannot write {error.filename}: {error.strerror}")
    return 0


def show(config: Config, result: Result, compiling: float, running: float) -> None:
    """Prints the learning curve, and what it took."""
    terminal = Console()
    spread = f"{jax.device_count()} {jax.default_backend()} device(s)"
    terminal.print(f"{config.agent} on {config.env}, {config.seeds} seed(s), {spread}")
    table = Table("transitions", "mean return", "lowest", "highest")
    for steps, *returns in map(dict.values, curve_rows(result)):
        table.add_row(f"{steps}", *(f"{x:.2f}" for x in returns))
    terminal.print(table)
    total = int(np.sum(result.transitions[-1].astype(np.int64)))
    terminal.print(
        f"{total} transitions of all seeds in {running:.1f} seconds, evaluations "
        f"included, {total / running:.0f} per second, after {compiling:.1f} to compile"
    )


def write(config: Config, result: Result, running: float) -> None:
    """Writes the folder of the run. The speed is that of one seed, over all of it."""
    name = f"anakin-{config.agent}-{config.env}-seed-{config.seed}"
    folder = config.out or Path("runs", name)
    run_folder.write_config(folder, config, "anakin")
    log = loggers.CSVFile(folder / run_folder.METRICS)
    for row in curve_rows(result):
        speed = float(np.mean(result.transitions[-1])) / running
        log.log(row | {"steps_per_second": speed})
    log.close()
    _, columns = run_folder.read(folder)
    run_folder.draw(columns, name, folder / "curve.png")


if __name__ == "__main__":
    sys.exit(main())

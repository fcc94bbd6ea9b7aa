"""A differentiable neural computer learns to repeat what it was shown.

    python examples/dnc_copy.py
        reaches bits of at most 0.1 in repeat-copy, within 2 minutes

Paper: Graves et al., "Hybrid computing using a neural network with dynamic external
memory", 2016, https://doi.org/10.1038/nature20101. The cores are those of `cores.py`.

**The task, repeat copy.** A sequence of `L` binary vectors is shown, one at each time,
and then the number of times `R` to repeat it. With `K = num_bits`:

    time t               inputs: K bits, go      targets: K bits, end       counts
    0 .. L-1             the sequence,    0      zeros,            0        no
    L                    zeros,         R / R*   zeros,            0        no
    L+1 .. L+RL          zeros,           0      vector (t-L-1) mod L, 0    yes
    L+1+RL               zeros,           0      zeros,            1        yes
    after it             zeros,           0      zeros,            0        no

`L` is drawn from `min_length .. max_length`, `R` from `1 .. R* = max_repeats`, and
every bit is the toss of a coin. The go flag says `R` as a share of `R*`. All sequences
take `T = max_length (R* + 1) + 2` times, enough for the longest.

**The loss** is the cross-entropy of independent bits, summed over the times that count,
in bits per sequence. To know nothing costs one bit for each: `(RL + 1) (K + 1)`. To
know all but what the vectors are costs `RLK`. Every batch is drawn anew, on the device,
from a key into which the number of batches before is folded.

Deviations: the sizes, the optimiser (Adam), and one linear layer more after the core,
which lets cores of any kind be compared.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import console
import cores
import flax.linen as nn
import jax
import jax.numpy as jnp
import meters
import numpy as np
import optax
from experiment import Experiment
from jax import Array
from loop import Event, Metrics, Timestep
from rich.console import Console


@dataclass(frozen=True)
class Config(console.RunConfig):
    """Trains a recurrent network to repeat sequences."""

    core: cores.CoreName = "dnc"  # what remembers
    steps: int = 6000  # batches to learn from
    evaluate_every: int = 500  # batches from one evaluation to the next
    evaluation_episodes: int = 200  # sequences of an evaluation
    checkpoint_every: int = 500  # batches from one checkpoint to the next
    num_bits: int = 4  # in each vector of a sequence
    min_length: int = 1  # vectors in a sequence, at least
    max_length: int = 3  # vectors in a sequence, at most
    max_repeats: int = 2  # times to repeat a sequence, at most
    hidden: int = 64  # units of the core, which for a DNC are those of its controller
    memory_size: int = 16  # locations in the memory of a DNC
    word_size: int = 16  # numbers in each of them
    read_heads: int = 1  # locations that are read at a time, roughly
    batch_size: int = 16  # sequences learned from at a time
    learning_rate: float = 3e-3  # of Adam; it falls to 0 by the end
    max_gradient: float = 1.0  # norm beyond which gradients are scaled down

    ranges: ClassVar = {"max_gradient": (0, float("inf"))}

    @property
    def task(self) -> str:
        """The task."""
        return "repeat-copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length must be at most max_length = {self.max_length}, "
                f"got {self.min_length}"
            )


class Batch(NamedTuple):
    """Sequences with what is to be said after them; time comes first."""

    inputs: Array  # f[T,B,K+1]
    targets: Array  # f[T,B,K+1]
    mask: Array  # b[T,B], where targets count


class State(NamedTuple):
    """All that learning changes."""

    params: Any
    opt_state: Any
    steps: Array  # i[], batches so far


class Network(nn.Module):
    """A core and a linear layer: the logits of all bits."""

    core: nn.RNNCellBase
    size: int

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps `f[T,B,X]` to `f[T,B,size]`, from the empty memory on."""
        first = jnp.zeros(inputs.shape[:2], bool)
        carry = self.core.initialize_carry(jax.random.key(0), inputs.shape[1:])
        _, hidden = cores.unroll(self.core, carry, inputs, first)
        return nn.Dense(self.size)(hidden)


class RepeatCopy:
    """The rules of the task and of learning it: pure functions."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.length = config.max_length * (config.max_repeats + 1) + 2
        settings = {}
        if config.core == "dnc":
            settings = {
                "locations": config.memory_size,
                "word_size": config.word_size,
                "read_heads": config.read_heads,
            }
        core = cores.make_core(config.core, config.hidden, **settings)
        self.network = Network(core, config.num_bits + 1)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_gradient),
            optax.adam(optax.linear_schedule(config.learning_rate, 0.0, config.steps)),
        )
        self.key_init, self.key_train, self.key_test = jax.random.split(
            jax.random.key(config.seed), 3
        )

    def init(self) -> State:
        """Returns the state before the first batch."""
        blank = jnp.zeros((self.length, 1, self.config.num_bits + 1))
        params = self.network.init(self.key_init, blank)
        return State(params, self.optimizer.init(params), jnp.int32(0))

    def sequence(self, key: Array) -> Batch:
        """Draws a sequence and what is to be said after it: a batch without `B`."""
        config = self.config
        key_bits, key_length, key_repeats = jax.random.split(key, 3)
        shape = config.max_length, config.num_bits
        bits = jax.random.bernoulli(key_bits, shape=shape).astype(jnp.float32)
        length = jax.random.randint(
            key_length, (), config.min_length, config.max_length + 1
        )
        repeats = jax.random.randint(key_repeats, (), 1, config.max_repeats + 1)
        time = jnp.arange(self.length)
        end = length + 1 + repeats * length

        def rows(where: Array, position: Array, last: Array) -> Array:
            shown = jnp.where(where[:, None], bits[position % length], 0)
            return jnp.concatenate([shown, last[:, None]], axis=1)

        go = repeats / config.max_repeats
        inputs = rows(time < length, time, jnp.where(time == length, go, 0))
        mask = (time > length) & (time <= end)
        said, ended = mask & (time < end), (time == end).astype(jnp.float32)
        return Batch(inputs, rows(said, time - length - 1, ended), mask)

    def batch(self, key: Array, size: int) -> Batch:
        """Draws sequences."""
        keys = jax.random.split(key, size)
        return jax.vmap(self.sequence, out_axes=1)(keys)

    def loss(self, params: Any, batch: Batch) -> Array:
        """Returns the mean cross-entropy of a sequence, in bits."""
        logits = self.logits(params, batch.inputs)
        losses = optax.sigmoid_binary_cross_entropy(logits, batch.targets)
        total = jnp.sum(losses, where=batch.mask[..., None])
        return total / (batch.mask.shape[1] * math.log(2))

    def learn(self, state: State) -> tuple[State, Metrics]:
        """Draws a batch and follows the gradient of its loss."""
        params, opt_state, steps = state
        key = jax.random.fold_in(self.key_train, steps)
        batch = self.batch(key, self.config.batch_size)
        loss, gradients = jax.value_and_grad(self.loss)(params, batch)
        updates, opt_state = self.optimizer.update(gradients, opt_state)
        params = optax.apply_updates(params, updates)
        return State(params, opt_state, steps + 1), {"loss": loss}

    def logits(self, params: Any, inputs: Array) -> Any:
        """Returns the log-odds of each bit being 1, `f[T,B,K+1]`."""
        return self.network.apply(params, inputs)

    def say(self, params: Any, inputs: Array) -> Array:
        """Returns the likelier value of each bit, `f[T,B,K+1]`."""
        return (self.logits(params, inputs) > 0).astype(inputs.dtype)

    def evaluate(self, params: Any) -> Metrics:
        """Measures on sequences that are always the same, and drawn apart from others.

        Returns:
            The loss in bits, how many bits are wrong in the mean, and the share of
            sequences in which none is.
        """
        batch = self.batch(self.key_test, self.config.evaluation_episodes)
        differ = self.say(params, batch.inputs) != batch.targets
        wrong = jnp.sum(differ & batch.mask[..., None], axis=(0, 2))
        return {
            "bits": self.loss(params, batch),
            "wrong": jnp.mean(wrong.astype(jnp.float32)),
            "right": jnp.mean((wrong == 0).astype(jnp.float32)),
        }


# A batch is a step of one environment in which nothing starts, ends or is rewarded.
STEP = Timestep((), np.zeros(1), np.ones(1), np.zeros(1, bool), np.zeros(1, bool))


class Learning:
    """An iterator over learning, batch after batch, for ever."""

    def __init__(self, rules: RepeatCopy) -> None:
        self.rules, self.state = rules, jax.jit(rules.init)()
        self._learn = jax.jit(rules.learn, donate_argnums=0)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        self.state, metrics = self._learn(self.state)
        return Event(1, STEP, metrics)

    def save(self) -> None:
        """Returns nothing: all is in the state."""

    def load(self, saved: None) -> None:
        """Does nothing."""


def picture(title: str, rows: Any, where: Any) -> str:
    """Draws `f[T,C]` in `C` lines, time from left to right: `#` is 1, `.` is 0."""
    shown = np.where(np.asarray(where), np.where(np.asarray(rows).T > 0, "#", "."), " ")
    return "\n".join([f"{title}:", *("  " + "".join(line) for line in shown)])


def example(rules: RepeatCopy, params: Any) -> str:
    """Draws the longest of the sequences for evaluation, and what is said to it."""
    draw = jax.jit(rules.batch, static_argnums=1)
    batch = draw(rules.key_test, rules.config.evaluation_episodes)
    said = jax.jit(rules.say)(params, batch.inputs)
    longest = np.argmax(np.sum(batch.mask, axis=0))
    inputs, targets, mask, said = (x[:, longest] for x in (*batch, said))
    shown = np.arange(rules.length) < np.argmax(mask)
    return "\n".join(
        [
            picture("inputs", inputs, shown),
            picture("targets", targets, mask),
            picture("outputs", said, mask),
        ]
    )


class RepeatCopyExperiment(Experiment):
    """A run of learning to repeat sequences, which ends with an example."""

    def __init__(self, config: Config, folder: Path, script: str) -> None:
        self.rules = RepeatCopy(config)
        self.learning = Learning(self.rules)
        self.measure = jax.jit(self.rules.evaluate)
        measured = [meters.Steps(), meters.Metric("loss")]
        super().__init__(
            config, folder, script, self.learning, measured, self.evaluation
        )

    def evaluation(self) -> dict[str, float]:
        """Measures on the same sequences each time."""
        metrics = self.measure(self.learning.state.params)
        return {f"evaluation_{name}": float(value) for name, value in metrics.items()}

    def run(self, terminal: Console, stop: Callable[[], bool] = lambda: False) -> None:
        """Trains the network, and shows what it says."""
        super().run(terminal, stop)
        terminal.print(example(self.rules, self.learning.state.params))


if __name__ == "__main__":
    sys.exit(console.run(Config, RepeatCopyExperiment))

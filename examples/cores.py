"""Recurrent cores for agents: GRU, LSTM, and a differentiable neural computer.

A core is a `flax.linen.RNNCellBase`: it starts from `initialize_carry(key, shape)`, and
`core(carry, inputs)` returns the next carry and the outputs. Agents that reach it
through `make_core`, `step` and `unroll` can swap it by name: they never look inside the
carry, which is a tree of arrays of any structure.

    core = make_core("dnc", features=64)
    carry = core.initialize_carry(key, inputs_t.shape[1:])
    params = core.init(key, carry, inputs_t[0])
    carry, outputs_t = nn.apply(unroll, core)(params, carry, inputs_t, first_t)

GRU and LSTM are Flax's own cells. The differentiable neural computer (DNC) is that of
Graves et al., "Hybrid computing using a neural network with dynamic external memory",
2016, https://doi.org/10.1038/nature20101: a controller network that writes to and
reads from a memory `M` of `N` locations, each a word of `W` numbers. The functions
below are its equations in its notation, for one memory; `DNC` batches them by
`jax.vmap`. Where it deviates, or the paper leaves a choice:

*   The cosine of two vectors is `u·v / √((|u|² + ε)(|v|² + ε))` with ε = 1e-6, so that
    an empty location is alike to nothing and gradients exist there.
*   Everything starts at zero: memory, usage, links, weightings and what was read.
*   Locations of the same usage are taken in the order of their index.
*   The linear layers have biases.
*   The controller is one cell, there a stack of LSTM layers.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

EPSILON = 1e-6  # added to squared lengths

# --- The differentiable neural computer: what the controller asks for ---------------


class Interface(NamedTuple):
    """What the controller asks of the memory at one step, with `R` read heads."""

    read_keys: Array  # kʳ, f[R,W]: what to look for
    read_strengths: Array  # βʳ, f[R]: how sharply, at least 1
    write_key: Array  # kʷ, f[W]
    write_strength: Array  # βʷ, f[]
    erase: Array  # e, f[W]: how much to erase of each component, in [0, 1]
    write: Array  # v, f[W]: what to add
    free_gates: Array  # f, f[R]: whether what was just read may be overwritten
    allocation_gate: Array  # gᵃ, f[]: write to free locations (1) or by content (0)
    write_gate: Array  # gʷ, f[]: whether to write at all
    read_modes: Array  # π, f[R,3]: shares of reading backward, by content, forward


def interface_shapes(read_heads: int, word_size: int) -> list[tuple[int, ...]]:
    """Returns the shape of each part; they take `RW + 3W + 5R + 3` numbers in all."""
    heads, word = (read_heads,), (word_size,)
    keys, modes = (read_heads, word_size), (read_heads, 3)
    return [keys, heads, word, (), word, word, heads, (), (), modes]


def oneplus(x: Array) -> Array:
    """Maps any number to one of at least 1: `1 + log(1 + eˣ)`."""
    return 1 + jax.nn.softplus(x)


def parse_interface(vector: Array, read_heads: int, word_size: int) -> Interface:
    """Splits the vector `ξ` that the controller emits, and puts each part in its range.

    Strengths go through `oneplus`, the erase vector and the gates through a sigmoid,
    and the read modes of each head through a softmax.
    """
    shapes = interface_shapes(read_heads, word_size)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(vector, ends[:-1])
    raw = Interface(*[p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)])
    return raw._replace(
        read_strengths=oneplus(raw.read_strengths),
        write_strength=oneplus(raw.write_strength),
        erase=jax.nn.sigmoid(raw.erase),
        free_gates=jax.nn.sigmoid(raw.free_gates),
        allocation_gate=jax.nn.sigmoid(raw.allocation_gate),
        write_gate=jax.nn.sigmoid(raw.write_gate),
        read_modes=jax.nn.softmax(raw.read_modes),
    )


# --- Where to write -----------------------------------------------------------------


def normalized(x: Array) -> Array:
    """Scales each row to length 1, and rows of length zero to zero."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON)


def content_weighting(contents: Array, key: Array, strength: Array) -> Array:
    """Weighs locations by how alike their content is to a key.

    `C(M, k, β)[i] = exp(β D(k, M[i])) / Σⱼ exp(β D(k, M[j]))`, where `D` is the cosine
    of the angle between two vectors. Returns `f[N]`, of sum 1.
    """
    return jax.nn.softmax(strength * (normalized(contents) @ normalized(key)))


def updated_usage(
    usage: Array, write_weighting: Array, read_weightings: Array, free_gates: Array
) -> Array:
    """Returns how much each location is in use, in [0, 1].

    `uₜ = (uₜ₋₁ + wʷₜ₋₁ - uₜ₋₁ wʷₜ₋₁) ψₜ`: what was written to is in use, but for what
    the retention `ψₜ = Πᵢ (1 - fₜⁱ wₜ₋₁ʳⁱ)` frees: locations that were just read by a
    head whose free gate is open. The weightings are those of the step before.
    """
    retention = jnp.prod(1 - free_gates[:, None] * read_weightings, axis=0)
    return (usage + (1 - usage) * write_weighting) * retention


def allocation_weighting(usage: Array) -> Array:
    """Weighs locations by how free they are: the least used first.

    `a[φ[j]] = (1 - u[φ[j]]) Πᵢ₌₁ʲ⁻¹ u[φ[i]]`, where `φ` sorts locations by ascending
    usage. The sum is `1 - Πᵢ u[i]`: nothing is allocated where all is in full use. Like
    in the paper, gradients take the order as given.
    """
    order = jnp.argsort(usage)
    ascending = usage[order]
    fuller = jnp.cumprod(jnp.concatenate([jnp.ones_like(usage[:1]), ascending[:-1]]))
    return ((1 - ascending) * fuller)[jnp.argsort(order)]


def write_weighting(contents: Array, usage: Array, interface: Interface) -> Array:
    """Weighs locations to write to: `wʷ = gʷ (gᵃ a + (1 - gᵃ) cʷ)`, of sum at most 1.

    It mixes what is free and what is alike to a key, `cʷ = C(Mₜ₋₁, kʷ, βʷ)`.
    """
    gate = interface.allocation_gate
    content = content_weighting(contents, interface.write_key, interface.write_strength)
    mixed = gate * allocation_weighting(usage) + (1 - gate) * content
    return interface.write_gate * mixed


def written(contents: Array, weighting: Array, erase: Array, write: Array) -> Array:
    """Erases and adds where the weighting says: `Mₜ = Mₜ₋₁ (1 - wʷ eᵀ) + wʷ vᵀ`."""
    return contents * (1 - jnp.outer(weighting, erase)) + jnp.outer(weighting, write)


# --- In which order it was written ---------------------------------------------------


def updated_link(link: Array, precedence: Array, weighting: Array) -> Array:
    """Returns to what degree location `i` was written right after location `j`.

    `Lₜ[i,j] = (1 - wₜʷ[i] - wₜʷ[j]) Lₜ₋₁[i,j] + wₜʷ[i] pₜ₋₁[j]`, and `Lₜ[i,i] = 0`.
    Rows and columns sum to at most 1. The precedence is that of the step before.
    """
    kept = 1 - weighting[:, None] - weighting[None, :]
    link = kept * link + jnp.outer(weighting, precedence)
    return link * (1 - jnp.eye(len(weighting), dtype=link.dtype))


def updated_precedence(precedence: Array, weighting: Array) -> Array:
    """Returns to what degree each location was written last, of sum at most 1.

    `pₜ = (1 - Σᵢ wₜʷ[i]) pₜ₋₁ + wₜʷ`.
    """
    return (1 - jnp.sum(weighting)) * precedence + weighting


# --- Where to read -------------------------------------------------------------------


def read_weightings(
    contents: Array, link: Array, previous: Array, interface: Interface
) -> Array:
    """Weighs locations for each head to read from: `wʳ = π₁ b + π₂ cʳ + π₃ f`.

    It mixes going back to what was written before what was read last, `b = Lᵀ wʳₜ₋₁`,
    looking for a key, `cʳ = C(M, kʳ, βʳ)`, and going forward, `f = L wʳₜ₋₁`. Contents
    and link are those after writing. Returns `f[R,N]`, each row of sum at most 1.
    """
    content = jax.vmap(content_weighting, in_axes=(None, 0, 0))(
        contents, interface.read_keys, interface.read_strengths
    )
    ways = jnp.stack([previous @ link, content, previous @ link.T], axis=1)
    return jnp.einsum("rm,rmn->rn", interface.read_modes, ways)


# --- One step ------------------------------------------------------------------------


class Memory(NamedTuple):
    """The state of the memory."""

    contents: Array  # M, f[N,W]
    usage: Array  # u, f[N]
    link: Array  # L, f[N,N]
    precedence: Array  # p, f[N]
    write_weighting: Array  # wʷ, f[N]
    read_weightings: Array  # wʳ, f[R,N]
    reads: Array  # r, f[R,W]: what each head has read


def access(memory: Memory, interface: Interface) -> Memory:
    """Writes to the memory, then reads from it: `rⁱ = Mᵀ wʳⁱ`."""
    contents, usage, link, precedence, wrote, read, _ = memory
    usage = updated_usage(usage, wrote, read, interface.free_gates)
    wrote = write_weighting(contents, usage, interface)
    contents = written(contents, wrote, interface.erase, interface.write)
    link = updated_link(link, precedence, wrote)
    precedence = updated_precedence(precedence, wrote)
    read = read_weightings(contents, link, read, interface)
    return Memory(contents, usage, link, precedence, wrote, read, read @ contents)


class DNCState(NamedTuple):
    """The carry of a DNC."""

    memory: Memory
    controller: Any  # the carry of the controller


class DNC(nn.RNNCellBase):
    """A differentiable neural computer.

    The controller sees `[x; r¹ₜ₋₁; …; rᴿₜ₋₁]`, the input and what was read before. A
    linear layer turns its output `h` into the interface vector `ξ`, and another one
    turns `[h; r¹ₜ; …; rᴿₜ]` into the output `y`.
    """

    features: int  # of the output
    controller: nn.RNNCellBase
    locations: int = 32  # N
    word_size: int = 16  # W
    read_heads: int = 2  # R

    @nn.compact
    def __call__(self, carry: DNCState, inputs: Array) -> tuple[DNCState, Array]:
        """Takes one step, on inputs `f[...,X]` with any leading axes."""
        batch, heads, word = inputs.shape[:-1], self.read_heads, self.word_size

        def respond(memory: Memory, vector: Array) -> Memory:
            return access(memory, parse_interface(vector, heads, word))

        def beside_reads(x: Array, memory: Memory) -> Array:
            return jnp.concatenate([x, memory.reads.reshape(*batch, -1)], axis=-1)

        for _ in batch:
            respond = jax.vmap(respond)
        controller, hidden = self.controller(
            carry.controller, beside_reads(inputs, carry.memory)
        )
        size = sum(math.prod(shape) for shape in interface_shapes(heads, word))
        vector = nn.Dense(size, name="interface")(hidden)
        memory = respond(carry.memory, vector)
        outputs = nn.Dense(self.features, name="output")(beside_reads(hidden, memory))
        return DNCState(memory, controller), outputs

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> DNCState:
        """Returns an empty memory, and the initial carry of the controller."""
        *batch, size = input_shape
        n, w, r = self.locations, self.word_size, self.read_heads
        shapes = [(n, w), (n,), (n, n), (n,), (n,), (r, n), (r, w)]
        memory = Memory(*[jnp.zeros((*batch, *s), jnp.float32) for s in shapes])
        controller = self.controller.initialize_carry(rng, (*batch, size + r * w))
        return DNCState(memory, controller)

    @property
    def num_feature_axes(self) -> int:
        """One: all other axes of the inputs are batch axes."""
        return 1


# --- Any core ------------------------------------------------------------------------

CoreName = Literal["gru", "lstm", "dnc"]


def make_core(name: CoreName, features: int, **settings: Any) -> nn.RNNCellBase:
    """Returns a core with outputs `f[...,features]`; settings are fields of its class.

    The controller of a DNC is an LSTM of as many units, unless `controller` is given.

    Raises:
        ValueError: if there is no core of this name.
    """
    match name:
        case "gru":
            return nn.GRUCell(features, **settings)
        case "lstm":
            return nn.OptimizedLSTMCell(features, **settings)
        case "dnc":
            controller = nn.OptimizedLSTMCell(features, parent=None)
            settings = {"controller": controller} | settings
            return DNC(features, **settings)
    names = ", ".join(get_args(CoreName))
    raise ValueError(f"make_core: name must be one of {names}; got {name!r}")


def step(
    core: nn.RNNCellBase, carry: Any, inputs: Array, first: Array
) -> tuple[Any, Array]:
    """Takes one step of a core, from its initial carry where an episode starts.

    Args:
        core: any core, inside of a module or of `nn.apply`.
        carry: what the step before returned.
        inputs: `f[...,X]`.
        first: `b[...]`, true where the inputs are the first of their episode.

    Returns:
        The next carry and the outputs.

    Raises:
        ValueError: if `first` does not have the leading axes of the inputs.
    """
    batch = inputs.shape[: inputs.ndim - core.num_feature_axes]
    if first.shape != batch:
        raise ValueError(f"step: first must have shape {batch}; got {first.shape}")
    # A fixed key, as in `nn.RNN`: every episode starts alike.
    start = core.initialize_carry(jax.random.key(0), inputs.shape)

    def restarted(old: Array, new: Array) -> Array:
        wide = first.reshape(batch + (1,) * (old.ndim - len(batch)))
        return jnp.where(wide, new, old)

    return core(jax.tree.map(restarted, carry, start), inputs)


def unroll(
    core: nn.RNNCellBase, carry: Any, inputs_t: Array, first_t: Array
) -> tuple[Any, Array]:
    """Takes a step for each row of `inputs_t: f[T,...,X]` and `first_t: b[T,...]`.

    Returns the last carry and the outputs `f[T,...,features]`. See `step`.
    """
    scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    return scan(core, carry, inputs_t, first_t)

import itertools
import math

import cores
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cores import Interface, Memory

N, W, R = 5, 3, 2
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def no_numpy_promotion_needed(quick_to_compile):
    """Many small programs are compiled here."""


def in_float64(function, *arguments):
    """Calls a function of arrays in float64, and returns NumPy arrays."""
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arguments)
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def assert_equal(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, **{"rtol": 1e-9, "atol": 1e-12} | tolerance
        ),
        actual,
        expected,
    )


# --- The paper's equations, in loops over NumPy arrays --------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def content(memory, key, strength):
    def cosine(u, v):
        return u @ v / math.sqrt((u @ u + 1e-6) * (v @ v + 1e-6))

    scores = [math.exp(strength * cosine(key, row)) for row in memory]
    return np.array([score / sum(scores) for score in scores])


def usage_of(usage, write, reads, free):
    result = []
    for n in range(len(usage)):
        retention = math.prod(1 - free[i] * reads[i][n] for i in range(len(free)))
        result.append((usage[n] + write[n] - usage[n] * write[n]) * retention)
    return np.array(result)


def allocation(usage):
    phi = sorted(range(len(usage)), key=lambda n: (usage[n], n))
    result = np.zeros(len(usage))
    for j, n in enumerate(phi):
        result[n] = (1 - usage[n]) * math.prod(usage[phi[i]] for i in range(j))
    return result


def link_of(link, precedence, write):
    result = np.zeros_like(link)
    for i, j in itertools.permutations(range(len(write)), 2):
        kept = (1 - write[i] - write[j]) * link[i, j]
        result[i, j] = kept + write[i] * precedence[j]
    return result


def memory_of(memory, write, erase, vector):
    result = np.zeros_like(memory)
    for n, w in np.ndindex(memory.shape):
        result[n, w] = memory[n, w] * (1 - write[n] * erase[w]) + write[n] * vector[w]
    return result


def read_of(memory, link, before, key, strength, mode):
    backward = [sum(link[m, n] * before[m] for m in range(N)) for n in range(N)]
    forward = [sum(link[n, m] * before[m] for m in range(N)) for n in range(N)]
    alike = content(memory, key, strength)
    return np.array(
        [
            mode[0] * backward[n] + mode[1] * alike[n] + mode[2] * forward[n]
            for n in range(N)
        ]
    )


def interface_of(xi):
    xi = iter(xi)

    def take(size):
        return np.array([next(xi) for _ in range(size)])

    def oneplus(x):
        return 1 + np.log(1 + np.exp(x))

    result = Interface(
        read_keys=np.stack([take(W) for _ in range(R)]),
        read_strengths=oneplus(take(R)),
        write_key=take(W),
        write_strength=oneplus(next(xi)),
        erase=sigmoid(take(W)),
        write=take(W),
        free_gates=sigmoid(take(R)),
        allocation_gate=sigmoid(next(xi)),
        write_gate=sigmoid(next(xi)),
        read_modes=np.stack([softmax(take(3)) for _ in range(R)]),
    )
    assert next(xi, None) is None
    return result


def access_of(m, x):
    """One step of the memory, in the paper's order."""
    usage = usage_of(m.usage, m.write_weighting, m.read_weightings, x.free_gates)
    alike = content(m.contents, x.write_key, x.write_strength)
    g = x.allocation_gate
    write = x.write_gate * (g * allocation(usage) + (1 - g) * alike)
    contents = memory_of(m.contents, write, x.erase, x.write)
    link = link_of(m.link, m.precedence, write)
    precedence = (1 - sum(write)) * m.precedence + write
    reads = np.stack(
        [
            read_of(
                contents,
                link,
                m.read_weightings[i],
                x.read_keys[i],
                x.read_strengths[i],
                x.read_modes[i],
            )
            for i in range(R)
        ]
    )
    vectors = np.stack([sum(row[n] * contents[n] for n in range(N)) for row in reads])
    return Memory(contents, usage, link, precedence, write, reads, vectors)


def random_params(rng, module, *arguments):
    """Larger than those of `init`, biases too, for gates far from a half."""
    shapes = jax.eval_shape(module.init, KEY, *arguments)
    draw = lambda x: jnp.float32(2 * rng.normal(size=x.shape) / x.shape[0] ** 0.5)
    return jax.tree.map(draw, shapes)


def empty_memory():
    core = cores.DNC(1, nn.GRUCell(1), N, W, R)
    return core.initialize_carry(KEY, (1,)).memory


def random_vectors(rng, steps, scale):
    return scale * rng.normal(size=(steps, R * W + 3 * W + 5 * R + 3))


@pytest.fixture
def memory(rng):
    """A memory that has been used for some steps."""
    memory = jax.tree.map(lambda x: np.asarray(x, np.float64), empty_memory())
    for vector in random_vectors(rng, 8, 2.0):
        memory = access_of(memory, interface_of(vector))
    return memory


# --- Each piece against its equation --------------------------------------------------


def test_the_interface_vector_is_split_in_the_order_of_the_paper(rng):
    (vector,) = random_vectors(rng, 1, 2.0)
    actual = in_float64(lambda v: cores.parse_interface(v, R, W), vector)
    assert_equal(actual, interface_of(vector))


def test_content_weightings_are_those_of_the_paper(rng, memory):
    key, strength = rng.normal(size=W), 3.0
    actual = in_float64(cores.content_weighting, memory.contents, key, strength)
    assert_equal(actual, content(memory.contents, key, strength))


def test_a_strong_key_finds_the_location_that_points_its_way():
    contents = jnp.eye(N, W) * 5
    key = jnp.array([0.0, 2.0, 0.0])
    found = jax.jit(cores.content_weighting)(contents, key, 50.0)
    np.testing.assert_allclose(found, np.eye(N)[1], atol=1e-6)


def test_a_key_of_zeros_and_a_memory_of_zeros_weigh_all_locations_alike(rng):
    some = np.float32(rng.normal(size=(N, W)))
    for contents, key in [(some, 0 * some[0]), (0 * some, some[0])]:
        weighting = jax.jit(cores.content_weighting)(contents, key, 10.0)
        np.testing.assert_allclose(weighting, np.full(N, 1 / N), rtol=1e-6)


def test_usages_are_those_of_the_paper(rng, memory):
    free = rng.random(R)
    arguments = memory.usage, memory.write_weighting, memory.read_weightings, free
    assert_equal(in_float64(cores.updated_usage, *arguments), usage_of(*arguments))


def test_a_location_is_in_use_once_written_and_free_once_read_with_an_open_gate():
    wrote, read = jnp.array([1.0, 0.0]), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    updated_usage = jax.jit(cores.updated_usage)
    used = updated_usage(jnp.zeros(2), wrote, jnp.zeros((2, 2)), jnp.ones(2))
    assert used.tolist() == [1, 0]
    for gates, left in [([1.0, 0.0], [0, 0]), ([0.0, 1.0], [1, 0])]:
        after = updated_usage(used, jnp.zeros(2), read, jnp.array(gates))
        assert after.tolist() == left


def test_allocation_weightings_are_those_of_the_paper(rng):
    usages = np.array(
        [
            [0.5, 0.25, 1.0, 0.75, 0.125],
            [0.5, 0.2, 0.5, 0.2, 0.5],  # ties
            [0.0, 1.0, 0.0, 1.0, 0.3],
            [0.0] * 5,
            [1.0] * 5,
            [0.4] * 5,
            *rng.random((20, 5)),
        ]
    )
    actual = in_float64(jax.vmap(cores.allocation_weighting), usages)
    assert_equal(actual, np.stack([*map(allocation, usages)]))
    assert_equal(actual.sum(1), 1 - usages.prod(1))
    assert_equal(allocation([0.5, 0.25, 1.0]), np.array([0.125, 0.75, 0.0]))


def test_gradients_of_allocation_are_those_of_the_products_in_their_order():
    usages = np.array([[0.5, 0.25, 0.9, 0.75], [0.0, 1, 0.25, 0.5], [0.3, 0, 0.2, 1]])
    jacobian = jax.vmap(jax.jacobian(cores.allocation_weighting))
    step = 1e-6
    # A small step keeps the order, in which the products are linear in each usage.
    for usage, actual in zip(usages, in_float64(jacobian, usages), strict=True):
        moved = [allocation(usage + step * unit) for unit in np.eye(4)]
        slopes = (np.stack(moved, axis=1) - allocation(usage)[:, None]) / step
        np.testing.assert_allclose(actual, slopes, atol=1e-8)


def test_links_and_precedence_are_those_of_the_paper(memory):
    write = memory.write_weighting
    link, before = memory.link, memory.precedence

    def update(link, before, write):
        after = cores.updated_precedence(before, write)
        return cores.updated_link(link, before, write), after

    actual = in_float64(update, link, before, write)
    after = (1 - write.sum()) * before + write
    assert_equal(actual, (link_of(link, before, write), after))


def test_read_weightings_are_those_of_the_paper(rng, memory):
    x = interface_of(random_vectors(rng, 1, 2.0)[0])
    before = memory.read_weightings
    actual = in_float64(cores.read_weightings, memory.contents, memory.link, before, x)
    heads = zip(before, x.read_keys, x.read_strengths, x.read_modes, strict=True)
    expected = [read_of(memory.contents, memory.link, *head) for head in heads]
    assert_equal(actual, np.stack(expected))


def test_a_step_of_the_memory_is_that_of_the_paper(rng, memory):
    x = interface_of(random_vectors(rng, 1, 2.0)[0])
    assert_equal(in_float64(cores.access, memory, x), access_of(memory, x))


def test_steps_of_a_dnc_are_those_of_the_paper_with_its_parameters(rng):
    core = cores.DNC(4, nn.SimpleCell(6), N, W, R)
    xs = rng.normal(size=(6, 2))
    carry = core.initialize_carry(KEY, (2,))
    params = random_params(rng, core, carry, jnp.float32(xs[0]))

    def run(params, carry, xs):
        return jax.lax.scan(lambda carry, x: core.apply(params, carry, x), carry, xs)

    with jax.enable_x64(True):
        to_float64 = lambda x: jnp.asarray(x, jnp.float64)
        params, carry, xs = jax.tree.map(to_float64, (params, carry, xs))
        end, ys = jax.jit(run)(params, carry, xs)

    def dense(p, x):
        return x @ p["kernel"] + p.get("bias", 0.0)

    p, memory, h, xs, ys = jax.tree.map(
        np.asarray, (params["params"], carry.memory, carry.controller, xs, ys)
    )
    for x, y in zip(xs, ys, strict=True):
        inputs = np.concatenate([x, *memory.reads])
        h = np.tanh(
            dense(p["controller"]["i"], inputs) + dense(p["controller"]["h"], h)
        )
        memory = access_of(memory, interface_of(dense(p["interface"], h)))
        assert_equal(y, dense(p["output"], np.concatenate([h, *memory.reads])))
    assert_equal(end.memory, memory)
    assert_equal(end.controller, h)


# --- What always holds ----------------------------------------------------------------


def test_weightings_links_and_usages_stay_in_their_bounds(rng):
    def run(vectors):
        def step(memory, vector):
            memory = cores.access(memory, cores.parse_interface(vector, R, W))
            return memory, memory

        return jax.lax.scan(step, empty_memory(), vectors)[1]

    # The largest scale saturates gates to exactly 0 and 1.
    vectors = [random_vectors(rng, 16 * 40, scale) for scale in (1, 10, 1000)]
    vectors = jnp.float32(np.stack(vectors).reshape(48, 40, -1))
    m = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(vectors))
    assert all(np.isfinite(x).all() for x in m)
    for x in (m.usage, m.link, m.precedence, m.write_weighting, m.read_weightings):
        assert x.min() > -1e-6
        assert x.max() < 1 + 1e-5
    for x in (m.precedence, m.write_weighting, m.read_weightings, m.link):
        assert x.sum(-1).max() < 1 + 1e-5
    assert m.link.sum(-2).max() < 1 + 1e-5
    assert not np.einsum("...nn->...n", m.link).any()


def asked(**changes):
    """An interface of hard zeros and ones, which does nothing unless told."""
    blank = Interface(
        read_keys=np.zeros((1, W)),
        read_strengths=np.ones(1),
        write_key=np.zeros(W),
        write_strength=1,
        erase=np.ones(W),
        write=np.zeros(W),
        free_gates=np.zeros(1),
        allocation_gate=1,
        write_gate=0,
        read_modes=np.zeros((1, 3)),
    )
    return Interface(*map(jnp.float32, blank._replace(**changes)))


def one_headed():
    return cores.DNC(1, nn.GRUCell(1), N, W, 1).initialize_carry(KEY, (1,)).memory


WORDS = np.float32([[3, 0, 0], [0, 3, 0], [0, 0, 3]])
BACKWARD, BY_CONTENT, FORWARD = np.float32(np.eye(3))[:, None]


def test_words_are_read_in_the_order_written_and_backward():
    access, memory = jax.jit(cores.access), one_headed()
    for word in WORDS:
        memory = access(memory, asked(write=word, write_gate=1))
    lookup = asked(read_keys=WORDS[:1], read_strengths=[100], read_modes=BY_CONTENT)
    reads = [memory := access(memory, lookup)]
    for mode in (FORWARD, FORWARD, BACKWARD, BACKWARD):
        reads.append(memory := access(memory, asked(read_modes=mode)))
    expected = WORDS[[0, 1, 2, 1, 0]]
    np.testing.assert_allclose([m.reads[0] for m in reads], expected, atol=1e-5)
    for m in reads:
        np.testing.assert_array_equal(m.contents[:3], WORDS)


def test_nothing_but_what_was_read_changes_where_the_write_gate_is_shut(rng, memory):
    memory = jax.tree.map(jnp.float32, memory)
    x = interface_of(random_vectors(rng, 1, 2.0)[0])._replace(write_gate=0.0)
    after = jax.jit(cores.access)(memory, jax.tree.map(jnp.float32, x))
    for name in ("contents", "link", "precedence"):
        np.testing.assert_array_equal(getattr(after, name), getattr(memory, name))
    assert not after.write_weighting.any()


def test_a_full_memory_is_written_to_only_where_a_word_was_freed():
    access, memory = jax.jit(cores.access), one_headed()
    for word in [*WORDS, -WORDS[0], -WORDS[1]]:
        memory = access(memory, asked(write=word, write_gate=1))
    full = access(memory, asked(write=[1, 1, 1], write_gate=1))
    np.testing.assert_array_equal(full.contents, memory.contents)
    lookup = asked(read_keys=WORDS[2:], read_strengths=[100], read_modes=BY_CONTENT)
    memory = access(memory, lookup)
    freed = access(memory, asked(write=[1, 1, 1], write_gate=1, free_gates=[1]))
    expected = np.array(memory.contents)
    expected[2] = 1
    np.testing.assert_allclose(freed.contents, expected, atol=1e-5)


# --- Gradients ------------------------------------------------------------------------


def test_gradients_are_finite_from_an_empty_memory_on_and_end_where_episodes_do(rng):
    core = any_core("dnc")
    xs = jnp.float32(rng.normal(size=(4, 2)))
    carry = core.initialize_carry(KEY, (2,))

    @jax.jit
    @jax.grad
    def gradient(arguments, first):
        params, carry, xs = arguments
        carry, ys = nn.apply(cores.unroll, core)(params, carry, xs, first)
        return jnp.sum(ys[2:] ** 2) + sum(map(jnp.sum, jax.tree.leaves(carry)))

    params = random_params(rng, core, carry, xs[0])
    zeros = jax.tree.map(jnp.zeros_like, params)
    large = jax.tree.map(lambda x: 100 * x, params)
    one_episode, two_episodes = np.zeros(4, bool), np.array([0, 0, 1, 0], bool)
    for some in (zeros, large, params):
        gradients = gradient((some, carry, xs), one_episode)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert all(np.any(g) for g in jax.tree.leaves(gradients[0]))
    assert np.all(gradients[2])
    _, to_carry, to_xs = gradient((params, carry, xs), two_episodes)
    assert not any(np.any(g) for g in jax.tree.leaves(to_carry))
    assert np.all(to_xs != 0, axis=1).tolist() == [False, False, True, True]
    assert not np.any(to_xs[:2])


def test_gradients_through_steps_of_the_memory_are_those_of_the_equations(rng, memory):
    vectors, direction = random_vectors(rng, 3, 2.0), random_vectors(rng, 3, 1.0)
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape), memory)

    def total(memory):
        return sum((x * w).sum() for x, w in zip(memory, weights, strict=True))

    def run(vectors):
        def step(memory, vector):
            return cores.access(memory, cores.parse_interface(vector, R, W)), None

        return total(jax.lax.scan(step, memory, vectors)[0])

    def expected(vectors):
        after = memory
        for vector in vectors:
            after = access_of(after, interface_of(vector))
        return total(after)

    slope = in_float64(lambda v, d: jax.jvp(run, (v,), (d,))[1], vectors, direction)
    h = 1e-5
    moved = expected(vectors + h * direction) - expected(vectors - h * direction)
    np.testing.assert_allclose(slope, moved / (2 * h), rtol=1e-6)


# --- Any core, and where episodes start -----------------------------------------------


class Network(nn.Module):
    """What an agent has around its core: a torso and a head."""

    core: nn.RNNCellBase

    @nn.compact
    def __call__(self, carry, xs, first):
        carry, ys = cores.unroll(self.core, carry, nn.tanh(nn.Dense(4)(xs)), first)
        return carry, nn.Dense(2)(ys)


class Odd(nn.RNNCellBase):
    """A core of a carry with dictionaries, integers, several ranks, and no zeros."""

    def __call__(self, carry, x):
        carry = {
            "count": carry["count"] + 1,
            "sums": [
                carry["sums"][0] + x[..., None],
                (carry["sums"][1][0] + x[..., 0],),
            ],
        }
        count = carry["count"].astype(jnp.float32)
        outputs = [
            count[..., None],
            *(s.reshape(*count.shape, -1) for s in jax.tree.leaves(carry["sums"])),
        ]
        return carry, jnp.concatenate(outputs, axis=-1)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        sums = [jnp.full((*input_shape, 1), 7.0), (jnp.full(batch, 0.5),)]
        return {"count": jnp.full(batch, 100), "sums": sums}

    @property
    def num_feature_axes(self):
        return 1


def any_core(name):
    small = {"locations": N, "word_size": W, "read_heads": R} if name == "dnc" else {}
    return Odd() if name == "odd" else cores.make_core(name, 3, **small)


@pytest.mark.parametrize("name", ["gru", "lstm", "dnc", "odd"])
def test_episodes_in_one_batch_are_as_each_apart(rng, name):
    """The same lines for every core; only its name differs."""
    core = any_core(name)
    network = Network(core)
    xs = jnp.float32(rng.normal(size=(6, 2, 3, 2)))
    first = rng.random((6, 2, 3)) < 0.3
    first[0] = True
    start = core.initialize_carry(KEY, (2, 3, 4))
    params = random_params(rng, network, start, xs, first)
    run = jax.jit(network.apply)
    used, _ = run(params, start, xs, first & False)
    end, outputs = run(params, used, xs, first)
    for column in np.ndindex(2, 3):
        carry = None
        for x, begins, expected in zip(xs, first, outputs, strict=True):
            if begins[column]:
                carry = core.initialize_carry(KEY, (4,))
            carry, output = run(params, carry, x[column][None], np.array([False]))
            assert_equal(output[0], expected[column], rtol=1e-4, atol=1e-5)
        there = jax.tree.map(lambda x, c=column: x[c], end)
        assert_equal(there, carry, rtol=1e-4, atol=1e-5)


# --- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rnn", "DNC", None])
def test_an_unknown_core_is_refused(name):
    with pytest.raises(ValueError, match=rf"one of gru, lstm, dnc; got {name!r}"):
        cores.make_core(name, 8)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (5, 2, 1)])
def test_starts_of_episodes_are_never_broadcast(shape):
    core, xs = any_core("odd"), jnp.zeros((5, 2, 4))
    start = core.initialize_carry(KEY, (2, 4))
    with pytest.raises(ValueError, match=r"first must have shape \(2,\); got"):
        nn.apply(cores.unroll, core)({}, start, xs, np.zeros(shape, bool))


def test_the_controller_of_a_dnc_can_be_any_core():
    lstm = cores.make_core("dnc", 8)
    assert isinstance(lstm.controller, nn.OptimizedLSTMCell)
    assert lstm.controller.features == 8
    inner = any_core("dnc")
    outer = cores.make_core("dnc", 3, controller=inner, locations=N, word_size=W)
    carry, xs = outer.initialize_carry(KEY, (4,)), np.zeros(4, np.float32)
    after, outputs = jax.eval_shape(outer.init_with_output, KEY, carry, xs)[0]
    assert outputs.shape == (3,)
    assert isinstance(after.controller, cores.DNCState)


def test_the_controller_of_a_core_made_inside_a_module_belongs_to_the_core():
    class Agent(nn.Module):
        @nn.compact
        def __call__(self, xs):
            core = cores.make_core("dnc", 3)
            return core(core.initialize_carry(KEY, xs.shape), xs)[1]

    params = jax.eval_shape(Agent().init, KEY, np.zeros(4, np.float32))["params"]
    assert params.keys() == {"DNC_0"}
    assert params["DNC_0"].keys() == {"controller", "interface", "output"}


# --- Learning -------------------------------------------------------------------------


class Forgetful(nn.RNNCellBase):
    """A controller without memory of its own."""

    features: int

    @nn.compact
    def __call__(self, carry, x):
        return carry, nn.tanh(nn.Dense(self.features)(x))

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return ()

    @property
    def num_feature_axes(self):
        return 1


def echo(key, batch=32, words=2, bits=2):
    """Two episodes of words to see, then blanks in which to say them in that order."""
    said = jax.random.bernoulli(key, shape=(2, words, batch, bits)).astype(jnp.float32)
    blank = jnp.zeros_like(said)
    signs = jnp.concatenate([2 * said - 1, blank], axis=1).reshape(-1, batch, bits)
    speak = jnp.concatenate([blank, blank + 1], axis=1).reshape(-1, batch, bits)
    xs = jnp.concatenate([signs, speak[..., :1]], axis=-1)
    targets = jnp.concatenate([blank, said], axis=1).reshape(-1, batch, bits)
    first = jnp.zeros((2, 2 * words, batch), bool).at[:, 0].set(True)
    return xs, first.reshape(-1, batch), targets, speak


@pytest.mark.parametrize(
    "controller",
    [
        pytest.param(nn.OptimizedLSTMCell(8), marks=pytest.mark.slow, id="lstm"),
        pytest.param(Forgetful(16), id="forgetful"),
    ],
)
def test_a_dnc_learns_to_echo_even_where_only_its_memory_remembers(controller):
    core = cores.make_core("dnc", 2, controller=controller, locations=4, word_size=4)
    start = core.initialize_carry(KEY, (32, 3))
    optimizer = optax.adam(0.03)

    def loss(params, key):
        xs, first, targets, speak = echo(key)
        _, ys = nn.apply(cores.unroll, core)(params, start, xs, first)
        losses = optax.sigmoid_binary_cross_entropy(ys, targets)
        return jnp.sum(speak * losses) / jnp.sum(speak)

    def learn(state, key):
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, key)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def losses(key):
        params = core.init(key, start, jnp.zeros((32, 3), jnp.float32))
        keys = jax.random.split(key, 100)
        return jax.lax.scan(learn, (params, optimizer.init(params)), keys)[1]

    assert np.mean(losses(KEY)[-10:]) < 0.1 * math.log(2)

"""Sum trees, against lists of priorities and their sums in float64."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rlprims.sum_trees import (
    _descend,
    create_sum_tree,
    find_in_sum_tree,
    sample_sum_tree,
    update_sum_tree,
)

CAPACITIES = [1, 2, 3, 8, 13, 1000]
TINY = float(np.finfo(np.float32).tiny)


def assert_same(tree, other):
    """Bit by bit."""
    for x, y in zip(tree, other, strict=True):
        np.testing.assert_array_equal(x, y)


def falls_on(priorities, values):
    """The index that each value falls on, by exact sums."""
    found = []
    for value in values:
        ends = np.cumsum([Fraction(float(p)) for p in priorities])
        found.append(next(i for i, end in enumerate(ends) if end > Fraction(value)))
    return found


def awkward(rng, count, size):
    """Priorities of all magnitudes, most of them zero, at least one not."""
    numbers = 10.0 ** rng.uniform(-37, 30, size=(count, size))
    near_one = rng.uniform(size=(count, size))
    numbers = np.where(rng.uniform(size=(count, 1)) < 0.5, numbers, near_one)
    share = rng.choice([0.1, 0.5, 0.95], size=(count, 1))
    numbers = np.where(rng.uniform(size=(count, size)) < share, 0, numbers)
    numbers[np.arange(count), rng.integers(size, size=count)] += 0.5
    return numbers.astype(np.float32)


class TestCreateSumTree:
    @pytest.mark.parametrize("size", CAPACITIES)
    def test_a_sum_is_that_of_the_priorities_below_it(self, rng, size):
        priorities = rng.integers(1000, size=size).astype(np.float32)
        tree = create_sum_tree(priorities)
        np.testing.assert_array_equal(tree.priorities, priorities)
        assert tree.sums.shape == (size,)
        assert tree.total == priorities.sum()
        sums = np.asarray(tree.sums)

        deepest = 1 << (size - 1).bit_length()

        def below(node):
            if node >= size:  # the first priorities are the deepest
                return [(node - deepest) % size]
            return below(2 * node) + below(2 * node + 1)

        assert below(1) == list(range(size))
        for node in range(1, size):
            assert sums[node] == priorities[below(node)].sum()

    def test_the_total_is_as_precise_as_pairwise_sums_are(self, rng):
        priorities = rng.uniform(size=1_000_003).astype(np.float32)
        total = create_sum_tree(priorities).total
        np.testing.assert_allclose(total, priorities.sum(dtype=np.float64), rtol=5e-7)

    def test_a_batch_of_trees_has_a_total_each(self):
        trees = jax.vmap(create_sum_tree)(jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]]))
        assert trees.total.tolist() == [6, 4]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_is_kept_in_single_precision_at_least(self, dtype):
        """A sum of 300 ones would stay at 256 in bfloat16."""
        tree = create_sum_tree(jnp.ones(300, dtype))
        assert [x.dtype for x in tree] == [jnp.float32] * 2
        assert tree.total == 300

    def test_what_is_tiny_counts_as_zero(self):
        tree = create_sum_tree(np.float32([TINY / 2, TINY, 0.0, 1e-45]))
        assert tree.priorities.view(jnp.int32).tolist() == [0, 1 << 23, 0, 0]
        assert tree.total == np.float32(TINY)
        assert find_in_sum_tree(tree, jnp.zeros(1)).tolist() == [1]

    @pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
    def test_what_is_no_priority_shows_in_the_total(self, bad):
        tree = create_sum_tree(jnp.array([1.0, bad, 2.0]))
        np.testing.assert_array_equal(tree.priorities, [1, np.nan, 2])
        assert np.isnan(tree.total)
        assert find_in_sum_tree(tree, jnp.array([0.0, 0.5])).tolist() == [-1, -1]
        mended = update_sum_tree(tree, jnp.array([1]), jnp.array([4.0]))
        assert_same(mended, create_sum_tree(jnp.array([1.0, 4.0, 2.0])))

    def test_refuses_a_tree_of_nothing(self):
        with pytest.raises(ValueError, match=r"^create_sum_tree: priorities has shape"):
            create_sum_tree(jnp.zeros(0))


class TestUpdateSumTree:
    @pytest.mark.parametrize("size", CAPACITIES)
    def test_does_what_assigning_to_a_list_one_by_one_does(self, rng, size):
        """With equal indices, and with indices that are out of range."""
        start = rng.uniform(size=size).astype(np.float32)
        indices = rng.integers(-2, size + 2, size=(40, 7))
        new = rng.uniform(size=(40, 7)).astype(np.float32)

        @jax.jit
        def run(tree, indices, new):
            def step(tree, update):
                tree = update_sum_tree(tree, *update)
                return tree, (tree, create_sum_tree(tree.priorities))

            return jax.lax.scan(step, tree, (indices, new))[1]

        trees, made_anew = run(create_sum_tree(start), indices, new)
        assert_same(trees, made_anew)
        set_to, expected = np.asarray(trees.priorities), start.tolist()
        for k in range(40):
            for i, p in zip(indices[k].tolist(), new[k].tolist(), strict=True):
                if 0 <= i < size:
                    expected[i] = p
            assert set_to[k].tolist() == expected

    def test_a_million_updates_leave_no_drift(self, rng):
        size, steps, batch = 777, 4000, 250
        indices = rng.integers(size, size=(steps, batch)).astype(np.int32)
        new = (10.0 ** rng.uniform(-6, 6, size=(steps, batch))).astype(np.float32)
        new[-1] /= 1e9

        @jax.jit
        def run(tree, indices, new):
            step = lambda tree, update: (update_sum_tree(tree, *update), None)
            return jax.lax.scan(step, tree, (indices, new))[0]

        tree = run(create_sum_tree(jnp.zeros(size)), indices, new)
        assert_same(tree, create_sum_tree(tree.priorities))
        exact = np.asarray(tree.priorities).sum(dtype=np.float64)
        np.testing.assert_allclose(tree.total, exact, rtol=6e-7)

    def test_the_last_of_equal_indices_wins(self):
        indices = jnp.array([4, 1, 4, 1, 4, 0] * 100)
        tree = update_sum_tree(
            create_sum_tree(jnp.zeros(5)), indices, jnp.arange(1.0, 601.0)
        )
        assert tree.priorities.tolist() == [600, 598, 0, 0, 599]

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
    def test_no_index_wraps_around(self, dtype):
        """Neither the largest of its dtype nor minus one, whatever the capacity."""
        tree = create_sum_tree(jnp.ones(300))
        kind = jnp.iinfo(dtype)
        index = jnp.array([kind.min or kind.max], dtype)
        outside = not 0 <= int(index[0]) < 300
        new = update_sum_tree(tree, index, jnp.array([7.0]))
        assert new.total == (300 if outside else 306)

    def test_no_indices_change_nothing(self):
        tree = create_sum_tree(jnp.array([1.0, 2.0, 3.0]))
        none = update_sum_tree(tree, jnp.zeros(0, jnp.int32), jnp.zeros(0))
        assert_same(none, tree)

    def test_an_update_of_half_precision_leaves_the_rest_in_single(self):
        tree = create_sum_tree(np.float32([0.1, 0.2, 0.3]))
        new = update_sum_tree(tree, jnp.array([0]), jnp.ones(1, jnp.bfloat16))
        assert_same(new, create_sum_tree(np.float32([1.0, 0.2, 0.3])))
        assert {x.dtype for x in new} == {jnp.dtype("float32")}

    def test_what_is_tiny_counts_as_zero(self):
        tree = create_sum_tree(jnp.zeros(3, jnp.float32))
        indices, tiny = jnp.arange(3), np.float32([TINY / 2, TINY, 1e-45])
        new = update_sum_tree(tree, indices, tiny)
        assert new.priorities.view(jnp.int32).tolist() == [0, 1 << 23, 0]

    def test_double_precision_stays(self):
        with jax.enable_x64(True):
            for dtype in (np.float32, np.float64):
                tree = create_sum_tree(np.ones(3, dtype))
                new = update_sum_tree(tree, np.array([1]), np.ones(1, np.float32) / 3)
                assert {x.dtype for x in (*tree, *new)} == {np.dtype(dtype)}

    def test_each_tree_of_a_batch_has_its_own_updates(self):
        trees = jax.vmap(create_sum_tree)(jnp.ones((2, 3)))
        indices, new = jnp.array([[0], [2]]), jnp.array([[5.0], [7.0]])
        trees = jax.vmap(update_sum_tree)(trees, indices, new)
        assert trees.priorities.tolist() == [[5, 1, 1], [1, 1, 7]]
        assert trees.total.tolist() == [7, 9]

    def test_gradients_flow_from_the_total_to_what_counts(self):
        def total(old, new):
            tree = create_sum_tree(old)
            return update_sum_tree(tree, jnp.array([1, 1, 7]), new).total

        old, new = jax.grad(total, (0, 1))(jnp.ones(3), jnp.ones(3))
        assert (old.tolist(), new.tolist()) == ([1, 0, 1], [0, 1, 0])

    def test_refuses_what_is_no_tree(self):
        with pytest.raises(TypeError, match=r"tree must be of type SumTree, got "):
            update_sum_tree(jnp.ones(3), jnp.array([0]), jnp.ones(1))

    def test_refuses_a_negative_number(self):
        tree, index = create_sum_tree(jnp.ones(3)), jnp.array([0])
        with pytest.raises(ValueError, match=r"priorities must be in \[0, inf\), got "):
            update_sum_tree(tree, index, -1.0)


class TestFindInSumTree:
    @pytest.mark.parametrize("size", CAPACITIES[:-1])
    def test_finds_what_exact_sums_find(self, rng, size):
        """Sums of small integers are exact, so every boundary is."""
        priorities = rng.integers(4, size=size).astype(np.float32)
        priorities[rng.integers(size)] += 1
        values = np.arange(0, priorities.sum(), 0.25, dtype=np.float32)
        tree = create_sum_tree(priorities)
        found = find_in_sum_tree(tree, values).tolist()
        assert found == falls_on(priorities, values.tolist())

    def test_finds_what_sums_in_double_precision_find(self, rng):
        priorities = rng.uniform(size=10_000) * (rng.uniform(size=10_000) < 0.7)
        priorities = priorities.astype(np.float32)
        ends = np.cumsum(priorities, dtype=np.float64)
        values = rng.uniform(0, ends[-1], size=5000).astype(np.float32)
        found = np.asarray(find_in_sum_tree(create_sum_tree(priorities), values))
        expected = np.searchsorted(ends, values, side="right")
        away = np.abs(values - ends[expected]) > 1e-3
        away &= np.abs(values - (ends - priorities)[expected]) > 1e-3
        assert away.mean() > 0.98
        np.testing.assert_array_equal(found[away], expected[away])
        assert (priorities[found] > 0).all()

    @pytest.mark.parametrize("size", [7, 64])
    def test_a_priority_of_zero_is_never_found(self, rng, size):
        """Not at any sum, nor next to it, as rounded in one order or another."""
        priorities = awkward(rng, 200, size)
        sums = np.cumsum(priorities, axis=-1)
        backwards = np.cumsum(priorities[:, ::-1], axis=-1)
        trees = jax.vmap(create_sum_tree)(priorities)
        values = np.concatenate([sums, backwards, trees.sums, trees.priorities], -1)
        up, down = (np.nextafter(values, np.float32(x)) for x in (np.inf, 0))
        values = np.concatenate([values, up, down], axis=-1)
        found = np.asarray(jax.vmap(find_in_sum_tree)(trees, values))
        inside = values < np.asarray(trees.total)[:, None]
        np.testing.assert_array_equal(found >= 0, inside)
        picked = np.take_along_axis(priorities, found, axis=-1)
        assert (picked[inside] > 0).all()
        # Even beyond the end, which is where rounding may take a draw.
        beyond = np.concatenate([values, values * 2], axis=-1)
        descend = jax.jit(jax.vmap(_descend))
        for start, offset in ((beyond, 0 * beyond), (0 * beyond, beyond)):
            found = np.asarray(descend(trees, start, offset))
            assert (np.take_along_axis(priorities, found, axis=-1) > 0).all()

    def test_a_million_priorities_of_all_magnitudes(self, rng):
        size = 1_000_000
        priorities = awkward(rng, 1, size)[0]
        tree = create_sum_tree(priorities)
        values = np.linspace(0, np.nextafter(tree.total, np.float32(0)), 5000)
        values = np.minimum(values, np.nextafter(tree.total, np.float32(0)))
        found = np.asarray(find_in_sum_tree(tree, values.astype(np.float32)))
        assert (found >= 0).all()
        assert (priorities[found] > 0).all()
        assert (np.diff(found) >= 0).all()

    def test_only_values_from_zero_to_less_than_the_total_are_found(self):
        tree = create_sum_tree(jnp.array([1.0, 2.0, 0.0]))
        below = np.nextafter(np.float32(3), np.float32(0))
        values = np.array([0, below, 3, 4, -1, np.inf, np.nan], np.float32)
        found = find_in_sum_tree(tree, values).tolist()
        assert found == [0, 1, -1, -1, -1, -1, -1]

    def test_nothing_is_found_where_there_is_nothing(self):
        for priorities in ([0.0, 0.0, 0.0], [3e38, 0.0, 3e38]):
            tree = create_sum_tree(np.float32(priorities))
            assert find_in_sum_tree(tree, jnp.array([0.0, 1.0])).tolist() == [-1, -1]


class TestSampleSumTree:
    @pytest.mark.parametrize("method", ["independent", "stratified", "systematic"])
    def test_draws_each_index_as_often_as_its_priority_says(self, method):
        priorities = np.array([1, 0, 3, 0.5, 0, 2.5, 0.1], np.float32)
        tree, keys = (
            create_sum_tree(priorities),
            jax.random.split(jax.random.key(0), 4000),
        )
        sample = functools.partial(sample_sum_tree, num_samples=6, method=method)
        indices, probabilities = jax.vmap(sample, (0, None))(keys, tree)
        expected = priorities / priorities.sum()
        np.testing.assert_allclose(probabilities, expected[indices], rtol=1e-6)
        counts = (np.asarray(indices)[..., None] == np.arange(7)).sum(axis=1)
        error = counts.mean(axis=0) - 6 * expected
        deviation = np.sqrt(6 * expected * (1 - expected) / 4000)
        assert (np.abs(error) <= 4 * deviation).all()
        if method == "independent":
            ratio = (
                counts.var(axis=0)[[0, 2, 5]]
                / (6 * expected * (1 - expected))[[0, 2, 5]]
            )
            np.testing.assert_allclose(ratio, 1, atol=0.15)
        else:
            assert (np.diff(indices, axis=1) >= 0).all()
            assert (counts.var(axis=0) <= 6 * expected * (1 - expected)).all()
        if method == "systematic":
            assert (
                (counts >= np.floor(6 * expected)) & (counts <= np.ceil(6 * expected))
            ).all()

    def test_a_stratified_batch_has_one_from_each_part_of_the_total(self):
        tree = create_sum_tree(jnp.ones(12))
        for seed in range(20):
            sample = sample_sum_tree(jax.random.key(seed), tree, 4)
            assert (sample.indices // 3).tolist() == [0, 1, 2, 3]

    def test_tells_millions_of_priorities_apart(self):
        """Of single numbers there are eight to each pair: no three tenths of them."""
        tree = create_sum_tree(np.tile(np.float32([0.3, 0.7]), 2**21))
        sample = sample_sum_tree(jax.random.key(0), tree, 2**15, method="independent")
        share = (np.asarray(sample.indices) % 2 == 0).mean()
        np.testing.assert_allclose(share, 0.3, atol=4 * np.sqrt(0.21 / 2**15))

    def test_the_last_of_all_draws_is_one_too(self, rng):
        """However points are rounded, and whatever the batch."""
        priorities = awkward(rng, 100, 37)
        priorities[:, -3:] = 0
        priorities[:, 0] += 1
        trees = jax.vmap(create_sum_tree)(priorities)
        most = np.nextafter(np.float32(1), np.float32(0))
        for cells in (4096, 4864, 7424, 2**23 - 1):
            width = np.asarray(trees.total)[:, None] / np.float32(cells)
            start = np.float32(cells - 1) * width
            found = np.asarray(jax.vmap(_descend)(trees, start, most * width))
            assert (np.take_along_axis(priorities, found, axis=-1) > 0).all()

    @pytest.mark.parametrize("bad", [0.0, np.nan, np.float32(3e38)])
    def test_nothing_is_drawn_where_nothing_can_be(self, bad):
        tree = create_sum_tree(np.full(3, bad, np.float32))
        sample = sample_sum_tree(jax.random.key(0), tree, 2)
        assert sample.indices.tolist() == [-1, -1]
        assert np.isnan(sample.probabilities).all()
        new = update_sum_tree(tree, sample.indices, jnp.ones(2))
        assert_same(new, tree)

    def test_refuses_to_draw_nothing_and_by_no_known_method(self):
        tree, key = create_sum_tree(jnp.ones(3, jnp.float32)), jax.random.key(0)
        match = r"^sample_sum_tree: num_samples must be in \[1, 8388608\], got 0\.$"
        with pytest.raises(ValueError, match=match):
            sample_sum_tree(key, tree, 0)
        with pytest.raises(
            ValueError, match=r"^sample_sum_tree: method must be one of "
        ):
            sample_sum_tree(key, tree, 1, method="uniform")

    def test_a_replay_in_a_loop_keeps_its_dtypes_and_draws_what_matters(self):
        """Each draw lowers a priority, so that all are lowered in the end."""

        def step(tree, key):
            sample = sample_sum_tree(key, tree, 8)
            lowered = tree.priorities[sample.indices] / 4
            return update_sum_tree(tree, sample.indices, lowered), sample.indices

        start = create_sum_tree(jnp.full(20, 1024.0))
        keys = jax.random.split(jax.random.key(0), 40)
        tree, drawn = jax.jit(functools.partial(jax.lax.scan, step))(start, keys)
        assert_same(tree, create_sum_tree(tree.priorities))
        assert tree.priorities.max() <= 1024 / 4**4
        assert set(np.unique(drawn)) == set(range(20))

    @pytest.mark.parametrize("shared", [True, False], ids=["tree", "rest"])
    def test_devices_may_share_a_tree_or_all_the_rest(self, rng, shared):
        trees = jax.vmap(create_sum_tree)(rng.uniform(size=(2, 5)).astype(np.float32))
        keys = jax.random.split(jax.random.key(0), 2)
        values, indices = (
            jnp.array([[0.1, 1.0], [0.2, 0.9]]),
            jnp.array([[0, 3], [4, 2]]),
        )
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)

        def run(trees, rest):
            tree, (key, values, indices) = first(trees), first(rest)
            sample = sample_sum_tree(key, tree, 3)
            found = find_in_sum_tree(tree, values)
            new = update_sum_tree(tree, indices, values)
            return jax.tree.map(lambda x: x[None], (sample, found, new))

        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        specs = (jax.P(), jax.P("d")) if shared else (jax.P("d"), jax.P())
        sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=jax.P("d"))
        results = jax.jit(sharded)(trees, (keys, values, indices))
        for k in range(2):
            at = lambda x, k=k: x[k : k + 1]
            one = (
                jax.tree.map(at, (keys, values, indices))
                if shared
                else (keys, values, indices)
            )
            tree = trees if shared else jax.tree.map(at, trees)
            jax.tree.map(
                np.testing.assert_array_equal, jax.tree.map(at, results), run(tree, one)
            )

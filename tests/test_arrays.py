"""Array operations, against loops over single entries."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims
from rlprims import (
    batched_index,
    contain_nonfinite,
    lhs_broadcast,
    one_hot,
    replace_masked,
)
from rlprims.arrays import greatest, keep_where

LEADS = [(), (3,), (2, 3), (0,)]


def over(shape):
    return itertools.product(*map(range, shape))


class TestBatchedIndex:
    @pytest.mark.parametrize("lead", LEADS)
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", bool])
    def test_picks_one_entry_for_each_index(self, rng, lead, dtype):
        values = jnp.asarray(rng.integers(2, size=(*lead, 4))).astype(dtype)
        indices = rng.integers(4, size=lead)
        picked = batched_index(values, indices)
        assert picked.shape == lead
        assert picked.dtype == values.dtype
        for i in over(lead):
            assert picked[i] == values[(*i, indices[i])]

    def test_takes_a_python_index_into_a_vector(self):
        assert batched_index(np.array([1.0, 2.0, 3.0]), 2) == 3

    @pytest.mark.parametrize("lead", LEADS)
    def test_keeps_the_last_axis_on_request(self, rng, lead):
        values, indices = rng.normal(size=(*lead, 4)), rng.integers(4, size=lead)
        kept = batched_index(values, indices, True)
        assert kept.shape == (*lead, 1)
        np.testing.assert_array_equal(kept[..., 0], batched_index(values, indices))

    @pytest.mark.parametrize("index", [-1, -3, -4, 3, 4, 2**31 - 1, -(2**31)])
    def test_an_index_outside_is_nan_and_neither_wraps_nor_clamps(self, index):
        assert jnp.isnan(batched_index(jnp.arange(3.0), index))
        picked = batched_index(jnp.ones((2, 3)), jnp.array([0, index]))
        np.testing.assert_array_equal(picked, [1, np.nan])

    def test_an_index_outside_is_nan_whatever_its_dtype(self):
        assert jnp.isnan(batched_index(jnp.ones(3), np.uint32(2**32 - 1)))
        with jax.enable_x64(True):
            assert jnp.isnan(batched_index(np.ones(3), np.int64(2**40)))
            assert jnp.isnan(batched_index(np.ones(3), np.uint64(2**64 - 1)))

    def test_an_index_outside_picks_an_extreme_where_there_is_no_nan(self):
        lowest = np.iinfo(np.int32).min
        assert batched_index(jnp.array([1, 2], jnp.int32), -1) == lowest
        assert batched_index(jnp.array([1, 2], jnp.uint8), 2) == 255
        assert batched_index(jnp.array([False, False]), -1)

    def test_a_narrow_index_reaches_every_entry_it_can(self):
        values = jnp.arange(300.0)
        assert batched_index(values, np.uint8(255)) == 255
        assert batched_index(values, np.int8(127)) == 127

    def test_the_gradient_goes_to_the_entry_picked(self):
        values = jnp.array([[jnp.nan, 2.0], [3.0, jnp.inf], [5.0, 6.0]])
        indices = jnp.array([1, 0, -1])
        gradient = jax.grad(lambda v: jnp.nansum(batched_index(v, indices)))(values)
        np.testing.assert_array_equal(gradient, [[0, 1], [1, 0], [0, 0]])

    def test_an_index_outside_passes_no_gradient(self):
        gradient = jax.grad(batched_index)(jnp.ones(3), -1)
        np.testing.assert_array_equal(gradient, np.zeros(3))

    def test_works_under_jit_and_vmap(self, rng):
        values, indices = rng.normal(size=(2, 5, 4)), rng.integers(4, size=(2, 5))
        expected = batched_index(values, indices)
        for transform in (jax.jit, jax.vmap, lambda f: jax.vmap(jax.vmap(f))):
            result = transform(batched_index)(values, indices)
            np.testing.assert_array_equal(result, expected)

    @pytest.mark.parametrize(
        ("values", "indices"),
        [
            ((3, 4), (1,)),
            ((1, 4), (3,)),
            ((3, 4), (2,)),
            ((3, 4), ()),
            ((3, 4), (3, 1)),
            ((4,), (1,)),
            ((4,), (4,)),
        ],
    )
    def test_refuses_lengths_that_differ(self, values, indices):
        with pytest.raises(ValueError, match=r"batched_index: indices has shape .*exp"):
            batched_index(jnp.zeros(values), jnp.zeros(indices, jnp.int32))

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
    def test_refuses_values_without_entries_to_pick(self, shape):
        with pytest.raises(ValueError, match=r"batched_index: values has .*A > 0"):
            batched_index(jnp.zeros(shape), jnp.zeros(shape[:-1], jnp.int32))

    @pytest.mark.parametrize("index", [1.0, True])
    def test_refuses_an_index_that_is_no_integer(self, index):
        with pytest.raises(TypeError, match="batched_index: indices must be an int"):
            batched_index(jnp.zeros(3), index)


class TestContainNonfinite:
    BAD = (jnp.nan, jnp.inf, -jnp.inf)

    @pytest.mark.parametrize("bad", BAD)
    def test_a_zero_weight_hides_what_is_not_finite(self, bad):
        value, weight = jnp.array([bad, bad, 2.0]), jnp.array([0.0, -0.0, 0.0])
        np.testing.assert_array_equal(contain_nonfinite(value, weight), [0, 0, 2])

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("weight", [1.0, 1e-30, -1.0, jnp.nan])
    def test_any_other_weight_shows_it(self, bad, weight):
        result = contain_nonfinite(jnp.float32(bad), jnp.float32(weight))
        np.testing.assert_array_equal(result, bad)

    def test_the_derivative_with_respect_to_a_zero_weight_is_the_value(self):
        product = lambda w: jnp.sum(w * contain_nonfinite(jnp.array([3.0, jnp.nan]), w))
        np.testing.assert_array_equal(jax.grad(product)(jnp.zeros(2)), [3, 0])

    def test_no_gradient_reaches_what_is_hidden(self):
        weight = jnp.array([0.0, 0.0, 2.0])
        product = lambda v: jnp.sum(weight * contain_nonfinite(jnp.log(v), weight))
        gradient = jax.grad(product)(jnp.array([2.0, 4.0, 4.0]))
        np.testing.assert_array_equal(gradient, [0, 0, 0.5])


class TestLhsBroadcast:
    @pytest.mark.parametrize(
        ("source", "target", "expected"),
        [
            ((3,), (3, 4), (3, 1)),
            ((3,), (3, 4, 5), (3, 1, 1)),
            ((3, 4), (3, 4, 5), (3, 4, 1)),
            ((3, 1), (3, 4, 5), (3, 1, 1)),
            ((1,), (3, 4), (1, 1)),
            ((3, 4), (3, 4), (3, 4)),
            ((), (3, 4), (1, 1)),
            ((), (), ()),
            ((0,), (0, 4), (0, 1)),
        ],
    )
    def test_appends_axes_until_the_ranks_agree(self, rng, source, target, expected):
        x = rng.normal(size=source).astype(np.float32)
        result = lhs_broadcast(x, np.zeros(target, np.int32))
        assert result.shape == expected
        assert result.dtype == x.dtype
        np.testing.assert_array_equal(np.ravel(result), np.ravel(x))
        assert np.broadcast_shapes(result.shape, target) == target

    @pytest.mark.parametrize(
        ("source", "target"), [((4,), (3, 4)), ((3, 4), (3,)), ((2,), ()), ((3,), (1,))]
    )
    def test_refuses_axes_that_do_not_match(self, source, target):
        with pytest.raises(ValueError, match=r"lhs_broadcast: source has .* of target"):
            lhs_broadcast(jnp.zeros(source), jnp.zeros(target))

    def test_works_under_jit_and_vmap(self):
        source, target = jnp.arange(6.0).reshape(2, 3), jnp.zeros((2, 3, 4))
        assert jax.jit(lhs_broadcast)(source, target).shape == (2, 3, 1)
        assert jax.vmap(lhs_broadcast)(source, target).shape == (2, 3, 1)


class TestOneHot:
    @pytest.mark.parametrize("lead", LEADS)
    def test_is_one_at_the_index_and_zero_elsewhere(self, rng, lead):
        indices = rng.integers(5, size=lead)
        result = one_hot(indices, 5)
        assert result.shape == (*lead, 5)
        assert result.dtype == jnp.float32
        for i in over((*lead, 5)):
            assert result[i] == (1 if indices[i[:-1]] == i[-1] else 0)

    @pytest.mark.parametrize("index", [-1, -5, 5, 6, 2**31 - 1])
    def test_an_index_outside_gives_zeros(self, index):
        np.testing.assert_array_equal(one_hot(index, 5), np.zeros(5))

    def test_a_narrow_index_meets_each_class_once(self):
        """In 8 bits, class 256 would look like class 0."""
        np.testing.assert_array_equal(one_hot(np.uint8(0), 300), np.eye(300)[0])

    @pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16, "int32", bool])
    def test_has_the_dtype_asked_for(self, dtype):
        result = one_hot(jnp.array([1, 0]), 2, dtype)
        assert result.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(result.astype(int), [[0, 1], [1, 0]])

    def test_takes_its_arguments_by_name(self):
        result = one_hot(indices=0, num_classes=1, dtype=jnp.int32)
        np.testing.assert_array_equal(result, [1])

    def test_may_have_no_classes_but_not_fewer(self):
        assert one_hot(jnp.array([0, 1]), 0).shape == (2, 0)
        with pytest.raises(ValueError, match="one_hot: num_classes must not be neg"):
            one_hot(jnp.array([0, 1]), -1)


class TestReplaceMasked:
    @pytest.mark.parametrize("mask_rank", [0, 1, 2, 3])
    @pytest.mark.parametrize("kind", ["array", "scalar", "zeros"])
    def test_replaces_where_the_mask_is_true(self, rng, mask_rank, kind):
        data, array = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
        mask = rng.uniform(size=(2, 3, 4)[:mask_rank]) < 0.5
        replacement = {"array": array, "scalar": 7.0, "zeros": None}[kind]
        new = np.broadcast_to(0 if kind == "zeros" else replacement, data.shape)
        result = replace_masked(data, replacement, mask)
        assert result.dtype == data.dtype
        for i in over(data.shape):
            assert float(result[i]) == (new[i] if mask[i[:mask_rank]] else data[i])

    def test_a_mask_axis_of_size_one_counts_for_the_whole_axis(self):
        result = replace_masked(jnp.ones((3, 2)), None, jnp.array([[True, False]]))
        np.testing.assert_array_equal(result, [[0, 1]] * 3)

    def test_what_is_not_shown_reaches_neither_values_nor_gradients(self):
        data = jnp.array([jnp.nan, 2.0, jnp.inf, 4.0])
        other = jnp.array([1.0, jnp.nan, 3.0, -jnp.inf])
        mask = jnp.array([True, False, True, False])
        total = lambda d, r: jnp.sum(replace_masked(d, r, mask) ** 2)
        assert total(data, other) == 1 + 4 + 9 + 16
        to_data, to_other = jax.grad(total, (0, 1))(data, other)
        np.testing.assert_array_equal(to_data, [0, 4, 0, 8])
        np.testing.assert_array_equal(to_other, [2, 0, 6, 0])

    def test_nan_shows_where_it_is_not_replaced(self):
        data, mask = jnp.array([jnp.nan, jnp.nan]), jnp.array([True, False])
        np.testing.assert_array_equal(replace_masked(data, None, mask), [0, np.nan])

    @pytest.mark.parametrize(
        ("data", "replacement", "expected"),
        [
            (jnp.bfloat16(1), None, jnp.bfloat16),
            (jnp.bfloat16(1), 7.0, jnp.bfloat16),
            (jnp.bfloat16(1), jnp.float32(7), jnp.float32),
            (jnp.int32(1), None, jnp.int32),
            (jnp.int32(1), 0.5, jnp.result_type(float)),
            (jnp.bool_(True), None, jnp.bool_),
        ],
    )
    def test_has_the_promoted_dtype(self, data, replacement, expected):
        assert replace_masked(data, replacement, True).dtype == expected

    @pytest.mark.parametrize("shape", [(1, 4), (3, 1), (4,), (3,), (1,), (2, 3, 4)])
    def test_refuses_a_replacement_of_another_shape(self, shape):
        with pytest.raises(ValueError, match="replace_masked: replacement has shape "):
            replace_masked(jnp.zeros((3, 4)), jnp.zeros(shape), jnp.zeros(3, bool))

    def test_refuses_data_that_the_replacement_would_broadcast(self):
        with pytest.raises(ValueError, match=r"expected \(3, 1\), the shape of data"):
            replace_masked(jnp.zeros((3, 1)), jnp.zeros((3, 4)), jnp.zeros(3, bool))

    @pytest.mark.parametrize("shape", [(4,), (3, 3), (3, 4, 1), (1, 3)])
    def test_refuses_a_mask_that_does_not_match_from_the_left(self, shape):
        with pytest.raises(ValueError, match=r"replace_masked: mask has .* of data"):
            replace_masked(jnp.zeros((3, 4)), None, jnp.zeros(shape, bool))

    @pytest.mark.parametrize("mask", [1, 1.0, np.ones(3)])
    def test_refuses_a_mask_that_is_not_boolean(self, mask):
        with pytest.raises(TypeError, match="replace_masked: mask must be boolean"):
            replace_masked(jnp.zeros(3), None, mask)

    def test_works_under_jit_and_vmap(self, rng):
        data, mask = rng.normal(size=(2, 3, 4)), rng.uniform(size=(2, 3)) < 0.5
        expected = replace_masked(data, None, mask)
        for transform in (jax.jit, jax.vmap):
            result = transform(lambda d, m: replace_masked(d, None, m))(data, mask)
            np.testing.assert_array_equal(result, expected)


class TestKeepWhere:
    def test_zeros_what_is_left_out_over_leading_axes(self):
        x, n = jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), jnp.int32([5, 7])
        x, n = keep_where(jnp.array([True, False]), x, n)
        assert x.tolist() == [[1, 2], [0, 0]]
        assert n.tolist() == [5, 0]
        assert n.dtype == jnp.int32

    def test_keeps_everything_without_a_mask(self):
        x = jnp.array([jnp.nan])
        assert keep_where(None, x)[0] is x

    def test_what_is_left_out_has_no_part_in_a_gradient(self):
        mask = jnp.array([True, False])
        fn = lambda x, y: jnp.prod(jnp.stack(keep_where(mask, x, y)), axis=0).sum()
        x, y = jnp.array([2.0, jnp.inf]), jnp.array([3.0, jnp.nan])
        grads = jax.grad(fn, argnums=(0, 1))(x, y)
        assert [g.tolist() for g in grads] == [[3, 0], [2, 0]]


SIZE = 5000  # where the maximum of XLA, on a CPU, has lost NaN
LOST = np.float32([[0, np.nan]] * SIZE)
ZEROS, ONES, FIRST = np.zeros(SIZE, "f4"), np.ones(SIZE, "f4"), np.zeros(SIZE, int)
MAXIMA = {
    "greatest": lambda: greatest(LOST),
    "greatest of some": lambda: greatest(LOST, where=LOST != 0, initial=-np.inf),
    "greedy": lambda: rlprims.greedy().probs(LOST)[:, 0],
    "epsilon_greedy": lambda: rlprims.epsilon_greedy(0.5).probs(LOST)[:, 0],
    "mellowmax": lambda: rlprims.mellowmax(LOST, omega=1.0),
    "maxmin_value": lambda: rlprims.maxmin_value(np.stack([LOST, LOST])),
    "q_learning": lambda: jax.vmap(rlprims.q_learning)(LOST, FIRST, ONES, ONES, LOST),
    "clipped_double_q_learning": lambda: rlprims.clipped_double_q_learning(
        np.stack([ZEROS, ZEROS]), ONES, ONES, LOST.T
    ),
}


class TestGreatest:
    def test_is_the_maximum_along_an_axis(self, rng):
        x = rng.normal(size=(4, 5, 6)).astype(np.float32)
        some = rng.random(size=x.shape) < 0.5
        for axis in (0, 1, -1):
            np.testing.assert_array_equal(greatest(x, axis), x.max(axis))
            got = greatest(x, axis, where=some, initial=-np.inf, keepdims=True)
            expected = x.max(axis, where=some, initial=-np.inf, keepdims=True)
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("name", MAXIMA)
    def test_nan_is_not_lost_in_a_large_array(self, name):
        assert np.isnan(MAXIMA[name]()).all()

    def test_nan_that_does_not_count_is_none(self):
        assert (greatest(LOST, where=LOST == 0, initial=-np.inf) == 0).all()

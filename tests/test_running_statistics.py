"""Running statistics, against those of all data at once in NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims.running_statistics import (
    MinMaxStatistics,
    RunningStatistics,
    merge_running_statistics,
    normalize_by_min_max,
    normalize_by_running_statistics,
    update_min_max,
    update_running_statistics,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

single = functools.partial(jnp.asarray, dtype=jnp.float32)

START = RunningStatistics(single([0, 0, 0]), single([0, 0, 0]))
UNBOUNDED = MinMaxStatistics(single([jnp.inf] * 3), single([-jnp.inf] * 3))


def assert_moments(state, data, rtol=1e-5, atol=0.0):
    data = np.concatenate([np.float64(x) for x in data])
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    close(state.mean, data.mean(0))
    close(state.variance, data.var(0))
    assert state.count == len(data)


def batches_of(rng, mean=2.0, number=5):
    batches = mean + rng.normal(size=(number, 6, 3)) * np.array([0.5, 1, 3])
    return batches.astype(np.float32), rng.uniform(size=(number, 6)) < 0.6


class TestUpdate:
    @pytest.mark.parametrize("mean", [2.0, 1e4])
    def test_batches_count_as_if_they_were_one(self, rng, mean):
        """However large the mean is beside the deviation."""
        batches, masks = batches_of(rng, mean, 40)
        state = kept = START
        for x, mask in zip(batches, masks, strict=True):
            state = update_running_statistics(state, x)
            spoilt = np.where(mask[:, None], x, np.nan)
            kept = update_running_statistics(kept, spoilt, mask=mask)
        assert_moments(state, batches, rtol=1e-3)
        assert_moments(kept, [x[m] for x, m in zip(batches, masks, strict=True)], 1e-3)

    def test_the_first_batch_replaces_the_start(self, rng):
        start = RunningStatistics(jnp.full(3, jnp.nan), jnp.full(3, 1e30), 0.0)
        (x, *_), _ = batches_of(rng)
        assert_moments(update_running_statistics(start, x), [x], rtol=1e-6)

    def test_an_empty_batch_changes_nothing(self, rng):
        x, nothing = single([[jnp.nan] * 3] * 6), jnp.zeros(6, bool)
        state = RunningStatistics(single([0, 1, 2]), single([1, 1, 1]), 5.0)
        for batch, mask in ((x, nothing), (x[:0], None)):
            same = update_running_statistics(state, batch, mask=mask)
            jax.tree.map(np.testing.assert_array_equal, same, state)
        still = update_running_statistics(START, x, mask=nothing)
        jax.tree.map(np.testing.assert_array_equal, still, START)

    def test_one_sample_has_no_variance(self):
        state = update_running_statistics(START, single([[0.1, -1e30, 7.0]]))
        np.testing.assert_array_equal(state.mean, np.float32([0.1, -1e30, 7]))
        assert not state.variance.any()
        assert state.count == 1

    @pytest.mark.parametrize("value", [0.1, 1e4, 1e30])
    def test_what_is_all_the_same_has_a_variance_of_zero(self, value):
        state = START
        for _ in range(3):
            state = update_running_statistics(state, single(np.full((7, 3), value)))
        assert state.mean.tolist() == [np.float32(value)] * 3
        assert not state.variance.any()

    def test_is_the_same_in_a_scan(self, rng):
        batches, _ = batches_of(rng)
        step = lambda state, x: (update_running_statistics(state, x), None)
        start = START._replace(count=single(0))
        assert_moments(jax.lax.scan(step, start, batches)[0], batches)

    def test_half_precision_data_leave_the_state_in_single(self):
        x = jnp.array([[256.0], [258.0]], jnp.bfloat16)
        state = RunningStatistics(single([0]), single([0]))
        for _ in range(300):
            state = update_running_statistics(state, x)
        assert {y.dtype for y in state} == {jnp.dtype("float32")}
        np.testing.assert_allclose(state.mean, [257], rtol=1e-6)
        np.testing.assert_allclose(state.variance, [1], rtol=1e-5)
        assert state.count == 600
        narrow = jax.tree.map(lambda y: jnp.asarray(y, jnp.bfloat16), state)
        widened = merge_running_statistics(narrow, narrow)
        assert {y.dtype for y in widened} == {jnp.dtype("float32")}
        out = normalize_by_running_statistics(state, x)
        assert out.dtype == jnp.bfloat16
        assert out.tolist() == [[-1], [1]]

    def test_padding_has_no_gradient(self):
        x = jnp.array([[1.0], [3.0], [jnp.nan]])
        mask = jnp.array([True, True, False])
        state = RunningStatistics(jnp.zeros(1), jnp.zeros(1))
        spread = lambda x: update_running_statistics(state, x, mask=mask).variance[0]
        assert jax.grad(spread)(x).tolist() == [[-1], [1], [0]]


class TestMerge:
    def test_is_that_of_all_samples_in_any_order(self, rng):
        batches, _ = batches_of(rng, 1e3)
        one, two, three = (
            functools.reduce(update_running_statistics, part, START)
            for part in (batches[:1], batches[1:3], batches[3:])
        )
        merge = merge_running_statistics
        for both in (merge(merge(one, two), three), merge(three, merge(two, one))):
            assert_moments(both, batches, rtol=1e-4)

    def test_statistics_of_nothing_have_no_effect(self, rng):
        state = update_running_statistics(START, batches_of(rng)[0][0])
        nothing = RunningStatistics(jnp.full(3, jnp.nan), jnp.full(3, jnp.inf), 0.0)
        for both in (
            merge_running_statistics(state, nothing),
            merge_running_statistics(nothing, state),
        ):
            jax.tree.map(np.testing.assert_array_equal, both, state)


class TestNormalize:
    def test_gives_a_mean_of_zero_and_a_variance_of_one(self, rng):
        batches, _ = batches_of(rng, 1e3)
        x = np.concatenate(batches)
        state = update_running_statistics(START, x)
        result = normalize_by_running_statistics(state, x)
        np.testing.assert_allclose(result.mean(0), 0, atol=1e-3)
        np.testing.assert_allclose(result.std(0), 1, rtol=1e-4)

    def test_epsilon_is_added_to_the_variance(self):
        state = RunningStatistics(jnp.array(1.0), jnp.array(3.0), 2.0)
        x = jnp.array([3.0, 0.0])
        result = normalize_by_running_statistics(state, x, epsilon=1.0)
        assert result.tolist() == [1, -0.5]

    def test_clips_on_both_sides(self):
        state = RunningStatistics(jnp.array(0.0), jnp.array(1.0), 2.0)
        result = normalize_by_running_statistics(
            state, jnp.array([-7.0, 0.5, 7.0]), epsilon=0.0, max_abs=5.0
        )
        assert result.tolist() == [-5, 0.5, 5]

    def test_before_any_samples_numbers_stay_as_they_are(self):
        x = jnp.array([[1.0, 2.0, -3.0]])
        assert normalize_by_running_statistics(START, x).tolist() == x.tolist()
        state = RunningStatistics(jnp.full(3, jnp.nan), jnp.full(3, jnp.nan), 0.0)
        assert normalize_by_running_statistics(state, x).tolist() == x.tolist()

    def test_what_has_no_variance_stays_finite(self):
        state = RunningStatistics(jnp.array(1.0), jnp.array(0.0), 2.0)

        def total(x, variance):
            own = state._replace(variance=variance)
            return normalize_by_running_statistics(own, x, epsilon=0.0).sum()

        x = jnp.array([1.0, 5.0])
        value, slopes = jax.value_and_grad(total, (0, 1))(x, state.variance)
        assert value == 0
        assert not any(np.any(slope) for slope in slopes)

    def test_its_gradient_is_one_over_the_deviation(self):
        state = RunningStatistics(jnp.array(1.0), jnp.array(4.0), 2.0)
        normal = lambda x: normalize_by_running_statistics(state, x).sum()
        np.testing.assert_allclose(jax.grad(normal)(jnp.ones(2)), [0.5, 0.5])


class TestMinMax:
    def test_is_the_range_of_all_that_counts(self, rng):
        batches, masks = batches_of(rng)
        state = UNBOUNDED
        for x, mask in zip(batches, masks, strict=True):
            spoilt = np.where(mask[:, None], x, np.nan)
            state = update_min_max(state, spoilt, mask=mask)
        np.testing.assert_array_equal(state.minimum, batches[masks].min(0))
        np.testing.assert_array_equal(state.maximum, batches[masks].max(0))
        result = normalize_by_min_max(state, batches[masks])
        np.testing.assert_allclose(result.min(0), 0, atol=1e-6)
        np.testing.assert_allclose(result.max(0), 1, rtol=1e-6)

    def test_nothing_changes_nothing(self):
        x, nothing = jnp.full((2, 3), jnp.nan), jnp.zeros(2, bool)
        state = MinMaxStatistics(jnp.zeros(3), jnp.ones(3))
        for batch, mask in ((x, nothing), (jnp.zeros((0, 3)), None)):
            same = update_min_max(state, batch, mask=mask)
            jax.tree.map(np.testing.assert_array_equal, same, state)

    def test_numbers_stay_as_they_are_until_two_differ(self):
        x = jnp.array([[2.0, 5.0, -1.0]])
        assert normalize_by_min_max(UNBOUNDED, x).tolist() == x.tolist()
        state = update_min_max(UNBOUNDED, x)
        assert normalize_by_min_max(state, x).tolist() == x.tolist()
        state = update_min_max(state, jnp.array([[4.0, 5.0, -5.0]]))
        assert normalize_by_min_max(state, x).tolist() == [[0, 5, 1]]

    def test_its_gradient_is_one_over_the_range(self):
        state = MinMaxStatistics(
            jnp.array([0.0, jnp.inf, 1.0]), jnp.array([4.0, -jnp.inf, 1.0])
        )
        normal = lambda x: normalize_by_min_max(state, x).sum()
        assert jax.grad(normal)(jnp.ones((1, 3))).tolist() == [[0.25, 1, 1]]

    def test_passes_nan_on(self):
        state = update_min_max(UNBOUNDED, jnp.array([[jnp.nan, 1.0, 2.0]]))
        assert np.isnan(state.minimum).tolist() == [True, False, False]
        assert np.isnan(normalize_by_min_max(state, jnp.ones((1, 3)))[0, 0])

    def test_half_precision_data_leave_the_state_in_single(self):
        state = update_min_max(UNBOUNDED, jnp.ones((2, 3), jnp.bfloat16))
        assert {x.dtype for x in state} == {jnp.dtype("float32")}


class TestDevices:
    """What is split over devices is counted as if it were whole."""

    def run(self, split, rng):
        (x, *_), (mask, *_) = batches_of(rng, number=1)
        x, mask = (np.concatenate([y, y[:2]]).reshape(4, 2, -1) for y in (x, mask))
        mask = mask[..., 0]
        mask[1] = False  # nothing counts on one device
        state = RunningStatistics(single([0, 1, 2]), single([1, 1, 1]), 2.0)

        def results(x, mask, axis_name):
            options = {"mask": mask, "axis_name": axis_name}
            moved = update_running_statistics(state, x, **options)
            return jnp.stack([*moved[:2], *update_min_max(UNBOUNDED, x, **options)])

        got = jax.jit(split(results))(x, mask)
        expected = results(x.reshape(8, 3), mask.ravel(), None)
        for each in np.reshape(got, (4, 4, 3)):
            np.testing.assert_allclose(each, expected, rtol=1e-5)

    def test_in_shard_map(self, rng):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        over, same = PartitionSpec("d"), PartitionSpec()

        def split(fn):
            own = lambda x, mask: fn(x[0], mask[0], "d")
            mapped = jax.shard_map(own, mesh=mesh, in_specs=over, out_specs=same)
            return lambda *xs: jnp.stack([mapped(*xs)] * 4)

        self.run(split, rng)

    def test_in_vmap(self, rng):
        self.run(
            lambda fn: jax.vmap(functools.partial(fn, axis_name="d"), axis_name="d"),
            rng,
        )


def test_refuses_what_breaks_a_contract():
    with pytest.raises(ValueError, match="x has shape"):
        update_running_statistics(START, jnp.zeros((2, 4)))
    with pytest.raises(TypeError, match="state must be of type RunningStatistics"):
        update_running_statistics((0, 1, 2), jnp.zeros((2, 3)))
    other = RunningStatistics(jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"other\.mean has shape"):
        merge_running_statistics(START, other)
    with pytest.raises(ValueError, match="max_abs must be in"):
        normalize_by_running_statistics(START, jnp.zeros((1, 3)), max_abs=-1.0)
    with pytest.raises(TypeError, match="axis_name must be the name"):
        update_min_max(UNBOUNDED, jnp.zeros((1, 3)), axis_name=0)

"""Points and draws, against the parts they belong to and exact expectations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims._strata import placed
from rlprims.sampling import sample_indices, sample_points

METHODS = ["independent", "stratified", "systematic"]
of_each_method = pytest.mark.parametrize("method", METHODS)


class TestSamplePoints:
    @of_each_method
    def test_are_uniform(self, method):
        keys = jax.random.split(jax.random.key(0), 5000)
        sample = functools.partial(sample_points, num_samples=3, method=method)
        points = np.asarray(jax.vmap(sample)(keys))
        assert ((points >= 0) & (points < 1)).all()
        np.testing.assert_allclose(points.mean(), 1 / 2, atol=0.02)
        np.testing.assert_allclose(points.var(), 1 / 12, atol=0.004)
        tenths = np.histogram(points, bins=10, range=(0, 1))[0] / points.size
        np.testing.assert_allclose(tenths, 0.1, atol=0.015)

    @pytest.mark.parametrize("method", METHODS[1:])
    @pytest.mark.parametrize("count", [1, 7, 5000])
    def test_one_falls_into_each_part(self, method, count):
        points = np.asarray(sample_points(jax.random.key(3), count, method=method))
        starts = np.arange(count, dtype=np.float32) / np.float32(count)
        ends = np.append(starts[1:], 1)
        assert (points >= starts - 6e-8).all()  # as the ends are rounded
        assert (points <= ends).all()
        assert (points < 1).all()

    def test_the_last_digits_have_nothing_to_do_with_the_first(self):
        points = sample_points(jax.random.key(0), 20_000, method="independent")
        last = np.asarray(points) * 4096 % 1
        np.testing.assert_allclose(np.corrcoef(points, last)[0, 1], 0, atol=0.03)
        np.testing.assert_allclose(np.histogram(last, 8)[0] / 20_000, 1 / 8, atol=0.01)

    def test_systematic_ones_are_at_the_same_distance(self):
        points = np.asarray(
            sample_points(jax.random.key(1), 10, method="systematic"), np.float64
        )
        np.testing.assert_allclose(np.diff(points), 0.1, rtol=1e-5)

    def test_the_others_are_not(self):
        for method in METHODS[:2]:
            points = sample_points(jax.random.key(1), 10, method=method)
            assert np.std(np.diff(np.sort(points))) > 0.01

    def test_independent_ones_may_all_be_in_one_half(self):
        keys = jax.random.split(jax.random.key(0), 1000)
        sample = functools.partial(sample_points, num_samples=3, method="independent")
        halves = (np.asarray(jax.vmap(sample)(keys)) < 0.5).sum(axis=1)
        shares = np.bincount(halves) / 1000
        np.testing.assert_allclose(shares, [1 / 8, 3 / 8, 3 / 8, 1 / 8], atol=0.05)

    @pytest.mark.parametrize("count", [1, 49, 2**20 + 1])
    def test_rounding_takes_none_into_the_next_part(self, count):
        """Not even the largest fraction there is, in the last part of all."""
        last = np.nextafter(np.float32(1), np.float32(0))
        cells = np.arange(count, dtype=np.float32)
        place = jax.jit(placed, static_argnums=2)
        starts = np.asarray(place(cells, np.zeros_like(cells), count))
        ends = np.asarray(place(cells, np.full_like(cells, last), count))
        assert (starts <= ends).all()
        assert (ends[:-1] < starts[1:]).all()
        assert ends[-1] < 1
        exact = np.arange(count) / count
        np.testing.assert_allclose(starts, exact, rtol=1.3e-7)
        np.testing.assert_allclose(ends, exact + 1 / count, rtol=3e-7)

    def test_different_keys_give_different_points(self):
        one, two = (sample_points(jax.random.key(seed), 4) for seed in (0, 1))
        assert (one != two).all()

    def test_have_the_dtype_asked_for(self):
        assert sample_points(jax.random.key(0), 3).dtype == np.float32
        with jax.enable_x64(True):
            assert sample_points(jax.random.key(0), 3).dtype == np.float32
            points = sample_points(jax.random.key(0), 3, dtype=jnp.float64)
            assert points.dtype == np.float64

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
    def test_refuses_a_dtype_that_is_too_narrow(self, dtype):
        match = (
            r"^sample_points: dtype must be floating-point, of 32 bits at least, got"
        )
        with pytest.raises(TypeError, match=match):
            sample_points(jax.random.key(0), 3, dtype=dtype)

    @pytest.mark.parametrize("count", [0, -1, 2**23 + 1])
    def test_refuses_a_number_of_points_that_cannot_be(self, count):
        match = (
            rf"^sample_points: num_samples must be in \[1, 8388608\], got {count}\.$"
        )
        with pytest.raises(ValueError, match=match):
            sample_points(jax.random.key(0), count)

    def test_refuses_another_method(self):
        with pytest.raises(ValueError, match=r"^sample_points: method must be one of "):
            sample_points(jax.random.key(0), 3, method="halton")


class TestSampleIndices:
    @of_each_method
    def test_the_expected_counts_are_exact(self, method):
        weights = np.array([0.5, 0.0, 2.0, 0.25, 1.25, 0.0], np.float32)
        keys = jax.random.split(jax.random.key(0), 4000)
        sample = functools.partial(sample_indices, num_samples=5, method=method)
        drawn = np.asarray(jax.vmap(sample, (0, None))(keys, weights))
        counts = (drawn[..., None] == np.arange(6)).sum(axis=1)
        expected = 5 * weights / weights.sum()
        deviation = np.sqrt(expected * (1 - expected / 5) / 4000)
        assert (np.abs(counts.mean(axis=0) - expected) <= 4 * deviation).all()
        if method == "systematic":
            assert (counts >= np.floor(expected)).all()
            assert (counts <= np.ceil(expected)).all()
        if method == "independent":
            ratio = (
                counts.var(axis=0)[expected > 0]
                / (expected * (1 - expected / 5))[expected > 0]
            )
            np.testing.assert_allclose(ratio, 1, atol=0.15)

    @of_each_method
    def test_are_those_that_the_points_fall_on(self, rng, method):
        """Of sums in float64, but for points so near one that rounding decides."""
        weights = rng.uniform(size=300) * (rng.uniform(size=300) < 0.5)
        weights = weights.astype(np.float32)
        key = jax.random.key(5)
        drawn = np.asarray(sample_indices(key, weights, 1000, method=method))
        points = np.asarray(sample_points(key, 1000, method=method), np.float64)
        ends = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
        away = np.abs(points[:, None] - ends).min(axis=1) > 1e-6
        expected = np.searchsorted(ends, points, side="right")
        assert away.mean() > 0.95
        np.testing.assert_array_equal(drawn[away], expected[away])
        assert (weights[drawn] > 0).all()

    @of_each_method
    def test_a_weight_of_zero_is_never_drawn(self, rng, method):
        weights = 10.0 ** rng.uniform(-37, 30, size=(500, 33))
        weights[rng.uniform(size=weights.shape) < 0.6] = 0
        weights[:, 20] += 0.1
        weights = weights.astype(np.float32)
        keys = jax.random.split(jax.random.key(0), 500)
        sample = functools.partial(sample_indices, num_samples=40, method=method)
        drawn = np.asarray(jax.vmap(sample)(keys, weights))
        assert (np.take_along_axis(weights, drawn, axis=-1) > 0).all()

    def test_equal_weights_are_each_drawn_once_by_systematic_resampling(self):
        for seed in range(30):
            drawn = sample_indices(
                jax.random.key(seed), jnp.full(64, 0.25), 64, method="systematic"
            )
            assert drawn.tolist() == list(range(64))

    def test_a_weight_is_relative(self, rng):
        weights, key = rng.uniform(size=20).astype(np.float32), jax.random.key(0)
        weights = np.maximum(weights, 0.1)  # so that none is below normal numbers
        for scale in np.float32([2.0**-122, 2.0**-60, 2.0**60]):
            np.testing.assert_array_equal(
                sample_indices(key, weights * scale, 50),
                sample_indices(key, weights, 50),
            )

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
    def test_a_weight_that_is_none_spoils_every_draw(self, bad):
        weights, key = jnp.array([1.0, bad, 2.0]), jax.random.key(0)
        assert sample_indices(key, weights, 3).tolist() == [-1, -1, -1]

    def test_nothing_is_drawn_where_all_weights_are_zero(self):
        assert sample_indices(jax.random.key(0), jnp.zeros(3), 2).tolist() == [-1, -1]

    def test_half_precision_is_drawn_from_in_single(self):
        weights = jnp.ones(400, jnp.bfloat16)  # whose sum would stay at 256
        drawn = sample_indices(jax.random.key(0), weights, 400, method="systematic")
        assert drawn.tolist() == list(range(400))

    def test_refuses_to_draw_nothing(self):
        with pytest.raises(
            ValueError, match=r"^sample_indices: num_samples must be in "
        ):
            sample_indices(jax.random.key(0), jnp.ones(3), 0)

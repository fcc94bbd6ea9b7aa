"""Squashed actions, against sums over components in double precision."""

import math
import statistics
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    normalize_action,
    rescale_action,
    squashed_gaussian,
    tanh_gaussian_log_prob,
    tanh_gaussian_sample_and_log_prob,
    unsquash_action,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

KEY = jax.random.key(3)
LOW, HIGH = np.float32([-1, 0, -0.3]), np.float32([1, 10, 0.7])
WIDE = {"minimum": LOW, "maximum": HIGH}


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def log_slope_by_hand(u):
    """The logarithm of the derivative of tanh, one over the square of cosh."""
    if abs(u) < 300:
        return -2 * math.log(math.cosh(u))
    return 2 * (math.log(2) - abs(u))


def log_prob_by_hand(us, mus, sigmas, lows, highs):
    total = []
    for u, mu, sigma, low, high in zip(us, mus, sigmas, lows, highs, strict=True):
        density = statistics.NormalDist(mu, sigma)
        log_normal = -(((u - mu) / sigma) ** 2) / 2 - math.log(
            density.stdev * math.sqrt(2 * math.pi)
        )
        total.append(log_normal - log_slope_by_hand(u) - math.log((high - low) / 2))
    return math.fsum(total)


def rows(fn, *arrays):
    """Applies `fn` to lists along the last axis of each array."""
    arrays = np.broadcast_arrays(*arrays)
    lead = arrays[0].shape[:-1]
    return np.reshape(
        [fn(*(a[i].tolist() for a in arrays)) for i in np.ndindex(lead)], lead
    )


class TestLogProb:
    def test_is_that_of_the_normal_less_the_volume(self, rng):
        u, mu = rng.normal(scale=3, size=(2, 2, 5, 3)).astype(np.float32)
        sigma = rng.uniform(0.3, 2, size=(2, 5, 3)).astype(np.float32)
        expected = rows(log_prob_by_hand, u, mu, sigma, LOW, HIGH)
        same(tanh_gaussian_log_prob(u, mu, sigma, **WIDE), expected)

    @pytest.mark.parametrize("u", [-1e3, -40.0, -10.0, 10.0, 40.0, 1e3])
    def test_stays_right_with_its_gradients_where_the_action_saturates(self, u):
        mu, sigma = np.float32([0.5]), 2.0
        fn = jax.value_and_grad(lambda u: tanh_gaussian_log_prob(u, mu, sigma))
        log_prob, slope = fn(np.float32([u]))
        same(log_prob, log_prob_by_hand([u], [0.5], [2.0], [-1.0], [1.0]))
        same(slope, [-(u - 0.5) / 4 + 2 * math.tanh(u)])

    def test_the_density_of_actions_integrates_to_one(self):
        a = np.linspace(2, 6, 20_001)[1:-1].astype(np.float32)[:, None]
        u = unsquash_action(a, 2.0, 6.0)
        mu = np.full_like(u, 0.3)
        log_probs = tanh_gaussian_log_prob(u, mu, 0.8, minimum=2.0, maximum=6.0)
        same(np.exp(np.float64(log_probs)).sum() * 4 / 20_000, 1, rtol=1e-3)

    def test_is_that_of_the_squashed_gaussian_with_the_same_normal(self, rng):
        spec = types.SimpleNamespace(**WIDE)
        other = squashed_gaussian(sigma_min=-0.5, sigma_max=-0.5)
        mu, u = rng.normal(size=(2, 4, 3)).astype(np.float32)
        action = rescale_action(np.tanh(u), LOW, HIGH)
        expected = other.logprob(action, mu, np.zeros_like(mu), spec)
        sigma = math.exp(-0.5)
        got = tanh_gaussian_log_prob(u, np.tanh(mu), sigma, **WIDE)
        same(got, expected, rtol=1e-4, atol=1e-4)

    def test_half_precision_rounds_only_the_result(self):
        u = jnp.array([12.0, -30.0], jnp.bfloat16)
        log_prob = tanh_gaussian_log_prob(u, 0 * u, 1.0)
        expected = log_prob_by_hand([12, -30], [0, 0], [1, 1], [-1, -1], [1, 1])
        assert log_prob.dtype == jnp.bfloat16
        assert log_prob == jnp.bfloat16(expected)

    def test_bounds_that_leave_no_room_give_nan(self):
        for low, high in [(1.0, 1.0), (1.0, -1.0)]:
            bounds = {"minimum": low, "maximum": high}
            assert np.isnan(
                tanh_gaussian_log_prob(np.ones(1), np.ones(1), 1.0, **bounds)
            )

    def test_a_deviation_of_zero_is_refused(self):
        with pytest.raises(ValueError, match=r"sigma must be in \(0, inf\), got 0.0"):
            tanh_gaussian_log_prob(jnp.ones(1), jnp.ones(1), 0.0)


class TestSample:
    def test_squashes_one_draw_for_each_component(self, rng):
        mu = rng.normal(size=(4, 3)).astype(np.float32)
        noise = np.asarray(jax.random.normal(KEY, (4, 3), np.float32))
        action, log_prob, u = tanh_gaussian_sample_and_log_prob(KEY, mu, 0.7, **WIDE)
        same(u, mu + np.float32(0.7) * noise)
        same(action, LOW + (np.tanh(np.float64(u)) + 1) / 2 * (HIGH - LOW))
        expected = rows(log_prob_by_hand, u, mu, np.full((4, 3), 0.7), LOW, HIGH)
        same(log_prob, expected)

    def test_old_keys_draw_the_same(self):
        mu = jnp.zeros(2)
        old, new = jax.random.PRNGKey(3), jax.random.key(3)
        draws = [tanh_gaussian_sample_and_log_prob(key, mu, 1.0) for key in (old, new)]
        jax.tree.map(np.testing.assert_array_equal, *draws)

    def test_draws_fall_below_each_action_as_often_as_they_should(self):
        mu = jnp.full((20_000, 1), 0.4)
        bounds = {"minimum": 0.0, "maximum": 2.0}
        action = tanh_gaussian_sample_and_log_prob(KEY, mu, 0.9, **bounds).action
        for limit in (0.5, 1.0, 1.5, 1.9):
            p = statistics.NormalDist(0.4, 0.9).cdf(math.atanh(limit - 1))
            assert abs(np.mean(action < limit) - p) < 4 * math.sqrt(
                p * (1 - p) / 20_000
            )

    def test_the_mean_log_prob_is_minus_the_entropy(self):
        """By quadrature over the normal."""
        mu = jnp.full((40_000, 1), 0.4)
        log_prob = tanh_gaussian_sample_and_log_prob(KEY, mu, 0.9).log_prob
        z = np.linspace(-8, 8, 4001)
        weights = np.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
        u = 0.4 + 0.9 * z
        logs = (
            -(z**2) / 2
            - math.log(0.9 * math.sqrt(2 * math.pi))
            + 2 * np.log(np.cosh(u))
        )
        error = 4 * np.std(log_prob) / math.sqrt(40_000)
        assert abs(np.mean(log_prob) - weights @ logs) < error

    def test_gradients_are_those_of_the_draw(self):
        """The density in terms of the noise moves with the volume and the scale."""
        mu, sigma = jnp.array([0.3, -0.8]), jnp.array([0.5, 1.5])
        draw = lambda mu, sigma: tanh_gaussian_sample_and_log_prob(KEY, mu, sigma)
        eps = np.asarray(jax.random.normal(KEY, (2,)))
        tanh = np.tanh(mu + sigma * eps)
        by_mu, by_sigma = jax.grad(lambda *x: draw(*x).log_prob, (0, 1))(mu, sigma)
        same(by_mu, 2 * tanh)
        same(by_sigma, 2 * tanh * eps - 1 / sigma)
        by_mu, by_sigma = jax.grad(lambda *x: draw(*x).action.sum(), (0, 1))(mu, sigma)
        same(by_mu, 1 - tanh**2)
        same(by_sigma, (1 - tanh**2) * eps)

    def test_a_mean_far_out_drowns_nothing(self):
        mu, sigma = jnp.array([1e3, -1e3]), 1e-3
        fn = lambda mu, sigma: (
            tanh_gaussian_sample_and_log_prob(KEY, mu, sigma).log_prob
        )
        log_prob, slopes = jax.value_and_grad(fn, (0, 1))(mu, sigma)
        eps = np.float64(jax.random.normal(KEY, (2,)))
        normal = -(eps**2) / 2 - math.log(1e-3 * math.sqrt(2 * math.pi))
        u = np.float64(mu) + 1e-3 * eps
        volume = np.array([log_slope_by_hand(x) for x in u])
        same(log_prob, np.sum(normal - volume), rtol=1e-6)
        same(slopes[0], [2, -2])
        same(slopes[1], 2 * (eps[0] - eps[1]) - 2000, rtol=1e-4)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("bounds", [(0.1, 0.3), (-0.7, 0.7), (99.0, 100.0)])
    def test_no_action_lies_beyond_its_bounds(self, dtype, bounds):
        low, high = np.asarray(bounds, dtype)
        mu = jnp.linspace(-20, 20, 3000, dtype=dtype)[:, None]
        limits = {"minimum": low, "maximum": high}
        action = tanh_gaussian_sample_and_log_prob(KEY, mu, 1.0, **limits).action
        assert action.dtype == dtype
        assert ((low <= action) & (action <= high)).all()
        assert (action == low).any()
        assert (action == high).any()

    def test_bounds_that_leave_no_room_give_nan(self):
        bounds = {"minimum": 1.0, "maximum": 1.0}
        draw = tanh_gaussian_sample_and_log_prob(KEY, jnp.zeros(2), 1.0, **bounds)
        assert np.isnan(draw.action).all()
        assert np.isnan(draw.log_prob)

    def test_a_key_that_is_none_is_refused(self):
        with pytest.raises(TypeError, match="key must be a random key"):
            tanh_gaussian_sample_and_log_prob(jnp.zeros(2), jnp.zeros(2), 1.0)


class TestRescaling:
    def test_maps_one_range_onto_the_other_linearly(self, rng):
        y = rng.uniform(-1, 1, size=(5, 3)).astype(np.float32)
        a = LOW + (np.float64(y) + 1) / 2 * (HIGH - LOW)
        same(rescale_action(y, LOW, HIGH), a)
        same(normalize_action(a.astype(np.float32), LOW, HIGH), y)

    def test_what_lies_beyond_stays_beyond(self):
        assert rescale_action(jnp.array([2.0, -3.0]), 0.0, 10.0).tolist() == [15, -10]
        assert normalize_action(jnp.array([15.0, -10.0]), 0.0, 10.0).tolist() == [2, -3]

    def test_meets_both_bounds_exactly(self, rng):
        low = rng.normal(scale=10, size=200).astype(np.float32)
        high = low + rng.uniform(1e-3, 9, size=200).astype(np.float32)
        one = np.ones(200, np.float32)
        for y, bound in [(one, high), (-one, low)]:
            np.testing.assert_array_equal(rescale_action(y, low, high), bound)
            np.testing.assert_array_equal(normalize_action(bound, low, high), y)

    def test_its_slope_is_half_the_range_even_at_a_bound(self):
        slope = jax.grad(lambda y: rescale_action(y, LOW, HIGH).sum())
        inverse = jax.grad(lambda a: normalize_action(a, LOW, HIGH).sum())
        for y in (-1.0, 0.5, 1.0):
            same(slope(jnp.full(3, y)), (HIGH - LOW) / 2)
            same(inverse(rescale_action(jnp.full(3, y), LOW, HIGH)), 2 / (HIGH - LOW))

    def test_great_bounds_do_not_overflow(self):
        action = rescale_action(jnp.array([-1.0, 0.0, 1.0]), -3e38, 3e38)
        assert action.tolist() == [np.float32(-3e38), 0, np.float32(3e38)]

    @pytest.mark.parametrize("fn", [rescale_action, normalize_action, unsquash_action])
    def test_bounds_that_leave_no_room_give_nan(self, fn):
        for low, high in [(1.0, 1.0), (1.0, -1.0)]:
            assert np.isnan(fn(jnp.ones(2), low, high)).all()


class TestUnsquash:
    def test_finds_what_was_squashed(self, rng):
        u = rng.uniform(-4, 4, size=(5, 3)).astype(np.float32)
        same(unsquash_action(rescale_action(np.tanh(u), LOW, HIGH), LOW, HIGH), u, 1e-3)

    def test_of_a_bound_it_is_finite_and_large(self):
        u = unsquash_action(np.stack([LOW, HIGH]), LOW, HIGH)
        same(u, math.atanh(1 - 2**-24) * np.array([[-1] * 3, [1] * 3]))

    def test_beyond_the_bounds_there_is_none(self):
        assert np.isnan(unsquash_action(HIGH + 1, LOW, HIGH)).all()
        assert np.isnan(unsquash_action(LOW - 1, LOW, HIGH)).all()

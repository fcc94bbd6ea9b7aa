"""Beta policies, against SciPy in double precision, and identities where it fails."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from rlprims import (
    beta_entropy,
    beta_kl_divergence,
    beta_log_prob,
    beta_sample_and_log_prob,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

KEY = jax.random.key(5)
UNIT = {"minimum": 0.0, "maximum": 1.0}
GRID = [1e-3, 0.3, 1, 2, 9.9, 10.1, 100, 1e5]
ALPHAS, BETAS = (x.reshape(-1, 1) for x in np.meshgrid(GRID, GRID))


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def typical(alpha, beta):
    """Shares of the interval within three deviations of the mean."""
    mean = alpha / (alpha + beta)
    deviation = np.sqrt(mean * (1 - mean) / (alpha + beta + 1))
    steps = np.array([-3, -1, 0, 1, 3])[:, None, None]
    return np.clip(mean + steps * deviation, 1e-3, 1 - 1e-3)


def run(fn, dtype, *arrays):
    """Compiles and calls a function in a precision; returns float64."""
    with jax.enable_x64(dtype == np.float64):
        return np.asarray(jax.jit(fn)(*(np.asarray(x, dtype) for x in arrays)), float)


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(np.float32, 2e-6, 2e-4), (np.float64, 1e-9, 1e-9)]
)


class TestLogProb:
    @PRECISIONS
    def test_is_that_of_the_definition_with_any_concentrations(self, dtype, rtol, atol):
        x, alpha, beta = np.broadcast_arrays(typical(ALPHAS, BETAS), ALPHAS, BETAS)
        x, alpha, beta = (np.float64(dtype(y)) for y in (x, alpha, beta))
        fn = lambda *args: beta_log_prob(*args, **UNIT)
        expected = stats.beta.logpdf(x, alpha, beta)[..., 0]
        got = run(fn, dtype, x, alpha, beta)
        same(got, expected, rtol=rtol, atol=atol)
        few = ((alpha > 0.1) & (alpha < 11) & (beta > 0.1) & (beta < 11))[..., 0]
        digits = 10 * np.finfo(dtype).eps  # of terms near ten
        same(got[few], expected[few], rtol=digits, atol=10 * digits)

    def test_keeps_its_digits_where_concentrations_are_large(self):
        """Where terms of a million cancel, in single precision."""
        alpha, beta = np.float32([2e6]), np.float32([1e6])
        x = np.float32([[2 / 3], [0.6668], [0.6662]])
        alphas, betas = np.full((3, 1), alpha), np.full((3, 1), beta)
        expected = stats.beta.logpdf(np.float64(x), 2e6, 1e6)[:, 0]
        same(beta_log_prob(x, alphas, betas, **UNIT), expected, rtol=0, atol=2e-3)

    def test_sums_components_and_scales_with_the_bounds(self, rng):
        low, high = np.float32([-1, 0]), np.float32([3, 10])
        share = rng.uniform(0.1, 0.9, size=(4, 2)).astype(np.float32)
        alpha, beta = rng.uniform(0.5, 5, size=(2, 4, 2)).astype(np.float32)
        action = low + share * (high - low)
        got = beta_log_prob(action, alpha, beta, minimum=low, maximum=high)
        each = stats.beta.logpdf(share, alpha, beta) - np.log(high - low)
        same(got, each.sum(axis=-1))

    def test_at_a_bound_is_that_of_the_nearest_number_inside(self):
        action = np.float32([[-1], [1]])
        for a, b in [(0.5, 0.5), (1, 1), (3, 2)]:
            alpha, beta = np.full((2, 1), a, "f4"), np.full((2, 1), b, "f4")
            got, slopes = jax.value_and_grad(
                lambda *args: beta_log_prob(*args).sum(), argnums=(0, 1, 2)
            )(action, alpha, beta)
            inside = np.float64(np.nextafter(action, np.float32(0)))
            expected = stats.beta.logpdf((inside + 1) / 2, a, b) - math.log(2)
            same(got, expected.sum(), atol=1e-5)
            assert all(np.isfinite(x).all() for x in slopes)
            assert not slopes[0].any()

    def test_at_a_bound_of_zero_is_finite_too(self):
        alpha = np.float32([2])
        got = beta_log_prob(np.float32([0]), alpha, alpha, **UNIT)
        assert np.isfinite(got)
        assert got < -80

    def test_at_a_bound_has_a_gradient_to_that_bound_through_the_width(self):
        action, alpha, beta = np.float32([0]), np.float32([3]), np.float32([2])
        fn = lambda low: beta_log_prob(action, alpha, beta, minimum=low, maximum=1.0)
        same(jax.grad(fn)(0.0), 3)

    def test_next_to_a_bound_of_zero_keeps_its_digits(self):
        x = np.float32([[1e-30], [1e-10]])
        half, many = np.full((2, 1), 0.5, "f4"), np.full((2, 1), 1e4, "f4")
        got = beta_log_prob(x, half, many, **UNIT)
        same(got, stats.beta.logpdf(np.float64(x), 0.5, 1e4)[:, 0])

    def test_beyond_the_bounds_and_without_room_is_nan(self):
        ones = np.ones((2, 1), np.float32)
        assert np.isnan(beta_log_prob(np.float32([[-1.5], [1.01]]), ones, ones)).all()
        inside = np.zeros((2, 1), np.float32)
        got = beta_log_prob(inside, ones, ones, minimum=0.0, maximum=0.0)
        assert np.isnan(got).all()

    @pytest.mark.parametrize("a", [0.02, 3.0, 3e3])
    def test_gradients_are_those_of_the_definition(self, a):
        x, alpha, beta = np.float32([0.4]), np.float32([a]), np.float32([1.5 * a])
        fn = lambda *args: beta_log_prob(*args, **UNIT)
        to_x, to_alpha, to_beta = jax.grad(fn, argnums=(0, 1, 2))(x, alpha, beta)
        a, b, x = float(alpha[0]), float(beta[0]), float(x[0])
        same(to_x, [(a - 1) / x - (b - 1) / (1 - x)], rtol=1e-5, atol=2e-3)
        of_total = special.digamma(a + b)
        same(to_alpha, [math.log(x) - special.digamma(a) + of_total], atol=1e-5)
        same(to_beta, [math.log1p(-x) - special.digamma(b) + of_total], atol=1e-5)

    def test_a_concentration_that_is_not_positive_gives_nan(self):
        one = np.float32([1])
        assert np.isnan(beta_log_prob(0 * one, 0 * one, one))


class TestEntropy:
    @PRECISIONS
    def test_is_that_of_the_definition_with_any_concentrations(self, dtype, rtol, atol):
        alpha, beta = np.float64(dtype(ALPHAS)), np.float64(dtype(BETAS))
        fn = lambda *args: beta_entropy(*args, **UNIT)
        expected = stats.beta.entropy(alpha, beta)[:, 0]
        same(run(fn, dtype, alpha, beta), expected, rtol=rtol, atol=atol / 10)

    def test_is_greatest_for_the_uniform_distribution(self):
        ones = np.ones(2, np.float32)
        fn = lambda a, b: beta_entropy(a, b, minimum=-1.0, maximum=np.float32([1, 9]))
        value, slopes = jax.value_and_grad(fn, argnums=(0, 1))(ones, ones)
        same(value, math.log(2) + math.log(10))
        same(slopes, np.zeros((2, 2)), atol=1e-5)


class TestKl:
    @PRECISIONS
    def test_is_the_integral_of_the_definition(self, dtype, rtol, atol):
        cases = [
            (0.5, 0.7, 2, 3),
            (2, 3, 0.5, 0.7),
            (8, 4, 30, 50),
            (200, 100, 190, 99),
        ]
        columns = [np.float64(dtype(x))[:, None] for x in np.transpose(cases)]

        def by_quadrature(a, b, c, d):
            log_p, log_q = stats.beta(a, b).logpdf, stats.beta(c, d).logpdf
            fn = lambda x: math.exp(log_p(x)) * (log_p(x) - log_q(x))
            pieces = itertools.pairwise([0, 0.3, 0.6, 0.7, 1])
            return sum(integrate.quad(fn, *piece, epsabs=1e-12)[0] for piece in pieces)

        expected = [by_quadrature(*row) for row in np.hstack(columns).tolist()]
        got = run(beta_kl_divergence, dtype, *columns)
        same(got, expected, rtol=1e-5 if dtype == np.float32 else 1e-7, atol=1e-6)

    def test_keeps_its_digits_between_near_neighbours(self):
        """Half the Fisher information times the square of the step."""
        a, b, step = 1e4, 2e4, 1.0
        p = np.float32([a]), np.float32([b])
        got = beta_kl_divergence(*p, np.float32([a + step]), np.float32([b]))
        fisher = special.polygamma(1, a) - special.polygamma(1, a + b)
        same(got, fisher * step**2 / 2, rtol=2e-2)

    def test_of_a_distribution_from_itself_is_zero_with_a_gradient_of_zero(self):
        a, b = np.float32([0.01, 1, 50]), np.float32([2, 1, 1e4])
        fn = jax.value_and_grad(beta_kl_divergence, argnums=(0, 1, 2, 3))
        value, slopes = fn(a, b, a, b)
        assert value == 0
        same(slopes, np.zeros((4, 3)), atol=1e-4)


DRAWS = 20_000


@jax.jit
def drawn(alpha, beta):
    """Draws within `[0, 2]`, and slopes of their sums."""
    ones = jnp.ones((DRAWS, 1), alpha.dtype)

    def run(alpha, beta):
        args = KEY, alpha * ones, beta * ones
        draw = beta_sample_and_log_prob(*args, minimum=0.0, maximum=2.0)
        return jnp.stack([draw.action.mean(), draw.log_prob.mean()]), draw

    _, transpose, draw = jax.vjp(run, alpha, beta, has_aux=True)
    return draw, jax.vmap(transpose)(jnp.eye(2, dtype=alpha.dtype))


class TestSample:
    @pytest.mark.parametrize(("a", "b"), [(0.5, 0.3), (1, 1), (3, 2), (50, 400)])
    def test_falls_below_each_action_as_often_as_it_should(self, a, b):
        (action, _), _ = drawn(np.float32(a), np.float32(b))
        for p in (0.05, 0.5, 0.9):
            limit = 2 * stats.beta.ppf(p, a, b)
            error = math.sqrt(p * (1 - p) / DRAWS)
            assert abs(np.mean(np.asarray(action) < limit) - p) < 4 * error

    def test_log_prob_is_that_of_the_action(self):
        (action, log_prob), _ = drawn(np.float32(1.7), np.float32(2.5))
        expected = stats.beta.logpdf(np.float64(action) / 2, 1.7, 2.5) - math.log(2)
        same(log_prob, expected[:, 0], rtol=1e-4, atol=1e-4)

    def test_sums_components_within_bounds_of_their_own(self):
        alpha, beta = np.float32([2, 3]), np.float32([1, 2])
        low, high = np.float32([-1, 5]), np.float32([1, 6])
        bounds = {"minimum": low, "maximum": high}
        action, log_prob = beta_sample_and_log_prob(KEY, alpha, beta, **bounds)
        assert (low < action).all()
        assert (action < high).all()
        same(log_prob, beta_log_prob(action, alpha, beta, **bounds), rtol=1e-4)

    def test_stays_finite_within_bounds_where_every_draw_rounds_to_one(self):
        (action, log_prob), slopes = drawn(np.float32(1e-3), np.float32(1e-3))
        assert ((action > 0) & (action < 1e-20)).any()  # where numbers are dense
        assert set(np.unique(action)) >= {0, 2}
        assert (action >= 0).all()
        assert (action <= 2).all()
        assert np.isfinite(log_prob).all()
        assert len(np.unique(log_prob)) > DRAWS / 2  # each is that of the draw itself
        assert all(np.isfinite(x).all() for x in slopes)

    def test_gradients_are_those_of_the_mean_and_of_the_entropy(self):
        """The mean is `2 a / (a + b)`; the entropy has its own test."""
        a, b = np.float32(2), np.float32(3)
        _, ((to_a, to_log_a), (to_b, to_log_b)) = drawn(a, b)
        same([to_a, to_b], [2 * 3 / 25, -2 * 2 / 25], atol=3e-3)
        a, b = np.float64([a]), np.float64([b])
        entropy = lambda a, b: stats.beta.entropy(a, b).item()
        slope_a = (entropy(a + 1e-4, b) - entropy(a - 1e-4, b)) / 2e-4
        slope_b = (entropy(a, b + 1e-4) - entropy(a, b - 1e-4)) / 2e-4
        same([to_log_a, to_log_b], [-slope_a, -slope_b], atol=1e-2)

    def test_mean_log_prob_is_minus_the_entropy(self):
        (_, log_prob), _ = drawn(np.float32(2), np.float32(0.8))
        error = 4 * np.std(log_prob) / math.sqrt(DRAWS)
        entropy = beta_entropy(np.float32([2]), np.float32([0.8]), minimum=0, maximum=2)
        assert abs(np.mean(log_prob) + entropy) < error

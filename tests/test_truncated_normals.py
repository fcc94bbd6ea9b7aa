"""Truncated normals, against special functions and quadrature in double precision."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from rlprims import (
    truncated_normal_entropy,
    truncated_normal_log_prob,
    truncated_normal_sample_and_log_prob,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

KEY = jax.random.key(6)
GRID = [-1e4, -40, -3, -1, 0, 0.3, 1, 2, 8, 1e3]
SCALES = [1e-2, 0.3, 1, 10, 1e3]
MU, SIGMA = (x.reshape(-1, 1) for x in np.meshgrid(GRID, SCALES))


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def sides(mu, sigma, low=-1.0, high=1.0):
    """The slope at the likeliest action, and the way to the bound, to either side."""
    near = min(max(mu, low), high)
    below = max(mu - high, 0) / sigma, (near - low) / sigma
    return below, (max(low - mu, 0) / sigma, (high - near) / sigma)


def by_quadrature(slope, length, power=0):
    """The integral of the density relative to its peak, times a power of its cost."""
    cost = lambda z: z * (slope + z / 2)
    fn = lambda z: math.exp(-cost(z)) * cost(z) ** power
    unit = 1 / max(1, slope)
    ends = sorted({min(length, k * unit) for k in (0, 0.3, 1, 3, 8, 20, 40)})
    pieces = itertools.pairwise(ends)
    return sum(integrate.quad(fn, *ends, epsabs=1e-300)[0] for ends in pieces)


def mass(mu, sigma, *bounds, power=0):
    both = sides(mu, sigma, *bounds)
    return sigma * math.fsum(by_quadrature(*side, power) for side in both)


def log_prob_by_hand(x, mu, sigma, low=-1.0, high=1.0):
    near = min(max(mu, low), high)
    cost = (x - near) * (x - near + 2 * (near - mu)) / (2 * sigma**2)
    return -cost - math.log(mass(mu, sigma, low, high))


def share_below(x, mu, sigma):
    """The distribution function within `[-1, 1]`."""
    near = min(max(mu, -1), 1)
    below, above = sides(mu, sigma)
    side, sign = (below, -1) if x < near else (above, 1)
    part = by_quadrature(side[0], abs(x - near) / sigma)
    return (by_quadrature(*below) + sign * part) * sigma / mass(mu, sigma)


def run(fn, dtype, *arrays):
    """Compiles and calls a function in a precision; returns float64."""
    with jax.enable_x64(dtype == np.float64):
        return np.asarray(jax.jit(fn)(*(np.asarray(x, dtype) for x in arrays)), float)


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-9)]
)


class TestLogProb:
    @PRECISIONS
    def test_is_that_of_the_definition_wherever_the_mean_is(self, dtype, rtol):
        x = np.array([-1, -0.9, 0.2, 1])[:, None, None]
        x, mu, sigma = (np.float64(dtype(y)) for y in np.broadcast_arrays(x, MU, SIGMA))
        expected = np.vectorize(log_prob_by_hand)(x, mu, sigma)[..., 0]
        got = run(truncated_normal_log_prob, dtype, x, mu, sigma)
        same(got, expected, rtol=rtol, atol=10 * rtol)

    def test_is_that_of_special_functions_where_they_hold(self):
        mu, sigma, x = 0.3, 0.7, 0.5
        part = special.ndtr((1 - mu) / sigma) - special.ndtr((-1 - mu) / sigma)
        expected = -(((x - mu) / sigma) ** 2) / 2 - math.log(
            part * sigma * math.sqrt(2 * math.pi)
        )
        got = truncated_normal_log_prob(np.float32([x]), np.float32([mu]), sigma)
        same(got, expected)

    def test_becomes_uniform_exponential_and_normal(self):
        x = np.float32([[0.25]])
        same(truncated_normal_log_prob(x, 5 * x, 1e6), [-math.log(2)])
        far = truncated_normal_log_prob(1 + 0 * x, 1e6 * (1 + 0 * x), 1.0)
        same(far, [math.log(1e6)], rtol=1e-5)
        narrow = truncated_normal_log_prob(x, x, 1e-3)
        same(narrow, [-math.log(1e-3 * math.sqrt(2 * math.pi))])

    def test_sums_components_each_within_its_bounds(self):
        low, high = np.float32([-1, 0]), np.float32([3, 10])
        x, mu, sigma = np.float32([0, 9]), np.float32([7, 4]), np.float32([2, 5])
        got = truncated_normal_log_prob(x, mu, sigma, minimum=low, maximum=high)
        parts = zip(*(y.tolist() for y in (x, mu, sigma, low, high)), strict=True)
        same(got, sum(log_prob_by_hand(*part) for part in parts))

    def test_gradients_are_right_wherever_the_mean_is(self):
        """Those of the log-density, less their mean: by quadrature."""
        for mu, sigma in [(0.3, 0.5), (1.0, 0.5), (6.0, 1.0), (-1e3, 2.0), (0, 1e3)]:
            x = 0.9 if mu > 0 else -0.9
            args = np.float32([x]), np.float32([mu]), np.float32([sigma])
            fn = jax.grad(truncated_normal_log_prob, argnums=(0, 1, 2))
            to_x, to_mu, to_sigma = fn(*args)
            near = min(max(mu, -1), 1)
            same(to_x, [-(x - mu) / sigma**2], rtol=1e-4)
            step = 1e-4 * max(abs(mu - near), 1)
            ends = [log_prob_by_hand(x, mu + s, sigma) for s in (step, -step)]
            same(to_mu, [(ends[0] - ends[1]) / (2 * step)], rtol=1e-3, atol=1e-5)
            ends = [log_prob_by_hand(x, mu, sigma * s) for s in (1.0001, 0.9999)]
            slope = (ends[0] - ends[1]) / (2e-4 * sigma)
            same(to_sigma, [slope], rtol=1e-3, atol=1e-5)

    def test_one_bound_may_be_infinite(self):
        """Of a half line, the mass is that below the mean, seen from the other end."""

        def expected(x, mu, sigma):
            norm = jax.scipy.stats.norm
            return (norm.logpdf(x, mu, sigma) - norm.logcdf(mu / sigma)).sum()

        def got(x, mu, sigma):
            bounds = {"minimum": 0.0, "maximum": jnp.inf}
            return truncated_normal_log_prob(x, mu, sigma, **bounds)

        args = jnp.float32([0.5]), jnp.float32([0.25]), jnp.float32([1.5])
        pairs = (
            jax.value_and_grad(fn, argnums=(0, 1, 2))(*args) for fn in (got, expected)
        )
        jax.tree.map(lambda x, y: same(x, y, rtol=1e-4), *pairs)
        measures = (
            truncated_normal_entropy,
            lambda *args, **bounds: truncated_normal_sample_and_log_prob(
                jax.random.key(0), *args, **bounds
            ).action.sum(),
        )
        for fn in measures:
            of = lambda sigma, fn=fn: fn(args[1], sigma, minimum=0.0, maximum=jnp.inf)
            same(jax.grad(of)(1.5), (of(1.51) - of(1.49)) / 0.02, rtol=1e-2)

    def test_gradients_are_finite_however_far_the_mean_is(self):
        mu = np.float32([[-1e30], [1e10], [-1e4], [0]])
        x = np.float32([[-1], [1], [1], [1]])
        fn = lambda *args: truncated_normal_log_prob(*args, 1.0).sum()
        value, slopes = jax.value_and_grad(fn, argnums=(0, 1))(x, mu)
        assert np.isfinite(value)
        assert all(np.isfinite(x).all() for x in slopes)

    def test_beyond_the_bounds_and_without_room_is_nan(self):
        x, mu = np.float32([[-1.5], [1.01]]), np.zeros((2, 1), np.float32)
        assert np.isnan(truncated_normal_log_prob(x, mu, 1.0)).all()
        empty = {"minimum": 0.0, "maximum": 0.0}
        assert np.isnan(truncated_normal_log_prob(mu, mu, 1.0, **empty)).all()

    def test_a_deviation_of_zero_is_refused(self):
        with pytest.raises(ValueError, match=r"sigma must be in \(0, inf\), got 0.0"):
            truncated_normal_log_prob(jnp.ones(1), jnp.ones(1), 0.0)


class TestEntropy:
    @PRECISIONS
    def test_is_that_of_the_definition_wherever_the_mean_is(self, dtype, rtol):
        mu, sigma = np.float64(dtype(MU)), np.float64(dtype(SIGMA))

        def by_hand(mu, sigma):
            whole = mass(mu, sigma)
            return math.log(whole) + mass(mu, sigma, power=1) / whole

        expected = np.vectorize(by_hand)(mu, sigma)[:, 0]
        got = run(truncated_normal_entropy, dtype, mu, sigma)
        same(got, expected, rtol=rtol, atol=rtol)

    def test_approaches_those_of_the_uniform_and_the_normal_distribution(self):
        mu = np.float32([0.2])
        wide = truncated_normal_entropy(mu, 1e8, minimum=0.0, maximum=5.0)
        same(wide, math.log(5))
        narrow = truncated_normal_entropy(mu, 1e-3)
        same(narrow, math.log(1e-3) + (1 + math.log(2 * math.pi)) / 2)


class TestSample:
    @PRECISIONS
    def test_is_the_inverse_of_the_distribution_function(self, dtype, rtol):
        """The integral up to each draw is the uniform number that it came from."""
        with jax.enable_x64(dtype == np.float64):
            shape = (6, *MU.shape)
            uniform = np.float64(jax.random.uniform(KEY, shape, dtype))
        mu, sigma = (np.broadcast_to(x, shape) for x in (MU, SIGMA))
        fn = lambda *args: truncated_normal_sample_and_log_prob(KEY, *args)
        with jax.enable_x64(dtype == np.float64):
            action, log_prob = jax.jit(fn)(mu.astype(dtype), sigma.astype(dtype))
        # An action that rounds is off by an ulp or so, in units of the distribution.
        density = np.exp(np.float64(log_prob))[..., None]
        got = np.vectorize(share_below)(np.float64(action), mu, sigma)
        off = np.abs(got - uniform)
        assert (off <= 10 * rtol + 2 * np.finfo(dtype).eps * density).all()

    def test_log_prob_is_that_of_the_action(self, rng):
        mu = rng.normal(scale=3, size=(30, 3)).astype(np.float32)
        bounds = {"minimum": np.float32([-1, 0, 5]), "maximum": np.float32([1, 9, 6])}
        draw = truncated_normal_sample_and_log_prob(KEY, mu, 0.8, **bounds)
        again = truncated_normal_log_prob(draw.action, mu, 0.8, **bounds)
        same(draw.log_prob, again, rtol=1e-4, atol=1e-4)

    def test_lies_within_bounds_and_does_not_pile_up_there(self):
        mu = np.float32([[-1e3], [-30], [0], [30], [1e3]]).repeat(1000, 1)
        for sigma in (1.0, 30.0):
            action = truncated_normal_sample_and_log_prob(KEY, mu, sigma).action
            assert np.abs(action).max() <= 1
            assert (np.abs(action) == 1).mean() < 0.01

    def test_gradients_are_those_at_a_fixed_quantile(self):
        """Against differences of the inverse, in double precision."""
        mu, sigma = np.array([[0.2, 0.9, 3, -40]]), np.array([[0.5, 0.1, 1, 2]])
        fn = lambda *args: truncated_normal_sample_and_log_prob(KEY, *args)[0].ravel()
        with jax.enable_x64(True):
            fn = jax.jit(fn)
            slopes = jax.jacobian(fn, argnums=(0, 1))(mu, sigma)
            to_mu = (fn(mu + 1e-5, sigma) - fn(mu - 1e-5, sigma)) / 2e-5
            to_sigma = (fn(mu, sigma + 1e-5) - fn(mu, sigma - 1e-5)) / 2e-5
        same(np.diag(slopes[0][:, 0]), to_mu, rtol=1e-6)
        same(np.diag(slopes[1][:, 0]), to_sigma, rtol=1e-6)

    def test_gradients_are_finite_however_far_the_mean_is(self):
        mu = np.float32([[-1e8], [-50], [1], [1e8]]).repeat(50, 1)

        def total(mu, sigma):
            draw = truncated_normal_sample_and_log_prob(KEY, mu, sigma)
            return draw.action.sum() + draw.log_prob.sum()

        slopes = jax.grad(total, argnums=(0, 1))(mu, np.float32(1))
        assert all(np.isfinite(x).all() for x in slopes)

    def test_mean_log_prob_is_minus_the_entropy(self):
        mu = np.full((20_000, 1), 1.5, np.float32)
        log_prob = truncated_normal_sample_and_log_prob(KEY, mu, 0.7).log_prob
        error = 4 * np.std(log_prob) / math.sqrt(20_000)
        gap = np.mean(log_prob) + truncated_normal_entropy(mu[0], 0.7)
        assert abs(gap) < error

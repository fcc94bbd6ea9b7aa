"""Policies over continuous actions, against sums over one component after another."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    gaussian_diagonal,
    multivariate_normal_kl_divergence,
    squashed_gaussian,
)

KEYS = jax.random.split(jax.random.key(1), 20_000)
UNIT = types.SimpleNamespace(minimum=-1.0, maximum=1.0)
KEY_MAKERS = pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])


def bounds(minimum, maximum):
    return types.SimpleNamespace(minimum=minimum, maximum=maximum)


# What each measure is, for one action at a time


def logprob_by_hand(actions, mus, sigmas):
    return math.fsum(
        -((a - mu) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
        for a, mu, sigma in zip(actions, mus, sigmas, strict=True)
    )


def entropy_by_hand(sigmas):
    return math.fsum(math.log(s * math.sqrt(2 * math.pi * math.e)) for s in sigmas)


def kl_by_hand(mus_0, sigmas_0, mus_1, sigmas_1):
    return math.fsum(
        math.log(s1 / s0) + (s0**2 + (m0 - m1) ** 2) / (2 * s1**2) - 0.5
        for m0, s0, m1, s1 in zip(mus_0, sigmas_0, mus_1, sigmas_1, strict=True)
    )


def scale_by_hand(s, low=-4.0, high=0.0):
    return math.exp(low + (math.tanh(s) + 1) / 2 * (high - low))


def squashed_by_hand(actions, mus, spreads, lows, highs, limits=(-4.0, 0.0)):
    total = []
    for a, mu, s, low, high in zip(actions, mus, spreads, lows, highs, strict=True):
        half = (high - low) / 2
        y = (a - low) / half - 1
        u, sigma = math.atanh(y), scale_by_hand(s, *limits)
        base = logprob_by_hand([u], [math.tanh(mu)], [sigma])
        total.append(base - math.log(half * (1 - y) * (1 + y)))
    return math.fsum(total)


def row_by_row(fn, *arrays):
    """Applies `fn` to lists along the last axis of each array."""
    arrays = np.broadcast_arrays(*arrays)
    lead = arrays[0].shape[:-1]
    rows = [fn(*(a[i].tolist() for a in arrays)) for i in np.ndindex(*lead)]
    return np.reshape(rows, lead)


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def example(rng, *shape):
    """Actions, two means and two standard deviations, without rounding to float32."""
    normal = rng.normal(size=(3, *shape)).astype(np.float32)
    return *normal, *rng.uniform(0.2, 2.0, size=(2, *shape)).astype(np.float32)


class TestGaussianDiagonal:
    @pytest.mark.parametrize("lead", [(), (2, 3)])
    def test_agrees_with_its_definition(self, rng, lead):
        x, mu, mu_1, sigma, sigma_1 = example(rng, *lead, 4)
        policy = gaussian_diagonal()
        logprobs = row_by_row(logprob_by_hand, x, mu, sigma)
        same(policy.logprob(x, mu, sigma), logprobs)
        same(policy.prob(x, mu, sigma), np.exp(logprobs))
        same(policy.entropy(mu, sigma), row_by_row(entropy_by_hand, sigma))
        kl = row_by_row(kl_by_hand, mu, sigma, mu_1, sigma_1)
        same(policy.kl(mu, sigma, mu_1, sigma_1), kl)
        to_normal = row_by_row(kl_by_hand, mu, sigma, 0 * mu, 1 + 0 * mu)
        same(policy.kl_to_standard_normal(mu, sigma), to_normal)

    @KEY_MAKERS
    def test_draws_once_for_each_component(self, rng, make_key):
        _, mu, _, sigma, _ = example(rng, 2, 3)
        normal = jax.random.normal(make_key(3), (2, 3), np.float32)
        drawn = gaussian_diagonal().sample(make_key(3), mu, sigma)
        same(drawn, mu + sigma * np.asarray(normal))
        assert len(np.unique(normal)) == 6

    def test_draws_have_its_mean_and_its_standard_deviation(self):
        mu, sigma = np.float32([1.0, -2.0]), np.float32([0.5, 3.0])
        draw = jax.vmap(gaussian_diagonal().sample, (0, None, None))
        drawn = np.asarray(draw(KEYS, mu, sigma))
        errors = sigma / math.sqrt(len(KEYS))
        assert (np.abs(drawn.mean(axis=0) - mu) < 4 * errors).all()
        same(drawn.std(axis=0), sigma, rtol=0.03)
        assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.03

    @pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
    def test_a_sigma_may_be_shared(self, rng, shape):
        x, mu, mu_1, *_ = example(rng, 2, 4)
        sigma = rng.uniform(0.2, 2.0, size=shape).astype(np.float32)
        policy, full = gaussian_diagonal(), np.broadcast_to(sigma, (2, 4))
        key = jax.random.key(0)
        same(policy.sample(key, mu, sigma), policy.sample(key, mu, full))
        same(policy.logprob(x, mu, sigma), row_by_row(logprob_by_hand, x, mu, full))
        same(policy.entropy(mu, sigma), row_by_row(entropy_by_hand, full))
        kl = row_by_row(kl_by_hand, mu, full, mu_1, full)
        same(policy.kl(mu, sigma, mu_1, sigma), kl)

    def test_a_default_is_used_unless_a_method_is_given_its_own(self, rng):
        x, mu, _, sigma, _ = example(rng, 3)
        plain, default = gaussian_diagonal(), gaussian_diagonal(0.5)
        key = jax.random.key(0)
        for name, first in [
            ("sample", (key, mu)),
            ("prob", (x, mu)),
            ("logprob", (x, mu)),
            ("entropy", (mu,)),
            ("kl_to_standard_normal", (mu,)),
        ]:
            ours, general = getattr(default, name), getattr(plain, name)
            same(ours(*first), general(*first, 0.5), rtol=0, atol=0)
            same(ours(*first, sigma), general(*first, sigma), rtol=0, atol=0)
            with pytest.raises(
                TypeError, match=rf"{name}: sigma must be an array, got"
            ):
                general(*first)

    def test_its_density_integrates_to_one(self):
        x = np.linspace(-20, 25, 20_001, dtype=np.float32)[:, None]
        density = gaussian_diagonal().prob(x, np.full_like(x, 1.5), 2.0)
        same(np.trapezoid(density, x[:, 0]), 1.0)

    def test_a_sigma_of_zero_draws_the_mean(self):
        mu = jnp.array([1.0, 2.0])
        key = jax.random.key(0)
        assert gaussian_diagonal(0.0).sample(key, mu).tolist() == [1.0, 2.0]
        with pytest.raises(ValueError, match=r"logprob: sigma must be in \(0, inf\)"):
            gaussian_diagonal(0.0).logprob(mu, mu)
        assert jnp.isnan(gaussian_diagonal().logprob(mu, mu, jnp.zeros(2)))

    @pytest.mark.parametrize("sigma", [-1.0, math.inf, math.nan])
    def test_a_sigma_out_of_range_is_refused(self, sigma):
        with pytest.raises(
            ValueError, match=r"gaussian_diagonal: sigma must be in \[0"
        ):
            gaussian_diagonal(sigma)

    def test_its_sigma_may_be_traced(self):
        mu = jnp.zeros(2)
        entropy = lambda sigma: gaussian_diagonal(sigma).entropy(mu)
        same(jax.jit(jax.grad(entropy))(4.0), 0.5)  # of 2 log sigma
        assert jnp.isnan(jax.jit(entropy)(-1.0))

    @pytest.mark.parametrize("name", ["prob", "logprob"])
    def test_an_action_of_one_component_is_not_repeated(self, name):
        with pytest.raises(
            ValueError, match=r"mu has shape \(3,\), expected f\[\.\.\.,N"
        ):
            getattr(gaussian_diagonal(), name)(jnp.ones(1), jnp.ones(3), jnp.ones(3))

    def test_far_out_the_logarithm_is_right_where_the_density_is_zero(self):
        mu, policy = jnp.zeros(1), gaussian_diagonal(1.0)
        x = jnp.array([1e4])
        assert policy.prob(x, mu) == 0
        same(policy.logprob(x, mu), logprob_by_hand([1e4], [0.0], [1.0]))
        same(jax.grad(policy.logprob, 1)(x, mu), [1e4])


class TestKL:
    def test_is_exactly_zero_between_equals_and_so_is_its_gradient(self, rng):
        _, mu, _, sigma, _ = example(rng, 6, 3)
        kl = lambda *args: multivariate_normal_kl_divergence(*args).sum()
        value, gradients = jax.value_and_grad(kl, (0, 1, 2, 3))(mu, sigma, mu, sigma)
        assert value == 0
        assert not any(g.any() for g in gradients)

    @pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3])
    def test_does_not_drown_in_rounding_between_neighbours(self, step):
        """The naive sum is off by a tenth of the last of these."""
        mu = np.float32([0.5, -1.0])
        sigma = np.float32([0.3, 2.0])
        other = (sigma * (1 + step)).astype(np.float32)
        kl = multivariate_normal_kl_divergence(mu, sigma, mu, other)
        expected = kl_by_hand(*map(np.ndarray.tolist, (mu, sigma, mu, other)))
        same(kl, expected, rtol=1e-3, atol=0)

    def test_is_never_negative(self, rng):
        sigma = rng.uniform(0.5, 2.0, size=(1000, 1)).astype(np.float32)
        near = np.nextafter(sigma, np.float32(3))
        mu = np.zeros_like(sigma)
        assert (multivariate_normal_kl_divergence(mu, sigma, mu, near) >= 0).all()

    def test_tells_its_arguments_apart(self):
        kl = multivariate_normal_kl_divergence
        mu = jnp.zeros(1)
        same(kl(mu, 1.0, mu, 2.0), kl_by_hand([0.0], [1.0], [0.0], [2.0]))
        same(kl(mu, 2.0, mu, 1.0), kl_by_hand([0.0], [2.0], [0.0], [1.0]))

    @pytest.mark.parametrize("name", ["sigma_0", "sigma_1"])
    def test_a_sigma_of_the_wrong_size_is_refused(self, name):
        given = {"sigma_0": jnp.ones((2, 3)), "sigma_1": jnp.ones((2, 3))}
        given[name] = jnp.ones((2, 3, 1))
        with pytest.raises(
            ValueError, match=rf"{name} has shape \(2, 3, 1\), expected"
        ):
            multivariate_normal_kl_divergence(
                mu_0=jnp.ones((2, 3)), mu_1=jnp.ones((2, 3)), **given
            )

    def test_a_covariance_matrix_is_refused(self):
        with pytest.raises(
            ValueError, match=r"sigma_0 has shape \(3, 3\), expected f\["
        ):
            multivariate_normal_kl_divergence(jnp.ones(3), jnp.eye(3), jnp.ones(3), 1.0)


class TestSquashedGaussian:
    @pytest.mark.parametrize("lead", [(), (2, 3)])
    @pytest.mark.parametrize("limits", [(-4.0, 0.0), (-1.0, 2.0)])
    def test_agrees_with_its_definition(self, rng, lead, limits):
        u, mu, mu_1, *_ = example(rng, *lead, 4)
        spread, spread_1 = 2 * example(rng, *lead, 4)[0], example(rng, *lead, 4)[1]
        low = np.float32([-1.0, 0.0, 3.0, -5.0])
        high = np.float32([1.0, 0.5, 4.0, 20.0])
        actions = ((high + low) / 2 + (high - low) / 2 * np.tanh(u)).astype(np.float32)
        policy, spec = squashed_gaussian(*limits), bounds(low, high)
        by_hand = functools.partial(squashed_by_hand, limits=limits)
        logprobs = row_by_row(by_hand, actions, mu, spread, low, high)
        same(policy.logprob(actions, mu, spread, spec), logprobs, rtol=1e-4)
        same(policy.prob(actions, mu, spread, spec), np.exp(logprobs), rtol=1e-3)
        scale, scale_1 = (
            np.vectorize(lambda s: scale_by_hand(s, *limits))(s)
            for s in (spread, spread_1)
        )
        same(policy.entropy(mu, spread), row_by_row(entropy_by_hand, scale))
        loc, loc_1 = (np.tanh(np.float64(m)) for m in (mu, mu_1))
        kl = row_by_row(kl_by_hand, loc, scale, loc_1, scale_1)
        same(policy.kl(mu, spread, mu_1, spread_1), kl, rtol=1e-4)
        to_normal = row_by_row(kl_by_hand, loc, scale, 0 * loc, 1 + 0 * loc)
        same(policy.kl_to_standard_normal(mu, spread), to_normal)

    @KEY_MAKERS
    def test_squashes_one_draw_for_each_component(self, rng, make_key):
        mu, spread, _, _, _ = example(rng, 2, 3)
        low, high = np.float32([-1.0, 0.0, 3.0]), np.float32([1.0, 0.5, 4.0])
        noise = np.asarray(jax.random.normal(make_key(3), (2, 3), np.float32))
        u = np.tanh(mu) + np.vectorize(scale_by_hand)(spread) * noise
        expected = (high + low) / 2 + (high - low) / 2 * np.tanh(u)
        spec = bounds(low, high)
        same(squashed_gaussian().sample(make_key(3), mu, spread, spec), expected)

    def test_draws_are_distributed_as_their_density_says(self):
        """The share of draws in each tenth of the range."""
        policy, spec = squashed_gaussian(), bounds(0.0, 10.0)
        mu, spread = np.float32([0.3]), np.float32([0.8])
        draw = jax.vmap(lambda key: policy.sample(key, mu, spread, spec))
        drawn = np.asarray(draw(KEYS))[:, 0]
        shares = np.histogram(drawn, bins=np.arange(11.0))[0] / len(KEYS)
        x = np.linspace(0, 10, 10_001, dtype=np.float32)[1:-1, None]
        each = lambda value: np.broadcast_to(value, x.shape)
        density = np.asarray(policy.prob(x, each(mu), each(spread), spec))
        expected = np.add.reduceat(density, np.arange(0, 9_999, 1000)) * 1e-3
        same(expected.sum(), 1.0, rtol=1e-4)
        same(shares, expected, rtol=0, atol=4 * 0.5 / math.sqrt(len(KEYS)))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_its_own_samples_have_a_logprob_and_a_gradient(self, dtype):
        """Some of the draws round to a bound, as many as the program makes them."""
        policy = squashed_gaussian(-4.0, 2.0)
        mu, spread = jnp.full(1, 3.0, dtype), jnp.full(1, 3.0, dtype)

        def measure(key):
            action = policy.sample(key, mu, spread, UNIT)
            logprob = lambda mu, spread: policy.logprob(action, mu, spread, UNIT)
            return action, jax.value_and_grad(logprob, (0, 1))(mu, spread)

        actions, measures = jax.jit(jax.vmap(measure))(KEYS[:5000])
        assert np.sum(jnp.abs(actions) == 1) > 0
        assert (jnp.abs(actions) <= 1).all()
        for x in jax.tree.leaves(measures):
            assert jnp.isfinite(x).all()
            assert x.any()
        assert actions.dtype == measures[0].dtype == dtype

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_at_a_bound_it_is_that_of_the_nearest_action_inside(self, dtype, sign):
        """In the precision of the action, whatever that of the policy is."""
        nearest = sign * (1 - float(jnp.finfo(dtype).eps) / 2)
        expected = squashed_by_hand([nearest], [0.5], [0.0], [-1.0], [1.0])
        at_bound, mu = jnp.full(1, sign, dtype), jnp.full(1, 0.5)
        logprob = squashed_gaussian().logprob(at_bound, mu, jnp.zeros(1), UNIT)
        same(logprob, expected)

    def test_outside_the_bounds_it_is_nan(self):
        policy, mu = squashed_gaussian(), jnp.zeros(1)
        for x in (-1.01, 1.01, jnp.inf, -jnp.inf, jnp.nan):
            assert jnp.isnan(policy.logprob(jnp.full(1, x), mu, mu, UNIT))
            assert jnp.isnan(policy.prob(jnp.full(1, x), mu, mu, UNIT))

    def test_one_component_outside_does_not_hide_behind_another(self):
        mu, actions = jnp.zeros((2, 2)), jnp.array([[0.0, 2.0], [0.0, 0.0]])
        logprob = squashed_gaussian().logprob(actions, mu, mu, UNIT)
        assert jnp.isnan(logprob).tolist() == [True, False]

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_draws_stay_within_bounds_that_are_not_round(self, rng, dtype):
        low, width = rng.normal(size=1000), rng.uniform(0.1, 10.0, size=1000)
        spec = bounds(jnp.asarray(low, dtype), jnp.asarray(low + width, dtype))
        policy, mu = squashed_gaussian(0.0, 6.0), jnp.zeros(1000, dtype)
        action = policy.sample(KEYS[0], mu, mu + 3, spec)
        assert (spec.minimum <= action).all()
        assert (action <= spec.maximum).all()
        assert np.mean((action == spec.minimum) | (action == spec.maximum)) > 0.5
        assert jnp.isfinite(policy.logprob(action, mu, mu + 3, spec))

    def test_gradients_reach_both_parameters_through_a_sample(self):
        """By the reparametrisation, as an actor that climbs its critic needs."""
        sample = lambda mu, s: squashed_gaussian().sample(KEYS[0], mu, s, UNIT)[0]
        noise = float(jax.random.normal(KEYS[0], (1,))[0])
        u = math.tanh(0.5) + scale_by_hand(0.25) * noise
        slope = 1 - math.tanh(u) ** 2
        gradients = jax.grad(sample, (0, 1))(jnp.full(1, 0.5), jnp.full(1, 0.25))
        d_scale = 2 * scale_by_hand(0.25) * (1 - math.tanh(0.25) ** 2)  # of the middle
        expected = slope * (1 - math.tanh(0.5) ** 2), slope * d_scale * noise
        same(np.ravel(gradients), expected)

    @pytest.mark.parametrize("x64", [False, True])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_bounds_do_not_widen_it(self, dtype, x64):
        """Those of dm_env are NumPy arrays, often of 64 bits."""
        with jax.enable_x64(x64):
            policy, mu = squashed_gaussian(), jnp.zeros(2, dtype)
            for spec in (
                bounds(np.full(2, -1.0), np.full(2, 1.0)),
                bounds(np.full(2, -1), np.full(2, 1)),
                bounds(np.float32(-1), np.float32(1)),
                bounds(-1, 1),
            ):
                action = policy.sample(KEYS[0], mu, mu, spec)
                logprob = policy.logprob(action, mu, mu, spec)
                assert action.dtype == logprob.dtype == dtype

    def test_parameters_of_two_dtypes_are_promoted(self):
        mu, sigma = jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.float32)
        action = squashed_gaussian().sample(KEYS[0], mu, sigma, bounds(0.1, 0.3))
        assert action.dtype == jnp.float32
        assert ((action >= np.float32(0.1)) & (action <= np.float32(0.3))).all()

    @pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (1.0, 1.0)])
    def test_bounds_the_wrong_way_round_give_nan(self, low, high):
        policy, mu, spec = squashed_gaussian(), jnp.zeros(1), bounds(low, high)
        assert jnp.isnan(policy.sample(KEYS[0], mu, mu, spec)).all()
        assert jnp.isnan(policy.logprob(mu, mu, mu, spec))

    @pytest.mark.parametrize("name", ["sample", "prob", "logprob"])
    def test_what_has_no_bounds_is_refused(self, name):
        first, mu = KEYS[0] if name == "sample" else jnp.zeros(1), jnp.zeros(1)
        text = f"squashed_gaussian.{name}: action_spec must have the attributes minimum"
        with pytest.raises(TypeError, match=f"{text} and maximum, got dict"):
            getattr(squashed_gaussian(), name)(first, mu, mu, {"minimum": 0})

    def test_bounds_of_the_wrong_size_are_refused(self):
        mu, spec = jnp.zeros(3), bounds(jnp.zeros(1), jnp.ones(1))
        with pytest.raises(
            ValueError, match=r"minimum has shape \(1,\), expected f\[\]"
        ):
            squashed_gaussian().sample(KEYS[0], mu, mu, spec)

    def test_what_is_no_array_is_refused_by_name(self):
        with pytest.raises(
            TypeError, match=r"squashed_gaussian\.sample: mu must be an"
        ):
            squashed_gaussian().sample(KEYS[0], [0.0], jnp.zeros(1), UNIT)
        with pytest.raises(TypeError, match=r"squashed_gaussian\.logprob: sample must"):
            squashed_gaussian().logprob([0.0], jnp.zeros(1), jnp.zeros(1), UNIT)

    def test_limits_the_wrong_way_round_are_refused_or_give_nan(self):
        with pytest.raises(
            ValueError, match="sigma_min must not exceed sigma_max, got 1"
        ):
            squashed_gaussian(1, -1.0)
        entropy = lambda low: squashed_gaussian(low, 0.0).entropy(*2 * [jnp.zeros(1)])
        assert jnp.isfinite(jax.jit(entropy)(-1.0))
        assert jnp.isnan(jax.jit(entropy)(1.0))

    @pytest.mark.parametrize("extreme", [-1e30, 1e30, -jnp.inf, jnp.inf])
    def test_any_output_of_a_network_will_do(self, extreme):
        policy, mu = squashed_gaussian(), jnp.full(1, extreme)
        action = policy.sample(KEYS[0], mu, mu, UNIT)
        measures = [policy.logprob(action, mu, mu, UNIT), policy.entropy(mu, mu)]
        measures += [policy.kl_to_standard_normal(mu, mu), policy.kl(mu, mu, -mu, mu)]
        assert np.isfinite([*action, *measures]).all()

    def test_runs_with_nans_forbidden(self):
        policy, at_bound = squashed_gaussian(), jnp.array([-1.0, 1.0])
        logprob = lambda mu, s: policy.logprob(at_bound, mu, s, UNIT)
        with jax.debug_nans(True):
            gradients = jax.grad(logprob, (0, 1))(jnp.zeros(2), jnp.zeros(2))
        assert all(np.isfinite(g).all() for g in gradients)

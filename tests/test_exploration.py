"""Noise, against its moments over many keys and what its definition says of each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    add_dirichlet_noise,
    add_factorized_noise,
    add_gaussian_noise,
    add_ornstein_uhlenbeck_noise,
    colored_noise,
    ornstein_uhlenbeck_noise,
)

KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, 20_000)
BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
KEY_MAKERS = pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])


def same(got, expected, rtol=1e-6, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def assert_moments(draws, mean, std):
    """Checks each column, within four standard errors of the mean."""
    draws = np.asarray(draws)
    assert (np.abs(draws.mean(axis=0) - mean) < 4 * std / math.sqrt(len(draws))).all()
    same(draws.std(axis=0), std, rtol=0.03)


class TestGaussian:
    @KEY_MAKERS
    @pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
    def test_adds_one_draw_to_each_component(self, rng, make_key, shape):
        action = rng.normal(size=shape).astype(np.float32)
        noise = 0.5 * np.asarray(jax.random.normal(make_key(5), shape, np.float32))
        same(add_gaussian_noise(make_key(5), action, 0.5), action + noise)

    def test_has_the_moments_it_is_given(self):
        action, stddev = jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0])
        noisy = jax.vmap(add_gaussian_noise, (0, None, None))(KEYS, action, stddev)
        assert_moments(noisy, action, np.asarray(stddev))
        assert abs(np.corrcoef(np.transpose(noisy))[0, 1]) < 0.03

    def test_without_a_deviation_there_is_no_noise(self):
        action = jnp.array([1.0, -1.0])
        assert add_gaussian_noise(KEY, action, 0.0).tolist() == action.tolist()

    def test_gradients_reach_the_action_and_the_deviation(self):
        total = lambda action, stddev: add_gaussian_noise(KEY, action, stddev).sum()
        d_action, d_stddev = jax.grad(total, (0, 1))(jnp.zeros(3), 0.5)
        same(d_action, np.ones(3))
        same(d_stddev, jax.random.normal(KEY, (3,)).sum())

    @pytest.mark.parametrize("stddev", [-0.5, math.inf, math.nan])
    def test_a_deviation_out_of_range_is_refused(self, stddev):
        with pytest.raises(ValueError, match=r"stddev must be in \[0, inf\), got"):
            add_gaussian_noise(KEY, jnp.ones(2), stddev)

    def test_a_deviation_of_another_size_is_refused(self):
        with pytest.raises(
            ValueError, match=r"stddev has shape \(1,\), expected f\[\]"
        ):
            add_gaussian_noise(KEY, jnp.ones(2), jnp.ones(1))


class TestOrnsteinUhlenbeck:
    @KEY_MAKERS
    @pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
    def test_agrees_with_its_definition(self, rng, make_key, shape):
        action, noise_tm1 = rng.normal(size=(2, *shape)).astype(np.float32)
        fresh = np.asarray(jax.random.normal(make_key(5), shape, np.float32))
        noise_t = 0.85 * noise_tm1 + 0.2 * fresh
        same(
            add_ornstein_uhlenbeck_noise(make_key(5), action, noise_tm1, 0.15, 0.2),
            action + noise_t,
        )
        step = functools.partial(ornstein_uhlenbeck_noise, damping=0.15, stddev=0.2)
        same(step(make_key(5), noise_tm1), noise_t)

    def test_the_noise_to_keep_is_the_noise_that_was_added(self, rng):
        """Which in half precision cannot be had back from the noisy action."""
        action, noise = rng.normal(size=(2, 100)).astype(np.float32)
        action = jnp.asarray(100 * action, jnp.bfloat16)
        added = add_ornstein_uhlenbeck_noise(KEY, action, noise, 0.15, 0.2)
        kept = ornstein_uhlenbeck_noise(KEY, noise, damping=0.15, stddev=0.2)
        same(added, action.astype(jnp.float32) + kept, rtol=0, atol=0)

    def test_settles_where_forgetting_and_noise_balance(self):
        """With a correlation of `1 - damping` between one step and the next."""

        def step(noise, key):
            noise = ornstein_uhlenbeck_noise(key, noise, damping=0.3, stddev=0.2)
            return noise, noise

        noises = np.asarray(jax.lax.scan(step, jnp.zeros(50), KEYS[:4000])[1][100:])
        same(noises.std(), 0.2 / math.sqrt(1 - 0.7**2), rtol=0.02)
        assert abs(noises.mean()) < 0.01
        same(np.corrcoef(noises[1:].ravel(), noises[:-1].ravel())[0, 1], 0.7, rtol=0.02)

    def test_forgets_all_at_once_or_nothing_ever(self):
        action, noise_tm1 = jnp.array([1.0, 2.0]), jnp.array([0.5, -0.5])
        noisy = add_ornstein_uhlenbeck_noise(KEY, action, noise_tm1, 1.0, 0.2)
        same(noisy, add_gaussian_noise(KEY, action, 0.2), rtol=0, atol=0)
        noisy = add_ornstein_uhlenbeck_noise(KEY, action, noise_tm1, 0.0, 0.0)
        same(noisy, [1.5, 1.5], rtol=0, atol=0)

    @BAD
    def test_noise_that_is_forgotten_leaks_nothing(self, bad):
        """As after a reset, where damping is 1."""
        noise_tm1, damping = jnp.array([bad, 1.0]), jnp.array([1.0, 0.5])
        call = lambda noise: ornstein_uhlenbeck_noise(
            KEY, noise, damping=damping, stddev=0.2
        )
        fresh = 0.2 * np.asarray(jax.random.normal(KEY, (2,)))
        same(call(noise_tm1), fresh + np.array([0.0, 0.5]))
        gradient = jax.grad(lambda noise: call(noise).sum())(noise_tm1)
        assert gradient.tolist() == [0.0, 0.5]

    @pytest.mark.parametrize("name", ["action", "noise_tm1"])
    def test_one_component_is_not_repeated(self, name):
        given = {"action": jnp.ones(3), "noise_tm1": jnp.ones(3), name: jnp.ones(1)}
        with pytest.raises(
            ValueError, match=r"noise_tm1 has shape \(\d,\), expected f\["
        ):
            add_ornstein_uhlenbeck_noise(KEY, **given, damping=0.1, stddev=0.1)

    @pytest.mark.parametrize("damping", [-0.1, 1.1])
    def test_damping_out_of_range_is_refused(self, damping):
        with pytest.raises(ValueError, match=r"damping must be in \[0, 1\], got"):
            add_ornstein_uhlenbeck_noise(KEY, jnp.ones(2), jnp.ones(2), damping, 0.1)


def spread_by_hand(count, alpha):
    """The standard deviation of each entry of a symmetric Dirichlet variate."""
    return math.sqrt((1 / count) * (1 - 1 / count) / (count * alpha + 1))


def many(prior):
    """A prior for each of many variates, in one shape, which is compiled once."""
    return jnp.broadcast_to(jnp.asarray(prior, jnp.float32), (20_000, 3))


@jax.jit
def weighed(prior, fraction, mask):
    """Noisy priors of three actions, and gradients of their sum by 0, 1 and 2."""

    def total(prior, fraction):
        noisy = add_dirichlet_noise(KEY, prior, 0.3, fraction, mask=mask)
        return jnp.sum(noisy @ np.arange(3, dtype=np.float32)), noisy

    gradients, noisy = jax.grad(total, (0, 1), has_aux=True)(prior, fraction)
    return noisy, *gradients


ALL = np.ones((2, 3), bool)
PRIOR = np.float32([[0.1, 0.9, 0.0], [0.3, 0.2, 0.5]])


class TestDirichlet:
    @pytest.mark.parametrize(
        ("lead", "make_key"), [((), jax.random.key), ((2, 3), jax.random.PRNGKey)]
    )
    def test_mixes_in_one_variate_for_each_prior(self, rng, lead, make_key):
        prior = rng.dirichlet(np.ones(3), size=lead).astype(np.float32)
        for alpha in (0.3, 10.0):
            alphas = np.full(3, np.float32(alpha))
            noise = np.asarray(
                jax.random.dirichlet(make_key(5), alphas, lead, np.float32)
            )
            noisy = add_dirichlet_noise(make_key(5), prior, alpha, 0.25)
            same(noisy, 0.75 * prior + 0.25 * noise)
            same(np.sum(noisy, axis=-1), np.ones(lead))

    @pytest.mark.parametrize("alpha", [0.3, 2.0])
    def test_has_the_moments_of_its_concentration(self, alpha):
        noisy = add_dirichlet_noise(KEY, many([0.1, 0.2, 0.7]), alpha, 0.5)
        mean = (np.array([0.1, 0.2, 0.7]) + 1 / 3) / 2
        assert_moments(noisy, mean, 0.5 * spread_by_hand(3, alpha))

    def test_a_concentration_for_each_action_pulls_towards_the_greatest(self):
        alphas = np.float32([1.0, 2.0, 5.0])
        noisy = add_dirichlet_noise(KEY, many([0.0, 0.0, 1.0]), alphas, 1.0)
        means = alphas / 8
        assert_moments(noisy, means, np.sqrt(means * (1 - means) / 9))

    def test_with_a_mask_it_is_that_of_leaving_the_other_actions_out(self):
        mask = np.broadcast_to([True, False, True], (20_000, 3))
        noisy = add_dirichlet_noise(KEY, many([0.2, 0.0, 0.8]), 0.3, 0.5, mask=mask)
        assert not noisy[:, 1].any()
        same(noisy.sum(axis=-1), np.ones(20_000))
        mean = (np.array([0.2, 0.8]) + 1 / 2) / 2
        assert_moments(noisy[:, ::2], mean, 0.5 * spread_by_hand(2, 0.3))

    def test_a_mask_of_all_changes_nothing(self):
        noisy, _, _ = weighed(PRIOR, 0.25, ALL)
        same(noisy, add_dirichlet_noise(KEY, PRIOR, 0.3, 0.25))

    @BAD
    def test_what_is_illegal_leaks_neither_values_nor_gradients(self, bad):
        mask = np.array([[True, True, False], [True, False, True]])
        expected = weighed(np.where(mask, PRIOR, 0), 0.25, mask)
        got = weighed(np.where(mask, PRIOR, np.float32(bad)), 0.25, mask)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert not got[0][~mask].any()
        assert got[1].tolist() == [[0.0, 0.75, 0.0], [0.0, 0.0, 1.5]]

    def test_one_legal_action_gets_everything(self):
        mask = np.array([[False, True, False], [False, False, True]])
        noisy, _, _ = weighed(mask.astype(np.float32), 0.25, mask)
        assert noisy.tolist() == mask.tolist()

    def test_no_legal_action_is_nan_without_a_gradient(self):
        noisy, d_prior, _ = weighed(PRIOR, 0.25, np.array([[False] * 3, [True] * 3]))
        assert jnp.isnan(noisy).all(axis=-1).tolist() == [True, False]
        assert d_prior.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.75, 1.5]]

    @BAD
    def test_a_prior_that_does_not_count_leaks_nothing(self, bad):
        dirty = PRIOR.copy()
        dirty[1, 1] = bad
        noisy, d_prior, _ = weighed(dirty, 1.0, ALL)
        same(noisy, weighed(PRIOR, 1.0, ALL)[0], rtol=0, atol=0)
        assert not d_prior.any()
        assert not jnp.isfinite(weighed(dirty, 0.5, ALL)[0][1, 1])

    def test_a_fraction_of_zero_changes_nothing(self):
        assert weighed(PRIOR, 0.0, ALL)[0].tolist() == PRIOR.tolist()

    def test_gradients_reach_the_prior_and_the_fraction(self):
        noise = np.asarray(
            jax.random.dirichlet(KEY, np.float32([0.3] * 3), (2,), np.float32)
        )
        _, d_prior, d_fraction = weighed(PRIOR, 0.25, ALL)
        same(d_prior, [[0.0, 0.75, 1.5]] * 2)
        same(d_fraction, np.sum((noise - PRIOR) @ np.arange(3.0)), rtol=1e-5)

    def test_the_gradient_in_the_concentration_is_right_on_average(self):
        """That of the mean square of an entry, `(alpha + 1) / (A (A alpha + 1))`."""

        def squares(alpha):
            return (
                add_dirichlet_noise(KEY, many(jnp.ones(3) / 3), alpha, 1.0)[:, 0] ** 2
            )

        slopes = np.asarray(jax.jvp(squares, (0.7,), (1.0,))[1])
        expected = (1 - 3) / (3 * (3 * 0.7 + 1) ** 2)
        assert abs(slopes.mean() - expected) < 4 * slopes.std() / math.sqrt(20_000)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_extreme_concentrations_give_a_distribution(self, dtype):
        prior = jnp.full((50, 3), 1 / 3, dtype)
        for alpha in (1e-30, 1e-8, 1e-3, 1e8, 1e30):
            noisy = add_dirichlet_noise(KEY, prior, alpha, 1.0)
            assert noisy.dtype == dtype
            noisy = np.asarray(noisy, np.float32)
            assert np.isfinite(noisy).all()
            same(noisy.sum(axis=-1), np.ones(50), rtol=0.01)
            top = noisy.max(axis=-1)
            same(np.median(top), 1.0 if alpha < 1 else 1 / 3, rtol=0.01)

    @pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
    def test_a_concentration_out_of_range_is_refused(self, alpha):
        text = r"add_dirichlet_noise: dirichlet_alpha must be in \(0, inf\), got"
        with pytest.raises(ValueError, match=text):
            add_dirichlet_noise(KEY, jnp.array([0.5, 0.5]), alpha, 0.25)

    @pytest.mark.parametrize("fraction", [-0.1, 1.5])
    def test_a_fraction_out_of_range_is_refused(self, fraction):
        with pytest.raises(ValueError, match=r"dirichlet_fraction must be in \[0, 1\]"):
            add_dirichlet_noise(KEY, jnp.array([0.5, 0.5]), 0.3, fraction)

    def test_a_mask_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"mask has shape \(1,\), expected b\["):
            add_dirichlet_noise(KEY, jnp.ones(2) / 2, 0.3, 0.25, mask=jnp.array([True]))


def shares_by_hand(length, exponent):
    """Of the variance, by frequency: the constant part has that of the lowest."""
    powers = [max(min(k, length - k), 1) ** -exponent for k in range(length)]
    return np.array(powers) / sum(powers)


def colored_by_hand(white, exponent):
    """White noise taken apart into waves, which are weighed and added up."""
    length = len(white)
    waves = np.exp(2j * np.pi * np.outer(np.arange(length), np.arange(length)) / length)
    gains = np.sqrt(length * shares_by_hand(length, exponent))
    return (waves @ (gains * (waves.conj() @ white)) / length).real


@functools.partial(jax.jit, static_argnums=1)
def many_colored(exponent, num_steps):
    """Sequences of one component, from as many keys."""
    draw = lambda key: colored_noise(key, 1.0, num_steps, exponent=exponent)
    return jax.vmap(draw)(KEYS)


class TestColored:
    @KEY_MAKERS
    def test_is_white_noise_whose_waves_are_weighed(self, make_key):
        lengths, exponents = (1, 2, 3, 7, 8), [1.0, 2.0, -0.5]
        stddev, key = jnp.array([1.0, 0.5, 2.0]), make_key(5)

        @jax.jit
        def draw(key, exponent):
            return [
                colored_noise(key, stddev, n, exponent=exponent) for n in lengths
            ] + [colored_noise(key, stddev, 8)]

        *noises, pink = draw(key, jnp.array(exponents))
        for length, noise in zip(lengths, noises, strict=True):
            white = np.asarray(jax.random.normal(key, (length, 3)))
            waves = map(colored_by_hand, white.T, exponents)
            expected = np.transpose([*waves]) * np.asarray(stddev)
            same(noise, expected, rtol=1e-4, atol=1e-5)
        same(pink[:, 0], noises[-1][:, 0])  # which is the default

    @pytest.mark.parametrize("num_steps", [7, 8])
    def test_with_an_exponent_of_zero_it_is_white(self, num_steps):
        noise = colored_noise(KEY, jnp.ones((2, 3)), num_steps, exponent=0.0)
        same(noise, jax.random.normal(KEY, (num_steps, 2, 3)), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("num_steps", [9, 10])
    def test_varies_by_one_at_each_step_and_together_as_its_spectrum_says(
        self, num_steps
    ):
        """As `colorednoise` does not, which leaves the constant part out."""
        steps = np.arange(num_steps)
        phases = 2 * np.pi * np.multiply.outer(steps, steps[:, None] - steps)
        for exponent in (0.0, 1.0, 2.0):
            noise = np.asarray(many_colored(exponent, num_steps), np.float64)
            shares = shares_by_hand(num_steps, exponent)
            together = np.tensordot(shares, np.cos(phases / num_steps), 1)
            same(np.diag(together), np.ones(num_steps))
            error = 4 * math.sqrt(2 / len(KEYS))
            same(noise.T @ noise / len(KEYS), together, rtol=0, atol=error)

    def test_is_normal_at_each_step(self):
        noise = np.asarray(many_colored(1.0, 10), np.float64)
        assert_moments(noise, 0, 1)
        assert (abs((noise**3).mean(axis=0)) < 4 * math.sqrt(15 / len(KEYS))).all()
        same((noise**4).mean(axis=0), np.full(10, 3), rtol=0.1)

    @pytest.mark.parametrize("exponent", [1.0, 2.0])
    def test_power_falls_by_the_exponent(self, exponent):
        """Of the frequencies of 500 sequences, on doubly logarithmic paper."""
        noise = colored_noise(KEY, jnp.ones(500), 256, exponent=exponent)
        power = np.mean(np.abs(np.fft.rfft(noise, axis=0)) ** 2, axis=1)
        slope = np.polyfit(np.log(np.arange(1, 129)), np.log(power[1:]), 1)[0]
        assert abs(slope + exponent) < 0.02
        same(power[0], power[1], rtol=0.3)

    def test_components_are_independent(self):
        noise = colored_noise(KEY, jnp.ones(2000), 8, exponent=2.0)
        left, right = np.split(np.asarray(noise), 2, axis=1)
        assert abs(np.mean(left * right, axis=1)).max() < 4 / math.sqrt(1000)

    def test_exponents_may_be_traced_and_mapped(self):
        exponents = jnp.array([0.0, 1.0, 2.0])
        draw = lambda exponent: colored_noise(KEY, 1.0, 6, exponent=exponent)
        for noise, exponent in zip(jax.vmap(draw)(exponents), exponents, strict=True):
            same(noise, draw(exponent), rtol=1e-5)

    @pytest.mark.parametrize("exponent", [-90.0, 90.0])
    def test_extreme_exponents_leave_one_wave_and_finite_slopes(self, exponent):
        with jax.debug_nans(True):
            noise, slope = jax.jvp(
                lambda exponent: colored_noise(KEY, 1.0, 8, exponent=exponent),
                (exponent,),
                (1.0,),
            )
        waves = np.abs(np.fft.rfft(noise))
        assert np.isfinite(slope).all()
        kept = (waves > 1e-3 * waves.max()).nonzero()[0]
        assert kept.tolist() == ([0, 1] if exponent > 0 else [4])

    @pytest.mark.parametrize("num_steps", [0, -1])
    def test_a_sequence_of_no_steps_is_refused(self, num_steps):
        text = f"colored_noise: num_steps must be at least 1: {num_steps}"
        with pytest.raises(ValueError, match=text):
            colored_noise(KEY, jnp.ones(2), num_steps)


def signed_root(x):
    return math.copysign(math.sqrt(abs(x)), x)


class TestFactorized:
    @KEY_MAKERS
    def test_noise_of_a_weight_is_that_of_its_input_times_that_of_its_output(
        self, rng, make_key
    ):
        kernel, kernel_stddev = rng.normal(size=(2, 3, 2)).astype(np.float32)
        bias, bias_stddev = rng.normal(size=(2, 2)).astype(np.float32)
        draws = jax.random.normal(make_key(5), (5,), np.float32)
        noise = [signed_root(x) for x in draws.tolist()]
        of_inputs, of_outputs = noise[:3], noise[3:]
        noisy_kernel, noisy_bias = add_factorized_noise(
            make_key(5), kernel, bias, kernel_stddev, bias_stddev
        )
        for j, of_output in enumerate(of_outputs):
            same(noisy_bias[j], bias[j] + bias_stddev[j] * of_output, rtol=1e-5)
            for i, of_input in enumerate(of_inputs):
                expected = kernel[i, j] + kernel_stddev[i, j] * of_input * of_output
                same(noisy_kernel[i, j], expected, rtol=1e-5)

    def test_has_the_moments_of_its_definition(self):
        """Those of a product of two, and of one: the mean of |x| is sqrt(2 / pi)."""
        zeros, ones = (jnp.zeros((3, 2)), jnp.zeros(2)), (jnp.ones((3, 2)), jnp.ones(2))
        noises = jax.vmap(lambda key: add_factorized_noise(key, *zeros, *ones))(KEYS)
        for noise, variance in zip(
            noises, (2 / math.pi, math.sqrt(2 / math.pi)), strict=True
        ):
            assert_moments(noise, 0, math.sqrt(variance))

    def test_gradients_reach_all_four_parameters(self):
        zeros, ones = (jnp.zeros((3, 2)), jnp.zeros(2)), (jnp.ones((3, 2)), jnp.ones(2))
        total = lambda *parameters: sum(
            x.sum() for x in add_factorized_noise(KEY, *parameters)
        )
        *means, d_kernel_stddev, d_bias_stddev = jax.grad(total, (0, 1, 2, 3))(
            *zeros, *ones
        )
        for slopes in means:
            assert (slopes == 1).all()
        noise = add_factorized_noise(KEY, *zeros, *ones)
        same(d_kernel_stddev, noise[0])
        same(d_bias_stddev, noise[1])

    def test_a_kernel_the_other_way_round_is_refused(self):
        text = r"add_factorized_noise: bias has shape \(3,\), expected f\[N\]"
        with pytest.raises(ValueError, match=text):
            add_factorized_noise(
                KEY, jnp.ones((3, 2)), jnp.ones(3), jnp.ones((3, 2)), jnp.ones(3)
            )

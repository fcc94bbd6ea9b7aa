"""Estimates of divergences, against sums over all actions and exact arithmetic."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.kl_estimators import (
    approximate_kl,
    importance_corrected_kl_estimate_k3,
    kl_estimate_k1,
    kl_estimate_k2,
    kl_estimate_k3,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ESTIMATES = [kl_estimate_k1, kl_estimate_k2, kl_estimate_k3]
INFINITY = np.inf


def exactly(difference):
    """k3 of one float, in sixty digits."""
    with decimal.localcontext(prec=60):
        x = decimal.Decimal(float(difference))
        return float(x.exp() - 1 - x)


def kl_by_hand(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))


class Policies:
    """Three softmax policies over all of a few actions, and slopes of divergences."""

    def __init__(self, rng):
        logits = rng.normal(size=(3, 5))
        self.logits = logits[0]
        self.pi, self.mu, self.reference = np.exp(logits) / np.exp(logits).sum(
            axis=1, keepdims=True
        )

    def slope(self, divergence):
        """With respect to the logits, by central differences."""
        steps = 1e-6 * np.eye(len(self.logits))
        soft = lambda z: np.exp(z) / np.exp(z).sum()
        return np.array(
            [
                (divergence(soft(self.logits + h)) - divergence(soft(self.logits - h)))
                / 2e-6
                for h in steps
            ]
        )

    def average(self, estimate, probs):
        """The mean of value and gradient over every action that `probs` may draw."""

        def mean(logits):
            return jnp.vdot(probs, estimate(jax.nn.log_softmax(logits)))

        with jax.enable_x64(True):
            return jax.value_and_grad(mean)(jnp.asarray(self.logits))


class TestGradientsOnAverage:
    """Over every action, with the probability that it is drawn."""

    def average_of(self, estimate, policies):
        reference = np.log(policies.reference)
        return policies.average(lambda x: estimate(x, reference), policies.pi)

    def test_that_of_k1_is_zero(self, rng):
        policies = Policies(rng)
        value, gradient = self.average_of(kl_estimate_k1, policies)
        np.testing.assert_allclose(
            value, kl_by_hand(policies.pi, policies.reference), rtol=1e-12
        )
        np.testing.assert_allclose(gradient, 0, atol=1e-15)

    def test_that_of_k2_is_that_of_the_divergence(self, rng):
        policies = Policies(rng)
        value, gradient = self.average_of(kl_estimate_k2, policies)
        half_square = np.log(policies.pi / policies.reference) ** 2 / 2
        np.testing.assert_allclose(value, policies.pi @ half_square, rtol=1e-12)
        expected = policies.slope(lambda p: kl_by_hand(p, policies.reference))
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)

    def test_that_of_k3_is_that_of_the_divergence_the_other_way_round(self, rng):
        policies = Policies(rng)
        value, gradient = self.average_of(kl_estimate_k3, policies)
        np.testing.assert_allclose(
            value, kl_by_hand(policies.pi, policies.reference), rtol=1e-12
        )
        expected = policies.slope(lambda p: kl_by_hand(policies.reference, p))
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)

    @pytest.mark.parametrize("actor", ["mu", "pi"])
    def test_those_of_the_corrected_k3_are_right_whoever_acted(self, rng, actor):
        policies = Policies(rng)
        acted = getattr(policies, actor)
        behaviour, reference = np.log(acted), np.log(policies.reference)
        value, gradient = policies.average(
            lambda x: importance_corrected_kl_estimate_k3(x, behaviour, reference),
            acted,
        )
        divergence = lambda p: kl_by_hand(p, policies.reference)
        np.testing.assert_allclose(value, divergence(policies.pi), rtol=1e-12)
        np.testing.assert_allclose(gradient, policies.slope(divergence), rtol=1e-6)

    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_approximate_kl_is_from_the_policy_that_acted(self, rng, estimator):
        policies = Policies(rng)
        behaviour = np.log(policies.mu)
        value, gradient = policies.average(
            lambda x: approximate_kl(
                x, behaviour, estimator=estimator, reduction="none"
            ),
            policies.mu,
        )
        divergence = lambda p: kl_by_hand(policies.mu, p)
        np.testing.assert_allclose(value, divergence(policies.pi), rtol=1e-12)
        np.testing.assert_allclose(gradient, policies.slope(divergence), rtol=1e-6)


SMALL_AND_LARGE = np.concatenate(
    [sign * np.geomspace(1e-8, 10, 400) for sign in (-1, 1)]
)


class TestK3:
    @pytest.mark.parametrize(
        ("dtype", "rtol"), [(np.float32, 5e-7), (np.float64, 1e-15)]
    )
    def test_keeps_all_digits_and_its_slope_does(self, dtype, rtol):
        with jax.enable_x64(dtype == np.float64):
            x = SMALL_AND_LARGE.astype(dtype)
            value, slope = jax.vmap(jax.value_and_grad(kl_estimate_k3))(0 * x, x)
            assert value.dtype == dtype
        np.testing.assert_allclose(value, [*map(exactly, x)], rtol=rtol)
        np.testing.assert_allclose(slope, -np.expm1(np.float64(x)), rtol=rtol)

    def test_is_never_negative(self):
        exponents = np.linspace(-45, 3, 20_000)
        for sign in (-1, 1):
            x = sign * (10**exponents).astype(np.float32)
            assert (kl_estimate_k3(0 * x, x) >= 0).all()

    def test_is_zero_only_for_equal_probabilities(self):
        x = np.float32([1e-18, -1e-18, 0])
        assert (kl_estimate_k3(0 * x, x) > 0).tolist() == [True, True, False]

    def test_has_second_derivatives(self):
        slope = jax.grad(jax.grad(kl_estimate_k3))
        for x in (0.0, 0.5, 3.0):
            np.testing.assert_allclose(slope(0.0, x), np.exp(x), rtol=1e-6)

    def test_is_computed_in_float32_for_half_precision(self):
        log_prob, reference = jnp.bfloat16([-1.0, -1.0]), jnp.bfloat16([-1.0078125, 9])
        k3 = kl_estimate_k3(log_prob, reference)
        assert k3.dtype == jnp.bfloat16
        expected = [exactly(-0.0078125), exactly(10)]
        np.testing.assert_allclose(k3.astype(np.float32), expected, rtol=4e-3)


class TestSaturation:
    @pytest.mark.parametrize("estimate", ESTIMATES)
    def test_an_action_that_the_reference_rules_out_is_infinitely_far(self, estimate):
        value, gradient = jax.value_and_grad(estimate)(-1.0, -INFINITY)
        assert value == INFINITY
        assert np.isfinite(gradient)

    @pytest.mark.parametrize("log_prob", [-1000.0, -INFINITY])
    def test_k3_has_no_gradient_where_it_overflows(self, log_prob):
        assert jax.value_and_grad(kl_estimate_k3)(log_prob, -1.0) == (INFINITY, 0)

    @pytest.mark.parametrize("estimate", ESTIMATES)
    def test_what_neither_policy_could_do_is_unknown_and_can_be_left_out(
        self, estimate
    ):
        impossible, mask = jnp.full(2, -INFINITY), jnp.zeros(2, bool)
        assert np.isnan(estimate(impossible, impossible)).all()
        for reduction in ("mean", "sum"):
            value, gradient = jax.value_and_grad(estimate)(
                impossible, impossible, mask_t=mask, reduction=reduction
            )
            assert (value, *gradient) == (0, 0, 0)

    def test_the_corrected_k3_has_a_limit_where_the_policy_rules_the_action_out(self):
        corrected = importance_corrected_kl_estimate_k3
        behaviour, reference = np.log(np.float32([0.25, 0.75]))
        for log_prob in (-INFINITY, -200.0, -90.0):
            value, slope = jax.value_and_grad(corrected)(log_prob, behaviour, reference)
            np.testing.assert_allclose(value, 3, rtol=1e-6)
            np.testing.assert_allclose(slope, 0, atol=1e-30)

    def test_the_corrected_k3_and_its_slope_keep_all_digits(self):
        log_ratios = np.float32([-200, -30, -2, -1, -1e-4, 0, 1e-4, 1, 20])
        references = np.float32([-200, -20, -1, 0])
        x, y = map(np.ravel, np.meshgrid(log_ratios, references))
        fn = jax.value_and_grad(importance_corrected_kl_estimate_k3)
        values, slopes = jax.vmap(fn)(x, 0 * x, y)
        with decimal.localcontext(prec=120):
            for i, pair in enumerate(zip(x, y, strict=True)):
                log_r, log_p = (decimal.Decimal(float(z)) for z in pair)
                slope = log_r.exp() * (log_r - log_p)
                value = log_p.exp() - log_r.exp() + slope
                close = {"rtol": 2e-6, "atol": 1e-37}
                np.testing.assert_allclose(values[i], float(value), **close)
                np.testing.assert_allclose(slopes[i], float(slope), **close)

    def test_the_corrected_k3_of_equal_policies_is_zero_even_if_the_ratio_overflows(
        self,
    ):
        result = jax.value_and_grad(importance_corrected_kl_estimate_k3)(
            90.0, 0.0, 90.0
        )
        assert result == (0, 0)


class TestArguments:
    @pytest.mark.parametrize("estimate", ESTIMATES)
    def test_padding_counts_for_nothing(self, estimate):
        log_prob, reference = jnp.array([-1.0, np.nan]), jnp.array([-3.0, np.nan])
        mask = jnp.array([True, False])
        value, gradient = jax.value_and_grad(estimate)(
            log_prob, reference, mask_t=mask, reduction="mean"
        )
        alone = jax.value_and_grad(estimate)(-1.0, -3.0)
        assert (value, gradient.tolist()) == (alone[0], [alone[1], 0])
        each = estimate(log_prob, reference, mask_t=mask)
        assert each.tolist() == [alone[0], 0]

    def test_the_reference_is_a_constant_unless_asked_otherwise(self):
        for estimate in ESTIMATES:
            slope = jax.grad(estimate, 1)
            assert slope(-1.0, -3.0) == 0
            assert slope(-1.0, -3.0, use_stop_gradient=False) != 0
        both = jax.grad(importance_corrected_kl_estimate_k3, (1, 2))
        assert both(-1.0, -2.0, -3.0) == (0, 0)
        free = both(-1.0, -2.0, -3.0, use_stop_gradient=False)
        ratio, reference = np.exp([1, -1])
        value = ratio * exactly(-2)
        np.testing.assert_allclose(free, [-value, reference - ratio], rtol=1e-6)

    def test_approximate_kl_is_a_mean_over_what_counts(self):
        log_prob, behaviour = jnp.array([-1.0, -2.0, 5.0]), jnp.array([-1.5, -1.0, 0.0])
        mask = jnp.array([True, True, False])
        k1 = approximate_kl(log_prob, behaviour, estimator="k1", mask_t=mask)
        k2 = approximate_kl(log_prob, behaviour, estimator="k2", mask_t=mask)
        k3 = approximate_kl(log_prob, behaviour, mask_t=mask)
        assert (k1, k2) == (0.25, 0.3125)
        np.testing.assert_allclose(k3, (exactly(0.5) + exactly(-1)) / 2, rtol=1e-6)

    def test_there_is_no_other_estimator(self):
        with pytest.raises(ValueError, match="approximate_kl: estimator must be"):
            approximate_kl(jnp.zeros(2), jnp.zeros(2), estimator="k4")

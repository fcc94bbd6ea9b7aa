"""Weights of imitated actions, against plain-Python readings of their equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    behaviour_cloning_loss,
    binary_advantage_weights,
    exponential_advantage_weights,
    self_normalized_importance_weights,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

BAD = [np.nan, np.inf, -np.inf]


def same(got, expected, rtol=1e-6, atol=1e-7):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


class TestExponential:
    def test_is_the_exponential_up_to_the_limit(self, rng):
        adv = rng.normal(scale=3, size=(4, 50)).astype(np.float32)
        weights = exponential_advantage_weights(adv, temperature=0.7, max_weight=20.0)
        expected = [
            min(math.exp(x / np.float32(0.7)), 20) for x in adv.ravel().tolist()
        ]
        same(weights, np.reshape(expected, adv.shape), rtol=1e-5)
        assert (weights == 20).any()

    def test_nothing_overflows_nor_becomes_nan(self):
        adv = jnp.array([1e38, np.inf, -1e38, -np.inf, 0.0])

        def fn(adv, heat, limit):
            return exponential_advantage_weights(
                adv, temperature=heat, max_weight=limit, use_stop_gradient=False
            )

        slopes = jax.jit(jax.jacrev(fn, (0, 1, 2)))
        for heat in (1e-6, 1.0):
            same(fn(adv, heat, 20.0), [20, 20, 0, 0, 1])
            by_adv, by_heat, by_limit = slopes(adv, heat, 20.0)
            same(by_adv, np.diag([0, 0, 0, 0, 1 / heat]))
            same(by_heat, np.zeros(5))
            same(by_limit, [1, 1, 0, 0, 0])

    def test_without_a_limit_only_infinity_is_too_much(self):
        adv = jnp.array([80.0, np.inf])
        fn = functools.partial(
            exponential_advantage_weights, temperature=1.0, max_weight=math.inf
        )
        same(fn(adv), [math.exp(80), math.inf], rtol=1e-5)

    def test_an_unknown_advantage_is_not_hidden_and_has_no_gradient(self):
        def fn(adv, heat):
            return exponential_advantage_weights(
                adv, temperature=heat, max_weight=5.0, use_stop_gradient=False
            )

        value, slopes = jax.value_and_grad(fn, (0, 1))(jnp.nan, 2.0)
        assert np.isnan(value)
        same(slopes, [0, 0])

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_are_those_derived_by_hand(self, stop):
        adv = jnp.array([0.5, 3.0])

        def fn(adv, heat, limit):
            settings = {"temperature": heat, "max_weight": limit}
            return exponential_advantage_weights(
                adv, **settings, use_stop_gradient=stop
            ).sum()

        by_adv, by_heat, by_limit = jax.grad(fn, (0, 1, 2))(adv, 0.5, 20.0)
        flows = not stop
        same(by_adv, [2 * math.e * flows, 0])
        same(by_heat, -2 * math.e * flows)
        same(by_limit, flows)

    def test_scaled_to_one_they_are_self_normalised_weights(self, rng):
        adv = rng.normal(size=6).astype(np.float32)
        weights = exponential_advantage_weights(
            adv, temperature=0.5, max_weight=math.inf
        )
        same(self_normalized_importance_weights(adv / 0.5), weights / weights.sum())

    def test_a_limit_of_zero_is_refused(self):
        message = r"max_weight must be in \(0, inf\], got 0.0"
        with pytest.raises(ValueError, match=message):
            exponential_advantage_weights(jnp.ones(1), temperature=1.0, max_weight=0.0)


class TestBinary:
    def test_keeps_what_is_better(self):
        adv = jnp.array([1e-30, -1e-30, 0.0, -0.0, np.inf, -np.inf, np.nan])
        same(binary_advantage_weights(adv), [1, 0, 0, 0, 1, 0, np.nan])

    def test_has_no_gradient(self):
        slope = jax.vmap(jax.grad(binary_advantage_weights))
        assert not slope(jnp.array([2.0, 0.0, -1.0, np.nan])).any()


class TestBehaviourCloning:
    def test_is_the_weighted_negative_log_likelihood(self, rng):
        log_prob, weights = -rng.uniform(size=(2, 3, 4)).astype(np.float32)
        fn = functools.partial(behaviour_cloning_loss, log_prob)
        same(fn(), -log_prob.mean())
        same(fn(reduction="none"), -log_prob)
        same(fn(weight_t=-weights, reduction="sum"), (log_prob * weights).sum(), 1e-5)

    @pytest.mark.parametrize("bad", BAD)
    def test_weights_of_zero_and_padding_leave_actions_out(self, bad):
        log_prob, weights = jnp.array([-1.0, bad, bad]), jnp.array([3.0, 0.0, bad])
        mask = jnp.array([True, True, False])

        def fn(log_prob, weights, stop):
            settings = {"weight_t": weights, "mask_t": mask, "use_stop_gradient": stop}
            return behaviour_cloning_loss(log_prob, **settings)

        for stop in (True, False):
            loss, slopes = jax.value_and_grad(fn, (0, 1))(log_prob, weights, stop)
            same(loss, 1.5)
            same(slopes[0], [-1.5, 0, 0])
            same(slopes[1], [0.5 * (not stop), 0, 0])

    def test_an_impossible_action_costs_infinity(self):
        assert behaviour_cloning_loss(jnp.array([-jnp.inf])) == math.inf

"""Losses on log-probabilities, against plain-Python readings of their equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.policy_gradients import clipped_surrogate_pg_loss, policy_gradient_loss
from rlprims.surrogates import (
    clipped_objective,
    discovered_policy_optimization_loss,
    log_prob_policy_gradient_loss,
    ppo_clip_loss,
    ppo_kl_penalty_loss,
    simple_policy_optimization_loss,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

INFINITY = math.inf


def ppo_by_hand(log_ratio, adv, low=0.2, high=0.2, dual=INFINITY):
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - low), 1 + high)
    gain = min(ratio * adv, clipped * adv)
    if adv < 0 and dual < INFINITY:
        gain = max(gain, dual * adv)
    return -gain


def discovered_by_hand(log_ratio, adv, alpha=2.0, beta=0.6):
    ratio = math.exp(log_ratio)
    if adv >= 0:
        x = (ratio - 1) * adv
        drift = max(0, x - alpha * math.tanh(x / alpha))
    else:
        x = log_ratio * adv
        drift = max(0, x - beta * math.tanh(x / beta))
    return -(ratio * adv - drift)


def simple_by_hand(log_ratio, adv, epsilon=0.2):
    ratio = math.exp(log_ratio)
    return -(ratio * adv - abs(adv) / (2 * epsilon) * (ratio - 1) ** 2)


def penalty_by_hand(log_ratio, adv):
    return -math.exp(log_ratio) * adv + 0.7 * 1.5


def with_a_penalty(*args, **settings):
    kl = jnp.full_like(args[-1], 1.5)
    return ppo_kl_penalty_loss(*args, kl, kl_coefficient=0.7, **settings)


def defaults(fn, **settings):
    return functools.partial(fn, **settings)


DUAL = {"epsilon": 0.1, "epsilon_high": 0.3, "dual_clip": 2.0}
# Each with an equation of its own.
LOSSES = {
    "ppo": (ppo_clip_loss, ppo_by_hand),
    "ppo dual": (
        defaults(ppo_clip_loss, **DUAL),
        defaults(ppo_by_hand, low=0.1, high=0.3, dual=2.0),
    ),
    "discovered": (discovered_policy_optimization_loss, discovered_by_hand),
    "discovered otherwise": (
        defaults(discovered_policy_optimization_loss, alpha=0.5, beta=0.2),
        defaults(discovered_by_hand, alpha=0.5, beta=0.2),
    ),
    "simple": (simple_policy_optimization_loss, simple_by_hand),
    "simple otherwise": (
        defaults(simple_policy_optimization_loss, epsilon=0.6),
        defaults(simple_by_hand, epsilon=0.6),
    ),
    "penalty": (with_a_penalty, penalty_by_hand),
}
of_each_equation = pytest.mark.parametrize(
    ("loss", "by_hand"), LOSSES.values(), ids=LOSSES
)
of_each = pytest.mark.parametrize(
    "name", [name for name in LOSSES if "otherwise" not in name]
)


def each(by_hand, log_ratios, adv):
    numbers = zip(np.float64(log_ratios), np.float64(adv), strict=True)
    return np.array([by_hand(*xs) for xs in numbers])


@functools.cache
def program(loss, **settings):
    """The losses of steps, with the gradient of each by its own log-probability."""

    def run(log_prob, behaviour, adv):
        total = lambda x: loss(x, behaviour, adv, reduction="none", **settings)
        losses, pull = jax.vjp(total, log_prob)
        return losses, *pull(jnp.ones_like(losses))

    return jax.jit(run)


def losses_and_slopes(loss, log_prob, behaviour, adv, **settings):
    """Of a few steps, filled up to as many as every other call has."""
    steps = np.broadcast_arrays(log_prob, behaviour, adv)
    size = max(x.size for x in steps)
    filled = (np.resize(x, 8).astype(x.dtype) for x in steps)
    results = program(loss, **settings)(*map(np.float32, filled))
    return [np.asarray(x[:size]) for x in results]


class TestEveryLossOfRatios:
    @of_each_equation
    def test_agrees_with_its_equation_and_finite_differences(self, rng, loss, by_hand):
        behaviour, step, adv = rng.normal(size=(3, 200))
        with jax.enable_x64(True):
            losses, slopes = program(loss)(behaviour + step, behaviour, adv)
        np.testing.assert_allclose(losses, each(by_hand, step, adv), rtol=1e-10)
        h = 1e-6
        after, before = (each(by_hand, step + x, adv) for x in (h, -h))
        expected = (after - before) / (2 * h)
        np.testing.assert_allclose(slopes, expected, rtol=1e-6, atol=1e-8)

    @of_each
    def test_starts_like_the_policy_gradient(self, rng, name):
        """Where no step has been taken, whatever holds later ones back."""
        log_prob, adv = rng.normal(size=(2, 8))
        _, slopes = losses_and_slopes(LOSSES[name][0], log_prob, log_prob, adv)
        np.testing.assert_allclose(slopes, -adv, rtol=1e-6)

    @of_each
    def test_is_without_gradient_where_an_advantage_is_zero(self, name):
        steps = [0, 1, 1e3, -1e3, -INFINITY]
        for pair in ((steps, 0), (0, steps)):
            losses, slopes = losses_and_slopes(LOSSES[name][0], *pair, 0)
            assert (losses == losses[0]).all()
            assert not slopes.any()

    @of_each
    @pytest.mark.parametrize("adv", [2, -2])
    def test_huge_ratios_make_nothing_nan(self, name, adv):
        steps = np.array([1e3, 60, 89, INFINITY, -1e3, -INFINITY])
        for pair in ((steps, 0), (0, -steps)):
            losses, slopes = losses_and_slopes(LOSSES[name][0], *pair, adv)
            assert not np.isnan(losses).any()
            assert np.isfinite(slopes).all()

    @of_each
    def test_padding_counts_for_nothing(self, rng, name):
        inputs = rng.normal(size=(3, 4)).astype(np.float32)
        mask = np.array([True, False, True, False])

        @jax.jit
        def run(inputs, mask):
            loss = lambda xs, **kw: LOSSES[name][0](*xs, use_stop_gradient=False, **kw)
            spoilt = jnp.where(mask, inputs, jnp.nan)
            return (
                jax.value_and_grad(loss)(spoilt, mask_t=mask),
                jax.value_and_grad(loss)(inputs[:, ::2]),
                loss(inputs, mask_t=mask & False),
            )

        (value, gradients), (alone, expected), nothing = run(inputs, mask)
        np.testing.assert_allclose(value, alone, rtol=1e-6)
        np.testing.assert_allclose(gradients[:, mask], expected, rtol=1e-6)
        assert not gradients[:, ~mask].any()
        assert nothing == 0

    @of_each
    def test_half_precision_does_not_overflow_where_it_is_clipped(self, name):
        """A ratio of exp(20) is out of the range of float16."""
        loss, by_hand = LOSSES[name]
        log_prob, adv = jnp.float16([20, 0.25]), jnp.float16([0, 1])
        losses, slopes = program(loss)(log_prob, 0 * log_prob, adv)
        assert losses.dtype == jnp.float16
        np.testing.assert_allclose(losses[1], by_hand(0.25, 1), rtol=2e-3)
        assert np.isfinite(losses).all()
        assert np.isfinite(slopes).all()

    @of_each
    def test_holds_what_was_observed_constant(self, name):
        @jax.jit
        def gradients(*args):
            loss = LOSSES[name][0]
            free = functools.partial(loss, use_stop_gradient=False)
            return [jax.grad(fn, (0, 1, 2))(*args) for fn in (loss, free)]

        held, flows = gradients(jnp.array([0.1]), jnp.array([0.05]), jnp.ones(1))
        assert [bool(x[0]) for x in held] == [True, False, False]
        assert [bool(x[0]) for x in flows] == [True, True, True]
        assert (held[0], flows[1]) == (flows[0], -flows[0])


class TestPpoClip:
    def test_is_the_loss_of_ratios(self, rng):
        behaviour, step, adv = rng.normal(size=(3, 50)).astype(np.float32)
        expected = clipped_surrogate_pg_loss(np.exp(step), adv, 0.3)
        loss = ppo_clip_loss(behaviour + step, behaviour, adv, epsilon=0.3)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)

    def test_has_no_gradient_beyond_the_clip_and_one_on_the_way_back(self):
        log_prob, adv = np.log([1.3, 0.7, 1.3, 0.7]), [1, -1, -1, 1]
        _, slopes = losses_and_slopes(ppo_clip_loss, log_prob, 0, adv)
        np.testing.assert_allclose(slopes, [0, 0, 1.3, -0.7], rtol=1e-6)

    def test_of_overflow_only_a_bad_action_is_infinite_and_a_dual_clip_bounds_it(self):
        args = ppo_clip_loss, 1e3, 0, [2, -2]
        losses, slopes = losses_and_slopes(*args)
        np.testing.assert_allclose(losses, [-2.4, INFINITY], rtol=1e-6)
        assert not slopes.any()
        losses, slopes = losses_and_slopes(*args, dual_clip=3.0)
        np.testing.assert_allclose(losses, [-2.4, 6], rtol=1e-6)
        assert not slopes.any()

    def test_takes_bounds_for_each_step(self):
        loss = ppo_clip_loss(
            jnp.log(jnp.full(3, 4.0)),
            jnp.zeros(3),
            jnp.array([1.0, 1.0, -1.0]),
            epsilon_high=jnp.array([0.5, 1.0, 1.0]),
            dual_clip=jnp.array([2.0, 2.0, 2.0]),
            reduction="none",
        )
        np.testing.assert_allclose(loss, [-1.5, -2, 2], rtol=1e-6)

    def test_a_dual_clip_must_be_above_one(self):
        message = r"ppo_clip_loss: dual_clip must be in \(1, inf\], got 1.0"
        with pytest.raises(ValueError, match=message):
            ppo_clip_loss(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), dual_clip=1.0)

    def test_what_is_not_a_number_is_not_hidden(self):
        nan, one = jnp.array([jnp.nan]), jnp.ones(1)
        assert np.isnan(ppo_clip_loss(nan, one, one))
        assert np.isnan(ppo_clip_loss(one, one, nan))

    def test_objective_of_ratios_is_for_any_ratio(self):
        """That of a whole sequence, say."""
        ratios, adv = jnp.array([0.5, 2.0, 9.0]), jnp.array([-1.0, 1.0, -1.0])
        gains = clipped_objective(ratios, adv, 0.8, 1.2, 4.0)
        np.testing.assert_allclose(gains, [-0.8, 1.2, -4], rtol=1e-6)


class TestPenalty:
    def test_lets_gradients_through_the_divergence(self):
        args = jnp.zeros(2), jnp.zeros(2), jnp.ones(2), jnp.ones(2)
        by_kl = jax.grad(ppo_kl_penalty_loss, 3)
        assert by_kl(*args, kl_coefficient=3.0).tolist() == [1.5, 1.5]

    def test_a_weight_of_zero_leaves_the_divergence_out(self):
        kl = jnp.array([jnp.nan, jnp.inf])
        args = jnp.zeros(2), jnp.zeros(2), jnp.ones(2), kl
        fn = jax.value_and_grad(ppo_kl_penalty_loss, 3)
        value, slopes = fn(*args, kl_coefficient=0.0)
        assert (value, slopes.tolist()) == (-1, [0, 0])

    def test_the_gradient_of_its_weight_knows_no_padding(self):
        def loss(kl_coefficient):
            return ppo_kl_penalty_loss(
                *jnp.zeros((3, 2)),
                jnp.array([3.0, jnp.nan]),
                kl_coefficient=kl_coefficient,
                mask_t=jnp.array([True, False]),
            )

        assert jax.value_and_grad(loss)(2.0) == (6, 3)


class TestDiscovered:
    def test_gains_at_most_alpha(self):
        losses, slopes = losses_and_slopes(
            discovered_policy_optimization_loss, [10, 100, INFINITY], 0, 0.5, alpha=3.0
        )
        np.testing.assert_allclose(losses, np.full(3, -3.5), rtol=1e-6)
        assert not slopes.any()

    def test_pulls_a_bad_action_back_that_has_become_too_unlikely(self):
        _, slopes = losses_and_slopes(
            discovered_policy_optimization_loss, [-0.1, -5], 0, -1
        )
        assert slopes[0] > 0 > slopes[1]


class TestSimple:
    @pytest.mark.parametrize("adv", [1, -1])
    def test_is_best_at_the_edge_of_the_clip(self, adv):
        best = math.log(1 + 0.25 * adv)
        log_prob = [best, best + 0.1, best - 0.1]
        losses, slopes = losses_and_slopes(
            simple_policy_optimization_loss, log_prob, 0, adv, epsilon=0.25
        )
        assert losses.argmin() == 0
        np.testing.assert_allclose(slopes[0], 0, atol=1e-6)
        assert slopes[2] < 0 < slopes[1]

    def test_an_infinite_epsilon_is_no_limit(self):
        loss = simple_policy_optimization_loss(
            jnp.log(jnp.array([3.0])), jnp.zeros(1), jnp.array([2.0]), epsilon=INFINITY
        )
        np.testing.assert_allclose(loss, -6, rtol=1e-6)


class TestPolicyGradient:
    def test_is_that_of_logits(self, rng):
        logits = rng.normal(size=(6, 3)).astype(np.float32)
        actions, adv, weights = rng.integers(3, size=6), *rng.normal(size=(2, 6))
        adv, weights = np.float32(adv), np.float32(weights)

        def from_log_probs(logits):
            log_probs = jax.nn.log_softmax(logits)[np.arange(6), actions]
            return log_prob_policy_gradient_loss(log_probs, adv, rho_t=weights)

        def from_logits(logits):
            return policy_gradient_loss(logits, actions, adv, weights)

        result, expected = (
            jax.value_and_grad(fn)(logits) for fn in (from_log_probs, from_logits)
        )
        np.testing.assert_allclose(result[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(result[1], expected[1], rtol=1e-4, atol=1e-6)

    def test_a_weight_of_zero_leaves_a_step_out(self):
        log_prob, rho = jnp.array([-jnp.inf, -1.0, -2.0]), jnp.array([1.0, 0.0, 1.0])
        adv = jnp.array([0.0, jnp.nan, 3.0])
        for stop in (True, False):
            fn = functools.partial(
                log_prob_policy_gradient_loss, use_stop_gradient=stop, reduction="sum"
            )
            value, slopes = jax.value_and_grad(fn)(log_prob, adv, rho_t=rho)
            assert (value, slopes.tolist()) == (6, [0, 0, -3])

    def test_padding_counts_for_nothing(self):
        nan = jnp.array([jnp.nan, 2.0])
        mask = jnp.array([False, True])

        def loss(log_prob, adv, rho):
            return log_prob_policy_gradient_loss(
                log_prob, adv, rho_t=rho, mask_t=mask, use_stop_gradient=False
            )

        value, slopes = jax.value_and_grad(loss, (0, 1, 2))(nan, nan, nan)
        assert value == -8
        assert [x.tolist() for x in slopes] == 3 * [[0, -4]]

    def test_holds_what_scores_an_action_constant(self):
        two = jnp.full(1, 2.0)
        loss = lambda x, adv, rho: log_prob_policy_gradient_loss(x, adv, rho_t=rho)
        slopes = jax.grad(loss, (0, 1, 2))(two, two, two)
        assert [x.item() for x in slopes] == [-4, 0, 0]

    def test_of_no_importance_weights_is_that_of_ones(self):
        log_prob, adv = jnp.array([-1.0, -2.0]), jnp.array([3.0, -1.0])
        assert log_prob_policy_gradient_loss(log_prob, adv) == 0.5
        assert log_prob_policy_gradient_loss(log_prob, adv, rho_t=jnp.ones(2)) == 0.5

"""V-MPO, against a plain reading of the paper, step by step."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from rlprims import (
    LagrangePenalty,
    get_top_k_weights,
    vmpo_compute_weights_and_temperature_loss,
    vmpo_loss,
)
from rlprims.vmpo import _kth_largest_by_bits, _kth_largest_by_sorting

T = 8
POSITIVE = functools.partial(jnp.clip, min=1e-10)
NAN, INFINITY = math.nan, math.inf


def floats(*values):
    return jnp.asarray(values, jnp.float32)


def top_by_hand(advantages, counts, fraction):
    """Which steps are in the top fraction of those that count."""
    ranked = sorted((x for x, c in zip(advantages, counts, strict=True) if c))[::-1]
    k = max(1, math.floor(fraction * len(ranked) + 1e-5))
    return [
        bool(c) and x >= ranked[k - 1] for x, c in zip(advantages, counts, strict=True)
    ]


def by_hand(advantages, restarting, importance, temperature, epsilon, fraction):
    """The loss of the temperature, weights and their number, in double precision."""
    steps = list(
        zip(*map(np.float64, (advantages, restarting, importance)), strict=True)
    )
    ranks = [a if rho else -INFINITY for a, _, rho in steps]
    top = top_by_hand(ranks, restarting, fraction)
    exps = [
        w * rho * math.exp(a / temperature) if chosen and w * rho else 0.0
        for (a, w, rho), chosen in zip(steps, top, strict=True)
    ]
    samples = sum(w for (_, w, _), chosen in zip(steps, top, strict=True) if chosen)
    loss = temperature * (epsilon + math.log(sum(exps) / samples))
    return loss, [e / sum(exps) for e in exps], samples


def weights_and_loss(
    advantages, restarting=None, importance=None, temperature=0.5, **given
):
    ones = jnp.ones_like(advantages)
    arguments = {"top_k_fraction": 0.5, "projection_operator": POSITIVE} | given
    return vmpo_compute_weights_and_temperature_loss(
        advantages,
        ones if restarting is None else restarting,
        ones if importance is None else importance,
        LagrangePenalty(temperature, 0.1),
        **arguments,
    )


class TestTopK:
    @pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
    def test_leaves_the_best_steps(self, rng, fraction):
        advantages, weights = np.float32(rng.normal(size=(2, T)))
        weights = np.where(np.arange(T) < 2, 0, np.abs(weights))
        expected = np.where(top_by_hand(advantages, weights, fraction), weights, 0)
        result = get_top_k_weights(fraction, weights, advantages)
        np.testing.assert_array_equal(result, expected)

    def test_every_fraction_of_a_hundred_is_as_many(self):
        ones, advantages = np.ones(100, np.float32), np.arange(100, dtype=np.float32)
        call = jax.jit(
            jax.vmap(
                lambda fraction: get_top_k_weights(fraction, ones, advantages).sum()
            )
        )
        counts = np.arange(1, 101)
        np.testing.assert_array_equal(call(np.float32(counts / 100)), counts)
        assert get_top_k_weights(0.29, ones, advantages).sum() == 29

    def test_at_least_one_is_chosen(self):
        assert get_top_k_weights(0.1, jnp.ones(3), floats(1, 3, 2)).tolist() == [
            0,
            1,
            0,
        ]

    def test_ties_are_all_chosen(self):
        ones = jnp.ones(5)
        result = get_top_k_weights(0.4, ones, floats(-0.0, 1, 0, -1, 0))
        assert result.tolist() == [1, 1, 1, 0, 1]

    @pytest.mark.parametrize("bad", [NAN, INFINITY, 1e30])
    def test_what_does_not_count_is_as_if_left_out(self, bad):
        advantages = floats(1, bad, 3, 2, bad, 4)
        counts = np.array([True, False, True, True, False, True])
        expected = [0, 0, 1, 0, 0, 1]
        result = get_top_k_weights(0.5, np.float32(counts), advantages)
        assert result.tolist() == expected
        result = get_top_k_weights(0.5, jnp.ones(6), advantages, mask_t=counts)
        assert result.tolist() == expected

    def test_of_nothing_is_nothing(self):
        assert get_top_k_weights(0.5, jnp.zeros(2), floats(1, 2)).tolist() == [0, 0]
        assert get_top_k_weights(0.5, jnp.zeros(0), jnp.zeros(0)).tolist() == []

    def test_what_is_no_number_ranks_first_and_so_shows(self):
        for nan in (NAN, -NAN):
            result = get_top_k_weights(0.25, jnp.ones(4), floats(1, nan, 9, INFINITY))
            assert result[1] == 1

    def test_steps_may_lie_along_several_axes(self, rng):
        advantages = np.float32(rng.normal(size=(4, 2)))
        ones = np.ones((4, 2), np.float32)
        flat = get_top_k_weights(0.5, ones.ravel(), advantages.ravel())
        result = get_top_k_weights(0.5, ones, advantages)
        np.testing.assert_array_equal(result.ravel(), flat)

    def test_a_fraction_out_of_range_is_refused(self):
        with pytest.raises(
            ValueError, match=r"top_k_fraction must be in \(0, 1\], got"
        ):
            get_top_k_weights(1.5, jnp.ones(2), jnp.ones(2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(allow_nan=False, width=32), min_size=9, max_size=9),
    st.integers(1, 9),
)
def test_both_ways_to_select_agree_with_sorting(values, k):
    """As unsigned integers; which of them runs depends on the platform."""
    keys = np.float32(values).view(np.uint32)
    expected = np.sort(keys)[9 - k]
    assert jax.jit(_kth_largest_by_bits)(keys, k) == expected
    assert jax.jit(_kth_largest_by_sorting)(keys, k) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(allow_nan=False, width=32), min_size=8, max_size=8))
def test_any_floats_are_ranked_as_numbers_are(values):
    values = np.float32(values)
    result = get_top_k_weights(0.375, np.ones(8, np.float32), values)
    np.testing.assert_array_equal(result, values >= np.sort(values)[5])


class TestWeightsAndTemperature:
    @pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
    @pytest.mark.parametrize("temperature", [0.3, 2.0])
    def test_are_what_the_paper_says(self, rng, fraction, temperature):
        advantages = np.float32(rng.normal(size=T))
        restarting = np.float32([1, 0, 1, 1, 1, 0, 1, 1])
        importance = np.float32(rng.uniform(0.5, 2, size=T))
        given = advantages, restarting, importance
        result = weights_and_loss(*given, temperature, top_k_fraction=fraction)
        expected = by_hand(*given, temperature, 0.1, fraction)
        for x, y in zip(result, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)

    def test_a_restarting_weight_weighs_the_step_and_not_its_advantage(self):
        given = floats(1, 2, 3), floats(0.5, 1, 0.25), jnp.ones(3)
        result = weights_and_loss(*given, top_k_fraction=1.0)
        for x, y in zip(result, by_hand(*given, 0.5, 0.1, 1.0), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)

    def test_the_dual_is_least_where_the_divergence_is_the_limit(self):
        with jax.enable_x64(True):
            advantages, epsilon = np.array([0.3, -1.2, 0.8, 2.0, 1.1, -3.0]), 0.1
            grid = np.geomspace(0.2, 20, 2001)
            call = lambda t: weights_and_loss(advantages, temperature=t)
            slopes = jax.vmap(jax.grad(lambda t: call(t)[0]))(grid)
            weights = np.asarray(jax.vmap(lambda t: call(t)[1])(grid))
            logs = np.log(np.where(weights > 0, weights * 3, 1))
            divergence = np.sum(weights * logs, axis=-1)
            np.testing.assert_allclose(slopes, epsilon - divergence, atol=1e-10)

    @pytest.mark.parametrize("bad", [5.0, 1e30, NAN, INFINITY, -INFINITY])
    @pytest.mark.parametrize("how", ["restart", "mask"])
    def test_what_does_not_count_is_as_if_left_out(self, bad, how):
        advantages = floats(-1000, -1001, bad, -1002, bad, -1003)
        kept = np.array([True, True, False, True, False, True])
        importance = jnp.where(kept, 1.0, bad)

        def call(temperature, advantages, **given):
            loss, weights, _ = weights_and_loss(
                advantages, temperature=temperature, use_stop_gradient=False, **given
            )
            return loss + weights[0], weights

        if how == "mask":
            given = {"mask_t": kept, "importance": importance}
        else:
            given = {"restarting": np.float32(kept), "importance": importance}
        value, gradients = jax.value_and_grad(call, (0, 1), has_aux=True)(
            1.0, advantages, **given
        )
        expected, slopes = jax.value_and_grad(call, (0, 1), has_aux=True)(
            1.0, advantages[kept]
        )
        np.testing.assert_allclose(value[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(value[1][kept], expected[1], rtol=1e-6)
        assert not value[1][~kept].any()
        np.testing.assert_allclose(gradients[0], slopes[0], rtol=1e-5)
        np.testing.assert_allclose(gradients[1][kept], slopes[1], rtol=1e-5)
        assert not gradients[1][~kept].any()

    @pytest.mark.parametrize("bad", [1e4, 1e30, NAN, INFINITY])
    @pytest.mark.parametrize("fraction", [0.5, 1.0])
    def test_a_step_of_no_importance_is_a_sample_without_a_say(self, bad, fraction):
        def call(temperature, advantages):
            result = weights_and_loss(
                advantages,
                None,
                floats(0, 1, 1, 1),
                temperature,
                top_k_fraction=fraction,
                use_stop_gradient=False,
            )
            return result[0] + result[1][-1], result

        compute = jax.value_and_grad(call, (0, 1), has_aux=True)
        (_, result), gradients = compute(1.0, floats(bad, 1, 2, 3))
        (_, low), slopes = compute(1.0, floats(-bad, 1, 2, 3))
        (_, ordinary), _ = compute(1.0, floats(0, 1, 2, 3))
        exps = np.exp([1.0, 2, 3]) if fraction == 1 else np.exp([2.0, 3])
        samples = 4 * fraction
        expected = 0.1 + math.log(exps.sum() / samples), samples
        for loss, weights, count in (result, low, ordinary):
            np.testing.assert_allclose([loss, count], expected, rtol=1e-6)
            np.testing.assert_allclose(weights[-1], exps[-1] / exps.sum(), rtol=1e-6)
        for x, y in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
        assert gradients[1][0] == 0

    def test_the_slope_by_an_importance_of_zero_is_that_next_to_it(self):
        def loss(importance):
            return weights_and_loss(
                floats(1, 2, 3),
                None,
                jnp.stack([importance, 1.0, 1.0]),
                1.0,
                top_k_fraction=1.0,
                use_stop_gradient=False,
            )[0]

        expected = math.exp(1) / (math.exp(2) + math.exp(3))
        np.testing.assert_allclose(jax.grad(loss)(0.0), expected, rtol=1e-5)

    def test_an_infinitesimal_temperature_still_finds_the_best(self):
        loss, weights, _ = weights_and_loss(
            floats(-1000, -1001, 5, 3e4), temperature=0.0
        )
        assert weights.tolist() == [0, 0, 0, 1]
        np.testing.assert_allclose(loss, 3e4, rtol=1e-6)

    def test_half_precision_keeps_its_range(self):
        advantages = floats(1, 2, 3, 4).astype(jnp.float16)
        restarting = floats(1, 1, 0, 1).astype(jnp.float16)
        result = weights_and_loss(advantages, restarting, top_k_fraction=1.0)
        expected = by_hand([1, 2, 3, 4], [1, 1, 0, 1], [1] * 4, 0.5, 0.1, 1.0)
        for x, y in zip(result, expected, strict=True):
            assert x.dtype == jnp.float16
            np.testing.assert_allclose(x, y, rtol=2e-3)

    def test_without_steps_there_is_nothing_to_learn(self):
        def loss(temperature, advantages, mask_t):
            return weights_and_loss(advantages, temperature=temperature, mask_t=mask_t)

        for mask_t in (np.zeros(2, bool), np.zeros(0, bool)):
            nothing = np.full(mask_t.shape, NAN, np.float32)
            for x in jax.tree.leaves(loss(1.0, nothing, mask_t)):
                assert not np.any(x)
            gradient = jax.grad(lambda *args: loss(*args)[0])(1.0, nothing, mask_t)
            assert gradient == 0

    @pytest.mark.parametrize("stop", [True, False])
    def test_the_flag_stops_what_flows_to_the_data(self, stop):
        def total(advantages, importance, temperature, part):
            result = weights_and_loss(
                advantages, None, importance, temperature, use_stop_gradient=stop
            )
            result = jnp.ravel(result[part])
            return jnp.vdot(result, jnp.cos(jnp.arange(1.0, 1 + result.size)))

        slopes = jax.grad(total, (0, 1, 2))
        args = floats(1, 2, 3, 4), jnp.ones(4), 0.5
        reached = [[bool(np.any(x)) for x in slopes(*args, part)] for part in (0, 1)]
        to_temperature_alone = [[False, False, True], [False] * 3]
        assert reached == (to_temperature_alone if stop else [[True] * 3] * 2)

    def test_the_fraction_may_be_traced(self):
        call = lambda fraction: weights_and_loss(
            floats(1, 2, 3, 4), top_k_fraction=fraction
        )[2]
        assert jax.vmap(call)(floats(0.25, 0.5, 1)).tolist() == [1, 2, 4]

    def test_a_penalty_may_come_out_of_a_compiled_function(self):
        call = jax.jit(
            lambda penalty: vmpo_compute_weights_and_temperature_loss(
                floats(1, 2), jnp.ones(2), jnp.ones(2), penalty, POSITIVE, 0.5
            )
        )
        assert call(LagrangePenalty(1.0, 0.1))[1].tolist() == [0, 1]


@pytest.fixture
def steps(rng):
    log_probs, advantages = np.float32(rng.normal(size=(2, T)))
    kl, kl_each = np.float32(rng.uniform(size=T)), np.float32(rng.uniform(size=(T, 3)))
    return log_probs, advantages, kl, kl_each


ALPHAS = np.float32(0.7), np.float32([0.3, 0.5, 1.2])


def call(log_probs, advantages, kl, kl_each, temperature=0.5, alphas=ALPHAS, **given):
    constraints = [
        (kl, LagrangePenalty(alphas[0], 0.3)),
        (kl_each, LagrangePenalty(alphas[1], 0.2, per_dimension=True)),
    ]
    return vmpo_loss(
        log_probs, advantages, LagrangePenalty(temperature, 0.1), constraints, **given
    )


class TestVMPOLoss:
    def test_its_mean_is_what_the_paper_says(self, rng, steps):
        log_probs, advantages, kl, kl_each = map(np.float64, steps)
        restarting = np.float32([1, 0, 1, 1, 1, 0, 1, 1])
        importance = np.float32(rng.uniform(0.5, 2, size=T))
        loss, outputs = call(
            *steps,
            restarting_weights=restarting,
            importance_weights=importance,
            policy_loss_weight=2.0,
            temperature_loss_weight=3.0,
            kl_loss_weight=5.0,
            alpha_loss_weight=7.0,
        )
        dual, weights, samples = by_hand(
            advantages, restarting, importance, 0.5, 0.1, 0.5
        )
        policy = -sum(w * x for w, x in zip(weights, log_probs, strict=True))
        alpha, alphas = np.float64(ALPHAS[0]), np.float64(ALPHAS[1])
        penalty = alpha * kl + kl_each @ alphas
        alpha_loss = alpha * (0.3 - kl) + (0.2 - kl_each) @ alphas
        np.testing.assert_allclose(outputs.temperature_loss, dual, rtol=1e-5)
        np.testing.assert_allclose(outputs.policy_loss.mean(), policy, rtol=1e-5)
        np.testing.assert_allclose(outputs.kl_loss, penalty, rtol=1e-5)
        np.testing.assert_allclose(outputs.alpha_loss, alpha_loss, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(outputs.normalized_weights, weights, rtol=1e-5)
        assert float(outputs.num_samples) == samples
        total = 2 * policy + 3 * dual + 5 * penalty.mean() + 7 * alpha_loss.mean()
        np.testing.assert_allclose(loss.mean(), total, rtol=1e-5)

    def test_steps_may_lie_along_several_axes(self, steps):
        folded = [x.reshape(4, 2, *x.shape[1:]) for x in steps]
        loss, _ = call(*folded)
        np.testing.assert_allclose(loss, call(*steps)[0].reshape(4, 2), rtol=1e-6)

    def test_needs_no_constraints(self, steps):
        loss, outputs = vmpo_loss(*steps[:2], LagrangePenalty(0.5, 0.1), [])
        total = outputs.policy_loss + outputs.temperature_loss
        np.testing.assert_allclose(loss, total, rtol=1e-6)
        assert outputs.kl_loss.tolist() == outputs.alpha_loss.tolist() == [0] * T

    def test_masked_steps_are_as_if_left_out(self, steps):
        """In the mean over those that count, and in its gradient."""
        kept = np.array([True, False, True, True, False, True, True, True])
        spoilt = [
            np.where(kept.reshape(-1, *[1] * (x.ndim - 1)), x, NAN) for x in steps
        ]

        def mean(steps, temperature, alphas, mask_t=None):
            loss, _ = call(*steps, temperature, alphas, mask_t=mask_t)
            return jnp.sum(loss) / (loss.size if mask_t is None else float(sum(mask_t)))

        compute = jax.value_and_grad(mean, (0, 1, 2))
        value, gradients = compute(spoilt, 0.5, ALPHAS, kept)
        expected, slopes = compute([x[kept] for x in steps], 0.5, ALPHAS)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
        close(value, expected)
        jax.tree.map(close, gradients[1:], slopes[1:])
        for x, y in zip(gradients[0], slopes[0], strict=True):
            close(x[kept], y)
            assert not x[~kept].any()
        loss, outputs = call(*spoilt, mask_t=kept)
        for x in (loss, *outputs[1:5]):
            assert not x[~kept].any()

    def test_a_log_probability_does_not_count_where_its_weight_is_zero(self, steps):
        log_probs, *others = steps
        weights = call(*steps)[1].normalized_weights
        spoilt = np.where(weights == 0, -INFINITY, log_probs)
        total = lambda log_probs: call(log_probs, *others)[0].mean()
        assert (weights == 0).sum() == 4
        assert total(spoilt) == total(log_probs)
        np.testing.assert_array_equal(
            jax.grad(total)(spoilt), jax.grad(total)(log_probs)
        )

    @pytest.mark.parametrize("stop", [True, False])
    @pytest.mark.parametrize("bad", [NAN, INFINITY])
    def test_a_step_of_loss_weight_zero_leaks_nothing(self, steps, bad, stop):
        log_probs, advantages, kl, kl_each = steps
        best = np.argmax(advantages)
        counts = np.float32(np.arange(T) != best)
        names = "policy_loss_weight", "kl_loss_weight", "alpha_loss_weight"

        def total(args, advantages, temperature, alphas):
            weights = dict.fromkeys(names, counts) | {"use_stop_gradient": stop}
            given = args[0], advantages, *args[1:], temperature, alphas
            return call(*given, **weights)[0].sum()

        spoilt = tuple(x.copy() for x in (log_probs, kl, kl_each))
        for x in spoilt:
            x[best] = bad
        others = advantages, 0.5, ALPHAS
        whole = log_probs.copy(), kl, kl_each
        whole[0][best] = 0
        run = jax.value_and_grad(total, (0, 1, 2, 3))
        result, expected = run(spoilt, *others), run(whole, *others)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, result, expected)

    @pytest.mark.parametrize("stop", [True, False])
    def test_advantages_are_constants_if_told(self, steps, stop):
        log_probs, advantages, *kl = steps
        total = lambda x: call(log_probs, x, *kl, use_stop_gradient=stop)[0].mean()
        assert bool(np.any(jax.grad(total)(advantages))) != stop

    def test_says_what_is_wrong(self, steps):
        log_probs, advantages, kl, kl_each = steps
        for args, changes, message in [
            ((log_probs[:1], advantages, kl, kl_each), {}, "advantages has shape (8,)"),
            ((*steps[:2], kl[:1], kl_each), {}, "kl_constraints[0][0] has shape (1,)"),
            (steps, {"top_k_fraction": 0.0}, "top_k_fraction must be in (0, 1], got"),
            (steps, {"mask_t": kl}, "mask_t must be boolean"),
            (steps, {"temperature": kl}, "temperature_constraint.alpha has shape (8,)"),
            (steps, {"projection_operator": 1.0}, "projection_operator must be a"),
        ]:
            with pytest.raises((TypeError, ValueError)) as error:
                call(*args, **changes)
            assert str(error.value).startswith(f"vmpo_loss: {message}")

    def test_float32_stays_under_x64(self, steps):
        with jax.enable_x64(True):
            loss, outputs = call(*steps)
            assert {x.dtype for x in (loss, *outputs)} == {jnp.dtype("float32")}


def mean_and_gradients(steps, temperature, restarting, mask_t, axis_name=None):
    """Of each device's steps; the mean over the devices is that over all steps."""

    def mean(log_probs, temperature):
        loss, outputs = call(
            log_probs,
            *steps[1:],
            temperature,
            axis_name=axis_name,
            restarting_weights=restarting,
            mask_t=mask_t,
        )
        return jnp.sum(loss), outputs

    compute = jax.value_and_grad(mean, (0, 1), has_aux=True)
    return compute(steps[0], temperature)


class TestDevices:
    """Statistics over two devices are those of one that holds all the data."""

    @pytest.fixture
    def shared(self, steps):
        restarting = np.float32([1, 0, 1, 1, 1, 1, 1, 1])
        mask_t = np.array([True, True, False, False, True, True, True, True])
        return steps, restarting, mask_t

    @pytest.mark.parametrize("transform", [jax.vmap, jax.pmap])
    def test_each_gets_its_part(self, shared, transform):
        steps, restarting, mask_t = shared
        (total, outputs), (by_log_probs, by_temperature) = mean_and_gradients(
            steps, 0.5, restarting, mask_t
        )
        halves = jax.tree.map(
            lambda x: x.reshape(2, 4, *x.shape[1:]), (steps, restarting, mask_t)
        )
        fn = lambda steps, restarting, mask_t: mean_and_gradients(
            steps, jnp.float32(0.5), restarting, mask_t, "i"
        )
        (totals, parts), slopes = transform(fn, axis_name="i")(*halves)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        close(np.sum(totals), total)
        close(np.ravel(parts.normalized_weights), outputs.normalized_weights)
        close(np.ravel(parts.policy_loss), outputs.policy_loss)
        close(parts.temperature_loss, [outputs.temperature_loss] * 2)
        close(parts.num_samples, [outputs.num_samples] * 2)
        close(np.ravel(slopes[0]), by_log_probs)
        # A gradient of what all devices share is the sum over them, on average.
        close(np.sum(slopes[1]), by_temperature)

    def test_inside_shard_map(self, shared):
        steps, restarting, mask_t = shared
        mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
        spec = PartitionSpec("i")

        def losses(steps, restarting, mask_t, temperature):
            return call(
                *steps,
                temperature,
                axis_name="i",
                restarting_weights=restarting,
                mask_t=mask_t,
            )[0]

        spread = jax.shard_map(
            losses, mesh=mesh, in_specs=(spec, spec, spec, None), out_specs=spec
        )
        total = lambda log_probs, temperature: jnp.sum(
            spread([log_probs, *steps[1:]], restarting, mask_t, temperature)
        )
        (expected, _), slopes = mean_and_gradients(steps, 0.5, restarting, mask_t)
        args = steps[0], jnp.float32(0.5)
        value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(*args)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for x, y in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
    def test_the_best_are_those_of_all_devices(self, rng, fraction):
        advantages = np.float32(rng.normal(size=T) + np.arange(T))
        restarting = np.float32([1, 0, 1, 1, 1, 1, 1, 1])
        expected = get_top_k_weights(fraction, restarting, advantages)
        fn = functools.partial(get_top_k_weights, fraction, axis_name="i")
        halves = restarting.reshape(2, 4), advantages.reshape(2, 4)
        result = jax.pmap(fn, axis_name="i")(*halves)
        np.testing.assert_array_equal(np.ravel(result), expected)


COMPILED = []


def listen(event, duration_secs, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(details.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(listen)


def test_an_eager_call_compiles_once(steps):
    fractions = itertools.count(1)
    again = lambda: call(*steps, top_k_fraction=1 / (1 + next(fractions)))
    again()
    assert COMPILED
    COMPILED.clear()
    again()
    again()
    assert not COMPILED

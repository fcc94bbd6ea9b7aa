"""Continuous control, against the definitions, one action at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    add_gaussian_noise,
    clipped_double_q_learning,
    dpg_loss,
    inverted_gradients,
    inverted_gradients_dpg_loss,
    smoothed_target_action,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

KEY = jax.random.key(11)
BAD = [np.nan, np.inf, -np.inf]
LOW, HIGH = np.float32([-1, 0, -0.3]), np.float32([1, 10, 0.7])
BOUNDS = {"minimum": LOW, "maximum": HIGH}
UNIT = {"minimum": -1.0, "maximum": 1.0}


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


class TestClippedDoubleQLearning:
    def test_every_critic_learns_from_the_least_target(self, rng):
        q_tm1, q_t = (rng.normal(size=(n, 2, 3)).astype(np.float32) for n in (2, 5))
        r_t, discount_t = rng.normal(size=(2, 2, 3)).astype(np.float32)
        errors = np.asarray(clipped_double_q_learning(q_tm1, r_t, discount_t, q_t))
        for i in np.ndindex(errors.shape):
            least = min(float(q[i[1:]]) for q in q_t)
            same(errors[i], r_t[i[1:]] + discount_t[i[1:]] * least - q_tm1[i])

    def test_critics_of_one_transition_are_a_vector(self):
        q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([6.0, 4.0])
        assert clipped_double_q_learning(q_tm1, 1.0, 0.5, q_t).tolist() == [2, 1]

    def test_one_critic_learns_as_if_there_were_no_ensemble(self):
        args = jnp.array([1.0]), 1.0, 0.5, jnp.array([6.0])
        assert clipped_double_q_learning(*args).tolist() == [3]

    def test_gradients_flow_to_predictions_and_to_the_least_target_if_told(self):
        args = (
            jnp.ones((2, 1)),
            jnp.ones(1),
            jnp.full(1, 0.5),
            jnp.array([[6.0], [4.0]]),
        )

        def slopes(stop):
            fn = functools.partial(
                clipped_double_q_learning, stop_target_gradients=stop
            )
            return jax.grad(lambda *args: fn(*args).sum(), (0, 1, 2, 3))(*args)

        on, off = slopes(True), slopes(False)
        flat = lambda slopes: [slope.ravel().tolist() for slope in slopes]
        assert flat(on) == [[-1, -1], [0], [0], [0, 0]]
        assert flat(off) == [[-1, -1], [2], [8], [0, 1]]

    @pytest.mark.parametrize("bad", BAD)
    def test_nothing_leaks_from_behind_the_end(self, bad):
        q_t = jnp.array([[bad, 4.0], [3.0, 5.0]])

        def total(*args):
            errors = clipped_double_q_learning(*args, stop_target_gradients=False)
            return errors.sum(), errors

        args = jnp.ones((2, 2)), jnp.ones(2), jnp.array([0.0, 0.5]), q_t
        slopes, errors = jax.grad(total, (0, 1, 2, 3), has_aux=True)(*args)
        same(errors, [[0, 2], [0, 2]])
        assert all(np.isfinite(slope).all() for slope in slopes)
        same(slopes[3], [[0, 1], [0, 0]])


class TestSmoothedTargetAction:
    def test_adds_clipped_noise_within_bounds(self, rng):
        action = rng.uniform(LOW - 0.1, HIGH + 0.1, size=(500, 3)).astype(np.float32)
        sigma, limit = np.float32([0.2, 2.0, 0.1]), np.float32([0.5, 3.0, 0.05])
        tuning = {"sigma": sigma, "noise_clip": limit}
        smoothed = smoothed_target_action(KEY, action, **tuning, **BOUNDS)
        drawn = sigma * np.asarray(jax.random.normal(KEY, (500, 3), np.float32))
        noise = np.maximum(np.minimum(drawn, limit), -limit)
        same(smoothed, np.maximum(np.minimum(action + noise, HIGH), LOW))
        assert (np.abs(drawn) > limit).any(axis=0).all()

    def test_the_paper_draws_with_a_fifth_and_clips_at_a_half(self):
        noise = np.asarray(smoothed_target_action(KEY, jnp.zeros((20_000, 1)), **UNIT))
        assert noise.min() == -0.5
        assert noise.max() == 0.5
        inside = np.abs(noise) < 0.3
        p = math.erf(1.5 / math.sqrt(2))  # within one and a half deviations
        assert abs(inside.mean() - p) < 4 * math.sqrt(p * (1 - p) / 20_000)
        assert abs(noise.mean()) < 4 * 0.2 / math.sqrt(20_000)

    def test_without_limits_it_is_gaussian_noise(self, rng):
        action = rng.normal(size=(4, 3)).astype(np.float32)
        free = {"noise_clip": math.inf, "minimum": -math.inf, "maximum": math.inf}
        smoothed = smoothed_target_action(KEY, action, sigma=0.7, **free)
        same(smoothed, add_gaussian_noise(KEY, action, 0.7))

    def test_without_noise_it_clips_to_the_bounds(self):
        action = jnp.array([-3.0, 0.5, 3.0])
        for tuning in ({"sigma": 0.0}, {"noise_clip": 0.0}):
            smoothed = smoothed_target_action(KEY, action, **tuning, **UNIT)
            assert smoothed.tolist() == [-1, 0.5, 1]

    def test_equal_bounds_leave_one_action_and_crossed_ones_none(self):
        minimum, maximum = jnp.array([0.5, 1.0]), jnp.array([0.5, 0.0])
        bounds = {"minimum": minimum, "maximum": maximum}
        same(smoothed_target_action(KEY, jnp.zeros(2), **bounds), [0.5, np.nan])

    def test_old_keys_draw_the_same(self):
        old, new = (
            smoothed_target_action(make(1), jnp.zeros(3), **UNIT)
            for make in (jax.random.PRNGKey, jax.random.key)
        )
        np.testing.assert_array_equal(old, new)

    def test_half_precision_stays_within_bounds(self):
        action = jnp.linspace(-1, 1, 3000, dtype=jnp.bfloat16).reshape(-1, 3)
        bounds = {"minimum": jnp.bfloat16(-0.3), "maximum": jnp.bfloat16(0.7)}
        smoothed = smoothed_target_action(KEY, action, **bounds)
        assert smoothed.dtype == jnp.bfloat16
        assert (smoothed >= bounds["minimum"]).all()
        assert (smoothed <= bounds["maximum"]).all()

    def test_bounds_must_be_given(self):
        with pytest.raises(
            TypeError, match="smoothed_target_action: missing a required"
        ):
            smoothed_target_action(KEY, jnp.zeros(3))

    @pytest.mark.parametrize("name", ["sigma", "noise_clip"])
    def test_a_negative_size_is_refused(self, name):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, inf.*, got -1"):
            smoothed_target_action(KEY, jnp.zeros(3), **UNIT, **{name: -1.0})


def inverted_by_hand(a, slope, low, high):
    room = high - a if slope > 0 else a - low
    return slope * room / (high - low)


class TestInvertedGradients:
    def test_scales_by_the_room_in_the_direction_of_the_slope(self, rng):
        a = rng.uniform(LOW - 0.5, HIGH + 0.5, size=(6, 3)).astype(np.float32)
        slopes = rng.normal(size=(6, 3)).astype(np.float32)
        got = np.asarray(inverted_gradients(a, slopes, **BOUNDS))
        for i in np.ndindex(6, 3):
            args = a[i], slopes[i], LOW[i[1]], HIGH[i[1]]
            same(got[i], inverted_by_hand(*map(float, args)))

    def test_at_a_bound_nothing_leads_out_and_all_leads_back(self):
        a, slope = jnp.array([1.0, 1.0, -1.0, -1.0]), jnp.array([2.0, -2.0, 2.0, -2.0])
        assert inverted_gradients(a, slope, **UNIT).tolist() == [0, -2, 2, 0]

    def test_beyond_a_bound_what_leads_out_turns_round(self):
        a, slope = jnp.array([3.0, 3.0, -3.0]), jnp.array([2.0, -2.0, -2.0])
        assert inverted_gradients(a, slope, **UNIT).tolist() == [-2, -4, 2]

    def test_no_slope_stays_none(self):
        assert inverted_gradients(jnp.array([0.5]), jnp.zeros(1), **UNIT).tolist() == [
            0
        ]

    def test_without_room_an_infinite_slope_is_nothing(self):
        a, slope = jnp.array([1.0, 0.5]), jnp.array([jnp.inf, jnp.inf])
        assert inverted_gradients(a, slope, **UNIT).tolist() == [0, jnp.inf]

    def test_bounds_that_leave_no_room_give_nan(self):
        for low, high in [(1.0, 1.0), (1.0, -1.0)]:
            got = inverted_gradients(
                jnp.ones(2), jnp.ones(2), minimum=low, maximum=high
            )
            assert np.isnan(got).all()

    def test_following_any_slope_stays_within_bounds(self, rng):
        a, slopes = np.tile(LOW, (50, 1)), rng.normal(scale=5, size=(200, 50, 3))
        for slope in slopes.astype(np.float32):
            a = a + 0.05 * np.asarray(inverted_gradients(a, slope, **BOUNDS))
        assert (a >= LOW).all()
        assert (a <= HIGH).all()

    def test_a_bound_of_another_size_is_refused(self):
        bounds = {"minimum": -np.ones(2), "maximum": 1.0}
        with pytest.raises(
            ValueError, match=r"minimum has shape \(2,\), expected f\[\]"
        ):
            inverted_gradients(jnp.ones(3), jnp.ones(3), **bounds)


class TestInvertedGradientsDpgLoss:
    def test_its_gradient_is_minus_the_inverted_slope(self, rng):
        a, slopes = rng.normal(size=(2, 4, 3)).astype(np.float32)
        loss = lambda a, g: inverted_gradients_dpg_loss(a, g, **BOUNDS, reduction="sum")
        by_a, by_slope = jax.grad(loss, (0, 1))(a, slopes)
        same(by_a, -inverted_gradients(a, slopes, **BOUNDS))
        same(by_slope, np.zeros((4, 3)))

    def test_is_the_deterministic_loss_summed_over_components(self, rng):
        a, slopes = rng.normal(size=(2, 4, 3)).astype(np.float32)
        losses = inverted_gradients_dpg_loss(a, slopes, **BOUNDS, reduction="none")
        inverted = inverted_gradients(a, slopes, **BOUNDS)
        for loss, action, slope in zip(losses, a, inverted, strict=True):
            same(loss, dpg_loss(action, slope).sum())
        same(inverted_gradients_dpg_loss(a, slopes, **BOUNDS), losses.mean())

    @pytest.mark.parametrize("bad", BAD)
    def test_padding_does_not_count(self, bad):
        a, slopes = (
            jnp.full((3, 2), 0.5).at[1].set(bad),
            jnp.ones((3, 2)).at[1].set(bad),
        )
        mask = jnp.array([True, False, True])
        fn = lambda a, g: inverted_gradients_dpg_loss(a, g, **UNIT, mask_t=mask)
        loss, slope = jax.value_and_grad(fn)(a, slopes)
        same(loss, 0.25**2)
        same(slope, [[-0.125, -0.125], [0, 0], [-0.125, -0.125]])

    def test_of_nothing_but_padding_it_is_zero(self):
        mask = jnp.zeros(2, bool)
        nothing = jnp.full((2, 1), jnp.nan)
        assert inverted_gradients_dpg_loss(nothing, nothing, **UNIT, mask_t=mask) == 0

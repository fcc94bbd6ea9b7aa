"""Losses, against plain-Python readings of their definitions, one number at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.losses import (
    expectile_loss,
    huber_loss,
    l2_loss,
    likelihood,
    log_loss,
    reduced,
)

BINARY = [log_loss, likelihood]
INFINITY = math.inf


def huber_by_hand(x, delta):
    if abs(x) <= delta:
        return x * x / 2
    return delta * (abs(x) - delta / 2)


def expectile_by_hand(prediction, target, expectile):
    if target < prediction:  # an over-estimate
        return (1 - expectile) * (target - prediction) ** 2
    return expectile * (target - prediction) ** 2


def log_loss_by_hand(prediction, target):
    loss = 0.0
    for outcome, probability in ((target, prediction), (1 - target, 1 - prediction)):
        if outcome > 0:
            log = math.log(probability) if probability > 0 else -math.inf
            loss -= outcome * log
    return loss


def each(by_hand, *args):
    """Applies a function of numbers to arrays, one by one, in double precision."""
    broadcast = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in args))
    out = [by_hand(*numbers) for numbers in zip(*map(np.ravel, broadcast), strict=True)]
    return np.reshape(out, broadcast[0].shape)


def slope(fn, x, step=1e-6):
    """The derivative of a function of a number, by central differences."""
    with jax.enable_x64(True):
        return (float(fn(x + step)) - float(fn(x - step))) / (2 * step)


def gradients(fn, *args):
    """The derivative of each element of the result by its own first argument."""
    axes = tuple(0 if np.ndim(arg) else None for arg in args)
    return jax.vmap(jax.grad(fn), axes)(*args)


@pytest.fixture(params=[(), (3,), (2, 0), (2, 3, 4)], ids=str)
def shape(request):
    return request.param


class TestL2Loss:
    def test_is_half_the_squared_error(self, rng, shape):
        predictions, targets = rng.normal(size=(2, *shape)).astype(np.float32)
        expected = each(lambda p, t: (t - p) * (t - p) / 2, predictions, targets)
        np.testing.assert_allclose(l2_loss(predictions, targets), expected, rtol=1e-6)

    def test_takes_errors_alone(self):
        assert l2_loss(jnp.array([3.0, -2.0])).tolist() == [4.5, 2]

    def test_takes_one_target_for_all(self):
        assert l2_loss(jnp.array([3.0, -1.0]), 1.0).tolist() == [2, 2]

    def test_its_gradient_is_the_error(self):
        by_both = jax.grad(l2_loss, (0, 1))(3.0, 1.0)
        assert by_both == (2, -2)
        assert jax.grad(l2_loss)(3.0) == 3

    def test_overflows_where_the_square_does(self):
        assert l2_loss(np.float32(1e30)) == INFINITY


class TestHuberLoss:
    @pytest.mark.parametrize("delta", [0.0, 0.5, 1.0, 3.0, INFINITY])
    def test_is_quadratic_then_linear(self, rng, shape, delta):
        x = rng.normal(scale=3, size=shape).astype(np.float32)
        expected = each(lambda x: huber_by_hand(x, delta), x)
        np.testing.assert_allclose(huber_loss(x, delta), expected, rtol=1e-6)

    def test_turns_linear_at_one_unless_told(self):
        assert huber_loss(jnp.array([0.5, 1.0, -3.0])).tolist() == [0.125, 0.5, 2.5]

    @pytest.mark.parametrize("delta", [0.0, 0.5, INFINITY])
    def test_its_gradient_is_the_clipped_error(self, delta):
        x = jnp.array([-1e30, -2.0, -0.5, -0.25, 0.0, 0.25, 0.5, 2.0, 1e30, 3e38])
        gradient = gradients(huber_loss, x, delta)
        np.testing.assert_array_equal(gradient, np.clip(x, -delta, delta))

    def test_stays_finite_as_long_as_the_error(self):
        np.testing.assert_allclose(huber_loss(jnp.float32(1e30)), 1e30, rtol=1e-6)
        np.testing.assert_allclose(huber_loss(jnp.float32(-3e38)), 3e38, rtol=1e-6)

    def test_an_infinite_error_pulls_as_hard_as_any_outlier(self):
        assert huber_loss(-INFINITY) == INFINITY
        assert jax.grad(huber_loss)(-INFINITY) == -1

    def test_does_not_hide_what_is_not_a_number(self):
        assert np.isnan(huber_loss(np.nan))
        assert np.isnan(jax.grad(huber_loss)(np.nan))

    @pytest.mark.parametrize("delta", [0.5, 1.0, INFINITY])
    def test_its_curvature_is_one_inside_and_zero_outside(self, delta):
        x = jnp.array([-1e30, -2.0, -0.25, 0.0, 0.25, 2.0, 1e30])
        curvature = gradients(jax.grad(huber_loss), x, delta)
        np.testing.assert_array_equal(curvature, np.abs(x) < delta)

    def test_the_gradient_by_delta_is_how_far_the_error_exceeds_it(self):
        by_delta = jax.vmap(jax.grad(huber_loss, 1), (0, None))
        x = jnp.array([-3.0, 0.5, 0.0, 4.0])
        assert by_delta(x, 1.0).tolist() == [2, 0, 0, 3]

    def test_takes_a_delta_for_each_element(self):
        losses = huber_loss(jnp.array([3.0, 3.0]), jnp.array([1.0, 2.0]))
        assert losses.tolist() == [2.5, 4]

    @pytest.mark.parametrize("delta", [-1.0, -1, np.float32(-1), math.nan])
    def test_refuses_a_negative_delta(self, delta):
        message = r"huber_loss: delta must be in \[0, inf\], got (-1|nan)"
        with pytest.raises(ValueError, match=message):
            huber_loss(jnp.ones(2), delta)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda x: huber_loss(x, delta=delta))(jnp.ones(2))

    def test_a_negative_delta_that_is_traced_gives_nan(self):
        losses = jax.jit(huber_loss)(jnp.array([0.5, 3.0]), jnp.float32(-1))
        assert np.isnan(losses).all()


class TestExpectileLoss:
    @pytest.mark.parametrize("expectile", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_agrees_with_the_definition(self, rng, shape, expectile):
        predictions, targets = rng.normal(size=(2, *shape)).astype(np.float32)
        expected = each(
            lambda p, t: expectile_by_hand(p, t, expectile), predictions, targets
        )
        losses = expectile_loss(predictions, targets, expectile)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)

    def test_a_high_expectile_penalises_under_estimates(self):
        """Which is what makes implicit Q-learning optimistic."""
        too_low = expectile_loss(jnp.float32(1), jnp.float32(2), 0.75)
        too_high = expectile_loss(jnp.float32(2), jnp.float32(1), 0.75)
        assert (too_low, too_high) == (0.75, 0.25)

    def test_is_the_squared_error_in_the_middle(self, rng):
        predictions, targets = rng.normal(size=(2, 5)).astype(np.float32)
        np.testing.assert_allclose(
            expectile_loss(predictions, targets, 0.5), l2_loss(predictions, targets)
        )

    def test_is_least_at_the_expectile(self):
        """Of 0, 0, 0 and 4, the 0.75-expectile is 2: pulls 0.25 · 6 and 0.75 · 2."""
        targets = jnp.array([0.0, 0.0, 0.0, 4.0])
        gradient = jax.grad(
            lambda p: jnp.sum(expectile_loss(jnp.full(4, p), targets, 0.75))
        )
        assert gradient(2.0) == 0
        assert gradient(1.5) < 0 < gradient(2.5)

    @pytest.mark.parametrize("prediction", [-2.0, 0.5, 2.0])
    def test_its_gradient_is_the_weighted_error(self, prediction):
        by_both = jax.grad(expectile_loss, (0, 1))(prediction, 0.5, 0.75)
        expected = 2 * (prediction - 0.5) * (0.25 if prediction > 0.5 else 0.75)
        assert by_both == (expected, -expected)

    def test_has_a_gradient_by_the_expectile(self):
        by_expectile = jax.vmap(jax.grad(expectile_loss, 2), (0, None, None))
        assert by_expectile(jnp.array([1.0, 5.0]), 3.0, 0.9).tolist() == [4, -4]

    @pytest.mark.parametrize(
        ("prediction", "expectile"), [(3e38, 1.0), (INFINITY, 1.0), (-INFINITY, 0.0)]
    )
    def test_an_error_without_weight_costs_nothing(self, prediction, expectile):
        assert expectile_loss(prediction, 0.0, expectile) == 0
        assert jax.grad(expectile_loss)(prediction, 0.0, expectile) == 0

    def test_does_not_hide_what_is_not_a_number(self):
        assert np.isnan(expectile_loss(np.nan, 0.0, 0.9))
        assert expectile_loss(INFINITY, 0.0, 0.9) == INFINITY

    def test_takes_an_expectile_for_each_element(self):
        losses = expectile_loss(jnp.zeros(2), 2.0, jnp.array([0.25, 0.75]))
        assert losses.tolist() == [1, 3]

    @pytest.mark.parametrize("expectile", [-0.5, 1.5, 2])
    def test_refuses_an_expectile_that_is_no_fraction(self, expectile):
        message = rf"expectile_loss: expectile must be in \[0, 1\], got {expectile}"
        with pytest.raises(ValueError, match=message):
            expectile_loss(jnp.ones(2), jnp.ones(2), expectile)
        losses = expectile_loss(jnp.ones(2), 0.0, jnp.float32(expectile))
        assert np.isnan(losses).all()


class TestBinaryLosses:
    probabilities = np.array([0.0, 1e-6, 0.25, 0.5, 0.9, 1.0], np.float32)

    @pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
    def test_agree_with_the_definitions(self, target):
        expected = each(lambda p: log_loss_by_hand(p, target), self.probabilities)
        losses = log_loss(self.probabilities, jnp.full(6, target))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        likelihoods = likelihood(self.probabilities, target)
        np.testing.assert_allclose(likelihoods, np.exp(-expected), rtol=1e-5)

    def test_a_sure_prediction_is_all_or_nothing(self):
        right, wrong = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
        assert log_loss(right, right).tolist() == [0, 0]
        assert log_loss(wrong, right).tolist() == [INFINITY, INFINITY]
        assert likelihood(right, right).tolist() == [1, 1]
        assert likelihood(wrong, right).tolist() == [0, 0]

    def test_log_loss_keeps_small_probabilities(self):
        np.testing.assert_allclose(log_loss(jnp.float32(1e-9), 0.0), 1e-9, rtol=1e-5)

    @pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
    @pytest.mark.parametrize("fn", BINARY)
    def test_gradients_are_finite_differences(self, fn, target):
        for prediction in (0.1, 0.5, 0.9):
            gradient = jax.grad(fn)(prediction, target)
            expected = slope(lambda p: fn(p, target), prediction)
            np.testing.assert_allclose(gradient, expected, rtol=1e-5)

    @pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
    @pytest.mark.parametrize("fn", BINARY)
    def test_gradients_by_the_target_are_finite_differences(self, fn, target):
        gradient = jax.grad(fn, 1)(0.2, target)
        expected = slope(lambda t: fn(0.2, t), target)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)

    def test_gradients_are_right_where_a_prediction_is_sure(self):
        right, wrong = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
        assert gradients(log_loss, right, right).tolist() == [1, -1]
        assert gradients(log_loss, wrong, right).tolist() == [INFINITY, -INFINITY]
        assert gradients(likelihood, right, right).tolist() == [-1, 1]
        assert gradients(likelihood, wrong, right).tolist() == [-1, 1]

    def test_curvature_is_right_where_a_prediction_is_sure(self):
        right = jnp.array([0.0, 1.0])
        assert gradients(jax.grad(log_loss), right, right).tolist() == [1, 1]
        assert gradients(jax.grad(likelihood), right, right).tolist() == [0, 0]

    @pytest.mark.parametrize("fn", BINARY)
    @pytest.mark.parametrize("target", [0.0, 1.0])
    def test_a_probability_past_the_end_by_rounding_does_no_harm(self, fn, target):
        """Then the outcome that is ruled out has one just below zero."""
        past = np.float32(target + (1e-6 if target else -1e-6))
        assert np.isfinite(fn(past, target))
        assert np.isfinite(jax.grad(fn)(past, target))

    @pytest.mark.parametrize("fn", BINARY)
    @pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
    def test_do_not_hide_what_is_not_a_number(self, fn, target):
        assert np.isnan(fn(np.nan, target))


class TestAllOfThem:
    @pytest.mark.parametrize(
        ("fn", "extra"),
        [(l2_loss, ()), (log_loss, ()), (likelihood, ()), (expectile_loss, (0.5,))],
    )
    def test_refuse_to_broadcast(self, fn, extra):
        three, column = jnp.full(3, 0.5), jnp.full((3, 1), 0.5)
        message = (
            rf"{fn.__name__}: targets has shape \(3, 1\), expected f\[\]\|f\[...\]"
        )
        with pytest.raises(ValueError, match=message):
            fn(three, column, *extra)
        message = rf"{fn.__name__}: targets has shape \(3,\), expected f\[\]\|f\[...\]"
        with pytest.raises(ValueError, match=message):
            fn(0.5, three, *extra)
        with pytest.raises(ValueError, match=f"{fn.__name__}: targets has shape"):
            fn(three, jnp.full(1, 0.5), *extra)

    def test_compute_low_precision_in_single(self):
        """In half precision, 300² overflows and 1 - 2⁻¹² is 1."""
        assert huber_loss(jnp.float16(300), 300.0) == 45000
        assert l2_loss(jnp.float16(300)) == 45000
        assert log_loss(jnp.float16(2**-12), 0.0) == jnp.float16(2**-12)

    def test_keep_double_precision(self):
        with jax.enable_x64(True):
            losses = [
                huber_loss(jnp.array(1e-10)),
                expectile_loss(jnp.array(0.0), 1e-10, 0.5),
                l2_loss(jnp.array(1 + 1e-10), 1.0),
            ]
            np.testing.assert_allclose(losses, 0.5e-20, rtol=1e-5)
            np.testing.assert_allclose(log_loss(jnp.array(1e-15), 0.0), 1e-15)


class TestReduced:
    """Over the steps of a trajectory, of which a mask may leave some out."""

    losses = jnp.array([1.0, jnp.nan, 5.0])
    mask = jnp.array([True, False, True])

    @pytest.mark.parametrize(
        ("reduction", "expected"), [("mean", 3), ("sum", 6), ("none", [1, 0, 5])]
    )
    def test_what_is_left_out_does_not_count(self, reduction, expected):
        assert reduced(self.losses, self.mask, reduction).tolist() == expected

    @pytest.mark.parametrize(
        ("reduction", "expected"), [("mean", 2), ("sum", 4), ("none", [1, 3])]
    )
    def test_without_a_mask_every_step_counts(self, reduction, expected):
        assert reduced(jnp.array([1.0, 3.0]), None, reduction).tolist() == expected

    def test_where_no_step_is_left_the_mean_is_zero(self):
        nothing = jnp.zeros(3, bool)
        value, slope = jax.value_and_grad(reduced)(self.losses, nothing, "mean")
        assert (value.tolist(), slope.tolist()) == (0, [0, 0, 0])

    def test_the_gradient_is_one_part_of_the_steps_left(self):
        slope = jax.grad(reduced)(self.losses, self.mask, "mean")
        assert slope.tolist() == [0.5, 0, 0.5]

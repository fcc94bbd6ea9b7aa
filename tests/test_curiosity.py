"""Errors of predictions as rewards and losses, against loops in double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims
from rlprims.curiosity import (
    icm_continuous_loss,
    icm_loss,
    prediction_error_rewards,
    rnd_loss,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

STEPS, FEATURES, ACTIONS = 6, 5, 4
NAN = np.float32(np.nan)


def close(x, y, rtol=1e-5):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def pairs_of(rng):
    return rng.normal(size=(2, STEPS, FEATURES)).astype(np.float32)


def squares(x, y):
    """The squared distance of each pair of vectors."""
    return [
        math.fsum((float(a) - float(b)) ** 2 for a, b in zip(u, v, strict=True))
        for u, v in zip(x, y, strict=True)
    ]


def surprise(logits, action, legal):
    """Minus the log-probability of an action, among those that are legal."""
    weights = {a: math.exp(logits[a]) for a in range(len(logits)) if legal[a]}
    return math.log(sum(weights.values()) / weights[action])


class Steps:
    """What the module predicted, and what there was, in six steps."""

    def __init__(self, rng):
        self.predicted, self.features = pairs_of(rng)
        self.logits = rng.normal(size=(STEPS, ACTIONS)).astype(np.float32)
        self.actions = rng.integers(ACTIONS, size=STEPS).astype(np.int32)
        self.legal = rng.uniform(size=(STEPS, ACTIONS)) < 0.5
        self.legal[np.arange(STEPS), self.actions] = True
        self.counts = np.array([1, 0, 1, 1, 0, 1], bool)

    def inputs(self):
        return self.predicted, self.logits, self.actions, self.features

    def losses(self, beta):
        inverse = map(surprise, self.logits, self.actions, self.legal)
        forward = squares(self.predicted, self.features)
        return [
            (1 - beta) * i + beta / 2 * f for i, f in zip(inverse, forward, strict=True)
        ]


@pytest.fixture
def steps(rng):
    return Steps(rng)


class TestRewards:
    def test_are_squared_distances_times_the_scale(self, rng):
        predicted, features = pairs_of(rng)
        expected = squares(predicted, features)
        close(prediction_error_rewards(predicted, features), expected)
        half = prediction_error_rewards(predicted, features, scale=0.5)
        close(half, 0.5 * np.array(expected))

    def test_are_nothing_where_all_was_predicted_or_scaled_away(self):
        x = jnp.array([[1.0, 2.0]])
        assert prediction_error_rewards(x, x).tolist() == [0]
        infinite = jnp.array([[jnp.inf, 0.0]])
        assert prediction_error_rewards(x, infinite).tolist() == [jnp.inf]
        assert prediction_error_rewards(x, infinite, scale=0.0).tolist() == [0]

    def test_sum_over_features_and_do_not_average(self):
        zeros, ones = jnp.zeros((2, 7)), jnp.ones((2, 7))
        assert prediction_error_rewards(zeros, ones).tolist() == [7, 7]

    def test_are_constants_unless_told_otherwise(self, rng):
        x, y = pairs_of(rng)
        total = lambda x, stop: prediction_error_rewards(
            x, y, use_stop_gradient=stop
        ).sum()
        assert not jax.grad(total)(x, True).any()
        close(jax.grad(total)(x, False), 2 * (x - y))

    def test_are_zero_in_padding_whatever_it_holds(self, rng):
        x, y = pairs_of(rng)
        mask = np.arange(STEPS) < 4
        x[4], y[5] = NAN, np.inf

        def total(x, y, scale):
            rewards = prediction_error_rewards(
                x, y, scale=scale, mask_t=mask, use_stop_gradient=False
            )
            return rewards.sum(), rewards

        slopes, rewards = jax.grad(total, (0, 1, 2), has_aux=True)(x, y, 0.5)
        close(rewards, 0.5 * np.array([*squares(x[:4], y[:4]), 0, 0]))
        assert not slopes[0][4:].any()
        assert not slopes[1][4:].any()
        assert np.isfinite(slopes[2])

    def test_of_half_precision_are_computed_in_single(self):
        x, y = jnp.zeros(300, jnp.bfloat16), jnp.ones(300, jnp.bfloat16)
        assert prediction_error_rewards(x, y) == 300  # by ones, 256 would be the end

    def test_need_not_stop_where_an_episode_ends(self):
        """On one scale, with discounts that are never zero."""
        r_t = jnp.array([[2.0], [2.0], [4.0], [2.0]])
        totals = []
        state = rlprims.RewardScale(jnp.zeros(1))
        for r in r_t:
            scaled, state = rlprims.scale_rewards(
                state, r, jnp.full(1, 0.5), epsilon=0.0
            )
            totals.append(r.item() + (0.5 * totals[-1] if totals else 0))
        close(scaled, 2 / np.std(totals))
        returns = rlprims.discounted_returns(r_t[:, 0], jnp.full(4, 0.5), jnp.zeros(4))
        close(returns, [2 + 0.5 * (2 + 0.5 * 5), 2 + 0.5 * 5, 5, 2])


class TestRndLoss:
    def test_is_the_mean_or_the_sum_of_squared_distances(self, rng):
        x, y = pairs_of(rng)
        expected = squares(x, y)
        close(rnd_loss(x, y), np.mean(expected))
        close(rnd_loss(x, y, reduction="sum"), np.sum(expected))
        close(rnd_loss(x, y, reduction="none"), expected)

    def test_takes_any_leading_axes(self, rng):
        x, y = rng.normal(size=(2, 2, 3, FEATURES)).astype(np.float32)
        losses = rnd_loss(x, y, reduction="none")
        assert losses.shape == (2, 3)
        close(losses[1], squares(x[1], y[1]))
        close(rnd_loss(x[0, 0], y[0, 0]), squares(x[:1, 0], y[:1, 0])[0])

    def test_moves_the_predictor_and_not_what_it_predicts(self, rng):
        x, y = pairs_of(rng)
        to_x, to_y = jax.grad(rnd_loss, (0, 1))(x, y)
        close(to_x, 2 * (x - y) / STEPS)
        assert not to_y.any()
        both = lambda y: rnd_loss(x, y, stop_target_gradients=False)
        close(jax.grad(both)(y), 2 * (y - x) / STEPS)

    def test_learns_from_a_share_of_the_steps(self, rng):
        """With a mean over the steps that are left, as if there were no others."""
        x, y = pairs_of(rng)
        mask = jax.random.bernoulli(jax.random.key(1), 0.5, (STEPS,))
        kept = np.asarray(mask)
        assert 0 < kept.sum() < STEPS
        x[~kept] = NAN
        value, slope = jax.value_and_grad(lambda x: rnd_loss(x, y, mask_t=mask))(x)
        expected = jax.value_and_grad(rnd_loss)(x[kept], y[kept])
        close(value, expected[0])
        close(slope[kept], expected[1])
        assert not slope[~kept].any()

    def test_is_zero_where_no_step_counts(self):
        x, nothing = jnp.full((2, 3), NAN), jnp.zeros(2, bool)
        for reduction in ("mean", "sum"):
            assert rnd_loss(x, x, mask_t=nothing, reduction=reduction) == 0


class TestIcmLoss:
    @pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
    def test_weighs_both_models(self, steps, beta):
        losses = icm_loss(
            *steps.inputs(), beta=beta, mask=steps.legal, reduction="none"
        )
        close(losses, steps.losses(beta))

    def test_has_the_weight_of_the_paper(self, steps):
        steps.legal[:] = True
        close(icm_loss(*steps.inputs()), np.mean(steps.losses(0.2)))

    def test_leaves_out_illegal_actions(self, steps):
        spoilt = np.where(steps.legal, steps.logits, NAN)

        def loss(logits):
            predicted, _, a_tm1, features = steps.inputs()
            return icm_loss(predicted, logits, a_tm1, features, mask=steps.legal)

        value, slope = jax.value_and_grad(loss)(spoilt)
        close(value, np.mean(steps.losses(0.2)))
        assert not slope[~steps.legal].any()
        assert np.isfinite(slope).all()
        close(slope.sum(axis=1), np.zeros(STEPS))

    def test_is_that_of_the_steps_that_count(self, steps):
        """Padding may hold NaN, no legal action, and an action that does not exist."""
        counts = steps.counts
        expected = np.array(steps.losses(0.3))[counts]
        floats = [steps.predicted, steps.logits, steps.features]
        for x in floats:
            x[~counts] = NAN
        steps.legal[~counts] = [[False], [True]]
        steps.actions[~counts] = -1

        def loss(predicted, logits, features, beta, reduction="mean"):
            return icm_loss(
                predicted,
                logits,
                steps.actions,
                features,
                beta=beta,
                mask=steps.legal,
                mask_t=counts,
                reduction=reduction,
            )

        beta = jnp.float32(0.3)
        value, slopes = jax.value_and_grad(loss, (0, 1, 2, 3))(*floats, beta)
        close(value, expected.mean())
        close(loss(*floats, beta, "sum"), expected.sum())
        close(loss(*floats, beta, "none")[~counts], 0)
        for slope in slopes[:3]:
            assert np.isfinite(slope).all()
            assert not slope[~counts].any()
        assert np.isfinite(slopes[3])

    def test_is_zero_where_no_step_counts(self, steps):
        assert icm_loss(*steps.inputs(), mask_t=np.zeros(STEPS, bool)) == 0

    def test_teaches_the_features_by_both_models_as_in_the_paper(self, steps):
        def loss(features, **flags):
            predicted, logits, a_tm1, _ = steps.inputs()
            return icm_loss(predicted, logits, a_tm1, features, beta=0.5, **flags)

        slope = jax.grad(loss)(steps.features)
        close(slope, (steps.features - steps.predicted) * 0.5 / STEPS)
        stopped = jax.grad(lambda x: loss(x, stop_target_gradients=True))
        assert not stopped(steps.features).any()

    def test_moves_predictions_towards_what_there_was(self, steps):
        def loss(predicted, logits):
            return icm_loss(predicted, logits, steps.actions, steps.features, beta=0.5)

        to_predicted, to_logits = jax.grad(loss, (0, 1))(steps.predicted, steps.logits)
        close(to_predicted, (steps.predicted - steps.features) * 0.5 / STEPS)
        taken = np.eye(ACTIONS)[steps.actions]
        softmax = np.exp(steps.logits) / np.exp(steps.logits).sum(1, keepdims=True)
        close(to_logits, (softmax - taken) * 0.5 / STEPS)

    def test_a_model_without_weight_may_be_infinite(self):
        x, far = jnp.zeros(2), jnp.array([jnp.inf, 0.0])
        sure = jnp.array([0.0, -jnp.inf])
        assert icm_loss(x, sure, 0, far, beta=0.0) == 0
        assert icm_loss(x, sure, 1, x, beta=1.0) == 0
        assert icm_loss(x, sure, 1, x, beta=0.5) == jnp.inf

    def test_of_one_action_is_that_of_the_forward_model(self):
        x = jnp.array([0.0, 2.0])
        assert icm_loss(x, jnp.array([7.0]), 0, jnp.zeros(2), beta=0.5) == 1

    def test_saturated_logits_are_fine(self):
        x, logits = jnp.zeros(2), jnp.array([1e4, -1e4])
        assert icm_loss(x, logits, 0, x, beta=0.5) == 0
        assert icm_loss(x, logits, 1, x, beta=0.5) == 1e4

    def test_an_action_that_does_not_exist_is_nan(self):
        x, logits = jnp.zeros(2), jnp.zeros(3)
        for action in (-1, 3):
            assert np.isnan(icm_loss(x, logits, action, x))

    def test_refuses_a_weight_above_one(self, steps):
        with pytest.raises(ValueError, match=r"icm_loss: beta must be in \[0, 1\]"):
            icm_loss(*steps.inputs(), beta=1.5)


class TestIcmContinuousLoss:
    def test_weighs_both_squared_distances(self, steps, rng):
        actions = rng.normal(size=(2, STEPS, ACTIONS)).astype(np.float32)
        losses = icm_continuous_loss(
            steps.predicted, *actions, steps.features, beta=0.3, reduction="none"
        )
        forward = np.array(squares(steps.predicted, steps.features))
        expected = 0.35 * np.array(squares(*actions)) + 0.15 * forward
        close(losses, expected)
        whole = icm_continuous_loss(steps.predicted, *actions, steps.features)
        close(whole, np.mean(0.4 * np.array(squares(*actions)) + 0.1 * forward))

    def test_is_maximum_likelihood_of_a_normal_distribution(self, rng):
        """But for a number that no prediction changes."""
        mean, action = rng.normal(size=(2, STEPS, ACTIONS)).astype(np.float32)
        same = np.zeros((STEPS, FEATURES), np.float32)
        losses = icm_continuous_loss(
            same, mean, action, same, beta=0.0, reduction="none"
        )
        one = np.ones_like(mean)
        log_probs = rlprims.gaussian_diagonal().logprob(action, mean, one)
        close(losses + log_probs, np.full(STEPS, -ACTIONS / 2 * math.log(2 * math.pi)))

    def test_is_that_of_the_steps_that_count(self, steps, rng):
        counts = steps.counts
        actions = rng.normal(size=(2, STEPS, ACTIONS)).astype(np.float32)
        kept = [x[counts] for x in (steps.predicted, *actions, steps.features)]
        floats = [steps.predicted, *actions, steps.features]
        for x in floats:
            x[~counts] = NAN
        loss = lambda *xs: icm_continuous_loss(*xs[:4], beta=xs[4], mask_t=counts)
        beta = jnp.float32(0.3)
        value, slopes = jax.value_and_grad(loss, range(5))(*floats, beta)
        close(value, icm_continuous_loss(*kept, beta=0.3))
        for slope in slopes[:4]:
            assert np.isfinite(slope).all()
            assert not slope[~counts].any()
            assert slope[counts].any()
        assert np.isfinite(slopes[4])

    def test_holds_features_constant_if_asked(self, steps):
        a = jnp.zeros((STEPS, ACTIONS))
        loss = lambda x, stop: icm_continuous_loss(
            steps.predicted, a, a, x, beta=1.0, stop_target_gradients=stop
        )
        assert not jax.grad(loss)(steps.features, True).any()
        slope = jax.grad(loss)(steps.features, False)
        close(slope, (steps.features - steps.predicted) / STEPS)

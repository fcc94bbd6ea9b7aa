"""Losses from preferences without a reference, against readings of the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.preference import bradley_terry_loss, orpo_loss, simpo_loss

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def bradley_terry_by_hand(chosen, rejected, margin, centering):
    return (
        -log_sigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2
    )


def simpo_by_hand(chosen, rejected, smoothing=0.0):
    h = 2.5 * chosen - 2.5 * rejected - 0.7
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)


def orpo_by_hand(chosen, rejected):
    odds = [math.exp(x) / -math.expm1(x) for x in (chosen, rejected)]
    return -chosen - 0.3 * log_sigmoid(math.log(odds[0] / odds[1]))


@pytest.fixture
def pairs(rng):
    return -rng.exponential(size=(2, 3, 4)).astype(np.float32)


def orpo(*args, **given):
    return orpo_loss(*args, beta=0.3, **given)


def simpo(*args, **given):
    return simpo_loss(*args, beta=2.5, margin=0.7, **given)


LOSSES = {
    "orpo": (orpo, orpo_by_hand),
    "simpo": (simpo, simpo_by_hand),
    "smoothed simpo": (
        lambda *x, **given: simpo(*x, label_smoothing=0.2, **given),
        lambda *x: simpo_by_hand(*x, 0.2),
    ),
    "bradley terry": (
        bradley_terry_loss,
        lambda *x: bradley_terry_by_hand(*x, 0.0, 0.0),
    ),
    "centered bradley terry": (
        lambda *x, **given: bradley_terry_loss(
            *x, margin=0.5, centering_coefficient=0.1, **given
        ),
        lambda *x: bradley_terry_by_hand(*x, 0.5, 0.1),
    ),
}


@pytest.mark.parametrize(("loss", "by_hand"), LOSSES.values(), ids=LOSSES)
class TestEveryLoss:
    def test_agrees_with_the_definition(self, loss, by_hand, pairs):
        expected = np.vectorize(by_hand)(*np.float64(pairs))
        np.testing.assert_allclose(loss(*pairs, reduction="none"), expected, rtol=1e-5)
        np.testing.assert_allclose(loss(*pairs), expected.mean(), rtol=1e-5)

    def test_pairs_left_out_may_hold_anything(self, loss, by_hand, pairs):
        mask = np.arange(12).reshape(3, 4) % 3 != 1
        spoilt = np.where(mask, pairs, np.nan)
        run = lambda x: loss(*x, mask=mask)
        value, slope = jax.value_and_grad(run)(jnp.asarray(spoilt))
        expected = np.vectorize(by_hand)(*np.float64(pairs[:, mask])).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert np.isfinite(slope).all()
        assert not slope[:, ~mask].any()
        assert loss(*spoilt, mask=np.zeros((3, 4), bool)) == 0

    def test_saturated_pairs_have_finite_losses_and_gradients(self, loss, by_hand):
        for pair in ((-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4), (-1e-30, -1e-30)):
            value, slopes = jax.value_and_grad(loss, (0, 1))(*pair)
            assert np.isfinite(value)
            assert np.isfinite(slopes).all()


class TestBradleyTerryLoss:
    def test_takes_a_margin_of_each_pair(self):
        margins = jnp.array([0.0, 1.0])
        losses = bradley_terry_loss(
            jnp.array([1.0, 2.0]), jnp.zeros(2), margin=margins, reduction="none"
        )
        assert losses[0] == losses[1]

    def test_a_margin_left_out_may_be_nan(self):
        given = {"margin": jnp.array([0.0, jnp.nan]), "mask": jnp.array([True, False])}
        run = lambda x: bradley_terry_loss(x, jnp.zeros(2), **given)
        value, slope = jax.value_and_grad(run)(jnp.zeros(2))
        np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
        assert slope.tolist() == [-0.5, 0]

    def test_an_infinite_reward_needs_no_centering(self):
        assert bradley_terry_loss(math.inf, 0.0) == 0
        assert bradley_terry_loss(0.0, math.inf) == math.inf

    def test_adding_to_both_rewards_changes_nothing_unless_centered(self):
        plain = bradley_terry_loss(11.0, 10.0) - bradley_terry_loss(1.0, 0.0)
        assert plain == 0
        given = {"centering_coefficient": 0.5}
        centered = bradley_terry_loss(2.0, 1.0, **given) - bradley_terry_loss(
            1.0, 0.0, **given
        )
        np.testing.assert_allclose(centered, 0.5 * (9 - 1), rtol=1e-6)


class TestOrpoLoss:
    @pytest.mark.parametrize("log_prob", [-1e-3, -1e-8, -1e-20, -30.0])
    def test_the_odds_keep_their_digits(self, log_prob):
        result = orpo_loss(-0.5, log_prob, beta=1.0)
        np.testing.assert_allclose(
            result, 0.5 + orpo_by_hand_of_one(-0.5, log_prob), rtol=1e-5
        )

    @pytest.mark.parametrize("sure", [0.0, 1e-7])
    def test_a_sure_token_is_finite(self, sure):
        for pair in ((sure, -1.0), (-1.0, sure), (sure, sure)):
            value, slopes = jax.value_and_grad(orpo, (0, 1))(*pair)
            assert np.isfinite(value)
            assert np.isfinite(slopes).all()

    def test_does_not_hide_what_is_not_a_number(self):
        assert np.isnan(orpo(math.nan, -1.0))
        assert np.isnan(orpo(-1.0, math.nan))

    def test_without_weight_it_is_the_likelihood(self):
        assert orpo_loss(-2.0, -math.inf, beta=0.0) == 2
        assert orpo_loss(-2.0, 0.0, beta=0.0) == 2
        assert orpo_loss(-math.inf, -1.0, beta=0.0) == math.inf


def orpo_by_hand_of_one(chosen, rejected):
    odds = [math.exp(x) / -math.expm1(x) for x in (chosen, rejected)]
    return -log_sigmoid(math.log(odds[0]) - math.log(odds[1]))


class TestSimpoLoss:
    def test_is_half_way_where_the_margin_is_kept(self):
        np.testing.assert_allclose(
            simpo_loss(-1.0, -1.5, beta=2.0, margin=1.0), math.log(2), rtol=1e-6
        )

    @pytest.mark.parametrize("smoothing", [-0.1, 1.5])
    def test_refuses_a_smoothing_that_is_no_probability(self, smoothing):
        message = rf"^simpo_loss: label_smoothing must be in \[0, 1\], got {smoothing}"
        with pytest.raises(ValueError, match=message):
            simpo(-1.0, -1.0, label_smoothing=smoothing)

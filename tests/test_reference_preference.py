"""Losses from preferences to a reference policy, against readings of the papers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.reference_preference import (
    dpo_loss,
    hinge_dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
)
from rlprims.tokens import sequence_log_probs

pytestmark = pytest.mark.usefixtures("quick_to_compile")
BETA = 0.4


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def reverse_kl(u):
    return math.log(u) + 1


def forward_kl(u):
    return -1 / u


def half_way(u):
    """Of the divergence with an alpha of one half."""
    return (1 - u**-0.5) / 0.5


def jensen_shannon(u):
    return math.log(2 * u / (1 + u))


def dpo_by_hand(chosen, rejected, ref_chosen, ref_rejected, slope, smoothing=0.0):
    h = BETA * slope(math.exp(chosen - ref_chosen))
    h -= BETA * slope(math.exp(rejected - ref_rejected))
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)


def ipo_by_hand(chosen, rejected, ref_chosen, ref_rejected):
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * BETA)) ** 2


def hinge_by_hand(chosen, rejected, ref_chosen, ref_rejected):
    return max(0, 1 - BETA * ((chosen - ref_chosen) - (rejected - ref_rejected)))


dpo = functools.partial(dpo_loss, beta=BETA)
LOSSES = {
    "dpo": (dpo, functools.partial(dpo_by_hand, slope=reverse_kl)),
    "smoothed dpo": (
        functools.partial(dpo, label_smoothing=0.2),
        functools.partial(dpo_by_hand, slope=reverse_kl, smoothing=0.2),
    ),
    "forward": (
        functools.partial(dpo, alpha=1.0),
        functools.partial(dpo_by_hand, slope=forward_kl),
    ),
    "half way": (
        functools.partial(dpo, alpha=0.5),
        functools.partial(dpo_by_hand, slope=half_way),
    ),
    "jensen shannon": (
        functools.partial(dpo, divergence="jensen_shannon"),
        functools.partial(dpo_by_hand, slope=jensen_shannon),
    ),
    "ipo": (functools.partial(ipo_loss, beta=BETA), ipo_by_hand),
    "hinge": (functools.partial(hinge_dpo_loss, beta=BETA), hinge_by_hand),
}


@pytest.fixture
def pairs(rng):
    return rng.normal(-3, 1.5, size=(4, 3, 4)).astype(np.float32)


@pytest.mark.parametrize(("loss", "by_hand"), LOSSES.values(), ids=LOSSES)
class TestEveryLossOfPairs:
    def test_agrees_with_the_definition(self, loss, by_hand, pairs):
        expected = np.vectorize(by_hand)(*np.float64(pairs))
        result = loss(*pairs, reduction="none")
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loss(*pairs), expected.mean(), rtol=1e-5)

    def test_pairs_left_out_may_hold_anything(self, loss, by_hand, pairs):
        mask = np.arange(12).reshape(3, 4) % 3 != 1
        spoilt = np.where(mask, pairs, np.nan)
        run = lambda x: loss(*x, mask=mask, use_stop_gradient=False)
        value, slope = jax.value_and_grad(run)(jnp.asarray(spoilt))
        expected = np.vectorize(by_hand)(*np.float64(pairs[:, mask])).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert np.isfinite(slope).all()
        assert not slope[:, ~mask].any()
        assert loss(*spoilt, mask=np.zeros((3, 4), bool)) == 0

    def test_the_reference_is_a_constant(self, loss, by_hand, pairs):
        held = jax.grad(lambda x: loss(*x))(pairs)
        assert held[:2].any()
        assert not held[2:].any()
        flowing = jax.grad(lambda x: loss(*x, use_stop_gradient=False))(pairs)
        np.testing.assert_allclose(flowing[2:], -flowing[:2], rtol=1e-6)

    @pytest.mark.parametrize("by_chosen", [-1e4, 0.0, 1e4])
    @pytest.mark.parametrize("by_rejected", [-1e4, 0.0, 1e4])
    def test_saturated_log_ratios_have_finite_losses_and_gradients(
        self, loss, by_hand, by_chosen, by_rejected
    ):
        run = jax.value_and_grad(loss, (0, 1))
        value, slopes = run(by_chosen - 1.0, by_rejected - 1.0, -1.0, -1.0)
        assert np.isfinite(value)
        assert np.isfinite(slopes).all()

    def test_what_is_chosen_becomes_likelier(self, loss, by_hand):
        by_both = jax.grad(loss, (0, 1))(-1.0, -1.0, -1.0, -1.0)
        assert by_both[0] < 0 < by_both[1]


class TestDpoLoss:
    def test_is_log_two_at_the_reference(self, pairs):
        result = dpo(*pairs[:2], *pairs[:2])
        np.testing.assert_allclose(result, math.log(2), rtol=1e-6)

    def test_an_impossible_answer_is_infinitely_bad(self):
        value, slope = jax.value_and_grad(dpo)(-math.inf, -1.0, -1.0, -1.0)
        assert value == math.inf
        np.testing.assert_allclose(slope, -BETA, rtol=1e-6)
        value, slopes = jax.value_and_grad(dpo, (0, 1))(-1.0, -math.inf, -1.0, -1.0)
        assert (value, slopes) == (0, (0, 0))

    def test_a_small_alpha_is_nearly_none(self, pairs):
        near = dpo(*pairs, alpha=1e-6)
        np.testing.assert_allclose(near, dpo(*pairs), rtol=1e-5)

    def test_smoothing_by_half_likes_neither(self):
        slope = jax.grad(functools.partial(dpo, label_smoothing=0.5))
        assert slope(-1.0, -1.0, -1.0, -1.0) == 0

    def test_of_means_over_tokens_it_is_normalised_by_length(self):
        """As in Tülu 3: each log-ratio is divided by the length of its answer."""
        tokens = jnp.array([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]])
        reference = jnp.array([[-2.0, -2.0, -5.0], [-1.0, 0.0, 0.0]])
        mask = jnp.array([[True] * 3, [True, False, False]])
        mean = functools.partial(sequence_log_probs, mask_t=mask, reduction="mean")
        result = dpo(*mean(tokens), *mean(reference))
        h = BETA * (3 / 3) - BETA * (-3 / 1)
        np.testing.assert_allclose(result, -log_sigmoid(h), rtol=1e-6)

    def test_refuses_another_divergence(self):
        message = r"^dpo_loss: divergence must be one of 'alpha', 'jensen_shannon'"
        with pytest.raises(ValueError, match=message):
            dpo(-1.0, -1.0, -1.0, -1.0, divergence="kl")


class TestIpoLoss:
    def test_the_margin_has_an_optimum(self):
        at_optimum = jax.grad(functools.partial(ipo_loss, beta=0.25))
        assert at_optimum(-1.0, -3.0, -1.0, -1.0) == 0


class TestHingeDpoLoss:
    def test_a_margin_of_one_is_enough(self):
        run = jax.value_and_grad(functools.partial(hinge_dpo_loss, beta=0.5))
        assert run(-1.0, -4.0, -1.0, -1.0) == (0, 0)
        assert run(-1.0, -2.0, -1.0, -1.0) == (0.5, -0.5)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kto_by_hand(log_prob, reference, good, point):
    r = log_prob - reference
    if good:
        return 1.5 * (1 - sigmoid(BETA * (r - point)))
    return 0.7 * (1 - sigmoid(BETA * (point - r)))


class TestKtoLoss:
    loss = staticmethod(
        functools.partial(
            kto_loss, beta=BETA, desirable_weight=1.5, undesirable_weight=0.7
        )
    )

    def test_agrees_with_the_definition(self, pairs):
        log_prob, reference = pairs[:2]
        good = pairs[2] > -3
        expected = np.vectorize(kto_by_hand)(
            np.float64(log_prob), np.float64(reference), good, 0.6
        )
        result = self.loss(log_prob, reference, good, 0.6, reduction="none")
        np.testing.assert_allclose(result, expected, rtol=1e-5)

    def test_answers_left_out_may_hold_anything(self, pairs):
        mask = np.arange(12).reshape(3, 4) % 3 != 1
        good = pairs[2] > -3
        run = lambda x: self.loss(*x, good, 0.6, mask=mask)
        spoilt = jnp.asarray(np.where(mask, pairs[:2], np.nan))
        value, slope = jax.value_and_grad(run)(spoilt)
        expected = np.vectorize(kto_by_hand)(*np.float64(pairs[:2]), good, 0.6)
        np.testing.assert_allclose(value, expected[mask].mean(), rtol=1e-5)
        assert np.isfinite(slope).all()
        assert not slope[:, ~mask].any()

    @pytest.mark.parametrize("good", [True, False])
    @pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
    def test_a_saturated_answer_no_longer_matters(self, good, log_ratio):
        value, slope = jax.value_and_grad(self.loss)(log_ratio, 0.0, good, 0.0)
        weight = 1.5 if good else 0.7
        expected = 0 if good == (log_ratio > 0) else weight
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert slope == 0

    def test_only_the_policy_learns(self):
        by_all = jax.grad(self.loss, (0, 1, 3))
        held, flowing = (
            by_all(-1.0, -1.0, True, 0.0, use_stop_gradient=stop)
            for stop in (True, False)
        )
        assert held[0] < 0
        assert held[1:] == (0, 0)
        assert flowing[1] == flowing[2] == -held[0]

    def test_a_higher_point_of_reference_makes_bad_answers_cheaper(self):
        at = lambda point, good: self.loss(-1.0, -1.0, good, point)
        assert at(1.0, False) < at(0.0, False)
        assert at(1.0, True) > at(0.0, True)


class TestKtoReferencePoint:
    def test_is_the_mean_of_what_counts_but_never_negative(self):
        log_prob = jnp.array([-1.0, -2.0, jnp.nan])
        reference, mask = jnp.array([-2.0, -6.0, 0.0]), jnp.array([True, True, False])
        run = functools.partial(kto_reference_point, mask=mask)
        assert run(log_prob, reference) == 2.5
        assert run(reference, log_prob) == 0
        slope = jax.grad(run)(log_prob, reference, stop_target_gradients=False)
        assert slope.tolist() == [0.5, 0.5, 0]
        assert not jax.grad(run)(log_prob, reference).any()

    def test_of_nothing_is_zero(self):
        assert (
            kto_reference_point(jnp.ones(2), jnp.zeros(2), mask=jnp.zeros(2, bool)) == 0
        )

    def test_a_batch_over_devices_is_one_batch(self):
        log_prob, reference = jnp.array([[-1.0], [-2.0]]), jnp.array([[-2.0], [-8.0]])
        run = functools.partial(kto_reference_point, axis_name="d")
        points = jax.vmap(run, axis_name="d")(log_prob, reference)
        assert points.tolist() == [3.5, 3.5]

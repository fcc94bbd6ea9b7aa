"""Policy losses of tokens, against readings of the papers, one number at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.token_losses import cispo_loss, grpo_loss, sapo_loss
from rlprims.tokens import aggregate_tokens

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def clip(x, low, high):
    return min(max(x, low), high)


def grpo_by_hand(log_prob, old, adv, low, high, largest=math.inf):
    ratio = math.exp(log_prob - old)
    gain = min(ratio, largest) if adv < 0 else ratio
    return -min(gain * adv, clip(ratio, 1 - low, 1 + high) * adv)


def cispo_by_hand(log_prob, old, adv, largest):
    return -min(math.exp(log_prob - old), largest) * adv * log_prob


def sapo_by_hand(log_prob, old, adv, positive, negative):
    tau = positive if adv > 0 else negative
    gate = 1 / (1 + math.exp(-tau * (math.exp(log_prob - old) - 1)))
    return -4 / tau * gate * adv


LOSSES = {
    "grpo": (
        functools.partial(grpo_loss, epsilon=0.2),
        lambda *x: grpo_by_hand(*x, 0.2, 0.2),
    ),
    "clip-higher": (
        functools.partial(grpo_loss, epsilon=0.2, epsilon_high=0.28),
        lambda *x: grpo_by_hand(*x, 0.2, 0.28),
    ),
    "two-sided": (
        functools.partial(grpo_loss, epsilon=0.2, epsilon_high=0.3, ratio_max=1.7),
        lambda *x: grpo_by_hand(*x, 0.2, 0.3, 1.7),
    ),
    "cispo": (
        functools.partial(cispo_loss, ratio_max=1.5),
        lambda *x: cispo_by_hand(*x, 1.5),
    ),
    "sapo": (sapo_loss, lambda *x: sapo_by_hand(*x, 1.0, 1.05)),
    "sapo with temperatures": (
        functools.partial(sapo_loss, temperature=0.5, negative_temperature=2.0),
        lambda *x: sapo_by_hand(*x, 0.5, 2.0),
    ),
}
of_each = pytest.mark.parametrize(("loss", "by_hand"), LOSSES.values(), ids=LOSSES)


@pytest.fixture
def batch(rng):
    """Ratios on both sides of every bound, with advantages of both signs."""
    old = -rng.uniform(0.1, 3, size=(4, 10)).astype(np.float32)
    log_prob = old + rng.normal(scale=0.6, size=old.shape).astype(np.float32)
    return log_prob, old, rng.normal(size=old.shape).astype(np.float32)


@of_each
class TestEveryLoss:
    def test_agrees_with_the_definition(self, loss, by_hand, batch):
        expected = np.vectorize(by_hand)(*map(np.float64, batch))
        result = loss(*batch, reduction="none")
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    def test_padding_may_hold_anything(self, loss, by_hand, batch):
        mask = np.random.default_rng(1).uniform(size=batch[0].shape) < 0.6
        kept = [x[mask] for x in batch]
        spoilt = [np.where(mask, x, np.nan) for x in batch]
        expected = np.vectorize(by_hand)(*map(np.float64, kept)).mean()
        value, slope = jax.value_and_grad(loss)(*spoilt, mask_t=mask)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        alone = jax.grad(loss)(*kept)
        np.testing.assert_allclose(slope[mask], alone, rtol=1e-5, atol=1e-7)
        assert not slope[~mask].any()
        assert loss(*spoilt, mask_t=np.zeros_like(mask)) == 0

    def test_an_advantage_of_a_sequence_is_that_of_its_tokens(
        self, loss, by_hand, batch
    ):
        log_prob, old, adv = batch
        each = np.broadcast_to(adv[:, :1], adv.shape)
        np.testing.assert_array_equal(
            loss(log_prob, old, adv[:, 0]), loss(log_prob, old, each)
        )

    def test_on_its_own_samples_the_gradient_is_the_policy_gradient(
        self, loss, by_hand, batch
    ):
        """Though the same numbers stand for the policy that acted."""
        log_prob, _, adv = batch
        slope = jax.grad(lambda x: loss(x, x, adv, reduction="sum"))(log_prob)
        np.testing.assert_allclose(slope, -adv, rtol=1e-5)

    def test_an_advantage_of_zero_has_no_gradient(self, loss, by_hand, batch):
        log_prob, old, _ = batch
        slope = jax.grad(loss)(log_prob, old, np.zeros(4, np.float32))
        assert not slope.any()


@pytest.mark.parametrize("name", ["two-sided", "cispo", "sapo"])
@pytest.mark.parametrize("adv", [1.0, 0.0, -1.0])
def test_ratios_that_overflow_leave_finite_losses_and_gradients(name, adv):
    loss, _ = LOSSES[name]
    low, high, advs = jnp.full((1, 2), -1e3), -jnp.ones((1, 2)), jnp.array([adv])
    for log_prob, old in ((low, high), (high, low), (low, low)):
        value, slope = jax.value_and_grad(loss)(log_prob, old, advs)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def gradient_of(loss, log_ratio, adv, **given):
    """At a token of probability e⁻¹ under the policy that drew it."""
    x = jnp.array([log_ratio - 1.0])
    fn = lambda x: loss(x, -jnp.ones(1), adv * jnp.ones(1), **given)
    return jax.grad(fn)(x).item()


class TestGrpoLoss:
    def test_a_ratio_that_overflows_is_bounded_for_a_positive_advantage_alone(self):
        run = jax.value_and_grad(functools.partial(grpo_loss, epsilon=0.25))
        value, slope = run(-jnp.ones(1), jnp.array([-1e3]), 2.0)
        assert (value, slope.tolist()) == (-2.5, [0])
        assert run(-jnp.ones(1), jnp.array([-1e3]), -2.0)[0] == math.inf

    @pytest.mark.parametrize(
        ("ratio", "adv", "flows"),
        [
            (1.25, 1, True),  # below the higher bound
            (1.35, 1, False),
            (0.5, 1, True),
            (0.75, -1, False),
            (0.85, -1, True),
            (1.5, -1, True),
            (2.5, -1, False),  # above the largest ratio
        ],
    )
    def test_the_gradient_ends_where_nothing_is_gained(self, ratio, adv, flows):
        slope = gradient_of(
            grpo_loss,
            math.log(ratio),
            adv,
            epsilon=0.2,
            epsilon_high=0.3,
            ratio_max=2.0,
        )
        expected = -ratio * adv if flows else 0
        np.testing.assert_allclose(slope, expected, rtol=1e-5)

    def test_an_epsilon_of_one_has_no_lower_bound(self):
        slope = gradient_of(grpo_loss, -50.0, -1.0, epsilon=1.0)
        np.testing.assert_allclose(slope, math.exp(-50), rtol=1e-5)

    def test_refuses_a_negative_epsilon(self):
        message = r"^grpo_loss: epsilon must be in \[0, inf\], got -0\.1\.$"
        with pytest.raises(ValueError, match=message):
            grpo_loss(jnp.ones(2), jnp.ones(2), 1.0, epsilon=-0.1)

    def test_as_published_it_is_a_mean_of_means_of_sequences(self, batch):
        log_prob, old, adv = batch
        mask = np.arange(10) < np.array([10, 3, 1, 7])[:, None]
        losses = grpo_loss(log_prob, old, adv, epsilon=0.2, reduction="none")
        expected = np.mean([np.mean(x[m]) for x, m in zip(losses, mask, strict=True)])
        result = aggregate_tokens(losses, "sequence_mean", mask_t=mask)
        np.testing.assert_allclose(result, expected, rtol=1e-5)


class TestCispoLoss:
    @pytest.mark.parametrize("adv", [2.0, -2.0])
    @pytest.mark.parametrize("ratio", [0.1, 1.2, 50.0])
    def test_every_token_keeps_a_bounded_gradient(self, ratio, adv):
        slope = gradient_of(cispo_loss, math.log(ratio), adv, ratio_max=3.0)
        np.testing.assert_allclose(slope, -min(ratio, 3.0) * adv, rtol=1e-5)

    def test_an_impossible_token_costs_nothing(self):
        value, slope = jax.value_and_grad(cispo_loss)(
            jnp.array([-jnp.inf]), -jnp.ones(1), 1.0, ratio_max=2.0
        )
        assert (value, slope.tolist()) == (0, [0])


class TestSapoLoss:
    @pytest.mark.parametrize(("adv", "tau"), [(1.0, 0.5), (-1.0, 3.0)])
    def test_the_gate_of_the_gradient_is_one_at_a_ratio_of_one(self, adv, tau):
        """And fades out as 4 σ(1 - σ), in both directions."""
        given = {"temperature": 0.5, "negative_temperature": 3.0}
        for ratio in (0.2, 1.0, 4.0):
            gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
            expected = -4 * gate * (1 - gate) * ratio * adv
            slope = gradient_of(sapo_loss, math.log(ratio), adv, **given)
            np.testing.assert_allclose(slope, expected, rtol=1e-3)

    def test_the_defaults_are_the_papers(self, batch):
        explicit = sapo_loss(*batch, temperature=1.0, negative_temperature=1.05)
        assert sapo_loss(*batch) == explicit

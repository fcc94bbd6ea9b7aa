"""Policy losses of sequences, against loops over their tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.sequence_losses import gmpo_loss, gspo_loss, gspo_token_loss
from rlprims.tokens import aggregate_tokens

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def gspo_by_hand(log_prob, old, adv):
    """With bounds of 0.1 and 0.3."""
    ratio = math.exp(np.mean(np.float64(log_prob) - old))
    return -min(ratio * adv, min(max(ratio, 0.9), 1.3) * adv)


def gmpo_by_hand(log_prob, old, adv):
    """With bounds of e^-0.1 and e^0.3; a product of |min(ρA, clip(ρ)A)|^(1/T)."""
    product = 1
    for d in np.float64(log_prob) - old:
        low, high = math.exp(-0.1), math.exp(0.3)
        ratio = math.exp(d)
        gain = min(ratio * np.sign(adv), min(max(ratio, low), high) * np.sign(adv))
        product *= abs(gain) ** (1 / len(log_prob))
    return -adv * product


EPSILONS = {"epsilon": 0.1, "epsilon_high": 0.3}
gspo, gspo_token, gmpo = (
    functools.partial(fn, **EPSILONS) for fn in (gspo_loss, gspo_token_loss, gmpo_loss)
)
LOSSES = {
    "gspo": (gspo, gspo_by_hand),
    "gspo_token": (gspo_token, gspo_by_hand),
    "gmpo": (gmpo, gmpo_by_hand),
}
of_each = pytest.mark.parametrize(("loss", "by_hand"), LOSSES.values(), ids=LOSSES)
IDS = np.array([3, 3, 3, 0, 0, 0, 0, 5, 1, 1, 7, 7])
MASK = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0], bool)


@pytest.fixture
def batch(rng):
    """Four rows, which are a sequence each, with ratios beyond every bound."""
    old = -rng.uniform(0.1, 3, size=(4, 12)).astype(np.float32)
    log_prob = old + rng.normal(scale=0.4, size=old.shape).astype(np.float32)
    log_prob += np.float32([[0.5], [-0.5], [0.4], [-0.4]])
    return log_prob, old, np.float32([1.5, 0.7, -0.6, -2.0])


@pytest.fixture
def packed(rng):
    old = -rng.uniform(0.1, 3, size=12).astype(np.float32)
    log_prob = old + rng.normal(scale=0.6, size=12).astype(np.float32)
    adv = np.float32(rng.normal(size=12))[IDS]
    return [np.where(MASK, x, np.nan) for x in (log_prob, old, adv)]


def sequences(packed):
    """Yields where the tokens of each packed sequence are, and what they hold."""
    for i in np.unique(IDS[MASK]):
        where = np.flatnonzero(np.equal(IDS, i) & MASK)
        log_prob, old, adv = (x[where] for x in packed)
        yield where, (log_prob, old, adv[0])


@of_each
class TestEveryLoss:
    def test_agrees_with_the_definition(self, loss, by_hand, batch):
        expected = [by_hand(*row) for row in zip(*batch, strict=True)]
        result = loss(*batch, reduction="none")
        np.testing.assert_allclose(result, np.transpose([expected] * 12), rtol=1e-5)
        np.testing.assert_allclose(loss(*batch), np.mean(expected), rtol=1e-5)

    def test_of_packed_sequences_is_that_of_each_apart(self, loss, by_hand, packed):
        run = functools.partial(
            loss, mask_t=MASK, segment_ids=np.where(MASK, IDS, -4), reduction="none"
        )
        weights = np.cos(np.arange(12.0)).astype(np.float32)
        result = run(*packed)
        slope = jax.grad(lambda x: jnp.vdot(weights, run(x, *packed[1:])))(packed[0])
        expected, slopes = np.zeros(12), np.zeros(12)
        for where, (log_prob, old, adv) in sequences(packed):
            expected[where] = by_hand(log_prob, old, adv)
            one = lambda x, old=old, adv=adv, where=where: jnp.vdot(
                weights[where], loss(x, old, adv, reduction="none")
            )
            slopes[where] = jax.grad(one)(log_prob)
        np.testing.assert_allclose(result, expected, rtol=1e-5)
        np.testing.assert_allclose(slope, slopes, rtol=1e-4, atol=1e-6)

    def test_on_its_own_samples_the_gradient_is_the_policy_gradient(
        self, loss, by_hand, batch
    ):
        """Of the mean over the tokens of a sequence."""
        log_prob, _, adv = batch
        slope = jax.grad(lambda x: loss(x, x, adv))(log_prob)
        expected = np.broadcast_to(-adv[:, None] / 48, slope.shape)
        np.testing.assert_allclose(slope, expected, rtol=1e-5)

    def test_of_padding_alone_is_zero(self, loss, by_hand, batch):
        spoilt = [np.full_like(x, np.nan) for x in batch]
        none = np.zeros((4, 12), bool)
        value, slope = jax.value_and_grad(loss)(*spoilt, mask_t=none)
        assert value == 0
        assert not slope.any()

    @pytest.mark.parametrize("adv", [1.0, 0.0, -1.0])
    def test_saturated_ratios_leave_finite_gradients(self, loss, by_hand, adv):
        low, high = jnp.full((1, 3), -60.0), jnp.full((1, 3), -1.0)
        for log_prob, old in ((low, high), (high, low)):
            value, slope = jax.value_and_grad(loss)(log_prob, old, jnp.array([adv]))
            assert np.isfinite(value)
            assert np.isfinite(slope).all()
        far = jax.grad(loss)(jnp.zeros((1, 3)), jnp.full((1, 3), -400.0), jnp.ones(1))
        assert not far.any()

    @pytest.mark.parametrize("wrong", [-1, 12])
    def test_a_token_of_no_sequence_makes_it_nan(self, loss, by_hand, batch, wrong):
        log_prob, old, _ = (x[0] for x in batch)
        ids = np.where(np.arange(12) == 5, wrong, 0)
        losses = loss(log_prob, old, 1.0, segment_ids=ids, reduction="none")
        assert np.flatnonzero(np.isnan(losses)).tolist() == [5]
        assert np.isnan(loss(log_prob, old, 1.0, segment_ids=ids))

    def test_bounds_above_are_those_below_unless_told(self, loss, by_hand, batch):
        both = loss.func(*batch, epsilon=0.1, epsilon_high=0.1)
        assert loss.func(*batch, epsilon=0.1) == both


@pytest.mark.parametrize("loss", [gspo, gmpo])
class TestReductionsOfSequences:
    def test_the_mean_is_over_sequences_and_not_tokens(self, loss, packed):
        ids = np.where(MASK, IDS, -4)
        expected = [loss(*args) for _, args in sequences(packed)]
        run = functools.partial(loss, *packed, mask_t=MASK, segment_ids=ids)
        np.testing.assert_allclose(run(), np.mean(expected), rtol=1e-5)
        np.testing.assert_allclose(run(reduction="sum"), np.sum(expected), rtol=1e-5)

    def test_a_sequence_without_tokens_is_left_out(self, loss, batch):
        mask = np.ones((4, 12), bool)
        mask[2] = False
        expected = np.mean([loss(*(x[i] for x in batch)) for i in (0, 1, 3)])
        np.testing.assert_allclose(loss(*batch, mask_t=mask), expected, rtol=1e-5)


class TestGspoTokenLoss:
    def test_with_one_advantage_it_is_gspo_in_value_and_gradient(self, batch):
        log_prob, old, adv = batch
        token = lambda x: aggregate_tokens(
            gspo_token(x, old, adv, reduction="none"), "sequence_mean"
        )
        value, slope = jax.value_and_grad(token)(log_prob)
        whole, of_whole = jax.value_and_grad(gspo)(log_prob, old, adv)
        np.testing.assert_allclose(value, whole, rtol=1e-6)
        np.testing.assert_allclose(slope, of_whole, rtol=1e-5, atol=1e-7)

    def test_each_token_has_its_own_advantage_and_one_ratio(self):
        old, adv = jnp.array([-1.0, -2.0]), jnp.array([1.0, 3.0])
        log_prob = old + jnp.array([0.1, -0.3])
        ratio = math.exp(-0.1)
        run = lambda x: gspo_token(x, old, adv, reduction="sum")
        value, slope = jax.value_and_grad(run)(log_prob)
        np.testing.assert_allclose(value, -4 * ratio, rtol=1e-6)
        np.testing.assert_allclose(slope, [-ratio, -3 * ratio], rtol=1e-6)


class TestGmpoLoss:
    def test_a_token_beyond_its_bound_has_no_gradient_and_the_others_do(self):
        old, ratios = -jnp.ones(3), jnp.array([0.2, 1.1, 3.0])
        log_prob = old + jnp.log(ratios)
        up = jax.grad(gmpo)(log_prob, old, 1.0)
        down = jax.grad(gmpo)(log_prob, old, -1.0)
        assert (up != 0).tolist() == [True, True, False]
        assert (down != 0).tolist() == [False, True, True]

    def test_the_default_is_the_papers(self, batch):
        assert gmpo_loss(*batch) == gmpo_loss(*batch, epsilon=0.4, epsilon_high=0.4)

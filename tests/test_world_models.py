"""Pieces of a world model, against loops in double precision."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

pytestmark = pytest.mark.usefixtures("quick_to_compile")

KEY = jax.random.key(2)
NAN = np.float32(np.nan)


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def softmax(logits):
    exps = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exps) for x in exps]


def kl_by_hand(posterior, prior):
    """Of one step: the sum over groups of that of each."""
    total = 0
    for q_logits, p_logits in zip(posterior, prior, strict=True):
        pairs = zip(softmax(q_logits), softmax(p_logits), strict=True)
        total += sum(q * math.log(q / p) for q, p in pairs if q)
    return total


SETTINGS = {"dynamics_coefficient": 0.5, "representation_coefficient": 0.1}


class TestBalancedKl:
    def loss(self, posterior, prior, **given):
        return rlprims.balanced_kl_loss(posterior, prior, **SETTINGS | given)

    def logits(self, rng, scale):
        """Steps of which some are further apart than one nat, and some are not."""
        scales = np.float32(scale).reshape(-1, 1, 1)
        return rng.normal(size=(2, len(scale), 3, 4)).astype(np.float32) * scales

    def test_is_that_of_its_definition_step_by_step(self, rng):
        posterior, prior = self.logits(rng, [0.1, 1, 2, 0.3])
        kls = np.array([*map(kl_by_hand, posterior.tolist(), prior.tolist())])
        assert [*(kls > 1)] == [False, True, True, False]
        expected = 0.6 * np.maximum(kls, 1)
        got = self.loss(posterior, prior, reduction="none")
        same(got, expected)
        same(self.loss(posterior, prior), expected.mean())
        same(self.loss(posterior, prior, reduction="sum"), expected.sum())
        free = self.loss(posterior, prior, free_nats=0.0, reduction="none")
        same(free, 0.6 * kls, atol=1e-5)

    def test_each_distribution_learns_at_its_own_speed_and_not_below_the_free_nats(
        self, rng
    ):
        posterior, prior = self.logits(rng, [0.1, 1, 2])

        def kl(posterior, prior):
            each = rlprims.categorical_kl_divergence(posterior, prior)
            return each.sum(axis=-1)[1:].sum()  # the first is below

        plain = jax.grad(kl, argnums=(0, 1))(posterior, prior)
        fn = lambda q, p: self.loss(q, p, reduction="sum")
        to_posterior, to_prior = jax.grad(fn, argnums=(0, 1))(posterior, prior)
        same(to_posterior, 0.1 * plain[0])
        same(to_prior, 0.5 * plain[1])
        assert not to_posterior[0].any()
        assert not to_prior[0].any()

    def test_gradients_of_the_prior_are_those_of_a_cross_entropy(self, rng):
        posterior, prior = self.logits(rng, [2])
        fn = lambda p: self.loss(posterior, p, reduction="sum")
        groups = zip(posterior[0].tolist(), prior[0].tolist(), strict=True)
        by_hand = [np.subtract(softmax(p), softmax(q)) * 0.5 for q, p in groups]
        same(jax.grad(fn)(prior)[0], by_hand)

    def test_with_the_flag_off_both_terms_move_both(self, rng):
        posterior, prior = self.logits(rng, [2, 3])
        flowing = {"stop_target_gradients": False, "reduction": "sum"}
        fn = lambda q, p: self.loss(q, p, **flowing)
        kl = lambda q, p: rlprims.categorical_kl_divergence(q, p).sum()
        got = jax.grad(fn, argnums=(0, 1))(posterior, prior)
        plain = jax.grad(kl, argnums=(0, 1))(posterior, prior)
        same(got[0], 0.6 * plain[0])
        same(got[1], 0.6 * plain[1])

    def test_free_nats_are_of_a_step_not_of_a_group_nor_of_the_mean(self):
        """Three groups of log 2 each, and a step of nothing."""
        posterior = np.float32([[[90, 0]] * 3, [[0, 0]] * 3])
        prior = np.zeros_like(posterior)
        got = self.loss(posterior, prior, reduction="none")
        same(got, [0.6 * 3 * math.log(2), 0.6])

    def test_padding_is_left_out_with_its_nan(self, rng):
        posterior, prior = self.logits(rng, [1, 2, 3])
        padded = np.concatenate([posterior, np.full_like(posterior[:1], NAN)])
        mask = np.array([True, True, True, False])
        longer = np.concatenate([prior, padded[-1:]])
        fn = lambda q: self.loss(q, longer, mask_t=mask)
        value, slope = jax.value_and_grad(fn)(padded)
        expected, its = jax.value_and_grad(self.loss)(posterior, prior)
        same(value, expected)
        same(slope, np.append(its, np.zeros_like(its[:1]), 0))
        assert self.loss(padded, padded, mask_t=np.zeros(4, bool)) == 0

    def test_classes_that_neither_has_add_nothing(self):
        posterior = np.float32([[1, 2, -np.inf], [0, 3, 1]])
        prior = np.float32([[2, 0, -np.inf], [1, 1, 1]])
        fn = lambda q, p: self.loss(q, p, free_nats=0.0)
        value, slopes = jax.value_and_grad(fn, argnums=(0, 1))(posterior, prior)
        fewer = kl_by_hand([[1, 2]], [[2, 0]]) + kl_by_hand([[0, 3, 1]], [[1, 1, 1]])
        same(value, 0.6 * fewer)
        assert all(np.isfinite(x).all() for x in slopes)

    def test_nan_shows(self):
        assert np.isnan(self.loss(np.full((1, 2), NAN), np.zeros((1, 2), np.float32)))

    def test_coefficients_have_no_default(self):
        with pytest.raises(TypeError, match="dynamics_coefficient"):
            rlprims.balanced_kl_loss(np.ones((1, 2)), np.ones((1, 2)))

    def test_negative_free_nats_are_refused(self):
        with pytest.raises(ValueError, match=r"free_nats must be in \[0, inf\)"):
            self.loss(jnp.ones((1, 2)), jnp.ones((1, 2)), free_nats=-1.0)


class TestImaginationWeights:
    def test_are_products_of_the_discounts_before(self, rng):
        discounts = rng.uniform(size=7).astype(np.float32)
        expected = [math.prod(discounts[:t].tolist()) for t in range(7)]
        same(rlprims.imagination_weights(discounts), expected)

    def test_the_last_discount_weighs_nothing(self):
        assert rlprims.imagination_weights(np.full(1, NAN)).tolist() == [1]

    def test_stay_zero_after_an_end_whatever_follows(self):
        discounts = np.float32([0.5, 0, 0.5, np.nan, np.inf, 1])

        def total(discounts):
            weights = rlprims.imagination_weights(discounts, use_stop_gradient=False)
            return weights.sum(), weights

        (_, weights), slope = jax.value_and_grad(total, has_aux=True)(discounts)
        assert weights.tolist() == [1, 0.5, 0, 0, 0, 0]
        assert np.isfinite(slope).all()

    def test_nan_before_an_end_shows_until_then(self):
        discounts = np.float32([1, np.nan, 1, 1])
        got = rlprims.imagination_weights(discounts)
        np.testing.assert_array_equal(got, [1, 1, NAN, NAN])

    def test_gradients_are_right_at_a_discount_of_zero(self):
        discounts = np.float32([0.5, 0, 0.25, 1])
        fn = lambda x: rlprims.imagination_weights(x, use_stop_gradient=False).sum()
        # of 1 + a + a b + a b c
        same(jax.grad(fn)(discounts), [1, 0.5 + 0.5 * 0.25, 0, 0])
        held = jax.grad(lambda x: rlprims.imagination_weights(x).sum())(discounts)
        assert not held.any()

    def test_are_those_that_a_return_gives_its_rewards(self, rng):
        """The gradient of the discounted return with respect to each reward."""
        discounts, rewards = rng.uniform(size=(2, 6)).astype(np.float32)
        first = lambda r: rlprims.discounted_returns(r, discounts, 0.0)[0]
        same(rlprims.imagination_weights(discounts), jax.grad(first)(rewards))

    def test_are_float32_inside(self):
        """A product of 200 discounts in half precision would be off by a tenth."""
        discounts = jnp.full(200, 0.99, jnp.bfloat16)
        got = rlprims.imagination_weights(discounts)
        assert got.dtype == jnp.bfloat16
        same(np.float32(got[-1]), float(discounts[0]) ** 199, rtol=4e-3)


class TestMixWithUniform:
    @pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.01, 0.5, 1.0])
    def test_is_the_logarithm_of_the_mixture(self, epsilon, rng):
        logits = rng.normal(scale=5, size=(20, 4)).astype(np.float32)
        got = rlprims.mix_with_uniform(logits, epsilon=epsilon)
        probs = np.array([*map(softmax, logits.tolist())])
        same(got, np.log((1 - epsilon) * probs + epsilon / 4), atol=1e-5)

    def test_holds_at_what_is_too_small_to_represent(self):
        logits = np.float32([0, -500, -np.inf])
        none = rlprims.mix_with_uniform(logits, epsilon=0.0)
        assert none.tolist() == [0, -500, -np.inf]
        some = rlprims.mix_with_uniform(logits)
        same(some, np.log([0.99 + 0.01 / 3, 0.01 / 3, 0.01 / 3]))

    def test_gradients_are_finite_and_right_at_both_ends_of_epsilon(self):
        logits = np.float32([1, 0, -1])
        fn = lambda x, e: rlprims.mix_with_uniform(x, epsilon=e)
        probs = np.array(softmax(logits.tolist()))
        for epsilon in (0.0, 1.0):
            to_logits, to_epsilon = jax.jacobian(fn, (0, 1))(logits, epsilon)
            mixture = (1 - epsilon) * probs + epsilon / 3
            slope = np.diag(probs) - np.outer(probs, probs)
            same(to_logits, (1 - epsilon) * slope / mixture[:, None])
            same(to_epsilon, (1 / 3 - probs) / mixture)

    def test_gradients_are_finite_where_probabilities_saturate(self):
        logits = np.float32([200, 0, -np.inf])
        for epsilon in (0.0, 0.01):
            fn = lambda x, e=epsilon: rlprims.mix_with_uniform(x, epsilon=e)[:2].sum()
            assert np.isfinite(jax.grad(fn)(logits)).all()

    def test_is_of_legal_actions_alone(self):
        logits = np.float32([[1, np.nan, 2], [np.nan, np.nan, 3]])
        mask = np.array([[True, False, True], [False, False, True]])
        fn = lambda x: rlprims.mix_with_uniform(x, epsilon=0.25, mask=mask)
        got, transpose = jax.vjp(fn, logits)
        two = 0.75 * np.array(softmax([1, 2])) + 0.125
        same(got[0], [math.log(two[0]), -np.inf, math.log(two[1])])
        same(got[1], [-np.inf, -np.inf, 0])
        (slope,) = transpose(np.where(mask, np.float32([[1, 1, 2]]), 0))
        assert np.isfinite(slope).all()
        assert not slope[~mask].any()

    def test_no_legal_action_gives_nan_without_a_gradient(self):
        mask = np.zeros(2, bool)
        fn = lambda x, e: rlprims.mix_with_uniform(x, epsilon=e, mask=mask).sum()
        value, slopes = jax.value_and_grad(fn, (0, 1))(np.ones(2, np.float32), 0.5)
        assert np.isnan(value)
        assert not any(np.any(x) for x in slopes)

    def test_one_action_is_certain(self):
        same(rlprims.mix_with_uniform(np.float32([[7]])), [[0]])

    def test_keeps_a_divergence_bounded(self):
        posterior, prior = np.float32([[900, 0]]), np.float32([[0, 900]])
        mixed = map(rlprims.mix_with_uniform, (posterior, prior))
        kl = rlprims.categorical_kl_divergence(*mixed)
        same(kl, [(0.995 - 0.005) * math.log(0.995 / 0.005)])


class TestStraightThrough:
    def test_gives_one_hot_vectors_exactly(self, rng):
        logits = rng.normal(scale=3, size=(500, 6)).astype(np.float32)
        got = np.asarray(rlprims.straight_through_sample(KEY, logits))
        assert set(np.unique(got)) == {0, 1}
        assert (got.sum(axis=-1) == 1).all()

    def test_draws_each_class_as_often_as_it_should(self):
        logits = np.float32([0, 1, 2, -np.inf])
        draws = rlprims.straight_through_sample(KEY, np.tile(logits, (20_000, 1)))
        probs = np.array([*softmax([0, 1, 2]), 0])
        error = np.sqrt(probs * (1 - probs) / 20_000)
        assert (abs(np.asarray(draws).mean(axis=0) - probs) <= 4 * error).all()

    def test_has_the_gradient_of_the_probabilities(self, rng):
        logits, weights = rng.normal(size=(2, 5)).astype(np.float32)
        fn = lambda x: rlprims.straight_through_sample(KEY, x) @ weights
        probs = np.array(softmax(logits.tolist()))
        same(jax.grad(fn)(logits), probs * (weights - probs @ weights))

    def test_never_draws_what_is_not_legal(self):
        logits = np.full((200, 3), np.float32([0, np.nan, 9]))
        mask = np.array([[True, False, True]]).repeat(200, 0)
        fn = lambda x: rlprims.straight_through_sample(KEY, x, mask=mask)
        got, transpose = jax.vjp(fn, logits)
        assert not got[:, 1].any()
        assert (got.sum(axis=-1) == 1).all()
        (slope,) = transpose(np.ones_like(logits) * np.float32([1, 5, 3]))
        assert np.isfinite(slope).all()
        assert not slope[:, 1].any()

    def test_no_legal_action_gives_nan_without_a_gradient(self):
        mask = np.zeros(2, bool)
        fn = lambda x: rlprims.straight_through_sample(KEY, x, mask=mask).sum()
        value, slope = jax.value_and_grad(fn)(np.ones(2, np.float32))
        assert np.isnan(value)
        assert not slope.any()

    def test_saturated_probabilities_have_finite_gradients(self):
        logits = np.float32([500, 0, -np.inf])
        fn = lambda x: rlprims.straight_through_sample(KEY, x) @ np.float32([1, 2, 3])
        assert np.isfinite(jax.grad(fn)(logits)).all()

    def test_half_precision_is_exact_too(self):
        logits = jnp.array(list(itertools.product([0.3, 2.0], repeat=3)), jnp.bfloat16)
        got = rlprims.straight_through_sample(KEY, logits)
        assert got.dtype == jnp.bfloat16
        assert set(np.unique(np.float32(got))) == {0, 1}

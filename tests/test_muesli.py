"""The CMPO policy and its losses, against sums over actions and over samples."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims


def policy_by_hand(prior, adv, c):
    """Probabilities of actions, from those of the prior."""
    pairs = zip(prior, adv, strict=True)
    parts = [p * math.exp(min(max(a, -c), c)) for p, a in pairs]
    return np.array(parts) / sum(parts)


def divergence_by_hand(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def weights_by_hand(adv, c, z_init=1.0):
    """Each sample over what is left of the normaliser without it."""
    parts, size = [math.exp(min(max(a, -c), c)) for a in adv], len(adv)
    return [
        parts[i] / ((z_init + sum(parts[k] for k in range(size) if k != i)) / size)
        for i in range(size)
    ]


def softmax(logits):
    exps = np.exp(np.float64(logits) - np.max(logits))
    return exps / exps.sum()


@pytest.fixture
def examples(rng):
    """Logits, logits of a prior and advantages, most of them beyond one."""
    return rng.normal(scale=2, size=(3, 20, 4)).astype(np.float32)


class TestPolicy:
    @pytest.mark.parametrize("c", [0.0, 0.5, 1.0, np.inf])
    def test_is_the_prior_times_exponentials(self, examples, c):
        _, prior, adv = examples
        result = rlprims.cmpo_policy(prior, adv, max_adv=c)
        for i in range(20):
            expected = policy_by_hand(softmax(prior[i]), np.float64(adv[i]), c)
            np.testing.assert_allclose(result[i], expected, rtol=2e-5)

    def test_is_the_prior_if_no_advantage_counts(self, examples):
        _, prior, adv = examples
        result = rlprims.cmpo_policy(prior, np.inf * adv, max_adv=0.0)
        np.testing.assert_allclose(result, jax.nn.softmax(prior), rtol=1e-6)

    @pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
    def test_is_never_further_from_the_prior_than_the_theorem_says(self, examples, c):
        _, prior, adv = examples
        result = rlprims.cmpo_policy(prior, 9 * adv, max_adv=c)
        distance = np.abs(result - jax.nn.softmax(prior)).sum(axis=-1) / 2
        assert (distance <= math.tanh(c / 2) + 1e-6).all()
        # It is that far from one prior over two actions, one good and one bad.
        prior, adv = jnp.array([-c / 2, c / 2]), jnp.array([9.0, -9.0])
        worst = rlprims.cmpo_policy(prior, adv, max_adv=c) - jax.nn.softmax(prior)
        np.testing.assert_allclose(worst[0], math.tanh(c / 2), rtol=1e-5)

    def test_of_one_action_is_sure(self):
        assert rlprims.cmpo_policy(jnp.array([-70.0]), jnp.array([np.inf])) == 1

    def test_of_legal_actions_is_that_of_leaving_out_the_others(self, examples):
        _, prior, adv = examples
        mask = np.array([True, False, True, False])
        prior, adv = (np.where(mask, x, np.nan) for x in (prior, adv))
        result = rlprims.cmpo_policy(prior, adv, mask=np.broadcast_to(mask, (20, 4)))
        assert not result[:, ~mask].any()
        expected = rlprims.cmpo_policy(prior[:, mask], adv[:, mask])
        np.testing.assert_allclose(result[:, mask], expected, rtol=1e-6)

    def test_nothing_can_raise_what_the_prior_excludes(self):
        prior, adv = jnp.array([0.0, -jnp.inf]), jnp.array([-9.0, jnp.nan])
        assert rlprims.cmpo_policy(prior, adv).tolist() == [1, 0]

    def test_where_no_action_is_legal_there_is_none(self):
        def total(prior, adv):
            policy = rlprims.cmpo_policy(
                prior, adv, mask=jnp.zeros(2, bool), stop_target_gradients=False
            )
            return jnp.sum(policy), policy

        gradients, policy = jax.grad(total, (0, 1), has_aux=True)(*jnp.ones((2, 2)))
        assert np.isnan(policy).all()
        assert not np.any(gradients)

    def test_is_that_of_sure_priors_too(self):
        prior, adv = jnp.array([200.0, 0.0]), jnp.array([-1.0, 1.0])
        policy = rlprims.cmpo_policy(prior, adv)
        np.testing.assert_allclose(policy, [1, 0], atol=1e-30)


class TestLoss:
    @pytest.mark.parametrize("c", [0.5, 1.0])
    def test_is_the_divergence_from_the_policy_to_become(self, examples, c):
        logits, prior, adv = examples
        result = rlprims.cmpo_loss(logits, prior, adv, max_adv=c, reduction="none")
        expected = [
            divergence_by_hand(
                policy_by_hand(softmax(prior[i]), np.float64(adv[i]), c),
                softmax(logits[i]),
            )
            for i in range(20)
        ]
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)
        for reduction, reduce in {"mean": np.mean, "sum": np.sum}.items():
            loss = rlprims.cmpo_loss(logits, prior, adv, max_adv=c, reduction=reduction)
            np.testing.assert_allclose(loss, reduce(expected), rtol=1e-5)

    def test_is_zero_at_that_policy_and_above_elsewhere(self, examples):
        logits, prior, adv = examples
        there = prior + np.clip(adv, -1, 1) + 5
        loss = functools.partial(rlprims.cmpo_loss, reduction="none")
        np.testing.assert_allclose(loss(there, prior, adv), 0, atol=1e-6)
        assert (loss(logits, prior, adv) > 0).all()

    def test_pulls_probabilities_towards_it(self, examples):
        """By the difference, as the cross-entropy from it does."""
        logits, prior, adv = examples
        loss = functools.partial(rlprims.cmpo_loss, reduction="sum")
        gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(logits, prior, adv)
        policy = rlprims.cmpo_policy(prior, adv)
        expected = jax.nn.softmax(logits) - policy
        np.testing.assert_allclose(gradients[0], expected, atol=1e-6)
        assert not np.any(gradients[1:])
        cross_entropy = lambda x: jnp.sum(rlprims.categorical_cross_entropy(policy, x))
        np.testing.assert_allclose(jax.grad(cross_entropy)(logits), expected, atol=1e-6)

    def test_a_target_held_constant_does_not_depend_on_the_bound(self, examples):
        @jax.jit
        @jax.grad
        def slope(c, flag):
            return rlprims.cmpo_loss(*examples, max_adv=c, stop_target_gradients=flag)

        assert slope(1.0, True) == 0
        assert abs(slope(1.0, False)) > 1e-3

    def test_padding_and_illegal_actions_are_cut_off(self, examples):
        mask_t = np.arange(20) < 5
        mask = np.broadcast_to([True, False, True, True], (20, 4))
        counts = mask_t[:, None] & mask  # in padding nothing is legal, or all is
        spoilt = [np.where(counts, x, np.nan) for x in examples]
        spoilt[0][10:], spoilt[1][10:], spoilt[2][10:] = [-np.inf, 0, 0, 0], 0, 0
        loss = functools.partial(rlprims.cmpo_loss, stop_target_gradients=False)
        legal = counts | (np.arange(20) >= 10)[:, None]
        cut = functools.partial(loss, mask=legal, mask_t=mask_t)
        value, gradients = jax.jit(jax.value_and_grad(cut, (0, 1, 2)))(*spoilt)
        apart = [x[:5][:, [0, 2, 3]] for x in examples]
        expected, slopes = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*apart)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for x, y in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(x[:5][:, [0, 2, 3]], y, rtol=1e-5, atol=1e-7)
            assert not np.any(x[~counts])

    def test_of_padding_alone_is_zero(self, examples):
        assert rlprims.cmpo_loss(*examples, mask_t=np.zeros(20, bool)) == 0

    def test_of_one_action_is_zero(self):
        one = jnp.ones((3, 1))
        assert rlprims.cmpo_loss(one, 2 * one, 3 * one) == 0

    def test_what_only_the_policy_excludes_costs_infinity(self):
        excluded, zero = jnp.array([0.0, -jnp.inf]), jnp.zeros(2)
        assert rlprims.cmpo_loss(excluded, zero, zero) == np.inf
        assert rlprims.cmpo_loss(excluded, excluded, zero) == 0

    def test_infinite_advantages_are_bounded_too(self):
        loss = functools.partial(rlprims.cmpo_loss, stop_target_gradients=False)
        args = jnp.zeros(2), jnp.zeros(2)
        value, slope = jax.value_and_grad(loss, 2)(*args, jnp.array([jnp.inf, 0.0]))
        assert value == loss(*args, jnp.array([1.0, 0.0]))
        assert slope[0] == 0
        assert np.isfinite(slope).all()

    def test_serves_unrolled_models_along_more_axes(self, examples):
        logits, prior, adv = (x.reshape(5, 2, 2, 4) for x in examples)
        whole = rlprims.cmpo_loss(logits, prior, adv)
        np.testing.assert_allclose(whole, rlprims.cmpo_loss(*examples), rtol=1e-6)


class TestSampledWeights:
    @pytest.mark.parametrize("c", [0.0, 0.5, 1.0, np.inf])
    def test_leave_each_sample_out_of_its_own_normalizer(self, examples, c):
        adv = examples[2]
        result = rlprims.sampled_cmpo_weights(adv, max_adv=c, initial_normalizer=2.0)
        expected = [weights_by_hand(np.float64(x), c, 2.0) for x in adv]
        np.testing.assert_allclose(result, expected, rtol=1e-5)

    def test_of_one_sample_is_its_exponential(self):
        adv = jnp.array([[0.5], [-2.0]])
        expected = [[math.exp(0.5)], [math.exp(-1)]]
        result = rlprims.sampled_cmpo_weights(adv)
        np.testing.assert_allclose(result, expected, rtol=1e-6)

    def test_are_one_where_no_advantage_counts(self, examples):
        weights = rlprims.sampled_cmpo_weights(examples[2], max_adv=0.0)
        np.testing.assert_allclose(weights, 1, rtol=1e-6)

    def test_in_expectation_are_the_policy_times_one_factor(self):
        """A sample is independent of its normaliser: over all draws, exactly."""
        prior, adv = np.array([0.5, 0.3, 0.2]), np.array([0.4, -0.6, 2.0])
        features, size = np.array([1.0, -3.0, 7.0]), 3
        draws = np.array([*itertools.product(range(3), repeat=size)])
        chances = prior[draws].prod(axis=1)
        with jax.enable_x64(True):
            weights = np.asarray(rlprims.sampled_cmpo_weights(adv[draws]))
            policy = np.asarray(rlprims.cmpo_policy(np.log(prior), adv))
        estimate = chances @ np.mean(weights * features[draws], axis=1)
        factor = 0.0
        exps = np.exp(np.clip(adv, -1, 1))
        for others in itertools.product(range(3), repeat=size - 1):
            normalizer = (1 + sum(exps[a] for a in others)) / size
            factor += prior[list(others)].prod() / normalizer
        scale = factor * (prior @ exps)
        np.testing.assert_allclose(estimate, scale * (policy @ features), rtol=1e-12)

    def test_of_many_samples_give_the_cross_entropy_from_the_policy(self, rng):
        prior, adv = np.array([0.5, 0.3, 0.2]), np.float32([0.4, -0.6, 2.0])
        log_pi = np.log(np.float32([0.2, 0.2, 0.6]))
        draws = rng.choice(3, p=prior, size=(40, 500))
        weights = rlprims.sampled_cmpo_weights(adv[draws])
        loss = rlprims.behaviour_cloning_loss(log_pi[draws], weight_t=weights)
        expected = -policy_by_hand(prior, adv, 1) @ log_pi
        np.testing.assert_allclose(loss, expected, rtol=0.01)

    def test_do_not_overflow(self):
        weights = rlprims.sampled_cmpo_weights(
            jnp.array([200.0, 200.0, -200.0]), max_adv=jnp.inf
        )
        np.testing.assert_allclose(weights, [3, 3, 0], rtol=1e-6, atol=1e-30)

    def test_samples_that_do_not_count_are_as_if_left_out(self, examples):
        adv, mask = examples[2], np.array([True, False, True, True])
        spoilt = np.where(mask, adv, np.nan)

        def total(adv, mask):
            weights = rlprims.sampled_cmpo_weights(
                adv, mask=mask, stop_target_gradients=False
            )
            return jnp.sum(weights**2), weights

        run = jax.jit(jax.grad(total, has_aux=True))
        gradient, weights = run(spoilt, np.broadcast_to(mask, (20, 4)))
        slope, expected = run(adv[:, mask], None)
        assert not np.any(weights[:, 1])
        assert not np.any(gradient[:, 1])
        np.testing.assert_allclose(weights[:, mask], expected, rtol=1e-6)
        np.testing.assert_allclose(gradient[:, mask], slope, rtol=1e-5, atol=1e-6)

    def test_are_zero_where_no_sample_counts(self):
        weights = rlprims.sampled_cmpo_weights(jnp.ones(3), mask=jnp.zeros(3, bool))
        assert weights.tolist() == [0, 0, 0]

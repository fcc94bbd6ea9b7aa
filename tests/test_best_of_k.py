"""Success within `k` attempts, against counting all subsets."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.best_of_k import pass_at_k, pass_at_k_rewards

pytestmark = pytest.mark.usefixtures("quick_to_compile")


class TestPassAtK:
    @pytest.mark.parametrize("k", [1, 2, 3, 7])
    def test_is_the_fraction_of_subsets_with_a_success(self, k):
        pairs = [(n, c) for n in range(k, 12) for c in range(n + 1)]
        expected = [
            float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for n, c in pairs
        ]
        result = pass_at_k(*np.array(pairs).T, k)
        np.testing.assert_allclose(result, expected, rtol=2e-6)

    def test_keeps_the_digits_of_a_small_probability(self):
        np.testing.assert_allclose(pass_at_k(10**7, 1, 3), 3e-7, rtol=1e-5)

    def test_is_exact_where_it_is_certain(self):
        result = pass_at_k(jnp.array([4, 4, 4, 200]), jnp.array([0, 4, 3, 199]), 2)
        assert result.tolist() == [0, 1, 1, 1]

    def test_stays_right_for_many_samples(self):
        n, c, k = 1000, 20, 100
        expected = float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
        np.testing.assert_allclose(pass_at_k(n, c, k), expected, rtol=1e-5)

    @pytest.mark.parametrize(("n", "c"), [(1, 0), (0, 0), (4, 5), (4, -1), (-3, -3)])
    def test_is_nan_where_it_cannot_be_known(self, n, c):
        assert np.isnan(pass_at_k(n, c, 2))

    @pytest.mark.parametrize("k", [0, -1])
    def test_refuses_no_attempts(self, k):
        with pytest.raises(
            ValueError, match=rf"^pass_at_k: k must be at least 1, got {k}\.$"
        ):
            pass_at_k(4, 1, k)

    def test_its_expectation_is_pass_at_k(self):
        """Over all outcomes of five attempts, each of which succeeds 3 times of 10."""
        p, n, k = 0.3, 5, 2
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = np.dot(chance, pass_at_k(np.full(n + 1, n), np.arange(n + 1), k))
        np.testing.assert_allclose(mean, 1 - (1 - p) ** k, rtol=1e-6)


def rewards_by_hand(rewards, k, baseline):
    """Goes through all subsets of `k`."""
    n, out = len(rewards), np.zeros(len(rewards))
    subsets = list(itertools.combinations(range(n), k))
    for subset, i in itertools.product(subsets, range(n)):
        if i in subset:
            others = [rewards[j] for j in subset if j != i]
            if baseline == "leave_one_out" and k == 1:
                others = [np.mean([rewards[j] for j in range(n) if j != i])]
            less = 0 if baseline == "none" else max(others)
            out[i] += (max(rewards[j] for j in subset) - less) / len(subsets)
    return out


BASELINES = ["none", "leave_one_out"]


@pytest.mark.parametrize("baseline", BASELINES)
class TestPassAtKRewards:
    @pytest.mark.parametrize("k", [1, 2, 3, 6])
    def test_is_the_sum_over_all_subsets(self, baseline, k, rng):
        rewards = rng.normal(size=6).astype(np.float32)
        ties = np.round(rewards)
        result = pass_at_k_rewards(np.stack([rewards, ties]), k=k, baseline=baseline)
        expected = [rewards_by_hand(row, k, baseline) for row in (rewards, ties)]
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_takes_ragged_groups_in_any_order(self, baseline, k, rng):
        ids = np.array([5, 1, 5, 1, 1, 5, 8, 1, 5])
        mask = np.array([1, 1, 1, 0, 1, 1, 1, 1, 0], bool)
        rewards = np.where(mask, rng.normal(size=9), np.nan).astype(np.float32)
        result = pass_at_k_rewards(
            rewards, np.where(mask, ids, 77), k=k, baseline=baseline, mask=mask
        )
        expected = np.zeros(9)
        for group in (1, 5, 8):
            where = np.flatnonzero((ids == group) & mask)
            if len(where) >= k > 0 and (len(where) > 1 or baseline == "none"):
                expected[where] = rewards_by_hand(rewards[where], k, baseline)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("k", [2, 3])
    def test_gives_an_unbiased_gradient(self, baseline, k):
        """Exactly, over all outcomes of four samples from three answers."""
        values = jnp.array([0.0, 1.0, 4.0])
        logits = jnp.array([0.3, -0.2, 0.1])

        def best(logits):
            pi = jax.nn.softmax(logits)
            pairs = jnp.array(list(itertools.product(range(3), repeat=k)))
            return jnp.sum(jnp.prod(pi[pairs], 1) * jnp.max(values[pairs], 1))

        draws = jnp.array(list(itertools.product(range(3), repeat=4)))
        scores = pass_at_k_rewards(values[draws], k=k, baseline=baseline)

        def surrogate(moving):
            chance = jnp.prod(jax.nn.softmax(logits)[draws], 1)
            log_pi = jax.nn.log_softmax(moving)[draws]
            return jnp.sum(chance * jnp.sum(scores * log_pi, 1))

        np.testing.assert_allclose(
            jax.jit(jax.grad(surrogate))(logits),
            jax.jit(jax.grad(best))(logits),
            rtol=1e-4,
            atol=1e-6,
        )

    def test_too_few_samples_say_nothing(self, baseline):
        result = pass_at_k_rewards(jnp.array([1.0, 2.0]), k=3, baseline=baseline)
        assert result.tolist() == [0, 0]
        result = pass_at_k_rewards(jnp.array([1.0, jnp.inf]), k=3, baseline=baseline)
        assert result.tolist() == [0, 0]

    def test_what_is_left_out_of_a_row_does_not_count(self, baseline):
        rewards = np.float32([2.0, np.nan, 4.0, -1.0, np.nan])
        mask = np.array([1, 0, 1, 1, 0], bool)
        result = pass_at_k_rewards(rewards, k=2, baseline=baseline, mask=mask)
        expected = rewards_by_hand(rewards[mask], 2, baseline)
        np.testing.assert_allclose(result[mask], expected, rtol=1e-6)
        assert not result[~mask].any()

    def test_a_reward_that_is_nan_stays_in_its_group(self, baseline):
        rewards, ids = jnp.array([1.0, jnp.nan, 3.0, 4.0]), jnp.array([0, 0, 1, 1])
        result = pass_at_k_rewards(rewards, ids, k=2, baseline=baseline)
        assert np.isnan(result).tolist() == [True, True, False, False]

    def test_a_sample_of_no_group_is_nan(self, baseline):
        rewards, ids = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0, -1, 0, 4])
        result = pass_at_k_rewards(rewards, ids, k=2, baseline=baseline)
        assert np.isnan(result).tolist() == [False, True, False, True]

    def test_of_equal_rewards_is_what_the_baseline_leaves(self, baseline):
        result = pass_at_k_rewards(jnp.full(5, 0.1), k=2, baseline=baseline)
        left = 0.04 if baseline == "none" else 0
        np.testing.assert_allclose(result, left, rtol=1e-6)

    def test_what_is_left_out_has_no_gradient(self, baseline):
        rewards = jnp.array([1.0, jnp.nan, 4.0, 2.0])
        mask = jnp.array([True, False, True, True])
        run = lambda x: pass_at_k_rewards(x, k=2, baseline=baseline, mask=mask)[2]
        slope = jax.grad(run)(rewards)
        assert slope[1] == 0
        assert np.isfinite(slope).all()


def test_right_answers_get_what_the_paper_says():
    """Rewards of 0 and 1 have a closed form, its theorem 2."""
    n, c, k = 7, 3, 3
    rewards = (np.arange(n) < c).astype(np.float32)
    result = pass_at_k_rewards(rewards, k=k, baseline="none")
    wrong = k / n * float(pass_at_k(n - 1, c, k - 1))
    np.testing.assert_allclose(result[:c], k / n, rtol=1e-6)
    np.testing.assert_allclose(result[c:], wrong, rtol=1e-6)


def test_refuses_what_is_no_number_of_attempts():
    with pytest.raises(ValueError, match=r"^pass_at_k_rewards: k must be at least 1"):
        pass_at_k_rewards(jnp.ones(3), k=0)
    with pytest.raises(TypeError, match=r"^pass_at_k_rewards: k must be a Python int"):
        pass_at_k_rewards(jnp.ones(3), k=2.0)

"""Bandits, against bounds written out arm by arm and a queue of recent pulls."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    RecentPulls,
    epsilon_greedy,
    recent_means_and_counts,
    ucb_scores,
    update_recent_pulls,
)

BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


def scores_by_hand(means, counts, exploration=2**0.5, legal=None):
    """Arm by arm, as the paper says it in words."""
    arms = range(len(means))
    legal = [True] * len(means) if legal is None else legal
    total = sum(counts[a] for a in arms if legal[a])

    def score(a):
        if not legal[a]:
            return -math.inf
        if counts[a] == 0:
            return math.inf
        return means[a] + exploration * math.sqrt(math.log(total) / counts[a])

    return [score(a) for a in arms]


def gradients(means, counts, exploration=1.0, mask=None):
    """Scores, and gradients of the sum of those that are finite."""

    def total(means, counts, exploration):
        scores = ucb_scores(means, counts, exploration=exploration, mask=mask)
        return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0)), scores

    given = means, counts, exploration
    slopes, scores = jax.grad(total, (0, 1, 2), has_aux=True)(*given)
    return scores, *slopes


class TestScores:
    def test_are_means_and_widths_by_hand(self, rng):
        means = rng.normal(size=(20, 5)).astype(np.float32)
        counts = rng.integers(4, size=(20, 5)).astype(np.float32)
        counts[:, 0] += 1
        mask = rng.uniform(size=(20, 5)) < 0.7
        mask[:, 0] = True
        widths = rng.uniform(size=20).astype(np.float32)
        got = (
            ucb_scores(means, counts),
            ucb_scores(means, counts, exploration=widths, mask=mask),
        )
        pairs = list(zip(means.tolist(), counts.tolist(), strict=True))
        expected = (
            [scores_by_hand(*pair) for pair in pairs],
            [
                scores_by_hand(*pair, c, m)
                for pair, c, m in zip(pairs, widths, mask, strict=True)
            ],
        )
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    def test_bonus_is_that_of_ucb1_and_not_of_predictor_ucb(self):
        """Which is `c sqrt(N) / (1 + n)`."""
        scores = ucb_scores(jnp.zeros(2), jnp.array([1.0, 3.0]))
        expected = [math.sqrt(2 * math.log(4) / n) for n in (1, 3)]
        np.testing.assert_allclose(scores, expected, rtol=1e-6)

    def test_rewards_on_another_scale_take_an_exploration_on_that_scale(self, rng):
        means, counts = rng.uniform(size=(2, 4)).astype(np.float32)
        scores = ucb_scores(means, 10 * counts)
        scaled = ucb_scores(
            5 * means - 3, 10 * counts, exploration=jnp.float32(5 * math.sqrt(2))
        )
        np.testing.assert_allclose(scaled, 5 * scores - 3, rtol=1e-5)

    def test_every_arm_is_tried_before_any_is_chosen(self):
        scores, *slopes = gradients(jnp.zeros(4), jnp.zeros(4))
        assert scores.tolist() == [math.inf] * 4
        assert not any(slope.any() for slope in slopes)

    @BAD
    def test_the_mean_of_no_rewards_leaks_nothing(self, bad):
        counts = jnp.array([4.0, 0.0, 2.0])
        got = gradients(jnp.array([0.5, bad, 1.0]), counts)
        expected = gradients(jnp.array([0.5, 0.0, 1.0]), counts)
        assert got[0][1] == math.inf
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert got[1].tolist() == [1.0, 0.0, 1.0]

    @BAD
    def test_with_a_mask_they_are_those_of_leaving_the_other_arms_out(self, bad):
        mask = jnp.array([True, False, True])
        means, counts = jnp.array([0.5, bad, 1.0]), jnp.array([4.0, bad, 2.0])
        scores, *slopes = gradients(means, counts, mask=mask)
        fewer, *fewer_slopes = gradients(means[mask], counts[mask])
        assert scores[1] == -math.inf
        np.testing.assert_allclose(scores[mask], fewer, rtol=1e-6)
        for slope, expected in zip(slopes, fewer_slopes, strict=True):
            where = mask if slope.shape else ...
            np.testing.assert_allclose(slope[where], expected, rtol=1e-6)
            assert np.isfinite(slope).all()

    def test_without_a_legal_arm_all_are_minus_infinity(self):
        scores, *slopes = gradients(
            jnp.ones(2), jnp.ones(2), mask=jnp.array([False, False])
        )
        assert scores.tolist() == [-math.inf] * 2
        assert not any(slope.any() for slope in slopes)
        assert (
            epsilon_greedy(0.1).sample(jax.random.key(0), scores * 0, mask=scores > 0)
            == -1
        )

    @pytest.mark.parametrize("counts", [[1.0], [0.25, 0.5], [1.0, 0.0]])
    def test_one_pull_or_less_has_no_width_and_finite_gradients(self, counts):
        counts = jnp.array(counts)
        with jax.debug_nans(True):
            scores, d_means, d_counts, d_exploration = gradients(
                jnp.full(counts.shape, 0.5), counts
            )
        assert scores.tolist() == [0.5 if n else math.inf for n in counts.tolist()]
        assert d_means.tolist() == (counts > 0).tolist()
        assert not d_counts.any()
        assert d_exploration == 0

    def test_ties_of_untried_arms_are_broken_at_random(self):
        scores = ucb_scores(jnp.zeros(3), jnp.array([1.0, 0.0, 0.0]))
        probs = epsilon_greedy(0.0).probs(scores)
        assert probs.tolist() == [0.0, 0.5, 0.5]

    def test_a_negative_count_is_nan(self):
        assert jnp.isnan(ucb_scores(jnp.zeros(2), jnp.array([-1.0, 1.0]))).any()

    def test_exploration_out_of_range_is_refused(self):
        text = r"ucb_scores: exploration must be in \[0, inf\), got -1.0"
        with pytest.raises(ValueError, match=text):
            ucb_scores(jnp.zeros(2), jnp.ones(2), exploration=-1.0)


class QueueOfPulls:
    """The pulls of one bandit as Python has them."""

    def __init__(self, length):
        self.pulls = collections.deque(maxlen=length)

    def means_and_counts(self, num_arms):
        each = [[r for a, r in self.pulls if a == arm] for arm in range(num_arms)]
        return [np.mean(x) if x else 0.0 for x in each], [len(x) for x in each]


@jax.jit
def follow(state, arms, rewards, mask):
    """The states and their statistics after each of many pulls."""

    def step(state, pull):
        arm, reward, pulled = pull
        state = update_recent_pulls(state, arm, reward, mask=pulled)
        return state, (state, recent_means_and_counts(state, 4))

    return jax.lax.scan(step, state, (arms, rewards, mask))[1]


class TestRecentPulls:
    @pytest.mark.parametrize("length", [1, 3, 40])
    def test_are_those_of_a_queue(self, rng, length):
        """Of two bandits at once, which wait for each other at times."""
        arms = rng.integers(-1, 5, size=(30, 2))
        rewards = rng.normal(size=(30, 2)).astype(np.float32)
        mask = rng.uniform(size=(30, 2)) < 0.8
        state = RecentPulls(jnp.full((2, length), -1), jnp.zeros((2, length)))
        states, (means, counts) = jax.tree.map(
            np.asarray, follow(state, arms, rewards, mask)
        )
        for bandit in range(2):
            queue = QueueOfPulls(length)
            for t in range(30):
                if mask[t, bandit]:
                    queue.pulls.append((arms[t, bandit], rewards[t, bandit]))
                here = slice(length - len(queue.pulls), None)
                pulls = (x[t, bandit, here].tolist() for x in states)
                assert list(zip(*pulls, strict=True)) == list(queue.pulls)
                expected_means, expected_counts = queue.means_and_counts(4)
                np.testing.assert_allclose(means[t, bandit], expected_means, rtol=1e-5)
                assert counts[t, bandit].tolist() == expected_counts

    def test_scores_are_those_of_sliding_window_ucb(self, rng):
        """With `min(t, W)` pulls in the logarithm."""
        state = RecentPulls(jnp.full(6, -1), jnp.zeros(6))
        arms, rewards = rng.integers(4, size=10), rng.uniform(size=10)
        arms[-6:] = [0, 1, 1, 0, 3, 1]
        rewards = rewards.astype(np.float32)
        _, (means, counts) = follow(state, arms, rewards, np.ones(10, bool))
        for t in (2, 10):
            recent = list(zip(arms[:t], rewards[:t], strict=True))[-6:]
            scores = ucb_scores(means[t - 1], counts[t - 1], exploration=0.5)
            for arm in range(4):
                own = [reward for a, reward in recent if a == arm]
                expected = math.inf
                if own:
                    width = math.sqrt(math.log(min(t, 6)) / len(own))
                    expected = np.mean(own) + 0.5 * width
                np.testing.assert_allclose(scores[arm], expected, rtol=1e-5)

    @BAD
    def test_a_reward_that_is_not_finite_is_gone_when_its_pull_is(self, bad):
        """And meanwhile it is only that of its arm."""
        state = RecentPulls(jnp.full(2, -1), jnp.zeros(2))
        arms, rewards = np.array([1, 2, 1]), np.float32([bad, 4.0, 3.0])
        _, (means, counts) = follow(state, arms, rewards, np.ones(3, bool))
        np.testing.assert_array_equal(means[0], [0, bad, 0, 0])
        np.testing.assert_array_equal(means[1], [0, bad, 4, 0])
        assert means[2].tolist() == [0, 3, 4, 0]
        assert counts[2].tolist() == [0, 1, 1, 0]

    @BAD
    def test_where_there_was_no_pull_its_reward_leaks_nothing(self, bad):
        state = RecentPulls(jnp.array([0, 1]), jnp.array([1.0, 2.0]))

        def total(rewards, new):
            held = RecentPulls(state.arms, rewards)
            after = update_recent_pulls(held, 1, new, mask=jnp.array(False))
            return recent_means_and_counts(after, 2)[0].sum(), after

        slopes, after = jax.grad(total, (0, 1), has_aux=True)(state.rewards, bad)
        assert [x.tolist() for x in after] == [[0, 1], [1.0, 2.0]]
        assert slopes[0].tolist() == [1.0, 1.0]
        assert slopes[1] == 0

    def test_gradients_reach_rewards_by_their_share_of_the_mean(self):
        mean = lambda rewards: recent_means_and_counts(
            RecentPulls(jnp.array([-1, 1, 0, 1]), rewards), 2
        )[0][1]
        assert jax.grad(mean)(jnp.ones(4)).tolist() == [0.0, 0.5, 0.0, 0.5]

    def test_rewards_stay_in_single_precision(self):
        state = RecentPulls(jnp.full(2, -1), jnp.zeros(2, jnp.float32))
        state = update_recent_pulls(state, 0, jnp.bfloat16(0.5))
        assert state.rewards.dtype == jnp.float32
        assert recent_means_and_counts(state, 1)[0].dtype == jnp.float32

    def test_finds_the_best_arm_again_after_it_has_changed(self):
        """As the best of all pulls so far would not for long."""

        def step(state, key_and_best):
            key, best = key_and_best
            scores = ucb_scores(*recent_means_and_counts(state, 3), exploration=0.5)
            arm = epsilon_greedy(0.05).sample(key, scores)
            return update_recent_pulls(
                state, arm, jnp.where(arm == best, 1.0, 0.0)
            ), arm

        keys, best = jax.random.split(jax.random.key(0), 400), jnp.arange(400) // 200
        start = RecentPulls(jnp.full(30, -1), jnp.zeros(30))
        arms = np.asarray(
            jax.jit(jax.lax.scan, static_argnums=0)(step, start, (keys, best))[1]
        )
        assert np.mean(arms[100:200] == 0) > 0.6
        assert np.mean(arms[300:] == 1) > 0.6

    def test_a_state_that_is_none_is_refused(self):
        with pytest.raises(TypeError, match="state must be of type RecentPulls"):
            update_recent_pulls((jnp.zeros(2, int), jnp.zeros(2)), 0, 1.0)

    def test_a_negative_number_of_arms_is_refused(self):
        text = "recent_means_and_counts: num_arms must not be negative: -1"
        with pytest.raises(ValueError, match=text):
            recent_means_and_counts(RecentPulls(jnp.full(2, -1), jnp.zeros(2)), -1)

"""Actions that are held, against the exact distribution of how long and of which."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import HeldAction, temporally_extended_epsilon_greedy

KEY = jax.random.key(11)
COUNT = 20_000
NOTHING = HeldAction(jnp.array(-1), jnp.array(0))


@functools.partial(jax.jit, static_argnums=4)
def act(q, state, epsilon, mask, max_duration=8, exponent=2.0, first=False):
    """The same choice in as many environments, each by itself."""
    many = lambda x: jnp.broadcast_to(x, (COUNT, *jnp.shape(x)))
    action, after = temporally_extended_epsilon_greedy(
        KEY,
        many(jnp.asarray(q, jnp.float32)),
        jax.tree.map(many, state),
        epsilon=epsilon,
        max_duration=max_duration,
        duration_exponent=exponent,
        first=many(first),
        mask=many(jnp.asarray(mask)),
    )
    return action, after


def shares(x, low, high):
    return np.bincount(np.asarray(x) - low, minlength=high - low + 1) / COUNT


def assert_shares(got, expected):
    """Within four standard errors, and exactly where nothing or all is expected."""
    expected = np.asarray(expected)
    error = 4 * np.sqrt(expected * (1 - expected) / COUNT)
    np.testing.assert_array_less(abs(got - expected), error + 1e-7)


def zeta(exponent, longest):
    powers = np.arange(1, longest + 1) ** -float(exponent)
    return powers / powers.sum()


Q, ALL = [0.0, 3.0, 3.0, 1.0], [True] * 4


class TestDurations:
    @pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.5])
    def test_are_those_of_a_zeta_distribution_up_to_the_longest(self, exponent):
        action, after = act(Q, NOTHING, 1.0, ALL, exponent=exponent)
        assert_shares(shares(after.steps_left + 1, 1, 8), zeta(exponent, 8))
        assert after.action.tolist() == action.tolist()

    def test_long_ones_are_as_rare_as_they_should_be(self):
        """And none is longer than the longest, nor shorter than one step."""
        _, after = act(Q, NOTHING, 1.0, ALL, 10_000, 1.5)
        durations = np.asarray(after.steps_left) + 1
        assert 1 <= durations.min() <= durations.max() <= 10_000
        expected = zeta(1.5, 10_000)
        for least in (2, 10, 100, 1000, 5000):
            attained = np.mean(durations >= least)
            share = expected[least - 1 :].sum()
            assert abs(attained - share) < 4 * math.sqrt(share / COUNT)

    def test_say_nothing_about_the_action(self):
        action, after = act(Q, NOTHING, 1.0, ALL)
        for a in range(4):
            durations = np.asarray(after.steps_left)[np.asarray(action) == a] + 1
            long = np.mean(durations > 1)
            expected = 1 - zeta(2, 8)[0]
            assert abs(long - expected) < 4 * math.sqrt(0.25 / len(durations))

    def test_count_every_step_the_first_included(self):
        """With no greedy action that could be taken for a random one."""

        def step(carry, key):
            state, t = carry
            # At the first step all explore, and none does later.
            action, after = temporally_extended_epsilon_greedy(
                key,
                jnp.broadcast_to(jnp.array([-1.0, -1.0, 0.0]), (200, 3)),
                state,
                epsilon=jnp.where(t == 0, 1.0, 0.0),
                max_duration=6,
                duration_exponent=0.5,
                mask=jnp.broadcast_to((jnp.arange(3) < 2) | (t > 0), (200, 3)),
            )
            return (after, t + 1), (action, after.steps_left)

        start = HeldAction(jnp.full(200, -1), jnp.zeros(200, int)), 0
        _, (actions, steps_left) = jax.lax.scan(step, start, jax.random.split(KEY, 8))
        actions, steps_left = np.asarray(actions), np.asarray(steps_left)
        durations = np.sum(actions < 2, axis=0)
        assert {*durations.tolist()} == {1, 2, 3, 4, 5, 6}
        assert durations.tolist() == (steps_left[0] + 1).tolist()
        for t in range(8):
            assert (actions[t] == np.where(t < durations, actions[0], 2)).all()
            assert (steps_left[t] == np.maximum(durations - 1 - t, 0)).all()


class TestActions:
    @pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
    def test_are_random_with_the_probability_of_epsilon_and_break_ties(self, epsilon):
        action, after = act(Q, NOTHING, epsilon, ALL)
        best = np.array([0.0, 0.5, 0.5, 0.0])
        assert_shares(shares(action, 0, 3), epsilon / 4 + (1 - epsilon) * best)
        longer = epsilon * (1 - zeta(2, 8)[0])
        assert_shares(shares(after.steps_left > 0, 0, 1), [1 - longer, longer])

    def test_of_one_step_are_those_of_epsilon_greedy(self):
        action, after = act(Q, NOTHING, 0.5, ALL, 1)
        assert_shares(shares(action, 0, 3), [0.125, 0.375, 0.375, 0.125])
        assert not after.steps_left.any()

    def test_are_legal(self):
        mask = [True, False, True, False]
        action, _ = act([0.0, math.nan, 3.0, math.inf], NOTHING, 0.5, mask)
        assert_shares(shares(action, 0, 3), [0.25, 0.0, 0.75, 0.0])

    def test_are_held_whatever_the_preferences_become(self):
        held = HeldAction(jnp.array(3), jnp.array(2))
        for q in (Q, [math.nan] * 4):
            action, after = act(q, held, 0.5, ALL)
            assert (action == 3).all()
            assert (after.action == 3).all()
            assert (after.steps_left == 1).all()

    def test_are_held_for_the_last_time_where_one_step_is_left(self):
        action, after = act(Q, HeldAction(jnp.array(3), jnp.array(1)), 1.0, ALL)
        assert (action == 3).all()
        assert not after.steps_left.any()

    @pytest.mark.parametrize("action", [3, -1, 4, 100])
    def test_that_are_no_longer_legal_are_decided_anew(self, action):
        """As are those that never were actions."""
        held = HeldAction(jnp.array(action), jnp.array(5))
        mask = [True, True, False, False]
        action, after = act(Q, held, 0.4, mask)
        assert_shares(shares(action, 0, 3), [0.2, 0.8, 0.0, 0.0])
        longer = 0.4 * (1 - zeta(2, 8)[0])
        assert_shares(shares(after.steps_left > 0, 0, 1), [1 - longer, longer])

    def test_are_decided_anew_where_an_episode_starts(self):
        held = HeldAction(jnp.array(3), jnp.array(5))
        action, after = act(Q, held, 0.0, ALL, first=True)
        assert {*action.tolist()} == {1, 2}
        assert not after.steps_left.any()

    def test_are_none_where_none_is_legal_and_none_is_held(self):
        action, after = act(Q, NOTHING, 0.5, [False] * 4)
        assert (action == -1).all()
        assert not after.steps_left.any()

    def test_are_none_where_the_best_is_not_known(self):
        """Of few environments: XLA on CPU has no NaN in the maxima of many."""
        action, after = temporally_extended_epsilon_greedy(
            KEY,
            jnp.broadcast_to(jnp.array([0.0, math.nan]), (20, 2)),
            HeldAction(jnp.full(20, -1), jnp.zeros(20, int)),
            epsilon=(jnp.arange(20) < 10).astype(jnp.float32),
            max_duration=8,
        )
        assert {*action[:10].tolist()} == {0, 1}
        assert {*action[10:].tolist()} == {-1}
        assert not after.steps_left[10:].any()

    @pytest.mark.parametrize("settings", [(1.5, 2.0), (math.nan, 2.0), (0.5, -1.0)])
    def test_are_none_where_a_setting_is_out_of_range(self, settings):
        epsilon, exponent = map(jnp.float32, settings)
        action, after = act(Q, NOTHING, epsilon, ALL, exponent=exponent)
        assert (action == -1).all()
        assert not after.steps_left.any()

    def test_follow_an_epsilon_for_each_environment(self):
        epsilon = (jnp.arange(COUNT) % 2).astype(jnp.float32)
        action, _ = act([0.0, 0.0, 0.0, 1.0], NOTHING, epsilon, ALL)
        action = np.asarray(action)
        assert (action[::2] == 3).all()
        assert abs(np.mean(action[1::2] == 3) - 0.25) < 0.02

    def test_explore_as_much_as_holds_last(self):
        """Greedy steps come one by one, and holds, with probability ε, by the mean."""

        def step(state, key):
            action, state = temporally_extended_epsilon_greedy(
                key,
                jnp.zeros((500, 2)).at[:, 0].set(1.0),
                state,
                epsilon=0.1,
                max_duration=20,
            )
            return state, action

        start = HeldAction(jnp.full(500, -1), jnp.zeros(500, int))
        _, actions = jax.lax.scan(step, start, jax.random.split(KEY, 600))
        mean = zeta(2, 20) @ np.arange(1, 21)
        explored = 0.1 * mean / (0.9 + 0.1 * mean)
        share = np.mean(np.asarray(actions)[100:] == 1)
        np.testing.assert_allclose(share, explored / 2, rtol=0.03)


@pytest.mark.parametrize("max_duration", [0, -1])
def test_a_longest_duration_of_no_steps_is_refused(max_duration):
    text = (
        "temporally_extended_epsilon_greedy: max_duration must be at least 1: "
        f"{max_duration}"
    )
    with pytest.raises(ValueError, match=text):
        temporally_extended_epsilon_greedy(
            KEY, jnp.zeros(2), NOTHING, epsilon=0.5, max_duration=max_duration
        )


def test_a_state_that_is_none_is_refused():
    with pytest.raises(TypeError, match="state must be of type HeldAction, got tuple"):
        temporally_extended_epsilon_greedy(
            KEY, jnp.zeros(2), (0, 0), epsilon=0.5, max_duration=5
        )

"""What a buffer stores of a trajectory, against loops over its episodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    hindsight_goal_indices,
    n_step_bootstrapped_returns,
    n_step_transitions,
    split_burn_in,
)

NAN = np.nan
KEYS = jax.random.split(jax.random.key(3), 6000)


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def episodes_of(discount_t, truncation_t, mask_t):
    """Lists the steps that count of each episode.

    A step left out ends an episode only if it says that a time limit did.
    """
    episodes, current = [], []
    for t in range(len(discount_t)):
        if mask_t[t]:
            current.append(t)
        if truncation_t[t] or (mask_t[t] and discount_t[t] == 0):
            episodes.append(current)
            current = []
    return [episode for episode in [*episodes, current] if episode]


def random_trajectory(rng, size=12):
    """Discounts with terminations, time limits, and steps left out."""
    discount_t = rng.uniform(0.5, 1, size) * (rng.uniform(size=size) < 0.8)
    truncation_t, mask_t = rng.uniform(size=(2, size)) < [[0.2], [0.75]]
    return discount_t.astype(np.float32), truncation_t, mask_t


@functools.partial(jax.jit, static_argnums=2)
def fold_masked(r_t, discount_t, n, truncation_t, mask_t):
    return n_step_transitions(
        r_t, discount_t, n, truncation_t=truncation_t, mask_t=mask_t
    )


class TestNStepTransitions:
    def by_hand(self, r_t, discount_t, n, truncation_t, mask_t):
        size = len(r_t)
        rewards, discounts, last_t = np.zeros(size), np.zeros(size), np.arange(size)
        for episode in episodes_of(discount_t, truncation_t, mask_t):
            for place, t in enumerate(episode):
                discounts[t] = 1
                for step in episode[place : place + n]:
                    rewards[t] += discounts[t] * r_t[step]
                    discounts[t] *= discount_t[step]
                    last_t[t] = step
        return rewards, discounts, last_t

    @pytest.mark.parametrize("n", [1, 3, 40])
    def test_fold_the_rewards_of_one_episode(self, rng, n):
        for _ in range(15):
            r_t = rng.normal(size=12).astype(np.float32)
            discount_t, truncation_t, mask_t = random_trajectory(rng)
            expected = self.by_hand(r_t, discount_t, n, truncation_t, mask_t)
            bad = rng.choice(np.float32([NAN, np.inf, 0]))
            r_t, discount_t = (np.where(mask_t, x, bad) for x in (r_t, discount_t))
            got = fold_masked(r_t, discount_t, n, truncation_t, mask_t)
            for x, y in zip(got, expected, strict=True):
                same(x, y)
            assert jnp.issubdtype(got.last_t.dtype, jnp.integer)

    @pytest.mark.parametrize("masked", [False, True])
    def test_lead_to_n_step_returns_and_their_gradients(self, rng, masked):
        """Bootstrapped later, from whatever the values are by then."""
        weights = np.cos(np.arange(12, dtype=np.float32))

        def cuts(truncation_t, mask_t):
            mask = {"mask_t": mask_t} if masked else {}
            return {"truncation_t": truncation_t} | mask

        def stored(r_t, discount_t, v_t, *where):
            r_t, discount_t, last_t = n_step_transitions(
                r_t, discount_t, 3, **cuts(*where)
            )
            returns = r_t + discount_t * v_t[last_t]
            return weights @ returns, returns

        def at_once(r_t, discount_t, v_t, *where):
            returns = n_step_bootstrapped_returns(
                r_t, discount_t, v_t, 3, **cuts(*where)
            )
            return weights @ returns, returns

        slopes = [
            jax.jit(jax.grad(fn, argnums=(0, 1, 2), has_aux=True))
            for fn in (stored, at_once)
        ]
        for _ in range(10):
            r_t, v_t = rng.normal(size=(2, 12)).astype(np.float32)
            discount_t, *where = random_trajectory(rng)
            results = [fn(r_t, discount_t, v_t, *where) for fn in slopes]
            # What it would be to go on after a termination is not known here.
            going_on = [
                ((by_r, np.where(discount_t == 0, 0, by_discount), by_v), returns)
                for (by_r, by_discount, by_v), returns in results
            ]
            jax.tree.map(same, *going_on)

    def test_end_with_the_trajectory_and_bootstrap_from_its_last_observation(self):
        folded = n_step_transitions(jnp.ones(3), jnp.full(3, 0.5), 2)
        assert folded.r_t.tolist() == [1.5, 1.5, 1]
        assert folded.discount_t.tolist() == [0.25, 0.25, 0.5]
        assert folded.last_t.tolist() == [1, 2, 2]

    def test_time_limits_bootstrap_and_terminations_do_not(self):
        """The mistake that everybody makes is to treat them alike."""
        discount_t = jnp.array([0.5, 0.0, 0.5, 0.5, 0.5])
        truncation_t = jnp.array([False, False, False, True, False])
        r_t = jnp.array([1.0, 1.0, 1.0, 1.0, 64.0])
        folded = n_step_transitions(r_t, discount_t, 3, truncation_t=truncation_t)
        assert folded.r_t.tolist() == [1.5, 1, 1.5, 1, 64]
        assert folded.discount_t.tolist() == [0, 0, 0.25, 0.5, 0.5]
        assert folded.last_t.tolist() == [1, 1, 3, 3, 4]

    def test_a_termination_may_be_marked_as_cut_too(self):
        discount_t, both = jnp.array([0.5, 0.0, 0.5]), jnp.array([False, True, False])
        marked = n_step_transitions(jnp.ones(3), discount_t, 3, truncation_t=both)
        plain = n_step_transitions(jnp.ones(3), discount_t, 3)
        jax.tree.map(np.testing.assert_array_equal, marked, plain)

    def test_a_lost_final_observation_is_left_to_the_step_before(self):
        """As docs/time_limits.md has it: masked out, and still marked as cut."""
        cut, mask = jnp.array([False, True, False]), jnp.array([True, False, True])
        folded = n_step_transitions(
            jnp.ones(3), jnp.full(3, 0.5), 3, truncation_t=cut, mask_t=mask
        )
        assert folded.r_t.tolist() == [1, 0, 1]
        assert folded.discount_t.tolist() == [0.5, 0, 0.5]
        assert folded.last_t.tolist() == [0, 1, 2]

    def test_of_one_step_are_the_steps_themselves(self, rng):
        r_t = rng.normal(size=12).astype(np.float32)
        discount_t, truncation_t, _ = random_trajectory(rng)
        folded = n_step_transitions(r_t, discount_t, 1, truncation_t=truncation_t)
        same(folded.r_t, r_t)
        same(folded.discount_t, discount_t)
        assert folded.last_t.tolist() == list(range(12))

    def test_nothing_comes_across_an_end_not_even_nan(self):
        for end in ("termination", "limit"):
            cut = jnp.array([False, end == "limit", False])
            discount_t = jnp.array([0.5, 0.5 * (end == "limit"), NAN])
            r_t = jnp.array([1.0, 1.0, NAN])
            fn = lambda r, cut=cut, discount_t=discount_t: n_step_transitions(
                r, discount_t, 3, truncation_t=cut
            ).r_t[0]
            value, slopes = jax.value_and_grad(fn)(r_t)
            assert (value, slopes.tolist()) == (1.5, [1, 0.5, 0])

    def test_how_many_steps_may_be_traced(self, rng):
        r_t = rng.normal(size=12).astype(np.float32)
        discount_t, truncation_t, mask_t = random_trajectory(rng)
        numbers = np.array([1, 3, 2**31 - 1])
        fixed = [1, 3, 40]  # as many as there are, and more
        traced = jax.jit(
            jax.vmap(fold_masked.__wrapped__, (None, None, 0, None, None))
        )(r_t, discount_t, numbers, truncation_t, mask_t)
        for i, n in enumerate(fixed):
            one = fold_masked(r_t, discount_t, n, truncation_t, mask_t)
            jax.tree.map(same, jax.tree.map(lambda x, i=i: x[i], traced), one)

    def test_steps_are_counted_exactly_in_half_precision(self):
        """Above 256 they are no numbers of bfloat16."""
        ones = jnp.ones(600, jnp.bfloat16)
        folded = n_step_transitions(ones, ones, 4)
        assert folded.r_t.dtype == folded.discount_t.dtype == jnp.bfloat16
        expected = np.minimum(np.arange(600) + 3, 599)
        assert folded.last_t.tolist() == expected.tolist()

    def test_of_no_steps_is_refused(self):
        with pytest.raises(ValueError, match=r"^n_step_transitions: n must be in"):
            n_step_transitions(jnp.ones(2), jnp.ones(2), 0)


class TestSplitBurnIn:
    @pytest.mark.parametrize("burn_in", [0, 1, 4])
    def test_cuts_every_array_at_one_time(self, burn_in):
        tree = {"r_t": jnp.arange(5.0), "rest": (np.arange(10).reshape(5, 2), None)}
        first, second = split_burn_in(tree, burn_in)
        assert first["r_t"].tolist() == list(range(burn_in))
        assert second["r_t"].tolist() == list(range(burn_in, 5))
        np.testing.assert_array_equal(first["rest"][0], tree["rest"][0][:burn_in])
        np.testing.assert_array_equal(second["rest"][0], tree["rest"][0][burn_in:])
        assert first["rest"][1] is second["rest"][1] is None
        assert isinstance(first["rest"][0], np.ndarray)

    def test_the_state_after_it_may_be_a_constant(self):
        """As the docstring shows: the warm-up gives a state, and no gradient."""

        def loss(weight, sequence, stop):
            warm_up, learn = split_burn_in(sequence, 2)
            state = warm_up.sum() * weight
            state = jax.lax.stop_gradient(state) if stop else state
            return state + weight * learn.sum()

        slope = lambda stop: jax.grad(loss)(3.0, jnp.arange(4.0), stop)
        assert (slope(True), slope(False)) == (5, 6)

    def test_works_in_compiled_code_and_over_keys(self):
        tree = {"key": jax.random.split(jax.random.key(0), 3), "x": jnp.arange(3)}
        first, second = jax.jit(split_burn_in, static_argnums=1)(tree, 1)
        assert first["key"].shape == (1,)
        assert second["x"].tolist() == [1, 2]

    @pytest.mark.parametrize("burn_in", [-1, 3, 4])
    def test_a_length_out_of_range_is_refused(self, burn_in):
        with pytest.raises(
            ValueError,
            match=r"^split_burn_in: burn_in must be in \[0, T\) with T = 3, got "
            f"{burn_in}.$",
        ):
            split_burn_in({"x": jnp.ones(3)}, burn_in)

    @pytest.mark.parametrize("burn_in", [1.0, True, jnp.array(1), np.int32(1)])
    def test_a_length_that_is_no_int_is_refused(self, burn_in):
        with pytest.raises(
            TypeError, match=r"^split_burn_in: burn_in must be a Python int"
        ):
            split_burn_in(jnp.ones(3), burn_in)

    @pytest.mark.parametrize(
        ("other", "text"),
        [
            (np.ones((2, 3)), r"tree\['b'\] has shape \(2, 3\), expected .* T = 3\.$"),
            (np.ones(()), r"tree\['b'\] has shape \(\), expected .* T = 3\.$"),
            (1.0, r"tree\['b'\] has shape \(\), expected .* T = 3\.$"),
        ],
    )
    def test_arrays_of_other_lengths_are_refused(self, other, text):
        with pytest.raises(ValueError, match=rf"^split_burn_in: {text}"):
            split_burn_in({"a": jnp.ones(3), "b": other}, 1)

    def test_something_without_time_is_refused(self):
        with pytest.raises(ValueError, match=r"^split_burn_in: tree has shape \(\), "):
            split_burn_in(1.0, 0)


def relabelled(keys, *trajectory, strategy="future", probability=1.0):
    """The goals that many keys give, all in one program."""
    discount_t, truncation_t, mask_t = trajectory

    def draw(key):
        return hindsight_goal_indices(
            key,
            discount_t,
            relabel_probability=probability,
            strategy=strategy,
            truncation_t=truncation_t,
            mask_t=mask_t,
        )

    return jax.vmap(draw)(keys)


def drawn(*args, **kwargs):
    return np.asarray(relabelled(*args, **kwargs))


def candidates(strategy, *trajectory):
    """The steps whose outcomes may become the goal of each step that counts."""
    found = {}
    for episode in episodes_of(*trajectory):
        for place, t in enumerate(episode):
            of = {"future": episode[place:], "final": episode[-1:], "episode": episode}
            found[t] = of[strategy]
    return found


STRATEGIES = pytest.mark.parametrize("strategy", ["future", "final", "episode"])


def chi_square(draws, steps):
    """How far draws are from uniform over `steps`, in standard deviations."""
    counts = np.array([(draws == step).sum() for step in steps])
    expected = len(draws) / len(steps)
    freedom = max(len(steps) - 1, 1)
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (
        2 * freedom
    ) ** 0.5


class TestHindsightGoalIndices:
    @STRATEGIES
    def test_goals_are_of_the_same_episode_and_each_is_found(self, rng, strategy):
        run = jax.jit(
            lambda *trajectory: relabelled(KEYS[:400], *trajectory, strategy=strategy)
        )
        for _ in range(8):
            trajectory = random_trajectory(rng)
            discount_t, truncation_t, mask_t = trajectory
            spoilt = np.where(mask_t, discount_t, rng.choice(np.float32([NAN, 0, 1])))
            goals = np.asarray(run(spoilt, truncation_t, mask_t))
            expected = candidates(strategy, *trajectory)
            for t in range(12):
                assert {*goals[:, t].tolist()} == {*expected.get(t, [-1])}

    def test_without_a_mask_the_trajectory_ends_the_last_episode(self):
        discount_t = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0])
        cut = jnp.array([False, False, True, False, False])
        draw = functools.partial(
            hindsight_goal_indices, KEYS[0], relabel_probability=1.0, strategy="final"
        )
        assert draw(discount_t).tolist() == [1, 1, 4, 4, 4]
        assert draw(discount_t, truncation_t=cut).tolist() == [1, 1, 2, 4, 4]

    @pytest.mark.parametrize("strategy", ["future", "episode"])
    def test_every_goal_is_as_likely_as_the_others(self, strategy):
        discount_t = np.float32([1, 1, 1, 0, 1, 1, 1, 1])
        mask_t = np.array([True, True, False, True, True, True, True, True])
        trajectory = discount_t, np.zeros(8, bool), mask_t
        goals = drawn(KEYS, *trajectory, strategy=strategy)
        for t, steps in candidates(strategy, *trajectory).items():
            assert {*goals[:, t].tolist()} == {*steps}
            assert chi_square(goals[:, t], steps) < 5

    def test_goals_of_different_steps_are_drawn_apart(self):
        trajectory = np.ones(3, np.float32), np.zeros(3, bool), np.ones(3, bool)
        goals = drawn(KEYS, *trajectory, strategy="episode")
        pairs = 3 * goals[:, 0] + goals[:, 1]
        assert chi_square(pairs, range(9)) < 5

    def test_steps_keep_their_goals_as_often_as_they_should(self):
        """And whether a step does tells nothing of the others, nor of the goal."""
        trajectory = np.ones(2, np.float32), np.zeros(2, bool), np.ones(2, bool)
        goals = drawn(KEYS, *trajectory, probability=0.8)
        kept = goals == -1
        error = 4 * np.sqrt(0.2 * 0.8 / len(KEYS))
        assert (np.abs(kept.mean(axis=0) - 0.2) < error).all()
        assert abs((kept[:, 0] & kept[:, 1]).mean() - 0.04) < error
        new = goals[:, 0][~kept[:, 0]]
        assert abs((new == 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(len(new))

    @STRATEGIES
    def test_a_probability_of_zero_keeps_them_all(self, strategy):
        trajectory = np.ones(4, np.float32), np.zeros(4, bool), np.ones(4, bool)
        goals = drawn(KEYS[:50], *trajectory, strategy=strategy, probability=0.0)
        assert (goals == -1).all()

    def test_each_step_may_have_a_probability_of_its_own(self):
        trajectory = np.ones(2, np.float32), np.zeros(2, bool), np.ones(2, bool)
        goals = drawn(KEYS[:50], *trajectory, probability=jnp.array([0.0, 1.0]))
        assert (goals[:, 0] == -1).all()
        assert (goals[:, 1] == 1).all()

    def test_of_a_probability_that_is_no_number_keep_their_goals(self):
        draw = functools.partial(hindsight_goal_indices, KEYS[0], jnp.ones(4))
        assert (draw(relabel_probability=jnp.array(NAN)) == -1).all()

    def test_of_padding_alone_there_are_none(self):
        draw = functools.partial(hindsight_goal_indices, KEYS[0], jnp.full(3, NAN))
        nothing = draw(relabel_probability=1.0, mask_t=jnp.zeros(3, bool))
        assert nothing.tolist() == [-1, -1, -1]

    def test_rewards_of_new_goals_are_the_callers(self):
        """As the docstring shows: a step whose outcome is its goal has reached it."""
        achieved_t, goal_t = jnp.array([10, 20, 30]), jnp.array([99, 99, 99])
        index_t = hindsight_goal_indices(
            KEYS[0], jnp.ones(3), relabel_probability=1.0, strategy="final"
        )
        goal_t = jnp.where(index_t >= 0, achieved_t[index_t], goal_t)
        assert (achieved_t == goal_t).tolist() == [False, False, True]

    def test_another_strategy_is_refused(self):
        with pytest.raises(
            ValueError,
            match=r"^hindsight_goal_indices: strategy must be one of 'future', 'final',"
            r" 'episode', got 'random'\.$",
        ):
            hindsight_goal_indices(
                KEYS[0], jnp.ones(2), relabel_probability=1.0, strategy="random"
            )

    @pytest.mark.parametrize("probability", [-0.1, 1.1])
    def test_what_is_no_probability_is_refused(self, probability):
        with pytest.raises(
            ValueError, match=r"^hindsight_goal_indices: relabel_probability must be in"
        ):
            hindsight_goal_indices(
                KEYS[0], jnp.ones(2), relabel_probability=probability
            )

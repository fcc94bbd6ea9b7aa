"""Returns that leave a trajectory, against the step at which each of them does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ACTIONS, STEPS = 3, 8
CUT = 4  # the step at which an episode ends


@pytest.fixture
def steps(rng):
    """q_tm1, a_tm1, r_t, discount_t, q_t, a_t, in which most actions are greedy."""
    q_tm1, q_t = rng.normal(size=(2, STEPS, ACTIONS)).astype(np.float32)
    a_tm1, random = rng.integers(ACTIONS, size=(2, STEPS)).astype(np.int32)
    r_t = rng.normal(size=STEPS).astype(np.float32)
    discount_t = np.where(np.arange(STEPS) == CUT, 0, 0.9).astype(np.float32)
    greedy = q_t.argmax(axis=-1).astype(np.int32)
    a_t = np.where(np.arange(STEPS) % 3 == 2, random, greedy)
    a_t[2] = (greedy[2] + 1) % ACTIONS  # at least one explores
    return q_tm1, a_tm1, r_t, discount_t, q_t, a_t


def n_step(r, discount, v, t, n):
    """`n` rewards from step `t`, then a bootstrap."""
    total, weight = 0.0, 1.0
    for k in range(t, t + n):
        total, weight = total + weight * r[k], weight * discount[k]
    return total + weight * v[t + n - 1]


class TestWatkinsLambda:
    def test_is_zero_where_the_action_is_not_a_best_one(self, steps):
        *_, q_t, a_t = steps
        best = [max(map(float, q)) for q in q_t]
        expected = [0.7 * (q_t[t][a_t[t]] == best[t]) for t in range(STEPS)]
        assert 0 < np.count_nonzero(expected) < STEPS
        actual = rlprims.watkins_lambda(q_t, a_t, 0.7)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        each = np.full(STEPS, 0.7, np.float32)
        np.testing.assert_array_equal(rlprims.watkins_lambda(q_t, a_t, each), actual)

    def test_any_of_several_best_actions_is_greedy(self):
        q = jnp.array([2.0, 1.0, 2.0])
        actual = jax.vmap(rlprims.watkins_lambda, in_axes=(None, 0))(q, jnp.arange(3))
        assert actual.tolist() == [1, 0, 1]

    def test_one_action_is_always_greedy(self):
        assert rlprims.watkins_lambda(jnp.array([-3.0]), 0) == 1

    def test_compares_with_legal_actions_alone(self):
        q = jnp.array([[jnp.nan, 1.0, 2.0]] * 3)
        mask = jnp.array([[False, True, False]] * 3)
        actual = rlprims.watkins_lambda(q, jnp.arange(3), mask=mask)
        assert actual.tolist() == [0, 1, 0]

    def test_an_illegal_action_is_not_greedy_even_as_the_equal_of_the_best(self):
        q, mask = jnp.array([2.0, 2.0]), jnp.array([False, True])
        actual = [rlprims.watkins_lambda(q, a, mask=mask) for a in (0, 1)]
        assert actual == [0, 1]

    def test_takes_minus_infinity_for_an_illegal_action(self):
        q = jnp.array([[-jnp.inf, 1.0]] * 2)
        assert rlprims.watkins_lambda(q, jnp.arange(2)).tolist() == [0, 1]

    def test_is_zero_where_no_action_is_legal(self):
        q, mask = jnp.array([1.0, 2.0]), jnp.zeros(2, bool)
        assert rlprims.watkins_lambda(q, 1, mask=mask) == 0

    def test_knows_no_greedy_action_beside_a_nan(self):
        assert rlprims.watkins_lambda(jnp.array([jnp.nan, 2.0]), 1) == 0

    @pytest.mark.parametrize("action", [-1, 2])
    def test_an_action_out_of_range_is_nan(self, action):
        assert jnp.isnan(rlprims.watkins_lambda(jnp.array([1.0, 2.0]), action))

    def test_distinguishes_what_half_precision_does(self):
        q = jnp.array([1.0, 1 + 2**-7], jnp.bfloat16)
        actual = [rlprims.watkins_lambda(q, a) for a in (0, 1)]
        assert actual == [0, 1]
        assert actual[0].dtype == jnp.bfloat16

    def test_passes_gradients_to_lambda_alone(self, steps):
        *_, q_t, a_t = steps
        fn = lambda q, x: rlprims.watkins_lambda(q, a_t, x).sum()
        to_q, to_lambda = jax.grad(fn, argnums=(0, 1))(q_t, 0.5)
        assert not to_q.any()
        assert float(to_lambda) == np.count_nonzero(rlprims.watkins_lambda(q_t, a_t))


class TestWatkinsQLambda:
    def test_goes_on_to_the_first_action_that_explores(self, steps):
        """With λ = 1: a return of as many rewards as came before it."""
        q_tm1, a_tm1, r, discount, q_t, a_t = steps
        best = np.max(np.float64(q_t), axis=-1)
        explores = [q_t[t][a_t[t]] < best[t] for t in range(STEPS)]
        expected = []
        for t in range(STEPS):
            stops = [k for k in range(t, STEPS) if explores[k] or k == STEPS - 1]
            target = n_step(r, discount, best, t, stops[0] - t + 1)
            expected.append(target - q_tm1[t][a_tm1[t]])
        actual = rlprims.watkins_q_lambda(*steps, 1.0)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("lambda_", [0.0, 0.6])
    def test_is_peng_q_lambda_with_the_lambda_of_watkins(self, steps, lambda_):
        *common, a_t = steps
        lambda_t = rlprims.watkins_lambda(common[-1], a_t, lambda_)
        expected = rlprims.q_lambda(*common, lambda_t)
        actual = rlprims.watkins_q_lambda(*steps, lambda_)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        different = rlprims.q_lambda(*common, lambda_)
        assert np.allclose(different, expected) == (lambda_ == 0)

    def test_does_not_see_what_an_exploring_action_led_to(self, steps):
        """The first action of a target may explore, but not a later one."""
        q_tm1, a_tm1, r, discount, q_t, a_t = steps
        later = np.where(np.arange(STEPS) > 2, np.float32(100), r)
        actual = rlprims.watkins_q_lambda(q_tm1, a_tm1, later, discount, q_t, a_t, 1.0)
        expected = rlprims.watkins_q_lambda(*steps, 1.0)
        np.testing.assert_array_equal(actual[:3], expected[:3])
        assert (actual[3:] != expected[3:])[:2].all()

    def test_does_not_see_past_a_termination(self, steps):
        q_tm1, a_tm1, r, discount, q_t, a_t = steps
        hidden = np.arange(STEPS) >= CUT
        unknown = np.where(hidden, -1, a_t).astype(np.int32)

        def early(q_tm1, r, discount, q_t):
            args = q_tm1, a_tm1, r, discount, q_t, unknown, 0.7
            return rlprims.watkins_q_lambda(*args, stop_target_gradients=False)[
                : CUT + 1
            ].sum()

        floats = (
            np.where(np.arange(STEPS) > CUT, np.float32(np.nan), r),
            discount,
            np.where(hidden[:, None], np.float32(np.nan), q_t),
        )
        actual = early(q_tm1, *floats)
        expected = rlprims.watkins_q_lambda(*steps, 0.7)[: CUT + 1].sum()
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        grads = jax.grad(early, argnums=(0, 1, 2, 3))(q_tm1, *floats)
        assert all(np.isfinite(x[: CUT + 1]).all() for x in grads)

    def test_does_not_need_to_know_the_last_action(self, steps):
        *common, a_t = steps
        unknown = np.where(np.arange(STEPS) == STEPS - 1, -1, a_t).astype(np.int32)
        np.testing.assert_array_equal(
            rlprims.watkins_q_lambda(*common, unknown, 0.7),
            rlprims.watkins_q_lambda(*steps, 0.7),
        )

    def test_any_other_action_out_of_range_is_nan(self, steps):
        *common, a_t = steps
        wrong = np.where(np.arange(STEPS) == 1, 3, a_t).astype(np.int32)
        errors = rlprims.watkins_q_lambda(*common, wrong, 0.7)
        assert np.isnan(errors[:2]).all()
        assert np.isfinite(errors[2:]).all()

    def test_never_compares_with_an_illegal_action(self, steps):
        q_tm1, a_tm1, r, discount, q_t, a_t = steps
        mask = np.arange(ACTIONS) != q_t.argmin(axis=-1)[:, None]
        spoilt = np.where(mask, q_t, np.float32(np.nan))
        actual = rlprims.watkins_q_lambda(
            q_tm1, a_tm1, r, discount, spoilt, a_t, 0.7, mask=mask
        )
        np.testing.assert_array_equal(actual, rlprims.watkins_q_lambda(*steps, 0.7))


def upgoing(r, discount, v):
    """Each return by itself: forwards to the first action below expectation."""
    returns = []
    for t in range(STEPS):
        n = 1
        while t + n < STEPS:
            one_step = r[t + n] + discount[t + n] * v[t + n]
            if one_step < v[t + n - 1]:
                break
            n += 1
        returns.append(n_step(r, discount, v, t, n))
    return returns


class TestUpgoReturns:
    def test_goes_on_while_actions_do_as_well_as_expected(self, rng):
        r, v = rng.normal(size=(2, STEPS)).astype(np.float32)
        discount = np.full(STEPS, 0.9, np.float32)
        expected = upgoing(*map(np.float64, (r, discount, v)))
        actual = rlprims.upgo_returns(r, discount, v)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
        one_step = r + discount * v
        assert 0 < np.count_nonzero(~np.isclose(actual, one_step)) < STEPS - 1

    def test_judges_an_action_by_the_step_after_the_bootstrap(self):
        """A good reward right away says nothing of what comes next."""
        discount, v = jnp.ones(2), jnp.array([1.0, 0.0])
        good_then_bad = rlprims.upgo_returns(jnp.array([9.0, 0.0]), discount, v)
        bad_then_good = rlprims.upgo_returns(jnp.array([0.0, 9.0]), discount, v)
        assert good_then_bad.tolist() == [10, 0]
        assert bad_then_good.tolist() == [9, 9]

    def test_goes_on_where_an_action_did_just_as_well(self):
        """Which shows in the gradient alone: of the value that it bootstraps from."""
        fn = lambda v: rlprims.upgo_returns(
            jnp.array([1.0, 1.0]), jnp.ones(2), v, stop_target_gradients=False
        )[0]
        assert jax.grad(fn)(jnp.array([3.0, 2.0])).tolist() == [0, 1]

    def test_is_not_below_what_bootstrapping_gives(self, rng):
        r, v = rng.normal(size=(2, 50)).astype(np.float32)
        discount = rng.uniform(size=50).astype(np.float32)
        actual = rlprims.upgo_returns(r, discount, v)
        assert (actual >= r + discount * v - 1e-6).all()
        assert (actual[:-1] > (r + discount * v)[:-1] + 1e-6).any()

    def test_does_not_see_past_a_termination(self, rng):
        r, v = rng.normal(size=(2, STEPS)).astype(np.float32)
        discount = np.where(np.arange(STEPS) == CUT, 0, 0.9).astype(np.float32)
        later_r = np.where(np.arange(STEPS) > CUT, np.float32(np.nan), r)
        later_v = np.where(np.arange(STEPS) >= CUT, np.float32(np.nan), v)

        def early(*args):
            returns = rlprims.upgo_returns(*args, stop_target_gradients=False)
            return returns[: CUT + 1]

        spoilt = later_r, discount, later_v
        np.testing.assert_array_equal(early(*spoilt), early(r, discount, v))
        grads = jax.grad(lambda *x: early(*x).sum(), argnums=(0, 1, 2))(*spoilt)
        assert all(np.isfinite(x[: CUT + 1]).all() for x in grads)

    @pytest.mark.parametrize("which", ["r", "v"])
    def test_shows_what_is_not_finite_where_nothing_cuts(self, which):
        bad = np.where(np.arange(4) == 2, np.nan, 1).astype(np.float32)
        good, half = np.ones(4, np.float32), np.full(4, 0.5, np.float32)
        r, v = (bad, good) if which == "r" else (good, bad)
        assert np.isnan(rlprims.upgo_returns(r, half, v)[:3]).all()

    def test_judges_by_the_next_step_that_counts(self):
        """Padding, which holds zeros or NaN, would be below expectation."""
        r, v = jnp.array([0.0, jnp.nan, 9.0]), jnp.array([1.0, jnp.nan, 0.0])
        mask_t = jnp.array([True, False, True])
        actual = rlprims.upgo_returns(r, jnp.ones(3), v, mask_t=mask_t)
        assert actual.tolist() == [9, 0, 9]

    def test_refuses_values_before_the_first_step(self):
        with pytest.raises(
            ValueError, match=r"^upgo_returns: v_t has shape \(4,\), expected f\[T\]"
        ):
            rlprims.upgo_returns(jnp.ones(3), jnp.ones(3), jnp.ones(4))

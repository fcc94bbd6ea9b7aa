"""What is made of many estimates, against loops over the members."""

import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    ensemble_td_learning,
    lower_confidence_bound,
    maxmin_value,
    random_subset_minimum,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

KEY = jax.random.key(5)
MEMBERS = 4
BAD = [np.nan, np.inf, -np.inf]


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def over_members(fn, values):
    """Applies `fn` to the list of estimates in each place."""
    values = np.float64(values)
    shape = values.shape[1:]
    return np.reshape([fn([x[i] for x in values]) for i in np.ndindex(shape)], shape)


class TestTdLearning:
    def test_moves_every_member_to_one_target(self, rng):
        q_tm1 = rng.normal(size=(MEMBERS, 2, 3)).astype(np.float32)
        r_t, discount_t, v_t = rng.normal(size=(3, 2, 3)).astype(np.float32)
        errors = ensemble_td_learning(q_tm1, r_t, discount_t, v_t)
        for error, q in zip(errors, q_tm1, strict=True):
            same(error, r_t + discount_t * v_t - q)

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_flow_to_predictions_and_to_the_rest_if_told(self, stop):
        args = jnp.ones((3, 2)), jnp.ones(2), jnp.full(2, 0.5), jnp.full(2, 4.0)
        total = lambda *args: ensemble_td_learning(
            *args, stop_target_gradients=stop
        ).sum()
        slopes = jax.grad(total, (0, 1, 2, 3))(*args)
        flows = 0 if stop else 3  # one of each member
        for slope, expected in zip(
            slopes, [-1, flows, 4 * flows, flows / 2], strict=True
        ):
            same(slope, np.full(slope.shape, expected))

    @pytest.mark.parametrize("bad", BAD)
    def test_nothing_leaks_from_behind_the_end(self, bad):
        q, r_t = jnp.ones((2, 2)), jnp.ones(2)
        discount_t, v_t = jnp.array([0.0, 0.5]), jnp.array([bad, 2.0])

        def total(*args):
            errors = ensemble_td_learning(*args, stop_target_gradients=False)
            return errors.sum(), errors

        slopes, errors = jax.grad(total, (0, 1, 2, 3), has_aux=True)(
            q, r_t, discount_t, v_t
        )
        same(errors, [[0, 1], [0, 1]])
        assert all(np.isfinite(slope).all() for slope in slopes)

    def test_sizes_are_not_broadcast(self):
        with pytest.raises(
            ValueError, match=r"v_t has shape \(1,\), expected f\[...\]"
        ):
            ensemble_td_learning(
                jnp.ones((2, 3)), jnp.ones(3), jnp.ones(3), jnp.ones(1)
            )


class TestLowerConfidenceBound:
    @pytest.mark.parametrize("beta", [-1.0, 0.0, 0.5, 2.0])
    def test_is_the_mean_less_deviations_of_the_members(self, rng, beta):
        values = rng.normal(size=(MEMBERS, 2, 3)).astype(np.float32)
        by_hand = lambda x: statistics.fmean(x) - beta * statistics.pstdev(x)
        same(lower_confidence_bound(values, beta=beta), over_members(by_hand, values))

    def test_each_place_may_have_a_weight_of_its_own(self):
        values, beta = jnp.array([[1.0, 1.0], [3.0, 3.0]]), jnp.array([0.0, 2.0])
        assert lower_confidence_bound(values, beta=beta).tolist() == [2, 0]

    @pytest.mark.parametrize("members", [1, 4])
    def test_where_all_agree_it_is_their_value_and_slopes_as_the_mean(self, members):
        values = jnp.full(members, 0.75)
        fn = lambda x: lower_confidence_bound(x, beta=2.0)
        value, slope = jax.value_and_grad(fn)(values)
        assert value == 0.75
        same(slope, np.full(members, 1 / members))
        assert np.isfinite(jax.hessian(fn)(values)).all()

    def test_its_gradient_favours_the_low(self, rng):
        values = rng.normal(size=MEMBERS).astype(np.float32)
        fn = lambda x, beta: lower_confidence_bound(x, beta=beta)
        slope, by_beta = jax.grad(fn, (0, 1))(values, 1.5)
        deviation = statistics.pstdev(values.tolist())
        off = np.float64(values) - values.mean(dtype=np.float64)
        same(slope, (1 - 1.5 * off / deviation) / MEMBERS, rtol=1e-4)
        same(by_beta, -deviation)

    def test_a_spread_whose_square_overflows_half_precision_is_fine(self):
        values = jnp.array([-3e4, 3e4], jnp.float16)
        bound = lower_confidence_bound(values, beta=0.5)
        assert bound.dtype == jnp.float16
        same(bound, -1.5e4, rtol=1e-3)

    def test_nan_shows_only_where_it_is(self):
        values = jnp.array([[1.0, np.nan], [3.0, 1.0]])
        same(lower_confidence_bound(values, beta=1.0), [1, np.nan])


class TestMaxminValue:
    def test_is_the_greatest_of_the_least(self, rng):
        q = rng.normal(size=(MEMBERS, 2, 3, 5)).astype(np.float32)
        mask = rng.uniform(size=(2, 3, 5)) < 0.6
        mask[..., 1] = True
        for legal in (mask, np.ones_like(mask)):
            expected = [
                max(min(x[i][a] for x in q) for a in range(5) if legal[i][a])
                for i in np.ndindex(2, 3)
            ]
            same(maxmin_value(q, mask=legal), np.reshape(expected, (2, 3)))
        same(maxmin_value(q), maxmin_value(q, mask=np.ones_like(mask)))

    def test_with_one_member_it_is_the_maximum(self):
        assert maxmin_value(jnp.array([[1.0, 3.0, 2.0]])) == 3

    def test_its_gradient_reaches_one_estimate(self):
        q = jnp.array([[1.0, 9.0, 5.0], [2.0, 0.0, 4.0]])
        assert jax.grad(maxmin_value)(q).tolist() == [[0, 0, 0], [0, 0, 1]]

    @pytest.mark.parametrize("bad", BAD)
    def test_what_is_not_legal_has_no_effect(self, bad):
        q = jnp.array([[1.0, bad], [2.0, bad]])
        fn = lambda q: maxmin_value(q, mask=jnp.array([True, False]))
        assert fn(q) == 1
        assert jax.grad(fn)(q).tolist() == [[1, 0], [0, 0]]

    def test_where_nothing_is_legal_the_end_cuts_it_off(self):
        q = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        value = lambda q: maxmin_value(q, mask=jnp.zeros(2, bool))
        assert value(q) == -math.inf

        def error(q, discount):
            args = jnp.zeros(1), jnp.float32(1), discount, value(q)
            return ensemble_td_learning(*args, stop_target_gradients=False)[0]

        assert error(q, 0.0) == 1
        assert jax.grad(error)(q, 0.0).tolist() == [[0, 0], [0, 0]]

    def test_estimates_of_nan_pass_no_gradient_behind_the_end(self):
        def error(q):
            args = jnp.zeros(1), jnp.float32(1), jnp.float32(0), maxmin_value(q)
            return ensemble_td_learning(*args, stop_target_gradients=False)[0]

        assert jax.grad(error)(jnp.array([[1.0, np.nan]])).tolist() == [[0, 0]]


class TestRandomSubsetMinimum:
    # In place `i` the minimum is -1 if the subset has member `i`, and 0 if not.
    SHOWS = -jnp.eye(MEMBERS)

    def test_draws_all_subsets_alike_and_one_for_all_places(self):
        keys = jax.random.split(KEY, 6000)
        draw = jax.vmap(random_subset_minimum, (0, None))  # of two
        drawn = [
            tuple(np.flatnonzero(row)) for row in np.asarray(draw(keys, self.SHOWS))
        ]
        p = 1 / 6
        for subset in itertools.combinations(range(MEMBERS), 2):
            error = 4 * math.sqrt(p * (1 - p) / 6000)
            assert abs(drawn.count(subset) / 6000 - p) < error

    @pytest.mark.parametrize("size", range(1, MEMBERS + 1))
    def test_draws_as_many_as_it_is_told(self, size):
        assert random_subset_minimum(KEY, self.SHOWS, subset_size=size).sum() == -size

    def test_is_the_least_of_the_members_drawn(self, rng):
        values = rng.normal(size=(MEMBERS, 2, 3)).astype(np.float32)
        places = np.asarray(random_subset_minimum(KEY, self.SHOWS, subset_size=3))
        expected = values[places < 0].min(axis=0)
        same(random_subset_minimum(KEY, values, subset_size=3), expected)
        whole = random_subset_minimum(KEY, values, subset_size=MEMBERS)
        same(whole, over_members(min, values))

    def test_old_keys_draw_the_same(self):
        old, new = (
            random_subset_minimum(make(1), self.SHOWS)
            for make in (jax.random.PRNGKey, jax.random.key)
        )
        np.testing.assert_array_equal(old, new)

    def test_a_member_that_is_not_drawn_has_no_effect(self):
        left_out = int(np.argmax(random_subset_minimum(KEY, self.SHOWS)))
        values = jnp.ones((MEMBERS, 2)).at[left_out].set(np.nan)
        fn = lambda x: random_subset_minimum(KEY, x).sum()
        assert fn(values) == 2
        slope = jax.grad(fn)(values)
        assert slope[left_out].tolist() == [0, 0]
        same(slope.sum(), 2)

    @pytest.mark.parametrize("size", [0, MEMBERS + 1, -1])
    def test_a_size_that_no_subset_has_is_refused(self, size):
        message = rf"subset_size must be in \[1, N\], got {size} with N = 4\."
        with pytest.raises(ValueError, match=f"^random_subset_minimum: {message}"):
            random_subset_minimum(KEY, self.SHOWS, subset_size=size)

    def test_a_size_that_is_no_int_is_refused(self):
        with pytest.raises(TypeError, match="subset_size must be a Python int"):
            random_subset_minimum(KEY, self.SHOWS, subset_size=2.0)

"""State-value errors, against plain readings of the books."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims


@pytest.fixture
def transition(rng):
    """Value, reward, discount and next value of one transition."""
    return tuple(np.float32(x) for x in rng.uniform(0.1, 1, size=4))


class TestTdLearning:
    def test_is_what_was_found_less_what_was_expected(self, transition):
        v_tm1, r_t, discount_t, v_t = map(float, transition)
        error = rlprims.td_learning(*transition)
        np.testing.assert_allclose(error, r_t + discount_t * v_t - v_tm1, rtol=1e-6)

    def test_is_zero_at_the_value_of_an_endless_loop(self):
        """Reward 1 for ever, at discount 0.5, is worth 2."""
        assert rlprims.td_learning(2.0, 1.0, 0.5, 2.0) == 0

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_ignores_the_state_after_a_termination(self, bad):
        grads = jax.grad(rlprims.td_learning, argnums=(0, 1, 2, 3))
        assert rlprims.td_learning(2.0, 1.0, 0.0, bad) == -1
        assert np.isfinite(grads(2.0, 1.0, 0.0, bad)).all()
        assert np.isfinite(grads(2.0, 1.0, 0.0, bad, stop_target_gradients=False)).all()

    def test_shows_a_value_that_is_not_finite_otherwise(self):
        assert np.isnan(rlprims.td_learning(2.0, 1.0, 0.5, np.nan))

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradient_flows_through_the_target_only_on_request(self, transition, stop):
        grads = jax.grad(rlprims.td_learning, argnums=(0, 1, 2, 3))(*transition, stop)
        _, _, discount_t, v_t = transition
        expected = [-1, 0, 0, 0] if stop else [-1, 1, v_t, discount_t]
        np.testing.assert_allclose(grads, expected, rtol=1e-6)


class TestTdLambda:
    @pytest.fixture
    def trajectory(self, rng):
        v_tm1, r, discount, v = rng.uniform(0.1, 1, size=(4, 6)).astype(np.float32)
        discount[2] = 0
        return v_tm1, r, discount, v

    @pytest.mark.parametrize("lambda_", [0.0, 0.4, 1.0])
    def test_is_the_return_computed_backwards_less_the_value(self, trajectory, lambda_):
        v_tm1, r, discount, v = trajectory
        expected, following = [], float(v[-1])
        for t in reversed(range(6)):
            mixed = (1 - lambda_) * float(v[t]) + lambda_ * following
            following = float(r[t]) + float(discount[t]) * mixed
            expected.insert(0, following - v_tm1[t])
        actual = rlprims.td_lambda(v_tm1, r, discount, v, lambda_)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    def test_with_lambda_zero_is_td_learning_at_each_step(self, trajectory):
        each = jax.vmap(rlprims.td_learning)(*trajectory)
        actual = rlprims.td_lambda(*trajectory, 0.0)
        np.testing.assert_allclose(actual, each, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradient_flows_through_the_target_only_on_request(self, trajectory, stop):
        def total(*args):
            return rlprims.td_lambda(*args, 0.9, stop_target_gradients=stop).sum()

        grads = jax.grad(total, argnums=(0, 1, 3))(*trajectory)
        np.testing.assert_array_equal(grads[0], -np.ones(6))
        assert np.any(grads[1] != 0) != stop
        assert np.any(grads[2] != 0) != stop

    def test_refuses_one_value_for_many_steps(self, trajectory):
        _, r, discount, v = trajectory
        with pytest.raises(ValueError, match=r"td_lambda: r_t has shape \(6,\).*T = 1"):
            rlprims.td_lambda(v[:1], r, discount, v, 0.9)


class TestQvMax:
    def test_takes_the_best_action(self, rng):
        q_t = rng.normal(size=4).astype(np.float32)
        error = rlprims.qv_max(0.5, 1.0, 0.9, q_t)
        best = sorted(map(float, q_t))[-1]
        np.testing.assert_allclose(error, 1.0 + 0.9 * best - 0.5, rtol=1e-6)

    def test_never_takes_an_illegal_action(self):
        assert rlprims.qv_max(0.5, 1.0, 0.5, jnp.array([-jnp.inf, 2.0])) == 1.5

    @pytest.mark.parametrize("bad", [np.nan, -np.inf])
    @pytest.mark.parametrize("stop", [True, False])
    def test_ignores_the_state_after_a_termination(self, bad, stop):
        q_t = jnp.array([bad, bad])
        assert rlprims.qv_max(0.5, 1.0, 0.0, q_t) == 0.5
        grads = jax.grad(rlprims.qv_max, argnums=(2, 3))(0.5, 1.0, 0.0, q_t, stop)
        assert all(np.isfinite(g).all() for g in grads)

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradient_flows_through_the_target_only_on_request(self, stop):
        q_t = jnp.array([1.0, 3.0, 2.0])
        v, q = jax.grad(rlprims.qv_max, argnums=(0, 3))(0.5, 1.0, 0.5, q_t, stop)
        assert v == -1
        assert q.tolist() == ([0, 0, 0] if stop else [0, 0.5, 0])

"""Multistep action-value errors, against recursions written out backwards."""

import jax
import numpy as np
import pytest

import rlprims

ACTIONS, STEPS = 4, 6


@pytest.fixture
def trajectory(rng):
    """q_tm1, a_tm1, r_t, discount_t, q_t, a_t; an episode ends at step 2."""
    q_tm1, q_t = rng.normal(size=(2, STEPS, ACTIONS)).astype(np.float32)
    a_tm1, a_t = rng.integers(ACTIONS, size=(2, STEPS)).astype(np.int32)
    r_t, discount_t = rng.uniform(0.1, 1, size=(2, STEPS)).astype(np.float32)
    discount_t[2] = 0
    return q_tm1, a_tm1, r_t, discount_t, q_t, a_t


def errors_backwards(q_tm1, a_tm1, r_t, discount_t, v_t, lambda_):
    errors, following = [], float(v_t[-1])
    for t in reversed(range(STEPS)):
        mixed = (1 - lambda_) * float(v_t[t]) + lambda_ * following
        following = float(r_t[t]) + float(discount_t[t]) * mixed
        errors.insert(0, following - q_tm1[t][a_tm1[t]])
    return errors


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_sarsa_lambda_bootstraps_from_the_actions_taken(trajectory, lambda_):
    *common, q_t, a_t = trajectory
    v_t = [q_t[t][a_t[t]] for t in range(STEPS)]
    actual = rlprims.sarsa_lambda(*common, q_t, a_t, lambda_)
    expected = errors_backwards(*common, v_t, lambda_)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_q_lambda_bootstraps_from_the_best_actions(trajectory, lambda_):
    *common, q_t, _ = trajectory
    v_t = [max(map(float, q)) for q in q_t]
    actual = rlprims.q_lambda(*common, q_t, lambda_)
    expected = errors_backwards(*common, v_t, lambda_)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("name", ["sarsa_lambda", "q_lambda"])
class TestMultistep:
    def test_does_not_see_past_a_termination(self, trajectory, name, bad, stop):
        q_tm1, a_tm1, r_t, discount_t, q_t, a_t = trajectory
        more = [a_t] if name == "sarsa_lambda" else []
        spoilt = np.where((np.arange(STEPS) >= 2)[:, None], bad, q_t)

        def early(q_tm1, r_t, discount_t, q_t):
            fn = getattr(rlprims, name)
            args = (q_tm1, a_tm1, r_t, discount_t, q_t, *more, 0.9, stop)
            return fn(*args)[:3].sum()

        args = q_tm1, r_t, discount_t
        assert early(*args, spoilt) == early(*args, q_t)
        grads = jax.grad(early, argnums=(0, 1, 2, 3))(*args, spoilt)
        assert all(np.isfinite(g[:3]).all() for g in grads)


@pytest.mark.parametrize("name", ["sarsa_lambda", "q_lambda"])
@pytest.mark.parametrize("stop", [True, False])
def test_multistep_gradients_flow_through_targets_only_on_request(
    trajectory, name, stop
):
    q_tm1, a_tm1, r_t, discount_t, q_t, a_t = trajectory
    more = [a_t] if name == "sarsa_lambda" else []

    def total(q_tm1, q_t):
        args = (q_tm1, a_tm1, r_t, discount_t, q_t, *more, 0.9, stop)
        return getattr(rlprims, name)(*args).sum()

    wrt_q_tm1, wrt_q_t = jax.grad(total, argnums=(0, 1))(q_tm1, q_t)
    np.testing.assert_array_equal(wrt_q_tm1, -np.eye(ACTIONS)[a_tm1])
    assert np.any(wrt_q_t) != stop


def test_q_lambda_never_bootstraps_from_an_illegal_action(trajectory):
    *common, q_t, _ = trajectory
    mask = np.arange(ACTIONS) != q_t.argmax(axis=-1)[:, None]
    spoilt = np.where(mask, q_t, np.nan)
    without = np.where(mask, q_t, -np.inf)
    expected = rlprims.q_lambda(*common, without, 0.6)
    actual = rlprims.q_lambda(*common, spoilt, 0.6, mask=mask)
    np.testing.assert_array_equal(actual, expected)
    assert np.isfinite(actual).all()

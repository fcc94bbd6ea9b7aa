"""Advantages, against sums of errors written out step by step."""

import jax
import numpy as np
import pytest

import rlprims


def sum_of_errors(r, discount, values, decay, weight, t):
    """Errors of one step from `t` on, each decayed by the steps before it."""
    total = 0.0
    for k in range(t, len(r)):
        error = r[k] + discount[k] * values[k + 1] - values[k]
        decays = [discount[i] * decay[i] for i in range(t, k)]
        total += np.prod(decays) * np.prod(weight[t : k + 1]) * error
    return total


@pytest.fixture
def trajectory(rng):
    """Rewards, discounts and values of seven steps, ending an episode at step 3."""
    r, discount, v = rng.uniform(0.1, 1, size=(3, 7)).astype(np.float32)
    discount[3] = 0
    return r, discount, v


@pytest.fixture
def lambda_(rng):
    return rng.uniform(size=7).astype(np.float32)


class TestGeneralizedAdvantageEstimation:
    def test_is_the_truncated_one_where_the_trajectory_is_unbroken(
        self, trajectory, lambda_
    ):
        r, discount, v = trajectory
        values = np.append(np.float32(0.5), v)
        np.testing.assert_array_equal(
            rlprims.generalized_advantage_estimation(
                values[:-1], r, discount, v, lambda_
            ),
            rlprims.truncated_generalized_advantage_estimation(
                r, discount, lambda_, values
            ),
        )

    def test_bootstraps_from_the_value_of_what_was_reached(self, trajectory, rng):
        """With λ = 0 each step stands for itself, whatever state comes next."""
        r, discount, v_t = trajectory
        v_tm1 = rng.normal(size=7).astype(np.float32)
        actual = rlprims.generalized_advantage_estimation(v_tm1, r, discount, v_t, 0.0)
        expected = [r[t] + discount[t] * v_t[t] - v_tm1[t] for t in range(7)]
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_is_a_constant_unless_told_otherwise(self, trajectory):
        r, discount, v = trajectory

        def total(v, **flag):
            return rlprims.generalized_advantage_estimation(
                v, r, discount, v, 0.9, **flag
            ).sum()

        assert not jax.grad(total)(v).any()
        assert jax.grad(lambda v: total(v, stop_target_gradients=False))(v).any()


class TestTruncatedGeneralizedAdvantageEstimation:
    def test_sums_decayed_errors(self, trajectory, lambda_, rng):
        r, discount, _ = trajectory
        values = rng.normal(size=8).astype(np.float32)
        expected = [
            sum_of_errors(r, discount, values, lambda_, np.ones(7), t) for t in range(7)
        ]
        actual = rlprims.truncated_generalized_advantage_estimation(
            r, discount, lambda_, values
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)

    def test_is_the_lambda_return_less_the_value(self, trajectory, lambda_):
        r, discount, v = trajectory
        values = np.concatenate([np.float32([0.5]), v])
        advantages = rlprims.truncated_generalized_advantage_estimation(
            r, discount, lambda_, values
        )
        returns = rlprims.lambda_returns(r, discount, v, lambda_)
        np.testing.assert_allclose(
            advantages, returns - values[:-1], rtol=1e-5, atol=1e-6
        )

    def test_refuses_values_without_the_last(self, trajectory):
        r, discount, v = trajectory
        with pytest.raises(
            ValueError, match=r"values has shape \(7,\), expected f\[T\+1\]"
        ):
            rlprims.truncated_generalized_advantage_estimation(r, discount, 0.9, v)


class TestImportanceCorrectedTdErrors:
    def test_sums_errors_weighted_by_ratios(self, trajectory, lambda_, rng):
        r, discount, _ = trajectory
        values = rng.normal(size=8).astype(np.float32)
        rho = rng.uniform(0, 2, size=7).astype(np.float32)
        expected = [
            sum_of_errors(r, discount, values, lambda_, rho, t) for t in range(7)
        ]
        actual = rlprims.importance_corrected_td_errors(
            r, discount, rho, lambda_, values
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)

    def test_equals_gae_on_policy(self, trajectory, lambda_, rng):
        r, discount, _ = trajectory
        values = rng.normal(size=8).astype(np.float32)
        np.testing.assert_array_equal(
            rlprims.importance_corrected_td_errors(
                r, discount, np.ones_like(r), lambda_, values
            ),
            rlprims.truncated_generalized_advantage_estimation(
                r, discount, lambda_, values
            ),
        )

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_an_impossible_action_hides_all_that_follows(self, trajectory, bad):
        r, discount, v = trajectory
        rho = np.where(np.arange(7) == 1, 0, 1).astype(np.float32)
        spoilt = np.where(np.arange(7) >= 1, bad, r)
        values = np.concatenate([v, v[:1]])
        errors = rlprims.importance_corrected_td_errors(
            spoilt, discount, rho, 1.0, values
        )
        assert errors[1] == 0
        np.testing.assert_allclose(
            errors[0], r[0] + discount[0] * v[1] - v[0], rtol=1e-6
        )

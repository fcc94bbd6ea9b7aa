"""Off-policy returns, against the operator written as a sum of corrected errors."""

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

import rlprims


def corrected_return(q, v, r, discount, c, t):
    """`r + γ v`, plus each later error weighted by the corrections up to it."""
    total = r[t] + discount[t] * v[t]
    for k in range(t + 1, len(r)):
        error = r[k] + discount[k] * v[k] - q[k - 1]
        total += np.prod([discount[i] * c[i] for i in range(t, k)]) * error
    return total


@pytest.fixture
def trajectory(rng):
    """Seven steps with an end of an episode at step 3: q, v, r, discount, c."""
    v, r, discount = rng.uniform(0.1, 1, size=(3, 7)).astype(np.float32)
    q, c = rng.uniform(0.1, 1, size=(2, 6)).astype(np.float32)
    discount[3] = 0
    return q, v, r, discount, c


@pytest.fixture
def policy(rng):
    """Values and probabilities of three actions at seven steps, and actions taken."""
    q = rng.normal(size=(7, 3)).astype(np.float32)
    pi = rng.dirichlet(np.ones(3), size=7).astype(np.float32)
    return q, pi, rng.integers(3, size=7).astype(np.int32)


class TestFromQAndV:
    def test_sums_corrected_errors(self, trajectory):
        expected = [corrected_return(*trajectory, t) for t in range(7)]
        actual = rlprims.general_off_policy_returns_from_q_and_v(*trajectory)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_without_corrections_is_one_step(self, trajectory):
        q, v, r, discount, c = trajectory
        actual = rlprims.general_off_policy_returns_from_q_and_v(
            q, v, r, discount, 0 * c
        )
        np.testing.assert_allclose(actual, r + discount * v, rtol=1e-6)

    def test_with_full_trust_in_equal_values_is_the_discounted_return(self, trajectory):
        """With c = 1 and q = v the corrections telescope into rewards."""
        _, v, r, discount, c = trajectory
        actual = rlprims.general_off_policy_returns_from_q_and_v(
            v[:-1], v, r, discount, np.ones_like(c)
        )
        expected = rlprims.discounted_returns(r, discount, v)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_does_not_see_past_a_termination(self, trajectory, bad):
        q, v, r, discount, c = trajectory
        after = np.arange(7) > 3
        spoilt = (
            np.where(after[1:], bad, q),
            np.where([*after[1:], True], bad, v),
            np.where(after, bad, r),
            discount,
            np.where(np.arange(6) >= 3, bad, c),
        )

        def early(*args):
            return rlprims.general_off_policy_returns_from_q_and_v(*args)[:4].sum()

        fn = rlprims.general_off_policy_returns_from_q_and_v
        np.testing.assert_array_equal(fn(*spoilt)[:4], fn(*trajectory)[:4])
        for grad in jax.grad(early, argnums=(0, 1, 2, 3, 4))(*spoilt):
            assert np.isfinite(grad[:4]).all()

    def test_ignores_action_values_it_gives_no_weight(self, trajectory):
        q, v, r, discount, c = trajectory
        cut = np.where(np.arange(6) == 1, 0, c).astype(np.float32)
        spoilt = np.where(np.arange(6) == 1, np.nan, q)
        fn = rlprims.general_off_policy_returns_from_q_and_v
        np.testing.assert_array_equal(
            fn(spoilt, v, r, discount, cut), fn(q, v, r, discount, cut)
        )

    def test_equals_finite_differences(self, trajectory):
        with jax.enable_x64(True):
            args = [np.asarray(x, np.float64) for x in trajectory]
            fn = rlprims.general_off_policy_returns_from_q_and_v
            check_grads(fn, args, order=2, modes=["fwd", "rev"])

    def test_refuses_a_value_too_many(self, trajectory):
        _, v, r, discount, c = trajectory
        with pytest.raises(
            ValueError, match=r"v_t has shape \(7,\), expected f\[T\] with T = 8"
        ):
            rlprims.general_off_policy_returns_from_q_and_v(v, v, r, discount, c)


class TestFromActionValues:
    def test_takes_expectations_under_the_policy(self, trajectory, policy):
        _, _, r, discount, c = trajectory
        q, pi, a = policy
        c = np.append(c, np.float32(np.nan))  # not used
        v = [
            sum(p * x for p, x in zip(*row, strict=True))
            for row in zip(pi, q, strict=True)
        ]
        taken = [q[t, a[t]] for t in range(6)]
        expected = [corrected_return(taken, v, r, discount, c, t) for t in range(7)]
        actual = rlprims.general_off_policy_returns_from_action_values(
            q, a, r, discount, c, pi
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("bad", [-np.inf, np.nan])
    def test_an_action_never_taken_counts_for_nothing(self, trajectory, policy, bad):
        _, _, r, discount, c = trajectory
        q, pi, _ = policy
        c, a = np.append(c, np.float32(0)), np.zeros(7, np.int32)
        pi = np.float32([[0.5, 0.5, 0.0]] * 7)
        spoilt = np.concatenate([q[:, :2], np.full((7, 1), bad, np.float32)], axis=1)

        def total(q, pi):
            return rlprims.general_off_policy_returns_from_action_values(
                q, a, r, discount, c, pi
            ).sum()

        assert total(spoilt, pi) == total(q, pi)
        for grad in jax.grad(total, argnums=(0, 1))(spoilt, pi):
            assert np.isfinite(grad).all()

    def test_does_not_see_past_a_termination(self, trajectory, policy):
        _, _, r, discount, c = trajectory
        q, pi, a = policy
        c = np.append(c, np.float32(1))
        spoilt, odd = (
            np.where((np.arange(7) >= 3)[:, None], np.nan, x) for x in (q, pi)
        )

        def early(q, pi, discount):
            return rlprims.general_off_policy_returns_from_action_values(
                q, a, r, discount, c, pi
            )[:4].sum()

        np.testing.assert_array_equal(
            early(spoilt, odd, discount), early(q, pi, discount)
        )
        for grad in jax.grad(early, argnums=(0, 1, 2))(spoilt, odd, discount):
            assert np.isfinite(grad[:4]).all()

    def test_an_action_out_of_range_is_nan(self, trajectory, policy):
        _, _, r, discount, c = trajectory
        q, pi, a = policy
        c, a = np.append(c, np.float32(1)), np.where(np.arange(7) == 1, 3, a)
        returns = rlprims.general_off_policy_returns_from_action_values(
            q, a.astype(np.int32), r, discount, c, pi
        )
        assert np.isnan(returns[:2]).all()
        assert np.isfinite(returns[2:]).all()

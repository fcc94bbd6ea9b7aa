"""Multistep returns, against sums written out step by step.

What returns and advantages share is tested here for both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import rlprims


def n_step_return(r, discount, v, t, n):
    """`n` rewards from step `t`, then a bootstrap: the definition, not a recursion."""
    total, weight = 0.0, 1.0
    for k in range(t, t + n):
        total += weight * r[k]
        weight *= discount[k]
    return total + weight * v[t + n - 1]


def lambda_return(r, discount, v, lambda_, t, horizon):
    """The average of the first `horizon` n-step returns, weighted by products of λ."""
    total, weight = 0.0, 1.0
    for n in range(1, horizon):
        keep = lambda_[t + n - 1]
        total += weight * (1 - keep) * n_step_return(r, discount, v, t, n)
        weight *= keep
    return total + weight * n_step_return(r, discount, v, t, horizon)


def bfloat16_ulp(x):
    return 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)


@pytest.fixture
def trajectory(rng):
    """Rewards, discounts and values of seven steps, ending an episode at step 3."""
    r, discount, v = rng.uniform(0.1, 1, size=(3, 7)).astype(np.float32)
    discount[3] = 0
    return r, discount, v


@pytest.fixture
def lambda_(rng):
    return rng.uniform(size=7).astype(np.float32)


RATIOS = np.resize([0.75, 1.25], 1024)

ESTIMATORS = {
    "lambda_returns": lambda r, d, v: rlprims.lambda_returns(r, d, v, 0.9),
    "discounted_returns": rlprims.discounted_returns,
    "n_step": lambda r, d, v: rlprims.n_step_bootstrapped_returns(r, d, v, 3, 0.9),
    "gae": lambda r, d, v: rlprims.truncated_generalized_advantage_estimation(
        r, d, 0.9, jnp.concatenate([jnp.ones(1, v.dtype), v])
    ),
    "importance_corrected": lambda r, d, v: rlprims.importance_corrected_td_errors(
        r,
        d,
        RATIOS[: len(r)].astype(r.dtype),
        0.9,
        jnp.concatenate([jnp.ones(1, v.dtype), v]),
    ),
}


@pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS.keys())
class TestEveryEstimator:
    @pytest.mark.parametrize("later", [100.0, np.nan, np.inf, -np.inf])
    def test_does_not_see_past_a_termination(self, estimate, trajectory, later):
        """In GAE the value of the state after is `values[4]`, a prediction there."""
        r, discount, v = trajectory
        after = np.arange(7) > 3
        spoilt = (
            np.where(after, later, r),
            discount,
            np.where([*after[1:], True], later, v),
        )
        np.testing.assert_array_equal(estimate(*spoilt)[:4], estimate(*trajectory)[:4])

    @pytest.mark.parametrize("later", [np.nan, np.inf, -np.inf])
    def test_has_a_finite_gradient_before_a_termination(
        self, estimate, trajectory, later
    ):
        r, discount, v = trajectory
        after = np.arange(7) > 3
        spoilt = np.where(after, later, r), discount, np.where(after, later, v)
        clean = np.where(after, 0, r), discount, np.where(after, 0, v)
        grads = jax.grad(lambda *x: estimate(*x)[:4].sum(), argnums=(0, 1, 2))
        for grad, expected in zip(grads(*spoilt), grads(*clean), strict=True):
            assert np.isfinite(grad[:4]).all()
            np.testing.assert_array_equal(grad[:3], expected[:3])

    def test_shows_what_is_not_finite_where_nothing_cuts(self, estimate, trajectory):
        r, discount, v = trajectory
        spoilt = np.where(np.arange(7) == 2, np.nan, r)
        assert np.isnan(estimate(spoilt, discount, v)[2])

    def test_is_linear_in_rewards_and_values(self, estimate, trajectory):
        r, discount, v = trajectory
        zero = np.zeros_like(r)
        nothing = estimate(zero, discount, zero)
        both = estimate(r, discount, v) - nothing
        apart = estimate(r, discount, zero) + estimate(zero, discount, v) - 2 * nothing
        np.testing.assert_allclose(both, apart, atol=1e-6)

    def test_of_packed_episodes_is_each_on_its_own(self, estimate, trajectory):
        r, discount, v = trajectory
        alone = estimate(r[:4], discount[:4], v[:4])
        np.testing.assert_allclose(estimate(r, discount, v)[:4], alone, rtol=1e-6)

    def test_of_no_steps_is_empty(self, estimate):
        nothing = np.zeros(0, np.float32)
        assert estimate(nothing, nothing, nothing).shape == (0,)

    def test_equals_finite_differences(self, estimate, trajectory):
        with jax.enable_x64(True):
            args = [np.asarray(x, np.float64) for x in trajectory]
            check_grads(estimate, args, order=2, modes=["fwd", "rev"])

    def test_stays_within_two_ulp_in_bfloat16_over_a_long_trajectory(
        self, estimate, rng
    ):
        r, v = rng.uniform(0.1, 1, size=(2, 1024))
        discount = rng.uniform(0.9, 1, size=1024)
        half = [jnp.asarray(x, jnp.bfloat16) for x in (r, discount, v)]
        with jax.enable_x64(True):
            expected = np.asarray(estimate(*(np.asarray(x, np.float64) for x in half)))
        actual = estimate(*half)
        assert actual.dtype == jnp.bfloat16
        error = np.abs(np.asarray(actual, np.float64) - expected)
        assert (error / bfloat16_ulp(expected)).max() <= 2


class TestLambdaReturns:
    def test_averages_n_step_returns(self, trajectory, lambda_):
        expected = [lambda_return(*trajectory, lambda_, t, 7 - t) for t in range(7)]
        actual = rlprims.lambda_returns(*trajectory, lambda_)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_scalar_and_constant_lambda_agree(self, trajectory):
        np.testing.assert_allclose(
            rlprims.lambda_returns(*trajectory, 0.9),
            rlprims.lambda_returns(*trajectory, np.full(7, 0.9, np.float32)),
            rtol=1e-6,
        )

    def test_bootstraps_at_once_when_lambda_is_zero(self, trajectory):
        r, discount, v = trajectory
        actual = rlprims.lambda_returns(*trajectory, 0.0)
        np.testing.assert_allclose(actual, r + discount * v, rtol=1e-6)

    def test_ignores_the_values_it_gives_no_weight(self, trajectory):
        """With λ = 1 only the last value counts."""
        r, discount, v = trajectory
        spoilt = np.where(np.arange(7) < 6, np.nan, v)
        expected = rlprims.discounted_returns(r, discount, v)
        actual = rlprims.lambda_returns(r, discount, spoilt, 1.0)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)

    def test_never_bootstraps_by_default(self, trajectory):
        np.testing.assert_array_equal(
            rlprims.lambda_returns(*trajectory),
            rlprims.lambda_returns(*trajectory, 1.0),
        )


class TestDiscountedReturns:
    def test_sums_rewards_to_the_end_and_bootstraps(self, trajectory):
        expected = [n_step_return(*trajectory, t, 7 - t) for t in range(7)]
        actual = rlprims.discounted_returns(*trajectory)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_takes_the_last_value_alone(self, trajectory):
        r, discount, v = trajectory
        alone = rlprims.discounted_returns(r, discount, v[-1])
        spoilt = np.where(np.arange(7) < 6, np.nan, v)
        np.testing.assert_array_equal(
            rlprims.discounted_returns(r, discount, spoilt), alone
        )

    def test_refuses_one_value_for_many_steps(self, trajectory):
        r, discount, _ = trajectory
        with pytest.raises(
            ValueError, match=r"v_t has shape \(1,\).*f\[\]\|f\[T\] with T = 7"
        ):
            rlprims.discounted_returns(r, discount, np.ones(1, np.float32))


class TestNStepBootstrappedReturns:
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 100])
    def test_sums_n_rewards_and_bootstraps(self, trajectory, n):
        expected = [n_step_return(*trajectory, t, min(n, 7 - t)) for t in range(7)]
        actual = rlprims.n_step_bootstrapped_returns(*trajectory, n)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    @pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 9])
    def test_averages_shorter_returns_when_lambda_is_below_one(
        self, trajectory, lambda_, n
    ):
        expected = [
            lambda_return(*trajectory, lambda_, t, min(n, 7 - t)) for t in range(7)
        ]
        actual = rlprims.n_step_bootstrapped_returns(*trajectory, n, lambda_)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    @pytest.mark.parametrize("n", [1, 3, 6, 7, 9])
    @pytest.mark.parametrize("dtype", [np.int32, np.uint8])
    def test_takes_a_traced_number_of_steps(self, trajectory, n, dtype):
        traced = jax.jit(rlprims.n_step_bootstrapped_returns)(*trajectory, dtype(n))
        fixed = rlprims.n_step_bootstrapped_returns(*trajectory, n)
        np.testing.assert_allclose(traced, fixed, rtol=1e-6)

    def test_refuses_less_than_one_step(self, trajectory):
        with pytest.raises(ValueError, match=r"n must be in \[1, inf\), got 0"):
            rlprims.n_step_bootstrapped_returns(*trajectory, 0)

    def test_program_grows_with_the_logarithm_of_n(self):
        trajectory = [jax.ShapeDtypeStruct((4096,), jnp.float32)] * 3

        def length(n):
            fn = functools.partial(rlprims.n_step_bootstrapped_returns, n=n)
            return len(jax.jit(fn).lower(*trajectory).as_text())

        assert length(2048) < 1.2 * length(1024) < 1.44 * length(512)

    def test_keeps_the_dtype_of_its_inputs(self, trajectory):
        half = [jnp.asarray(x, jnp.bfloat16) for x in trajectory]
        assert rlprims.n_step_bootstrapped_returns(*half, 2).dtype == jnp.bfloat16
        with jax.enable_x64(True):
            returns = rlprims.n_step_bootstrapped_returns(*trajectory, 2)
            assert returns.dtype == np.float32


class TestRewardsToGo:
    def test_sums_rewards_to_the_end_of_the_episode(self, trajectory):
        r, discount, v = trajectory
        expected = [n_step_return(r, discount, 0 * v, t, 7 - t) for t in range(7)]
        actual = rlprims.rewards_to_go(r, discount)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_of_one_step_is_its_reward(self):
        assert rlprims.rewards_to_go(np.ones(1), np.ones(1)).tolist() == [1]

    def test_knows_nothing_of_what_a_time_limit_cut_off(self):
        """Where the discount is not zero, and nothing stands for the rest."""
        ones, cut = np.ones(4, np.float32), np.arange(4) == 1
        actual = rlprims.rewards_to_go(ones, ones, truncation_t=cut)
        assert actual.tolist() == [2, 1, 2, 1]

    def test_does_not_see_past_a_termination(self, trajectory):
        r, discount, _ = trajectory
        spoilt = np.where(np.arange(7) > 3, np.float32(np.nan), r)
        expected = rlprims.rewards_to_go(r, discount)
        actual = rlprims.rewards_to_go(spoilt, discount)
        np.testing.assert_array_equal(actual[:4], expected[:4])


class TestSoftLambdaReturns:
    def test_averages_returns_that_pay_for_entropy_on_the_way(
        self, trajectory, lambda_, rng
    ):
        """Between `n` rewards lie `n - 1` states: the value has that of the last."""
        r, discount, v = map(np.float64, trajectory)
        entropy = rng.uniform(size=7)

        def soft_return(t, n):
            paid = [0.0] * 7
            paid[t : t + n - 1] = 0.3 * entropy[t : t + n - 1]
            return n_step_return(r + discount * paid, discount, v, t, n)

        def average(t):
            total, weight = 0.0, 1.0
            for n in range(1, 7 - t):
                total += weight * (1 - lambda_[t + n - 1]) * soft_return(t, n)
                weight *= lambda_[t + n - 1]
            return total + weight * soft_return(t, 7 - t)

        actual = rlprims.soft_lambda_returns(
            *trajectory, entropy.astype(np.float32), lambda_, temperature=0.3
        )
        np.testing.assert_allclose(actual, [*map(average, range(7))], rtol=1e-5)

    @pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
    def test_is_the_soft_action_value_at_the_fixed_point(self, lambda_):
        """One state, two equal actions, and `v = ηH + q`, `q = 1 + v / 2`."""
        entropy, temperature = np.log(2), 0.7
        v = 2 * (temperature * entropy + 1)
        full = lambda x: np.full(5, x, np.float32)
        actual = rlprims.soft_lambda_returns(
            full(1), full(0.5), full(v), full(entropy), lambda_, temperature=temperature
        )
        np.testing.assert_allclose(actual, 1 + v / 2, rtol=1e-6)

    def test_without_temperature_is_the_lambda_return(self, trajectory, lambda_):
        unknown = np.full(7, np.inf, np.float32)
        np.testing.assert_array_equal(
            rlprims.soft_lambda_returns(*trajectory, unknown, lambda_, temperature=0.0),
            rlprims.lambda_returns(*trajectory, lambda_),
        )

    def test_does_not_need_entropies_that_the_value_holds(self, trajectory):
        """At a time limit, at a termination and at the end."""
        cut = np.arange(7) == 1
        entropy = np.ones(7, np.float32)
        spoilt = np.where(np.isin(np.arange(7), [1, 3, 6]), np.float32(np.nan), entropy)

        def run(entropy, temperature):
            return rlprims.soft_lambda_returns(
                *trajectory,
                entropy,
                0.9,
                temperature=temperature,
                truncation_t=cut,
                stop_target_gradients=False,
            )

        np.testing.assert_array_equal(run(spoilt, 0.5), run(entropy, 0.5))
        total = lambda *x: run(*x).sum()
        for gradient in jax.grad(total, argnums=(0, 1))(spoilt, 0.5):
            assert np.isfinite(gradient).all()

    def test_refuses_a_negative_temperature(self, trajectory):
        with pytest.raises(
            ValueError, match=r"^soft_lambda_returns: temperature must be in \[0, inf\)"
        ):
            rlprims.soft_lambda_returns(*trajectory, trajectory[0], temperature=-1.0)


@pytest.mark.parametrize("n", [5, 100, 400])
def test_compiles_n_step_returns_quickly_for_any_n(n):
    """No time is asserted: a program that unrolls `n` steps has at least `n` sums."""
    shapes = [jax.ShapeDtypeStruct((1024, 32), jnp.float32)] * 3
    fn = jax.vmap(
        lambda r, d, v: rlprims.n_step_bootstrapped_returns(r, d, v, n),
        in_axes=1,
        out_axes=1,
    )
    program = jax.jit(fn).lower(*shapes).as_text()
    assert program.count("stablehlo.add") < 40

"""Multistep action-value errors, against recursions written out backwards."""

import jax
import jax.numpy as jnp
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


@pytest.fixture
def policies(rng):
    """pi_t, of all actions, and mu_t, of those taken."""
    pi_t = rng.dirichlet(np.ones(ACTIONS), size=STEPS).astype(np.float32)
    return pi_t, rng.uniform(0.1, 1, size=STEPS).astype(np.float32)


def retrace_errors(q_taken_tm1, q_taken_t, v_t, r_t, discount_t, ratios, lambda_):
    """The operator of the paper: a sum of one-step errors, each less trusted."""
    arrays = q_taken_tm1, q_taken_t, v_t, r_t, discount_t, ratios
    q_tm1, q, v, r, discount, ratios = (np.float64(x) for x in arrays)
    traces = [d * lambda_ * min(1, x) for d, x in zip(discount, ratios, strict=False)]
    return [
        r[t]
        + discount[t] * v[t]
        + sum(
            np.prod(traces[t:k]) * (r[k] + discount[k] * v[k] - q[k - 1])
            for k in range(t + 1, STEPS)
        )
        - q_tm1[t]
        for t in range(STEPS)
    ]


# One action, of value 1, taken twice; then a reward of 10, worth 9 if it is trusted.
ONE = {
    "q_tm1": jnp.zeros((2, 1)),
    "q_t": jnp.ones((2, 1)),
    "a_tm1": jnp.array([0, 0]),
    "a_t": jnp.array([0, 0]),
    "r_t": jnp.array([0.0, 9.0]),
    "discount_t": jnp.array([1.0, 0.0]),
    "lambda_": 1.0,
}


class TestRetrace:
    @pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
    def test_sums_the_errors_of_the_paper(self, trajectory, policies, lambda_):
        q_tm1, a_tm1, r_t, discount_t, q_t, a_t = trajectory
        pi_t, mu_t = policies
        steps = np.arange(STEPS)
        v_t = [sum(map(float, row)) for row in pi_t * q_t]
        expected = retrace_errors(
            q_tm1[steps, a_tm1],
            q_t[steps, a_t],
            v_t,
            r_t,
            discount_t,
            pi_t[steps, a_t] / mu_t,
            lambda_,
        )
        actual = rlprims.retrace(
            q_tm1, q_t, a_tm1, a_t, r_t, discount_t, pi_t, mu_t, lambda_
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("pi", "mu", "ratio"),
        [
            (1e-1, 1e-1, 1),
            (1e-8, 1e-8, 1),
            (1e-12, 1e-12, 1),
            (1e-12, 4e-12, 0.25),
            (0.5, 0.25, 1),
            (1e-8, 0.0, 1),
            (0.0, 0.0, 0),
            (0.0, 1e-30, 0),
        ],
    )
    def test_has_ratios_without_bias(self, pi, mu, ratio):
        pi_t, mu_t = jnp.full((2, 1), pi), jnp.full(2, mu)
        error = rlprims.retrace(**ONE, pi_t=pi_t, mu_t=mu_t)[0]
        np.testing.assert_allclose(error, pi + ratio * (9 - 1), rtol=1e-6)

    @pytest.mark.parametrize("eps", [0.0, 1e-8, 1.0])
    def test_takes_an_epsilon_and_does_not_use_it(self, eps):
        half, mu_t = jnp.full((2, 1), 0.5), jnp.full(2, 0.5)
        assert rlprims.retrace(**ONE, pi_t=half, mu_t=mu_t, eps=eps)[0] == 8.5

    def test_is_a_number_in_half_precision(self):
        """Where 1e-8 is zero."""
        half = {k: jnp.asarray(x, jnp.float16) for k, x in ONE.items() if k[0] != "a"}
        nothing = jnp.zeros((2, 1), jnp.float16), jnp.zeros(2, jnp.float16)
        errors = rlprims.retrace(**ONE | half, pi_t=nothing[0], mu_t=nothing[1])
        assert errors.tolist() == [0, 9]
        assert errors.dtype == jnp.float16

    @pytest.mark.parametrize("name", ["pi_t", "mu_t"])
    def test_shows_a_probability_that_is_none(self, name):
        given = {"pi_t": jnp.ones((2, 1)), "mu_t": jnp.ones(2)}
        given[name] = given[name].at[0].set(jnp.nan)
        assert np.isnan(rlprims.retrace(**ONE, **given)[0])

    def test_does_not_see_past_a_termination_nor_use_the_last_ratio(
        self, trajectory, policies
    ):
        q_tm1, a_tm1, r_t, discount_t, q_t, a_t = trajectory
        after = np.arange(STEPS) >= 2
        spoil = lambda x: np.where(after.reshape(-1, *[1] * (x.ndim - 1)), np.nan, x)

        def early(q_tm1, q_t, r_t, discount_t, pi_t, mu_t):
            errors = rlprims.retrace(
                q_tm1,
                q_t,
                a_tm1,
                a_t,
                r_t,
                discount_t,
                pi_t,
                mu_t,
                0.9,
                stop_target_gradients=False,
            )
            return errors[:3].sum()

        args = q_tm1, q_t, r_t, discount_t, *policies
        spoilt = q_tm1, spoil(q_t), r_t, discount_t, *map(spoil, policies)
        value, gradients = jax.value_and_grad(early, argnums=range(6))(*spoilt)
        assert value == early(*args)
        assert all(np.isfinite(x[:3]).all() for x in gradients)

    def test_gradients_flow_through_targets_only_on_request(self, trajectory, policies):
        q_tm1, a_tm1, r_t, discount_t, q_t, a_t = trajectory

        def total(q_tm1, q_t, pi_t, stop):
            return rlprims.retrace(
                q_tm1,
                q_t,
                a_tm1,
                a_t,
                r_t,
                discount_t,
                pi_t,
                policies[1],
                0.9,
                stop_target_gradients=stop,
            ).sum()

        gradients = jax.grad(total, argnums=(0, 1, 2))
        held, flowing = (gradients(q_tm1, q_t, policies[0], x) for x in (True, False))
        np.testing.assert_array_equal(held[0], -np.eye(ACTIONS)[a_tm1])
        assert not np.any(held[1])
        assert not np.any(held[2])
        assert np.any(flowing[1])
        assert np.any(flowing[2])


class TestContinuousRetrace:
    @pytest.fixture
    def inputs(self, rng):
        """q_tm1, q_t, v_t, r_t, discount_t, log_rhos; an episode ends at step 2."""
        q_tm1, v_t, r_t = rng.normal(size=(3, STEPS))
        q_t, log_rhos = rng.normal(size=(2, STEPS - 1))
        discount_t = rng.uniform(0.1, 1, size=STEPS)
        discount_t[2] = 0
        arrays = q_tm1, q_t, v_t, r_t, discount_t, log_rhos
        return tuple(x.astype(np.float32) for x in arrays)

    @pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
    def test_sums_the_errors_of_the_paper(self, inputs, lambda_):
        expected = retrace_errors(*inputs[:-1], np.exp(inputs[-1]), lambda_)
        actual = rlprims.retrace_continuous(*inputs, lambda_)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    def test_is_retrace_of_the_actions_taken(self, trajectory, policies):
        q_tm1, a_tm1, r_t, discount_t, q_t, a_t = trajectory
        pi_t, mu_t = policies
        steps = np.arange(STEPS)
        expected = rlprims.retrace(
            q_tm1, q_t, a_tm1, a_t, r_t, discount_t, pi_t, mu_t, 0.6
        )
        actual = rlprims.retrace_continuous(
            q_tm1[steps, a_tm1],
            q_t[steps, a_t][:-1],
            (pi_t * q_t).sum(axis=-1),
            r_t,
            discount_t,
            np.log(pi_t[steps, a_t] / mu_t)[:-1],
            0.6,
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("log_rho", "ratio"), [(1e3, 1), (-1e3, 0), (-np.inf, 0)])
    def test_of_extreme_ratios_have_gradients(self, inputs, log_rho, ratio):
        *others, log_rhos = inputs
        extreme = np.full_like(log_rhos, log_rho)

        def total(log_rhos):
            return rlprims.retrace_continuous(*others, log_rhos, 0.9, False).sum()

        value, gradient = jax.value_and_grad(total)(extreme)
        expected = retrace_errors(*others, np.full(STEPS - 1, ratio), 0.9)
        np.testing.assert_allclose(value, sum(expected), rtol=1e-5)
        assert not gradient.any()

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_does_not_see_past_a_termination(self, inputs, bad):
        q_tm1, q_t, v_t, r_t, discount_t, log_rhos = inputs
        spoil = lambda x: np.where(np.arange(len(x)) >= 2, bad, x)

        def early(*args):
            return rlprims.retrace_continuous(*args, 0.9, False)[:3].sum()

        spoilt = q_tm1, spoil(q_t), spoil(v_t), r_t, discount_t, spoil(log_rhos)
        value, gradients = jax.value_and_grad(early, argnums=range(6))(*spoilt)
        assert value == early(*inputs)
        assert all(np.isfinite(x[:3]).all() for x in gradients)

    def test_lambda_has_a_gradient_if_a_ratio_that_is_not_used_is_none(self, inputs):
        *others, log_rhos = inputs
        spoilt = np.where(np.arange(STEPS - 1) == 2, np.nan, log_rhos)
        fn = lambda x, ratios: rlprims.retrace_continuous(*others, ratios, x, False)
        slope = jax.grad(lambda x, ratios: fn(x, ratios).sum())
        assert slope(0.5, spoilt) == slope(0.5, log_rhos)

    def test_a_ratio_of_no_weight_may_be_anything(self, inputs):
        *others, log_rhos = inputs
        fn = lambda log_rhos: rlprims.retrace_continuous(*others, log_rhos, 0.0, False)
        np.testing.assert_array_equal(fn(np.nan * log_rhos), fn(log_rhos))
        gradient = jax.grad(lambda x: fn(x).sum())(np.nan * log_rhos)
        assert not gradient.any()

    def test_refuses_a_ratio_too_many(self, inputs):
        *others, log_rhos = inputs
        with pytest.raises(
            ValueError, match=r"log_rhos has shape \(6,\), expected f\[T-1\] with T = 6"
        ):
            rlprims.retrace_continuous(*others, np.append(log_rhos, log_rhos[0]), 0.9)

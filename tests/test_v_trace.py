"""V-trace, against the sums of its paper and recursions written out backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import rlprims

T = 6
ERRORS = ["vtrace", "leaky_vtrace"]
OUTPUTS = ["vtrace_td_error_and_advantage", "leaky_vtrace_td_error_and_advantage"]
# Three steps, of which the one in the middle may be left out.
INPUTS = {
    "v_tm1": jnp.zeros(3),
    "v_t": jnp.zeros(3),
    "r_t": jnp.array([1.0, 5.0, 2.0]),
    "discount_t": jnp.full(3, 0.5),
    "rho_tm1": jnp.ones(3),
}
MASK = jnp.array([True, False, True])
CUT = jnp.array([True, False])


@pytest.fixture
def trajectory(rng):
    """v_tm1, v_t, r_t, discount_t, rho_tm1: unbroken, with an end at step 3."""
    values, r_t = rng.normal(size=T + 1), rng.normal(size=T)
    discount_t, rho_tm1 = rng.uniform(0.3, 1, size=T), rng.uniform(0.2, 3, size=T)
    discount_t[3] = 0
    arrays = values[:-1], values[1:], r_t, discount_t, rho_tm1
    return tuple(x.astype(np.float32) for x in arrays)


def expected(trajectory, alpha=1, lambda_=1, clip=1, clip_pg=1):
    """Errors, advantages and estimates, each a sum over what follows."""
    v_tm1, v_t, r, discount, rho = (np.float64(x) for x in trajectory)
    leaky = lambda bound: [(1 - alpha) * x + alpha * min(x, bound) for x in rho]
    deltas = [
        w * (r[k] + discount[k] * v_t[k] - v_tm1[k]) for k, w in enumerate(leaky(clip))
    ]
    traces = [lambda_ * c * d for c, d in zip(leaky(1), discount, strict=True)]
    errors = [
        sum(np.prod(traces[t:k]) * deltas[k] for k in range(t, len(r)))
        for t in range(len(r) + 1)
    ]
    q = [r[t] + discount[t] * (v_t[t] + lambda_ * errors[t + 1]) for t in range(len(r))]
    advantages = [w * (q[t] - v_tm1[t]) for t, w in enumerate(leaky(clip_pg))]
    return errors[:-1], advantages, q


class TestValues:
    @pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
    @pytest.mark.parametrize(("clip", "clip_pg"), [(1.0, 1.0), (2.0, 0.5)])
    def test_are_the_sums_of_the_paper(self, trajectory, lambda_, clip, clip_pg):
        sums = expected(trajectory, lambda_=lambda_, clip=clip, clip_pg=clip_pg)
        errors = rlprims.vtrace(*trajectory, lambda_, clip)
        outputs = rlprims.vtrace_td_error_and_advantage(
            *trajectory, lambda_, clip, clip_pg
        )
        for actual, exact in zip([errors, *outputs], [sums[0], *sums], strict=True):
            np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_of_the_leaky_form_have_mixed_ratios(self, trajectory, alpha):
        sums = expected(trajectory, alpha, 0.6, 2, 0.5)
        errors = rlprims.leaky_vtrace(*trajectory, alpha, 0.6, 2.0)
        outputs = rlprims.leaky_vtrace_td_error_and_advantage(
            *trajectory, alpha, 0.6, 2.0, 0.5
        )
        for actual, exact in zip([errors, *outputs], [sums[0], *sums], strict=True):
            np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)

    def test_on_policy_are_those_of_td_lambda(self, trajectory):
        v_tm1, v_t, r_t, discount_t, _ = trajectory
        errors, advantages, q = rlprims.vtrace_td_error_and_advantage(
            v_tm1, v_t, r_t, discount_t, np.ones(T, np.float32), 0.6
        )
        td = rlprims.td_lambda(v_tm1, r_t, discount_t, v_t, 0.6)
        for actual, exact in [(errors, td), (advantages, td), (q, v_tm1 + td)]:
            np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-6)

    def test_unclipped_with_alpha_zero_are_plain_importance_sampling(self, trajectory):
        v_tm1, v_t, r_t, discount_t, rho_tm1 = trajectory
        values = np.append(v_tm1, v_t[-1])
        corrected = rlprims.importance_corrected_td_errors(
            r_t, discount_t, rho_tm1, 0.6, values
        )
        actual = rlprims.leaky_vtrace(*trajectory, 0.0, 0.6)
        np.testing.assert_allclose(actual, corrected, rtol=1e-5)

    def test_may_have_settings_for_each_step(self, trajectory):
        per_step = np.full(T, 0.6, np.float32)
        np.testing.assert_array_equal(
            rlprims.leaky_vtrace(*trajectory, per_step, per_step, per_step),
            rlprims.leaky_vtrace(*trajectory, 0.6, 0.6, 0.6),
        )

    def test_keep_their_digits_next_to_large_values(self):
        """In the last digit of a value there is no room for the error."""
        v, r = np.full(1, 1e4, np.float32), np.float32([1e4 + 0.01])
        exact = 0.37 * (np.float64(r) - np.float64(v))
        for stop in (True, False):
            actual = rlprims.vtrace(v, v, r, 0 * v, 0.37 + 0 * v, 1.0, 1.0, stop)
            np.testing.assert_allclose(actual, exact, rtol=1e-6)

    def test_of_infinite_ratios_are_clipped_exactly(self):
        zero, one, inf = np.zeros(1), np.ones(1), np.full(1, np.inf)
        args = [x.astype(np.float32) for x in (zero, zero, one, one, inf)]
        assert rlprims.vtrace(*args).tolist() == [1]
        assert rlprims.leaky_vtrace(*args, 1.0).tolist() == [1]
        for out in rlprims.leaky_vtrace_td_error_and_advantage(*args, 1.0):
            assert out.tolist() == [1]
        by_alpha = jax.grad(lambda a: rlprims.leaky_vtrace(*args, a, 1.0).sum())
        assert np.isfinite(by_alpha(1.0))

    def test_of_an_infinite_ratio_that_is_mixed_in_are_infinite(self):
        """With the sign of what the ratio weighs, at the last step as before it."""
        one, inf = np.ones(3, np.float32), np.float32([1, np.inf, np.inf])
        for r_t in (one, -one):
            out = rlprims.leaky_vtrace_td_error_and_advantage(
                0 * one, 0 * one, r_t, one, inf, 0.5
            )
            errors = rlprims.leaky_vtrace(0 * one, 0 * one, r_t, one, inf, 0.5)
            infinite = (r_t * np.inf).tolist()
            assert errors.tolist() == out.errors.tolist() == infinite
            assert out.pg_advantage.tolist() == infinite
            assert out.q_estimate.tolist() == [*infinite[:2], r_t[2]]

    @pytest.mark.parametrize("cut", ["discount", "mask", "truncation", "lambda"])
    def test_of_an_infinite_ratio_end_at_a_cut(self, cut):
        zero, one, inf = np.float32([[0] * 3, [1] * 3, [1, np.inf, np.inf]])
        first = np.arange(3) == 0
        discount_t = np.where(first & (cut == "discount"), 0, one)
        how = {
            "mask": {"mask_t": first},
            "truncation": {"truncation_t": first},
            "lambda": {"lambda_": np.where(first, 0, one)},
        }.get(cut, {})
        errors = rlprims.leaky_vtrace(zero, zero, one, discount_t, inf, 0.5, **how)
        after = [0, 0] if cut == "mask" else [np.inf] * 2
        assert errors.tolist() == [1, *after]


class TestTimeLimits:
    @pytest.mark.parametrize("name", OUTPUTS)
    @pytest.mark.parametrize("given", ["truncation", "lambda"])
    def test_advantages_see_the_final_value_and_not_the_next_episodes(
        self, name, given
    ):
        """Two episodes, worth 1 and 100 throughout, with nothing to gain."""
        v, nothing, ones = jnp.array([1.0, 100.0]), jnp.zeros(2), jnp.ones(2)
        how = {
            "truncation": {"truncation_t": CUT},
            "lambda": {"lambda_": jnp.where(CUT, 0.0, 1.0)},
        }[given]
        out = getattr(rlprims, name)(v, v, nothing, ones, ones, **how)
        assert out.errors.tolist() == [0, 0]
        assert out.pg_advantage.tolist() == [0, 0]
        assert out.q_estimate.tolist() == [1, 100]

    def test_a_lost_final_value_leaves_its_step_out(self):
        """What was computed from it is NaN; the step before bootstraps instead."""
        v_tm1, v_t = jnp.array([1.0, 2.0, 7.0]), jnp.array([2.0, jnp.nan, 0.0])
        out = rlprims.vtrace_td_error_and_advantage(
            v_tm1,
            v_t,
            jnp.ones(3),
            jnp.full(3, 0.5),
            jnp.ones(3),
            truncation_t=jnp.array([False, True, False]),
            mask_t=jnp.array([True, False, True]),
        )
        assert out.errors.tolist() == [1 + 0.5 * 2 - 1, 0, 1 - 7]
        assert out.pg_advantage.tolist() == [1, 0, -6]
        assert out.q_estimate.tolist() == [2, 0, 1]


class TestMasks:
    @pytest.mark.parametrize("name", ["sample_mask", "mask_t"])
    def test_pass_over_a_step_without_its_discount(self, name):
        assert rlprims.vtrace(**INPUTS, **{name: MASK}).tolist() == [2, 0, 2]
        for fn in map(rlprims.__dict__.get, OUTPUTS):
            out = fn(**INPUTS, **{name: MASK})
            assert [x.tolist() for x in out] == [[2, 0, 2]] * 3

    @pytest.mark.parametrize("name", ERRORS)
    def test_train_nothing_on_a_step_left_out(self, name):
        def loss(v_tm1):
            inputs = INPUTS | {"v_tm1": v_tm1, "sample_mask": MASK}
            return 0.5 * (getattr(rlprims, name)(**inputs) ** 2).sum()

        assert jax.grad(loss)(jnp.zeros(3)).tolist() == [-2, 0, -2]

    @pytest.mark.parametrize("name", ERRORS + OUTPUTS)
    @pytest.mark.parametrize("stop", [True, False])
    def test_let_nothing_out_of_a_step_left_out(self, name, stop):
        def total(inputs):
            out = getattr(rlprims, name)(
                **inputs, mask_t=MASK, stop_target_gradients=stop
            )
            return sum(map(jnp.sum, jax.tree.leaves(out)))

        spoilt = {k: x.at[1].set(jnp.nan) for k, x in INPUTS.items()}
        value, gradients = jax.value_and_grad(total)(spoilt)
        assert value == total(INPUTS)
        assert all(np.isfinite(x).all() and x[1] == 0 for x in gradients.values())

    @pytest.mark.parametrize("name", ERRORS + OUTPUTS)
    def test_of_both_names_at_once_are_refused(self, name):
        both = {"sample_mask": MASK, "mask_t": MASK}
        with pytest.raises(
            ValueError, match=f"^{name}: sample_mask and mask_t are one thing"
        ):
            getattr(rlprims, name)(**INPUTS, **both)

    def test_must_be_boolean(self):
        with pytest.raises(TypeError, match="sample_mask must be boolean, got float"):
            rlprims.vtrace(**INPUTS, sample_mask=jnp.ones(3))


class TestCuts:
    @pytest.mark.parametrize("name", ERRORS + OUTPUTS)
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nothing_shows_from_beyond_a_termination(self, trajectory, name, bad):
        """Not even if the ratio there, or at the last step itself, is infinite."""
        v_tm1, v_t, r_t, discount_t, rho_tm1 = trajectory
        after = np.arange(T) > 3
        spoilt = (
            np.where(after, bad, v_tm1),
            np.where(np.arange(T) >= 3, bad, v_t),
            np.where(after, bad, r_t),
            discount_t,
            np.where(after, bad, rho_tm1),
        )

        def early(args):
            out = getattr(rlprims, name)(*args, stop_target_gradients=False)
            return sum(x[:4].sum() for x in jax.tree.leaves(out))

        value, gradients = jax.value_and_grad(early)(spoilt)
        assert value == early(trajectory)
        assert all(np.isfinite(x[:4]).all() for x in gradients)

    def test_an_infinite_ratio_before_a_termination_is_no_way_past_it(self):
        zero, one, inf = (jnp.full(2, x) for x in (0.0, 1.0, jnp.inf))
        errors = rlprims.leaky_vtrace(zero, zero, one, zero, inf, 0.5)
        assert errors.tolist() == [np.inf, np.inf]

    def test_a_ratio_of_zero_gives_an_error_no_weight(self):
        ones, r_t = jnp.ones(2), jnp.array([jnp.nan, 1.0])
        rho_tm1 = jnp.array([0.0, 1.0])

        def total(rho_tm1):
            out = rlprims.vtrace_td_error_and_advantage(
                0 * ones, ones, r_t, ones, rho_tm1, stop_target_gradients=False
            )
            return out.errors.sum() + out.pg_advantage.sum()

        value, gradient = jax.value_and_grad(total)(rho_tm1)
        assert value == 4
        assert np.isfinite(gradient).all()


class TestGradients:
    @pytest.mark.parametrize("name", OUTPUTS)
    def test_reach_only_the_predictions_of_errors_if_stopped(self, trajectory, name):
        fn = getattr(rlprims, name)
        jacobian = jax.jacobian(fn, argnums=(0, 1, 2, 3, 4))
        by_input = jacobian(*trajectory)
        np.testing.assert_array_equal(by_input.errors[0], -np.eye(T))
        others = [*by_input.errors[1:], *by_input.pg_advantage, *by_input.q_estimate]
        assert not any(np.any(x) for x in others)

    def test_stopped_run_no_recurrence_backwards(self, trajectory):
        loss = lambda v: (rlprims.vtrace(v, *trajectory[1:]) ** 2).sum()
        program = jax.jit(jax.grad(loss)).lower(trajectory[0]).as_text()
        assert program.count("stablehlo.while") == 1

    def test_equal_finite_differences_if_not(self, trajectory):
        mask_t = np.arange(T) % 3 != 1

        def outputs(*args):
            return rlprims.leaky_vtrace_td_error_and_advantage(
                *args, 1.5, 0.8, stop_target_gradients=False, mask_t=mask_t
            )

        with jax.enable_x64(True):
            args = [np.asarray(x, np.float64) for x in trajectory]
            settings = [np.float64(x) for x in (0.3, 0.6)]  # alpha and lambda_
            check_grads(jax.jit(outputs), [*args, *settings], order=2, modes=["rev"])


def test_a_bound_below_zero_is_refused():
    one = jnp.ones(1)
    for setting in ("clip_rho_threshold", "clip_pg_rho_threshold"):
        with pytest.raises(ValueError, match=rf"{setting} must be in \[0, inf\]"):
            rlprims.vtrace_td_error_and_advantage(*[one] * 5, **{setting: -1.0})


@pytest.mark.parametrize("name", ERRORS + OUTPUTS)
def test_runs_on_each_device_by_itself(name):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.arange(6.0).reshape(2, 3)
    vmapped = jax.vmap(lambda x: getattr(rlprims, name)(x, x, x, x, x))
    sharded = jax.shard_map(vmapped, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(sharded)(x), vmapped(x))

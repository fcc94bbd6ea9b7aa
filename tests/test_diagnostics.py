"""Diagnostics, against their definitions in NumPy in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims.diagnostics import (
    action_gap,
    clip_fraction,
    dormant_ratio,
    effective_rank,
    explained_variance,
    overestimation_gap,
    policy_churn,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def in_single(*arrays):
    return [np.asarray(x).astype(np.float32) for x in arrays]


class TestExplainedVariance:
    def by_hand(self, values, returns):
        values, returns = (np.asarray(x, np.float64) for x in (values, returns))
        return 1 - np.var(returns - values) / np.var(returns)

    @pytest.mark.parametrize("mean", [0.0, 1e4])
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
    def test_is_that_of_the_definition_at_any_scale(self, rng, mean, scale):
        returns = mean + rng.normal(size=(4, 9))
        values = returns + rng.normal(size=(4, 9)) / 2
        values, returns = in_single(scale * values, scale * returns)
        mask = rng.uniform(size=(4, 9)) < 0.7
        got = explained_variance(values, returns)
        np.testing.assert_allclose(got, self.by_hand(values, returns), rtol=2e-3)
        got = explained_variance(
            np.where(mask, values, np.nan), np.where(mask, returns, np.inf), mask_t=mask
        )
        expected = self.by_hand(values[mask], returns[mask])
        np.testing.assert_allclose(got, expected, rtol=2e-3)

    def test_is_one_of_what_is_perfect_and_zero_of_a_constant(self):
        returns = jnp.array([1.0, 2.0, 5.0])
        assert explained_variance(returns, returns) == 1
        assert explained_variance(returns + 7, returns) == 1
        assert explained_variance(jnp.full(3, 0.1), returns) == pytest.approx(0)
        assert explained_variance(-returns, returns) == pytest.approx(-3)

    @pytest.mark.parametrize("value", [0.1, 1e30, -3.0])
    def test_is_zero_where_there_is_nothing_to_explain(self, value):
        values, returns = jnp.arange(7.0), jnp.full(7, value)
        assert explained_variance(values, returns) == 0
        assert explained_variance(returns, returns) == 0

    def test_is_zero_of_one_pair_and_of_none(self):
        one = jnp.array([1.0, jnp.nan])
        assert explained_variance(one, one, mask_t=jnp.array([True, False])) == 0
        assert explained_variance(one, one, mask_t=jnp.zeros(2, bool)) == 0
        assert explained_variance(jnp.zeros(0), jnp.zeros(0)) == 0

    def test_passes_nan_on(self):
        bad, good = jnp.array([jnp.nan, 1.0]), jnp.array([0.0, 1.0])
        assert np.isnan(explained_variance(bad, good))
        assert np.isnan(explained_variance(good, bad))
        assert np.isnan(explained_variance(bad, jnp.ones(2)))

    def test_padding_has_no_gradient(self):
        values, returns = jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1.0, 3.0, jnp.inf])
        mask = jnp.array([True, True, False])
        slopes = jax.grad(explained_variance)(values, returns, mask_t=mask)
        # Var[e] = (e_1 - e_0)^2 / 4 and Var[G] = 1, where e_0 = 0 and e_1 = 1.
        np.testing.assert_allclose(slopes, [-0.5, 0.5, 0], atol=1e-6)


class TestClipFraction:
    def test_counts_the_ratios_outside(self, rng):
        log_prob, behaviour = in_single(*rng.normal(-1, 0.3, size=(2, 4, 9)))
        mask = rng.uniform(size=(4, 9)) < 0.7
        ratios = np.exp(np.float64(log_prob) - behaviour)
        outside = np.abs(ratios - 1) > 0.2
        np.testing.assert_allclose(clip_fraction(log_prob, behaviour), outside.mean())
        spoilt = np.where(mask, log_prob, np.nan)
        got = clip_fraction(spoilt, behaviour, mask_t=mask)
        np.testing.assert_allclose(got, outside[mask].mean(), rtol=1e-6)
        got = clip_fraction(log_prob, behaviour, epsilon=0.1, epsilon_high=0.4)
        outside = (ratios < 0.9) | (ratios > 1.4)
        np.testing.assert_allclose(got, outside.mean(), rtol=1e-6)

    def test_ratios_at_the_edge_are_inside(self):
        log_prob = jnp.log1p(jnp.array([-0.5, 0.5]))
        epsilon = jnp.abs(jnp.expm1(log_prob))
        assert clip_fraction(log_prob, jnp.zeros(2), epsilon=epsilon) == 0
        assert clip_fraction(log_prob, jnp.zeros(2), epsilon=epsilon * 0.9999) == 1

    def test_saturated_probabilities_are_outside(self):
        log_prob, behaviour = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -500.0])
        assert clip_fraction(log_prob, behaviour) == 1
        assert clip_fraction(log_prob, behaviour, epsilon=1.0) == 0.5

    def test_is_unknown_of_an_action_that_neither_could_draw(self):
        never = jnp.array([-jnp.inf, 0.0])
        assert np.isnan(clip_fraction(never, never))

    def test_is_zero_of_nothing(self):
        nan = jnp.full(2, jnp.nan)
        assert clip_fraction(nan, nan, mask_t=jnp.zeros(2, bool)) == 0
        assert clip_fraction(jnp.zeros(0), jnp.zeros(0)) == 0


class TestActionGap:
    def test_is_the_difference_of_the_two_best_legal_ones(self, rng):
        (q,) = in_single(rng.normal(size=(3, 5, 4)))
        mask = rng.uniform(size=q.shape) < 0.5
        expected = np.zeros(q.shape[:2])
        for i in np.ndindex(q.shape[:2]):
            best = sorted(q[i][mask[i]])[::-1]
            expected[i] = best[0] - best[1] if len(best) > 1 else 0
        got = action_gap(np.where(mask, q, np.nan), mask=mask)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        got = action_gap(np.where(mask, q, -np.inf))
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    def test_is_zero_where_there_is_no_choice(self):
        assert action_gap(jnp.array([3.0])) == 0
        assert action_gap(jnp.array([3.0, 3.0, 1.0])) == 0
        assert action_gap(jnp.array([3.0, 1.0]), mask=jnp.array([False, True])) == 0
        assert action_gap(jnp.array([jnp.nan, 1.0]), mask=jnp.zeros(2, bool)) == 0

    def test_passes_nan_on(self):
        q = jnp.array([jnp.nan, 1.0, -jnp.inf])
        assert np.isnan(action_gap(q))
        assert np.isnan(action_gap(q, mask=jnp.array([True, False, False])))

    def test_its_gradient_is_of_the_two_best(self):
        q, mask = jnp.array([1.0, 5.0, jnp.nan, 3.0]), jnp.array([1, 1, 0, 1], bool)
        assert jax.grad(action_gap)(q, mask=mask).tolist() == [0, 1, 0, -1]
        alone = jax.grad(action_gap)(q, mask=jnp.array([1, 0, 0, 0], bool))
        assert alone.tolist() == [0, 0, 0, 0]


class TestOverestimationGap:
    def test_is_the_mean_of_what_values_have_too_much(self, rng):
        q, returns = in_single(*rng.normal(3, 2, size=(2, 4, 9)))
        mask = rng.uniform(size=(4, 9)) < 0.7
        gaps = np.float64(q) - returns
        np.testing.assert_allclose(overestimation_gap(q, returns), gaps.mean(), 1e-5)
        spoilt = np.where(mask, q, np.nan)
        got = overestimation_gap(spoilt, returns, mask_t=mask)
        np.testing.assert_allclose(got, gaps[mask].mean(), rtol=1e-5)

    def test_is_below_zero_of_values_that_are_too_low(self):
        assert overestimation_gap(jnp.array([1.0, 2.0]), jnp.array([2.0, 5.0])) == -2

    def test_passes_nan_on_and_is_zero_of_nothing(self):
        nan = jnp.full(2, jnp.nan)
        assert np.isnan(overestimation_gap(nan, jnp.zeros(2)))
        assert overestimation_gap(nan, nan, mask_t=jnp.zeros(2, bool)) == 0
        assert overestimation_gap(jnp.zeros(0), jnp.zeros(0)) == 0

    def test_padding_has_no_gradient(self):
        q, mask = jnp.array([1.0, jnp.nan]), jnp.array([True, False])
        slope = jax.grad(lambda q: overestimation_gap(q, jnp.ones(2), mask_t=mask))(q)
        assert slope.tolist() == [1, 0]


class TestPolicyChurn:
    def test_counts_states_whose_best_legal_action_changed(self, rng):
        q, new_q = in_single(*rng.normal(size=(2, 3, 5, 4)))
        mask = rng.uniform(size=q.shape) < 0.6
        mask[..., 0] = True
        mask_t = rng.uniform(size=q.shape[:2]) < 0.7
        legal, new_legal = (np.where(mask, x, -np.inf) for x in (q, new_q))
        changed = legal.argmax(-1) != new_legal.argmax(-1)
        got = policy_churn(np.where(mask, q, np.nan), new_q, mask=mask)
        np.testing.assert_allclose(got, changed.mean(), rtol=1e-6)
        q[~mask_t] = np.nan
        got = policy_churn(q, new_q, mask=mask, mask_t=mask_t)
        np.testing.assert_allclose(got, changed[mask_t].mean(), rtol=1e-6)

    def test_takes_the_first_of_several_best(self):
        tied = jnp.array([[1.0, 1.0]])
        assert policy_churn(tied, jnp.array([[2.0, 1.0]])) == 0
        assert policy_churn(tied, jnp.array([[1.0, 2.0]])) == 1
        assert policy_churn(jnp.array([[1.0, 2.0]]), tied) == 1

    def test_is_zero_of_nothing_and_where_nothing_is_legal(self):
        q, nothing = jnp.array([[1.0, jnp.nan]]), jnp.zeros((1, 2), bool)
        assert policy_churn(q, q, mask=nothing) == 0
        assert policy_churn(q, q, mask_t=nothing[:, 0]) == 0

    def test_passes_nan_on(self):
        good, bad = jnp.array([[1.0, 2.0]]), jnp.array([[jnp.nan, 2.0]])
        assert np.isnan(policy_churn(good, bad))
        assert np.isnan(policy_churn(bad, good))


class TestDormantRatio:
    @pytest.mark.parametrize("threshold", [0.0, 0.1, 1.0])
    def test_counts_units_with_a_low_score(self, rng, threshold):
        activations = rng.normal(size=(4, 6, 10)) * np.geomspace(0.01, 10, 10)
        activations[..., 3] = 0
        (activations,) = in_single(activations)
        mask = rng.uniform(size=(4, 6)) < 0.6

        def by_hand(x):
            sizes = np.abs(np.float64(x)).reshape(-1, 10).mean(0)
            return np.mean(sizes / sizes.mean() <= threshold)

        got = dormant_ratio(activations, threshold=threshold)
        np.testing.assert_allclose(got, by_hand(activations), rtol=1e-6)
        spoilt = np.where(mask[..., None], activations, np.nan)
        got = dormant_ratio(spoilt, threshold=threshold, mask=mask)
        np.testing.assert_allclose(got, by_hand(activations[mask]), rtol=1e-6)
        # A dead unit that speaks up where it does not count is still dead.
        activations[~mask, 3] = 100
        got = dormant_ratio(activations, threshold=0.0, mask=mask)
        np.testing.assert_allclose(got, 0.1, rtol=1e-6)

    def test_a_unit_at_the_threshold_is_dormant(self):
        activations = jnp.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
        assert dormant_ratio(activations, threshold=0.5) == pytest.approx(1 / 3)
        assert dormant_ratio(activations, threshold=1.0) == pytest.approx(2 / 3)
        assert dormant_ratio(activations, threshold=0.49) == 0

    def test_all_units_of_a_dead_layer_are(self):
        assert dormant_ratio(jnp.zeros((3, 4)), threshold=0.0) == 1

    def test_none_is_where_no_input_counts(self):
        nan = jnp.full((2, 3), jnp.nan)
        assert dormant_ratio(nan, threshold=0.1, mask=jnp.zeros(2, bool)) == 0
        assert dormant_ratio(jnp.zeros((0, 3)), threshold=0.1) == 0

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("threshold", [0.0, 0.1])
    def test_is_unknown_of_what_is_not_finite(self, bad, threshold):
        activations = jnp.array([[bad, 1.0]])
        assert np.isnan(dormant_ratio(activations, threshold=threshold))


class TestEffectiveRank:
    def with_spectrum(self, rng, sigmas, rows=9):
        size = len(sigmas)
        left, _ = np.linalg.qr(rng.normal(size=(rows, size)))
        right, _ = np.linalg.qr(rng.normal(size=(size, size)))
        return in_single(left @ np.diag(sigmas) @ right)[0]

    def test_counts_what_makes_up_nearly_all_of_the_sum(self, rng):
        sigmas = np.array([50, 30, 15, 3.8, 1.1, 0.1])
        x = self.with_spectrum(rng, sigmas)
        shares = [(0.4, 2), (0.3, 2), (0.1, 3), (0.04, 4), (0.005, 5), (0.0005, 6)]
        for delta, rank in shares:
            assert effective_rank(x, delta=delta) == rank
        assert (
            effective_rank(x) == 5
        )  # the first four make 99 per cent but for rounding
        assert effective_rank(1e6 * x, delta=0.1) == 3
        assert effective_rank(x.T, delta=0.1) == 3

    def test_leaves_states_out(self, rng):
        x = self.with_spectrum(rng, [9.0, 5.0, 0.5])
        spoilt = np.insert(x, [0, 4], np.nan, axis=0)
        mask = np.isfinite(spoilt).all(axis=1)
        stacked, masks = (
            np.stack([spoilt, spoilt]),
            np.stack([mask, np.zeros(11, bool)]),
        )
        got = effective_rank(stacked, delta=0.1, mask=masks)
        assert got.tolist() == [2, 0]

    def test_of_one_direction_is_one_and_of_zeros_zero(self):
        assert effective_rank(jnp.ones((5, 3))) == 1
        assert effective_rank(jnp.eye(4)) == 4
        assert effective_rank(jnp.zeros((5, 3))) == 0
        assert effective_rank(jnp.ones((5, 3)), delta=1.0) == 0

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_is_unknown_of_what_is_not_finite(self, bad):
        x = jnp.stack([jnp.eye(2), jnp.eye(2).at[0, 0].set(bad)])
        assert effective_rank(x).tolist() == [2, -1]


class TestDevices:
    """What is split is measured as if it were whole."""

    def run(self, split, rng):
        x, y = in_single(*rng.normal(size=(2, 4, 6, 3)))
        x[..., 0] = 0
        mask = rng.uniform(size=(4, 6)) < 0.6
        mask[1] = False  # nothing counts on one device

        def results(x, y, mask, axis_name):
            along = {"mask_t": mask, "axis_name": axis_name}
            of_inputs = {"mask": mask, "axis_name": axis_name}
            return jnp.stack(
                [
                    explained_variance(x[..., 1], y[..., 1], **along),
                    clip_fraction(x[..., 1], y[..., 1], **along),
                    overestimation_gap(x[..., 1], y[..., 1], **along),
                    policy_churn(x, y, **along),
                    dormant_ratio(x, threshold=0.1, **of_inputs),
                ]
            )

        got = jax.jit(split(results))(x, y, mask)
        expected = results(x, y, mask, None)
        for each in np.reshape(got, (4, -1)):
            np.testing.assert_allclose(each, expected, rtol=1e-5)

    def test_in_shard_map(self, rng):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        over, same = PartitionSpec("d"), PartitionSpec()

        def split(fn):
            whole = functools.partial(fn, axis_name="d")
            mapped = jax.shard_map(whole, mesh=mesh, in_specs=over, out_specs=same)
            return lambda *xs: jnp.stack([mapped(*xs)] * 4)

        self.run(split, rng)

    def test_in_vmap(self, rng):
        self.run(
            lambda fn: jax.vmap(functools.partial(fn, axis_name="d"), axis_name="d"),
            rng,
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_fraction(jnp.zeros(2), jnp.zeros(3)), "behaviour_log_prob_t has"),
        (lambda: effective_rank(jnp.zeros((2, 2)), delta=2.0), "delta must be in"),
        (lambda: action_gap(jnp.zeros(2), mask=jnp.zeros(3, bool)), "mask has shape"),
        (lambda: explained_variance(jnp.zeros(2), jnp.zeros(1)), "returns has shape"),
        (lambda: overestimation_gap(jnp.zeros(2), jnp.zeros(3)), "returns_t has"),
        (lambda: policy_churn(jnp.zeros(2), jnp.zeros(3)), "new_q has shape"),
        (lambda: dormant_ratio(jnp.zeros(2), threshold=-1.0), "threshold must be in"),
    ],
)
def test_refuses_what_breaks_a_contract(call, message):
    with pytest.raises(ValueError, match=message):
        call()

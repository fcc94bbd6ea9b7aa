"""Importance weights, against exact fractions and sums in float64."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

pytestmark = pytest.mark.usefixtures("quick_to_compile")

RATIOS = [Fraction(1, 8), Fraction(1, 2), Fraction(1), Fraction(3), Fraction(40)]
LOGS = np.log(np.float64(RATIOS)).astype(np.float32)


def effective(ratios):
    return float(sum(ratios) ** 2 / sum(x * x for x in ratios))


class TestTruncated:
    def test_bounds_ratios_from_above(self):
        expected = [float(min(x, Fraction(2))) for x in RATIOS]
        actual = rlprims.truncated_importance_weights(LOGS, max_weight=2.0)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
    def test_does_not_overflow(self, dtype):
        logs = np.array([1e4, np.inf, -1e4, -np.inf]).astype(dtype)
        actual = rlprims.truncated_importance_weights(logs, max_weight=2.0)
        assert actual.tolist() == [2, 2, 0, 0]
        assert actual.dtype == dtype

    def test_without_a_bound_is_the_ratio(self):
        actual = rlprims.truncated_importance_weights(LOGS, max_weight=np.inf)
        np.testing.assert_allclose(actual, np.float64(RATIOS), rtol=1e-6)

    def test_has_the_gradient_of_the_ratio_below_the_bound_and_none_above(self):
        def total(logs, bound):
            return rlprims.truncated_importance_weights(
                logs, max_weight=bound, use_stop_gradient=False
            ).sum()

        logs = np.append(LOGS, [np.float32(1e4), np.float32(-np.inf)])
        to_logs, to_bound = jax.grad(total, argnums=(0, 1))(logs, 2.0)
        expected = [1 / 8, 1 / 2, 1, 0, 0, 0, 0]
        np.testing.assert_allclose(to_logs, expected, rtol=1e-6)
        assert to_bound == 3

    def test_is_nan_where_the_ratio_is_unknown(self):
        actual = rlprims.truncated_importance_weights(
            np.float32(np.nan), max_weight=1.0
        )
        assert np.isnan(actual)


def bounded(logs, low=0.5, high=3.0, **given):
    return rlprims.masked_importance_weights(
        logs, min_weight=low, max_weight=high, **given
    )


class TestMasked:
    def test_drops_ratios_out_of_bounds(self):
        """What lies on a bound stays, as far as logarithms are exact."""
        actual = bounded(LOGS, 0.499, 3.001)
        np.testing.assert_allclose(actual, [0, 0.5, 1, 3, 0], rtol=1e-6)
        assert bounded(np.zeros(1, np.float32), 1.0, 1.0).tolist() == [1]

    def test_drops_everything_where_the_bounds_cross(self):
        assert not bounded(LOGS, 3.0, 0.5).any()

    @pytest.mark.parametrize("high", [3.0, np.inf])
    def test_does_not_overflow_within_bounds(self, high):
        logs = np.array([1e4, -1e4, -np.inf], np.float32)
        expected = [np.inf if high == np.inf else 0, 0, 0]
        assert bounded(logs, 0.0, high).tolist() == expected

    def test_has_no_gradient_where_it_drops(self):
        logs = np.append(LOGS, np.float32(1e4))
        fn = lambda x: bounded(x, 0.499, 3.001, use_stop_gradient=False).sum()
        expected = [0, 0.5, 1, 3, 0, 0]
        np.testing.assert_allclose(jax.grad(fn)(logs), expected, rtol=1e-6)

    def test_is_nan_where_the_ratio_is_unknown(self):
        assert np.isnan(bounded(np.float32(np.nan)))

    @pytest.mark.parametrize("bound", ["min_weight", "max_weight"])
    def test_refuses_a_bound_below_zero(self, bound):
        bounds = {"min_weight": 1.0, "max_weight": 1.0, bound: -1.0}
        with pytest.raises(ValueError, match=rf"{bound} must be in \[0, inf\], got -1"):
            rlprims.masked_importance_weights(LOGS, **bounds)


@pytest.mark.parametrize("fn", [bounded, rlprims.truncated_importance_weights])
def test_padding_has_no_weight_and_no_gradient(fn):
    logs, mask_t = np.float32([0, np.nan, 0]), np.array([True, False, True])
    given = {} if fn is bounded else {"max_weight": 2.0}
    total = lambda x: fn(x, mask_t=mask_t, use_stop_gradient=False, **given)
    assert total(logs).tolist() == [1, 0, 1]
    assert jax.grad(lambda x: total(x).sum())(logs).tolist() == [1, 0, 1]


class TestSelfNormalized:
    def test_is_each_share_of_the_sum(self):
        expected = [float(x / sum(RATIOS)) for x in RATIOS]
        actual = rlprims.self_normalized_importance_weights(LOGS)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)

    @pytest.mark.parametrize("shift", [-1e4, 1e4])
    def test_does_not_depend_on_a_common_factor(self, shift):
        logs = np.float32([0, 1, 2])
        np.testing.assert_array_equal(
            rlprims.self_normalized_importance_weights(logs + np.float32(shift)),
            rlprims.self_normalized_importance_weights(logs),
        )

    def test_estimates_a_mean_within_the_range_of_what_was_seen(self, rng):
        logs, x = rng.normal(size=(2, 50)).astype(np.float32) * 3
        mean = np.dot(rlprims.self_normalized_importance_weights(logs), x)
        assert x.min() < mean < x.max()

    def test_has_the_gradient_of_a_softmax(self):
        fn = lambda x: rlprims.self_normalized_importance_weights(
            x, use_stop_gradient=False
        )
        w = np.float64(fn(LOGS))
        expected = np.diag(w) - np.outer(w, w)
        np.testing.assert_allclose(jax.jacobian(fn)(LOGS), expected, atol=1e-6)


class TestEffectiveSampleSize:
    def test_is_the_square_of_the_sum_over_the_sum_of_squares(self):
        actual = rlprims.effective_sample_size(LOGS)
        np.testing.assert_allclose(actual, effective(RATIOS), rtol=1e-6)

    def test_counts_equal_weights(self):
        for logs in (np.zeros(7), np.full(7, 500.0), np.full(7, -500.0)):
            actual = rlprims.effective_sample_size(logs.astype(np.float32))
            np.testing.assert_allclose(actual, 7, rtol=1e-6)

    def test_is_one_where_one_outweighs_the_others(self):
        assert rlprims.effective_sample_size(np.float32([200, 0, -np.inf])) == 1
        assert rlprims.effective_sample_size(np.zeros(1, np.float32)) == 1

    def test_has_no_gradient_along_a_common_factor(self):
        gradient = jax.grad(rlprims.effective_sample_size)(LOGS)
        np.testing.assert_allclose(np.sum(gradient), 0, atol=1e-6)
        assert abs(gradient).max() > 0.01

    def test_stays_accurate_over_many_samples_in_half_precision(self):
        logs = jnp.zeros(4096, jnp.bfloat16)
        assert rlprims.effective_sample_size(logs) == 4096


BOTH = {
    "self_normalized_importance_weights": lambda x, **given: (
        rlprims.self_normalized_importance_weights(x, use_stop_gradient=False, **given)
    ),
    "effective_sample_size": rlprims.effective_sample_size,
}


@pytest.mark.parametrize("name", BOTH)
class TestOverSamples:
    def test_is_that_of_the_samples_that_count(self, name):
        fn, spoilt = BOTH[name], np.insert(LOGS, 2, [np.nan, np.inf])
        mask = np.array([1, 1, 0, 0, 1, 1, 1], bool)
        expected, actual = fn(LOGS), fn(spoilt, mask=mask)
        if np.ndim(actual):
            assert not actual[~mask].any()
            actual = actual[mask]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        weights = np.arange(1, 6, dtype=np.float32)
        places = lambda y, where: (y[where] * weights).sum() if np.ndim(y) else y
        gradient = jax.grad(lambda x: places(fn(x, mask=mask), mask))(spoilt)
        clean = jax.grad(lambda x: places(fn(x), slice(None)))(LOGS)
        assert not gradient[~mask].any()
        np.testing.assert_allclose(gradient[mask], clean, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("nothing", ["masked", "impossible"])
    def test_of_nothing_is_zero_without_a_gradient(self, name, nothing):
        logs, mask = np.float32([1, -np.inf]), np.zeros(2, bool)
        if nothing == "impossible":
            logs, mask = np.float32([np.nan, -np.inf]), np.array([False, True])
        fn = lambda x: BOTH[name](x, mask=mask).sum()
        value, gradient = jax.value_and_grad(fn)(logs)
        assert value == 0
        assert gradient.tolist() == [0, 0]

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_is_nan_where_a_sample_that_counts_is_unknown(self, name, bad):
        assert np.isnan(BOTH[name](np.float32([0, bad]))).all()

    def test_of_samples_split_over_devices_is_that_of_all(self, name):
        """One device holds none that counts."""
        logs = np.append(LOGS, np.float32(300) * np.ones(3, np.float32)).reshape(2, 4)
        mask = np.array([[True] * 4, [True] + [False] * 3])
        split = lambda x, m: BOTH[name](x, mask=m, axis_name="d")
        for rows in (mask, mask & np.array([[True], [False]])):
            whole = BOTH[name](logs.reshape(-1), mask=rows.reshape(-1))
            parts = jax.vmap(split, axis_name="d")(logs, rows)
            expected = np.reshape(whole, (2, 4)) if np.ndim(whole) else [whole] * 2
            np.testing.assert_allclose(parts, expected, rtol=1e-6)
        over = jax.P("d")
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        each = lambda x, m: split(x[0], m[0])[None]
        spread = jax.shard_map(each, mesh=mesh, in_specs=over, out_specs=over)
        np.testing.assert_allclose(jax.jit(spread)(logs, rows), parts, rtol=1e-6)

    def test_takes_each_row_by_itself(self, name):
        logs = np.stack([LOGS, LOGS[::-1]])
        np.testing.assert_allclose(BOTH[name](logs)[0], BOTH[name](LOGS), rtol=1e-6)

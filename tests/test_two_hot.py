"""Two-hot codes, against exact arithmetic in fractions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.two_hot import (
    transform_from_2hot,
    transform_from_2hot_nonlinear,
    transform_to_2hot,
    transform_to_2hot_nonlinear,
)

RANGES = [  # narrow and wide, on one side of zero and on both, exact in binary or not
    (-300.0, 300.0, 601),
    (-0.3, 0.3, 601),
    (-0.3, 0.3, 600),
    (0.0, 1.0, 601),
    (0.0, 1e-6, 601),
    (-1e-6, 1e-6, 11),
    (-1.0, 3.0, 77),
    (1.0, 1.001, 601),
    (-7.3, -0.2, 50),
    (-1e30, 1e30, 51),
    (0.5, 2.0, 2),
]


def fraction(x):
    return Fraction(float(x))


def bins_by_hand(low, high, num_bins):
    """Evenly spaced bins, exactly."""
    low, high = fraction(np.float32(low)), fraction(np.float32(high))
    last = num_bins - 1
    return [low + Fraction(k, last) * (high - low) for k in range(num_bins)]


def encode_by_hand(x, bins):
    """Walks along the bins until the number lies between two of them."""
    x = min(max(fraction(x), bins[0]), bins[-1])
    weights = [Fraction(0)] * len(bins)
    for k in range(len(bins) - 1):
        if bins[k] <= x <= bins[k + 1]:
            width = bins[k + 1] - bins[k]
            weights[k] = (bins[k + 1] - x) / width
            weights[k + 1] = (x - bins[k]) / width
            break
    return weights


def decode_by_hand(probs, bins):
    return sum(fraction(p) * b for p, b in zip(probs, bins, strict=True))


def floats(fractions):
    return np.array([float(f) for f in fractions])


def inside(low, high, rng, size=500):
    """Numbers of a range, in single precision."""
    low, high = np.float32(low), np.float32(high)
    x = rng.uniform(low, high, size=size).astype(np.float32)
    return np.clip(x, low, high)


@pytest.mark.parametrize(("low", "high", "num_bins"), RANGES)
class TestOnARange:
    def test_bins_are_where_they_belong(self, low, high, num_bins):
        """Each decodes, within two roundings, to the number it stands for."""
        one_hot = np.eye(num_bins, dtype=np.float32)
        decoded = transform_from_2hot(one_hot, low, high, num_bins)
        exact = floats(bins_by_hand(low, high, num_bins))
        np.testing.assert_array_equal(decoded[0], np.float32(low))
        np.testing.assert_array_equal(decoded[-1], np.float32(high))
        np.testing.assert_allclose(decoded, exact, rtol=2.5e-7)

    def test_weights_are_those_of_the_neighbours(self, low, high, num_bins, rng):
        x = inside(low, high, rng, size=100)
        bins = bins_by_hand(low, high, num_bins)
        exact = np.array([floats(encode_by_hand(v, bins)) for v in x])
        # A bin is rounded to single precision, and may be off by so much of a width.
        off = 2.0**-23 * max(abs(low), abs(high)) / (float(bins[1] - bins[0]))
        result = transform_to_2hot(x, low, high, num_bins)
        np.testing.assert_allclose(result, exact, atol=2.0**-23 + 2 * off)

    def test_weights_sum_to_exactly_one(self, low, high, num_bins, rng):
        weights = transform_to_2hot(inside(low, high, rng), low, high, num_bins)
        np.testing.assert_array_equal(np.sum(weights, axis=-1, dtype=np.float32), 1)

    def test_only_two_neighbours_have_weight(self, low, high, num_bins, rng):
        weights = np.asarray(
            transform_to_2hot(inside(low, high, rng), low, high, num_bins)
        )
        assert weights.min() >= 0
        for row in weights:
            used = np.flatnonzero(row)
            assert len(used) in {1, 2}
            assert used[-1] - used[0] == len(used) - 1

    def test_a_bin_has_all_the_weight_of_its_number(self, low, high, num_bins):
        bins = transform_from_2hot(jnp.eye(num_bins), low, high, num_bins)
        weights = transform_to_2hot(bins, low, high, num_bins)
        np.testing.assert_array_equal(weights, np.eye(num_bins))

    def test_there_and_back_is_where_one_was(self, low, high, num_bins, rng):
        """Within two units in the last place, of the neighbours if zero is between."""
        x = inside(low, high, rng, size=5000)
        weights = transform_to_2hot(x, low, high, num_bins)
        result = transform_from_2hot(weights, low, high, num_bins)
        width = (high - low) / (num_bins - 1)
        straddles = 0 if num_bins % 2 or low + high else width * 2.0**-23
        np.testing.assert_allclose(result, x, rtol=2.4e-7, atol=straddles)

    def test_numbers_outside_are_taken_for_the_ends(self, low, high, num_bins):
        reach = np.float32(high) - np.float32(low)
        x = np.array([-np.inf, low - reach, high + reach, np.inf], np.float32)
        first, last = np.eye(num_bins)[[0, -1]]
        result = transform_to_2hot(x, low, high, num_bins)
        np.testing.assert_array_equal(result, [first, first, last, last])

    def test_nan_stays_nan(self, low, high, num_bins):
        assert np.isnan(transform_to_2hot(np.nan, low, high, num_bins)).all()

    def test_derivative_inside_is_one_over_the_width(self, low, high, num_bins, rng):
        k = rng.integers(num_bins - 1)
        bins = floats(bins_by_hand(low, high, num_bins))
        x = np.float32(0.3 * bins[k] + 0.7 * bins[k + 1])
        result = jax.jacobian(transform_to_2hot)(x, low, high, num_bins)
        expected = np.zeros(num_bins)
        expected[[k, k + 1]] = np.array([-1, 1]) / (bins[k + 1] - bins[k])
        rtol = 1e-6 + 2.0**-21 * max(abs(low), abs(high)) / (bins[k + 1] - bins[k])
        np.testing.assert_allclose(result, expected, rtol=rtol)

    def test_derivative_at_bins_and_beyond_is_of_one_side(self, low, high, num_bins):
        """From above on a bin, from below on the last one, and 0 outside."""
        fn = lambda x: transform_to_2hot(x, low, high, num_bins)[-1]
        bins = transform_from_2hot(jnp.eye(num_bins), low, high, num_bins)
        width, whole = bins[-1] - bins[-2], bins[-1] - bins[0]
        x = jnp.stack([bins[0] - whole, bins[-2], bins[-1], bins[-1] + whole])
        result = jax.vmap(jax.grad(fn))(x)
        np.testing.assert_allclose(result, [0, 1 / width, 1 / width, 0], rtol=1e-6)


class TestUniformBins:
    def test_a_number_half_way_is_shared_equally(self):
        result = transform_to_2hot(jnp.array([-0.75, 0.25]), -1.0, 1.0, 5)
        assert result.tolist() == [[0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0]]

    def test_a_number_next_to_a_bin_keeps_its_digits_on_either_side(self):
        x = jnp.array([1e-12, -1e-12])
        weights = transform_to_2hot(x, -1.0, 1.0, 3)
        np.testing.assert_allclose(weights[:, [2, 0]].diagonal(), 1e-12, rtol=2e-7)
        np.testing.assert_allclose(
            transform_from_2hot(weights, -1.0, 1.0, 3), x, rtol=2e-7
        )

    def test_the_ends_are_exact(self, rng):
        ends = np.sort(np.float32(rng.normal(size=(200, 2))))
        first_and_last = np.eye(50, dtype=np.float32)[[0, -1]]
        decode = jax.vmap(lambda a, b: transform_from_2hot(first_and_last, a, b, 50))
        np.testing.assert_array_equal(decode(*ends.T), ends)

    def test_mirror_images_have_mirrored_weights(self, rng):
        for low, high, num_bins in [(-0.3, 0.3, 601), (-0.7, 0.7, 40)]:
            x = inside(low, high, rng)
            np.testing.assert_array_equal(
                transform_to_2hot(-x, low, high, num_bins),
                transform_to_2hot(x, low, high, num_bins)[:, ::-1],
            )

    @pytest.mark.parametrize("num_bins", [2, 3, 5, 6, 51, 600, 601])
    @pytest.mark.parametrize("shape", [(), (7,), (1000,), (3, 5)])
    def test_a_symmetric_distribution_decodes_to_exactly_zero(
        self, shape, num_bins, rng
    ):
        probs = rng.random((*shape, num_bins)).astype(np.float32)
        probs += probs[..., ::-1]
        probs /= probs.sum(axis=-1, keepdims=True, dtype=np.float32)
        np.testing.assert_array_equal(probs, probs[..., ::-1])
        result = transform_from_2hot(probs, -0.3, 0.3, num_bins)
        np.testing.assert_array_equal(result, np.zeros(shape))

    def test_an_untrained_network_predicts_exactly_zero(self):
        """Zero logits, inside one compiled program."""
        fn = lambda x: transform_from_2hot(jax.nn.softmax(x), -0.3, 0.3, 601)
        assert jax.jit(fn)(jnp.zeros(601)) == 0

    @pytest.mark.parametrize(("low", "high", "num_bins"), RANGES)
    def test_the_mean_is_the_mean(self, low, high, num_bins, rng):
        probs = rng.dirichlet(np.ones(num_bins), size=20).astype(np.float32)
        bins = bins_by_hand(low, high, num_bins)
        exact = floats(decode_by_hand(p, bins) for p in probs)
        result = transform_from_2hot(probs, low, high, num_bins)
        scale = max(abs(low), abs(high))
        np.testing.assert_allclose(result, exact, rtol=5e-7, atol=5e-7 * scale)

    def test_the_range_may_be_traced_and_differ_along_a_batch(self):
        low, high = jnp.array([-1.0, 0.0]), jnp.array([1.0, 4.0])
        encode = jax.jit(jax.vmap(lambda x, a, b: transform_to_2hot(x, a, b, 3)))
        weights = encode(jnp.array([0.5, 1.0]), low, high)
        assert weights.tolist() == [[0, 0.5, 0.5], [0.5, 0.5, 0]]
        decode = jax.vmap(lambda p, a, b: transform_from_2hot(p, a, b, 3))
        assert decode(weights, low, high).tolist() == [0.5, 1]

    def test_a_traced_range_without_width_gives_finite_weights(self):
        weights = transform_to_2hot(0.5, jnp.float32(1), jnp.float32(1), 4)
        assert np.isfinite(weights).all()
        assert weights.sum() == 1
        grads = jax.jacobian(transform_to_2hot, argnums=(0, 1, 2))(
            jnp.float32(1), jnp.float32(1), jnp.float32(1), 4
        )
        assert all(np.isfinite(g).all() for g in grads)

    def test_a_traced_range_upside_down_gives_nan(self):
        low, high = jnp.float32(1), jnp.float32(0)
        assert np.isnan(transform_to_2hot(0.5, low, high, 4)).all()
        assert np.isnan(transform_from_2hot(jnp.ones(4) / 4, low, high, 4))

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_decoding_has_the_derivatives_of_a_mean(self, symmetric, rng):
        probs = rng.dirichlet(np.ones(7)).astype(np.float32)
        probs = (probs + probs[::-1]) / 2 if symmetric else probs
        high = 3.0 if symmetric else 5.0
        grad = jax.grad(transform_from_2hot, argnums=(0, 1, 2))
        wrt_probs, wrt_low, wrt_high = grad(probs, -3.0, high, 7)
        k = np.arange(7)
        np.testing.assert_allclose(
            wrt_probs, -3 + (3 + high) * k / 6, rtol=1e-6, atol=1e-6
        )
        np.testing.assert_allclose(wrt_low, probs @ (1 - k / 6), rtol=1e-6)
        np.testing.assert_allclose(wrt_high, probs @ (k / 6), rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
    def test_half_precision_costs_no_more_than_its_own_rounding(self, dtype, rng):
        x = rng.uniform(-300, 300, 200).astype(dtype)
        weights = transform_to_2hot(x, -300.0, 300.0, 601)
        assert weights.dtype == dtype
        bins = bins_by_hand(-300, 300, 601)
        exact = np.array([floats(encode_by_hand(v, bins)) for v in x])
        np.testing.assert_array_equal(weights, exact.astype(dtype))
        result = transform_from_2hot(weights, -300.0, 300.0, 601)
        assert result.dtype == dtype
        digits = 8 if dtype == jnp.bfloat16 else 11
        np.testing.assert_allclose(
            np.float64(result), np.float64(x), rtol=2.5 * 2.0**-digits
        )

    def test_a_coarse_dtype_finds_its_bin_among_many(self):
        weights = transform_to_2hot(np.float16([1.5]), -3000.0, 3000.0, 6001)
        assert np.flatnonzero(weights[0]).tolist() == [3001, 3002]

    def test_double_precision_is_kept(self, rng):
        with jax.enable_x64(True):
            x = rng.uniform(-0.3, 0.3, 100)
            weights = transform_to_2hot(x, -0.3, 0.3, 601)
            assert weights.dtype == np.float64
            result = transform_from_2hot(weights, -0.3, 0.3, 601)
        np.testing.assert_allclose(result, x, rtol=4.5e-16)

    def test_a_scalar_gives_a_vector_and_comes_back_as_a_scalar(self):
        weights = transform_to_2hot(jnp.float32(0.5), 0.0, 1.0, 11)
        assert weights.shape == (11,)
        assert transform_from_2hot(weights, 0.0, 1.0, 11).shape == ()

    @pytest.mark.parametrize("shape", [(0,), (2, 3), (2, 0, 3), (1, 1, 1)])
    def test_leading_axes_are_kept(self, shape):
        weights = transform_to_2hot(jnp.zeros(shape), 0.0, 1.0, 11)
        assert weights.shape == (*shape, 11)
        assert transform_from_2hot(weights, 0.0, 1.0, 11).shape == shape


@pytest.fixture
def bins(rng):
    """Sorted bins of very different distances."""
    return np.sort(rng.normal(size=12) ** 5).astype(np.float32)


class TestArbitraryBins:
    def test_weights_are_those_of_the_neighbours(self, bins, rng):
        x = inside(bins[0] - 1, bins[-1] + 1, rng)
        exact = np.array([floats(encode_by_hand(v, [*map(fraction, bins)])) for v in x])
        result = transform_to_2hot_nonlinear(x, bins)
        np.testing.assert_allclose(result, exact, rtol=4e-7, atol=2.0**-24)
        np.testing.assert_array_equal(np.sum(result, axis=-1, dtype=np.float32), 1)

    def test_the_smaller_weight_keeps_its_digits(self, bins):
        for k in range(len(bins) - 1):
            low, high = bins[k : k + 2]
            for x in (np.nextafter(low, high), np.nextafter(high, low)):
                exact = floats(encode_by_hand(x, [*map(fraction, bins)]))
                result = transform_to_2hot_nonlinear(x, bins)
                np.testing.assert_allclose(result, exact, rtol=2.5e-7)

    def test_there_and_back_is_where_one_was(self, bins, rng):
        x = inside(bins[0], bins[-1], rng)
        weights = transform_to_2hot_nonlinear(x, bins)
        result = transform_from_2hot_nonlinear(weights, bins)
        k = np.clip(np.searchsorted(bins, x), 1, len(bins) - 1)
        straddles = np.sign(bins[k]) != np.sign(bins[k - 1])
        error = np.abs(result - x)
        largest = np.maximum(np.abs(bins[k]), np.abs(bins[k - 1]))
        assert np.all(error <= 2 * np.spacing(np.where(straddles, largest, np.abs(x))))

    def test_the_mean_is_the_mean(self, bins, rng):
        probs = rng.dirichlet(np.ones(12), size=20).astype(np.float32)
        exact = floats(decode_by_hand(p, map(fraction, bins)) for p in probs)
        result = transform_from_2hot_nonlinear(probs, bins)
        scale = np.abs(bins).max()
        np.testing.assert_allclose(result, exact, rtol=5e-7, atol=2e-7 * scale)

    def test_evenly_spaced_bins_are_no_special_case(self, rng):
        bins = np.linspace(-3, 5, 17, dtype=np.float32)
        x = inside(-4, 6, rng)
        weights = transform_to_2hot(x, -3.0, 5.0, 17)
        np.testing.assert_array_equal(weights, transform_to_2hot_nonlinear(x, bins))
        np.testing.assert_array_equal(
            transform_from_2hot(weights, -3.0, 5.0, 17),
            transform_from_2hot_nonlinear(weights, bins),
        )

    def test_nan_stays_nan(self, bins):
        result = transform_to_2hot_nonlinear(jnp.array([jnp.nan, 0.0]), bins)
        np.testing.assert_array_equal(np.isnan(result).all(axis=-1), [True, False])
        np.testing.assert_array_equal(np.isnan(result).any(axis=-1), [True, False])

    @pytest.mark.parametrize("bins", [(2, 1, 0), (0, 2, 1), (0, np.nan, 1)])
    def test_bins_that_do_not_increase_give_nan(self, bins):
        result = transform_to_2hot_nonlinear(0.5, jnp.array(bins, jnp.float32))
        assert np.isnan(result).all()

    def test_equal_bins_divide_nothing_by_zero(self):
        bins = jnp.array([0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0])
        x = jnp.array([-1.0, 0.0, 0.25, 1.0, 1.5, 2.0, 3.0])
        weights = transform_to_2hot_nonlinear(x, bins)
        assert np.isfinite(weights).all()
        np.testing.assert_array_equal(weights.sum(axis=-1), 1)
        clipped = [0, 0, 0.25, 1, 1.5, 2, 2]
        result = transform_from_2hot_nonlinear(weights, bins)
        np.testing.assert_array_equal(result, clipped)

    def test_equal_bins_have_finite_derivatives(self):
        bins = jnp.array([0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0])
        x = jnp.array([-1.0, 0.0, 0.25, 1.0, 1.5, 2.0, 3.0, jnp.inf, -jnp.inf])
        jacobian = jax.vmap(
            jax.jacobian(transform_to_2hot_nonlinear, argnums=(0, 1)), (0, None)
        )
        assert all(np.isfinite(j).all() for j in jacobian(x, bins))

    def test_derivatives_are_those_of_the_fractions(self, bins):
        bins = bins.astype(np.float64)
        x = 0.4 * bins[4] + 0.6 * bins[5]
        with jax.enable_x64(True):
            wrt_x, wrt_bins = jax.jacobian(transform_to_2hot_nonlinear, argnums=(0, 1))(
                x, bins
            )
        exact = [*map(fraction, bins)]
        step = Fraction(1, 10**20)

        def difference(dx, dbins):
            moved = [b + d for b, d in zip(exact, dbins, strict=True)]
            there = encode_by_hand_exactly(fraction(x) + dx, moved)
            here = encode_by_hand_exactly(fraction(x), exact)
            return floats((a - b) / step for a, b in zip(there, here, strict=True))

        none = [Fraction(0)] * 12
        np.testing.assert_allclose(wrt_x, difference(step, none), rtol=1e-9)
        for k in range(12):
            moved = [*none[:k], step, *none[k + 1 :]]
            np.testing.assert_allclose(
                wrt_bins[:, k], difference(0, moved), rtol=1e-9, atol=1e-12
            )

    def test_decoding_has_the_derivatives_of_a_mean(self, bins, rng):
        probs = rng.dirichlet(np.ones(12)).astype(np.float32)
        for b in (bins, bins - bins[::-1]):
            grad = jax.grad(transform_from_2hot_nonlinear, argnums=(0, 1))
            wrt_probs, wrt_bins = grad(probs, b)
            np.testing.assert_allclose(wrt_probs, b, rtol=1e-6)
            np.testing.assert_allclose(wrt_bins, probs, rtol=1e-6)

    def test_infinite_bins_take_infinite_numbers_only(self):
        inf = np.inf
        bins = jnp.array([-inf, -inf, -1.0, 1.0, inf, inf])
        x = np.array([-inf, -3e38, -1, 0, 1, 3e38, inf], np.float32)
        weights = transform_to_2hot_nonlinear(x, bins)
        result = transform_from_2hot_nonlinear(weights, bins)
        np.testing.assert_array_equal(result, [-inf, -1, -1, 0, 1, 1, inf])

    def test_infinite_bins_leave_derivatives_finite(self):
        bins = jnp.array([-jnp.inf, -1.0, 1.0, jnp.inf])
        x = jnp.array([-3e38, -1.0, 0.0, 1.0, 3e38])
        jacobian = jax.vmap(jax.jacobian(transform_to_2hot_nonlinear), (0, None))
        expected = np.zeros((5, 4))
        expected[1:3, 1:3] = [-0.5, 0.5]
        np.testing.assert_array_equal(jacobian(x, bins), expected)

    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    def test_a_bin_without_probability_counts_for_nothing(self, bad):
        probs, bins = jnp.array([0.0, 0.5, 0.5]), jnp.array([bad, 1.0, 2.0])
        value_and_grad = jax.value_and_grad(transform_from_2hot_nonlinear)
        value, grad = value_and_grad(probs, bins)
        assert value == 1.5
        assert grad.tolist() == [0, 1, 2]
        assert not np.isfinite(transform_from_2hot_nonlinear(probs[::-1], bins))

    def test_opposite_infinities_have_no_mean(self):
        bins = jnp.array([-jnp.inf, 0.0, jnp.inf])
        for probs in ([0.25, 0.5, 0.25], [0.125, 0.5, 0.375]):
            assert np.isnan(transform_from_2hot_nonlinear(jnp.array(probs), bins))

    def test_a_wide_and_a_narrow_dtype_give_the_wide_one(self, bins):
        result = transform_to_2hot_nonlinear(jnp.bfloat16(0.25), bins)
        assert result.dtype == np.float32


def encode_by_hand_exactly(x, bins):
    """The code of a fraction that no float is equal to."""
    k = max(k for k in range(len(bins) - 1) if bins[k] <= x)
    weights = [Fraction(0)] * len(bins)
    weights[k] = (bins[k + 1] - x) / (bins[k + 1] - bins[k])
    weights[k + 1] = 1 - weights[k]
    return weights


class TestErrors:
    @pytest.mark.parametrize(
        ("fn", "first"),
        [(transform_to_2hot, 0.5), (transform_from_2hot, np.ones(3, np.float32))],
    )
    def test_name_the_function_and_the_argument(self, fn, first):
        name = fn.__name__
        with pytest.raises(ValueError, match=f"{name}: num_bins must be at least 2"):
            fn(first, 0.0, 1.0, 1)
        with pytest.raises(ValueError, match=rf"{name}: min_value .* got 1.0 and 1.0"):
            fn(first, 1.0, 1.0, 3)
        with pytest.raises(ValueError, match=rf"{name}: min_value .* got 2 and 1\."):
            fn(first, min_value=2, max_value=1, num_bins=3)
        for bad in (np.nan, np.inf):
            with pytest.raises(ValueError, match=f"{name}: min_value must be below"):
                fn(first, 0.0, bad, 3)
        with pytest.raises(TypeError, match=f"{name}: num_bins must be a Python int"):
            fn(first, 0.0, 1.0, 3.0)
        with pytest.raises(TypeError, match=f"{name}: missing a required argument"):
            fn(first, 0.0)
        with pytest.raises(ValueError, match=rf"{name}: min_value has shape \(2,\)"):
            fn(first, jnp.zeros(2), 1.0, 3)

    def test_tell_how_many_probabilities_are_wanted(self):
        probs = jnp.ones((2, 4))
        with pytest.raises(ValueError, match=r"probs has shape \(2, 4\).*num_bins = 5"):
            transform_from_2hot(probs, 0.0, 1.0, 5)
        with pytest.raises(ValueError, match=r"from_2hot_nonlinear: bins has shape"):
            transform_from_2hot_nonlinear(probs, jnp.arange(5.0))

    @pytest.mark.parametrize("size", [0, 1])
    def test_tell_that_one_bin_is_not_enough(self, size):
        bins = jnp.zeros(size)
        with pytest.raises(
            ValueError, match="to_2hot_nonlinear: bins must be at least"
        ):
            transform_to_2hot_nonlinear(0.5, bins)
        with pytest.raises(ValueError, match="from_2hot_nonlinear: bins must be at le"):
            transform_from_2hot_nonlinear(bins, bins)

    def test_refuse_integers(self):
        with pytest.raises(TypeError, match="scalar must be floating-point"):
            transform_to_2hot(jnp.arange(3), 0.0, 1.0, 3)

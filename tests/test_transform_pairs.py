"""Pairs of transforms, against their definitions in double precision."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.transform_pairs import (
    DISCOUNT_TRANSFORM_PAIR,
    HYPERBOLIC_SIN_PAIR,
    IDENTITY_PAIR,
    SIGNED_HYPERBOLIC_PAIR,
    SIGNED_LOGP1_PAIR,
    TxPair,
    compose_tx,
    muzero_pair,
    twohot_pair,
    unbiased_transform_pair,
)
from rlprims.transforms import signed_hyperbolic
from rlprims.two_hot import transform_from_2hot, transform_to_2hot

SQUARE = TxPair(jnp.sqrt, jnp.square)
FACTORIES = {
    "twohot_pair": twohot_pair,
    "muzero_pair": lambda *args: muzero_pair(*args, SIGNED_HYPERBOLIC_PAIR),
    "unbiased_transform_pair": lambda *args: unbiased_transform_pair(
        *args, SIGNED_HYPERBOLIC_PAIR
    ),
}
ELEMENTWISE = {
    "identity": (IDENTITY_PAIR, lambda x: x),
    "signed_logp1": (SIGNED_LOGP1_PAIR, lambda x: np.sign(x) * np.log1p(abs(x))),
    "signed_hyperbolic": (
        SIGNED_HYPERBOLIC_PAIR,
        lambda x: np.sign(x) * (np.sqrt(abs(x) + 1) - 1) + 1e-3 * x,
    ),
    "hyperbolic_sin": (HYPERBOLIC_SIN_PAIR, np.arcsinh),
    "discount": (DISCOUNT_TRANSFORM_PAIR, lambda x: np.log(1 / (1 - x))),
}


@pytest.fixture(params=FACTORIES)
def make(request):
    """A function of the range and the number of bins that makes a pair."""
    return FACTORIES[request.param]


@pytest.mark.parametrize("name", ELEMENTWISE)
class TestElementwisePairs:
    def numbers(self, name, rng):
        x = rng.normal(size=100) * 10
        return np.float32(x[x < 1] if name == "discount" else x)

    def test_apply_is_its_definition(self, name, rng):
        pair, definition = ELEMENTWISE[name]
        x = self.numbers(name, rng)
        exact = definition(np.float64(x))
        np.testing.assert_allclose(pair.apply(x), exact, rtol=1e-6)

    def test_apply_inv_undoes_apply(self, name, rng):
        pair, _ = ELEMENTWISE[name]
        x = self.numbers(name, rng)
        np.testing.assert_allclose(pair.apply_inv(pair.apply(x)), x, rtol=4e-6)

    def test_slope_is_positive(self, name, rng):
        pair, _ = ELEMENTWISE[name]
        for fn in pair:
            slopes = jax.vmap(jax.grad(fn))(self.numbers(name, rng))
            assert np.all(slopes > 0)


class TestDiscountTransform:
    """The logarithm of the horizon `1 / (1 - discount)`."""

    def test_is_the_logarithm_of_the_horizon(self):
        discounts = jnp.array([0.0, 0.5, 0.75, 1.0])
        horizons = [1, 2, 4, np.inf]
        result = DISCOUNT_TRANSFORM_PAIR.apply(discounts)
        np.testing.assert_allclose(result, np.log(horizons), rtol=1e-7)

    def test_keeps_its_digits_next_to_zero_and_one(self):
        x = np.float32([1e-30, -1e-30, 1e-3, 1 - 2.0**-24, -1e30])
        exact = -np.log1p(-np.float64(x))
        y = DISCOUNT_TRANSFORM_PAIR.apply(x)
        np.testing.assert_allclose(y, exact, rtol=2e-7)
        y = np.float32([1e-30, -1e-30, 1e-3, 3.0, -80.0])
        exact = -np.expm1(-np.float64(y))
        np.testing.assert_allclose(DISCOUNT_TRANSFORM_PAIR.apply_inv(y), exact, 2e-7)

    def test_has_no_value_beyond_one(self):
        assert np.isnan(DISCOUNT_TRANSFORM_PAIR.apply(1.5))

    def test_ends_are_exact(self):
        y = jnp.array([jnp.inf, -jnp.inf, 0.0, -0.0])
        result = np.asarray(DISCOUNT_TRANSFORM_PAIR.apply_inv(y))
        np.testing.assert_array_equal(result, [1, -np.inf, 0, 0])
        assert np.signbit(result).tolist() == [False, True, False, True]

    @pytest.mark.parametrize("x", [-3.0, 0.0, 20.0])
    def test_derivative_of_the_inverse_survives_saturation(self, x):
        result = jax.grad(DISCOUNT_TRANSFORM_PAIR.apply_inv)(x)
        np.testing.assert_allclose(result, math.exp(-x), rtol=1e-6)


class TestComposition:
    def test_applies_the_first_pair_first(self):
        shift = TxPair(lambda x: x + 1, lambda x: x - 1)
        double = TxPair(lambda x: x * 2, lambda x: x / 2)
        pair = compose_tx(shift, double)
        assert pair.apply(3.0) == 8
        assert pair.apply_inv(8.0) == 3
        assert compose_tx(double, shift).apply(3.0) == 7
        assert compose_tx(pair, shift, shift).apply(3.0) == 10

    def test_of_nothing_is_the_identity(self):
        pair = compose_tx()
        x = jnp.array([-1.5, 2.0])
        np.testing.assert_array_equal(pair.apply(x), x)
        np.testing.assert_array_equal(pair.apply_inv(x), x)

    def test_of_one_is_that_one(self, rng):
        x = np.float32(rng.normal(size=5))
        pair = compose_tx(SIGNED_LOGP1_PAIR)
        np.testing.assert_array_equal(pair.apply(x), SIGNED_LOGP1_PAIR.apply(x))
        np.testing.assert_array_equal(pair.apply_inv(x), SIGNED_LOGP1_PAIR.apply_inv(x))

    def test_does_not_round_between_its_parts(self):
        """A value of 1e6 lies between two logarithms that bfloat16 can hold."""
        square_of_log = TxPair(jnp.square, jnp.sqrt)
        pair = compose_tx(SIGNED_LOGP1_PAIR, square_of_log)
        x = jnp.bfloat16(1e6)
        exact = math.log1p(float(x)) ** 2
        result = pair.apply(x)
        assert result.dtype == jnp.bfloat16
        assert result == jnp.bfloat16(exact)

    def test_accepts_any_object_with_both_functions(self):
        halving = SimpleNamespace(apply=lambda x: x / 2, apply_inv=lambda x: x * 2)
        assert compose_tx(halving, SQUARE).apply(8.0) == 2
        assert muzero_pair(0.0, 4.0, 5, halving).apply(4.0)[2] == 1

    def test_gradient_flows_through_what_the_functions_close_over(self):
        def loss(scale):
            pair = compose_tx(TxPair(lambda x: x * scale, lambda x: x / scale), SQUARE)
            return pair.apply(2.0)

        for fn in (loss, jax.jit(loss)):
            np.testing.assert_allclose(jax.grad(fn)(2.0), 0.5, rtol=1e-6)


class TestTwoHotPair:
    def test_is_the_pair_of_two_hot_functions(self, rng):
        pair = twohot_pair(-2.0, 3.0, 11)
        x = np.float32(rng.normal(size=(4, 5)) * 2)
        weights = transform_to_2hot(x, -2.0, 3.0, 11)
        np.testing.assert_array_equal(pair.apply(x), weights)
        np.testing.assert_array_equal(
            pair.apply_inv(weights), transform_from_2hot(weights, -2.0, 3.0, 11)
        )


class TestMuZeroPair:
    def test_transforms_first_and_then_encodes(self, rng):
        x = np.float32(rng.normal(size=20) * 5)
        pair = muzero_pair(-2.0, 2.0, 21, SIGNED_HYPERBOLIC_PAIR)
        expected = transform_to_2hot(signed_hyperbolic(x), -2.0, 2.0, 21)
        np.testing.assert_allclose(pair.apply(x), expected, atol=1e-6)

    def test_decodes_the_mean_of_transformed_values(self):
        """Bins 0, 2 and 4 with mean 3, squared."""
        pair = muzero_pair(0.0, 4.0, 3, SQUARE)
        assert pair.apply_inv(jnp.array([0.0, 0.5, 0.5])) == 9

    def test_is_the_composition_of_both(self, rng):
        """Compiled together or apart: a sum may be rounded differently."""
        x = np.float32(rng.normal(size=20) * 5)
        tx = SIGNED_LOGP1_PAIR
        pair, composed = (
            muzero_pair(-2.0, 2.0, 21, tx),
            compose_tx(tx, twohot_pair(-2.0, 2.0, 21)),
        )
        weights = pair.apply(x)
        np.testing.assert_array_equal(weights, composed.apply(x))
        np.testing.assert_allclose(
            pair.apply_inv(weights), composed.apply_inv(weights), rtol=5e-7
        )

    def test_keeps_the_digits_of_a_large_value_in_half_precision(self):
        """The logarithm of 1e6, rounded on its own, would be off by a percent."""
        x = jnp.bfloat16(1e6)
        pair = muzero_pair(-20.0, 20.0, 41, SIGNED_LOGP1_PAIR)
        exact = math.log1p(float(x)) - 13
        np.testing.assert_allclose(
            np.float32(pair.apply(x)[33:35]), [1 - exact, exact], rtol=2.0**-8
        )


class TestUnbiasedTransformPair:
    def test_encodes_values_on_inverse_transformed_bins(self):
        """Bins 0, 4 and 16, the squares of 0, 2 and 4."""
        pair = unbiased_transform_pair(0.0, 4.0, 3, SQUARE)
        x = jnp.array([-1.0, 0.0, 1.0, 7.0, 16.0, 20.0])
        assert pair.apply(x).tolist() == [
            [1, 0, 0],
            [1, 0, 0],
            [0.75, 0.25, 0],
            [0, 0.75, 0.25],
            [0, 0, 1],
            [0, 0, 1],
        ]
        assert pair.apply_inv(jnp.array([0.0, 0.5, 0.5])) == 10

    def test_decodes_the_mean_of_codes_to_the_mean_of_values(self, rng):
        x = np.float32(rng.normal(size=1000) * 10)
        unbiased, muzero = (
            factory(-40.0, 40.0, 161, SIGNED_HYPERBOLIC_PAIR)
            for factory in (unbiased_transform_pair, muzero_pair)
        )
        mean = lambda pair: pair.apply_inv(jnp.mean(pair.apply(x**2), axis=0))
        np.testing.assert_allclose(mean(unbiased), np.mean(x**2), rtol=1e-5)
        assert mean(muzero) < 0.9 * np.mean(x**2)  # the square of a mean of roots

    def test_is_the_two_hot_pair_for_the_identity(self, rng):
        x = np.float32(rng.normal(size=20))
        pair = unbiased_transform_pair(-1.0, 1.0, 21, IDENTITY_PAIR)
        np.testing.assert_array_equal(
            pair.apply(x), twohot_pair(-1.0, 1.0, 21).apply(x)
        )

    def test_survives_bins_that_overflow(self):
        pair = unbiased_transform_pair(-300.0, 300.0, 601, SIGNED_LOGP1_PAIR)
        x = jnp.array([5.0, -1e30, 0.0, jnp.inf], jnp.float32)
        weights = pair.apply(x)
        np.testing.assert_array_equal(weights.sum(axis=-1), 1)
        np.testing.assert_allclose(pair.apply_inv(weights), x, rtol=5e-7)


class TestEveryCode:
    def test_a_value_comes_back(self, make, rng):
        pair = make(-10.0, 10.0, 601)
        x = np.float32(rng.uniform(-9, 9, size=(7, 11)))
        weights = pair.apply(x)
        assert weights.shape == (7, 11, 601)
        np.testing.assert_allclose(pair.apply_inv(weights), x, rtol=2e-6)

    def test_a_scalar_comes_back_as_a_scalar(self, make):
        pair = make(-2.0, 2.0, 5)
        for scalar in (0.3, jnp.float32(0.3)):
            assert pair.apply(scalar).shape == (5,)
            assert pair.apply_inv(pair.apply(scalar)).shape == ()

    def test_zero_logits_decode_to_exactly_zero(self, make):
        pair = make(-300.0, 300.0, 601)
        assert pair.apply_inv(jax.nn.softmax(jnp.zeros(601))) == 0

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
    def test_dtype_is_kept(self, make, dtype):
        pair = make(-2.0, 2.0, 5)
        weights = pair.apply(jnp.asarray(0.3, dtype))
        assert weights.dtype == dtype
        assert pair.apply_inv(weights).dtype == dtype

    def test_double_precision_is_kept(self, make, rng):
        x = rng.uniform(-9, 9, 100)
        with jax.enable_x64(True):
            pair = make(-10.0, 10.0, 601)
            weights = pair.apply(x)
            assert weights.dtype == np.float64
            np.testing.assert_allclose(pair.apply_inv(weights), x, rtol=5e-15)

    def test_the_way_there_and_back_has_slope_one(self, make):
        pair = make(-10.0, 10.0, 601)
        slope = jax.grad(lambda x: pair.apply_inv(pair.apply(x)))
        np.testing.assert_allclose(slope(3.21), 1, rtol=2e-3)

    def test_the_range_may_be_traced_and_differ_along_a_batch(self, make):
        def there(high):
            return make(-high, high, 11).apply(0.7)

        high = jnp.array([1.0, 3.0])
        expected = [make(-h, h, 11).apply(0.7) for h in (1.0, 3.0)]
        np.testing.assert_allclose(
            jax.jit(jax.vmap(there))(high), np.stack(expected), atol=1e-6
        )

    def test_works_inside_compiled_code(self, make, rng):
        pair = make(-10.0, 10.0, 21)
        x = np.float32(rng.normal(size=8))
        np.testing.assert_allclose(
            jax.jit(jax.vmap(pair.apply))(x), pair.apply(x), atol=1e-6
        )

    def test_too_few_probabilities_are_refused(self, make):
        with pytest.raises(ValueError, match=r"apply_inv: probs has shape.*= 5"):
            make(-2.0, 2.0, 5).apply_inv(jnp.ones(4))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((1.0, 1.0, 5), ValueError, "min_value must be below max_value"),
            ((2, 1, 5), ValueError, "min_value must be below max_value"),
            ((-np.inf, 1.0, 5), ValueError, "both finite"),
            ((-1.0, 1.0, 1), ValueError, "num_bins must be at least 2, got 1"),
            ((-1.0, 1.0, 5.0), TypeError, "num_bins must be a Python int, got float"),
        ],
    )
    def test_an_impossible_range_is_refused_at_once(
        self, make, arguments, error, message, request
    ):
        name = request.node.callspec.params["make"]
        with pytest.raises(error, match=f"{name}: .*{message}"):
            make(*arguments)


class TestCompilation:
    """An eager call must not compile again, whoever made the pair."""

    @pytest.fixture
    def traced(self):
        """A pair that counts how often each of its functions is traced."""
        counts = {"apply": 0, "apply_inv": 0}

        def apply(x):
            counts["apply"] += 1
            return jnp.tanh(x)

        def apply_inv(x):
            counts["apply_inv"] += 1
            return jnp.arctanh(x)

        return TxPair(apply, apply_inv), counts

    def test_muzero_pairs_made_alike_share_what_is_compiled(self, traced):
        tx, counts = traced
        for low in (-0.5, -0.25, -0.5):
            pair = muzero_pair(low, 0.5, 7, tx)
            pair.apply_inv(pair.apply(jnp.float32(0.1)))
        assert counts == {"apply": 1, "apply_inv": 1}

    def test_unbiased_pairs_made_alike_share_what_is_compiled(self, traced):
        tx, counts = traced
        for low in (-0.5, -0.25, -0.5):
            pair = unbiased_transform_pair(low, 0.5, 7, tx)
            pair.apply_inv(pair.apply(jnp.float32(0.1)))
        assert counts == {"apply": 0, "apply_inv": 2}  # once for either way

    def test_compositions_made_alike_share_what_is_compiled(self, traced):
        tx, counts = traced
        for _ in range(3):
            pair = compose_tx(tx, IDENTITY_PAIR)
            pair.apply_inv(pair.apply(jnp.float32(0.1)))
        assert counts == {"apply": 1, "apply_inv": 1}


class TestErrors:
    @pytest.mark.parametrize("bad", [signed_hyperbolic, [IDENTITY_PAIR], None])
    def test_what_is_no_pair_is_refused(self, bad):
        for name, call in {
            "compose_tx": lambda: compose_tx(bad),
            "muzero_pair": lambda: muzero_pair(-1.0, 1.0, 3, bad),
            "unbiased_transform_pair": lambda: unbiased_transform_pair(
                min_value=-1.0, max_value=1.0, num_bins=3, tx=bad
            ),
        }.items():
            with pytest.raises(TypeError, match=f"{name}: .* must be a TxPair"):
                call()

    def test_a_missing_argument_is_named(self):
        with pytest.raises(TypeError, match="num_bins"):
            twohot_pair(-1.0, 1.0)

    def test_integers_are_refused(self):
        with pytest.raises(TypeError, match="x must be floating-point"):
            twohot_pair(-1.0, 1.0, 3).apply(jnp.arange(3))

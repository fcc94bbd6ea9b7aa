"""Value transforms, against their definitions in a hundred and fifty decimal digits."""

import decimal
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.transforms import (
    hyperbolic_arcsin,
    hyperbolic_sin,
    identity,
    logit,
    power,
    sigmoid,
    signed_expm1,
    signed_hyperbolic,
    signed_logp1,
    signed_parabolic,
)

EPS, P = float(np.float32(1e-3)), float(np.float32(0.3))  # exact in every dtype


def odd(definition):
    """Extends a definition for numbers above 0 to all numbers."""
    return lambda x: definition(abs(x)).copy_sign(x)


def hyperbolic_by_hand(eps):
    eps = Decimal(eps)
    return odd(lambda x: (x + 1).sqrt() - 1 + eps * x)


def parabolic_by_hand(eps):
    """The published inverse; without the identity, the inverse of a square root."""
    eps = Decimal(eps)
    if eps == 0:
        return odd(lambda x: (x + 1) ** 2 - 1)
    root = lambda x: (1 + 4 * eps * (x + 1 + eps)).sqrt()
    return odd(lambda x: ((root(x) - 1) / (2 * eps)) ** 2 - 1)


def power_by_hand(p):
    p = Decimal(p)
    return odd(lambda x: ((1 + x / p.sqrt()) ** p - 1) / p.sqrt())


DEFINITIONS = {
    "identity": (identity, lambda x: x),
    "sigmoid": (sigmoid, lambda x: 1 / (1 + (-x).exp())),
    "logit": (logit, lambda x: (x / (1 - x)).ln()),
    "signed_logp1": (signed_logp1, odd(lambda x: (1 + x).ln())),
    "signed_expm1": (signed_expm1, odd(lambda x: x.exp() - 1)),
    "hyperbolic_sin": (hyperbolic_sin, odd(lambda x: (x.exp() - (-x).exp()) / 2)),
    "hyperbolic_arcsin": (
        hyperbolic_arcsin,
        odd(lambda x: (x + (x * x + 1).sqrt()).ln()),
    ),
    "signed_hyperbolic": (lambda x: signed_hyperbolic(x, EPS), hyperbolic_by_hand(EPS)),
    "signed_parabolic": (lambda x: signed_parabolic(x, EPS), parabolic_by_hand(EPS)),
    "signed_hyperbolic_0": (
        lambda x: signed_hyperbolic(x, eps=0.0),
        hyperbolic_by_hand(0),
    ),
    "signed_parabolic_0": (
        lambda x: signed_parabolic(x, eps=0.0),
        parabolic_by_hand(0),
    ),
    "signed_hyperbolic_1": (
        lambda x: signed_hyperbolic(x, eps=1.0),
        hyperbolic_by_hand(1),
    ),
    "signed_parabolic_1": (
        lambda x: signed_parabolic(x, eps=1.0),
        parabolic_by_hand(1),
    ),
    "power_below_1": (lambda x: power(x, P), power_by_hand(P)),
    "power_1": (lambda x: power(x, 1.0), power_by_hand(1)),
    "power_2": (lambda x: power(x, 2.0), power_by_hand(2)),
}
# The largest errors measured on a million numbers are, in units in the last place of
# single precision, value / derivative: identity 0 / 0, sigmoid 2.0 / 3.5,
# logit 3.7 / 2.0, signed_logp1 2.3 / 1.5, signed_expm1 3.8 / 3.8 (1.7 / 1.0 below 88),
# hyperbolic_sin 2.6 / 2.5, hyperbolic_arcsin 2.9 / 2.5, signed_hyperbolic 2.5 / 2.2,
# signed_parabolic 5.5 / 4.9, power 5.0 / 1.5 for p = 0.3 and 5.9 / 0.8 for p = 2.
# In double precision they are the same to within one, but for hyperbolic_sin 4.4 / 4.0
# and power 6.8 / 1.3 for p = 2.
ULPS = {"identity": 0, "signed_parabolic": 6, "power_below_1": 6, "power_2": 7}
ODD = [name for name in DEFINITIONS if name not in {"sigmoid", "logit"}]
GROWING = {"signed_expm1", "hyperbolic_sin"}
SQUARES = {"signed_parabolic_0", "power_2"}


def parametrize(names):
    return pytest.mark.parametrize("name", list(names))


@pytest.fixture(autouse=True)
def many_digits():
    with decimal.localcontext() as context:
        context.prec = 150
        context.traps[decimal.Overflow] = False
        context.traps[decimal.InvalidOperation] = False
        yield


def numbers(name, rng, largest=30):
    """Numbers of every magnitude between `1e-30` and `1e30` in the domain."""
    exponents = np.append(rng.uniform(-30, largest, 300), rng.uniform(-4, 2, 300))
    x = np.float32(10**exponents)
    if name == "logit":
        x = np.concatenate([x[x < 1], 1 - x[x < 0.5], 0.5 + x[x < 0.4]])
        return x[(x > 0) & (x < 1)]
    if name in GROWING:
        x = x[x < 100]
    if name in SQUARES:
        x = x[x < 1e18]
    return np.concatenate([x, -x])


def ulps(result, exact):
    """The error in units in the last place of the dtype of `result`."""
    with np.errstate(over="ignore"):
        nearest = np.array([float(e) for e in exact]).astype(result.dtype)
    tiny = np.finfo(result.dtype).tiny
    units = np.spacing(np.maximum(np.abs(nearest), tiny))
    errors = [
        float(abs(Decimal(float(r)) - e) / Decimal(float(u)))
        for r, e, u in zip(result, exact, units, strict=True)
        if abs(e) < Decimal(float(np.finfo(result.dtype).max)) and abs(e) > tiny
    ]
    overflow = np.isinf(nearest)
    np.testing.assert_array_equal(result[overflow], nearest[overflow])
    assert len(errors) > 100
    return np.array(errors)


def slope(definition, x):
    """The derivative, as a difference over a distance forty digits smaller."""
    x = Decimal(x)
    step = (abs(x) or 1) * Decimal("1e-40")
    return (definition(x + step) - definition(x - step)) / (2 * step)


def gradient(fn):
    return jax.jit(jax.vmap(jax.grad(fn)))


@parametrize(DEFINITIONS)
class TestEveryTransform:
    def test_is_accurate_at_every_scale(self, name, rng):
        fn, definition = DEFINITIONS[name]
        x = numbers(name, rng)
        exact = [definition(Decimal(float(v))) for v in x]
        assert ulps(np.asarray(fn(x)), exact).max() <= ULPS.get(name, 4)

    def test_is_accurate_in_double_precision(self, name, rng):
        fn, definition = DEFINITIONS[name]
        x = numbers(name, rng).astype(np.float64)
        exact = [definition(Decimal(float(v))) for v in x]
        with jax.enable_x64(True):
            result = np.asarray(fn(x))
        assert result.dtype == np.float64
        assert ulps(result, exact).max() <= ULPS.get(name, 5)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
    def test_rounds_once_in_half_precision(self, name, dtype, rng):
        """To the nearest number, or its neighbour if it lies almost half-way."""
        fn, definition = DEFINITIONS[name]
        x = numbers(name, rng, largest=4).astype(dtype)
        x = x[np.isfinite(x.astype(np.float32))]
        x = x[(x != 0) & (x != 1)] if name == "logit" else x
        result = np.asarray(fn(x))
        assert result.dtype == dtype
        with np.errstate(over="ignore"):
            exact = np.array([float(definition(Decimal(float(v)))) for v in x])
            rounded = exact.astype(dtype)
        digits = 8 if dtype == jnp.bfloat16 else 11
        normal = np.abs(exact) > 6.2e-5
        off = np.asarray(result != rounded) & normal
        error = np.abs(result.astype(np.float64) - exact)
        assert np.all(error[off] <= 1.0001 * 2.0**-digits * np.abs(exact[off]))
        assert off.mean() < 0.01

    def test_derivative_is_accurate_at_every_scale(self, name, rng):
        fn, definition = DEFINITIONS[name]
        x = numbers(name, rng)
        exact = [slope(definition, float(v)) for v in x]
        result = np.asarray(gradient(fn)(x))
        assert ulps(result, exact).max() <= max(ULPS.get(name, 4), 4)

    def test_second_derivative_is_accurate_away_from_zero(self, name, rng):
        fn, definition = DEFINITIONS[name]
        x = np.float32(rng.uniform(0.1, 0.9, 100))
        exact = [slope(lambda v: slope(definition, v), Decimal(float(v))) for v in x]
        result = np.asarray(gradient(jax.grad(fn))(x))
        np.testing.assert_allclose(
            result, np.array([float(e) for e in exact]), rtol=1e-5, atol=1e-6
        )

    def test_takes_a_number_or_an_array_of_any_shape(self, name):
        fn, definition = DEFINITIONS[name]
        expected = float(definition(Decimal("0.25")))
        assert fn(0.25).shape == ()
        np.testing.assert_allclose(fn(0.25), expected, rtol=1e-6)
        np.testing.assert_allclose(
            fn(jnp.full((2, 0, 3), 0.25)), np.full((2, 0, 3), expected)
        )
        np.testing.assert_allclose(
            fn(jnp.full((2, 3), 0.25)), np.full((2, 3), expected), rtol=1e-6
        )

    def test_forward_and_reverse_mode_agree(self, name):
        fn, _ = DEFINITIONS[name]
        x = jnp.float32(0.3)
        forward, reverse = jax.jacfwd(fn)(x), jax.grad(fn)(x)
        np.testing.assert_allclose(forward, reverse, rtol=1e-6)


@parametrize(ODD)
class TestEveryOddTransform:
    def test_is_exactly_odd(self, name, rng):
        fn, _ = DEFINITIONS[name]
        x = numbers(name, rng)
        np.testing.assert_array_equal(fn(-x), -fn(x))

    def test_is_exact_at_zero_with_its_sign_and_at_infinity(self, name):
        fn, _ = DEFINITIONS[name]
        x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
        result = np.asarray(fn(x))
        np.testing.assert_array_equal(result, x)
        np.testing.assert_array_equal(np.signbit(result)[:4], np.signbit(x)[:4])

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_derivative_at_zero_is_right(self, name, zero):
        fn, definition = DEFINITIONS[name]
        exact = float(slope(definition, zero))
        np.testing.assert_allclose(jax.grad(fn)(zero), exact, rtol=3e-7)

    @pytest.mark.parametrize("zero", [0.0, -0.0, 1e-30])
    def test_second_derivative_next_to_zero_is_finite(self, name, zero):
        fn, _ = DEFINITIONS[name]
        assert np.isfinite(jax.grad(jax.grad(fn))(zero))

    def test_derivative_at_infinity_is_no_nan(self, name):
        fn, _ = DEFINITIONS[name]
        x = jnp.array([jnp.inf, -jnp.inf])
        assert not np.isnan(gradient(fn)(x)).any()


@pytest.mark.parametrize(
    ("there", "back"),
    [
        ("signed_logp1", "signed_expm1"),
        ("hyperbolic_arcsin", "hyperbolic_sin"),
        ("signed_hyperbolic", "signed_parabolic"),
        ("signed_hyperbolic_0", "signed_parabolic_0"),
        ("logit", "sigmoid"),
    ],
)
class TestInverses:
    def test_there_and_back_is_where_one_was(self, there, back, rng):
        """Up to the rounding on the way, which the way back may magnify."""
        x = numbers(there, rng)
        y = np.asarray(DEFINITIONS[there][0](x))
        result = np.asarray(DEFINITIONS[back][0](y))
        magnified = np.array(
            [
                float(abs(Decimal(float(b)) * slope(DEFINITIONS[back][1], float(b))))
                for b in y
            ]
        ) / np.abs(x)
        errors = np.abs(result.astype(np.float64) - x) / np.spacing(np.abs(x))
        # An error of an ulp may be one of two in a number just below a power of two.
        assert np.all(errors <= 6 + 2 * 4 * magnified)

    def test_back_and_there_is_where_one_was(self, there, back, rng):
        y = rng.uniform(-5, 5, 1000).astype(np.float32)
        result = DEFINITIONS[there][0](DEFINITIONS[back][0](y))
        np.testing.assert_allclose(result, y, rtol=5e-5, atol=1e-7)

    def test_derivatives_are_reciprocal(self, there, back):
        x = jnp.float32(0.7)
        there, back = DEFINITIONS[there][0], DEFINITIONS[back][0]
        product = jax.grad(there)(x) * jax.grad(back)(there(x))
        np.testing.assert_allclose(product, 1, rtol=2e-6)


class TestLogit:
    def test_is_accurate_next_to_one(self):
        x = np.float32(1 - 2.0**-24)
        np.testing.assert_allclose(logit(x), math.log(2**24 - 1), rtol=1e-7)

    def test_is_infinite_at_certainty_and_nan_where_there_is_no_probability(self):
        x = jnp.array([0.0, -0.0, 1.0, -1e-6, 1.0000001, jnp.inf, -jnp.inf, jnp.nan])
        expected = [-np.inf, -np.inf, np.inf] + 5 * [np.nan]
        np.testing.assert_array_equal(logit(x), expected)

    def test_is_antisymmetric_about_a_half(self, rng):
        x = rng.integers(1, 2**12, 100) / np.float32(2**12)  # exactly invertible
        np.testing.assert_allclose(logit(np.float32(1 - x)), -logit(x), rtol=5e-7)


class TestSigmoid:
    def test_is_exact_at_the_ends(self):
        x = jnp.array([-jnp.inf, -1e30, -0.0, 0.0, 1e30, jnp.inf])
        np.testing.assert_array_equal(sigmoid(x), [0, 0, 0.5, 0.5, 1, 1])

    @pytest.mark.parametrize("x", [20.0, 80.0, -80.0])
    def test_derivative_survives_saturation(self, x):
        np.testing.assert_allclose(jax.grad(sigmoid)(x), math.exp(-abs(x)), rtol=1e-6)

    def test_derivative_vanishes_at_infinity(self):
        assert gradient(sigmoid)(jnp.array([jnp.inf, -jnp.inf])).tolist() == [0, 0]


class TestHyperbolicAndParabolic:
    @pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3, 0.25, 1.0])
    def test_eps_may_be_traced(self, eps):
        x = jnp.array([-3.0, 0.0, 8.0])
        y = jax.jit(signed_hyperbolic)(x, jnp.float32(eps))
        np.testing.assert_allclose(y, [-1 - 3 * eps, 0, 2 + 8 * eps], rtol=1e-6)
        back = jax.jit(signed_parabolic)(y, jnp.float32(eps))
        np.testing.assert_allclose(back, x, rtol=1e-6)

    def test_eps_may_differ_along_a_batch(self):
        x, eps = jnp.array([3.0, 3.0]), jnp.array([0.0, 1.0])
        assert jax.vmap(signed_hyperbolic)(x, eps).tolist() == [1, 4]

    @pytest.mark.parametrize("eps", [0.0, 1e-3, 0.5])
    @pytest.mark.parametrize(
        ("fn", "by_hand"),
        [
            (signed_hyperbolic, hyperbolic_by_hand),
            (signed_parabolic, parabolic_by_hand),
        ],
    )
    def test_derivative_with_respect_to_eps_is_right(self, fn, by_hand, eps):
        x, eps = Decimal("-2.5"), Decimal(float(np.float32(eps)))
        step = Decimal("1e-30")
        exact = (by_hand(eps + step)(x) - by_hand(eps)(x)) / step
        result = jax.grad(fn, argnums=1)(float(x), float(eps))
        np.testing.assert_allclose(result, float(exact), rtol=2e-6)

    def test_infinity_does_not_need_the_identity(self):
        x = jnp.array([jnp.inf, -jnp.inf])
        for fn in (signed_hyperbolic, signed_parabolic):
            for eps in (0.0, 1e-3):
                np.testing.assert_array_equal(fn(x, eps), x)

    def test_a_mask_keeps_the_gradient_of_an_infinite_value_out(self):
        """A state without legal actions is worth -infinity, and is masked."""

        def masked(x):
            y = signed_parabolic(signed_hyperbolic(x))
            return jnp.where(jnp.isinf(y), 0, y).sum()

        result = jax.grad(masked)(jnp.array([1.0, -jnp.inf]))
        np.testing.assert_allclose(result, [1, 0], atol=1e-6)

    def test_half_precision_survives_the_way_back(self):
        """The way there is rounded to 8 bits, which the way back doubles."""
        x = jnp.array([0.5, 2, 5, 20], jnp.bfloat16)
        back = signed_parabolic(signed_hyperbolic(x)).astype(jnp.float32)
        np.testing.assert_allclose(back, [0.5, 2, 5, 20], rtol=2.5 * 2.0**-8)

    def test_large_results_overflow_to_infinity_only(self):
        x = jnp.array([1e35, 3e38, -3e38], jnp.float32)
        np.testing.assert_allclose(
            signed_parabolic(x), [1e38, np.inf, -np.inf], rtol=1e-6
        )

    def test_eps_is_a_thousandth_by_default(self):
        x = jnp.float32(1e6)
        assert signed_hyperbolic(x) == signed_hyperbolic(x, 1e-3)
        assert signed_parabolic(x) == signed_parabolic(x, eps=1e-3)

    def test_eps_must_be_a_scalar(self):
        with pytest.raises(
            ValueError, match=r"signed_hyperbolic: eps has shape \(2,\)"
        ):
            signed_hyperbolic(jnp.ones(2), jnp.ones(2))


class TestPower:
    @pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 2.0, 3.0])
    def test_the_reciprocal_exponent_inverts(self, p, rng):
        x = numbers("power", rng, largest=8)
        there, back = (p, 1 / p) if p < 1 else (1 / p, p)
        result = np.asarray(power(power(x, there), back))
        # The logarithm of the growth is rounded and then multiplied.
        size = np.log1p(np.abs(x) / math.sqrt(there))
        assert np.all(np.abs(result / x - 1) <= 2e-6 + 3e-7 * size / there)

    def test_keeps_small_numbers(self):
        x = np.float32([1e-6, 1e-5, 1e-4, 1e-2, 5])
        np.testing.assert_allclose(power(power(x, 0.3), 1 / 0.3), x, rtol=2e-6)

    @pytest.mark.parametrize("p", [0.3, 1.0, 2.5])
    @pytest.mark.parametrize("x", [-4.0, 1e-3, 1.0, 1e4])
    def test_derivative_with_respect_to_p_is_right(self, p, x):
        p, x = Decimal(float(np.float32(p))), Decimal(float(np.float32(x)))
        step = Decimal("1e-30")
        difference = power_by_hand(p + step)(x) - power_by_hand(p - step)(x)
        result = jax.grad(power, argnums=1)(float(x), float(p))
        expected = float(difference / (2 * step))
        # For small x, terms of its size cancel.
        np.testing.assert_allclose(
            result, expected, rtol=2e-6, atol=5e-7 * abs(float(x))
        )

    def test_p_may_be_traced(self):
        assert jax.jit(power)(4.0, 4.0) == 40

    @pytest.mark.parametrize("p", [0.0, -0.5])
    def test_has_no_value_for_exponents_that_are_not_positive(self, p):
        assert np.isnan(power(2.0, p))


class TestExponential:
    @pytest.mark.parametrize(
        ("fn", "definition"), [(signed_expm1, np.expm1), (hyperbolic_sin, np.sinh)]
    )
    def test_is_accurate_to_three_ulps_next_to_zero(self, fn, definition):
        """Where `jnp.expm1` is off by five."""
        x = np.linspace(1e-3, 1, 100_000, dtype=np.float32)
        exact = definition(x.astype(np.float64))
        errors = np.abs(np.asarray(fn(x), np.float64) - exact)
        assert np.all(errors <= 3 * np.spacing(exact.astype(np.float32)))


class TestOverflow:
    def test_an_exponential_lasts_as_long_as_the_dtype(self):
        x = jnp.array([88.7, 88.75, -88.75], jnp.float32)
        np.testing.assert_array_equal(np.isinf(signed_expm1(x)), [False, True, True])

    def test_a_hyperbolic_sine_lasts_as_long_as_the_dtype(self):
        """Half of an exponential that overflows before."""
        x = jnp.array([89.0, 89.4, 89.45, -89.45], jnp.float32)
        np.testing.assert_allclose(
            hyperbolic_sin(x),
            [math.sinh(89), math.sinh(np.float32(89.4)), np.inf, -np.inf],
            rtol=1e-6,
        )


def test_an_integer_array_is_refused():
    with pytest.raises(TypeError, match="signed_logp1: x must be floating-point"):
        signed_logp1(jnp.arange(3))

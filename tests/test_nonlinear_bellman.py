"""Transformed targets, against recursions written on the scale of rewards."""

import inspect
import pydoc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims
from rlprims import (
    DISCOUNT_TRANSFORM_PAIR,
    HYPERBOLIC_SIN_PAIR,
    IDENTITY_PAIR,
    SIGNED_HYPERBOLIC_PAIR,
    SIGNED_LOGP1_PAIR,
    TxPair,
    transform_values,
)

T, A, N = 5, 3, 2
SQUARE = TxPair(jnp.sqrt, jnp.square)
# Pairs with exact definitions, for the oracles.
PAIRS = {
    "identity": (IDENTITY_PAIR, lambda x: x, lambda x: x),
    "signed_logp1": (
        SIGNED_LOGP1_PAIR,
        lambda x: np.sign(x) * np.log1p(abs(x)),
        lambda x: np.sign(x) * np.expm1(abs(x)),
    ),
    "hyperbolic_sin": (HYPERBOLIC_SIN_PAIR, np.arcsinh, np.sinh),
}
NAMES = {
    "transformed_lambda_returns",
    "transformed_n_step_returns",
    "transformed_general_off_policy_returns_from_action_values",
    "transformed_n_step_q_learning",
    "transformed_q_lambda",
    "transformed_retrace",
}


@pytest.fixture
def inputs(rng):
    """Arguments by name, of a trajectory with an end at step 2."""
    floats = {
        "r_t": rng.normal(size=T),
        "discount_t": np.where(np.arange(T) == 2, 0, rng.uniform(0.2, 1, size=T)),
        "v_t": rng.normal(size=T),
        "q_tm1": rng.normal(size=(T, A)),
        "q_t": rng.normal(size=(T, A)),
        "c_t": rng.uniform(size=T),
        "pi_t": rng.dirichlet(np.ones(A), size=T),
        "mu_t": rng.uniform(0.1, 1, size=T),
    }
    inputs = {k: np.float32(x) for k, x in floats.items()}
    a_tm1 = rng.integers(A, size=T).astype(np.int32)
    inputs |= {"a_tm1": a_tm1, "a_t": (a_tm1 + 1) % A, "target_q_t": inputs["q_t"]}
    return inputs | {"lambda_": 0.6, "n": N}


def call(name, inputs, pair, **given):
    """Calls a function by the names of its parameters, with what else is given."""
    fn = getattr(rlprims, name)
    needed = {
        k
        for k, p in inspect.signature(fn).parameters.items()
        if p.default is p.empty and k != "tx_pair"
    }
    return fn(
        tx_pair=pair, **{k: inputs[k] for k in needed | {"lambda_"} & needed} | given
    )


def expected(name, inputs, h, h_inv):
    """What a function should give, in loops of double precision."""
    x = {k: np.asarray(v, np.float64) for k, v in inputs.items()}
    steps, a_t = range(T), inputs["a_t"]
    r, d, lambda_ = x["r_t"], x["discount_t"], 0.6
    q, best = h_inv(x["q_t"]), h_inv(x["q_t"].max(axis=-1))
    taken = [q[t, a_t[t]] for t in steps]
    match name:
        case "transformed_lambda_returns":
            returns = mixed(r, d, h_inv(x["v_t"]), 1.0)
        case "transformed_q_lambda":
            returns = mixed(r, d, best, lambda_)
        case "transformed_n_step_returns":
            returns = over_n(r, d, h_inv(x["v_t"]))
        case "transformed_n_step_q_learning":
            returns = over_n(r, d, taken)
        case _:
            v = (x["pi_t"] * q).sum(axis=-1)
            ratios = [x["pi_t"][t, a_t[t]] / x["mu_t"][t] for t in steps]
            retrace = [lambda_ * min(1, ratio) for ratio in ratios]
            c = retrace if name == "transformed_retrace" else x["c_t"]
            returns = corrected(r, d, v, taken, c)
    targets = np.array([h(g) for g in returns])
    if name.endswith("returns") or "returns_from" in name:
        return targets
    return targets - x["q_tm1"][steps, inputs["a_tm1"]]


def mixed(r, d, v, lambda_):
    returns, following = [], v[-1]
    for t in reversed(range(T)):
        following = r[t] + d[t] * ((1 - lambda_) * v[t] + lambda_ * following)
        returns.insert(0, following)
    return returns


def over_n(r, d, v):
    returns = []
    for start in range(T):
        stop = min(start + N, T)
        total = v[stop - 1]
        for t in reversed(range(start, stop)):
            total = r[t] + d[t] * total
        returns.append(total)
    return returns


def corrected(r, d, v, taken, c):
    returns, more = [], 0
    for t in reversed(range(T)):
        following = r[t] + d[t] * (v[t] + more)
        more = c[t - 1] * (following - taken[t - 1])
        returns.insert(0, following)
    return returns


of_each = pytest.mark.parametrize("name", sorted(NAMES))


def test_all_of_them_are_here():
    assert {k for k in vars(rlprims) if k.startswith("transformed_")} - NAMES == {
        "transformed_action_values"  # the module
    }


@of_each
class TestEachFunction:
    @pytest.mark.parametrize("pair", PAIRS)
    def test_builds_targets_on_the_scale_of_rewards(self, name, inputs, pair):
        tx_pair, h, h_inv = PAIRS[pair]
        actual = call(name, inputs, tx_pair)
        exact = expected(name, inputs, h, h_inv)
        np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-5)

    def test_shows_its_true_signature(self, name):
        fn = getattr(rlprims, name)
        parameters = list(inspect.signature(fn).parameters)
        returns = "returns" in name
        place = 0 if returns else parameters.index("stop_target_gradients") + 1
        assert parameters[place] == "tx_pair"
        first_line = pydoc.plain(pydoc.render_doc(fn)).splitlines()[2]
        assert first_line.startswith(f"{name}(")
        assert "tx_pair" in first_line

    def test_gradients_flow_only_as_asked(self, name, inputs):
        [target] = {"v_t", "target_q_t"} & {
            *inspect.signature(getattr(rlprims, name)).parameters
        } or {"q_t"}

        def gradient(stop):
            def total(values):
                given = {target: values, "stop_target_gradients": stop}
                return call(name, inputs | given, SIGNED_HYPERBOLIC_PAIR, **given).sum()

            return jax.grad(total)(inputs[target])

        assert not np.any(gradient(True))
        assert np.any(gradient(False))

    @pytest.mark.parametrize("pair", [HYPERBOLIC_SIN_PAIR, DISCOUNT_TRANSFORM_PAIR])
    def test_does_not_see_past_a_termination(self, name, inputs, pair):
        """Where the inverse of what is not seen may be infinite as well."""
        tame = inputs | {k: 0.1 * inputs[k] for k in ("r_t", "v_t", "q_t", "q_tm1")}
        tame["target_q_t"] = tame["q_t"]
        parameters = inspect.signature(getattr(rlprims, name)).parameters
        floats = {k: tame[k] for k in parameters if k in tame and np.ndim(tame[k])}
        floats = {k: x for k, x in floats.items() if x.dtype == np.float32}
        follows = {"v_t", "q_t", "target_q_t"} & floats.keys()

        def early(floats):
            given = {"stop_target_gradients": False}
            return call(name, tame | floats, pair, **given)[:3].sum()

        @jax.jit
        def run(floats):
            along = jax.tree.map(jnp.ones_like, floats)
            slope = jax.jvp(early, (floats,), (along,))[1]
            return *jax.value_and_grad(early)(floats), slope

        expected, _, _ = run(floats)
        for bad in (np.nan, np.inf, -np.inf, 1e6, -1e6):
            spoilt = dict(floats)
            for k in follows:
                spoilt[k] = floats[k].copy()
                spoilt[k][2:] = bad
            value, gradients, slope = run(spoilt)
            assert value == expected
            assert np.isfinite(slope)
            assert all(np.isfinite(x[:3]).all() for x in gradients.values())

    @pytest.mark.parametrize("other", [None, (jnp.sqrt, jnp.square)])
    def test_refuses_what_is_no_pair(self, name, inputs, other):
        with pytest.raises(TypeError, match=f"^{name}: a transform must be a TxPair"):
            call(name, inputs, other)

    def test_refuses_an_array_for_a_pair(self, name, inputs):
        text = f"^{name}: tx_pair must be fixed while tracing, got an array"
        for array in (jnp.ones(T), np.ones(T)):
            with pytest.raises(TypeError, match=text):
                call(name, inputs, array)


class TestWhichAreRulesWithTheIdentity:
    def test_q_lambda(self, inputs):
        rule = {k: inputs[k] for k in ("q_tm1", "a_tm1", "r_t", "discount_t", "q_t")}
        np.testing.assert_allclose(
            rlprims.transformed_q_lambda(**rule, lambda_=0.6),
            rlprims.q_lambda(**rule, lambda_=0.6),
            rtol=1e-6,
        )

    def test_retrace(self, inputs):
        parameters = inspect.signature(rlprims.retrace).parameters
        rule = {k: x for k, x in inputs.items() if k in parameters}
        np.testing.assert_allclose(
            rlprims.transformed_retrace(**rule), rlprims.retrace(**rule), rtol=1e-6
        )


def test_q_lambda_never_bootstraps_from_an_illegal_action(inputs):
    mask = np.arange(A) != inputs["q_t"].argmax(axis=-1)[:, None]
    left = np.where(mask, inputs["q_t"], -np.inf).astype(np.float32)
    spoilt = np.where(mask, inputs["q_t"], np.nan).astype(np.float32)
    pair = SIGNED_HYPERBOLIC_PAIR
    exact = call("transformed_q_lambda", inputs | {"q_t": left}, pair)
    actual = call("transformed_q_lambda", inputs | {"q_t": spoilt}, pair, mask=mask)
    np.testing.assert_array_equal(actual, exact)
    assert np.isfinite(actual).all()


def test_an_action_of_no_probability_may_have_any_value(inputs):
    pi_t = np.float32([[0.5, 0.5, 0.0]] * T)
    a_t, a_tm1 = np.zeros((2, T), np.int32)
    given = inputs | {"pi_t": pi_t, "a_t": a_t, "a_tm1": a_tm1}

    def total(q_t):
        given["q_t"] = q_t
        kwargs = {"stop_target_gradients": False}
        return call(
            "transformed_retrace", given, SIGNED_HYPERBOLIC_PAIR, **kwargs
        ).sum()

    spoilt = inputs["q_t"].copy()
    spoilt[:, 2] = -np.inf
    value, gradient = jax.value_and_grad(total)(spoilt)
    assert value == total(inputs["q_t"])
    assert np.isfinite(gradient).all()


def test_a_target_that_is_not_finite_passes_no_gradient():
    def first(v_t):
        return rlprims.transformed_lambda_returns(
            HYPERBOLIC_SIN_PAIR, jnp.array([1.0, jnp.nan]), jnp.array([0.0, 1.0]), v_t
        )[0]

    assert jax.grad(first)(jnp.ones(2)).tolist() == [0, 0]


def test_a_value_that_lambda_leaves_out_may_be_anything():
    v_t = jnp.array([jnp.nan, 4.0])
    fn = lambda v_t: rlprims.transformed_lambda_returns(
        SQUARE, jnp.zeros(2), jnp.ones(2), v_t
    )
    assert fn(v_t).tolist() == [4, 4]
    assert jax.grad(lambda v_t: fn(v_t).sum())(v_t).tolist() == [0, 2]


@pytest.mark.parametrize("encode", [rlprims.twohot_pair, rlprims.muzero_pair])
class TestCodes:
    def make(self, encode):
        more = [SIGNED_HYPERBOLIC_PAIR] if encode is rlprims.muzero_pair else []
        return encode(-4.0, 4.0, 9, *more)

    @pytest.mark.parametrize("name", ["lambda", "n_step"])
    def test_of_values_have_codes_of_targets(self, inputs, encode, name):
        pair, name = self.make(encode), f"transformed_{name}_returns"
        coded = inputs | {"v_t": pair.apply(inputs["v_t"])}
        plain = call(name, inputs, IDENTITY_PAIR)
        actual = call(name, coded, pair)
        np.testing.assert_allclose(actual, pair.apply(plain), atol=1e-5)
        mask_t = np.arange(T) > 0
        assert not call(name, coded, pair, mask_t=mask_t)[0].any()

    def test_of_action_values_too(self, inputs, encode):
        pair = self.make(encode)
        name = "transformed_general_off_policy_returns_from_action_values"
        coded = inputs | {"q_t": pair.apply(inputs["q_t"])}
        plain = call(name, inputs, IDENTITY_PAIR)
        actual = call(name, coded, pair)
        np.testing.assert_allclose(actual, pair.apply(plain), atol=1e-5)

    def test_are_refused_by_a_pair_that_makes_none(self, inputs, encode):
        coded = inputs | {"v_t": self.make(encode).apply(inputs["v_t"])}
        text = r"v_t has shape \(5, 9\), expected f\[T\]\|f\[T,K\] as tx_pair has it"
        text += r".* \(5, 9\) of this\. For a batch, use jax\.vmap\.$"
        with pytest.raises(ValueError, match=f"^transformed_lambda_returns: {text}"):
            call("transformed_lambda_returns", coded, SIGNED_HYPERBOLIC_PAIR)

    def test_behind_a_termination_may_be_anything(self, inputs, encode):
        pair = self.make(encode)
        codes = np.array(pair.apply(inputs["v_t"]))
        spoilt = codes.copy()
        spoilt[2] = np.nan

        def early(v_t):
            given = inputs | {"v_t": v_t}
            return call("transformed_lambda_returns", given, pair)[:3, :4].sum()

        value, gradient = jax.value_and_grad(early)(spoilt)
        assert value == early(codes)
        assert np.isfinite(gradient).all()


class TestTransformValues:
    def test_transforms_the_arguments_named_and_the_result(self):
        fn = transform_values(lambda a, b, c: a + 2 * b + c, 0, -1)
        assert fn(SQUARE, 2.0, 4.0, 2.0) == 4  # the root of 4 + 8 + 4
        assert fn(SQUARE, 2.0, c=2.0, b=4.0) == 4
        assert fn(tx_pair=SQUARE, a=2.0, b=4.0, c=2.0) == 4

    def test_leaves_defaults_and_none_alone(self):
        fn = transform_values(lambda a, b=9.0: a if b is None else a + b, 0, 1)
        assert fn(SQUARE, 4.0) == 5
        assert fn(SQUARE, 4.0, 3.0) == 5
        assert fn(SQUARE, 4.0, None) == 4

    def test_has_the_signature_of_what_it_transforms(self):
        fn = transform_values(rlprims.td_learning, 0, 3)
        before = list(inspect.signature(rlprims.td_learning).parameters)
        assert list(inspect.signature(fn).parameters) == ["tx_pair", *before]
        assert fn.__name__ == "transformed_td_learning"
        only = transform_values(lambda x, /, y: x + y, 0)
        assert str(inspect.signature(only)).startswith("(tx_pair: ")
        assert only(SQUARE, 3.0, y=7.0) == 4

    def test_works_for_any_estimator(self, inputs):
        """Sarsa(λ) in another way than by functions that are here."""
        x = {k: inputs[k] for k in ("r_t", "discount_t", "v_t")}
        fn = transform_values(rlprims.discounted_returns, 2)
        np.testing.assert_allclose(
            fn(HYPERBOLIC_SIN_PAIR, **x),
            rlprims.transformed_lambda_returns(HYPERBOLIC_SIN_PAIR, **x),
            rtol=1e-6,
        )

    def test_gives_zero_where_a_mask_leaves_steps_out(self):
        fn = transform_values(rlprims.lambda_returns, 2)
        shift = TxPair(lambda x: x + 1, lambda x: x - 1)
        x, mask_t = jnp.array([1.0, jnp.nan]), jnp.array([True, False])
        assert fn(shift, x, x, x, mask_t=mask_t).tolist() == [2, 0]

    @pytest.mark.parametrize("position", [2, -3])
    def test_refuses_a_position_without_an_argument(self, position):
        text = "transform_values: value_argnums must be positions of arguments of "
        with pytest.raises(ValueError, match=f"{text}.*by position, got {position}"):
            transform_values(lambda a, b, *, c=0: a + b + c, position)

    def test_names_itself_in_errors(self):
        fn = transform_values(rlprims.td_learning, 0)
        with pytest.raises(TypeError, match=r"^transformed_td_learning: missing a req"):
            fn(SQUARE, 1.0)
        with pytest.raises(TypeError, match=r"^transformed_td_learning: a transform"):
            fn(1.0, 1.0, 1.0, 1.0)


def test_the_order_of_arguments_is_that_of_rlax():
    common, n_or_lambda = ["r_t", "discount_t"], ["n", "lambda_t"]
    first, last = ["tx_pair"], ["stop_target_gradients"]
    q = ["q_tm1", "q_t", "a_tm1", "a_t"]
    orders = {
        "transformed_lambda_returns": [*first, *common, "v_t", "lambda_", *last],
        "transformed_n_step_returns": [*first, *common, "v_t", *n_or_lambda, *last],
        "transformed_general_off_policy_returns_from_action_values": [
            *(*first, "q_t", "a_t", *common, "c_t", "pi_t", *last)
        ],
        "transformed_n_step_q_learning": [
            *("q_tm1", "a_tm1", "target_q_t", "a_t", *common, "n", *last, *first)
        ],
        "transformed_q_lambda": [
            *("q_tm1", "a_tm1", *common, "q_t", "lambda_", *last, *first)
        ],
        "transformed_retrace": [
            *(*q, *common, "pi_t", "mu_t", "lambda_", "eps", *last, *first)
        ],
    }
    for name in NAMES:
        parameters = inspect.signature(getattr(rlprims, name)).parameters.values()
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        assert positional == orders[name]

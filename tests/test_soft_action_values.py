"""Soft action values, against plain-Python readings of the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims
from rlprims import mellowmax

pytestmark = pytest.mark.usefixtures("quick_to_compile")

INF, NAN = math.inf, math.nan
ACTIONS = 4


def log_mean_exp(values, omega):
    if omega == 0:
        return sum(values) / len(values)
    mean = math.fsum(math.exp(omega * x) for x in values) / len(values)
    return math.log(mean) / omega


def soft_maximum(values, temperature):
    best = max(values)
    total = math.fsum(math.exp((x - best) / temperature) for x in values)
    return best + temperature * math.log(total)


def policy(values, temperature):
    best = max(values)
    weights = [math.exp((x - best) / temperature) for x in values]
    return [w / math.fsum(weights) for w in weights]


def mellow(values, omega, mask=None):
    return mellowmax(values, omega=omega, mask=mask)


compiled_mellow = jax.jit(mellow)


class TestMellowmax:
    @pytest.fixture
    def values(self, rng):
        return rng.normal(size=ACTIONS).astype(np.float32)

    def test_agrees_with_the_paper(self, values):
        omegas = np.float32([-20, -1, -1e-3, -1e-6, 0, 1e-6, 1e-3, 0.3, 1, 20])
        expected = [log_mean_exp(values.tolist(), float(w)) for w in omegas]
        expected[3] = expected[5] = values.mean()  # `log` of 1 + 1e-6 loses digits
        result = compiled_mellow(np.tile(values, (10, 1)), omegas)
        np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("best", [0, 10000])
    def test_keeps_its_digits_from_the_mean_to_the_maximum(self, best):
        """Of 1000 values: neither where exponentials are nearly 1, nor nearly 0."""
        values = best - np.float32([0, *[1] * 999])
        for omega in np.float32([1e-30, 1e-4, 0.01, 1, 30, 1e6]):
            mean = np.expm1((values.astype(float) - best) * omega).mean()
            expected = best + math.log1p(mean) / omega
            np.testing.assert_allclose(mellow(values, omega), expected, rtol=1e-6)

    def test_goes_from_the_minimum_over_the_mean_to_the_maximum(self, values):
        omegas = np.float32([-1e30, 0, 1e30])
        expected = [values.min(), values.mean(), values.max()]
        result = compiled_mellow(np.tile(values, (3, 1)), omegas)
        np.testing.assert_allclose(result, expected, rtol=1e-6)

    def test_does_not_expand(self, rng):
        """The largest change of a value bounds that of the result."""
        x, y = rng.normal(size=(2, 50, ACTIONS)).astype(np.float32)
        omega = np.full(50, 5, np.float32)
        moved = compiled_mellow(x, omega) - compiled_mellow(y, omega)
        assert (np.abs(moved) <= np.abs(x - y).max(axis=-1) + 1e-6).all()

    @pytest.mark.parametrize("omega", [-3.0, 0.0, 1e-5, 2.0])
    def test_has_the_derivatives_of_a_log_mean_exponential(self, values, omega):
        """A softmax by the values; at 0 by omega, half the variance."""
        by_values, by_omega = jax.grad(mellow, (0, 1))(values, omega)
        expected = policy((values * omega).tolist(), 1.0)
        np.testing.assert_allclose(by_values, expected, rtol=1e-5)
        if omega in {0.0, 1e-5}:
            np.testing.assert_allclose(by_omega, values.var() / 2, rtol=1e-4)
        else:
            h = 1e-5
            up, down = (log_mean_exp(values.tolist(), omega + s) for s in (h, -h))
            np.testing.assert_allclose(by_omega, (up - down) / (2 * h), rtol=1e-4)

    @pytest.mark.parametrize("omega", [-2.0, 0.0, 3.0])
    def test_is_that_of_legal_values_alone(self, values, omega):
        mask = np.array([True, False, True, False])
        expected = mellow(values[mask], omega)
        for bad in [NAN, INF, -INF, 1e9]:
            spoilt = np.where(mask, values, np.float32(bad))
            value, slope = jax.value_and_grad(mellow)(spoilt, omega, mask)
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            assert np.isfinite(slope).all()
            assert not slope[~mask].any()
        hidden = np.where(mask, values, -INF).astype(np.float32)
        np.testing.assert_allclose(mellow(hidden, omega), expected, rtol=1e-6)

    def test_of_nothing_legal_is_minus_infinity_without_a_gradient(self, values):
        none = np.zeros(ACTIONS, bool)
        grads = jax.value_and_grad(mellow, (0, 1))(values, 2.0, none)
        assert grads[0] == -INF
        assert not any(np.any(x) for x in grads[1])

    def test_values_may_be_as_far_apart_as_numbers_go(self):
        values = jnp.array([2.0, -3e38, 2.0])
        value, slope = jax.value_and_grad(mellow)(values, 1.0)
        np.testing.assert_allclose(value, 2 + math.log(2 / 3), rtol=1e-6)
        np.testing.assert_allclose(slope, [0.5, 0, 0.5], rtol=1e-6)

    def test_of_one_value_is_that_value(self):
        assert mellow(jnp.array([3.5]), 7.0) == 3.5

    def test_infinite_omega_is_refused(self, values):
        match = r"^mellowmax: omega must be in \(-inf, inf\), got inf\.$"
        with pytest.raises(ValueError, match=match):
            mellow(values, INF)


@pytest.fixture
def transition(rng):
    names = ["q_tm1", "target_q_tm1", "target_q_t"]
    q = dict(zip(names, rng.normal(size=(3, ACTIONS)).astype(np.float32), strict=True))
    return q | {
        "a_tm1": np.int32(2),
        "r_t": np.float32(0.7),
        "discount_t": np.float32(0.9),
        "mask": None,
        "mask_tm1": None,
    }


def soft(x, stop=True, **settings):
    return rlprims.soft_q_learning(
        *(x[k] for k in ("q_tm1", "a_tm1", "r_t", "discount_t", "target_q_t")),
        **{"temperature": 0.5} | settings,
        mask=x["mask"],
        stop_target_gradients=stop,
    )


def with_targets(fn, **defaults):
    def call(x, stop=True, **settings):
        names = "q_tm1", "a_tm1", "r_t", "discount_t", "target_q_tm1", "target_q_t"
        return fn(
            *(x[k] for k in names),
            **defaults | settings,
            mask=x["mask"],
            mask_tm1=x["mask_tm1"],
            stop_target_gradients=stop,
        )

    return call


munchausen = with_targets(rlprims.munchausen_q_learning, temperature=0.5)
gap = with_targets(rlprims.advantage_learning, action_gap_scale=0.4)
RULES = {"soft": soft, "munchausen": munchausen, "advantage": gap}
FLOATS = ["q_tm1", "target_q_tm1", "target_q_t", "discount_t"]


def expected_error(name, x, temperature=0.5, weight=0.9, floor=-1.0, scale=0.4):
    q_tm1, q_bar, q_t = (
        [float(q) for q in x[k]] for k in ("q_tm1", "target_q_tm1", "target_q_t")
    )
    a, added = int(x["a_tm1"]), 0.0
    if name == "soft":
        value = soft_maximum(q_t, temperature)
    elif name == "munchausen":
        log_pi = temperature * math.log(policy(q_bar, temperature)[a])
        added = weight * min(max(log_pi, floor), 0)
        pi = policy(q_t, temperature)
        each = zip(pi, q_t, strict=True)
        value = sum(p * (q - temperature * math.log(p)) for p, q in each)
    else:
        value, added = max(q_t), -scale * (max(q_bar) - q_bar[a])
    return float(x["r_t"]) + added + float(x["discount_t"]) * value - q_tm1[a]


def gradients(rule, x, stop=False):
    fn = lambda floats: rule(x | floats, stop)
    return jax.grad(fn)({k: x[k] for k in FLOATS})


@pytest.fixture(params=RULES)
def name(request):
    return request.param


@pytest.fixture
def rule(name):
    return RULES[name]


class TestEveryRule:
    @pytest.mark.parametrize("action", range(ACTIONS))
    def test_agrees_with_the_paper(self, name, rule, transition, action):
        x = transition | {"a_tm1": np.int32(action)}
        np.testing.assert_allclose(rule(x), expected_error(name, x), rtol=1e-5)

    def test_moves_the_prediction_alone_unless_told(self, name, rule, transition):
        x = transition | {"target_q_tm1": np.float32([0.3, 0.1, 0.2, 0])}
        x |= {"a_tm1": np.int32(1)}  # not the best
        held = gradients(rule, x, stop=True)
        assert held["q_tm1"].tolist() == [0, -1, 0, 0]
        assert not any(np.any(held[k]) for k in FLOATS[1:])
        flows = gradients(rule, x)
        np.testing.assert_allclose(flows["target_q_t"].sum(), 0.9, rtol=1e-5)
        assert np.any(flows["target_q_tm1"]) == (name != "soft")

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_a_terminal_state_may_hold_anything(self, rule, transition, bad):
        over = transition | {"discount_t": np.float32(0)}
        expected = rule(over)
        over |= {"target_q_t": np.full(ACTIONS, bad, np.float32)}
        assert rule(over) == expected
        assert all(np.isfinite(x).all() for x in gradients(rule, over).values())
        none = over | {"mask": np.zeros(ACTIONS, bool)}
        assert rule(none) == expected
        assert all(np.isfinite(x).all() for x in gradients(rule, none).values())

    @pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e9])
    def test_is_that_of_legal_actions_alone(self, name, rule, transition, bad):
        mask = np.array([True, False, True, True])
        short = {
            k: x[mask] if np.shape(x) == (ACTIONS,) else x
            for k, x in transition.items()
        }
        expected = expected_error(name, short | {"a_tm1": np.int32(1)})
        x = transition | {"mask": mask, "mask_tm1": mask}
        for k in ("target_q_tm1", "target_q_t"):
            x[k] = np.where(mask, x[k], np.float32(bad))
        np.testing.assert_allclose(rule(x), expected, rtol=1e-5)
        assert all(np.isfinite(x).all() for x in gradients(rule, x).values())

    def test_minus_infinity_means_the_same(self, rule, transition):
        mask = np.array([True, False, True, True])
        masked = transition | {"mask": mask, "mask_tm1": mask}
        hidden = transition | {
            k: np.where(mask, transition[k], -INF).astype(np.float32)
            for k in ("target_q_tm1", "target_q_t")
        }
        assert rule(hidden) == rule(masked)
        assert all(np.isfinite(x).all() for x in gradients(rule, hidden).values())

    def test_nan_of_a_legal_action_shows(self, rule, transition):
        x = transition | {"target_q_t": np.float32([0, NAN, 0, 0])}
        assert np.isnan(rule(x))

    @pytest.mark.parametrize("index", [-1, ACTIONS])
    def test_an_action_out_of_range_is_nan(self, rule, transition, index):
        assert np.isnan(rule(transition | {"a_tm1": np.int32(index)}))

    def test_one_action_has_neither_entropy_nor_a_gap(self, rule, transition):
        x = {k: x[:1] if np.shape(x) else x for k, x in transition.items()}
        x |= {"a_tm1": np.int32(0)}
        expected = 0.7 + 0.9 * x["target_q_t"][0] - x["q_tm1"][0]
        np.testing.assert_allclose(rule(x), expected, rtol=1e-5)


class TestSoftMaximum:
    def test_is_the_maximum_when_cold(self, transition):
        x = transition
        expected = rlprims.q_learning(
            x["q_tm1"], x["a_tm1"], x["r_t"], x["discount_t"], x["target_q_t"]
        )
        np.testing.assert_allclose(soft(x, temperature=1e-6), expected, atol=2e-6)

    def test_lies_above_it_by_entropy_when_hot(self, transition):
        x = transition | {"target_q_t": np.zeros(ACTIONS, np.float32)}
        expected = 0.7 + 0.9 * 100 * math.log(ACTIONS) - x["q_tm1"][2]
        np.testing.assert_allclose(soft(x, temperature=100.0), expected, rtol=1e-6)

    def test_does_not_overflow(self, transition):
        x = transition | {"target_q_t": np.float32([1e4, -1e4, 0, 1e4])}
        expected = 0.7 + 0.9 * (1e4 + 0.1 * math.log(2)) - x["q_tm1"][2]
        np.testing.assert_allclose(soft(x, temperature=0.1), expected, rtol=1e-6)
        grads = gradients(soft, x)["target_q_t"]
        np.testing.assert_allclose(grads, [0.45, 0, 0, 0.45], rtol=1e-5)

    def test_no_temperature_is_refused(self, transition):
        match = r"^soft_q_learning: temperature must be in \(0, inf\), got 0\.0\.$"
        with pytest.raises(ValueError, match=match):
            soft(transition, temperature=0.0)


class TestMunchausen:
    def test_has_the_defaults_of_the_paper(self, transition):
        x = transition | {"target_q_tm1": np.float32([0, 0.01, -0.01, 0.02])}
        names = "q_tm1", "a_tm1", "r_t", "discount_t", "target_q_tm1", "target_q_t"
        result = rlprims.munchausen_q_learning(*(x[k] for k in names))
        expected = expected_error("munchausen", x, 0.03, 0.9, -1.0)
        np.testing.assert_allclose(result, expected, rtol=1e-5)

    def test_limits_what_an_unlikely_action_costs(self, transition):
        x = transition | {"target_q_tm1": np.float32([1e4, 0, 0, 0])}
        plain = munchausen(x, munchausen_weight=0.0)
        for floor in (-1.0, -3.0):
            cost = munchausen(x, min_log_policy=floor) - plain
            np.testing.assert_allclose(cost, 0.9 * floor, rtol=1e-5)

    def test_without_weight_is_soft_q_learning(self, transition):
        spoilt = transition | {"target_q_tm1": np.full(ACTIONS, NAN, np.float32)}
        assert munchausen(spoilt, munchausen_weight=0.0) == soft(transition)

    def test_an_illegal_action_taken_is_nan(self, transition):
        x = transition | {"mask_tm1": np.array([True, True, False, True])}
        assert np.isnan(munchausen(x))

    def test_a_positive_floor_is_refused(self, transition):
        match = r"^munchausen_q_learning: min_log_policy must be in \[-inf, 0\]"
        with pytest.raises(ValueError, match=match):
            munchausen(transition, min_log_policy=1.0)


class TestAdvantageLearning:
    def test_leaves_the_best_action_as_it_is(self, transition):
        x = transition | {"target_q_tm1": np.float32([0, 1, 2, -1])}
        assert gap(x) == gap(x, action_gap_scale=0.0)

    def test_without_scale_is_q_learning(self, transition):
        x = transition | {"target_q_tm1": np.full(ACTIONS, NAN, np.float32)}
        expected = rlprims.q_learning(
            x["q_tm1"], x["a_tm1"], x["r_t"], x["discount_t"], x["target_q_t"]
        )
        assert gap(x, action_gap_scale=0.0) == expected

    def test_a_scale_of_one_is_refused(self, transition):
        match = (
            r"^advantage_learning: action_gap_scale must be in \[0, 1\), got 1\.0\.$"
        )
        with pytest.raises(ValueError, match=match):
            gap(transition, action_gap_scale=1.0)

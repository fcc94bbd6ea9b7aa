"""Distortions of risk, against the formulas in double precision."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import cpw_distortion, cvar_distortion, power_distortion, wang_distortion

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NORMAL = NormalDist()


def cpw(tau, eta):
    return tau**eta / (tau**eta + (1 - tau) ** eta) ** (1 / eta)


def power(tau, eta):
    exponent = 1 / (1 + abs(eta))
    return tau**exponent if eta >= 0 else 1 - (1 - tau) ** exponent


DISTORTIONS = {
    "cvar": (cvar_distortion, lambda t, eta: eta * t, [0.01, 0.25, 1.0]),
    "wang": (
        wang_distortion,
        lambda t, eta: NORMAL.cdf(NORMAL.inv_cdf(t) + eta),
        [-0.75, 0.0, 0.75, 3.0],
    ),
    "cpw": (cpw_distortion, cpw, [0.3, 0.71, 1.0, 2.0]),
    "power": (power_distortion, power, [-2.0, -0.5, 0.0, 1.0, 5.0]),
}
NEUTRAL = {"cvar": 1.0, "wang": 0.0, "cpw": 1.0, "power": 0.0}


@pytest.mark.parametrize("name", DISTORTIONS)
class TestDistortions:
    def test_agree_with_the_paper(self, name, rng):
        fn, oracle, parameters = DISTORTIONS[name]
        tau = np.float32([*rng.uniform(size=20), 1e-6, 1e-3, 1 - 2**-10, 1 - 2**-23])
        eta = np.repeat(np.float32(parameters), len(tau)).reshape(len(parameters), -1)
        tau = np.broadcast_to(tau, eta.shape)
        result = fn(tau, risk_parameter=eta)
        expected = np.vectorize(oracle)(tau.astype(float), eta.astype(float))
        np.testing.assert_allclose(result, expected, rtol=5e-6)
        one = fn(tau[0], risk_parameter=parameters[0])
        np.testing.assert_allclose(one, expected[0], rtol=5e-6)

    def test_keep_the_ends_with_finite_gradients(self, name):
        fn, _, parameters = DISTORTIONS[name]
        ends, tiny = np.float32([0, 1]), np.float32([1e-37, 1 - 2**-24])
        for eta in parameters:
            top = eta if name == "cvar" else 1
            assert fn(ends, risk_parameter=eta).tolist() == [0, np.float32(top)]
            total = lambda tau, eta: fn(tau, risk_parameter=eta).sum()
            for tau in (ends, tiny):
                grads = jax.grad(total, (0, 1))(tau, eta)
                assert all(np.isfinite(x).all() for x in grads)
            slope = eta if name == "cvar" else 0
            np.testing.assert_array_equal(jax.grad(total)(ends, eta), np.float32(slope))

    def test_do_nothing_where_neutral(self, name, rng):
        fn, tau = DISTORTIONS[name][0], rng.uniform(size=20).astype(np.float32)
        result = fn(tau, risk_parameter=NEUTRAL[name])
        np.testing.assert_allclose(result, tau, rtol=3e-6)

    def test_keep_the_order_within_the_interval(self, name):
        fn, _, parameters = DISTORTIONS[name]
        tau = np.linspace(0, 1, 101, dtype=np.float32)
        for eta in parameters:
            levels = np.asarray(fn(tau, risk_parameter=eta))
            assert ((levels >= 0) & (levels <= 1)).all()
            assert (np.diff(levels) >= -1e-6).all()

    def test_nan_and_what_is_no_level_show(self, name):
        fn = DISTORTIONS[name][0]
        result = fn(jnp.array([math.nan, -0.1, 1.1]), risk_parameter=0.5)
        assert np.isnan(result).all()


def test_risk_averse_levels_are_lower_and_those_that_seek_it_higher():
    tau = jnp.linspace(0.05, 0.95, 19)
    for fn in (wang_distortion, power_distortion):
        assert (fn(tau, risk_parameter=-0.5) < tau).all()
        assert (fn(tau, risk_parameter=0.5) > tau).all()
    assert (cvar_distortion(tau, risk_parameter=0.5) < tau).all()


def test_distortions_mirror_each_other_as_the_paper_says():
    tau = jnp.linspace(0.0, 1.0, 9)
    for fn in (wang_distortion, power_distortion):
        mirrored = 1 - fn(1 - tau, risk_parameter=-0.7)
        np.testing.assert_allclose(fn(tau, risk_parameter=0.7), mirrored, atol=1e-6)


def test_conditional_value_at_risk_is_the_mean_of_the_worst():
    """Of outcomes 0..9, all equally likely."""
    tau = (jnp.arange(1000.0) + 0.5) / 1000
    levels = cvar_distortion(tau, risk_parameter=0.3)
    outcomes = jnp.floor(10 * levels)
    np.testing.assert_allclose(outcomes.mean(), (0 + 1 + 2) / 3, atol=0.01)


def test_people_weigh_as_was_measured_by_default():
    np.testing.assert_allclose(cpw_distortion(0.3), cpw(0.3, 0.71), rtol=1e-6)


def test_a_share_of_nothing_is_refused():
    match = r"^cvar_distortion: risk_parameter must be in \(0, 1\], got 0\.0\.$"
    with pytest.raises(ValueError, match=match):
        cvar_distortion(0.5, risk_parameter=0.0)

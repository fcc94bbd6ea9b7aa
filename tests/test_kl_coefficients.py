"""Weights of penalties, against the rules of the papers, one number at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.kl_coefficients import (
    adaptive_kl_coefficient,
    proportional_kl_coefficient,
)

BOTH = [adaptive_kl_coefficient, proportional_kl_coefficient]


def adaptive_by_hand(beta, kl, target, tolerance=1.5, factor=2.0):
    if kl < target / tolerance:
        return beta / factor
    if kl > target * tolerance:
        return beta * factor
    return beta


def proportional_by_hand(beta, kl, target, gain=0.1, limit=0.2):
    error = max(-limit, min(limit, (kl - target) / target))
    return beta * (1 + gain * error)


def each(by_hand, *arrays):
    return [by_hand(*numbers) for numbers in zip(*arrays, strict=True)]


@pytest.mark.parametrize(
    ("fn", "by_hand", "settings"),
    [
        (adaptive_kl_coefficient, adaptive_by_hand, {}),
        (adaptive_kl_coefficient, adaptive_by_hand, {"tolerance": 3, "factor": 1.5}),
        (proportional_kl_coefficient, proportional_by_hand, {}),
        (proportional_kl_coefficient, proportional_by_hand, {"gain": 0.5}),
    ],
)
def test_agree_with_the_definition(rng, fn, by_hand, settings):
    beta, kl, target = rng.uniform(0.01, 4, size=(3, 200)).astype(np.float32)
    expected = each(lambda *xs: by_hand(*xs, **settings), beta, kl, target)
    result = fn(beta, kl, target_kl=target, **settings)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_the_limit_of_the_error_is_that_of_its_size():
    result = proportional_kl_coefficient(
        jnp.full(3, 8.0),
        jnp.array([0.0, 1.25, 9.0]),
        target_kl=1,
        gain=1,
        error_limit=0.5,
    )
    assert result.tolist() == [4, 10, 12]


def test_a_divergence_at_the_edge_changes_nothing():
    kl = jnp.array([0.5, 2.0])
    result = adaptive_kl_coefficient(jnp.full(2, 8.0), kl, target_kl=1.0, tolerance=2.0)
    assert result.tolist() == [8, 8]


@pytest.mark.parametrize("fn", BOTH)
def test_an_estimate_may_be_negative_or_infinite(fn):
    low, high = fn(jnp.ones(2), jnp.array([-1.0, jnp.inf]), target_kl=1.0).tolist()
    assert 0 < low < 1 < high < 3


@pytest.mark.parametrize("fn", BOTH)
def test_a_divergence_that_is_not_a_number_is_not_hidden(fn):
    assert np.isnan(fn(1.0, jnp.float32(jnp.nan), target_kl=1.0))


@pytest.mark.parametrize("fn", BOTH)
def test_a_target_must_be_positive(fn):
    message = rf"{fn.__name__}: target_kl must be in \(0, inf\), got 0"
    with pytest.raises(ValueError, match=message):
        fn(1.0, 1.0, target_kl=0)


def test_the_divergence_comes_back_to_its_target():
    """If a larger weight makes it smaller."""
    for fn in BOTH:
        beta = jnp.float32(64.0)
        for _ in range(400):
            beta = fn(beta, 0.1 / beta, target_kl=0.1)
        assert 0.6 < beta < 1.6

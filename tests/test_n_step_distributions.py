"""Multistep targets of distributions, against walks along the trajectory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims
from rlprims import categorical_n_step_targets, quantile_n_step_targets

pytestmark = pytest.mark.usefixtures("quick_to_compile")

STEPS, ATOMS = 7, 4
GRID = np.linspace(-4, 4, 9, dtype=np.float32)
NEXT_ATOMS = np.float32([-2, 0.3, 1, 5])


@pytest.fixture
def trajectory(rng):
    return {
        "r_t": rng.uniform(-1, 1, STEPS).astype(np.float32),
        "discount_t": np.float32([0.9, 0.8, 1, 0.5, 0, 0.9, 0.7]),
        "dist_t": rng.normal(size=(STEPS, ATOMS)).astype(np.float32),
    }


def walk(x, start, n, truncated=(), left_out=()):
    """Returns rewards, discount and step to bootstrap from, or `None` if left out."""
    if start in left_out:
        return None
    total, discount, last, count = 0.0, 1.0, start, 0
    for t in range(start, STEPS):
        if t in left_out:
            if t in truncated:
                break
            continue
        total += discount * float(x["r_t"][t])
        discount *= float(x["discount_t"][t])
        last, count = t, count + 1
        if count == n or t in truncated:
            break
    return total, discount, last


def softmax(logits):
    weights = np.exp(np.asarray(logits, float))
    return weights / weights.sum()


@functools.partial(jax.jit, static_argnames=("n", "stop"))
def categorical(x, n, stop=True, **cuts):
    return categorical_n_step_targets(
        GRID,
        x["r_t"],
        x["discount_t"],
        NEXT_ATOMS,
        x["dist_t"],
        n,
        **cuts,
        stop_target_gradients=stop,
    )


@functools.partial(jax.jit, static_argnames=("n", "stop"))
def quantile(x, n, stop=True, **cuts):
    return quantile_n_step_targets(
        *(x[k] for k in ("r_t", "discount_t", "dist_t")),
        n,
        **cuts,
        stop_target_gradients=stop,
    )


def expected_categorical(x, walked):
    if walked is None:
        return np.zeros(len(GRID))
    total, discount, last = walked
    atoms = np.float32(total + discount * NEXT_ATOMS)
    probs = softmax(x["dist_t"][last]).astype(np.float32)
    return rlprims.categorical_l2_project(atoms, probs, GRID)


def expected_quantile(x, walked):
    if walked is None:
        return np.zeros(ATOMS)
    total, discount, last = walked
    return total + discount * x["dist_t"][last].astype(float)


TARGETS = {categorical: expected_categorical, quantile: expected_quantile}


def assert_agrees(fn, x, n, truncated=(), left_out=(), **cuts):
    result = np.asarray(fn(x, n, **cuts))
    for start in range(STEPS):
        expected = TARGETS[fn](x, walk(x, start, n, truncated, left_out))
        np.testing.assert_allclose(result[start], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("fn", TARGETS)
class TestBoth:
    @pytest.mark.parametrize("n", [1, 2, 3, 100])
    def test_bootstrap_after_as_many_rewards(self, fn, trajectory, n):
        assert_agrees(fn, trajectory, n)

    def test_bootstrap_where_a_time_limit_cut(self, fn, trajectory):
        cut = np.isin(np.arange(STEPS), [1, 5])
        assert_agrees(fn, trajectory, 3, truncated=[1, 5], truncation_t=cut)

    def test_pass_over_what_is_left_out(self, fn, trajectory):
        kept = ~np.isin(np.arange(STEPS), [0, 2, 6])
        x = {k: v.copy() for k, v in trajectory.items()}
        for array in x.values():
            array[~kept] = np.nan
        assert_agrees(fn, x, 2, left_out=[0, 2, 6], mask_t=kept)
        assert_agrees(fn, x, 100, left_out=[0, 2, 6], mask_t=kept)
        grads = jax.grad(lambda x: (fn(x, 2, stop=False, mask_t=kept) ** 2).sum())(x)
        for slope in grads.values():
            assert np.isfinite(slope).all()
            assert not slope[~kept].any()

    def test_know_nothing_of_what_follows_a_termination(self, fn, trajectory):
        expected = fn(trajectory, 3)[:5]
        x = {k: v.copy() for k, v in trajectory.items()}
        x["dist_t"][4:], x["r_t"][5:] = np.nan, np.nan
        total = lambda x: (fn(x, 3, stop=False)[:5] ** 2).sum()
        np.testing.assert_allclose(fn(x, 3)[:5], expected, rtol=1e-6)
        grads = jax.grad(total)(x)
        assert all(np.isfinite(slope[:5]).all() for slope in grads.values())
        assert not grads["dist_t"][4].any()

    def test_take_a_traced_number_of_steps(self, fn, trajectory):
        result = jax.jit(lambda n: fn.__wrapped__(trajectory, n))(jnp.int32(3))
        np.testing.assert_allclose(result, fn(trajectory, 3), rtol=1e-6, atol=1e-7)

    def test_are_constants_unless_told(self, fn, trajectory):
        total = lambda x, stop: (fn(x, 2, stop=stop) ** 2).sum()
        held, flows = (jax.grad(total)(trajectory, stop) for stop in (True, False))
        assert not any(np.any(x) for x in held.values())
        assert all(np.any(x) for x in flows.values())


def test_categorical_targets_have_the_mean_of_n_step_returns(trajectory):
    wide = np.linspace(-20, 20, 30, dtype=np.float32)  # no atom leaves the range
    r_t, discount_t, logits_t = trajectory.values()
    v_t = np.array([softmax(x) @ NEXT_ATOMS for x in logits_t], np.float32)
    returns = rlprims.n_step_bootstrapped_returns(r_t, discount_t, v_t, 3)
    targets = categorical_n_step_targets(wide, r_t, discount_t, NEXT_ATOMS, logits_t, 3)
    np.testing.assert_allclose(targets @ wide, returns, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(targets.sum(axis=-1), 1, rtol=1e-6)


def test_one_step_targets_are_those_of_categorical_learning(trajectory):
    """Whose loss is the cross-entropy from them."""
    r_t, discount_t, logits_t = trajectory.values()
    logits = np.float32(np.cos(np.arange(9)))
    targets = categorical_n_step_targets(GRID, r_t, discount_t, NEXT_ATOMS, logits_t, 1)
    for t in range(STEPS):
        expected = rlprims.categorical_td_learning(
            GRID, logits, r_t[t], discount_t[t], NEXT_ATOMS, logits_t[t]
        )
        loss = rlprims.categorical_cross_entropy(targets[t], logits)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_no_rewards_are_refused(trajectory):
    match = r"_n_step_targets: n must be in \[1, inf\), got 0\.$"
    for fn in TARGETS:
        with pytest.raises(ValueError, match=match):
            fn.__wrapped__(trajectory, 0)

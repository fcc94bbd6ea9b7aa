"""Scales of returns, against NumPy in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims.return_normalization import (
    ReturnRange,
    RewardScale,
    normalize_by_return_range,
    return_based_scale,
    scale_rewards,
    update_return_range,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

START = ReturnRange(0.0, 0.0)


class TestReturnRange:
    @pytest.mark.parametrize("decay", [0.0, 0.9])
    def test_is_the_mean_of_what_percentiles_are_apart(self, rng, decay):
        batches = rng.normal(1e3, 2, size=(6, 4, 9)).astype(np.float32)
        masks = rng.uniform(size=batches.shape) < 0.6
        shares = {"low": 0.1, "high": 0.75}
        state, kept, apart, apart_kept = START, START, [], []
        for x, mask in zip(batches, masks, strict=True):
            state = update_return_range(state, x, decay=decay, **shares)
            spoilt = np.where(mask, x, np.nan)
            kept = update_return_range(kept, spoilt, decay=decay, mask_t=mask, **shares)
            apart.append(np.diff(np.quantile(np.float64(x), [0.1, 0.75]))[0])
            low, high = np.quantile(np.float64(x[mask]), [0.1, 0.75])
            apart_kept.append(high - low)
        weights = decay ** np.arange(6.0)[::-1]
        for got, spreads in ((state, apart), (kept, apart_kept)):
            expected = np.average(spreads, weights=weights)
            np.testing.assert_allclose(got.range, expected, rtol=1e-4)
            np.testing.assert_allclose(got.weight, 1 - decay**6, rtol=1e-5)

    def test_has_the_percentiles_and_the_decay_of_the_paper(self):
        state = update_return_range(START, jnp.arange(101.0))
        np.testing.assert_allclose(state, [90, 0.01], rtol=1e-4)

    def test_of_one_return_or_equal_ones_is_zero(self):
        for returns in (jnp.array(1e4), jnp.full(7, 0.1)):
            assert update_return_range(START, returns).range == 0

    def test_an_empty_batch_changes_nothing(self):
        state = ReturnRange(jnp.array(3.0), jnp.array(0.25))
        nan, nothing = jnp.full(3, jnp.nan), jnp.zeros(3, bool)
        assert update_return_range(state, nan, mask_t=nothing) == state
        assert update_return_range(state, jnp.zeros(0)) == state
        assert update_return_range(START, nan, mask_t=nothing) == START

    def test_passes_nan_on(self):
        mask = jnp.array([True, True, False])
        state = update_return_range(START, jnp.array([jnp.nan, 1, 1]), mask_t=mask)
        assert np.isnan(state.range)
        inner = {"low": 0.0, "high": 0.5}  # between numbers that are known
        state = update_return_range(START, jnp.array([1.0, jnp.nan, 1.0]), **inner)
        assert np.isnan(state.range)

    def test_half_precision_returns_leave_the_state_in_single(self):
        state = update_return_range(START, jnp.ones(3, jnp.bfloat16))
        state = update_return_range(state, jnp.ones(3, jnp.bfloat16))
        assert {x.dtype for x in state} == {jnp.dtype("float32")}

    def test_padding_has_no_gradient(self):
        mask = jnp.array([True, False, True])

        def spread(x):
            return update_return_range(START, x, low=0.0, high=1.0, mask_t=mask).range

        slopes = jax.grad(spread)(jnp.array([1.0, jnp.nan, 3.0]))
        np.testing.assert_allclose(slopes, [-1, 0, 1], rtol=1e-6)

    @pytest.mark.parametrize(("spread", "divisor"), [(0.5, 1), (1.0, 1), (8.0, 8)])
    def test_divides_by_no_less_than_one(self, spread, divisor):
        state, x = ReturnRange(spread, 0.5), jnp.array([2.0, -4.0])
        result = normalize_by_return_range(state, x)
        np.testing.assert_allclose(result, x / divisor)
        normal = lambda x: normalize_by_return_range(state, x).sum()
        np.testing.assert_allclose(jax.grad(normal)(x), [1 / divisor] * 2)

    def test_the_least_to_divide_by_can_be_chosen(self):
        state, x = ReturnRange(0.5, 0.5), jnp.array([2.0])
        assert normalize_by_return_range(state, x, min_range=0.25) == 4
        assert normalize_by_return_range(state, x, min_range=2.0) == 1
        with pytest.raises(ValueError, match="min_range must be in"):
            normalize_by_return_range(state, x, min_range=0.0)


def example(rng, shape=(4, 9)):
    r_t, returns = rng.normal([[[1]], [[7]]], 2, size=(2, *shape)).astype(np.float32)
    discount_t = np.where(rng.uniform(size=shape) < 0.3, 0, 0.9).astype(np.float32)
    return r_t, discount_t, returns, rng.uniform(size=shape) < 0.6


class TestReturnBasedScale:
    def by_hand(self, r_t, discount_t, returns):
        r_t, discount_t, returns = map(np.float64, (r_t, discount_t, returns))
        return np.sqrt(r_t.var() + discount_t.var() * (returns**2).mean())

    def test_is_that_of_the_definition(self, rng):
        *inputs, mask = example(rng)
        got = return_based_scale(*inputs)
        np.testing.assert_allclose(got, self.by_hand(*inputs), rtol=1e-5)
        spoilt = [np.where(mask, x, np.nan) for x in inputs]
        got = return_based_scale(*spoilt, mask_t=mask)
        expected = self.by_hand(*(x[mask] for x in inputs))
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    def test_a_large_mean_costs_no_digits(self, rng):
        r_t, _, returns, _ = example(rng)
        inputs = r_t + np.float32(1e4), np.full_like(r_t, 0.99), returns
        got = return_based_scale(*inputs)
        np.testing.assert_allclose(got, self.by_hand(*inputs), rtol=1e-5)

    def test_is_zero_where_nothing_varies(self):
        nan, nothing = jnp.full(2, jnp.nan), jnp.zeros(2, bool)
        assert return_based_scale(nan, nan, nan, mask_t=nothing) == 0
        one = jnp.full(5, 0.1)
        scale = lambda r_t: return_based_scale(r_t, one, one)
        assert jax.value_and_grad(scale)(one)[0] == 0
        assert not jax.grad(scale)(one).any()


class TestScaleRewards:
    def by_hand(self, r_t, discount_t, truncation_t, mask_t, epsilon):
        """Over time, then environments."""
        sums, seen, results = np.zeros(r_t.shape[1]), [], np.zeros(r_t.shape)
        for t, b in np.ndindex(r_t.shape):
            if mask_t[t, b]:
                sums[b] += r_t[t, b]
                seen.append(sums[b])
                sums[b] *= discount_t[t, b] * (1 - truncation_t[t, b])
            if b == r_t.shape[1] - 1 and seen:
                scale = np.sqrt(np.var(seen) + epsilon)
                results[t] = np.where(mask_t[t], r_t[t] / scale, 0)
        return results, sums, seen

    def scanned(self, r_t, discount_t, truncation_t, mask_t, axis_name=None):
        def step(state, xs):
            r_t, discount_t, truncation_t, mask_t = xs
            rewards, state = scale_rewards(
                state,
                r_t,
                discount_t,
                epsilon=0.1,
                mask_t=mask_t,
                truncation_t=truncation_t,
                axis_name=axis_name,
            )
            return state, rewards

        state = RewardScale(jnp.zeros_like(r_t[0]), *jnp.zeros(3, jnp.float32))
        state, rewards = jax.lax.scan(
            step, state, (r_t, discount_t, truncation_t, mask_t)
        )
        return rewards, state

    def steps(self, rng):
        r_t, discount_t, _, mask_t = example(rng, (12, 4))
        return r_t, discount_t, rng.uniform(size=(12, 4)) < 0.2, mask_t

    def test_divides_by_the_deviation_of_all_sums_so_far(self, rng):
        r_t, discount_t, truncation_t, mask_t = self.steps(rng)
        expected, sums, seen = self.by_hand(
            r_t.astype(float), discount_t, truncation_t, mask_t, 0.1
        )
        spoilt = [np.where(mask_t, x, np.nan) for x in (r_t, discount_t)]
        got, state = jax.jit(self.scanned)(*spoilt, truncation_t, mask_t)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        np.testing.assert_allclose(state.total, sums, rtol=1e-5, atol=1e-6)
        moments = np.mean(seen), np.var(seen), len(seen)
        np.testing.assert_allclose(state[1:], moments, rtol=1e-5)

    def test_a_sum_ends_with_its_episode_nan_included(self):
        state = RewardScale(jnp.array([1.0, 1.0, jnp.inf]))
        _, state = scale_rewards(
            state,
            jnp.array([2.0, jnp.nan, 2.0]),
            jnp.array([0.5, 0.0, 0.9]),
            truncation_t=jnp.array([False, False, True]),
        )
        assert state.total.tolist() == [1.5, 0, 0]

    def test_without_variance_rewards_are_zero_or_scaled_by_epsilon(self):
        state, r_t = RewardScale(jnp.zeros(2)), jnp.full(2, 3.0)
        assert scale_rewards(state, r_t, 1.0 * r_t, epsilon=0.0)[0].tolist() == [0, 0]
        scaled, _ = scale_rewards(state, r_t, 0.0 * r_t, epsilon=4.0)
        assert scaled.tolist() == [1.5, 1.5]

    def test_may_start_with_moments_that_count_for_several_sums(self):
        r_t = jnp.array([3.0])
        scaled, _ = scale_rewards(RewardScale(jnp.zeros(1)), r_t, r_t)
        np.testing.assert_allclose(scaled, 3e4, rtol=1e-5)
        start = RewardScale(jnp.zeros(1), 0.0, 1.0, 3.0)
        scaled, state = scale_rewards(start, r_t, r_t)
        np.testing.assert_allclose(state[1:], [0.75, 39 / 16, 4], rtol=1e-6)
        np.testing.assert_allclose(scaled, 3 / np.sqrt(39 / 16), rtol=1e-6)

    def test_half_precision_rewards_leave_the_state_in_single(self):
        state = RewardScale(jnp.zeros(2, jnp.float32))
        r_t = jnp.array([1.0, 2.0], jnp.bfloat16)
        rewards, state = scale_rewards(state, r_t, r_t * 0)
        assert rewards.dtype == jnp.bfloat16
        assert {x.dtype for x in state} == {jnp.dtype("float32")}

    def test_environments_may_be_on_several_devices(self, rng):
        steps = self.steps(rng)
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        over, same = PartitionSpec(None, "d"), PartitionSpec()

        def parts(*steps):
            rewards, state = self.scanned(*steps, axis_name="d")
            return rewards, jnp.stack(state[1:])

        mapped = jax.shard_map(parts, mesh=mesh, in_specs=over, out_specs=(over, same))
        got = jax.jit(mapped)(*steps)
        rewards, state = self.scanned(*steps)
        np.testing.assert_allclose(got[0], rewards, rtol=1e-5)
        np.testing.assert_allclose(got[1], state[1:], rtol=1e-5)


def test_range_is_that_of_all_devices(rng):
    returns = rng.normal(size=(4, 7)).astype(np.float32)
    mask = rng.random((4, 7)) < 0.7
    mask[1] = False  # nothing counts on one device
    over = functools.partial(update_return_range, START, axis_name="d")
    mapped = jax.vmap(lambda x, mask_t: over(x, mask_t=mask_t).range, axis_name="d")
    expected = update_return_range(START, returns, mask_t=mask).range
    np.testing.assert_array_equal(mapped(returns, mask), [expected] * 4)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    split, same = PartitionSpec("d"), PartitionSpec()
    sharded = jax.shard_map(over, mesh=mesh, in_specs=split, out_specs=same)
    expected = update_return_range(START, returns)
    np.testing.assert_array_equal(jax.jit(sharded)(returns), expected)


def test_scale_is_that_of_all_devices(rng):
    *inputs, mask = example(rng)
    over = functools.partial(return_based_scale, axis_name="d")
    mapped = jax.vmap(lambda *xs: over(*xs[:-1], mask_t=xs[-1]), axis_name="d")
    expected = return_based_scale(*inputs, mask_t=mask)
    np.testing.assert_allclose(mapped(*inputs, mask), [expected] * 4, rtol=1e-5)


def test_refuses_what_breaks_a_contract():
    with pytest.raises(ValueError, match="decay must be in"):
        update_return_range(START, jnp.zeros(2), decay=1.0)
    with pytest.raises(TypeError, match="state must be of type ReturnRange"):
        update_return_range(0.0, jnp.zeros(2))
    with pytest.raises(ValueError, match="r_t has shape"):
        scale_rewards(RewardScale(jnp.zeros(2)), jnp.zeros(3), jnp.zeros(2))
    with pytest.raises(ValueError, match="returns has shape"):
        return_based_scale(jnp.zeros(2), jnp.zeros(2), jnp.zeros(1))

"""Advantages of samples of a group, against loops over the definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims.group_advantages import (
    group_centered_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    reinforce_plus_plus_advantages,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

BY_IDS = [
    group_centered_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
]
UNKNOWN = np.float32(np.nan)


def centered_by_hand(r, others):
    return r - np.mean([r, *others])


def relative_by_hand(r, others, epsilon=0.0, ddof=0):
    group = [r, *others]
    deviation = np.std(group, ddof=ddof) if len(group) > ddof else 0
    return (r - np.mean(group)) / (deviation + epsilon) if deviation else 0


def left_out_by_hand(r, others):
    return r - np.mean(others) if others else 0


BY_HAND = dict(
    zip(BY_IDS, [centered_by_hand, relative_by_hand, left_out_by_hand], strict=True)
)


def over_groups(by_hand, rewards, ids, mask):
    """Applies a function of one reward and the others of its group that count."""
    out = np.zeros(len(rewards))
    for i in np.flatnonzero(mask):
        mates = (ids == ids[i]) & mask & (np.arange(len(ids)) != i)
        out[i] = by_hand(np.float64(rewards[i]), list(np.float64(rewards[mates])))
    return out


@pytest.mark.parametrize("fn", BY_IDS)
class TestByGroup:
    def test_agrees_with_the_definition(self, fn, rng):
        """Of groups of any size and order, one of a single sample, one of none left."""
        ids = np.array([4, 0, 2, 0, 4, 7, 2, 0, 5, 5])
        mask = np.array([1, 1, 1, 1, 1, 1, 0, 1, 0, 0], bool)
        rewards = rng.normal(3, size=10).astype(np.float32)
        spoilt = np.where(mask, rewards, UNKNOWN)
        expected = over_groups(BY_HAND[fn], rewards, ids, mask)
        result = fn(spoilt, np.where(mask, ids, -7), mask=mask)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    def test_a_row_is_a_group_without_ids(self, fn, rng):
        rewards = rng.normal(size=(2, 3, 4)).astype(np.float32)
        mask = rng.uniform(size=rewards.shape) < 0.7
        ids = np.repeat(np.arange(6), 4)
        expected = over_groups(BY_HAND[fn], rewards.ravel(), ids, mask.ravel())
        result = fn(rewards, mask=mask)
        np.testing.assert_allclose(result.ravel(), expected, rtol=1e-5, atol=1e-6)

    def test_ids_in_one_row_know_nothing_of_the_next(self, fn, rng):
        rewards = rng.normal(size=(2, 6)).astype(np.float32)
        ids = np.array([[0, 1, 0, 1, 2, 2], [5, 5, 5, 0, 0, 0]])
        expected = [fn(*row) for row in zip(rewards, ids, strict=True)]
        np.testing.assert_allclose(fn(rewards, ids), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("reward", [0.1, 1e6, -0.3])
    def test_of_equal_rewards_is_exactly_zero(self, fn, reward):
        """Though their mean, rounded, may not be equal to them."""
        rewards = jnp.full(7, reward)
        value, slope = jax.value_and_grad(lambda x: jnp.vdot(fn(x), x))(rewards)
        assert value == 0
        assert np.isfinite(slope).all()
        assert not fn(rewards).any()

    def test_of_one_sample_or_none_left_is_zero(self, fn):
        assert fn(jnp.array([5.0])).tolist() == [0]
        nothing = fn(jnp.array([jnp.nan, jnp.inf]), mask=jnp.zeros(2, bool))
        assert nothing.tolist() == [0, 0]

    def test_what_is_left_out_has_no_gradient(self, fn):
        rewards = jnp.array([1.0, jnp.nan, 4.0, 2.0])
        mask = jnp.array([True, False, True, True])
        weights = jnp.arange(4.0)
        slope = jax.grad(lambda x: jnp.vdot(weights, fn(x, mask=mask)))(rewards)
        kept = jnp.array([0, 2, 3])
        alone = jax.grad(lambda x: jnp.vdot(weights[kept], fn(x)))(rewards[kept])
        np.testing.assert_allclose(slope[kept], alone, rtol=1e-5, atol=1e-6)
        assert slope[1] == 0

    @pytest.mark.parametrize("wrong", [-1, 4, 300])
    def test_a_sample_of_no_group_is_nan_and_disturbs_no_other(self, fn, wrong):
        rewards = jnp.array([1.0, 3.0, 8.0, 2.0])
        result = fn(rewards, jnp.array([0, 0, wrong, 3]))
        assert np.isnan(result).tolist() == [False, False, True, False]
        np.testing.assert_allclose(result[:2], fn(rewards[:2]), rtol=1e-6)

    def test_a_reward_that_is_nan_stays_in_its_group(self, fn):
        rewards = jnp.array([1.0, jnp.nan, 3.0, 4.0])
        result = fn(rewards, jnp.array([0, 0, 1, 1]))
        assert np.isnan(result).tolist() == [True, True, False, False]

    def test_adds_up_to_zero_in_each_group(self, fn, rng):
        rewards = rng.normal(size=(3, 5)).astype(np.float32)
        np.testing.assert_allclose(fn(rewards).sum(-1), 0, atol=1e-5)

    def test_a_large_offset_costs_no_digits(self, fn):
        near = fn(jnp.array([0.0, 1.0, 3.0]))
        far = fn(jnp.array([0.0, 1.0, 3.0]) + 2.0**23)
        np.testing.assert_array_equal(near, far)

    def test_takes_ids_of_eight_bits_in_a_long_row(self, fn):
        rewards = jnp.arange(300.0) % 7
        ids = np.arange(300) % 5 - (np.arange(300) == 7)
        ids[8] = -1
        result = fn(rewards, jnp.asarray(ids, jnp.int8))
        np.testing.assert_array_equal(result, fn(rewards, jnp.asarray(ids)))
        assert np.flatnonzero(np.isnan(result)).tolist() == [8]


class TestGroupRelativeAdvantages:
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0], np.float32)

    @pytest.mark.parametrize(("epsilon", "ddof"), [(1e-4, 1), (0.5, 0), (1e-6, 1)])
    def test_takes_what_popular_code_does(self, epsilon, ddof):
        by_hand = functools.partial(relative_by_hand, epsilon=epsilon, ddof=ddof)
        expected = over_groups(by_hand, self.rewards, np.zeros(5), np.ones(5, bool))
        result = group_relative_advantages(self.rewards, epsilon=epsilon, ddof=ddof)
        np.testing.assert_allclose(result, expected, rtol=1e-6)

    def test_the_defaults_are_the_papers(self):
        result = group_relative_advantages(self.rewards)
        np.testing.assert_allclose(np.std(result), 1, rtol=1e-6)
        np.testing.assert_allclose(np.mean(result), 0, atol=1e-6)

    def test_one_sample_has_no_sample_deviation_and_no_advantage(self):
        assert group_relative_advantages(jnp.array([3.0]), ddof=1).tolist() == [0]

    def test_refuses_another_ddof(self):
        message = r"^group_relative_advantages: ddof must be one of 0, 1, got 2\.$"
        with pytest.raises(ValueError, match=message):
            group_relative_advantages(self.rewards, ddof=2)

    def test_a_difference_of_one_bit_is_a_difference(self):
        rewards = jnp.array([1.0, np.nextafter(np.float32(1), np.float32(2))])
        assert group_relative_advantages(rewards).tolist() == [-1, 1]


def test_leaving_one_out_is_centering_but_for_a_factor(rng):
    rewards = rng.normal(size=5).astype(np.float32)
    np.testing.assert_allclose(
        leave_one_out_advantages(rewards),
        group_centered_advantages(rewards) * 5 / 4,
        rtol=1e-6,
    )


def reinforce_plus_plus_by_hand(rewards, kl, beta, mask):
    returns = np.zeros(kl.shape)
    for i, t in np.argwhere(mask):
        later = [kl[i, s] for s in range(t, kl.shape[1]) if mask[i, s]]
        returns[i, t] = rewards[i] - beta * sum(later)
    all_of_them = returns[mask]
    normal = (returns - all_of_them.mean()) / all_of_them.std()
    return np.where(mask, normal, 0)


class TestReinforcePlusPlusAdvantages:
    @pytest.fixture
    def batch(self, rng):
        rewards = rng.normal(size=8).astype(np.float32)
        kl = rng.normal(size=(8, 5)).astype(np.float32)
        mask = rng.uniform(size=kl.shape) < 0.7
        return rewards, np.where(mask, kl, UNKNOWN), mask

    def test_agrees_with_the_definition(self, batch):
        rewards, kl, mask = batch
        expected = reinforce_plus_plus_by_hand(rewards, kl, 0.3, mask)
        result = reinforce_plus_plus_advantages(rewards, kl, beta=0.3, mask_t=mask)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    def test_a_batch_over_four_devices_is_one_batch(self, batch):
        rewards, kl, mask = batch
        expected = reinforce_plus_plus_advantages(rewards, kl, beta=0.3, mask_t=mask)
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        over = PartitionSpec("d")

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=over, out_specs=over)
        def spread(rewards, kl, mask):
            return reinforce_plus_plus_advantages(
                rewards, kl, beta=0.3, mask_t=mask, axis_name="d"
            )

        result = jax.jit(spread)(rewards, kl, mask)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    def test_of_equal_returns_is_exactly_zero(self):
        result = reinforce_plus_plus_advantages(
            jnp.full(7, 0.1), jnp.zeros((7, 3)), beta=0.1
        )
        assert not result.any()

    def test_epsilon_is_added_to_the_deviation(self):
        result = reinforce_plus_plus_advantages(
            jnp.array([1.0, 3.0]), jnp.zeros((2, 1)), beta=0.1, epsilon=1.0
        )
        assert result.tolist() == [[-0.5], [0.5]]

    def test_of_padding_alone_is_zero_with_a_gradient_of_zero(self):
        run = lambda x: reinforce_plus_plus_advantages(
            jnp.ones(1), x, beta=0.1, mask_t=jnp.zeros((1, 2), bool)
        ).sum()
        value, slope = jax.value_and_grad(run)(jnp.full((1, 2), jnp.nan))
        assert (value.tolist(), slope.tolist()) == (0, [[0, 0]])

"""Episodic rewards, against their definition in double precision, one at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.intrinsic_rewards import (
    _MOST_DISTANCES,
    IntrinsicRewardState,
    episodic_memory_intrinsic_rewards,
    never_give_up_rewards,
)
from rlprims.running_statistics import RunningStatistics

SIZE = 6


def rewards_by_hand(embeddings, memory, distance_sum=0.0, distance_count=0, **settings):
    """The rewards, and the sum and the number of all squared distances."""
    setting = {
        "number": 2,
        "scale": 1.0,
        "c": 1e-3,
        "add": 1e-3,
        "eps": 1e-4,
        "xi": 8e-3,
        "most": 8.0,
    }
    setting |= settings
    neighbors = []
    for x in embeddings:
        squares = sorted(
            sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True))
            for y in memory
        )
        neighbors.append([d for d in squares[: setting["number"]] if math.isfinite(d)])
    distance_sum += sum(map(sum, neighbors))
    distance_count += sum(map(len, neighbors))
    mean = distance_sum / max(distance_count, 1)
    rewards = []
    for squares in neighbors:
        kernels = 0.0
        for d in squares:
            rate = max(d / (mean + setting["add"]) - setting["xi"], 0)
            kernels += setting["eps"] / (rate + setting["eps"])
        similarity = math.sqrt(kernels) + setting["c"]
        rewards.append(
            0.0 if similarity > setting["most"] else setting["scale"] / similarity
        )
    return rewards, distance_sum, distance_count


def call(embeddings, state=None, number=2, size=SIZE, scale=1.0, **settings):
    return episodic_memory_intrinsic_rewards(
        jnp.asarray(embeddings), number, scale, state, max_memory_size=size, **settings
    )


def cloud(rng, size, mean=0.0, std=1.0):
    return rng.normal(mean, std, size=(size, 3)).astype(np.float32)


def empty(size=SIZE, dims=3):
    return IntrinsicRewardState(jnp.full((size, dims), jnp.inf, jnp.float32))


class TestRewards:
    @pytest.mark.parametrize("std", [1e-2, 1.0, 1e3])
    def test_are_those_of_the_definition(self, rng, std):
        memory = cloud(rng, SIZE, std=std)
        state, total, count = IntrinsicRewardState(jnp.asarray(memory)), 0.0, 0
        for _ in range(3):
            embeddings = cloud(rng, 4, std=std)
            expected, total, count = rewards_by_hand(
                embeddings, np.asarray(state.memory), total, count
            )
            rewards, state = call(embeddings, state)
            np.testing.assert_allclose(rewards, expected, rtol=1e-4)
            np.testing.assert_allclose(state.distance_sum, total, rtol=1e-5)
            assert state.distance_count == count

    def test_use_distances_of_the_right_sign(self):
        """Subtracted from the constant, small distances give the least of rewards."""
        embeddings = np.float32([[0.03, 0.0], [0.0, 0.03]])
        expected, *_ = rewards_by_hand(embeddings, np.zeros((2, 2)))
        rewards, state = call(embeddings, size=8)
        np.testing.assert_allclose(rewards, expected, rtol=1e-4)
        assert rewards[0] > 40
        np.testing.assert_allclose(state.distance_sum, 4 * 0.03**2, rtol=1e-5)

    @pytest.mark.parametrize("scale", [1e-4, 1.0])
    def test_one_at_a_time_they_are_those_of_the_paper_at_any_scale(self, rng, scale):
        embeddings = cloud(rng, 10, std=scale)
        expected, total, count = [], 0.0, 0
        for i in range(1, 10):
            memory = embeddings[max(i - SIZE, 0) : i]
            reward, total, count = rewards_by_hand(
                embeddings[i : i + 1], memory, total, count, add=0.0
            )
            expected += reward

        def step(state, x):
            rewards, state = call(x[None], state, distance_constant=0.0)
            return state, rewards[0]

        _, rewards = jax.lax.scan(step, empty(), embeddings)
        np.testing.assert_allclose(rewards[1:], expected, rtol=1e-3)

    def test_hardly_depend_on_the_scale_of_the_embeddings(self, rng):
        memory, embeddings = cloud(rng, SIZE), cloud(rng, 4)
        settings = {"constant": 1e-6}
        small, large = (
            call(scale * embeddings, IntrinsicRewardState(scale * memory), **settings)
            for scale in (1.0, 1e3)
        )
        np.testing.assert_allclose(small[0], large[0], rtol=1e-3)

    def test_the_first_call_compares_with_zeros(self, rng):
        embeddings = cloud(rng, 4)
        expected, *_ = rewards_by_hand(embeddings, np.zeros((2, 3)))
        rewards, state = call(embeddings)
        np.testing.assert_allclose(rewards, expected, rtol=1e-4)
        np.testing.assert_array_equal(state.memory[:4], embeddings)
        assert (state.memory[4:] == jnp.inf).all()

    def test_fall_with_familiarity(self, rng):
        embeddings = cloud(rng, 3)
        first, state = call(embeddings, size=12)
        second, _ = call(embeddings, state, size=12)
        assert (second < first).all()

    def test_follow_the_settings(self, rng):
        memory, embeddings = cloud(rng, SIZE), cloud(rng, 4)
        embeddings[1] += 5
        expected, *_ = rewards_by_hand(
            embeddings,
            memory,
            number=3,
            scale=5.0,
            c=0.1,
            add=0.1,
            eps=0.5,
            xi=0.3,
            most=1.2,
        )
        assert 0 < sum(reward == 0 for reward in expected) < 4
        rewards, _ = call(
            embeddings,
            IntrinsicRewardState(memory),
            number=3,
            scale=5.0,
            constant=0.1,
            epsilon=0.5,
            cluster_distance=0.3,
            max_similarity=1.2,
        )
        np.testing.assert_allclose(rewards, expected, rtol=1e-4)

    def test_are_nothing_above_the_greatest_similarity(self):
        points = jnp.zeros((1, 2))
        state = IntrinsicRewardState(jnp.zeros((100, 2)))
        same, _ = call(points, state, number=100, size=100)
        assert same.tolist() == [0]
        rewards, _ = call(points, state, number=100, size=100, max_similarity=11.0)
        np.testing.assert_allclose(rewards, 1 / 10.001, rtol=1e-5)

    def test_an_empty_slot_is_no_neighbor(self, rng):
        memory, embeddings = cloud(rng, 1), cloud(rng, 4)
        state = empty()._replace(memory=empty().memory.at[3].set(memory[0]))
        rewards, new = call(embeddings, state)
        expected, total, _ = rewards_by_hand(embeddings, memory)
        np.testing.assert_allclose(rewards, expected, rtol=1e-4)
        assert new.distance_count == 4
        np.testing.assert_allclose(new.distance_sum, total, rtol=1e-5)

    def test_are_greatest_where_nothing_is_remembered(self, rng):
        rewards, state = call(cloud(rng, 4), empty())
        np.testing.assert_allclose(rewards, 1e3, rtol=1e-5)
        assert (state.distance_sum, state.distance_count) == (0, 0)

    @pytest.mark.parametrize("spoilt", [np.nan, np.inf])
    def test_what_is_not_finite_spoils_nothing_else(self, rng, spoilt):
        memory, embeddings = cloud(rng, SIZE), cloud(rng, 4)
        expected, *_ = rewards_by_hand(embeddings[1:], memory)
        embeddings[0, 1] = spoilt
        rewards, state = call(embeddings, IntrinsicRewardState(memory))
        assert np.isnan(rewards[0])
        np.testing.assert_allclose(rewards[1:], expected, rtol=1e-4)
        assert np.isfinite(state.distance_sum)
        again, state = call(embeddings[1:], state)
        assert np.isfinite([*again, state.distance_sum]).all()

    def test_gradients_are_finite(self, rng):
        embeddings = cloud(rng, 4)
        embeddings[0] = 0  # as the memory is at the start

        def total(embeddings, scale):
            return call(embeddings, scale=scale)[0].sum()

        by_embeddings, by_scale = jax.grad(total, (0, 1))(embeddings, 2.0)
        assert np.isfinite(by_embeddings).all()
        np.testing.assert_allclose(by_scale, call(embeddings)[0].sum(), rtol=1e-5)
        nothing = jax.grad(lambda x: call(x, empty())[0].sum())(embeddings)
        assert (nothing == 0).all()

    def test_a_mean_of_zero_and_no_constant_are_fine(self):
        rewards, _ = call(jnp.zeros((2, 3)), constant=0.0)
        np.testing.assert_allclose(rewards, 1 / math.sqrt(2), rtol=1e-6)


class TestState:
    def test_the_memory_is_a_ring(self):
        state = None
        for n in range(3):
            _, state = call(jnp.full((3, 1), n + 1.0), state, number=1, size=4)
            expected = [[1, 1, 1, np.inf], [2, 2, 1, 2], [3, 2, 3, 3]][n]
            assert state.memory.ravel().tolist() == expected
            assert state.next_memory_index == [3, 2, 1][n]

    @pytest.mark.parametrize("start", [0, 2])
    @pytest.mark.parametrize("number", [0, 1, 4, 5, 9])
    def test_the_newest_replace_the_oldest(self, number, start):
        size, state = 4, empty(4, 1)._replace(next_memory_index=start)
        new = np.arange(number, dtype=np.float32)[:, None] + 1
        ring = np.full(size, np.inf)
        for n, x in enumerate(new[:, 0]):
            ring[(start + n) % size] = x
        _, state = call(new, state, number=1, size=size)
        np.testing.assert_array_equal(state.memory[:, 0], ring)
        assert state.next_memory_index == (start + number) % size

    def test_an_index_beyond_the_end_goes_round(self):
        state = empty(4, 1)._replace(next_memory_index=6)
        _, state = call(jnp.ones((1, 1)), state, number=1, size=4)
        assert state.next_memory_index == 3
        assert jnp.isfinite(state.memory[:, 0]).tolist() == [False, False, True, False]

    def test_keeps_its_types_in_a_loop(self, rng):
        state = IntrinsicRewardState(
            jnp.asarray(cloud(rng, SIZE)), jnp.int32(0), jnp.float32(0), jnp.int32(0)
        )
        step = lambda state, x: call(x, state)[::-1]
        embeddings = jnp.stack([jnp.asarray(cloud(rng, 2)) for _ in range(3)])
        last, rewards = jax.lax.scan(step, state, embeddings)
        assert rewards.shape == (3, 2)
        one = state
        for x in embeddings:
            one = call(x, one)[1]
        for x, y in zip(last, one, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)

    def test_counts_distances_without_losing_any_or_overflowing(self):
        many = _MOST_DISTANCES - 1
        state = IntrinsicRewardState(jnp.zeros((1, 1)), 0, 2.0 * many, many)
        for _ in range(3):
            _, state = call(jnp.full((1, 1), 2.0**0.5), state, number=1, size=1)
            mean = float(state.distance_sum) / int(state.distance_count)
            np.testing.assert_allclose(mean, 2, rtol=1e-6)
            assert state.distance_count <= _MOST_DISTANCES
            state = state._replace(memory=jnp.zeros((1, 1)))

    def test_half_precision_embeddings_leave_a_float32_state_as_it_is(self, rng):
        state = IntrinsicRewardState(cloud(rng, SIZE), 0, np.float32(0))
        rewards, state = call(jnp.asarray(cloud(rng, 4), jnp.bfloat16), state)
        assert {x.dtype for x in (rewards, state.memory, state.distance_sum)} == {
            jnp.dtype("float32")
        }

    def test_of_half_precision_counts_in_single(self, rng):
        """The sum would soon be too large for the next distance to change it."""
        half = jnp.asarray(cloud(rng, 4), jnp.bfloat16)
        rewards, state = call(half)
        for _ in range(3):
            dtypes = [str(x.dtype) for x in (rewards, state.memory, state.distance_sum)]
            assert dtypes == ["bfloat16", "bfloat16", "float32"]
            rewards, state = call(half, state)
        state = IntrinsicRewardState(jnp.zeros((1, 1), "bfloat16"), 0, 2048.0, 1)
        _, state = call(jnp.ones((1, 1), "bfloat16"), state, number=1, size=1)
        assert state.distance_sum == 2049


class TestRefusals:
    def test_a_memory_of_another_size(self):
        message = r"state\.memory has shape \(6, 3\), expected f\[M,D\] with M = .* = 9"
        with pytest.raises(ValueError, match=message):
            call(jnp.ones((2, 3)), empty(), size=9)

    @pytest.mark.parametrize("number", [0, SIZE + 1])
    def test_more_neighbors_than_slots(self, number):
        with pytest.raises(ValueError, match=r"num_neighbors must be in \[1, 6\]"):
            call(jnp.ones((2, 3)), number=number)

    def test_a_single_embedding(self):
        with pytest.raises(ValueError, match=r"embeddings has shape \(3,\), expected"):
            call(jnp.ones(3))

    def test_what_is_no_state(self):
        with pytest.raises(TypeError, match="must be of type IntrinsicRewardState"):
            call(jnp.ones((2, 3)), jnp.ones((6, 3)))

    def test_settings_out_of_range(self):
        with pytest.raises(ValueError, match=r"epsilon must be in \(0, inf\), got 0"):
            call(jnp.ones((2, 3)), epsilon=0.0)


class TestNeverGiveUp:
    STATE = RunningStatistics(jnp.array(2.0), jnp.array(9.0), 5.0)

    def test_multiplies_by_how_new_an_observation_is(self, rng):
        errors = rng.normal(2, 6, size=40).astype(np.float32)
        rewards = rng.uniform(size=40).astype(np.float32)
        expected = [
            r * min(max(1 + (float(e) - 2) / 3, 1), 2.5)
            for r, e in zip(rewards, errors, strict=True)
        ]
        result = never_give_up_rewards(self.STATE, rewards, errors, max_modulation=2.5)
        np.testing.assert_allclose(result, expected, rtol=1e-5)
        shares = np.mean(result == rewards), np.mean(result >= 2.49 * rewards)
        assert all(0 < share < 0.9 for share in shares)

    def test_multiplies_by_five_at_most_unless_told_otherwise(self):
        one, far = jnp.ones(1), jnp.array([1e9])
        assert never_give_up_rewards(self.STATE, one, far).tolist() == [5]
        free = never_give_up_rewards(self.STATE, one, far, max_modulation=jnp.inf)
        assert free.item() > 1e8

    def test_may_have_statistics_of_each_column(self):
        state = RunningStatistics(jnp.array([0.0, 1.0]), jnp.array([1.0, 4.0]), 5.0)
        errors = jnp.array([[1.0, 1.0], [2.0, 5.0]])
        result = never_give_up_rewards(state, jnp.ones((2, 2)), errors)
        assert result.tolist() == [[2, 1], [3, 3]]

    def test_changes_nothing_where_errors_have_no_deviation(self):
        """As of one error, or of none, and without a gradient that is not finite."""
        rewards, errors = jnp.array([0.5, 0.25]), jnp.array([7.0, 2.0])
        for state in (
            RunningStatistics(jnp.array(2.0), jnp.array(0.0), 1.0),
            RunningStatistics(jnp.array(jnp.nan), jnp.array(jnp.nan), 0.0),
        ):

            def total(rewards, errors, state=state):
                result = never_give_up_rewards(state, rewards, errors)
                return result.sum(), result

            slopes, result = jax.grad(total, (0, 1), has_aux=True)(rewards, errors)
            np.testing.assert_array_equal(result, rewards)
            np.testing.assert_array_equal(slopes, [[1, 1], [0, 0]])

    def test_is_zero_in_padding_and_where_there_is_no_episodic_reward(self):
        mask = jnp.array([True, False, False, True])
        rewards = jnp.array([1.0, jnp.nan, 1.0, 0.0])
        errors = jnp.array([5.0, 1.0, jnp.nan, jnp.inf])
        limit = {"max_modulation": jnp.inf, "mask_t": mask}
        total = lambda *xs: never_give_up_rewards(self.STATE, *xs, **limit).sum()
        result = never_give_up_rewards(self.STATE, rewards, errors, **limit)
        assert result.tolist() == [2, 0, 0, 0]
        slopes = np.array(jax.grad(total, (0, 1))(rewards, errors))
        assert np.isfinite(slopes[:, :3]).all()
        assert not slopes[:, 1:3].any()

    def test_an_error_that_is_not_known_is_not_hidden(self):
        result = never_give_up_rewards(self.STATE, jnp.ones(1), jnp.array([jnp.nan]))
        assert np.isnan(result).all()

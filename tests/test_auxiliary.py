"""Auxiliary tasks, against loops over pixels, cells and steps in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import feature_control_rewards, pixel_control_loss, pixel_control_rewards

T, CELLS, SIZE, ACTIONS = 4, (2, 3), 2, 3
TYPES = ["feature", "absolute_change", "increase", "decrease", "potential"]


def images(rng, steps=T, cells=CELLS, size=SIZE):
    shape = (steps + 1, cells[0] * size, cells[1] * size, 3)
    return rng.uniform(size=shape).astype(np.float32)


def rewards_by_hand(observations, size):
    """The mean of all the changes in each cell."""
    after, before = np.float64(observations[1:]), np.float64(observations[:-1])
    steps, height, width, _ = after.shape
    out = np.zeros((steps, height // size, width // size))
    for t, y, x in np.ndindex(out.shape):
        rows, columns = slice(y * size, (y + 1) * size), slice(x * size, (x + 1) * size)
        change = after[t, rows, columns] - before[t, rows, columns]
        out[t, y, x] = np.mean(np.abs(change))
    return out


def loss_by_hand(observations, actions, q, discounts, size):
    """Half the squared distance to the return of each cell, from the end backwards."""
    rewards, q = rewards_by_hand(observations, size), np.float64(q)
    out = np.zeros(rewards.shape)
    for y, x in np.ndindex(rewards.shape[1:]):
        target = q[-1, y, x].max()
        for t in reversed(range(len(rewards))):
            target = rewards[t, y, x] + discounts[t] * target
            out[t, y, x] = (target - q[t, y, x, actions[t]]) ** 2 / 2
    return out


@pytest.fixture
def play(rng):
    """Observations, actions, action values and discounts of one trajectory."""
    q = rng.normal(size=(T + 1, *CELLS, ACTIONS)).astype(np.float32)
    discounts = rng.uniform(0.2, 1, T).astype(np.float32)
    return images(rng), rng.integers(ACTIONS, size=T), q, discounts


class TestPixelControlRewards:
    @pytest.mark.parametrize(("cells", "size"), [((2, 3), 2), ((1, 1), 4), ((3, 2), 1)])
    def test_are_the_mean_change_in_each_cell(self, rng, cells, size):
        observations = images(rng, 3, cells, size)
        rewards = pixel_control_rewards(observations, size)
        expected = rewards_by_hand(observations, size)
        np.testing.assert_allclose(rewards, expected, rtol=1e-5)

    def test_a_change_counts_in_its_own_cell_only(self):
        observations = np.zeros((2, 4, 6, 3), np.float32)
        observations[1, 3, 2] = [1.0, 0.0, -0.2]
        rewards = pixel_control_rewards(observations, 2)
        np.testing.assert_allclose(rewards, [[[0, 0, 0], [0, 0.1, 0]]], rtol=1e-6)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32])
    def test_integers_are_refused_since_they_wrap_around(self, dtype):
        """In uint8, from 255 to 0 is a change of 1."""
        observations = np.array([255, 0], dtype).reshape(2, 1, 1, 1)
        message = "pixel_control_rewards: observations must be floating-point, got "
        with pytest.raises(TypeError, match=message):
            pixel_control_rewards(observations, 1)
        assert pixel_control_rewards(observations.astype(np.float32), 1) == 255

    @pytest.mark.parametrize("size", [0, -2, 3, 4, 5, 8])
    def test_cells_that_do_not_fill_the_image_are_refused(self, size):
        """Where RLax can take the reward of one step for that of another."""
        message = f"pixel_control_rewards: cell_size must be .* 4 and 6, got {size}"
        with pytest.raises(ValueError, match=message):
            pixel_control_rewards(jnp.zeros((4, 4, 6, 3)), size)

    def test_a_step_from_one_episode_to_the_next_is_no_change(self, rng):
        observations, mask_t = images(rng), np.array([True, True, False, True])
        rewards = pixel_control_rewards(observations, SIZE, mask_t=mask_t)
        expected = rewards_by_hand(observations, SIZE) * mask_t[:, None, None]
        np.testing.assert_allclose(rewards, expected, rtol=1e-5)

    def test_what_is_left_out_may_hold_anything(self, rng):
        observations, mask_t = images(rng), np.array([True, True, False, False])
        observations[3:] = [np.nan, np.inf, -np.inf]
        mask_t = jnp.asarray(mask_t)
        total = lambda x: jnp.sum(pixel_control_rewards(x, SIZE, mask_t=mask_t))
        value, slopes = jax.value_and_grad(total)(observations)
        assert value == pixel_control_rewards(observations[:3], SIZE).sum()
        assert np.isfinite(slopes).all()
        assert not np.any(slopes[3:])

    def test_no_steps_give_no_rewards(self):
        assert pixel_control_rewards(jnp.zeros((1, 4, 6, 3)), 2).shape == (0, 2, 3)

    def test_bfloat16_is_averaged_in_single_precision(self):
        observations = np.zeros((2, 32, 32, 1), np.float32)
        observations[1, ::2] = 1.0
        rewards = pixel_control_rewards(observations.astype(jnp.bfloat16), 32)
        assert (rewards.dtype, rewards) == (jnp.bfloat16, 0.5)


class TestPixelControlLoss:
    def test_is_that_of_the_return_of_each_cell(self, play):
        observations, actions, q, discounts = play
        losses = pixel_control_loss(observations, actions, q, discounts, SIZE)
        expected = loss_by_hand(observations, actions, q, discounts, SIZE)
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)

    def test_takes_one_discount_for_all_steps(self, play):
        observations, actions, q, _ = play
        losses = pixel_control_loss(observations, actions, q, 0.9, SIZE)
        expected = loss_by_hand(observations, actions, q, [0.9] * T, SIZE)
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)

    def test_its_gradient_is_the_error_at_the_action_taken(self, play):
        observations, actions, q, discounts = play
        loss = lambda q, **flags: pixel_control_loss(
            observations, actions, q, discounts, SIZE, **flags
        ).sum()
        slopes = np.asarray(jax.grad(loss)(q))
        losses = pixel_control_loss(observations, actions, q, discounts, SIZE)
        taken = np.take_along_axis(slopes[:-1], actions[:, None, None, None], -1)
        np.testing.assert_allclose(taken[..., 0] ** 2 / 2, losses, rtol=1e-5)
        assert np.count_nonzero(slopes) == np.count_nonzero(taken) == taken.size
        flowing = jax.grad(lambda q: loss(q, stop_target_gradients=False))(q)
        assert np.any(flowing[-1])

    def test_observations_get_no_gradient_unless_asked(self, play):
        observations, *rest = play
        for stop in (True, False):
            loss = lambda x, stop=stop: pixel_control_loss(
                x, *rest, SIZE, stop_target_gradients=stop
            ).sum()
            assert np.any(jax.grad(loss)(observations)) != stop

    @pytest.mark.parametrize("action", [-1, ACTIONS, -ACTIONS, 99])
    def test_an_action_out_of_range_is_nan(self, play, action):
        """Where RLax takes another action for -1."""
        observations, actions, q, discounts = play
        actions[1] = action
        losses = pixel_control_loss(observations, actions, q, discounts, SIZE)
        assert jnp.isnan(losses).all((1, 2)).tolist() == [False, True, False, False]

    def test_a_zero_discount_cuts_exactly(self, play):
        observations, actions, q, discounts = play
        discounts[1] = 0
        losses = pixel_control_loss(observations, actions, q, discounts, SIZE)
        observations[3:], q[3:] = np.nan, np.inf
        cut = pixel_control_loss(observations, actions, q, discounts, SIZE)
        np.testing.assert_array_equal(cut[:2], losses[:2])

    def test_an_illegal_action_is_as_if_left_out(self, play):
        observations, actions, q, discounts = play
        actions, legal = actions % 2, np.array([True, True, False])
        expected = loss_by_hand(observations, actions, q[..., :2], discounts, SIZE)
        masked = pixel_control_loss(
            observations, actions, q, discounts, SIZE, mask=np.tile(legal, (T, 1))
        )
        infinite = np.where(legal, q, -np.inf)
        by_value = pixel_control_loss(observations, actions, infinite, discounts, SIZE)
        np.testing.assert_allclose(masked, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(masked, by_value)

    def test_a_time_limit_bootstraps_from_the_final_observation(self, play):
        observations, actions, q, discounts = play
        truncation_t = np.array([False, True, False, False])
        losses = pixel_control_loss(*play, SIZE, truncation_t=truncation_t)
        early = loss_by_hand(observations[:3], actions[:2], q[:3], discounts[:2], SIZE)
        late = loss_by_hand(observations[2:], actions[2:], q[2:], discounts[2:], SIZE)
        np.testing.assert_allclose(losses, [*early, *late], rtol=1e-4, atol=1e-6)

    def test_the_step_to_another_episode_is_left_out(self, play):
        """Observations 0 to 2 are one episode, and 3 and 4 the next."""
        observations, actions, q, discounts = play
        actions[2], discounts[2] = -1, np.nan
        mask_t = np.array([True, True, False, True])
        truncation_t = ~mask_t
        losses = pixel_control_loss(
            *play, SIZE, truncation_t=truncation_t, mask_t=mask_t
        )
        early = loss_by_hand(observations[:3], actions[:2], q[:3], discounts[:2], SIZE)
        late = loss_by_hand(observations[3:], actions[3:], q[3:], discounts[3:], SIZE)
        between = np.zeros((1, *CELLS))
        np.testing.assert_allclose(
            losses, [*early, *between, *late], rtol=1e-4, atol=1e-6
        )

    @pytest.mark.parametrize("stop", [True, False])
    def test_padding_may_hold_anything(self, play, stop):
        observations, actions, q, discounts = play
        short = (observations[:3], actions[:2], q[:3], discounts[:2])
        mask_t = jnp.array([True, True, False, False])

        def loss(observations, q, actions, discounts, **mask):
            return pixel_control_loss(
                *(observations, actions, q, discounts, SIZE),
                stop_target_gradients=stop,
                **mask,
            ).sum()

        slopes = jax.value_and_grad(loss, (0, 1))
        expected, by_hand = slopes(short[0], short[2], short[1], short[3])
        observations[3:], q[3:], actions[2:], discounts[2:] = np.nan, np.inf, 9, np.nan
        value, gradients = slopes(observations, q, actions, discounts, mask_t=mask_t)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for slope, one in zip(gradients, by_hand, strict=True):
            np.testing.assert_allclose(slope[:3], one, rtol=1e-5, atol=1e-7)
            assert not np.any(slope[3:])

    @pytest.mark.parametrize("cells", [(2, 2), (3, 3), (3, 2), (4, 6), (1, 1)])
    def test_values_for_other_cells_are_refused(self, play, cells):
        observations, actions, _, discounts = play
        q = jnp.zeros((T + 1, *cells, ACTIONS))
        message = r"^pixel_control_loss: action_values has shape .* = \(2, 3\)\.$"
        with pytest.raises(ValueError, match=message):
            pixel_control_loss(observations, actions, q, discounts, SIZE)

    @pytest.mark.parametrize("size", [0, 3, 8])
    def test_cells_that_do_not_fill_the_image_are_refused(self, play, size):
        with pytest.raises(ValueError, match="pixel_control_loss: cell_size must be"):
            pixel_control_loss(*play, size)

    def test_integers_are_refused(self, play):
        message = "pixel_control_loss: observations must be floating-point, got uint8"
        with pytest.raises(TypeError, match=message):
            pixel_control_loss(np.uint8(play[0]), *play[1:], SIZE)


class TestFeatureControlRewards:
    def by_hand(self, kind, phi, discounts):
        out = np.zeros((len(phi) - 1, phi.shape[1]))
        for t, d in np.ndindex(out.shape):
            old, new = float(phi[t, d]), float(phi[t + 1, d])
            out[t, d] = {
                "feature": new,
                "absolute_change": abs(new - old),
                "increase": new - old,
                "decrease": old - new,
                "potential": discounts[t] * new - old,
            }[kind]
        return out

    @pytest.mark.parametrize("kind", TYPES)
    def test_each_type_is_as_defined(self, rng, kind):
        phi = rng.normal(size=(5, 3)).astype(np.float32)
        discounts = rng.uniform(size=4).astype(np.float32)
        rewards = feature_control_rewards(phi, kind, discounts)
        expected = self.by_hand(kind, phi, discounts)
        np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)
        rewards = feature_control_rewards(phi, kind, discount=0.9)
        expected = self.by_hand(kind, phi, [0.9] * 4)
        np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)

    def test_are_absolute_changes_unless_told(self):
        phi = jnp.array([[1.0], [3.0], [2.0]])
        assert feature_control_rewards(phi).ravel().tolist() == [2, 1]

    def test_only_the_potential_needs_a_discount(self):
        phi = jnp.array([[1.0], [3.0]])
        for kind in TYPES[:-1]:
            feature_control_rewards(phi, kind)
        message = "feature_control_rewards: discount must be given for 'potential'"
        with pytest.raises(ValueError, match=message):
            feature_control_rewards(phi, "potential")

    @pytest.mark.parametrize("kind", ["change", "", None, 3])
    def test_an_unknown_type_is_refused(self, kind):
        message = "feature_control_rewards: cumulant_type must be one of 'feature', "
        with pytest.raises(ValueError, match=message):
            feature_control_rewards(jnp.zeros((2, 1)), kind)

    @pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), (2, 3)])
    def test_discounts_never_broadcast(self, shape):
        """RLax takes three for one of each feature."""
        phi, discount = jnp.zeros((3, 3)), jnp.ones(shape)
        message = (
            r"feature_control_rewards: discount has shape .*f\[\]\|f\[T\] with T = 2"
        )
        with pytest.raises(ValueError, match=message):
            feature_control_rewards(phi, "potential", discount)

    def test_the_potential_at_a_termination_ignores_what_follows(self):
        phi = jnp.array([[1.0], [jnp.nan], [2.0]])
        discount = jnp.array([0.0, 0.5])
        rewards = lambda phi: feature_control_rewards(phi, "potential", discount)[0, 0]
        assert rewards(phi) == -1
        assert jax.grad(rewards)(phi).ravel().tolist() == [-1, 0, 0]

    @pytest.mark.parametrize("kind", TYPES)
    def test_a_step_from_one_episode_to_the_next_is_no_change(self, rng, kind):
        phi = rng.normal(size=(5, 3)).astype(np.float32)
        phi[3:] = np.nan
        mask_t = jnp.array([True, True, False, False])
        total = lambda phi: feature_control_rewards(phi, kind, 0.5, mask_t=mask_t).sum()
        value, slopes = jax.value_and_grad(total)(phi)
        expected = self.by_hand(kind, phi[:3], [0.5] * 2).sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert np.isfinite(slopes).all()
        assert not np.any(slopes[3:])

    def test_potentials_telescope(self, rng):
        """Shaping adds the last potential less the first to a return, and no more."""
        phi = rng.normal(size=(6, 2)).astype(np.float32)
        rewards = feature_control_rewards(phi, "potential", 0.5)
        total = sum(0.5**t * reward for t, reward in enumerate(rewards))
        np.testing.assert_allclose(total, 0.5**5 * phi[5] - phi[0], rtol=1e-5)

    def test_integers_are_refused(self):
        message = "feature_control_rewards: features must be floating-point, got uint8"
        with pytest.raises(TypeError, match=message):
            feature_control_rewards(np.array([[255], [0]], np.uint8))

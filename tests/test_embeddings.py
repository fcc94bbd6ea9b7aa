"""Embeddings, entry by entry."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import embed_oar

FEATURES = np.float32([[0.5, -0.5], [1.5, 2.5], [3.0, 4.0]])
ACTION = np.int32([0, 2, 1])
REWARD = np.float32([1.0, -2.0, 100.0])


def by_hand(features, action, reward, num_actions):
    chosen = [1.0 if a == action else 0.0 for a in range(num_actions)]
    return [*features, *chosen, math.tanh(reward)]


def test_appends_the_action_and_the_squashed_reward():
    expected = [by_hand(*row, 3) for row in zip(FEATURES, ACTION, REWARD, strict=True)]
    np.testing.assert_allclose(
        embed_oar(FEATURES, ACTION, REWARD, 3), expected, rtol=1e-6
    )


def test_takes_any_leading_axes():
    together = embed_oar(FEATURES, ACTION, REWARD, 4)
    assert together.shape == (3, 7)
    one = embed_oar(FEATURES[1], ACTION[1], REWARD[1], 4)
    np.testing.assert_array_equal(one, together[1])
    two = embed_oar(FEATURES[None], ACTION[None], REWARD[None], 4)
    np.testing.assert_array_equal(two, together[None])


def test_an_action_out_of_range_is_nan_and_spoils_nothing_else():
    action = np.int32([3, -1, 1])
    embedding = np.asarray(embed_oar(FEATURES, action, REWARD, 3))
    assert np.isnan(embedding[:2, 2:5]).all()
    inside = embed_oar(FEATURES, np.int32([0, 0, 1]), REWARD, 3)
    rest = [0, 1, 5]
    np.testing.assert_array_equal(embedding[:, rest], inside[:, rest])
    np.testing.assert_array_equal(embedding[2], inside[2])


def test_gradients_reach_features_and_rewards():
    total = lambda features, reward: embed_oar(features, ACTION, reward, 3).sum()
    d_features, d_reward = jax.grad(total, (0, 1))(FEATURES, REWARD)
    np.testing.assert_array_equal(d_features, np.ones((3, 2)))
    np.testing.assert_allclose(d_reward, 1 - np.tanh(REWARD) ** 2, rtol=1e-5, atol=1e-7)


def test_any_integer_dtype_will_do():
    actions = [ACTION.astype(kind) for kind in (np.int8, np.uint8, np.int16)]
    expected = embed_oar(FEATURES, ACTION, REWARD, 200)
    for action in actions:
        np.testing.assert_array_equal(
            embed_oar(FEATURES, action, REWARD, 200), expected
        )


def test_no_features_are_fine():
    embedding = embed_oar(np.zeros((3, 0), np.float32), ACTION, REWARD, 3)
    assert embedding.shape == (3, 4)


@pytest.mark.parametrize("name", ["action", "reward"])
def test_one_entry_is_not_repeated(name):
    given = {"features": FEATURES, "action": ACTION, "reward": REWARD}
    given[name] = given[name][:1]
    with pytest.raises(
        ValueError, match=rf"embed_oar: {name} has shape \(1,\), expect"
    ):
        embed_oar(**given, num_actions=3)


@pytest.mark.parametrize("num_actions", [0, -1])
def test_no_actions_are_refused(num_actions):
    with pytest.raises(ValueError, match="embed_oar: num_actions must be at least 1"):
        embed_oar(FEATURES, ACTION, REWARD, num_actions)


def test_the_number_of_actions_is_a_python_int():
    with pytest.raises(TypeError, match="num_actions must be a Python int"):
        jax.jit(embed_oar)(FEATURES, ACTION, REWARD, jnp.int32(3))

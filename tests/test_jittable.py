import doctest

import catch
import gymnasium
import jax
import jax.numpy as jnp
import jittable
import numpy as np
import pytest
from jittable import CartPole, Catch


@pytest.fixture(scope="module")
def play():
    """Plays actions, `i[steps, B]`, in `B` environments."""

    def played(env, state, actions, key):
        def step(state, inputs):
            action, key = inputs
            keys = jax.random.split(key, len(action))
            state, timestep = jax.vmap(env.step)(state, action, keys)
            return state, (state, timestep)

        return jax.lax.scan(step, state, (actions, jax.random.split(key, len(actions))))

    compiled = jax.jit(played, static_argnums=0)
    return lambda *args: jax.tree.map(np.asarray, compiled(*args)[1])


def starts(env, count, seed=0):
    return jax.vmap(env.reset)(jax.random.split(jax.random.key(seed), count))


def test_the_examples_in_the_docstring_are_true():
    result = doctest.testmod(jittable, extraglobs={"jax": jax})
    assert result.attempted > 0
    assert result.failed == 0


# --- Catch --------------------------------------------------------------------------


def follow(env, column):
    """Starts an episode of catch.py whose ball is in a column."""
    timestep = env.step(0)
    while timestep.observation[0].argmax() != column:
        timestep = env.reset()
    return timestep


@pytest.mark.parametrize(("rows", "columns"), [(10, 5), (2, 1), (4, 6)])
def test_catch_is_catch_move_by_move_for_every_ball_and_random_actions(
    rows, columns, play, rng
):
    env = Catch(rows, columns)
    actions = rng.integers(3, size=(4 * rows + 1, 24)).astype(np.int32)
    _, ours = play(env, starts(env, 24), actions, jax.random.key(1))
    balls = set()
    for b in range(24):
        theirs = catch.Catch(rows, columns)
        for t, action in enumerate(actions[:, b]):
            board = ours.observation[t, b]
            if ours.first[t, b]:
                column = int(board[0].argmax())
                balls.add(column)
                timestep = follow(theirs, column)
            else:
                timestep = theirs.step(action)
            np.testing.assert_array_equal(board, timestep.observation)
            assert ours.first[t, b] == timestep.first()
            assert ours.last[t, b] == timestep.last()
            assert ours.r_t[t, b] == (timestep.reward or 0.0)
            assert ours.discount_t[t, b] == (timestep.last() is False)
    assert balls == set(range(columns))


def test_the_column_of_the_ball_is_drawn_evenly():
    balls = np.asarray(starts(Catch(columns=5), 5000).ball_column)
    np.testing.assert_allclose(np.bincount(balls), 1000, atol=120)  # 4 deviations


def test_the_specs_of_catch_are_those_of_catch():
    assert Catch(4, 3).observation_spec() == catch.Catch(4, 3).observation_spec()
    assert Catch().action_spec() == catch.Catch().action_spec()
    assert Catch(4, 3).episode_steps == 3


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (10, 0)])
def test_catch_refuses_a_board_without_room(rows, columns):
    with pytest.raises(ValueError, match=f"got {rows} x {columns}"):
        Catch(rows, columns)


# --- CartPole -----------------------------------------------------------------------


def near_edge(physics):
    return (
        abs(abs(physics[0]) - 2.4) < 1e-4
        or abs(abs(physics[2]) - np.radians(12)) < 1e-5
    )


def test_cartpole_is_that_of_gymnasium_step_by_step(play, rng):
    count, steps = 12, 150
    # Runs of the same push, from far outside of where episodes start.
    actions = np.repeat(rng.integers(2, size=(steps // 3, count)), 3, axis=0)
    env = CartPole()
    states, ours = play(env, starts(env, count), actions, jax.random.key(1))
    theirs = gymnasium.make("CartPole-v1").unwrapped
    compared = {"terminated": 0, "went on": 0}
    for b in range(count):
        for t in range(1, steps):
            if ours.first[t, b]:
                continue
            before = states.physics[t - 1, b]
            theirs.reset()
            theirs.state = before.astype(np.float64)
            observation, reward, terminated, _, _ = theirs.step(int(actions[t, b]))
            np.testing.assert_allclose(
                ours.observation[t, b], observation, rtol=1e-5, atol=1e-6
            )
            assert ours.r_t[t, b] == reward
            if not near_edge(observation):
                assert ours.last[t, b] == terminated
                assert ours.discount_t[t, b] == 1 - terminated
                compared["terminated" if terminated else "went on"] += 1
    assert compared["terminated"] > 20
    assert compared["went on"] > 1000


def test_one_long_episode_of_cartpole_stays_with_gymnasium(play):
    env, theirs = CartPole(), gymnasium.make("CartPole-v1").unwrapped
    actions = np.tile([[0], [1]], (20, 1))
    states, ours = play(env, starts(env, 1), actions, jax.random.key(0))
    theirs.reset()
    theirs.state = states.physics[0, 0].astype(np.float64)
    for t in range(1, len(actions)):
        observation, _, terminated, _, _ = theirs.step(int(actions[t, 0]))
        np.testing.assert_allclose(ours.observation[t, 0], observation, atol=1e-5)
        assert ours.last[t, 0] == terminated
        if terminated:
            break
    assert t > 20


def test_the_bounds_of_cartpole_are_those_of_gymnasium():
    theirs = gymnasium.make("CartPole-v1")
    x, angle = theirs.unwrapped.x_threshold, theirs.unwrapped.theta_threshold_radians
    assert CartPole().limit == theirs.spec.max_episode_steps
    env, state = CartPole(), starts(CartPole(), 1)
    step = jax.jit(env.step)

    def ends(position, lean):
        physics = jnp.array([position, 0.0, lean, 0.0])
        state = jittable.CartPoleState(physics, jnp.int32(3), jnp.array(False))
        return bool(step(state, 0, jax.random.key(0))[1].last)

    for sign in -1, 1:
        assert not ends(sign * (x - 1e-4), 0.0)
        assert ends(sign * (x + 1e-4), 0.0)
        assert not ends(0.0, sign * (angle - 1e-4))
        assert ends(0.0, sign * (angle + 1e-4))
    assert state.over.all()


def test_the_time_limit_of_cartpole_cuts_short_and_a_fall_terminates(play):
    env = CartPole(limit=3)
    actions = np.tile([[0], [0], [1], [0]], (2, 2))
    states, seen = play(env, starts(env, 2), actions, jax.random.key(0))
    for b in range(2):
        assert seen.first[:, b].tolist() == [True, False, False, False] * 2
        assert seen.last[:, b].tolist() == [False, False, False, True] * 2
        assert seen.discount_t[:, b].tolist() == [1.0] * 8
        assert seen.r_t[:, b].tolist() == [0.0, 1.0, 1.0, 1.0] * 2
    # The final observation is what the last push led to, not the next start.
    np.testing.assert_array_equal(seen.observation[3], states.physics[3])
    assert not np.allclose(seen.observation[3], seen.observation[4])
    leaning = jittable.CartPoleState(
        jnp.array([0.0, 0.0, 0.3, 0.0]), jnp.int32(2), jnp.array(False)
    )
    _, both = jax.jit(env.step)(leaning, 0, jax.random.key(0))
    assert (both.last, both.discount_t) == (True, 0.0)  # a fall at the limit is a fall


def test_cartpole_starts_where_gymnasium_does():
    physics = np.asarray(starts(CartPole(), 1000).physics)
    assert np.abs(physics).max() < 0.05
    np.testing.assert_allclose(physics.mean(axis=0), 0.0, atol=0.005)
    np.testing.assert_allclose(physics.std(axis=0), 0.1 / 12**0.5, rtol=0.1)


def test_cartpole_refuses_a_limit_without_steps():
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        CartPole(limit=0)

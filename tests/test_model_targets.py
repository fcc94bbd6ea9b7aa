"""Targets of an unrolled model, against a walk through the trajectory step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

T, K, A = 12, 4, 3


def walk(t, discount, truncation, mask, num_unroll_steps):
    """Where a model unrolled from step `t` is: at a step, "absorbed", or nowhere."""
    place = t if mask[t] else None
    for _ in range(num_unroll_steps + 1):
        yield place
        if place is None or place == "absorbed":
            continue
        ended, cut = discount[place] == 0, truncation[place]
        place += 1
        while place < len(mask) and not mask[place]:
            cut |= truncation[place]
            place += 1
        if ended:
            place = "absorbed"
        elif cut or place == len(mask):
            place = None


def targets_by_hand(returns, pi, r, discount, truncation, mask, num_unroll_steps):
    """The six arrays, one entry after the other."""
    shape = len(r), num_unroll_steps + 1
    value, reward, policy = np.zeros(shape), np.zeros(shape), np.zeros((*shape, A))
    has_value, has_reward, has_policy = (np.zeros(shape, bool) for _ in range(3))
    for t in range(len(r)):
        places = list(walk(t, discount, truncation, mask, num_unroll_steps))
        for k, place in enumerate(places):
            if place is None:
                continue
            has_value[t, k] = True
            if place == "absorbed":
                policy[t, k] = 1 / A
            else:
                value[t, k], policy[t, k] = returns[place], pi[place]
                has_policy[t, k] = True
        for k in range(1, num_unroll_steps + 1):
            before = places[k - 1]
            if before is not None:
                has_reward[t, k] = True
                reward[t, k] = 0 if before == "absorbed" else r[before]
    return value, reward, policy, has_value, has_reward, has_policy


def trajectory(seed):
    """Steps with any ends and any padding, which holds nothing to compute with."""
    rng = np.random.default_rng(seed)
    returns, r = rng.normal(size=(2, T))
    pi = rng.dirichlet(np.ones(A), size=T)
    discount = np.where(rng.uniform(size=T) < 0.2, 0, 0.9)
    truncation = rng.uniform(size=T) < 0.2
    mask = rng.uniform(size=T) < 0.8
    for x in (returns, pi, r, discount):
        x[~mask] = np.nan
    floats = (x.astype(np.float32) for x in (returns, pi, r, discount))
    return *floats, truncation, mask


@pytest.fixture(scope="module")
def targets():
    @functools.partial(jax.jit, static_argnums=6)
    def targets(returns, pi, r, discount, truncation, mask, k):
        return rlprims.muzero_targets(
            returns,
            pi,
            r,
            discount,
            num_unroll_steps=k,
            truncation_t=truncation,
            mask_t=mask,
        )

    return targets


def assert_all_close(results, expected):
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_are_those_of_a_walk_along_the_trajectory(targets):
    for seed in range(60):
        steps = trajectory(seed)
        assert_all_close(targets(*steps, K), targets_by_hand(*steps, K))


@pytest.mark.parametrize("k", [0, 1, 3 * T])
def test_any_number_of_unroll_steps_will_do(targets, k):
    steps = trajectory(0)
    assert_all_close(targets(*steps, k), targets_by_hand(*steps, k))


def test_without_padding_or_time_limits_no_flags_are_needed():
    returns, pi, r, discount = (np.nan_to_num(x) for x in trajectory(1)[:4])
    no, yes = np.zeros(T, bool), np.ones(T, bool)
    results = rlprims.muzero_targets(returns, pi, r, discount, num_unroll_steps=K)
    expected = targets_by_hand(returns, pi, r, discount, no, yes, K)
    assert_all_close(results, expected)


def game_targets(rewards, root_values, visits, discount, td_steps, k):
    """A game that has ended, as the pseudo-code of MuZero has it.

    Of it the value, the reward and the policy, or `None` where there is no target.
    """
    size = len(rewards)
    for t in range(size):
        for now in range(t, t + k + 1):
            end = now + td_steps
            value = root_values[end] * discount**td_steps if end < size else 0
            for i, reward in enumerate(rewards[now:end]):
                value += reward * discount**i
            reward = rewards[now - 1] if t < now <= size else 0 if t < now else None
            yield value, reward, visits[now] if now < size else None


def test_of_a_finished_game_are_those_of_muzero(rng):
    """With returns that bootstrap, after three steps, from the values of searches."""
    rewards, values = rng.normal(size=(2, 7))
    visits = rng.dirichlet(np.ones(A), size=7)
    discount = np.full(7, 0.9)
    discount[-1] = 0
    with jax.enable_x64(True):
        returns = rlprims.n_step_bootstrapped_returns(
            rewards, discount, np.append(values[1:], np.nan), 3
        )
        results = rlprims.muzero_targets(
            returns, visits, rewards, discount, num_unroll_steps=K
        )
    value, reward, policy, *masks = (x.reshape(7 * (K + 1), -1) for x in results)
    expected = list(game_targets(rewards, values, visits, 0.9, 3, K))
    for i, row in enumerate(expected):
        for x, mask, target in zip((value, reward, policy), masks, row, strict=True):
            assert mask[i] == (target is not None)
            if target is not None:
                np.testing.assert_allclose(x[i], target, rtol=1e-12)


def test_after_a_termination_the_state_is_absorbing():
    one, pi = jnp.ones(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    discount = jnp.array([0.0, 0.9])
    targets = rlprims.muzero_targets(one, pi, one, discount, num_unroll_steps=3)
    assert targets.value[0].tolist() == [1, 0, 0, 0]
    assert targets.value_mask[0].tolist() == [True] * 4
    assert targets.reward[0].tolist() == [0, 1, 0, 0]
    assert targets.reward_mask[0].tolist() == [False, True, True, True]
    assert targets.policy[0].tolist() == [[1, 0]] + [[0.5, 0.5]] * 3
    assert targets.policy_mask[0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("step", [0, 1])
def test_after_a_time_limit_and_at_the_end_nothing_is_known(step):
    one, pi = jnp.ones(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    cut = jnp.array([True, False])
    targets = rlprims.muzero_targets(
        one, pi, one, one, num_unroll_steps=3, truncation_t=cut
    )
    assert targets.value[step].tolist() == [1, 0, 0, 0]
    assert targets.value_mask[step].tolist() == [True, False, False, False]
    assert targets.reward[step].tolist() == [0, 1, 0, 0]
    assert targets.reward_mask[step].tolist() == [False, True, False, False]
    assert targets.policy[step].tolist() == [[1, 0]] + [[0, 0]] * 3
    assert targets.policy_mask[step].tolist() == [True, False, False, False]


def test_a_termination_at_the_time_limit_is_a_termination():
    one, pi, yes = jnp.ones(1), jnp.ones((1, 1)), jnp.ones(1, bool)
    targets = rlprims.muzero_targets(
        one, pi, one, 0 * one, num_unroll_steps=2, truncation_t=yes
    )
    assert targets.value_mask.all()


@pytest.mark.parametrize("ends", ["terminated", "truncated"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_of_the_next_episode_gets_in(ends, bad):
    """Not as a value, nor into a gradient."""
    first = np.arange(4) < 2
    x = np.where(first, 1, bad).astype(np.float32)
    pi = np.stack([x, x], axis=1)
    discount = np.ones(4, np.float32)
    truncation = np.zeros(4, bool)
    if ends == "terminated":
        discount[1] = 0
    else:
        truncation[1] = True

    def total(x, pi):
        targets = rlprims.muzero_targets(
            x,
            pi,
            x,
            discount,
            num_unroll_steps=3,
            truncation_t=truncation,
            stop_target_gradients=False,
        )
        return sum(jnp.sum(y[:2]) for y in targets[:3])

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(x, pi)
    assert np.isfinite(value)
    # From itself and from the step before; and a reward of each, if it was ahead.
    assert gradients[0].tolist() == [2, 4, 0, 0]
    assert gradients[1].tolist() == [[1, 1], [2, 2], [0, 0], [0, 0]]


def test_targets_are_constants_unless_told_otherwise():
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def slopes(x, pi, flag):
        targets = rlprims.muzero_targets(
            x, pi, x, x, num_unroll_steps=2, stop_target_gradients=flag
        )
        return sum(jnp.sum(y) for y in targets[:3])

    args = jnp.ones(3), jnp.ones((3, 2))
    assert not any(x.any() for x in slopes(*args, True))
    of_x, of_pi = slopes(*args, False)
    assert of_x.tolist() == [1 + 1, 2 + 2, 3 + 2]
    assert of_pi.tolist() == [[1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_keep_the_dtype(dtype):
    one, pi = jnp.ones(3, dtype), jnp.ones((3, 2), dtype)
    results = rlprims.muzero_targets(one, pi, one, one, num_unroll_steps=2)
    assert [x.dtype for x in results] == [dtype] * 3 + [jnp.bool_] * 3


def test_losses_of_unrolled_steps_weigh_together_what_the_first_weighs(rng):
    """As the page of the module has it."""
    bins = jnp.linspace(-3.0, 3.0, 5)
    returns, r = rng.uniform(-1, 1, size=(2, 3)).astype(np.float32)
    targets = rlprims.muzero_targets(
        returns, jnp.ones((3, 1)), r, np.float32([1, 1, 0]), num_unroll_steps=2
    )

    def losses(logits):
        return rlprims.two_hot_loss(
            logits, targets.value, bins, mask_t=targets.value_mask, reduction="none"
        )

    def loss(logits):
        each = losses(logits)
        unrolled = rlprims.scale_gradient(each[:, 1:], 1 / 2)
        return jnp.sum(each[:, 0]) + jnp.sum(unrolled)

    logits = jnp.asarray(rng.normal(size=(3, 3, 5)), jnp.float32)
    plain = jax.jit(jax.grad(lambda x: jnp.sum(losses(x))))(logits)
    scaled = jax.jit(jax.grad(loss))(logits)
    weights = np.float32([1, 0.5, 0.5])[None, :, None]
    np.testing.assert_allclose(scaled, plain * weights, rtol=1e-6)


def test_refuses_to_unroll_backwards():
    one, pi = jnp.ones(3), jnp.ones((3, 2))
    with pytest.raises(
        ValueError, match="muzero_targets: num_unroll_steps must be at least 0: -1"
    ):
        rlprims.muzero_targets(one, pi, one, one, num_unroll_steps=-1)

"""Losses from fixed data, against plain-Python readings of their equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    iql_value_loss,
    rebrac_actor_loss,
    rebrac_critic_errors,
    td3_bc_actor_loss,
    xql_value_loss,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

BAD = [np.nan, np.inf, -np.inf]
PADDED = jnp.array([True, True, False])


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def each(fn, *arrays):
    numbers = zip(*(np.float64(x).ravel().tolist() for x in arrays), strict=True)
    return np.reshape([fn(*xs) for xs in numbers], np.shape(arrays[0]))


def descend(loss, start, rate, steps=2000):
    """Where a number ends that follows its gradient down."""
    step = lambda _, x: x - rate * jax.grad(loss)(x)
    return jax.jit(lambda x: jax.lax.fori_loop(0, steps, step, x))(start)


class TestImplicitQLearning:
    def test_squares_count_by_side(self, rng):
        v, q, tau = rng.uniform(size=(3, 4, 9)).astype(np.float32)

        def by_hand(v, q, tau):
            return (tau if q > v else 1 - tau) * (q - v) ** 2

        fn = functools.partial(iql_value_loss, v, q)
        expected = each(by_hand, v, q, tau)
        same(fn(expectile=tau, reduction="none"), expected)
        same(fn(expectile=tau, reduction="sum"), expected.sum())
        half = each(functools.partial(by_hand, tau=0.5), v, q)
        same(fn(expectile=0.5), half.mean())

    def test_the_value_rises_from_the_mean_towards_the_best_action(self):
        q = jnp.array([0.0, 1.0, 5.0])

        def value(tau):
            loss = lambda v: iql_value_loss(v * jnp.ones(3), q, expectile=tau)
            return descend(loss, 2.0, 0.2)

        same(value(0.5), 2)
        # Where 0.9 (5 - v) = 0.1 (v - 0) + 0.1 (v - 1)
        same(value(0.9), 4.6 / 1.1)
        same(value(1.0), 5, atol=1e-3)

    @pytest.mark.parametrize("stop", [True, False])
    @pytest.mark.parametrize("bad", BAD)
    def test_padding_counts_for_nothing(self, bad, stop):
        v, q = jnp.array([1.0, 1.0, bad]), jnp.array([3.0, 0.0, bad])
        tau = jnp.array([0.75, 0.75, bad])

        def fn(v, q, tau):
            settings = {"expectile": tau, "stop_target_gradients": stop}
            return iql_value_loss(v, q, mask_t=PADDED, **settings)

        loss, slopes = jax.value_and_grad(fn, range(3))(v, q, tau)
        same(loss, (0.75 * 4 + 0.25) / 2)
        same(slopes[0], [-1.5, 0.25, 0])
        same(slopes[1], np.array([1.5, -0.25, 0]) * (not stop))
        same(slopes[2], [2, -0.5, 0])
        nothing = iql_value_loss(v, q, expectile=0.7, mask_t=PADDED & False)
        assert nothing == 0


class TestExtremeQLearning:
    @pytest.mark.parametrize("limit", [math.inf, 1.5])
    def test_is_the_loss_of_a_gumbel_variable_and_a_line_beyond_the_limit(
        self, rng, limit
    ):
        v, q = rng.normal(scale=2, size=(2, 4, 9))

        def by_hand(v, q):
            z = (q - v) / 0.8
            near = min(z, limit)
            return math.exp(near) * (1 + z - near) - z - 1

        with jax.enable_x64(True):
            fn = functools.partial(xql_value_loss, temperature=0.8, reduction="none")
            losses, pull = jax.vjp(lambda v: fn(v, q, max_exponent=limit), v)
            (slopes,) = pull(jnp.ones_like(losses))
        same(losses, each(by_hand, v, q), rtol=1e-10)
        around = (each(by_hand, v + 1e-6, q) - each(by_hand, v - 1e-6, q)) / 2e-6
        same(slopes, around, rtol=1e-6, atol=1e-7)

    def test_is_least_at_the_soft_maximum(self):
        q = jnp.array([0.0, 1.0, 5.0])
        loss = lambda v: xql_value_loss(v * jnp.ones(3), q, temperature=2.0)
        mean = math.fsum(math.exp(x / 2) for x in (0, 1, 5)) / 3
        same(descend(loss, 4.0, 0.5), 2 * math.log(mean))

    def test_keeps_all_digits_of_a_small_error(self):
        losses = xql_value_loss(
            jnp.zeros(2), jnp.array([1e-4, -1e-6]), temperature=1.0, reduction="none"
        )
        same(losses, [5.0001667e-9, 4.9999983e-13], atol=0)

    def test_a_huge_error_is_linear_and_keeps_its_gradient(self):
        v, q = jnp.zeros(4, jnp.float32), jnp.float32([1e6, -1e6, 200, 3e38])

        def fn(v, limit):
            settings = {"temperature": 0.01, "max_exponent": limit}
            return xql_value_loss(v, q, reduction="none", **settings)

        losses, pull = jax.vjp(lambda v: fn(v, 3.0), v)
        slope = math.expm1(3)
        line = lambda z: math.exp(3) - 4 + slope * (z - 3)
        same(losses, [line(1e8), 1e8 - 1, line(2e4), math.inf])
        same(pull(jnp.ones_like(v))[0], [-100 * slope, 100, -100 * slope, 0])
        losses, pull = jax.vjp(lambda v: fn(v, jnp.inf), v)
        same(losses, [math.inf, 1e8 - 1, math.inf, math.inf])
        same(pull(jnp.ones_like(v))[0], [0, 100, 0, 0])

    @pytest.mark.parametrize("stop", [True, False])
    @pytest.mark.parametrize("bad", BAD)
    def test_padding_counts_for_nothing(self, bad, stop):
        v, q = jnp.array([1.0, 1.0, bad]), jnp.array([3.0, 1.0, bad])

        def fn(v, q, heat, limit):
            settings = {"max_exponent": limit, "stop_target_gradients": stop}
            return xql_value_loss(v, q, temperature=heat, mask_t=PADDED, **settings)

        with jax.debug_nans(True):
            fn = jax.jit(jax.value_and_grad(fn, range(4)))
            loss, slopes = fn(v, q, 2.0, 9.0)
        same(loss, (math.e - 2) / 2)
        slope = (math.e - 1) / 4
        same(slopes[0], [-slope, 0, 0])
        same(slopes[1], [slope * (not stop), 0, 0])
        same(slopes[2], -slope)
        same(slopes[3], 0)


def squared_distance(a, b):
    return ((np.float64(a) - np.float64(b)) ** 2).sum(-1)


@pytest.fixture
def actions(rng):
    q = rng.normal(size=(2, 4)).astype(np.float32)
    a, data = rng.normal(size=(2, 2, 4, 3)).astype(np.float32)
    return q, a, data


class TestTd3WithBehaviourCloning:
    def test_weighs_values_by_their_mean_size(self, actions):
        q, a, data = actions
        for alpha, settings in ((2.5, {}), (0.5, {"alpha": 0.5})):
            weight = alpha / np.abs(np.float64(q)).mean()
            expected = squared_distance(a, data) - weight * q
            fn = functools.partial(td3_bc_actor_loss, q, a, data, **settings)
            same(fn(reduction="none"), expected)
            same(fn(), expected.mean())
            same(fn(reduction="sum"), expected.sum())

    def test_does_not_depend_on_the_scale_of_rewards(self, actions):
        q, a, data = actions
        same(td3_bc_actor_loss(1000 * q, a, data), td3_bc_actor_loss(q, a, data))

    def test_gives_the_loss_of_popular_code_as_its_docstring_says(self, actions):
        q, a, data = actions
        theirs = ((a - data) ** 2).mean() - 2.5 * q.mean() / np.abs(q).mean()
        same(td3_bc_actor_loss(q, a, data, alpha=2.5 * 3) / 3, theirs)

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_are_those_derived_by_hand(self, stop):
        q, a, data = jnp.array([1.0, -3.0]), jnp.array([[1.0], [2.0]]), jnp.ones((2, 1))

        def fn(q, a, data, alpha):
            settings = {"alpha": alpha, "use_stop_gradient": stop}
            return td3_bc_actor_loss(q, a, data, reduction="sum", **settings)

        by_q, by_a, by_data, by_alpha = jax.grad(fn, range(4))(q, a, data, 4.0)
        # The loss has -4 sum(q) / m, with m the mean size, 2; dm/dq = sign(q) / 2.
        through_the_mean = 4 * -2 / 4 * np.array([0.5, -0.5]) * (not stop)
        same(by_q, -2 + through_the_mean)
        same(by_a, [[0], [2]])
        same(by_data, np.array([[0], [-2]]) * (not stop))
        same(by_alpha, 2 / 2 * (not stop))

    def test_values_of_zero_leave_behaviour_cloning(self, actions):
        q, a, data = actions
        fn = jax.value_and_grad(td3_bc_actor_loss)
        loss, slopes = fn(0 * q, a, data)
        same(loss, squared_distance(a, data).mean())
        same(slopes, np.full(q.shape, -2.5 / 8))
        same(td3_bc_actor_loss(q, a, data, alpha=0.0), loss)

    @pytest.mark.parametrize("bad", BAD)
    def test_padding_counts_for_nothing(self, bad):
        q = jnp.array([1.0, -3.0, bad])
        a, data = jnp.array([[1.0], [2.0], [bad]]), jnp.array([[1.0], [1.0], [bad]])

        def fn(q, a, data, alpha, mask):
            settings = {"alpha": alpha, "use_stop_gradient": False}
            return td3_bc_actor_loss(q, a, data, mask_t=mask, **settings)

        fn = jax.jit(jax.value_and_grad(fn, range(4)))
        with jax.debug_nans(True):
            loss, slopes = fn(q, a, data, 4.0, PADDED)
            nothing, none = fn(q, a, data, 4.0, PADDED & False)
        same(loss, (1 + 4) / 2)
        same(slopes[0], [-1.5, -0.5, 0])
        same(slopes[1], [[0], [1], [0]])
        same(slopes[2], [[0], [-1], [0]])
        same(slopes[3], 0.5)
        assert nothing == 0
        assert not any(slope.any() for slope in none)


class TestRebracActor:
    def test_is_the_price_of_the_distance_less_the_value(self, actions):
        q, a, data = actions
        expected = 0.3 * squared_distance(a, data) - q
        fn = functools.partial(rebrac_actor_loss, q, a, data, penalty_weight=0.3)
        same(fn(reduction="none"), expected)
        same(fn(), expected.mean())
        same(fn(reduction="sum"), expected.sum())

    def test_divided_by_the_size_of_values_it_is_that_of_td3_bc(self, actions):
        q, a, data = actions
        scaled = rebrac_actor_loss(q / np.abs(q).mean(), a, data, penalty_weight=0.4)
        same(0.4 * td3_bc_actor_loss(q, a, data, alpha=1 / 0.4), scaled)

    @pytest.mark.parametrize("stop", [True, False])
    @pytest.mark.parametrize("bad", BAD)
    def test_padding_counts_for_nothing(self, bad, stop):
        q = jnp.array([1.0, 2.0, bad])
        a, data = jnp.array([[1.0], [2.0], [bad]]), jnp.array([[1.0], [1.0], [bad]])

        def fn(q, a, data, weight):
            settings = {"penalty_weight": weight, "use_stop_gradient": stop}
            return rebrac_actor_loss(q, a, data, mask_t=PADDED, **settings)

        loss, slopes = jax.value_and_grad(fn, range(4))(q, a, data, 4.0)
        flows = not stop
        same(loss, (4 - 3) / 2)
        same(slopes[0], [-0.5, -0.5, 0])
        same(slopes[1], [[0], [4], [0]])
        same(slopes[2], np.array([[0], [-4], [0]]) * flows)
        same(slopes[3], 0.5 * flows)

    def test_a_price_of_zero_leaves_the_data_out(self):
        args = jnp.ones(2), jnp.ones((2, 1)), jnp.array([[jnp.nan], [1e30]])
        fn = functools.partial(rebrac_actor_loss, penalty_weight=0.0)
        loss, slopes = jax.value_and_grad(fn, (0, 1))(*args)
        same(loss, -1)
        same(slopes[1], np.zeros((2, 1)))


class TestRebracCritic:
    def test_the_least_value_less_the_penalty_is_the_target_of_all(self, rng, actions):
        _, a, data = actions
        q_tm1, q_t = rng.normal(size=(2, 3, 2, 4)).astype(np.float32)
        r_t, discount_t = rng.uniform(size=(2, 2, 4)).astype(np.float32)
        args = q_tm1, r_t, discount_t, q_t[:2], a, data
        errors = rebrac_critic_errors(*args, penalty_weight=0.3)
        v_t = np.minimum(q_t[0], q_t[1]) - 0.3 * squared_distance(a, data)
        same(errors, r_t + discount_t * v_t - q_tm1)

    def test_gradients_flow_to_predictions_alone_by_default(self):
        args = (
            jnp.ones((2, 1)),
            *jnp.ones((2, 1)),
            jnp.ones((2, 1)),
            *jnp.eye(2)[:, None],
        )

        def fn(*args):
            return rebrac_critic_errors(*args[:6], penalty_weight=args[6]).sum()

        first, *others = jax.grad(fn, range(7))(*args, 0.5)
        assert first.tolist() == [[-1], [-1]]
        assert not any(x.any() for x in others)

    @pytest.mark.parametrize("bad", BAD)
    def test_nothing_leaks_from_behind_the_end(self, bad):
        a, data = jnp.array([[bad], [2.0]]), jnp.array([[bad], [1.0]])
        q_t = jnp.array([[bad, 3.0]])

        def fn(q_tm1, r_t, discount_t, q_t, a, data, weight):
            errors = rebrac_critic_errors(
                *(q_tm1, r_t, discount_t, q_t, a, data),
                penalty_weight=weight,
                stop_target_gradients=False,
            )
            return errors.sum(), errors

        args = jnp.ones((1, 2)), jnp.ones(2), jnp.array([0.0, 0.5]), q_t, a, data, 2.0
        slopes, errors = jax.grad(fn, range(7), has_aux=True)(*args)
        same(errors, [[0, 0.5]])
        same(slopes[2], [0, 1])
        same(slopes[3], [[0, 0.5]])
        same(slopes[4], [[0], [-2]])
        same(slopes[5], [[0], [2]])
        same(slopes[6], -0.5)

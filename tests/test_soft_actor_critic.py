"""Soft actor-critic, against its definitions and gradients derived by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    clipped_double_q_learning,
    continuous_target_entropy,
    rescale_action,
    sac_actor_loss,
    sac_critic_errors,
    sac_temperature_loss,
    tanh_gaussian_sample_and_log_prob,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

KEY = jax.random.key(2)
BAD = [np.nan, np.inf, -np.inf]
CRITICS, SHAPE = 3, (2, 4)


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


@pytest.fixture
def batch(rng):
    """Predictions, rewards, discounts, target values, log-probabilities, prices."""
    q_tm1, q_t = rng.normal(size=(2, CRITICS, *SHAPE)).astype(np.float32)
    r_t, discount_t, log_prob_t = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    temperature = rng.uniform(0.1, 2, size=SHAPE).astype(np.float32)
    return q_tm1, r_t, discount_t, q_t, log_prob_t, temperature


def least(q):
    """The least estimate in each place, and whose it is."""
    places = [(int(np.argmin(q[:, *i])), *i) for i in np.ndindex(q.shape[1:])]
    return np.reshape([q[i] for i in places], q.shape[1:]), places


class TestCriticErrors:
    def test_every_critic_learns_from_the_least_soft_value(self, batch):
        q_tm1, r_t, discount_t, q_t, log_prob_t, temperature = batch
        for alpha in (temperature, 0.3):
            errors = sac_critic_errors(*batch[:5], temperature=alpha)
            target = r_t + discount_t * (least(q_t)[0] - alpha * log_prob_t)
            for error, q in zip(errors, q_tm1, strict=True):
                same(error, target - q)

    def test_without_a_price_on_entropy_it_is_clipped_double_q_learning(self, batch):
        expected = clipped_double_q_learning(*batch[:4])
        same(sac_critic_errors(*batch[:5], temperature=0.0), expected)
        certain = np.full(SHAPE, np.inf, np.float32)
        same(sac_critic_errors(*batch[:4], certain, temperature=0.0), expected)

    def test_gradients_flow_to_predictions_alone_by_default(self, batch):
        fn = lambda *args: sac_critic_errors(*args[:5], temperature=args[5]).sum()
        first, *others = jax.grad(fn, range(6))(*batch)
        same(first, -np.ones_like(first))
        assert not any(slope.any() for slope in others)

    def test_gradients_through_the_target_are_those_derived_by_hand(self, batch):
        _, _, discount_t, q_t, log_prob_t, temperature = batch

        def fn(*args):
            settings = {"temperature": args[5], "stop_target_gradients": False}
            return sac_critic_errors(*args[:5], **settings).sum() / CRITICS

        slopes = jax.grad(fn, range(1, 6))(*batch)
        value, places = least(q_t)
        by_q = np.zeros_like(q_t)
        for place in places:
            by_q[place] = discount_t[place[1:]]
        soft = value - temperature * log_prob_t
        expected = [
            np.ones(SHAPE),
            soft,
            by_q,
            -discount_t * temperature,
            -discount_t * log_prob_t,
        ]
        for slope, by_hand in zip(slopes, expected, strict=True):
            same(slope, by_hand)

    @pytest.mark.parametrize("bad", BAD)
    def test_nothing_leaks_from_behind_the_end(self, bad):
        """Neither from the critics nor from the policy."""
        q_t, log_prob_t = jnp.array([[bad, 4.0], [3.0, 5.0]]), jnp.array([bad, -2.0])

        def fn(*args):
            settings = {"temperature": args[5], "stop_target_gradients": False}
            errors = sac_critic_errors(*args[:5], **settings)
            return errors.sum(), errors

        args = (
            jnp.ones((2, 2)),
            jnp.ones(2),
            jnp.array([0.0, 0.5]),
            q_t,
            log_prob_t,
            0.5,
        )
        slopes, errors = jax.grad(fn, range(6), has_aux=True)(*args)
        same(errors, [[0, 2.5], [0, 2.5]])
        assert all(np.isfinite(slope).all() for slope in slopes)
        same(slopes[5], 2)  # two critics, half of two nats

    def test_a_negative_temperature_is_refused(self, batch):
        with pytest.raises(
            ValueError, match=r"temperature must be in \[0, inf\), got -1"
        ):
            sac_critic_errors(*batch[:5], temperature=-1)


class TestActorLoss:
    def test_is_the_price_of_being_sure_less_the_least_value(self, batch):
        *_, q_t, log_prob_t, temperature = batch
        expected = temperature * log_prob_t - least(q_t)[0]
        fn = functools.partial(sac_actor_loss, log_prob_t, q_t, temperature=temperature)
        same(fn(reduction="none"), expected)
        same(fn(reduction="sum"), expected.sum())
        same(fn(), expected.mean())

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_are_those_derived_by_hand(self, batch, stop):
        """They reach the policy both ways, and the temperature only if told."""
        *_, q_t, log_prob_t, temperature = batch

        def fn(log_prob_t, q_t, temperature):
            settings = {"temperature": temperature, "use_stop_gradient": stop}
            return sac_actor_loss(log_prob_t, q_t, **settings, reduction="sum")

        slopes = jax.grad(fn, range(3))(log_prob_t, q_t, temperature)
        by_q = np.zeros_like(q_t)
        for place in least(q_t)[1]:
            by_q[place] = -1
        same(slopes[0], temperature)
        same(slopes[1], by_q)
        same(slopes[2], log_prob_t * (not stop))

    def test_its_gradient_by_the_mean_is_that_of_the_reparametrised_draw(self):
        alpha, target = 0.3, jnp.array([0.2, -0.4])
        q = lambda a: -((a - target) ** 2).sum(keepdims=True)

        def fn(mu):
            action, log_prob, _ = tanh_gaussian_sample_and_log_prob(KEY, mu, 0.5)
            return sac_actor_loss(log_prob, q(action), temperature=alpha)

        mu = jnp.array([0.1, 1.5])
        tanh = np.tanh(mu + 0.5 * jax.random.normal(KEY, (2,)))
        slope = -2 * (tanh - target)  # of the critic
        same(jax.grad(fn)(mu), 2 * alpha * tanh - slope * (1 - tanh**2))

    @pytest.mark.parametrize("bad", BAD)
    def test_padding_does_not_count(self, bad):
        mask = jnp.array([True, False, True])
        log_prob_t, q_t = jnp.array([1.0, bad, 2.0]), jnp.array([[3.0, bad, 4.0]])

        def fn(log_prob_t, q_t, alpha):
            settings = {"temperature": alpha, "use_stop_gradient": False}
            return sac_actor_loss(log_prob_t, q_t, **settings, mask_t=mask)

        alpha = jnp.array([0.5, bad, 0.5])
        loss, slopes = jax.value_and_grad(fn, range(3))(log_prob_t, q_t, alpha)
        same(loss, (-2.5 - 3) / 2)
        same(slopes[0], [0.25, 0, 0.25])
        same(slopes[1], [[-0.5, 0, -0.5]])
        same(slopes[2], [0.5, 0, 1])

    def test_of_nothing_but_padding_it_is_zero(self):
        nothing, mask = jnp.full(2, np.nan), jnp.zeros(2, bool)
        assert sac_actor_loss(nothing, nothing[None], temperature=1.0, mask_t=mask) == 0

    def test_action_values_without_an_axis_of_critics_are_refused(self):
        with pytest.raises(
            ValueError, match=r"q_t has shape \(3,\), expected f\[N,...\]"
        ):
            sac_actor_loss(jnp.ones(3), jnp.ones(3), temperature=1.0)


class TestTemperatureLoss:
    @pytest.mark.parametrize("stop", [True, False])
    def test_its_gradients_are_those_derived_by_hand(self, rng, stop):
        log_prob_t = rng.normal(size=5).astype(np.float32)

        def fn(alpha, log_prob_t, target):
            settings = {"target_entropy": target, "use_stop_gradient": stop}
            return sac_temperature_loss(alpha, log_prob_t, **settings)

        loss, slopes = jax.value_and_grad(fn, range(3))(0.4, log_prob_t, -2.0)
        excess = log_prob_t.mean() - 2
        same(loss, -0.4 * excess)
        same(slopes[0], -excess)
        same(slopes[1], np.full(5, -0.08) * (not stop))
        same(slopes[2], -0.4 * (not stop))

    def test_the_logarithm_of_the_temperature_learns_in_either_form(self, rng):
        """That of the paper has the temperature in its gradient."""
        log_prob_t = rng.normal(size=5).astype(np.float32)
        fn = functools.partial(sac_temperature_loss, target_entropy=-2.0)
        paper = jax.grad(lambda log_alpha: fn(jnp.exp(log_alpha), log_prob_t))
        code = jax.grad(lambda log_alpha: fn(log_alpha, log_prob_t))
        excess = log_prob_t.mean() - 2
        for log_alpha in (-3.0, 0.0, 2.0):
            same(paper(log_alpha), -math.exp(log_alpha) * excess)
            same(code(log_alpha), -excess)

    def test_being_too_sure_raises_the_temperature_and_being_unsure_lowers_it(self):
        slope = jax.grad(functools.partial(sac_temperature_loss, target_entropy=-1.0))
        assert slope(0.5, jnp.full(3, 2.0)) < 0
        assert slope(0.5, jnp.full(3, 0.0)) > 0
        assert slope(0.5, jnp.full(3, 1.0)) == 0

    def test_each_place_may_have_its_own(self, batch):
        *_, log_prob_t, alpha = batch
        target = -alpha
        fn = functools.partial(sac_temperature_loss, alpha, log_prob_t)
        losses = fn(target_entropy=target, reduction="none")
        same(losses, -alpha * (log_prob_t + target))
        same(fn(target_entropy=target, reduction="sum"), losses.sum())

    @pytest.mark.parametrize("bad", BAD)
    def test_padding_does_not_count(self, bad):
        mask = jnp.array([True, False, True])

        def fn(alpha, log_prob_t, target):
            settings = {"target_entropy": target, "use_stop_gradient": False}
            return sac_temperature_loss(alpha, log_prob_t, **settings, mask_t=mask)

        padded = lambda x: jnp.array([x, bad, x])
        args = padded(0.5), padded(3.0), padded(-1.0)
        loss, slopes = jax.value_and_grad(fn, range(3))(*args)
        assert loss == -1
        assert [slope.tolist() for slope in slopes] == [
            [-1, 0, -1],
            [-0.25, 0, -0.25],
            [-0.25, 0, -0.25],
        ]


class TestTargetEntropy:
    @pytest.mark.parametrize("size", [1, 6])
    def test_is_minus_one_for_each_component(self, size):
        one = jnp.ones(size)
        assert continuous_target_entropy(-one, one) == -size
        assert continuous_target_entropy(-one, one, per_dimension=-0.5) == -size / 2

    def test_is_the_entropy_of_a_uniform_policy_where_a_component_has_log_two(self):
        low, high = jnp.array([0.0, -3.0]), jnp.array([10.0, 1.0])
        target = continuous_target_entropy(low, high, per_dimension=math.log(2))
        same(target, math.log(10 * 4))

    def test_is_as_strict_for_any_bounds(self):
        """A loss of rescaled actions and their log-probabilities is as before."""
        mu, low, high = (
            jnp.zeros((8, 2)),
            jnp.array([0.0, -3.0]),
            jnp.array([10.0, 1.0]),
        )

        def loss(low, high):
            bounds = {"minimum": low, "maximum": high}
            action, log_prob, _ = tanh_gaussian_sample_and_log_prob(
                KEY, mu, 0.5, **bounds
            )
            target = continuous_target_entropy(low, high)
            return action, sac_temperature_loss(1.0, log_prob, target_entropy=target)

        action, plain = loss(-jnp.ones(2), jnp.ones(2))
        rescaled, other = loss(low, high)
        same(rescaled, rescale_action(action, low, high))
        same(other, plain)

    def test_bounds_that_leave_no_room_have_none(self):
        assert np.isnan(continuous_target_entropy(jnp.ones(2), jnp.ones(2)))

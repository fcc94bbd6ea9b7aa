"""Discrete soft actor-critic, against sums over actions in double precision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    discrete_sac_actor_loss,
    discrete_sac_critic_errors,
    discrete_sac_temperature_loss,
    discrete_target_entropy,
    sac_temperature_loss,
    soft_state_value,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

BAD = [np.nan, np.inf, -np.inf]
# Logits that a policy has where nothing follows, and whether they are legal.
ENDS = [(0.0, True), (np.nan, True), (-np.inf, True), (0.0, False)]
CRITICS, SHAPE, ACTIONS = 3, (2, 4), 5


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def probabilities(logits, legal):
    """Of legal actions alone, as a dict."""
    kept = {a: x for a, x in enumerate(logits) if legal[a] and x > -math.inf}
    top = max(kept.values())
    total = math.fsum(math.exp(x - top) for x in kept.values())
    return {a: math.exp(x - top) / total for a, x in kept.items()}


def entropy_by_hand(logits, legal):
    probs = probabilities(logits, legal).values()
    return -math.fsum(p * math.log(p) for p in probs if p > 0)


def value_by_hand(q, logits, alpha, legal):
    mean = math.fsum(p * q[a] for a, p in probabilities(logits, legal).items())
    return mean + alpha * entropy_by_hand(logits, legal)


def rows(fn, *arrays):
    """Applies `fn` in each place, to vectors of actions and to numbers."""
    each = [[np.float64(x[i]).tolist() for x in arrays] for i in np.ndindex(SHAPE)]
    return np.reshape([fn(*args) for args in each], SHAPE)


@pytest.fixture
def batch(rng):
    q_tm1, q_t = rng.normal(size=(2, CRITICS, *SHAPE, ACTIONS)).astype(np.float32)
    logits = rng.normal(scale=2, size=(*SHAPE, ACTIONS)).astype(np.float32)
    logits[0, 0, 2] = -np.inf
    legal = rng.uniform(size=logits.shape) < 0.6
    legal[..., 1] = True
    temperature = rng.uniform(0.1, 2, size=SHAPE).astype(np.float32)
    return q_tm1, q_t, logits, temperature, legal


class TestSoftStateValue:
    def test_is_the_mean_value_and_the_entropy_of_legal_actions(self, batch):
        _, (q, *_), logits, alpha, mask = batch
        value = soft_state_value(q, logits, temperature=alpha, mask=mask)
        same(value, rows(value_by_hand, q, logits, alpha, mask))
        every = np.ones_like(mask)
        value = soft_state_value(q, logits, temperature=alpha)
        same(value, rows(value_by_hand, q, logits, alpha, every))

    def test_of_the_best_policy_it_is_the_soft_maximum(self, batch):
        """Which no other policy exceeds, so that it has no slope there."""
        _, (q, *_), _, _, mask = batch
        alpha = 0.7
        fn = functools.partial(soft_state_value, temperature=alpha, mask=mask)
        logits = q / np.float32(alpha)
        best = lambda q, legal: (
            alpha
            * math.log(
                math.fsum(
                    math.exp(x / alpha) for x, yes in zip(q, legal, strict=True) if yes
                )
            )
        )
        same(fn(q, logits), rows(best, q, mask))
        slope = jax.grad(lambda logits: fn(q, logits).sum())(logits)
        same(slope, np.zeros_like(slope))

    @pytest.mark.parametrize("alpha", [0.0, 1.5])
    @pytest.mark.parametrize("bad", BAD)
    def test_an_action_without_probability_counts_for_nothing(self, bad, alpha):
        """Whether a mask, a logit of minus infinity, or rounding takes it away."""
        q = jnp.array([1.0, 3.0, bad])
        fn = lambda q, logits, alpha, mask: soft_state_value(
            q, logits, temperature=alpha, mask=mask
        )
        slopes = jax.value_and_grad(fn, (0, 1, 2))
        ways = [
            (jnp.array([0.0, 0.0, bad]), jnp.array([True, True, False])),
            (jnp.array([0.0, 0.0, -jnp.inf]), None),
            (jnp.array([0.0, 0.0, -1e4]), None),
        ]
        for logits, mask in ways:
            value, (by_q, by_logits, by_alpha) = slopes(q, logits, alpha, mask)
            same(value, 2 + alpha * math.log(2))
            same(by_q, [0.5, 0.5, 0])
            same(by_logits, [-0.5, 0.5, 0])
            same(by_alpha, math.log(2))

    def test_a_sure_policy_has_no_entropy(self):
        q, logits = jnp.array([1.0, 3.0]), jnp.array([1e4, -1e4])
        assert soft_state_value(q, logits, temperature=5.0) == 1
        one = soft_state_value(jnp.array([2.0]), jnp.array([7.0]), temperature=5.0)
        assert one == 2

    def test_without_a_legal_action_there_is_no_value(self):
        fn = lambda q, logits: soft_state_value(
            q, logits, temperature=1.0, mask=jnp.zeros(2, bool)
        )
        value, slope = jax.value_and_grad(fn, 1)(jnp.ones(2), jnp.ones(2))
        assert np.isnan(value)
        assert slope.tolist() == [0, 0]


class TestCriticErrors:
    def test_every_critic_learns_from_the_soft_value_of_the_least(self, batch, rng):
        q_tm1, q_t, logits, alpha, mask = batch
        r_t, discount_t = rng.normal(size=(2, *SHAPE)).astype(np.float32)
        a_tm1 = rng.integers(ACTIONS, size=SHAPE).astype(np.int32)
        args = q_tm1, a_tm1, r_t, discount_t, q_t, logits
        errors = discrete_sac_critic_errors(*args, temperature=alpha, mask=mask)
        v_t = rows(value_by_hand, np.min(q_t, axis=0), logits, alpha, mask)
        for error, q in zip(errors, q_tm1, strict=True):
            for i in np.ndindex(SHAPE):
                target = r_t[i] + discount_t[i] * v_t[i]
                same(error[i], target - q[i][a_tm1[i]])

    def test_an_action_that_does_not_exist_has_no_error(self):
        q = jnp.ones((2, 3))
        for action in (-1, 3):
            args = q, action, 1.0, 0.5, q, jnp.zeros(3)
            assert np.isnan(discrete_sac_critic_errors(*args, temperature=1.0)).all()

    def test_gradients_flow_to_the_action_taken_alone_by_default(self):
        q_tm1, q_t, logits = jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.zeros(3)

        def fn(q_tm1, q_t, logits, alpha):
            args = q_tm1, 1, 1.0, 0.5, q_t, logits
            return discrete_sac_critic_errors(*args, temperature=alpha).sum()

        first, *others = jax.grad(fn, range(4))(q_tm1, q_t, logits, 0.5)
        assert first.tolist() == [[0, -1, 0]] * 2
        assert not any(slope.any() for slope in others)

    @pytest.mark.parametrize(("logit", "legal"), ENDS)
    @pytest.mark.parametrize("bad", BAD)
    def test_nothing_leaks_from_behind_the_end(self, bad, logit, legal):
        """Not even where no action is legal any more."""
        q_t = jnp.array([[[bad, 1.0], [4.0, 2.0]]])
        logits = jnp.array([[logit, logit], [0.0, 0.0]])
        mask = jnp.array([[legal, legal], [True, True]])

        def fn(q_tm1, r_t, discount_t, q_t, logits, alpha):
            errors = discrete_sac_critic_errors(
                q_tm1,
                jnp.array([0, 1]),
                r_t,
                discount_t,
                q_t,
                logits,
                temperature=alpha,
                mask=mask,
                stop_target_gradients=False,
            )
            return errors.sum(), errors

        args = jnp.ones((1, 2, 2)), jnp.ones(2), jnp.array([0.0, 0.5]), q_t, logits, 2.0
        slopes, errors = jax.grad(fn, range(6), has_aux=True)(*args)
        same(errors, [[0, 1.5 + math.log(2)]])
        assert all(np.isfinite(slope).all() for slope in slopes)
        same(slopes[3], [[[0, 0], [0.25, 0.25]]])
        same(slopes[4], [[0, 0], [0.25, -0.25]])
        same(slopes[5], 0.5 * math.log(2))


class TestActorLoss:
    def test_is_minus_the_soft_value_of_the_least(self, batch):
        _, q_t, logits, alpha, mask = batch
        fn = functools.partial(discrete_sac_actor_loss, logits, q_t, temperature=alpha)
        expected = -rows(value_by_hand, np.min(q_t, axis=0), logits, alpha, mask)
        same(fn(mask=mask, reduction="none"), expected)
        same(fn(mask=mask, reduction="sum"), expected.sum())
        same(fn(mask=mask), expected.mean())

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_are_those_derived_by_hand(self, rng, stop):
        q_t, logits = rng.normal(size=(2, 4)).astype(np.float32)
        alpha = np.float32(0.8)

        def fn(logits, q_t, alpha):
            settings = {"temperature": alpha, "use_stop_gradient": stop}
            return discrete_sac_actor_loss(logits, q_t[None], **settings)

        by_logits, by_q, by_alpha = jax.grad(fn, range(3))(logits, q_t, alpha)
        pi = np.array([*probabilities(logits, [True] * 4).values()])
        costs = alpha * np.log(pi) - q_t  # its mean is the loss
        same(by_logits, pi * (costs - pi @ costs))
        same(by_q, -pi * (not stop))
        same(by_alpha, pi @ np.log(pi) * (not stop))

    @pytest.mark.parametrize(("logit", "legal"), ENDS)
    @pytest.mark.parametrize("bad", BAD)
    def test_padding_does_not_count(self, bad, logit, legal):
        logits = jnp.array([[0.0, 0.0], [logit, logit]])
        q_t = jnp.array([[[4.0, 2.0], [bad, 1.0]]])
        masks = {
            "mask": jnp.array([[True, True], [legal, legal]]),
            "mask_t": jnp.array([True, False]),
        }

        def fn(logits, q_t, alpha):
            settings = {"temperature": alpha, "use_stop_gradient": False}
            return discrete_sac_actor_loss(logits, q_t, **settings, **masks)

        loss, slopes = jax.value_and_grad(fn, range(3))(logits, q_t, 1.0)
        same(loss, -3 - math.log(2))
        same(slopes[0], [[-0.5, 0.5], [0, 0]])
        same(slopes[1], [[[-0.5, -0.5], [0, 0]]])
        same(slopes[2], -math.log(2))

    def test_without_a_legal_action_there_is_no_loss(self):
        mask = jnp.zeros((1, 2), bool)
        args = jnp.zeros((1, 2)), jnp.zeros((1, 1, 2))
        loss = discrete_sac_actor_loss(*args, temperature=1.0, mask=mask)
        assert np.isnan(loss)


class TestTemperatureLoss:
    def test_is_the_excess_of_entropy_times_the_temperature(self, batch):
        *_, logits, alpha, mask = batch
        target = np.float32(0.3) * alpha
        fn = functools.partial(
            discrete_sac_temperature_loss,
            alpha,
            logits,
            target_entropy=target,
            mask=mask,
        )
        expected = alpha * (rows(entropy_by_hand, logits, mask) - target)
        same(fn(reduction="none"), expected)
        same(fn(reduction="sum"), expected.sum())
        same(fn(), expected.mean())

    def test_is_the_mean_over_actions_drawn(self, rng):
        logits = rng.normal(size=4).astype(np.float32)
        pi = np.array([*probabilities(logits, [True] * 4).values()])
        losses = sac_temperature_loss(
            0.7, np.float32(np.log(pi)), target_entropy=0.9, reduction="none"
        )
        loss = discrete_sac_temperature_loss(0.7, logits, target_entropy=0.9)
        same(loss, pi @ np.asarray(losses))

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_are_those_derived_by_hand(self, rng, stop):
        logits = rng.normal(size=4).astype(np.float32)

        def fn(alpha, logits, target):
            settings = {"target_entropy": target, "use_stop_gradient": stop}
            return discrete_sac_temperature_loss(alpha, logits, **settings)

        by_alpha, by_logits, by_target = jax.grad(fn, range(3))(0.7, logits, 0.9)
        pi = np.array([*probabilities(logits, [True] * 4).values()])
        entropy = -pi @ np.log(pi)
        same(by_alpha, entropy - 0.9)
        same(by_logits, -0.7 * pi * (np.log(pi) + entropy) * (not stop))
        same(by_target, -0.7 * (not stop))

    @pytest.mark.parametrize("bad", BAD)
    def test_padding_does_not_count(self, bad):
        masks = {
            "mask": jnp.array([[True, True], [False, False]]),
            "mask_t": jnp.array([True, False]),
        }

        def fn(alpha, logits, target):
            settings = {"target_entropy": target, "use_stop_gradient": False}
            return discrete_sac_temperature_loss(alpha, logits, **settings, **masks)

        args = jnp.array([2.0, bad]), jnp.array([[0.0, 0.0], [bad, bad]])
        loss, slopes = jax.value_and_grad(fn, range(3))(*args, jnp.array([0.5, bad]))
        same(loss, 2 * (math.log(2) - 0.5))
        same(slopes[0], [math.log(2) - 0.5, 0])
        same(slopes[1], np.zeros((2, 2)))
        same(slopes[2], [-2, 0])


class TestTargetEntropy:
    def test_is_a_part_of_that_of_a_uniform_policy(self):
        counts = jnp.array([[1, 2], [18, 1000]])
        expected = [[0.98 * math.log(n) for n in row] for row in counts.tolist()]
        same(discrete_target_entropy(counts), expected)
        same(
            discrete_target_entropy(counts, fraction=0.5),
            np.multiply(expected, 0.5 / 0.98),
        )

    def test_is_within_reach_whatever_is_legal(self, batch):
        *_, mask = batch
        target = discrete_target_entropy(mask.sum(-1, dtype=np.int32))
        uniform = np.zeros(mask.shape, np.float32)
        loss = discrete_sac_temperature_loss(
            1.0, uniform, target_entropy=target, mask=mask, reduction="none"
        )
        assert (loss >= 0).all()

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
    def test_takes_any_integer(self, dtype):
        target = discrete_target_entropy(np.asarray(100, dtype))
        assert (target + jnp.float32(1)).dtype == jnp.float32  # under x64 too
        same(target, 0.98 * math.log(100))

    def test_of_no_action_there_is_none(self):
        assert np.isnan(discrete_target_entropy(jnp.array(0)))
        with pytest.raises(
            ValueError, match=r"num_actions must be in \[1, inf\), got 0"
        ):
            discrete_target_entropy(0)

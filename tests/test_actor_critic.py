"""Value, entropy and self-imitation losses, against readings of their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.actor_critic import (
    clipped_value_loss,
    entropy_bonus_loss,
    sample_entropy_loss,
    self_imitation_policy_loss,
    self_imitation_value_loss,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

INFINITY = np.inf


def clipped_value_by_hand(v, old, target, epsilon):
    clipped = old + max(-epsilon, min(epsilon, v - old))
    return max((v - target) ** 2, (clipped - target) ** 2) / 2


def self_imitation_policy_by_hand(log_prob, v, target):
    return -log_prob * max(target - v, 0)


def self_imitation_value_by_hand(v, target):
    return max(target - v, 0) ** 2 / 2


LOSSES = [
    (
        functools.partial(clipped_value_loss, epsilon=0.4),
        functools.partial(clipped_value_by_hand, epsilon=0.4),
        3,
    ),
    (self_imitation_policy_loss, self_imitation_policy_by_hand, 3),
    (self_imitation_value_loss, self_imitation_value_by_hand, 2),
]


@pytest.mark.parametrize(("loss", "by_hand", "inputs"), LOSSES)
class TestEveryLoss:
    def test_agrees_with_its_equation_and_finite_differences(
        self, rng, loss, by_hand, inputs
    ):
        """In the first argument, which learns."""
        arrays = rng.normal(size=(inputs, 200))
        with jax.enable_x64(True):

            @jax.jit
            def run(arrays):
                total = lambda x: loss(x, *arrays[1:], reduction="sum")
                return loss(*arrays, reduction="none"), jax.grad(total)(arrays[0])

            losses, slopes = run(arrays)
        each = lambda *xs: np.array([by_hand(*x) for x in zip(*xs, strict=True)])
        np.testing.assert_allclose(losses, each(*arrays), rtol=1e-12)
        after, before = (each(arrays[0] + h, *arrays[1:]) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(slopes, (after - before) / 2e-6, atol=1e-7)

    def test_padding_counts_for_nothing_and_the_rest_is_constant(
        self, rng, loss, by_hand, inputs
    ):
        arrays = rng.normal(size=(inputs, 4)).astype(np.float32)
        arrays[-1] += 3  # targets that all values are to rise to
        mask = np.array([True, False, False, True])

        @jax.jit
        def run(arrays, mask):
            fn = jax.value_and_grad(lambda xs, **kw: loss(*xs, **kw))
            spoilt = jnp.where(mask, arrays, jnp.nan)
            return (
                fn(spoilt, mask_t=mask),
                fn(arrays[:, ::3]),
                loss(*arrays, mask_t=mask & False),
            )

        (value, slopes), (alone, expected), nothing = run(arrays, mask)
        np.testing.assert_allclose(value, alone, rtol=1e-6)
        np.testing.assert_allclose(slopes[:, mask], expected, rtol=1e-6)
        assert not slopes[:, ~mask].any()
        assert slopes[0].any()
        assert not slopes[1:].any()
        assert nothing == 0


class TestClippedValue:
    def run(self, v, target, epsilon=1.0):
        fn = functools.partial(clipped_value_loss, epsilon=epsilon)
        value, slope = jax.value_and_grad(fn)(v, 0.0, target)
        return float(value), float(slope)

    def test_stops_at_the_clip_on_the_way_there_and_not_on_the_way_back(self):
        assert self.run(0.5, 4.0) == (3.5**2 / 2, -3.5)
        assert self.run(2.0, 4.0) == (4.5, 0)
        assert self.run(2.0, -4.0) == (18, 6)

    def test_an_infinite_epsilon_is_no_clip_and_one_of_zero_no_movement(self):
        assert self.run(2.0, 4.0, INFINITY) == (2, -2)
        assert self.run(2.0, 4.0, 0.0) == (8, 0)

    def test_within_the_clip_not_a_digit_is_lost(self):
        """As by adding the difference to a large old value."""
        value = clipped_value_loss(0.04, 1e6, 0.0, epsilon=2e6)
        np.testing.assert_allclose(value, 8e-4, rtol=1e-6)

    def test_takes_a_bound_for_each_step(self):
        epsilon = jnp.array([1.0, 3.0])
        loss = clipped_value_loss(
            jnp.full(2, 2.0), jnp.zeros(2), jnp.full(2, 4.0), epsilon=epsilon
        )
        assert loss == (4.5 + 2) / 2

    def test_refuses_a_negative_epsilon(self):
        message = r"clipped_value_loss: epsilon must be in \[0, inf\], got -1"
        with pytest.raises(ValueError, match=message):
            clipped_value_loss(1.0, 1.0, 1.0, epsilon=-1)


class TestEntropy:
    def test_bonus_is_the_mean_over_what_counts(self):
        entropies, mask = (
            jnp.array([[1.0, jnp.nan], [4.0, 1.0]]),
            jnp.ones((2, 2), bool),
        )
        mask = mask.at[0, 1].set(False)
        loss, slopes = jax.value_and_grad(entropy_bonus_loss)(entropies, mask_t=mask)
        assert loss == -2
        np.testing.assert_allclose(slopes, [[-1 / 3, 0], [-1 / 3, -1 / 3]], rtol=1e-6)

    @pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
    def test_of_samples_is_that_of_the_policy_on_average(self, rng, gradient):
        """Over every action, with the probability that it is drawn."""
        with jax.enable_x64(True):
            logits = jnp.asarray(rng.normal(size=4))
            probs = jax.nn.softmax(logits)

            def on_average(logits):
                losses = sample_entropy_loss(
                    jax.nn.log_softmax(logits), gradient=gradient, reduction="none"
                )
                return probs @ losses

            def exactly(logits):
                log_probs = jax.nn.log_softmax(logits)
                return jnp.exp(log_probs) @ log_probs

            value, slope = jax.value_and_grad(on_average)(logits)
            expected, right = jax.value_and_grad(exactly)(logits)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        wrong = np.zeros(4)  # no action carries a gradient here
        expected = right if gradient == "score_function" else wrong
        np.testing.assert_allclose(slope, expected, rtol=1e-12, atol=1e-15)

    def test_of_reparameterised_samples_has_the_pathwise_gradient(self):
        """A Gaussian's entropy grows with the logarithm of its scale, slope 1."""

        def loss(log_scale, noise):
            action = jnp.exp(log_scale) * noise
            log_prob = -0.5 * (action / jnp.exp(log_scale)) ** 2 - log_scale
            return sample_entropy_loss(log_prob, gradient="pathwise")

        noise = jax.random.normal(jax.random.key(0), (10,))
        np.testing.assert_allclose(jax.grad(loss)(0.3, noise), -1, rtol=1e-6)

    @pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
    def test_what_is_left_out_or_impossible_makes_nothing_nan(self, gradient):
        log_prob = jnp.array([-jnp.inf, jnp.nan, -2.0])
        mask = jnp.array([True, False, True])
        fn = functools.partial(sample_entropy_loss, gradient=gradient)
        value, slopes = jax.value_and_grad(fn)(log_prob, mask_t=mask)
        assert value == -INFINITY
        expected = {"pathwise": [0.5, 0, 0.5], "score_function": [0, 0, -1]}
        assert slopes.tolist() == expected[gradient]

    def test_how_its_gradient_comes_about_must_be_said(self):
        with pytest.raises(TypeError, match=r"sample_entropy_loss: .* 'gradient'"):
            sample_entropy_loss(jnp.zeros(2))
        with pytest.raises(ValueError, match="sample_entropy_loss: gradient must be"):
            sample_entropy_loss(jnp.zeros(2), gradient="none")


class TestSelfImitation:
    def test_what_went_no_better_is_cut_off(self):
        log_prob = jnp.array([-jnp.inf, -1.0])
        v, returns = jnp.array([1.0, 1.0]), jnp.array([1.0, 3.0])
        fn = jax.value_and_grad(self_imitation_policy_loss)
        value, slopes = fn(log_prob, v, returns)
        assert (value, slopes.tolist()) == (1, [0, -1])
        fn = jax.value_and_grad(self_imitation_value_loss)
        value, slopes = fn(jnp.array([jnp.inf, 1.0]), returns)
        assert (value, slopes.tolist()) == (1, [0, -1])

    def test_the_mean_can_be_over_what_went_better(self):
        log_prob, v = jnp.full(2, -1.0), jnp.array([1.0, 1.0])
        returns = jnp.array([0.0, 3.0])
        loss = self_imitation_policy_loss(log_prob, v, returns, mask_t=returns > v)
        assert loss == 2

    def test_values_do_not_learn_from_the_policy_loss_unless_asked(self):
        slope = jax.grad(self_imitation_policy_loss, (1, 2))
        args = jnp.full(1, -2.0), jnp.zeros(1), jnp.ones(1)
        assert [x.item() for x in slope(*args)] == [0, 0]
        free = slope(*args, use_stop_gradient=False)
        assert [x.item() for x in free] == [-2, 2]

"""Sampled targets of a policy, against sums over one action after another."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    PolicyTarget,
    constant_policy_targets,
    gaussian_diagonal,
    sampled_policy_distillation_loss,
    softmax,
    zero_policy_targets,
)

KEY = jax.random.key(3)
MAKERS = pytest.mark.parametrize("make", [constant_policy_targets, zero_policy_targets])
BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


class Normal:
    """A distribution in the manner of distrax: vectors of two components."""

    def __init__(self, mu):
        self.mu = jnp.asarray(mu)
        self.policy = gaussian_diagonal(1.0)

    @property
    def batch_shape(self):
        return self.mu.shape[:-1]

    def sample(self, *, seed, sample_shape=()):
        self.asked = seed, sample_shape
        return self.policy.sample(seed, self.spread(sample_shape))

    def log_prob(self, value):
        return self.policy.logprob(value, self.spread((len(value),)))

    def spread(self, shape):
        return jnp.broadcast_to(self.mu, (*shape, *self.mu.shape))


class Categorical:
    """A distribution in the manner of TensorFlow Probability: whole numbers."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits)
        self.batch_shape = self.logits.shape[:-1]

    def sample(self, sample_shape=(), seed=None, name="sample"):
        return softmax().sample(seed, self.spread(sample_shape))

    def log_prob(self, value, name="log_prob"):
        return softmax().logprob(value, self.spread((len(value),)))

    def spread(self, shape):
        return jnp.broadcast_to(self.logits, (*shape, *self.logits.shape))


def logprob_by_hand(action, mu):
    terms = zip(action, mu, strict=True)
    return math.fsum(-((a - m) ** 2) / 2 - math.log(2 * math.pi) / 2 for a, m in terms)


def losses_by_hand(actions, weights, mu):
    """The loss of each step, of `N` samples of `T` steps."""
    samples, steps = weights.shape
    return [
        -sum(
            weights[i, t] * logprob_by_hand(actions[i, t].tolist(), mu[t].tolist())
            for i in range(samples)
        )
        / samples
        for t in range(steps)
    ]


def example(rng, samples=4, steps=3):
    actions = rng.normal(size=(samples, steps, 2)).astype(np.float32)
    weights = rng.normal(size=(samples, steps)).astype(np.float32)
    return actions, weights, rng.normal(size=(steps, 2)).astype(np.float32)


def loss(mu, actions, weights, *args, **kwargs):
    targets = PolicyTarget(actions=actions, weights=weights)
    return sampled_policy_distillation_loss(Normal(mu), targets, *args, **kwargs)


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


class TestTargets:
    @MAKERS
    @pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
    def test_draws_once_with_the_key_it_is_given(self, rng, make, make_key):
        key, policy = make_key(5), Normal(rng.normal(size=(3, 2)).astype(np.float32))
        targets = make(policy, key, 4)
        assert policy.asked[0] is key
        assert policy.asked[1] == (4,)
        noise = jax.random.normal(key, (4, 3, 2), np.float32)
        same(targets.actions, policy.mu[None] + noise)
        assert targets.weights.shape == (4, 3)

    def test_all_weights_are_the_scale(self):
        policy = Categorical(jnp.zeros((3, 5)))
        for targets, weight in [
            (constant_policy_targets(policy, KEY, 4), 1.0),
            (constant_policy_targets(policy, KEY, 4, 0.25), 0.25),
            (constant_policy_targets(policy, KEY, 4, weights_scale=2), 2.0),
            (zero_policy_targets(policy, KEY, 4), 0.0),
            (zero_policy_targets(policy, KEY, 4, weights_scale=0.25), 0.25),
        ]:
            assert targets.weights.tolist() == [[weight] * 3] * 4
            assert targets.actions.shape == (4, 3)

    @MAKERS
    def test_one_policy_has_no_axis_of_its_own(self, make):
        targets = make(Categorical(jnp.zeros(5)), KEY, 4)
        assert targets.weights.shape == targets.actions.shape == (4,)

    @MAKERS
    @pytest.mark.parametrize("x64", [False, True])
    def test_weights_have_the_dtype_of_actions_unless_these_are_whole(self, make, x64):
        with jax.enable_x64(x64):
            for dtype in ("bfloat16", "float32"):
                policy = Normal(jnp.zeros((3, 2), dtype))
                assert make(policy, KEY, 4).weights.dtype == dtype
                scale = jnp.asarray(0.5, "float16")
                given = make(policy, KEY, 4, weights_scale=scale)
                assert given.weights.dtype == "float16"
            whole = make(Categorical(jnp.zeros((3, 5), jnp.float32)), KEY, 4)
            assert whole.weights.dtype == "float32"

    def test_the_scale_may_be_traced_and_differentiated(self):
        policy = Categorical(jnp.zeros((3, 5)))
        total = lambda scale: constant_policy_targets(
            policy, KEY, 4, scale
        ).weights.sum()
        assert jax.jit(jax.grad(total))(2.0) == 12

    def test_gradients_reach_the_policy_that_drew(self):
        """Until a loss stops them."""
        total = lambda mu: constant_policy_targets(Normal(mu), KEY, 4).actions.sum()
        assert jax.grad(total)(jnp.zeros((3, 2))).tolist() == [[4.0] * 2] * 3

    def test_is_a_tree_that_jit_and_vmap_pass_on(self):
        draw = lambda key: constant_policy_targets(Categorical(jnp.zeros(5)), key, 4)
        batch = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 2))
        assert isinstance(batch, PolicyTarget)
        one = draw(jax.random.split(KEY, 2)[1])
        assert batch.actions[1].tolist() == one.actions.tolist()

    @MAKERS
    def test_refuses_what_it_cannot_use_by_name(self, make):
        policy = Categorical(jnp.zeros(5))
        cases = [
            (TypeError, "num_samples must be a Python int, got float", (KEY, 2.0), {}),
            (TypeError, "num_samples must be a Python int, got bool", (KEY, True), {}),
            (ValueError, "num_samples must be at least 1, got 0", (KEY, 0), {}),
            (TypeError, "rng_key must be a random key, got int", (0, 2), {}),
            (
                ValueError,
                r"weights_scale has shape \(5,\), expected \(\)",
                (KEY, 2),
                {"weights_scale": jnp.ones(5)},
            ),
        ]
        name = make.__name__
        for error, text, args, kwargs in cases:
            with pytest.raises(error, match=f"^{name}: {text}"):
                make(policy, *args, **kwargs)


class TestDistillation:
    def test_agrees_with_its_definition(self, rng):
        actions, weights, mu = example(rng)
        expected = losses_by_hand(actions, weights, mu)
        same(loss(mu, actions, weights), np.mean(expected))
        same(loss(mu, actions, weights, reduction="sum"), np.sum(expected))
        same(loss(mu, actions, weights, reduction="none"), expected)

    def test_a_mask_is_that_of_leaving_the_other_steps_out(self, rng):
        actions, weights, mu = example(rng, steps=5)
        mask = np.array([True, False, True, True, False])
        left = losses_by_hand(actions[:, mask], weights[:, mask], mu[mask])
        given = mu, actions, weights
        same(loss(*given, mask_t=mask), np.mean(left))
        same(loss(*given, mask_t=mask, reduction="sum"), np.sum(left))
        losses = loss(*given, mask_t=mask, reduction="none")
        same(losses[mask], left)
        assert not losses[~mask].any()

    def test_a_mask_of_all_changes_nothing_and_of_none_gives_zero(self, rng):
        actions, weights, mu = example(rng)
        plain = loss(mu, actions, weights)
        same(loss(mu, actions, weights, mask_t=np.ones(3, bool)), plain)
        assert loss(mu, actions, weights, mask_t=np.zeros(3, bool)) == 0

    @BAD
    def test_padding_leaks_neither_values_nor_gradients(self, rng, bad):
        actions, weights, mu = example(rng)
        mask = np.array([True, False, True])
        call = lambda *xs: loss(*xs, False, mask_t=mask)
        run = jax.value_and_grad(call, (0, 1, 2))
        expected = run(mu, actions, weights)
        actions[:, 1], weights[:, 1] = bad, bad
        got = run(mu, actions, weights)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert not got[1][0][1].any()
        assert not got[1][1][:, 1].any()

    @BAD
    def test_an_action_of_weight_zero_leaks_nothing(self, rng, bad):
        actions, weights, mu = example(rng)
        weights[2] = 0
        call = lambda *xs: loss(*xs, False)
        run = jax.value_and_grad(call, (0, 1))
        expected = run(mu, actions, weights)
        actions[2] = bad
        got = run(mu, actions, weights)
        same(got[0], expected[0])
        same(got[1][0], expected[1][0])
        assert not got[1][1][2].any()

    def test_an_impossible_action_of_weight_zero_costs_nothing(self):
        policy = Categorical(jnp.array([[0.0, -jnp.inf]]))
        targets = PolicyTarget(jnp.array([[0], [1]]), jnp.array([[1.0], [0.0]]))
        assert sampled_policy_distillation_loss(policy, targets) == 0

    def test_targets_of_zero_have_no_loss_and_no_gradient(self):
        mu = jnp.ones((3, 2))
        targets = zero_policy_targets(Normal(mu), KEY, 4)
        value, gradient = jax.value_and_grad(loss)(mu, *targets)
        assert value == 0
        assert not gradient.any()

    @pytest.mark.parametrize("traced", [False, True])
    def test_the_flag_holds_actions_and_weights_constant(self, rng, traced):
        actions, weights, mu = example(rng)
        run = jax.grad(loss, (0, 1, 2))
        if traced:
            run = jax.jit(run)
        held, free = (run(mu, actions, weights, stop) for stop in (True, False))
        same(held[0], free[0])
        assert not held[1].any()
        assert not held[2].any()
        to_mean = mu - actions
        same(free[1], -weights[..., None] * to_mean / weights.size)
        logprobs = [
            [
                logprob_by_hand(a.tolist(), m.tolist())
                for a, m in zip(row, mu, strict=True)
            ]
            for row in actions
        ]
        same(free[2], -np.array(logprobs) / weights.size)

    def test_the_flag_is_on_unless_turned_off(self, rng):
        actions, weights, mu = example(rng)
        assert not jax.grad(loss, 1)(mu, actions, weights).any()

    def test_estimates_the_cross_entropy_from_the_policy_that_drew(self):
        p, q = np.float32([0.0, 1.0, 2.0]), np.float32([1.0, 1.0, 0.0])
        targets = constant_policy_targets(Categorical(p), KEY, 20_000)
        expected = -np.sum(jax.nn.softmax(p) * jax.nn.log_softmax(q))
        got = sampled_policy_distillation_loss(Categorical(q), targets)
        same(got, expected, rtol=0.02)

    def test_descending_it_copies_the_policy_that_drew(self):
        targets = constant_policy_targets(Normal(jnp.array([1.0, -2.0])), KEY, 1000)
        descend = lambda _, mu: mu - 0.5 * jax.grad(loss)(mu, *targets)
        mu = jax.lax.fori_loop(0, 20, descend, jnp.zeros(2))
        same(mu, np.mean(targets.actions, axis=0), atol=1e-4)

    def test_targets_may_be_any_object_with_the_two_attributes(self, rng):
        actions, weights, mu = example(rng)
        targets = types.SimpleNamespace(weights=weights, actions=actions)
        got = sampled_policy_distillation_loss(
            distribution=Normal(mu), policy_targets=targets, stop_target_gradients=True
        )
        same(got, loss(mu, actions, weights))

    def test_half_precision_is_summed_in_full(self, rng):
        """A sum of 4096 ones stops at 256 in bfloat16."""
        policy = types.SimpleNamespace(log_prob=lambda value: value)
        ones = jnp.ones((2, 4096), jnp.bfloat16)
        got = sampled_policy_distillation_loss(
            policy, PolicyTarget(ones, ones), reduction="sum"
        )
        assert got == -4096
        assert got.dtype == jnp.bfloat16

    def test_refuses_shapes_that_differ_by_name(self, rng):
        actions, weights, mu = example(rng)
        start = "^sampled_policy_distillation_loss: "
        for bad in (weights[:, :1], weights[:1], weights[0], weights[..., None]):
            text = rf"{start}weights has shape \({', ?'.join(map(str, bad.shape))},?\)"
            with pytest.raises(ValueError, match=text):
                loss(mu, actions, bad)
        for mask in (np.ones(1, bool), np.ones((4, 3), bool)):
            with pytest.raises(ValueError, match=rf"{start}mask_t has shape"):
                loss(mu, actions, weights, mask_t=mask)
        for bad in (weights[:, 0], weights[..., None]):
            with pytest.raises(ValueError, match=r", expected \(4, 3\)\.$"):
                loss(mu, actions, bad)

    def test_refuses_what_is_no_mask_no_weight_no_flag_and_no_reduction(self, rng):
        actions, weights, mu = example(rng)
        with pytest.raises(TypeError, match="mask_t must be boolean, got float32"):
            loss(mu, actions, weights, mask_t=np.ones(3, np.float32))
        with pytest.raises(
            TypeError, match="weights must be floating-point, got int32"
        ):
            loss(mu, actions, np.ones((4, 3), np.int32))
        with pytest.raises(TypeError, match="stop_target_gradients must be boolean"):
            loss(mu, actions, weights, 1)
        with pytest.raises(
            ValueError, match="reduction must be one of 'mean', 'sum', 'n"
        ):
            loss(mu, actions, weights, reduction="max")

"""MPO, against a plain reading of the paper, one batch entry at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    LagrangePenalty,
    mpo_compute_weights_and_temperature_loss,
    mpo_loss,
)

N, B, D = 5, 3, 2


def floats(*values):
    return jnp.asarray(values, jnp.float32)


def entry_by_hand(q, temperature, epsilon):
    """The weights of one entry's samples, and the dual, in double precision."""
    exps = [math.exp(float(x) / temperature) for x in q]
    dual = temperature * (epsilon + math.log(sum(exps) / len(exps)))
    return [e / sum(exps) for e in exps], dual


@pytest.fixture
def batch(rng):
    """Log-probabilities, values, divergences of two kinds."""
    log_probs, q = np.float32(rng.normal(size=(2, N, B)))
    kl, kl_each = rng.uniform(size=B), rng.uniform(size=(B, D))
    return log_probs, q, np.float32(kl), np.float32(kl_each)


def weights_and_loss(q, temperature=0.5, epsilon=0.1, axis=0, project=jnp.abs):
    constraint = LagrangePenalty(temperature, epsilon)
    loss, weights, n = mpo_compute_weights_and_temperature_loss(
        q, constraint, project, axis
    )
    return weights, loss, n


class TestWeights:
    def test_are_the_softmax_of_values_over_temperature(self, batch):
        _, q, *_ = batch
        weights, loss, n = weights_and_loss(q)
        for entry in range(B):
            expected, dual = entry_by_hand(q[:, entry], 0.5, 0.1)
            np.testing.assert_allclose(weights[:, entry], expected, rtol=1e-5)
            np.testing.assert_allclose(loss[entry], dual, rtol=1e-5)
        assert type(n) is int
        assert n == N

    @pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
    def test_samples_may_lie_along_any_axis(self, batch, axis):
        _, q, *_ = batch
        q = np.stack([q, 2 * q], axis=-1)
        weights, loss, _ = weights_and_loss(q)
        moved, same, n = weights_and_loss(np.moveaxis(q, 0, axis), axis=axis)
        assert n == N
        np.testing.assert_array_equal(np.moveaxis(moved, axis, 0), weights)
        np.testing.assert_array_equal(same, loss)

    def test_each_entry_may_have_a_temperature(self, batch):
        _, q, *_ = batch
        temperatures = floats(0.5, 1, 2)
        weights, loss, _ = weights_and_loss(q, temperatures)
        for entry, temperature in enumerate(temperatures):
            alone = weights_and_loss(q[:, entry], temperature)
            np.testing.assert_allclose(weights[:, entry], alone[0], rtol=1e-6)
            np.testing.assert_allclose(loss[entry], alone[1], rtol=1e-6)

    def test_the_temperature_is_projected(self):
        twice = lambda x: 2 * jnp.abs(x)
        result = weights_and_loss(floats(1, 2, 3), -0.5, project=twice)
        np.testing.assert_array_equal(
            result[0], weights_and_loss(floats(1, 2, 3), 1.0)[0]
        )

    @pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
    def test_large_values_neither_overflow_nor_vanish(self, shift):
        q = floats(1, 2, 3) + shift
        weights, loss, _ = weights_and_loss(q, 1e-10)
        assert weights.tolist() == [0, 0, 1]
        np.testing.assert_allclose(loss, 3 + shift, rtol=1e-6)

    def test_the_dual_is_least_where_the_divergence_is_the_limit(self):
        """Enumerates temperatures, and takes the divergence from the weights."""
        with jax.enable_x64(True):
            q, epsilon = np.array([0.3, -1.2, 0.8, 2.0]), 0.25
            dual = lambda t: weights_and_loss(q, t, epsilon)[1]
            grid = np.geomspace(0.2, 20, 2001)
            weights = np.asarray(jax.vmap(lambda t: weights_and_loss(q, t)[0])(grid))
            divergence = np.sum(weights * np.log(weights * len(q)), axis=-1)
            slopes = jax.vmap(jax.grad(dual))(grid)
            np.testing.assert_allclose(slopes, epsilon - divergence, atol=1e-10)
            best = np.argmin(jax.vmap(dual)(grid))
            np.testing.assert_allclose(divergence[best], epsilon, rtol=0.01)

    def test_an_action_that_is_ruled_out_has_no_effect_but_on_their_number(self):
        def result(temperature, q):
            weights, loss, _ = weights_and_loss(q, temperature)
            return weights[-2:], loss + temperature * jnp.log(q.size)

        with_it = jax.jacobian(result)(0.5, floats(-np.inf, 1, 2))
        without = jax.jacobian(result)(0.5, floats(1, 2))
        for x, y in zip(with_it, without, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)
        weights, *_ = weights_and_loss(floats(-np.inf, 1, 2))
        assert weights[0] == 0

    def test_no_possible_action_gives_no_number(self):
        weights, loss, _ = weights_and_loss(floats(-np.inf, -np.inf))
        assert np.isnan(loss)
        assert np.isnan(weights).all()

    def test_a_value_that_is_no_number_shows_in_its_entry_alone(self):
        weights, loss, _ = weights_and_loss(floats([1, np.nan], [2, 1]))
        assert np.isnan(loss).tolist() == [False, True]
        assert np.isnan(weights).tolist() == [[False, True]] * 2


WEIGHTS = {
    "policy_loss_weight": 2.0,
    "temperature_loss_weight": 3.0,
    "kl_loss_weight": 5.0,
    "alpha_loss_weight": 7.0,
}


class TestMPOLoss:
    def call(self, log_probs, q, kl, kl_each, temperature=0.5, alphas=None, **given):
        alpha, alpha_each = (0.7, floats(0.2, 1.5)) if alphas is None else alphas
        constraints = [
            (kl, LagrangePenalty(alpha, 0.3)),
            (kl_each, LagrangePenalty(alpha_each, 0.2, per_dimension=True)),
        ]
        return mpo_loss(
            log_probs, q, LagrangePenalty(temperature, 0.1), constraints, **given
        )

    def test_is_what_the_paper_says(self, batch):
        log_probs, q, kl, kl_each = map(np.float64, batch)
        loss, outputs = self.call(*batch, **WEIGHTS)
        assert outputs.num_samples == N
        for i in range(B):
            weights, dual = entry_by_hand(q[:, i], 0.5, 0.1)
            policy = -sum(w * x for w, x in zip(weights, log_probs[:, i], strict=True))
            penalty = 0.7 * kl[i] + 0.2 * kl_each[i, 0] + 1.5 * kl_each[i, 1]
            alpha = 0.7 * (0.3 - kl[i]) + 0.2 * (0.2 - kl_each[i, 0])
            alpha += 1.5 * (0.2 - kl_each[i, 1])
            expected = [dual, policy, penalty, alpha]
            np.testing.assert_allclose([x[i] for x in outputs[:4]], expected, rtol=1e-5)
            total = 2 * policy + 3 * dual + 5 * penalty + 7 * alpha
            np.testing.assert_allclose(loss[i], total, rtol=1e-5)
            column = outputs.normalized_weights[:, i]
            np.testing.assert_allclose(column, weights, rtol=1e-5)

    def test_samples_may_lie_along_another_axis(self, batch):
        log_probs, q, *kl = batch
        loss, outputs = self.call(log_probs.T, q.T, *kl, sample_axis=1)
        expected, others = self.call(*batch)
        np.testing.assert_array_equal(loss, expected)
        transposed = outputs.normalized_weights.T
        np.testing.assert_array_equal(transposed, others.normalized_weights)

    def test_needs_no_constraints(self, batch):
        log_probs, q, *_ = batch
        loss, outputs = mpo_loss(log_probs, q, LagrangePenalty(0.5, 0.1), [])
        sum_of_two = outputs.policy_loss + outputs.temperature_loss
        np.testing.assert_allclose(loss, sum_of_two, rtol=1e-6)
        assert outputs.kl_loss.tolist() == outputs.alpha_loss.tolist() == [0] * B
        assert {x.dtype for x in (loss, *outputs[:5])} == {jnp.dtype("float32")}

    def test_multipliers_below_zero_are_projected(self, batch):
        log_probs, q, kl, _ = batch
        constraints = [(kl, LagrangePenalty(-1.0, 0.1))]
        temperature = LagrangePenalty(1.0, 0.1)
        _, outputs = mpo_loss(log_probs, q, temperature, constraints)
        np.testing.assert_allclose(outputs.kl_loss, 1e-10 * kl, rtol=1e-5)

    def gradients(self, batch, part, stop):
        def total(log_probs, q, kl, temperature, alpha):
            loss, outputs = self.call(
                log_probs,
                q,
                kl,
                batch[3],
                temperature,
                (alpha, floats(0.2, 1.5)),
                use_stop_gradient=stop,
            )
            return jnp.sum(getattr(outputs, part) if part else loss)

        args = *batch[:3], 0.5, 0.7
        grads = jax.grad(total, range(5))(*args)
        names = "log_probs", "q", "kl", "temperature", "alpha"
        return {
            k for k, x in zip(names, grads, strict=True) if np.any(np.abs(x) > 1e-4)
        }

    @pytest.mark.parametrize(
        ("part", "stopped", "flowing"),
        [
            ("policy_loss", {"log_probs"}, {"log_probs", "q", "temperature"}),
            ("temperature_loss", {"temperature"}, {"q", "temperature"}),
            ("kl_loss", {"kl"}, {"kl", "alpha"}),
            ("alpha_loss", {"alpha"}, {"kl", "alpha"}),
            ("normalized_weights", set(), set()),  # they sum to one
        ],
    )
    def test_each_loss_moves_what_it_is_for(self, batch, part, stopped, flowing):
        assert self.gradients(batch, part, stop=True) == stopped
        assert self.gradients(batch, part, stop=False) == flowing

    def test_its_gradient_is_the_weighted_likelihood(self, batch):
        log_probs, q, *kl = batch
        total = lambda x: self.call(x, q, *kl)[0].sum()
        weights = self.call(*batch)[1].normalized_weights
        np.testing.assert_array_equal(jax.grad(total)(log_probs), -weights)

    def test_an_action_of_weight_zero_does_not_count(self):
        def total(log_probs, q):
            return mpo_loss(log_probs, q, LagrangePenalty(1.0, 0.1), [])[0]

        log_probs, q = floats(-np.inf, -1, -2), floats(-np.inf, 1, 1)
        value, gradient = jax.value_and_grad(total)(log_probs, q)
        np.testing.assert_allclose(value, 1.5 + 0.1 + 1 + math.log(2 / 3), rtol=1e-6)
        assert gradient.tolist() == [0, -0.5, -0.5]

    def test_a_weight_of_zero_leaves_a_loss_out(self, batch):
        log_probs, q, kl, kl_each = batch
        loss, _ = self.call(
            log_probs,
            q,
            kl * np.inf,
            kl_each,
            kl_loss_weight=0.0,
            alpha_loss_weight=0.0,
        )
        expected, _ = mpo_loss(log_probs, q, LagrangePenalty(0.5, 0.1), [])
        np.testing.assert_allclose(loss, expected, rtol=1e-6)

    @pytest.mark.parametrize("stop", [True, False])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_an_entry_of_weight_zero_leaks_nothing(self, batch, bad, stop):
        """The gradients are those with other data there, and zero for that data."""
        counts = np.float32([1, 0, 1])

        def total(args, temperature, alphas):
            weights = dict.fromkeys(WEIGHTS, counts)
            call = functools.partial(self.call, use_stop_gradient=stop, **weights)
            return call(*args, temperature=temperature, alphas=alphas)[0].sum()

        spoilt = tuple(x.copy() for x in batch)
        for x in spoilt:
            (x.T if x.shape == (N, B) else x)[1] = bad
        settings = 0.5, (0.7, floats(0.2, 1.5))
        expected = jax.value_and_grad(total, (0, 1, 2))(batch, *settings)
        result = jax.value_and_grad(total, (0, 1, 2))(spoilt, *settings)
        jax.tree.map(np.testing.assert_array_equal, result, expected)

    def test_each_loss_has_a_weight_of_its_own_to_leave_an_entry_out(self, batch):
        log_probs, q, kl, _ = batch
        kl = np.where(np.arange(B) == 1, np.nan, kl)

        def gradient(alpha, **weights):
            penalty = LagrangePenalty(alpha, 0.3)
            temperature = LagrangePenalty(0.5, 0.1)
            loss, _ = mpo_loss(log_probs, q, temperature, [(kl, penalty)], **weights)
            return jnp.sum(loss)

        only_policy = {"kl_loss_weight": 0.0, "alpha_loss_weight": 0.0}
        assert jax.grad(gradient)(0.7, **only_policy) == 0
        assert np.isnan(jax.grad(gradient)(0.7, kl_loss_weight=0.0))
        assert np.isnan(gradient(0.7, alpha_loss_weight=0.0))

    @pytest.mark.parametrize("name", ["policy", "temperature"])
    def test_a_value_that_is_no_number_shows_in_either_loss(self, batch, name):
        log_probs, q, *_ = batch
        weights = {"policy_loss_weight": 0.0, "temperature_loss_weight": 0.0}
        weights[f"{name}_loss_weight"] = 1.0
        penalty = LagrangePenalty(0.5, 0.1)
        loss, _ = mpo_loss(log_probs, q * np.nan, penalty, [], **weights)
        assert np.isnan(loss).all()

    def test_weights_are_reported_where_no_loss_counts_them(self):
        q = floats([-np.inf, 1], [1, 3], [1, np.nan])
        weights = {"policy_loss_weight": 0.0, "temperature_loss_weight": 0.0}
        _, outputs = mpo_loss(q, q, LagrangePenalty(1.0, 0.1), [], **weights)
        assert outputs.normalized_weights[:, 0].tolist() == [0, 0.5, 0.5]

    def test_half_precision_rounds_only_the_result(self, batch):
        half = [jnp.asarray(x, jnp.bfloat16) for x in batch]
        alphas = jnp.bfloat16(0.7), floats(0.2, 1.5).astype(jnp.bfloat16)
        wide = [x.astype(jnp.float32) for x in half]
        loss, outputs = self.call(*half, alphas=alphas)
        alphas = tuple(x.astype(jnp.float32) for x in alphas)
        expected, others = self.call(*wide, alphas=alphas)
        for x, y in zip([loss, *outputs[:5]], [expected, *others[:5]], strict=True):
            np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))

    def test_float32_stays_under_x64(self, batch):
        with jax.enable_x64(True):
            log_probs, q, *_ = batch
            loss, outputs = mpo_loss(log_probs, q, LagrangePenalty(0.5, 0.1), [])
            assert {x.dtype for x in (loss, *outputs[:5])} == {jnp.dtype("float32")}

    def test_jit_and_vmap_change_nothing(self, batch):
        expected = self.call(*batch)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(close, jax.jit(self.call)(*batch), expected)
        loss, _ = jax.vmap(self.call, in_axes=(1, 1, 0, 0))(*batch)
        np.testing.assert_allclose(loss, expected[0], rtol=1e-6)

    def test_compiles_once(self, batch):
        self.call(*batch, **WEIGHTS)
        assert COMPILED
        COMPILED.clear()
        for scale in (2, 3):
            self.call(*(x * np.float32(scale) for x in batch), **WEIGHTS)
        assert not COMPILED

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": np.ones((N, 1), np.float32)}, "sample_q_values has shape (5, 1)"),
            ({"kl": floats(1)}, "kl_constraints[0][0] has shape (1,), expected f[...]"),
            ({"temperature": floats(1)}, "temperature_constraint.alpha has shape (1,)"),
            ({"sample_axis": 2}, "sample_log_probs has shape (5, 3), expected samples"),
            ({"sample_axis": 0.0}, "sample_axis must be a Python int, fixed while"),
            ({"sample_axis": True}, "sample_axis must be a Python int, fixed while"),
            ({"q": np.ones((N, B), int)}, "sample_q_values must be floating-point"),
            ({"projection_operator": 1e-10}, "projection_operator must be a function"),
        ],
    )
    def test_says_what_is_wrong(self, batch, change, message):
        names = "log_probs", "q", "kl", "kl_each"
        with pytest.raises((TypeError, ValueError)) as error:
            self.call(**dict(zip(names, batch, strict=True)) | change)
        assert str(error.value).startswith(f"mpo_loss: {message}")

    def test_a_penalty_must_be_one(self, batch):
        with pytest.raises(
            TypeError, match="temperature_constraint must be of type La"
        ):
            mpo_loss(batch[0], batch[1], 1.0, [])
        with pytest.raises(
            TypeError, match="temperature_constraint must be of type La"
        ):
            mpo_compute_weights_and_temperature_loss(batch[1], 1.0, abs)


COMPILED = []


def listen(event, duration_secs, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(str(details.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(listen)

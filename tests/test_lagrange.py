"""Lagrange penalties, against their definition, one entry and dimension at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    LagrangePenalty,
    compute_parametric_kl_penalty_and_dual_loss,
    kl_alpha_loss,
    kl_constraint_loss,
)

POSITIVE = functools.partial(jnp.clip, min=1e-10)
B, D = 4, 3


def floats(*values):
    return jnp.asarray(values, jnp.float32)


def by_hand(kl, alpha, epsilon, per_dimension):
    """The penalty and the dual loss of each entry, in double precision."""
    kl, alpha = np.float64(kl), np.maximum(np.float64(alpha), 1e-10)
    alpha = np.broadcast_to(alpha, kl.shape)
    penalty, dual = np.zeros((2, *kl.shape[:-1])) if per_dimension else (0 * kl, 0 * kl)
    for index in np.ndindex(kl.shape):
        entry = index[:-1] if per_dimension else index
        penalty[entry] += alpha[index] * kl[index]
        dual[entry] += alpha[index] * (epsilon - kl[index])
    return penalty, dual


@pytest.fixture
def constraints(rng):
    """One constraint of each kind."""
    kl = [rng.uniform(0, 2, size=shape) for shape in [(B,), (B, D), (B, D), (B,)]]
    alpha = [0.7, rng.uniform(0.1, 2, size=D), 0.3, rng.uniform(0.1, 2, size=B)]
    kinds = [False, True, True, False]
    return [
        (np.float32(k), LagrangePenalty(np.float32(a), 0.1 * i, per_dimension))
        for i, (k, a, per_dimension) in enumerate(zip(kl, alpha, kinds, strict=True))
    ]


class TestKLConstraintLoss:
    def test_is_its_definition(self, constraints):
        for kl, penalty in constraints:
            *losses, alpha = kl_constraint_loss(kl, penalty, POSITIVE)
            expected = by_hand(kl, *penalty)
            np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(alpha, penalty.alpha)

    def test_projects_the_multiplier(self):
        penalty = LagrangePenalty(floats(-3), 0.5)
        losses = kl_constraint_loss(floats(2), penalty, POSITIVE)
        np.testing.assert_allclose(losses, [[2e-10], [-1.5e-10], [1e-10]], rtol=1e-6)

    @pytest.mark.parametrize("stop", [True, False])
    def test_each_loss_moves_its_own_variable_alone_if_told(self, stop):
        def losses(kl, alpha, epsilon):
            penalty = LagrangePenalty(alpha, epsilon)
            return kl_constraint_loss(kl, penalty, POSITIVE, stop)[:2]

        by_kl, by_alpha, by_epsilon = jax.jacobian(losses, (0, 1, 2))(3.0, 2.0, 0.5)[0]
        assert (by_kl, by_alpha, by_epsilon) == (2, 0 if stop else 3, 0)
        by_kl, by_alpha, by_epsilon = jax.jacobian(losses, (0, 1, 2))(3.0, 2.0, 0.5)[1]
        assert (by_kl, by_alpha, by_epsilon) == (0 if stop else -2, -2.5, 2)

    def test_descending_the_dual_raises_the_price_of_what_is_too_far(self):
        def dual(alpha, kl):
            return kl_constraint_loss(kl, LagrangePenalty(alpha, 0.5), POSITIVE)[1]

        assert jax.grad(dual)(1.0, 2.0) < 0 < jax.grad(dual)(1.0, 0.1)

    def test_a_multiplier_of_zero_cuts_an_infinite_divergence(self):
        def losses(kl, alpha):
            penalty = LagrangePenalty(alpha, 0.5)
            penalty, dual, _ = kl_constraint_loss(kl, penalty, jax.nn.relu)
            return penalty + dual

        value, gradient = jax.value_and_grad(losses)(np.inf, 0.0)
        assert (value, gradient) == (0, 0)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_is_rounded_once(self, dtype):
        kl, alpha = floats(0.1, 0.7).astype(dtype), floats(0.3).astype(dtype)[0]
        penalty, dual, _ = kl_constraint_loss(kl, LagrangePenalty(alpha, 0.2), POSITIVE)
        wide, a = np.float32(kl), np.float32(alpha)
        assert penalty.dtype == dual.dtype == dtype
        np.testing.assert_array_equal(penalty, (a * wide).astype(dtype))
        np.testing.assert_array_equal(
            dual, (a * (np.float32(0.2) - wide)).astype(dtype)
        )

    @pytest.mark.parametrize(
        ("kl", "penalty", "message"),
        [
            (floats(1, 2), 2.0, "penalty must be of type LagrangePenalty, got float"),
            (
                floats(1, 2),
                LagrangePenalty(floats(1, 2, 3), 0.1),
                r"penalty.alpha has shape (3,), expected f[]|f[...] with ... = (2,)",
            ),
            (
                floats(1, 2),
                LagrangePenalty(floats(1, 2, 3), 0.1, per_dimension=True),
                r"penalty.alpha has shape (3,), expected f[]|f[D0] with D0 = 2",
            ),
            (
                floats(1),
                LagrangePenalty(1.0, -0.1),
                "penalty.epsilon must be in [0, inf], got -0.1",
            ),
            (jnp.array([1]), LagrangePenalty(1.0, 0.1), "kl must be floating-point"),
            (
                floats(1),
                LagrangePenalty(1.0, 0.1, jnp.array(True)),
                "penalty.per_dimension must be a Python bool, fixed while tracing",
            ),
        ],
    )
    def test_says_what_is_wrong(self, kl, penalty, message):
        with pytest.raises((TypeError, ValueError)) as error:
            kl_constraint_loss(kl, penalty, POSITIVE)
        assert str(error.value).startswith(f"kl_constraint_loss: {message}")

    def test_a_projection_must_be_a_function(self):
        penalty = LagrangePenalty(1.0, 0.1)
        for wrong in (1e-10, floats(1)):
            with pytest.raises(TypeError, match="projection_operator must be a func"):
                kl_constraint_loss(floats(1), penalty, wrong)


class TestSumOfConstraints:
    def test_is_that_of_each(self, constraints):
        result = compute_parametric_kl_penalty_and_dual_loss(constraints, POSITIVE)
        each = [by_hand(kl, *penalty) for kl, penalty in constraints]
        np.testing.assert_allclose(result, np.sum(each, axis=0), rtol=1e-5)

    def test_of_none_is_zero(self):
        penalty, dual = compute_parametric_kl_penalty_and_dual_loss([], POSITIVE)
        assert penalty == dual == 0

    def test_of_half_precision_is_rounded_once(self):
        pairs = [
            (floats(x).astype(jnp.bfloat16), LagrangePenalty(1.0, 0.0))
            for x in (1.0, 1 / 256, 1 / 256)
        ]
        penalty, _ = compute_parametric_kl_penalty_and_dual_loss(pairs, POSITIVE)
        assert penalty.dtype == jnp.bfloat16
        assert penalty.tolist() == [1.0078125]

    @pytest.mark.parametrize("stop", [True, False])
    def test_stops_gradients_if_told(self, stop):
        def losses(kl, alpha):
            pairs = [(kl, LagrangePenalty(alpha, 0.5))] * 2
            return compute_parametric_kl_penalty_and_dual_loss(pairs, POSITIVE, stop)

        (kl_0, alpha_0), (kl_1, alpha_1) = jax.jacobian(losses, (0, 1))(3.0, 2.0)
        assert (kl_0, alpha_1) == (4, -5)
        assert (alpha_0, kl_1) == ((0, 0) if stop else (6, -4))

    @pytest.mark.parametrize(
        ("constraints", "message"),
        [
            (floats(1), "kl_constraints must be a list of pairs (kl, LagrangePenalty)"),
            (iter([]), "kl_constraints must be a list of pairs (kl, LagrangePenalty)"),
            (LagrangePenalty(1.0, 0.1), "kl_constraints must be a list of pairs"),
            ([floats(1)], "kl_constraints[0] must be a pair (kl, LagrangePenalty)"),
            ([(1.0, 2.0, 3.0)], "kl_constraints[0] must be a pair"),
            ([(1.0, 2.0)], "kl_constraints[0][1] must be of type LagrangePenalty, got"),
            (
                [(floats(1, n), LagrangePenalty(1.0, 0.1)) for n in (1, 2)]
                + [(floats(1, 2, 3), LagrangePenalty(1.0, 0.1))],
                "kl_constraints[2][0] has shape (3,), expected f[...] with ... = (2,).",
            ),
            (
                [(floats(1), LagrangePenalty("x", 0.1))],
                "kl_constraints[0][1].alpha must be an array or a number, got str",
            ),
        ],
    )
    def test_says_what_is_wrong(self, constraints, message):
        with pytest.raises((TypeError, ValueError)) as error:
            compute_parametric_kl_penalty_and_dual_loss(constraints, POSITIVE)
        name = "compute_parametric_kl_penalty_and_dual_loss"
        assert str(error.value).startswith(f"{name}: {message}")

    def test_a_missing_argument_is_named(self):
        with pytest.raises(TypeError, match="missing a required argument: 'projection"):
            compute_parametric_kl_penalty_and_dual_loss([])

    def test_may_be_called_inside_other_transformations(self, constraints):
        call = lambda pairs: compute_parametric_kl_penalty_and_dual_loss(pairs, abs)
        kl, alpha = constraints[1][0], constraints[1][1].alpha
        rows = lambda kl: call([(kl, LagrangePenalty(alpha, 0.1, per_dimension=True))])
        np.testing.assert_allclose(jax.vmap(rows)(kl), rows(kl), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(rows)(kl), rows(kl), rtol=1e-6)


class TestKLAlphaLoss:
    def expected(self, weights, constraints):
        each = [by_hand(kl, *penalty) for kl, penalty in constraints]
        return np.sum(each, axis=0) * np.float64(weights)

    def test_is_the_weighted_mean(self, rng, constraints):
        weights = np.float32(rng.uniform(size=B))
        expected = self.expected(weights, constraints)
        call = functools.partial(kl_alpha_loss, weights, constraints)
        mean = expected.sum(axis=-1) / weights.sum()
        np.testing.assert_allclose(call(), mean, rtol=1e-5)
        np.testing.assert_allclose(
            call(reduction="sum"), expected.sum(axis=-1), rtol=1e-5
        )
        np.testing.assert_allclose(call(reduction="none"), expected, rtol=1e-5)

    def test_takes_multipliers_as_they_are(self):
        pair = floats(1, 3), LagrangePenalty(floats(-2)[0], 0.5)
        losses = kl_alpha_loss(floats(1, 1), [pair])
        assert [loss.item() for loss in losses] == [-4, 3]

    @pytest.mark.parametrize("how", ["weight", "mask"])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_what_is_left_out_has_no_effect(self, how, reduction, constraints):
        kept = np.array([True, False, True, True])
        ones = np.ones(B, np.float32)

        def loss(alpha, constraints, **given):
            pairs = [
                (kl, penalty._replace(alpha=a))
                for (kl, penalty), a in zip(constraints, alpha, strict=True)
            ]
            return sum(
                kl_alpha_loss(kl_constraints=pairs, reduction=reduction, **given)
            )

        spoilt = [
            (np.where(kept.reshape(-1, *[1] * (kl.ndim - 1)), kl, np.nan), p)
            for kl, p in constraints[:3]
        ]
        alpha = [p.alpha for _, p in constraints[:3]]
        if how == "mask":
            given = {"restarting_weights": ones, "mask_t": kept}
        else:
            given = {"restarting_weights": np.float32(kept)}
        apart = [(kl[kept], p) for kl, p in constraints[:3]]
        expected = jax.value_and_grad(loss)(alpha, apart, restarting_weights=ones[kept])
        result = jax.value_and_grad(loss)(alpha, spoilt, **given)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5), result, expected
        )

    def test_of_nothing_is_zero(self):
        pair = floats(np.nan), LagrangePenalty(1.0, 0.5)
        for nothing in [kl_alpha_loss(floats(1)), kl_alpha_loss(floats(0), [pair])]:
            assert [loss.item() for loss in nothing] == [0, 0]

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_over_devices_is_that_of_one(self, rng, constraints, reduction):
        weights = np.float32([1, 0, 0.5, 1])
        pairs = constraints[:3]

        def call(weights, kl, axis_name=None):
            split = [(k, p) for k, (_, p) in zip(kl, pairs, strict=True)]
            return kl_alpha_loss(weights, split, axis_name, reduction=reduction)

        kl = [kl for kl, _ in pairs]
        halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (weights, kl))
        for transform in (jax.vmap, jax.pmap):
            spread = transform(functools.partial(call, axis_name="i"), axis_name="i")
            result = np.asarray(spread(*halves))
            expected = np.stack([call(weights, kl)] * 2, axis=1)
            np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_a_mean_by_weights_that_add_up_to_less_than_one():
    weights, kl = jnp.array([0.25, 0.5]), jnp.array([3.0, 9.0])
    losses = kl_alpha_loss(weights, [(kl, LagrangePenalty(jnp.float32(2), 1.0))])
    assert [loss.item() for loss in losses] == [14, -12]

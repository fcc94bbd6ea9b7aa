"""The recurrence, against sums of products, under every transformation of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from rlprims import backward_recurrence


def unrolled(u, a, last):
    """Each `x_t` as a sum of later inputs, weighted by the decays between."""
    solution = []
    for t in range(len(u)):
        terms = [np.prod(a[t:k]) * u[k] for k in range(t, len(u))]
        solution.append(sum(terms) + np.prod(a[t:]) * last)
    return np.array(solution)


@pytest.fixture
def coefficients(rng):
    """Inputs and decays of seven steps, one of which cuts the future off."""
    u, a = rng.normal(size=7), rng.uniform(-1, 1, size=7)
    a[3] = 0
    return u.astype(np.float32), a.astype(np.float32), np.float32(2.5)


def test_is_a_sum_of_inputs_weighted_by_the_decays_between(coefficients):
    expected = unrolled(*(x.astype(np.float64) for x in coefficients))
    np.testing.assert_allclose(backward_recurrence(*coefficients), expected, rtol=1e-5)


def test_starts_from_zero_by_default(coefficients):
    u, a, _ = coefficients
    expected = backward_recurrence(u, a, 0.0)
    np.testing.assert_array_equal(backward_recurrence(u, a), expected)


def test_of_no_steps_is_empty():
    nothing = np.zeros(0, np.float32)
    assert backward_recurrence(nothing, nothing, 1.0).shape == (0,)
    grads = jax.grad(lambda *uax: backward_recurrence(*uax).sum(), argnums=(0, 1, 2))(
        nothing, nothing, 1.0
    )
    assert [g.shape for g in grads] == [(0,), (0,), ()]


def test_of_one_step_uses_the_last_value():
    one = np.ones(1, np.float32)
    assert backward_recurrence(one, 0.5 * one, 4.0).tolist() == [3.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
class TestCut:
    def test_keeps_what_is_not_finite_from_reaching_back(self, coefficients, bad):
        u, a, last = coefficients
        expected = backward_recurrence(u, a, last)[:4]
        spoilt = np.where(np.arange(7) > 3, bad, u)
        actual = backward_recurrence(spoilt, a, bad)
        np.testing.assert_array_equal(actual[:4], expected)
        assert not np.isfinite(actual[4:]).any()

    def test_keeps_it_out_of_gradients(self, coefficients, bad):
        u, a, last = coefficients
        spoilt = np.where(np.arange(7) > 3, bad, u)

        def before_the_cut(u, a, last):
            return backward_recurrence(u, a, last)[:4].sum()

        grads = jax.grad(before_the_cut, argnums=(0, 1))
        clean = grads(u, a, last)
        for spoilt_grad, grad in zip(grads(spoilt, a, last), clean, strict=True):
            np.testing.assert_array_equal(spoilt_grad[:3], grad[:3])
            assert spoilt_grad[3] == (0 if grad is clean[1] else grad[3])

    def test_keeps_it_out_of_forward_derivatives(self, coefficients, bad):
        u, a, last = coefficients
        spoilt = np.where(np.arange(7) > 3, bad, u)
        direction = (np.ones_like(u), np.ones_like(a))
        _, tangent = jax.jvp(
            lambda u, a: backward_recurrence(u, a, last), (spoilt, a), direction
        )
        assert np.isfinite(tangent[:4]).all()

    def test_shows_it_where_nothing_cuts(self, coefficients, bad):
        u, a, last = coefficients
        spoilt = np.where(np.arange(7) == 2, bad, u)
        assert not np.isfinite(backward_recurrence(spoilt, a, last)[:3]).any()


class TestDerivative:
    def test_equals_finite_differences_to_the_third_order(self, coefficients):
        with jax.enable_x64(True):
            args = [np.asarray(x, np.float64) for x in coefficients]
            check_grads(backward_recurrence, args, order=3, modes=["fwd", "rev"])

    def test_is_right_at_a_decay_of_zero(self):
        """A finite future beyond a cut still says what a longer horizon is worth."""
        u, a = jnp.ones(3), jnp.array([0.0, 0.5, 0.5])
        grad = jax.grad(lambda a: backward_recurrence(u, a, 2.0)[0])(a)
        assert grad.tolist() == [2.0, 0.0, 0.0]  # the value of the step that follows

    @pytest.mark.parametrize(
        "twice",
        [
            lambda f: jax.jacrev(jax.grad(f), argnums=1),
            lambda f: jax.jacfwd(jax.grad(f), argnums=1),
            lambda f: jax.jacfwd(jax.jacfwd(f), argnums=1),
            lambda f: jax.jacrev(jax.jacfwd(f), argnums=1),
        ],
        ids=["grad of grad", "jvp of grad", "jvp of jvp", "grad of jvp"],
    )
    def test_of_second_order_is_right_at_a_decay_of_zero(self, twice):
        u, a = jnp.ones(3), jnp.array([0.0, 0.5, 1.0])
        mixed = twice(lambda u, a: backward_recurrence(u, a)[0])(u, a)
        # x_0 = u_0 + a_0 (u_1 + a_1 u_2): differentiated by u, then by a.
        assert mixed.tolist() == [[0, 0, 0], [1, 0, 0], [0.5, 0, 0]]

    def test_by_the_inputs_keeps_only_the_decays(self, capsys):
        """Of size `T`, that is: nothing beside what the analytic gradient needs."""
        u = a = jnp.ones(99, jnp.float32)
        print_saved_residuals(lambda u: backward_recurrence(u, a), u)
        kept = capsys.readouterr().out
        assert kept.count("[99]") == 1
        assert "f32[99] from a constant" in kept

    def test_by_the_decays_keeps_the_solution_too(self, capsys):
        u = a = jnp.ones(99, jnp.float32)
        print_saved_residuals(backward_recurrence, u, a)
        kept = capsys.readouterr().out
        assert kept.count("f32[99]") == 2

    def test_runs_one_loop_each_way(self):
        u, a = jnp.ones(9), jnp.full(9, 0.5)

        def loss(u):
            return jnp.sum(jnp.square(backward_recurrence(u, a)))

        program = jax.jit(jax.value_and_grad(loss)).lower(u).as_text()
        assert program.count("stablehlo.while") == 2


class TestTransformations:
    """Each gives what a plain call gives."""

    @pytest.fixture
    def batch(self, rng):
        u, a = rng.normal(size=(2, 2, 5)).astype(np.float32)
        return (
            u,
            a,
            np.stack([backward_recurrence(*ua) for ua in zip(u, a, strict=True)]),
        )

    def test_vmap_over_either_axis(self, batch):
        u, a, expected = batch
        np.testing.assert_array_equal(jax.vmap(backward_recurrence)(u, a), expected)
        over_columns = jax.vmap(backward_recurrence, in_axes=1, out_axes=1)
        np.testing.assert_array_equal(over_columns(u.T, a.T), expected.T)

    def test_vmap_over_one_argument(self, batch):
        u, a, expected = batch
        shared = jax.vmap(backward_recurrence, in_axes=(0, None))(u, a[0])
        np.testing.assert_array_equal(shared[0], expected[0])

    def test_pmap(self, batch):
        u, a, expected = batch
        np.testing.assert_array_equal(jax.pmap(backward_recurrence)(u, a), expected)

    @pytest.mark.parametrize("sharded", [(True, True), (True, False), (False, True)])
    def test_shard_map_with_its_gradient(self, batch, sharded):
        u, a, _ = batch
        args = [x if split else x[:1] for x, split in zip((u, a), sharded, strict=True)]
        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        specs = tuple(
            PartitionSpec("d") if split else PartitionSpec() for split in sharded
        )

        def each(u, a):
            return backward_recurrence(u[0], a[0])[None]

        spread = jax.shard_map(
            each, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("d")
        )

        def plain(u, a):
            rows = jnp.broadcast_to(u, (2, 5)), jnp.broadcast_to(a, (2, 5))
            return jax.vmap(backward_recurrence)(*rows)

        np.testing.assert_allclose(spread(*args), plain(*args), rtol=1e-6)
        for index in (0, 1):
            grad, expected = (
                jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), argnums=index))(
                    *args
                )
                for f in (spread, plain)
            )
            np.testing.assert_allclose(grad, expected, rtol=1e-5)

    def test_scan(self, batch):
        u, a, expected = batch
        _, solved = jax.lax.scan(lambda c, ua: (c, backward_recurrence(*ua)), 0, (u, a))
        np.testing.assert_array_equal(solved, expected)

    def test_checkpoint(self, batch):
        u, a, _ = batch

        def loss(u, a):
            return jnp.sum(backward_recurrence(u, a) ** 2)

        plain = jax.grad(loss, argnums=(0, 1))(u[0], a[0])
        rematerialised = jax.grad(jax.checkpoint(loss), argnums=(0, 1))(u[0], a[0])
        for x, y in zip(rematerialised, plain, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_accumulates_half_precision_in_single():
    """Ones added in bfloat16 itself would stick at 256."""
    ones = jnp.ones(1024, jnp.bfloat16)
    solution = backward_recurrence(ones, ones)
    assert solution.dtype == jnp.bfloat16
    assert solution[0] == 1024

"""Moving averages, against weighted means over the whole history in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims.moving_averages import EmaState, _update, create_ema, merged


def moments_by_hand(batches, decay):
    """The moments of all entries so far, each with the weight of its batch."""
    weights = [decay ** (len(batches) - 1 - n) for n in range(len(batches))]
    batches = [np.asarray(batch, np.float64) for batch in batches]
    total = sum(weights)
    means = [w * batch.mean() for w, batch in zip(weights, batches, strict=True)]
    mean = sum(means) / total
    spreads = [
        w * ((batch - mean) ** 2).mean()
        for w, batch in zip(weights, batches, strict=True)
    ]
    return mean, sum(spreads) / total


def run(batches, decay, template=None, jit=True):
    init_state, update_moments = create_ema(decay)
    update = jax.jit(update_moments) if jit else update_moments
    state = init_state(batches[0] if template is None else template)
    for batch in batches:
        moments, state = update(batch, state)
    return moments, state


def both(moments):
    return np.array([moments.mean, moments.variance])


class TestCreateEma:
    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
    @pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
    def test_weighs_batches_by_their_age(self, rng, decay, shape):
        batches = rng.normal(1, 2, size=(12, *shape)).astype(np.float32)
        moments, state = run(list(batches), decay)
        expected = moments_by_hand(batches, decay)
        np.testing.assert_allclose(both(moments), expected, rtol=1e-5, atol=1e-6)
        again = state.debiased_moments()
        np.testing.assert_allclose(both(again), both(moments), rtol=3e-7)

    def test_is_unbiased_from_the_first_update_on(self):
        moments, _ = run([jnp.array([1.0, 3.0])], 0.999)
        np.testing.assert_allclose(both(moments), [2, 1], rtol=1e-6)

    @pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
    def test_starts_with_the_moments_of_the_first_batch(self, decay):
        """Even where the square of the mean overflows."""
        init_state, update_moments = create_ema(decay)
        for mean in (0.1, 1e25):
            x = jnp.full(4, mean)
            moments, _ = update_moments(x, init_state(x))
            assert moments == (x[0], 0)

    def test_keeps_what_its_state_says(self, rng):
        batches = rng.normal(size=(3, 4)).astype(np.float32)
        moments, state = run(list(batches), 0.9)
        np.testing.assert_allclose(state.decay_product, 0.9**3, rtol=1e-6)
        total = 1 - 0.9**3
        np.testing.assert_allclose(state.mu, total * moments.mean, rtol=1e-5)
        np.testing.assert_allclose(state.nu, total * moments.variance, rtol=1e-5)

    def test_the_moments_before_any_data_are_zero(self):
        state = create_ema()[0]({"a": jnp.ones(3)})
        assert state.debiased_moments() == ({"a": 0}, {"a": 0})
        assert state.decay_product == 1

    def test_averages_each_leaf_of_a_tree_by_itself(self, rng):
        trees = [
            {"a": rng.normal(size=2).astype(np.float32), "b": (np.float32(n), None)}
            for n in range(4)
        ]
        moments, state = run(trees, 0.9)
        assert jax.tree.structure(state.mu) == jax.tree.structure(trees[0])
        for leaf in (lambda tree: tree["a"], lambda tree: tree["b"][0]):
            expected = moments_by_hand([leaf(tree) for tree in trees], 0.9)
            own = leaf(moments.mean), leaf(moments.variance)
            np.testing.assert_allclose(own, expected, rtol=1e-5)

    def test_a_tree_without_arrays_is_fine(self):
        assert run([(None, ())], 0.9)[0].mean == (None, ())

    def test_batches_may_differ_in_size(self, rng):
        batches = [rng.normal(size=n).astype(np.float32) for n in (2, 5, 1)]
        moments, _ = run(batches, 0.5)
        expected = moments_by_hand(batches, 0.5)
        np.testing.assert_allclose(both(moments), expected, rtol=1e-5)

    @pytest.mark.parametrize("mean", [1e4, -1e6])
    @pytest.mark.parametrize("decay", [0.9, 0.999])
    def test_the_variance_is_right_where_the_mean_is_large(self, mean, decay):
        batches = [jnp.array([mean + (-1.0) ** n]) for n in range(200)]
        moments, _ = run(batches, decay)
        _, variance = moments_by_hand(batches, decay)
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(moments.variance, variance, rtol=0.05)

    def test_the_variance_of_a_constant_is_tiny(self):
        moments, _ = run([jnp.full(3, 1e4)] * 300, 0.999)
        np.testing.assert_allclose(moments.mean, 1e4, rtol=1e-5)
        assert 0 <= moments.variance < 0.01

    def test_the_mean_of_many_large_numbers_is_exact(self):
        numbers = 1e4 + np.tile(np.float32([-1, 1]), 500_000)
        moments, _ = run([numbers.astype(np.float32)], 0.9)
        np.testing.assert_allclose(both(moments), [1e4, 1], rtol=1e-4)

    def test_half_precision_does_not_get_stuck(self):
        init_state, update_moments = create_ema(0.999)
        one = jnp.bfloat16(1)

        def step(state, _):
            moments, state = update_moments(one, state)
            return state, moments

        moments = jax.lax.scan(step, init_state(one), None, 5000)[1]
        np.testing.assert_allclose(moments.mean[-1], 1, rtol=1e-4)
        np.testing.assert_allclose(moments.variance[-1], 0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.float16, jnp.bfloat16])
    def test_narrow_numbers_do_not_overflow(self, dtype):
        numbers = jnp.array([100, 120, 20], dtype)
        moments, state = run([numbers], 0.9)
        expected = moments_by_hand([[100, 120, 20]], 0.9)
        np.testing.assert_allclose(both(moments), expected, rtol=1e-6)
        assert {x.dtype for x in jax.tree.leaves((moments, state.mu, state.nu))} == {
            jnp.dtype("float32")
        }

    def test_the_square_of_a_half_precision_number_does_not_overflow(self):
        moments, _ = run([jnp.array([300, -300], jnp.float16)], 0.9)
        np.testing.assert_allclose(both(moments), [0, 9e4])

    @pytest.mark.parametrize("x64", [False, True])
    def test_keeps_wide_dtypes(self, x64):
        with jax.enable_x64(x64):
            for dtype in ("float32", "float64") if x64 else ("float32",):
                numbers = np.ones(2, dtype)
                init_state, update_moments = create_ema(0.9)
                moments, state = update_moments(numbers, init_state(numbers))
                leaves = (moments, state.mu, state.nu)
                assert {x.dtype for x in jax.tree.leaves(leaves)} == {np.dtype(dtype)}

    def test_the_state_keeps_its_dtypes_in_a_loop(self):
        init_state, update_moments = create_ema(0.9)
        x = jnp.array([1, 2], jnp.int32)
        step = lambda state, x: update_moments(x, state)[::-1]
        state, moments = jax.lax.scan(step, init_state(x), jnp.stack([x, x]))
        assert isinstance(state, EmaState)
        np.testing.assert_allclose(moments.mean, [1.5, 1.5], rtol=1e-6)

    def test_what_is_not_a_number_spoils_its_own_leaf_alone(self):
        moments, _ = run([{"a": jnp.array([jnp.nan, 1.0]), "b": jnp.ones(2)}], 0.9)
        assert np.isnan([moments.mean["a"], moments.variance["a"]]).all()
        assert moments.mean["b"] == 1

    def test_devices_together_do_what_one_does_with_all_data(self, rng):
        batch = rng.normal(1e4, 1, size=(2, 50)).astype(np.float32)
        expected = moments_by_hand([batch], 0.9)
        init_state, update_moments = create_ema(0.9, "d")
        update = lambda x: update_moments(x, init_state(x))
        mapped, _ = jax.vmap(update, axis_name="d")(batch)
        np.testing.assert_allclose(mapped.mean, [expected[0]] * 2, rtol=1e-6)
        np.testing.assert_allclose(mapped.variance, [expected[1]] * 2, rtol=1e-3)
        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        spec = {"in_specs": PartitionSpec("d"), "out_specs": PartitionSpec()}
        sharded, state = jax.jit(jax.shard_map(update, mesh=mesh, **spec))(batch)
        np.testing.assert_allclose(both(sharded), expected, rtol=1e-3)
        np.testing.assert_allclose(both(state.debiased_moments()), both(sharded))

    def test_gradients_flow_from_the_moments_to_the_data(self):
        init_state, update_moments = create_ema(0.9)
        x = jnp.array([1.0, 3.0])
        moments = lambda x: update_moments(x, init_state(x))[0]
        np.testing.assert_allclose(jax.grad(lambda x: moments(x).mean)(x), [0.5, 0.5])
        np.testing.assert_allclose(jax.grad(lambda x: moments(x).variance)(x), [-1, 1])

    def test_the_decay_may_be_traced(self):
        def mean(decay):
            init_state, update_moments = create_ema(decay)
            state = init_state(jnp.ones(1))
            _, state = update_moments(jnp.zeros(1), state)
            return update_moments(jnp.ones(1), state)[0].mean

        means = jax.vmap(mean)(jnp.array([0.0, 0.5, 1.5, -0.5]))
        np.testing.assert_allclose(means, [1, 1 / 1.5, np.nan, np.nan], rtol=1e-6)

    @pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
    def test_refuses_a_decay_out_of_range(self, decay):
        with pytest.raises(ValueError, match=r"create_ema: decay must be in \[0, 1\)"):
            create_ema(decay)

    def test_refuses_another_structure(self):
        init_state, update_moments = create_ema()
        with pytest.raises(ValueError, match=r"update_moments: tree has the structure"):
            update_moments({"a": jnp.ones(2)}, init_state({"b": jnp.ones(2)}))

    @pytest.mark.parametrize(
        ("leaf", "error", "message"),
        [
            ("x", TypeError, r"tree\['a'\] must be an array of real numbers, got str"),
            (jnp.array(True), TypeError, r"tree\['a'\] must be .* numbers, got bool"),
            (1j, TypeError, r"tree\['a'\] must be .* numbers, got complex"),
            (
                jnp.zeros((0, 2)),
                ValueError,
                r"tree\['a'\] has shape \(0, 2\), expected",
            ),
        ],
    )
    def test_refuses_what_has_no_mean(self, leaf, error, message):
        init_state, update_moments = create_ema()
        with pytest.raises(error, match="update_moments: " + message):
            update_moments({"a": leaf}, init_state({"a": jnp.ones(2)}))

    def test_compiles_once_for_all_averages_of_one_structure(self):
        run([jnp.ones(7)], 0.3, jit=False)
        before = _update._cache_size()
        for decay in (0.4, 0.5):
            run([jnp.zeros(7)] * 3, decay, jit=False)
        assert _update._cache_size() == before


class TestMerged:
    def test_is_the_moments_of_both_sets_together(self, rng):
        some, others = rng.normal(size=3), rng.normal(5, 2, size=9)
        moments = merged(some.mean(), some.var(), others.mean(), others.var(), 0.75)
        together = np.concatenate([some, others])
        np.testing.assert_allclose(moments, [together.mean(), together.var()])

    def test_a_weight_of_one_replaces_the_moments(self):
        assert merged(5.0, 2.0, 3.0, 1.0, 1.0) == (3, 1)
        assert merged(5.0, 2.0, 3.0, 1.0, 0.0) == (5, 2)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
    def test_what_has_no_weight_has_no_effect(self, bad):
        bad, three, one = jnp.float32(bad), jnp.float32(3), jnp.float32(1)
        assert merged(bad, bad, three, one, one) == (3, 1)
        assert merged(three, one, bad, bad, 0 * one) == (3, 1)

    def test_the_slope_by_a_weight_of_one_or_zero_is_that_next_to_it(self):
        for weight in (0.0, 1.0):
            slopes = jax.jacobian(lambda w: merged(5.0, 2.0, 3.0, 1.0, w))(weight)
            # Of w 3 + (1 - w) 5, and of 2 - w + 4 w (1 - w).
            assert slopes == (-2, 3 - 8 * weight)

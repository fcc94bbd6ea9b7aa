"""Where gradients flow, are stopped, and are clipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims import clip_gradient, scale_gradient, stop_gradient_if, td_error


def clipped_by_hand(gradient, low, high):
    """Clips one number at a time."""
    flat = [
        low if g < low else high if g > high else g for g in np.asarray(gradient).flat
    ]
    return np.reshape(flat, np.shape(gradient))


def gradient_behind(clip, weights):
    """The gradient that reaches `x` when each element counts `weights` in the loss."""
    return jax.grad(lambda x: jnp.sum(weights * clip(x)))(jnp.zeros_like(weights))


@pytest.fixture
def compilations():
    """A list that grows with every compilation."""
    seen = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


class TestClipGradient:
    unit = staticmethod(lambda x: clip_gradient(x, -1.0, 1.0))

    def test_leaves_values_alone(self, rng):
        x = rng.normal(scale=100, size=(2, 3)).astype(np.float32)
        np.testing.assert_array_equal(clip_gradient(x, -1.0, 1.0), x)

    def test_clips_each_element_of_the_gradient(self, rng):
        weights = rng.normal(scale=2, size=(4, 3)).astype(np.float32)
        gradient = gradient_behind(lambda x: clip_gradient(x, -1.5, 0.5), weights)
        np.testing.assert_array_equal(gradient, clipped_by_hand(weights, -1.5, 0.5))

    def test_takes_a_tree_and_keywords(self):
        tree = {"a": jnp.ones(2), "b": (jnp.ones(()), None)}
        clip = functools.partial(clip_gradient, gradient_max=1.0, gradient_min=-1.0)
        out = clip(x=tree)
        assert jax.tree.structure(out) == jax.tree.structure(tree)

        def loss(tree):
            clipped = clip(x=tree)
            return 3 * jnp.sum(clipped["a"]) - 0.5 * clipped["b"][0]

        gradient = jax.grad(loss)(tree)
        assert gradient["a"].tolist() == [1, 1]
        assert gradient["b"][0] == -0.5

    def test_is_the_identity_in_forward_mode(self):
        value, slope = jax.jvp(lambda x: 3 * self.unit(x), (5.0,), (2.0,))
        assert (value, slope) == (15, 6)
        assert jax.jacfwd(lambda x: 3 * self.unit(x))(5.0) == 3

    def test_bounds_and_arguments_may_be_mapped(self, rng):
        weights = rng.normal(scale=3, size=(2, 4, 3)).astype(np.float32)
        low = np.array([-1, -2], np.float32)
        high = np.array([1, 0.5, 2, 0.25], np.float32)

        def gradient(weights, low, high):
            return gradient_behind(lambda x: clip_gradient(x, low, high), weights)

        mapped = jax.vmap(jax.vmap(gradient, (0, None, 0)), (0, 0, None))
        for i, j in np.ndindex(2, 4):
            np.testing.assert_array_equal(
                mapped(weights, low, high)[i, j],
                clipped_by_hand(weights[i, j], low[i], high[j]),
            )

    @pytest.mark.parametrize("each_its_own", [True, False])
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_any_axis_may_be_mapped(self, rng, axis, each_its_own):
        x = rng.normal(size=(4, 3, 2)).astype(np.float32)
        size = x.shape[axis] if each_its_own else 1
        bound = np.linspace(0.5, 1.5, size, dtype=np.float32)
        bounds = np.expand_dims(bound, [other for other in range(3) if other != axis])

        def clip(x, bound):
            return clip_gradient(x, -bound, bound)

        def mapped(x):
            if each_its_own:
                return jax.vmap(clip, (axis, 0), axis)(x, bound)
            return jax.vmap(clip, (axis, None), axis)(x, bound[0])

        np.testing.assert_array_equal(mapped(x), x)
        gradient = jax.grad(lambda x: jnp.sum(mapped(x) ** 2))(x)
        np.testing.assert_array_equal(gradient, np.clip(2 * x, -bounds, bounds))

    def test_one_argument_under_many_bounds_gets_the_sum_of_clipped_gradients(self):
        def loss(x):
            clipped = jax.vmap(lambda bound: clip_gradient(x, -bound, bound))
            return jnp.sum(3 * clipped(jnp.array([1.0, 2.0])))

        assert jax.grad(loss)(jnp.zeros(2)).tolist() == [3, 3]  # 1 + 2

    def test_compiles_with_traced_bounds(self):
        @jax.jit
        def gradient(bound):
            return jax.grad(lambda x: 3 * clip_gradient(x, -bound, bound))(0.0)

        assert gradient(2.0) == 2
        assert gradient(5.0) == 3

    def test_clips_at_every_step_of_a_scan(self):
        def loss(x):
            def step(x, _):
                return 2 * clip_gradient(x, -3.0, 3.0), None

            return jax.lax.scan(step, x, None, length=3)[0]

        assert jax.grad(loss)(1.0) == 3  # 2, then 4 -> 3, then 6 -> 3
        assert jax.jit(jax.grad(loss))(1.0) == 3
        assert jax.jvp(loss, (1.0,), (1.0,))[1] == 8

    def test_works_under_checkpointing(self):
        loss = jax.checkpoint(lambda x: 3 * self.unit(jnp.sin(x)))
        assert jax.grad(loss)(0.0) == 1

    @pytest.mark.parametrize("spec", [PartitionSpec("d"), PartitionSpec()])
    def test_works_inside_shard_map(self, spec):
        mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
        shards = functools.partial(jax.shard_map, mesh=mesh, out_specs=spec)

        def gradient(x, bound):
            clip = functools.partial(
                clip_gradient, gradient_min=-bound, gradient_max=bound
            )
            return jax.grad(lambda x: jnp.sum(3 * clip(x)))(x)

        inside = shards(gradient, in_specs=(spec, PartitionSpec()))
        assert inside(jnp.zeros(2), jnp.ones(())).tolist() == [1, 1]
        assert jax.jit(inside)(jnp.zeros(2), jnp.ones(())).tolist() == [1, 1]
        outside = shards(self.unit, in_specs=spec)
        through = jax.grad(lambda x: jnp.sum(3 * outside(x)))(jnp.zeros(2))
        assert through.tolist() == [1, 1]

    @pytest.mark.parametrize("outer", [jax.jacrev, jax.jacfwd])
    def test_the_clipped_gradient_has_the_derivative_of_what_it_is(self, outer):
        """The clipped gradient of 10 x² is `20 x`, held between -1 and 1."""
        gradient = jax.grad(lambda x: jnp.sum(10 * self.unit(x) ** 2))
        x = jnp.array([0.01, 1.0, -1.0])
        np.testing.assert_allclose(outer(gradient)(x), np.diag([20, 0, 0]))
        np.testing.assert_allclose(jax.jit(outer(gradient))(x), np.diag([20, 0, 0]))

    def test_the_clipped_gradient_can_be_differentiated_by_the_bounds(self):
        def gradient(weight, bound):
            return jax.grad(lambda x: weight * clip_gradient(x, -bound, bound))(0.0)

        assert jax.grad(gradient, 1)(3.0, 1.0) == 1
        assert jax.grad(gradient, 1)(-3.0, 1.0) == -1
        assert jax.grad(gradient, 1)(0.5, 1.0) == 0

    def test_values_have_no_gradient_by_the_bounds(self):
        def value(low, high):
            return clip_gradient(3.0, low, high)

        assert jax.grad(value, (0, 1))(-1.0, 1.0) == (0, 0)

    def test_does_not_hide_a_gradient_that_is_not_a_number(self):
        gradient = gradient_behind(self.unit, jnp.array([jnp.nan, jnp.inf]))
        np.testing.assert_array_equal(gradient, [np.nan, 1])

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_keeps_the_dtype_whatever_the_bounds(self, dtype):
        for bound in (1.0, 1, np.float32(1), jnp.ones(())):
            clip = functools.partial(
                clip_gradient, gradient_min=-bound, gradient_max=bound
            )
            assert clip(jnp.ones(2, dtype)).dtype == dtype
            gradient = gradient_behind(clip, jnp.full(2, 3, dtype))
            assert gradient.dtype == dtype
            assert gradient.tolist() == [1, 1]

    def test_keeps_double_precision(self):
        with jax.enable_x64(True):
            gradient = gradient_behind(
                lambda x: clip_gradient(x, -0.1, 0.1), jnp.ones(1)
            )
            assert gradient.dtype == np.float64
            assert gradient.item() == 0.1

    def test_the_upper_bound_wins_if_traced_bounds_cross(self):
        def gradient(low, high):
            return jax.grad(lambda x: 5 * clip_gradient(x, low, high))(0.0)

        assert jax.jit(gradient)(1.0, -1.0) == -1

    @pytest.mark.parametrize("number", [float, np.float32, int])
    def test_refuses_python_bounds_that_cross(self, number):
        message = "clip_gradient: gradient_min must not exceed gradient_max, got 1.*-1"
        with pytest.raises(ValueError, match=message):
            clip_gradient(1.0, number(1), number(-1))

    @pytest.mark.parametrize("name", ["gradient_min", "gradient_max"])
    def test_refuses_a_bound_that_is_no_scalar(self, name):
        bounds = {"gradient_min": -1.0, "gradient_max": 1.0, name: jnp.zeros(2)}
        message = rf"clip_gradient: {name} has shape \(2,\), expected f\[\]"
        with pytest.raises(ValueError, match=message):
            clip_gradient(jnp.zeros(2), **bounds)

    def test_refuses_what_has_no_gradient(self):
        message = "clip_gradient: x must be floating-point, got int32"
        with pytest.raises(TypeError, match=message):
            clip_gradient({"a": 1.0, "b": jnp.arange(2, dtype=jnp.int32)}, -1.0, 1.0)

    def test_an_eager_loop_compiles_nothing_new(self, compilations):
        def use(i):
            x = jnp.full(3, float(i))
            self.unit(x)
            clip_gradient(x, -float(i), float(i))
            jax.grad(lambda x: jnp.sum(clip_gradient(x, -1.0, float(i))))(x)
            jax.vmap(jax.grad(self.unit))(x)

        use(0)
        use(1)
        compilations.clear()
        for i in range(2, 100):
            use(i)
        assert not compilations


class TestScaleGradient:
    half = staticmethod(lambda x: scale_gradient(x, 0.5))

    def test_leaves_values_and_dtypes_of_a_tree_alone(self):
        tree = {"a": jnp.float32([1e-40, jnp.nan]), "b": (jnp.bfloat16(3), None)}
        out = scale_gradient(x=tree, scale=1 / 3)
        assert jax.tree.structure(out) == jax.tree.structure(tree)
        for x, y in zip(*map(jax.tree.leaves, (out, tree)), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)

    @pytest.mark.parametrize("scale", [0.5, 1 / 3, 1.0, 7.0, -1.0, 0.0])
    def test_multiplies_the_gradient_in_both_modes(self, rng, scale):
        weights, x = rng.normal(size=(2, 4)).astype(np.float32)
        loss = lambda x: jnp.sum(weights * jnp.sin(scale_gradient(x, scale)))
        expected = scale * np.float64(weights) * np.cos(np.float64(x))
        for mode in (jax.grad, jax.jacrev, jax.jacfwd):
            np.testing.assert_allclose(mode(loss)(x), expected, rtol=1e-6, atol=1e-7)

    def test_powers_of_two_are_exact_at_every_step_of_a_scan(self):
        def unrolled(x):
            step = lambda x, _: (3 * self.half(x), None)
            return jax.lax.scan(step, x, None, length=4)[0]

        for fn in (unrolled, jax.jit(unrolled), jax.checkpoint(unrolled)):
            assert jax.grad(fn)(1.0) == 1.5**4
            assert jax.jvp(fn, (1.0,), (1.0,)) == (3**4, 1.5**4)

    def test_scales_may_be_traced_and_mapped(self):
        scales = jnp.array([0.0, 0.5, -2.0])
        gradient = jax.grad(lambda x, scale: 3 * scale_gradient(x, scale))
        assert jax.jit(jax.vmap(gradient, (None, 0)))(1.0, scales).tolist() == [
            0,
            1.5,
            -6,
        ]
        values = jax.vmap(scale_gradient, (None, 0))(1.0, scales)
        assert values.tolist() == [1, 1, 1]

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    @pytest.mark.parametrize("traced", [True, False])
    def test_a_scale_of_zero_lets_nothing_through(self, bad, traced):
        def gradient(scale):
            loss = lambda x: jnp.sum(bad * scale_gradient(x, scale))
            return jax.grad(loss)(jnp.ones(2)), jax.jvp(
                lambda x: scale_gradient(x, scale), (1.0,), (bad,)
            )

        gradient = jax.jit(gradient) if traced else gradient
        backward, (value, forward) = gradient(0.0)
        assert backward.tolist() == [0, 0]
        assert (value, forward) == (1, 0)
        assert not np.isfinite(gradient(0.5)[0]).any()

    @pytest.mark.parametrize("outer", [jax.jacrev, jax.jacfwd])
    def test_the_scaled_gradient_has_the_derivative_of_what_it_is(self, outer):
        """The scaled gradient of x³ is `1.5 x²`, whose derivative is `3 x`."""
        gradient = jax.grad(lambda x: self.half(x) ** 3)
        assert outer(gradient)(2.0) == 6
        assert jax.jit(outer(gradient))(2.0) == 6

    def test_the_scaled_gradient_can_be_differentiated_by_the_scale(self):
        gradient = jax.grad(lambda x, scale: scale_gradient(x, scale) ** 2)
        assert jax.grad(gradient, 1)(3.0, 0.25) == 6
        assert jax.grad(lambda scale: scale_gradient(3.0, scale))(0.25) == 0

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_keeps_the_dtype_and_rounds_once(self, dtype):
        weights = jnp.array([3.0, 7.0], dtype)
        expected = (weights.astype(jnp.float32) * np.float32(1 / 3)).astype(dtype)
        for scale in (1 / 3, np.float32(1 / 3), jnp.float32(1 / 3)):
            gradient = gradient_behind(lambda x, s=scale: scale_gradient(x, s), weights)
            assert gradient.dtype == dtype
            np.testing.assert_array_equal(gradient, expected)
        assert gradient_behind(lambda x: scale_gradient(x, 2), weights).dtype == dtype

    def test_keeps_double_precision(self):
        with jax.enable_x64(True):
            weights = jnp.ones(1)
            gradient = gradient_behind(lambda x: scale_gradient(x, 0.1), weights)
            assert gradient.dtype == np.float64
            assert gradient.item() == 0.1

    @pytest.mark.parametrize("spec", [PartitionSpec("d"), PartitionSpec()])
    def test_works_inside_shard_map(self, spec):
        mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
        gradient = lambda x, scale: jax.grad(
            lambda x: jnp.sum(3 * scale_gradient(x, scale))
        )(x)
        inside = jax.shard_map(
            gradient, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
        )
        assert jax.jit(inside)(jnp.zeros(2), jnp.float32(0.5)).tolist() == [1.5, 1.5]

    def test_refuses_a_scale_that_is_no_scalar(self):
        message = r"scale_gradient: scale has shape \(2,\), expected f\[\]"
        with pytest.raises(ValueError, match=message):
            scale_gradient(jnp.zeros(2), jnp.zeros(2))

    def test_refuses_what_has_no_gradient(self):
        message = "scale_gradient: x must be floating-point, got int32"
        with pytest.raises(TypeError, match=message):
            scale_gradient({"a": 1.0, "b": jnp.arange(2, dtype=jnp.int32)}, 0.5)

    def test_an_eager_loop_compiles_nothing_new(self, compilations):
        def use(i):
            x = jnp.full(3, float(i))
            scale_gradient(x, float(i))
            jax.grad(lambda x: jnp.sum(scale_gradient(x, float(i))))(x)

        use(0)
        use(1)
        compilations.clear()
        for i in range(2, 50):
            use(i)
        assert not compilations


class TestStopGradientIf:
    @pytest.mark.parametrize("flag", [True, False])
    @pytest.mark.parametrize("traced", [True, False])
    def test_blocks_gradients_on_request(self, flag, traced):
        def loss(x, flag):
            tree = stop_gradient_if(flag, {"a": x, "b": 2 * x})
            return x + tree["a"] + tree["b"]

        flag = jnp.asarray(flag) if traced else flag
        assert loss(3.0, flag) == 12
        assert jax.grad(loss)(3.0, flag) == (1 if flag else 4)

    def test_leaves_nothing_behind_if_the_flag_is_known(self):
        jaxpr = jax.make_jaxpr(lambda x: stop_gradient_if(False, x))(1.0)
        assert not jaxpr.eqns


class TestTdError:
    def test_is_the_target_less_the_prediction(self):
        assert td_error(jnp.float32(1), jnp.float32(4), True) == 3

    @pytest.mark.parametrize("stop", [True, False])
    def test_the_target_is_a_constant_on_request(self, stop):
        gradients = jax.grad(td_error, (0, 1))(1.0, 4.0, stop)
        assert gradients == (-1, 0 if stop else 1)

"""PopArt, against its definition in double precision, one task at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims.normalization import (
    PopArtState,
    art,
    normalize,
    pop,
    popart,
    unnormalize,
    unnormalize_linear,
)

BOUNDS = 1e-4, 1e4
START = PopArtState(np.zeros(2, "f"), np.ones(2, "f"), np.ones(2, "f"))


def state_of(means, stds, dtype=np.float32):
    means, stds = np.asarray(means, np.float64), np.asarray(stds, np.float64)
    numbers = means, stds, means**2 + stds**2
    return PopArtState(*(jnp.asarray(x.astype(dtype)) for x in numbers))


def art_by_hand(moments, targets, indices, step_size):
    """The mean and the mean square of each task, as a list of pairs."""
    updated = []
    for task, (mean, square) in enumerate(moments):
        own = [float(y) for y, i in zip(targets, indices, strict=True) if i == task]
        step = step_size if own else 0.0
        new_mean = sum(own) / max(len(own), 1)
        new_square = sum(y * y for y in own) / max(len(own), 1)
        updated.append(
            (mean + step * (new_mean - mean), square + step * (new_square - square))
        )
    return updated


def state_by_hand(moments, scale_lb, scale_ub):
    scales = [max(square - mean**2, 0) ** 0.5 for mean, square in moments]
    means, squares = zip(*moments, strict=True)
    return PopArtState(means, np.clip(scales, scale_lb, scale_ub), squares)


def assert_close(state, expected, rtol=1e-5, atol=1e-6):
    for x, y in zip(state, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


jitted_art = jax.jit(art)


class TestArt:
    @pytest.mark.parametrize("step_size", [0.0, 0.1, 0.5, 1.0])
    def test_averages_the_targets_of_each_task(self, rng, step_size):
        moments = [(1.0, 5.0), (-3.0, 10.0), (0.0, 1.0)]
        state = PopArtState(
            jnp.array([1.0, -3.0, 0.0]),
            jnp.array([2.0, 1.0, 1.0]),
            jnp.array([5, 10, 1.0]),
        )
        for _ in range(5):
            targets = rng.normal(3, 2, size=(4, 5)).astype(np.float32)
            indices = rng.integers(2, size=(4, 5))  # none of the last task
            moments = art_by_hand(moments, targets.ravel(), indices.ravel(), step_size)
            state = jitted_art(state, targets, indices, step_size, *BOUNDS)
            assert_close(state, state_by_hand(moments, *BOUNDS), rtol=2e-5, atol=1e-3)

    def test_a_task_without_targets_keeps_its_statistics(self):
        state = state_of([0.0, 7.3], [1.0, 0.3])
        new = art(state, jnp.array([5.0]), jnp.array([0]), 0.1, *BOUNDS)
        assert [float(x[1]) for x in new] == [float(x[1]) for x in state]

    def test_no_targets_change_nothing(self):
        new = art(START, jnp.zeros(0), jnp.zeros(0, int), 0.1, *BOUNDS)
        assert_close(new, START, rtol=0, atol=0)

    def test_the_number_of_equal_targets_does_not_matter(self):
        one = state = PopArtState(jnp.zeros(1), jnp.ones(1), jnp.ones(1))
        for _ in range(3):
            one = art(one, jnp.full(1, 10.0), jnp.zeros(1, int), 0.1, *BOUNDS)
            state = art(state, jnp.full(64, 10.0), jnp.zeros(64, int), 0.1, *BOUNDS)
        assert_close(state, one)
        np.testing.assert_allclose(state.shift, 10 * (1 - 0.9**3), rtol=1e-6)

    @pytest.mark.parametrize("mean", [1e4, -1e6])
    def test_the_scale_is_right_where_the_mean_is_large(self, mean):
        state = state_of([mean], [1.0])
        for _ in range(100):
            targets = jnp.array([mean - 1, mean + 1])
            state = jitted_art(state, targets, jnp.array([0, 0]), 0.1, 1e-4, 1e6)
        np.testing.assert_allclose(state.scale, 1, rtol=1e-3)

    def test_finds_a_large_mean_and_a_small_scale_by_itself(self, rng):
        state = PopArtState(jnp.zeros(1), jnp.ones(1), jnp.ones(1))
        indices = np.zeros(100, int)
        for _ in range(200):
            targets = (1e4 + rng.normal(size=100)).astype(np.float32)
            state = jitted_art(state, targets, indices, 0.2, 1e-4, 1e6)
        np.testing.assert_allclose(state.shift, 1e4, rtol=1e-4)
        np.testing.assert_allclose(state.scale, 1, rtol=0.05)

    def test_remembers_a_variance_beyond_the_bounds(self):
        moments = [(1.0, 101.0), (0.5, 0.26)]  # variances 100 and 0.01
        state = PopArtState(
            jnp.array([1.0, 0.5]), jnp.array([2.0, 0.5]), jnp.array([101.0, 0.26])
        )
        for target in (1.0, 2.0, -1.0, 4.0):
            targets, indices = np.float32([target, target]), [0, 1]
            moments = art_by_hand(moments, targets, indices, 0.1)
            state = art(state, targets, jnp.array(indices), 0.1, 0.5, 2.0)
            assert_close(state, state_by_hand(moments, 0.5, 2.0))

    @pytest.mark.parametrize("spoilt", [np.nan, np.inf])
    def test_what_is_not_finite_spoils_its_own_task_alone(self, spoilt):
        targets, indices = jnp.array([spoilt, 5.0]), jnp.array([0, 1])
        new = art(START, targets, indices, 0.1, *BOUNDS)
        alone = art(START, targets[1:], indices[1:], 0.1, *BOUNDS)
        assert [x[1] for x in new] == [x[1] for x in alone]
        assert not any(np.isfinite(x[0]) for x in new)

    @pytest.mark.parametrize("index", [-1, 2, 7, -3])
    def test_an_index_out_of_range_makes_everything_nan(self, index):
        new = art(START, jnp.array([5.0, 1.0]), jnp.array([index, 1]), 0.1, *BOUNDS)
        assert np.isnan(new).all()

    @pytest.mark.parametrize("spoilt", [np.nan, np.inf])
    def test_targets_without_any_weight_change_nothing(self, spoilt):
        targets, indices = jnp.array([spoilt, 5.0]), jnp.array([0, 1])
        assert_close(art(START, targets, indices, 0.0, *BOUNDS), START, rtol=0)

    def test_a_step_of_one_forgets_a_spread_that_overflows(self):
        new = art(START, jnp.array([1e25]), jnp.array([0]), 1.0, *BOUNDS)
        assert np.float32(new.shift[0]) == np.float32(1e25)
        assert np.float32(new.scale[0]) == np.float32(BOUNDS[0])
        new = art(START, jnp.array([1e25]), jnp.array([0]), 0.5, 0.0, jnp.inf)
        assert np.isfinite(new).all()

    def test_recovers_from_a_target_whose_square_overflows(self):
        indices = jnp.array([0])
        state = PopArtState(jnp.zeros(1), jnp.ones(1), jnp.ones(1))
        state = art(state, jnp.array([1e20]), indices, 0.5, *BOUNDS)
        assert np.isfinite(state).all()
        assert state.scale == BOUNDS[1]
        for _ in range(150):
            state = jitted_art(state, jnp.array([3.0]), indices, 0.5, *BOUNDS)
        np.testing.assert_allclose(state.shift, 3, rtol=1e-5)
        assert state.scale < 1

    def test_masked_targets_are_left_out(self):
        targets = jnp.array([5.0, jnp.nan, jnp.inf, 3.0, 1e9])
        indices, mask = jnp.array([0, 1, 9, 1, -1]), jnp.array([1, 0, 0, 1, 0]) == 1
        expected = art(START, targets[mask], indices[mask], 0.1, *BOUNDS)
        new = art(START, targets, indices, 0.1, *BOUNDS, mask=mask)
        assert_close(new, expected, rtol=1e-6)

        def total(targets):
            settings = {"mask": mask, "stop_target_gradients": False}
            new = art(START, targets, indices, 0.1, *BOUNDS, **settings)
            return sum(x.sum() for x in new)

        gradient = jax.grad(total)(targets)
        assert np.isfinite(gradient).all()
        assert ((gradient != 0) == mask).all()

    def test_gradients_are_finite_where_the_targets_do_not_vary(self):
        def total(targets):
            indices = jnp.zeros(2, int)
            new = art(
                START, targets, indices, 1.0, 1e-4, 1e4, stop_target_gradients=False
            )
            return new.scale.sum()

        assert jax.grad(total)(jnp.array([2.0, 2.0])).tolist() == [0, 0]

    def test_devices_together_do_what_one_does_with_all_targets(self, rng):
        state = state_of([1.0, -2.0, 3.0], [0.5, 1.0, 2.0])
        targets = rng.normal(size=(2, 3)).astype(np.float32)
        indices = np.array([[0, 0, 1], [0, 1, 1]])
        mask = np.array([[True, False, True], [True, True, True]])
        expected = art(state, targets, indices, 0.1, *BOUNDS, mask=mask)

        def part(state, targets, indices, mask):
            return art(state, targets, indices, 0.1, *BOUNDS, "d", mask=mask)

        mapped = jax.vmap(part, (None, 0, 0, 0), axis_name="d")
        results = mapped(state, targets, indices, mask)
        for device in range(2):
            assert_close([x[device] for x in results], expected)
        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        split = PartitionSpec("d")
        sharded = jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(PartitionSpec(), split, split, split),
            out_specs=PartitionSpec(),
        )
        assert_close(jax.jit(sharded)(state, targets, indices, mask), expected)

    def test_an_index_out_of_range_on_one_device_shows_on_all(self):
        part = functools.partial(art, START, axis_name="d")
        settings = {"step_size": 0.1, "scale_lb": 1e-4, "scale_ub": 1e4}
        new = jax.vmap(lambda y, i: part(y, i, **settings), axis_name="d")(
            jnp.ones((2, 1)), jnp.array([[0], [2]])
        )
        assert np.isnan(new).all()

    def test_half_precision_targets_leave_a_float32_state_as_it_is(self):
        targets = jnp.array([1.5], jnp.bfloat16)
        new = art(START, targets, jnp.array([0]), 0.001, *BOUNDS)
        assert {x.dtype for x in new} == {jnp.dtype("float32")}
        np.testing.assert_allclose(new.shift[0], 0.0015, rtol=1e-6)

    def test_refuses_settings_out_of_range(self):
        with pytest.raises(ValueError, match=r"art: step_size must be in \[0, 1\]"):
            art(START, jnp.ones(1), jnp.array([0]), 1.5, *BOUNDS)

    def test_refuses_targets_and_indices_that_differ_in_shape(self):
        with pytest.raises(
            ValueError, match=r"art: indices has shape \(1,\), expected"
        ):
            art(START, jnp.ones(2), jnp.array([0]), 0.1, *BOUNDS)


class TestNormalize:
    def test_subtracts_the_shift_and_divides_by_the_scale(self):
        state = state_of([0.0, 10.0], [1.0, 2.0])
        indices = jnp.array([[0, 1], [1, 0]])
        numbers = jnp.array([[5.0, 6.0], [7.0, -1.0]])
        assert normalize(state, numbers, indices).tolist() == [[5, -2], [-1.5, -1]]
        assert unnormalize(state, numbers, indices).tolist() == [[5, 22], [24, -1]]

    def test_is_undone_by_unnormalize(self, rng):
        state = state_of([1.0, -20.0], [0.5, 3.0])
        numbers, indices = rng.normal(size=7), rng.integers(2, size=7)
        numbers = numbers.astype(np.float32)
        again = unnormalize(state, normalize(state, numbers, indices), indices)
        np.testing.assert_allclose(again, numbers, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("fn", [normalize, unnormalize])
    @pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint8])
    def test_a_task_out_of_range_is_nan(self, fn, dtype):
        indices = jnp.array([2, 1, 127], dtype)
        assert np.isnan(fn(START, jnp.ones(3), indices)).tolist() == [True, False, True]
        if jnp.issubdtype(dtype, jnp.signedinteger):
            assert np.isnan(fn(START, jnp.ones(1), jnp.array([-1], dtype))).all()

    def test_does_not_broadcast(self):
        with pytest.raises(ValueError, match=r"indices has shape \(3,\), expected"):
            normalize(START, jnp.ones((3, 1)), jnp.zeros(3, int))

    def test_takes_more_tasks_than_a_narrow_index_can_count(self):
        state = state_of(np.arange(300.0), np.ones(300))
        indices = jnp.array([127, -128], jnp.int8)
        picked = unnormalize(state, jnp.zeros(2), indices)
        assert picked[0] == 127
        assert np.isnan(picked[1])


class TestUnnormalizeLinear:
    def test_picks_the_output_of_the_task(self):
        state = state_of([0.0, 10.0], [1.0, 2.0])
        inputs = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        both = unnormalize_linear(state, inputs, jnp.array([0, 1]))
        assert both.normalized.tolist() == [1, 4]
        assert both.unnormalized.tolist() == [1, 18]

    @pytest.mark.parametrize("index", [-1, 2])
    def test_a_task_out_of_range_is_nan(self, index):
        both = unnormalize_linear(START, jnp.ones((1, 2)), jnp.array([index]))
        assert np.isnan(both).all()

    def test_the_gradient_reaches_the_output_of_the_task_alone(self):
        state = state_of([0.0, 10.0], [1.0, 2.0])
        outputs = lambda x: unnormalize_linear(state, x, jnp.array([1])).unnormalized
        gradient = jax.grad(lambda x: outputs(x).sum())(jnp.ones((1, 2)))
        assert gradient.tolist() == [[0, 2]]


OLD, NEW = (
    state_of([0.3, -2.0, 1e4], [1.5, 4.0, 1.0]),
    state_of([1, 2, 10001], [3, 1, 2]),
)


class TestPop:
    @pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)], ids=str)
    def test_keeps_the_unnormalized_outputs(self, rng, shape):
        params = {
            "w": rng.normal(size=shape).astype(np.float32),
            "b": rng.normal(size=3).astype(np.float32),
        }
        new = pop(params, OLD, NEW)
        x = rng.normal(size=shape[:-1])

        def outputs(params, state):
            w, b = (np.asarray(params[name], np.float64) for name in "wb")
            linear = (w * x[..., None]).reshape(-1, 3).sum(axis=0) + b
            shift, scale = (np.asarray(s, np.float64) for s in state[:2])
            return shift + scale * linear

        np.testing.assert_allclose(
            outputs(new, NEW), outputs(params, OLD), rtol=1e-6, atol=1e-5
        )

    def test_keeps_them_exactly_where_nothing_is_rounded(self):
        old, new = state_of([1.0], [2.0]), state_of([3.0], [4.0])
        params = pop({"w": jnp.array([[6.0]]), "b": jnp.array([5.0])}, old, new)
        assert params["w"].tolist() == [[3]]  # 2 (6 x + 5) + 1 = 4 (3 x + 2) + 3
        assert params["b"].tolist() == [2]

    def test_the_same_statistics_change_nothing(self, rng):
        params = {"w": rng.normal(size=(5, 3)), "b": rng.normal(size=3)}
        params = jax.tree.map(lambda x: x.astype(np.float32), params)
        new = pop(params, OLD, OLD)
        for name, x in params.items():
            np.testing.assert_allclose(new[name], x, rtol=1e-6)

    def test_leaves_other_entries_alone(self):
        params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "name": "values"}
        assert pop(params, OLD, NEW)["name"] == "values"
        assert pop(params, OLD, NEW).keys() == params.keys()

    def test_keeps_the_dtype_of_the_parameters(self):
        params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.float16)}
        new = pop(params, OLD, NEW)
        assert {name: x.dtype for name, x in new.items()} == {
            name: x.dtype for name, x in params.items()
        }

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"w": jnp.ones((2, 3))}, r'params must have "w" and "b", got \[\'w\'\]'),
            (
                {"w": jnp.ones((2, 1)), "b": jnp.ones(3)},
                r"b has shape \(3,\), expected",
            ),
            (
                {"w": jnp.ones((2, 3)), "b": jnp.ones(1)},
                r"b has shape \(1,\), expected",
            ),
            ({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, r"old.shift has shape \(3,\)"),
        ],
    )
    def test_refuses_what_does_not_match(self, params, message):
        with pytest.raises(ValueError, match="^pop: " + message) as error:
            pop(params, OLD, NEW)
        assert "vmap" not in str(error.value)

    def test_refuses_what_is_no_mapping(self):
        with pytest.raises(TypeError, match="pop: params must be a mapping"):
            pop([jnp.ones((2, 3)), jnp.ones(3)], OLD, NEW)


class TestPopart:
    def test_starts_at_mean_0_and_variance_1(self):
        assert [x.tolist() for x in popart(2, 0.1, *BOUNDS)[0]()] == [
            [0, 0],
            [1, 1],
            [1, 1],
        ]

    def test_adapts_the_statistics_and_keeps_the_outputs(self, rng):
        init, update = popart(3, 0.1, *BOUNDS)
        params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
        targets, indices = jnp.array([5.0, 6.0, 9.0]), jnp.array([0, 1, 1])
        new_params, state = update(params, init(), targets, indices)
        expected = art(init(), targets, indices, 0.1, *BOUNDS)
        assert_close(state, expected, rtol=0, atol=0)
        x = rng.normal(size=2)
        outputs = lambda params: x @ np.asarray(params["w"]) + np.asarray(params["b"])
        before, after = outputs(params), outputs(new_params)
        after = np.asarray(state.shift) + np.asarray(state.scale) * after
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)

    def test_learns_values_on_very_different_scales(self, rng):
        """A constant network cannot: its outputs are what the statistics make them."""
        init, update = popart(2, 0.05, *BOUNDS)
        params, state = {"w": jnp.zeros((1, 2)), "b": jnp.zeros(2)}, init()
        update = jax.jit(update)
        for _ in range(300):
            indices = rng.integers(2, size=32)
            targets = np.where(indices == 0, 1e-2, 1e3) * rng.normal(3, 1, size=32)
            params, state = update(params, state, targets.astype(np.float32), indices)
        np.testing.assert_allclose(state.shift, [3e-2, 3e3], rtol=0.1)
        np.testing.assert_allclose(state.scale, [1e-2, 1e3], rtol=0.1)
        unnormalized = state.shift + state.scale * params["b"]
        np.testing.assert_allclose(unnormalized, 0, atol=2e-2)

    def test_takes_a_mask(self):
        init, update = popart(1, 0.1, *BOUNDS)
        params = {"w": jnp.zeros((1, 1)), "b": jnp.zeros(1)}
        targets, indices = jnp.array([5.0, jnp.nan]), jnp.array([0, 4])
        mask = jnp.array([True, False])
        _, state = update(params, init(), targets, indices, mask=mask)
        assert_close(state, art(init(), targets[:1], indices[:1], 0.1, *BOUNDS))

    def test_settings_may_be_traced(self):
        def shift(step_size):
            init, update = popart(1, step_size, *BOUNDS)
            params = {"w": jnp.zeros((1, 1)), "b": jnp.zeros(1)}
            return update(params, init(), jnp.ones(1), jnp.array([0]))[1].shift[0]

        assert jax.vmap(shift)(jnp.array([0.25, 0.5])).tolist() == [0.25, 0.5]

    @pytest.mark.parametrize("number", [1.0, True, 0, -1])
    def test_refuses_a_number_of_tasks_that_is_none(self, number):
        with pytest.raises(
            (TypeError, ValueError), match="num_outputs must be a Python"
        ):
            popart(number, 0.1, *BOUNDS)

    def test_refuses_settings_out_of_range(self):
        with pytest.raises(ValueError, match=r"popart: step_size must be in \[0, 1\]"):
            popart(1, 1.5, *BOUNDS)

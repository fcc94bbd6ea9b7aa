"""Updates now and then, against the choice made in Python."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import conditional_update, periodic_update

NEW = {"w": jnp.array([1.0, 2.0]), "n": (jnp.int32(3), None)}
OLD = {"w": jnp.array([-1.0, -2.0]), "n": (jnp.int32(-3), None)}
BOTH = [conditional_update, periodic_update]


def same(tree, expected):
    equal = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and (x == y).all(), tree, expected
    )
    return all(jax.tree.leaves(equal))


class TestConditionalUpdate:
    @pytest.mark.parametrize("is_time", [True, False])
    @pytest.mark.parametrize("kind", [bool, np.bool_, jnp.bool_])
    def test_takes_the_new_if_it_is_time(self, kind, is_time):
        expected = NEW if is_time else OLD
        assert same(conditional_update(NEW, OLD, kind(is_time)), expected)
        assert same(jax.jit(conditional_update)(NEW, OLD, kind(is_time)), expected)

    def test_a_population_has_flags_of_its_own(self):
        updated = conditional_update(
            jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.array([True, False])
        )
        assert updated.tolist() == [[1, 1, 1], [0, 0, 0]]

    def test_what_is_not_taken_does_not_leak(self):
        total = lambda new, old, is_time: jnp.sum(
            conditional_update(new, old, is_time) ** 2
        )
        slopes = jax.value_and_grad(total, (0, 1))
        good, bad = jnp.array([2.0, 3.0]), jnp.array([jnp.nan, jnp.inf])
        value, (new, old) = slopes(bad, good, False)
        assert (value, new.tolist(), old.tolist()) == (13, [0, 0], [4, 6])
        value, (new, old) = slopes(good, bad, True)
        assert (value, new.tolist(), old.tolist()) == (13, [4, 6], [0, 0])

    @pytest.mark.parametrize("is_time", [1, jnp.int32(0), 0.0])
    def test_a_flag_that_is_not_boolean_is_refused(self, is_time):
        message = "^conditional_update: is_time must be boolean, got .* is_time != 0.$"
        with pytest.raises(TypeError, match=message):
            conditional_update(NEW, OLD, is_time)

    def test_a_flag_that_does_not_fit_is_named(self):
        message = (
            r"^conditional_update: is_time has shape \(3,\), expected leading axes"
        )
        with pytest.raises(ValueError, match=message):
            conditional_update(jnp.ones(2), jnp.ones(2), jnp.ones(3, bool))


class TestPeriodicUpdate:
    @pytest.mark.parametrize("period", [1, 2, 3, 100])
    def test_it_is_time_at_each_multiple(self, period):
        steps = [-4, -3, 0, 1, 2, 3, 4, 5, 6, 99, 100, 101, 2**31 - 1]
        taken = [step for step in steps if step / period == step // period]
        traced = jax.jit(lambda step, period: periodic_update(1.0, 0.0, step, period))
        assert [s for s in steps if periodic_update(True, False, s, period)] == taken
        assert [s for s in steps if traced(s, period) == 1] == taken

    @pytest.mark.parametrize("steps", ["int8", "uint8", "int32", "uint32"])
    @pytest.mark.parametrize("period", ["int8", "uint8", "int32", "uint32"])
    def test_integers_of_any_dtype_go_together(self, steps, period):
        for step in range(7):
            updated = periodic_update(
                1.0, 0.0, jnp.array(step, steps), jnp.array(3, period)
            )
            assert updated == int(step % 3 == 0)

    def test_counts_beyond_what_a_signed_integer_holds(self):
        late, period = jnp.uint32(3_000_000_000), 1_000_000_000
        assert periodic_update(1.0, 0.0, late, period) == 1
        assert periodic_update(1.0, 0.0, late + 1, period) == 0
        assert periodic_update(1.0, 0.0, jnp.uint8(200), 300) == 0
        with jax.enable_x64(True):
            later = jnp.int64(10**12)
            assert periodic_update(1.0, 0.0, later, 10**9) == 1
            assert periodic_update(1.0, 0.0, later + 1, 10**9) == 0

    def test_a_population_has_steps_and_periods_of_its_own(self):
        new, old, steps = jnp.ones((3, 2)), jnp.zeros((3, 2)), jnp.array([4, 5, 6])
        updated = periodic_update({"a": new}, {"a": old}, steps, 2)["a"]
        assert updated[:, 0].tolist() == [1, 0, 1]
        updated = periodic_update(new, old, steps, jnp.array([3, 5, 4]))
        assert updated[:, 1].tolist() == [0, 1, 0]
        mapped = jax.vmap(periodic_update, (0, 0, 0, None))(new, old, steps, 2)
        assert mapped[:, 1].tolist() == [1, 0, 1]

    @pytest.mark.parametrize("period", [0, -1, -3, np.int32(0), 2**31])
    def test_a_period_out_of_range_is_refused(self, period):
        message = rf"update_period must be in \[1, 2147483647\], got {period}\."
        with pytest.raises(ValueError, match=message):
            periodic_update(NEW, OLD, 3, period)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda steps: periodic_update(NEW, OLD, steps, period))(3)

    @pytest.mark.parametrize(
        "steps", [2**31, -(2**40), 2**70, np.int64(2**40), np.array([2**40])]
    )
    def test_what_does_not_fit_into_an_integer_is_refused(self, steps):
        """It is not cut down to its lower bits."""
        message = f"periodic_update: steps must fit into int32, got {steps}."
        with (
            jax.enable_x64(False),
            pytest.raises(ValueError, match=f"^{re.escape(message)}$"),
        ):
            periodic_update(jnp.ones(1), jnp.zeros(1), steps, 3)
        with jax.enable_x64(True):
            assert periodic_update(1.0, 0.0, 2**40 + 2, 3) == 1  # as 4**20 leaves 1

    def test_a_period_that_does_not_fit_into_an_integer_is_refused(self):
        with (
            jax.enable_x64(False),
            pytest.raises(ValueError, match="update_period must fit into int32"),
        ):
            periodic_update(1.0, 0.0, 3, np.array(2**33))
        assert periodic_update(1.0, 0.0, np.uint32(3_000_000_000), 10**9) == 1

    @pytest.mark.parametrize("period", [0, -1, -3])
    @pytest.mark.parametrize("steps", [0, 3, 4])
    def test_an_array_out_of_range_is_nan_and_updates_nothing(self, steps, period):
        for call in (periodic_update, jax.jit(periodic_update)):
            updated = call(NEW, OLD, steps, jnp.array(period))
            assert jnp.isnan(updated["w"]).all()
            assert updated["n"][0] == -3

    def test_only_the_periods_out_of_range_make_nan(self):
        new, old = jnp.ones((2, 2)), jnp.zeros((2, 2))
        updated = periodic_update(new, old, jnp.array([3, 3]), jnp.array([0, 3]))
        np.testing.assert_array_equal(updated, [[np.nan] * 2, [1] * 2])

    @pytest.mark.parametrize(
        ("steps", "period", "message"),
        [
            (3.0, 3, "steps must be an integer, got float32"),
            (np.ones((), np.float32), 3, "steps must be an integer, got float32"),
            (3, 1.5, "update_period must be an integer, got float32"),
            (True, 3, "steps must be an integer, got bool"),
            (3, True, "update_period must be an integer, got bool"),
            ([3, 4], "3", "update_period must be an array, got str"),
        ],
    )
    def test_what_is_no_integer_is_refused(self, steps, period, message):
        with (
            jax.enable_x64(False),
            pytest.raises(TypeError, match=f"^periodic_update: {message}"),
        ):
            periodic_update(NEW, OLD, steps, period)

    def test_shapes_that_do_not_fit_are_named(self):
        message = (
            r"^periodic_update: update_period has shape \(2,\), expected that of st"
        )
        with pytest.raises(ValueError, match=message):
            periodic_update(NEW, OLD, 3, jnp.array([1, 2]))
        message = r"^periodic_update: steps has shape \(3,\), expected leading axes of"
        with pytest.raises(ValueError, match=message):
            periodic_update(jnp.ones(2), jnp.ones(2), jnp.array([1, 2, 3]), 2)

    def test_gradients_flow_to_what_is_taken(self):
        slopes = jax.grad(
            lambda new, old, step: periodic_update(new, old, step, 2), (0, 1)
        )
        assert slopes(1.0, jnp.nan, 4) == (1, 0)
        assert slopes(jnp.nan, 1.0, 5) == (0, 1)


REST = {conditional_update: (True,), periodic_update: (4, 2)}  # it is time


class TestBoth:
    @pytest.mark.parametrize("update", BOTH)
    @pytest.mark.parametrize(
        ("new", "old", "message"),
        [
            (
                {"a": 1.0},
                {"b": 1.0},
                "old_tensors has structure .*, that of new_tensors",
            ),
            ({"a": 1.0}, {"a": None}, "old_tensors has structure"),
            (
                [jnp.ones(3)],
                [jnp.ones(1)],
                r"old_tensors\[0\] has shape \(1,\), expected",
            ),
            (
                [jnp.ones(1)],
                [jnp.ones(3)],
                r"old_tensors\[0\] has shape \(3,\), expected",
            ),
        ],
    )
    def test_trees_that_differ_are_named(self, update, new, old, message):
        with pytest.raises(ValueError, match=f"^{update.__name__}: {message}"):
            update(new, old, *REST[update])

    @pytest.mark.parametrize("update", BOTH)
    def test_dtypes_that_differ_are_refused_and_not_promoted(self, update):
        for new, old in (
            (jnp.bfloat16(1), jnp.float32(1)),
            (jnp.int32(1), jnp.float32(1)),
        ):
            message = (
                rf"^{update.__name__}: old_tensors\['a'\] has dtype float32, expected"
            )
            with pytest.raises(TypeError, match=message):
                update({"a": new}, {"a": old}, *REST[update])

    @pytest.mark.parametrize("update", BOTH)
    def test_empty_trees_stay_empty(self, update):
        assert update({"a": None}, {"a": None}, *REST[update]) == {"a": None}

    @pytest.mark.parametrize("update", BOTH)
    @pytest.mark.parametrize(
        "dtype", ["bfloat16", "float16", "float32", "int8", "bool"]
    )
    def test_dtypes_stay(self, update, dtype):
        new, old = jnp.ones(2, dtype), jnp.zeros(2, dtype)
        assert update(new, old, *REST[update]).dtype == dtype

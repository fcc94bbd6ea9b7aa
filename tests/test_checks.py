"""What `checked` does, shown on small functions of no other use."""

import functools
import inspect
import math
import re
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rlprims._checks import Arg, Flag, bounded, checked
from rlprims._contracts import Contract

COMPILED = []  # one entry for each program compiled, by whomever


def listen(event: str, duration_secs: float, **details: str | int):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(details)


jax.monitoring.register_event_duration_secs_listener(listen)


@checked
def scale(
    x: Annotated[Arg, "f[A]"], factor: Annotated[Arg, "f[]"] = 2.0
) -> Annotated[Array, "f[A]"]:
    """Multiplies."""
    return x * factor


@checked
def pick(
    x: Annotated[Arg, "f[A]"], index: Annotated[Arg, "i[]"]
) -> Annotated[Array, "f[]"]:
    return x[index]


@checked
def keep(
    x: Annotated[Arg, "f[T]"], mask: Annotated[Arg | None, "b[T]"] = None
) -> Annotated[Array, "f[T]"]:
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


@checked
def negate(x: Annotated[Arg, "f[]"], flag: Flag = True) -> Annotated[Array, "f[]"]:
    if isinstance(flag, bool):  # decided while tracing
        return -x if flag else x
    return jnp.where(flag, -x, x)


@checked
def add(
    x: Annotated[Arg, "f[]"], n: Annotated[int | Array, "i[]"]
) -> Annotated[Array, "f[]"]:
    return x + (n if isinstance(n, int) else n.astype(x.dtype))


@checked
def repeat(x: Annotated[Arg, "f[]"], times: int) -> Annotated[Array, "f[N]"]:
    return jnp.full(times, x)


@checked
def draw(
    key: Annotated[Arg, "k[]"], x: Annotated[Arg, "f[]"]
) -> Annotated[Array, "f[]"]:
    return x * jax.random.uniform(key, dtype=x.dtype)


@checked
def mix(
    x: Annotated[Arg, "f[]"],
    *,
    y: Annotated[Arg, "f[]"] = 0.0,
    weight: Annotated[Arg, "f[]"] = 0.5,
) -> Annotated[Array, "f[]"]:
    return x + weight * (y - x)


@checked
def stretch(
    x: Annotated[Arg, "f[...]"], by: Annotated[Arg, "f[]"]
) -> Annotated[Array, "f[...]"]:
    return x * by


@checked
def soften(
    x: Annotated[Arg, "f[A]"], temperature: Annotated[Arg, "f[]", "(0, inf)"] = 1.0
) -> Annotated[Array, "f[A]"]:
    return x / temperature


@checked
def ahead(
    x: Annotated[Arg, "f[]"], n: Annotated[int | Array, "i[]", "[1, 3)"]
) -> Annotated[Array, "f[]"]:
    return x


def takes(x_contract, y_contract="f[]"):
    """A function with these contracts that does nothing."""

    def fn(x: Any, y: Any = 0.0):
        return ()

    fn.__annotations__ = {
        "x": Annotated[Arg, x_contract],
        "y": Annotated[Arg, y_contract],
    }
    return checked(fn)


def f32(*shape):
    return np.ones(shape, np.float32)


def message(error, fn, *args, **kwargs):
    """What a call is refused with."""
    with pytest.raises(error) as caught:
        fn(*args, **kwargs)
    assert type(caught.value) is error
    return str(caught.value)


# Notation


@pytest.mark.parametrize(
    ("contract", "fitting", "others"),
    [
        ("f[]", [()], [(1,), (1, 1)]),
        ("f[A]", [(3,), (1,), (0,)], [(), (1, 3), (3, 1)]),
        ("f[A,B]", [(2, 3), (2, 2), (0, 1)], [(2,), (2, 3, 1)]),
        ("f[A,A]", [(2, 2)], [(2, 3), (1, 2)]),
        ("f[2]", [(2,)], [(), (1,), (3,), (1, 2)]),
        ("f[T,2]", [(4, 2)], [(2, 4), (4, 1), (4,)]),
        ("f[T+1]", [(3,), (1,)], [(0,), ()]),
        ("f[T+1,T]", [(3, 2), (1, 0)], [(2, 3), (3, 3)]),
        ("f[T-1,T]", [(2, 3), (0, 1)], [(3, 3), (1, 1), (0, 0)]),
        ("f[T,T+2]", [(1, 3)], [(1, 2), (1, 1)]),
        ("f[]|f[T]", [(), (3,)], [(1, 3)]),
        ("f[T]|f[T,A]", [(3,), (3, 2)], [(), (3, 2, 1)]),
        ("f[...]", [(), (3,), (1, 2, 3)], []),
        ("f[...,A]", [(3,), (2, 3), (1, 2, 3)], [()]),
        ("f[...,2,A]", [(2, 1), (5, 2, 3)], [(2,), (3, 2)]),
        ("f[N,...]", [(3,), (3, 2), (1, 2, 3)], [()]),
        ("f[2,...,A]", [(2, 1), (2, 5, 3)], [(2,), (3, 2), (1, 2)]),
    ],
)
def test_a_contract_says_which_shapes_fit(contract, fitting, others):
    fn = takes(contract)
    for shape in fitting:
        fn(f32(*shape))
    for shape in others:
        assert f"expected {contract}" in message(ValueError, fn, f32(*shape))


@pytest.mark.parametrize(
    ("contracts", "fitting", "others"),
    [
        (("f[A]", "f[A]"), [((2,), (2,))], [((2,), (3,)), ((2,), (1,)), ((1,), (2,))]),
        (("f[T]", "f[T+1]"), [((2,), (3,))], [((2,), (2,)), ((2,), (1,))]),
        (("f[T+1]", "f[T]"), [((3,), (2,))], [((2,), (2,)), ((2,), (3,))]),
        (("f[T-1]", "f[T]"), [((2,), (3,)), ((0,), (1,))], [((0,), (0,))]),
        (("f[T,A]", "i[T]"), [((2, 3), (2,))], [((2, 3), (3,)), ((2, 3), (1,))]),
        (("f[T]", "f[]|f[T]"), [((2,), ()), ((2,), (2,))], [((2,), (1,))]),
        (("f[]|f[T]", "f[T]"), [((), (2,)), ((2,), (2,))], [((1,), (2,))]),
        (("f[...,A]", "i[...]"), [((3,), ()), ((2, 3), (2,))], [((2, 3), (3,))]),
        (("f[...]", "f[...]"), [((), ()), ((2, 3), (2, 3))], [((2, 3), (3,))]),
        (("f[N,...]", "f[...]"), [((4,), ()), ((4, 2), (2,))], [((2, 4), (2,))]),
        (("f[...]", "f[]"), [((2,), ())], [((2,), (2,))]),
    ],
)
def test_a_letter_means_one_size_in_a_call(contracts, fitting, others):
    fn = takes(*contracts)
    dtype = np.int32 if contracts[1].startswith("i") else np.float32
    for x, y in fitting:
        fn(f32(*x), np.ones(y, dtype))
    for x, y in others:
        assert "fn: y has shape" in message(ValueError, fn, f32(*x), np.ones(y, dtype))


@pytest.mark.parametrize(
    "text",
    [
        *("", "f", "f[A", "fA]", "f(A)", "g[A]", "F[A]", "f32[A]", "f[A B]", "f[A+]"),
        *("f[T+A]", "f[+1]", "f[]|", "|f[]", "f[]||f[A]", "f[]|i[]", "f[A]|x[B]"),
        *(
            "f[,]",
            "f[A,]",
            "f[,A]",
            "f[A,,B]",
            "f[...,...]",
            "f[...,A,...]",
            "f[A...]",
            "f[...A]",
        ),
    ],
)
def test_a_mistake_in_a_contract_shows_at_the_first_call(text):
    assert repr(text) in message(ValueError, takes(text), f32(2))


def test_keeps_name_docstring_and_signature():
    assert (scale.__name__, scale.__doc__) == ("scale", "Multiplies.")
    assert list(inspect.signature(scale).parameters) == ["x", "factor"]


# Kinds of argument


def test_a_flag_is_a_python_bool_or_a_traced_one():
    assert negate(2.0) == negate(2.0, True) == -2
    assert negate(2.0, False) == negate(2.0, flag=False) == 2
    numpy_false: Any = np.bool_(False)
    assert negate(2.0, numpy_false) == negate(2.0, jnp.array(False)) == 2
    assert jax.jit(negate)(2.0, True) == -2
    assert jax.vmap(negate)(f32(2), jnp.array([True, False])).tolist() == [-1, 1]


def test_a_python_flag_or_int_is_fixed_where_the_contract_says_so():
    fixed = []

    @checked
    def fn(flag: Flag, n: Annotated[int | Array, "i[]"]) -> None:
        fixed.append((isinstance(flag, bool), isinstance(n, int)))

    fn(True, 2)
    fn(jnp.array(True), 2)
    fn(True, jnp.int32(2))
    jax.jit(fn)(False, 3)
    assert fixed == [(True, True), (False, True), (True, False), (False, False)]


def test_a_plain_int_is_fixed():
    assert repeat(2.0, 3).tolist() == repeat(2.0, times=3).tolist() == [2, 2, 2]


def test_an_optional_array_may_be_left_out():
    x, mask = f32(2), np.array([True, False])
    assert keep(x).tolist() == keep(x, None).tolist() == [1, 1]
    assert keep(x, mask).tolist() == keep(x, mask=mask).tolist() == [1, 0]


def test_keyword_only_arguments_are_checked_too():
    assert mix(2.0, y=4.0, weight=0.5) == 3
    assert mix(2.0, weight=0.5) == 1
    assert message(ValueError, mix, 2.0, weight=f32(1, 1)) == (
        "mix: weight has shape (1, 1), expected f[]."
    )


def test_takes_random_keys_of_both_styles():
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    assert draw(old, 1.0) == draw(new, 1.0) == jax.random.uniform(new)
    keys = jax.random.split(old, 4), jax.random.split(new, 4)
    vmapped = jax.vmap(draw, in_axes=(0, None))
    assert vmapped(keys[0], 1.0).tolist() == vmapped(keys[1], 1.0).tolist()


class Moments(NamedTuple):
    mean: Annotated[Arg, "f[A]"]
    scale: Annotated[Arg, "f[]", "(0, inf)"] = 1.0
    exact: Flag = True


@checked
def center(
    x: Annotated[Arg, "f[A]"], state: Moments, other: Moments | None = None
) -> Annotated[Array, "f[A]"]:
    if other is not None:
        state = state._replace(mean=state.mean + other.mean)
    return (x - state.mean) / state.scale


class TestNamedTuples:
    """The fields of a named tuple are arguments like any other."""

    def test_are_checked_cast_and_put_together_again(self):
        state = Moments(np.array([1.0, 2.0], jnp.bfloat16), 2)
        result = center(jnp.bfloat16([3, 6]), state)
        assert (result.tolist(), result.dtype) == ([1, 2], jnp.bfloat16)
        assert center(f32(2), state=Moments(f32(2), 0.5)).tolist() == [0, 0]
        assert center(f32(2), Moments(f32(2)), Moments(f32(2))).tolist() == [-1, -1]

    def test_may_be_mapped_and_differentiated(self):
        batch = Moments(f32(3, 2), f32(3), np.ones(3, bool))
        assert jax.vmap(center)(2 * f32(3, 2), batch).tolist() == [[1, 1]] * 3
        by_state = jax.grad(lambda state: center(f32(2), state).sum(), allow_int=True)
        assert by_state(Moments(f32(2))).mean.tolist() == [-1, -1]

    def test_fields_are_named_in_errors(self):
        wrong = [
            (Moments(f32(3)), "state.mean has shape (3,), expected f[A] with A = 2."),
            (Moments(f32(2), -1), "state.scale must be in (0, inf), got -1."),
        ]
        for state, expected in wrong:
            text = message(ValueError, center, f32(2), state)
            assert text == f"center: {expected}"
        text = message(TypeError, center, f32(2), Moments(np.ones(2, np.int32)))
        assert text.startswith("center: state.mean must be floating-point, got int32; ")

    @pytest.mark.parametrize("state", [None, (f32(2), 1.0), f32(2)])
    def test_another_type_is_refused(self, state):
        kind = type(state).__name__
        text = message(TypeError, center, f32(2), state)
        assert text == f"center: state must be of type Moments, got {kind}."

    def test_a_batch_of_them_is_refused_with_the_call_to_make(self):
        state = Moments(f32(4, 2), f32(4), np.ones(4, bool))
        call = "use jax.vmap(center)(x, state)."
        assert call in message(ValueError, center, f32(4, 2), state)
        shared = "use jax.vmap(center, in_axes=(0, None))(x, state)."
        assert shared in message(ValueError, center, f32(4, 2), Moments(f32(2)))
        some = message(ValueError, center, f32(4, 2), Moments(f32(4, 2)))
        assert "jax.vmap" not in some


class Tally(NamedTuple):
    """A total, `f[]`, and the last of what it is of, `f[A]`."""

    total: Annotated[Arg, "f[]", "running"]
    last: Annotated[Arg, "f[A]"]


class Sum(NamedTuple):
    """A total, `f[]`."""

    total: Annotated[Arg, "f[]", "running"]


@checked
def doubled(state: Sum) -> Sum:
    """Adds a total to itself."""
    return Sum(state.total + state.total)


@checked
def tally(
    x: Annotated[Arg, "f[A]"], state: Tally
) -> tuple[Annotated[Array, "f[A]"], Tally]:
    """Adds to a running total."""
    return x - state.last, Tally(state.total + jnp.sum(x), x)


@checked
def begun(x: Annotated[Arg, "f[A]"]) -> Tally:
    """Starts a running total."""
    return Tally(jnp.sum(x), x)


class TestRunningStatistics:
    """They stay wide beside narrow data, and leave it narrow."""

    def test_are_of_32_bits_where_a_state_is_made(self):
        state = begun(jnp.full(2, 65504, jnp.float16))
        assert (state.total, state.total.dtype) == (131008, np.float32)
        assert state.last.dtype == np.float16

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("total", [2048.0, np.float32(2048), jnp.bfloat16(2048)])
    def test_are_of_32_bits_and_leave_the_others_alone(self, dtype, total):
        one = jnp.ones(1, dtype)
        change, state = tally(one, Tally(total, one))
        assert [x.dtype for x in (change, state.last)] == [dtype] * 2
        assert state.total.dtype == np.float32
        assert state.total == 2049

    def test_are_of_32_bits_where_there_is_nothing_else(self):
        """Twice the largest number of half precision is infinite there."""
        total = doubled(Sum(jnp.float16(65504))).total
        assert (total, total.dtype) == (131008, np.float32)
        with jax.enable_x64(True):
            assert doubled(Sum(np.float32(1))).total.dtype == np.float32
            assert doubled(Sum(np.float64(1))).total.dtype == np.float64

    def test_are_promoted_if_wider(self):
        with jax.enable_x64(True):
            one, total = np.ones(1, np.float32), np.float64(1)
            assert {
                x.dtype for x in jax.tree.leaves(tally(one, Tally(total, one)))
            } == {np.dtype("float64")}
            change, state = tally(one, Tally(1.0, one))
            assert {x.dtype for x in (change, *state)} == {np.dtype("float32")}


# Refusals, in full
# Refusals, in full

FLOAT = "must be floating-point, got"
AS_FLOAT = "convert it with jnp.asarray(x, jnp.float32)."


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ((scale, np.ones(2, np.int32)), f"scale: x {FLOAT} int32; {AS_FLOAT}"),
        ((scale, np.ones(2, bool)), f"scale: x {FLOAT} bool; {AS_FLOAT}"),
        ((scale, np.ones(2, np.complex64)), f"scale: x {FLOAT} complex64; {AS_FLOAT}"),
        ((negate, True), f"negate: x {FLOAT} bool; {AS_FLOAT}"),
        ((negate, np.complex64(1)), f"negate: x {FLOAT} complex64; {AS_FLOAT}"),
        (
            (pick, f32(2), np.float32(1)),
            "pick: index must be an integer, got float32; "
            "convert it with jnp.asarray(index, jnp.int32).",
        ),
        (
            (add, 1.0, True),
            "add: n must be an integer, got bool; "
            "convert it with jnp.asarray(n, jnp.int32).",
        ),
        (
            (keep, f32(2), np.ones(2, np.int32)),
            "keep: mask must be boolean, got int32; compare it, as in mask != 0.",
        ),
        (
            (negate, 1.0, np.int32(1)),
            "negate: flag must be boolean, got int32; compare it, as in flag != 0.",
        ),
        (
            (draw, np.int32(3), 1.0),
            "draw: key must be a random key, got int32; "
            "make one with jax.random.key(seed).",
        ),
        (
            (draw, np.uint32(3), 1.0),
            "draw: key must be a random key, got uint32; "
            "make one with jax.random.key(seed).",
        ),
        (
            (scale, [1.0, 2.0]),
            "scale: x must be an array or a number, got list; "
            "convert it with jnp.asarray(x).",
        ),
        (
            (scale, "ab"),
            "scale: x must be an array or a number, got str; "
            "convert it with jnp.asarray(x).",
        ),
        ((scale, None), "scale: x must be an array, got None."),
        ((scale, f32(2), None), "scale: factor must be an array, got None."),
        ((negate, 1.0, None), "negate: flag must be an array, got None."),
        ((scale,), "scale: missing a required argument: 'x'."),
        ((scale, f32(2), 1.0, 2.0), "scale: too many positional arguments."),
        ((mix, 1.0, 2.0), "mix: too many positional arguments."),
    ],
)
def test_a_wrong_argument_is_named(call, expected):
    assert message(TypeError, *call) == expected
    with jax.disable_jit():
        assert message(TypeError, *call) == expected


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None, 1.0])])
def test_an_array_of_no_numbers_is_named(array):
    assert message(TypeError, scale, array).startswith("scale: x must be ")


def test_a_number_too_long_for_an_integer_is_named():
    for value in (2**70, -(2**70)):
        text = message(ValueError, pick, f32(2), value)
        assert re.fullmatch(
            rf"pick: index must fit into int(32|64), got {value}\.", text
        )
    assert negate(2**70) == -(2.0**70)


def test_names_that_do_not_bind_are_refused():
    assert message(TypeError, scale, f32(2), by=1.0) == (
        "scale: got an unexpected keyword argument 'by'."
    )
    assert message(TypeError, scale, f32(2), x=f32(2)) == (
        "scale: multiple values for argument 'x'."
    )


@pytest.mark.parametrize("times", [3.0, True, np.int32(3), jnp.int32(3), [3], None])
def test_what_must_be_a_python_int_is_refused_by_name(times):
    """Whatever was accepted before: 3.0 equals 3, and True equals 1."""
    assert len(repeat(1.0, 3)) == 3
    assert len(repeat(1.0, 1)) == 1
    assert message(TypeError, repeat, 1.0, times).startswith(
        "repeat: times must be a Python int, fixed while tracing, got "
    )


def test_a_choice_must_be_one_of_those_listed():
    @checked
    def total(x: Annotated[Arg, "f[T]"], how: Literal["sum", "mean"] = "sum") -> Any:
        return x.sum() if how == "sum" else x.mean()

    assert (total(f32(2)), total(f32(2), "mean"), total(f32(2), how="sum")) == (2, 1, 2)
    for wrong in ("max", None, 0, f32(2)):
        text = message(ValueError, total, f32(2), wrong)
        assert text == f"total: how must be one of 'sum', 'mean', got {wrong!r}."


def test_an_array_is_refused_where_any_python_value_must_be():
    @checked
    def apply(fn: Any, x: Annotated[Arg, "f[]"]) -> Any:
        return fn(x)

    assert apply(abs, -1.0) == 1
    for array in (f32(1), np.ones(1)):
        text = message(TypeError, apply, array, -1.0)
        assert text == "apply: fn must be fixed while tracing, got an array."


def test_a_traced_value_is_refused_where_a_python_int_must_be():
    assert "repeat: times must be a Python int" in (
        message(TypeError, jax.jit(repeat), 1.0, 3)
    )


def test_equal_values_of_different_types_are_told_apart():
    assert add(1.0, 1) == 2
    assert message(TypeError, add, 1.0, True).startswith("add: n must be an integer")


def test_a_wrong_shape_says_what_was_expected():
    assert message(ValueError, scale, 1.0) == "scale: x has shape (), expected f[A]."
    assert message(ValueError, takes("f[A]", "f[A]"), f32(3), f32(4)) == (
        "fn: y has shape (4,), expected f[A] with A = 3."
    )
    assert message(ValueError, takes("f[T,A]", "f[]|f[T+1]"), f32(2, 3), f32(2)) == (
        "fn: y has shape (2,), expected f[]|f[T+1] with T = 2."
    )
    assert message(ValueError, takes("f[...,A]", "f[...]"), f32(2, 3), f32(3)) == (
        "fn: y has shape (3,), expected f[...] with ... = (2,)."
    )


# Intervals


@pytest.mark.parametrize("value", [0, 0.0, -1.0, np.float32(0), math.inf, math.nan])
def test_a_number_outside_its_interval_is_refused(value):
    expected = f"soften: temperature must be in (0, inf), got {value}."
    assert message(ValueError, soften, f32(2), value) == expected
    assert message(ValueError, soften, f32(2), temperature=value) == expected


def test_an_interval_may_hold_its_ends_or_not():
    assert ahead(2.0, 1) == ahead(2.0, 2) == 2
    for n in (0, 3):
        assert message(ValueError, ahead, 2.0, n) == (
            f"ahead: n must be in [1, 3), got {n}."
        )


def test_an_array_outside_its_interval_becomes_nan():
    for call in (soften, jax.jit(soften)):
        assert call(f32(2), jnp.float32(0.5)).tolist() == [2, 2]
        for value in (0.0, -1.0, jnp.inf, jnp.nan):
            assert jnp.isnan(call(f32(2), jnp.float32(value))).all()


def test_an_interval_leaves_the_gradient_alone():
    slope = jax.grad(lambda temperature: soften(f32(2), temperature).sum())
    assert slope(0.5) == -8


@pytest.mark.parametrize(
    "text", ["0, 1", "[0, 1", "0, 1]", "{0, 1}", "[0; 1]", "[0]", "[0, 1, 2]", "[a, 1]"]
)
def test_a_mistake_in_an_interval_shows_when_it_is_read(text):
    with pytest.raises(ValueError, match=r"interval|float"):
        Contract.parse("f[]", text)


def test_what_builds_a_function_may_refuse_numbers_too():
    @bounded
    def build(temperature: Annotated[Arg, "f[]", "(0, inf)"] = 1.0) -> Any:
        return temperature

    assert (build(), build(2.0), build("as it was")) == (1.0, 2.0, "as it was")
    assert message(ValueError, build, temperature=0) == (
        "build: temperature must be in (0, inf), got 0."
    )
    assert message(TypeError, build, 1, 2) == "build: too many positional arguments."


# Batches

TIME_FIRST = " If time comes first, as in [T, B], map axis 1: in_axes=1, out_axes=1."


@pytest.mark.parametrize(
    ("fn", "given", "call"),
    [
        (pick, {"x": f32(2, 3), "index": np.ones(2, int)}, "jax.vmap(pick)(x, index)"),
        (
            pick,
            {"x": f32(2, 3), "index": 1},
            "jax.vmap(pick, in_axes=(0, None))(x, index)",
        ),
        (
            scale,
            {"x": f32(3), "factor": f32(2)},
            "jax.vmap(scale, in_axes=(None, 0))(x, factor)",
        ),
        (
            repeat,
            {"x": f32(2), "times": 3},
            "jax.vmap(repeat, in_axes=(0, None))(x, times)",
        ),
        (
            negate,
            {"x": f32(2), "flag": False},
            "jax.vmap(negate, in_axes=(0, None))(x, flag)",
        ),
        (
            draw,
            {"key": jax.random.split(jax.random.key(0), 2), "x": f32(2)},
            "jax.vmap(draw)(key, x)",
        ),
        (
            draw,
            {"key": jax.random.split(jax.random.PRNGKey(0), 2), "x": f32(2)},
            "jax.vmap(draw)(key, x)",
        ),
        (mix, {"x": f32(2), "y": f32(2)}, "jax.vmap(mix)(x, y=y)"),
        (
            mix,
            {"x": f32(2), "y": 1.0},
            "jax.vmap(functools.partial(mix, y=y))(x)",
        ),
        (
            mix,
            {"x": f32(2), "y": f32(2), "weight": 0.5},
            "jax.vmap(functools.partial(mix, weight=weight))(x, y=y)",
        ),
        (stretch, {"x": f32(2), "by": f32(2)}, "jax.vmap(stretch)(x, by)"),
        (stretch, {"x": f32(2, 3), "by": f32(2)}, "jax.vmap(stretch)(x, by)"),
        (
            stretch,
            {"x": f32(3), "by": f32(2)},
            "jax.vmap(stretch, in_axes=(None, 0))(x, by)",
        ),
    ],
)
def test_a_batch_is_refused_with_the_call_to_make(fn, given, call):
    text = message(ValueError, fn, **given)
    assert text.endswith(f" For a batch of 2, use {call}.")
    scope = {"jax": jax, "functools": functools, fn.__name__: fn}
    assert len(eval(call, scope, given)) == 2


def test_a_batch_of_sequences_may_have_time_first():
    text = message(ValueError, keep, f32(2, 3), np.ones((2, 3), bool))
    assert text.endswith(f" use jax.vmap(keep)(x, mask).{TIME_FIRST}")


def test_a_number_or_a_sequence_may_be_batched():
    """A bootstrap of one number a trajectory looks like one of a number a step."""

    @checked
    def close(
        r: Annotated[Arg, "f[T]"], last: Annotated[Arg, "f[]|f[T]"]
    ) -> Annotated[Array, "f[T]"]:
        return r + last

    for last in (f32(2), f32(2, 3)):
        text = message(ValueError, close, f32(2, 3), last)
        assert "For a batch of 2, use jax.vmap(close)(r, last)." in text
    text = message(ValueError, close, f32(2, 3), f32(3))
    assert "use jax.vmap(close, in_axes=(0, None))(r, last)." in text


def test_an_argument_of_two_ranks_may_be_a_batch_of_the_lower():
    """It has the rank of the higher, which its size may rule out or may not."""

    @checked
    def decode(
        r: Annotated[Arg, "f[T]"], v: Annotated[Arg, "f[T]|f[T,K]"]
    ) -> Annotated[Array, "f[T]"]:
        return r

    for r, v, axes in [
        (f32(3), f32(2, 3), ", in_axes=(None, 0)"),
        (f32(2, 3), f32(2, 3), ""),
        (f32(3, 3), f32(3, 3), ""),
        (f32(2, 3), f32(2, 3, 4), ""),
        (f32(3, 3), f32(3, 4), ", in_axes=(0, None)"),
        (f32(2, 3), f32(3, 4), ", in_axes=(0, None)"),
    ]:
        call = f"use jax.vmap(decode{axes})(r, v)."
        assert call in message(ValueError, decode, r, v)
    assert "jax.vmap" not in message(ValueError, decode, f32(3), f32(2, 4))


def test_no_call_is_suggested_that_would_not_work():
    for x, index in [(f32(2, 3), np.ones(3, int)), (f32(2, 3, 4), np.ones(2, int))]:
        assert message(ValueError, pick, x, index) == (
            f"pick: x has shape {x.shape}, expected f[A]."
        )


def test_under_vmap_shapes_are_those_of_one_call():
    text = message(ValueError, jax.vmap(pick), f32(2, 3, 4), np.ones(2, int))
    assert text.startswith("pick: x has shape (3, 4), expected f[A].")


# Dtypes


@pytest.mark.parametrize("promotion", ["strict", "standard"])
@pytest.mark.parametrize(
    ("x", "factor", "expected"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
        ("bfloat16", "float16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("float64", "float32", "float64"),
        ("bfloat16", "float64", "float64"),
    ],
)
def test_the_result_has_the_promoted_dtype(x, factor, expected, promotion):
    with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
        result = scale(jnp.ones(2, x), jnp.ones((), factor))
        assert result.dtype == expected


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_python_numbers_adapt_to_the_arrays(dtype, x64):
    with jax.enable_x64(x64):
        x = jnp.ones(2, dtype)
        for factor in (2, 2.0):
            assert scale(x, factor).dtype == scale(x).dtype == dtype
            assert jax.jit(scale)(x, factor).dtype == dtype


@pytest.mark.parametrize("x64", [False, True])
def test_of_python_numbers_alone_the_result_adapts_in_turn(x64):
    with jax.enable_x64(x64):
        for number in (2, 2.0):
            result = negate(number)
            assert result.dtype == (jnp.float64 if x64 else jnp.float32)
            assert (result * jnp.bfloat16(1)).dtype == jnp.bfloat16


def test_a_numpy_float64_is_single_precision_unless_x64_is_on():
    for x64 in (False, True):
        with jax.enable_x64(x64):
            assert scale(np.ones(2)).dtype == (jnp.float64 if x64 else jnp.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("x", [300.0, 1e-4])
def test_half_precision_is_computed_in_single(x, dtype):
    """The square overflows in float16, or underflows."""
    seen = []

    @checked
    def there_and_back(x: Annotated[Arg, "f[]"]) -> Annotated[Array, "f[]"]:
        seen.append(x.dtype)
        return jnp.sqrt(x * x)

    half = jnp.asarray(x, dtype)
    result = there_and_back(half)
    assert (result, result.dtype, seen) == (half, dtype, [jnp.float32])


def test_only_what_was_computed_in_single_precision_is_rounded():
    class Moments(NamedTuple):
        mean: Any
        many: Any
        count: Any
        index: Any

    @checked
    def moments(x: Annotated[Arg, "f[A]"]) -> Moments:
        return Moments(jnp.mean(x), x > 0, len(x), jnp.argmax(x))

    result = moments(jnp.ones(3, jnp.bfloat16))
    dtypes = [getattr(leaf, "dtype", type(leaf)) for leaf in result]
    integer = jnp.arange(1).dtype
    assert dtypes == [jnp.bfloat16, jnp.bool_, integer, integer]


# Compilation


def fresh():
    """A function that was never called, and how often its body ran."""
    traces = []

    @checked
    def fn(
        x: Annotated[Arg, "f[A]"], y: Annotated[Arg, "f[]"] = 1.0, n: int = 2
    ) -> Annotated[Array, "f[A]"]:
        traces.append(x.shape)
        return x * y * n

    return fn, traces


def test_compiles_once_for_each_shape_dtype_and_fixed_value():
    fn, traces = fresh()
    x = [np.full(3, value, np.float32) for value in range(4)]
    COMPILED.clear()
    for value in x:
        fn(value, 1.0)
        fn(value, y=value[0].item())
    assert len(traces) == len(COMPILED) == 1
    fn(x[0])
    fn(f32(4), 1.0)
    fn(x[0].astype(np.float16), 1.0)
    fn(x[0], 1.0, 3)
    fn(x[0], np.float32(1.0))
    assert len(traces) == len(COMPILED) == 6


def test_is_traced_once_into_an_outer_program():
    fn, traces = fresh()
    outer = jax.jit(lambda x: fn(x) + fn(2 * x))
    COMPILED.clear()
    outer(f32(3))
    outer(2 * f32(3))
    assert len(traces) == len(COMPILED) == 1


def test_a_failed_call_leaves_nothing_behind():
    fn, _ = fresh()
    first, second = (message(ValueError, fn, f32(2, 3)) for _ in range(2))
    assert first == second
    assert fn(f32(2)).tolist() == [2, 2]


def operations(fn, *arguments):
    """What a function compiles to: the operations, and nothing of their names."""
    compiled = jax.jit(fn).lower(*arguments).compile().as_text()
    return re.findall(r"= (\S+\[\S* \w+)\(", str(compiled))


def test_an_outer_program_holds_the_equation_and_nothing_else():
    """No trace is left of a check, a cast or a call."""
    arguments = f32(3), np.float32(2)
    plain = operations(lambda x, factor: x * factor, *arguments)
    assert plain
    assert operations(scale, *arguments) == plain


@pytest.mark.parametrize("promotion", ["strict", "standard"])
def test_works_op_by_op(promotion):
    x = jnp.ones(2, jnp.float16)
    with jax.disable_jit(), jax.numpy_dtype_promotion(promotion):
        assert scale(x).dtype == jnp.float16
        assert scale(f32(2), 3).tolist() == [3, 3]
        assert negate(2.0, jnp.array(False)) == 2
        assert repeat(2.0, 2).tolist() == [2, 2]

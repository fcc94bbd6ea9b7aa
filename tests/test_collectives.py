"""Sums over devices and batches, against sums in NumPy over all of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from rlprims import AllSum

DATA = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7.5


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), [0, 1], ()])
def test_sums_over_axes(axis):
    expected = DATA.sum(tuple(axis) if isinstance(axis, list) else axis)
    np.testing.assert_allclose(AllSum()(DATA, axis), expected)
    np.testing.assert_allclose(AllSum(None)(jnp.asarray(DATA), axis=axis), expected)


@pytest.mark.parametrize("axis", [None, 0, (0, 1)])
def test_sums_over_a_mapped_axis_too(axis):
    expected = DATA.sum(0).sum(axis)
    by_vmap = jax.vmap(lambda x: AllSum("batch")(x, axis), axis_name="batch")(DATA)
    np.testing.assert_allclose(by_vmap, [expected, expected])


def test_sums_over_two_mapped_axes():
    inner = jax.vmap(AllSum(("i", "j")), axis_name="j")
    both = jax.vmap(inner, axis_name="i")(DATA)
    np.testing.assert_allclose(both, np.full((2, 3), DATA.sum()))


def test_sums_over_one_mapped_axis_of_two():
    inner = jax.vmap(AllSum("i"), axis_name="j")
    one = jax.vmap(inner, axis_name="i")(DATA)
    np.testing.assert_allclose(one, np.tile(DATA.sum((0, 2)), (2, 1)))


@pytest.mark.parametrize("axis", [None, 1])
def test_sums_over_devices(axis):
    expected = DATA.sum(0).sum(axis if axis is None else axis - 1)
    mesh, split = Mesh(jax.devices()[:2], "d"), PartitionSpec("d")
    total = lambda x: AllSum("d")(x, None if axis is None else (0, axis))
    over_devices = jax.shard_map(
        total, mesh=mesh, in_specs=split, out_specs=PartitionSpec()
    )
    np.testing.assert_allclose(over_devices(DATA), expected)
    np.testing.assert_allclose(jax.jit(over_devices)(DATA), expected)


def test_has_a_gradient_over_devices():
    """Of a loss that is normalised over all of a batch: log of the sum of squares."""
    mesh, split = Mesh(jax.devices()[:2], "d"), PartitionSpec("d")
    loss = jax.shard_map(
        lambda x: jnp.log(AllSum("d")(x**2)),
        mesh=mesh,
        in_specs=split,
        out_specs=PartitionSpec(),
    )
    expected = 2 * DATA / (DATA**2).sum()
    np.testing.assert_allclose(jax.grad(loss)(DATA), expected, rtol=1e-6)


def test_sums_under_pmap():
    total = jax.pmap(AllSum("d"), axis_name="d")(DATA)
    np.testing.assert_allclose(total, np.full(2, DATA.sum()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype):
    """Small numbers add up, however many they are, before the large one swamps them."""
    x = jnp.array([2048.0, *[1.0] * 64], dtype)
    for total in (
        AllSum()(x),
        jax.vmap(AllSum("batch"), axis_name="batch")(x)[0],
        jax.vmap(AllSum("batch"), axis_name="batch")(x[:, None])[-1],
    ):
        assert (total.dtype, total) == (dtype, jnp.array(2112, dtype))


@pytest.mark.parametrize(
    ("dtype", "expected"), [(bool, "int32"), ("int32", "int32"), ("float32", "float32")]
)
def test_keeps_other_dtypes_and_counts_booleans(dtype, expected):
    with jax.enable_x64(False):
        total = AllSum()(jnp.array([1, 0, 1], dtype))
        assert (total.dtype, total) == (expected, 2)
        assert AllSum()(3.0) == 3


def test_small_integers_do_not_wrap_around():
    assert AllSum()(np.array([200, 200], np.uint8)) == 400


def test_is_a_static_argument():
    assert AllSum("i") == AllSum(axis_name="i") != AllSum()
    assert hash(AllSum("i")) == hash(AllSum("i"))
    compiled = jax.jit(lambda total, x: total(x), static_argnums=0)
    assert compiled(AllSum(), jnp.ones(3)) == 3
    assert repr(AllSum("i")) == "AllSum(axis_name='i')"


def test_an_axis_that_is_not_mapped_over_is_an_error():
    with pytest.raises(NameError, match=r"^AllSum: .*unbound axis name: nowhere"):
        AllSum("nowhere")(jnp.ones(2))


@pytest.mark.parametrize("x", [[1.0, 2.0], {"a": 1.0}, None, "x"])
def test_what_is_no_array_is_refused(x):
    with pytest.raises(TypeError, match=r"^AllSum: "):
        AllSum()(x)


@pytest.mark.parametrize("axis", [2, -3, (0, 0), (0, 2)])
def test_an_axis_that_is_not_there_is_refused(axis):
    with pytest.raises(ValueError, match=r"^AllSum: .*axis"):
        AllSum()(jnp.ones((2, 3)), axis)


@pytest.mark.parametrize("name", [0, 1, ("batch", 0)])
def test_a_number_is_refused_as_the_name_of_an_axis(name):
    """JAX would take it for an axis of the array, silently."""
    with pytest.raises(TypeError, match=r"^AllSum: axis_name must be .*, got .*[01]"):
        AllSum(name)

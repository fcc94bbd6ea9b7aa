"""Standardised advantages, against NumPy in double precision, group by group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims.standardization import (
    standardize_advantages,
    standardize_advantages_by_group,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

GROUPS = 3


def by_hand(adv, groups=None, mask=None, epsilon=1e-8, ddof=0):
    adv = np.asarray(adv, np.float64)
    groups = np.zeros(adv.shape, int) if groups is None else groups
    mask = np.ones(adv.shape, bool) if mask is None else mask
    result = np.zeros(adv.shape)
    for group in np.unique(groups):
        own = mask & (groups == group)
        if own.sum() > 1:
            errors = adv[own] - adv[own].mean()
            deviation = np.sqrt((errors**2).sum() / (own.sum() - ddof))
            result[own] = 0 if deviation == 0 else errors / (deviation + epsilon)
    return result


def example(rng, shape=(4, 6)):
    adv = (3 + 2 * rng.normal(size=shape)).astype(np.float32)
    return adv, rng.integers(GROUPS, size=shape), rng.uniform(size=shape) < 0.7


by_group = functools.partial(standardize_advantages_by_group, num_groups=GROUPS)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("epsilon", [1e-8, 0.5])
def test_agree_with_the_definition(rng, ddof, epsilon):
    adv, groups, mask = example(rng)
    settings = {"ddof": ddof, "epsilon": epsilon}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for masks in ({}, {"mask": mask}):
        given = {f"{k}_t": x for k, x in masks.items()}
        result = standardize_advantages(adv, **given, **settings)
        close(result, by_hand(adv, **masks, **settings))
        result = by_group(adv, groups, **given, **settings)
        close(result, by_hand(adv, groups, **masks, **settings))


def test_mean_is_zero_and_deviation_one(rng):
    adv, groups, mask = example(rng, (40,))
    result = standardize_advantages(adv, mask_t=mask)[mask]
    np.testing.assert_allclose([result.mean(), result.std()], [0, 1], atol=1e-6)
    result = by_group(adv, groups, ddof=1)
    for group in range(GROUPS):
        own = result[groups == group]
        np.testing.assert_allclose([own.mean(), own.std(ddof=1)], [0, 1], atol=1e-6)


class TestDegenerate:
    @pytest.mark.parametrize("value", [0.1, -1e30, 1e-30, 0.0])
    @pytest.mark.parametrize("epsilon", [0.0, 1e-8])
    def test_what_is_all_the_same_is_exactly_zero(self, value, epsilon):
        """Its mean, rounded, is not always the number itself."""
        adv = jnp.full(7, value)

        def total(adv):
            result = standardize_advantages(adv, epsilon=epsilon)
            return jnp.vdot(result, jnp.arange(7.0)), result

        slopes, result = jax.grad(total, has_aux=True)(adv)
        assert not result.any()
        assert not slopes.any()

    @pytest.mark.parametrize("ddof", [0, 1])
    def test_one_alone_is_zero(self, ddof):
        assert standardize_advantages(jnp.array([3.0]), ddof=ddof).tolist() == [0]
        assert standardize_advantages(3.0, ddof=ddof) == 0
        alone = by_group(jnp.array([3.0, 1.0, 5.0]), jnp.array([2, 0, 1]), ddof=ddof)
        assert alone.tolist() == [0, 0, 0]

    def test_of_nothing_there_is_nothing(self):
        assert standardize_advantages(jnp.zeros(0)).shape == (0,)
        assert by_group(jnp.zeros(0), jnp.zeros(0, int)).shape == (0,)
        adv, mask = jnp.full(3, jnp.nan), jnp.zeros(3, bool)
        assert standardize_advantages(adv, mask_t=mask).tolist() == [0, 0, 0]
        ids = jnp.array([0, 7, -1])
        assert by_group(adv, ids, mask_t=mask).tolist() == [0, 0, 0]

    def test_padding_has_no_gradient(self, rng):
        adv, groups, mask = example(rng)
        weights = rng.normal(size=adv.shape).astype(np.float32)
        spoilt = np.where(mask, adv, np.nan)

        def total(adv):
            every = standardize_advantages(adv, mask_t=mask)
            own = by_group(adv, groups, mask_t=mask)
            return jnp.vdot(every + own, weights)

        slopes = jax.jit(jax.grad(total))
        got, expected = slopes(spoilt), slopes(adv)
        assert not got[~mask].any()
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_allclose(got.sum(), 0, atol=1e-5)


class TestPrecision:
    def test_a_large_mean_costs_no_digits(self):
        adv = np.float32([16_777_216, 16_777_218, 16_777_222, 16_777_224])
        np.testing.assert_allclose(standardize_advantages(adv), by_hand(adv), rtol=1e-6)

    @pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
    def test_neither_do_squares_out_of_range(self, rng, scale):
        adv = (scale * rng.normal(size=9)).astype(np.float32)
        result = standardize_advantages(adv, epsilon=0)
        np.testing.assert_allclose(result, by_hand(adv, epsilon=0), rtol=1e-5)

    def test_half_precision_is_computed_in_float32(self):
        adv = jnp.bfloat16([1.0, *[1.0078125] * 511])
        result = standardize_advantages(adv)
        assert result.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            result.astype(np.float32), by_hand(adv.astype(np.float32)), rtol=4e-3
        )

    def test_nan_is_not_hidden_and_spoils_its_own_group_alone(self):
        adv, groups = jnp.array([1.0, jnp.nan, 2.0, 4.0]), jnp.array([0, 0, 1, 1])
        assert np.isnan(standardize_advantages(adv)).all()
        result = by_group(adv, groups)
        assert np.isnan(result[:2]).all()
        np.testing.assert_allclose(result[2:], [-1, 1], rtol=1e-6)
        infinite = jnp.array([1.0, jnp.inf, 2.0])
        assert np.isnan(standardize_advantages(infinite)).any()


class TestGroups:
    @pytest.mark.parametrize("stray", [-1, GROUPS, 2**31 - 1])
    def test_one_that_does_not_exist_gives_nan_to_its_own(self, stray):
        adv, groups = jnp.array([1.0, 9.0, 5.0, 100.0]), jnp.array([0, 1, 0, stray])
        result = by_group(adv, groups)
        np.testing.assert_allclose(result[:3], [-1, 0, 1], rtol=1e-6)
        assert np.isnan(result[3])

    def test_may_be_many_and_empty(self):
        adv, groups = jnp.array([1.0, 3.0]), jnp.array([70, 70], jnp.int8)
        result = standardize_advantages_by_group(adv, groups, num_groups=300, epsilon=0)
        assert result.tolist() == [-1, 1]

    @pytest.mark.parametrize("number", [0, -1])
    def test_there_must_be_one(self, number):
        with pytest.raises(ValueError, match=f"must be positive, got {number}"):
            standardize_advantages_by_group(
                jnp.zeros(1), jnp.zeros(1, int), num_groups=number
            )

    def test_their_number_must_be_an_int(self):
        with pytest.raises(TypeError, match="num_groups must be a Python int"):
            standardize_advantages_by_group(
                jnp.zeros(1), jnp.zeros(1, int), num_groups=2.0
            )


def test_there_is_no_other_ddof():
    with pytest.raises(ValueError, match="standardize_advantages: ddof must be"):
        standardize_advantages(jnp.zeros(2), ddof=2)


class TestDevices:
    """What is split is standardised as if it were whole, gradients included."""

    def run(self, split, rng):
        adv, groups, mask = example(rng)
        mask[1] = False  # nothing counts on one device
        weights = rng.normal(size=adv.shape).astype(np.float32)

        def results(adv, groups, mask, axis_name):
            options = {"mask_t": mask, "axis_name": axis_name}
            return (
                standardize_advantages(adv, **options),
                by_group(adv, groups, **options),
            )

        def loss(over):
            def total(adv):
                pair = over(adv, groups, mask)
                return sum(jnp.vdot(x, weights) for x in pair), pair

            return jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(adv))

        whole = functools.partial(results, axis_name=None)
        got, expected = loss(split(results)), loss(whole)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    def test_in_shard_map(self, rng):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        over = PartitionSpec("d")
        self.run(
            lambda fn: jax.shard_map(
                functools.partial(fn, axis_name="d"),
                mesh=mesh,
                in_specs=over,
                out_specs=over,
            ),
            rng,
        )

    def test_in_vmap(self, rng):
        self.run(
            lambda fn: jax.vmap(functools.partial(fn, axis_name="d"), axis_name="d"),
            rng,
        )

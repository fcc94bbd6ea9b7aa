"""Counts and what they are made of, against dictionaries, fractions and loops."""

import collections
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlprims.counts import count_bonus, count_visits, pseudo_count, simhash

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SIZE = 7
NAN = np.float32(np.nan)

equal = np.testing.assert_array_equal
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


class TestBonus:
    def test_falls_with_the_root_of_the_count(self):
        counts = np.float32([0, 0.5, 1, 9, 1e6])
        expected = [2 / math.sqrt(n + 0.01) for n in counts]
        close(count_bonus(counts, scale=2.0), expected)
        bonus = count_bonus(counts[2:], scale=2.0, offset=0.0)
        close(bonus, [2 / math.sqrt(n) for n in counts[2:]])

    def test_of_what_is_known_for_sure_is_zero(self):
        bonus = lambda n: count_bonus(n, scale=1.0)
        value, slope = jax.value_and_grad(bonus)(jnp.inf)
        assert value == 0
        assert slope == 0

    def test_of_a_count_of_zero_is_infinite_without_an_offset(self):
        bonus = lambda n, scale: count_bonus(n, scale=scale, offset=0.0)
        value, slope = jax.value_and_grad(bonus)(0.0, 1.0)
        assert value == jnp.inf
        assert slope == 0
        value, slopes = jax.value_and_grad(bonus, (0, 1))(0.0, 0.0)
        assert value == 0
        assert np.isfinite(slopes).all()

    def test_of_a_negative_count_is_nan(self):
        result = count_bonus(jnp.array([-0.5, NAN]), scale=1.0)
        assert np.isnan(result).all()

    def test_is_zero_in_padding_whatever_it_holds(self):
        counts, mask = jnp.array([1.0, NAN, 0.0]), jnp.array([True, False, False])

        def total(counts, scale, offset):
            bonus = count_bonus(counts, scale=scale, offset=offset, mask_t=mask)
            return bonus.sum(), bonus

        slopes, bonus = jax.grad(total, (0, 1, 2), has_aux=True)(counts, 1.0, 0.0)
        equal(bonus, [1, 0, 0])
        equal(slopes[0], [-0.5, 0, 0])
        equal(slopes[1:], [1, -0.5])


class TestVisits:
    def test_are_those_of_a_dictionary(self, rng):
        counts, seen = jnp.zeros(SIZE, jnp.int32), collections.Counter()
        for _ in range(5):
            indices = rng.integers(SIZE, size=(3, 4)).astype(np.int32)
            seen.update(indices.ravel().tolist())
            visits, counts = count_visits(counts, indices)
            equal(visits, np.vectorize(seen.__getitem__)(indices))
            equal(counts, [seen[place] for place in range(SIZE)])

    def test_of_one_place_in_one_batch_all_count(self):
        visits, counts = count_visits(jnp.array([5, 1]), jnp.zeros(1000, jnp.int32))
        equal(counts, [1005, 1])
        equal(visits, np.full(1000, 1005))

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
    def test_outside_the_table_are_not_counted(self, dtype):
        """Neither at the end that is nearer, nor from the end."""
        far = jnp.iinfo(dtype).max
        indices = jnp.asarray([SIZE, far, SIZE - 1], dtype)
        if dtype.startswith("i"):
            indices = jnp.append(indices, jnp.asarray([-1, -SIZE, -far - 1], dtype))
        visits, counts = count_visits(jnp.zeros(SIZE, jnp.int32), indices)
        equal(counts, [*[0] * (SIZE - 1), 1])
        equal(visits, [NAN, NAN, 1, NAN, NAN, NAN][: len(indices)])
        bonus = count_bonus(visits, scale=1.0)
        equal(np.isnan(bonus), np.isnan(visits))

    def test_may_have_indices_that_are_shorter_than_the_table(self):
        table = jnp.zeros(300, jnp.int32)
        for dtype in ("int8", "uint8"):
            _, counts = count_visits(table, jnp.asarray([100], dtype))
            equal(counts.nonzero()[0], [100])

    def test_in_padding_are_not_counted(self):
        mask = jnp.array([True, False, False, True])
        indices = jnp.array([1, 1, -9, 2])
        visits, counts = count_visits(jnp.array([0, 4, 0]), indices, mask_t=mask)
        equal(counts, [0, 5, 1])
        equal(visits, [5, 0, 0, 1])
        nothing = jnp.zeros(4, bool)
        visits, same = count_visits(counts, indices, mask_t=nothing)
        equal(same, counts)
        equal(visits, np.zeros(4))

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
    def test_stop_at_the_largest_integer(self, dtype):
        most = jnp.iinfo(dtype).max
        table = jnp.asarray([most - 3, most, 0], dtype)
        indices = jnp.repeat(jnp.arange(3), 600, total_repeat_length=1800)
        _, counts = count_visits(table, indices)
        assert counts.dtype == dtype
        equal(counts, [most, most, min(600, most)])

    def test_may_be_none_in_a_table_of_nothing(self):
        visits, counts = count_visits(jnp.zeros(0, jnp.int32), jnp.array([0]))
        assert counts.shape == (0,)
        assert np.isnan(visits).all()
        visits, counts = count_visits(jnp.array([3]), jnp.zeros(0, jnp.int32))
        assert visits.shape == (0,)
        equal(counts, [3])

    def test_on_several_devices_are_counted_in_one_table(self, rng):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        indices = rng.integers(SIZE, size=8).astype(np.int32)
        mask = np.arange(8) != 2
        split, same = PartitionSpec("d"), PartitionSpec()
        count = jax.shard_map(
            lambda counts, indices, mask: count_visits(
                counts, indices, mask_t=mask, axis_name="d"
            ),
            mesh=mesh,
            in_specs=(same, split, split),
            out_specs=(split, same),
        )
        start = jnp.arange(SIZE)
        expected = count_visits(start, indices, mask_t=mask)
        jax.tree.map(equal, jax.jit(count)(start, indices, mask), expected)

    def test_fit_a_scan_over_time(self, rng):
        codes = rng.integers(SIZE, size=(9, 2)).astype(np.int32)
        step = lambda counts, code: count_visits(counts, code)[::-1]
        counts, visits = jax.lax.scan(step, jnp.zeros(SIZE, jnp.int32), codes)
        equal(counts, np.bincount(codes.ravel(), minlength=SIZE))
        equal(visits[-1], counts[codes[-1]])


class TestPseudoCount:
    @pytest.mark.parametrize("n", [0, 1, 3, 50])
    @pytest.mark.parametrize("m", [60, 5000])
    def test_is_the_count_of_a_model_that_counts(self, n, m):
        before, after = Fraction(n, m), Fraction(n + 1, m + 1)
        expected = before * (1 - after) / (after - before)
        assert expected == n
        log_prob = math.log(before) if n else -math.inf
        with jax.enable_x64(True):
            result = pseudo_count(np.float64(log_prob), np.float64(math.log(after)))
            close(result, n)

    @pytest.mark.parametrize("gain", [1e-3, 0.1, 5.0, 200.0])
    def test_is_right_where_probabilities_underflow(self, gain):
        """It is about 1 / (exp(gain) - 1), though exp(-900) is no single number."""
        after = jnp.float32(-900.0) + jnp.float32(gain)
        gain = float(after) + 900
        result = pseudo_count(jnp.float32(-900.0), after)
        np.testing.assert_allclose(result, 1 / math.expm1(gain), rtol=1e-5, atol=1e-37)

    def test_keeps_its_digits_near_certainty(self):
        """Where the probability after is 1 minus less than a rounding error."""
        before, after = np.float32(-1e-3), np.float32(-1e-9)
        expected = -math.expm1(after) * math.exp(before)
        expected /= math.exp(after) - math.exp(before)
        close(pseudo_count(before, after), expected)

    def test_is_infinite_where_there_was_nothing_to_learn(self):
        log_prob = jnp.array([-1.0, -1.0, 0.0, -jnp.inf])
        after = jnp.array([-1.0, -2.0, 0.0, -jnp.inf])
        result = pseudo_count(log_prob, after)
        equal(result, np.full(4, np.inf))
        equal(count_bonus(result, scale=1.0), np.zeros(4))

    def test_has_finite_gradients_everywhere(self):
        log_prob = jnp.array([-1.0, -2.0, -1.0, -jnp.inf, -jnp.inf, -500.0])
        after = jnp.array([-1.0, -1.0, -2.0, -jnp.inf, -1.0, 0.0])

        def total(log_prob, after):
            return count_bonus(pseudo_count(log_prob, after), scale=1.0).sum()

        slopes = jax.grad(total, (0, 1))(log_prob, after)
        assert np.isfinite(slopes).all()
        equal(np.array(slopes)[:, [0, 2, 3]], 0)
        assert (np.array(slopes)[:, 1] != 0).all()

    def test_of_what_is_no_probability_is_nan(self):
        log_prob, after = jnp.array([NAN, -1.0, 0.5, -1.0]), [-1.0, NAN, 0.7, 0.1]
        assert np.isnan(pseudo_count(log_prob, jnp.array(after))).all()
        with pytest.raises(ValueError, match=r"log_prob must be in \[-inf, 0\]"):
            pseudo_count(0.5, 0.0)


class TestSimhash:
    def test_is_the_signs_as_bits(self, rng):
        features = rng.normal(size=(2, 5, 4)).astype(np.float32)
        projection = rng.normal(size=(4, 6)).astype(np.float32)
        codes = simhash(features, projection)
        for code, x in zip(codes.ravel(), features.reshape(10, 4), strict=True):
            bits = [float(np.dot(np.float64(x), a)) >= 0 for a in projection.T]
            assert code == sum(2**k for k, bit in enumerate(bits) if bit)

    def test_does_not_depend_on_the_length_of_the_features(self, rng):
        features = rng.normal(size=(20, 4)).astype(np.float32)
        projection = rng.normal(size=(4, 6)).astype(np.float32)
        codes = simhash(features, projection)
        equal(simhash(1e-3 * features, projection), codes)
        equal(simhash(-features, projection), 63 - codes)

    def test_differs_in_signs_in_proportion_to_the_angle(self):
        angle, signs = 0.7, 20_000
        features = jnp.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        planes = jax.random.normal(jax.random.key(0), (signs, 2, 1))
        codes = jax.vmap(simhash, (None, 0))(features, planes)
        differ = (codes[:, 0] != codes[:, 1]).mean()
        np.testing.assert_allclose(differ, angle / math.pi, atol=0.012)

    def test_of_zero_is_a_code_of_its_own(self):
        """And one of nothing to project, or on nothing, is what is left of it."""
        assert simhash(jnp.zeros(3), jnp.ones((3, 4))) == 15
        assert simhash(-jnp.zeros(3), jnp.ones((3, 4))) == 15
        assert simhash(jnp.ones(3), jnp.zeros((3, 0))) == 0

    def test_of_nan_is_no_code(self):
        features = jnp.array([[NAN, 1.0], [jnp.inf, 1.0], [jnp.inf, -jnp.inf]])
        codes = simhash(features, jnp.array([[1.0, -2.0], [1.0, 1.0]]))
        equal(codes, [-1, 1, -1])
        visits, counts = count_visits(jnp.zeros(4, jnp.int32), codes)
        equal(visits, [NAN, 1, NAN])
        equal(counts, [0, 1, 0, 0])

    def test_fits_32_bits(self):
        code = simhash(jnp.ones(1), jnp.ones((1, 30)))
        assert code == 2**30 - 1
        with jax.enable_x64(True):
            assert simhash(jnp.ones(1), jnp.ones((1, 30))).dtype == jnp.int32
        with pytest.raises(ValueError, match=r"simhash: projection .* K <= 30"):
            simhash(jnp.ones(1), jnp.ones((1, 31)))

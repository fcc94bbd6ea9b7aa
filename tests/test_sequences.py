"""Sequences, against loops over batch, subsequence and time."""

import itertools

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from rlprims import (
    extract_subsequences,
    fix_step_type_on_interruptions,
    sample_start_indices,
)

FIRST, MID, LAST = map(int, dm_env.StepType)


def by_hand(trajectories, starts, length, last=None):
    """The subsequences, one number at a time; NaN where they do not fit."""
    last = len(trajectories) - length if last is None else last
    batch, number = starts.shape
    out = np.full((length, batch, number, *trajectories.shape[2:]), np.nan)
    for step, b, n in np.ndindex(length, batch, number):
        start = int(starts[b, n])
        if 0 <= start <= last and start + length <= len(trajectories):
            out[step, b, n] = trajectories[start + step, b]
    return out


class TestExtractSubsequences:
    @pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
    @pytest.mark.parametrize("length", [0, 1, 2, 6])
    def test_cuts_each_trajectory_at_its_own_starts(self, rng, rest, length):
        data = rng.normal(size=(6, 2, *rest)).astype(np.float32)
        starts = rng.integers(7 - length, size=(2, 5)) % 6
        pieces = extract_subsequences(data, starts, length)
        assert pieces.dtype == np.float32
        np.testing.assert_array_equal(pieces, by_hand(data, starts, length))

    def test_cuts_single_steps_unless_told(self):
        data, starts = jnp.arange(8.0).reshape(4, 2), jnp.array([[1, 3], [0, 2]])
        pieces = extract_subsequences(data, starts)
        assert pieces.tolist() == [[[2, 6], [1, 5]]]

    @pytest.mark.parametrize("start", [-1, -2, -5, 4, 5, 9, 2**31 - 1, -(2**31)])
    def test_a_start_that_does_not_fit_is_nan_and_neither_wraps_nor_clamps(self, start):
        data, starts = np.arange(10.0).reshape(5, 2), np.array([[0, start], [start, 3]])
        pieces = extract_subsequences(data, starts, 2)
        np.testing.assert_array_equal(pieces, by_hand(data, starts, 2))
        assert jnp.isnan(pieces).sum() == 4

    @pytest.mark.parametrize(("start", "length"), [(4, 3), (3, 4), (3, 3), (-1, 2)])
    def test_one_that_runs_off_the_end_is_nan_from_its_start(self, start, length):
        """Where RLax repeats the last step."""
        pieces = extract_subsequences(
            jnp.arange(5.0)[:, None], np.array([[start]]), length
        )
        assert jnp.isnan(pieces).all()

    def test_a_start_beyond_the_last_valid_one_is_nan(self):
        data, starts = np.arange(12.0).reshape(6, 2), np.array([[0, 3], [2, 4]])
        for last in (2, jnp.int32(2), np.int8(2), jnp.uint32(2)):
            pieces = extract_subsequences(data, starts, 2, last)
            np.testing.assert_array_equal(pieces, by_hand(data, starts, 2, 2))

    def test_the_last_valid_start_may_be_traced(self):
        data, starts = np.arange(12.0).reshape(6, 2), np.array([[0, 5], [2, 4]])
        compiled = jax.jit(lambda last: extract_subsequences(data, starts, 2, last))
        for last in range(-1, 8):
            np.testing.assert_array_equal(
                compiled(last), by_hand(data, starts, 2, last)
            )

    @pytest.mark.parametrize(
        ("dtype", "extreme"),
        [("int32", -(2**31)), ("uint8", 255), (bool, True), ("bfloat16", np.nan)],
    )
    def test_keeps_dtypes_with_an_extreme_where_there_is_no_nan(self, dtype, extreme):
        data = jnp.ones((3, 1), dtype)
        pieces = extract_subsequences(data, np.array([[0, 3]]), 1)
        assert pieces.dtype == data.dtype
        np.testing.assert_array_equal(pieces.astype(float), [[[1, float(extreme)]]])

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
    def test_small_indices_reach_far(self, dtype):
        data = jnp.arange(300.0)[:, None]
        pieces = extract_subsequences(data, jnp.array([[100]], dtype), 200)
        np.testing.assert_array_equal(pieces[:, 0, 0], np.arange(100, 300))

    def test_gradients_count_how_often_a_step_is_taken(self):
        starts = np.array([[0, 1, 9], [2, -1, 2]])
        total = lambda data: jnp.nansum(extract_subsequences(data, starts, 2) * 3.0)
        slopes = jax.grad(total)(jnp.ones((4, 2)))
        assert slopes.T.tolist() == [[3, 6, 3, 0], [0, 0, 6, 6]]

    @pytest.mark.parametrize(
        ("data", "starts", "text"),
        [
            (
                (5, 2),
                (3, 1),
                r"start_indices has shape \(3, 1\), expected \[B,N\] with B",
            ),
            ((5, 2), (1, 1), r"start_indices has shape \(1, 1\), expected"),
            ((5, 2), (2,), r"start_indices has shape \(2,\), expected"),
            ((5, 2), (2, 1, 1), r"start_indices has shape \(2, 1, 1\), expected"),
            ((5,), (5, 1), r"trajectories has shape \(5,\), expected \[T,B,...\]\.$"),
        ],
    )
    def test_shapes_that_do_not_match_are_refused(self, data, starts, text):
        with pytest.raises(ValueError, match=f"^extract_subsequences: {text}"):
            extract_subsequences(jnp.zeros(data), jnp.zeros(starts, jnp.int32), 2)

    @pytest.mark.parametrize(
        ("rest", "text"),
        [
            ((6,), "subsequence_len must be at most T = 5, got 6"),
            ((-1,), r"subsequence_len must be in \[0, inf\), got -1"),
            (
                (2, 4),
                "max_valid_start_idx must be at most T - subsequence_len = 3, got 4",
            ),
            (
                (2, np.int64(4)),
                "max_valid_start_idx must be at most T - subsequence_len",
            ),
            ((2, -1), r"max_valid_start_idx must be in \[0, inf\), got -1"),
            ((2, np.ones(1, int)), r"max_valid_start_idx has shape \(1,\), expected"),
        ],
    )
    def test_numbers_out_of_range_are_refused(self, rest, text):
        with pytest.raises(ValueError, match=f"^extract_subsequences: {text}"):
            extract_subsequences(jnp.zeros((5, 1)), jnp.array([[0]]), *rest)

    @pytest.mark.parametrize(
        ("starts", "rest", "text"),
        [
            (jnp.zeros((1, 1), "float32"), (2,), "start_indices must be .* float32"),
            (jnp.array([[True]]), (2,), "start_indices must be an integer, got bool"),
            (jnp.array([[0]]), (jnp.int32(2),), "subsequence_len must be a Python int"),
            (jnp.array([[0]]), (2.0,), "subsequence_len must be a Python int"),
            (jnp.array([[0]]), (2, 1.0), "max_valid_start_idx must be an integer"),
        ],
    )
    def test_wrong_dtypes_are_refused(self, starts, rest, text):
        with pytest.raises(TypeError, match=f"^extract_subsequences: {text}"):
            extract_subsequences(jnp.zeros((5, 1)), starts, *rest)

    def test_works_under_vmap(self, rng):
        data, starts = rng.normal(size=(3, 5, 2)), rng.integers(4, size=(3, 2, 4))
        mapped = jax.vmap(lambda x, i: extract_subsequences(x, i, 2))(data, starts)
        for one, x, i in zip(mapped, data, starts, strict=True):
            np.testing.assert_array_equal(one, by_hand(x, i, 2).astype(one.dtype))


class TestSampleStartIndices:
    @pytest.mark.parametrize("style", [jax.random.key, jax.random.PRNGKey])
    @pytest.mark.parametrize(
        ("seed", "sizes", "draws"),
        [
            (0, (2, 3, 5), [[0, 2, 4], [0, 3, 5]]),
            (7, (3, 2, 9), [[1, 2], [6, 8], [8, 4]]),
            (1, (1, 5, 4), [[1, 2, 4, 3, 0]]),
        ],
    )
    def test_the_draws_are_those_of_rlax(self, style, seed, sizes, draws):
        """As RLax 0.1.9 gives them for a Python number."""
        assert sample_start_indices(style(seed), *sizes).tolist() == draws

    @pytest.mark.parametrize("make", [int, jnp.int32])
    @pytest.mark.parametrize(
        ("count", "last"), [(0, 0), (1, 0), (4, 3), (3, 6), (1, 6)]
    )
    def test_draws_different_times_in_range(self, make, count, last):
        starts = sample_start_indices(jax.random.key(1), 50, count, make(last))
        assert starts.shape == (50, count)
        for row in starts.tolist():
            assert len({*row}) == count
            assert {*row} <= {*range(last + 1)}

    @pytest.mark.parametrize("make", [int, jnp.int32])
    def test_every_ordered_selection_is_equally_likely(self, make):
        """The 12 ways to draw two of four: counts within five standard deviations."""
        drawn = sample_start_indices(jax.random.key(2), 12_000, 2, make(3)).tolist()
        counts = [drawn.count([*pair]) for pair in itertools.permutations(range(4), 2)]
        assert sum(counts) == 12_000
        assert max(abs(count - 1000) for count in counts) < 5 * np.sqrt(1000 * 11 / 12)

    def test_trajectories_and_keys_have_draws_of_their_own(self):
        for last in (1000, jnp.int32(1000)):
            one, two = (
                sample_start_indices(jax.random.key(seed), 4, 3, last)
                for seed in (0, 1)
            )
            assert len({*map(tuple, np.concatenate([one, two]).tolist())}) == 8

    def test_the_last_time_may_be_traced(self):
        draw = jax.jit(lambda last: sample_start_indices(jax.random.key(0), 3, 2, last))
        for last in range(1, 6):
            assert draw(last).max() <= last
            assert draw(last).min() >= 0

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
    def test_the_last_time_may_be_the_largest_of_its_dtype(self, dtype):
        last = min(jnp.iinfo(dtype).max, 2**31 - 2)
        starts = sample_start_indices(jax.random.key(0), 50, 3, jnp.array(last, dtype))
        assert starts.min() >= 0
        assert last // 2 < starts.max() <= last

    @pytest.mark.parametrize("last", [-2, -1, 0, 1])
    def test_an_array_that_is_too_small_gives_no_time(self, last):
        starts = sample_start_indices(jax.random.key(0), 2, 3, jnp.array(last))
        assert starts.tolist() == [[-1] * 3] * 2
        pieces = extract_subsequences(jnp.ones((4, 2)), starts, 2)
        assert jnp.isnan(pieces).all()

    def test_works_in_shard_map(self):
        mesh, split = Mesh(jax.devices()[:2], "d"), PartitionSpec("d")
        keys = jax.random.split(jax.random.key(0), 2)
        draw = lambda keys, last: sample_start_indices(keys[0], 3, 2, last[0])
        sharded = jax.shard_map(draw, mesh=mesh, in_specs=split, out_specs=split)
        lasts = jnp.array([5, 9])
        expected = [
            draw(key[None], last[None]) for key, last in zip(keys, lasts, strict=True)
        ]
        np.testing.assert_array_equal(sharded(keys, lasts), np.concatenate(expected))

    @pytest.mark.parametrize(
        ("sizes", "text"),
        [
            ((2, 5, 3), "num_start_indices must be at most .* = 4, got 5"),
            ((2, 1, -1), r"max_valid_start_idx must be in \[0, inf\), got -1"),
            ((-1, 1, 3), "batch_size must not be negative: -1"),
            ((2, -1, 3), "num_start_indices must not be negative: -1"),
        ],
    )
    def test_sizes_that_do_not_go_together_are_refused(self, sizes, text):
        with pytest.raises(ValueError, match=f"^sample_start_indices: {text}"):
            sample_start_indices(jax.random.key(0), *sizes)

    def test_an_empty_batch_is_fine(self):
        assert sample_start_indices(jax.random.key(0), 0, 2, 3).shape == (0, 2)


class TestFixStepTypeOnInterruptions:
    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
    def test_every_short_sequence(self, dtype):
        """All of length one to four, as the columns of one batch each."""
        for length in range(1, 5):
            steps = np.array([*itertools.product(range(3), repeat=length)], dtype).T
            expected = steps.copy()
            for t, b in np.ndindex(length - 1, 3**length):
                if steps[t, b] == MID and steps[t + 1, b] == FIRST:
                    expected[t, b] = LAST
            fixed = fix_step_type_on_interruptions(steps)
            assert fixed.dtype == dtype
            np.testing.assert_array_equal(fixed, expected)

    def test_takes_one_trajectory(self):
        fixed = fix_step_type_on_interruptions(jnp.array([FIRST, MID, MID, FIRST, MID]))
        assert fixed.tolist() == [FIRST, MID, LAST, FIRST, MID]

    def test_the_final_step_and_a_lone_first_one_stay(self):
        for steps in ([MID, MID], [FIRST, FIRST], [FIRST], [LAST, FIRST], []):
            fixed = fix_step_type_on_interruptions(jnp.array(steps, jnp.int32))
            assert fixed.tolist() == steps

    def test_trajectories_of_a_batch_do_not_touch(self):
        steps = jnp.array([[MID, FIRST], [MID, FIRST]])
        assert fix_step_type_on_interruptions(steps).tolist() == steps.tolist()

    @pytest.mark.parametrize("shape", [(), (2, 2, 2)])
    def test_other_ranks_are_refused(self, shape):
        message = (
            r"^fix_step_type_on_interruptions: step_type has shape .* i\[T\]\|i\[T,B"
        )
        with pytest.raises(ValueError, match=message):
            fix_step_type_on_interruptions(jnp.zeros(shape, jnp.int32))

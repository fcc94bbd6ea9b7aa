"""Log-probabilities of tokens and averages over them, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.tokens import aggregate_tokens, sequence_log_probs, token_log_probs

V = 7


def log_probs_by_hand(logits, tokens, temperature=1.0):
    z = np.float64(logits) / temperature
    top = z.max(-1, keepdims=True)
    log_total = np.log(np.exp(z - top).sum(-1)) + top[..., 0]
    return np.take_along_axis(z, tokens[..., None], -1)[..., 0] - log_total


class TestTokenLogProbs:
    @pytest.fixture
    def batch(self, rng):
        logits = rng.normal(scale=4, size=(2, 3, V)).astype(np.float32)
        return logits, rng.integers(V, size=(2, 3))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_agrees_with_the_definition(self, batch, temperature):
        expected = log_probs_by_hand(*batch, temperature)
        result = token_log_probs(*batch, temperature=temperature)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    def test_has_a_temperature_of_one_unless_told(self, batch):
        with_one = token_log_probs(*batch, temperature=1.0)
        np.testing.assert_allclose(token_log_probs(*batch), with_one, rtol=1e-6)

    def test_its_gradient_is_the_one_hot_less_the_softmax(self, batch):
        logits, tokens = batch
        slope = jax.grad(lambda x: token_log_probs(x, tokens).sum())(logits)
        expected = np.eye(V, dtype=np.float32)[tokens] - jax.nn.softmax(logits)
        np.testing.assert_allclose(slope, expected, atol=1e-6)

    def test_its_curvature_is_that_of_the_log_softmax(self, batch):
        """Forwards over backwards, and the other way round."""
        logits, tokens = batch[0][0, 0], batch[1][0, 0]
        fn = lambda x: token_log_probs(x, tokens)
        pi = np.float64(jax.nn.softmax(logits))
        expected = np.outer(pi, pi) - np.diag(pi)
        np.testing.assert_allclose(jax.hessian(fn)(logits), expected, atol=1e-6)
        backwards = jax.jacrev(jax.jacrev(fn))(logits)
        np.testing.assert_allclose(backwards, expected, atol=1e-6)

    @pytest.mark.parametrize("offset", [-1e4, 1e4])
    def test_an_offset_of_the_logits_changes_nothing(self, offset):
        logits = jnp.array([0.0, 1.0, 3.0]) + offset
        result = token_log_probs(logits, 1)
        np.testing.assert_allclose(result, -2.169846, rtol=1e-5)

    def test_keeps_what_is_saturated(self):
        logits = jnp.array([1e30, 0.0, -1e30])
        run = jax.vmap(jax.value_and_grad(token_log_probs), (None, 0))
        values, slopes = run(logits, jnp.arange(3))
        np.testing.assert_allclose(values, [0, -1e30, -2e30], rtol=1e-6)
        assert slopes.tolist() == [[0, 0, 0], [-1, 1, 0], [-1, 0, 1]]

    def test_minus_infinity_rules_a_token_out(self):
        logits = jnp.array([0.0, -jnp.inf, 0.0])
        values, slopes = jax.vmap(jax.value_and_grad(token_log_probs), (None, 0))(
            logits, jnp.arange(2)
        )
        np.testing.assert_allclose(values, [-np.log(2), -np.inf], rtol=1e-6)
        assert slopes[0].tolist() == [0.5, 0, -0.5]
        assert np.isfinite(slopes).all()

    @pytest.mark.parametrize("temperature", [None, 0.5])
    def test_a_mask_leaves_tokens_out(self, batch, temperature):
        logits, tokens = batch
        legal = np.arange(V) != 2
        tokens = np.where(tokens == 2, 3, tokens)
        mask = np.broadcast_to(legal, logits.shape)
        spoilt = np.where(mask, logits, np.nan)
        expected = log_probs_by_hand(
            logits[..., legal], tokens - (tokens > 2), temperature or 1.0
        )
        given = {"mask": mask, "temperature": temperature}
        result = token_log_probs(spoilt, tokens, **given)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
        slope = jax.grad(lambda x: token_log_probs(x, tokens, **given).sum())(spoilt)
        assert np.isfinite(slope).all()
        assert not slope[..., 2].any()

    def test_of_no_legal_token_is_nan_without_a_gradient(self):
        none = jnp.zeros(3, bool)
        value, slope = jax.value_and_grad(lambda x: token_log_probs(x, 1, mask=none))(
            jnp.ones(3)
        )
        assert np.isnan(value)
        assert slope.tolist() == [0, 0, 0]

    def test_where_all_are_ruled_out_it_is_nan_without_a_gradient(self):
        value, slope = jax.value_and_grad(token_log_probs)(jnp.full(3, -jnp.inf), 3)
        assert np.isnan(value)
        assert slope.tolist() == [0, 0, 0]
        slope = jax.grad(token_log_probs)(jnp.full(3, -jnp.inf), 1)
        assert np.isfinite(slope).all()

    @pytest.mark.parametrize("token", [-1, V, 300])
    def test_of_a_token_that_does_not_exist_is_nan_without_a_gradient(self, token):
        value, slope = jax.value_and_grad(token_log_probs)(jnp.ones(V), token)
        assert np.isnan(value)
        assert not slope.any()

    @pytest.mark.parametrize("token_of_padding", [-5, 1])
    def test_padding_may_hold_anything(self, batch, token_of_padding):
        logits, tokens = batch
        counts = np.array([[True, False, True], [False, True, True]])
        spoilt = np.where(counts[..., None], logits, np.nan)
        run = lambda x: token_log_probs(
            x, np.where(counts, tokens, token_of_padding), mask_t=counts
        )
        expected = np.where(counts, log_probs_by_hand(logits, tokens), 0)
        np.testing.assert_allclose(run(spoilt), expected, rtol=1e-5, atol=1e-6)
        slope = jax.grad(lambda x: run(x).sum())(spoilt)
        assert np.isfinite(slope).all()
        assert not slope[~counts].any()
        twice = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: run(x).sum())(x) ** 2))
        assert np.isfinite(twice(spoilt)).all()

    def test_takes_tokens_of_few_bits_of_a_large_vocabulary(self):
        run = jax.value_and_grad(token_log_probs)
        value, slope = run(jnp.zeros(300), jnp.int8(100))
        np.testing.assert_allclose(value, -np.log(300), rtol=1e-6)
        np.testing.assert_allclose(slope[100], 1 - 1 / 300, rtol=1e-6)


class TestMemory:
    """Of a vocabulary of V = 4096, in bytes that the compiler plans to use."""

    size, vocabulary = 256, 4096
    whole = 4 * 256 * 4096

    def planned(self, fn):
        logits = jax.ShapeDtypeStruct((self.size, self.vocabulary), np.float32)
        tokens = jax.ShapeDtypeStruct((self.size,), np.int32)
        return jax.jit(fn).lower(logits, tokens).compile().memory_analysis()

    def test_the_value_needs_no_second_array_of_the_logits(self):
        assert self.planned(token_log_probs).temp_size_in_bytes < self.whole / 50

    def test_the_gradient_is_the_only_other_array_of_that_size(self):
        gradient = jax.grad(lambda x, a: token_log_probs(x, a).sum())
        plan = self.planned(gradient)
        assert plan.output_size_in_bytes >= self.whole
        assert plan.temp_size_in_bytes < self.whole / 50

    def test_nothing_of_that_size_is_kept_for_the_gradient_but_the_logits(self):
        logits = jnp.zeros((self.size, self.vocabulary))
        run = lambda x: token_log_probs(x, jnp.zeros(self.size, jnp.int32))
        kept = jax.tree.leaves(jax.vjp(run, logits)[1])
        where = {x.unsafe_buffer_pointer() for x in kept if x.size > self.size}
        assert where == {logits.unsafe_buffer_pointer()}

    def test_a_log_softmax_would_be_one(self):
        """So that the numbers above mean something."""
        plain = lambda x, a: jnp.take_along_axis(jax.nn.log_softmax(x), a[:, None], -1)
        assert self.planned(plain).temp_size_in_bytes >= self.whole


class TestSequenceLogProbs:
    log_probs = np.array([[-1.0, -3.0, np.nan], [np.nan] * 3], np.float32)
    mask = np.array([[True, True, False], [False] * 3])

    @pytest.mark.parametrize(("reduction", "expected"), [("sum", -4), ("mean", -2)])
    def test_takes_the_tokens_that_count(self, reduction, expected):
        run = lambda x: sequence_log_probs(x, mask_t=self.mask, reduction=reduction)
        assert run(self.log_probs).tolist() == [expected, 0]
        slope = jax.grad(lambda x: run(x).sum())(self.log_probs)
        each = 1 if reduction == "sum" else 0.5
        assert slope.tolist() == [[each, each, 0], [0, 0, 0]]

    def test_takes_all_without_a_mask(self):
        assert sequence_log_probs(jnp.array([[-1.0, -2.0]])).tolist() == [-3]


MODES = ["token_mean", "sequence_mean", "constant_length"]


def aggregate_by_hand(sequences, mode, length):
    """Of a list of sequences, each a list of numbers."""
    sequences = [x for x in sequences if len(x)]
    if not sequences:
        return 0
    if mode == "token_mean":
        return np.mean(np.concatenate(sequences))
    if mode == "sequence_mean":
        return np.mean([np.mean(x) for x in sequences])
    return np.mean([np.sum(x) / length for x in sequences])


@pytest.mark.parametrize("mode", MODES)
class TestAggregateTokens:
    def test_agrees_with_the_definition(self, mode, rng):
        values = rng.normal(size=(2, 3, 5)).astype(np.float32)
        mask = rng.uniform(size=values.shape) < 0.5
        mask[0, 1] = False
        rows = zip(values.reshape(6, 5), mask.reshape(6, 5), strict=True)
        expected = aggregate_by_hand([x[kept] for x, kept in rows], mode, 4.0)
        spoilt = np.where(mask, values, np.nan)
        result = aggregate_tokens(spoilt, mode, length=4.0, mask_t=mask)
        np.testing.assert_allclose(result, expected, rtol=1e-5)

    def test_packed_sequences_are_each_on_their_own(self, mode, rng):
        """In two rows of sequences, of which the second reuses the ids."""
        values = rng.normal(size=(2, 6)).astype(np.float32)
        ids = np.array([[0, 0, 0, 1, 1, 4], [1, 1, 5, 5, 5, 5]])
        mask = np.array([[1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]], bool)
        sequences = [
            values[row][(ids[row] == i) & mask[row]] for row in (0, 1) for i in range(6)
        ]
        expected = aggregate_by_hand(sequences, mode, 4.0)
        spoilt, wrong = np.where(mask, values, np.nan), np.where(mask, ids, -9)
        result = aggregate_tokens(
            spoilt, mode, length=4.0, mask_t=mask, segment_ids=wrong
        )
        np.testing.assert_allclose(result, expected, rtol=1e-5)

    def test_of_nothing_is_zero_with_a_gradient_of_zero(self, mode):
        nothing = jnp.zeros((2, 3), bool)
        run = lambda x: aggregate_tokens(x, mode, mask_t=nothing)
        value, slope = jax.value_and_grad(run)(jnp.full((2, 3), jnp.nan))
        assert value == 0
        assert not slope.any()

    @pytest.mark.parametrize("wrong", [-1, 3])
    def test_a_token_of_no_sequence_makes_it_nan(self, mode, wrong):
        ids = jnp.array([0, 0, wrong])
        assert np.isnan(aggregate_tokens(jnp.ones(3), mode, segment_ids=ids))

    def test_counts_without_a_mask_and_ids(self, mode):
        assert aggregate_tokens(jnp.full((3, 4), 2.0), mode, length=4.0) == 2


def test_a_constant_length_of_one_sums_each_sequence():
    values = jnp.array([[1.0, 2.0], [5.0, 0.0]])
    assert aggregate_tokens(values, "constant_length") == 4


def test_tokens_count_alike_unless_told():
    mask = jnp.array([[True, True], [True, False]])
    values = jnp.array([[1.0, 2.0], [6.0, 9.0]])
    assert aggregate_tokens(values, mask_t=mask) == 3


def test_refuses_another_aggregation():
    message = r"^aggregate_tokens: aggregation must be one of 'token_mean', 'sequence"
    with pytest.raises(ValueError, match=message):
        aggregate_tokens(jnp.ones(3), "mean")

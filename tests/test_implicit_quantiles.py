"""Implicit quantiles, against plain-Python readings of the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims
from rlprims import (
    cosine_embedding,
    propose_quantile_levels,
    quantile_huber_loss,
    quantile_proposal_loss,
    quantile_regression_loss,
    sample_quantile_levels,
    truncated_quantile_targets,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

INF, NAN = math.inf, math.nan


class TestSampledLevels:
    def test_are_uniform(self):
        keys = jax.random.split(jax.random.key(0), 1000)
        levels = np.asarray(jax.vmap(lambda k: sample_quantile_levels(k, 20))(keys))
        assert (levels >= 0).all()
        assert (levels < 1).all()
        counts, _ = np.histogram(levels, bins=10, range=(0, 1))
        assert abs(counts - 2000).max() < 4 * math.sqrt(2000 * 0.9)
        between = np.corrcoef(levels.T) - np.eye(20)  # none depends on another
        assert abs(between).max() < 5 / math.sqrt(1000)

    def test_take_either_kind_of_key(self):
        new = sample_quantile_levels(jax.random.key(3), 4)
        old = sample_quantile_levels(jax.random.PRNGKey(3), 4)
        np.testing.assert_array_equal(new, old)
        assert new.dtype == jnp.float32

    def test_come_in_the_dtype_asked_for(self):
        half = sample_quantile_levels(jax.random.key(3), 4, jnp.bfloat16)
        assert half.dtype == jnp.bfloat16

    def test_integers_are_refused(self):
        match = r"^sample_quantile_levels: dtype must be floating-point, got "
        with pytest.raises(TypeError, match=match):
            sample_quantile_levels(jax.random.key(3), 4, jnp.int32)

    def test_none_are_refused(self):
        match = r"^sample_quantile_levels: num_levels must be at least 1, got 0\.$"
        with pytest.raises(ValueError, match=match):
            sample_quantile_levels(jax.random.key(0), 0)


class TestCosineEmbedding:
    @pytest.mark.parametrize("first", [0, 1])
    def test_agrees_with_the_paper(self, first, rng):
        tau = np.append(rng.uniform(size=(2, 3)).astype(np.float32), [[0, 0.5, 1]], 0)
        expected = [
            [[math.cos(math.pi * (first + i) * float(t)) for i in range(64)] for t in x]
            for x in tau
        ]
        result = cosine_embedding(tau, 64, first_frequency=first)
        np.testing.assert_allclose(result, expected, atol=3e-5)

    def test_begins_with_a_constant_as_in_the_paper(self, rng):
        features = cosine_embedding(rng.uniform(size=5).astype(np.float32), 3)
        assert (features[:, 0] == 1).all()

    def test_no_features_are_refused(self):
        match = r"^cosine_embedding: num_features must be at least 1, got 0\.$"
        with pytest.raises(ValueError, match=match):
            cosine_embedding(0.5, 0)


def huber_pair(u, tau, kappa):
    """One pair of estimate and target, divided by kappa."""
    if kappa == 0:
        size = abs(u)
    elif abs(u) <= kappa:
        size = u * u / 2 / kappa
    else:
        size = abs(u) - kappa / 2
    return (1 - tau if u < 0 else tau) * size


class TestHuberLoss:
    @pytest.fixture
    def sample(self, rng):
        source, target = rng.normal(size=5), rng.normal(size=4)
        return tuple(np.float32(x) for x in (source, rng.uniform(size=5), target))

    @pytest.mark.parametrize("kappa", [0.0, 1e-3, 0.5, 1.0, 3.0])
    def test_agrees_with_the_paper(self, sample, kappa):
        """A sum over estimates and a mean over targets, divided by kappa."""
        expected = sum(
            huber_pair(float(y) - float(s), float(tau), kappa)
            for s, tau in zip(*sample[:2], strict=True)
            for y in sample[2]
        )
        result = quantile_huber_loss(*sample, huber_param=kappa)
        np.testing.assert_allclose(result, expected / 4, rtol=1e-5)

    def test_at_one_is_the_loss_that_is_not_divided(self, sample):
        expected = quantile_regression_loss(*sample, 1.0)
        assert quantile_huber_loss(*sample) == expected

    def test_pulls_no_harder_than_one(self, sample):
        far = sample[0] - 100, sample[1], sample[2]
        for kappa in (0.5, 4.0):
            pull = jax.grad(
                lambda x, k=kappa: quantile_huber_loss(x, *far[1:], huber_param=k)
            )
            np.testing.assert_allclose(pull(far[0]), -far[1], rtol=1e-5)

    def test_stops_the_targets_unless_told(self, sample):
        fn = lambda y, stop: quantile_huber_loss(
            *sample[:2], y, stop_target_gradients=stop
        )
        assert not jax.grad(fn)(sample[2], True).any()
        assert jax.grad(fn)(sample[2], False).all()

    def test_bad_arguments_are_refused(self, sample):
        match = r"^quantile_huber_loss: dist_target must have an entry, got \(0,\)\.$"
        with pytest.raises(ValueError, match=match):
            quantile_huber_loss(*sample[:2], sample[2][:0])
        match = r"^quantile_huber_loss: huber_param must be in \[0, inf\), got inf\.$"
        with pytest.raises(ValueError, match=match):
            quantile_huber_loss(*sample, huber_param=INF)


class TestProposedLevels:
    def test_are_cumulative_probabilities_and_their_middles(self, rng):
        logits = rng.normal(size=(3, 6)).astype(np.float32)
        result = propose_quantile_levels(logits)
        for x, boundaries, midpoints in zip(logits, *result, strict=True):
            weights = [math.exp(v) for v in x]
            tau = [math.fsum(weights[:i]) / math.fsum(weights) for i in range(7)]
            np.testing.assert_allclose(boundaries, tau, rtol=1e-6)
            middles = [(tau[i] + tau[i + 1]) / 2 for i in range(6)]
            np.testing.assert_allclose(midpoints, middles, rtol=1e-6)

    def test_begin_at_zero_end_at_one_and_never_leave(self, rng):
        logits = rng.normal(size=(50, 201)).astype(np.float32) * 10
        boundaries, midpoints = map(np.asarray, propose_quantile_levels(logits))
        assert (boundaries[:, 0] == 0).all()
        assert (boundaries[:, -1] == 1).all()
        assert (np.diff(boundaries) >= 0).all()
        assert ((midpoints >= 0) & (midpoints <= 1)).all()

    def test_one_interval_is_everything(self):
        boundaries, midpoints = propose_quantile_levels(jnp.array([5.0]))
        assert (boundaries.tolist(), midpoints.tolist()) == ([0, 1], [0.5])


class TestProposalLoss:
    def test_descends_the_distance_to_the_quantile_function(self):
        """Of an exponential: the integral of the misfit, by a fine sum."""
        quantiles = lambda tau: -np.log1p(-np.asarray(tau, float))

        def distance(inner):
            tau = np.array([0, *inner, 1])
            fine = (np.arange(200_000) + 0.5) / 200_000
            which = np.searchsorted(tau, fine, side="right") - 1
            middles = (tau[1:] + tau[:-1]) / 2
            return np.abs(quantiles(fine) - quantiles(middles)[which]).mean()

        inner = np.array([0.2, 0.5, 0.7])
        tau = np.float32([0, *inner, 1])
        middles = (tau[1:] + tau[:-1]) / 2
        slope = jax.grad(quantile_proposal_loss)(
            tau, np.float32(quantiles(inner)), np.float32(quantiles(middles))
        )
        assert slope[0] == slope[-1] == 0
        for i, step in enumerate(0.01 * np.eye(3)):
            around = (distance(inner + step) - distance(inner - step)) / 0.02
            np.testing.assert_allclose(slope[i + 1], around, atol=2e-3)

    def test_has_the_gradient_of_the_paper(self, rng):
        logits = rng.normal(size=4).astype(np.float32)
        inner, middle = (rng.normal(size=n).astype(np.float32) for n in (3, 4))
        tau, _ = propose_quantile_levels(logits)
        slope = jax.grad(quantile_proposal_loss)(tau, inner, middle)
        expected = [2 * inner[i - 1] - middle[i] - middle[i - 1] for i in (1, 2, 3)]
        np.testing.assert_allclose(slope, [0, *expected, 0], rtol=1e-5)

    @pytest.mark.parametrize("stop", [True, False])
    def test_trains_levels_alone_unless_told(self, stop, rng):
        args = [rng.normal(size=n).astype(np.float32) for n in (5, 3, 4)]
        fn = lambda *args: quantile_proposal_loss(*args, use_stop_gradient=stop)
        by_levels, *others = jax.grad(fn, (0, 1, 2))(*args)
        assert by_levels[1:-1].all()
        assert all(x.any() != stop for x in others)

    def test_one_interval_has_nothing_to_move(self):
        args = jnp.array([0.0, 1.0]), jnp.zeros(0), jnp.array([3.0])
        assert quantile_proposal_loss(*args) == 0

    def test_quantiles_at_the_ends_are_refused(self):
        match = r"^quantile_proposal_loss: dist_at_boundaries has shape \(3,\)"
        with pytest.raises(ValueError, match=match):
            quantile_proposal_loss(jnp.ones(3), jnp.ones(3), jnp.ones(2))


class TestTruncatedTargets:
    @pytest.mark.parametrize("dropped", [0, 1, 3])
    @pytest.mark.parametrize("bonus", [{}, {"temperature": 0.2, "log_prob_t": -1.5}])
    def test_agree_with_the_paper(self, dropped, bonus, rng):
        dist_t = rng.normal(size=(3, 4)).astype(np.float32)
        kept = sorted(dist_t.ravel().tolist())[: 3 * (4 - dropped)]
        worth = 0.3 if bonus else 0.0
        expected = [0.5 + 0.9 * (z + worth) for z in kept]
        result = truncated_quantile_targets(0.5, 0.9, dist_t, dropped, **bonus)
        np.testing.assert_allclose(result, expected, rtol=1e-5)

    def test_drop_the_highest_whichever_critic_is_theirs(self):
        dist_t = jnp.array([[5.0, 6.0], [1.0, 2.0]])
        assert truncated_quantile_targets(0.0, 1.0, dist_t, 1).tolist() == [1, 2]

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_are_the_reward_alone_after_a_termination(self, bad):
        dist_t, log_prob = jnp.array([[bad, 1.0], [2.0, 3.0]]), jnp.float32(bad)

        def total(dist_t, log_prob):
            settings = {"temperature": 0.2, "log_prob_t": log_prob}
            return truncated_quantile_targets(
                1.5, 0.0, dist_t, 1, **settings, stop_target_gradients=False
            ).sum()

        value, grads = jax.value_and_grad(total, (0, 1))(dist_t, log_prob)
        assert value == 3
        assert not any(np.any(x) for x in grads)

    def test_nan_is_not_dropped_as_if_it_were_high(self):
        dist_t = jnp.array([[NAN, 1.0], [2.0, 3.0]])
        assert np.isnan(truncated_quantile_targets(0.0, 1.0, dist_t, 1)).all()

    def test_infinity_is(self):
        dist_t = jnp.array([[INF, 1.0], [2.0, 3.0]])
        assert truncated_quantile_targets(0.0, 1.0, dist_t, 1).tolist() == [1, 2]

    def test_pass_gradients_to_what_is_kept_only_if_told(self):
        dist_t = jnp.array([[5.0, 6.0], [1.0, 2.0]])
        total = lambda x, stop: truncated_quantile_targets(
            0.0, 0.9, x, 1, stop_target_gradients=stop
        ).sum()
        assert not jax.grad(total)(dist_t, True).any()
        np.testing.assert_allclose(
            jax.grad(total)(dist_t, False), [[0, 0], [0.9, 0.9]], rtol=1e-6
        )

    @pytest.mark.parametrize("dropped", [-1, 2])
    def test_dropping_all_or_fewer_than_none_is_refused(self, dropped):
        match = r"^truncated_quantile_targets: num_dropped must be in \[0, 2\), as "
        with pytest.raises(ValueError, match=match):
            truncated_quantile_targets(0.0, 1.0, jnp.ones((3, 2)), dropped)

    def test_half_an_entropy_term_is_refused(self):
        match = r"^truncated_quantile_targets: temperature and log_prob_t must be given"
        for half in ({"temperature": 0.1}, {"log_prob_t": 0.1}):
            with pytest.raises(ValueError, match=match):
                truncated_quantile_targets(0.0, 1.0, jnp.ones((3, 2)), 1, **half)


def test_an_implicit_quantile_network_learns_what_it_samples(rng):
    """Exactly where the paper's loss is least: at the quantiles of the targets."""
    targets = np.float32(rng.normal(size=101))
    tau = sample_quantile_levels(jax.random.key(0), 5)
    loss = lambda x: quantile_huber_loss(x, tau, targets, huber_param=0.0)
    best = np.float32(np.quantile(targets, tau))
    for step in (-0.1, 0.1):
        assert (np.sign(jax.grad(loss)(best + np.float32(step))) == np.sign(step)).all()
    assert rlprims.QuantileLevels._fields == ("boundaries", "midpoints")

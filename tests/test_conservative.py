"""Conservative penalties, against sums and integrals in double precision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    calibrated_q,
    continuous_cql_penalty,
    cql_lagrange_losses,
    cql_penalty,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

BAD = [np.nan, np.inf, -np.inf]
SHAPE, ACTIONS = (2, 5), 4


def same(got, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def log_sum_exp(xs):
    return math.log(math.fsum(map(math.exp, xs)))


def rows(fn, *arrays):
    """Applies `fn` in each place, to vectors and to numbers."""
    each = [[np.float64(x[i]).tolist() for x in arrays] for i in np.ndindex(SHAPE)]
    return np.reshape([fn(*args) for args in each], SHAPE)


@pytest.fixture
def batch(rng):
    q = rng.normal(scale=2, size=(*SHAPE, ACTIONS)).astype(np.float32)
    actions = rng.integers(ACTIONS, size=SHAPE).astype(np.int32)
    legal = rng.uniform(size=q.shape) < 0.5
    np.put_along_axis(legal, actions[..., None], True, -1)
    return q, actions, legal


class TestDiscretePenalty:
    def test_is_the_soft_maximum_of_legal_actions_less_the_action_taken(self, batch):
        q, actions, legal = batch

        def by_hand(q, action, legal, heat):
            kept = [x / heat for x, yes in zip(q, legal, strict=True) if yes]
            return heat * log_sum_exp(kept) - q[int(action)]

        fn = functools.partial(cql_penalty, q, actions)
        hot = functools.partial(by_hand, heat=0.25)
        expected = rows(hot, q, actions, legal)
        penalty = fn(mask=legal, temperature=0.25, reduction="none")
        same(penalty, expected)
        same(fn(mask=legal, temperature=0.25), expected.mean())
        expected = rows(functools.partial(by_hand, heat=1), q, actions, legal | True)
        same(fn(reduction="sum"), expected.sum())

    def test_pushes_down_by_the_softmax_and_the_action_taken_up(self, rng):
        q = rng.normal(size=4).astype(np.float32)
        slopes = jax.grad(cql_penalty)(q, 2, temperature=0.5)
        softmax = np.exp(2 * q) / np.exp(2 * q).sum()
        same(slopes, softmax - np.eye(4)[2])

    def test_of_one_action_it_is_nothing(self):
        one = jnp.array([[7.0, 3.0]])
        mask = jnp.array([[True, False]])
        fn = jax.value_and_grad(functools.partial(cql_penalty, mask=mask))
        penalty, slopes = fn(one, jnp.array([0]))
        assert (penalty, slopes.tolist()) == (0, [[0, 0]])
        assert cql_penalty(jnp.array([7.0]), 0) == 0

    def test_saturates_without_overflow(self):
        q = jnp.array([[1e30, -1e30], [-1e4, 1e4]])
        fn = jax.value_and_grad(cql_penalty, 0)
        penalty, slopes = fn(q, jnp.array([0, 0]), reduction="sum")
        same(penalty, 2e4)
        same(slopes, [[0, 0], [-1, 1]])

    @pytest.mark.parametrize("bad", BAD)
    def test_what_is_not_legal_or_padding_counts_for_nothing(self, bad):
        q = jnp.array([[0.0, 0.0, bad], [bad, bad, bad]])
        mask = jnp.array([[True, True, False], [False, False, False]])
        counts = jnp.array([True, False])

        def fn(q, heat):
            actions = jnp.array([0, 9])
            masks = {"mask": mask, "mask_t": counts}
            return cql_penalty(q, actions, temperature=heat, **masks)

        with jax.debug_nans(True):
            penalty, slopes = jax.jit(jax.value_and_grad(fn, (0, 1)))(q, 2.0)
        same(penalty, 2 * math.log(2))
        same(slopes[0], [[-0.5, 0.5, 0], [0, 0, 0]])
        same(slopes[1], math.log(2))

    def test_where_no_action_is_legal_there_is_none_and_no_gradient(self):
        fn = functools.partial(cql_penalty, mask=jnp.zeros(2, bool))
        penalty, slopes = jax.value_and_grad(fn)(jnp.ones(2), 0)
        assert np.isnan(penalty)
        assert slopes.tolist() == [0, 0]

    def test_an_action_that_cannot_have_been_taken_shows(self):
        q, mask = jnp.ones(2), jnp.array([True, False])
        assert cql_penalty(q, 1, mask=mask) == math.inf
        assert np.isnan(cql_penalty(q, 2))
        assert np.isnan(cql_penalty(q, -1))


class TestContinuousPenalty:
    def test_is_the_log_of_the_mean_of_ratios_less_the_action_taken(self, rng):
        q, samples = rng.normal(size=(2, *SHAPE, 6)).astype(np.float32)
        log_probs = rng.normal(size=(*SHAPE, 6)).astype(np.float32)
        taken = q[..., 0]

        def by_hand(taken, samples, log_probs, heat):
            pairs = zip(samples, log_probs, strict=True)
            ratios = [math.exp(x / heat - log_mu) for x, log_mu in pairs]
            return heat * math.log(math.fsum(ratios) / 6) - taken

        for heat in (1, 0.5):
            fn = functools.partial(by_hand, heat=heat)
            expected = rows(fn, taken, samples, log_probs)
            settings = {"temperature": float(heat), "reduction": "none"}
            same(
                continuous_cql_penalty(taken, samples, log_probs, **settings), expected
            )

    def test_estimates_the_integral_over_actions_from_several_distributions(self, rng):
        """Of exp(-a^2 / 2 / 0.5) for actions in [-2, 2], from two of them."""
        n, heat = 200_000, 0.5
        uniform = rng.uniform(-2, 2, size=n)
        sloped = 2 - 4 * np.sqrt(rng.uniform(size=n))  # of density (2 - a) / 8
        actions = np.concatenate([uniform, sloped])
        log_probs = np.log(np.concatenate([np.full(n, 0.25), (2 - sloped) / 8]))
        penalty = continuous_cql_penalty(
            *np.float32([0.75]),
            np.float32(-(actions**2) / 2),
            np.float32(log_probs),
            temperature=heat,
        )
        middles = (np.arange(40_000) + 0.5) / 10_000 - 2
        integral = np.exp(-(middles**2) / 2 / heat).sum() / 10_000
        same(penalty, heat * math.log(integral) - 0.75, rtol=0, atol=0.005)

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_are_those_derived_by_hand(self, rng, stop):
        samples, log_probs = rng.normal(size=(2, 5)).astype(np.float32)

        def fn(taken, samples, log_probs):
            settings = {"temperature": 0.5, "use_stop_gradient": stop}
            return continuous_cql_penalty(taken, samples, log_probs, **settings)

        slopes = jax.grad(fn, (0, 1, 2))(jnp.float32(3), samples, log_probs)
        ratios = np.exp(samples / 0.5 - log_probs)
        weights = ratios / ratios.sum()
        same(slopes[0], -1)
        same(slopes[1], weights)
        same(slopes[2], -0.5 * weights * (not stop))

    def test_of_one_sample_it_is_the_difference_and_its_log_density(self):
        penalty = continuous_cql_penalty(
            2.0, jnp.array([5.0]), jnp.array([-1.0]), temperature=3.0
        )
        same(penalty, 5 + 3 - 2)

    def test_huge_values_and_samples_left_out_make_nothing_nan(self):
        samples = jnp.array([[1e30, 0.0], [1.0, -jnp.inf], [-jnp.inf, -jnp.inf]])

        def fn(samples, heat):
            return continuous_cql_penalty(
                jnp.zeros(3),
                samples,
                jnp.zeros((3, 2)),
                temperature=heat,
                reduction="none",
            )

        same(fn(samples, 1.0), [1e30, 1 - math.log(2), -math.inf])
        slopes = jax.jacrev(fn)(samples, 1.0)
        expected = [[1, 0], [1, 0], [0, 0]]
        same(jnp.einsum("iij->ij", slopes), expected)
        by_heat = jax.jacrev(fn, 1)(samples[1:2].repeat(3, axis=0), 1.0)
        same(by_heat, np.full(3, -math.log(2)))

    def test_where_all_samples_are_left_out_no_gradient_reaches_their_densities(self):
        def fn(samples, log_probs):
            settings = {"temperature": 1.0, "use_stop_gradient": False}
            return continuous_cql_penalty(0.0, samples, log_probs, **settings)

        args = jnp.full(2, -jnp.inf), jnp.zeros(2)
        penalty, slopes = jax.value_and_grad(fn, (0, 1))(*args)
        assert penalty == -math.inf
        same(slopes, np.zeros((2, 2)))

    @pytest.mark.parametrize("bad", BAD)
    def test_padding_counts_for_nothing(self, bad):
        taken, samples = jnp.array([1.0, bad]), jnp.array([[2.0, 2.0], [bad, 0.0]])
        mask = jnp.array([True, False])

        def fn(taken, samples, log_probs, heat):
            settings = {"temperature": heat, "use_stop_gradient": False}
            return continuous_cql_penalty(
                taken, samples, log_probs, mask_t=mask, **settings
            )

        args = taken, samples, samples, 2.0
        penalty, slopes = jax.value_and_grad(fn, range(4))(*args)
        same(penalty, 2 * (2 / 2 - 2) - 1)
        same(slopes[0], [-1, 0])
        same(slopes[1], [[0.5, 0.5], [0, 0]])
        same(slopes[2], [[-1, -1], [0, 0]])
        same(slopes[3], -2)


class TestCalibration:
    def test_raises_values_to_the_reference_of_their_state(self, rng):
        q, v = rng.normal(size=(*SHAPE, 3)), rng.normal(size=SHAPE)
        q, v = np.float32(q), np.float32(v)
        expected = [[max(x, v[i]) for x in q[i]] for i in np.ndindex(SHAPE)]
        same(calibrated_q(q, v), np.reshape(expected, q.shape))
        same(calibrated_q(q, np.full_like(v, -np.inf)), q)

    @pytest.mark.parametrize("stop", [True, False])
    def test_no_gradient_reaches_what_was_raised(self, stop):
        fn = lambda q, v: calibrated_q(q, v, use_stop_gradient=stop).sum()
        by_q, by_v = jax.grad(fn, (0, 1))(jnp.array([1.0, 5.0, 2.0]), 3.0)
        assert by_q.tolist() == [0, 1, 0]
        assert by_v == 2 * (not stop)

    def test_makes_a_penalty_pull_no_lower_than_the_reference(self):
        """The sampled values end above it, where the plain penalty has no floor."""

        def fn(q):
            return continuous_cql_penalty(0.0, calibrated_q(q, 3.0), jnp.zeros(2))

        slopes = jax.grad(fn)(jnp.array([2.0, 4.0]))
        assert slopes[0] == 0 < slopes[1]

    def test_an_unknown_value_is_not_hidden(self):
        assert np.isnan(calibrated_q(jnp.array([jnp.nan]), 3.0)).all()


class TestLagrange:
    def test_one_loss_is_minus_the_other(self, rng):
        penalty, threshold = rng.normal(size=(2, 6)).astype(np.float32)
        losses = cql_lagrange_losses(
            penalty, 1.5, threshold=threshold, reduction="none"
        )
        same(losses[0], 1.5 * (penalty - threshold))
        same(losses[1], -1.5 * (penalty - threshold))

    @pytest.mark.parametrize("stop", [True, False])
    def test_each_trains_its_own_variable(self, stop):
        def fn(penalty, multiplier, threshold):
            settings = {"threshold": threshold, "use_stop_gradient": stop}
            return jnp.stack(cql_lagrange_losses(penalty, multiplier, **settings))

        slopes = jax.jacrev(fn, (0, 1, 2))(jnp.array([3.0, 5.0]), 2.0, 1.0)
        flows = not stop
        same(slopes[0], [[1, 1], [-flows, -flows]])
        same(slopes[1], [3 * flows, -3])
        same(slopes[2], [-2 * flows, 2 * flows])

    def test_the_multiplier_rises_while_the_penalty_is_above_the_threshold(self):
        fn = lambda alpha, penalty: cql_lagrange_losses(penalty, alpha, threshold=1.0)
        slope = jax.grad(lambda *args: fn(*args)[1])
        assert slope(2.0, jnp.array([3.0])) < 0 < slope(2.0, jnp.array([0.5]))

    @pytest.mark.parametrize("bad", BAD)
    def test_padding_and_a_multiplier_of_zero_cut_exactly(self, bad):
        mask = jnp.array([True, True, False])
        args = jnp.array([3.0, bad, bad]), jnp.array([2.0, 0.0, bad])

        def fn(penalty, multiplier):
            settings = {"threshold": 1.0, "mask_t": mask, "use_stop_gradient": False}
            return jnp.stack(cql_lagrange_losses(penalty, multiplier, **settings))

        same(fn(*args), [2, -2])
        slopes = jax.jacrev(fn, (0, 1))(*args)
        same(slopes[0], [[1, 0, 0], [-1, 0, 0]])
        same(slopes[1], [[1, 0, 0], [-1, 0, 0]])

    def test_goes_with_a_penalty(self, batch):
        q, actions, _ = batch
        fn = functools.partial(cql_penalty, q, actions)
        each = cql_lagrange_losses(fn(reduction="none"), 2.0, threshold=1.0)
        mean = cql_lagrange_losses(fn(), 2.0, threshold=1.0)
        same(each, mean)

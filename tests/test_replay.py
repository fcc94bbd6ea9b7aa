"""Prioritised replay, against loops in double precision and what is known by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    actor_epsilons,
    huber_loss,
    l2_loss,
    pal_loss,
    prioritized_importance_weights,
    prioritized_probabilities,
    proportional_priorities,
    rank_priorities,
    sequence_priorities,
)

NAN, INF = np.nan, np.inf


def same(got, expected, rtol=1e-6, atol=0.0):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def in_double_precision(fn):
    """Computes in float64, in one program."""

    def run(*args, **kwargs):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, jax.jit(fn)(*args, **kwargs))

    return run


class TestProportionalPriorities:
    def test_are_sizes_and_something_more(self):
        td_errors = jnp.array([[-2.0, 0.0], [0.5, 3.0]])
        priorities = proportional_priorities(td_errors, epsilon=0.25)
        assert priorities.tolist() == [[2.25, 0.25], [0.75, 3.25]]
        assert proportional_priorities(td_errors).tolist() == [[2, 0], [0.5, 3]]

    def test_do_not_fall_below_the_least(self):
        td_errors = jnp.array([-2.0, 0.0, 0.5])
        assert proportional_priorities(td_errors, min_priority=1.0).tolist() == [
            2,
            1,
            1,
        ]

    def test_what_is_added_counts_towards_the_least(self):
        settings = {"epsilon": 0.5, "min_priority": 1.0}
        assert proportional_priorities(jnp.array([0.25, 2.0]), **settings).tolist() == [
            1,
            2.5,
        ]

    @pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.0])
    def test_with_a_least_of_one_are_those_of_lap(self, rng, alpha):
        td_errors = 3 * rng.normal(size=20)
        lap = np.maximum(np.abs(td_errors) ** alpha, 1)
        priorities = proportional_priorities(np.float32(td_errors), min_priority=1.0)
        probs = prioritized_probabilities(priorities, priority_exponent=alpha)
        same(probs, lap / lap.sum(), rtol=1e-5)

    def test_what_is_left_out_has_none(self):
        td_errors, mask = jnp.array([NAN, -2.0, INF]), jnp.array([False, True, False])
        settings = {"epsilon": 0.5, "min_priority": 1.0, "mask": mask}
        total = lambda x: proportional_priorities(x, **settings).sum()
        assert proportional_priorities(td_errors, **settings).tolist() == [0, 2.5, 0]
        assert jax.grad(total)(td_errors).tolist() == [0, -1, 0]

    def test_an_error_that_is_not_a_number_shows(self):
        assert np.isnan(proportional_priorities(jnp.array([NAN]), min_priority=1.0))

    @pytest.mark.parametrize("name", ["epsilon", "min_priority"])
    def test_a_negative_setting_is_refused(self, name):
        with pytest.raises(
            ValueError, match=rf"^proportional_priorities: {name} must be in \[0, inf\)"
        ):
            proportional_priorities(jnp.ones(2), **{name: -0.1})


class TestRankPriorities:
    def by_hand(self, td_errors, mask):
        """One over one more than the number of those that are ahead."""
        sizes, result = np.abs(td_errors), np.zeros(len(td_errors))
        for i in np.flatnonzero(mask):
            ahead = sum(
                sizes[j] > sizes[i] or (sizes[j] == sizes[i] and j < i)
                for j in np.flatnonzero(mask)
            )
            result[i] = 1 / (1 + ahead)
        return result

    def test_are_one_over_the_rank_whatever_is_left_out(self, rng):
        for _ in range(20):
            td_errors = rng.integers(-3, 4, size=9).astype(np.float32)  # many are equal
            mask = rng.uniform(size=9) < 0.7
            spoilt = np.where(mask, td_errors, rng.choice([NAN, INF, 100.0]))
            same(
                rank_priorities(np.float32(spoilt), mask=mask),
                self.by_hand(td_errors, mask),
            )

    def test_of_equal_errors_the_first_is_ahead(self):
        assert rank_priorities(jnp.array([1.0, -1.0, 1.0, 2.0])).tolist() == [
            0.5,
            np.float32(1 / 3),
            0.25,
            1,
        ]

    def test_do_not_depend_on_the_scale(self, rng):
        td_errors = rng.normal(size=9).astype(np.float32)
        same(rank_priorities(1e30 * td_errors), rank_priorities(td_errors), rtol=0)

    def test_an_infinite_error_is_the_first(self):
        assert rank_priorities(jnp.array([1.0, -INF])).tolist() == [0.5, 1]

    def test_one_that_is_not_a_number_shows_and_is_the_last(self):
        same(rank_priorities(jnp.array([NAN, 0.0, 2.0])), [NAN, 0.5, 1])

    def test_have_no_gradient(self):
        assert not jax.grad(lambda x: rank_priorities(x).sum())(jnp.arange(4.0)).any()

    def test_of_many_are_exact_in_half_precision(self):
        """Ranks above 256 are no numbers of bfloat16, but what they divide may be."""
        td_errors = jnp.zeros(512, jnp.bfloat16)
        same(rank_priorities(td_errors)[jnp.array([255, 511])], [1 / 256, 1 / 512])


class TestSequencePriorities:
    @pytest.mark.parametrize("eta", [0.0, 0.25, 0.9, 1.0])
    def test_mix_the_largest_and_the_mean(self, rng, eta):
        td_errors = rng.normal(size=7)
        sizes = np.abs(td_errors)
        expected = eta * sizes.max() + (1 - eta) * sizes.mean()
        got = sequence_priorities(np.float32(td_errors), max_priority_weight=eta)
        same(got, expected)

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    def test_an_infinite_error_has_an_infinite_priority(self, eta):
        td_errors = jnp.array([1.0, -INF])
        assert sequence_priorities(td_errors, max_priority_weight=eta) == INF

    def test_the_largest_counts_for_nine_tenths_as_in_the_paper(self):
        same(sequence_priorities(jnp.array([1.0, -3.0])), 0.9 * 3 + 0.1 * 2)

    @pytest.mark.parametrize("bad", [NAN, INF, 50.0])
    def test_padding_and_burn_in_contribute_to_neither(self, bad):
        td_errors = jnp.array([bad, 1.0, -3.0, bad])
        mask = jnp.array([False, True, True, False])
        fn = functools.partial(sequence_priorities, mask_t=mask)
        priority, slopes = jax.value_and_grad(fn)(td_errors)
        same(priority, 0.9 * 3 + 0.1 * 2)
        same(slopes, [0, 0.05, -0.95, 0])

    def test_without_any_step_it_is_zero(self):
        nothing = sequence_priorities(jnp.full(3, NAN), mask_t=jnp.zeros(3, bool))
        assert nothing == sequence_priorities(jnp.zeros(0)) == 0

    @pytest.mark.parametrize("eta", [-0.1, 1.1])
    def test_a_weight_out_of_range_is_refused(self, eta):
        with pytest.raises(
            ValueError, match=r"^sequence_priorities: max_priority_weight must be in"
        ):
            sequence_priorities(jnp.ones(2), max_priority_weight=eta)


def probabilities(priorities, exponent, mask=None):
    return np.asarray(
        prioritized_probabilities(
            np.float32(priorities), priority_exponent=exponent, mask=mask
        )
    )


class TestProbabilities:
    @pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 3.0])
    def test_are_powers_over_their_sum(self, rng, alpha):
        for _ in range(10):
            priorities = rng.exponential(size=11)
            mask = rng.uniform(size=11) < 0.6
            mask[0] = True
            powers = np.where(mask, priorities**alpha, 0)
            probs = probabilities(priorities, alpha, mask)
            same(probs, powers / powers.sum(), rtol=2e-6)
            assert not probs[~mask].any()

    def test_of_tiny_and_huge_priorities_neither_vanish_nor_overflow(self):
        same(probabilities([1e-30, 3e-30], 2.0), [0.1, 0.9], rtol=1e-4)
        same(probabilities([1e30, 3e30], 2.0), [0.1, 0.9], rtol=1e-4)
        same(probabilities([2e38, 2e38, 2e38], 1.0), [1 / 3] * 3)
        ratio = 10**0.74
        rest = [1 / (1 + ratio), ratio / (1 + ratio)]
        same(probabilities([1e-37, 1e37], 0.01), rest, rtol=1e-5)

    def test_of_the_smallest_numbers_are_probabilities(self):
        """Whether or not the device takes a denormal number for zero."""
        probs = probabilities([1e-40, 1e-40], 1.0)
        same(probs, [0.5, 0.5])
        same(probabilities([1e-40, 0.0, 1.0], 1.0), [0, 0, 1], atol=1e-30)

    def test_an_exponent_of_zero_draws_all_filled_slots_alike(self):
        """Even those of priority zero, whose power is then one."""
        mask = np.array([True, True, False, True])
        same(probabilities([0.0, 5.0, 7.0, 1e-9], 0.0, mask), [1 / 3, 1 / 3, 0, 1 / 3])
        near = probabilities([0.0, 5.0, 7.0, 1.0], 1e-6, mask)
        same(near, [0, 0.5, 0, 0.5], rtol=1e-5)

    def test_a_traced_exponent_of_zero_does_the_same(self):
        run = jax.jit(lambda p, a: prioritized_probabilities(p, priority_exponent=a))
        assert run(jnp.array([0.0, 5.0]), jnp.array(0.0)).tolist() == [0.5, 0.5]
        assert run(jnp.array([0.0, 5.0]), jnp.array(0.5)).tolist() == [0, 1]

    def test_without_any_priority_all_filled_slots_are_drawn_alike(self):
        mask = np.array([True, False, True])
        assert probabilities([0.0, 3.0, 0.0], 0.6, mask).tolist() == [0.5, 0, 0.5]

    def test_of_an_empty_buffer_are_zero(self):
        for alpha in (0.0, 0.6):
            empty = np.zeros(3, bool)
            assert not probabilities([1.0, NAN, 0.0], alpha, empty).any()

    def test_of_one_slot_is_one(self):
        for priority in (0.0, 1e-30, 7.0):
            assert probabilities([priority], 0.6) == 1

    @pytest.mark.parametrize("bad", [NAN, INF, -1.0])
    def test_an_empty_slot_may_hold_anything(self, bad):
        mask = jnp.array([True, False, True])
        priorities = jnp.array([1.0, bad, 3.0])

        def first(p, a):
            return prioritized_probabilities(p, priority_exponent=a, mask=mask)[0]

        value, (slopes, by_exponent) = jax.value_and_grad(first, (0, 1))(
            priorities, 1.0
        )
        same(value, 0.25)
        same(slopes, [3 / 16, 0, -1 / 16])
        same(by_exponent, -3 / 16 * np.log(3), rtol=1e-5)

    @pytest.mark.parametrize("bad", [NAN, INF, -1.0])
    def test_a_filled_slot_must_hold_a_priority(self, bad):
        assert np.isnan(probabilities([1.0, bad], 0.6)).any()

    @pytest.mark.parametrize("alpha", [0.0, 0.6])
    def test_gradients_are_numbers_where_a_priority_is_zero(self, alpha):
        weigh = jnp.array([1.0, 2.0, 3.0])
        for priorities in (jnp.array([0.0, 1.0, 2.0]), jnp.zeros(3)):
            fn = lambda p, a: weigh @ prioritized_probabilities(p, priority_exponent=a)
            for slope in jax.grad(fn, (0, 1))(priorities, alpha):
                assert np.isfinite(slope).all()

    def test_do_not_depend_on_the_unit(self, rng):
        priorities = rng.exponential(size=7)
        same(
            probabilities(1e6 * priorities, 0.6),
            probabilities(priorities, 0.6),
            rtol=1e-5,
        )

    def test_sum_to_one_over_a_large_buffer(self, rng):
        priorities = rng.exponential(size=100_000)
        probs = probabilities(priorities, 0.6)
        powers = priorities**0.6
        same(probs.sum(dtype=np.float64), 1, rtol=1e-5)
        same(probs, powers / powers.sum(), rtol=1e-5)

    def test_a_negative_exponent_is_refused(self):
        with pytest.raises(
            ValueError, match=r"^prioritized_probabilities: priority_exponent must be"
        ):
            probabilities([1.0], -0.1)


def weights(probs, exponent, reference=None):
    return np.asarray(
        prioritized_importance_weights(
            np.float32(probs),
            importance_exponent=exponent,
            reference_probability=reference,
        )
    )


class TestImportanceWeights:
    @pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("size", [8.0, 1e6])
    def test_are_those_of_the_paper_whatever_the_size_of_the_buffer(
        self, rng, beta, size
    ):
        probs = rng.dirichlet(np.ones(8))
        raw = (size * probs) ** -beta
        same(weights(probs, beta), raw / raw.max(), rtol=1e-5)

    def test_may_be_relative_to_the_whole_buffer(self, rng):
        buffer = rng.dirichlet(np.ones(50))
        drawn = np.sort(buffer)[20:30]
        raw, most = (50 * drawn) ** -0.4, ((50 * buffer) ** -0.4).max()
        got = weights(drawn, 0.4, np.float32(buffer.min()))
        same(got, raw / most, rtol=1e-5)
        assert (got < 1).all()

    def test_may_be_left_as_they_are(self, rng):
        probs = rng.dirichlet(np.ones(8))
        same(weights(probs, 0.4, 1 / 8), (8 * probs) ** -0.4, rtol=1e-5)

    def test_with_an_exponent_of_one_undo_the_bias(self, rng):
        """The weighted mean over what is drawn is the mean, up to its size."""
        td_errors = rng.normal(size=12)
        priorities = proportional_priorities(np.float32(td_errors), epsilon=0.01)
        probs = prioritized_probabilities(priorities, priority_exponent=0.6)
        expected = np.float64(probs) * weights(probs, 1.0)
        same(expected / expected.sum(), np.full(12, 1 / 12), rtol=1e-5)

    def test_an_exponent_of_zero_leaves_the_bias(self):
        assert weights([0.1, 0.2, 0.7], 0.0).tolist() == [1, 1, 1]

    def test_what_cannot_be_drawn_has_none_and_does_not_count(self):
        for beta, rest in ((1.0, 0.25), (0.0, 1)):
            assert weights([0.0, 0.5, 0.125], beta).tolist() == [0, rest, 1]
            got = weights([0.0, 0.5, 0.125], beta, 0.125)
            assert got.tolist() == [0, rest, 1]
        assert weights([0.0, 0.0], 0.5).tolist() == [0, 0]

    def test_gradients_are_numbers_where_a_probability_is_zero(self):
        def total(probs, beta):
            return prioritized_importance_weights(probs, importance_exponent=beta).sum()

        slope = jax.grad(total, (0, 1))
        for probs in ([0.0, 0.5, 0.125], [0.0, 0.0, 0.0]):
            by_probs, by_beta = slope(jnp.array(probs), 1.0)
            assert by_probs[0] == 0
            assert np.isfinite([*by_probs, by_beta]).all()
        same(slope(jnp.array([0.0, 0.5, 0.125]), 1.0)[0], [0, -0.5, 2])
        assert slope(jnp.array([1.0, 0.0]), 1.0)[0].tolist() == [0, 0]

    def test_of_unlikely_draws_do_not_overflow(self):
        same(weights([1e-30, 4e-30], 0.5), [1, 0.5], rtol=1e-5)
        same(weights([1e-37, 1.0], 0.1), [1, 10**-3.7], rtol=1e-5)
        same(weights([1e-37, 1.0], 1.0, 1e-37), [1, 1e-37], rtol=1e-4)
        same(weights([1e-37, 1.0], 1.0, 1.0), [1e37, 1], rtol=1e-4)

    def test_the_largest_of_a_batch_of_any_shape_is_one(self, rng):
        probs = rng.dirichlet(np.ones(6)).reshape(2, 3)
        got = weights(probs, 0.7)
        assert got.shape == (2, 3)
        assert got.max() == got.reshape(-1)[probs.argmin()] == 1

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("importance_exponent", -0.1),
            ("reference_probability", 0.0),
            ("reference_probability", 1.5),
        ],
    )
    def test_a_setting_out_of_range_is_refused(self, name, value):
        settings = {"importance_exponent": 0.5} | {name: value}
        with pytest.raises(
            ValueError, match=f"^prioritized_importance_weights: {name} must be in"
        ):
            prioritized_importance_weights(jnp.ones(2), **settings)


class TestPalLoss:
    def by_hand(self, td_errors, alpha):
        lam = np.mean([max(abs(x) ** alpha, 1) for x in td_errors])
        pieces = [
            0.5 * x**2 if abs(x) <= 1 else abs(x) ** (1 + alpha) / (1 + alpha)
            for x in td_errors
        ]
        return np.array(pieces) / lam

    @pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.5])
    def test_is_that_of_the_paper(self, rng, alpha):
        td_errors = np.append(3 * rng.normal(size=20), [0, 1, -1, 1 + 1e-3])
        expected = self.by_hand(td_errors, alpha)
        call = functools.partial(
            pal_loss, np.float32(td_errors), priority_exponent=alpha
        )
        same(call(reduction="none"), expected, rtol=1e-5)
        same(call(), expected.mean(), rtol=1e-5)
        same(call(reduction="sum"), expected.sum(), rtol=1e-5)

    @pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.0])
    def test_expected_gradient_is_that_of_huber_under_prioritised_draws(
        self, rng, alpha
    ):
        """Both over all of a buffer: every draw, times how likely it is."""
        targets = 3 * rng.normal(size=40)
        features = rng.normal(size=(40, 3))
        params = rng.normal(size=3)
        td_errors = lambda params: targets - features @ params

        def prioritised(params):
            priorities = proportional_priorities(td_errors(params), min_priority=1.0)
            probs = prioritized_probabilities(priorities, priority_exponent=alpha)
            return jax.lax.stop_gradient(probs) @ huber_loss(td_errors(params))

        def uniform(params):
            return pal_loss(td_errors(params), priority_exponent=alpha)

        both = lambda params: (jax.grad(prioritised)(params), jax.grad(uniform)(params))
        lap, pal = in_double_precision(both)(params)
        same(pal, lap, rtol=1e-12)
        errors = td_errors(params)
        powers = np.maximum(np.abs(errors) ** alpha, 1)
        by_hand = -(powers * np.clip(errors, -1, 1)) @ features / powers.sum()
        same(pal, by_hand, rtol=1e-12)

    def test_the_normaliser_is_a_constant(self):
        td_errors = jnp.array([2.0, 0.5])
        fn = functools.partial(pal_loss, priority_exponent=1.0, reduction="sum")
        same(jax.grad(fn)(td_errors), np.array([2, 0.5]) / 1.5)

    def test_with_an_exponent_of_zero_slopes_are_those_of_huber(self):
        td_errors = jnp.array([-5.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
        pal = jax.grad(lambda x: pal_loss(x, priority_exponent=0.0, reduction="sum"))
        assert pal(td_errors).tolist() == [-1, -1, -0.5, 0, 0.5, 1, 1]

    def test_with_an_exponent_of_one_it_is_the_squared_error_scaled(self, rng):
        td_errors = np.float32(3 * rng.normal(size=9))
        scale = np.maximum(np.abs(td_errors), 1).mean()
        got = pal_loss(td_errors, priority_exponent=1.0, reduction="none")
        same(got, l2_loss(td_errors) / scale, rtol=1e-5)

    def test_curvature_is_that_of_its_pieces(self):
        fn = lambda x: pal_loss(x, priority_exponent=1.0)
        for x, expected in ((0.0, 1), (0.5, 1), (-2.0, 0.5)):
            same(jax.grad(jax.grad(fn))(x), expected, rtol=1e-5)

    @pytest.mark.parametrize("bad", [NAN, INF, 100.0])
    def test_padding_counts_in_neither_the_loss_nor_the_normaliser(self, bad):
        td_errors, mask = jnp.array([2.0, bad, 0.5]), jnp.array([True, False, True])
        fn = functools.partial(pal_loss, priority_exponent=1.0, mask_t=mask)
        loss, slopes = jax.value_and_grad(fn)(td_errors)
        same(loss, (2 + 0.125) / 1.5 / 2)
        same(slopes, np.array([2, 0, 0.5]) / 1.5 / 2)
        assert fn(td_errors, reduction="none")[1] == 0

    def test_of_padding_alone_is_zero(self):
        nothing = {"priority_exponent": 0.4, "mask_t": jnp.zeros(2, bool)}
        fn = functools.partial(pal_loss, **nothing)
        loss, slopes = jax.value_and_grad(fn)(jnp.array([NAN, 3.0]))
        assert loss == 0
        assert not slopes.any()

    def test_huge_errors_do_not_spoil_small_ones(self):
        fn = functools.partial(pal_loss, priority_exponent=0.4, reduction="none")
        slope = jax.grad(lambda x: fn(x)[0])(jnp.array([0.5, 1e25]))
        assert np.isfinite(slope).all()

    def test_takes_any_shape(self, rng):
        td_errors = np.float32(3 * rng.normal(size=(2, 3)))
        fn = functools.partial(pal_loss, priority_exponent=0.4, reduction="none")
        assert fn(td_errors).shape == (2, 3)
        same(fn(td_errors).reshape(-1), fn(td_errors.reshape(-1)))


class TestActorEpsilons:
    def test_are_those_of_the_paper(self):
        expected = [0.4 ** (1 + 7 * i / 255) for i in range(256)]
        same(actor_epsilons(jnp.arange(256), 256), expected, rtol=1e-5)
        same(actor_epsilons(0, 360), 0.4)
        same(actor_epsilons(359, 360), 0.4**8, rtol=1e-5)

    def test_of_one_actor_is_that_of_the_first(self):
        same(actor_epsilons(0, 1), 0.4)

    def test_of_no_such_actor_is_not_a_number(self):
        index = jnp.array([-1, 0, 3, 4], jnp.int8)
        got = actor_epsilons(index, 4, epsilon=0.5)
        assert np.isnan(got).tolist() == [True, False, False, True]

    def test_bounds_are_themselves(self):
        index = jnp.arange(3)
        assert actor_epsilons(index, 3, epsilon=0.0).tolist() == [0, 0, 0]
        assert actor_epsilons(index, 3, epsilon=1.0).tolist() == [1, 1, 1]
        same(actor_epsilons(index, 3, exponent=0.0), [0.4] * 3)

    def test_gradients_are_numbers_at_the_bounds_and_for_no_such_actor(self):
        index = jnp.array([-1, 0, 2])
        for epsilon, exponent in itertools.product((0.0, 1.0), (0.0, 7.0)):
            fn = lambda e, a: jnp.nansum(
                actor_epsilons(index, 3, epsilon=e, exponent=a)
            )
            assert np.isfinite(jax.grad(fn, (0, 1))(epsilon, exponent)).all()

    def test_one_actor_at_least(self):
        with pytest.raises(ValueError, match=r"^actor_epsilons: num_actors must be in"):
            actor_epsilons(0, 0)

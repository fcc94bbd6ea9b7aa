"""Planning with Gumbel noise, against loops in double precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.gumbel_planning import (
    completed_action_values,
    gumbel_action_scores,
    gumbel_improved_policy,
    gumbel_perturbed_logits,
    mixed_value,
    scaled_action_values,
)
from rlprims.planning import sequential_halving_visits

pytestmark = pytest.mark.usefixtures("quick_to_compile")

LEAD = (3, 6)
ACTIONS = 5


def random_search(rng):
    """Logits, values, visits and legal actions; what must not matter is NaN."""
    logits, q = np.float32(rng.normal(size=(2, *LEAD, ACTIONS)))
    v = np.float32(rng.normal(size=LEAD))
    visits = rng.integers(4, size=logits.shape).astype(np.int32)
    mask = rng.uniform(size=logits.shape) < 0.7
    mask[0, 0], mask[0, 1] = False, True
    visits[1, 1] = 0  # a search that has not begun
    visits[2, 2] += 1  # and one that was everywhere
    mask[1, 2:4] = True
    logits[1, 2, 0], visits[1, 2, 0] = -np.inf, 3  # visits to what is never taken
    logits[1, 3, 1:], visits[1, 3] = -np.inf, [0, 2, 0, 1, 0]  # and none to what is
    hidden = ~mask | (visits == 0)
    return (
        np.where(mask, logits, np.nan),
        v,
        np.where(hidden, np.nan, q),
        visits,
        mask,
    )


class ByHand:
    """One state, its legal actions alone, in double precision."""

    def __init__(self, logits, v, q, visits):
        self.logits = [float(x) for x in logits]
        self.v, self.visits = float(v), [int(n) for n in visits]
        self.q = [float(x) for x in q]

    def mixed(self):
        mass = value = 0.0
        for logit, q, n in zip(self.logits, self.q, self.visits, strict=True):
            if n > 0 and logit > -np.inf:
                mass += np.exp(logit)
                value += np.exp(logit) * q
        if mass == 0:
            return self.v
        total = sum(self.visits)
        return (self.v + total * value / mass) / (1 + total)

    def completed(self):
        pairs = zip(self.q, self.visits, strict=True)
        return [q if n > 0 else self.mixed() for q, n in pairs]

    def scaled(self, c_visit=50.0, c_scale=1.0, rescale=False):
        values = np.array(self.completed())
        if rescale:
            span = values.max() - values.min()
            values = (values - values.min()) / (span if span > 0 else 1.0)
        return (c_visit + max(self.visits)) * c_scale * values

    def policy(self, **settings):
        scores = np.array(self.logits) + self.scaled(**settings)
        powers = np.exp(scores - scores.max())
        return powers / powers.sum()


def by_hand(search, method, fill, **settings):
    """The result of each state, with `fill` for what is not legal."""
    logits, v, q, visits, mask = search
    expected = np.full(logits.shape, fill)
    for i in np.ndindex(LEAD):
        legal = mask[i]
        if legal.any():
            some = ByHand(logits[i][legal], v[i], q[i][legal], visits[i][legal])
            expected[i][legal] = getattr(some, method)(**settings)
    return expected


def call(fn, search, **settings):
    *arrays, mask = search
    return fn(*arrays, mask=mask, **settings)


class TestMixedValue:
    def test_is_that_of_the_definition_over_legal_actions(self, rng):
        search = random_search(rng)
        logits, v, q, visits, mask = search
        got = call(mixed_value, search)
        for i in np.ndindex(LEAD):
            legal = mask[i]
            some = ByHand(logits[i][legal], v[i], q[i][legal], visits[i][legal])
            np.testing.assert_allclose(got[i], some.mixed(), rtol=1e-5)

    def test_of_a_search_that_saw_nothing_is_the_prediction(self):
        nan = jnp.full(3, jnp.nan)
        assert mixed_value(jnp.zeros(3), 7.0, nan, jnp.zeros(3, int)) == 7
        nothing = jnp.zeros(3, bool)
        assert mixed_value(nan, 7.0, nan, jnp.array([3, 1, 2]), mask=nothing) == 7

    def test_takes_the_prior_of_what_was_visited_alone(self):
        """However little of it there is."""
        logits = jnp.array([0.0, -300.0, -300.0 + np.log(3)])
        q, visits = jnp.array([jnp.nan, 0.0, 8.0]), jnp.array([0, 1, 2])
        got = mixed_value(logits, 2.0, q, visits)  # (2 + 3 * 6) / 4
        assert got == pytest.approx(5, rel=1e-4)

    def test_counts_do_not_weigh_actions(self):
        q = jnp.array([0.0, 4.0])
        one = mixed_value(jnp.zeros(2), 0.0, q, jnp.array([9, 1]))
        two = mixed_value(jnp.zeros(2), 0.0, q, jnp.array([1, 9]))
        assert one == two == pytest.approx(2 * 10 / 11)

    def test_visits_to_what_is_never_taken_tell_nothing(self):
        logits, visits = jnp.array([0.0, -jnp.inf]), jnp.array([0, 5])
        assert mixed_value(logits, 3.0, jnp.array([jnp.nan, 9.0]), visits) == 3
        gradient = jax.grad(lambda *x: mixed_value(*x, visits), (0, 1, 2))
        got = gradient(logits, 3.0, jnp.array([jnp.nan, 9.0]))
        assert [np.asarray(x).tolist() for x in got] == [[0, 0], 1, [0, 0]]

    def test_gradients_are_of_what_was_visited(self):
        logits, v = jnp.array([0.0, 0.0, jnp.nan, 5.0]), 1.0
        q, visits = jnp.array([2.0, 4.0, jnp.nan, jnp.nan]), jnp.array([1, 2, 5, 0])
        mask = jnp.array([True, True, False, True])
        gradient = jax.grad(lambda *x: mixed_value(*x, visits, mask=mask), (0, 1, 2))
        of_logits, of_v, of_q = gradient(logits, v, q)
        # 3 / 4 of a mean of halves, whose slope by a logit is p (q - mean) = ± 1 / 2.
        np.testing.assert_allclose(of_logits, [-0.375, 0.375, 0, 0], rtol=1e-6)
        np.testing.assert_allclose(of_q, [0.375, 0.375, 0, 0], rtol=1e-6)
        assert of_v == 0.25


class TestCompletedActionValues:
    def test_are_those_of_the_definition_over_legal_actions(self, rng):
        search = random_search(rng)
        got = call(completed_action_values, search)
        expected = by_hand(search, "completed", -np.inf)
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    def test_gradients_do_not_pass_what_was_not_seen(self):
        q, visits = jnp.array([1.0, jnp.nan]), jnp.array([1, 0])
        total = lambda q, v: completed_action_values(jnp.zeros(2), v, q, visits).sum()
        of_q, of_v = jax.grad(total, (0, 1))(q, 0.0)
        assert of_q.tolist() == [1.5, 0]
        assert of_v == 0.5


class TestScaledActionValues:
    @pytest.mark.parametrize("rescale", [False, True])
    def test_are_those_of_the_definition_over_legal_actions(self, rng, rescale):
        search = random_search(rng)
        _, _, _, visits, mask = search
        q = call(completed_action_values, search)
        for settings in ({}, {"c_visit": 3.0, "c_scale": 0.1}):
            settings |= {"rescale": rescale}
            expected = by_hand(search, "scaled", -np.inf, **settings)
            got = scaled_action_values(q, visits, mask=mask, **settings)
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)
            # The values of what is not legal say so without a mask, too.
            visits_of_legal = np.where(mask, visits, 0)
            got = scaled_action_values(q, visits_of_legal, **settings)
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)

    def test_they_keep_the_order_of_the_values(self, rng):
        q = np.float32(rng.normal(size=(50, 7)))
        visits = rng.integers(9, size=q.shape)
        for rescale in (False, True):
            got = np.asarray(scaled_action_values(q, visits, rescale=rescale))
            assert (got.argsort(-1) == q.argsort(-1)).all()

    def test_rescaled_they_do_not_depend_on_the_units(self):
        q, visits = jnp.array([1.0, 3.0, 2.0]), jnp.array([1, 1, 2])
        got = scaled_action_values(q, visits, rescale=True)
        assert got.tolist() == [0, 52, 26]
        other = scaled_action_values(100 * q - 7, visits, rescale=True)
        np.testing.assert_allclose(other, got, rtol=1e-6)

    def test_rescaled_equal_ones_are_zero_with_finite_gradients(self):
        fn = lambda q, mask=None: scaled_action_values(
            q, jnp.zeros(3, int), rescale=True, mask=mask
        )
        assert fn(jnp.full(3, 0.1)).tolist() == [0, 0, 0]
        one = jnp.array([False, True, False])
        q = jnp.array([jnp.nan, 5.0, jnp.inf])
        assert fn(q, one).tolist() == [-jnp.inf, 0, -jnp.inf]
        slopes = jax.grad(lambda q: fn(q, one)[1])(q)
        assert slopes.tolist() == [0, 0, 0]

    def test_illegal_values_have_no_gradient(self):
        q, mask = jnp.array([1.0, jnp.nan, 3.0, 2.0]), jnp.array([1, 0, 1, 1], bool)
        best = lambda q: scaled_action_values(
            q, jnp.array([0, 9, 0, 0]), c_visit=1.0, rescale=True, mask=mask
        )[3]
        np.testing.assert_allclose(jax.grad(best)(q), [-0.25, 0, -0.25, 0.5])

    def test_where_nothing_is_legal_the_scale_has_no_gradient(self):
        q, visits = jnp.array([1.0, jnp.nan]), jnp.array([3, 4])
        slope = jax.grad(
            lambda c_scale: scaled_action_values(
                q, visits, c_scale=c_scale, rescale=True, mask=jnp.zeros(2, bool)
            )[0]
        )
        assert slope(1.0) == 0

    def test_a_value_that_is_not_a_number_shows(self):
        q, visits = jnp.array([jnp.nan, 1.0]), jnp.array([1, 1])
        assert np.isnan(scaled_action_values(q, visits, rescale=True)).all()


class TestGumbelImprovedPolicy:
    @pytest.mark.parametrize("rescale", [False, True])
    def test_is_that_of_the_definition_over_legal_actions(self, rng, rescale):
        search = random_search(rng)
        mask = search[-1]
        for settings in ({}, {"c_visit": 3.0, "c_scale": 0.1}):
            settings |= {"rescale": rescale}
            expected = by_hand(search, "policy", 0.0, **settings)
            expected[~mask.any(-1)] = np.nan
            got = call(gumbel_improved_policy, search, **settings)
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-6)

    @pytest.mark.parametrize("rescale", [False, True])
    def test_it_is_worth_no_less_than_the_policy_before(self, rng, rescale):
        shape = (500, ACTIONS)
        logits, q = np.float32(3 * rng.normal(size=(2, *shape)))
        v, visits = np.float32(rng.normal(size=500)), rng.integers(3, size=shape)
        mask = rng.uniform(size=shape) < 0.7
        mask[:, 0] = True
        completed = completed_action_values(logits, v, q, visits, mask=mask)
        values = np.where(mask, np.float64(completed), 0)
        before = np.where(mask, np.exp(np.float64(logits)), 0)
        before /= before.sum(-1, keepdims=True)
        better = 0
        for c_scale in (0.0, 0.01, 1.0):
            settings = {"c_scale": c_scale, "rescale": rescale, "mask": mask}
            policy = gumbel_improved_policy(logits, v, q, visits, **settings)
            gain = ((np.float64(policy) - before) * values).sum(-1)
            assert (gain > -1e-5).all()
            better = (gain > 1e-3).mean()
        assert better > 0.5

    def test_without_visits_it_is_the_policy_before(self):
        logits, nan = jnp.array([0.0, 1.0, -jnp.inf]), jnp.full(3, jnp.nan)
        got = gumbel_improved_policy(logits, 100.0, nan, jnp.zeros(3, int))
        np.testing.assert_allclose(got, jax.nn.softmax(logits), rtol=1e-5)

    def test_all_mass_on_one_action_stays_there(self):
        logits = jnp.array([0.0, -jnp.inf, -jnp.inf])
        q, visits = jnp.array([-9.0, 9.0, 0.0]), jnp.array([1, 5, 0])
        assert gumbel_improved_policy(logits, 0.0, q, visits).tolist() == [1, 0, 0]

    def test_of_one_action_is_certain(self):
        one = jnp.ones((2, 1))
        visits = jnp.array([[0], [3]])
        for rescale in (False, True):
            got = gumbel_improved_policy(
                one, jnp.zeros(2), one, visits, rescale=rescale
            )
            assert got.tolist() == [[1.0], [1.0]]

    def test_is_a_constant_unless_told_otherwise(self):
        logits, q, visits = jnp.array([0.0, 1.0]), jnp.zeros(2), jnp.array([1, 1])
        first = lambda logits, **flag: gumbel_improved_policy(
            logits, 0.0, q, visits, **flag
        )[0]
        assert jax.grad(first)(logits).tolist() == [0, 0]
        slope = jax.grad(first)(logits, stop_target_gradients=False)[0]
        probs = jax.nn.softmax(logits)
        assert slope == pytest.approx(probs[0] * probs[1])

    def test_what_is_not_legal_has_no_gradient(self):
        logits, q = jnp.array([0.0, 1.0, jnp.nan]), jnp.array([0.0, 1.0, jnp.nan])
        visits, mask = jnp.array([1, 0, 4]), jnp.array([True, True, False])
        first = lambda logits, v, q, mask=mask: gumbel_improved_policy(
            logits, v, q, visits, c_scale=0.01, mask=mask, stop_target_gradients=False
        )[0]
        slopes = jax.grad(first, (0, 1, 2))(logits, 0.5, q)
        assert all(np.isfinite(x).all() for x in slopes)
        assert slopes[0][2] == slopes[2][2] == 0
        assert slopes[1] != 0
        nothing = jax.grad(first, (0, 1, 2))(logits, 0.5, q, jnp.zeros(3, bool))
        assert not any(np.asarray(x).any() for x in nothing)

    def test_half_precision_is_computed_in_single(self):
        logits, q = jnp.zeros(2, jnp.bfloat16), jnp.array([0.5, 0.504], jnp.bfloat16)
        got = gumbel_improved_policy(logits, jnp.bfloat16(0.0), q, jnp.array([1, 1]))
        gap = 51 * float(q[1] - q[0])
        assert got.dtype == jnp.bfloat16
        assert float(got[1]) == pytest.approx(1 / (1 + np.exp(-gap)), rel=2**-8)


def inclusion(probs, k):
    """How often each set of `k` is drawn one by one without replacement."""
    sets = {}
    for order in itertools.permutations(range(len(probs)), k):
        left, chance = 1.0, 1.0
        for a in order:
            chance *= probs[a] / left
            left -= probs[a]
        key = frozenset(order)
        sets[key] = sets.get(key, 0.0) + chance
    return sets


class TestGumbelPerturbedLogits:
    def test_the_largest_are_a_sample_without_replacement(self):
        probs, draws = np.array([0.6, 0.3, 0.1]), 40_000
        logits = jnp.broadcast_to(jnp.log(jnp.float32(probs)) + 5, (draws, 3))
        perturbed = gumbel_perturbed_logits(jax.random.key(1), logits)
        order = np.asarray(jax.lax.top_k(perturbed, 2)[1])
        first = np.bincount(order[:, 0], minlength=3) / draws
        np.testing.assert_allclose(first, probs, atol=0.01)
        for actions, chance in inclusion(probs, 2).items():
            drawn = np.mean([set(pair) == actions for pair in order.tolist()])
            assert drawn == pytest.approx(chance, abs=0.01)

    def test_what_has_no_probability_comes_last(self):
        logits = jnp.array([-jnp.inf, 0.0, jnp.nan, -50.0])
        mask = jnp.array([True, True, False, True])
        keys = jax.random.split(jax.random.key(0), 20)
        got = jax.vmap(lambda key: gumbel_perturbed_logits(key, logits, mask=mask))(
            keys
        )
        assert (got[:, [0, 2]] == -jnp.inf).all()
        assert (np.asarray(jax.lax.top_k(got, 2)[1]) == [1, 3]).all()
        assert len(np.unique(got[:, 1])) == 20
        slopes = jax.grad(lambda x: gumbel_perturbed_logits(keys[0], x, mask=mask)[1])(
            logits
        )
        assert slopes.tolist() == [0, 1, 0, 0]

    def test_each_state_has_noise_of_its_own(self):
        got = gumbel_perturbed_logits(jax.random.key(0), jnp.zeros((50, 4)))
        assert len(np.unique(got)) == 200


class TestGumbelActionScores:
    def test_are_those_of_the_definition_over_legal_actions(self, rng):
        perturbed, scaled = np.float32(rng.normal(size=(2, *LEAD, ACTIONS)))
        visits = rng.integers(4, size=perturbed.shape)
        considered, mask = (
            rng.integers(4, size=LEAD),
            rng.uniform(size=visits.shape) < 0.7,
        )
        total = np.where(mask, perturbed + scaled, -np.inf)
        most = np.where(mask, visits, 0).max(-1)
        perturbed[~mask] = scaled[~mask] = np.nan
        for wanted, given in ((considered, considered), (most, None)):
            got = gumbel_action_scores(perturbed, scaled, visits, given, mask=mask)
            same = visits == wanted[..., None]
            np.testing.assert_array_equal(got, np.where(same, total, -np.inf))

    def test_compares_counts_of_any_integers(self):
        for one, two in ((np.uint8, np.int32), (np.int32, np.uint8)):
            visits, wanted = np.array([3, 200], one), two(200)
            got = gumbel_action_scores(jnp.zeros(2), jnp.ones(2), visits, wanted)
            assert got.tolist() == [-jnp.inf, 1]

    def test_the_gradient_is_that_of_what_is_considered(self):
        visits, mask = jnp.array([2, 2, 1]), jnp.array([True, False, True])
        nan = jnp.array([1.0, jnp.nan, jnp.nan])
        best = lambda *x: gumbel_action_scores(*x, visits, mask=mask)[0]
        for slopes in jax.grad(best, (0, 1))(nan, nan):
            assert slopes.tolist() == [1, 0, 0]


class TestSearch:
    """At the root of a tree whose values are known, all functions together."""

    def search(self, key, logits, values, mask, simulations, considered):
        perturbed = gumbel_perturbed_logits(key, logits, mask=mask)
        schedule = sequential_halving_visits(
            mask.sum(), simulations, max_num_considered_actions=considered
        )

        def scores(visits, wanted=None):
            q = completed_action_values(logits, 0.0, values, visits, mask=mask)
            scaled = scaled_action_values(q, visits, c_visit=5.0, mask=mask)
            return gumbel_action_scores(perturbed, scaled, visits, wanted, mask=mask)

        def step(visits, wanted):
            action = jnp.argmax(scores(visits, wanted))
            return visits.at[action].add(1), None

        visits, _ = jax.lax.scan(step, jnp.zeros(logits.shape, int), schedule)
        return perturbed, visits, jnp.argmax(scores(visits))

    def test_halves_the_actions_of_the_largest_perturbed_logits(self, rng):
        logits, values = jnp.float32(rng.normal(size=(2, 9)))
        mask = jnp.arange(9) != 4
        search = jax.jit(lambda key: self.search(key, logits, values, mask, 26, 6))
        for seed in range(20):
            perturbed, visits, action = map(np.asarray, search(jax.random.key(seed)))
            assert visits.sum() == 26
            # 6 actions once each, 3 twice more, 2 four times more and what is left.
            assert sorted(visits) == [0, 0, 0, 1, 1, 1, 3, 10, 10]
            sampled = np.argsort(perturbed)[-6:]
            assert set(np.flatnonzero(visits)) == set(sampled)
            scores, last = perturbed + 15 * np.asarray(values), visits == 10
            assert action == np.argmax(np.where(last, scores, -np.inf))

    def test_finds_the_best_of_actions_that_the_policy_likes_alike(self, rng):
        values = jnp.float32(rng.normal(size=8))
        _, _, action = self.search(
            jax.random.key(0), jnp.zeros(8), values, jnp.ones(8, bool), 24, 8
        )
        assert action == np.argmax(values)

    def test_the_action_taken_is_no_worse_than_one_of_the_policy(self):
        """In expectation, with two simulations among four actions."""
        logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
        values, mask = jnp.array([0.0, 0.1, 0.2, 0.3]), jnp.ones(4, bool)
        keys = jax.random.split(jax.random.key(0), 4000)
        search = lambda key: self.search(key, logits, values, mask, 2, 4)[2]
        taken = values[jax.jit(jax.vmap(search))(keys)].mean()
        assert taken > jnp.vdot(jnp.exp(logits), values) + 0.03


def test_nothing_to_choose_from_has_scores_of_minus_infinity():
    x, visits, mask = jnp.ones(2), jnp.array([1, 2]), jnp.zeros(2, bool)
    for scores in (
        completed_action_values(x, 1.0, x, visits, mask=mask),
        scaled_action_values(x, visits, rescale=True, mask=mask),
        gumbel_perturbed_logits(jax.random.key(0), x, mask=mask),
        gumbel_action_scores(x, x, visits, mask=mask),
    ):
        assert scores.tolist() == [-jnp.inf] * 2
    policy = gumbel_improved_policy(x, 1.0, x, visits, mask=mask)
    assert np.isnan(policy).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, n: mixed_value(x, x, x, n), "v has shape"),
        (lambda x, n: completed_action_values(x, 0.0, x, n[:1]), "visit_counts has"),
        (lambda x, n: scaled_action_values(x, n, c_visit=-1.0), "c_visit must be in"),
        (lambda x, n: gumbel_improved_policy(x, 0.0, x[:1], n), "q has shape"),
        (lambda x, n: gumbel_action_scores(x, x, n, n), "considered_visits has shape"),
    ],
)
def test_refuses_what_breaks_a_contract(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(2), jnp.ones(2, int))

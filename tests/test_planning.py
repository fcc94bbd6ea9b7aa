"""Scores and policies of a tree search, against loops in double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.planning import (
    interior_action_scores,
    puct_scores,
    sequential_halving_visits,
    visit_count_policy,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

LEAD = (3, 5)
ACTIONS = 4


def random_search(rng):
    """Priors, values, visits and legal actions; what must not matter is NaN."""
    prior = rng.dirichlet(np.ones(ACTIONS), size=LEAD).astype(np.float32)
    q = rng.uniform(size=prior.shape).astype(np.float32)
    visits = rng.integers(9, size=prior.shape).astype(np.int32)
    mask = rng.uniform(size=prior.shape) < 0.7
    mask[0, 0], mask[0, 1] = False, True
    visits[0, 1] = 0
    return np.where(mask, prior, np.nan), np.where(mask, q, np.nan), visits, mask


class TestPuctScores:
    def by_hand(self, prior, q, visits, c1=1.25, c2=19652):
        total = sum(map(int, visits))
        grown = c1 + math.log((total + c2 + 1) / c2)
        return [
            float(q[a]) + float(prior[a]) * math.sqrt(total) / (1 + int(n)) * grown
            for a, n in enumerate(visits)
        ]

    @pytest.mark.parametrize("settings", [{}, {"c1": 0.5, "c2": 10.0}])
    def test_are_those_of_the_definition_over_legal_actions(self, rng, settings):
        prior, q, visits, mask = random_search(rng)
        expected = np.full(q.shape, -np.inf)
        for i in np.ndindex(LEAD):
            legal = mask[i]
            some = prior[i][legal], q[i][legal], visits[i][legal]
            expected[i][legal] = self.by_hand(*some, **settings)
        got = puct_scores(prior, q, visits, mask=mask, **settings)
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    def test_the_bonus_grows_with_the_first_visits_and_with_the_billionth(self):
        """Where a quotient near one would lose the digits that matter."""
        prior, zero = jnp.ones(1), jnp.zeros(1)
        for total in (1, 3, 2**30):
            got = puct_scores(prior, zero, jnp.array([total]), c1=0.0)[0]
            expected = np.sqrt(total) / (1 + total) * np.log1p((total + 1) / 19652)
            assert got == pytest.approx(expected, rel=1e-6)

    def test_without_visits_they_are_the_values(self):
        q = jnp.array([0.25, 0.5])
        scores = puct_scores(jnp.array([1.0, 0.0]), q, jnp.zeros(2, int))
        assert scores.tolist() == q.tolist()

    def test_what_the_prior_excludes_has_its_value_alone(self):
        scores = puct_scores(jnp.array([0.0, 1.0]), jnp.zeros(2), jnp.array([5, 3]))
        assert scores[0] == 0
        assert scores[1] > 0

    def test_a_search_by_them_comes_to_follow_the_prior_where_values_are_equal(self):
        prior, q = jnp.array([0.6, 0.3, 0.1]), jnp.zeros(3)

        def step(visits, _):
            scores = puct_scores(prior, q, visits)
            return visits.at[jnp.argmax(scores)].add(1), None

        visits, _ = jax.lax.scan(step, jnp.zeros(3, int), length=500)
        np.testing.assert_allclose(visits / 500, prior, atol=0.01)

    def test_gradients_of_illegal_actions_are_zero(self):
        """The values of legal ones count once each."""
        mask = jnp.array([True, False])
        legal_sum = lambda prior, q: puct_scores(
            prior, q, jnp.array([3, 7]), mask=mask, c2=jnp.inf
        )[0]
        given = jnp.array([0.5, jnp.nan]), jnp.array([1.0, jnp.nan])
        of_prior, of_q = jax.grad(legal_sum, (0, 1))(*given)
        np.testing.assert_allclose(of_prior, [1.25 * np.sqrt(3) / 4, 0], rtol=1e-6)
        assert of_q.tolist() == [1, 0]

    def test_takes_small_integers_for_visits(self):
        visits = np.full(3, 200, np.uint8)
        got = puct_scores(jnp.ones(3) / 3, jnp.zeros(3), visits)
        expected = puct_scores(jnp.ones(3) / 3, jnp.zeros(3), visits.astype(int))
        assert got.tolist() == expected.tolist()


class TestVisitCountPolicy:
    def by_hand(self, visits, temperature):
        visits = [int(n) for n in visits]
        if temperature == 0 or not any(visits):
            powers = [float(n == max(visits)) for n in visits]
        else:
            powers = [(n / max(visits)) ** (1 / temperature) for n in visits]
        return np.array(powers) / sum(powers)

    @pytest.mark.parametrize("temperature", [0.0, 0.01, 0.25, 1.0, 3.0])
    def test_is_that_of_the_definition_over_legal_actions(self, rng, temperature):
        _, _, visits, mask = random_search(rng)
        expected = np.zeros(visits.shape)
        for i in np.ndindex(LEAD):
            if mask[i].any():
                some = self.by_hand(visits[i][mask[i]], temperature)
                expected[i][mask[i]] = some
            else:
                expected[i] = np.nan
        got = visit_count_policy(visits, temperature=temperature, mask=mask)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-30)

    def test_ties_share_at_a_temperature_of_zero(self):
        visits = jnp.array([[2, 7, 7, 0], [0, 0, 0, 0], [0, 0, 5, 0]])
        got = visit_count_policy(visits, temperature=0.0)
        assert got.tolist() == [[0, 0.5, 0.5, 0], [0.25] * 4, [0, 0, 1, 0]]

    def test_no_visits_are_as_equal_visits(self):
        mask = jnp.array([True, False, True, False])
        for temperature in (0.0, 0.3, 1.0):
            got = visit_count_policy(
                jnp.array([0, 9, 0, 9]), temperature=temperature, mask=mask
            )
            assert got.tolist() == [0.5, 0, 0.5, 0]

    def test_large_counts_are_as_exact_as_small_ones(self):
        most = np.iinfo(np.int32).max
        got = visit_count_policy(jnp.array([most, most // 2, 1]), temperature=0.125)
        np.testing.assert_allclose(got, [256 / 257, 1 / 257, 0], rtol=1e-5, atol=1e-30)
        got = visit_count_policy(jnp.array([most, most - 1]), temperature=0.0)
        assert got.tolist() == [1, 0]

    def test_cold_is_greedy_and_hot_is_uniform_over_what_was_visited(self):
        visits = jnp.array([3, 4, 0])
        for cold in (0.0, 1e-40, 1e-30, 1e-3):
            got = visit_count_policy(visits, temperature=cold)
            np.testing.assert_allclose(got, [0, 1, 0], atol=1e-30)
        hot = visit_count_policy(visits, temperature=jnp.inf)
        assert hot.tolist() == [0.5, 0.5, 0]

    def test_the_derivative_by_temperature_is_finite_everywhere(self):
        visits = jnp.array([3, 4, 0, 1_000_000_000])
        entropy = lambda t: jnp.sum(visit_count_policy(visits, temperature=t) ** 2)
        slopes = jax.vmap(jax.grad(entropy))(
            jnp.array([0, 1e-38, 1e-30, 1e-20, 1e-6, 0.1, 1.0, 1e6, jnp.inf])
        )
        assert jnp.isfinite(slopes).all()
        nothing = jax.grad(
            lambda t: visit_count_policy(
                visits[:2], temperature=t, mask=visits[:2] < 0
            ).sum()
        )
        assert nothing(0.5) == 0

    def test_is_in_the_dtype_of_the_temperature(self):
        temperature = jnp.bfloat16(0.5)
        got = visit_count_policy(jnp.array([1, 3]), temperature=temperature)
        assert got.dtype == jnp.bfloat16
        assert got.tolist() == [0.10009765625, 0.8984375]  # 0.1 and 0.9, rounded

    def test_one_action_has_it_all(self):
        assert visit_count_policy(jnp.array([[0], [1], [9]])).tolist() == [[1.0]] * 3


def halving_by_hand(actions, simulations):
    """Names actions 0, 1, …, the best last, and keeps the set of those considered."""
    visits = dict.fromkeys(range(actions), 0)
    rounds, left, log = math.ceil(math.log2(actions)), [*range(actions)], []
    while len(log) < simulations:
        each = max(1, math.floor(simulations / (len(left) * max(rounds, 1))))
        for _ in range(each):
            for action in left:
                log.append(visits[action])
                visits[action] += 1
        if len(left) > 2:
            left = left[len(left) - math.ceil(len(left) / 2) :]
    return log[:simulations]


class TestSequentialHalvingVisits:
    def test_are_those_of_rounds_of_a_set_that_is_halved(self):
        for actions in (1, 2, 3, 4, 5, 7, 8, 11, 16):
            for simulations in (1, 2, 5, 16, 23, 50, 200):
                got = sequential_halving_visits(actions, simulations)
                assert got.tolist() == halving_by_hand(actions, simulations)

    def test_of_the_known_case(self):
        """16 actions, 64 simulations: four rounds of 16."""
        got = sequential_halving_visits(16, 64)
        assert got.tolist() == (
            [0] * 16
            + [1] * 8
            + [2] * 8
            + [3, 3, 3, 3]
            + [4] * 4
            + [5] * 4
            + [6] * 4
            + [7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14]
        )

    def test_every_simulation_finds_an_action_and_all_are_spent(self):
        """Whoever wins: always some action has as many visits as are asked for."""
        rng = np.random.default_rng(0)
        for actions, simulations in ((16, 50), (6, 100), (5, 3), (1, 9), (13, 77)):
            visits = np.zeros(actions, int)
            for wanted in np.asarray(sequential_halving_visits(actions, simulations)):
                [candidates] = np.nonzero(visits == wanted)
                visits[rng.choice(candidates)] += 1
            assert visits.sum() == simulations
            assert visits.max() - np.sort(visits)[-min(2, actions)] <= 1

    def test_considers_no_more_than_there_are_and_than_it_may(self):
        counts = np.arange(-1, 8)
        got = sequential_halving_visits(counts, 12, max_num_considered_actions=4)
        assert got.shape == (9, 12)
        for row, count in zip(got.tolist(), counts, strict=True):
            expected = halving_by_hand(min(count, 4), 12) if count > 0 else [-1] * 12
            assert row == expected

    def test_the_number_of_actions_may_be_traced(self):
        mask = jnp.array([True, False, True, True])
        got = jax.jit(lambda m: sequential_halving_visits(m.sum(), 6))(mask)
        assert got.tolist() == halving_by_hand(3, 6)

    def test_none_is_fine(self):
        assert sequential_halving_visits(3, 0).tolist() == []

    @pytest.mark.parametrize(("simulations", "most"), [(-1, 4), (4, 0)])
    def test_refuses_what_is_no_number_of_them(self, simulations, most):
        with pytest.raises(ValueError, match=f"got {simulations} and {most}"):
            sequential_halving_visits(3, simulations, max_num_considered_actions=most)

    def test_refuses_a_number_of_simulations_that_is_traced(self):
        with pytest.raises(TypeError, match="num_simulations must be a Python int"):
            sequential_halving_visits(3, np.int32(4))


class TestInteriorActionScores:
    def test_are_those_of_the_definition_over_legal_actions(self, rng):
        probs, _, visits, mask = random_search(rng)
        expected = np.full(probs.shape, -np.inf)
        for i in np.ndindex(LEAD):
            total = visits[i][mask[i]].sum()
            for a in np.flatnonzero(mask[i]):
                expected[i][a] = probs[i][a] - visits[i][a] / (1 + total)
        got = interior_action_scores(probs, visits, mask=mask)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)

    def test_the_visits_come_to_be_as_the_policy_has_them(self):
        probs = jnp.array([0.55, 0.0, 0.3, 0.15])

        def step(visits, _):
            action = jnp.argmax(interior_action_scores(probs, visits))
            return visits.at[action].add(1), None

        visits, _ = jax.lax.scan(step, jnp.zeros(4, int), length=40)
        assert jnp.abs(visits / 40 - probs).max() < 1 / 40

    def test_the_gradient_is_that_of_the_policy(self):
        mask = jnp.array([True, True, False])
        best = lambda probs: interior_action_scores(
            probs, jnp.array([1, 0, 4]), mask=mask
        )[1]
        assert jax.grad(best)(jnp.array([0.5, 0.5, jnp.nan])).tolist() == [0, 1, 0]


def test_nothing_to_choose_from_has_scores_of_minus_infinity():
    x, visits, mask = jnp.ones(2), jnp.array([1, 2]), jnp.zeros(2, bool)
    for scores in (
        puct_scores(x, x, visits, mask=mask),
        interior_action_scores(x, visits, mask=mask),
    ):
        assert scores.tolist() == [-jnp.inf] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, n: puct_scores(x, x, n[:1]), "visit_counts has shape"),
        (lambda x, n: puct_scores(x, x, n, c2=0.0), r"c2 must be in \(0, inf\]"),
        (lambda x, n: visit_count_policy(n, temperature=-1.0), "temperature must be"),
        (lambda x, n: interior_action_scores(x, n[:1]), "visit_counts has shape"),
    ],
)
def test_refuses_what_breaks_a_contract(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(2), jnp.ones(2, int))

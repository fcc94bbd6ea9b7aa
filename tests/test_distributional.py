"""Categorical distributions, against exact fractions and plain-Python readings."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import rlprims
from rlprims import categorical_l2_project

INF, NAN = np.inf, np.nan
ACTIONS, ATOMS, NEXT_ATOMS = 3, 5, 4


def hat(k, z, atoms):
    """1 on atom `k`, 0 on its neighbours and beyond, linear in between."""
    if z == atoms[k]:
        return Fraction(1)
    neighbours = atoms[k + 1 : k + 2] if z > atoms[k] else atoms[max(k - 1, 0) : k]
    if not neighbours:  # beyond an end
        return Fraction(1)
    share = 1 - abs(z - atoms[k]) / abs(neighbours[0] - atoms[k])
    return max(share, Fraction(0))


def project(z_p, probs, z_q):
    """The projection onto different atoms, exactly."""
    z_p, probs, z_q = ([Fraction(float(x)) for x in xs] for xs in (z_p, probs, z_q))
    shares = [
        [p * hat(k, z, z_q) for z, p in zip(z_p, probs, strict=True)]
        for k in range(len(z_q))
    ]
    return np.array([float(sum(share)) for share in shares])


def assert_projects(z_p, probs, z_q):
    z_p, probs, z_q = (np.asarray(x, np.float32) for x in (z_p, probs, z_q))
    scale = np.abs(probs).sum()
    result = categorical_l2_project(z_p, probs, z_q)
    np.testing.assert_allclose(result, project(z_p, probs, z_q), atol=2e-6 * scale)
    np.testing.assert_allclose(result.sum(), probs.sum(), rtol=1e-6, atol=1e-6 * scale)


GRIDS = {
    "even": np.linspace(-2, 2, 11),
    "even and far from zero": np.linspace(4096, 4096.625, 11),
    "nearly even": np.linspace(-2, 2, 11)
    + 0.08 * np.array([0, 1, -1, 1, -1] * 2 + [0]),
    "uneven": np.array([-2, -1.99, -1.9, -1, -0.5, 0, 0.1, 0.11, 1.5, 1.9, 2]),
    "one far away": np.array([-1e6, *np.linspace(0, 1, 9), 1e6]),
}


class TestProjection:
    @pytest.mark.parametrize("name", GRIDS)
    def test_shares_each_atom_between_its_neighbours(self, name, rng):
        z_q = GRIDS[name].astype(np.float32)
        low, high = z_q[1], z_q[-2]
        for _ in range(5):
            inside = rng.uniform(low, high, 20)
            ends = [z_q[0] - 1, z_q[0], z_q[-1], z_q[-1] + 1]
            z_p = np.array([*inside, *ends, *rng.choice(z_q, 6)])
            assert_projects(z_p, rng.dirichlet(np.ones(30)), z_q)

    @pytest.mark.parametrize("name", GRIDS)
    def test_keeps_a_distribution_that_is_on_the_atoms(self, name, rng):
        z_q = GRIDS[name].astype(np.float32)
        probs = rng.dirichlet(np.ones(len(z_q))).astype(np.float32)
        np.testing.assert_array_equal(categorical_l2_project(z_q, probs, z_q), probs)

    @pytest.mark.parametrize("name", GRIDS)
    def test_keeps_the_mean(self, name, rng):
        z_q = GRIDS[name].astype(np.float32)
        z_p = rng.uniform(z_q[0], z_q[-1], 30).astype(np.float32)
        probs = rng.dirichlet(np.ones(30)).astype(np.float32)
        after = np.asarray(categorical_l2_project(z_p, probs, z_q), np.float64) @ z_q
        before = np.asarray(probs, np.float64) @ z_p
        np.testing.assert_allclose(after, before, atol=1e-6 * np.abs(z_q).max())

    def test_is_linear_in_probabilities_that_need_be_none(self):
        assert_projects([0.25, -0.5, 7], [2, 3, -1], [-1, 0, 2])

    @pytest.mark.parametrize(
        ("z_p", "z_q", "expected"),
        [
            ([0, 0.5], [0, 0, 1], [0, 0.75, 0.25]),
            ([-3, 0.5], [0, 0, 1], [0, 0.75, 0.25]),
            ([0.5, 3], [0, 1, 1], [0.25, 0.75, 0]),
            ([0.5, 1], [0, 1, 1], [0.25, 0.75, 0]),
            ([2, 3], [1, 1, 1], [0, 1, 0]),
            ([-2, 3], [4], [1]),
            ([-0.0, 0.0], [-1, -0.0, 1], [0, 1, 0]),
            ([-0.0, 0.0], [-1, 0.0, 1], [0, 1, 0]),
            ([INF, -INF], [-1, 0, 1], [0.5, 0, 0.5]),
            ([INF, -INF], [-1, 0, 5], [0.5, 0, 0.5]),
            ([INF, 3], [-1, 0, INF], [0, 0.5, 0.5]),
        ],
    )
    def test_loses_no_mass_at_the_edges(self, z_p, z_q, expected):
        z_p, z_q = jnp.array(z_p, jnp.float32), jnp.array(z_q, jnp.float32)
        result = categorical_l2_project(z_p, jnp.array([0.5, 0.5]), z_q)
        assert result.tolist() == expected

    def test_loses_no_mass_on_1001_atoms_of_half_precision(self, rng):
        """They are no longer distinct."""
        z_q = jnp.linspace(-500, 500, 1001).astype(jnp.bfloat16)
        assert len(np.unique(z_q)) < 800
        z_p = jnp.asarray([123, 122.5, 499, 7.03], jnp.bfloat16)
        for probs in np.eye(4):
            result = categorical_l2_project(z_p, jnp.bfloat16(probs), z_q)
            assert result.dtype == jnp.bfloat16
            assert np.asarray(result, np.float32).sum() == pytest.approx(1, abs=4e-3)

    def test_ignores_an_atom_without_probability(self):
        z_q = jnp.array([0.0, 1.0, 3.0])

        def run(z_p, probs):
            value, grads = jax.value_and_grad(
                lambda *args: (
                    categorical_l2_project(*args) @ jnp.array([1.0, 2.0, 5.0])
                ),
                argnums=(0, 1, 2),
            )(z_p, probs, z_q)
            return value, grads

        probs = jnp.array([0.0, 1.0])
        expected, _ = run(jnp.array([0.0, 0.5]), probs)
        for bad in [NAN, INF, -INF]:
            value, grads = run(jnp.array([bad, 0.5]), probs)
            assert value == expected
            assert all(np.isfinite(grad).all() for grad in grads)

    def test_an_infinite_atom_without_probability_would_go_to_the_end(self):
        jacobian = jax.jacobian(categorical_l2_project, argnums=1)(
            jnp.array([INF, 0.5]), jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0, 3.0])
        )
        np.testing.assert_array_equal(jacobian, [[0, 0.5], [0, 0.5], [1, 0]])

    def test_shows_nan_that_has_probability(self):
        z_q = jnp.array([0.0, 1.0, 2.0])
        probs = jnp.array([0.5, 0.5])
        assert np.isnan(categorical_l2_project(jnp.array([NAN, 1.0]), probs, z_q)).all()
        spoilt = categorical_l2_project(jnp.ones(2), jnp.array([NAN, 1.0]), z_q)
        assert np.isnan(spoilt).any()

    @pytest.mark.parametrize("name", ["even", "uneven"])
    def test_derivatives_are_those_of_finite_differences(self, name, rng):
        with jax.enable_x64(True):
            z_q = GRIDS[name]
            z_p = rng.uniform(z_q[0], z_q[-1], 6)
            args = z_p, rng.dirichlet(np.ones(6)), z_q
            check_grads(categorical_l2_project, args, order=1, modes=["rev"])

    @pytest.mark.parametrize(
        ("z", "slope"),
        [
            (1.0, [0, -0.5, 0.5]),  # on an atom: from above
            (0.0, [-1, 1, 0]),
            (3.0, [0, -0.5, 0.5]),  # on the last: from below
            (-1.0, [0, 0, 0]),
            (4.0, [0, 0, 0]),
            (INF, [0, 0, 0]),
        ],
    )
    def test_derivatives_where_it_has_corners_are_one_sided(self, z, slope):
        jacobian = jax.jacobian(categorical_l2_project, argnums=(0, 2))(
            jnp.array([z]), jnp.ones(1), jnp.array([0.0, 1.0, 3.0])
        )
        assert jacobian[0][:, 0].tolist() == slope
        assert np.isfinite(jacobian[1]).all()
        np.testing.assert_allclose(jacobian[1].sum(axis=0), 0)  # mass is kept

    @pytest.mark.parametrize("z_q", [[2.0], [2.0, 2.0], [0.0, 2.0, 2.0]])
    def test_derivatives_on_equal_atoms_are_those_from_above(self, z_q):
        args = jnp.array([2.0, 5.0]), jnp.array([0.5, 0.5]), jnp.array(z_q)
        jacobians = jax.jacobian(categorical_l2_project, argnums=(0, 1, 2))(*args)
        assert all(np.isfinite(jacobian).all() for jacobian in jacobians)
        assert not np.any(jacobians[0])

    def test_a_batch_may_mix_even_and_uneven_atoms(self, rng):
        z_q = np.stack([GRIDS["even"], GRIDS["uneven"]]).astype(np.float32)
        z_p = rng.uniform(-3, 3, (2, 30)).astype(np.float32)
        probs = rng.dirichlet(np.ones(30), 2).astype(np.float32)
        result = jax.vmap(categorical_l2_project)(z_p, probs, z_q)
        expected = [project(*args) for args in zip(z_p, probs, z_q, strict=True)]
        np.testing.assert_allclose(result, expected, atol=2e-6)

    @pytest.mark.parametrize("z_q", [(2, 1, 0), (0, 2, 1), (0, NAN, 1)])
    def test_atoms_that_do_not_increase_give_nan(self, z_q):
        z_q, p = jnp.array(z_q, jnp.float32), jnp.ones(3) / 3
        assert np.isnan(categorical_l2_project(jnp.arange(3.0), p, z_q)).all()

    def test_needs_no_memory_for_all_pairs(self):
        atoms = jax.ShapeDtypeStruct((601,), jnp.float32)
        loss = lambda *args: categorical_l2_project(*args)[7]
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(atoms, atoms, atoms)
        assert program.compile().memory_analysis().temp_size_in_bytes < 601 * 601


# The rules, as functions of one dict of arguments


def td(x, stop=True, mask=None):
    names = [
        "v_atoms_tm1",
        "v_logits_tm1",
        "r_t",
        "discount_t",
        "v_atoms_t",
        "v_logits_t",
    ]
    logits = {
        "v_logits_tm1": x["logits_tm1"][x["a_tm1"]],
        "v_logits_t": x["logits_t"][1],
    }
    atoms = {"v_atoms_tm1": x["atoms_tm1"], "v_atoms_t": x["atoms_t"]}
    args = x | logits | atoms
    return rlprims.categorical_td_learning(*(args[name] for name in names), stop)


FLOATS = ["atoms_tm1", "logits_tm1", "r_t", "discount_t", "atoms_t", "logits_t"]
NAMES = [*FLOATS[:2], "a_tm1", *FLOATS[2:]]


def q(x, stop=True, mask=None):
    args = (x[name] for name in NAMES)
    return rlprims.categorical_q_learning(*args, stop, mask=mask)


def double(x, stop=True, mask=None):
    args = (x[name] for name in [*NAMES, "selector"])
    return rlprims.categorical_double_q_learning(*args, stop, mask=mask)


RULES = {"td": td, "q": q, "double": double}


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum()


def cross_entropy(target, logits):
    return -float(target @ np.log(softmax(logits)))


def expected_loss(name, x):
    values = [softmax(logits) @ x["atoms_t"] for logits in x["logits_t"]]
    values = {"td": [0, 1, 0], "q": values, "double": list(x["selector"])}[name]
    probs = softmax(x["logits_t"][values.index(max(values))])
    atoms_t = float(x["r_t"]) + float(x["discount_t"]) * x["atoms_t"].astype(np.float64)
    target = project(atoms_t, probs, x["atoms_tm1"])
    return cross_entropy(target, x["logits_tm1"][x["a_tm1"]])


@pytest.fixture(params=RULES)
def name(request):
    return request.param


@pytest.fixture
def rule(name):
    return RULES[name]


@pytest.fixture
def transition(rng):
    return {
        "atoms_tm1": np.linspace(-1, 1, ATOMS, dtype=np.float32),
        "logits_tm1": rng.normal(size=(ACTIONS, ATOMS)).astype(np.float32),
        "a_tm1": np.int32(2),
        "r_t": np.float32(0.2),
        "discount_t": np.float32(0.5),
        "atoms_t": rng.uniform(-1, 1, NEXT_ATOMS).astype(np.float32),
        "logits_t": rng.normal(size=(ACTIONS, NEXT_ATOMS)).astype(np.float32),
        "selector": rng.normal(size=ACTIONS).astype(np.float32),
    }


def gradients(rule, x, stop=False, **kwargs):
    floats = {k: x[k] for k in [*FLOATS, "selector"]}
    return jax.grad(lambda floats: rule(x | floats, stop, **kwargs))(floats)


class TestEveryRule:
    def test_agrees_with_the_textbook(self, rule, name, transition, rng):
        for _ in range(5):
            x = transition | {"logits_t": rng.normal(size=(ACTIONS, NEXT_ATOMS))}
            x["logits_t"] = x["logits_t"].astype(np.float32)
            np.testing.assert_allclose(rule(x), expected_loss(name, x), rtol=1e-5)

    def test_is_at_rest_where_prediction_and_target_agree(self, rule, transition):
        x = transition | {"atoms_t": transition["atoms_tm1"]}
        x["logits_t"] = x["logits_tm1"] = np.stack(
            [transition["logits_tm1"][1]] * ACTIONS
        )
        x |= {"r_t": np.float32(0), "discount_t": np.float32(1)}
        grads = gradients(rule, x, stop=True)
        np.testing.assert_allclose(grads["logits_tm1"], 0, atol=1e-6)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    @pytest.mark.parametrize("what", [["atoms_t"], ["logits_t", "selector"]])
    def test_a_termination_leaves_the_reward_alone(self, rule, transition, bad, what):
        x = transition | {"discount_t": np.float32(0)}
        x |= {k: np.full_like(x[k], bad) for k in what}
        target = project([x["r_t"]], [1], x["atoms_tm1"])
        expected = cross_entropy(target, x["logits_tm1"][2])
        np.testing.assert_allclose(rule(x), expected, rtol=1e-6)
        for stop in [True, False]:
            grads = gradients(rule, x, stop)
            assert all(np.isfinite(grad).all() for grad in grads.values())

    def test_what_it_would_be_to_go_on_is_the_gradient_at_a_termination(
        self, rule, transition
    ):
        """A finite value behind a discount of 0 still has its effect on the slope."""
        x = transition | {"discount_t": np.float32(0), "logits_t": np.zeros((3, 4))}
        x["logits_t"] = x["logits_t"].astype(np.float32)
        x["logits_t"][:, 0] = -INF  # an atom that is impossible
        x["atoms_t"] = np.float32([NAN, 0.1, 0.2, 0.4])
        slope = gradients(rule, x)["discount_t"]
        around = [rule(x | {"discount_t": np.float32(d)}) for d in (0.1, -0.1)]
        np.testing.assert_allclose(slope, (around[0] - around[1]) / 0.2, rtol=1e-4)

    @pytest.mark.parametrize("what", ["atoms_t", "logits_t", "r_t", "discount_t"])
    def test_shows_nan_otherwise(self, rule, transition, what):
        x = transition | {what: np.full_like(transition[what], NAN)}
        assert np.isnan(rule(x))

    def test_ignores_a_next_atom_without_probability(self, rule, transition):
        x = transition | {"logits_t": transition["logits_t"].copy()}
        x["logits_t"][:, 2] = -INF
        expected = rule(x)
        for bad in [NAN, INF, -INF]:
            x["atoms_t"] = np.where(np.arange(NEXT_ATOMS) == 2, bad, x["atoms_t"])
            x["atoms_t"] = x["atoms_t"].astype(np.float32)
            assert rule(x) == expected
            grads = gradients(rule, x)
            assert all(np.isfinite(grad).all() for grad in grads.values())

    def test_a_prediction_may_rule_out_what_the_target_does(self, rule, transition):
        x = transition | {"logits_tm1": transition["logits_tm1"].copy()}
        x |= {"r_t": np.float32(5)}  # all on the last atom
        x["logits_tm1"][2, :-1] = -INF
        assert rule(x) == 0
        assert np.isfinite(gradients(rule, x)["logits_t"]).all()

    def test_gradient_is_prediction_minus_target_and_stops_there(
        self, rule, transition
    ):
        grads = gradients(rule, transition, stop=True)
        of_action = grads.pop("logits_tm1")
        assert not any(np.any(grad) for grad in grads.values())
        assert not np.any(of_action[:2])
        target = softmax(transition["logits_tm1"][2]) - np.asarray(of_action[2])
        loss = cross_entropy(target, transition["logits_tm1"][2])
        np.testing.assert_allclose(loss, rule(transition), rtol=1e-5)

    def test_gradient_flows_where_the_target_has_zeros(self, rule, transition):
        """A cross-entropy written as a divergence has a gradient of NaN there."""
        with jax.enable_x64(True):
            x = {k: np.asarray(v, np.float64) for k, v in transition.items()}
            x |= {"a_tm1": 2, "r_t": np.float64(0.9)}
            args = [x[k] for k in FLOATS]
            fn = lambda *args: rule(x | dict(zip(FLOATS, args, strict=True)), False)
            atoms_t = x["r_t"] + 0.5 * x["atoms_t"]
            assert not all(project(atoms_t, np.ones(NEXT_ATOMS), x["atoms_tm1"]))
            check_grads(fn, args, order=1, modes=["rev"])

    @pytest.mark.parametrize("index", [-1, ACTIONS, 100])
    def test_an_action_out_of_range_is_nan(self, name, transition, index):
        if name != "td":
            assert np.isnan(RULES[name](transition | {"a_tm1": np.int32(index)}))


class TestLegalActions:
    @pytest.fixture(params=["q", "double"])
    def name(self, request):
        return request.param

    @pytest.mark.parametrize("best", range(ACTIONS))
    def test_a_masked_action_is_never_chosen(self, name, rule, transition, best):
        """What it holds does not matter: it is as if it were not there."""
        mask = np.arange(ACTIONS) != best
        x = {k: np.array(v) for k, v in transition.items()}
        x["selector"][best] = 9
        x["logits_t"][best] = np.where(x["atoms_t"] == x["atoms_t"].max(), 9, 0)
        rest = x | {k: x[k][mask] for k in ("logits_tm1", "logits_t", "selector")}
        rest |= {"a_tm1": np.int32(0)}
        x["logits_tm1"][2] = rest["logits_tm1"][0]
        expected = expected_loss(name, rest)
        np.testing.assert_allclose(rule(x, mask=mask), expected, rtol=1e-5)
        for bad in [NAN, INF, -INF]:
            x["logits_t"][best] = x["selector"][best] = bad
            np.testing.assert_allclose(rule(x, mask=mask), expected, rtol=1e-5)
            grads = gradients(rule, x, mask=mask)
            assert all(np.isfinite(grad).all() for grad in grads.values())

    def test_minus_infinity_means_the_same(self, name, rule, transition):
        mask = np.array([True, False, True])
        expected = rule(transition, mask=mask)
        x = {k: np.array(v) for k, v in transition.items()}
        x["logits_t"][1] = x["selector"][1] = -INF
        assert rule(x) == expected
        assert np.isfinite(gradients(rule, x)["logits_t"]).all()

    def test_no_legal_action_is_nan_unless_the_episode_is_over(
        self, name, rule, transition
    ):
        none = np.zeros(ACTIONS, bool)
        assert np.isnan(rule(transition, mask=none))
        over = transition | {"discount_t": np.float32(0)}
        np.testing.assert_allclose(rule(over, mask=none), rule(over), rtol=1e-6)
        grads = gradients(rule, over, mask=none)
        assert all(np.isfinite(grad).all() for grad in grads.values())

    def test_nothing_is_chosen_by_nan(self, name, rule, transition):
        x = {k: np.array(v) for k, v in transition.items()}
        x["logits_t"][1, 0] = x["selector"][1] = NAN
        assert np.isnan(rule(x))


class TestErrors:
    def test_a_batch_is_refused_with_the_call_to_make(self, transition):
        x = {k: np.stack([v, v]) for k, v in transition.items()}
        x["atoms_tm1"], x["atoms_t"] = transition["atoms_tm1"], transition["atoms_t"]
        with pytest.raises(ValueError, match=r"^categorical_q_learning: ") as error:
            q(x)
        assert "jax.vmap(" in str(error.value)

    def test_atoms_for_each_action_are_refused(self, transition):
        atoms = np.ones((ACTIONS, NEXT_ATOMS), np.float32)
        match = r"^categorical_double_q_learning: q_atoms_t has shape \(3, 4\)"
        with pytest.raises(ValueError, match=match):
            double(transition | {"atoms_t": atoms})

    def test_probabilities_of_other_atoms_are_refused(self):
        match = r"^categorical_l2_project: probs has shape \(3,\), expected f\[M\]"
        with pytest.raises(ValueError, match=match):
            categorical_l2_project(jnp.ones(2), jnp.ones(3), jnp.arange(2.0))

    def test_integer_atoms_are_refused(self):
        with pytest.raises(
            TypeError, match=r"^categorical_td_learning: v_atoms_t must"
        ):
            rlprims.categorical_td_learning(
                jnp.arange(2.0), jnp.ones(2), 0.0, 1.0, jnp.arange(2), jnp.ones(2)
            )

"""Quantile losses, against plain-Python readings of the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import rlprims
from rlprims import quantile, quantile_regression_loss

INF, NAN = np.inf, np.nan
ACTIONS, SOURCES, TARGETS = 3, 5, 4
KAPPAS = [0.0, 0.4, 1.0, INF]


def pair(u, tau, kappa):
    if kappa == 0:
        size = abs(u)
    elif abs(u) <= kappa:
        size = u * u / 2
    else:
        size = kappa * (abs(u) - kappa / 2)
    return abs(tau - (1 if u < 0 else 0)) * size


def regression(sources, levels, targets, kappa):
    return sum(
        sum(pair(float(y) - float(s), float(tau), kappa) for y in targets)
        / len(targets)
        for s, tau in zip(sources, levels, strict=True)
    )


@pytest.fixture
def sample(rng):
    """Sources, levels and targets."""
    sources, targets = rng.normal(size=SOURCES), rng.normal(size=TARGETS)
    levels = rng.uniform(size=SOURCES)
    return tuple(np.float32(x) for x in (sources, levels, targets))


def gradients_of_regression(sample, kappa, stop):
    """By sources, levels and targets; levels by themselves, as they go another way."""
    fn = lambda *args: quantile_regression_loss(*args, kappa, stop)
    by_sources, by_targets = jax.grad(fn, argnums=(0, 2))(*sample)
    return by_sources, jax.grad(fn, argnums=1)(*sample), by_targets


class TestRegression:
    @pytest.mark.parametrize("kappa", KAPPAS)
    def test_agrees_with_the_paper(self, sample, kappa):
        """A sum over sources and a mean over targets, not divided by kappa."""
        loss = quantile_regression_loss(*sample, kappa)
        np.testing.assert_allclose(loss, regression(*sample, kappa), rtol=1e-5)

    def test_is_linear_without_a_huber_parameter(self, sample):
        expected = regression(*sample, 0)
        np.testing.assert_allclose(
            quantile_regression_loss(*sample), expected, rtol=1e-5
        )

    def test_huber_parameters_may_be_traced_zero_included(self, sample):
        losses = jax.jit(jax.vmap(lambda k: quantile_regression_loss(*sample, k)))
        expected = [regression(*sample, k) for k in KAPPAS]
        np.testing.assert_allclose(losses(jnp.array(KAPPAS)), expected, rtol=1e-5)

    @pytest.mark.parametrize("level", [0.25, 0.5, 0.9])
    def test_pulls_towards_the_quantile(self, level, rng):
        targets = np.float32(rng.normal(size=99))
        best = np.quantile(targets, level)
        sources = np.float32([best - 0.1, best + 0.1])
        levels = np.full(2, level, np.float32)
        pull = jax.grad(quantile_regression_loss)(sources, levels, targets)
        assert pull[0] < 0 < pull[1]

    @pytest.mark.parametrize("kappa", [0.0, 1.0])
    def test_the_flag_stops_the_targets(self, sample, kappa):
        held = gradients_of_regression(sample, kappa, True)
        flows = gradients_of_regression(sample, kappa, False)
        assert not np.any(held[2])
        assert np.all(flows[2])
        for x, y in zip(held[:2], flows[:2], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(flows[2].sum(), -flows[0].sum(), rtol=1e-5)

    def test_derivatives_are_those_of_finite_differences(self, sample):
        with jax.enable_x64(True):
            args = [np.float64(x) for x in (*sample, 1)]
            fn = lambda *args: quantile_regression_loss(*args, False)
            check_grads(fn, args, order=2, modes=["fwd", "rev"])

    @pytest.mark.parametrize("kappa", [0.0, 1.0])
    def test_curvature_by_the_sources_alone_is_right_too(self, sample, kappa):
        """It goes through the loop over targets."""
        hessian = jax.hessian(quantile_regression_loss)(*sample, kappa)
        sources, levels, targets = sample
        u = targets[None, :] - sources[:, None]
        weights = np.where(u < 0, 1 - levels[:, None], levels[:, None])
        expected = np.diag((weights * (np.abs(u) < kappa)).mean(axis=1))
        np.testing.assert_allclose(hessian, expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("stop", [True, False])
    def test_an_exact_hit_counts_as_a_target_above(self, stop):
        args = jnp.array([1.0]), jnp.array([0.25]), jnp.array([1.0])
        for kappa, slope in [(0.0, -0.25), (1.0, 0)]:
            grads = gradients_of_regression(args, kappa, stop)
            assert grads[0].tolist() == [slope]

    @pytest.mark.parametrize("kappa", [0.0, 1.0])
    def test_an_outlier_does_not_disturb_the_rest(self, sample, kappa):
        sources, levels, targets = sample
        grads = [
            gradients_of_regression(
                (sources, levels, np.append(targets, x)), kappa, True
            )
            for x in np.float32([1e2, 1e30])
        ]
        np.testing.assert_array_equal(grads[0][0], grads[1][0])

    @pytest.mark.parametrize("kappa", [0.0, 1.0])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_is_accurate_for_many_quantiles(self, rng, scale, kappa):
        sources, targets = np.float32(scale * rng.normal(size=(2, 200)))
        levels = np.float32((np.arange(200) + 0.5) / 200)
        loss, grad = jax.value_and_grad(quantile_regression_loss)(
            sources, levels, targets, kappa
        )
        with jax.enable_x64(True):
            args = [np.float64(x) for x in (sources, levels, targets)]
            expected = jax.value_and_grad(quantile_regression_loss)(*args, kappa)
        np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
        size = np.abs(expected[1]).max()
        np.testing.assert_allclose(grad, expected[1], atol=5e-6 * size)

    def test_a_gradient_needs_no_memory_for_all_pairs(self):
        x = jax.ShapeDtypeStruct((300,), jnp.float32)
        program = jax.jit(jax.value_and_grad(quantile_regression_loss)).lower(x, x, x)
        assert program.compile().memory_analysis().temp_size_in_bytes < 300 * 300

    @pytest.mark.parametrize("kappa", KAPPAS)
    def test_both_ways_to_sum_agree(self, sample, kappa):
        """One is for processors, the other for everything else."""
        weights = np.float32([0.1, 0.2, 0.3, 0.4])
        args = *sample, weights, np.float32(kappa)
        for x, y in zip(
            quantile._one_by_one(*args), quantile._all_pairs(*args), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5)

    @pytest.mark.parametrize("kappa", [0.0, 1.0])
    @pytest.mark.parametrize("what", [0, 2])
    def test_shows_nan_in_value_and_gradient(self, sample, what, kappa):
        sample[what][1] = NAN
        assert np.isnan(quantile_regression_loss(*sample, kappa))
        assert np.isnan(gradients_of_regression(sample, kappa, True)[0]).any()

    @pytest.mark.parametrize("kappa", [0.0, 1.0])
    def test_an_infinite_error_of_weight_zero_does_not_count(self, kappa):
        args = jnp.array([1.0]), jnp.array([0.0]), jnp.array([INF, 1.0])
        assert quantile_regression_loss(*args, kappa) == 0
        for stop in [True, False]:
            grads = gradients_of_regression(args, kappa, stop)
            assert np.isfinite(grads[0]).all()

    def test_half_precision_does_not_add_up_in_half_precision(self, rng):
        sources, targets = rng.normal(size=(2, 300))
        args = [jnp.bfloat16(x) for x in (sources, rng.uniform(size=300), targets)]
        loss = quantile_regression_loss(*args)
        exact = regression(*(np.float64(x) for x in args), 0)
        assert loss.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(loss), exact, rtol=4e-3)

    def test_runs_where_targets_are_sharded(self, sample):
        sources, levels, targets = sample
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(spec(), spec("x")), out_specs=spec()
        )
        def loss(sources, targets):
            loss = quantile_regression_loss(sources, levels, targets, 1.0)
            return jax.lax.pmean(loss, "x")

        value, grad = jax.value_and_grad(loss)(sources, targets)
        expected = gradients_of_regression(sample, 1.0, True)[0]
        np.testing.assert_allclose(grad, expected, rtol=1e-5)
        np.testing.assert_allclose(value, regression(*sample, 1), rtol=1e-5)


# The rules, as functions of one dict of arguments

NAMES = ["dist_q_tm1", "levels", "a_tm1", "r_t", "discount_t"]


def q(x, kappa=0.0, stop=True, mask=None):
    args = (x[name] for name in [*NAMES, "selector", "dist_q_t"])
    return rlprims.quantile_q_learning(*args, kappa, stop, mask=mask)


def sarsa(x, kappa=0.0, stop=True, mask=None):
    args = (x[name] for name in [*NAMES, "dist_q_t", "probs"])
    return rlprims.quantile_expected_sarsa(*args, kappa, stop)


RULES = {"q": q, "sarsa": sarsa}
FLOATS = ["dist_q_tm1", "r_t", "discount_t", "dist_q_t", "selector", "probs"]


def expected_loss(name, x, kappa):
    means = [sum(map(float, column)) for column in x["selector"].T]
    best = means.index(max(means))
    probs = {"q": np.eye(len(means))[best], "sarsa": x["probs"]}[name]
    losses = []
    for column in x["dist_q_t"].T:
        targets = [float(x["r_t"]) + float(x["discount_t"]) * float(y) for y in column]
        sources = x["dist_q_tm1"][:, x["a_tm1"]]
        losses.append(regression(sources, x["levels"], targets, kappa))
    return sum(p * loss for p, loss in zip(probs, losses, strict=True) if p)


@pytest.fixture(params=RULES)
def name(request):
    return request.param


@pytest.fixture
def rule(name):
    return RULES[name]


@pytest.fixture
def transition(rng):
    return {
        "dist_q_tm1": np.float32(rng.normal(size=(SOURCES, ACTIONS))),
        "levels": np.float32(rng.uniform(size=SOURCES)),
        "a_tm1": np.int32(2),
        "r_t": np.float32(0.3),
        "discount_t": np.float32(0.9),
        "dist_q_t": np.float32(rng.normal(size=(TARGETS, ACTIONS))),
        "selector": np.float32(rng.normal(size=(6, ACTIONS))),
        "probs": np.float32(rng.dirichlet(np.ones(ACTIONS))),
    }


def gradients(rule, x, kappa=1.0, stop=False, **kwargs):
    floats = {k: x[k] for k in FLOATS}
    return jax.grad(lambda floats: rule(x | floats, kappa, stop, **kwargs))(floats)


def assert_finite(grads):
    assert all(np.isfinite(grad).all() for grad in grads.values())


class TestEveryRule:
    @pytest.mark.parametrize("kappa", KAPPAS)
    def test_agrees_with_the_paper(self, rule, name, transition, kappa):
        expected = expected_loss(name, transition, kappa)
        np.testing.assert_allclose(rule(transition, kappa), expected, rtol=1e-5)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_a_termination_leaves_the_reward_alone(self, rule, transition, bad):
        x = transition | {"discount_t": np.float32(0)}
        x |= {k: np.full_like(x[k], bad) for k in ("dist_q_t", "selector")}
        if not bad > 0:
            x["probs"] = np.full_like(x["probs"], 0 if bad < 0 else NAN)
        expected = regression(x["dist_q_tm1"][:, 2], x["levels"], [x["r_t"]], 1)
        np.testing.assert_allclose(rule(x, 1.0), expected, rtol=1e-5)
        for stop in [True, False]:
            assert_finite(gradients(rule, x, stop=stop))

    def test_what_it_would_be_to_go_on_is_the_gradient_at_a_termination(
        self, rule, transition
    ):
        """A finite value behind a discount of 0 still has its effect on the slope."""
        x = transition | {"discount_t": np.float32(0)}
        slope = gradients(rule, x, kappa=INF)["discount_t"]
        around = [rule(x | {"discount_t": np.float32(d)}, INF) for d in (0.02, -0.02)]
        np.testing.assert_allclose(slope, (around[0] - around[1]) / 0.04, rtol=3e-3)

    @pytest.mark.parametrize("what", ["dist_q_t", "r_t", "discount_t", "dist_q_tm1"])
    def test_shows_nan_otherwise(self, rule, transition, what):
        x = transition | {what: np.full_like(transition[what], NAN)}
        assert np.isnan(rule(x))

    @pytest.mark.parametrize("kappa", [0.0, 1.0])
    def test_gradient_stops_at_the_target(self, rule, transition, kappa):
        grads = gradients(rule, transition, kappa, stop=True)
        of_action = grads.pop("dist_q_tm1")
        assert np.any(of_action[:, 2])
        assert not np.any(of_action[:, :2])
        assert not any(np.any(grad) for grad in grads.values())
        flowing = gradients(rule, transition, kappa, stop=False)
        np.testing.assert_allclose(
            of_action, flowing["dist_q_tm1"], rtol=1e-5, atol=1e-7
        )
        assert np.any(flowing["dist_q_t"])
        assert np.any(flowing["r_t"])

    @pytest.mark.parametrize("index", [-1, ACTIONS, 100])
    def test_an_action_out_of_range_is_nan(self, rule, transition, index):
        assert np.isnan(rule(transition | {"a_tm1": np.int32(index)}))


class TestLegalActions:
    @pytest.mark.parametrize("best", range(ACTIONS))
    def test_a_masked_action_is_never_chosen(self, transition, best):
        """What it holds does not matter: it is as if it were not there."""
        mask = np.arange(ACTIONS) != best
        x = {k: np.array(v) for k, v in transition.items()}
        rest = x | {k: x[k][:, mask] for k in ("dist_q_t", "selector")}
        expected = expected_loss("q", rest, 1)
        for bad in [9, NAN, INF, -INF]:
            x["selector"][:, best] = x["dist_q_t"][:, best] = bad
            np.testing.assert_allclose(q(x, 1.0, mask=mask), expected, rtol=1e-5)
            assert_finite(gradients(q, x, mask=mask))

    def test_minus_infinity_means_the_same(self, transition):
        expected = q(transition, mask=np.array([True, False, True]))
        transition["selector"][:, 1] = -INF
        assert q(transition) == expected

    def test_no_legal_action_is_nan_unless_the_episode_is_over(self, transition):
        none = np.zeros(ACTIONS, bool)
        assert np.isnan(q(transition, mask=none))
        over = transition | {"discount_t": np.float32(0)}
        np.testing.assert_allclose(q(over, mask=none), q(over), rtol=1e-6)
        assert_finite(gradients(q, over, mask=none))

    def test_nothing_is_chosen_by_nan(self, transition):
        transition["selector"][0, 1] = NAN
        assert np.isnan(q(transition))


class TestExpectedSarsa:
    def test_of_a_greedy_policy_is_q_learning(self, transition):
        best = transition["selector"].mean(axis=0).argmax()
        greedy = transition | {"probs": np.eye(ACTIONS, dtype=np.float32)[best]}
        np.testing.assert_allclose(sarsa(greedy, 1.0), q(greedy, 1.0), rtol=1e-5)

    def test_mixes_distributions_and_not_their_values(self):
        """The median of the return is 0 or 2, not sure to be 1."""
        dist_q = jnp.array([[0.0, 2.0]])
        args = dist_q, jnp.array([0.5]), 0, 1.0, 1.0, dist_q - 1, jnp.array([0.5, 0.5])
        assert rlprims.quantile_expected_sarsa(*args) == 0.5

    def test_an_impossible_action_counts_for_nothing(self, transition):
        x = transition | {"probs": np.float32([0.4, 0, 0.6])}
        expected = expected_loss("sarsa", x, 1)
        for bad in [NAN, INF, -INF]:
            x["dist_q_t"][:, 1] = bad
            np.testing.assert_allclose(sarsa(x, 1.0), expected, rtol=1e-5)
            assert_finite(gradients(sarsa, x))

    def test_no_policy_is_shown_unless_the_episode_is_over(self, transition):
        assert np.isnan(sarsa(transition | {"probs": np.float32([NAN, 1, 0])}))


class TestErrors:
    def test_a_batch_is_refused_with_the_call_to_make(self, sample):
        batch = [np.stack([x, x]) for x in sample]
        with pytest.raises(ValueError, match=r"^quantile_regression_loss: ") as error:
            quantile_regression_loss(*batch)
        assert "For a batch of 2, use jax.vmap(" in str(error.value)

    def test_one_level_for_all_is_refused(self, sample):
        match = r"^quantile_regression_loss: tau_src has shape \(1,\), .* N = 5\."
        with pytest.raises(ValueError, match=match):
            quantile_regression_loss(sample[0], sample[1][:1], sample[2])

    def test_a_negative_huber_parameter_is_refused(self, sample):
        match = r"^quantile_regression_loss: huber_param must be in \[0, inf\]"
        with pytest.raises(ValueError, match=match):
            quantile_regression_loss(*sample, -1.0)

    def test_no_targets_are_refused(self, rule, transition, sample):
        empty = transition | {"dist_q_t": np.zeros((0, ACTIONS), np.float32)}
        match = r"^quantile_\w+: dist_q_t must have an entry, got \(0, 3\)\.$"
        with pytest.raises(ValueError, match=match):
            rule(empty)
        match = (
            r"^quantile_regression_loss: dist_target must have an entry, got \(0,\)\.$"
        )
        with pytest.raises(ValueError, match=match):
            quantile_regression_loss(*sample[:2], sample[2][:0])

    def test_an_integer_reward_is_refused(self, rule, transition):
        with pytest.raises(TypeError, match=r"r_t must be floating-point, got int32"):
            rule(transition | {"r_t": np.int32(1)})

"""Off-policy errors, against sums over steps and means over all trajectories."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ACTIONS, STEPS = 3, 6
CUT = 2  # the step at which an episode ends


def estimate(name, s, lambda_=1.0, sigma=None, **given):
    """Calls a function by name, with as much of the trajectory as it takes."""
    more = {
        "tree_backup": [s["pi_t"]],
        "off_policy_q_lambda": [s["pi_t"]],
        "q_sigma": [s["pi_t"], s["rho_t"], sigma],
        "per_decision_importance_sampling": [s["rho_t"]],
    }[name]
    common = [s[k] for k in ("q_tm1", "q_t", "a_tm1", "a_t", "r_t", "discount_t")]
    return getattr(rlprims, name)(*common, *more, lambda_, **given)


@pytest.fixture
def steps(rng):
    """A trajectory in which an episode ends at step 2."""
    floats = rng.uniform(0.2, 1.5, size=(2, STEPS))
    floats[0, CUT] = 0
    return {
        "q_tm1": rng.normal(size=(STEPS, ACTIONS)).astype(np.float32),
        "q_t": rng.normal(size=(STEPS, ACTIONS)).astype(np.float32),
        "a_tm1": rng.integers(ACTIONS, size=STEPS).astype(np.int32),
        "a_t": rng.integers(ACTIONS, size=STEPS).astype(np.int32),
        "r_t": rng.normal(size=STEPS).astype(np.float32),
        "discount_t": np.minimum(floats[0], 1).astype(np.float32),
        "pi_t": rng.dirichlet(np.ones(ACTIONS), size=STEPS).astype(np.float32),
        "rho_t": floats[1].astype(np.float32),
    }


def taken(values, actions):
    return np.float64(values)[np.arange(STEPS), actions]


def sum_of_errors(s, bootstrap, trust):
    """The first error, and each later one, weighted by the trust up to it."""
    q_tm1, q_t = taken(s["q_tm1"], s["a_tm1"]), taken(s["q_t"], s["a_t"])
    discount = np.float64(s["discount_t"])
    target = s["r_t"] + discount * bootstrap
    return [
        target[t]
        - q_tm1[t]
        + sum(
            np.prod(discount[t:k] * trust[t:k]) * (target[k] - q_t[k - 1])
            for k in range(t + 1, STEPS)
        )
        for t in range(STEPS)
    ]


def mean_values(s):
    return np.float64([np.dot(p, q) for p, q in zip(s["pi_t"], s["q_t"], strict=True)])


LAMBDAS = [0.0, 0.6, 1.0]


@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_tree_backup_trusts_an_action_as_far_as_it_is_likely(steps, lambda_):
    trust = lambda_ * taken(steps["pi_t"], steps["a_t"])
    expected = sum_of_errors(steps, mean_values(steps), trust)
    actual = estimate("tree_backup", steps, lambda_)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_off_policy_q_lambda_trusts_every_action_alike(steps, lambda_):
    expected = sum_of_errors(steps, mean_values(steps), np.full(STEPS, lambda_))
    actual = estimate("off_policy_q_lambda", steps, lambda_)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lambda_", LAMBDAS)
@pytest.mark.parametrize("control_variate", [False, True])
def test_q_sigma_mixes_samples_and_means(steps, lambda_, control_variate, rng):
    sigma = rng.uniform(size=STEPS).astype(np.float32)
    rho, q, v = steps["rho_t"], taken(steps["q_t"], steps["a_t"]), mean_values(steps)
    trust = sigma * rho + (1 - sigma) * taken(steps["pi_t"], steps["a_t"])
    mixed = v if control_variate else sigma * rho * q + (1 - sigma) * v
    expected = sum_of_errors(steps, mixed, lambda_ * trust)
    actual = estimate("q_sigma", steps, lambda_, sigma, control_variate=control_variate)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_q_sigma_on_policy_is_the_unifying_algorithm(steps, rng):
    """As the paper has it: a sum of Sarsa's and expected Sarsa's errors."""
    sigma = rng.uniform(size=STEPS)
    steps = steps | {"rho_t": np.ones(STEPS, np.float32)}
    q_tm1, q_t = (
        taken(steps["q_tm1"], steps["a_tm1"]),
        taken(steps["q_t"], steps["a_t"]),
    )
    before = np.append(q_tm1[:1], q_t[:-1])  # one array of values, as of one policy
    steps["q_tm1"] = np.float32(before[:, None] * np.ones(ACTIONS))
    r, discount = np.float64(steps["r_t"]), np.float64(steps["discount_t"])
    sarsa, expected_sarsa = (
        r + discount * v - before for v in (q_t, mean_values(steps))
    )
    errors = sigma * sarsa + (1 - sigma) * expected_sarsa
    decays = discount * ((1 - sigma) * taken(steps["pi_t"], steps["a_t"]) + sigma)
    expected = [
        sum(np.prod(decays[t:k]) * errors[k] for k in range(t, STEPS))
        for t in range(STEPS)
    ]
    actual = estimate("q_sigma", steps, sigma=np.float32(sigma))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_per_decision_importance_sampling_weighs_each_reward_by_what_led_to_it(
    steps, lambda_
):
    """An average of returns of each length, without a recursion."""
    rho, discount = np.float64(steps["rho_t"]), np.float64(steps["discount_t"])
    q, r = taken(steps["q_t"], steps["a_t"]), steps["r_t"]
    weights = discount * rho

    def n_step(t, n):
        rewards = sum(np.prod(weights[t:k]) * r[k] for k in range(t, t + n))
        return rewards + np.prod(weights[t : t + n]) * q[t + n - 1]

    def mean(t):
        last = STEPS - t
        shares = [lambda_ ** (n - 1) * (1 - lambda_) for n in range(1, last)]
        shares.append(lambda_ ** (last - 1))
        return sum(x * n_step(t, n) for n, x in enumerate(shares, start=1))

    predictions = taken(steps["q_tm1"], steps["a_tm1"])
    expected = [mean(t) - predictions[t] for t in range(STEPS)]
    actual = estimate("per_decision_importance_sampling", steps, lambda_)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# Relations


@pytest.mark.parametrize("control_variate", [False, True])
def test_q_sigma_of_means_alone_is_tree_backup(steps, control_variate):
    """The ratios are then not used."""
    blind = steps | {"rho_t": np.full(STEPS, np.nan, np.float32)}
    actual = estimate("q_sigma", blind, 0.7, 0.0, control_variate=control_variate)
    np.testing.assert_allclose(actual, estimate("tree_backup", steps, 0.7), rtol=1e-5)


def test_q_sigma_of_samples_alone_is_per_decision_importance_sampling(steps):
    expected = estimate("per_decision_importance_sampling", steps, 0.7)
    actual = estimate("q_sigma", steps, 0.7, 1.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_importance_sampling_on_policy_is_sarsa(steps):
    ones = steps | {"rho_t": np.ones(STEPS, np.float32)}
    keys = ("q_tm1", "a_tm1", "r_t", "discount_t", "q_t", "a_t")
    expected = rlprims.sarsa_lambda(*(steps[k] for k in keys), 0.7)
    actual = estimate("per_decision_importance_sampling", ones, 0.7)
    np.testing.assert_array_equal(actual, expected)


def test_tree_backup_of_a_greedy_policy_is_watkins_q_lambda(steps):
    greedy = np.eye(ACTIONS, dtype=np.float32)[steps["q_t"].argmax(axis=-1)]
    keys = ("q_tm1", "a_tm1", "r_t", "discount_t", "q_t", "a_t")
    expected = rlprims.watkins_q_lambda(*(steps[k] for k in keys), 1.0)
    actual = estimate("tree_backup", steps | {"pi_t": greedy})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_tree_backup_is_retrace_where_the_behaviour_was_certain(steps):
    """A ratio to a probability of one is the probability itself."""
    keys = ("q_tm1", "q_t", "a_tm1", "a_t", "r_t", "discount_t", "pi_t")
    ones = np.ones(STEPS, np.float32)
    expected = rlprims.retrace(*(steps[k] for k in keys), ones, 0.7)
    np.testing.assert_array_equal(estimate("tree_backup", steps, 0.7), expected)


ALL = {
    "tree_backup": {},
    "off_policy_q_lambda": {},
    "q_sigma": {"sigma": 0.4},
    "q_sigma-control": {"sigma": 0.4, "control_variate": True},
    "per_decision_importance_sampling": {},
}
over_all = pytest.mark.parametrize("name", ALL)


def run(name, steps, lambda_=1.0):
    """Calls one of them with settings of its own."""
    return estimate(name.split("-")[0], steps, lambda_, **ALL[name])


@over_all
def test_without_trust_is_one_step(steps, name):
    sampled = {"per_decision_importance_sampling": 1.0, "q_sigma": 0.4}.get(name, 0.0)
    q = steps["rho_t"] * taken(steps["q_t"], steps["a_t"])
    v = sampled * q + (1 - sampled) * mean_values(steps)
    predictions = taken(steps["q_tm1"], steps["a_tm1"])
    expected = steps["r_t"] + steps["discount_t"] * v - predictions
    np.testing.assert_allclose(run(name, steps, 0.0), expected, rtol=1e-5, atol=1e-6)


def compiled(name):
    """Errors and gradients of a sum of the first, all settings being arrays too."""

    def early(floats, actions, count):
        given = {k: v for k, v in ALL[name].items() if k == "control_variate"}
        given |= {"sigma": floats["sigma"]} if "sigma" in ALL[name] else {}
        errors = estimate(
            name.split("-")[0],
            floats | actions,
            floats["lambda_"],
            stop_target_gradients=False,
            **given,
        )
        return jnp.where(jnp.arange(STEPS) < count, errors, 0).sum()

    fn = jax.jit(jax.value_and_grad(early))

    def run(steps, count):
        more = {"sigma": np.float32(0.4), "lambda_": np.float32(0.7)}
        steps = {k: np.broadcast_to(x, STEPS) for k, x in more.items()} | steps
        actions = {k: x for k, x in steps.items() if k in ("a_tm1", "a_t")}
        floats = {k: x for k, x in steps.items() if k not in actions}
        return fn(floats, actions, count)

    return run


def spoilt(x, where):
    bad = x.dtype.type(np.nan if x.dtype == np.float32 else -7)
    return np.where(where.reshape(-1, *[1] * (x.ndim - 1)), bad, x)


@over_all
def test_does_not_see_past_a_termination(steps, name):
    """Nor is anything known of the terminal state, or of an action there."""
    reached, fn = ["q_t", "a_t", "pi_t", "rho_t"], compiled(name)
    times = np.arange(STEPS)
    hidden = {k: times >= CUT if k in reached else times > CUT for k in steps}
    del hidden["discount_t"]
    expected, _ = fn(steps, CUT + 1)
    for keys in [[*hidden], *([key] for key in reached)]:
        changed = {k: spoilt(steps[k], hidden[k]) for k in keys}
        value, gradients = fn(steps | changed, CUT + 1)
        assert value == expected
        for key, gradient in gradients.items():
            assert np.isfinite(gradient[: CUT + 1]).all(), (keys, key)


@over_all
def test_needs_no_value_where_the_trajectory_ends_with_the_episode(steps, name):
    ends, fn = np.arange(STEPS) == STEPS - 1, compiled(name)
    steps["discount_t"] = np.where(ends, np.float32(0), np.float32(0.9))
    keys = "q_t", "a_t", "pi_t", "rho_t"
    value, gradients = fn(steps | {k: spoilt(steps[k], ends) for k in keys}, STEPS)
    assert value == fn(steps, STEPS)[0]
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@over_all
def test_shows_what_is_not_finite_where_nothing_cuts(steps, name):
    spoilt = steps | {"r_t": np.where(np.arange(STEPS) == 1, np.nan, steps["r_t"])}
    assert np.isnan(run(name, spoilt)[:2]).all()


@pytest.mark.parametrize(
    "name", ["tree_backup", "off_policy_q_lambda", "q_sigma-control"]
)
def test_does_not_need_to_know_the_last_action(steps, name):
    last, fn = np.arange(STEPS) == STEPS - 1, compiled(name)
    blind = steps | {k: spoilt(steps[k], last) for k in ("a_t", "rho_t")}
    (value, gradients), (expected, clean) = fn(blind, STEPS), fn(steps, STEPS)
    assert value == expected
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient, clean[key], rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["q_sigma", "per_decision_importance_sampling"])
@pytest.mark.parametrize("key", ["a_t", "rho_t"])
def test_needs_to_know_the_last_action_that_it_samples(steps, name, key):
    blind = steps | {key: spoilt(steps[key], np.arange(STEPS) == STEPS - 1)}
    assert np.isnan(run(name, blind)[-1])


@over_all
def test_an_action_out_of_range_is_nan(steps, name):
    spoilt = steps | {"a_t": np.where(np.arange(STEPS) == 1, 3, steps["a_t"])}
    spoilt["a_t"] = spoilt["a_t"].astype(np.int32)
    errors = run(name, spoilt, 0.6)
    assert np.isnan(errors[:2]).all()
    assert np.isfinite(errors[2:]).all()


@pytest.mark.parametrize(
    "name", ["tree_backup", "off_policy_q_lambda", "q_sigma-control"]
)
@pytest.mark.parametrize("bad", [-np.inf, np.nan])
def test_an_action_that_is_never_taken_counts_for_nothing(steps, name, bad):
    steps["pi_t"][:, 2], steps["a_t"] = 0, np.zeros(STEPS, np.int32)
    spoilt = steps | {"q_t": steps["q_t"].copy()}
    spoilt["q_t"][:, 2] = bad
    np.testing.assert_array_equal(run(name, spoilt), run(name, steps))


def test_q_sigma_may_average_where_a_time_limit_left_no_action(steps):
    cut = {"truncation_t": np.arange(STEPS) == 4}
    sigma = np.where(cut["truncation_t"], 0, 1).astype(np.float32)
    blind = steps | {"a_t": steps["a_t"].copy(), "rho_t": steps["rho_t"].copy()}
    blind["a_t"][4], blind["rho_t"][4] = -1, np.nan
    actual = estimate("q_sigma", blind, sigma=sigma, **cut)
    np.testing.assert_array_equal(
        actual, estimate("q_sigma", steps, sigma=sigma, **cut)
    )
    mean = steps["r_t"] + steps["discount_t"] * mean_values(steps)
    expected = mean[4] - taken(steps["q_tm1"], steps["a_tm1"])[4]
    np.testing.assert_allclose(actual[4], expected, rtol=1e-5)


def test_a_sigma_out_of_range_is_refused(steps):
    with pytest.raises(ValueError, match=r"^q_sigma: sigma must be in \[0, 1\], got 2"):
        estimate("q_sigma", steps, sigma=2.0)


def test_whether_to_use_control_variates_is_fixed(steps):
    with pytest.raises(TypeError, match="control_variate must be fixed while tracing"):
        estimate("q_sigma", steps, sigma=1.0, control_variate=np.array(True))


def test_errors_of_shape_name_the_argument(steps):
    short = steps | {"rho_t": steps["rho_t"][:-1]}
    with pytest.raises(
        ValueError,
        match=r"^per_decision_importance_sampling: rho_t has shape \(5,\), expected",
    ):
        estimate("per_decision_importance_sampling", short)


# Means over all trajectories of a small problem


class Problem:
    """Three steps through two states, two actions each, and a terminal state.

    All trajectories that start with one action are listed, with their probabilities.
    """

    horizon, discount = 3, 0.8

    def __init__(self, rng):
        shape = self.horizon, 2, 2  # time, state, action
        self.rewards = rng.normal(size=shape)
        self.moves = rng.dirichlet(np.ones(2), size=shape)
        self.pi, self.mu = rng.dirichlet(np.ones(2) * 2, size=(2, self.horizon, 2))
        self.q = np.zeros((self.horizon + 1, 2, 2))
        for t in reversed(range(self.horizon)):
            v = (self.pi[t + 1] * self.q[t + 1]).sum(-1) if t + 1 < 3 else np.zeros(2)
            self.q[t] = self.rewards[t] + self.discount * self.moves[t] @ v

    def trajectories(self, q):
        """Arguments of each trajectory from state 0 and action 0, and its weight."""
        for s1, a1, s2, a2 in itertools.product(range(2), repeat=4):
            states, actions = [0, s1, s2], [0, a1, a2]
            at = lambda x, states=states: np.stack(
                [x[t, s] for t, s in enumerate(states)]
            )
            end = lambda x: np.concatenate([x[1:], np.full_like(x[:1], np.nan)])
            probability = (
                self.moves[0, 0, 0, s1]
                * self.mu[1, s1, a1]
                * self.moves[1, s1, a1, s2]
                * self.mu[2, s2, a2]
            )
            a = np.array(actions, np.int32)
            pi, mu = at(self.pi), at(self.mu)
            steps = np.arange(3)
            yield (
                {
                    "q_tm1": at(q),
                    "q_t": end(at(q)),
                    "a_tm1": a,
                    "a_t": np.append(a[1:], 0).astype(np.int32),
                    "r_t": at(self.rewards)[steps, a],
                    "discount_t": np.array([self.discount, self.discount, 0]),
                    "pi_t": end(pi),
                    "rho_t": end((pi / mu)[steps, a]),
                },
                probability,
            )

    def moments(self, name, q, **given):
        """The mean and the variance of the first target, of those that act with mu."""
        with jax.enable_x64(True):
            steps, weights = zip(*self.trajectories(q), strict=True)
            batch = jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *steps)
            fn = lambda s: estimate(name, s, **given)[0]
            targets = np.asarray(jax.jit(jax.vmap(fn))(batch)) + q[0, 0, 0]
        np.testing.assert_allclose(sum(weights), 1)
        mean = np.dot(weights, targets)
        return mean, np.dot(weights, (targets - mean) ** 2)


@pytest.fixture(scope="module")
def problem():
    return Problem(np.random.default_rng(3))


SAMPLERS = {
    "per_decision_importance_sampling": {},
    "q_sigma": {"sigma": 1.0},
    "q_sigma-control": {"sigma": 1.0, "control_variate": True},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_importance_sampling_is_unbiased_whatever_the_values(problem, name):
    wrong = np.random.default_rng(1).normal(size=problem.q.shape)
    mean, _ = problem.moments(name.split("-")[0], wrong, **SAMPLERS[name])
    np.testing.assert_allclose(mean, problem.q[0, 0, 0], rtol=1e-12)


@over_all
@pytest.mark.parametrize("lambda_", [0.6, 1.0])
def test_the_right_values_are_where_no_error_is_left_on_average(problem, name, lambda_):
    mean, _ = problem.moments(
        name.split("-")[0], problem.q, lambda_=lambda_, **ALL[name]
    )
    np.testing.assert_allclose(mean, problem.q[0, 0, 0], rtol=1e-12)


def test_control_variates_and_means_make_targets_less_noisy(problem):
    """Once the values are right."""
    variances = [
        problem.moments("q_sigma", problem.q, sigma=sigma, control_variate=control)[1]
        for sigma, control in [(1.0, False), (1.0, True), (0.0, True)]
    ]
    assert variances[0] > variances[1] > variances[2] > 0

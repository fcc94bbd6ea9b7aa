"""Action-value errors, against plain-Python readings of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import rlprims

ACTIONS = 4


def value_of_sarsa(q_t, extra):
    return q_t[extra["a_t"]]


def value_of_expected_sarsa(q_t, extra):
    return sum(p * q for p, q in zip(extra["probs_a_t"], q_t, strict=True))


def value_of_q_learning(q_t, extra):
    best = q_t[0]
    for q in q_t:
        best = q if q > best else best
    return best


def value_of_double_q_learning(q_t, extra):
    selector = list(extra["q_t_selector"])
    return q_t[selector.index(value_of_q_learning(selector, extra))]


def value_of_persistent_q_learning(q_t, extra):
    alpha = extra["action_gap_scale"]
    return (1 - alpha) * value_of_q_learning(q_t, extra) + alpha * q_t[extra["a_tm1"]]


# Each rule with what it takes beside q_tm1, a_tm1, r_t, discount_t and q_t.
RULES = {
    "sarsa": (value_of_sarsa, ["a_t"]),
    "expected_sarsa": (value_of_expected_sarsa, ["probs_a_t"]),
    "q_learning": (value_of_q_learning, []),
    "double_q_learning": (value_of_double_q_learning, ["q_t_selector"]),
    "persistent_q_learning": (value_of_persistent_q_learning, ["action_gap_scale"]),
}


@pytest.fixture
def extra(rng):
    return {
        "a_tm1": np.int32(2),
        "a_t": np.int32(1),
        "probs_a_t": rng.dirichlet(np.ones(ACTIONS)).astype(np.float32),
        "q_t_selector": rng.normal(size=ACTIONS).astype(np.float32),
        "action_gap_scale": np.float32(0.3),
    }


@pytest.fixture(params=RULES)
def rule(request, extra):
    """A rule as a function of (q_tm1, r_t, discount_t, q_t, stop), and its oracle."""
    oracle, names = RULES[request.param]
    fn, more = getattr(rlprims, request.param), [extra[name] for name in names]

    def error(q_tm1, r_t, discount_t, q_t, stop=True):
        return fn(q_tm1, extra["a_tm1"], r_t, discount_t, q_t, *more, stop)

    return error, lambda q_t: oracle([float(q) for q in q_t], extra)


@pytest.fixture
def transition(rng):
    q_tm1, q_t = rng.normal(size=(2, ACTIONS)).astype(np.float32)
    return q_tm1, np.float32(0.7), np.float32(0.9), q_t


class TestEveryRule:
    def test_agrees_with_the_textbook(self, rule, transition):
        error, value = rule
        q_tm1, r_t, discount_t, q_t = transition
        expected = float(r_t) + float(discount_t) * value(q_t) - float(q_tm1[2])
        np.testing.assert_allclose(error(*transition), expected, rtol=1e-5)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("stop", [True, False])
    def test_ignores_the_state_after_a_termination(self, rule, transition, bad, stop):
        error, _ = rule
        q_tm1, r_t, _, q_t = transition
        spoilt = np.full_like(q_t, bad)
        assert error(q_tm1, r_t, 0.0, spoilt) == error(q_tm1, r_t, 0.0, q_t)
        grads = jax.grad(error, argnums=(0, 1, 2, 3))(q_tm1, r_t, 0.0, spoilt, stop)
        assert all(np.isfinite(g).all() for g in grads)

    def test_shows_a_value_that_is_not_finite_otherwise(self, rule, transition):
        error, _ = rule
        q_tm1, r_t, discount_t, q_t = transition
        assert np.isnan(error(q_tm1, r_t, discount_t, np.full_like(q_t, np.nan)))

    def test_what_it_would_be_to_go_on_is_the_gradient_at_a_termination(
        self, rule, transition
    ):
        """A finite value behind a discount of 0 still has its effect on the slope."""
        error, value = rule
        q_tm1, r_t, _, q_t = transition
        slope = jax.grad(error, argnums=2)(q_tm1, r_t, 0.0, q_t, False)
        np.testing.assert_allclose(slope, value(q_t), rtol=1e-5)

    def test_gradient_stops_at_the_target(self, rule, transition):
        error, _ = rule
        grads = jax.grad(error, argnums=(0, 1, 2, 3))(*transition)
        np.testing.assert_array_equal(grads[0], -np.eye(ACTIONS)[2])
        assert not any(np.any(g) for g in grads[1:])

    def test_gradient_equals_finite_differences_when_it_may_flow(
        self, rule, transition
    ):
        error, _ = rule
        with jax.enable_x64(True):
            args = [np.asarray(x, np.float64) for x in transition]
            check_grads(
                lambda *x: error(*x, False), args, order=2, modes=["fwd", "rev"]
            )

    @pytest.mark.parametrize("stop", [True, False])
    def test_a_traced_flag_does_what_a_python_one_does(self, rule, transition, stop):
        error, _ = rule
        grads = jax.grad(error, argnums=(0, 3))
        for traced, plain in zip(
            jax.jit(grads)(*transition, stop), grads(*transition, stop), strict=True
        ):
            np.testing.assert_allclose(traced, plain, rtol=1e-6)

    @pytest.mark.parametrize("index", [-1, ACTIONS, 100])
    def test_an_action_out_of_range_is_nan(self, index, transition):
        q_tm1, r_t, discount_t, q_t = transition
        assert np.isnan(rlprims.q_learning(q_tm1, index, r_t, discount_t, q_t))
        assert np.isnan(rlprims.sarsa(q_tm1, 0, r_t, discount_t, q_t, index))
        assert np.isnan(rlprims.qv_learning(q_tm1, index, r_t, discount_t, 1.0))


def test_q_learning_is_zero_at_the_fixed_point():
    """A one-state loop with reward 1 and discount 0.5 is worth 2."""
    q = jnp.array([2.0, 0.0])
    assert rlprims.q_learning(q, 0, 1.0, 0.5, q) == 0


def test_q_learning_never_takes_an_illegal_action():
    q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([-jnp.inf, 3.0])
    assert rlprims.q_learning(q_tm1, 0, 1.0, 0.5, q_t) == 1.5


def test_expected_sarsa_gives_an_impossible_action_no_weight():
    q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([3.0, -jnp.inf])
    probs = jnp.array([1.0, 0.0])

    def error(q_t, probs):
        return rlprims.expected_sarsa(q_tm1, 0, 1.0, 0.5, q_t, probs, False)

    assert error(q_t, probs) == 1.5
    for grad in jax.grad(error, argnums=(0, 1))(q_t, probs):
        assert np.isfinite(grad).all()


def test_expected_sarsa_of_a_greedy_policy_is_q_learning(transition):
    q_tm1, r_t, discount_t, q_t = transition
    greedy = np.eye(ACTIONS, dtype=np.float32)[q_t.argmax()]
    np.testing.assert_allclose(
        rlprims.expected_sarsa(q_tm1, 2, r_t, discount_t, q_t, greedy),
        rlprims.q_learning(q_tm1, 2, r_t, discount_t, q_t),
        rtol=1e-6,
    )


def test_double_q_learning_does_not_overestimate_a_noisy_maximum(rng):
    """The mean over noise of zero mean is zero: for one table it would be positive."""
    value, selector = rng.normal(size=(2, 2000, ACTIONS)).astype(np.float32)
    nothing, a = np.zeros(ACTIONS, np.float32), np.int32(0)
    axes = (None, None, None, None, 0, 0)
    errors = jax.vmap(rlprims.double_q_learning, axes)(
        nothing, a, 0.0, 1.0, value, selector
    )
    single = jax.vmap(rlprims.q_learning, axes[:5])(nothing, a, 0.0, 1.0, value)
    assert abs(float(errors.mean())) < 4 / np.sqrt(2000)  # four standard errors
    assert float(single.mean()) > 1 - 4 / np.sqrt(2000)  # E[max of 4 normals] = 1.03


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_persistent_q_learning_is_exact_at_the_ends_of_its_scale(alpha):
    """A weight of zero hides an action that is not legal."""
    q_tm1 = jnp.array([1.0, 2.0])
    same_is_illegal = jnp.array([3.0, -jnp.inf])
    best_is_infinite = jnp.array([jnp.inf, 3.0])
    q_t = same_is_illegal if alpha == 0 else best_is_infinite
    error = rlprims.persistent_q_learning(q_tm1, 1, 1.0, 0.5, q_t, alpha)
    assert error == 1.0 + 0.5 * 3.0 - 2.0


GREEDY = {
    "q_learning": lambda q, **k: rlprims.q_learning(q, 2, 0.5, 0.9, q, **k),
    "double_q_learning": lambda q, **k: rlprims.double_q_learning(
        q, 2, 0.5, 0.9, np.arange(4, dtype=np.float32), q, **k
    ),
    "persistent_q_learning": lambda q, **k: rlprims.persistent_q_learning(
        q, 2, 0.5, 0.9, q, 0.3, **k
    ),
}


class TestLegalActions:
    """A mask does what minus infinity does, and hides what is not legal."""

    mask = np.array([True, False, True, False])

    @pytest.mark.parametrize("name", GREEDY)
    def test_the_best_is_the_best_legal_one(self, name):
        q = np.float32([1.0, 9.0, 2.0, np.nan])
        few = np.where(self.mask, q, -np.inf).astype(np.float32)
        fn = GREEDY[name]
        assert fn(q, mask=self.mask) == fn(few)
        assert np.isfinite(fn(q, mask=self.mask))

    @pytest.mark.parametrize("name", GREEDY)
    def test_where_none_is_legal_there_is_no_finite_value(self, name):
        q, nothing = np.float32([1, 2, 3, 4]), np.zeros(4, bool)
        assert not np.isfinite(GREEDY[name](q, mask=nothing))

    @pytest.mark.parametrize("name", GREEDY)
    def test_a_terminal_state_may_have_none(self, name):
        """There the value is not defined, and does not count."""
        nothing, q = np.zeros(4, bool), np.float32([1, 2, 3, 4])
        more = {"double_q_learning": [q], "persistent_q_learning": [0.3]}

        def error(discount, q_t):
            fn = getattr(rlprims, name)
            args = (q, 2, 0.5, discount, q_t, *more.get(name, []))
            return fn(*args, False, mask=nothing)

        assert error(0.0, q) == 0.5 - 3
        gradients = jax.grad(error, argnums=(0, 1))(0.0, q)
        assert all(np.isfinite(x).all() for x in gradients)


class TestQvLearning:
    def test_agrees_with_the_textbook(self):
        q_tm1 = jnp.array([1.0, 2.0])
        assert rlprims.qv_learning(q_tm1, 1, 0.5, 0.5, 4.0) == 0.5

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_ignores_the_state_after_a_termination(self, bad):
        q_tm1 = jnp.array([1.0, 2.0])
        assert rlprims.qv_learning(q_tm1, 1, 0.5, 0.0, bad) == -1.5

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradient_flows_through_the_target_only_on_request(self, stop):
        grads = jax.grad(rlprims.qv_learning, argnums=(0, 2, 3, 4))(
            jnp.array([1.0, 2.0]), 1, 0.5, 0.5, 4.0, stop
        )
        assert grads[0].tolist() == [0, -1]
        assert [float(g) for g in grads[1:]] == ([0, 0, 0] if stop else [1, 4, 0.5])


class TestErrors:
    def test_a_batch_is_refused_with_the_call_to_make(self, transition):
        q_tm1, r_t, _, q_t = transition
        batch = [np.stack([x, x]) for x in (q_tm1, np.int32(2), r_t)]
        with pytest.raises(ValueError, match=r"^q_learning: q_tm1 has shape") as error:
            rlprims.q_learning(*batch, 0.9, np.stack([q_t, q_t]))
        assert str(error.value) == (
            "q_learning: q_tm1 has shape (2, 4), expected f[A]. For a batch of 2, use "
            "jax.vmap(q_learning, in_axes=(0, 0, 0, None, 0))"
            "(q_tm1, a_tm1, r_t, discount_t, q_t)."
        )

    def test_action_sets_of_different_size_are_refused(self, transition):
        q_tm1, r_t, discount_t, _ = transition
        with pytest.raises(ValueError, match=r"q_t has shape \(5,\).*A = 4"):
            rlprims.q_learning(q_tm1, 2, r_t, discount_t, np.ones(5, np.float32))

    def test_an_integer_reward_is_refused_with_its_remedy(self, transition):
        q_tm1, _, discount_t, q_t = transition
        with pytest.raises(
            TypeError, match=r"r_t must be floating-point, got int32; conv"
        ):
            rlprims.q_learning(q_tm1, 2, np.int32(1), discount_t, q_t)

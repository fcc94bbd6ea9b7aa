"""Policy losses, against NumPy readings of the papers, step by step."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    clipped_surrogate_pg_loss,
    dpg_loss,
    entropy_loss,
    policy_gradient_loss,
    qpg_loss,
    rm_loss,
    rpg_loss,
)

INFINITY = math.inf
ALL_ACTIONS = [qpg_loss, rm_loss, rpg_loss]
T, A = 5, 4


def in_double(by_hand):
    """Hands a NumPy function arrays of double precision."""

    @functools.wraps(by_hand)
    def wrapper(*args, **kwargs):
        args, kwargs = jax.tree.map(
            lambda x: np.float64(x) if getattr(x, "dtype", None) == np.float32 else x,
            (args, kwargs),
        )
        return by_hand(*args, **kwargs)

    return wrapper


def softmax_by_hand(logits):
    exponentials = [math.exp(x) for x in logits]
    return [e / sum(exponentials) for e in exponentials]


def mean(numbers):
    return sum(numbers) / len(numbers)


@in_double
def policy_gradient_by_hand(logits_t, a_t, adv_t, w_t):
    return mean(
        [
            -w * adv * math.log(softmax_by_hand(logits)[a])
            for logits, a, adv, w in zip(logits_t, a_t, adv_t, w_t, strict=True)
        ]
    )


@in_double
def entropy_by_hand(logits_t, w_t):
    return -mean(
        [
            w * sum(-p * math.log(p) for p in softmax_by_hand(logits))
            for logits, w in zip(logits_t, w_t, strict=True)
        ]
    )


@in_double
def surrogate_by_hand(ratio_t, adv_t, epsilon):
    terms = []
    for ratio, adv in zip(ratio_t, adv_t, strict=True):
        clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
        terms.append(min(ratio * adv, clipped * adv))
    return -mean(terms)


@in_double
def all_actions_by_hand(logits_t, q_t, of_step):
    """Averages a function of one step's policy and advantages."""
    terms = []
    for logits, q in zip(logits_t, q_t, strict=True):
        pi = softmax_by_hand(logits)
        v = sum(p * x for p, x in zip(pi, q, strict=True))
        terms.append(of_step(pi, [x - v for x in q]))
    return mean(terms)


def positive(x):
    return x if x > 0 else 0.0


def dot(xs, ys):
    return sum(x * y for x, y in zip(xs, ys, strict=True))


OF_STEP = {
    qpg_loss: lambda pi, adv: -dot(pi, adv),
    rm_loss: lambda pi, adv: -dot(pi, map(positive, adv)),
    rpg_loss: lambda pi, adv: sum(map(positive, adv)),
}


def difference(fn, x, step=1e-6):
    """The gradient of a NumPy function, by central differences."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[index] = step
        gradient[index] = (fn(x + nudge) - fn(x - nudge)) / (2 * step)
    return gradient


@pytest.fixture
def steps(rng):
    """Logits, actions, advantages, weights and action values of five steps."""
    return {
        "logits_t": rng.normal(size=(T, A)).astype(np.float32),
        "a_t": rng.integers(A, size=T).astype(np.int32),
        "adv_t": rng.normal(size=T).astype(np.float32),
        "w_t": rng.uniform(size=T).astype(np.float32),
        "q_t": rng.normal(size=(T, A)).astype(np.float32),
    }


def arguments(fn, steps):
    """What `fn` takes, out of `steps`."""
    names = {
        policy_gradient_loss: ["logits_t", "a_t", "adv_t", "w_t"],
        entropy_loss: ["logits_t", "w_t"],
    }.get(fn, ["logits_t", "q_t"])
    return {name: steps[name] for name in names}


def as_floats(numbers):
    return {k: np.float32(x) for k, x in numbers.items()}


def by_floats(fn, **kwargs):
    """The gradient of `fn` by each of its floating-point arguments, by name."""
    floats = {k: x for k, x in kwargs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return jax.grad(lambda floats: fn(**(kwargs | floats)))(floats)


WITH_LOGITS = [policy_gradient_loss, entropy_loss, *ALL_ACTIONS]
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)


class TestPolicyGradientLoss:
    def test_agrees_with_the_definition(self, steps):
        args = arguments(policy_gradient_loss, steps)
        close(policy_gradient_loss(**args), policy_gradient_by_hand(**args))

    def test_raises_the_probability_of_a_good_action(self):
        """Its gradient is the advantage times the policy less the action taken."""
        gradient = jax.grad(policy_gradient_loss)(
            jnp.log(jnp.array([[1.0, 3.0]])), jnp.array([0]), jnp.ones(1), jnp.ones(1)
        )
        close(gradient, [[-0.75, 0.75]])

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_are_finite_differences(self, steps, stop):
        args = arguments(policy_gradient_loss, steps)
        gradient = by_floats(
            functools.partial(policy_gradient_loss, use_stop_gradient=stop), **args
        )
        for name in ("logits_t", "adv_t", "w_t"):
            expected = difference(
                lambda x, name=name: policy_gradient_by_hand(**(args | {name: x})),
                args[name],
            )
            held = stop and name == "adv_t"
            close(gradient[name], np.zeros(T) if held else expected)

    @pytest.mark.parametrize("action", [-1, A, 7])
    def test_an_action_that_does_not_exist_gives_nan(self, steps, action):
        args = arguments(policy_gradient_loss, steps)
        args["a_t"] = np.where(np.arange(T) == 2, action, args["a_t"])
        assert np.isnan(policy_gradient_loss(**args))
        args["adv_t"][:] = 0
        assert np.isnan(policy_gradient_loss(**args))
        args["w_t"] = np.where(np.arange(T) == 2, 0, args["w_t"])
        assert np.isfinite(policy_gradient_loss(**args))

    def test_an_action_ruled_out_costs_infinity(self):
        loss = functools.partial(policy_gradient_loss, a_t=jnp.array([0]))
        rest = {"adv_t": jnp.ones(1), "w_t": jnp.ones(1)}
        assert loss(jnp.array([[-jnp.inf, 0.0]]), **rest) == INFINITY
        mask = jnp.array([[False, True]])
        assert loss(jnp.zeros((1, 2)), **rest, mask=mask) == INFINITY

    def test_other_actions_ruled_out_are_harmless(self):
        logits = jnp.array([[-jnp.inf, 1.0, 1.0]])
        value, gradient = jax.value_and_grad(policy_gradient_loss)(
            logits, jnp.array([1]), jnp.ones(1), jnp.ones(1)
        )
        close(value, math.log(2))
        close(gradient, [[0, -0.5, 0.5]])


class TestEntropyLoss:
    def test_agrees_with_the_definition(self, steps):
        args = arguments(entropy_loss, steps)
        close(entropy_loss(**args), entropy_by_hand(**args))

    def test_is_least_where_all_actions_are_alike(self):
        uniform = jnp.zeros((1, 3))
        close(entropy_loss(uniform, jnp.ones(1)), -math.log(3))
        close(jax.grad(entropy_loss)(uniform, jnp.ones(1)), np.zeros((1, 3)))

    def test_gradients_are_finite_differences(self, steps):
        args = arguments(entropy_loss, steps)
        gradient = by_floats(entropy_loss, **args)
        for name in args:
            expected = difference(
                lambda x, name=name: entropy_by_hand(**(args | {name: x})), args[name]
            )
            close(gradient[name], expected)

    def test_an_action_ruled_out_adds_nothing(self):
        ruled_out = jnp.array([[1.0, -jnp.inf, 2.0]])
        left = jnp.array([[1.0, 2.0]])
        value, gradient = jax.value_and_grad(entropy_loss)(ruled_out, jnp.ones(1))
        expected = jax.value_and_grad(entropy_loss)(left, jnp.ones(1))
        close(value, expected[0])
        close(gradient, np.insert(expected[1], 1, 0, axis=-1))
        curvature = jax.hessian(entropy_loss)(ruled_out, jnp.ones(1))
        assert np.isfinite(curvature).all()

    def test_an_action_too_unlikely_to_represent_adds_nothing(self):
        logits = jnp.array([[0.0, -500.0]], jnp.float32)
        assert entropy_loss(logits, np.ones(1, np.float32)) == 0
        assert jax.grad(entropy_loss)(logits, np.ones(1, np.float32)).tolist() == [
            [0, 0]
        ]


class TestClippedSurrogateLoss:
    @pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0, 2.0])
    def test_agrees_with_the_definition(self, rng, epsilon):
        ratios = np.exp(rng.normal(size=50)).astype(np.float32)
        adv = rng.normal(size=50).astype(np.float32)
        loss = clipped_surrogate_pg_loss(ratios, adv, epsilon)
        close(loss, surrogate_by_hand(ratios, adv, epsilon))

    @pytest.mark.parametrize("stop", [True, False])
    def test_gradients_are_finite_differences(self, rng, stop):
        ratios = np.exp(rng.normal(size=20)).astype(np.float32)
        adv = rng.normal(size=20).astype(np.float32)
        by_all = jax.grad(clipped_surrogate_pg_loss, (0, 1, 2))(ratios, adv, 0.3, stop)
        expected = (
            difference(lambda x: surrogate_by_hand(x, adv, 0.3), ratios),
            difference(lambda x: surrogate_by_hand(ratios, x, 0.3), adv),
            difference(lambda x: surrogate_by_hand(ratios, adv, x), 0.3),
        )
        close(by_all[0], expected[0])
        close(by_all[1], 0 * expected[1] if stop else expected[1])
        close(by_all[2], expected[2])

    @pytest.mark.parametrize("adv", [1.0, -1.0])
    @pytest.mark.parametrize("ratio", [0.5, 0.75, 1.0, 1.25, 1.5])
    def test_gradients_at_the_edges_are_finite_differences(self, adv, ratio):
        """Of the two edges the loss is smooth at one, and has a kink at the other."""
        gradient = jax.grad(clipped_surrogate_pg_loss)(
            jnp.array([ratio]), jnp.array([adv]), 0.25
        )
        close(
            gradient, difference(lambda x: surrogate_by_hand(x, [adv], 0.25), [ratio])
        )

    def test_an_infinite_ratio_counts_by_the_sign_of_the_advantage(self):
        value_and_grad = jax.value_and_grad(clipped_surrogate_pg_loss)
        losses = {}
        for adv in (2.0, 0.0, -2.0):
            losses[adv], gradient = value_and_grad(
                jnp.array([jnp.inf]), jnp.array([adv]), 0.5
            )
            assert np.isfinite(gradient)
        assert losses == {2.0: -3, 0.0: 0, -2.0: INFINITY}

    @pytest.mark.parametrize("adv", [1.0, 0.0, -1.0])
    def test_does_not_hide_what_is_not_a_number(self, adv):
        nan, adv = jnp.array([jnp.nan]), jnp.array([adv])
        assert np.isnan(clipped_surrogate_pg_loss(nan, adv, 0.2))
        assert np.isnan(clipped_surrogate_pg_loss(adv, nan, 0.2))

    def test_takes_an_epsilon_for_each_step_and_a_traced_one(self):
        loss = jax.jit(clipped_surrogate_pg_loss)
        ratios, adv = jnp.full(2, 4.0), jnp.ones(2)
        assert loss(ratios, adv, jnp.array([0.5, 1.0])) == -1.75
        assert loss(ratios, adv, jnp.float32(1)) == -2

    def test_refuses_a_negative_epsilon(self):
        message = r"clipped_surrogate_pg_loss: epsilon must be in \[0, inf\], got -0.2"
        with pytest.raises(ValueError, match=message):
            clipped_surrogate_pg_loss(jnp.ones(2), jnp.ones(2), -0.2)
        loss = clipped_surrogate_pg_loss(jnp.ones(2), jnp.ones(2), jnp.float32(-0.2))
        assert np.isnan(loss)


def dpg_gradients(a, dqda, *args):
    return jax.grad(lambda a, dqda: dpg_loss(a, dqda, *args).sum(), (0, 1))(a, dqda)


class TestDpgLoss:
    def test_is_half_the_squared_slope(self):
        loss = dpg_loss(jnp.array([5.0, -1.0]), jnp.array([3.0, -4.0]))
        assert loss.tolist() == [4.5, 8]

    @pytest.mark.parametrize(("a", "dqda"), [(1e4, 1e-4), (-3e7, 0.1), (0.0, 1e19)])
    def test_its_gradient_is_minus_the_slope_to_the_last_bit(self, a, dqda):
        a, dqda = jnp.array([a]), jnp.array([dqda])
        by_action, by_slope = dpg_gradients(a, dqda)
        assert by_action == -dqda
        assert by_slope == 0
        np.testing.assert_array_equal(dpg_loss(a, dqda), 0.5 * dqda * dqda)

    def test_without_the_stop_the_slope_learns_instead(self):
        """The loss is then half the squared slope, whatever the action."""
        by_action, by_slope = dpg_gradients(
            jnp.array([1.0, 2.0]), jnp.array([3.0, -4.0]), None, False
        )
        assert by_action.tolist() == [0, 0]
        assert by_slope.tolist() == [3, -4]

    @pytest.mark.parametrize("limit", [0.0, 0.5, 5.0, 7.0, INFINITY])
    @pytest.mark.parametrize("stop", [True, False])
    def test_shortens_slopes_to_a_norm(self, limit, stop):
        a, dqda = jnp.array([1.0, 2.0]), jnp.array([3.0, -4.0])
        loss = dpg_loss(a, dqda, limit, stop)
        expected = np.array([3, -4]) * min(1, limit / 5)
        close(loss, 0.5 * expected**2)
        by_action, by_slope = dpg_gradients(a, dqda, limit, stop)

        def by_hand(dqda):
            norm = math.sqrt(dqda @ dqda)
            return 0.5 * sum((dqda * min(1, limit / norm)) ** 2)

        if stop:
            close(by_action, -expected)
            assert by_slope.tolist() == [0, 0]
        else:
            assert by_action.tolist() == [0, 0]
            if limit != 5:  # a kink
                close(by_slope, difference(by_hand, dqda), atol=1e-6)

    def test_leaves_slopes_that_fit_to_the_last_bit(self, rng):
        dqda = rng.normal(size=7).astype(np.float32)
        by_action, _ = dpg_gradients(jnp.zeros(7), dqda, 100.0)
        np.testing.assert_array_equal(by_action, -dqda)

    @pytest.mark.parametrize("size", [1e20, 1e38, 3e38])
    def test_shortens_slopes_whose_square_overflows(self, size):
        dqda = jnp.array([-size, 0.0, -size])
        for limit in (1.0, 1e-20, 1e10):
            by_action, _ = dpg_gradients(jnp.zeros(3), dqda, limit)
            expected = np.array([1, 0, 1]) * limit / math.sqrt(2)
            np.testing.assert_allclose(by_action, expected, rtol=1e-6)

    @pytest.mark.parametrize("dqda", [[0.0, 0.0], [1e-30, -1e-30]])
    @pytest.mark.parametrize("stop", [True, False])
    def test_tiny_slopes_are_harmless(self, dqda, stop):
        by_action, by_slope = dpg_gradients(
            np.ones(2, np.float32), np.float32(dqda), 1.0, stop
        )
        target = by_action if stop else by_slope
        np.testing.assert_array_equal(target, np.float32(dqda) * (-1 if stop else 1))

    @pytest.mark.parametrize("stop", [True, False])
    def test_no_slope_fits_any_limit(self, stop):
        by_action, by_slope = dpg_gradients(jnp.ones(2), jnp.zeros(2), 0.0, stop)
        assert not by_action.any()
        assert not by_slope.any()

    @pytest.mark.parametrize("limit", [None, 1.0])
    def test_does_not_hide_what_is_not_a_number(self, limit):
        zero, nan = jnp.zeros(2), jnp.array([jnp.nan, 1.0])
        assert np.isnan(dpg_loss(zero, nan, limit)[0])
        assert np.isnan(dpg_loss(nan, zero, limit)[0])

    def test_the_limit_may_be_traced_and_mapped(self):
        loss = jax.vmap(dpg_loss, (None, None, 0))
        losses = loss(jnp.zeros(1), jnp.array([4.0]), jnp.array([1.0, 2.0, 8.0]))
        assert losses.tolist() == [[0.5], [2], [8]]

    def test_refuses_a_negative_limit(self):
        message = r"dpg_loss: dqda_clipping must be in \[0, inf\], got -1"
        with pytest.raises(ValueError, match=message):
            dpg_loss(jnp.ones(2), jnp.ones(2), -1.0)
        loss = dpg_loss(jnp.ones(2), jnp.ones(2), jnp.float32(-1))
        assert np.isnan(loss).all()


@pytest.mark.parametrize("fn", ALL_ACTIONS)
class TestLossesOverAllActions:
    def test_agree_with_the_definition(self, fn, steps):
        args = arguments(fn, steps)
        close(fn(**args), all_actions_by_hand(**args, of_step=OF_STEP[fn]))

    def test_gradients_are_finite_differences_if_nothing_is_stopped(self, fn, steps):
        args = arguments(fn, steps)
        gradient = by_floats(functools.partial(fn, use_stop_gradient=False), **args)
        for name in args:
            expected = difference(
                lambda x, name=name: all_actions_by_hand(
                    **(args | {name: x}), of_step=OF_STEP[fn]
                ),
                args[name],
            )
            close(gradient[name], expected)
            assert fn is qpg_loss or np.abs(expected).max() > 0.01

    def test_by_default_only_the_policy_moves(self, fn, steps):
        """Advantages are constants, but for `rpg_loss`, which is made of nothing else.

        There only the action values are.
        """
        args = arguments(fn, steps)

        @in_double
        def by_hand(logits_t, now_t, q_t):
            terms = []
            for logits, now, q in zip(logits_t, now_t, q_t, strict=True):
                pi = softmax_by_hand(logits)
                v = dot(pi if fn is rpg_loss else softmax_by_hand(now), q)
                terms.append(OF_STEP[fn](pi, [x - v for x in q]))
            return mean(terms)

        gradient = by_floats(fn, **args)
        held = functools.partial(by_hand, now_t=args["logits_t"], q_t=args["q_t"])
        close(gradient["logits_t"], difference(held, args["logits_t"]))
        assert np.abs(gradient["logits_t"]).max() > 0.01
        assert not gradient["q_t"].any()

    def test_descending_favours_the_better_action(self, fn):
        gradient = jax.grad(fn)(jnp.zeros((1, 2)), jnp.array([[3.0, 1.0]]))
        assert gradient[0, 0] < 0 < gradient[0, 1]

    def test_does_not_care_about_what_all_actions_share(self, fn, steps):
        args = arguments(fn, steps)
        close(fn(args["logits_t"], args["q_t"] + 3), fn(**args), atol=1e-6)

    def test_an_action_of_probability_zero_is_worth_anything(self, fn):
        logits = jnp.array([[0.0, 1.0, -jnp.inf]])
        q = jnp.array([[3.0, 1.0, -jnp.inf]])
        value, gradients = jax.value_and_grad(fn, (0, 1))(logits, q, False)
        close(value, fn(logits[:, :2], q[:, :2]))
        assert np.isfinite(gradients).all()

    def test_does_not_hide_what_is_not_a_number(self, fn):
        logits = jnp.zeros((1, 2))
        assert np.isnan(fn(logits, jnp.array([[jnp.nan, 1.0]])))
        assert np.isnan(fn(jnp.array([[jnp.nan, 1.0]]), logits))


@pytest.mark.parametrize("fn", WITH_LOGITS)
class TestMasks:
    def test_masked_actions_might_as_well_be_deleted(self, fn, steps, rng):
        """So neither value nor gradients differ, NaN or not; the deleted get zeros."""
        args = arguments(fn, steps)
        where = [np.r_[:2, 3:A]] * T  # action 2 is in the way
        kept = {
            k: np.delete(x, 2, axis=1) if x.ndim == 2 else x for k, x in args.items()
        }
        if "a_t" in args:
            kept["a_t"] = rng.integers(A - 1, size=T)
            args["a_t"] = np.take(where[0], kept["a_t"])
        mask = np.arange(A) != 2
        mask = np.broadcast_to(mask, (T, A))
        if "use_stop_gradient" in inspect.signature(fn).parameters:
            fn = functools.partial(fn, use_stop_gradient=False)
        expected = fn(**kept), by_floats(fn, **kept)
        for junk in (7.0, np.nan, np.inf, -np.inf):
            dirty = {
                k: np.where(mask, x, np.float32(junk)) if x.ndim == 2 else x
                for k, x in args.items()
            }
            masked = functools.partial(fn, mask=mask)
            close(masked(**dirty), expected[0])
            for name, gradient in by_floats(masked, **dirty).items():
                deleted = (
                    np.delete(gradient, 2, axis=1) if gradient.ndim == 2 else gradient
                )
                close(deleted, expected[1][name])
                if gradient.ndim == 2:
                    assert not gradient[:, 2].any()

    def test_a_mask_may_differ_from_step_to_step(self, fn, rng):
        steps = {
            "logits_t": np.zeros((2, 2), np.float32),
            "q_t": np.array([[1, 9], [9, 2]], np.float32),
            "a_t": np.array([0, 1]),
            "adv_t": np.ones(2, np.float32),
            "w_t": np.ones(2, np.float32),
        }
        mask = np.eye(2, dtype=bool)  # one action is left, and nothing to gain or lose
        close(fn(**arguments(fn, steps), mask=mask), 0)

    def test_no_legal_action_gives_nan(self, fn, steps):
        mask = np.ones((T, A), bool)
        mask[1] = False
        assert np.isnan(fn(**arguments(fn, steps), mask=mask))


WEIGHTED = [
    (fn, name)
    for fn, names in {
        policy_gradient_loss: ["logits_t", "adv_t", "a_t", "mask"],
        entropy_loss: ["logits_t", "mask"],
    }.items()
    for name in names
]


class TestWeights:
    @pytest.mark.parametrize(("fn", "name"), WEIGHTED)
    @pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
    def test_a_step_of_weight_zero_leaks_nothing(self, fn, steps, name, junk):
        args = arguments(fn, steps) | {"mask": np.ones((T, A), bool)}
        args["w_t"][3] = 0
        expected = fn(**args), by_floats(fn, **args)
        dirty = args[name].copy()
        dirty[3] = {"a_t": -1, "mask": False}.get(name, junk)
        args[name] = dirty
        value, gradients = fn(**args), by_floats(fn, **args)
        np.testing.assert_array_equal(value, expected[0])
        rest = np.arange(T) != 3
        for key, gradient in gradients.items():
            assert np.isfinite(gradient).all()
            np.testing.assert_array_equal(gradient[rest], expected[1][key][rest])
        assert not gradients["logits_t"][3].any()

    @pytest.mark.parametrize(("fn", "name"), WEIGHTED)
    def test_a_step_of_any_other_weight_shows(self, fn, steps, name):
        args = arguments(fn, steps) | {"mask": np.ones((T, A), bool)}
        args[name][3] = {"a_t": -1, "mask": False}.get(name, np.nan)
        assert np.isnan(fn(**args))

    @pytest.mark.parametrize("fn", [policy_gradient_loss, entropy_loss])
    def test_the_gradient_by_a_weight_of_zero_is_what_the_step_would_cost(
        self, fn, steps
    ):
        """An action ruled out must not change that."""
        args = arguments(fn, steps)
        args["logits_t"][:, 2] = -np.inf
        if "a_t" in args:
            args["a_t"][:] = 1
        by_weight = by_floats(fn, **args)["w_t"]
        args["w_t"] = np.zeros(T, np.float32)
        np.testing.assert_allclose(by_floats(fn, **args)["w_t"], by_weight, rtol=1e-6)

    @pytest.mark.parametrize("fn", [policy_gradient_loss, entropy_loss])
    def test_steps_of_weight_zero_count_in_the_mean(self, fn, steps):
        args = arguments(fn, steps)
        twice = {k: np.concatenate([x, x]) for k, x in args.items()}
        twice["w_t"][T:] = 0
        close(fn(**twice), fn(**args) / 2)


@pytest.mark.parametrize(
    "fn", [*WITH_LOGITS, clipped_surrogate_pg_loss], ids=lambda fn: fn.__name__
)
class TestSteps:
    """Steps may be left out, and the rest averaged, summed or left as they are."""

    kept = np.array([True, False, True, True, False])

    @pytest.fixture
    def given(self, fn, steps):
        if fn is not clipped_surrogate_pg_loss:
            return arguments(fn, steps)
        ratios = 0.5 + steps["w_t"]
        return {"prob_ratios_t": ratios, "adv_t": steps["adv_t"], "epsilon": 0.2}

    def on(self, where, given):
        return {k: x[where] if np.ndim(x) else x for k, x in given.items()}

    def test_reductions_are_those_of_the_loss_of_each_step(self, fn, given):
        each = fn(**given, reduction="none")
        alone = [fn(**self.on(slice(t, t + 1), given)) for t in range(T)]
        close(each, alone)
        close(fn(**given, reduction="sum"), np.sum(alone, dtype=np.float32))
        close(fn(**given), np.mean(alone, dtype=np.float32))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("junk", [np.nan, np.inf, 9.0])
    def test_steps_left_out_might_as_well_be_deleted(self, fn, given, reduction, junk):
        def spoil(x):
            bad = -1 if x.dtype == np.int32 else np.float32(junk)
            where = self.kept.reshape(-1, *[1] * (x.ndim - 1))
            return np.where(where, x, bad).astype(x.dtype)

        dirty = {k: spoil(x) if np.ndim(x) else x for k, x in given.items()}
        masked = functools.partial(fn, reduction=reduction, mask_t=self.kept)
        left = self.on(self.kept, given)
        deleted = functools.partial(fn, reduction=reduction)
        close(masked(**dirty), deleted(**left))
        epsilon = {k: dirty.pop(k) for k in ["epsilon"] if left.pop(k, None)}
        expected = by_floats(deleted, **left, **as_floats(epsilon))
        for name, gradient in by_floats(masked, **dirty, **as_floats(epsilon)).items():
            if np.ndim(gradient):
                close(gradient[self.kept], expected[name])
                assert not gradient[~self.kept].any()
            else:
                close(gradient, expected[name])

    def test_where_no_step_is_left_the_loss_is_zero(self, fn, given):
        assert fn(**given, mask_t=np.zeros(T, bool)) == 0

    def test_another_reduction_is_refused(self, fn, given):
        message = f"{fn.__name__}: reduction must be one of 'mean', 'sum', 'none', got"
        with pytest.raises(ValueError, match=message):
            fn(**given, reduction="max")


class TestAllOfThem:
    @pytest.mark.parametrize(
        ("fn", "name"),
        [(policy_gradient_loss, k) for k in ("logits_t", "a_t", "adv_t", "w_t")]
        + [(entropy_loss, k) for k in ("logits_t", "w_t")]
        + [(fn, k) for fn in ALL_ACTIONS for k in ("logits_t", "q_t")],
    )
    def test_refuse_a_length_that_could_broadcast(self, fn, name, steps):
        args = arguments(fn, steps)
        args[name] = args[name][:1]
        with pytest.raises(ValueError, match=rf"{fn.__name__}: \w+ has shape"):
            fn(**args)

    @pytest.mark.parametrize("fn", ALL_ACTIONS)
    def test_refuse_values_of_other_actions(self, fn, steps):
        with pytest.raises(ValueError, match=rf"{fn.__name__}: q_t has shape \(5, 1\)"):
            fn(steps["logits_t"], steps["q_t"][:, :1])

    @pytest.mark.parametrize("fn", WITH_LOGITS)
    def test_refuse_a_mask_that_could_broadcast(self, fn, steps):
        with pytest.raises(
            ValueError, match=rf"{fn.__name__}: mask has shape \(1, 4\)"
        ):
            fn(**arguments(fn, steps), mask=np.ones((1, A), bool))

    def test_refuse_one_ratio_for_many_advantages_and_one_slope_for_many_actions(self):
        message = r"clipped_surrogate_pg_loss: adv_t has shape \(3,\)"
        with pytest.raises(ValueError, match=message):
            clipped_surrogate_pg_loss(jnp.ones(1), jnp.ones(3), 0.2)
        with pytest.raises(ValueError, match=r"dpg_loss: dqda_t has shape \(1,\)"):
            dpg_loss(jnp.ones(3), jnp.ones(1))

    @pytest.mark.parametrize("fn", WITH_LOGITS)
    def test_the_mean_over_no_steps_is_nan(self, fn, steps):
        none = {k: x[:0] for k, x in arguments(fn, steps).items()}
        assert np.isnan(fn(**none))

    def test_the_surrogate_mean_over_no_steps_is_nan(self):
        assert np.isnan(clipped_surrogate_pg_loss(jnp.zeros(0), jnp.zeros(0), 0.2))

    def test_long_means_of_low_precision_accumulate_in_single(self):
        """In half precision, ones add up to 256 at most."""
        ones = jnp.ones(4096, jnp.bfloat16)
        loss = clipped_surrogate_pg_loss(ones, ones, 0.2)
        assert loss.dtype == jnp.bfloat16
        assert loss == -1

    def test_large_logits_are_harmless(self):
        logits, one = jnp.array([[1e30, 0.0]]), jnp.ones(1)
        action = jnp.array([0])
        assert policy_gradient_loss(logits, action, one, one) == 0
        assert entropy_loss(logits, one) == 0
        assert rpg_loss(logits, jnp.array([[1.0, 3.0]])) == 2

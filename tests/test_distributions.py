"""Distributions over actions, against sums over one action after another."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    batched_index,
    categorical_cross_entropy,
    categorical_importance_sampling_ratios,
    categorical_kl_divergence,
    categorical_sample,
    clipped_entropy_softmax,
    epsilon_greedy,
    greedy,
    softmax,
)

BAD = [np.nan, np.inf, -np.inf]
KEYS = pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])


# What each distribution is, for one list of numbers at a time


def softmax_by_hand(logits, temperature=1.0):
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def epsilon_greedy_by_hand(preferences, epsilon):
    best = [x == max(preferences) for x in preferences]
    count = len(preferences)
    return [epsilon / count + (1 - epsilon) * x / sum(best) for x in best]


def log_by_hand(p):
    return math.log(p) if p > 0 else -math.inf


def kl_by_hand(ps, qs):
    pairs = [(p, q) for p, q in zip(ps, qs, strict=True) if p > 0]
    return math.fsum(p * (log_by_hand(p) - log_by_hand(q)) for p, q in pairs)


def entropy_by_hand(ps, clip=math.inf):
    entropy = math.fsum(-p * math.log(p) for p in ps if p > 0)
    return min(entropy, clip * math.log(len(ps))) if clip < math.inf else entropy


def among_legal(fn, mask):
    """Applies `fn` to what is legal and fills in zeros for what is not."""
    return lambda xs: scatter(fn([x for x, m in zip(xs, mask, strict=True) if m]), mask)


def scatter(ps, mask):
    left = iter(ps)
    return [next(left) if m else 0.0 for m in mask]


POLICIES = {
    "softmax": (softmax(), softmax_by_hand, math.inf),
    "clipped": (
        clipped_entropy_softmax(0.7, 0.5),
        lambda x: softmax_by_hand(x, 0.7),
        0.5,
    ),
    "greedy": (greedy(), lambda x: epsilon_greedy_by_hand(x, 0.0), math.inf),
    "epsilon": (
        epsilon_greedy(0.3),
        lambda x: epsilon_greedy_by_hand(x, 0.3),
        math.inf,
    ),
}
EACH = pytest.mark.parametrize(
    ("policy", "by_hand", "clip"), POLICIES.values(), ids=POLICIES
)
EACH_POLICY = pytest.mark.parametrize(
    "policy", [policy for policy, *_ in POLICIES.values()], ids=POLICIES
)


def row_by_row(fn, *arrays, axes=1):
    """Applies `fn` to lists along the last axis of each array."""
    lead = arrays[0].shape[: arrays[0].ndim - axes]
    rows = [fn(*(a[i].tolist() for a in arrays)) for i in np.ndindex(*lead)]
    return np.reshape(np.asarray(rows), (*lead, *np.shape(rows[0])))


def numbers(rng, *shape):
    """Multiples of a half, which tie."""
    return (rng.integers(-4, 5, size=shape) / 2).astype(np.float32)


def some_legal(rng, *shape):
    mask = rng.uniform(size=shape) < 0.6
    mask[..., 0] |= ~mask.any(axis=-1)
    return mask


def measures(policy, logits, others, actions, mask=None):
    """Everything that can be differentiated."""
    return {
        "probs": policy.probs(logits, mask=mask),
        "logprob": policy.logprob(actions, logits, mask=mask),
        "entropy": policy.entropy(logits, mask=mask),
        "kl": policy.kl(logits, others, mask=mask),
    }


jitted = jax.jit(measures, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def gradients(policy, logits, others, actions, mask):
    """The gradient of everything in both of the logits."""
    names = ["probs", "logprob", "entropy", "kl"]
    total = lambda p, q, name: measures(policy, p, q, actions, mask)[name].sum()
    return {name: jax.grad(total, (0, 1))(logits, others, name) for name in names}


def same(got, expected, rtol=2e-6, atol=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
        got,
        expected,
    )


class TestEveryPolicy:
    @EACH
    @pytest.mark.parametrize("lead", [(), (2, 3)])
    def test_agrees_with_its_definition(self, rng, policy, by_hand, clip, lead):
        logits, others = numbers(rng, 2, *lead, 4)
        actions = rng.integers(4, size=lead)
        probs, q = row_by_row(by_hand, logits), row_by_row(by_hand, others)
        picked = np.take_along_axis(probs, actions[..., None], -1)[..., 0]
        expected = {
            "probs": probs,
            "logprob": np.vectorize(log_by_hand)(picked),
            "entropy": row_by_row(lambda p: entropy_by_hand(p, clip), probs),
            "kl": row_by_row(kl_by_hand, probs, q),
        }
        same(measures(policy, logits, others, actions), expected)

    @EACH
    def test_a_mask_leaves_actions_out(self, rng, policy, by_hand, clip):
        """The very result that the policy has without the columns."""
        logits, others = numbers(rng, 2, 6, 5)
        mask = np.array([True, False, True, True, False])
        masks, actions = np.tile(mask, (6, 1)), rng.integers(3, size=6)
        left = jitted(policy, logits[:, mask], others[:, mask], actions)
        all_actions = np.flatnonzero(mask)[actions]
        got = jitted(policy, logits, others, all_actions, masks)
        assert not got["probs"][:, ~mask].any()
        same(got | {"probs": got["probs"][:, mask]}, left)
        probs = row_by_row(among_legal(by_hand, mask), logits)
        np.testing.assert_allclose(got["probs"], probs, rtol=2e-6)
        legal = row_by_row(lambda p: entropy_by_hand(p, clip), probs[:, mask])
        np.testing.assert_allclose(got["entropy"], legal, rtol=2e-6)

    @EACH_POLICY
    def test_each_row_has_a_mask_of_its_own(self, rng, policy):
        logits, others, mask = *numbers(rng, 2, 6, 5), some_legal(rng, 6, 5)
        actions = mask.argmax(axis=-1)
        together = jitted(policy, logits, others, actions, mask)
        for i in range(6):
            one = jitted(policy, logits[i], others[i], actions[i], mask[i])
            same(jax.tree.map(lambda x, i=i: x[i], together), one)

    @EACH_POLICY
    @pytest.mark.parametrize("bad", BAD)
    def test_what_is_illegal_leaks_neither_values_nor_gradients(self, rng, policy, bad):
        logits, others, mask = *numbers(rng, 2, 6, 5), some_legal(rng, 6, 5)
        clean = logits, others, mask.argmax(axis=-1), mask
        dirty = *(np.where(mask, x, bad) for x in clean[:2]), *clean[2:]
        expected, got = (jitted(policy, *args) for args in (clean, dirty))
        assert not got["probs"][~mask].any()
        same(got, expected, rtol=0, atol=0)
        expected, got = (gradients(policy, *args) for args in (clean, dirty))
        assert not any(g[~mask].any() for g in jax.tree.leaves(got))
        same(got, expected, rtol=0, atol=0)

    @EACH_POLICY
    def test_no_legal_action_is_nan_without_a_gradient(self, rng, policy):
        logits, others, mask = *numbers(rng, 2, 6, 5), some_legal(rng, 6, 5)
        mask[1] = False
        args = policy, logits, others, mask.argmax(axis=-1), mask
        for name, x in jitted(*args).items():
            assert jnp.isnan(x[1]).all(), name
            assert not jnp.isnan(np.delete(x, 1, axis=0)).any(), name
        for gradient in jax.tree.leaves(gradients(*args)):
            assert not gradient[1].any()

    @EACH_POLICY
    def test_a_legal_nan_shows(self, rng, policy):
        logits, others = numbers(rng, 2, 6, 5)
        logits[0, 2] = np.nan
        for mask in (None, np.tile(np.arange(5) < 3, (6, 1))):
            for x in jitted(policy, logits, others, np.ones(6, int), mask).values():
                assert jnp.isnan(x[0]).all()
                assert not jnp.isnan(x[1:]).any()
            drawn = policy.sample(jax.random.key(0), logits, mask=mask)
            assert drawn[0] == -1
            assert (drawn[1:] >= 0).all()

    @EACH_POLICY
    @pytest.mark.parametrize("action", [-1, 3])
    def test_the_logprob_of_no_action_is_nan(self, policy, action):
        assert jnp.isnan(policy.logprob(action, jnp.arange(3.0)))

    @EACH_POLICY
    def test_keeps_half_precision_and_rounds_only_at_the_end(self, rng, policy):
        dtype = jnp.dtype(jnp.bfloat16)
        logits, others = jnp.asarray(numbers(rng, 2, 3, 4), dtype)
        halves = jitted(policy, logits, others, np.arange(3))
        single = jitted(policy, *map(np.float32, (logits, others)), np.arange(3))
        assert {x.dtype for x in halves.values()} == {dtype}
        same(halves, jax.tree.map(lambda x: x.astype(dtype), single), rtol=0, atol=0)

    @EACH_POLICY
    @pytest.mark.parametrize("masked", [False, True])
    def test_gradients_are_those_of_finite_differences(self, rng, policy, masked):
        with jax.enable_x64(True):
            logits, others, along = rng.normal(size=(3, 3, 4))
            mask = some_legal(rng, 3, 4) if masked else None
            actions = np.zeros(3, int) if mask is None else mask.argmax(axis=-1)
            weights = jnp.cos(jnp.arange(1.0, 22.0))  # one for each number measured

            @jax.jit
            def total(step):
                p, q = logits + step * along, others - 2 * step * along
                parts = measures(policy, p, q, actions, mask).values()
                flat = jnp.concatenate([x.ravel() for x in parts])
                return weights @ jnp.where(jnp.isfinite(flat), flat, 0)

            difference = (total(1e-6) - total(-1e-6)) / 2e-6
            slope = jax.grad(total)(0.0)
            np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8)

    @EACH_POLICY
    def test_is_the_same_under_jit_and_vmap(self, rng, policy):
        logits, others, mask = *numbers(rng, 2, 3, 4), some_legal(rng, 3, 4)
        args = logits, others, np.arange(3), mask
        expected = measures(policy, *args)
        same(jitted(policy, *args), expected)
        same(jax.vmap(functools.partial(jitted, policy))(*args), expected)

    @EACH_POLICY
    def test_refuses_a_mask_or_an_action_of_another_shape(self, policy):
        logits = jnp.zeros((3, 4))
        with pytest.raises(ValueError, match=r"\.probs: mask has shape \(4,\), expect"):
            policy.probs(logits, mask=jnp.ones(4, bool))
        with pytest.raises(ValueError, match=r"\.logprob: .* has shape "):
            policy.logprob(jnp.zeros(1, int), logits)
        with pytest.raises(ValueError, match=r": q_\w+ has shape \(1, 4\), expected"):
            policy.kl(logits, jnp.zeros((1, 4)))

    @pytest.mark.parametrize(
        "build", [softmax, clipped_entropy_softmax, epsilon_greedy]
    )
    def test_compiles_once_whatever_the_parameter(self, caplog, build):
        key, logits = jax.random.key(0), jnp.arange(7.0)
        compiled = []
        for parameter in (0.25, 0.75):
            caplog.clear()
            with jax.log_compiles(True):
                build(parameter).sample(key, logits)
                build(parameter).entropy(logits)
            compiled.append(any("ompiling" in r.getMessage() for r in caplog.records))
        assert compiled == [True, False]


class TestSampling:
    @EACH_POLICY
    @KEYS
    @pytest.mark.parametrize("lead", [(), (2, 3)])
    def test_is_one_categorical_draw(self, rng, policy, make_key, lead):
        """So that an agent seeded the same acts the same."""
        for seed in range(20):
            key, logits = make_key(seed), numbers(rng, *lead, 5)
            drawn = policy.sample(key, logits)
            log_probs = jnp.log(policy.probs(logits))
            assert drawn.shape == lead
            assert drawn.dtype == jnp.result_type(int)
            expected = jax.random.categorical(key, log_probs)
            np.testing.assert_array_equal(drawn, expected)

    @EACH
    def test_is_as_frequent_as_it_is_probable(self, policy, by_hand, clip):
        logits = np.array([0.0, 1.0, 5.0, 1.0, 0.5, -np.inf], np.float32)
        mask = np.array([True, True, False, True, True, False])
        draw = lambda key: policy.sample(key, logits, mask=mask)
        drawn = jax.vmap(draw)(jax.random.split(jax.random.key(1), 20_000))
        counts = np.bincount(drawn, minlength=6)
        expected = 20_000 * np.array(among_legal(by_hand, mask)(logits.tolist()))
        assert not counts[expected == 0].any()
        some = expected > 0
        square = ((counts - expected)[some] ** 2 / expected[some]).sum()
        assert square < 25  # of at most three degrees of freedom: one in 60 000

    def test_draws_rare_actions_as_often_in_half_precision(self):
        """Noise of eight bits would all but rule them out."""
        logits = jnp.tile(jnp.array([0.0, -7.0], jnp.bfloat16), (400_000, 1))
        count = int(softmax().sample(jax.random.key(0), logits).sum())
        expected = 400_000 * softmax_by_hand([0.0, -7.0])[1]
        assert abs(count - expected) < 4 * math.sqrt(expected)

    @EACH_POLICY
    def test_draws_minus_one_where_no_action_is_legal(self, policy):
        mask = jnp.array([[True, False], [False, False], [False, True]])
        drawn = policy.sample(jax.random.key(0), jnp.ones((3, 2)), mask=mask)
        np.testing.assert_array_equal(drawn, [0, -1, 1])
        picked = batched_index(jnp.ones((3, 2)), drawn)
        np.testing.assert_array_equal(picked, [1, np.nan, 1])

    @EACH_POLICY
    def test_is_a_loop_over_keys_under_vmap(self, rng, policy):
        keys, logits = jax.random.split(jax.random.key(0), 5), numbers(rng, 5, 4)
        mask = some_legal(rng, 5, 4)
        draw = lambda key, x, m: policy.sample(key, x, mask=m)
        drawn = jax.jit(jax.vmap(draw))(keys, logits, mask)
        assert drawn.tolist() == [
            int(draw(*each)) for each in zip(keys, logits, mask, strict=True)
        ]


class TestSoftmax:
    def test_minus_infinity_excludes_an_action(self):
        logits, finite = jnp.array([1.0, 2.0, -jnp.inf]), [1.0, 2.0]
        expected = softmax_by_hand(finite)
        probs, entropy = softmax().probs(logits), softmax().entropy(logits)
        np.testing.assert_allclose(probs, [*expected, 0], rtol=1e-6)
        np.testing.assert_allclose(entropy, entropy_by_hand(expected), rtol=1e-6)
        gradient = jax.grad(softmax().entropy)(logits)
        reduced = jax.grad(softmax().entropy)(jnp.array(finite))
        np.testing.assert_allclose(gradient, [*reduced, 0], rtol=1e-5)

    @pytest.mark.parametrize("name", ["probs", "entropy"])
    def test_an_excluded_action_does_not_touch_the_temperature(self, name):
        """Whether by the mask or by its logit."""

        def slope(logits, mask=None):
            def total(temperature):
                out = getattr(softmax(temperature), name)(logits, mask=mask)
                return jnp.sum(jnp.cos(jnp.arange(1.0, 1.0 + out.size)) * out.ravel())

            return jax.grad(total)(2.0)

        expected = slope(jnp.array([1.0, 2.0]))
        excluded = slope(jnp.array([1.0, 2.0, -jnp.inf]))
        np.testing.assert_allclose(excluded, expected, rtol=1e-6)
        for bad in BAD:
            masked = slope(jnp.array([1.0, 2.0, bad]), jnp.array([True, True, False]))
            np.testing.assert_allclose(masked, expected, rtol=1e-6)

    @pytest.mark.parametrize("logits", [[-np.inf] * 2, [np.inf, 0.0], [np.inf] * 2])
    def test_is_nan_where_logits_define_nothing(self, logits):
        assert jnp.isnan(softmax().probs(jnp.array(logits))).all()
        assert softmax().sample(jax.random.key(0), jnp.array(logits)) == -1

    def test_is_finite_however_large_the_logits(self):
        logits = jnp.array([1e30, -1e30, 1e30])
        np.testing.assert_array_equal(softmax().probs(logits), [0.5, 0, 0.5])
        np.testing.assert_allclose(softmax().entropy(logits), math.log(2), rtol=1e-6)
        assert jnp.isfinite(jax.grad(softmax().entropy)(logits)).all()

    def test_the_temperature_may_be_traced(self):
        logits = np.array([1.0, 2.0, 4.0])
        with jax.enable_x64(True):
            entropy = jax.jit(lambda t: softmax(t).entropy(logits))
            expected = entropy_by_hand(softmax_by_hand(logits.tolist(), 1.7))
            np.testing.assert_allclose(entropy(1.7), expected, rtol=1e-12)
            difference = (entropy(1.7 + 1e-6) - entropy(1.7 - 1e-6)) / 2e-6
            np.testing.assert_allclose(jax.grad(entropy)(1.7), difference, rtol=1e-6)

    def test_takes_arguments_by_name(self):
        logits, key = jnp.array([1.0, 2.0]), jax.random.key(0)
        policy = softmax(temperature=2.0)
        assert policy.sample(key=key, logits=logits).shape == ()
        assert policy.probs(logits=logits).shape == (2,)
        assert policy.logprob(sample=0, logits=logits) < 0
        assert policy.kl(p_logits=logits, q_logits=logits) == 0

    def test_names_what_is_wrong(self):
        with pytest.raises(TypeError, match=r"softmax\.probs: logits must be float"):
            softmax().probs(jnp.array([1, 2]))
        with pytest.raises(ValueError, match=r"expected f\[\]"):
            softmax(jnp.ones(2)).probs(jnp.ones((2, 3)))


class TestClippedEntropySoftmax:
    def test_the_entropy_stops_at_a_fraction_of_the_greatest(self):
        policy, flat = clipped_entropy_softmax(entropy_clip=0.5), jnp.zeros(16)
        np.testing.assert_allclose(policy.entropy(flat), math.log(4), rtol=1e-6)
        logits = jnp.linspace(0.0, 1.0, 16)
        np.testing.assert_allclose(policy.entropy(logits), math.log(4), rtol=1e-6)

    def test_has_no_gradient_beyond_the_clip_and_the_usual_one_below(self):
        policy = clipped_entropy_softmax(entropy_clip=0.5)
        beyond, below = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 4.0, 8.0])
        np.testing.assert_array_equal(jax.grad(policy.entropy)(beyond), np.zeros(3))
        expected = jax.grad(softmax().entropy)(below)
        assert expected.any()
        np.testing.assert_array_equal(jax.grad(policy.entropy)(below), expected)

    def test_the_clip_counts_legal_actions(self):
        policy = clipped_entropy_softmax(entropy_clip=0.5)
        entropy = policy.entropy(jnp.zeros(5), mask=jnp.arange(5) < 4)
        np.testing.assert_allclose(entropy, math.log(2), rtol=1e-6)
        assert policy.entropy(jnp.zeros(5), mask=jnp.arange(5) < 1) == 0

    def test_by_default_it_clips_nothing(self, rng):
        logits = numbers(rng, 5, 4)
        for policy in (clipped_entropy_softmax(), clipped_entropy_softmax(1.0, 2.0)):
            np.testing.assert_array_equal(
                policy.entropy(logits), softmax().entropy(logits)
            )

    def test_the_clip_may_be_traced(self):
        clipped = lambda c: clipped_entropy_softmax(1.0, c).entropy(jnp.zeros(16))
        np.testing.assert_allclose(jax.jit(clipped)(0.5), math.log(4), rtol=1e-6)
        np.testing.assert_allclose(jax.grad(clipped)(0.5), math.log(16), rtol=1e-6)

    def test_ignores_an_action_spec(self):
        """Which may be any object, hashable or not."""
        policy, logits, spec = clipped_entropy_softmax(), jnp.arange(3.0), {"any": []}
        key = jax.random.key(0)
        assert policy.sample(key, logits, spec) == policy.sample(key, logits)
        assert policy.logprob(1, logits, spec) == policy.logprob(1, logits)
        np.testing.assert_array_equal(
            policy.probs(logits, action_spec=spec), policy.probs(logits)
        )


class TestGreedyAndEpsilonGreedy:
    @pytest.mark.parametrize(
        ("preferences", "ties"),
        [
            ([1.0, 2.0, 2.0], [0, 0.5, 0.5]),
            ([np.inf, 1.0, np.inf], [0.5, 0, 0.5]),
            ([-np.inf] * 3, [1 / 3] * 3),
            ([-np.inf, -np.inf, 0.0], [0, 0, 1]),
            ([0.0, -0.0, -1.0], [0.5, 0.5, 0]),
        ],
    )
    def test_exact_ties_share_the_probability(self, preferences, ties):
        preferences, ties = jnp.array(preferences), np.array(ties)
        np.testing.assert_allclose(greedy().probs(preferences), ties, rtol=1e-6)
        mixed = 0.3 / 3 + 0.7 * ties
        probs = epsilon_greedy(0.3).probs(preferences)
        np.testing.assert_allclose(probs, mixed, rtol=1e-6)

    def test_is_greedy_and_random_over_legal_actions_alone(self):
        preferences = jnp.array([1.0, 9.0, 1.0, -jnp.inf, 0.0])
        mask = jnp.array([True, False, True, True, False])
        probs = greedy().probs(preferences, mask=mask)
        np.testing.assert_array_equal(probs, [0.5, 0, 0.5, 0, 0])
        probs = epsilon_greedy(0.75).probs(preferences, mask=mask)
        np.testing.assert_array_equal(probs, [0.375, 0, 0.375, 0.25, 0])

    def test_a_legal_action_worth_minus_infinity_may_be_the_only_one(self):
        mask = jnp.array([False, True])
        probs = greedy().probs(jnp.array([1.0, -jnp.inf]), mask=mask)
        np.testing.assert_array_equal(probs, [0, 1])

    def test_at_epsilon_one_preferences_do_not_matter(self):
        for worst in BAD:
            probs = epsilon_greedy(1.0).probs(jnp.array([1.0, worst]))
            np.testing.assert_array_equal(probs, [0.5, 0.5])

    def test_a_deterministic_choice_has_no_entropy(self):
        entropy = greedy().entropy(jnp.array([1.0, 3.0, 2.0]))
        assert entropy == 0
        assert not jnp.signbit(entropy)

    def test_preferences_have_no_gradient(self, rng):
        preferences = numbers(rng, 4)
        for policy in (greedy(), epsilon_greedy(0.3)):
            for fn in (policy.entropy, functools.partial(policy.logprob, 0)):
                assert not jax.grad(fn)(preferences).any()

    def test_epsilon_may_be_traced(self):
        preferences = np.array([1.0, 3.0, 3.0, 0.0])
        mask = np.array([True, True, True, False])
        with jax.enable_x64(True):
            entropy = jax.jit(
                lambda e: epsilon_greedy(e).entropy(preferences, mask=mask)
            )
            expected = epsilon_greedy_by_hand([1.0, 3.0, 3.0], 0.3)
            expected = entropy_by_hand(expected)
            np.testing.assert_allclose(entropy(0.3), expected, rtol=1e-12)
            difference = (entropy(0.3 + 1e-6) - entropy(0.3 - 1e-6)) / 2e-6
            np.testing.assert_allclose(jax.grad(entropy)(0.3), difference, rtol=1e-6)

    def test_the_gradient_in_epsilon_is_finite_at_zero(self):
        """Where an action has no probability, and so no logarithm."""
        preferences = jnp.array([1.0, 3.0])
        slope = jax.grad(lambda e: epsilon_greedy(e).logprob(1, preferences))(0.0)
        np.testing.assert_allclose(slope, -0.5)
        for fn in (
            lambda e: epsilon_greedy(e).entropy(preferences),
            lambda e: epsilon_greedy(e).kl(preferences, 2 * preferences),
        ):
            assert jnp.isfinite(jax.grad(fn)(0.0))

    def test_a_method_may_be_given_another_epsilon(self):
        preferences, key = jnp.array([1.0, 3.0]), jax.random.key(0)
        for policy in (epsilon_greedy(), epsilon_greedy(0.9)):
            for given in ([0.5], [jnp.float32(0.5)]):
                probs = policy.probs(preferences, *given)
                np.testing.assert_array_equal(probs, [0.25, 0.75])
            assert policy.sample(key, preferences, 0.0) == 1
            assert policy.logprob(1, preferences, epsilon=0.0) == 0
            assert policy.entropy(preferences, 0.0) == 0
            assert policy.kl(preferences, preferences, 0.5) == 0

    def test_an_epsilon_is_needed(self):
        with pytest.raises(TypeError, match=r"greedy\.probs: epsilon must be an"):
            epsilon_greedy().probs(jnp.array([1.0, 3.0]))

    def test_takes_preferences_by_name(self):
        preferences, key = jnp.array([1.0, 3.0]), jax.random.key(0)
        for policy in (greedy(), epsilon_greedy(0.0)):
            assert policy.sample(key=key, preferences=preferences) == 1
            assert policy.probs(preferences=preferences)[1] == 1
            assert policy.logprob(sample=1, preferences=preferences) == 0
            assert policy.entropy(preferences=preferences) == 0


class TestDomains:
    REFUSED = (
        (softmax, "temperature", r"in \(0, inf\]", [-1.0, 0.0, 0, math.nan]),
        (clipped_entropy_softmax, "temperature", r"in \(0, inf\]", [-1.0, 0.0]),
        (clipped_entropy_softmax, "entropy_clip", r"in \[0, inf\]", [-0.5, math.nan]),
        (epsilon_greedy, "epsilon", r"in \[0, 1\]", [-0.1, 1.5, 2, math.nan]),
    )

    @pytest.mark.parametrize(("build", "name", "words", "values"), REFUSED)
    def test_a_python_number_out_of_range_is_refused(self, build, name, words, values):
        for value in values:
            match = f"{build.__name__}: {name} must be {words}, got {value}"
            with pytest.raises(ValueError, match=match):
                build(**{name: value})
            with pytest.raises(ValueError, match=f"{name} must be {words}"):
                build(**{name: np.float32(value)})

    @pytest.mark.parametrize("epsilon", [-0.1, 1.5])
    def test_so_is_an_epsilon_given_to_a_method(self, epsilon):
        policy, q = epsilon_greedy(), jnp.ones(2)
        for call in (
            lambda: policy.sample(jax.random.key(0), q, epsilon),
            lambda: policy.probs(q, epsilon=epsilon),
            lambda: policy.logprob(0, q, epsilon),
            lambda: policy.entropy(q, epsilon),
            lambda: policy.kl(q, q, epsilon),
        ):
            with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\], got"):
                call()

    def test_so_is_the_temperature_of_a_divergence(self):
        for call in (
            lambda: categorical_kl_divergence(jnp.ones(2), jnp.ones(2), -1.0),
            lambda: categorical_kl_divergence(
                jnp.ones(2), jnp.ones(2), temperature=0.0
            ),
        ):
            with pytest.raises(
                ValueError, match=r"temperature must be in \(0, inf\], got"
            ):
                call()

    @pytest.mark.parametrize("value", [-1.0, 1.5])
    def test_an_array_out_of_range_gives_nan(self, value):
        x, y, bad = jnp.zeros(2), jnp.ones(2), jnp.float32(value)
        results = [epsilon_greedy(bad).probs(x)]
        if value < 0:
            results += [
                softmax(bad).probs(x),
                clipped_entropy_softmax(1.0, bad).entropy(x),
                categorical_kl_divergence(x, y, bad),
            ]
        assert all(jnp.isnan(result).all() for result in results)
        assert epsilon_greedy(bad).sample(jax.random.key(0), x) == -1

    @pytest.mark.parametrize("epsilon", [0, 1, 0.0, 1.0])
    def test_the_ends_of_the_range_are_in_it(self, epsilon):
        probs = epsilon_greedy(epsilon).probs(jnp.array([0.0, 1.0]))
        np.testing.assert_array_equal(probs, [epsilon / 2, 1 - epsilon / 2])


class TestCategoricalSample:
    @KEYS
    @pytest.mark.parametrize("lead", [(), (2, 3)])
    def test_is_one_categorical_draw(self, rng, make_key, lead):
        probs = rng.dirichlet(np.ones(5), size=lead).astype(np.float32)
        for seed in range(20):
            drawn = categorical_sample(make_key(seed), probs)
            expected = jax.random.categorical(make_key(seed), jnp.log(probs))
            assert drawn.dtype == jnp.result_type(int)
            np.testing.assert_array_equal(drawn, expected)

    @pytest.mark.parametrize("scale", [1.0, 1e-6, 40.0])
    def test_is_as_frequent_as_it_is_probable(self, scale):
        probs = np.array([0.1, 0.2, np.nan, 0.0, 0.7])
        mask = np.array([True, True, False, True, True])
        draw = lambda key: categorical_sample(key, probs * scale, mask=mask)
        drawn = jax.vmap(draw)(jax.random.split(jax.random.key(2), 20_000))
        counts = np.bincount(drawn, minlength=5)
        assert counts[2] == counts[3] == 0
        some, expected = [0, 1, 4], 20_000 * np.array([0.1, 0.2, 0.7])
        square = ((counts[some] - expected) ** 2 / expected).sum()
        assert square < 20  # of two degrees of freedom: one in 20 000

    @pytest.mark.parametrize(
        "probs",
        [[0.0, 0.0], [-0.1, 1.1], [-0.5, -0.5], [np.nan, 1.0], [np.inf, 1.0]],
    )
    def test_draws_minus_one_where_there_is_no_distribution(self, probs):
        together = jnp.array([probs, [0.0, 1.0]])
        drawn = categorical_sample(jax.random.key(0), together)
        assert drawn.tolist() == [-1, 1]

    def test_draws_minus_one_where_nothing_is_legal(self):
        mask = jnp.zeros(2, bool)
        assert categorical_sample(jax.random.key(0), jnp.ones(2), mask=mask) == -1


def differentiate(fn, *args):
    """The gradient in each argument, along with finite differences of it, in float64.

    Entries that are not finite are not moved.
    """
    with jax.enable_x64(True):
        args = [np.asarray(x, np.float64) for x in args]
        got = jax.grad(lambda *args: fn(*args).sum(), range(len(args)))(*args)
        expected = [np.zeros_like(x) for x in args]
        for k, x in enumerate(args):
            for i in zip(*np.nonzero(np.isfinite(x)), strict=True):
                ends = []
                for step in (1e-6, -1e-6):
                    moved = [a.copy() for a in args]
                    moved[k][i] += step
                    ends.append(fn(*moved).sum())
                expected[k][i] = (ends[0] - ends[1]) / 2e-6
        return got, expected


class TestCategoricalCrossEntropy:
    def by_hand(self, labels, logits):
        probs = softmax_by_hand(logits)
        pairs = zip(labels, probs, strict=True)
        return math.fsum(-x * log_by_hand(p) for x, p in pairs if x != 0)

    @pytest.mark.parametrize("lead", [(), (2, 3)])
    def test_agrees_with_its_definition(self, rng, lead):
        labels = rng.dirichlet(np.ones(4), size=lead).astype(np.float32)
        logits = numbers(rng, *lead, 4)
        expected = row_by_row(self.by_hand, labels, logits)
        got = categorical_cross_entropy(labels, logits)
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    def test_labels_are_not_normalised(self):
        logits = jnp.array([0.0, 1.0])
        one = categorical_cross_entropy(jnp.array([0.5, 0.5]), logits)
        two = categorical_cross_entropy(jnp.array([1.0, 1.0]), logits)
        np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
        assert categorical_cross_entropy(jnp.zeros(2), logits) == 0

    @pytest.mark.parametrize("excluded", [False, True])
    def test_a_label_of_zero_has_a_gradient(self, excluded):
        """It is one more action to predict, unless that is ruled out."""
        labels, logits = [0.5, 0.5, 0.0], [1.0, 2.0, -np.inf if excluded else 3.0]
        expected = self.by_hand(labels, logits)
        got = categorical_cross_entropy(jnp.array(labels), jnp.array(logits))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        to_labels, to_logits = jax.grad(categorical_cross_entropy, (0, 1))(
            jnp.array(labels), jnp.array(logits)
        )
        probs = softmax_by_hand(logits)
        slopes = [0 if p == 0 else -math.log(p) for p in probs]
        np.testing.assert_allclose(to_labels, slopes, rtol=1e-6)
        np.testing.assert_allclose(to_logits, np.subtract(probs, labels), rtol=1e-5)

    def test_predicting_the_impossible_costs_infinity(self):
        logits = jnp.array([1.0, -jnp.inf])
        assert categorical_cross_entropy(jnp.array([0.5, 0.5]), logits) == jnp.inf

    @pytest.mark.parametrize("bad", BAD)
    def test_what_is_illegal_leaks_neither_values_nor_gradients(self, bad):
        labels, logits = jnp.array([0.25, bad, 0.75]), jnp.array([1.0, bad, 0.5])
        mask = jnp.array([True, False, True])
        loss = functools.partial(categorical_cross_entropy, mask=mask)
        expected = self.by_hand([0.25, 0.75], [1.0, 0.5])
        np.testing.assert_allclose(loss(labels, logits), expected, rtol=1e-6)
        got, differences = differentiate(loss, labels, logits)
        for x, y in zip(got, differences, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8)

    def test_no_legal_action_is_nan_without_a_gradient(self):
        mask = jnp.array([[False, False], [True, True]])
        loss = functools.partial(categorical_cross_entropy, mask=mask)
        args = jnp.full((2, 2), 0.5), jnp.zeros((2, 2))
        np.testing.assert_allclose(loss(*args), [np.nan, math.log(2)], rtol=1e-6)
        for gradient in jax.grad(lambda *a: loss(*a)[0], (0, 1))(*args):
            np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


class TestCategoricalKlDivergence:
    @pytest.mark.parametrize("temperature", [1.0, 0.5, 3])
    def test_agrees_with_its_definition(self, rng, temperature):
        p_logits, q_logits = numbers(rng, 2, 2, 3, 4)
        hand = lambda p, q: kl_by_hand(
            softmax_by_hand(p, temperature), softmax_by_hand(q, temperature)
        )
        expected = row_by_row(hand, p_logits, q_logits)
        got = categorical_kl_divergence(p_logits, q_logits, temperature)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    def test_is_zero_of_a_distribution_from_itself(self, rng):
        logits = numbers(rng, 5, 4)
        logits[0, 1] = -np.inf
        np.testing.assert_array_equal(
            categorical_kl_divergence(logits, logits), np.zeros(5)
        )
        np.testing.assert_array_equal(
            categorical_kl_divergence(logits, logits + 8), np.zeros(5)
        )

    def test_an_action_excluded_by_the_first_adds_nothing(self):
        excluded, full = [1.0, 2.0, -np.inf], [1.0, 2.0, 3.0]
        expected = kl_by_hand(softmax_by_hand(excluded), softmax_by_hand(full))
        got = categorical_kl_divergence(jnp.array(excluded), jnp.array(full))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        for first, second in ((excluded, full), (excluded, excluded)):
            got, differences = differentiate(categorical_kl_divergence, first, second)
            for x, y in zip(got, differences, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8)

    def test_an_action_excluded_by_the_second_alone_is_infinite(self):
        full, excluded = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, -jnp.inf])
        assert categorical_kl_divergence(full, excluded) == jnp.inf

    def test_is_right_for_extreme_logits(self):
        p_logits, q_logits = jnp.array([1e4, 0.0]), jnp.array([0.0, 1e4])
        assert categorical_kl_divergence(p_logits, q_logits) == 1e4
        gradients = jax.grad(categorical_kl_divergence, (0, 1))(p_logits, q_logits)
        np.testing.assert_array_equal(gradients, [[0, 0], [-1, 1]])


class TestCategoricalImportanceSamplingRatios:
    def by_hand(self, pi_logits, mu_logits, action):
        return softmax_by_hand(pi_logits)[action] / softmax_by_hand(mu_logits)[action]

    @pytest.mark.parametrize("lead", [(), (2, 3)])
    def test_agrees_with_its_definition(self, rng, lead):
        pi_logits, mu_logits = numbers(rng, 2, *lead, 4)
        actions = rng.integers(4, size=lead)
        got = categorical_importance_sampling_ratios(pi_logits, mu_logits, actions)
        assert got.shape == lead
        for i in np.ndindex(*lead):
            rows = pi_logits[i].tolist(), mu_logits[i].tolist()
            np.testing.assert_allclose(
                got[i], self.by_hand(*rows, actions[i]), rtol=1e-5
            )

    def test_is_right_where_probabilities_are_too_small_to_represent(self):
        pi_logits, mu_logits = np.array([[0.0, -500.0], [0.0, -501.0]])
        ratio = functools.partial(categorical_importance_sampling_ratios, a_t=1)
        single = ratio(np.float32(pi_logits), np.float32(mu_logits))
        np.testing.assert_allclose(single, math.e, rtol=1e-6)
        got, expected = differentiate(ratio, pi_logits, mu_logits)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)

    def test_an_excluded_action_is_never_or_surely_off_policy(self):
        full, excluded = jnp.array([0.0, 0.0]), jnp.array([0.0, -jnp.inf])
        ratio = categorical_importance_sampling_ratios
        assert ratio(excluded, full, 1) == 0
        assert ratio(excluded, full, 0) == 2
        assert ratio(full, excluded, 1) == jnp.inf
        assert jnp.isnan(ratio(excluded, excluded, 1))
        for logits in ((excluded, full, 0), (excluded, excluded, 1)):
            for gradient in jax.grad(ratio, (0, 1))(*logits):
                assert jnp.isfinite(gradient).all()

    @pytest.mark.parametrize("action", [-1, 2, 7])
    def test_the_ratio_of_no_action_is_nan(self, action):
        ones = jnp.ones(2)
        assert jnp.isnan(categorical_importance_sampling_ratios(ones, ones, action))

    @pytest.mark.parametrize("bad", BAD)
    def test_what_is_illegal_leaks_neither_values_nor_gradients(self, bad):
        pi_logits, mu_logits = [1.0, bad, 0.5], [0.0, bad, 2.0]
        mask = jnp.array([True, False, True])
        ratio = functools.partial(
            categorical_importance_sampling_ratios, a_t=2, mask=mask
        )
        expected = self.by_hand([1.0, 0.5], [0.0, 2.0], 1)
        value = ratio(jnp.array(pi_logits), jnp.array(mu_logits))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        got, differences = differentiate(ratio, pi_logits, mu_logits)
        np.testing.assert_allclose(got, differences, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("legal", [[True, False, True], [False] * 3])
    def test_an_illegal_action_has_no_ratio_and_no_gradient(self, legal):
        """So that a step of padding can be weighted out."""
        ratio = functools.partial(
            categorical_importance_sampling_ratios, a_t=1, mask=jnp.array(legal)
        )
        logits = jnp.array([1.0, 2.0, 3.0]), jnp.ones(3)
        assert jnp.isnan(ratio(*logits))
        np.testing.assert_array_equal(
            jax.grad(ratio, (0, 1))(*logits), np.zeros((2, 3))
        )


def test_methods_take_by_position_what_they_need_and_the_rest_by_name():
    logits, preferences = ["logits"], ["preferences", "epsilon"]
    expected = {
        softmax(): {
            "sample": ["key", *logits],
            "probs": logits,
            "logprob": ["sample", *logits],
            "entropy": logits,
            "kl": ["p_logits", "q_logits"],
        },
        epsilon_greedy(0.1): {
            "sample": ["key", *preferences],
            "probs": preferences,
            "logprob": ["sample", *preferences],
            "entropy": preferences,
        },
    }
    for policy, methods in expected.items():
        for name, parameters in methods.items():
            signature = inspect.signature(getattr(policy, name)).parameters
            positional = [
                k for k, p in signature.items() if p.kind is p.POSITIONAL_OR_KEYWORD
            ]
            assert positional == parameters

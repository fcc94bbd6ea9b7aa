"""Time limits and padding: many episodes in one trajectory are each on its own.

Every function that takes `truncation_t` or `mask_t` along a trajectory is here.
"""

import functools
import inspect
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import rlprims

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ACTIONS = 3
LONGEST = 3
ATOMS = np.linspace(-1, 3, ACTIONS + 1, dtype=np.float32)
# Its transform of zero is not zero, as padding is.
PAIR = rlprims.compose_tx(
    rlprims.SIGNED_HYPERBOLIC_PAIR, rlprims.TxPair(lambda x: x + 1, lambda x: x - 1)
)


class Steps(NamedTuple):
    """What the estimators need to know of each step, `[T]` or `[T, A]`."""

    v_tm1: jax.Array
    r_t: jax.Array
    discount_t: jax.Array
    v_t: jax.Array
    lambda_t: jax.Array
    rho_tm1: jax.Array
    c_t: jax.Array
    q_taken_t: jax.Array
    q_tm1: jax.Array
    q_t: jax.Array
    pi_t: jax.Array
    a_tm1: jax.Array
    a_t: jax.Array


def values(s):
    """In one array, as if the trajectory were unbroken."""
    return jnp.append(s.v_tm1, s.v_t[-1:])


def vtrace_inputs(s):
    return s.v_tm1, s.v_t, s.r_t, s.discount_t, s.rho_tm1


def mixed(results):
    """Several results as one, in which each of them shows."""
    return sum(weight * x for weight, x in enumerate(results, start=1))


def off_policy_inputs(s):
    return s.q_tm1, s.q_t, s.a_tm1, s.a_t, s.r_t, s.discount_t


FLOWS = {"stop_target_gradients": False}


def weighed(distributions):
    """Each distribution as one number, in which each of its own shows."""
    return distributions @ jnp.cos(jnp.arange(distributions.shape[-1], dtype="f4"))


def unrolled(targets):
    """All targets from each step as one number, in which each of them shows."""
    value, reward, policy, *masks = targets
    masks = [mask.astype("f4") for mask in masks]
    return mixed(map(weighed, (value, reward, weighed(policy), *masks)))


def bootstrapped(folded, v_t):
    """Transitions over several steps as the returns that they lead to."""
    reached = jnp.where(folded.discount_t == 0, 0, v_t[folded.last_t])
    return folded.r_t + folded.discount_t * reached


ESTIMATORS = {
    "discounted_returns": lambda s, f: f(s.r_t, s.discount_t, s.v_t),
    "lambda_returns": lambda s, f: f(s.r_t, s.discount_t, s.v_t, s.lambda_t),
    "n_step_bootstrapped_returns": lambda s, f: f(
        s.r_t, s.discount_t, s.v_t, 2, s.lambda_t
    ),
    "generalized_advantage_estimation": lambda s, f: f(
        s.v_tm1,
        s.r_t,
        s.discount_t,
        s.v_t,
        s.lambda_t,
        stop_target_gradients=False,
    ),
    "truncated_generalized_advantage_estimation": lambda s, f: f(
        s.r_t, s.discount_t, s.lambda_t, values(s), v_t=s.v_t
    ),
    "importance_corrected_td_errors": lambda s, f: f(
        s.r_t, s.discount_t, s.rho_tm1, s.lambda_t, values(s), v_t=s.v_t
    ),
    "general_off_policy_returns_from_q_and_v": lambda s, f: f(
        s.q_taken_t[:-1], s.v_t, s.r_t, s.discount_t, s.c_t[:-1]
    ),
    "general_off_policy_returns_from_action_values": lambda s, f: f(
        s.q_t, s.a_t, s.r_t, s.discount_t, s.c_t, s.pi_t
    ),
    "categorical_n_step_targets": lambda s, f: weighed(
        f(
            ATOMS,
            s.r_t,
            s.discount_t,
            ATOMS[1:],
            s.q_t,
            2,
            stop_target_gradients=False,
        )
    ),
    "quantile_n_step_targets": lambda s, f: weighed(
        f(s.r_t, s.discount_t, s.q_t, 2, stop_target_gradients=False)
    ),
    "td_lambda": lambda s, f: f(s.v_tm1, s.r_t, s.discount_t, s.v_t, s.lambda_t, False),
    "sarsa_lambda": lambda s, f: f(
        s.q_tm1, s.a_tm1, s.r_t, s.discount_t, s.q_t, s.a_t, s.lambda_t, False
    ),
    "q_lambda": lambda s, f: f(
        s.q_tm1, s.a_tm1, s.r_t, s.discount_t, s.q_t, s.lambda_t, False
    ),
    "retrace": lambda s, f: f(
        s.q_tm1,
        s.q_t,
        s.a_tm1,
        s.a_t,
        s.r_t,
        s.discount_t,
        s.pi_t,
        s.c_t,
        s.lambda_t,
        stop_target_gradients=False,
    ),
    "retrace_continuous": lambda s, f: f(
        s.v_tm1,
        s.q_taken_t[:-1],
        s.v_t,
        s.r_t,
        s.discount_t,
        s.rho_tm1[:-1] - 0.6,
        s.lambda_t[:-1],
        stop_target_gradients=False,
    ),
    "tree_backup": lambda s, f: f(*off_policy_inputs(s), s.pi_t, s.lambda_t, **FLOWS),
    "off_policy_q_lambda": lambda s, f: f(
        *off_policy_inputs(s), s.pi_t, s.lambda_t, **FLOWS
    ),
    "q_sigma": lambda s, f: mixed(
        f(
            *off_policy_inputs(s),
            s.pi_t,
            s.rho_tm1,
            s.c_t,
            s.lambda_t,
            control_variate=control_variate,
            **FLOWS,
        )
        for control_variate in (False, True)
    ),
    "per_decision_importance_sampling": lambda s, f: f(
        *off_policy_inputs(s), s.rho_tm1, s.lambda_t, **FLOWS
    ),
    "watkins_q_lambda": lambda s, f: f(
        s.q_tm1, s.a_tm1, s.r_t, s.discount_t, s.q_t, s.a_t, s.lambda_t, **FLOWS
    ),
    "muzero_targets": lambda s, f: unrolled(
        f(s.v_tm1, s.pi_t, s.r_t, s.discount_t, num_unroll_steps=3, **FLOWS)
    ),
    "upgo_returns": lambda s, f: f(s.r_t, s.discount_t, s.v_t, **FLOWS),
    "n_step_transitions": lambda s, f: bootstrapped(f(s.r_t, s.discount_t, 2), s.v_t),
    "rewards_to_go": lambda s, f: f(s.r_t, s.discount_t, **FLOWS),
    "soft_lambda_returns": lambda s, f: f(
        s.r_t, s.discount_t, s.v_t, s.c_t, s.lambda_t, temperature=0.5, **FLOWS
    ),
    "transformed_lambda_returns": lambda s, f: f(
        PAIR, s.r_t, s.discount_t, s.v_t, s.lambda_t
    ),
    "transformed_n_step_returns": lambda s, f: f(
        PAIR, s.r_t, s.discount_t, s.v_t, 2, s.lambda_t
    ),
    "transformed_general_off_policy_returns_from_action_values": lambda s, f: f(
        PAIR, s.q_t, s.a_t, s.r_t, s.discount_t, s.c_t, s.pi_t
    ),
    "transformed_n_step_q_learning": lambda s, f: f(
        s.q_tm1, s.a_tm1, s.q_t, s.a_t, s.r_t, s.discount_t, 2, False, PAIR
    ),
    "transformed_q_lambda": lambda s, f: f(
        s.q_tm1, s.a_tm1, s.r_t, s.discount_t, s.q_t, s.lambda_t, False, PAIR
    ),
    "transformed_retrace": lambda s, f: f(
        s.q_tm1,
        s.q_t,
        s.a_tm1,
        s.a_t,
        s.r_t,
        s.discount_t,
        s.pi_t,
        s.c_t,
        s.lambda_t,
        stop_target_gradients=False,
        tx_pair=PAIR,
    ),
    "vtrace": lambda s, f: f(
        *vtrace_inputs(s), s.lambda_t, 0.7, stop_target_gradients=False
    ),
    "leaky_vtrace": lambda s, f: f(
        *vtrace_inputs(s), 0.3, s.lambda_t, 0.7, stop_target_gradients=False
    ),
    "vtrace_td_error_and_advantage": lambda s, f: mixed(
        f(*vtrace_inputs(s), s.lambda_t, 0.7, 0.8, stop_target_gradients=False)
    ),
    "leaky_vtrace_td_error_and_advantage": lambda s, f: mixed(
        f(*vtrace_inputs(s), 0.3, s.lambda_t, 0.7, 0.8, stop_target_gradients=False)
    ),
}
# Functions along a trajectory that need no place in this table, and why.
ELSEWHERE = {
    "backward_recurrence": "knows no episodes",
    "update_return_range": "takes returns in any order",
}


@functools.cache
def estimate_and_gradients(name):
    """Returns a compiled function of steps, weights of the result, and cuts."""

    def weigh(steps, weights, cuts):
        fn = functools.partial(getattr(rlprims, name), **cuts)
        result = ESTIMATORS[name](steps, fn)
        return jnp.vdot(weights, result), result

    def run(steps, weights, cuts):
        floats = {k: x for k, x in steps._asdict().items() if x.dtype == jnp.float32}
        fn = lambda floats: weigh(steps._replace(**floats), weights, cuts)
        (_, result), gradients = jax.value_and_grad(fn, has_aux=True)(floats)
        return result, gradients

    return jax.jit(run)


def random_steps(rng, size):
    floats = rng.uniform(0.2, 1, size=(8, size))
    actions = rng.integers(ACTIONS, size=(2, size))
    q_tm1, q_t = rng.normal(size=(2, size, ACTIONS))
    pi_t = rng.dirichlet(np.ones(ACTIONS), size=size)
    return Steps(
        *(np.float32(x) for x in (*floats, q_tm1, q_t, pi_t)), *np.int32(actions)
    )


class Episodes(NamedTuple):
    """Episodes one after another, with steps to leave out."""

    lengths: list[int]
    terminated: list[bool]
    kept: list[bool]
    seed: int

    def packed(self):
        """Returns all steps in one, and where they are cut or left out.

        What is left out holds nothing that can be computed with. If it is the last
        step of an episode, it is marked as cut: who leaves it out must say so.
        """
        size = sum(self.lengths)
        steps = random_steps(np.random.default_rng(self.seed), size)
        lasts = np.cumsum(self.lengths) - 1
        ends = np.isin(np.arange(size), lasts)
        kept = np.array(self.kept[:size])
        terminated = np.zeros(size, bool)
        terminated[lasts] = self.terminated[: len(lasts)]
        discount_t = np.where(terminated, 0, steps.discount_t).astype(np.float32)
        steps = steps._replace(discount_t=discount_t)

        def spoil(x):
            bad = np.nan if x.dtype == np.float32 else -7
            where = kept.reshape(-1, *[1] * (x.ndim - 1))
            return np.where(where, x, np.asarray(bad, x.dtype))

        truncation_t = ends & ~(terminated & kept)
        return Steps(*map(spoil, steps)), truncation_t, kept

    def apart(self, steps):
        """Yields the steps of each episode that are kept, and where they are."""
        stops = np.cumsum(self.lengths)
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            where = np.arange(start, stop)[self.kept[start:stop]]
            if len(where):
                yield where, Steps(*(np.asarray(x)[where] for x in steps))


@st.composite
def episodes(draw, size=10):
    lengths = []
    while (left := size - sum(lengths)) > 0:
        lengths.append(draw(st.integers(1, min(left, LONGEST))))
    flags = lambda n: draw(st.lists(st.booleans(), min_size=n, max_size=n))
    seed = draw(st.integers(0, 2**16))
    kept = flags(size) if draw(st.booleans()) else [True] * size
    return Episodes(lengths, flags(len(lengths)), kept, seed)


@pytest.mark.parametrize("name", ESTIMATORS)
class TestEveryEstimator:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(episodes=episodes())
    def test_of_packed_episodes_is_that_of_each_apart(self, name, episodes):
        """Steps that are left out hold NaN and actions that do not exist."""
        steps, truncation_t, mask_t = episodes.packed()
        weights = np.cos(np.arange(len(mask_t), dtype=np.float32))
        cuts = {"truncation_t": truncation_t, "mask_t": mask_t}
        run = estimate_and_gradients(name)
        result, gradients = run(steps, weights, cuts)
        expected = np.zeros_like(result)
        slopes = {k: np.zeros_like(x) for k, x in gradients.items()}
        for where, part in episodes.apart(steps):
            expected[where], more = run(part, weights[where], {})
            for k, x in more.items():
                slopes[k][where] = x
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
        # What it would be to go on after a termination depends on what comes next.
        going_on = steps.discount_t != 0
        for grads in (gradients, slopes):
            grads["discount_t"] = np.where(going_on, grads["discount_t"], 0)
        for k, x in gradients.items():
            np.testing.assert_allclose(x, slopes[k], rtol=1e-5, atol=1e-6, err_msg=k)

    @pytest.mark.slow
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(episodes=episodes())
    def test_needs_no_mask_where_every_step_counts(self, name, episodes):
        episodes = episodes._replace(kept=[True] * len(episodes.kept))
        steps, truncation_t, mask_t = episodes.packed()
        run, ones = estimate_and_gradients(name), np.ones(len(mask_t), np.float32)
        cuts = {"truncation_t": truncation_t}
        without, _ = run(steps, ones, cuts)
        with_mask, _ = run(steps, ones, cuts | {"mask_t": mask_t})
        np.testing.assert_allclose(without, with_mask, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_of_padding_alone_is_zero(self, name):
        episodes = Episodes([4], [False], [False] * 4, seed=0)
        steps, _, mask_t = episodes.packed()
        ones = np.ones(4, np.float32)
        result, gradients = estimate_and_gradients(name)(
            steps, ones, {"mask_t": mask_t}
        )
        assert not result.any()
        assert not any(x.any() for x in gradients.values())

    @pytest.mark.slow
    def test_works_on_four_devices_with_its_gradients(self, name):
        """In `shard_map`, over a batch that is split, in a program of its own."""
        kept = [True, True, False, True]
        packed = [Episodes([2, 2], [True, False], kept, i).packed() for i in range(4)]
        steps, *cuts = jax.tree.map(lambda *xs: np.stack(xs), *packed)
        ones = np.ones(4, np.float32)

        def run(steps, truncation_t, mask_t):
            cuts = {"truncation_t": truncation_t, "mask_t": mask_t}
            return estimate_and_gradients(name)(steps, ones, cuts)

        over = PartitionSpec("d")
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        spread = jax.shard_map(jax.vmap(run), mesh=mesh, in_specs=over, out_specs=over)
        chex.assert_trees_all_close(
            jax.jit(spread)(steps, *cuts),
            jax.vmap(run)(steps, *cuts),
            rtol=1e-5,
            atol=1e-6,
        )

    @pytest.mark.slow
    def test_a_step_before_the_last_of_all_may_be_cut_too(self, name):
        """The next value then belongs to another episode, whatever it is."""
        steps = random_steps(np.random.default_rng(0), 2)
        cut = {"truncation_t": np.array([True, False])}
        run, first = estimate_and_gradients(name), np.float32([1, 0])
        result, _ = run(steps, first, cut)
        later = Steps(*(np.stack([x[0], 9 * x[1]]) for x in steps))
        later = later._replace(a_tm1=steps.a_tm1, a_t=steps.a_t)
        other, _ = run(later, first, cut)
        assert result[0] == other[0]


def test_the_mistake_that_everybody_makes():
    """A second episode's first value is no estimate of where the first one ended."""
    v_tm1, v_t = jnp.array([1.0, 100.0]), jnp.array([1.0, 100.0])
    nothing, one, cut = jnp.zeros(2), jnp.ones(2), jnp.array([True, False])
    advantages = rlprims.generalized_advantage_estimation(
        v_tm1, nothing, one, v_t, 1.0, truncation_t=cut
    )
    assert advantages.tolist() == [0, 0]
    unbroken = rlprims.truncated_generalized_advantage_estimation(
        nothing, one, 1.0, jnp.array([1.0, 100.0, 100.0])
    )
    assert unbroken.tolist() == [99, 0]


@pytest.mark.parametrize(
    "name",
    ["truncated_generalized_advantage_estimation", "importance_corrected_td_errors"],
)
def test_one_array_of_values_cannot_know_what_a_time_limit_hid(name):
    steps = random_steps(np.random.default_rng(0), 3)
    cut = {"truncation_t": np.zeros(3, bool), "v_t": None}
    call = lambda *args, **given: getattr(rlprims, name)(*args, **given | cut)
    with pytest.raises(
        ValueError, match=f"^{name}: truncation_t needs v_t, the values"
    ):
        ESTIMATORS[name](steps, call)


def gives_an_array_for_each_step(fn):
    """Or a distribution for each, or several arrays; the losses may give a number."""
    contract = fn.__contracts__().get("return")
    per_step = ("f[T]", "f[T,M]", "f[T,N]")
    return contract is None or contract.text.startswith(per_step)


def test_no_function_along_a_trajectory_is_left_out():
    names = {
        name
        for name, fn in vars(rlprims).items()
        if inspect.isfunction(fn) and hasattr(fn, "__contracts__")
        if {"truncation_t", "mask_t"} & inspect.signature(fn).parameters.keys()
        if gives_an_array_for_each_step(fn)
    }
    assert names == ESTIMATORS.keys() | ELSEWHERE.keys()

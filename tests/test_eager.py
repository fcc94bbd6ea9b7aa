"""A call outside `jax.jit` compiles once, and leaves nothing behind."""

import os
import runpy
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONTRACTS = runpy.run_path(str(Path(__file__).with_name("test_contracts.py")))
CASES = [case for case in CONTRACTS["CASES"] if case.full]
COMPILED = []  # the name of each program compiled


def listen(event: str, duration_secs: float, **details: str | int):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(details.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(listen)


def compiled_again(call, *examples):
    """Lists what is compiled for later examples, once the first has been."""
    first, *others = examples
    jax.block_until_ready(call(first))
    COMPILED.clear()
    for example in others:
        jax.block_until_ready(call(example))
    return COMPILED


@pytest.fixture
def arguments(rng):
    """Three calls that differ in values alone."""
    return lambda case: [case.arguments(rng) for _ in range(3)]


def of_each(cases):
    return pytest.mark.parametrize("case", cases, ids=repr)


def test_compilation_is_seen():
    assert compiled_again(jnp.cumsum, np.ones(31), np.ones(37))


@pytest.mark.slow
@of_each(CASES)
def test_a_call_compiles_once(case, arguments):
    assert not compiled_again(lambda xs: case.call(**xs), *arguments(case))


@pytest.mark.slow
@of_each(CASES)
def test_so_does_a_call_under_vmap(case, arguments):
    stacked = [
        {k: CONTRACTS["stack"](x, x) for k, x in xs.items()} for xs in arguments(case)
    ]
    vmapped = jax.vmap(lambda xs: case.call(**xs))
    assert not compiled_again(vmapped, *stacked)


@pytest.mark.slow
@of_each([case for case in CASES if CONTRACTS["gives_floats"](case)])
def test_so_does_a_gradient(case, arguments):
    def gradients(xs):
        floats = {k: xs[k] for k in case.floats}
        result = lambda floats: jax.tree.leaves(case.call(**(xs | floats)))[0].sum()
        return jax.value_and_grad(result)(floats)

    assert not compiled_again(gradients, *arguments(case))


BOUNDS = types.SimpleNamespace(minimum=np.zeros(3), maximum=np.ones(3))
SQUASHED, ONES = rlprims.squashed_gaussian(), np.ones(3, np.float32)
NORMAL = types.SimpleNamespace(
    batch_shape=(3,),
    sample=lambda seed, sample_shape: jax.random.normal(seed, (*sample_shape, 3)),
    log_prob=lambda value: -(value**2),
)
TARGETS = rlprims.PolicyTarget(np.ones((4, 3), np.float32), np.ones((4, 3), np.float32))
METHODS = {
    "squashed_gaussian.sample": lambda x: SQUASHED.sample(
        jax.random.key(0), ONES * x, ONES, BOUNDS
    ),
    "squashed_gaussian.logprob": lambda x: rlprims.squashed_gaussian(-x).logprob(
        ONES / 2, ONES * x, ONES, BOUNDS
    ),
    "constant_policy_targets": lambda x: rlprims.constant_policy_targets(
        NORMAL, jax.random.key(0), 4, float(x)
    ),
    "sampled_policy_distillation_loss": lambda x: (
        rlprims.sampled_policy_distillation_loss(
            NORMAL, TARGETS._replace(weights=TARGETS.weights * x), mask_t=ONES > 0
        )
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_so_does_what_is_given_an_object(name):
    assert not compiled_again(METHODS[name], *np.float32([1, 2, 3]))


TREES = [{"a": jnp.full((2, 3), x), "b": jnp.full(2, 2 * x)} for x in (1.0, 2.0, 3.0)]
FLAGS = [jnp.array([True, False]), jnp.array([False, True]), jnp.array([True, True])]
IMAGES = jnp.zeros((5, 2, 3))
OF_TREES = {
    "transpose_first_axis_to_last": lambda i, fn: fn(TREES[i]),
    "transpose_last_axis_to_first": lambda i, fn: fn(TREES[i]),
    "tree_replace_masked": lambda i, fn: fn(TREES[i], TREES[0], FLAGS[i]),
    "tree_select": lambda i, fn: fn(FLAGS[i], TREES[i], TREES[0]),
    "tree_split_key": lambda i, fn: fn(jax.random.key(i), TREES[i]),
    "tree_split_leaves": lambda i, fn: fn(TREES[i]),
    "conditional_update": lambda i, fn: fn(TREES[i], TREES[0], FLAGS[i]),
    "periodic_update": lambda i, fn: fn(TREES[i], TREES[0], i, jnp.array(i + 1)),
    "extract_subsequences": lambda i, fn: fn(IMAGES, jnp.full((2, 1), i), 2, i + 1),
    "split_burn_in": lambda i, fn: fn({"a": IMAGES + i}, 2),
    "AllSum": lambda i, fn: fn()(TREES[i]["a"]),
}


@pytest.mark.parametrize("name", OF_TREES)
def test_so_does_a_call_on_trees(name):
    call = lambda i: OF_TREES[name](i, getattr(rlprims, name))
    assert not compiled_again(call, 0, 1, 2)


def memory():
    """The bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


T = 16
R_T, V_T = np.ones(T, np.float32), np.ones(T + 1, np.float32)
CALLS = {
    "lambda_returns": lambda x: rlprims.lambda_returns(R_T * x, R_T, V_T[1:], 0.9),
    "gae": lambda x: rlprims.truncated_generalized_advantage_estimation(
        R_T * x, R_T, 0.9, V_T
    ),
    "q_learning": lambda x: rlprims.q_learning(R_T, 1, x, 0.9, R_T),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("transform", ["call", "gradient"])
@pytest.mark.parametrize("name", CALLS)
def test_a_thousand_calls_do_not_grow_the_process(name, transform):
    """A program that is compiled anew takes a megabyte or more: 1 GB in all here.

    Ten kilobytes for each call are allowed, against noise in what is measured.
    """
    fn = CALLS[name]
    call = fn if transform == "call" else jax.grad(lambda x: jnp.sum(fn(x)))

    def run(times):
        for step in range(times):
            jax.block_until_ready(call(np.float32(step)))

    run(100)
    before = memory()
    for _ in range(10):
        run(100)
        assert memory() - before < 10e6

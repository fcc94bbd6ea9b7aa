"""Values on ordinary input are those of RLax, where it is installed.

`pip install -e ".[peer]"` installs it. Each function with contracts is called in both
libraries with the same random arguments, made as in `test_contracts.py`; what differs
on purpose is listed with its reason, and `docs/migrating.md` shows how.
"""

import inspect
import runpy
import types
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import rlprims

rlax = pytest.importorskip("rlax")

CONTRACTS = runpy.run_path(str(Path(__file__).with_name("test_contracts.py")))
CASES = {
    fn.__name__: CONTRACTS["Case"](fn, False) for fn in CONTRACTS["CHECKED"].values()
}
# Values that differ on purpose, and why.
DIFFERENT = {
    "art": "sums the steps over the targets of a task in RLax",
    "episodic_memory_intrinsic_rewards": "takes distances to be negative in RLax",
    "signed_parabolic": "cancels digits in RLax",
    **dict.fromkeys(
        ("muzero_pair", "transform_to_2hot", "twohot_pair"),
        "has a bias against division by zero in RLax",
    ),
}
DISTRIBUTIONS = ["clipped_entropy_softmax", "epsilon_greedy", "gaussian_diagonal"]
DISTRIBUTIONS += ["greedy", "softmax", "squashed_gaussian"]
# What a distribution is made with in RLax, and its methods are called with here.
SETTINGS = {"temperature", "epsilon", "entropy_clip", "sigma_min", "sigma_max"}


def unbroken(arguments):
    """The value of a state reached is that of the next state left."""
    return {"v_t": np.append(arguments["v_tm1"][1:], arguments["v_t"][-1:])}


def without_restarts(arguments):
    return {
        "restarting_weights": np.ones_like(arguments["restarting_weights"]),
        "top_k_fraction": 0.6,
    }


# Arguments of which only some values are ordinary, and what they are.
ORDINARY = {
    "categorical_cross_entropy": lambda given: {
        "labels": CONTRACTS["probabilities"](given["labels"])
    },
    "leaky_vtrace_td_error_and_advantage": unbroken,
    "sample_start_indices": lambda given: {
        "max_valid_start_idx": int(given["max_valid_start_idx"])
    },
    "vmpo_compute_weights_and_temperature_loss": without_restarts,
    "vtrace_td_error_and_advantage": unbroken,
}
# Functions that take one leading axis in RLax.
ONE_AXIS = {"add_dirichlet_noise", "add_ornstein_uhlenbeck_noise", "embed_oar"}


def in_rlax(name, arguments):
    """Calls the function of that name, or that method of a distribution."""
    maker, _, method = name.partition(".")
    fn = getattr(rlax, maker)
    if method:
        made_with = {k: arguments.pop(k) for k in SETTINGS & arguments.keys()}
        fn = getattr(fn(**made_with), method)
        if "minimum" in arguments:
            bounds = {k: arguments.pop(k) for k in ("minimum", "maximum")}
            arguments["action_spec"] = types.SimpleNamespace(**bounds)
        return fn(*arguments.values())
    return fn(**arguments)


def in_both(name):
    maker, _, method = name.partition(".")
    if not method:
        return hasattr(rlax, name) and not name.startswith("transformed_")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are to be deprecated
        return maker in DISTRIBUTIONS and bool(getattr(getattr(rlax, maker)(), method))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*filter(in_both, CASES)])
def test_values_are_those_of_rlax(name, rng):
    case, equal = CASES[name], []
    order = list(inspect.signature(case.fn).parameters)
    for _ in range(5):
        last = dict.fromkeys(case.inputs, -1)
        lead = (2,) if name in ONE_AXIS else (2, 3)
        arguments = case.arguments(rng, choice=last, lead=lead)
        arguments |= ORDINARY.get(name, lambda _: {})(arguments)
        ours = case.call(**arguments)
        given = case.static | CONTRACTS["put_together"](case.records, arguments)
        given = {k: given[k] for k in order if k in given}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            theirs = in_rlax(name, given)
        if hasattr(theirs, "__dataclass_fields__"):
            theirs = [getattr(theirs, field) for field in ours._fields]
        leaves = map(jax.tree.leaves, (ours, theirs))
        equal += [
            np.allclose(x, y, rtol=1e-4, atol=1e-5)
            for x, y in zip(*leaves, strict=True)
        ]
    assert all(equal) != (name in DIFFERENT)


class Inputs:
    """Random arrays; the same ones for whoever asks in the same order."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def f(self, *shape):
        return np.float32(self.rng.uniform(0.1, 0.9, shape))

    def i(self, below, *shape):
        return np.int32(self.rng.integers(below, size=shape))

    def tree(self, *shape):
        return {"a": self.f(*shape), "b": [self.f(*shape, 2)]}

    def penalty(self, rl):
        return rl.LagrangePenalty(alpha=self.f(), epsilon=0.1)


def normal():
    """A policy in the manner of distrax."""
    draw = lambda seed, sample_shape: jax.random.normal(seed, (*sample_shape, 3))
    return types.SimpleNamespace(
        batch_shape=(3,), sample=draw, log_prob=lambda x: -(x**2) / 2
    )


def moments(rl, x):
    init, update = rl.create_ema(0.9)
    tree = x.tree(3)
    return jax.tree.leaves(update(x.tree(3), update(tree, init(tree))[1])[0])


def rescaled(rl, x):
    state = rl.PopArtState(x.f(3), 1 + x.f(3), 4 + x.f(3))
    new = rl.PopArtState(x.f(3), 1 + x.f(3), 4 + x.f(3))
    return rl.pop({"w": x.f(5, 3), "b": x.f(3)}, state, new)


def updated(rl, x):
    init, update = rl.popart(3, 0.1, 1e-4, 1e4)
    params = {"w": x.f(5, 3), "b": x.f(3)}
    return update(params, init(), x.f(3), np.arange(3))[0]


def distilled(rl, x):
    targets = rl.PolicyTarget(actions=x.f(4, 3), weights=x.f(4, 3))
    return rl.sampled_policy_distillation_loss(normal(), targets)


def constrained(rl, x):
    return [(x.f(6), x.penalty(rl)), (x.f(6), x.penalty(rl))]


def mpo(rl, x):
    values, penalty = x.f(4, 6), x.penalty(rl)
    loss, outputs = rl.mpo_loss(x.f(4, 6), values, penalty, constrained(rl, x))
    return loss, outputs.normalized_weights, outputs.kl_loss, outputs.alpha_loss


def vmpo(rl, x):
    log_probs, advantages, penalty = x.f(6), x.f(6), x.penalty(rl)
    loss, outputs = rl.vmpo_loss(log_probs, advantages, penalty, constrained(rl, x))
    return loss, outputs.policy_loss, outputs.temperature_loss


def there_and_back(pair, x):
    codes = pair.apply(x.f(4))
    return codes, pair.apply_inv(codes)


def traces(rl, x, *more):
    """What functions of action values along a trajectory start with."""
    return x.f(5, 3), *more, x.i(3, 5), x.f(5), x.f(5)


# Calls of the functions that `test_contracts.py` makes no arguments for.
CALLS = {
    "AllSum": lambda rl, x: rl.AllSum()(x.f(3, 2), axis=0),
    "batched_index": lambda rl, x: rl.batched_index(x.f(5, 3), x.i(3, 5)),
    "clip_gradient": lambda rl, x: jax.grad(
        lambda y: (3 * rl.clip_gradient(y, -1.0, 1.0) ** 2).sum()
    )(x.f(4)),
    "compose_tx": lambda rl, x: there_and_back(
        rl.compose_tx(rl.SIGNED_LOGP1_PAIR, rl.HYPERBOLIC_SIN_PAIR), x
    ),
    "compute_parametric_kl_penalty_and_dual_loss": lambda rl, x: (
        rl.compute_parametric_kl_penalty_and_dual_loss(constrained(rl, x), abs)
    ),
    "conditional_update": lambda rl, x: rl.conditional_update(
        x.tree(3), x.tree(3), np.bool_(True)
    ),
    "constant_policy_targets": lambda rl, x: (
        rl.constant_policy_targets(normal(), jax.random.key(3), 4, 0.5).actions
    ),
    "create_ema": moments,
    "extract_subsequences": lambda rl, x: rl.extract_subsequences(
        x.f(6, 2), x.i(3, 2, 4), 3
    ),
    "greedy": lambda rl, x: rl.greedy().probs(x.f(4)),
    "lhs_broadcast": lambda rl, x: rl.lhs_broadcast(x.f(3), x.f(3, 2)),
    "mpo_compute_weights_and_temperature_loss": lambda rl, x: (
        rl.mpo_compute_weights_and_temperature_loss(x.f(4, 6), x.penalty(rl), abs)
    ),
    "mpo_loss": mpo,
    "muzero_pair": lambda rl, x: there_and_back(
        rl.muzero_pair(-2.0, 2.0, 21, rl.SIGNED_LOGP1_PAIR), x
    ),
    "periodic_update": lambda rl, x: rl.periodic_update(
        x.tree(3), x.tree(3), np.int32(6), 3
    ),
    "pop": rescaled,
    "popart": updated,
    "replace_masked": lambda rl, x: rl.replace_masked(
        x.f(3, 2), x.f(3, 2), np.array([True, False, True])
    ),
    "sampled_policy_distillation_loss": distilled,
    "transformed_general_off_policy_returns_from_action_values": lambda rl, x: (
        rl.transformed_general_off_policy_returns_from_action_values(
            rl.SIGNED_LOGP1_PAIR, *traces(rl, x), x.f(5), x.f(5, 3) / 3
        )
    ),
    "transformed_lambda_returns": lambda rl, x: rl.transformed_lambda_returns(
        rl.SIGNED_LOGP1_PAIR, x.f(5), x.f(5), x.f(5), 0.9
    ),
    "transformed_n_step_q_learning": lambda rl, x: rl.transformed_n_step_q_learning(
        x.f(5, 3),
        x.i(3, 5),
        x.f(5, 3),
        x.i(3, 5),
        x.f(5),
        x.f(5),
        2,
        tx_pair=rl.SIGNED_LOGP1_PAIR,
    ),
    "transformed_n_step_returns": lambda rl, x: rl.transformed_n_step_returns(
        rl.SIGNED_LOGP1_PAIR, x.f(5), x.f(5), x.f(5), 3
    ),
    "transformed_q_lambda": lambda rl, x: rl.transformed_q_lambda(
        *traces(rl, x), x.f(5, 3), 0.9, tx_pair=rl.SIGNED_LOGP1_PAIR
    ),
    "transformed_retrace": lambda rl, x: rl.transformed_retrace(
        *traces(rl, x, x.f(5, 3), x.i(3, 5)),
        x.f(5, 3) / 3,
        x.f(5),
        0.9,
        tx_pair=rl.SIGNED_LOGP1_PAIR,
    ),
    "transpose_first_axis_to_last": lambda rl, x: rl.transpose_first_axis_to_last(
        x.tree(3, 4)
    ),
    "transpose_last_axis_to_first": lambda rl, x: rl.transpose_last_axis_to_first(
        x.tree(3, 4)
    ),
    "tree_fn": lambda rl, x: rl.tree_fn(lambda y, by: by * y, by=2)(x.tree(3)),
    "tree_map_zipped": lambda rl, x: rl.tree_map_zipped(
        lambda *ys: sum(ys), [x.tree(3), x.tree(3)]
    ),
    "tree_replace_masked": lambda rl, x: rl.tree_replace_masked(
        x.tree(2), x.tree(2), np.array([True, False])
    ),
    "tree_select": lambda rl, x: rl.tree_select(np.bool_(False), x.tree(3), x.tree(3)),
    "tree_split_key": lambda rl, x: jax.tree.map(
        jax.random.key_data, rl.tree_split_key(jax.random.key(3), x.tree(3))
    ),
    "tree_split_leaves": lambda rl, x: rl.tree_split_leaves(x.tree(3, 2)),
    "twohot_pair": lambda rl, x: there_and_back(rl.twohot_pair(-2.0, 2.0, 21), x),
    "unbiased_transform_pair": lambda rl, x: there_and_back(
        rl.unbiased_transform_pair(-2.0, 2.0, 21, rl.SIGNED_LOGP1_PAIR), x
    ),
    "vmpo_loss": vmpo,
    "zero_policy_targets": lambda rl, x: (
        rl.zero_policy_targets(normal(), jax.random.key(3), 4).weights
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_calls_give_what_they_give_in_rlax(name):
    equal = []
    for seed in range(5):
        ours = CALLS[name](rlprims, Inputs(seed))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            theirs = CALLS[name](rlax, Inputs(seed))
        leaves = map(jax.tree.leaves, (ours, theirs))
        equal += [
            np.allclose(x, y, rtol=1e-4, atol=2e-5)
            for x, y in zip(*leaves, strict=True)
        ]
    assert all(equal) != (name in DIFFERENT)


def test_every_public_name_is_compared():
    callables = {name for name in dir(rlax) if inspect.isfunction(getattr(rlax, name))}
    compared = {name.partition(".")[0] for name in CASES if in_both(name)}
    assert callables - compared - CALLS.keys() == set()

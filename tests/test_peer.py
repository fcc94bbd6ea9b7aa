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
    "transform_to_2hot": "has a bias against division by zero in RLax",
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

"""What every public function promises, in one table read off the package itself.

A new function joins by existing. Its arguments are made from its contracts, in sizes
that all differ, so that taking one axis for another shows.
"""

import functools
import importlib
import inspect
import itertools
import pkgutil
import re
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims
from rlprims._contracts import Contract

pytestmark = pytest.mark.usefixtures("quick_to_compile")

MODULES = [
    importlib.import_module(f"rlprims.{module.name}")
    for module in pkgutil.iter_modules(rlprims.__path__)
    if not module.name.startswith("_")
]
EXPORTS = [(name, getattr(m, name)) for m in MODULES for name in m.__all__]
PUBLIC = dict(EXPORTS)
# The methods of a distribution, such as `softmax.probs`, have contracts too.
CHECKED = {
    fn.__name__: fn
    for module in MODULES
    for fn in vars(module).values()
    if hasattr(fn, "__contracts__") and fn.__module__ == module.__name__
    if PUBLIC.get(fn.__name__) is fn or "." in fn.__name__
}

# Public callables without contracts, and why.
UNCHECKED = {
    "ContinuousDistribution": "a type",
    "BoundedSample": "a type",
    "AllSum": "takes any shape and dtype, and has checks of its own",
    "DiscreteDistribution": "a type",
    "Distribution": "a type",
    "PolicyTarget": "a type",
    "EmaMoments": "a type",
    "EmaState": "a type",
    "HeldAction": "a type",
    "IntrinsicRewardState": "a type",
    "KNNQueryResult": "a type",
    "QuantileLevels": "a type",
    "MinMaxStatistics": "a type",
    "NStepTransitions": "a type",
    "PopArtOutput": "a type",
    "PopArtState": "a type",
    "RecentPulls": "a type",
    "ReturnRange": "a type",
    "RewardScale": "a type",
    "RunningStatistics": "a type",
    "SumTree": "a type",
    "SumTreeSample": "a type",
    "LagrangePenalty": "a type",
    "ModelTargets": "a type",
    "MpoOutputs": "a type",
    "TanhGaussianSample": "a type",
    "TxPair": "a type",
    "VTraceOutput": "a type",
    "batched_index": "takes values of any dtype, and has checks of its own",
    "clip_gradient": "takes any tree, and has checks of its own",
    "clipped_entropy_softmax": "makes a distribution",
    "compose_tx": "makes a pair of transforms",
    "constant_policy_targets": "takes a distribution, and has checks of its own",
    "compute_parametric_kl_penalty_and_dual_loss": "takes a list of any length",
    "contain_nonfinite": "a building block, for arrays that were checked",
    "create_ema": "makes functions",
    "epsilon_greedy": "makes a distribution",
    "gaussian_diagonal": "makes a distribution",
    "conditional_update": "takes any tree, and has checks of its own",
    "extract_subsequences": "takes data of any dtype, and has checks of its own",
    "greedy": "makes a distribution",
    "joint_log_prob": "takes any tree, and has checks of its own",
    "kl_alpha_loss": "takes a list of any length",
    "kl_constraint_loss": "takes divergences of a batch, or of each dimension",
    "lhs_broadcast": "takes any dtype, and shapes that differ",
    "mpo_compute_weights_and_temperature_loss": "takes samples along any axis",
    "mpo_loss": "takes a list of any length, and samples along any axis",
    "muzero_pair": "makes a pair of transforms",
    "periodic_update": "takes any tree, and has checks of its own",
    "pop": "takes a mapping, of which `pop.layer` checks the entries",
    "popart": "makes functions",
    "replace_masked": "takes data of any dtype, and broadcasts",
    "sampled_policy_distillation_loss": "takes a distribution",
    "scale_gradient": "takes any tree, and has checks of its own",
    "softmax": "makes a distribution",
    "split_burn_in": "takes any tree, and has checks of its own",
    "squashed_gaussian": "makes a distribution",
    "stop_gradient_if": "takes any tree",
    "transform_values": "makes an estimator",
    "td_error": "a building block, for arrays that were checked",
    "transpose_first_axis_to_last": "takes any tree, and has checks of its own",
    "transpose_last_axis_to_first": "takes any tree, and has checks of its own",
    "tree_fn": "makes a function of trees",
    "tree_map_zipped": "takes any tree, and has checks of its own",
    "tree_replace_masked": "takes any tree, and has checks of its own",
    "tree_select": "takes any tree, and has checks of its own",
    "tree_split_key": "takes any tree, and has checks of its own",
    "tree_split_leaves": "takes any tree, and has checks of its own",
    "twohot_pair": "makes a pair of transforms",
    "unbiased_transform_pair": "makes a pair of transforms",
    "zero_policy_targets": "takes a distribution, and has checks of its own",
    "vmpo_loss": "takes a list of any length",
}
# Functions with nothing to cite, and why.
NO_SOURCE = {
    **dict.fromkeys(("categorical_sample", "one_hot"), "a definition"),
    **dict.fromkeys(("explained_variance", "policy_churn"), "a definition"),
    **dict.fromkeys(("beta_entropy", "beta_kl_divergence"), "mathematics"),
    **dict.fromkeys(("beta_log_prob", "beta_sample_and_log_prob"), "mathematics"),
    "truncated_normal_entropy": "mathematics",
    "truncated_normal_log_prob": "mathematics",
    "truncated_normal_sample_and_log_prob": "mathematics",
    "fix_step_type_on_interruptions": "a definition",
    "sample_start_indices": "a definition",
    **dict.fromkeys(("l2_loss", "likelihood", "log_loss"), "a definition"),
    **dict.fromkeys(("normalize_action", "rescale_action"), "a definition"),
    "unsquash_action": "a definition",
    **dict.fromkeys(("hyperbolic_arcsin", "hyperbolic_sin"), "mathematics"),
    **dict.fromkeys(("identity", "logit", "power", "sigmoid"), "mathematics"),
}
# Parameters that are another name of one beside them, and refused together with it.
ALIASES = {"sample_mask": "mask_t"}
# Functions with no gradient at all where nothing is stopped, and why.
ZERO_UNLESS_STOPPED = {
    "cql_lagrange_losses": "a loss, and minus that",
    "qpg_loss": "a mean minus itself",
}
# Functions that draw what a derivative holds at its quantile, not at its key, and why.
DERIVED_AT_A_QUANTILE = {
    "add_dirichlet_noise": "a gamma variate in its concentration",
    "beta_sample_and_log_prob": "two gamma variates in their concentrations",
}
# Functions with a slope that is not that of their values, and why.
STRAIGHT_THROUGH = {"straight_through_sample": "a choice, with that of its probability"}
# Functions that a Python number and an array of it serve differently, and why.
PARTICULAR = {"sample_start_indices": "an array may be traced, and draws otherwise"}
# The size that an array of bins has at least, and the images of cells that fill them;
# that of everything else is one.
CELL = 2
# How many quantiles are dropped for each critic.
DROPPED = 2
FEWEST = {"K": 2, "M": 10, "H": CELL, "W": CELL, "Y": 1, "X": 1}
# Functions whose flag has no gradient to stop, and why.
NOTHING_TO_STOP = {
    "balanced_kl_loss": "what one term holds constant, the other does not",
    "get_top_k_weights": "what is chosen has none anyway",
}
# Functions of which not every result depends on every argument, and why.
SEPARATE_RESULTS = {
    "episodic_memory_intrinsic_rewards": "rewards, and a state",
    "scale_rewards": "rewards, and a state",
    "temporally_extended_epsilon_greedy": "an action, and for how long it is held",
    "update_return_range": "a range, and how much it is an average of",
    "leaky_vtrace_td_error_and_advantage": "a threshold for each result",
    "vtrace_td_error_and_advantage": "a threshold for each result",
    "vmpo_compute_weights_and_temperature_loss": "a loss, weights and their number",
}


def as_many(letter):
    """A Python number that says how long an axis of the result is."""
    return lambda _: SIZES[letter]


def probabilities(x):
    """They sum to one."""
    return x / x.sum(axis=-1, keepdims=True)


def of_both_signs(x):
    """Advantages, on which it depends what is clipped."""
    return np.where(np.arange(x.size).reshape(x.shape) % 2, x, -x)


def pathwise(_):
    """The gradient of the value as it stands."""
    return "pathwise"


def all_groups(_):
    """As many as there are in the examples of integers."""
    return 3


def cell_size(_):
    """As images of `SIZES` have it."""
    return CELL


def dropped(_):
    """As many as the targets that are left tell."""
    return DROPPED


def enough(x):
    """A last time with as many before it as are drawn."""
    return x + SIZES["N"]


def alone(_):
    """A subset of one member, which the smallest of ensembles has."""
    return 1


def flickering(x):
    """Images in which no pixel stays as it is, where its change has no slope."""
    x[::2] *= -1
    return x


def increasing(x):
    """They divide the line, none of them close to the next."""
    return (np.cumsum(x, axis=-1) / np.sum(x, axis=-1)).astype(x.dtype)


def small(x):
    """Returns stay within the atoms."""
    return x / 8


def absolute(_):
    """A projection to where a multiplier may be."""
    return jnp.abs


def as_often(x):
    """Visits of actions that are all considered."""
    return np.zeros_like(x)


def negative(x):
    """The start of a range that ends above zero."""
    return -x


def above_one(x):
    """The end of a range that holds every example, or the middle of their ratios."""
    return x + 1


def far_above(x):
    """The end of a range so wide that no density, near one, has a logarithm near 0."""
    return x + 100


def far_below(x):
    """A probability before anything was learned, less than any afterwards."""
    return -1 - x


def plenty(x):
    """More samples than are correct, and than are drawn."""
    return x + 5


def by_length(_):
    """The aggregation for which every argument matters."""
    return "constant_length"


def alternating(x):
    """Some are true and some are not."""
    return (np.arange(x.size) % 2 == 0).reshape(x.shape)


def a_pair(_):
    """How many samples are drawn."""
    return 2


LIMITS = {"sigma_min": negative}
BOTH_SIGNS = {"adv": of_both_signs}
BOUNDS = {"minimum": negative, "maximum": above_one}


def pair(_):
    """A transform and its inverse, which decodes values that come as codes."""

    def decode(x):
        is_code = x.shape[-1:] == (SIZES["K"],)
        return rlprims.signed_parabolic(x.sum(axis=-1) if is_code else x)

    return rlprims.TxPair(rlprims.signed_hyperbolic, decode)


# Arguments that cannot be just anything: what makes a random example a proper one.
EXAMPLES = {
    "actor_epsilons": {"num_actors": plenty},
    "exponential_advantage_weights": {"adv_t": of_both_signs},
    "binary_advantage_weights": {"adv_t": of_both_signs},
    "adaptive_kl_coefficient": {"tolerance": above_one, "factor": above_one},
    "discovered_policy_optimization_loss": {"adv_t": of_both_signs},
    "ppo_clip_loss": {"adv_t": of_both_signs, "dual_clip": above_one},
    "sample_entropy_loss": {"gradient": pathwise},
    "simple_policy_optimization_loss": {"adv_t": of_both_signs},
    "standardize_advantages_by_group": {"num_groups": all_groups},
    "embed_oar": {"num_actions": as_many("A")},
    "gumbel_action_scores": {"visit_counts": as_often},
    "categorical_double_q_learning": {"q_atoms_tm1": increasing, "r_t": small},
    "categorical_l2_project": {"z_q": increasing},
    "categorical_n_step_targets": {"atoms_tm1": increasing, "r_t": small},
    "categorical_q_learning": {"q_atoms_tm1": increasing, "r_t": small},
    "categorical_td_learning": {"v_atoms_tm1": increasing, "r_t": small},
    "expected_sarsa": {"probs_a_t": probabilities},
    "general_off_policy_returns_from_action_values": {"pi_t": probabilities},
    "masked_importance_weights": {"max_weight": above_one},
    "off_policy_q_lambda": {"pi_t": probabilities},
    "q_sigma": {"pi_t": probabilities},
    "retrace": {"pi_t": probabilities},
    "tree_backup": {"pi_t": probabilities},
    "truncated_importance_weights": {"max_weight": above_one},
    "inverted_gradients": BOUNDS,
    "inverted_gradients_dpg_loss": BOUNDS,
    "normalize_action": BOUNDS,
    "random_subset_minimum": {"subset_size": alone},
    "rescale_action": BOUNDS,
    "smoothed_target_action": BOUNDS,
    "episodic_memory_intrinsic_rewards": {
        "num_neighbors": as_many("K"),
        "max_memory_size": as_many("M"),
    },
    "colored_noise": {"num_steps": as_many("T")},
    "cosine_embedding": {"num_features": as_many("D")},
    "hl_gauss_decode": {"edges": increasing},
    "hl_gauss_encode": {"edges": increasing},
    "hl_gauss_loss": {"edges": increasing},
    "knn_query": {"num_neighbors": as_many("K")},
    "muzero_targets": {"num_unroll_steps": as_many("K")},
    "munchausen_q_learning": {"min_log_policy": negative},
    "one_hot": {"num_classes": as_many("A")},
    "cispo_loss": BOTH_SIGNS,
    "gmpo_loss": BOTH_SIGNS,
    "grpo_loss": BOTH_SIGNS,
    "gspo_loss": BOTH_SIGNS,
    "gspo_token_loss": BOTH_SIGNS,
    "sapo_loss": BOTH_SIGNS,
    "aggregate_tokens": {"aggregation": by_length},
    "kto_loss": {"desirable": alternating},
    "kto_reference_point": {"reference_log_prob": negative},
    "never_give_up_rewards": {"max_modulation": above_one},
    "pseudo_count": {"log_prob": far_below, "recoding_log_prob": negative},
    "pass_at_k": {"num_samples": plenty, "k": a_pair},
    "pass_at_k_rewards": {"k": a_pair},
    "squashed_gaussian.entropy": LIMITS,
    "squashed_gaussian.kl": LIMITS,
    "squashed_gaussian.kl_to_standard_normal": LIMITS,
    "squashed_gaussian.logprob": LIMITS | BOUNDS,
    "squashed_gaussian.prob": LIMITS | BOUNDS,
    "squashed_gaussian.sample": LIMITS | BOUNDS,
    "pixel_control_loss": {"observations": flickering, "cell_size": cell_size},
    "pixel_control_rewards": {"observations": flickering, "cell_size": cell_size},
    "recent_means_and_counts": {"num_arms": as_many("A")},
    "sample_start_indices": {
        "batch_size": as_many("B"),
        "num_start_indices": as_many("N"),
        "max_valid_start_idx": enough,
    },
    "continuous_target_entropy": BOUNDS,
    "tanh_gaussian_log_prob": BOUNDS | {"maximum": far_above},
    "tanh_gaussian_sample_and_log_prob": BOUNDS | {"maximum": far_above},
    "balanced_kl_loss": {"free_nats": small},
    "beta_entropy": BOUNDS | {"maximum": far_above},
    "beta_log_prob": BOUNDS,
    "beta_sample_and_log_prob": BOUNDS,
    "truncated_normal_entropy": BOUNDS,
    "truncated_normal_log_prob": BOUNDS,
    "truncated_normal_sample_and_log_prob": BOUNDS,
    "unsquash_action": BOUNDS,
    "sample_indices": {"num_samples": as_many("B")},
    "sample_points": {"num_samples": as_many("B")},
    "sample_quantile_levels": {"num_levels": as_many("N")},
    "sequential_halving_visits": {"num_simulations": as_many("N")},
    "temporally_extended_epsilon_greedy": {"max_duration": as_many("N")},
    "sample_sum_tree": {"num_samples": as_many("B")},
    "transform_from_2hot": {"min_value": negative, "num_bins": as_many("K")},
    "transform_to_2hot": {"min_value": negative, "num_bins": as_many("K")},
    "transform_to_2hot_nonlinear": {"bins": increasing},
    "transformed_general_off_policy_returns_from_action_values": {
        "pi_t": probabilities,
        "tx_pair": pair,
    },
    "transformed_lambda_returns": {"tx_pair": pair},
    "transformed_n_step_q_learning": {"tx_pair": pair},
    "transformed_n_step_returns": {"tx_pair": pair},
    "transformed_q_lambda": {"tx_pair": pair},
    "transformed_retrace": {"pi_t": probabilities, "tx_pair": pair},
    "truncated_quantile_targets": {"num_dropped": dropped},
    "two_hot_loss": {"bins": increasing},
    "vmpo_compute_weights_and_temperature_loss": {"projection_operator": absolute},
}

DIM = re.compile(r"(\.\.\.|\d+|[A-Z]\w*)([+-]\d+)?")
TEXTS = [c.text for fn in CHECKED.values() for c in fn.__contracts__().values()]
LETTERS = sorted(set(re.findall(r"[A-Z]\w*", " ".join(TEXTS))))
SIZES = {letter: size for size, letter in enumerate(LETTERS, start=4)}
SIZES["E"] = SIZES["D"] + SIZES["A"] + 1  # features, an action and a reward
SIZES["P"] = SIZES["C"] * (SIZES["M"] - DROPPED)  # quantiles of all critics, pooled
SIZES |= {"H": CELL * SIZES["Y"], "W": CELL * SIZES["X"]}
LEADS = [(2, 3), (2,), ()]  # for `...`
STOPS = {"stop_target_gradients", "use_stop_gradient"}


# Calls


def axes_of(spec, sizes=SIZES, lead=LEADS[0]):
    """Reads a contract as (letter, size) pairs, without the code under test."""
    axes = []
    for dim in spec.dims:
        letter, offset = typing.cast(re.Match, DIM.fullmatch(dim)).groups("0")
        if letter == "...":
            axes += [(letter, size) for size in lead]
        else:
            size = int(letter) if letter.isdigit() else sizes[letter]
            axes.append((letter, size + int(offset)))
    return axes


def shape_of(spec, **shaping):
    return tuple(size for _, size in axes_of(spec, **shaping))


def example(kind, shape, rng, dtype=np.float32, below=3):
    """A random array; its integers pick what its booleans leave in."""
    match kind:
        case "f":
            return np.asarray(rng.uniform(0.1, 0.9, shape)).astype(dtype)
        case "i":
            return np.asarray(rng.integers(below, size=shape), np.int32)
        case "b":
            x = np.asarray(rng.uniform(size=shape) < 0.5)
            return x | (np.arange(shape[-1]) < 3) if shape else x
        case _:
            return jax.random.split(jax.random.key(rng.integers(2**16)), shape)


def fields_of(hint):
    """The fields with contracts of what may be a named tuple."""
    if not hasattr(hint, "_fields"):
        return []
    hints = typing.get_type_hints(hint, include_extras=True)
    return [k for k, x in hints.items() if Contract.of(x)]


def records_of(fn):
    """The type of each parameter that is a named tuple with contracts."""
    hints = typing.get_type_hints(fn, include_extras=True)
    kinds = {k: (hint, *typing.get_args(hint)) for k, hint in hints.items()}
    named = {k: [x for x in kinds[k] if fields_of(x)] for k in kinds}
    return {k: x[0] for k, x in named.items() if x and k != "return"}


def parameters_of(fn, records):
    """Parameters by name, with those of a named tuple's fields in its place."""
    parameters = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if name not in records:
            parameters[name] = parameter
            continue
        for field, other in inspect.signature(records[name]).parameters.items():
            default = parameter.default if parameter.default is None else other.default
            parameters[f"{name}.{field}"] = other.replace(default=default)
    return parameters


def put_together(records, arguments):
    together = {k: x for k, x in arguments.items() if "." not in k}
    for name, record in records.items():
        own = [k for k in arguments if k.startswith(f"{name}.")]
        fields = {k.removeprefix(f"{name}."): arguments[k] for k in own}
        if fields:
            together[name] = record(**fields)
    return together


class Case:
    """A way to call a function: with what it requires, or (`full`) with everything.

    Of a union, a call takes the first alternative, or (`full`) the last. Flags keep
    their defaults. The fields of a named tuple, such as `state.mean`, are arguments
    by themselves, which `call` puts together.
    """

    def __init__(self, fn, full):
        self.fn, self.full, self.name = fn, full, fn.__name__
        self.records = records_of(fn)
        parameters = parameters_of(fn, self.records)
        self.contracts = {k: fn.__contracts__().get(k) for k in parameters}
        self.flags = [k for k, c in self.contracts.items() if c and bool in c.fixed]
        self.inputs = {
            k: self.contracts[k]
            for k, p in parameters.items()
            if self.contracts[k] and (full or p.default is p.empty)
            if k not in self.flags and ALIASES.get(k) not in parameters
        }
        self.axes = {k: axes_of(c.specs[-full]) for k, c in self.inputs.items()}
        self.shapes = {k: tuple(n for _, n in axes) for k, axes in self.axes.items()}
        self.floats = [k for k, c in self.inputs.items() if c.kind == "f"]
        self.scalars = [k for k in self.floats if self.shapes[k] == ()]
        self.makers = EXAMPLES.get(self.name, {})
        plain = self.makers.keys() - fn.__contracts__().keys()
        self.static = {k: self.makers[k](None) for k in plain}
        hints = typing.get_type_hints(fn, include_extras=True)
        self.results = list(contracts_in(hints["return"]))

    def __repr__(self):
        return self.name + "-full" * self.full

    def call(self, **arguments):
        return self.fn(**self.static, **put_together(self.records, arguments))

    def arguments(self, rng, dtype=np.float32, choice=None, below=3, **shaping):
        choice = choice or dict.fromkeys(self.inputs, -self.full)
        arguments = {}
        for name, contract in self.inputs.items():
            shape = shape_of(contract.specs[choice[name]], **shaping)
            x = example(contract.kind, shape, rng, dtype, below)
            if contract.interval and contract.kind == "i":
                x += int(contract.interval.low)
            arguments[name] = self.makers.get(name, lambda x: x)(x)
        return arguments


def contracts_in(hint):
    """The contract of each array in a result: one, a tuple of them, or named ones."""
    if hasattr(hint, "__metadata__"):
        yield Contract.of(hint)
    elif hasattr(hint, "_fields"):
        hints = typing.get_type_hints(hint, include_extras=True)
        yield from itertools.chain(*map(contracts_in, hints.values()))
    else:
        yield from itertools.chain(*map(contracts_in, typing.get_args(hint)))


PAIRS = [(Case(fn, False), Case(fn, True)) for fn in CHECKED.values()]
CASES = [
    case
    for some, full in PAIRS
    for case in ([some, full] if some.shapes != full.shapes else [full])
]
FLOORS = {}


def over(floor, *conditions):
    """Runs a test on the cases it applies to: on `floor` functions or more."""
    cases = [case for case in CASES if all(holds(case) for holds in conditions)]

    def mark(test):
        FLOORS[test.__name__] = (len({case.name for case in cases}), floor)
        return pytest.mark.parametrize("case", cases, ids=repr)(test)

    return mark


def is_full(case):
    return case.full


def is_plain(case):
    """The call with nothing that could be left out."""
    return not case.full or case.shapes == Case(case.fn, False).shapes


def is_public(case):
    return case.name in PUBLIC


def has_a_stop(case):
    return bool(STOPS.intersection(case.flags))


def gives_floats(case):
    return bool(case.floats) and {c.kind for c in case.results} == {"f"}


def keeps_no_statistics(case):
    """Statistics that run from call to call stay in single precision at least."""
    return not any(c.running for c in case.inputs.values())


def abstract(case, arguments):
    """The shapes and dtypes of a result, which need no compilation."""
    return jax.tree.leaves(jax.eval_shape(lambda: case.call(**arguments)))


def stack(*xs, axis=0):
    where = jnp if isinstance(xs[0], jax.Array) else np
    return where.stack(xs, axis=min(axis, np.ndim(xs[0])))


def stack_results(*results):
    return jax.tree.map(lambda *xs: np.stack(xs), *results)


def assert_equal(x, y, rtol=1e-6, atol=1e-7):
    chex.assert_trees_all_equal_dtypes(x, y)
    chex.assert_trees_all_close(x, y, rtol=rtol, atol=atol)


# A batch may be summed in another order: an ulp or two of numbers near one.
IN_ANOTHER_ORDER = {"rtol": 1e-5, "atol": 3e-7}


def to_differentiate(case, arguments, **flags):
    """Returns floats, and a function of them that weighs each entry of the result."""

    def total(floats):
        results = jax.tree.leaves(case.call(**(arguments | floats), **flags))
        smooth = [x for x in results if x.dtype != jnp.bool_]
        weights = lambda x: jnp.cos(jnp.arange(1, x.size + 1, dtype=x.dtype))
        return jnp.asarray(sum(jnp.vdot(x, weights(x)) for x in smooth))

    return {k: arguments[k] for k in case.floats}, total


# Shapes and dtypes


@over(200)
def test_result_keeps_its_contract(case, rng):
    """Whichever alternative each argument takes, and whatever `...` is."""
    kinds = {"f": jnp.floating, "i": jnp.integer, "b": jnp.bool_}
    alternatives = [range(len(c.specs)) for c in case.inputs.values()]
    for picks, lead in itertools.product(itertools.product(*alternatives), LEADS):
        choice = dict(zip(case.inputs, picks, strict=True))
        arguments = case.arguments(rng, choice=choice, lead=lead)
        results = abstract(case, arguments)
        for x, contract in zip(results, case.results, strict=True):
            assert x.shape in [shape_of(spec, lead=lead) for spec in contract.specs]
            assert jnp.issubdtype(x.dtype, kinds[contract.kind])


@over(180, gives_floats, keeps_no_statistics)
@pytest.mark.parametrize(
    "x64", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "x64"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_keeps_the_dtype_of_its_inputs(case, rng, dtype, x64):
    """Python numbers adapt to the arrays: they never widen the result."""
    expected = {jnp.dtype("float32" if dtype == "float64" and not x64 else dtype)}
    with jax.enable_x64(x64):
        arguments = case.arguments(rng, jnp.dtype(dtype))
        assert {x.dtype for x in abstract(case, arguments)} == expected
        for name in case.scalars:
            if name != case.floats[0]:
                arguments[name] = float(arguments[name])
        assert {x.dtype for x in abstract(case, arguments)} == expected


@over(170, gives_floats, keeps_no_statistics, lambda case: len(case.floats) > 1)
def test_promotes_mixed_dtypes(case, rng):
    half, single = (case.arguments(rng, dtype) for dtype in ("bfloat16", "float32"))
    for name in case.floats:
        arguments = single | {name: half[name]}
        assert {x.dtype for x in abstract(case, arguments)} == {jnp.dtype("float32")}


@pytest.mark.slow
@over(180, gives_floats, keeps_no_statistics, is_full)
def test_half_precision_rounds_only_the_result(case, rng):
    half = case.arguments(rng, jnp.bfloat16)
    single = half | {k: half[k].astype(np.float32) for k in case.floats}
    expected = jax.tree.map(np.asarray, case.call(**single))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    jax.tree.map(np.testing.assert_array_equal, case.call(**half), rounded)


@pytest.mark.slow
@over(200, is_full, lambda case: case.name not in PARTICULAR)
def test_takes_numpy_and_jax_arrays_and_python_numbers_alike(case, rng):
    with jax.enable_x64(False):  # else a result of Python numbers alone is wider
        arguments = case.arguments(rng)
        expected = case.call(**arguments)
        assert_equal(case.call(**jax.tree.map(jnp.asarray, arguments)), expected)
        for name, contract in case.inputs.items():
            if contract.kind in "fi" and case.shapes[name] == ():
                arguments[name] = arguments[name].item()
        assert_equal(case.call(**arguments), expected)


# Transformations


@pytest.mark.slow
@over(200, is_full)
def test_jit_changes_nothing(case, rng):
    """Every argument is traced here, so every hyper-parameter may be."""
    arguments = case.arguments(rng)
    with jax.debug_nans(True):
        assert_equal(jax.jit(case.call)(**arguments), case.call(**arguments))


def keys_of(case):
    return [k for k, c in case.inputs.items() if c.kind == "k"]


@pytest.mark.slow
@over(12, keys_of, is_full)
def test_keys_of_the_old_style_draw_the_same(case, rng):
    arguments = case.arguments(rng)
    old = {k: jax.random.key_data(arguments[k]) for k in keys_of(case)}
    assert_equal(case.call(**arguments | old), case.call(**arguments))


@over(200)
def test_no_float_is_fixed_while_tracing(case):
    hints = typing.get_type_hints(case.fn)
    plain = [hints[k] for k, contract in case.contracts.items() if not contract]
    assert float not in itertools.chain(plain, *map(typing.get_args, plain))


@pytest.mark.slow
@over(200, is_full)
def test_vmap_is_a_loop(case, rng):
    """Over the leading axis, and over the next where there is one."""
    batch = [case.arguments(rng) for _ in range(3)]
    expected = stack_results(*[case.call(**arguments) for arguments in batch])

    def vmapped(axis, stacked):
        axes = {k: min(axis, len(shape)) for k, shape in case.shapes.items()}
        return jax.vmap(lambda xs: case.call(**xs), in_axes=(axes,))(stacked)

    stacked = [
        jax.tree.map(functools.partial(stack, axis=axis), *batch) for axis in (0, 1)
    ]
    for result in jax.jit(lambda xs: [*map(vmapped, (0, 1), xs)])(stacked):
        assert_equal(result, expected, **IN_ANOTHER_ORDER)


def scan_on_each_device(fn):
    """Which refuses a carry that varies less over the devices than what it becomes."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    step = lambda _, xs: (None, fn(xs))
    loop = lambda stacked: jax.lax.scan(step, None, stacked)[1]
    spec = jax.P("d")
    return jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec))


@pytest.mark.slow
@over(200, is_full)
@pytest.mark.parametrize("mapped", [scan_on_each_device, jax.pmap])
def test_devices_and_scans_are_loops(case, rng, mapped):
    batch = [case.arguments(rng) for _ in range(4)]
    expected = stack_results(*[case.call(**arguments) for arguments in batch])
    result = mapped(lambda xs: case.call(**xs))(jax.tree.map(stack, *batch))
    assert_equal(result, expected, **IN_ANOTHER_ORDER)


def has_the_slope_of_its_values(case):
    return case.name not in DERIVED_AT_A_QUANTILE | STRAIGHT_THROUGH


@pytest.mark.slow
@over(180, gives_floats, is_plain, has_the_slope_of_its_values)
def test_gradients_are_those_of_finite_differences(case, rng):
    """Along a random direction, backwards and forwards, where nothing is stopped."""
    with jax.enable_x64(True):
        arguments = case.arguments(rng, np.float64)
        flags = dict.fromkeys(STOPS.intersection(case.flags), False)
        floats, total = to_differentiate(case, arguments, **flags)
        along = {k: rng.normal(size=x.shape) for k, x in floats.items()}

        def moved(step, floats):
            return total({k: x + step * along[k] for k, x in floats.items()})

        @jax.jit
        def slopes(floats):
            gradient = jax.grad(jax.checkpoint(total))(floats)
            backward = sum(jnp.vdot(gradient[k], along[k]) for k in floats)
            forward = jax.jvp(lambda h: moved(h, floats), (0.0,), (1.0,))[1]
            after, before = jax.vmap(moved, (0, None))(jnp.array([1e-6, -1e-6]), floats)
            return backward, forward, (after - before) / 2e-6

        with jax.debug_nans(True):
            backward, forward, around = map(np.asarray, slopes(floats))
    np.testing.assert_allclose(forward, backward, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(around, backward, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@over(95, has_a_stop, is_full)
def test_the_flag_stops_gradients_and_nothing_else(case, rng):
    [flag] = STOPS.intersection(case.flags)
    arguments = case.arguments(rng)

    def run(stop):
        floats, total = to_differentiate(case, arguments, **{flag: stop})
        return jax.value_and_grad(total)(floats)

    run_both = jax.jit(lambda traced: (run(True), run(traced)))
    (on, traced_on), (_, off) = run_both(True), run_both(False)
    assert_equal(traced_on, on)
    assert_equal(off[0], on[0])
    reached_on, reached_off = (
        {name for name, gradient in gradients.items() if abs(gradient).max() > 1e-3}
        for _, gradients in (on, off)
    )
    if case.name in NOTHING_TO_STOP:
        assert reached_on == reached_off
        return
    assert reached_on != reached_off
    assert reached_off - reached_on or case.name in ZERO_UNLESS_STOPPED


def small_sizes(case):
    """Yields the letters to set to one: each by itself, then all."""
    letters = {letter for axes in case.axes.values() for letter, _ in axes}
    letters = sorted(letters & SIZES.keys() - FEWEST.keys())
    yield from [[letter] for letter in letters] + [letters] * (len(letters) > 1)


@pytest.mark.slow
@over(130, lambda case: any(small_sizes(case)), is_full)
def test_sizes_of_one_are_fine(case, rng):
    sizes = [SIZES | dict.fromkeys(letters, 1) for letters in small_sizes(case)]
    tries = [case.arguments(rng, sizes=small, below=1) for small in sizes]
    results = jax.jit(lambda tries: [case.call(**t) for t in tries])(tries)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


def may_have_no_steps(case):
    sizes = [pair for axes in case.axes.values() for pair in axes]
    return ("T", SIZES["T"]) in sizes and ("T", SIZES["T"] - 1) not in sizes


@over(45, may_have_no_steps, is_full)
def test_no_time_steps_are_fine(case, rng):
    result = case.call(**case.arguments(rng, sizes=SIZES | {"T": 0}))
    for x in jax.tree.leaves(result):
        assert np.isfinite(x).all()


# Refusals

WRONG_DTYPES = {
    "f": ["int32", "bool", "complex64"],
    "i": ["float32", "bool"],
    "b": ["int32", "float32"],
    "k": ["int32", "float32"],
}
REMEDIES = {
    "f": "convert it with jnp.asarray({}, jnp.float32).",
    "i": "convert it with jnp.asarray({}, jnp.int32).",
    "b": "compare it, as in {} != 0.",
    "k": "make one with jax.random.key(seed).",
}


@over(200)
def test_a_wrong_dtype_is_refused_by_name_and_with_a_remedy(case, rng):
    arguments = case.arguments(rng)
    for name in [*case.inputs, *case.flags]:
        kind, shape = case.contracts[name].kind, case.shapes.get(name, ())
        for dtype in WRONG_DTYPES[kind]:
            with pytest.raises(TypeError) as error:
                case.call(**arguments | {name: np.ones(shape, dtype)})
            start = f"{case.name}: {name} must be "
            end = f", got {dtype}; {REMEDIES[kind].format(name)}"
            assert str(error.value).startswith(start)
            assert str(error.value).endswith(end)


def wrong_shapes(case):
    """Yields each argument with the shapes that must not be broadcast."""
    for name, contract in case.inputs.items():
        shape, axes = case.shapes[name], case.axes[name]
        shared = {x for k in case.axes if k != name for x, _ in case.axes[k]}
        free = "..." in contract.text and "..." not in shared
        wrong = [] if free else [(1, *shape), (*shape, 1), shape[1:]]
        for axis, (letter, size) in enumerate(axes):
            if letter in shared or letter.isdigit():
                for other in (1, size - 1, size + 1):
                    wrong.append((*shape[:axis], other, *shape[axis + 1 :]))
        right = [shape_of(spec) for spec in contract.specs]
        letters = [[letter for letter, _ in axes_of(spec)] for spec in contract.specs]
        any_size = [
            len(axes)
            for axes in letters
            if not shared.intersection(axes) and not any(map(str.isdigit, axes))
        ]
        for x in dict.fromkeys(wrong):
            if x not in right and len(x) not in any_size:
                yield name, x


@over(180, lambda case: any(wrong_shapes(case)))
def test_a_wrong_shape_is_refused_by_name_and_never_broadcast(case, rng):
    arguments = case.arguments(rng)
    for name, shape in wrong_shapes(case):
        given = arguments | {name: example(case.inputs[name].kind, shape, rng)}
        with pytest.raises(ValueError, match=" has shape ") as error:
            case.call(**given)
        blamed = str(error.value).removeprefix(f"{case.name}: ").split()[0]
        assert str(error.value).startswith(
            f"{case.name}: {blamed} has shape {given[blamed].shape}, expected "
            f"{case.contracts[blamed].text}"
        )


def outside(interval):
    """Yields the numbers next to an interval that it leaves out."""
    if np.isfinite(interval.low):
        yield interval.low - (interval.text[0] == "[")
    if np.isfinite(interval.high):
        yield interval.high + (interval.text[-1] == "]")


def bounds(case):
    return {k: c.interval for k, c in case.inputs.items() if c.interval}


@pytest.mark.slow
@over(85, bounds, is_full)
def test_a_number_out_of_bounds_is_refused_and_an_array_of_it_becomes_nan(case, rng):
    arguments = case.arguments(rng)
    for name, interval in bounds(case).items():
        kind = case.inputs[name].kind
        for number in map({"f": float, "i": int}[kind], outside(interval)):
            text = f"{case.name}: {name} must be in {interval.text}, got {number}."
            with pytest.raises(ValueError, match=re.escape(text)):
                case.call(**arguments | {name: number})
            if kind == "f":
                array = np.full(case.shapes[name], number, np.float32)
                result = case.call(**arguments | {name: array})
                nothing = {"f": np.isnan, "i": lambda x: x == -1}  # no such action
                told = [
                    nothing[contract.kind](x).any()
                    for x, contract in zip(
                        jax.tree.leaves(result), case.results, strict=True
                    )
                ]
                assert any(told) if case.name in SEPARATE_RESULTS else all(told)


def takes_a_limited_rank(case):
    return any(c.rank == len(case.shapes[k]) for k, c in case.inputs.items())


def can_be_mapped(case):
    """Of a named tuple that holds a flag, not every field has an axis to map."""
    return not any("." in flag for flag in case.flags)


@over(120, takes_a_limited_rank, can_be_mapped, is_public)
def test_a_batch_is_refused_with_the_call_to_make(case, rng):
    """Whether numbers are batched too, or shared."""
    ranks = {k: c.rank for k, c in case.inputs.items()}
    short = {k for k in ranks if ranks[k] not in (None, len(case.shapes[k]))}
    # A state is batched as a whole, and its numbers with it.
    numbers = {k for k in case.scalars if "." not in k} - {next(iter(ranks))}
    for same in [short] if None in ranks.values() else [short, short | numbers]:
        one, two = case.arguments(rng), case.arguments(rng)
        two |= {k: one[k] for k in same}
        batch = one | {k: stack(one[k], two[k]) for k in one if k not in same}
        with pytest.raises(ValueError, match="For a batch of 2, use ") as error:
            case.call(**batch)
        call = re.findall(r"use (jax\.vmap\(.*\))\.(?:$| If)", str(error.value))[0]
        scope = {"jax": jax, "functools": functools, case.name: case.fn}
        scope |= case.static | put_together(case.records, batch)
        passed = re.findall(r"(\w+)[,)]", call.partition(")(")[2])
        assert passed == [
            k for k in inspect.signature(case.fn).parameters if k in passed
        ]
        result = jax.eval_shape(lambda scope=scope, call=call: eval(call, scope))
        expected = abstract(case, one)
        for x, each in zip(jax.tree.leaves(result), expected, strict=True):
            assert (x.shape, x.dtype) == ((2, *each.shape), each.dtype)


# Documentation

FUNCTIONS = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x)}
SECTIONS = ["Args", "Returns", "Raises", "Example", "References"]
SOURCE = re.compile(r"<https?://\S+>`_")

of_each = functools.partial(pytest.mark.parametrize, "name")


def split_at(pattern, text):
    """Splits text at the lines that start a part, into a dict by name."""
    parts = re.split(pattern, text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def sections(name):
    return split_at(r"^(\w+):$", inspect.getdoc(FUNCTIONS[name]) or "")


def entries(name):
    return split_at(r"^    \*{0,2}(\w+): ", sections(name).get("Args", ""))


@of_each(FUNCTIONS)
def test_docstring_starts_with_one_sentence_in_the_third_person(name):
    first, *others = (inspect.getdoc(FUNCTIONS[name]) or "").split("\n")
    assert re.fullmatch(r"[A-Z][a-z]*s .*\.", first)
    assert others[0] == ""


@of_each(FUNCTIONS)
def test_docstring_has_its_sections_in_order(name):
    found = list(sections(name))
    assert found == [section for section in SECTIONS if section in found]
    optional = {"References"} if name in CHECKED else {"Args", "Raises", "References"}
    assert optional | {*found} == {*SECTIONS}


@of_each(FUNCTIONS)
def test_docstring_has_an_entry_for_each_parameter(name):
    assert list(entries(name)) == list(inspect.signature(FUNCTIONS[name]).parameters)


@over(180, is_public)
def test_docstring_repeats_each_contract(case):
    for name, contract in case.contracts.items():
        parameter, _, field = name.partition(".")
        if field:
            text = inspect.getdoc(case.records[parameter])
        else:
            text = entries(case.name)[parameter]
        assert not contract or f"`{contract.text}`" in text
    for contract in case.results:
        assert f"`{contract.text}`" in sections(case.name)["Returns"]


@of_each(FUNCTIONS)
def test_docstring_has_an_example_that_runs(name):
    assert ">>> " in sections(name)["Example"]


@of_each(sorted(FUNCTIONS.keys() & CHECKED.keys()))
def test_docstring_cites_a_source(name):
    """Or else has no such section and a reason above: never both."""
    cited = SOURCE.search(sections(name).get("References", ""))
    assert bool(cited) != (name in NO_SOURCE)


# The table


def test_no_two_modules_export_one_name():
    assert len(EXPORTS) == len(PUBLIC)


def test_no_module_has_the_name_of_a_function():
    """Else `rlprims.name` would be one or the other."""
    assert not {m.__name__.removeprefix("rlprims.") for m in MODULES} & PUBLIC.keys()


@of_each(PUBLIC)
def test_the_package_exports_what_its_modules_do(name):
    assert getattr(rlprims, name) is PUBLIC[name]


def test_every_public_callable_has_contracts_or_a_reason():
    callables = {name for name, x in PUBLIC.items() if callable(x)}
    assert callables - CHECKED.keys() == UNCHECKED.keys()


def test_no_exception_has_outlived_its_reason():
    tables = (
        NO_SOURCE,
        ZERO_UNLESS_STOPPED,
        NOTHING_TO_STOP,
        SEPARATE_RESULTS,
        PARTICULAR,
    )
    names = set().union(*tables)
    assert names <= PUBLIC.keys() & CHECKED.keys()
    assert DERIVED_AT_A_QUANTILE.keys() | STRAIGHT_THROUGH.keys() <= CHECKED.keys()
    for name, makers in EXAMPLES.items():
        assert makers.keys() <= inspect.signature(CHECKED[name]).parameters.keys()


@pytest.mark.parametrize("test", FLOORS)
def test_each_check_covers_many_functions(test):
    functions, floor = FLOORS[test]
    assert functions >= floor > 0

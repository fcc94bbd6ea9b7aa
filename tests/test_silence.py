"""Wrong shapes and indices that RLax accepts in silence are told here.

Each entry of the table is a function of RLax 0.1.9, arguments that are right, and the
changes of one of them to which RLax gives a finite answer all the same: that is tested
where it is installed, by `pip install -e ".[peer]"`. Here, a wrong shape is an error
that names the function and an argument, and a wrong index gives NaN.

`test_contracts.py` makes changes of shape too, to each argument that has a contract.
Some functions of the table have none, and no index has one.

Of all functions that bootstrap, NaN after a discount of 0 shows in the result of RLax.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# A function, its arguments with their axes, and what is accepted of which argument.
TABLE = """
batched_index: values TA, indices Ti
    | values len1; indices len1, below
replace_masked: data TA, replacement TA, mask Tb
    | data last1; replacement rank+1, rank-1, len1, last1
categorical_importance_sampling_ratios: pi_logits_t A, mu_logits_t A, a_t i
    | pi_logits_t trailing1, len-1, len1
gaussian_diagonal.prob: sample A, mu A, sigma A
    | sample len1
gaussian_diagonal.logprob: sample A, mu A, sigma A
    | sample len1
gaussian_diagonal.kl: mu_0 A, sigma_0 A, mu_1 A, sigma_1 A
    | sigma_0 trailing1; sigma_1 trailing1
embed_oar: features TA, action Ti, reward T, num_actions #4
    | action above, below
add_ornstein_uhlenbeck_noise: key k, action A, noise_tm1 A, damping ., stddev .
    | action len1; noise_tm1 len1
l2_loss: predictions N, targets N
    | predictions rank+1; targets rank+1
likelihood: predictions N, targets N
    | predictions rank+1, trailing1; targets rank+1, trailing1
log_loss: predictions N, targets N
    | predictions rank+1, trailing1; targets rank+1, trailing1
pixel_control_loss: observations UAAC, actions Ti, action_values UEEA, discount_factor
    ., cell_size #2
    | actions below
extract_subsequences: trajectories TBC, start_indices BBi, subsequence_len #2
    | start_indices rank+1, trailing1, len-1, len1, above, below
compute_parametric_kl_penalty_and_dual_loss: kl N, kl2 NA
    | kl rank+1, trailing1, rank-1, len1; kl2 rank+1, rank-1, len1, last1
discounted_returns: r_t T, discount_t T, v_t T
    | v_t len1
truncated_generalized_advantage_estimation: r_t T, discount_t T, lambda_ ., values U
    | r_t len1
general_off_policy_returns_from_action_values: q_t TA, a_t Ti, r_t T, discount_t T, c_t
    T, pi_t TA
    | a_t below; pi_t last1
sarsa: q_tm1 A, a_tm1 i, r_t ., discount_t ., q_t A, a_t i
    | q_tm1 len-1, len1; a_tm1 above, below; q_t len-1, len1; a_t above, below
expected_sarsa: q_tm1 A, a_tm1 i, r_t ., discount_t ., q_t A, probs_a_t A
    | q_tm1 len-1, len1; a_tm1 above, below
q_learning: q_tm1 A, a_tm1 i, r_t ., discount_t ., q_t A
    | q_tm1 len-1, len1; a_tm1 above, below; q_t len-1, len1
double_q_learning: q_tm1 A, a_tm1 i, r_t ., discount_t ., q_t_value A, q_t_selector A
    | q_tm1 len-1, len1; a_tm1 above, below; q_t_value len-1, len1; q_t_selector
    len-1, len1
persistent_q_learning: q_tm1 A, a_tm1 i, r_t ., discount_t ., q_t A, action_gap_scale .
    | q_tm1 len-1, len1; a_tm1 above, below; q_t len-1, len1
qv_learning: q_tm1 A, a_tm1 i, r_t ., discount_t ., v_t .
    | a_tm1 above, below
td_lambda: v_tm1 T, r_t T, discount_t T, v_t T, lambda_ .
    | v_tm1 len1
sarsa_lambda: q_tm1 TA, a_tm1 Ti, r_t T, discount_t T, q_t TA, a_t Ti, lambda_ .
    | q_tm1 len1; a_tm1 len1, below; q_t len1; a_t len1, below
q_lambda: q_tm1 TA, a_tm1 Ti, r_t T, discount_t T, q_t TA, lambda_ .
    | q_tm1 len1; a_tm1 len1, below; q_t last-1, last1
retrace: q_tm1 TA, q_t TA, a_tm1 Ti, a_t Ti, r_t T, discount_t T, pi_t TA, mu_t T,
    lambda_ .
    | q_tm1 len1; a_tm1 len1, below; a_t below; mu_t len1
retrace_continuous: q_tm1 T, q_t S, v_t T, r_t T, discount_t T, log_rhos S, lambda_ .
    | q_tm1 len1
categorical_q_learning: q_atoms_tm1 M, q_logits_tm1 AM, a_tm1 i, r_t ., discount_t .,
    q_atoms_t M, q_logits_t AM
    | q_logits_tm1 len-1, len1; a_tm1 above, below; q_logits_t len-1, len1
categorical_double_q_learning: q_atoms_tm1 M, q_logits_tm1 AM, a_tm1 i, r_t .,
    discount_t ., q_atoms_t M, q_logits_t AM, q_t_selector A
    | q_logits_tm1 len-1, len1; a_tm1 above, below; q_logits_t len-1, len1;
    q_t_selector len-1, len1
quantile_regression_loss: dist_src N, tau_src N, dist_target N
    | dist_src len1; tau_src len1
quantile_q_learning: dist_q_tm1 NA, tau_q_tm1 N, a_tm1 i, r_t ., discount_t .,
    dist_q_t_selector NA, dist_q_t NA
    | dist_q_tm1 len1, last-1, last1; tau_q_tm1 len1; a_tm1 above, below;
    dist_q_t_selector last-1, last1; dist_q_t last-1, last1
quantile_expected_sarsa: dist_q_tm1 NA, tau_q_tm1 N, a_tm1 i, r_t ., discount_t .,
    dist_q_t NA, probs_a_t A
    | dist_q_tm1 len1, last-1, last1; tau_q_tm1 len1; a_tm1 above, below
transformed_general_off_policy_returns_from_action_values: q_t TA, a_t Ti, r_t T,
    discount_t T, c_t T, pi_t TA
    | a_t below; pi_t last1
transformed_q_lambda: q_tm1 TA, a_tm1 Ti, r_t T, discount_t T, q_t TA, lambda_ .
    | q_tm1 len1; a_tm1 len1, below; q_t last-1, last1
transformed_retrace: q_tm1 TA, q_t TA, a_tm1 Ti, a_t Ti, r_t T, discount_t T, pi_t TA,
    mu_t T, lambda_ .
    | q_tm1 len1, last-1; a_tm1 len1, below; a_t below; mu_t len1
transformed_n_step_q_learning: q_tm1 TA, a_tm1 Ti, target_q_t TA, a_t Ti, r_t T,
    discount_t T, n #2
    | q_tm1 len1; a_tm1 len1, below; target_q_t len1, last-1; a_t len1, below
dpg_loss: a_t A, dqda_t A
    | a_t len1; dqda_t len1
policy_gradient_loss: logits_t TA, a_t Ti, adv_t T, w_t T
    | logits_t len1; a_t len1; adv_t len1; w_t len1
entropy_loss: logits_t TA, w_t T
    | logits_t len1; w_t len1
qpg_loss: logits_t TA, q_t TA
    | logits_t len1, last1; q_t len1, last1
rm_loss: logits_t TA, q_t TA
    | logits_t len1, last1; q_t len1, last1
rpg_loss: logits_t TA, q_t TA
    | logits_t len1, last1; q_t len1, last1
clipped_surrogate_pg_loss: prob_ratios_t T, adv_t T, epsilon .
    | prob_ratios_t len1; adv_t len1
normalize: unnormalized N, indices Ni
    | unnormalized rank+1, trailing1, rank-1, len1; indices rank+1, trailing1,
    rank-1, len1, above, below
unnormalize: normalized N, indices Ni
    | normalized rank+1, trailing1, rank-1, len1; indices rank+1, trailing1, rank-1,
    len1, above, below
unnormalize_linear: inputs NC, indices Ni
    | indices below
art: targets N, indices Ni
    | indices above, below
pop: w CC, b C, o_shift C, o_scale C, n_shift C, n_scale C
    | w rank-1; b rank+1, trailing1, rank-1, len1; o_shift rank+1, trailing1,
    rank-1, len1; o_scale rank+1, trailing1, rank-1, len1; n_shift rank+1,
    trailing1, rank-1, len1; n_scale rank+1, trailing1, rank-1, len1
popart: targets N, indices Ni
    | indices above, below
tree_replace_masked: data TA, replacement TA, mask Tb
    | data last1; replacement rank+1, rank-1, len1, last1
"""
# Functions that bootstrap and accept nothing else.
MORE = """
td_learning: v_tm1 ., r_t ., discount_t ., v_t .
qv_max: v_tm1 ., r_t ., discount_t ., q_t A
categorical_td_learning: v_atoms_tm1 M, v_logits_tm1 M, r_t ., discount_t .,
    v_atoms_t M, v_logits_t M
lambda_returns: r_t T, discount_t T, v_t T
n_step_bootstrapped_returns: r_t T, discount_t T, v_t T, n #2
general_off_policy_returns_from_q_and_v: q_t S, v_t T, r_t T, discount_t T, c_t S
transformed_lambda_returns: r_t T, discount_t T, v_t T
transformed_n_step_returns: r_t T, discount_t T, v_t T, n #2
vtrace: v_tm1 T, v_t T, r_t T, discount_t T, rho_tm1 T
leaky_vtrace: v_tm1 T, v_t T, r_t T, discount_t T, rho_tm1 T
vtrace_td_error_and_advantage: v_tm1 T, v_t T, r_t T, discount_t T, rho_tm1 T
leaky_vtrace_td_error_and_advantage: v_tm1 T, v_t T, r_t T, discount_t T, rho_tm1 T
"""
LINES = re.sub(r"\n {4}", " ", TABLE + MORE).split("\n")
SIZES = {"T": 5, "S": 4, "U": 6, "A": 4, "E": 2, "B": 2, "C": 3, "M": 7, "N": 6}
CHANGES = {
    "len1": lambda x: x[:1],
    "len-1": lambda x: x[:-1],
    "last1": lambda x: x[..., :1],
    "last-1": lambda x: x[..., :-1],
    "trailing1": lambda x: x[..., None],
    "rank+1": lambda x: x[None],
    "rank-1": lambda x: x[0],
    "below": lambda x: np.full_like(x, -1),
    "above": lambda x: np.full_like(x, 99),
}
# What is right here on purpose, and why.
LEGAL = {
    ("pop", "w", "rank-1"): "a layer may have no axis of inputs",
}
# Functions that another one speaks for.
RENAMED = {"gaussian_diagonal.kl": "multivariate_normal_kl_divergence"}


def entry(line):
    """The function, its arguments by name, and the cases to try."""
    name, arguments, *accepted = re.split(": | \\| ", line)
    arguments = dict(x.split() for x in arguments.split(", "))
    cases = []
    for changes in "".join(accepted).split("; ") * bool(accepted):
        argument, *kinds = changes.replace(",", "").split()
        cases += [(argument, kind) for kind in kinds]
    return name, arguments, cases


ENTRIES = {name: (axes, cases) for name, axes, cases in map(entry, filter(None, LINES))}
SILENT = [name for name, (_, cases) in ENTRIES.items() if cases]
BOOTSTRAP = [name for name, (axes, _) in ENTRIES.items() if "discount_t" in axes]
# What they bootstrap from, which does not count after a discount of 0.
REACHED = {"v_t", "q_t", "q_t_value", "target_q_t", "values", "dist_q_t"}
REACHED |= {"q_logits_t", "v_logits_t"}


def example(name, axes, rng):
    if axes == "k":
        return jax.random.key(0)
    if axes[0] == "#":
        return int(axes[1:])
    shape = [SIZES[x] for x in axes if x.isupper()]
    if axes[-1] == "i":
        return np.int32(rng.integers(2, size=shape))
    if axes[-1] == "b":
        return np.arange(shape[0]) < 2
    x = rng.uniform(0.1, 0.9, shape).astype(np.float32)
    return np.sort(x) if "atoms" in name else x


def state(rl, shift=None, scale=None):
    of_three = jnp.array([0.1, 0.2, 0.3], jnp.float32)
    shift = of_three if shift is None else shift
    return rl.PopArtState(shift, of_three if scale is None else scale, of_three)


def divergences(rl, kl, kl2):
    each = rl.LagrangePenalty(jnp.ones(SIZES["A"], jnp.float32), 0.1, True)
    all_ = rl.LagrangePenalty(jnp.float32(1), 0.1)
    kls = [(kl, all_), (kl2, each)]
    return rl.compute_parametric_kl_penalty_and_dual_loss(kls, jnp.abs)


def updated(rl, targets, indices):
    init, update = rl.popart(3, 0.1, 1e-4, 1e4)
    params = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
    return update(params, init(), targets, indices)


def transformed(name):
    return lambda rl, *xs: getattr(rl, name)(rl.SIGNED_LOGP1_PAIR, *xs)


PAIRED = ["general_off_policy_returns_from_action_values", "lambda_returns"]
PAIRED += ["n_step_returns"]
# Calls that are not of the function with the arguments and nothing else.
CALLS = {
    "art": lambda rl, *xs: rl.art(state(rl), *xs, 0.1, 1e-4, 1e4),
    "compute_parametric_kl_penalty_and_dual_loss": divergences,
    "gaussian_diagonal.kl": lambda rl, *xs: rl.gaussian_diagonal().kl(*xs),
    "gaussian_diagonal.logprob": lambda rl, *xs: rl.gaussian_diagonal().logprob(*xs),
    "gaussian_diagonal.prob": lambda rl, *xs: rl.gaussian_diagonal().prob(*xs),
    "normalize": lambda rl, *xs: rl.normalize(state(rl), *xs),
    "pop": lambda rl, w, b, *xs: rl.pop(
        {"w": w, "b": b}, state(rl, *xs[:2]), state(rl, *xs[2:])
    ),
    "popart": updated,
    **{f"transformed_{name}": transformed(f"transformed_{name}") for name in PAIRED},
    "tree_replace_masked": lambda rl, data, new, mask: rl.tree_replace_masked(
        {"a": data}, {"a": new}, mask
    ),
    "unnormalize": lambda rl, *xs: rl.unnormalize(state(rl), *xs),
    "unnormalize_linear": lambda rl, *xs: rl.unnormalize_linear(state(rl), *xs),
}


def call(rl, name, arguments):
    function = CALLS.get(name, lambda rl, *xs: getattr(rl, name)(*xs))
    arrays = [jnp.asarray(x) if np.ndim(x) else x for x in arguments.values()]
    return jax.tree.leaves(function(rl, *arrays))


def examples(name):
    rng, axes = np.random.default_rng(0), ENTRIES[name][0]
    return {k: example(k, x, rng) for k, x in axes.items()}


def calls(name):
    """The right arguments, and then each change of one of them."""
    arguments = examples(name)
    yield "right", arguments
    for argument, kind in ENTRIES[name][1]:
        changed = CHANGES[kind](arguments[argument])
        if (name, argument, kind) not in LEGAL:
            yield kind, arguments | {argument: changed}


@pytest.mark.parametrize("name", SILENT)
def test_it_is_told_here(name):
    for kind, arguments in calls(name):
        if kind == "right":
            assert all(np.isfinite(x).all() for x in call(rlprims, name, arguments))
        elif kind in {"above", "below"}:
            assert any(np.isnan(x).any() for x in call(rlprims, name, arguments))
        else:
            with pytest.raises(ValueError, match=r"^[\w.]+: [\w.\[\]]+ has ") as error:
                call(rlprims, name, arguments)
            function = str(error.value).partition(":")[0]
            assert function in {name, RENAMED.get(name)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SILENT)
def test_it_is_accepted_by_rlax(name, rlax):
    for _, arguments in calls(name):
        assert all(np.isfinite(x).all() for x in call(rlax, name, arguments))


def after_the_end(name):
    """Arguments of which the last step is the end, with NaN after it."""
    arguments, axes = examples(name), ENTRIES[name][0]
    for argument in axes.keys() & (REACHED | {"discount_t"}):
        if axes[argument] != "S":  # which ends before
            x = np.array(arguments[argument])
            last = -1 if axes[argument][0] in "TU" else ...
            x[last] = 0 if argument == "discount_t" else np.nan
            arguments[argument] = x
    return arguments


def spoilt(rl, name):
    return any(np.isnan(x).any() for x in call(rl, name, after_the_end(name)))


@pytest.mark.parametrize("name", BOOTSTRAP)
def test_nothing_gets_past_the_end_here(name):
    assert not spoilt(rlprims, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BOOTSTRAP)
def test_nan_gets_past_the_end_in_rlax(name, rlax):
    assert spoilt(rlax, name)


def test_the_table_has_every_case():
    assert len({name.partition(".")[0] for name in SILENT}) == 49
    assert len(BOOTSTRAP) == 34
    assert sum(len(cases) for _, cases in ENTRIES.values()) == 225

"""Code written for RLax calls rlprims as it is: names, positions, keywords, defaults.

The tables hold the public names of RLax 0.1.9, and what other code reaches for in it,
with the signatures that its documentation shows. Here an argument may be added, but
only as a keyword with a default.
"""

import inspect
import re

import pytest

import rlprims

PUBLIC = """
AllSum(axis_name=None)
EmaMoments(mean, variance)
EmaState(mu, nu, decay_product)
LagrangePenalty(alpha, epsilon, per_dimension=False)
PolicyTarget(actions, weights)
PopArtState(shift, scale, second_moment)
TxPair(apply, apply_inv)
add_dirichlet_noise(key, prior, dirichlet_alpha, dirichlet_fraction)
add_gaussian_noise(key, action, stddev)
add_ornstein_uhlenbeck_noise(key, action, noise_tm1, damping, stddev)
art(state, targets, indices, step_size, scale_lb, scale_ub, axis_name=None)
batched_index(values, indices, keepdims=False)
categorical_cross_entropy(labels, logits)
categorical_double_q_learning(q_atoms_tm1, q_logits_tm1, a_tm1, r_t, discount_t,
    q_atoms_t, q_logits_t, q_t_selector, stop_target_gradients=True)
categorical_importance_sampling_ratios(pi_logits_t, mu_logits_t, a_t)
categorical_kl_divergence(p_logits, q_logits, temperature=1.0)
categorical_l2_project(z_p, probs, z_q)
categorical_q_learning(q_atoms_tm1, q_logits_tm1, a_tm1, r_t, discount_t, q_atoms_t,
    q_logits_t, stop_target_gradients=True)
categorical_sample(key, probs)
categorical_td_learning(v_atoms_tm1, v_logits_tm1, r_t, discount_t, v_atoms_t,
    v_logits_t, stop_target_gradients=True)
clip_gradient(x, gradient_min, gradient_max)
clipped_entropy_softmax(temperature=1.0, entropy_clip=1.0)
clipped_surrogate_pg_loss(prob_ratios_t, adv_t, epsilon, use_stop_gradient=True)
compose_tx(*tx_list)
compute_parametric_kl_penalty_and_dual_loss(kl_constraints, projection_operator,
    use_stop_gradient=True)
conditional_update(new_tensors, old_tensors, is_time)
constant_policy_targets(distribution, rng_key, num_samples, weights_scale=1.0)
create_ema(decay=0.999, pmean_axis_name=None)
discounted_returns(r_t, discount_t, v_t, stop_target_gradients=False)
double_q_learning(q_tm1, a_tm1, r_t, discount_t, q_t_value, q_t_selector,
    stop_target_gradients=True)
dpg_loss(a_t, dqda_t, dqda_clipping=None, use_stop_gradient=True)
embed_oar(features, action, reward, num_actions)
entropy_loss(logits_t, w_t)
episodic_memory_intrinsic_rewards(embeddings, num_neighbors, reward_scale,
    intrinsic_reward_state=None, constant=0.001, epsilon=0.0001, cluster_distance=0.008,
    max_similarity=8.0, max_memory_size=30000)
epsilon_greedy(epsilon=None)
expected_sarsa(q_tm1, a_tm1, r_t, discount_t, q_t, probs_a_t,
    stop_target_gradients=True)
expectile_loss(predictions, targets, expectile)
extract_subsequences(trajectories, start_indices, subsequence_len=1,
    max_valid_start_idx=None)
feature_control_rewards(features, cumulant_type='absolute_change', discount=None)
fix_step_type_on_interruptions(step_type)
gaussian_diagonal(sigma=None)
general_off_policy_returns_from_action_values(q_t, a_t, r_t, discount_t, c_t, pi_t,
    stop_target_gradients=False)
general_off_policy_returns_from_q_and_v(q_t, v_t, r_t, discount_t, c_t,
    stop_target_gradients=False)
greedy()
huber_loss(x, delta=1.0)
identity(x)
knn_query(data, query_points, num_neighbors, metric=ANY)
l2_loss(predictions, targets=None)
lambda_returns(r_t, discount_t, v_t, lambda_=1.0, stop_target_gradients=False)
leaky_vtrace(v_tm1, v_t, r_t, discount_t, rho_tm1, alpha_=1.0, lambda_=1.0,
    clip_rho_threshold=1.0, stop_target_gradients=True, sample_mask=None)
leaky_vtrace_td_error_and_advantage(v_tm1, v_t, r_t, discount_t, rho_tm1, alpha=1.0,
    lambda_=1.0, clip_rho_threshold=1.0, clip_pg_rho_threshold=1.0,
    stop_target_gradients=True, sample_mask=None)
lhs_broadcast(source, target)
likelihood(predictions, targets)
log_loss(predictions, targets)
logit(x)
mpo_compute_weights_and_temperature_loss(sample_q_values, temperature_constraint,
    projection_operator, sample_axis=0)
mpo_loss(sample_log_probs, sample_q_values, temperature_constraint, kl_constraints,
    projection_operator=ANY, policy_loss_weight=1.0, temperature_loss_weight=1.0,
    kl_loss_weight=1.0, alpha_loss_weight=1.0, sample_axis=0, use_stop_gradient=True)
multivariate_normal_kl_divergence(mu_0, sigma_0, mu_1, sigma_1)
muzero_pair(min_value, max_value, num_bins, tx)
n_step_bootstrapped_returns(r_t, discount_t, v_t, n, lambda_t=1.0,
    stop_target_gradients=False)
normalize(state, unnormalized, indices)
one_hot(indices, num_classes, dtype=ANY)
periodic_update(new_tensors, old_tensors, steps, update_period)
persistent_q_learning(q_tm1, a_tm1, r_t, discount_t, q_t, action_gap_scale,
    stop_target_gradients=True)
pixel_control_loss(observations, actions, action_values, discount_factor, cell_size)
pixel_control_rewards(observations, cell_size)
policy_gradient_loss(logits_t, a_t, adv_t, w_t, use_stop_gradient=True)
pop(params, old, new)
popart(num_outputs, step_size, scale_lb, scale_ub, axis_name=None)
power(x, p)
q_lambda(q_tm1, a_tm1, r_t, discount_t, q_t, lambda_, stop_target_gradients=True)
q_learning(q_tm1, a_tm1, r_t, discount_t, q_t, stop_target_gradients=True)
qpg_loss(logits_t, q_t, use_stop_gradient=True)
quantile_expected_sarsa(dist_q_tm1, tau_q_tm1, a_tm1, r_t, discount_t, dist_q_t,
    probs_a_t, huber_param=0.0, stop_target_gradients=True)
quantile_q_learning(dist_q_tm1, tau_q_tm1, a_tm1, r_t, discount_t, dist_q_t_selector,
    dist_q_t, huber_param=0.0, stop_target_gradients=True)
quantile_regression_loss(dist_src, tau_src, dist_target, huber_param=0.0,
    stop_target_gradients=True)
qv_learning(q_tm1, a_tm1, r_t, discount_t, v_t, stop_target_gradients=True)
qv_max(v_tm1, r_t, discount_t, q_t, stop_target_gradients=True)
replace_masked(data, replacement, mask)
retrace(q_tm1, q_t, a_tm1, a_t, r_t, discount_t, pi_t, mu_t, lambda_, eps=1e-08,
    stop_target_gradients=True)
retrace_continuous(q_tm1, q_t, v_t, r_t, discount_t, log_rhos, lambda_,
    stop_target_gradients=True)
rm_loss(logits_t, q_t, use_stop_gradient=True)
rpg_loss(logits_t, q_t, use_stop_gradient=True)
sample_start_indices(rng_key, batch_size, num_start_indices, max_valid_start_idx)
sampled_policy_distillation_loss(distribution, policy_targets,
    stop_target_gradients=True)
sarsa(q_tm1, a_tm1, r_t, discount_t, q_t, a_t, stop_target_gradients=True)
sarsa_lambda(q_tm1, a_tm1, r_t, discount_t, q_t, a_t, lambda_,
    stop_target_gradients=True)
sigmoid(x)
signed_expm1(x)
signed_hyperbolic(x, eps=0.001)
signed_logp1(x)
signed_parabolic(x, eps=0.001)
softmax(temperature=1.0)
squashed_gaussian(sigma_min=-4, sigma_max=0.0)
td_lambda(v_tm1, r_t, discount_t, v_t, lambda_, stop_target_gradients=True)
td_learning(v_tm1, r_t, discount_t, v_t, stop_target_gradients=True)
transform_from_2hot(probs, min_value, max_value, num_bins)
transform_to_2hot(scalar, min_value, max_value, num_bins)
transformed_general_off_policy_returns_from_action_values(tx_pair, q_t, a_t, r_t,
    discount_t, c_t, pi_t, stop_target_gradients=False)
transformed_lambda_returns(tx_pair, r_t, discount_t, v_t, lambda_=1.0,
    stop_target_gradients=False)
transformed_n_step_q_learning(q_tm1, a_tm1, target_q_t, a_t, r_t, discount_t, n,
    stop_target_gradients=True, tx_pair=IDENTITY_PAIR)
transformed_n_step_returns(tx_pair, r_t, discount_t, v_t, n, lambda_t=1.0,
    stop_target_gradients=False)
transformed_q_lambda(q_tm1, a_tm1, r_t, discount_t, q_t, lambda_,
    stop_target_gradients=True, tx_pair=IDENTITY_PAIR)
transformed_retrace(q_tm1, q_t, a_tm1, a_t, r_t, discount_t, pi_t, mu_t, lambda_,
    eps=1e-08, stop_target_gradients=True, tx_pair=IDENTITY_PAIR)
transpose_first_axis_to_last(tree)
transpose_last_axis_to_first(tree)
tree_fn(fn, **unmapped_kwargs)
tree_map_zipped(fn, nests)
tree_replace_masked(tree_data, tree_replacement, mask)
tree_select(pred, on_true, on_false)
tree_split_key(rng_key, tree_like)
tree_split_leaves(tree_like, axis=0, keepdim=False)
truncated_generalized_advantage_estimation(r_t, discount_t, lambda_, values,
    stop_target_gradients=False)
twohot_pair(min_value, max_value, num_bins)
unbiased_transform_pair(min_value, max_value, num_bins, tx)
unnormalize(state, normalized, indices)
unnormalize_linear(state, inputs, indices)
vmpo_compute_weights_and_temperature_loss(advantages, restarting_weights,
    importance_weights, temperature_constraint, projection_operator, top_k_fraction,
    axis_name=None, use_stop_gradient=True)
vmpo_loss(sample_log_probs, advantages, temperature_constraint, kl_constraints,
    projection_operator=ANY, restarting_weights=None, importance_weights=None,
    top_k_fraction=0.5, policy_loss_weight=1.0, temperature_loss_weight=1.0,
    kl_loss_weight=1.0, alpha_loss_weight=1.0, axis_name=None, use_stop_gradient=True)
vtrace(v_tm1, v_t, r_t, discount_t, rho_tm1, lambda_=1.0, clip_rho_threshold=1.0,
    stop_target_gradients=True, sample_mask=None)
vtrace_td_error_and_advantage(v_tm1, v_t, r_t, discount_t, rho_tm1, lambda_=1.0,
    clip_rho_threshold=1.0, clip_pg_rho_threshold=1.0, stop_target_gradients=True,
    sample_mask=None)
zero_policy_targets(distribution, rng_key, num_samples, *, weights_scale=0.0)
"""
REACHED_FOR = """
ContinuousDistribution(sample, prob, logprob, entropy, kl_to_standard_normal, kl)
DiscreteDistribution(sample, probs, logprob, entropy, kl)
IntrinsicRewardState(memory, next_memory_index=0, distance_sum=0, distance_count=0)
KNNQueryResult(neighbors, neighbor_indices, neighbor_neg_distances)
MpoOutputs(temperature_loss, policy_loss, kl_loss, alpha_loss, normalized_weights,
    num_samples)
PopArtOutput(normalized, unnormalized)
VTraceOutput(errors, pg_advantage, q_estimate)
get_top_k_weights(top_k_fraction, restarting_weights, scaled_advantages, axis_name=None,
    use_stop_gradient=True)
hyperbolic_arcsin(x)
hyperbolic_sin(x)
importance_corrected_td_errors(r_t, discount_t, rho_tm1, lambda_, values,
    stop_target_gradients=False)
kl_alpha_loss(restarting_weights, kl_constraints=(), axis_name=None)
kl_constraint_loss(kl, penalty, projection_operator, use_stop_gradient=True)
transform_from_2hot_nonlinear(probs, bins)
transform_to_2hot_nonlinear(scalar, bins)
transform_values(build_targets, *value_argnums)
"""
PAIRS = [
    "DISCOUNT_TRANSFORM_PAIR",
    "HYPERBOLIC_SIN_PAIR",
    "IDENTITY_PAIR",
    "SIGNED_HYPERBOLIC_PAIR",
    "SIGNED_LOGP1_PAIR",
]
ANY = object()  # a default that is a function or a type, compared by what it does


def signatures(table):
    """Reads a table as signatures by name."""
    rows = re.findall(r"^(\w+)(\(.*?\))$", table.replace("\n    ", " "), re.MULTILINE)
    names = {"ANY": ANY, "IDENTITY_PAIR": rlprims.IDENTITY_PAIR}
    return {
        name: inspect.signature(eval(f"lambda {parameters[1:-1]}: 0", names))
        for name, parameters in rows
    }


SIGNATURES = signatures(PUBLIC) | signatures(REACHED_FOR)


def test_the_table_has_every_public_name():
    assert len(signatures(PUBLIC)) + len(PAIRS) == 127
    assert len(signatures(REACHED_FOR)) == 16


@pytest.mark.parametrize("name", SIGNATURES)
def test_takes_what_rlax_takes(name):
    theirs = list(SIGNATURES[name].parameters.values())
    ours = list(inspect.signature(getattr(rlprims, name)).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for mine, other in zip(ours, theirs, strict=False):
        assert mine.kind == other.kind
        assert (mine.default is mine.empty) == (other.default is other.empty)
        if other.default is not ANY:
            assert type(mine.default) is type(other.default)
            assert mine.default == other.default
    for added in ours[len(theirs) :]:
        assert added.kind is added.KEYWORD_ONLY
        assert added.default is not added.empty


@pytest.mark.parametrize("name", PAIRS)
def test_has_the_pairs_of_rlax(name):
    assert isinstance(getattr(rlprims, name), rlprims.TxPair)

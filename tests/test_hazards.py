"""What goes wrong in RLax 0.1.9 goes right here: one row for each finding.

The last column says what RLax does: gives a `wrong` value or refuses nothing, gives the
`same`, or raises an error. It is tested where RLax is installed: `pip install -e
".[peer]"`. What is right comes from definitions, or from exact arithmetic.

The letters are those of the entries in the list of findings. The wrong shapes and
indices that RLax accepts in silence, and functions whose discount of 0 does not keep
NaN out, are one by one in `test_silence.py`.
"""

import builtins
import inspect
import re
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import rlprims

# A call, what is right, and what RLax does. An indented line belongs to that above.
TABLE = r"""
# Episodic memory: negative distances. The index of its ring is cosmetic only.
B1 remembered(rl, 0.03)[0] | novelty(0.03) | wrong
B1 remembered(rl, 1.2)[0] | novelty(1.2) | wrong
B1 remembered(rl, 0.03)[1].distance_sum | 4 * 0.03**2 | wrong
B2 [*memories(rl)][-1].memory | [[3], [2], [3], [3]] | same
B2 [state.next_memory_index for state in memories(rl)] | [3, 2, 1] | wrong
# Slopes at zero.
B3 grad(signed_logp1)(0.0) | 1 | wrong
B3 grad(signed_expm1)(0.0) | 1 | wrong
B3 grad(signed_hyperbolic)(0.0) | 0.501 | wrong
B3 grad(signed_parabolic)(0.0) | 1.996 | wrong
B3 grad(power)(0.0, 0.3) | 1 | wrong
# Flags that stop nothing, or everything.
B4 grad(quantile_regression_loss, 2)(f(1, 2), f(0.25, 0.75), f(3, 4), 1.0, True)
    | [0, 0] | wrong
B5 grad(rm_loss, 1)(f([1, 2]), f([3, 4]), False) | [[SLOPE, -SLOPE]] | wrong
B5 (rm_loss(f([1, 2]), f([3.25, 4]), False) - rm_loss(f([1, 2]), f([2.75, 4]), False))
    | SLOPE / 2 | same
B5 grad(rpg_loss, 1)(f([1, 2]), f([3, 4]), False) | [[SIGMOID - 1, 1 - SIGMOID]] | same
B5 grad(qpg_loss, 1)(f([1, 2]), f([3, 4]), False) | [[0, 0]] | same
# Gradients at exact zeros and ones.
B6 grad(categorical_cross_entropy)(f(0.5, 0.5, 0), V) | -np.log(softmax([1, 2, 3]))
    | wrong
B6 c51_slope(rl, 0.5) | c51_slope_by_definition(0.5) | same
B6 c51_slope(rl, 1.5) | c51_slope_by_definition(1.5) | wrong
B7 log_loss(f(0, 1), f(0, 1)) | [0, 0] | same
B7 grad(log_loss)(1.0, 1.0) | -1 | wrong
B7 grad(log_loss)(0.0, 0.0) | 1 | wrong
B7 grad(likelihood)(1.0, 1.0) | 1 | wrong
B7 grad(likelihood)(0.0, 0.0) | -1 | wrong
# Projections. Of repeated atoms, which one gets the mass is open.
B8 categorical_l2_project(f(0, 0.5), f(0.5, 0.5), f(0, 0, 1))[:2].sum() | 0.75 | wrong
B8 categorical_l2_project(f(0, 0.5), f(0.5, 0.5), f(0, 0, 1))[2] | 0.25 | same
B8 categorical_l2_project(h(123), h(1), h(*np.linspace(-500, 500, 1001))).sum()
    | 1 | wrong
B8 categorical_l2_project(f(nan, 0.5), f(0, 1), f(0, 1)) | [0.5, 0.5] | wrong
B8 categorical_l2_project(f(0, 0.5), f(0.5, 0.5), f(1, 0)) | [nan, nan] | wrong
B8 categorical_l2_project(f(0), f(1), f(3)) | [1] | same
B8 grad(lambda z: categorical_l2_project(f(0), f(1), z).sum())(f(3)) | [0] | wrong
B9 decoded(rl, f(2.55e-4), 0, 1e-3, 101) / 2.55e-4 | [1] | wrong
B9 decoded(rl, f(2.5e-6), 0, 1e-5, 11) / 2.5e-6 | [1] | wrong
B9 decoded(rl, f(2.5e-7), 0, 1e-6, 11) / 2.5e-7 | [1] | wrong
B9 transform_to_2hot(h(122.5), -300, 300, 601).sum() | 1 | wrong
B9 transform_to_2hot(h(122.5), -300, 300, 601).max() | 0.5 | wrong
B9 transform_to_2hot(f16(1.5), -3000, 3000, 6001).sum() | 1 | wrong
B9 transform_to_2hot(f16(1.5), -3000, 3000, 6001).max() | 0.5 | wrong
B9 decoded(rl, f(0.5)[0], 0, 1, 11).shape == () | True | wrong
B9 unbiased_transform_pair(-1.0, 1.0, 11, IDENTITY_PAIR).apply(f(0.5)[0]).shape
    | [11] | wrong
# Precision of transforms.
B10 there_and_back(rl, f(*WIDE)) / np.float32(WIDE) | np.ones(9) | wrong
B10 abs(there_and_back(rl, h(*FEW)) / h(*FEW) - 1).max() < 0.02 | True | wrong
B10 abs(there_and_back(rl, f16(*FEW)) / f16(*FEW) - 1).max() < 0.002 | True | wrong
B11 power(power(f(*POWERS), 0.3), 1 / 0.3) / np.float32(POWERS) | np.ones(5) | wrong
B11 logit(f(1 - 2**-24)) | [np.log(2**24 - 1)] | wrong
# Moving statistics.
B12 art(PopArtState(f(1e4), f(1), f(1e8 + 1)), f(10001, 9999), i(0, 0), 0.1, 1e-4,
    1e6).scale | [1] | wrong
B12 step(rl, f(nan, 1), i(0, 1)).shift | [nan, 0.1] | wrong
B12 three_steps(rl).shift | [10 * NEW] | wrong
B12 three_steps(rl).second_moment | [1 + 99 * NEW] | wrong
B12 three_steps(rl).scale | [np.sqrt(1 + 99 * NEW - (10 * NEW) ** 2)] | wrong
B12 np.isnan(step(rl, f(5, 1), i(7, 1)).shift).any() | True | wrong
B12 normalize(PopArtState(f(0, 10), f(1, 2), f(1, 1)), f(5), i(7)) | [nan] | wrong
B12 np.isfinite(step(rl, f(1e20, 1), i(0, 1)).second_moment) | [True, True] | wrong
B13 abs(averaged(rl, 0.9, [*f(*WAVE)]).variance - WAVE_VARIANCE) < 1e-3 | True | wrong
B13 averaged(rl, 0.999, [jnp.bfloat16(1)] * 5000).mean | 1 | wrong
B13 averaged(rl, 0.999, [jnp.bfloat16(1)] * 5000).variance | 0 | wrong
B13 averaged(rl, 0.9, [jnp.uint8([100, 200])]).mean | 150 | same
B13 averaged(rl, 0.9, [jnp.uint8([100, 200])]).variance | 2500 | wrong
B13 averaged(rl, 0.9, [f16(300)]).variance | 0 | wrong
# V-MPO and MPO.
B14 v_mpo(rl, f(-1000, -1001, 5), f(1, 1, 0), 1, 1.0)[1] | [SIGMOID, 1 - SIGMOID, 0]
    | wrong
B14 v_mpo(rl, f(-1000, -1001, 5), f(1, 1, 0), 1, 1.0)[0]
    | 0.1 - 1000 + np.log((1 + np.exp(-1)) / 2) | wrong
B14 v_mpo(rl, f(1e4, 1, 2), 1, f(0, 1, 1), 1.0)[1] | [0, 1 - SIGMOID, SIGMOID] | wrong
B14 v_mpo(rl, f(-1000, -1001, 5, -1002), f(1, 1, 0, 1), 1, 0.5, temperature=1e-4)[1]
    | [1, 0, 0, 0] | wrong
B14 v_mpo(rl, f(1, 2, nan), f(1, 1, 0), 1, 1.0)[1] | [1 - SIGMOID, SIGMOID, 0] | wrong
B14 v_mpo(rl, f(1, 2, nan), f(1, 1, 0), 1, 1.0)[0]
    | 0.1 + np.log((np.exp(1) + np.exp(2)) / 2) | wrong
B14 v_mpo(rl, f16(1, 2, 3, 4), f16(1, 1, 0, 1), 1, 0.5)[1] | [0, 0, 0, 1] | wrong
B14 v_mpo(rl, jnp.linspace(0, 1, 100), 1, 1, 0.29)[2] | 29 | wrong
B15 grad(temperature_into_values, 1)(rl, f([1], [2], [3])) | [[0], [0], [0]] | wrong
B15 grad(temperature_into_advantages, 1)(rl, f(1, 2, 3, 4)) | [0, 0, 0, 0] | wrong
B15 mpo_loss(f([0, 0]), f([0, 0]), penalty(rl), [])[0] | [0.1, 0.1]
    | AttributeError: 'int' object has no attribute 'shape'
# V-trace and generalized advantages. The last row of B16 has no like in RLax.
B16 masked(rl) | [2.8, 0, 2] | wrong
B16 grad(lambda v: (masked(rl, v) ** 2).sum() / 2)(f(0, 0, 0)) | [-2.8, 0, -2] | wrong
B16 uncompiled(lambda: masked(rl, r=f(1, nan, 2))[i(0, 2)]) | [2.8, 2] | wrong
B16 jit(lambda r: masked(rl, r=r))(f(1, nan, 2))[i(0, 2)] | [2.8, 2] | same
B16 grad(nan_ratio, 1)(rl, f(1, 5, 2)) | [1, 0, 1.9] | wrong
B16 vtrace(f(LARGE), f(LARGE), f(LARGER), f(0), f(0.37)) | [0.37 * (LARGER - LARGE)]
    | wrong
B16 vtrace(f(LARGE), f(LARGE), f(LARGER), f(0), f(0.37), stop_target_gradients=False)
    | [0.37 * (LARGER - LARGE)] | same
B16 grad(total_advantage, 1)(rl, f(0, 1, 2, 3)) | [0, 0, 0, 0] | wrong
B16 leaky_vtrace(f(0), f(0), f(1), f(0.9), f(inf), 1.0) | [1] | wrong
B16 vtrace(f(0), f(0), f(1), f(0.9), f(inf)) | [1] | same
B16 vtrace_td_error_and_advantage(f(1, 100), f(1, 100), f(0, 0), f(1, 1), f(1, 1),
    f(0, 1)).pg_advantage | [0, 0] | wrong
B16 generalized_advantage_estimation(f(1, 100), f(0, 0), f(1, 1), f(1, 100), 1.0,
    truncation_t=jnp.array([True, True])) | [0, 0] | NameError: generalized_advantage
B17 on_devices(lambda x: truncated_generalized_advantage_estimation(x, x, 0.9,
    jnp.append(x, x[0]))) | [[2.71, 1.9, 1]] * 4 | TypeError: scan body function carry
B17 on_devices(lambda x: vtrace(x, x, x, x, x)) | [[3, 2, 1]] * 4
    | TypeError: scan body function carry
B17 on_devices(lambda x: leaky_vtrace(x, x, x, x, x)) | [[3, 2, 1]] * 4
    | TypeError: scan body function carry
B17 on_devices(lambda x: vtrace_td_error_and_advantage(x, x, x, x, x).errors)
    | [[3, 2, 1]] * 4 | TypeError: scan body function carry
B17 on_devices(lambda x: leaky_vtrace_td_error_and_advantage(x, x, x, x, x).errors)
    | [[3, 2, 1]] * 4 | TypeError: scan body function carry
B17 on_devices(lambda x: lambda_returns(x, x, x)) | [[4, 3, 2]] * 4 | same
# Returns.
B18 n_step_bootstrapped_returns(h(1, 2), h(0.9, 0.9), h(3, 4), 1).dtype
    == jnp.bfloat16 | True | wrong
B18 n_step_bootstrapped_returns(f16(1, 2), f16(1, 2), f16(1, 2), 2).dtype
    == jnp.float16 | True | wrong
B18 under_x64(lambda: n_step_bootstrapped_returns(R, D, V, 2)).dtype == jnp.float32
    | True | wrong
B18 n_step_bootstrapped_returns(f(1, 2), f(0.9, 0.9), f(3, 4), 5)
    | [1 + 0.9 * (2 + 0.9 * 4), 2 + 0.9 * 4] | same
B18 n_step_bootstrapped_returns(R, D, V, 2, f(0.5, 0.5)) | ValueError:
    n_step_bootstrapped_returns: lambda_t has shape | TypeError: incompatible shapes
B18 n_step_bootstrapped_returns(R, D, V, 0) | ValueError: n_step_bootstrapped_returns:
    n must be | TypeError: must have every element be nonnegative
B19 corrected(rl, 0.1) | [9 + 0.2, 10.1] | same
B19 corrected(rl, 1e-8) | [9 + 2e-8, 10] | wrong
B19 corrected(rl, 0, f16) | [0, 10] | wrong
# Policies over continuous actions.
B20 grad(lambda a: dpg_loss(a, f(1e20, 0), 1.0).sum())(f(0, 0)) | [-1, 0] | wrong
B20 grad(lambda a: dpg_loss(a, f(1e-4)).sum())(f(1e4)) | [-1e-4] | wrong
B21 np.isfinite(at_the_bound(rl, f(0))) | True | wrong
B21 np.isfinite(grad(at_the_bound, 1)(rl, f(0))) | [True] | wrong
B21 np.isfinite(own_samples(rl)).all() | True | wrong
# Cuts that let NaN through.
C1 q_learning(f(1, 2), 0, 1.0, 0.0, f(nan, 1)) | 0 | wrong
C1 q_learning(f(1, 2), 0, 1.0, 0.0, f(-inf, -inf)) | 0 | wrong
C1 lambda_returns(R, f(0.9, 0, 0.9), f(1, nan, 1)) | [1.9, 1, 1.9] | wrong
C1 truncated_generalized_advantage_estimation(f(1, 1, nan), f(0.9, 0, 0.9), 0.9,
    f(1, 1, 1, 1)) | [0.9, 0, nan] | wrong
C1 discounted_returns(f(1, 1), f(0.9, 0.9), f(nan, 1)) | [2.71, 1.9] | wrong
C1 expected_sarsa(f(1, 2), 0, 1.0, 0.9, f(1, -inf), f(1, 0)) | 0.9 | wrong
C1 policy_gradient_loss(f([0, 0], [0, 0]), i(0, 1), f(1, nan), f(1, 0))
    | np.log(2) / 2 | wrong
# Accepted in silence.
D1 q_learning(V, 7, 1.0, 0.9, V) | nan | wrong
D1 q_learning(V, -1, 1.0, 0.9, V) | nan | wrong
D1 q_learning(V, 2, 1.0, 0.9, V) | 0.7 | same
D1 q_lambda(QS, i(0, 7), f(1, 1), f(0.9, 0.9), QS, 0.9) | [TRACED, nan] | same
D1 q_lambda(QS, i(0, -1), f(1, 1), f(0.9, 0.9), QS, 0.9) | [TRACED, nan] | wrong
D1 policy_gradient_loss(f([0, 0]), i(-1), f(1), f(1)) | nan | wrong
D2 td_lambda(f(1), R, D, V, 0.9) | ValueError: td_lambda: r_t has shape | wrong
D2 truncated_generalized_advantage_estimation(f(1), D, 0.9, f(1, 2, 3, 4))
    | ValueError: truncated_generalized_advantage_estimation: discount_t has | wrong
D2 discounted_returns(R, D, f(1)) | ValueError: discounted_returns: v_t has | wrong
D2 policy_gradient_loss(f([0, 0], [0, 0], [0, 0]), i(0, 1, 0), f(1), R)
    | ValueError: policy_gradient_loss: adv_t has shape | wrong
D2 policy_gradient_loss(f([0, 0]), i(0, 1, 0), R, R)
    | ValueError: policy_gradient_loss: a_t has shape | wrong
D2 clipped_surrogate_pg_loss(f(1.1), V, 0.2)
    | ValueError: clipped_surrogate_pg_loss: adv_t has shape | wrong
D2 rm_loss(f([1, 2], [3, 4]), f([1], [2])) | ValueError: rm_loss: q_t has | wrong
D2 entropy_loss(f([1, 2], [3, 4]), f(0.5)) | ValueError: entropy_loss: w_t has | wrong
D2 quantile_regression_loss(V, f(0.5), V + 1)
    | ValueError: quantile_regression_loss: tau_src has shape | wrong
D2 normalize(PopArtState(f(0), f(1), f(1)), f([1], [2], [3]), i(0, 0, 0))
    | ValueError: normalize: indices has shape | wrong
D2 q_learning(V, 0, 1.0, 0.9, f(1, 2)) | ValueError: q_learning: q_t has shape | wrong
D2 compute_parametric_kl_penalty_and_dual_loss([(f([1], [2]), penalty(rl)),
    (f(1, 2), penalty(rl))], jnp.abs) | ValueError:
    compute_parametric_kl_penalty_and_dual_loss: kl_constraints[1][0] has | wrong
D3 extract_subsequences(X, i([4]), 3, 2).ravel() | [nan, nan, nan] | wrong
D3 extract_subsequences(X, i([3]), 4).ravel() | [nan, nan, nan, nan] | wrong
D3 extract_subsequences(jnp.ones((5, 2)), i([0], [1], [2]), 2, 2)
    | ValueError: extract_subsequences: start_indices has shape | wrong
D3 sample_start_indices(KEY, 2, 5, 3) | ValueError: sample_start_indices:
    num_start_indices must be | ValueError: Cannot take a larger sample
D3 jit(lambda last: sample_start_indices(KEY, 1, 1, last))(0) | [[0]]
    | ConcretizationTypeError: Abstract tracer value
D4 huber_loss(f(3), -1.0) | ValueError: huber_loss: delta must be | wrong
D4 epsilon_greedy(1.5).probs(V) | ValueError: epsilon_greedy: epsilon must be | wrong
D4 add_dirichlet_noise(KEY, f([0.5, 0.5]), 0.0, 0.25)
    | ValueError: add_dirichlet_noise: dirichlet_alpha must be | wrong
D4 np.sort(add_dirichlet_noise(KEY, f([0.5, 0.5]), 1e-8, 0.25)) | [[0.375, 0.625]]
    | same
D4 vtrace(R, R, R, R, R, clip_rho_threshold=-1.0)
    | ValueError: vtrace: clip_rho_threshold must be | wrong
D4 transform_to_2hot(f(0.5), 0.0, 1.0, 1)
    | ValueError: transform_to_2hot: num_bins must be | wrong
D4 categorical_cross_entropy(f(1, 1), f(0, 1)) | -np.log(softmax([0, 1])).sum() | wrong
D4 epsilon_greedy(0.1).probs(f(1, nan, 0)) | [nan, nan, nan] | wrong
# Refusals.
E1 clip_gradient({"a": f(1)}, -1.0, 1.0)["a"] | [1]
    | ValueError: entry not a 2- or 3- tuple
E1 clip_gradient(x=f(1), gradient_min=-1.0, gradient_max=1.0) | [1]
    | TypeError: positional-only
E1 jax.jvp(lambda x: clip_gradient(x, -1.0, 1.0), (1.0,), (1.0,)) | [1, 1]
    | TypeError: forward-mode autodiff
E1 transformed_lambda_returns(IDENTITY_PAIR, r_t=f(1), discount_t=f(1), v_t=f(1))
    | [2] | IndexError: list index out of range
E1 parameters(transformed_lambda_returns)[0] == "tx_pair" | True | wrong
E1 jit(quantile_regression_loss)(f(1), f(0.5), f(2), 1.0) | 0.5 * 0.5
    | TracerBoolConversionError: Attempted boolean conversion
E1 jit(lambda top: v_mpo(rl, f(1, 2), 1, 1, top)[1])(0.5) | [0, 1]
    | TracerBoolConversionError: Attempted boolean conversion
E1 strictly(lambda: vtrace(f(0), f(0), f(1), f(0.9), f(1))) | [1]
    | TypePromotionError: no available implicit dtype promotion
E1 strictly(lambda: expectile_loss(f(0), f(1), 0.7)) | [0.7]
    | TypePromotionError: no available implicit dtype promotion
E1 strictly(lambda: transform_to_2hot(f(0.5), 0.0, 1.0, 3)) | [[0, 1, 0]]
    | TypePromotionError: no available implicit dtype promotion
E1 strictly(lambda: epsilon_greedy(0.1).probs(f(1, 2))) | [0.05, 0.95]
    | TypePromotionError: no available implicit dtype promotion
E1 unwarned(lambda: policy_gradient_loss(f([0, 0]), i(0), f(1), f(1))) | np.log(2)
    | PendingDeprecationWarning: Rlax softmax
E1 td_learning(f(0)[0], jnp.int32(1), 0.9, 1.0) | TypeError: td_learning: r_t must be
    floating-point, got int32 | AssertionError: Assertion assert_type
E1 td_learning(f(0), 1.0, 0.9, 1.0) | ValueError: td_learning: v_tm1 has shape (1,)
    | AssertionError: Assertion assert_rank
E1 lambda_returns(f(), f(), f()) | []
    | IndexError: index is out of bounds for axis 0 with size 0
E1 multivariate_normal_kl_divergence(f(0, 0), 0.5, f(0, 0), 1.0)
    | 2 * (np.log(2) + 0.125 - 0.5) | AttributeError: no attribute 'shape'
# Dtypes.
E2 add_gaussian_noise(KEY, h(1), 0.1).dtype == jnp.bfloat16 | True | wrong
E2 add_ornstein_uhlenbeck_noise(KEY, h(1), h(1), 0.1, 0.1).dtype == jnp.bfloat16
    | True | wrong
E2 add_dirichlet_noise(KEY, h([0.5, 0.5]), 0.3, 0.25).dtype == jnp.bfloat16
    | True | wrong
E2 quantile_regression_loss(h(1), h(0.5), h(2)).dtype == jnp.bfloat16 | True | wrong
E2 embed_oar(h([1]), i(0), h(1), 2).dtype == jnp.bfloat16 | True | wrong
E2 art(PopArtState(h(0), h(1), h(1)), h(1), i(0), 0.1, 1e-4, 1e4).shift.dtype
    == jnp.bfloat16 | True | wrong
E2 greedy().probs(h(1, 2)).dtype == jnp.bfloat16 | True | wrong
E2 unbiased_transform_pair(-1.0, 1.0, 3, IDENTITY_PAIR).apply(h(0.5)).dtype
    == jnp.bfloat16 | True | wrong
# Documents: what the names say, and which there are.
E3 expectile_loss(f(2), f(1), 0.9) | [0.1] | same
E3 categorical_cross_entropy(f(0.5, 0.5), f(0, 0)) | np.log(2) | same
E3 "categorical_sample" in exported(rl) | True | wrong
E3 "embed_oar" in exported(rl) | True | wrong
E3 "pixel_control_loss" in exported(rl) | True | wrong
E3 "IntrinsicRewardState" in exported(rl) | True | wrong
E3 "MpoOutputs" in exported(rl) | True | wrong
E3 "KNNQueryResult" in exported(rl) | True | wrong
E3 "importance_corrected_td_errors" in exported(rl) | True | wrong
# Suspected, and right in both.
X categorical_kl_divergence(L, L) | 0 | same
X categorical_kl_divergence(L, V) | P @ np.log(P / softmax([1, 2, 3])[:2]) | same
X categorical_kl_divergence(V, L) | inf | same
X grad(categorical_kl_divergence)(L, V) | [0, 0, 0] | same
X softmax().entropy(L) | -P @ np.log(P) | same
X grad(softmax().entropy)(L) | [P[0] * P[1], -P[0] * P[1], 0] | same
X clipped_entropy_softmax(1.0, 0.5).entropy(h(1, 1, 0)).dtype == jnp.bfloat16
    | True | same
X epsilon_greedy(0.1).probs(f(1, 1, 0)) | [0.45 + 0.1 / 3, 0.45 + 0.1 / 3, 0.1 / 3]
    | same
X greedy().probs(f(1, 1, 0)) | [0.5, 0.5, 0] | same
X log_loss(f(0, 1, 0), f(0, 1, 1)) | [0, 0, inf] | same
X averaged(rl, 0.9, [f(1e4)]).variance >= 0 | True | same
X create_ema(0.9)[0](f(1)).debiased_moments().mean | [0] | same
"""
LINES = re.sub(r"\n {4}", " ", TABLE).strip().splitlines()
ROWS = [re.split(r" \| ", line) for line in LINES if not line.startswith("#")]

# What a comparison raises, or a call that is not refused.
WRONG = (AssertionError, pytest.fail.Exception)

of_each_row = pytest.mark.parametrize(
    ("call", "right", "peer"), ROWS, ids=[call for call, _, _ in ROWS]
)


def run(call, right, rl):
    """Calls what follows the letters of the entry, and compares."""
    code = compile(call.partition(" ")[2], call, "eval")
    names = globals() | vars(rl) | {"rl": rl}
    kind, _, message = right.partition(": ")
    if kind in {"TypeError", "ValueError"}:
        with pytest.raises(getattr(builtins, kind)) as error:
            eval(code, names)
        if not str(error.value).startswith(message):
            raise error.value
    else:
        result = np.asarray(eval(code, names), np.float64)
        np.testing.assert_allclose(result, eval(right), rtol=1e-5, atol=1e-6)


@of_each_row
def test_it_is_right_here(call, right, peer):
    run(call, right, rlprims)


@pytest.mark.filterwarnings("ignore")
@of_each_row
def test_it_is_as_stated_in_rlax(call, right, peer, rlax):
    kind, _, message = peer.partition(": ")
    error_types = Exception
    if kind == "wrong":
        error_types, message = WRONG, "Not equal to tolerance|DID NOT RAISE"
    if kind == "same":
        run(call, right, rlax)
        return
    with pytest.raises(error_types, match=message) as error:
        run(call, right, rlax)
    assert kind in {"wrong", error.type.__name__}


# What the calls are made of


def f(*values):
    return jnp.array(values, jnp.float32)


def h(*values):
    return jnp.array(values, jnp.bfloat16)


def f16(*values):
    return jnp.array(values, jnp.float16)


def i(*values):
    return jnp.array(values, jnp.int32)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


nan, inf, grad, jit = np.nan, np.inf, jax.grad, jax.jit
KEY = jax.random.key(0)
R, D, V = f(1, 1, 1), f(0.9, 0.9, 0.9), f(1, 2, 3)
X, QS = f([0], [1], [2], [3], [4]), f([1, 2, 3], [1, 2, 3])
L, P = f(1, 2, -inf), softmax([1, 2])
SIGMOID = P[1]  # of 1
SLOPE = SIGMOID * (1 - SIGMOID)
TRACED = 1 + 0.9 * (0.1 * 3 + 0.9 * (1 + 0.9 * 3)) - 1
WIDE, FEW = [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 1e3, 1e5], [0.5, 2, 5, 20]
POWERS = [1e-6, 1e-5, 1e-4, 1e-2, 5]
LARGE = np.float32(1e4)
LARGER = LARGE + np.float32(0.01)
NEW = 1 - 0.9**3  # the weight of three steps
WAVE = 1e4 + (-1.0) ** np.arange(200)
WAVE_VARIANCE = np.cov(WAVE, aweights=0.9 ** np.arange(200)[::-1], bias=True).item()


def uncompiled(call):
    with jax.disable_jit():
        return call()


def under_x64(call):
    with jax.enable_x64(True):
        return call()


def strictly(call):
    with jax.numpy_dtype_promotion("strict"):
        return call()


def unwarned(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def on_devices(call):
    """Of a trajectory of ones on each of four devices."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    each, axis = lambda x: call(x[0])[None], PartitionSpec("d")
    mapped = jax.shard_map(each, mesh=mesh, in_specs=axis, out_specs=axis)
    return mapped(jnp.ones((4, 3), jnp.float32))


def parameters(function):
    return list(inspect.signature(function).parameters)


def exported(rl):
    names = {}
    exec(f"from {rl.__name__} import *", names)
    return names


def remembered(rl, side):
    e = f([side, 0], [0, side])
    return rl.episodic_memory_intrinsic_rewards(e, 2, 1.0, max_memory_size=8)


def novelty(side):
    """Of each embedding, by the formula: two neighbours, both of them zeros."""
    rate = side**2 / (side**2 + 1e-3) - 8e-3
    return [1 / ((2 * 1e-4 / (rate + 1e-4)) ** 0.5 + 1e-3)] * 2


def memories(rl):
    state = None
    for e in (f([1], [1], [1]), f([2], [2], [2]), f([3], [3], [3])):
        _, state = rl.episodic_memory_intrinsic_rewards(
            e, 1, 1.0, state, max_memory_size=4
        )
        yield state


def c51_slope(rl, reward):
    z, logits = jnp.linspace(-2, 2, 5, dtype=jnp.float32), f(0, 1, 2, 3, 4)
    loss = lambda x: rl.categorical_td_learning(z, z, reward, 0.9, z, x, False)
    return grad(loss)(logits)


def c51_slope_by_definition(reward):
    """The loss is linear in the probabilities of the target."""
    z, p = np.linspace(-2, 2, 5), softmax(np.arange(5))
    moved = np.clip(reward + 0.9 * z, -2, 2)
    costs = -np.log(softmax(z)) @ np.maximum(0, 1 - abs(z[:, None] - moved))
    return p * (costs - p @ costs)


def decoded(rl, x, low, high, bins):
    encoded = rl.transform_to_2hot(x, low, high, bins)
    return rl.transform_from_2hot(encoded, low, high, bins)


def there_and_back(rl, x):
    return rl.signed_parabolic(rl.signed_hyperbolic(x))


def step(rl, targets, tasks):
    state = rl.PopArtState(f(0, 0), f(1, 1), f(1, 1))
    return rl.art(state, targets, tasks, 0.1, 1e-4, 1e4)


def three_steps(rl):
    """Of one task with 64 targets."""
    state = rl.PopArtState(f(0), f(1), f(1))
    for _ in range(3):
        state = rl.art(state, f(*[10] * 64), i(*[0] * 64), 0.1, 1e-4, 1e4)
    return state


def averaged(rl, decay, stream):
    init, update = rl.create_ema(decay)
    update = jit(update)
    state = init(stream[0])
    for x in stream:
        moments, state = update(x, state)
    return moments


def penalty(rl, alpha=1.0, dtype=jnp.float32):
    return rl.LagrangePenalty(jnp.array(alpha, dtype), 0.1)


def v_mpo(rl, advantages, restarting, importance, top, temperature=1.0):
    ones = jnp.ones_like(advantages)
    return rl.vmpo_compute_weights_and_temperature_loss(
        advantages,
        restarting * ones,
        importance * ones,
        penalty(rl, temperature, advantages.dtype),
        lambda x: jnp.clip(x, min=1e-10),
        top,
    )


def temperature_into_values(rl, q):
    constraints = [(f(0), penalty(rl))]
    _, outputs = rl.mpo_loss(jnp.zeros_like(q), q, penalty(rl), constraints)
    return outputs.temperature_loss.sum()


def temperature_into_advantages(rl, a):
    constraints = [(jnp.zeros_like(a), penalty(rl))]
    return rl.vmpo_loss(jnp.zeros_like(a), a, penalty(rl), constraints)[0].sum()


def masked(rl, v=None, r=None, rho=None, **flag):
    """The errors of a trajectory of which the second step is left out."""
    zeros, r = f(0, 0, 0), f(1, 5, 2) if r is None else r
    v, rho = zeros if v is None else v, f(1, 1, 1) if rho is None else rho
    mask = jnp.array([True, False, True])
    return rl.vtrace(v, zeros, r, D, rho, sample_mask=mask, **flag)


def nan_ratio(rl, r):
    errors = masked(rl, r=r, rho=f(1, nan, 1), stop_target_gradients=False)
    return errors[i(0, 2)].sum()


def total_advantage(rl, v):
    results = rl.vtrace_td_error_and_advantage(v[:-1], v[1:], R, D, R)
    return results.pg_advantage.sum()


def corrected(rl, p, kind=f):
    a, q, pi, mu = i(0, 0), kind([1], [1]), kind([p], [p]), kind(p, p)
    return rl.retrace(kind([0], [0]), q, a, a, kind(0, 10), kind(1, 1), pi, mu, 1.0)


UNIT = SimpleNamespace(minimum=np.float32(-1), maximum=np.float32(1))


def at_the_bound(rl, mu):
    return rl.squashed_gaussian(-4.0, 2.0).logprob(f(1), mu, f(0), UNIT).sum()


def own_samples(rl):
    """The log-densities of many."""
    policy = rl.squashed_gaussian(-4.0, 2.0)

    def density(key):
        sample = policy.sample(key, f(3), f(3), UNIT)
        return policy.logprob(sample, f(3), f(3), UNIT)

    return jax.vmap(density)(jax.random.split(KEY, 10000))

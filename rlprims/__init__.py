"""Reinforcement-learning primitives for JAX: pure, jittable, batched by `jax.vmap`.

Each topic is a module, whose docstring teaches it and whose `__all__` is its API; all
of it can be had from here too:

*   `state_values`, `action_values`, `action_value_traces`, `off_policy_action_values`:
    temporal-difference errors, which move predictions towards targets.
*   `soft_action_values`: errors with a soft maximum, or a wider gap between actions.
*   `distributional`, `quantile`, `implicit_quantiles`: losses of predicted
    distributions of the return.
*   `risk_distortions`: which part of such a distribution a policy attends to.
*   `histogram_losses`: values learned by classification.
*   `returns`, `selective_returns`, `advantages`, `off_policy`, `v_trace`: multistep
    estimates, for one's own policy and another's.
*   `importance_weights`: what samples of one policy count for under another.
*   `policy_gradients`, `regret_policy_gradients`: losses whose gradient improves a
    policy.
*   `surrogates`, `actor_critic`: losses from log-probabilities of any kind of action,
    and what is added to them.
*   `joint_actions`: actions made of several parts.
*   `kl_estimators`, `kl_coefficients`: divergences from samples, and the weight of a
    penalty on them.
*   `standardization`: advantages on one scale.
*   `control`, `soft_actor_critic`, `discrete_soft_actor_critic`: actors and the critics
    they climb; `ensembles`: several critics, and what to make of them.
*   `offline`, `conservative`, `advantage_weights`: values and policies learned from
    a fixed set of data.
*   `mpo`, `vmpo`, `muesli`, `lagrange`: policies improved within a limit on how far
    they move.
*   `group_advantages`, `best_of_k`: several answers of a language model compared.
*   `tokens`, `token_losses`, `sequence_losses`: its log-probabilities, and losses that
    improve it by them.
*   `preference`, `reference_preference`: losses from which answer was preferred.
*   `categorical`, `distributions`: policies over a finite number of actions.
*   `gaussians`, `squashing`: policies over continuous actions, and their bounds;
    `beta_policies`, `truncated_normals`: more of those within bounds.
*   `model_targets`, `world_models`: what a learned model should predict, latent states,
    and learning from what is imagined.
*   `policy_targets`: actions and weights to learn a policy from.
*   `planning`, `gumbel_planning`: where a tree search looks, and the policy it finds.
*   `exploration`, `temporally_extended`: noise on actions, priors and parameters, and
    random actions that last.
*   `bandits`: choices among arms by how little is known of them.
*   `embeddings`: what goes into a network beside the observation.
*   `losses`: of one prediction against one target.
*   `transforms`, `transform_pairs`, `two_hot`: values on a friendlier scale.
*   `nonlinear_bellman`, `transformed_action_values`: targets and errors of such values.
*   `auxiliary`: rewards and a loss for tasks of the agent's own.
*   `sequences`: trajectories cut into pieces, and where episodes end.
*   `replay`, `transitions`: what a replay buffer draws, and what it stores.
*   `sampling`, `sum_trees`: draws by weight, and from a replay memory by priority.
*   `trees`, `updates`, `collectives`: trees of arrays, target networks, and sums over
    devices.
*   `curiosity`, `counts`, `intrinsic_rewards`: rewards for what is new, as errors of
    predictions, counts or nearest neighbours in a `memory` tell.
*   `moving_averages`, `normalization`: statistics of a stream of data, and targets on a
    common scale.
*   `running_statistics`, `return_normalization`: statistics of all data so far, and
    scales of returns to divide by.
*   `diagnostics`: numbers to watch while an agent learns.
*   `gradients`, `recurrences`, `arrays`: what the rest is made of.
"""

from rlprims.action_value_traces import *
from rlprims.action_values import *
from rlprims.actor_critic import *
from rlprims.advantage_weights import *
from rlprims.advantages import *
from rlprims.arrays import *
from rlprims.auxiliary import *
from rlprims.bandits import *
from rlprims.best_of_k import *
from rlprims.beta_policies import *
from rlprims.categorical import *
from rlprims.collectives import *
from rlprims.conservative import *
from rlprims.control import *
from rlprims.counts import *
from rlprims.curiosity import *
from rlprims.diagnostics import *
from rlprims.discrete_soft_actor_critic import *
from rlprims.distributional import *
from rlprims.distributions import *
from rlprims.embeddings import *
from rlprims.ensembles import *
from rlprims.exploration import *
from rlprims.gaussians import *
from rlprims.gradients import *
from rlprims.group_advantages import *
from rlprims.gumbel_planning import *
from rlprims.histogram_losses import *
from rlprims.implicit_quantiles import *
from rlprims.importance_weights import *
from rlprims.intrinsic_rewards import *
from rlprims.joint_actions import *
from rlprims.kl_coefficients import *
from rlprims.kl_estimators import *
from rlprims.lagrange import *
from rlprims.losses import *
from rlprims.memory import *
from rlprims.model_targets import *
from rlprims.moving_averages import *
from rlprims.mpo import *
from rlprims.muesli import *
from rlprims.nonlinear_bellman import *
from rlprims.normalization import *
from rlprims.off_policy import *
from rlprims.off_policy_action_values import *
from rlprims.offline import *
from rlprims.planning import *
from rlprims.policy_gradients import *
from rlprims.policy_targets import *
from rlprims.preference import *
from rlprims.quantile import *
from rlprims.recurrences import *
from rlprims.reference_preference import *
from rlprims.regret_policy_gradients import *
from rlprims.replay import *
from rlprims.return_normalization import *
from rlprims.returns import *
from rlprims.risk_distortions import *
from rlprims.running_statistics import *
from rlprims.sampling import *
from rlprims.selective_returns import *
from rlprims.sequence_losses import *
from rlprims.sequences import *
from rlprims.soft_action_values import *
from rlprims.soft_actor_critic import *
from rlprims.squashing import *
from rlprims.standardization import *
from rlprims.state_values import *
from rlprims.sum_trees import *
from rlprims.surrogates import *
from rlprims.temporally_extended import *
from rlprims.token_losses import *
from rlprims.tokens import *
from rlprims.transform_pairs import *
from rlprims.transformed_action_values import *
from rlprims.transforms import *
from rlprims.transitions import *
from rlprims.trees import *
from rlprims.truncated_normals import *
from rlprims.two_hot import *
from rlprims.updates import *
from rlprims.v_trace import *
from rlprims.vmpo import *
from rlprims.world_models import *

__version__ = "0.1.0"

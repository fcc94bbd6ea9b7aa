r"""Muesli: a policy kept near one that advantages have improved, by a bounded amount.

The advantage of an action, clipped to `[-c, c]`, raises or lowers its probability by
its exponential. The result, the clipped MPO or CMPO policy, is a target that never is
far from the prior it starts from, however wrong the advantages:

.. math::
    \pi_{\text{CMPO}}(a) \propto \pi_{\text{prior}}(a) \, e^{\text{clip}(A(a), -c, c)},
    \qquad
    \sup \operatorname{TV}(\pi_{\text{CMPO}}, \pi_{\text{prior}}) = \tanh(c / 2)

The prior is the policy of a target network. Muesli adds up three losses of the policy:

*   the policy gradient, `log_prob_policy_gradient_loss`, with the importance weights of
    `truncated_importance_weights` where an older policy acted;
*   `cmpo_loss`, the divergence from the CMPO policy. Where there are too many actions
    to sum over, `behaviour_cloning_loss` of sampled ones with the weights of
    `sampled_cmpo_weights` has the same gradient, up to what samples cost;
*   that of the policies predicted by a model that is unrolled: `cmpo_loss` again, along
    more axes, or the cross-entropy from the CMPO policy of the state that the model
    should be in, which `muzero_targets` lays out.

Advantages of all actions come from one step of the model, as `r + γ v' - v`. They are
dimensionless here, so that `c` fits every task: divided by the root of the moving
average of the squares of those of the actions taken.

>>> from rlprims import create_ema
>>> init_state, update_moments = create_ema(0.99)
>>> adv_t = jnp.array([300.0, -400.0])  # of actions taken
>>> moments, state = update_moments(adv_t**2, init_state(0.0))
>>> adv = jnp.array([[0.0, 700.0], [0.0, -70.0]])  # of all actions
>>> normalized = adv / jnp.sqrt(moments.mean + 1e-12)
>>> policy = cmpo_policy(jnp.zeros((2, 2)), normalized)
>>> (policy * 100).round().tolist()  # softmax of (0, 1), clipped, and of (0, -0.2)
[[27.0, 73.0], [55.0, 45.0]]
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where
from rlprims.categorical import masked_log_softmax, weighted_sum, which_legal
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced
from rlprims.policy_gradients import log_policy

__all__ = ["cmpo_loss", "cmpo_policy", "sampled_cmpo_weights"]

Logits = Annotated[Arg, "f[...,A]"]
Bound = Annotated[Arg, "f[]", "[0, inf]"]
LegalMask = Annotated[Arg | None, "b[...,A]"]


@checked
def cmpo_policy(
    prior_logits: Logits,
    adv: Logits,
    *,
    max_adv: Bound = 1.0,
    mask: LegalMask = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[...,A]"]:
    r"""Computes the policy that clipped advantages make of a prior.

    .. math::
        \pi_{\text{CMPO}}(a) = \frac{
            \pi_{\text{prior}}(a) \, e^{\text{clip}(A(a), -c, c)}}{
            \sum_b \pi_{\text{prior}}(b) \, e^{\text{clip}(A(b), -c, c)}}

    No action that the prior excludes gets any probability, whatever its advantage.

    Args:
        prior_logits: logits of the prior, `f[...,A]`.
        adv: advantages :math:`A` of all actions, `f[...,A]`, dimensionless: divided by
            how large they are in general.
        max_adv: bound :math:`c` on their size, `f[]`, dimensionless, in `[0, inf]`; 0
            gives the prior.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.
        stop_target_gradients: whether to block gradients through the result, `b[]`.

    Returns:
        The probabilities, `f[...,A]`, dimensionless; NaN where no action is legal.

    Raises:
        ValueError: if a shape breaks its contract, or `max_adv` is a Python number
            below 0.
        TypeError: if `mask` is not boolean, or another argument is not floating-point.

    Example:
        >>> prior_logits, adv = jnp.zeros(2), jnp.array([0.0, jnp.inf])
        >>> (cmpo_policy(prior_logits, adv) * 100).round().tolist()  # inf counts as 1
        [27.0, 73.0]

    References:
        Hessel et al., `Muesli: Combining Improvements in Policy Optimization
        <https://arxiv.org/abs/2104.06159>`_, 2021.
    """
    logits = _improved(prior_logits, adv, max_adv)
    policy = jnp.exp(masked_log_softmax(logits, mask))
    return stop_gradient_if(stop_target_gradients, policy)


@checked
def cmpo_loss(
    logits_t: Logits,
    prior_logits_t: Logits,
    adv_t: Logits,
    *,
    max_adv: Bound = 1.0,
    mask: LegalMask = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the divergence of a policy from the one it should become.

    .. math::
        L = \operatorname{KL}(\pi_{\text{CMPO}}, \pi)
          = \sum_a \pi_{\text{CMPO}}(a) \log \frac{\pi_{\text{CMPO}}(a)}{\pi(a)}, \qquad
        \pi = \operatorname{softmax}(\text{logits}_t)

    with the policy of `cmpo_policy`. It is 0 where the policy is that one already, and
    infinite where the policy excludes an action that it does not.

    Args:
        logits_t: logits of the policy to improve, `f[...,A]`.
        prior_logits_t: logits of the prior, `f[...,A]`.
        adv_t: advantages of all actions, `f[...,A]`, dimensionless: divided by how
            large they are in general.
        max_adv: bound :math:`c` on their size, `f[]`, dimensionless, in `[0, inf]`.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether the prior and the advantages are constants when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or `max_adv` is a Python number
            below 0.
        TypeError: if a mask is not boolean, or another argument is not floating-point.

    Example:
        >>> logits, adv = jnp.array([0.0, 1.0]), jnp.array([0.0, 5.0])
        >>> cmpo_loss(logits, jnp.zeros(2), adv).item()  # as 5 counts as 1
        0.0

    References:
        Hessel et al., `Muesli: Combining Improvements in Policy Optimization
        <https://arxiv.org/abs/2104.06159>`_, 2021.
    """
    logits_t, prior, adv = keep_where(mask_t, logits_t, prior_logits_t, adv_t)
    counts = True if mask_t is None else mask_t
    log_target = log_policy(_improved(prior, adv, max_adv), mask, counts)
    log_target = stop_gradient_if(stop_target_gradients, log_target)
    log_pi = log_policy(logits_t, mask, counts)
    losses = weighted_sum(log_target - log_pi, jnp.exp(log_target))
    return reduced(losses, mask_t, reduction)


@checked
def sampled_cmpo_weights(
    adv: Annotated[Arg, "f[...,N]"],
    *,
    max_adv: Bound = 1.0,
    initial_normalizer: Annotated[Arg, "f[]", "(0, inf)"] = 1.0,
    mask: Annotated[Arg | None, "b[...,N]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[...,N]"]:
    r"""Computes what sampled actions count for as samples of the CMPO policy.

    .. math::
        w_i = \frac{e^{\text{clip}(A(a_i), -c, c)}}{\tilde z_i}, \qquad
        \tilde z_i = \frac1N \Bigl(z_{\text{init}}
            + \sum_{k \ne i} e^{\text{clip}(A(a_k), -c, c)}\Bigr), \qquad
        a_i \sim \pi_{\text{prior}}

    The normaliser of a sample leaves that sample out, and so is independent of it: a
    good action is not divided by itself. The mean of :math:`-w_i \log \pi(a_i)` over
    the samples estimates the cross-entropy from the CMPO policy, and its gradient that
    of `cmpo_loss`. It is `behaviour_cloning_loss` of their log-probabilities, or
    `sampled_policy_distillation_loss`.

    Args:
        adv: advantages of `N` actions that were drawn from the prior, `f[...,N]`,
            dimensionless: divided by how large they are in general.
        max_adv: bound :math:`c` on their size, `f[]`, dimensionless, in `[0, inf]`.
        initial_normalizer: what stands in for the sample left out,
            :math:`z_{\text{init}}`, `f[]`, dimensionless, positive. An advantage of 0
            has 1.
        mask: whether each sample counts, `b[...,N]`: the weight of the others is 0,
            and `N` is the number of those that do. All count if `None`.
        stop_target_gradients: whether to block gradients through the result, `b[]`.

    Returns:
        The weights, `f[...,N]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract, or a bound is a Python number that
            is out of its range.
        TypeError: if `mask` is not boolean, or another argument is not floating-point.

    Example:
        >>> adv = jnp.log(jnp.array([0.6, 1.0]))
        >>> weights = sampled_cmpo_weights(adv)
        >>> (weights * 100).round().tolist()  # 0.6 / ((1 + 1) / 2), 1 / ((1 + 0.6) / 2)
        [60.0, 125.0]

    References:
        Hessel et al., `Muesli: Combining Improvements in Policy Optimization
        <https://arxiv.org/abs/2104.06159>`_, 2021.
    """
    counts = which_legal(adv, mask)
    clipped = jnp.clip(jnp.where(counts, adv, 0), -max_adv, max_adv)
    # All relative to the largest, which cancels, so that nothing overflows.
    top = jnp.max(jax.lax.stop_gradient(clipped), axis=-1, keepdims=True, initial=0)
    parts = jnp.where(counts, jnp.exp(clipped - top), 0)
    apart = ~jnp.eye(adv.shape[-1], dtype=bool)
    others = jnp.sum(parts[..., None, :], axis=-1, where=apart)
    number = jnp.sum(counts, axis=-1, keepdims=True, dtype=adv.dtype)
    weights = number * parts / (initial_normalizer * jnp.exp(-top) + others)
    return stop_gradient_if(stop_target_gradients, weights)


def _improved(prior_logits: Array, adv: Array, max_adv: Array) -> Array:
    """Returns logits of the CMPO policy; no advantage moves what is excluded."""
    adv = jnp.where(prior_logits == -jnp.inf, 0, adv)
    return prior_logits + jnp.clip(adv, -max_adv, max_adv)

r"""Latent states that are categorical, and learning from what is imagined.

A world model of the Dreamer family describes the state of the environment by `C`
categorical variables of `K` classes each. It has two distributions of them: the
posterior, which has seen the observation, and the prior, which predicts it from what
came before. Both are given by logits, of which `mix_with_uniform` keeps every class
possible. `straight_through_sample` draws a state that gradients flow through, and
`balanced_kl_loss` brings prior and posterior together.

Starting in such a state, the agent imagines what would follow, and learns from that.
A continuation predicted to be unlikely makes all that comes after it unlikely, which
is what `imagination_weights` are for. The rest of DreamerV3 is elsewhere: its values
in `two_hot` and `histogram_losses`, and its actor, whose loss is a sum:

    >>> from rlprims import *
    >>> reward, value = jnp.array([0.0, 1.0, 0.0]), jnp.array([1.0, 2.0, 3.0])
    >>> discount = jnp.array([1.0, 0.5, 0.5])  # 0.5, times predicted continuations
    >>> log_prob, entropy = jnp.full(3, -1.0), jnp.full(3, 0.5)
    >>> returns = lambda_returns(reward, discount, value, 0.95)
    >>> spread, weights = ReturnRange(0.0, 0.0), imagination_weights(discount)
    >>> spread = update_return_range(spread, returns)
    >>> adv = normalize_by_return_range(spread, returns - jnp.array([1.0, 1.0, 2.0]))
    >>> actor = log_prob_policy_gradient_loss(log_prob, adv, rho_t=weights)
    >>> bonus = entropy_bonus_loss(weights * entropy)
    >>> round((actor + 3e-4 * bonus).item(), 4)
    0.4122
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where, one_hot
from rlprims.categorical import (
    categorical_kl_divergence,
    draw,
    masked_log_softmax,
    which_legal,
)
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced

__all__ = [
    "balanced_kl_loss",
    "imagination_weights",
    "mix_with_uniform",
    "straight_through_sample",
]

Logits = Annotated[Arg, "f[...,A]"]
Groups = Annotated[Arg, "f[...,C,K]"]
Coefficient = Annotated[Arg, "f[]", "[0, inf)"]
Mask = Annotated[Arg | None, "b[...,A]"]


@checked
def balanced_kl_loss(
    posterior_logits: Groups,
    prior_logits: Groups,
    *,
    dynamics_coefficient: Coefficient,
    representation_coefficient: Coefficient,
    free_nats: Coefficient = 1.0,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes how far prior and posterior are apart, learnt at two speeds.

    .. math::
        L &= \beta_{\text{dyn}} \max\bigl(f, \operatorname{KL}(\bar q \,\|\, p)\bigr)
            + \beta_{\text{rep}} \max\bigl(f, \operatorname{KL}(q \,\|\, \bar p)\bigr)
        \\
        \operatorname{KL}(q \,\|\, p) &= \sum_{c=1}^C \sum_{k=1}^K
            q_c(k) \log \frac{q_c(k)}{p_c(k)}

    where a bar holds a distribution constant. The first term moves the prior towards
    the posterior, so that the future is predicted; the second moves the posterior
    towards the prior, so that it can be. A divergence below the free nats :math:`f` is
    left alone: it is not worth simplifying the world for. The bound is on the sum over
    all variables of a step, not on each of them, nor on the mean over steps.

    Args:
        posterior_logits: logits of :math:`q`, which has seen the observation,
            `f[...,C,K]`.
        prior_logits: logits of :math:`p`, which predicts it, `f[...,C,K]`.
        dynamics_coefficient: weight :math:`\beta_{\text{dyn}}` of what the prior
            learns, `f[]`, dimensionless, not negative.
        representation_coefficient: weight :math:`\beta_{\text{rep}}` of what the
            posterior learns, `f[]`, dimensionless, not negative; the smaller of the
            two, as the posterior has a world to describe.
        free_nats: divergence :math:`f` at each step below which nothing is learnt,
            `f[]`, in nats, not negative.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether each term holds one of its distributions
            constant when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or a coefficient or `free_nats` is a
            Python number below 0 or infinite.
        TypeError: if logits or settings are not floating-point, or `mask_t` is not
            boolean.

    Example:
        >>> posterior, prior = jnp.array([[90.0, 0.0]] * 3), jnp.zeros((3, 2))
        >>> loss = balanced_kl_loss(
        ...     posterior,
        ...     prior,
        ...     dynamics_coefficient=0.5,
        ...     representation_coefficient=0.5,
        ... )
        >>> round(loss.item(), 4)  # 3 log 2
        2.0794

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    posterior, prior = keep_where(mask_t, posterior_logits, prior_logits)
    held = stop_gradient_if(stop_target_gradients, (posterior, prior))
    dynamics = _divergence_above(free_nats, held[0], prior)
    representation = _divergence_above(free_nats, posterior, held[1])
    losses = (
        dynamics_coefficient * dynamics + representation_coefficient * representation
    )
    return reduced(losses, mask_t, reduction)


@checked
def imagination_weights(
    discount_t: Annotated[Arg, "f[T]"], *, use_stop_gradient: Flag = True
) -> Annotated[Array, "f[T]"]:
    r"""Computes how likely an imagined trajectory is to get as far as each step.

    .. math::
        w_{t-1} = \prod_{k=1}^{t-1} \gamma_k, \qquad w_0 = 1

    The discount is that of the agent times the predicted probability of going on, so
    that the weight is that of the step in the objective. It is for whatever is averaged
    over imagined states: the losses of actor and critic. Unlike in a trajectory that
    was lived through, nothing starts anew after a discount of 0: all that follows has
    weight 0, whatever its discounts.

    The state that the trajectory starts from has weight 1. Where it may itself be the
    end of an episode, multiply all weights by its own probability of going on, as
    popular code does.

    Args:
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`: with
            the probability that the step which ends there did not end the episode.
        use_stop_gradient: whether the weights are constants when differentiating,
            `b[]`, as the paper has it.

    Returns:
        Weights of the states at times `0..T-1`, and of the actions taken there, `f[T]`,
        dimensionless.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> imagination_weights(jnp.array([0.5, 0.5, 0.0, 0.5, jnp.nan])).tolist()
        [1.0, 0.5, 0.25, 0.0, 0.0]

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    over = jnp.cumsum(discount_t == 0) > 0
    discounts = jnp.where(over & ~jnp.isfinite(discount_t), 0, discount_t)
    weights = jnp.append(jnp.ones((1,), discounts.dtype), jnp.cumprod(discounts))[:-1]
    return stop_gradient_if(use_stop_gradient, weights)


@checked
def mix_with_uniform(
    logits: Logits,
    *,
    epsilon: Annotated[Arg, "f[]", "[0, 1]"] = 0.01,
    mask: Mask = None,
) -> Annotated[Array, "f[...,A]"]:
    r"""Mixes a little of the uniform distribution into a softmax: unimix.

    .. math::
        \log \Bigl( (1 - \epsilon) \, \pi(a) + \frac{\epsilon}{A} \Bigr),
        \qquad \pi = \text{softmax}(\text{logits})

    No class then becomes impossible, so that divergences stay bounded and gradients
    alive. The result is logits too, as good as any: of a policy, or of a latent state.

    Args:
        logits: logits, `f[...,A]`; minus infinity for what has no probability but that
            of the uniform part.
        epsilon: the share :math:`\epsilon` of the uniform distribution, `f[]`,
            dimensionless, in `[0, 1]`.
        mask: whether each action is legal, `b[...,A]`; all are if `None`. The
            mixture is of legal actions alone.

    Returns:
        Log-probabilities, `f[...,A]`, in nats: minus infinity for what is not legal,
        and NaN where nothing is.

    Raises:
        ValueError: if a shape breaks its contract, or `epsilon` is a Python number
            outside `[0, 1]`.
        TypeError: if `logits` or `epsilon` is not floating-point, or `mask` is not
            boolean.

    Example:
        >>> log_probs = mix_with_uniform(jnp.array([900.0, 0.0]), epsilon=0.5)
        >>> jnp.exp(log_probs).tolist()
        [0.75, 0.25]

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    log_probs, legal = masked_log_softmax(logits, mask), which_legal(logits, mask)
    count = jnp.sum(legal, axis=-1, keepdims=True, dtype=logits.dtype)
    share = jnp.where(legal, epsilon / jnp.maximum(count, 1), 0)
    mixture = (1 - epsilon) * jnp.where(legal, jnp.exp(log_probs), 0) + share
    # Without a uniform part, the logarithm may be of what is too small to represent.
    fits = ~(mixture < jnp.finfo(logits.dtype).tiny)
    return jnp.where(fits, jnp.log(jnp.where(fits, mixture, 1)), log_probs)


@checked
def straight_through_sample(
    key: Annotated[Arg, "k[]"], logits: Logits, *, mask: Mask = None
) -> Annotated[Array, "f[...,A]"]:
    r"""Draws one-hot vectors, whose gradient is that of the probabilities.

    .. math::
        y = \text{one\_hot}(a) + \pi - \bar\pi, \qquad
        a \sim \pi = \text{softmax}(\text{logits})

    where a bar holds the probabilities constant, so that the value is that of the
    one-hot vector, exactly. The gradient is biased, and of low variance.

    Args:
        key: a random key, `k[]`; one is enough for any number of draws.
        logits: logits, `f[...,A]`.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The vectors, `f[...,A]`, a 1 in each and zeros elsewhere; NaN where no action
        is legal.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `logits` is not floating-point, `key` is not a random key, or
            `mask` is not boolean.

    Example:
        >>> logits = jnp.array([[0.0, 90.0], [90.0, 0.0]])
        >>> straight_through_sample(jax.random.key(0), logits).tolist()
        [[0.0, 1.0], [1.0, 0.0]]

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    log_probs = masked_log_softmax(logits, mask)
    drawn = one_hot(draw(key, log_probs), logits.shape[-1], logits.dtype)
    probs = jnp.exp(log_probs)
    return drawn + (probs - stop_gradient_if(True, probs))


def _divergence_above(free: Array, p_logits: Array, q_logits: Array) -> Array:
    """Returns divergences, or what is free where that is more."""
    divergence = jnp.sum(categorical_kl_divergence(p_logits, q_logits), axis=-1)
    return jnp.maximum(divergence, free)

r"""Numbers to watch while an agent learns: what goes wrong before the score does.

==============================  ======================================================
number                          what it tells
==============================  ======================================================
`explained_variance`            how well values predict returns: 1 is perfect, 0 no
                                better than a constant, below 0 worse
`overestimation_gap`            by how much values exceed the returns that followed
`clip_fraction`                 how often PPO's ratios leave the trust region
`action_gap`                    by how much the best action is better than the next
`policy_churn`                  in how many states an update changed the greedy action
`dormant_ratio`                 how many units of a layer hardly ever react
`effective_rank`                how many directions the features of a layer really use
==============================  ======================================================

How far a policy has moved from the one that acted is `kl_estimators.approximate_kl`,
and how many samples are left of a batch under it
`importance_weights.effective_sample_size`.

These are for looking at, not for learning from: shares and ranks have a gradient of
zero. NaN is passed on and never counted as a no. With `axis_name`, a number is that of
the whole batch on all devices, which the mean over devices is not.
"""

from collections.abc import Hashable
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import keep_where
from rlprims.collectives import AllSum
from rlprims.running_statistics import largest, moments
from rlprims.surrogates import clip_range

__all__ = [
    "action_gap",
    "clip_fraction",
    "dormant_ratio",
    "effective_rank",
    "explained_variance",
    "overestimation_gap",
    "policy_churn",
]


@checked
def explained_variance(
    predictions: Annotated[Arg, "f[...]"],
    returns: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes which part of the variance of returns is explained by predictions.

    .. math::
        1 - \frac{\operatorname{Var}[G - v]}{\operatorname{Var}[G]}

    Perfect predictions give 1, a constant gives 0, and there is no lower limit. A
    constant error costs nothing, as it does not in `Var`. Where the returns are all the
    same there is nothing to explain, and the result is defined to be 0; much code gives
    NaN.

    Args:
        predictions: values :math:`v`, `f[...]`.
        returns: the returns :math:`G` that they predict, `f[...]`, in the same units.
        mask_t: whether each pair counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the pairs are split; `None` if they are not.

    Returns:
        The explained part, `f[]`, dimensionless, at most 1; 0 of fewer than two pairs.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> explained_variance(jnp.array([1.0, 3.0]), jnp.array([0.0, 4.0])).item()
        0.75
    """
    mask = None if mask_t is None else mask_t.ravel()
    returns, errors = (x.ravel() for x in (returns, returns - predictions))
    high, low = (largest(sign * returns, mask, axis_name) for sign in (1, -1))
    width = jax.lax.stop_gradient(high + low)  # so that no square is out of range
    width = jnp.where(width <= 0, 1, width)
    spread = moments(returns / width, mask, axis_name).variance
    left = moments(errors / width, mask, axis_name).variance
    explained = 1 - left / jnp.where(spread == 0, 1, spread)
    return jnp.where((spread == 0) & ~jnp.isnan(left), 0, explained)


@checked
def clip_fraction(
    log_prob_t: Annotated[Arg, "f[...]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...]"],
    *,
    epsilon: Annotated[Arg, "f[]|f[...]", "[0, inf]"] = 0.2,
    epsilon_high: Annotated[Arg | None, "f[]|f[...]", "[0, inf]"] = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the share of probability ratios that are outside PPO's trust region.

    .. math::
        \frac1n \sum_t 1\bigl[\rho_t < 1 - \epsilon \text{ or }
            \rho_t > 1 + \epsilon_{\text{high}}\bigr], \qquad
        \rho_t = \frac{\pi(a_t)}{\mu(a_t)}

    Not all of these lose their gradient: one that is outside on the side where the
    advantage would have it back keeps it.

    Args:
        log_prob_t: log-probabilities of the actions taken, under the policy :math:`\pi`
            that learns, `f[...]`, in nats.
        behaviour_log_prob_t: the same under the policy :math:`\mu` that acted,
            `f[...]`.
        epsilon: how far below one a ratio may be, `f[]|f[...]`, dimensionless, not
            negative.
        epsilon_high: how far above one, `f[]|f[...]`; as `epsilon` if `None`.
        mask_t: whether each step counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the steps are split; `None` if they are not.

    Returns:
        The share, `f[]`, dimensionless, in `[0, 1]`; 0 if no step counts.

    Raises:
        ValueError: if a shape breaks its contract, or a limit is a Python number below
            0.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> log_prob, behaviour = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.4]]))
        >>> clip_fraction(log_prob, behaviour).item()  # ratios of 1 and 1.25
        0.5

    References:
        Schulman et al., `Proximal Policy Optimization Algorithms
        <https://arxiv.org/abs/1707.06347>`_, 2017, eq. 7, whose clipping it counts.
    """
    low, high = clip_range(epsilon, epsilon_high)
    changes = jnp.expm1(jax.lax.stop_gradient(log_prob_t - behaviour_log_prob_t))
    beyond = ((changes < low) | (changes > high)).astype(changes.dtype)
    unknown = jnp.isnan(changes) | jnp.isnan(high - low)
    return _mean(jnp.where(unknown, jnp.nan, beyond), mask_t, axis_name)


@checked
def action_gap(
    q: Annotated[Arg, "f[...,A]"],
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes by how much the best action is better than the second best.

    .. math::
        q(a^*) - \max_{a \ne a^*} q(a), \qquad a^* = \operatorname*{argmax}_a q(a)

    It is 0 where two actions share the best value. An error in the values that is
    smaller than half of it does not change the greedy action.

    Args:
        q: action values, `f[...,A]`; minus infinity for an illegal action.
        mask: whether each action is legal, `b[...,A]`. All are if `None`.

    Returns:
        The gaps, `f[...]`, in units of `q`, not negative. Where fewer than two actions
        are legal there is nothing to choose: 0, with no gradient.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> q, mask = jnp.array([1.0, 5.0, 3.0]), jnp.array([True, False, True])
        >>> action_gap(q).item(), action_gap(q, mask=mask).item()
        (2.0, 2.0)

    References:
        Bellemare et al., `Increasing the Action Gap: New Operators for Reinforcement
        Learning <https://arxiv.org/abs/1512.04860>`_, 2015.
    """
    none = jnp.full_like(q, -jnp.inf, shape=(*q.shape[:-1], 2))
    legal = q if mask is None else jnp.where(mask, q, -jnp.inf)
    pair, _ = jax.lax.top_k(jnp.concatenate([legal, none], axis=-1), 2)
    best, second = pair[..., 0], pair[..., 1]
    alone = (second == -jnp.inf) & ~jnp.isnan(best)
    return jnp.where(alone, 0, best - jnp.where(alone, 0, second))


@checked
def overestimation_gap(
    q_t: Annotated[Arg, "f[...]"],
    returns_t: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes by how much values exceed the returns that followed, on average.

    .. math::
        \frac1n \sum_t \bigl(q_t(a_t) - G_t\bigr)

    A maximum over noisy values is too high, and values that learn from it drift
    upwards: the gap then grows although the returns do not. Let the policy that the
    values are of act, without exploring, and take its whole discounted returns, as of
    `discounted_returns`: a return that bootstraps has the values' own error. Leave out
    the steps whose episode was cut before its discounts had faded.

    Args:
        q_t: values of the actions taken, :math:`q_t(a_t)`, or of states, `f[...]`.
        returns_t: the returns :math:`G_t` that followed, `f[...]`, in the same units.
        mask_t: whether each step counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the steps are split; `None` if they are not.

    Returns:
        The gap, `f[]`, in units of return: below 0 where values are too low; 0 of no
        steps.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> overestimation_gap(jnp.array([3.0, 5.0]), jnp.array([2.0, 4.0])).item()
        1.0

    References:
        van Hasselt, Guez and Silver, `Deep Reinforcement Learning with Double
        Q-learning <https://arxiv.org/abs/1509.06461>`_, 2015.
        Fujimoto et al., `Addressing Function Approximation Error in Actor-Critic
        Methods <https://arxiv.org/abs/1802.09477>`_, 2018.
    """
    return _mean(q_t - returns_t, mask_t, axis_name)


@checked
def policy_churn(
    q: Annotated[Arg, "f[...,A]"],
    new_q: Annotated[Arg, "f[...,A]"],
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the share of states in which an update changed the greedy action.

    .. math::
        \frac1n \sum_s 1\Bigl[\operatorname*{argmax}_a q(s, a)
            \ne \operatorname*{argmax}_a q'(s, a)\Bigr]

    Of several best actions, the greedy one is the first, before and after: that a tie
    is broken or made may or may not show.

    Args:
        q: action values before, `f[...,A]`; logits or probabilities do as well.
        new_q: action values of the same states after, `f[...,A]`.
        mask: whether each action is legal, `b[...,A]`. All are if `None`.
        mask_t: whether each state counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the states are split; `None` if they are not.

    Returns:
        The share, `f[]`, dimensionless, in `[0, 1]`; 0 if no state counts. A state
        where no action is legal has not changed.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> q, new_q = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([[1.0, 0.0]] * 2)
        >>> policy_churn(q, new_q).item()
        0.5
    """
    if mask is not None:
        q, new_q = (jnp.where(mask, x, -jnp.inf) for x in (q, new_q))
    changed = jnp.argmax(q, axis=-1) != jnp.argmax(new_q, axis=-1)
    unknown = (jnp.isnan(q) | jnp.isnan(new_q)).any(axis=-1)
    changed = jnp.where(unknown, jnp.nan, changed.astype(q.dtype))
    return _mean(changed, mask_t, axis_name)


@checked
def dormant_ratio(
    activations: Annotated[Arg, "f[...,D]"],
    *,
    threshold: Annotated[Arg, "f[]", "[0, inf)"],
    mask: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the share of units in a layer that hardly react to any input.

    .. math::
        \frac1D \sum_i 1[s_i \le \tau], \qquad
        s_i = \frac{\overline{|h_i|}}{\frac1D \sum_j \overline{|h_j|}}

    The bars are means over inputs. For a network, take the mean over its layers,
    weighted by how many units each has.

    Args:
        activations: outputs :math:`h` of the `D` units of a layer, after its activation
            function, for each input, `f[...,D]`, in any units.
        threshold: the score :math:`\tau` up to which a unit is dormant, `f[]`,
            dimensionless, not negative; at 0, only units that are always 0 are.
        mask: whether each input counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the inputs are split; `None` if they are not.

    Returns:
        The share, `f[]`, dimensionless, in `[0, 1]`; 1 where all units are always 0, 0
        if no input counts, NaN if an activation that counts is not finite.

    Raises:
        ValueError: if a shape breaks its contract, or `threshold` is a Python number
            below 0.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> activations = jnp.array([[0.0, 1.0, 2.0], [0.0, -1.0, 2.0]])
        >>> round(dormant_ratio(activations, threshold=0.1).item(), 3)
        0.333

    References:
        Sokar et al., `The Dormant Neuron Phenomenon in Deep Reinforcement Learning
        <https://arxiv.org/abs/2302.12902>`_, 2023.
    """
    sizes, one = keep_where(mask, jnp.abs(activations), jnp.ones_like(activations))
    total, over = AllSum(axis_name), tuple(range(activations.ndim - 1))
    counts = total(one, axis=over)
    sizes = total(sizes, axis=over) / jnp.maximum(counts, 1)
    limit = threshold * jnp.mean(sizes)
    dormant = jnp.mean((sizes <= limit) & (counts > 0), dtype=sizes.dtype)
    return jnp.where(jnp.isfinite(limit), dormant, jnp.nan)


@checked
def effective_rank(
    features: Annotated[Arg, "f[...,N,D]"],
    *,
    delta: Annotated[Arg, "f[]", "[0, 1]"] = 0.01,
    mask: Annotated[Arg | None, "b[...,N]"] = None,
) -> Annotated[Array, "i[...]"]:
    r"""Counts the singular values that make up nearly all of a matrix of features.

    .. math::
        \min\Bigl\{k : \frac{\sum_{i \le k} \sigma_i}{\sum_i \sigma_i}
            \ge 1 - \delta\Bigr\}, \qquad \sigma_1 \ge \sigma_2 \ge \dots

    This is the srank of Kumar et al. Other numbers go by the same name, such as the
    exponential of the entropy of the normalised singular values. The features are not
    centred, and multiplying them by a number changes nothing.

    Args:
        features: features of `N` states, `f[...,N,D]`, in any units.
        delta: the share :math:`\delta` of the sum to do without, `f[]`, dimensionless,
            in `[0, 1]`. At 0, it is rounding that decides what counts.
        mask: whether each state counts, `b[...,N]`: the others are as if left out, NaN
            included. All count if `None`.

    Returns:
        The ranks, `i[...]`, from 1 to the smaller of `N` and `D`; 0 where the features
        are all zero, no state counts or `delta` is 1; -1 where a feature that counts is
        not finite.

    Raises:
        ValueError: if a shape breaks its contract, or `delta` is a Python number
            outside `[0, 1]`.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> effective_rank(jnp.diag(jnp.array([8.0, 2.0, 0.01]))).item()
        2

    References:
        Kumar et al., `Implicit Under-Parameterization Inhibits Data-Efficient Deep
        Reinforcement Learning <https://arxiv.org/abs/2010.14498>`_, 2020.
    """
    (features,) = keep_where(mask, features)
    finite = jnp.isfinite(features).all(axis=(-2, -1))
    (features,) = keep_where(finite, features)
    sigmas = jnp.linalg.svd(features, compute_uv=False)
    sums = jnp.cumsum(sigmas, axis=-1)
    before = sums - sigmas  # of those before each: nothing, for the first
    limit = (1 - delta) * sums[..., -1:]
    ranks = jnp.sum(before < limit, axis=-1)
    return jnp.where(finite & ~jnp.isnan(delta), ranks, -1)


def _mean(x: Array, mask: Array | None, axis_name: Hashable | None) -> Array:
    """Returns the mean over what counts, on all devices; 0 if nothing does."""
    x, one = keep_where(mask, x, jnp.ones_like(x))
    total = AllSum(axis_name)
    return total(x) / jnp.maximum(total(one), 1)

r"""Policies learned from data alone, by imitating the actions that turned out well.

A policy that climbs a critic soon leaves the data, and learns from values of actions
that nobody has tried. One that imitates the data stays where values are known, and
improves on it by imitating good actions more:

.. math::
    L = -w_t \log \pi(a_t)

What sets the algorithms apart is the weight :math:`w_t`, a function of the advantage:

======================================  ===============================
algorithm                               weight
======================================  ===============================
behaviour cloning                       1
advantage-weighted regression (AWR)     `exponential_advantage_weights`
advantage-weighted actor-critic (AWAC)  `exponential_advantage_weights`
implicit Q-learning (IQL)               `exponential_advantage_weights`
critic-regularised regression (CRR)     `exponential_advantage_weights`
                                        or `binary_advantage_weights`
======================================  ===============================

`behaviour_cloning_loss` takes any of them:

>>> log_prob_t, adv_t = jnp.array([-1.0, -2.0]), jnp.array([0.0, -jnp.inf])
>>> weight_t = exponential_advantage_weights(adv_t, temperature=1.0, max_weight=20.0)
>>> behaviour_cloning_loss(log_prob_t, weight_t=weight_t).item()  # (1 + 0) / 2
0.5

Weights that sum to one over a batch are those of `self_normalized_importance_weights`
for the advantage over the temperature.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from rlprims._checks import Arg, Flag, checked
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction
from rlprims.surrogates import log_prob_policy_gradient_loss

__all__ = [
    "behaviour_cloning_loss",
    "binary_advantage_weights",
    "exponential_advantage_weights",
]


@checked
def behaviour_cloning_loss(
    log_prob_t: Annotated[Arg, "f[...]"],
    *,
    weight_t: Annotated[Arg | None, "f[...]"] = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of a policy that imitates the actions in the data.

    .. math::
        L = -w_t \log \pi(a_t)

    It is the negative log-likelihood of the data, where each action may have a weight.
    The mean is over all actions: weights are not made to sum to one.

    Args:
        log_prob_t: log-probabilities of the actions in the data, under the policy to
            improve, `f[...]`, in nats.
        weight_t: weight of each action, `f[...]`, dimensionless; 0 leaves the action
            out, however unlikely it is. All are 1 if `None`.
        mask_t: whether each action counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether weights are constants when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the actions that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each action, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `mask_t` is not boolean, or another argument is not
            floating-point.

    Example:
        >>> log_prob_t, weight_t = jnp.array([-1.0, -3.0]), jnp.array([2.0, 0.0])
        >>> behaviour_cloning_loss(log_prob_t).item()
        2.0
        >>> behaviour_cloning_loss(log_prob_t, weight_t=weight_t).item()
        1.0

    References:
        Peng et al., `Advantage-Weighted Regression: Simple and Scalable Off-Policy
        Reinforcement Learning <https://arxiv.org/abs/1910.00177>`_, 2019.
        Kostrikov, Nair and Levine, `Offline Reinforcement Learning with Implicit
        Q-Learning <https://arxiv.org/abs/2110.06169>`_, 2021.
    """
    return log_prob_policy_gradient_loss(
        log_prob_t,
        jnp.ones_like(log_prob_t) if weight_t is None else weight_t,
        mask_t=mask_t,
        use_stop_gradient=use_stop_gradient,
        reduction=reduction,
    )


@checked
def binary_advantage_weights(
    adv_t: Annotated[Arg, "f[...]"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes weights that keep the actions that are better than the policy's.

    .. math::
        w_t = 1[A_t > 0]

    There is no scale to choose, and no gradient.

    Args:
        adv_t: advantages :math:`A_t` of the actions in the data, `f[...]`, in units of
            return.

    Returns:
        The weights, `f[...]`, dimensionless: 1, 0, or NaN where an advantage is.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `adv_t` is not floating-point.

    Example:
        >>> binary_advantage_weights(jnp.array([2.0, 0.0, -1.0])).tolist()
        [1.0, 0.0, 0.0]

    References:
        Wang et al., `Critic Regularized Regression
        <https://arxiv.org/abs/2006.15134>`_, 2020.
    """
    known = jnp.where(adv_t > 0, 1, 0).astype(adv_t.dtype)
    return jnp.where(jnp.isnan(adv_t), jnp.nan, known)


@checked
def exponential_advantage_weights(
    adv_t: Annotated[Arg, "f[...]"],
    *,
    temperature: Annotated[Arg, "f[]|f[...]", "(0, inf)"],
    max_weight: Annotated[Arg, "f[]", "(0, inf]"],
    use_stop_gradient: Flag = True,
) -> Annotated[Array, "f[...]"]:
    r"""Computes weights that grow exponentially with the advantage, up to a limit.

    .. math::
        w_t = \min\bigl(e^{A_t / \beta}, w_{\max}\bigr)

    Without the limit these are the weights of the policy that gains most within a
    bounded divergence from the one that acted. The colder, the closer it is to taking
    the best action of the data; the hotter, the closer to behaviour cloning.

    Implicit Q-learning multiplies by an inverse temperature instead: give its inverse.
    The papers limit weights to 20 (AWR, CRR) or not at all (AWAC), and popular code of
    IQL to 100. An advantage whose exponential overflows has the greatest weight.

    Args:
        adv_t: advantages :math:`A_t` of the actions in the data, `f[...]`, in units of
            return.
        temperature: temperature :math:`\beta`, `f[]|f[...]`, in units of return,
            positive.
        max_weight: greatest weight :math:`w_{\max}`, `f[]`, dimensionless, positive;
            infinity for no limit.
        use_stop_gradient: whether weights are constants when differentiating, `b[]`.

    Returns:
        The weights, `f[...]`, dimensionless, in `[0, max_weight]`.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of its range.
        TypeError: if an argument is not floating-point.

    Example:
        >>> adv_t = jnp.array([-jnp.inf, 0.0, 1e9])
        >>> exponential_advantage_weights(
        ...     adv_t, temperature=0.5, max_weight=20.0
        ... ).tolist()
        [0.0, 1.0, 20.0]

    References:
        Peng et al., `Advantage-Weighted Regression: Simple and Scalable Off-Policy
        Reinforcement Learning <https://arxiv.org/abs/1910.00177>`_, 2019.
        Nair et al., `Accelerating Online Reinforcement Learning with Offline Datasets
        <https://arxiv.org/abs/2006.09359>`_, 2020.
        Wang et al., `Critic Regularized Regression
        <https://arxiv.org/abs/2006.15134>`_, 2020.
        Kostrikov, Nair and Levine, `Offline Reinforcement Learning with Implicit
        Q-Learning <https://arxiv.org/abs/2110.06169>`_, 2021.
    """
    exponents = stop_gradient(adv_t / temperature)
    sloped = jnp.isfinite(exponents) & (exponents < jnp.log(max_weight))
    inside = jnp.exp(jnp.where(sloped, adv_t, 0) / temperature)
    beyond = jnp.minimum(jnp.exp(exponents), max_weight)
    return stop_gradient_if(use_stop_gradient, jnp.where(sloped, inside, beyond))

r"""Rewards for what an agent cannot predict yet, and losses of what predicts it.

What was seen often is predicted well, so the error of a prediction tells how new an
observation is. The two ways to be curious differ in what they predict:

*   Random network distillation (RND): the output of a fixed random network, from the
    observation that it sees. `rnd_loss` trains the predictor.
*   The intrinsic curiosity module (ICM): the features of the next observation, from
    those of this one and the action. `icm_loss`, or `icm_continuous_loss`, trains this
    forward model, and with it the features: they must tell which action was taken, and
    need not hold what no action can change.

`prediction_error_rewards` is the reward of both. RND puts everything on one scale, for
which the package has functions. Observations are normalised and clipped, and rewards
are divided by the deviation of their discounted sums:

    >>> import rlprims
    >>> observations = 50 + 9 * jax.random.normal(jax.random.key(0), (10, 3))
    >>> seen = rlprims.RunningStatistics(jnp.zeros(3), jnp.zeros(3))
    >>> seen = rlprims.update_running_statistics(seen, observations)
    >>> inputs = rlprims.normalize_by_running_statistics(seen, observations, max_abs=5)
    >>> predicted, features = jnp.zeros((10, 3)), jnp.tanh(inputs)  # from networks
    >>> r_t = prediction_error_rewards(predicted, features).reshape(5, 2)  # [T, B]
    >>> discount_t = jnp.full(2, 0.99)
    >>> def step(scale, r_t):
    ...     return rlprims.scale_rewards(scale, r_t, discount_t)[::-1]
    >>> scale, r_t = jax.lax.scan(step, rlprims.RewardScale(jnp.zeros(2)), r_t)

These discounts are not zero where an episode ends, and neither are those of returns:
what is new stays new, so an end costs nothing. A value function of its own learns such
returns, while that of the task's rewards keeps the discounts of its episodes:

    >>> v_tm1, v_t = jnp.zeros(5), jnp.zeros(5)
    >>> adv = rlprims.generalized_advantage_estimation(
    ...     v_tm1, r_t[:, 0], jnp.full(5, 0.99), v_t, 0.95
    ... )
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import batched_index, keep_where, weighted
from rlprims.categorical import masked_log_softmax
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced

__all__ = [
    "icm_continuous_loss",
    "icm_loss",
    "prediction_error_rewards",
    "rnd_loss",
]

Features = Annotated[Arg, "f[...,D]"]
Actions = Annotated[Arg, "f[...,A]"]
Mask = Annotated[Arg | None, "b[...]"]
Loss = Annotated[Array, "f[]|f[...]"]


@checked
def icm_continuous_loss(
    predicted_features_t: Features,
    predicted_a_tm1: Actions,
    a_tm1: Actions,
    features_t: Features,
    *,
    beta: Annotated[Arg, "f[]", "[0, 1]"] = 0.2,
    mask_t: Mask = None,
    stop_target_gradients: Flag = False,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of an intrinsic curiosity module for continuous actions.

    .. math::
        L = \frac{1 - \beta}{2} \lVert \hat a_{t-1} - a_{t-1} \rVert^2
            + \frac{\beta}{2} \lVert \hat\phi_t - \phi_t \rVert^2

    The paper has a finite number of actions, as `icm_loss`, and maximises their
    likelihood. So does this, for a normal distribution of variance one around the
    prediction. All else is as there.

    Args:
        predicted_features_t: features :math:`\hat\phi_t` at times `t` that the forward
            model predicts from those before and the action, `f[...,D]`.
        predicted_a_tm1: the action :math:`\hat a_{t-1}` that the inverse model predicts
            from the features before and after, `f[...,A]`.
        a_tm1: the action taken, `f[...,A]`, in units of `predicted_a_tm1`.
        features_t: the features :math:`\phi_t` there were, `f[...,D]`.
        beta: weight :math:`\beta` of the forward model, `f[]`, dimensionless, in
            `[0, 1]`; the paper has 0.2.
        mask_t: whether each step counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        stop_target_gradients: whether to hold `features_t` constant, `b[]`. `a_tm1` is
            what happened, and differentiable.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`.

    Raises:
        ValueError: if a shape breaks its contract, or `beta` is a Python number outside
            `[0, 1]`.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> features, action = jnp.array([0.0, 3.0]), jnp.array([1.0])
        >>> icm_continuous_loss(  # (0.5 * 2**2 + 0.5 * 4**2) / 2
        ...     features, action, jnp.array([3.0]), jnp.array([4.0, 3.0]), beta=0.5
        ... ).item()
        5.0

    References:
        Pathak et al., `Curiosity-driven Exploration by Self-supervised Prediction
        <https://arxiv.org/abs/1705.05363>`_, 2017.
    """
    features_t = stop_gradient_if(stop_target_gradients, features_t)
    inverse = 0.5 * _squared_distances(predicted_a_tm1, a_tm1, mask_t)
    forward = 0.5 * _squared_distances(predicted_features_t, features_t, mask_t)
    return reduced(_joint(inverse, forward, beta), mask_t, reduction)


@checked
def icm_loss(
    predicted_features_t: Features,
    logits_tm1: Actions,
    a_tm1: Annotated[Arg, "i[...]"],
    features_t: Features,
    *,
    beta: Annotated[Arg, "f[]", "[0, 1]"] = 0.2,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
    mask_t: Mask = None,
    stop_target_gradients: Flag = False,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of an intrinsic curiosity module, for a number of actions.

    .. math::
        L = -(1 - \beta) \log p(a_{t-1} \mid \phi_{t-1}, \phi_t)
            + \frac{\beta}{2} \lVert \hat\phi_t - \phi_t \rVert^2

    The norm is a sum over features. Popular code takes their mean instead, which
    weights the forward model less the more features there are.

    The paper minimises both parts jointly, and so does this by default: the forward
    model teaches the features to be easy to predict too. Popular code often stops
    that, here by `stop_target_gradients` for the features after the action. Those
    before it reach `predicted_features_t` and are the caller's to hold constant.

    Args:
        predicted_features_t: features :math:`\hat\phi_t` at times `t` that the forward
            model predicts from those before and the action, `f[...,D]`.
        logits_tm1: logits :math:`p` of the inverse model, which predicts the action
            from the features before and after, `f[...,A]`.
        a_tm1: the action taken, `i[...]`, in `[0, A)`; outside, the loss is NaN.
        features_t: the features :math:`\phi_t` there were, `f[...,D]`.
        beta: weight :math:`\beta` of the forward model, `f[]`, dimensionless, in
            `[0, 1]`; the paper has 0.2.
        mask: whether each action was legal, `b[...,A]`. All were if `None`.
        mask_t: whether each step counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        stop_target_gradients: whether to hold `features_t` constant, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in nats where the features are
        dimensionless.

    Raises:
        ValueError: if a shape breaks its contract, or `beta` is a Python number outside
            `[0, 1]`.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> features, logits = jnp.array([0.0, 3.0]), jnp.array([90.0, 0.0])
        >>> icm_loss(features, logits, 0, jnp.array([4.0, 3.0]), beta=0.5).item()
        4.0

    References:
        Pathak et al., `Curiosity-driven Exploration by Self-supervised Prediction
        <https://arxiv.org/abs/1705.05363>`_, 2017.
    """
    features_t = stop_gradient_if(stop_target_gradients, features_t)
    (logits,) = keep_where(mask_t, logits_tm1)
    log_probs = batched_index(masked_log_softmax(logits, mask), a_tm1)
    (inverse,) = keep_where(mask_t, -log_probs)  # padding may have no legal action
    forward = 0.5 * _squared_distances(predicted_features_t, features_t, mask_t)
    return reduced(_joint(inverse, forward, beta), mask_t, reduction)


@checked
def prediction_error_rewards(
    predicted_features_t: Features,
    features_t: Features,
    *,
    scale: Annotated[Arg, "f[]", "[0, inf)"] = 1.0,
    mask_t: Mask = None,
    use_stop_gradient: Flag = True,
) -> Annotated[Array, "f[...]"]:
    r"""Rewards observations for features that were not predicted.

    .. math::
        r_t = \text{scale} \, \lVert \hat\phi_t - \phi_t \rVert^2

    This is the reward of RND, and with a scale of :math:`\eta / 2` that of ICM. The
    norm is a sum over features, as in the papers. Popular code takes their mean: once
    rewards are divided by their deviation, it is all the same.

    Args:
        predicted_features_t: what was predicted :math:`\hat\phi_t` of the observation
            at times `t`, which the action led to, `f[...,D]`.
        features_t: what there was :math:`\phi_t`, `f[...,D]`: for RND, the output of
            the fixed random network.
        scale: what to multiply by, `f[]`, in units of reward per squared unit of
            features, not negative.
        mask_t: whether each step counts, `b[...]`: the others, padding say, have a
            reward of 0, whatever they hold. All count if `None`.
        use_stop_gradient: whether the rewards are constants when differentiating,
            `b[]`.

    Returns:
        The rewards, `f[...]`, not negative.

    Raises:
        ValueError: if a shape breaks its contract, or `scale` is a Python number below
            0.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> predicted, features = jnp.array([[0.0, 3.0]]), jnp.array([[4.0, 0.0]])
        >>> prediction_error_rewards(predicted, features).tolist()
        [25.0]

    References:
        Burda et al., `Exploration by Random Network Distillation
        <https://arxiv.org/abs/1810.12894>`_, 2018.
        Pathak et al., `Curiosity-driven Exploration by Self-supervised Prediction
        <https://arxiv.org/abs/1705.05363>`_, 2017.
    """
    squares = _squared_distances(predicted_features_t, features_t, mask_t)
    return stop_gradient_if(use_stop_gradient, weighted(squares, scale))


@checked
def rnd_loss(
    predicted_features_t: Features,
    features_t: Features,
    *,
    mask_t: Mask = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of the predictor in random network distillation.

    .. math::
        L_t = \lVert \hat f(s_t) - f(s_t) \rVert^2

    The norm is a sum over features, as in the paper. Popular code takes their mean, so
    that a learning rate tuned there is to be divided by their number.

    The more environments there are, the sooner novelty wears off. The paper therefore
    trains the predictor on a random share of the steps. That is a `mask_t`, such as
    `jax.random.bernoulli(key, 0.25, features_t.shape[:-1])`; the mean is over the steps
    that are left.

    Args:
        predicted_features_t: output :math:`\hat f(s_t)` of the predictor, `f[...,D]`.
        features_t: output :math:`f(s_t)` of the fixed random network, `f[...,D]`.
        mask_t: whether each step counts, `b[...]`: the others are as if left out, NaN
            included. All count if `None`.
        stop_target_gradients: whether to hold `features_t` constant, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in squared units of features.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> predicted = jnp.array([[0.0, 3.0], [1.0, 1.0]])
        >>> features = jnp.array([[4.0, 0.0], [1.0, 2.0]])
        >>> rnd_loss(predicted, features).item()  # (25 + 1) / 2
        13.0

    References:
        Burda et al., `Exploration by Random Network Distillation
        <https://arxiv.org/abs/1810.12894>`_, 2018.
    """
    features_t = stop_gradient_if(stop_target_gradients, features_t)
    squares = _squared_distances(predicted_features_t, features_t, mask_t)
    return reduced(squares, mask_t, reduction)


def _squared_distances(x: Array, y: Array, mask: Array | None) -> Array:
    x, y = keep_where(mask, x, y)
    return jnp.sum((x - y) ** 2, axis=-1)


def _joint(inverse: Array, forward: Array, beta: Array) -> Array:
    """Mixes two losses, each of which may be infinite where its weight is zero."""
    return weighted(inverse, 1 - beta) + weighted(forward, beta)

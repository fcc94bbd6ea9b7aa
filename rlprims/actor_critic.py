r"""What an actor-critic minimises beside its policy loss: value, entropy, its past.

*   `clipped_value_loss` moves the critic no further from its old self than PPO moves
    the policy.
*   `entropy_bonus_loss` and `sample_entropy_loss` keep the policy exploring, by its
    entropy where that is known, and by samples where it is not.
*   `self_imitation_policy_loss` and `self_imitation_value_loss` learn again from what
    went better than expected.

They are added up with weights of one's own.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where, weighted
from rlprims.gradients import stop_gradient_if, td_error
from rlprims.losses import Reduction, l2_loss, reduced

__all__ = [
    "clipped_value_loss",
    "entropy_bonus_loss",
    "sample_entropy_loss",
    "self_imitation_policy_loss",
    "self_imitation_value_loss",
]


@checked
def clipped_value_loss(
    v_t: Annotated[Arg, "f[...]"],
    behaviour_v_t: Annotated[Arg, "f[...]"],
    target_t: Annotated[Arg, "f[...]"],
    *,
    epsilon: Annotated[Arg, "f[]|f[...]", "[0, inf]"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the squared error of values clipped near what they were, as PPO does.

    The larger of the errors with and without the clip counts, so that there is nothing
    to gain from moving a value by more than `epsilon` towards its target.

    .. math::
        L = \frac1T \sum_t \tfrac12 \max\Bigl((v_t - G_t)^2, \;
            \bigl(\operatorname{clip}(v_t, u_t - \epsilon, u_t + \epsilon)
                - G_t\bigr)^2\Bigr)

    The half is that of `l2_loss`, and of the first code of PPO, which multiplies by a
    weight of a half once more; the paper below writes it without. Some code takes the
    clipped error alone, not the larger, and so has no gradient beyond the clip, not
    even back.

    Args:
        v_t: values to improve, `f[...]`, in units of return.
        behaviour_v_t: what they were when acting, :math:`u_t`, `f[...]`.
        target_t: returns :math:`G_t` to predict, `f[...]`.
        epsilon: how far a value may usefully move, `f[]|f[...]`, in units of return,
            which a ratio's is not, not negative.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether targets and old values are constants when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in squared units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `epsilon` is a Python number
            below 0.
        TypeError: if an argument is not floating-point.

    Example:
        >>> v, target = jnp.array([2.0, -2.0]), jnp.array([2.0, 2.0])
        >>> clipped_value_loss(
        ...     v, jnp.zeros(2), target, epsilon=1.0, reduction="none"
        ... ).tolist()  # as if it were 1, and as it is
        [0.5, 8.0]

    References:
        Engstrom et al., `Implementation Matters in Deep Policy Gradients: A Case Study
        on PPO and TRPO <https://arxiv.org/abs/2005.12729>`_, 2020.
    """
    v, old, target = keep_where(mask_t, v_t, behaviour_v_t, target_t)
    old = stop_gradient_if(stop_target_gradients, old)
    near = jnp.clip(v, old - epsilon, old + epsilon)
    errors = (td_error(x, target, stop_target_gradients) for x in (v, near))
    return reduced(jnp.maximum(*map(l2_loss, errors)), mask_t, reduction)


@checked
def entropy_bonus_loss(
    entropy_t: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the negative mean of entropies, to be minimised.

    .. math::
        L = -\frac1T \sum_t H_t

    For logits there is `entropy_loss`, and where no entropy is known
    `sample_entropy_loss`.

    Args:
        entropy_t: entropies of the policy at each step, `f[...]`, in nats.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `entropy_t` is not floating-point.

    Example:
        >>> entropy_bonus_loss(jnp.array([1.0, 3.0])).item()
        -2.0

    References:
        Williams and Peng, `Function Optimization using Connectionist Reinforcement
        Learning Algorithms <https://doi.org/10.1080/09540099108946587>`_, 1991.
    """
    return reduced(-entropy_t, mask_t, reduction)


@checked
def sample_entropy_loss(
    log_prob_t: Annotated[Arg, "f[...]"],
    *,
    gradient: Literal["pathwise", "score_function"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Estimates the negative entropy of a policy from its own actions.

    .. math::
        L = \frac1T \sum_t \log \pi(a_t), \qquad a_t \sim \pi

    How its gradient comes about must be said. An action that is a function of the
    parameters and of noise, as that of a squashed Gaussian, carries it: `"pathwise"`
    differentiates the equation as it stands. Through an action that is a constant the
    equation has a gradient of zero on average, which popular code adds nonetheless;
    `"score_function"` has the same value and the gradient

    .. math::
        \nabla L = \frac1T \sum_t \log \pi(a_t) \, \nabla \log \pi(a_t)

    Args:
        log_prob_t: log-probabilities of actions under the policy that drew them,
            `f[...]`, in nats.
        gradient: `"pathwise"` if gradients flow through the actions, and
            `"score_function"` if the actions are constants.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract, or there is no such `gradient`.
        TypeError: if `log_prob_t` is not floating-point.

    Example:
        >>> loss = lambda x: sample_entropy_loss(x, gradient="score_function")
        >>> value, slope = jax.value_and_grad(loss)(jnp.array([-3.0]))
        >>> value.item(), slope.item()
        (-3.0, -3.0)

    References:
        Williams and Peng, `Function Optimization using Connectionist Reinforcement
        Learning Algorithms <https://doi.org/10.1080/09540099108946587>`_, 1991.
    """
    (losses,) = keep_where(mask_t, log_prob_t)
    if gradient == "score_function":
        score = jnp.where(jnp.isfinite(losses), losses, 0)
        losses, still = jax.lax.stop_gradient((losses, score))
        losses += still * (score - still)  # nothing but a gradient
    return reduced(losses, mask_t, reduction)


@checked
def self_imitation_policy_loss(
    log_prob_t: Annotated[Arg, "f[...]"],
    v_t: Annotated[Arg, "f[...]"],
    return_t: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss that repeats past actions which did better than expected.

    .. math::
        L = -\frac1T \sum_t \max(R_t - v_t, 0) \log \pi(a_t)

    A step that did no better has no effect, but counts in `T`: with
    `mask_t=return_t > v_t` the mean is over the others.

    Args:
        log_prob_t: log-probabilities of past actions, under the policy to improve,
            `f[...]`, in nats.
        v_t: values of the states they were taken in, `f[...]`, in units of return.
        return_t: returns :math:`R_t` that followed, `f[...]`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether returns and values are constants when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> log_prob, v, returns = jnp.full(2, -2.0), jnp.ones(2), jnp.array([4.0, 0.0])
        >>> self_imitation_policy_loss(log_prob, v, returns).item()  # (3 * 2 + 0) / 2
        3.0

    References:
        Oh et al., `Self-Imitation Learning <https://arxiv.org/abs/1806.05635>`_, 2018,
        eq. 2.
    """
    log_prob, v, returns = keep_where(mask_t, log_prob_t, v_t, return_t)
    gains = stop_gradient_if(use_stop_gradient, jax.nn.relu(returns - v))
    return reduced(-weighted(log_prob, gains), mask_t, reduction)


@checked
def self_imitation_value_loss(
    v_t: Annotated[Arg, "f[...]"],
    return_t: Annotated[Arg, "f[...]"],
    *,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    stop_target_gradients: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss that raises values to past returns which were better.

    .. math::
        L = \frac1T \sum_t \tfrac12 \max(R_t - v_t, 0)^2

    Args:
        v_t: values of past states, `f[...]`, in units of return.
        return_t: returns :math:`R_t` that followed, `f[...]`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether the returns are constants when differentiating,
            `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in squared units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> v, returns = jnp.ones(2), jnp.array([4.0, 0.0])
        >>> self_imitation_value_loss(v, returns).item()  # (9 / 2 + 0) / 2
        2.25

    References:
        Oh et al., `Self-Imitation Learning <https://arxiv.org/abs/1806.05635>`_, 2018,
        eq. 2.
    """
    v, returns = keep_where(mask_t, v_t, return_t)
    errors = jax.nn.relu(td_error(v, returns, stop_target_gradients))
    return reduced(l2_loss(errors), mask_t, reduction)

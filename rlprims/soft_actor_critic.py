r"""Soft actor-critic: a policy that seeks return and stays as random as it can afford.

Entropy is worth something: the soft value of a state counts, besides the values of
actions, :math:`-\alpha \log \pi` of the action drawn, where the temperature
:math:`\alpha` is the price of entropy. Three parts learn, each from a function of its
own, for which the other parts are constants by default:

======================  ========================================  ==================
function                trains                                    held constant
======================  ========================================  ==================
`sac_critic_errors`     the critics, by `q_tm1`                   the target
`sac_actor_loss`        the policy, by `log_prob_t` and, through  the temperature
                        the action, by `q_t`
`sac_temperature_loss`  the temperature                           `log_prob_t`
======================  ========================================  ==================

These are for continuous actions, drawn with their log-probabilities, as
`tanh_gaussian_sample_and_log_prob` does. `discrete_soft_actor_critic` has the same for
a finite number of actions.

An ensemble of critics lies along the first axis, where `jax.vmap` over parameters puts
it, and its minimum counts, as in the paper. For another reduction, such as the mean of
randomised ensembles, pass its result as an ensemble of one, `value[None]`.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import contain_nonfinite, keep_where, weighted
from rlprims.ensembles import ensemble_td_learning, minimum_of
from rlprims.gaussians import half_width
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced

__all__ = [
    "continuous_target_entropy",
    "sac_actor_loss",
    "sac_critic_errors",
    "sac_temperature_loss",
]

Values = Annotated[Arg, "f[...]"]
Temperature = Annotated[Arg, "f[]|f[...]", "[0, inf)"]
Loss = Annotated[Array, "f[]|f[...]"]


@checked
def continuous_target_entropy(
    minimum: Annotated[Arg, "f[A]"],
    maximum: Annotated[Arg, "f[A]"],
    *,
    per_dimension: Annotated[Arg, "f[]"] = -1.0,
) -> Annotated[Array, "f[]"]:
    r"""Computes how random a policy over continuous actions should be.

    .. math::
        \bar H = \sum_{i=1}^A \bigl(e + \log \tfrac12
            (\text{maximum}_i - \text{minimum}_i)\bigr)

    For actions in `[-1, 1]` this is minus the number of components, as in the paper. An
    entropy depends on the units of actions: the second term keeps the target as strict
    where log-probabilities are those of actions within other bounds. If yours are of
    actions in `[-1, 1]`, rescaled later, give -1 and 1.

    Args:
        minimum: least action, `f[A]`, in the units of log-probabilities' actions.
        maximum: greatest action, `f[A]`, in the same units, above `minimum`; else the
            result is NaN.
        per_dimension: target :math:`e` for each component in `[-1, 1]`, `f[]`, in nats;
            a uniform policy has log 2.

    Returns:
        The target, `f[]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> continuous_target_entropy(-jnp.ones(3), jnp.ones(3)).item()
        -3.0

    References:
        Haarnoja et al., `Soft Actor-Critic Algorithms and Applications
        <https://arxiv.org/abs/1812.05905>`_, 2018, appendix D.
    """
    return jnp.sum(per_dimension + jnp.log(half_width(minimum, maximum)))


@checked
def sac_actor_loss(
    log_prob_t: Values,
    q_t: Annotated[Arg, "f[N,...]"],
    *,
    temperature: Temperature,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of a policy over continuous actions.

    .. math::
        L = \alpha \log \pi(a_t) - \min_i q_{i, t}(a_t)

    The action has to be drawn from the policy to improve, so that gradients flow into
    it through both terms: they do, to `log_prob_t` and to `q_t`. Differentiate with
    respect to the parameters of the policy alone, as those of the critics would move
    too.

    Args:
        log_prob_t: log-probabilities of the actions drawn, `f[...]`, in nats.
        q_t: values of these actions, by each of `N` critics, `f[N,...]`, in units of
            return.
        temperature: price :math:`\alpha` of entropy, `f[]|f[...]`, in units of return
            per nat, at least 0.
        mask_t: whether each action counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the temperature is a constant when differentiating,
            `b[]`.
        reduction: `"mean"` or `"sum"` over the actions that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each action, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and negative.
        TypeError: if an argument is not floating-point.

    Example:
        >>> q_t = jnp.array([[3.0], [2.0]])  # of two critics, for one action
        >>> sac_actor_loss(jnp.array([-1.0]), q_t, temperature=0.5).item()
        -2.5

    References:
        Haarnoja et al., `Soft Actor-Critic Algorithms and Applications
        <https://arxiv.org/abs/1812.05905>`_, 2018.
    """
    log_prob_t, value_t = keep_where(mask_t, log_prob_t, minimum_of(q_t))
    alpha = stop_gradient_if(use_stop_gradient, temperature)
    return reduced(weighted(log_prob_t, alpha) - value_t, mask_t, reduction)


@checked
def sac_critic_errors(
    q_tm1: Annotated[Arg, "f[N,...]"],
    r_t: Values,
    discount_t: Values,
    q_t: Annotated[Arg, "f[M,...]"],
    log_prob_t: Values,
    *,
    temperature: Temperature,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[N,...]"]:
    r"""Computes the errors of the critics of a policy over continuous actions.

    .. math::
        \delta_i = r_t + \gamma_t \bigl(\min_j q_{j, t}(a_t)
            - \alpha \log \pi(a_t)\bigr) - q_{i, t-1}

    The next action :math:`a_t` is drawn from the present policy, and not the one that
    was taken. All critics share the target.

    Args:
        q_tm1: values of the action taken, by each of `N` critics, `f[N,...]`, in units
            of return.
        r_t: rewards that followed, `f[...]`.
        discount_t: discounts that followed, `f[...]`, dimensionless, in `[0, 1]`; 0 on
            termination, where `q_t` and `log_prob_t` may be anything.
        q_t: values of the next action, by each of `M` target critics, `f[M,...]`, in
            units of return.
        log_prob_t: log-probabilities of the next action, `f[...]`, in nats.
        temperature: price :math:`\alpha` of entropy, `f[]|f[...]`, in units of return
            per nat, at least 0.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The errors of each critic, target minus prediction, `f[N,...]`, in units of
        return.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and negative.
        TypeError: if an argument is not floating-point.

    Example:
        >>> q_tm1, q_t = jnp.array([1.0, 2.0]), jnp.array([4.0, 3.0])
        >>> # 1 + 0.5 * (3 - 2 * -0.5) - 1, and the same less 2
        >>> sac_critic_errors(q_tm1, 1.0, 0.5, q_t, -0.5, temperature=2.0).tolist()
        [2.0, 1.0]

    References:
        Haarnoja et al., `Soft Actor-Critic Algorithms and Applications
        <https://arxiv.org/abs/1812.05905>`_, 2018.
    """
    log_prob_t = contain_nonfinite(log_prob_t, discount_t)
    v_t = minimum_of(q_t) - weighted(log_prob_t, temperature)
    stop = stop_target_gradients
    return ensemble_td_learning(q_tm1, r_t, discount_t, v_t, stop_target_gradients=stop)


@checked
def sac_temperature_loss(
    temperature: Annotated[Arg, "f[]|f[...]"],
    log_prob_t: Values,
    *,
    target_entropy: Annotated[Arg, "f[]|f[...]"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Loss:
    r"""Computes the loss of the temperature, which moves the entropy to a target.

    .. math::
        L = -\alpha \bigl(\log \pi(a_t) + \bar H\bigr)

    The temperature rises where the policy is surer than the target, and falls where it
    is less sure. Gradients flow to it alone, unless told otherwise.

    Pass the exponential of what is learned, to keep it positive: this is the loss of
    the paper, and by :math:`\log \alpha` its gradient is the temperature itself times
    the excess of entropy. Popular code has :math:`-\log \alpha \, (\log \pi + \bar H)`
    instead, whose gradient lacks that factor: pass the logarithm to get it.

    Args:
        temperature: what to learn, :math:`\alpha`, `f[]|f[...]`, in units of return per
            nat.
        log_prob_t: log-probabilities of actions drawn from the policy, `f[...]`, in
            nats.
        target_entropy: target :math:`\bar H`, `f[]|f[...]`, in nats.
        mask_t: whether each action counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether all but the temperature is constant when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the actions that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each action, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> log_prob_t = jnp.array([1.0, 3.0])
        >>> loss = lambda alpha: sac_temperature_loss(
        ...     alpha, log_prob_t, target_entropy=-1.0
        ... )
        >>> jax.grad(loss)(0.5).item()  # -(2 - 1): too sure, so the temperature rises
        -1.0

    References:
        Haarnoja et al., `Soft Actor-Critic Algorithms and Applications
        <https://arxiv.org/abs/1812.05905>`_, 2018, section 5.
    """
    (excess,) = keep_where(mask_t, log_prob_t + target_entropy)
    excess = stop_gradient_if(use_stop_gradient, excess)
    return reduced(-temperature * excess, mask_t, reduction)

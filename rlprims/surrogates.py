r"""Losses of a policy from log-probabilities of its actions, whatever an action is.

The losses of `policy_gradients` start from logits. These start from what every policy
can tell, the log-probability of the action taken: of one action out of many, a vector,
or a structure of both, whose parts `joint_log_prob` adds up. All are to be minimised:

*   `log_prob_policy_gradient_loss` takes one step on the actions of the policy itself.
*   The others take several steps on the same actions. They start from the ratio
    :math:`\rho` of the probability now to that when acting, and differ in what keeps it
    near 1:

=====================================  ===============================================
loss                                   far from 1
=====================================  ===============================================
`ppo_clip_loss`                        has no slope any more
`ppo_kl_penalty_loss`                  costs as much as a divergence says
`discovered_policy_optimization_loss`  has a slope that fades away, or is reversed
`simple_policy_optimization_loss`      is pulled back, the more the further
=====================================  ===============================================

Ratios are made of differences of log-probabilities, in single precision at least. One
that overflows is infinite and has no gradient: where an advantage of zero or a clip
cuts it off, it has no effect, and elsewhere it makes the loss infinite, but nothing
NaN. An action that neither policy could take has a ratio of NaN.

By default what scores an action and what was observed, the advantage and the
log-probability of the policy that acted, are constants when differentiating.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import guarded, keep_where, weighted
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced

__all__ = [
    "discovered_policy_optimization_loss",
    "log_prob_policy_gradient_loss",
    "ppo_clip_loss",
    "ppo_kl_penalty_loss",
    "simple_policy_optimization_loss",
]


@checked
def log_prob_policy_gradient_loss(
    log_prob_t: Annotated[Arg, "f[...]"],
    adv_t: Annotated[Arg, "f[...]"],
    *,
    rho_t: Annotated[Arg | None, "f[...]"] = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the policy-gradient loss of the actions taken: REINFORCE.

    .. math::
        L = -\frac1T \sum_t \rho_t A_t \log \pi(a_t)

    Args:
        log_prob_t: log-probabilities of the actions taken, under the policy to improve,
            `f[...]`, in nats.
        adv_t: advantages :math:`A_t` of these actions, `f[...]`, in units of return; 0
            leaves the step out.
        rho_t: importance weights :math:`\rho_t`, `f[...]`, dimensionless, where another
            policy acted; 0 leaves the step out, NaN included. All are 1 if `None`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether advantages and importance weights are constants when
            differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> log_prob, adv = jnp.array([-1.0, -2.0]), jnp.array([3.0, 0.5])
        >>> log_prob_policy_gradient_loss(log_prob, adv).item()  # (3 + 1) / 2
        2.0

    References:
        Williams, `Simple Statistical Gradient-Following Algorithms for Connectionist
        Reinforcement Learning <https://doi.org/10.1007/BF00992696>`_, 1992.
    """
    log_prob, adv = keep_where(mask_t, log_prob_t, adv_t)
    weights = adv if rho_t is None else weighted(adv, rho_t)
    weights = stop_gradient_if(use_stop_gradient, weights)
    return reduced(-weighted(log_prob, weights), mask_t, reduction)


@checked
def ppo_clip_loss(
    log_prob_t: Annotated[Arg, "f[...]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...]"],
    adv_t: Annotated[Arg, "f[...]"],
    *,
    epsilon: Annotated[Arg, "f[]|f[...]", "[0, inf]"] = 0.2,
    epsilon_high: Annotated[Arg | None, "f[]|f[...]", "[0, inf]"] = None,
    dual_clip: Annotated[Arg | None, "f[]|f[...]", "(1, inf]"] = None,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the clipped loss of proximal policy optimisation, PPO.

    A step is no longer rewarded once it has moved the probability of its action far
    enough in the direction that its advantage asks for. Moving the other way is never
    free, and without `dual_clip` has no limit.

    .. math::
        L = -\frac1T \sum_t \begin{cases}
            \min(\rho_t, 1 + \epsilon_{\text{high}}) \, A_t & A_t \ge 0 \\
            \min\bigl(\max(\rho_t, 1 - \epsilon), c\bigr) \, A_t & A_t < 0
        \end{cases}, \qquad \rho_t = \frac{\pi(a_t)}{\mu(a_t)}

    At the very edge, where there is no derivative, the gradient is the mean of those on
    both sides.

    Args:
        log_prob_t: log-probabilities of the actions taken, under the policy to improve,
            :math:`\pi`, `f[...]`, in nats.
        behaviour_log_prob_t: the same under the policy that acted, :math:`\mu`,
            `f[...]`.
        adv_t: advantages :math:`A_t` of these actions, `f[...]`, in units of return.
        epsilon: how far a ratio may usefully go from 1, `f[]|f[...]`, dimensionless,
            not negative.
        epsilon_high: how far it may go above 1, `f[]|f[...]`, if not `epsilon`: more of
            it leaves unlikely actions room to grow, the clip-higher of DAPO.
        dual_clip: bound :math:`c` on the ratio where the advantage is negative,
            `f[]|f[...]`, above 1, 3 in the paper: beyond it the loss is constant. None
            if `None`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the advantages and the policy that acted are
            constants when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of its range.
        TypeError: if an argument is not floating-point.

    Example:
        >>> log_prob, adv = jnp.log(jnp.array([0.5, 0.5])), jnp.array([4.0, -1.0])
        >>> behaviour = jnp.log(jnp.array([0.25, 0.125]))  # ratios of 2 and 4
        >>> ppo_clip_loss(
        ...     log_prob, behaviour, adv, epsilon=0.5, dual_clip=3.0, reduction="none"
        ... ).tolist()  # -1.5 * 4 and 3 * 1
        [-6.0, 3.0]

    References:
        Schulman, Wolski, Dhariwal, Radford and Klimov, `Proximal Policy Optimization
        Algorithms <https://arxiv.org/abs/1707.06347>`_, 2017, eq. 7.
        Yu et al., `DAPO: An Open-Source LLM Reinforcement Learning System at Scale
        <https://arxiv.org/abs/2503.14476>`_, 2025, for `epsilon_high`.
        Ye et al., `Mastering Complex Control in MOBA Games with Deep Reinforcement
        Learning <https://arxiv.org/abs/1912.09729>`_, 2019, for `dual_clip`.
    """
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv_t, mask_t, use_stop_gradient
    )
    low, high = clip_range(epsilon, epsilon_high)
    gains = clipped_objective(ratios(log_ratios), adv, 1 + low, 1 + high, dual_clip)
    return reduced(-gains, mask_t, reduction)


@checked
def ppo_kl_penalty_loss(
    log_prob_t: Annotated[Arg, "f[...]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...]"],
    adv_t: Annotated[Arg, "f[...]"],
    kl_t: Annotated[Arg, "f[...]"],
    *,
    kl_coefficient: Annotated[Arg, "f[]|f[...]", "[0, inf]"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of proximal policy optimisation with a penalty, not a clip.

    .. math::
        L = \frac1T \sum_t \beta \, \text{KL}_t - \rho_t A_t, \qquad
        \rho_t = \frac{\pi(a_t)}{\mu(a_t)}

    `adaptive_kl_coefficient` sets :math:`\beta` from one update to the next.

    Args:
        log_prob_t: log-probabilities of the actions taken, under the policy to improve,
            :math:`\pi`, `f[...]`, in nats.
        behaviour_log_prob_t: the same under the policy that acted, :math:`\mu`,
            `f[...]`.
        adv_t: advantages :math:`A_t` of these actions, `f[...]`, in units of return; 0
            leaves the ratio out.
        kl_t: divergences of the policy to improve from the one that acted at each step,
            :math:`\text{KL}(\mu \,\|\, \pi)` in the paper, `f[...]`, in nats. Gradients
            flow to it: exact, or `approximate_kl` with `reduction="none"`.
        kl_coefficient: weight :math:`\beta` of the penalty, `f[]|f[...]`, in units of
            return per nat, not negative; 0 leaves it out.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the advantages and the policy that acted are
            constants when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `kl_coefficient` is a Python
            number below 0.
        TypeError: if an argument is not floating-point.

    Example:
        >>> log_prob, behaviour = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
        >>> adv, kl = jnp.array([1.0]), jnp.array([3.0])
        >>> ppo_kl_penalty_loss(log_prob, behaviour, adv, kl, kl_coefficient=4.0).item()
        10.0

    References:
        Schulman, Wolski, Dhariwal, Radford and Klimov, `Proximal Policy Optimization
        Algorithms <https://arxiv.org/abs/1707.06347>`_, 2017, section 4.
    """
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv_t, mask_t, use_stop_gradient
    )
    (kl,) = keep_where(mask_t, kl_t)
    losses = weighted(kl, kl_coefficient) - weighted(ratios(log_ratios), adv)
    return reduced(losses, mask_t, reduction)


@checked
def discovered_policy_optimization_loss(
    log_prob_t: Annotated[Arg, "f[...]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...]"],
    adv_t: Annotated[Arg, "f[...]"],
    *,
    alpha: Annotated[Arg, "f[]", "(0, inf)"] = 2.0,
    beta: Annotated[Arg, "f[]", "(0, inf)"] = 0.6,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of discovered policy optimisation, found by meta-learning.

    Not the preference loss that is called DPO too. In place of PPO's clip a drift
    :math:`f` is taken off the gain, a formula for what a network had learnt to do:

    .. math::
        L = -\frac1T \sum_t \rho_t A_t - f_t, \qquad f_t = \begin{cases}
            \operatorname{relu}\bigl((\rho_t - 1) A_t
                - \alpha \tanh((\rho_t - 1) A_t / \alpha)\bigr) & A_t \ge 0 \\
            \operatorname{relu}\bigl(A_t \log \rho_t
                - \beta \tanh(A_t \log(\rho_t) / \beta)\bigr) & A_t < 0
        \end{cases}

    Args:
        log_prob_t: log-probabilities of the actions taken, under the policy to improve,
            :math:`\pi`, `f[...]`, in nats.
        behaviour_log_prob_t: the same under the policy that acted, :math:`\mu`,
            `f[...]`, where :math:`\rho_t = \pi(a_t) / \mu(a_t)`.
        adv_t: advantages :math:`A_t` of these actions, `f[...]`, in units of return,
            which the paper standardises.
        alpha: what a step with a positive advantage can gain at most, `f[]`, in units
            of return, positive.
        beta: scale of the drift where the advantage is negative, `f[]`, in units of
            return, positive.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the advantages and the policy that acted are
            constants when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of its range.
        TypeError: if an argument is not floating-point.

    Example:
        >>> log_prob, adv = jnp.array([0.0, 90.0]), jnp.array([3.0, 3.0])
        >>> discovered_policy_optimization_loss(
        ...     log_prob, jnp.zeros(2), adv, reduction="none"
        ... ).tolist()  # -A, and -A - alpha
        [-3.0, -5.0]

    References:
        Lu et al., `Discovered Policy Optimisation <https://arxiv.org/abs/2210.05639>`_,
        2022.
    """
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv_t, mask_t, use_stop_gradient
    )
    good, bad = jnp.maximum(adv, 0), jnp.minimum(adv, 0)
    # What a good action gains beyond its advantage is bounded, once less its drift.
    up = weighted(guarded(jnp.expm1, log_ratios), good)
    gains = good + jnp.where(up > 0, alpha * jnp.tanh(up / alpha), up)
    down = weighted(log_ratios, bad)
    drift = jax.nn.relu(down - beta * jnp.tanh(down / beta))
    losses = drift - weighted(ratios(log_ratios), bad) - gains
    return reduced(losses, mask_t, reduction)


@checked
def simple_policy_optimization_loss(
    log_prob_t: Annotated[Arg, "f[...]"],
    behaviour_log_prob_t: Annotated[Arg, "f[...]"],
    adv_t: Annotated[Arg, "f[...]"],
    *,
    epsilon: Annotated[Arg, "f[]|f[...]", "(0, inf]"] = 0.2,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    use_stop_gradient: Flag = True,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    r"""Computes the loss of simple policy optimisation, SPO.

    Where PPO's clip has no slope, and ratios may drift on, this parabola pulls them
    back: its minimum is at the edge of the clip, :math:`1 \pm \epsilon` by the sign of
    the advantage.

    .. math::
        L = -\frac1T \sum_t \rho_t A_t
            - \frac{|A_t|}{2 \epsilon} (\rho_t - 1)^2, \qquad
        \rho_t = \frac{\pi(a_t)}{\mu(a_t)}

    Args:
        log_prob_t: log-probabilities of the actions taken, under the policy to improve,
            :math:`\pi`, `f[...]`, in nats.
        behaviour_log_prob_t: the same under the policy that acted, :math:`\mu`,
            `f[...]`.
        adv_t: advantages :math:`A_t` of these actions, `f[...]`, in units of return; 0
            leaves the step out.
        epsilon: how far from 1 a ratio is best, `f[]|f[...]`, dimensionless, positive.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        use_stop_gradient: whether the advantages and the policy that acted are
            constants when differentiating, `b[]`.
        reduction: `"mean"` or `"sum"` over the steps that count, or `"none"`.

    Returns:
        The loss, `f[]`, or of each step, `f[]|f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, or `epsilon` is a Python number and
            not positive.
        TypeError: if an argument is not floating-point.

    Example:
        >>> log_prob, behaviour = jnp.log(jnp.array([0.75])), jnp.log(jnp.array([0.5]))
        >>> simple_policy_optimization_loss(
        ...     log_prob, behaviour, jnp.array([4.0]), epsilon=0.5
        ... ).item()  # 1.5 * 4 less 4 * 0.5 ** 2 / (2 * 0.5)
        -5.0

    References:
        Xie et al., `Simple Policy Optimization <https://arxiv.org/abs/2401.16025>`_,
        2024.
    """
    log_ratios, adv = log_ratios_and_advantages(
        log_prob_t, behaviour_log_prob_t, adv_t, mask_t, use_stop_gradient
    )
    sign = jnp.sign(adv)
    parabola = lambda x: jnp.expm1(x) * (sign - jnp.expm1(x) / (2 * epsilon))
    gains = adv + weighted(guarded(parabola, log_ratios), jnp.abs(adv))
    return reduced(-gains, mask_t, reduction)


# What the losses are made of


def clipped_objective(
    ratio: Array, adv: Array, low: Arg, high: Arg, limit: Arg | None = None
) -> Array:
    """Returns the gain to maximise, of ratios clipped where that is no reward.

    They are clipped from above where the advantage is positive, and from below where it
    is negative; there `limit` clips them from above too.
    """
    at_least = jnp.maximum(ratio, low)
    if limit is not None:
        at_least = jnp.minimum(at_least, limit)
    return adv * jnp.where(adv < 0, at_least, jnp.minimum(ratio, high))


def clip_range(epsilon: Array, epsilon_high: Array | None) -> tuple[Array, Array]:
    """Returns how far a ratio may go below and above 1; as far as below by default."""
    return -epsilon, epsilon if epsilon_high is None else epsilon_high


def ratios(log_ratios: Array) -> Array:
    """Returns ratios, of which those that overflow have no gradient."""
    return guarded(jnp.exp, log_ratios)


def log_ratios_and_advantages(
    log_prob: Array, behaviour: Array, adv: Array, mask: Array | None, stop: Flag
) -> tuple[Array, Array]:
    log_prob, behaviour, adv = keep_where(mask, log_prob, behaviour, adv)
    behaviour, adv = stop_gradient_if(stop, (behaviour, adv))
    return log_prob - behaviour, adv

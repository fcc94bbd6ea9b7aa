r"""Quantiles at levels of one's choice, sampled or learned, and of many critics.

`quantile` has estimates at fixed levels. A network that is given the level
:math:`\tau`, in `[0, 1]`, predicts the quantile there, :math:`F^{-1}(\tau)`, of the
whole distribution of the return:

*   Implicit quantile networks (IQN) draw levels at random
    (`sample_quantile_levels`), feed cosines of them to the network
    (`cosine_embedding`) and learn by `quantile_huber_loss`.
*   Fully parameterised quantile functions (FQF) propose the levels
    (`propose_quantile_levels`) and learn where they are best
    (`quantile_proposal_loss`).
*   A policy is averse to risk, or seeks it, if its action values average quantiles at
    distorted levels (`rlprims.risk_distortions`).
*   Truncated quantile critics (TQC) keep overestimation in check: the targets are the
    quantiles of several critics together, without the highest
    (`truncated_quantile_targets`).
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import contain_nonfinite
from rlprims.gradients import stop_gradient_if
from rlprims.quantile import quantile_regression_loss

__all__ = [
    "QuantileLevels",
    "cosine_embedding",
    "propose_quantile_levels",
    "quantile_huber_loss",
    "quantile_proposal_loss",
    "sample_quantile_levels",
    "truncated_quantile_targets",
]


class QuantileLevels(NamedTuple):
    """Levels that divide `[0, 1]` into intervals, and the middle of each.

    Attributes:
        boundaries: where intervals begin and end, `f[...,N+1]`, dimensionless: from 0
            to 1 in increasing order.
        midpoints: the middle of each interval, `f[...,N]`, dimensionless.
    """

    boundaries: Annotated[Arg, "f[...,N+1]"]
    midpoints: Annotated[Arg, "f[...,N]"]


# Implicit quantile networks


@checked
def sample_quantile_levels(
    key: Annotated[Arg, "k[]"], num_levels: int, dtype: Any = jnp.float32
) -> Annotated[Array, "f[N]"]:
    r"""Draws levels at which to evaluate quantiles, uniformly.

    .. math::
        \tau_i \sim U([0, 1))

    Args:
        key: a random key, `k[]`.
        num_levels: how many to draw, a Python `int`, at least 1.
        dtype: the dtype of the result, floating-point.

    Returns:
        Levels, `f[N]` with `N = num_levels`, dimensionless, in `[0, 1)`, in no order.

    Raises:
        ValueError: if `key` is a batch; use `jax.vmap` for batches. If `num_levels` is
            below 1.
        TypeError: if `key` is not a random key, `num_levels` no Python `int`, or
            `dtype` not floating-point.

    Example:
        >>> levels = sample_quantile_levels(jax.random.key(0), 8)
        >>> levels.shape, bool((levels >= 0).all() & (levels < 1).all())
        ((8,), True)

    References:
        Dabney, Ostrovski, Silver and Munos, `Implicit Quantile Networks for
        Distributional Reinforcement Learning <https://arxiv.org/abs/1806.06923>`_,
        2018.
    """
    if num_levels < 1:
        raise ValueError(
            f"sample_quantile_levels: num_levels must be at least 1, got {num_levels}."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"sample_quantile_levels: dtype must be floating-point, got {dtype}."
        )
    return jax.random.uniform(key, (num_levels,), dtype)


@checked
def cosine_embedding(
    tau: Annotated[Arg, "f[...]", "[0, 1]"],
    num_features: int,
    *,
    first_frequency: int = 0,
) -> Annotated[Array, "f[...,D]"]:
    r"""Computes cosines of levels, as features for a network.

    .. math::
        \phi_i(\tau) = \cos\bigl(\pi (i_0 + i) \tau\bigr), \qquad i = 0, \ldots, D - 1

    The paper begins at the frequency :math:`i_0 = 0`, whose feature is always 1. Much
    code begins at 1.

    Args:
        tau: levels :math:`\tau`, `f[...]`, dimensionless, in `[0, 1]`.
        num_features: how many features `D`, a Python `int`, at least 1; 64 in the
            paper.
        first_frequency: the frequency :math:`i_0` of the first, a Python `int`.

    Returns:
        Features, `f[...,D]`, dimensionless, in `[-1, 1]`. A layer and a rectifier
        follow in the network.

    Raises:
        ValueError: if `tau` is a Python number outside `[0, 1]`, or `num_features` is
            below 1.
        TypeError: if `tau` is not floating-point, or another argument no Python `int`.

    Example:
        >>> cosine_embedding(1.0, 3).round(4).tolist()
        [1.0, -1.0, 1.0]

    References:
        Dabney, Ostrovski, Silver and Munos, `Implicit Quantile Networks for
        Distributional Reinforcement Learning <https://arxiv.org/abs/1806.06923>`_,
        2018.
    """
    if num_features < 1:
        raise ValueError(
            f"cosine_embedding: num_features must be at least 1, got {num_features}."
        )
    frequencies = first_frequency + jnp.arange(num_features, dtype=tau.dtype)
    return jnp.cos(jnp.pi * jnp.multiply.outer(tau, frequencies))


@checked
def quantile_huber_loss(
    dist_src: Annotated[Arg, "f[N]"],
    tau_src: Annotated[Arg, "f[N]", "[0, 1]"],
    dist_target: Annotated[Arg, "f[M]"],
    *,
    huber_param: Annotated[Arg, "f[]", "[0, inf)"] = 1.0,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the loss of implicit quantiles, in units of return.

    .. math::
        L = \sum_i \frac1M \sum_j \bigl|\tau_i - 1[u_{ij} < 0]\bigr| \,
            \frac{\ell_\kappa(u_{ij})}\kappa, \qquad u_{ij} = y_j - \theta_i

    with :math:`\ell_\kappa` the `huber_loss`. It is `quantile_regression_loss`, divided
    by :math:`\kappa` as the papers of IQN and FQF have it and that of QR-DQN has not:
    so, the slope of a large error is at most 1, and the loss goes to that of
    :math:`\kappa = 0` as :math:`\kappa` gets small. At 1, which is common, they agree.
    Like there, it is a sum over estimates, and a mean over targets.

    Args:
        dist_src: estimates :math:`\theta_i`, `f[N]`, in units of return.
        tau_src: their levels :math:`\tau_i`, `f[N]`, dimensionless, in `[0, 1]`.
        dist_target: targets :math:`y_j`, `f[M]`, in units of return, in any order.
        huber_param: where the loss turns linear, :math:`\kappa`, `f[]`, in units of
            return, not negative, finite; 0 for linear everywhere.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        The loss, `f[]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, there are no targets, or
            `huber_param` is a Python number below 0 or infinite; use `jax.vmap` for
            batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> estimate, level, targets = jnp.zeros(1), jnp.full(1, 0.5), jnp.array([4.0])
        >>> quantile_huber_loss(estimate, level, targets, huber_param=2.0).item()
        1.5

    References:
        Dabney, Ostrovski, Silver and Munos, `Implicit Quantile Networks for
        Distributional Reinforcement Learning <https://arxiv.org/abs/1806.06923>`_,
        2018.
    """
    if len(dist_target) == 0:
        raise ValueError(
            "quantile_huber_loss: dist_target must have an entry, got (0,)."
        )
    loss = quantile_regression_loss(
        dist_src, tau_src, dist_target, huber_param, stop_target_gradients
    )
    return loss / jnp.where(huber_param == 0, 1, huber_param)


# Fully parameterised quantile functions


@checked
def propose_quantile_levels(
    logits: Annotated[Arg, "f[...,N]"],
) -> QuantileLevels:
    r"""Computes levels whose distances are a softmax of logits.

    .. math::
        \tau_i = \sum_{j < i} p_j, \qquad
        \hat\tau_i = \frac{\tau_i + \tau_{i+1}}2, \qquad
        p = \text{softmax}(\text{logits})

    The step function with the value :math:`F^{-1}(\hat\tau_i)` between
    :math:`\tau_i` and :math:`\tau_{i+1}` stands for the quantile function, and its
    mean :math:`\sum_i p_i F^{-1}(\hat\tau_i)` is the action value.

    Args:
        logits: logits of the distances between levels, `f[...,N]`.

    Returns:
        The boundaries, `f[...,N+1]`, exactly 0 at the first and 1 at the last, and the
        midpoints, `f[...,N]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `logits` is not floating-point.

    Example:
        >>> boundaries, midpoints = propose_quantile_levels(jnp.zeros(2))
        >>> boundaries.tolist(), midpoints.tolist()
        ([0.0, 0.5, 1.0], [0.25, 0.75])

    References:
        Yang et al., `Fully Parameterized Quantile Function for Distributional
        Reinforcement Learning <https://arxiv.org/abs/1911.02140>`_, 2019.
    """
    probs = jax.nn.softmax(logits)
    inner = jnp.minimum(jnp.cumsum(probs, axis=-1)[..., :-1], 1)
    ends = jnp.zeros_like(probs, shape=(*probs.shape[:-1], 1))
    boundaries = jnp.concatenate([ends, inner, ends + 1], axis=-1)
    return QuantileLevels(boundaries, (boundaries[..., :-1] + boundaries[..., 1:]) / 2)


@checked
def quantile_proposal_loss(
    boundaries: Annotated[Arg, "f[N+1]"],
    dist_at_boundaries: Annotated[Arg, "f[N-1]"],
    dist_at_midpoints: Annotated[Arg, "f[N]"],
    *,
    use_stop_gradient: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes a loss that moves levels to where a step function fits best.

    The distance (1-Wasserstein) of the step function from the quantile function has a
    derivative by the levels that needs no integral, and which is that of this loss:

    .. math::
        L = \sum_{i=1}^{N-1} \tau_i \, \perp\!\Bigl(2 F^{-1}(\tau_i)
            - F^{-1}(\hat\tau_i) - F^{-1}(\hat\tau_{i-1})\Bigr)

    where :math:`\perp` holds constant. It trains the network that proposes the levels,
    and nothing else. The value of the loss itself means little. The paper assumes
    quantiles that increase with the level; much code flips signs where they do not.

    Args:
        boundaries: levels :math:`\tau_0..\tau_N`, `f[N+1]`, dimensionless, from
            `propose_quantile_levels`. The first and the last, 0 and 1, stay.
        dist_at_boundaries: quantiles at the others :math:`F^{-1}(\tau_i)`, `f[N-1]`,
            in units of return.
        dist_at_midpoints: quantiles at the midpoints :math:`F^{-1}(\hat\tau_i)`,
            `f[N]`, in units of return.
        use_stop_gradient: whether the quantiles are constants when differentiating,
            `b[]`.

    Returns:
        The loss, `f[]`, in units of return; 0 if there is one interval.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> at_boundaries, at_midpoints = jnp.array([3.0]), jnp.array([1.0, 2.0])
        >>> boundaries = jnp.array([0.0, 0.5, 1.0])
        >>> quantile_proposal_loss(boundaries, at_boundaries, at_midpoints).item()
        1.5

    References:
        Yang et al., `Fully Parameterized Quantile Function for Distributional
        Reinforcement Learning <https://arxiv.org/abs/1911.02140>`_, 2019.
    """
    slopes = 2 * dist_at_boundaries - dist_at_midpoints[1:] - dist_at_midpoints[:-1]
    return jnp.sum(boundaries[1:-1] * stop_gradient_if(use_stop_gradient, slopes))


# Truncated quantile critics


@checked
def truncated_quantile_targets(
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    dist_t: Annotated[Arg, "f[C,M]"],
    num_dropped: int,
    *,
    temperature: Annotated[Arg | None, "f[]"] = None,
    log_prob_t: Annotated[Arg | None, "f[]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[P]"]:
    r"""Computes targets from all critics' quantiles together, without the highest.

    .. math::
        y_i = r_t + \gamma_t \bigl(z_{(i)} - \alpha \log \pi(a_t)\bigr), \qquad
        i = 1, \ldots, C (M - d)

    with :math:`z_{(1)} \le z_{(2)} \le \ldots` the quantiles of all critics in order:
    the `d` highest for each critic are dropped, whichever critics they are of. Each
    critic then learns from all targets, by `quantile_regression_loss`.

    Args:
        r_t: reward, `f[]`.
        discount_t: discount, `f[]`, dimensionless, in `[0, 1]`; 0 on termination: the
            targets are then the reward, whatever is predicted for the state reached.
        dist_t: quantiles that `C` target critics predict for the state reached and an
            action drawn there, `f[C,M]`, in units of return, in any order. If one is
            NaN, so are all targets.
        num_dropped: how many quantiles to drop for each critic, `d`, a Python `int`,
            in `[0, M)`.
        temperature: worth :math:`\alpha` of entropy, `f[]`, in units of return per nat;
            `None` for no entropy term.
        log_prob_t: log-probability of that action, :math:`\log \pi(a_t)`, `f[]`, in
            nats; given along with `temperature`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        Targets in increasing order, `f[P]` with `P = C (M - d)`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract, nothing is left, `num_dropped` is
            negative, or one of `temperature` and `log_prob_t` is given without the
            other; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract, or `num_dropped` is no Python `int`.

    Example:
        >>> dist_t = jnp.array([[1.0, 9.0], [2.0, 3.0]])
        >>> truncated_quantile_targets(1.0, 0.5, dist_t, 1).tolist()
        [1.5, 2.0]

    References:
        Kuznetsov, Shvechikov, Grishin and Vetrov, `Controlling Overestimation Bias
        with Truncated Mixture of Continuous Distributional Quantile Critics
        <https://arxiv.org/abs/2005.04269>`_, 2020.
    """
    num_critics, num_quantiles = dist_t.shape
    if not 0 <= num_dropped < num_quantiles:
        raise ValueError(
            f"truncated_quantile_targets: num_dropped must be in [0, {num_quantiles}), "
            f"as dist_t has shape {dist_t.shape}, got {num_dropped}."
        )
    if (temperature is None) != (log_prob_t is None):
        raise ValueError(
            "truncated_quantile_targets: temperature and log_prob_t must be given "
            "together."
        )
    if temperature is not None and log_prob_t is not None:
        dist_t = dist_t - temperature * log_prob_t
    ordered = jnp.sort(contain_nonfinite(dist_t, discount_t), axis=None)
    kept = ordered[: num_critics * (num_quantiles - num_dropped)]
    kept = jnp.where(jnp.isnan(ordered[-1]), jnp.nan, kept)  # which comes last
    return stop_gradient_if(stop_target_gradients, r_t + discount_t * kept)

"""Losses of one prediction against one target, element by element.

They take arrays of any shape and keep it: how to reduce, and with which weights, is the
caller's choice. They differ in which statistic of random targets their minimiser is:

==================  =========================  =====================================
loss                minimised by               large errors
==================  =========================  =====================================
`l2_loss`           the mean                   count as their square
`huber_loss`        between median and mean    count as their size
`expectile_loss`    an expectile, the mean     count as their square, and differently
                    with one side up-weighted  above and below
`log_loss`          the probability            without bound, if sure and wrong
==================  =========================  =====================================
"""

from typing import Annotated, Literal

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import contain_nonfinite, keep_where

__all__ = [
    "expectile_loss",
    "huber_loss",
    "l2_loss",
    "likelihood",
    "log_loss",
]

Reduction = Literal["mean", "sum", "none"]


@checked
def expectile_loss(
    predictions: Annotated[Arg, "f[...]"],
    targets: Annotated[Arg, "f[]|f[...]"],
    expectile: Annotated[Arg, "f[]|f[...]", "[0, 1]"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes squared errors that count differently above and below the prediction.

    An expectile above 0.5 penalises predictions that are too low more than those that
    are too high, so that they rise above the mean: towards the largest target as it
    approaches 1. At 0.5 this is `l2_loss`.

    .. math::
        L = \bigl|\tau - 1[u < 0]\bigr| \, u^2, \qquad
        u = \text{targets} - \text{predictions}

    Args:
        predictions: what to fit, `f[...]`.
        targets: what to fit it to, `f[]|f[...]`, in the units of `predictions`.
        expectile: weight :math:`\tau` of targets above the prediction,
            `f[]|f[...]`, dimensionless, in `[0, 1]`; targets below it have
            :math:`1 - \tau`. An infinite error of weight 0 does not count.

    Returns:
        The losses, `f[...]`, in squared units of `predictions`.

    Raises:
        ValueError: if a shape breaks its contract, or `expectile` is a Python number
            outside `[0, 1]`.
        TypeError: if an argument is not floating-point.

    Example:
        >>> expectile_loss(jnp.zeros(2), jnp.array([2.0, -2.0]), 0.75).tolist()
        [3.0, 1.0]

    References:
        Kostrikov, Nair and Levine, `Offline Reinforcement Learning with Implicit
        Q-Learning <https://arxiv.org/abs/2110.06169>`_, 2021, section 4.1.
    """
    errors = targets - predictions
    weights = jnp.where(errors < 0, 1 - expectile, expectile)
    errors = contain_nonfinite(errors, weights)
    return weights * errors * errors  # in this order 0 stays 0 where a square overflows


@checked
def huber_loss(
    x: Annotated[Arg, "f[...]"], delta: Annotated[Arg, "f[]|f[...]", "[0, inf]"] = 1.0
) -> Annotated[Array, "f[...]"]:
    r"""Computes a loss that is quadratic for small errors and linear for large ones.

    Its gradient is the error, clipped to `[-delta, delta]`: an outlier pulls no harder
    than an error of `delta`.

    .. math::
        L(x) = \begin{cases}
            \tfrac12 x^2 & |x| \le \delta \\
            \delta \bigl(|x| - \tfrac12 \delta\bigr) & \text{otherwise}
        \end{cases}

    Args:
        x: errors, `f[...]`.
        delta: where the loss turns linear, `f[]|f[...]`, in the units of `x`, not
            negative; infinity gives `l2_loss`.

    Returns:
        The losses, `f[...]`, in squared units of `x`.

    Raises:
        ValueError: if a shape breaks its contract, or `delta` is a Python number
            below 0.
        TypeError: if an argument is not floating-point.

    Example:
        >>> huber_loss(jnp.array([0.5, 3.0])).tolist()
        [0.125, 2.5]

    References:
        Huber, `Robust Estimation of a Location Parameter
        <https://doi.org/10.1214/aoms/1177703732>`_, 1964.
    """
    near = jnp.clip(x, -delta, delta)
    excess = jnp.abs(x) - jnp.abs(near)
    return 0.5 * near * near + contain_nonfinite(delta, excess) * excess


@checked
def l2_loss(
    predictions: Annotated[Arg, "f[...]"],
    targets: Annotated[Arg | None, "f[]|f[...]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes half the squared error, whose gradient is the error.

    .. math::
        L = \tfrac12 (\text{targets} - \text{predictions})^2

    Args:
        predictions: what to fit, `f[...]`.
        targets: what to fit it to, `f[]|f[...]`, in the units of `predictions`;
            `None` for 0, as when `predictions` are errors already.

    Returns:
        The losses, `f[...]`, in squared units of `predictions`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> l2_loss(jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])).tolist()
        [2.0, 0.0]
    """
    return 0.5 * (predictions if targets is None else targets - predictions) ** 2


@checked
def likelihood(
    predictions: Annotated[Arg, "f[...]"],
    targets: Annotated[Arg, "f[]|f[...]"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes the likelihood of binary targets under predicted probabilities.

    .. math::
        L = p^y \, (1 - p)^{1 - y}, \qquad 0^0 = 1

    It is the exponential of minus `log_loss`. Its gradient does not vanish where a
    prediction is sure and wrong, nor explode as that of `log_loss` does.

    Args:
        predictions: probabilities :math:`p` that the target is 1, `f[...]`,
            dimensionless, in `[0, 1]`.
        targets: outcomes :math:`y`, 0 or 1, or the probability of 1, `f[]|f[...]`,
            dimensionless.

    Returns:
        The likelihoods, `f[...]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> likelihood(jnp.array([0.25, 0.25]), jnp.array([1.0, 0.0])).tolist()
        [0.25, 0.75]
    """
    p_of_one, p_of_zero = _relevant(predictions, targets)
    return p_of_one**targets * (1 - p_of_zero) ** (1 - targets)


@checked
def log_loss(
    predictions: Annotated[Arg, "f[...]"],
    targets: Annotated[Arg, "f[]|f[...]"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes the cross-entropy of binary targets and predicted probabilities.

    .. math::
        L = -y \log p - (1 - y) \log(1 - p), \qquad 0 \log 0 = 0

    A prediction that is sure and right costs 0, and one that is sure and wrong costs
    infinity.

    Args:
        predictions: probabilities :math:`p` that the target is 1, `f[...]`,
            dimensionless, in `[0, 1]`.
        targets: outcomes :math:`y`, 0 or 1, or the probability of 1, `f[]|f[...]`,
            dimensionless.

    Returns:
        The losses, `f[...]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> log_loss(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])).tolist()
        [0.0, inf]
    """
    p_of_one, p_of_zero = _relevant(predictions, targets)
    return -targets * jnp.log(p_of_one) - (1 - targets) * jnp.log1p(-p_of_zero)


def _relevant(predictions: Array, targets: Array) -> tuple[Array, Array]:
    """Returns the predictions that face each outcome, sure ones where it is absent.

    An outcome that the target rules out counts for nothing, and a prediction that it
    is impossible must not turn that into NaN, `0 log 0`, nor its derivative, `0 / 0`.
    """
    of_one = jnp.where((targets == 0) & ~(predictions > 0), 1, predictions)
    of_zero = jnp.where((targets == 1) & ~(predictions < 1), 0, predictions)
    return of_one, of_zero


# What losses over the steps of a trajectory share


def reduced(losses: Array, mask: Array | None, reduction: Reduction) -> Array:
    """Reduces losses over the steps that `mask` leaves in: to 0 if none is left."""
    (losses,) = keep_where(mask, losses)
    match reduction:
        case "none":
            return losses
        case "sum":
            return jnp.sum(losses)
        case "mean":
            if mask is None:
                return jnp.mean(losses)
            return jnp.sum(losses) / jnp.maximum(jnp.sum(mask, dtype=losses.dtype), 1)

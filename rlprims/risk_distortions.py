r"""Distortions of risk: which quantiles of the return a policy attends to.

The mean of quantiles at levels :math:`\tau`, drawn uniformly, is an action value that
is neutral to risk. At distorted levels, :math:`F^{-1}(\beta(\tau))`, it is averse to
risk if they are lower, and seeks it if they are higher. A `risk_parameter`
:math:`\eta` says how much:

====================  ==========  ==========  ==========
distortion            averse      neutral     seeking
====================  ==========  ==========  ==========
`cvar_distortion`     below 1     1           never
`wang_distortion`     below 0     0           above 0
`power_distortion`    below 0     0           above 0
====================  ==========  ==========  ==========

With `cpw_distortion` a parameter below 1, where it is neutral, overweighs both
extremes, as people do.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked

__all__ = [
    "cpw_distortion",
    "cvar_distortion",
    "power_distortion",
    "wang_distortion",
]


@checked
def cvar_distortion(
    tau: Annotated[Arg, "f[...]", "[0, 1]"],
    *,
    risk_parameter: Annotated[Arg, "f[]|f[...]", "(0, 1]"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes distorted levels that attend to the worst outcomes alone.

    .. math::
        \beta(\tau) = \eta \, \tau

    The mean of quantiles at these levels is the conditional value at risk: the mean of
    the worst outcomes, a share :math:`\eta` of all.

    Args:
        tau: levels :math:`\tau`, `f[...]`, dimensionless, in `[0, 1]`.
        risk_parameter: the share :math:`\eta`, `f[]|f[...]`, dimensionless, in
            `(0, 1]`; 1 is neutral.

    Returns:
        Levels, `f[...]`, dimensionless, in `[0, 1]`.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number is out of its
            interval.
        TypeError: if an argument is not floating-point.

    Example:
        >>> cvar_distortion(jnp.array([0.0, 0.5, 1.0]), risk_parameter=0.25).tolist()
        [0.0, 0.125, 0.25]

    References:
        Dabney, Ostrovski, Silver and Munos, `Implicit Quantile Networks for
        Distributional Reinforcement Learning <https://arxiv.org/abs/1806.06923>`_,
        2018, section 3.1.
    """
    return risk_parameter * tau


@checked
def wang_distortion(
    tau: Annotated[Arg, "f[...]", "[0, 1]"],
    *,
    risk_parameter: Annotated[Arg, "f[]|f[...]", "(-inf, inf)"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes distorted levels, shifted on the scale of a Gaussian.

    .. math::
        \beta(\tau) = \Phi\bigl(\Phi^{-1}(\tau) + \eta\bigr)

    with :math:`\Phi` the cumulative distribution of the standard Gaussian. The levels
    0 and 1 stay, without a gradient.

    Args:
        tau: levels :math:`\tau`, `f[...]`, dimensionless, in `[0, 1]`.
        risk_parameter: the shift :math:`\eta`, `f[]|f[...]`, in standard deviations,
            finite: averse to risk below 0, neutral at 0, seeking it above.

    Returns:
        Levels, `f[...]`, dimensionless, in `[0, 1]`.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number is out of its
            interval.
        TypeError: if an argument is not floating-point.

    Example:
        >>> levels = wang_distortion(jnp.array([0.0, 0.5, 1.0]), risk_parameter=-1.0)
        >>> [round(x, 4) for x in levels.tolist()]
        [0.0, 0.1587, 1.0]

    References:
        Dabney, Ostrovski, Silver and Munos, `Implicit Quantile Networks for
        Distributional Reinforcement Learning <https://arxiv.org/abs/1806.06923>`_,
        2018, section 3.1.
    """
    normal = jax.scipy.special
    return _between(tau, lambda x: normal.ndtr(normal.ndtri(x) + risk_parameter))


@checked
def cpw_distortion(
    tau: Annotated[Arg, "f[...]", "[0, 1]"],
    *,
    risk_parameter: Annotated[Arg, "f[]|f[...]", "(0, inf)"] = 0.71,
) -> Annotated[Array, "f[...]"]:
    r"""Computes distorted levels as people weigh them: more at both extremes.

    .. math::
        \beta(\tau) = \frac{\tau^\eta}{\bigl(\tau^\eta + (1 - \tau)^\eta\bigr)^{1/\eta}}

    This is the weighting of cumulative prospect theory. The levels 0 and 1 stay,
    without a gradient.

    Args:
        tau: levels :math:`\tau`, `f[...]`, dimensionless, in `[0, 1]`.
        risk_parameter: the exponent :math:`\eta`, `f[]|f[...]`, dimensionless,
            positive; 1 is neutral, and 0.71 was measured of people. Below about 0.28
            levels no longer keep their order.

    Returns:
        Levels, `f[...]`, dimensionless, in `[0, 1]`.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number is out of its
            interval.
        TypeError: if an argument is not floating-point.

    Example:
        >>> levels = cpw_distortion(jnp.array([0.0, 0.5, 1.0]), risk_parameter=0.5)
        >>> [round(x, 4) for x in levels.tolist()]  # (1 / 2)^(3 / 2)
        [0.0, 0.3536, 1.0]

    References:
        Dabney, Ostrovski, Silver and Munos, `Implicit Quantile Networks for
        Distributional Reinforcement Learning <https://arxiv.org/abs/1806.06923>`_,
        2018, section 3.1.
    """

    def weigh(x: Array) -> Array:
        low, high = risk_parameter * jnp.log(x), risk_parameter * jnp.log1p(-x)
        return jnp.exp(low - jnp.logaddexp(low, high) / risk_parameter)

    return _between(tau, weigh)


@checked
def power_distortion(
    tau: Annotated[Arg, "f[...]", "[0, 1]"],
    *,
    risk_parameter: Annotated[Arg, "f[]|f[...]", "(-inf, inf)"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes distorted levels, raised to a power.

    .. math::
        \beta(\tau) = \begin{cases}
            \tau^{1 / (1 + |\eta|)} & \eta \ge 0 \\
            1 - (1 - \tau)^{1 / (1 + |\eta|)} & \eta < 0
        \end{cases}

    The levels 0 and 1 stay, without a gradient.

    Args:
        tau: levels :math:`\tau`, `f[...]`, dimensionless, in `[0, 1]`.
        risk_parameter: the parameter :math:`\eta`, `f[]|f[...]`, dimensionless,
            finite: averse to risk below 0, neutral at 0, seeking it above.

    Returns:
        Levels, `f[...]`, dimensionless, in `[0, 1]`.

    Raises:
        ValueError: if a shape breaks its contract, or a Python number is out of its
            interval.
        TypeError: if an argument is not floating-point.

    Example:
        >>> levels = jnp.array([0.0, 0.25, 1.0])
        >>> [round(x, 4) for x in power_distortion(levels, risk_parameter=1.0).tolist()]
        [0.0, 0.5, 1.0]

    References:
        Dabney, Ostrovski, Silver and Munos, `Implicit Quantile Networks for
        Distributional Reinforcement Learning <https://arxiv.org/abs/1806.06923>`_,
        2018, section 3.1.
    """
    averse = risk_parameter < 0
    exponent = 1 / (1 + jnp.where(averse, -risk_parameter, risk_parameter))
    seek = lambda x: jnp.exp(exponent * jnp.log(x))
    avoid = lambda x: -jnp.expm1(exponent * jnp.log1p(-x))
    return _between(tau, lambda x: jnp.where(averse, avoid(x), seek(x)))


def _between(tau: Array, fn: Callable[[Array], Array]) -> Array:
    """Applies `fn` between 0 and 1; these stay as they are, with no gradient."""
    inside = (tau > 0) & (tau < 1)
    ends = jax.lax.stop_gradient(tau)
    return jnp.where(inside, fn(jnp.where(inside, tau, 0.5)), ends)

r"""Elementwise transforms that bring values to a friendlier scale, and their inverses.

Returns can span many orders of magnitude. A network that predicts a *squashed* value,
close to the identity for small numbers and slow to grow for large ones, copes with all
of them. Each transform here is increasing, so that it has an inverse, and all but
`sigmoid` and `logit` are odd, :math:`f(-x) = -f(x)`:

=====================  =====================  ===================================
transform              inverse                growth of the transform
=====================  =====================  ===================================
`signed_logp1`         `signed_expm1`         logarithm
`hyperbolic_arcsin`    `hyperbolic_sin`       logarithm
`signed_hyperbolic`    `signed_parabolic`     square root, then linear at last
`power(x, p)`          `power(x, 1 / p)`      power :math:`p`
`logit`                `sigmoid`              from a probability to the real line
=====================  =====================  ===================================

They are accurate to a few units in the last place at every scale, and exact at 0, -0
and ±infinity. A result too large for the dtype is infinite; compiled code takes numbers
below about 1e-38 in single precision for 0. Derivatives are just as accurate, at 0 too,
and never NaN.
"""

from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from rlprims._checks import Arg, checked

__all__ = [
    "hyperbolic_arcsin",
    "hyperbolic_sin",
    "identity",
    "logit",
    "power",
    "sigmoid",
    "signed_expm1",
    "signed_hyperbolic",
    "signed_logp1",
    "signed_parabolic",
]

P = ParamSpec("P")
R = TypeVar("R")


def _derivatives(*rules: Callable[..., Array]) -> Callable[..., Any]:
    """Gives a function its derivatives, each a rule `(tangent, result, *arguments)`.

    Derived automatically, they would be wrong at 0, where `abs` and `sign` have none,
    and NaN or inaccurate wherever an intermediate value overflows or cancels.
    """

    def attach(fn: Callable[P, R]) -> Callable[P, R]:
        function = jax.custom_jvp(fn)

        def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
            result = cast(Any, function(*primals))
            terms = [
                rule(tangent, result, *primals)
                for rule, tangent in zip(rules, tangents, strict=True)
                if not isinstance(tangent, SymbolicZero)
            ]
            return result, sum(terms, start=jnp.zeros_like(result))

        function.defjvp(jvp, symbolic_zeros=True)
        return cast(Callable[P, R], function)

    return attach


@checked
def identity(x: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    r"""Computes nothing: returns its argument, :math:`f(x) = x`.

    Args:
        x: numbers, `f[...]`.

    Returns:
        The same numbers, `f[...]`.

    Raises:
        TypeError: if `x` is not floating-point.

    Example:
        >>> identity(jnp.array([1.0, -2.0])).tolist()
        [1.0, -2.0]
    """
    return x


@checked
@_derivatives(lambda dx, y, x: dx * y * jax.nn.sigmoid(-x))
def sigmoid(x: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    r"""Computes the logistic function, which maps the real line to probabilities.

    .. math::
        f(x) = \frac{1}{1 + e^{-x}}

    Args:
        x: log-odds, `f[...]`, dimensionless.

    Returns:
        Probabilities, `f[...]`, in `[0, 1]`; the inverse is `logit`.

    Raises:
        TypeError: if `x` is not floating-point.

    Example:
        >>> sigmoid(jnp.array([-jnp.inf, 0.0, jnp.inf])).tolist()
        [0.0, 0.5, 1.0]
    """
    return jax.nn.sigmoid(x)


@checked
@_derivatives(lambda dx, _, x: dx / (x * (1 - x)))
def logit(x: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    r"""Computes log-odds, the inverse of `sigmoid`.

    .. math::
        f(x) = \log \frac{x}{1 - x}
             = 2 \operatorname{arsinh} \frac{x - 1/2}{\sqrt{x (1 - x)}}

    The second form is the one computed: it is as good next to 1/2 as elsewhere.

    Args:
        x: probabilities, `f[...]`, in `[0, 1]`.

    Returns:
        Log-odds, `f[...]`, dimensionless: -infinity at 0, infinity at 1, and NaN
        where `x` is no probability.

    Raises:
        TypeError: if `x` is not floating-point.

    Example:
        >>> logit(jnp.array([0.0, 0.5, 1.0])).tolist()
        [-inf, 0.0, inf]
    """
    deviation = jnp.abs(jnp.sqrt(x * (1 - x)))  # `abs` for the root of -0, which is -0
    return 2 * jnp.arcsinh((x - 0.5) / deviation)


@checked
@_derivatives(lambda dx, _, x: dx / (1 + jnp.abs(x)))
def signed_logp1(x: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    r"""Computes a logarithm that is odd and passes through 0 with slope 1.

    .. math::
        f(x) = \operatorname{sign}(x) \log(1 + |x|)

    Args:
        x: values, `f[...]`, in units of return.

    Returns:
        Transformed values, `f[...]`, dimensionless; the inverse is `signed_expm1`.

    Raises:
        TypeError: if `x` is not floating-point.

    Example:
        >>> signed_logp1(jnp.array([-jnp.inf, 0.0, jnp.inf])).tolist()
        [-inf, 0.0, inf]

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


@checked
@_derivatives(lambda dx, _, x: dx * jnp.exp(jnp.abs(x)))
def signed_expm1(x: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    r"""Computes an exponential that is odd and passes through 0 with slope 1.

    .. math::
        f(x) = \operatorname{sign}(x) (e^{|x|} - 1)

    Args:
        x: transformed values, `f[...]`, dimensionless. Beyond ±88.7 (±709.7 in double
            precision) the result overflows to infinity.

    Returns:
        Values, `f[...]`, in units of return; the inverse is `signed_logp1`.

    Raises:
        TypeError: if `x` is not floating-point.

    Example:
        >>> signed_expm1(jnp.array([-jnp.inf, 0.0, jnp.inf])).tolist()
        [-inf, 0.0, inf]

    References:
        Hafner et al., `Mastering Diverse Domains through World Models
        <https://arxiv.org/abs/2301.04104>`_, 2023.
    """
    return jnp.sign(x) * _expm1(jnp.abs(x))


def _hyperbolic_slope(x: Array, eps: Array) -> Array:
    """The derivative of `signed_hyperbolic`."""
    return 0.5 / jnp.sqrt(1 + jnp.abs(x)) + eps


@checked
@_derivatives(
    lambda dx, _, x, eps: dx * _hyperbolic_slope(x, eps),
    lambda deps, _, x, eps: deps * x,
)
def signed_hyperbolic(
    x: Annotated[Arg, "f[...]"],
    eps: Annotated[Arg, "f[]"] = 1e-3,
) -> Annotated[Array, "f[...]"]:
    r"""Computes a square root that is odd, plus a little of the identity.

    .. math::
        f(x) = \operatorname{sign}(x) \bigl(\sqrt{|x| + 1} - 1\bigr) + \epsilon x
             = \frac{x}{\sqrt{|x| + 1} + 1} + \epsilon x

    The second form is the one computed, as nothing in it cancels. The slope, at 0
    :math:`\tfrac12 + \epsilon`, never falls below :math:`\epsilon`, which makes the
    inverse Lipschitz-continuous.

    Args:
        x: values, `f[...]`, in units of return.
        eps: weight of the identity :math:`\epsilon`, `f[]`, dimensionless, at least 0.

    Returns:
        Transformed values, `f[...]`; the inverse is `signed_parabolic`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> signed_hyperbolic(jnp.array([-8.0, 0.0, 3.0]), eps=0.5).tolist()
        [-6.0, 0.0, 2.5]

    References:
        Pohlen et al., `Observe and Look Further: Achieving Consistent Performance on
        Atari <https://arxiv.org/abs/1805.11593>`_, 2018. Used by Kapturowski et al.,
        `Recurrent Experience Replay in Distributed Reinforcement Learning
        <https://openreview.net/forum?id=r1lyTjAqYX>`_, 2019.
    """
    y = x / (jnp.sqrt(jnp.abs(x) + 1) + 1) + eps * x
    return jnp.where(jnp.isinf(x), x, y)


@checked
@_derivatives(
    lambda dx, y, _, eps: dx / _hyperbolic_slope(y, eps),
    lambda deps, y, _, eps: -deps * y / _hyperbolic_slope(y, eps),
)
def signed_parabolic(
    x: Annotated[Arg, "f[...]"],
    eps: Annotated[Arg, "f[]"] = 1e-3,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the inverse of `signed_hyperbolic`.

    With :math:`c = \tfrac12 + \epsilon`, the unknown
    :math:`t = \operatorname{sign}(y) (\sqrt{|y| + 1} - 1)` solves
    :math:`\epsilon t |t| + 2 c t = x`. Its root is written so that nothing cancels and
    :math:`\epsilon = 0` is no exception:

    .. math::
        t = \frac{x}{c + \sqrt{c^2 + \epsilon |x|}}, \qquad
        y = t \, (|t| + 2)

    Args:
        x: transformed values, `f[...]`. The result, about :math:`x / \epsilon` for
            large `x`, overflows to infinity where it exceeds the dtype.
        eps: weight of the identity :math:`\epsilon`, `f[]`, dimensionless, in
            `[0, 1]`.

    Returns:
        Values, `f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> signed_parabolic(jnp.array([-6.0, 0.0, 2.5]), eps=0.5).tolist()
        [-8.0, 0.0, 3.0]

    References:
        Pohlen et al., `Observe and Look Further: Achieving Consistent Performance on
        Atari <https://arxiv.org/abs/1805.11593>`_, 2018.
    """
    slope = 0.5 + eps
    t = x / (slope + jnp.sqrt(slope * slope + eps * jnp.abs(x)))
    return jnp.where(jnp.isinf(x), x, t * (jnp.abs(t) + 2))


def _cosh(x: Array, *_: Array) -> Array:
    root = jnp.exp(jnp.abs(x) / 2)  # half the exponent, so as not to overflow early
    return 0.5 * root * root + 0.5 / root / root


@checked
@_derivatives(lambda dx, _, x: dx * _cosh(x))
def hyperbolic_sin(x: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    r"""Computes the hyperbolic sine, the inverse of `hyperbolic_arcsin`.

    .. math::
        f(x) = \frac{e^x - e^{-x}}{2}

    Args:
        x: transformed values, `f[...]`, dimensionless. Beyond ±89.4 (±710.4 in double
            precision) the result overflows to infinity.

    Returns:
        Values, `f[...]`, in units of return.

    Raises:
        TypeError: if `x` is not floating-point.

    Example:
        >>> hyperbolic_sin(jnp.array([-jnp.inf, 0.0, jnp.inf])).tolist()
        [-inf, 0.0, inf]
    """
    size = jnp.abs(x)
    growth, root = _expm1(size), jnp.exp(size / 2)
    small = 0.5 * (growth + growth / (growth + 1))
    large = 0.5 * root * root - 0.5 / root / root
    return jnp.sign(x) * jnp.where(size < 1, small, large)


@checked
@_derivatives(lambda dx, _, x: dx / jnp.hypot(x, 1.0))
def hyperbolic_arcsin(x: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    r"""Computes the inverse hyperbolic sine: a logarithm that is smooth through 0.

    .. math::
        f(x) = \log\bigl(x + \sqrt{x^2 + 1}\bigr)

    Args:
        x: values, `f[...]`, in units of return.

    Returns:
        Transformed values, `f[...]`, dimensionless; the inverse is `hyperbolic_sin`.

    Raises:
        TypeError: if `x` is not floating-point.

    Example:
        >>> hyperbolic_arcsin(jnp.array([-jnp.inf, 0.0, jnp.inf])).tolist()
        [-inf, 0.0, inf]
    """
    return jnp.arcsinh(x)


def _power_slope(x: Array, p: Array) -> Array:
    """The derivative of `power` with respect to `x`."""
    return (1 + jnp.abs(x) / jnp.sqrt(p)) ** (p - 1)


def _power_slope_in_p(y: Array, x: Array, p: Array) -> Array:
    """The derivative of `power` with respect to `p`."""
    root = jnp.sqrt(p)
    scaled = jnp.abs(x) / root
    log_slope = jnp.log1p(scaled) - 0.5 * scaled / (1 + scaled)
    return (jnp.sign(x) / root + y) * log_slope - 0.5 * y / p


@checked
@_derivatives(
    lambda dx, _, x, p: dx * _power_slope(x, p),
    lambda dp, y, x, p: dp * _power_slope_in_p(y, x, p),
)
def power(
    x: Annotated[Arg, "f[...]"],
    p: Annotated[Arg, "f[]"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes a power that is odd and passes through 0 with slope 1.

    .. math::
        f_p(x) = \operatorname{sign}(x) \, \frac{1}{\sqrt p}
                 \left[\left(1 + \frac{|x|}{\sqrt p}\right)^{p} - 1\right]

    It squashes for :math:`p < 1`, is the identity for :math:`p = 1`, and the inverse
    of :math:`f_p` is :math:`f_{1/p}`.

    Args:
        x: values, `f[...]`.
        p: the exponent, `f[]`, dimensionless, above 0; otherwise the result is NaN.

    Returns:
        Transformed values, `f[...]`, infinite where :math:`\sqrt p` times them or
        `x` divided by :math:`\sqrt p` exceeds the dtype.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> power(jnp.array([-2.0, 0.0, 4.0]), 4.0).tolist()
        [-7.5, 0.0, 40.0]
    """
    root = jnp.sqrt(p)
    scaled = jnp.abs(x) / root
    exponent = p * jnp.log1p(scaled)
    grown = jnp.where(exponent < 1, _expm1(exponent), (1 + scaled) ** p - 1)
    return jnp.sign(x) * grown / root


@_derivatives(lambda dx, _, x: dx * jnp.exp(x))
def _expm1(x: Array) -> Array:
    """Computes `exp(x) - 1` by its Taylor series near 0.

    There `jnp.expm1` is off by five units in the last place, this by one and a half.
    """
    series = jnp.ones_like(x)
    for k in range(16, 1, -1):  # as many terms as double precision wants
        series = 1 + series * x / k
    return jnp.where(jnp.abs(x) < 0.5, series * x, jnp.expm1(x))

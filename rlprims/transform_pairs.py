r"""Transforms paired with their inverses, and two-hot codes of transformed values.

A learner that predicts transformed values needs the way there and the way back: the
non-linear Bellman equation

.. math::
    Q(s, a) = \mathbb{E}\, h\bigl(r + \gamma \, h^{-1}(\max_{a'} Q(s', a'))\bigr)

uses both. A `TxPair` holds them as one object, to hand to an estimator or to combine
with others:

=========================  ==========================================================
pair                       a value `x` becomes
=========================  ==========================================================
`IDENTITY_PAIR`            itself
`SIGNED_LOGP1_PAIR`        `signed_logp1(x)`
`SIGNED_HYPERBOLIC_PAIR`   `signed_hyperbolic(x)`
`HYPERBOLIC_SIN_PAIR`      `hyperbolic_arcsin(x)`
`DISCOUNT_TRANSFORM_PAIR`  `-log(1 - x)`, for discounts and their like
`compose_tx(a, b)`         `b(a(x))`
`twohot_pair(...)`         weights on evenly spaced bins
`muzero_pair(...)`         the same for its transform
`unbiased_transform_pair`  weights on bins that are the inverse transform of such bins
=========================  ==========================================================

The functions of a pair take numbers of any shape, keep their dtype and compute in
single precision at least. They are compiled once for each pair and shape, so make a
pair of functions of your own outside the loop that uses it.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.transforms import (
    _expm1,
    hyperbolic_arcsin,
    hyperbolic_sin,
    identity,
    signed_expm1,
    signed_hyperbolic,
    signed_logp1,
    signed_parabolic,
)
from rlprims.two_hot import (
    _refuse_other_sizes,
    _refuses_empty_ranges,
    _uniform_bins,
    transform_from_2hot_nonlinear,
    transform_to_2hot_nonlinear,
)

__all__ = [
    "DISCOUNT_TRANSFORM_PAIR",
    "HYPERBOLIC_SIN_PAIR",
    "IDENTITY_PAIR",
    "SIGNED_HYPERBOLIC_PAIR",
    "SIGNED_LOGP1_PAIR",
    "TxPair",
    "compose_tx",
    "muzero_pair",
    "twohot_pair",
    "unbiased_transform_pair",
]


class TxPair(NamedTuple):
    """A transform and its inverse.

    Attributes:
        apply: the transform, a function of one array.
        apply_inv: its inverse, likewise.
    """

    apply: Callable[[Any], Array]
    apply_inv: Callable[[Any], Array]


@checked
def _log_horizon(discount: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    """Computes the logarithm of the horizon `1 / (1 - discount)`."""
    return -jnp.log1p(-discount)


@checked
def _discount(log_horizon: Annotated[Arg, "f[...]"]) -> Annotated[Array, "f[...]"]:
    """Computes the inverse of `_log_horizon`."""
    return -_expm1(-log_horizon)


IDENTITY_PAIR = TxPair(identity, identity)
SIGNED_LOGP1_PAIR = TxPair(signed_logp1, signed_expm1)
SIGNED_HYPERBOLIC_PAIR = TxPair(signed_hyperbolic, signed_parabolic)
HYPERBOLIC_SIN_PAIR = TxPair(hyperbolic_arcsin, hyperbolic_sin)
DISCOUNT_TRANSFORM_PAIR = TxPair(_log_horizon, _discount)


def compose_tx(*tx_list: TxPair) -> TxPair:
    r"""Composes pairs, the first one given being the first one applied.

    .. math::
        f(x) = f_n(\dots f_2(f_1(x))), \qquad
        f^{-1}(y) = f_1^{-1}(f_2^{-1}(\dots f_n^{-1}(y)))

    Args:
        *tx_list: pairs of functions of JAX arrays; none of them makes the identity.

    Returns:
        The pair of both compositions. Intermediate results are not rounded to the
        dtype of the argument if that is narrower than single precision.

    Raises:
        TypeError: if an argument is no pair.

    Example:
        >>> double = TxPair(lambda x: 2 * x, lambda x: x / 2)
        >>> shift = TxPair(lambda x: x + 1, lambda x: x - 1)
        >>> both = compose_tx(double, shift)
        >>> both.apply(3.0).item(), both.apply_inv(7.0).item()
        (7.0, 3.0)

    References:
        Van Hasselt et al., `General non-linear Bellman equations
        <https://arxiv.org/abs/1907.03687>`_, 2019.
    """
    pairs = [as_pair("compose_tx", tx) for tx in tx_list]
    forward = tuple(tx.apply for tx in pairs)
    backward = tuple(tx.apply_inv for tx in reversed(pairs))
    return TxPair(
        functools.partial(_chain, fns=forward),
        functools.partial(_chain, fns=backward),
    )


@_refuses_empty_ranges
def twohot_pair(min_value: Any, max_value: Any, num_bins: int) -> TxPair:
    """Pairs `transform_to_2hot` with `transform_from_2hot`.

    Args:
        min_value: the first bin, `f[]`, in units of return.
        max_value: the last bin, `f[]`, above `min_value`; checked only if both are
            Python numbers.
        num_bins: how many bins, an `int`, at least 2.

    Returns:
        A pair that turns values `f[...]` into weights `f[...,K]`, and back.

    Raises:
        ValueError: if there are fewer than 2 bins or the range is empty.
        TypeError: if `num_bins` is no `int`.

    Example:
        >>> pair = twohot_pair(-1.0, 1.0, 5)
        >>> pair.apply(0.25).tolist()
        [0.0, 0.0, 0.5, 0.5, 0.0]
        >>> pair.apply_inv(pair.apply(0.25)).item()
        0.25

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    return _code(min_value, max_value, num_bins, IDENTITY_PAIR, IDENTITY_PAIR)


@_refuses_empty_ranges
def muzero_pair(min_value: Any, max_value: Any, num_bins: int, tx: TxPair) -> TxPair:
    r"""Pairs the two-hot code of transformed values with its inverse.

    The same as `compose_tx(tx, twohot_pair(min_value, max_value, num_bins))`: with
    :math:`h` the transform and :math:`b_k` evenly spaced bins, a value :math:`x`
    becomes the weights of :math:`h(x)`, and weights become

    .. math::
        x = h^{-1}\Bigl(\sum_k p_k b_k\Bigr)

    A distribution of values does not decode to its mean, as :math:`h` does not commute
    with taking means; see `unbiased_transform_pair`.

    Args:
        min_value: the first bin, `f[]`, in units of the *transformed* value.
        max_value: the last bin, `f[]`, above `min_value`, likewise; checked only if
            both are Python numbers.
        num_bins: how many bins, an `int`, at least 2.
        tx: the transform with its inverse, such as `SIGNED_HYPERBOLIC_PAIR`.

    Returns:
        A pair that turns values `f[...]` into weights `f[...,K]`, and back.

    Raises:
        ValueError: if there are fewer than 2 bins or the range is empty.
        TypeError: if `num_bins` is no `int` or `tx` no pair.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> pair = muzero_pair(0.0, 4.0, 3, square)
        >>> pair.apply(9.0).tolist()  # its root is 3, half-way between 2 and 4
        [0.0, 0.5, 0.5]
        >>> pair.apply_inv(jnp.array([0.0, 0.5, 0.5])).item()
        9.0

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    tx = as_pair("muzero_pair", tx)
    return _code(min_value, max_value, num_bins, tx, IDENTITY_PAIR)


@_refuses_empty_ranges
def unbiased_transform_pair(
    min_value: Any, max_value: Any, num_bins: int, tx: TxPair
) -> TxPair:
    r"""Pairs the two-hot code on unevenly spaced bins with its inverse.

    Values are not transformed; the bins are. They are evenly spaced as *transformed*
    values :math:`b_k`, and so dense near 0 and far apart for large values:

    .. math::
        x = \sum_k p_k \, h^{-1}(b_k)

    Decoding is linear in the weights, so that a mean of codes decodes to the mean of
    the values, which is not so for `muzero_pair`.

    Args:
        min_value: the first bin before the inverse transform, `f[]`, in units of the
            *transformed* value.
        max_value: the last one, `f[]`, above `min_value`, likewise; checked only if
            both are Python numbers.
        num_bins: how many bins, an `int`, at least 2.
        tx: the transform with its inverse, such as `SIGNED_HYPERBOLIC_PAIR`; the
            inverse must be increasing.

    Returns:
        A pair that turns values `f[...]` into weights `f[...,K]`, and back.

    Raises:
        ValueError: if there are fewer than 2 bins or the range is empty.
        TypeError: if `num_bins` is no `int` or `tx` no pair.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> pair = unbiased_transform_pair(0.0, 4.0, 3, square)  # bins 0, 4 and 16
        >>> pair.apply(7.0).tolist()
        [0.0, 0.75, 0.25]
        >>> pair.apply_inv(jnp.array([0.0, 0.75, 0.25])).item()
        7.0
    """
    tx = as_pair("unbiased_transform_pair", tx)
    return _code(min_value, max_value, num_bins, IDENTITY_PAIR, tx)


def as_pair(name: str, tx: Any) -> TxPair:
    functions = getattr(tx, "apply", None), getattr(tx, "apply_inv", None)
    if not all(map(callable, functions)):
        raise TypeError(
            f"{name}: a transform must be a TxPair, with functions apply and "
            f"apply_inv, got {type(tx).__name__}."
        )
    return TxPair(tx.apply, tx.apply_inv)


@checked
def _chain(
    x: Annotated[Arg, "f[...]"], fns: tuple[Callable[[Any], Array], ...]
) -> Annotated[Array, "f[...]"]:
    """Applies functions one after the other."""
    return functools.reduce(lambda y, fn: fn(y), fns, x)


def _code(
    min_value: Any, max_value: Any, num_bins: int, value_tx: TxPair, bin_tx: TxPair
) -> TxPair:
    """Pairs the two-hot code of transformed values, on transformed bins."""
    settings = {
        "min_value": min_value,
        "max_value": max_value,
        "num_bins": num_bins,
        "value_tx": value_tx,
        "bin_tx": bin_tx,
    }
    return TxPair(
        functools.partial(_encode, **settings),
        functools.partial(_decode, **settings),
    )


@checked
def _encode(
    x: Annotated[Arg, "f[...]"],
    min_value: Annotated[Arg, "f[]"],
    max_value: Annotated[Arg, "f[]"],
    num_bins: int,
    value_tx: TxPair,
    bin_tx: TxPair,
) -> Annotated[Array, "f[...,K]"]:
    """Turns values into weights."""
    bins = bin_tx.apply_inv(_uniform_bins(min_value, max_value, num_bins))
    return transform_to_2hot_nonlinear(value_tx.apply(x), bins)


@checked
def _decode(
    probs: Annotated[Arg, "f[...,K]"],
    min_value: Annotated[Arg, "f[]"],
    max_value: Annotated[Arg, "f[]"],
    num_bins: int,
    value_tx: TxPair,
    bin_tx: TxPair,
) -> Annotated[Array, "f[...]"]:
    """Turns weights into values."""
    _refuse_other_sizes("apply_inv", probs, num_bins)
    bins = bin_tx.apply_inv(_uniform_bins(min_value, max_value, num_bins))
    return value_tx.apply_inv(transform_from_2hot_nonlinear(probs, bins))

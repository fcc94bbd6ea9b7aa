r"""Targets for values on a transformed scale: the non-linear Bellman equation.

Returns differ in size by orders of magnitude, and a network that predicts :math:`h(G)`
for an increasing :math:`h` sees less of that. Expectations do not pass through
:math:`h`, so targets are built on the scale of rewards: values go there by
:math:`h^{-1}`, any estimator of this library does its work, and :math:`h` takes the
targets back:

.. math::
    h\bigl(r_t + \gamma_t \, h^{-1}(v_t)\bigr)

`transform_values` makes such a function of any estimator; those that RLax has are here.
A `TxPair` holds :math:`h` and :math:`h^{-1}`. A pair that encodes values, such as
`muzero_pair`, has targets that are codes too.

A pair is fixed while tracing, and each new one compiles again: make a pair of functions
of your own outside the loop that uses it. No gradient flows through a transform where
its result is not finite, so that behind a zero discount nothing is left of it.
`truncation_t` and `mask_t` mean what they mean for returns.
"""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import guarded, keep_where
from rlprims.off_policy import general_off_policy_returns_from_action_values
from rlprims.returns import lambda_returns, n_step_bootstrapped_returns
from rlprims.transform_pairs import TxPair, as_pair

__all__ = [
    "transform_values",
    "transformed_general_off_policy_returns_from_action_values",
    "transformed_lambda_returns",
    "transformed_n_step_returns",
]


def transform_values(
    build_targets: Callable[..., Array], *value_argnums: int
) -> Callable[..., Array]:
    r"""Makes an estimator of transformed targets from transformed values.

    The result takes a `TxPair` before the other arguments, positional or by keyword.
    With :math:`f` the estimator and :math:`h` the transform it computes

    .. math::
        h\bigl(f(\dots, h^{-1}(v), \dots)\bigr)

    Args:
        build_targets: the estimator, a function that returns one array.
        *value_argnums: the positions of the arguments that are values; a default, or
            `None`, is left as it is.

    Returns:
        The function of a pair and the arguments of `build_targets`. Targets are 0 at
        steps that an argument named `mask_t` leaves out.

    Raises:
        ValueError: if there is no argument at such a position.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> twice = transform_values(lambda v, times=2.0: times * v, 0)
        >>> twice(square, 3.0, times=4.0).item()  # the root of 4 times 3 squared
        6.0

    References:
        Van Hasselt et al., `General non-linear Bellman equations
        <https://arxiv.org/abs/1907.03687>`_, 2019.
    """
    signature = inspect.signature(build_targets)
    names = [_parameter_at(position, signature) for position in value_argnums]
    name = f"transformed_{getattr(build_targets, '__name__', 'targets')}"

    def transformed(tx_pair: TxPair, *args: Any, **kwargs: Any) -> Array:
        pair = as_pair(name, tx_pair)
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}: {error}.") from None
        arguments = given.arguments
        for key in names:
            if arguments.get(key) is not None:
                arguments[key] = guarded(pair.apply_inv, jnp.asarray(arguments[key]))
        targets = guarded(pair.apply, build_targets(*given.args, **given.kwargs))
        return keep_where(arguments.get("mask_t"), targets)[0]

    transformed.__name__ = transformed.__qualname__ = name
    cast(Any, transformed).__signature__ = _with_a_pair(signature)
    return transformed


def _parameter_at(position: int, signature: inspect.Signature) -> str:
    """Returns the name of a parameter that takes a positional argument."""
    kinds = signature.parameters.items()
    names = [name for name, p in kinds if p.kind <= p.POSITIONAL_OR_KEYWORD]
    if not -len(names) <= position < len(names):
        raise ValueError(
            "transform_values: value_argnums must be positions of arguments of "
            f"build_targets, which takes {len(names)} by position, got {position}."
        )
    return names[position]


def _with_a_pair(signature: inspect.Signature) -> inspect.Signature:
    """Returns a signature with a pair before the other parameters."""
    others = list(signature.parameters.values())
    kind = min(inspect.Parameter.POSITIONAL_OR_KEYWORD, *(p.kind for p in others))
    pair = inspect.Parameter("tx_pair", kind, annotation=TxPair)
    return signature.replace(parameters=[pair, *others])


def _decoding(name: str, tx_pair: Any, key: str, value: Array, axes: str) -> TxPair:
    """Checks that the inverse leaves nothing of a code but one number for it."""
    pair = as_pair(name, tx_pair)
    rank = len(axes.split(","))
    shape = jax.eval_shape(pair.apply_inv, value).shape
    if shape != value.shape[:rank]:
        raise ValueError(
            f"{name}: {key} has shape {value.shape}, expected f[{axes}]|f[{axes},K] as "
            f"tx_pair has it: its apply_inv made the shape {shape} of this. For a "
            "batch, use jax.vmap."
        )
    return pair


_lambda_returns = transform_values(lambda_returns, 2)
_n_step_returns = transform_values(n_step_bootstrapped_returns, 2)
_off_policy_returns = transform_values(general_off_policy_returns_from_action_values, 0)


@checked
def transformed_lambda_returns(
    tx_pair: TxPair,
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]|f[T,K]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    stop_target_gradients: Flag = False,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]|f[T,K]"]:
    r"""Computes transformed :math:`\lambda`-returns from transformed values.

    .. math::
        h(G_{t-1}), \qquad G_{t-1} = r_t + \gamma_t \bigl[(1 - \lambda_t) \,
            h^{-1}(v_t) + \lambda_t \, G_t\bigr], \qquad G_T = h^{-1}(v_T)

    Args:
        tx_pair: the transform :math:`h` and its inverse, fixed while tracing.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: transformed values at times `1..T`, `f[T]|f[T,K]`.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no return sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Transformed returns from times `0..T-1`, `f[T]|f[T,K]`; 0 at steps that do not
        count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract, or `tx_pair` is no pair.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> r_t, discount_t = jnp.array([7.0, 7.0]), jnp.array([1.0, 0.5])
        >>> v_t = jnp.array([3.0, 2.0])
        >>> transformed_lambda_returns(square, r_t, discount_t, v_t).tolist()
        [4.0, 3.0]

    References:
        Van Hasselt et al., `General non-linear Bellman equations
        <https://arxiv.org/abs/1907.03687>`_, 2019.
    """
    tx_pair = _decoding("transformed_lambda_returns", tx_pair, "v_t", v_t, "T")
    return _lambda_returns(
        tx_pair,
        r_t,
        discount_t,
        v_t,
        lambda_,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )


@checked
def transformed_n_step_returns(
    tx_pair: TxPair,
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]|f[T,K]"],
    n: Annotated[int | Array, "i[]", "[1, inf)"],
    lambda_t: Annotated[Arg, "f[]|f[T]"] = 1.0,
    stop_target_gradients: Flag = False,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]|f[T,K]"]:
    r"""Computes transformed returns over `n` rewards, then bootstrapped.

    .. math::
        h\bigl(G_{t-1}^{(n)}\bigr), \qquad
        G_{t-1}^{(n)} = r_t + \gamma_t \bigl[(1 - \lambda_t) \, h^{-1}(v_t)
            + \lambda_t \, G_t^{(n-1)}\bigr], \qquad G_t^{(0)} = h^{-1}(v_t)

    Args:
        tx_pair: the transform :math:`h` and its inverse, fixed while tracing.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: transformed values at times `1..T`, `f[T]|f[T,K]`.
        n: number of rewards in each return, `i[]`, at least 1; may exceed `T`. A
            Python `int` is fixed while tracing; an array may be traced, and is not
            checked.
        lambda_t: mixing between bootstrapping at once (0) and after `n` steps (1),
            `f[]|f[T]`, dimensionless.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no return sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Transformed returns from times `0..T-1`, `f[T]|f[T,K]`; 0 at steps that do not
        count.

    Raises:
        ValueError: if a shape breaks its contract, or `n` is below 1.
        TypeError: if a dtype breaks its contract, or `tx_pair` is no pair.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> r_t, discount_t = jnp.array([7.0, 7.0]), jnp.array([1.0, 0.5])
        >>> v_t = jnp.array([0.0, 2.0])
        >>> transformed_n_step_returns(square, r_t, discount_t, v_t, 2).tolist()
        [4.0, 3.0]

    References:
        Van Hasselt et al., `General non-linear Bellman equations
        <https://arxiv.org/abs/1907.03687>`_, 2019.
        Kapturowski et al., `Recurrent Experience Replay in Distributed Reinforcement
        Learning <https://openreview.net/forum?id=r1lyTjAqYX>`_, 2019.
    """
    tx_pair = _decoding("transformed_n_step_returns", tx_pair, "v_t", v_t, "T")
    return _n_step_returns(
        tx_pair,
        r_t,
        discount_t,
        v_t,
        n,
        lambda_t,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )


@checked
def transformed_general_off_policy_returns_from_action_values(
    tx_pair: TxPair,
    q_t: Annotated[Arg, "f[T,A]|f[T,A,K]"],
    a_t: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    c_t: Annotated[Arg, "f[T]"],
    pi_t: Annotated[Arg, "f[T,A]"],
    stop_target_gradients: Flag = False,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]|f[T,K]"]:
    r"""Computes transformed off-policy returns from the values of all actions.

    .. math::
        h(G_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t \Bigl[\sum_a \pi_t(a) \, h^{-1}(q_t(a))
            + c_t \, \bigl(G_t - h^{-1}(q_t(a_t))\bigr)\Bigr], \qquad c_T = 0

    Args:
        tx_pair: the transform :math:`h` and its inverse, fixed while tracing.
        q_t: transformed action values at times `1..T`, `f[T,A]|f[T,A,K]`.
        a_t: actions taken at times `1..T`, `i[T]`, in `[0, A)`; the last is not used.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        c_t: corrections at times `1..T`, `f[T]`, dimensionless; the last is not used.
        pi_t: probabilities of the actions under the evaluated policy at times `1..T`,
            `f[T,A]`.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own state value, and no return sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Transformed returns from times `0..T-1`, `f[T]|f[T,K]`; 0 at steps that do not
        count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract, or `tx_pair` is no pair.

    Example:
        >>> square = TxPair(jnp.sqrt, jnp.square)
        >>> q_t, pi_t = jnp.array([[2.0, 0.0]]), jnp.array([[0.5, 0.5]])
        >>> a_t, r_t, ones = jnp.array([0]), jnp.array([2.0]), jnp.ones(1)
        >>> transformed_general_off_policy_returns_from_action_values(
        ...     square, q_t, a_t, r_t, ones, ones, pi_t
        ... ).tolist()  # the root of 2 + 0.5 * 4
        [2.0]

    References:
        Van Hasselt et al., `General non-linear Bellman equations
        <https://arxiv.org/abs/1907.03687>`_, 2019.
        Munos, Stepleton, Harutyunyan and Bellemare, `Safe and Efficient Off-Policy
        Reinforcement Learning <https://arxiv.org/abs/1606.02647>`_, 2016.
    """
    name = "transformed_general_off_policy_returns_from_action_values"
    tx_pair = _decoding(name, tx_pair, "q_t", q_t, "T,A")
    return _off_policy_returns(
        tx_pair,
        q_t,
        a_t,
        r_t,
        discount_t,
        c_t,
        pi_t,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )

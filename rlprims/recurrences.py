"""The one recurrence behind every multistep estimator.

Each of them is a linear recurrence that runs backwards in time, with coefficients of
its own:

=====================  ========================  ===================  ==============
estimator              input `u_t`               decay `a_t`          last
=====================  ========================  ===================  ==============
discounted return      `r`                       `γ`                  `v_T`
λ-return               `r + γ (1 - λ) v`         `γ λ`                `v_T`
GAE                    `r + γ v' - v`            `γ λ`                0
importance-corrected   `ρ (r + γ v' - v)`        `ρ γ λ`              0
V-trace                `ρ̄ (r + γ v' - v)`        `γ c̄ λ`              0
general off-policy     `r + γ (v - c q)`         `γ c`                `r_T + γ_T v_T`
=====================  ========================  ===================  ==============

Two things interrupt a trajectory besides a termination, and both are settled here for
every estimator. A time limit cuts the episode after a step: `uncut` makes the weight
of what follows zero, so that the step bootstraps from its own next value. Padding is
passed over, as if it were not there.
"""

import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from rlprims._checks import Arg, checked
from rlprims.arrays import contain_nonfinite, keep_where

__all__ = ["backward_recurrence"]


@checked
def backward_recurrence(
    input_t: Annotated[Arg, "f[T]"],
    decay_t: Annotated[Arg, "f[T]"],
    last: Annotated[Arg, "f[]"] = 0.0,
    *,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Solves a linear recurrence backwards in time.

    .. math::
        x_t = u_t + a_t \, x_{t+1}, \qquad x_T = \text{last}

    The derivative is the same recurrence run forwards in time, so that
    differentiating keeps nothing but the decays and, where they are differentiated
    too, the solution.

    Args:
        input_t: inputs :math:`u_t`, `f[T]`.
        decay_t: decays :math:`a_t`, `f[T]`; a zero cuts the future off exactly, NaN
            and infinity included.
        last: the value beyond the end of the sequence, `f[]`.
        mask_t: whether each step counts, `b[T]`; the others are passed over, NaN
            included. All count if `None`.

    Returns:
        The solution :math:`x_t`, `f[T]`, in the units of `input_t`; 0 at steps that
        do not count.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> inputs, decays = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5])
        >>> backward_recurrence(inputs, decays, 4.0).tolist()
        [3.0, 4.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018,
        eq. 12.18, of which this is the general form.
    """
    inputs, decays = passing_over(mask_t, input_t, decay_t)
    (solution,) = keep_where(mask_t, _recurrence(inputs, decays, last, decays == 0))
    return solution


def passing_over(
    mask_t: Array | None, input_t: Array, decay_t: Array
) -> tuple[Array, Array]:
    """Returns coefficients that hand on, at a step left out, what follows it."""
    if mask_t is None:
        return input_t, decay_t
    return jnp.where(mask_t, input_t, 0), jnp.where(mask_t, decay_t, 1)


def uncut(weight: Array, truncation_t: Array | None, mask_t: Array | None) -> Array:
    """Returns the weight of what follows each step: 0 where a trajectory is cut.

    That is after a truncated step, and after the last step before padding that holds
    a truncation or runs to the end: with a step masked out, what was known of its end
    is left to the step before.
    """
    if mask_t is None:
        return weight if truncation_t is None else jnp.where(truncation_t, 0, weight)
    if truncation_t is None:
        truncation_t = jnp.zeros_like(mask_t)
    # Counts the truncations, and the end, in the padding from each step on.
    padding = jnp.where(mask_t, 0.0, 1.0)
    ends = backward_recurrence(jnp.where(truncation_t, padding, 0), padding, 1.0)
    following = jnp.append(ends, 1.0)[1:]
    return jnp.where(mask_t & ~truncation_t & (following == 0), weight, 0)


def followed(
    weight_t: Array, truncation_t: Array | None, mask_t: Array | None
) -> Array:
    """Returns `uncut` weights, and 0 at the end, which no other step follows either."""
    return uncut(weight_t, truncation_t, mask_t).at[-1:].set(0)


def last_steps(
    discount_t: Array, truncation_t: Array | None, mask_t: Array | None
) -> Array:
    """Returns the step that the episode of each step ends with: a number in `[0, T)`.

    It terminates there, or is cut, or the trajectory ends. Padding after the last step
    that counts gives `T`.
    """
    goes_on = followed((discount_t != 0).astype(discount_t.dtype), truncation_t, mask_t)
    is_last = goes_on == 0 if mask_t is None else mask_t & (goes_on == 0)
    steps, size = jnp.arange(len(discount_t)), len(discount_t)
    return jax.lax.cummin(jnp.where(is_last, steps, size), reverse=True)


def numbered(mask_t: Array | None, size: int) -> tuple[Array, Array, Array]:
    """Returns which steps count, and two ways between steps and their numbers.

    Those that count are numbered `0, 1, …`: the second result is the number of each
    step, or of the one before it that counts, and the third is the step of each number.
    """
    counts = jnp.ones(size, bool) if mask_t is None else mask_t
    return counts, jnp.cumsum(counts) - 1, jnp.argsort(~counts, stable=True)


def next_counted(x_t: Array, mask_t: Array | None) -> Array:
    """Returns what each step is followed by, padding passed over; 0 at the end."""
    inputs, decays = passing_over(mask_t, x_t, jnp.zeros_like(x_t))
    return jnp.append(backward_recurrence(inputs, decays), 0)[1:]


@jax.custom_jvp
def _recurrence(u: Array, a: Array, last: Array, cut: Array | None) -> Array:
    """Solves `x_t = u_t + a_t x_{t+1}`, ignoring `x_{t+1}` where `cut` is true.

    `cut` may only be true where `a` is zero, so that it changes no finite value.
    """
    return _solve(u, a, last, cut)


@functools.partial(_recurrence.defjvp, symbolic_zeros=True)
def _recurrence_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    """Differentiates the recurrence: the tangent obeys it too, with other inputs."""
    u, a, last, cut = primals
    du, da, dlast = map(_dense, tangents, primals[:3])
    x = _recurrence(u, a, last, cut)
    if isinstance(tangents[1], SymbolicZero):  # the solution need not be kept
        return x, _recurrence(du, a, dlast, None)
    following = jnp.concatenate([x[1:], last[None]])[: len(x)]
    # Only what is not finite stays cut: a decay of zero has a derivative like any.
    lost = (a == 0) & ~jnp.isfinite(following)
    du += da * contain_nonfinite(following, a)
    return x, _recurrence(du, a, dlast, lost)


def _dense(tangent: Any, primal: Array) -> Array:
    return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent


def _solve(u: Array, a: Array, last: Array, cut: Array | None) -> Array:
    """Solves the recurrence along the first axis: the one place to choose how."""
    if len(u) == 0:
        return u

    def step(x: Array, uac: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        u, a, cut = uac
        x = u + a * (x if cut is None else jnp.where(cut, 0, x))
        return x, x

    # Inside `shard_map` the carry must vary over the devices that the steps vary over.
    # A choice that always falls on `last` makes it so, and is linear in both sides.
    never = (a[-1] < 0) & (a[-1] > 0)
    init = jnp.where(never, u[-1], last)
    return jax.lax.scan(step, init, (u, a, cut), reverse=True)[1]

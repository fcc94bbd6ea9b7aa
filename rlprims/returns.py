"""Multistep estimates of the return, from rewards and values along a trajectory.

A trajectory of `T` transitions starts in states `0..T-1` and gives rewards, discounts
and values at times `1..T`. Its end need not be the end of an episode: every estimator
bootstraps there from the last value. It may hold several episodes, and padding:

*   A zero discount marks a termination. Nothing that comes after it, not even NaN,
    reaches an estimate from before.
*   `truncation_t` marks a time limit. The discount stays positive, `v_t` is the value
    of the final observation, and the estimates before bootstrap from it.
*   `mask_t` leaves steps out. If the value of a final observation was lost to an
    automatic reset, leave its step out and mark it as truncated all the same: the
    step before is then the last of its episode.

The estimates are those of each episode by itself, to rounding.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where, weighted
from rlprims.gradients import stop_gradient_if
from rlprims.recurrences import backward_recurrence, followed, uncut

__all__ = [
    "discounted_returns",
    "lambda_returns",
    "n_step_bootstrapped_returns",
    "rewards_to_go",
    "soft_lambda_returns",
]

Maps = tuple[Array, Array]  # `u` and `a` of the maps `x -> u_t + a_t x`


@checked
def lambda_returns(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    stop_target_gradients: Flag = False,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes :math:`\lambda`-returns, truncated at the end of the trajectory.

    Which algorithm this serves depends on the values: state values give TD(λ), the
    value of the action taken Sarsa(λ), the maximum over actions Peng's Q(λ).

    .. math::
        G_{t-1} = r_t + \gamma_t \bigl[(1 - \lambda_t) \, v_t + \lambda_t \, G_t\bigr],
        \qquad G_T = v_T

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: values at times `1..T`, `f[T]`, in units of return.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no return sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`; 0 at steps that do
        not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> lambda_returns(jnp.ones(2), jnp.full(2, 0.5), jnp.full(2, 4.0)).tolist()
        [2.5, 3.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 12.18.
    """
    r_t, discount_t, v_t = keep_where(mask_t, r_t, discount_t, v_t)
    lambda_t = uncut(lambda_, truncation_t, mask_t)
    inputs = r_t + weighted(v_t, discount_t * (1 - lambda_t))
    decays = discount_t * lambda_t
    returns = backward_recurrence(inputs, decays, _last(v_t), mask_t=mask_t)
    return stop_gradient_if(stop_target_gradients, returns)


@checked
def discounted_returns(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[]|f[T]"],
    stop_target_gradients: Flag = False,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes discounted returns, with a bootstrap at the end of the trajectory.

    .. math::
        G_{t-1} = r_t + \gamma_t \, G_t, \qquad G_T = v_T

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: values at times `1..T`, or one for every time, `f[]|f[T]`, in units of
            return; only that at time `T` is used, and those at truncated steps.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no return sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`; 0 at steps that do
        not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> discounted_returns(jnp.ones(2), jnp.full(2, 0.5), 4.0).tolist()
        [2.5, 3.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 12.17.
    """
    if truncation_t is None and mask_t is None:
        returns = backward_recurrence(r_t, discount_t, _last(v_t))
    else:
        v_t = jnp.broadcast_to(v_t, r_t.shape)
        returns = lambda_returns(
            r_t, discount_t, v_t, truncation_t=truncation_t, mask_t=mask_t
        )
    return stop_gradient_if(stop_target_gradients, returns)


@checked
def n_step_bootstrapped_returns(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    n: Annotated[int | Array, "i[]", "[1, inf)"],
    lambda_t: Annotated[Arg, "f[]|f[T]"] = 1.0,
    stop_target_gradients: Flag = False,
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
) -> Annotated[Array, "f[T]"]:
    r"""Computes returns over `n` rewards, then bootstrapped.

    Within `n` steps of the end of the trajectory, the return runs to the end and
    bootstraps from the last value there. With `lambda_t` below 1 these are
    λ-returns, truncated after `n` steps.

    .. math::
        G_{t-1}^{(n)} = r_t + \gamma_t \bigl[(1 - \lambda_t) \, v_t
            + \lambda_t \, G_t^{(n-1)}\bigr], \qquad G_t^{(0)} = v_t

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: values at times `1..T`, `f[T]`, in units of return.
        n: number of rewards in each return, `i[]`, at least 1; may exceed `T`. A
            Python `int` is fixed while tracing; an array may be traced, and is not
            checked.
        lambda_t: mixing between bootstrapping at once (0) and after `n` steps (1),
            `f[]|f[T]`, dimensionless.
        stop_target_gradients: whether to block gradients through the result, `b[]`;
            by default they flow.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no return sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`; 0 at steps that do
        not count.

    Raises:
        ValueError: if a shape breaks its contract, or `n` is below 1.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> r_t, v_t = jnp.ones(3), jnp.array([2.0, 4.0, 8.0])
        >>> n_step_bootstrapped_returns(r_t, jnp.full(3, 0.5), v_t, 2).tolist()
        [2.5, 3.5, 5.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018,
        eq. 7.1 (eq. 12.9 for the λ-return so truncated).
    """
    steps = len(r_t)
    if isinstance(n, int):
        n = min(n, steps)
    else:
        n = jnp.minimum(n, jnp.asarray(steps, n.dtype)).astype(jnp.int32)
    lambda_t = jnp.broadcast_to(uncut(lambda_t, truncation_t, mask_t), r_t.shape)
    r_t, discount_t, v_t, lambda_t = _to_the_front(
        mask_t, *keep_where(mask_t, r_t, discount_t, v_t), lambda_t
    )
    inputs = r_t + weighted(v_t, discount_t * (1 - lambda_t))
    total, decay = _compose_steps(inputs, discount_t * lambda_t, n)
    ends = jnp.minimum(jnp.arange(steps, dtype=jnp.int32) + n, steps) - 1
    returns = _put_back(mask_t, total + weighted(v_t[ends], decay))
    return stop_gradient_if(stop_target_gradients, returns)


@checked
def rewards_to_go(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes discounted sums of the rewards that are still to come.

    They are returns without a bootstrap, as REINFORCE wants them. Nothing stands for
    the rewards that a time limit or the end of the trajectory has cut off: there the
    sum ends, as after a termination. Where values are at hand, `discounted_returns`
    bootstraps from them.

    .. math::
        G_{t-1} = r_t + \gamma_t \, G_t, \qquad G_T = 0

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`: no
            sum sees beyond. None was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to block gradients through the result, `b[]`.

    Returns:
        Sums from times `0..T-1`, `f[T]`, in the units of `r_t`; 0 at steps that do not
        count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> rewards_to_go(jnp.ones(3), jnp.array([0.5, 0.0, 0.5])).tolist()
        [1.5, 1.0, 1.0]

    References:
        Williams, `Simple Statistical Gradient-Following Algorithms for Connectionist
        Reinforcement Learning <https://doi.org/10.1007/BF00992696>`_, 1992.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, section
        13.3.
    """
    return discounted_returns(
        r_t,
        discount_t,
        0.0,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )


@checked
def soft_lambda_returns(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    entropy_t: Annotated[Arg, "f[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"] = 1.0,
    *,
    temperature: Annotated[Arg, "f[]", "[0, inf)"],
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes :math:`\lambda`-returns that reward the entropy of the policy too.

    They are targets for soft action values, :math:`Q(s_{t-1}, a_{t-1})`. The first
    action is given, so that its own entropy is no part of them: they pay for the
    entropy at each later state that they pass through. A soft state value, from which
    they bootstrap, has that of its own state in it, :math:`v_t = \sum_a \pi_t(a) \,
    [q_t(a) - \eta \log \pi_t(a)]`. For targets of soft state values, add
    `temperature` times the entropy at times `0..T-1`.

    .. math::
        G_{t-1} = r_t + \gamma_t \bigl[(1 - \lambda_t) \, v_t
            + \lambda_t \, (\eta \mathcal{H}_t + G_t)\bigr],
        \qquad \eta \mathcal{H}_T + G_T = v_T

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: soft state values at times `1..T`, `f[T]`, in units of return.
        entropy_t: entropies :math:`\mathcal{H}_t` of the policy at times `1..T`,
            `f[T]`, in nats; or minus the log-probabilities of the actions taken, of
            which they are the mean. The last is not used, nor those at truncated
            steps, as `v_t` has them.
        lambda_: mixing between bootstrapping at once (0) and never (1), `f[]|f[T]`,
            dimensionless.
        temperature: what a nat of entropy is worth, :math:`\eta`, `f[]`, in units of
            return, not negative; 0 gives `lambda_returns`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `v_t`, and no return sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to block gradients through the result, `b[]`.

    Returns:
        Returns from times `0..T-1`, `f[T]`, in the units of `r_t`; 0 at steps that do
        not count.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            below 0; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> r_t, discount_t, v_t = jnp.ones(2), jnp.full(2, 0.5), jnp.full(2, 4.0)
        >>> entropy_t = jnp.array([3.0, jnp.nan])
        >>> soft_lambda_returns(
        ...     r_t, discount_t, v_t, entropy_t, temperature=2.0
        ... ).tolist()  # 1 + 0.5 * (2 * 3 + 3) and 1 + 0.5 * 4
        [5.5, 3.0]

    References:
        Haarnoja et al., `Soft Actor-Critic: Off-Policy Maximum Entropy Deep RL with a
        Stochastic Actor <https://arxiv.org/abs/1801.01290>`_, 2018, for soft values and
        the target of one step.
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018, eq. 12.18,
        for the recursion.
    """
    r_t, discount_t, entropy_t = keep_where(mask_t, r_t, discount_t, entropy_t)
    passed = followed(discount_t * lambda_, truncation_t, mask_t)
    return lambda_returns(
        r_t + weighted(entropy_t, temperature * passed),
        discount_t,
        v_t,
        lambda_,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )


def _last(v_t: Array) -> Array:
    """Returns the value to bootstrap from at the end of the trajectory."""
    return (
        v_t if v_t.ndim == 0 else v_t[-1] if len(v_t) else jnp.zeros_like(v_t, shape=())
    )


def _to_the_front(mask: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """Moves the steps that count to the front, in order."""
    if mask is None:
        return arrays
    order = jnp.argsort(~mask, stable=True)
    return tuple(x[order] for x in arrays)


def _put_back(mask: Array | None, returns: Array) -> Array:
    """Moves the steps that count from the front to where they were."""
    if mask is None:
        return returns
    return jnp.where(mask, returns[jnp.cumsum(mask) - 1], 0)


def _compose_steps(u: Array, a: Array, n: int | Array) -> Maps:
    """Composes each of the maps `x -> u_t + a_t x` with the `n - 1` that follow it.

    Beyond the end stands the identity. Spans of 1, 2, 4, … maps are built by doubling
    and those that `n` has in binary joined, which takes `O(log n)` operations.
    """
    span, joined = (u, a), (jnp.zeros_like(u), jnp.ones_like(a))
    for bit in range(len(u).bit_length()):
        longer = _compose(span, joined, 2**bit)
        joined = _choose((n >> bit) & 1 == 1, longer, joined)
        span = _compose(span, span, 2**bit)
    return joined


def _choose(flag: bool | Array, yes: Maps, no: Maps) -> Maps:
    if isinstance(flag, bool):
        return yes if flag else no
    return jnp.where(flag, yes[0], no[0]), jnp.where(flag, yes[1], no[1])


def _compose(early: Maps, late: Maps, shift: int) -> Maps:
    """Composes each map in `early` with the one `shift` places on in `late`."""
    (u, a), (late_u, late_a) = early, late
    late_u = jnp.pad(late_u[shift:], (0, min(shift, len(u))))
    late_a = jnp.pad(late_a[shift:], (0, min(shift, len(u))), constant_values=1)
    return u + weighted(late_u, a), weighted(late_a, a)

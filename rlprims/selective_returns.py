"""Returns that follow a trajectory only as long as it goes well.

A multistep return sees far ahead, and takes the blame for every later action that was
not a good one. These two leave the trajectory where that happens, and bootstrap there.
Each is a λ-return that is told step by step how far to go:

*   Watkins' Q(λ) follows the trajectory while the actions are greedy, since what came
    after another one says nothing of the best policy. `watkins_lambda` tells where that
    was.
*   `upgo_returns` follows it while the actions do at least as well as expected.

`truncation_t` and `mask_t` mean what they mean for returns.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.action_value_traces import q_lambda
from rlprims.arrays import (
    batched_index,
    contain_nonfinite,
    greatest,
    keep_where,
    weighted,
)
from rlprims.categorical import which_legal
from rlprims.recurrences import followed, next_counted
from rlprims.returns import lambda_returns

__all__ = ["upgo_returns", "watkins_lambda", "watkins_q_lambda"]


@checked
def watkins_lambda(
    q_t: Annotated[Arg, "f[...,A]"],
    a_t: Annotated[Arg, "i[...]"],
    lambda_: Annotated[Arg, "f[]|f[...]"] = 1.0,
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the λ that makes Peng's Q(λ) Watkins': 0 where an action explored.

    .. math::
        \lambda'_t = \lambda_t \, 1\bigl[q_t(a_t) = \max_a q_t(a)\bigr]

    The result is the `lambda_` of `q_lambda`, of its relatives or of `lambda_returns`.
    It belongs to the state that a step reaches and the action taken there: where that
    action explored, the target of the step before it bootstraps from the best value
    of this state, and does not see what the action led to. An action that ties with
    the best is greedy. So is none where a value is NaN, whose error will be NaN too.

    Args:
        q_t: action values, at times `1..T` in a trajectory, `f[...,A]`, in any units.
        a_t: actions taken there, `i[...]`, in `[0, A)`; outside, the result is NaN.
        lambda_: mixing between bootstrapping at once (0) and never (1) after a greedy
            action, `f[]|f[...]`, dimensionless.
        mask: whether each action is legal, `b[...,A]`; all are if `None`. One that is
            not is not greedy.

    Returns:
        The mixing after each action, `f[...]`, dimensionless: `lambda_`, or 0.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_t = jnp.array([[1.0, 2.0], [2.0, 2.0], [1.0, 2.0]])
        >>> watkins_lambda(q_t, jnp.array([1, 0, 0]), 0.5).tolist()
        [0.5, 0.5, 0.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018,
        section 12.10.
    """
    legal = which_legal(q_t, mask)
    best = greatest(jnp.where(legal, q_t, -jnp.inf), keepdims=True)
    greedy = jnp.where(legal & (q_t == best), 1, jnp.zeros_like(q_t))
    return batched_index(greedy, a_t) * lambda_


@checked
def watkins_q_lambda(
    q_tm1: Annotated[Arg, "f[T,A]"],
    a_tm1: Annotated[Arg, "i[T]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    q_t: Annotated[Arg, "f[T,A]"],
    a_t: Annotated[Arg, "i[T]"],
    lambda_: Annotated[Arg, "f[]|f[T]"],
    *,
    mask: Annotated[Arg | None, "b[T,A]"] = None,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes the errors of Watkins' Q(λ) along a trajectory.

    The first action of a target may be any. The target then follows the trajectory as
    long as its actions are greedy, and bootstraps from the best action where the next
    one is not. Peng's Q(λ), `q_lambda`, goes on after any action: it learns faster, and
    the values of a policy between the one that acted and the best.

    .. math::
        \delta_{t-1} = G_{t-1} - q_{t-1}(a_{t-1}), \qquad
        G_{t-1} = r_t + \gamma_t \Bigl[(1 - \lambda'_t) \max_a q_t(a)
            + \lambda'_t \, G_t\Bigr], \qquad
        \lambda'_t = \lambda_t \, 1\bigl[q_t(a_t) = \max_a q_t(a)\bigr]

    with :math:`G_T = \max_a q_T(a)`.

    Args:
        q_tm1: action values at times `0..T-1`, `f[T,A]`, in units of return.
        a_tm1: actions taken at times `0..T-1`, `i[T]`, in `[0, A)`.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        q_t: action values at times `1..T`, `f[T,A]`, in units of return.
        a_t: actions taken at times `1..T`, `i[T]`, in `[0, A)`; the last is not used.
        lambda_: mixing between bootstrapping at once (0) and never (1) after a greedy
            action, `f[]|f[T]`, dimensionless.
        mask: whether each action is legal at times `1..T`, `b[T,A]`; all are if `None`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own value, and no target sees beyond. None was
            cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        The errors, targets minus predictions, `f[T]`, in units of return; 0 at steps
        that do not count.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> q_tm1 = q_t = jnp.array([[1.0, 2.0], [4.0, 2.0]])
        >>> a_tm1, r_t, discount_t = jnp.array([1, 0]), jnp.ones(2), jnp.full(2, 0.5)
        >>> transitions = q_tm1, a_tm1, r_t, discount_t, q_t
        >>> watkins_q_lambda(*transitions, jnp.array([1, 0]), 1.0).tolist()  # greedy
        [0.5, -1.0]
        >>> watkins_q_lambda(*transitions, jnp.array([0, 0]), 1.0).tolist()
        [0.0, -1.0]

    References:
        Sutton and Barto, `Reinforcement Learning: An Introduction
        <http://incompleteideas.net/book/the-book-2nd.html>`_, 2nd ed., 2018,
        section 12.10.
    """
    q_t, a_t, discount_t = keep_where(mask_t, q_t, a_t, discount_t)
    lambda_t = contain_nonfinite(
        watkins_lambda(q_t, a_t, mask=mask), followed(discount_t, truncation_t, mask_t)
    )
    return q_lambda(
        q_tm1,
        a_tm1,
        r_t,
        discount_t,
        q_t,
        weighted(lambda_t, lambda_),
        stop_target_gradients,
        mask=mask,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )


@checked
def upgo_returns(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    v_t: Annotated[Arg, "f[T]"],
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T]"]:
    r"""Computes upgoing returns, which pass over what went worse than expected.

    Whether an action did at least as well as expected is judged by one step: its reward
    and the value of the state it led to, against the value of the state it was taken
    in. If not, the return bootstraps from the latter. Its advantage over the value of
    the first state, times a clipped importance ratio, is what the UPGO policy gradient
    weighs actions by. The paper has a discount of 1 until the end.

    .. math::
        G_{t-1} = r_t + \gamma_t \begin{cases}
            G_t & r_{t+1} + \gamma_{t+1} \, v_{t+1} \ge v_t \\
            v_t & \text{otherwise}
        \end{cases}, \qquad G_T = v_T

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        v_t: values at times `1..T`, `f[T]`, in units of return.
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
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> r_t, v_t = jnp.array([1.0, 3.0, 1.0]), jnp.array([4.0, 4.0, 2.0])
        >>> upgo_returns(r_t, jnp.full(3, 0.5), v_t).tolist()
        [3.5, 5.0, 2.0]

    References:
        Vinyals et al., `Grandmaster level in StarCraft II using multi-agent
        reinforcement learning <https://doi.org/10.1038/s41586-019-1724-z>`_, 2019.
    """
    r_t, discount_t, v_t = keep_where(mask_t, r_t, discount_t, v_t)
    q_t = next_counted(r_t + weighted(v_t, discount_t), mask_t)
    # Where either is NaN, that of the two is chosen which shows it.
    lambda_t = jnp.where((q_t < v_t) | jnp.isnan(v_t), 0, jnp.ones_like(v_t))
    return lambda_returns(
        r_t,
        discount_t,
        v_t,
        lambda_t,
        stop_target_gradients,
        truncation_t=truncation_t,
        mask_t=mask_t,
    )

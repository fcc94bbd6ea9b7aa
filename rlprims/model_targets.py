r"""Targets of a model that is unrolled from every step of a trajectory.

A model that is learned for planning starts from a state, is given the actions that
were taken there, and predicts at each of `K` steps the reward, the value and the
policy. It never sees a state again, so that what it should have predicted `k` steps
after time `t` is what happened at time `t + k`:

==========  ================================  =====================================
prediction  target at unroll step `k`         at `k = 0`
==========  ================================  =====================================
value       the return from time `t + k`      that from `t`
policy      what a search found at `t + k`    that found at `t`
reward      the reward at time `t + k`,       none: there was no action yet
            of the transition into the state
==========  ================================  =====================================

Returns are whatever estimator gives them. MuZero's bootstrap after `n` steps:

>>> from rlprims import n_step_bootstrapped_returns
>>> r_t, discount_t = jnp.array([1.0, 2.0, 4.0]), jnp.array([0.5, 0.5, 0.0])
>>> v_t, pi_tm1 = jnp.array([8.0, 8.0, 8.0]), jnp.full((3, 2), 0.5)
>>> returns = n_step_bootstrapped_returns(r_t, discount_t, v_t, 2)
>>> targets = muzero_targets(returns, pi_tm1, r_t, discount_t, num_unroll_steps=2)
>>> targets.value.tolist()  # 0 after the end
[[4.0, 4.0, 4.0], [4.0, 4.0, 0.0], [4.0, 0.0, 0.0]]
>>> targets.reward.tolist()
[[0.0, 1.0, 2.0], [0.0, 2.0, 4.0], [0.0, 4.0, 0.0]]
>>> targets.policy_mask.tolist()
[[True, True, True], [True, True, False], [True, False, False]]

The losses take predictions in the same shape and the mask. MuZero gives the `K`
unrolled steps together the weight of the first, by scaling their gradients:

>>> from rlprims import scale_gradient, two_hot_loss
>>> logits, bins = jnp.zeros((3, 3, 5)), jnp.linspace(0.0, 4.0, 5)
>>> losses = two_hot_loss(
...     logits, targets.value, bins, mask_t=targets.value_mask, reduction="none"
... )
>>> unrolled = scale_gradient(losses[:, 1:], 1 / 2)  # 1 / K
>>> loss = jnp.mean(losses[:, 0] + jnp.sum(unrolled, axis=1))

and halves the gradient at the start of each step of the model: the dynamics are applied
to `scale_gradient(state, 0.5)`.

Of a window that was cut out of a trajectory to start at its first step, take row 0 of
each target. Let it hold `K + n` steps, as the last returns bootstrap where it ends.
"""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import keep_where, lhs_broadcast
from rlprims.gradients import stop_gradient_if
from rlprims.recurrences import last_steps, numbered

__all__ = ["ModelTargets", "muzero_targets"]


class ModelTargets(NamedTuple):
    """What a model should predict, from each step and for each unroll step `0..K`.

    Attributes:
        value: returns, `f[T,K+1]`, in units of return.
        reward: rewards of the transitions into the states, `f[T,K+1]`.
        policy: probabilities of actions, `f[T,K+1,A]`, dimensionless.
        value_mask: whether there is a target for the value, `b[T,K+1]`.
        reward_mask: whether there is one for the reward, `b[T,K+1]`.
        policy_mask: whether there is one for the policy, `b[T,K+1]`.
    """

    value: Annotated[Array, "f[T,K+1]"]
    reward: Annotated[Array, "f[T,K+1]"]
    policy: Annotated[Array, "f[T,K+1,A]"]
    value_mask: Annotated[Array, "b[T,K+1]"]
    reward_mask: Annotated[Array, "b[T,K+1]"]
    policy_mask: Annotated[Array, "b[T,K+1]"]


@checked
def muzero_targets(
    returns_tm1: Annotated[Arg, "f[T]"],
    pi_tm1: Annotated[Arg, "f[T,A]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    *,
    num_unroll_steps: int,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> ModelTargets:
    r"""Lays out the targets of a model unrolled from each step of a trajectory.

    .. math::
        z_{t,k} = G_{t+k}, \qquad p_{t,k} = \pi_{t+k}, \qquad
        u_{t,k} = r_{t+k} \quad (k \ge 1)

    for `t` in `0..T-1` and `k` in `0..K`, where these exist. Beyond the end of an
    episode nothing comes from the next one. What stands there depends on the end:

    *   After a termination the state is absorbing. Rewards and values are 0, and are
        to be learned. The policy is uniform, and is not: its mask is false.
    *   After a time limit, and at the end of the trajectory, nothing is known: all
        are 0 and all masks false. The reward of the last transition is known, and is
        a target; the value of the state that it leads to is none, as it is but the
        estimate that the returns bootstrap from.

    Args:
        returns_tm1: returns :math:`G` from times `0..T-1`, `f[T]`, in units of return,
            such as those of `n_step_bootstrapped_returns`.
        pi_tm1: probabilities of actions that a search found at times `0..T-1`,
            `f[T,A]`, dimensionless, such as shares of visits.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless; 0 on
            termination. Nothing else about them matters.
        num_unroll_steps: the number `K` of steps that the model is unrolled for, a
            Python `int`, at least 0; may exceed `T`.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`.
            None was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to block gradients through the result, `b[]`.

    Returns:
        The `ModelTargets`: of each step, returns and rewards `f[T,K+1]`, policies
        `f[T,K+1,A]`, and which of them are targets, `b[T,K+1]`. All are 0 and false
        at steps that do not count.

    Raises:
        ValueError: if a shape breaks its contract, or `num_unroll_steps` is negative;
            use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract, or `num_unroll_steps` is no Python
            `int`.

    Example:
        >>> returns, pi, r_t = jnp.array([3.0, 2.0]), jnp.ones((2, 1)), jnp.ones(2)
        >>> targets = muzero_targets(returns, pi, r_t, r_t, num_unroll_steps=2)
        >>> targets.value.tolist()
        [[3.0, 2.0, 0.0], [2.0, 0.0, 0.0]]
        >>> targets.value_mask.tolist()  # the trajectory ends within its episode
        [[True, True, False], [True, False, False]]
        >>> targets.reward_mask.tolist()
        [[False, True, True], [False, True, False]]

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    if num_unroll_steps < 0:
        raise ValueError(
            f"muzero_targets: num_unroll_steps must be at least 0: {num_unroll_steps}."
        )
    data = stop_gradient_if(stop_target_gradients, (returns_tm1, r_t, pi_tm1))
    steps, within, after = _unrolled(discount_t, num_unroll_steps, truncation_t, mask_t)
    value, reward, policy = (keep_where(within, x[steps])[0] for x in data)
    uniform = 1 / max(policy.shape[-1], 1)
    policy = jnp.where(lhs_broadcast(after, policy), uniform, policy)
    known = within | after
    return ModelTargets(value, _delayed(reward), policy, known, _delayed(known), within)


def _unrolled(
    discount_t: Array, length: int, truncation_t: Array | None, mask_t: Array | None
) -> tuple[Array, Array, Array]:
    """Returns which step each unroll step is at, and whether there is such a step.

    The last result is whether the episode has terminated before. Steps are numbered
    among those that count, so that the others are passed over.
    """
    counts, place, order = numbered(mask_t, len(discount_t))
    ends = last_steps(discount_t, truncation_t, mask_t)
    places = place[:, None] + jnp.arange(length + 1)[None]
    within = counts[:, None] & (places <= place[ends][:, None])
    after = counts[:, None] & ~within & (discount_t[ends] == 0)[:, None]
    return order[jnp.clip(places, 0, len(order) - 1)], within, after


def _delayed(x: Array) -> Array:
    """Moves what belongs to a step to the unroll step that it leads to."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))

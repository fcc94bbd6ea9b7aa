r"""Policies from a search of few visits, after Gumbel MuZero, on plain arrays.

A search from a state visits actions and estimates their values. With few visits some
actions have none, so that counts tell little; Gumbel MuZero improves its policy by the
values instead, and does so in expectation however few there are.

*   At the root, `gumbel_perturbed_logits` draws noise once for each search. The `m`
    actions of the largest perturbed logits are a sample of the policy without
    replacement: those to consider.
*   `sequential_halving_visits` says how to spend the simulations on them: the next one
    goes to the action of the highest `gumbel_action_scores` among those visited as
    often as it says. The action to take, in the end, has the highest score among the
    most visited.
*   Below the root, the search follows the highest `interior_action_scores`.
*   `gumbel_improved_policy` is what to train the policy towards.

In between, `mixed_value` is an estimate of the value of the state, and of the actions
without visits: `completed_action_values` puts it in their place. These values are put
on the scale of logits by `scaled_action_values`.

Actions lie along the last axis, and any axes may lead. Every function of actions takes
a `mask` of legal ones, true where legal. The result is that of leaving the others out:
they have a value, a score or a logit of minus infinity, a probability of zero, and
their visits do not count. Where no action is legal, all scores are minus infinity, and
there is no policy: its probabilities are NaN, with a gradient of zero. The value of an
action without visits has no effect, NaN included.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import greatest
from rlprims.categorical import masked_log_softmax, weighted_sum, which_legal
from rlprims.gradients import stop_gradient_if
from rlprims.planning import legal_counts

__all__ = [
    "completed_action_values",
    "gumbel_action_scores",
    "gumbel_improved_policy",
    "gumbel_perturbed_logits",
    "mixed_value",
    "scaled_action_values",
]

Actions = Annotated[Arg, "f[...,A]"]
Visits = Annotated[Arg, "i[...,A]"]
Mask = Annotated[Arg | None, "b[...,A]"]
Constant = Annotated[Arg, "f[]", "[0, inf)"]


@checked
def mixed_value(
    logits: Actions,
    v: Annotated[Arg, "f[...]"],
    q: Actions,
    visit_counts: Visits,
    *,
    mask: Mask = None,
) -> Annotated[Array, "f[...]"]:
    r"""Mixes the predicted value of a state with the values that a search found.

    .. math::
        v_\text{mix} = \frac{1}{1 + N} \left(v + N \,
            \frac{\sum_{a: n(a) > 0} \pi(a) q(a)}{\sum_{a: n(a) > 0} \pi(a)}\right),
        \qquad N = \sum_b n(b), \quad \pi = \text{softmax}(\text{logits})

    Either part estimates the value of the policy :math:`\pi`: the network by itself,
    with the weight of one visit, and the search by what it saw. Visits to actions that
    the policy never takes, whose logit is minus infinity, tell nothing of its value;
    with no others, and without any, the result is `v`. The package mctx weighs all
    actions alike whose probability is too small for a number, those too.

    Args:
        logits: logits of the policy that the search started from, `f[...,A]`.
        v: predicted value of the state, `f[...]`, in units of return.
        q: estimated action values, `f[...,A]`, in the same units.
        visit_counts: visits :math:`n` of each action, `i[...,A]`, not negative.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The mixed value, `f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> q, visits = jnp.array([2.0, 4.0, jnp.nan]), jnp.array([1, 1, 0])
        >>> mixed_value(jnp.zeros(3), 0.0, q, visits).item()  # (0 + 2 * 3) / 3
        2.0

    References:
        Danihelka et al., `Policy improvement by planning with Gumbel
        <https://openreview.net/forum?id=bERaNdoegnO>`_, 2022.
    """
    counts = legal_counts(visit_counts, q, mask)
    told = (counts > 0) & (logits != -jnp.inf)
    any_told = jnp.any(told, axis=-1, keepdims=True)
    # Where nothing tells, any distribution will do: it has a weight of zero.
    log_probs = masked_log_softmax(jnp.where(any_told, logits, 0), told | ~any_told)
    total = jnp.where(any_told, jnp.sum(counts, axis=-1, keepdims=True), 0)
    searched = weighted_sum(q, total * jnp.exp(log_probs))
    return (v + searched) / (1 + total[..., 0])


@checked
def completed_action_values(
    logits: Actions,
    v: Annotated[Arg, "f[...]"],
    q: Actions,
    visit_counts: Visits,
    *,
    mask: Mask = None,
) -> Annotated[Array, "f[...,A]"]:
    r"""Gives each action without visits the mixed value of the state.

    .. math::
        \text{completed}(a) = \begin{cases}
            q(a) & n(a) > 0 \\ v_\text{mix} & \text{otherwise}
        \end{cases}

    where :math:`v_\text{mix}` is the `mixed_value`. An action that was not tried is
    thereby neither better nor worse than the policy itself.

    Args:
        logits: logits of the policy that the search started from, `f[...,A]`.
        v: predicted value of the state, `f[...]`, in units of return.
        q: estimated action values, `f[...,A]`, in the same units.
        visit_counts: visits :math:`n` of each action, `i[...,A]`, not negative.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The values of all actions, `f[...,A]`, in units of return; minus infinity where
        not legal.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> q, visits = jnp.array([2.0, 4.0, jnp.nan]), jnp.array([1, 1, 0])
        >>> completed_action_values(jnp.zeros(3), 0.0, q, visits).tolist()
        [2.0, 4.0, 2.0]

    References:
        Danihelka et al., `Policy improvement by planning with Gumbel
        <https://openreview.net/forum?id=bERaNdoegnO>`_, 2022.
    """
    mixed = mixed_value(logits, v, q, visit_counts, mask=mask)
    completed = jnp.where(visit_counts > 0, q, mixed[..., None])
    return jnp.where(which_legal(q, mask), completed, -jnp.inf)


@checked
def scaled_action_values(
    q: Actions,
    visit_counts: Visits,
    *,
    c_visit: Constant = 50.0,
    c_scale: Constant = 1.0,
    rescale: Flag = False,
    mask: Mask = None,
) -> Annotated[Array, "f[...,A]"]:
    r"""Scales action values so that they can be added to logits.

    .. math::
        \sigma(q(a)) = \bigl(c_\text{visit} + \max_b n(b)\bigr) \, c_\text{scale} \,
            q(a)

    The more visits there are, the more the values count. The defaults are those of the
    paper, for values between 0 and 1. With `rescale`, the values of each state are put
    there first, by their smallest and largest. The package mctx does that, with actions
    that are not legal among them, and has a `c_scale` of 0.1 by default.

    Args:
        q: completed action values, `f[...,A]`; minus infinity means not legal.
        visit_counts: visits :math:`n` of each action, `i[...,A]`, not negative.
        c_visit: how many visits the values count as beside the actual ones, `f[]`, not
            negative.
        c_scale: what a visit is worth, `f[]`, in nats per unit of `q`, not negative.
        rescale: whether to replace values by :math:`(q - \min q) / (\max q - \min q)`
            over the legal actions, or by 0 if all are the same, `b[]`.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The scaled values, `f[...,A]`, in nats; minus infinity where not legal.

    Raises:
        ValueError: if a shape breaks its contract, or `c_visit` or `c_scale` is a
            Python number out of range.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> q, visits = jnp.array([2.0, 6.0]), jnp.array([1, 3])
        >>> scaled_action_values(q, visits, c_visit=1.0).tolist()
        [8.0, 24.0]
        >>> scaled_action_values(q, visits, c_visit=1.0, rescale=True).tolist()
        [0.0, 4.0]

    References:
        Danihelka et al., `Policy improvement by planning with Gumbel
        <https://openreview.net/forum?id=bERaNdoegnO>`_, 2022.
    """
    legal = which_legal(q, mask) & (q != -jnp.inf)
    most = jnp.max(legal_counts(visit_counts, q, mask), axis=-1, keepdims=True)
    q = jnp.where(legal, q, 0)
    q = jnp.where(rescale, _rescaled(q, legal), q)
    return jnp.where(legal, (c_visit + most) * c_scale * q, -jnp.inf)


@checked
def gumbel_improved_policy(
    logits: Actions,
    v: Annotated[Arg, "f[...]"],
    q: Actions,
    visit_counts: Visits,
    *,
    c_visit: Constant = 50.0,
    c_scale: Constant = 1.0,
    rescale: Flag = False,
    mask: Mask = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[...,A]"]:
    r"""Improves a policy by the values of its actions that a search estimated.

    .. math::
        \pi'(a) = \text{softmax}\bigl(\text{logits} +
            \sigma(\text{completed})\bigr)(a)

    of the `completed_action_values` and :math:`\sigma`, the `scaled_action_values`. Its
    expected completed value is at least that of the policy :math:`\text{softmax}
    (\text{logits})`, and it needs no visits to every action. It is the target of the
    policy to learn, by `categorical_cross_entropy`, and what `interior_action_scores`
    follow.

    Args:
        logits: logits of the policy that the search started from, `f[...,A]`.
        v: predicted value of the state, `f[...]`, in units of return.
        q: estimated action values, `f[...,A]`, in the same units.
        visit_counts: visits of each action, `i[...,A]`, not negative.
        c_visit: how many visits the values count as beside the actual ones, `f[]`, not
            negative.
        c_scale: what a visit is worth, `f[]`, in nats per unit of `q`, not negative.
        rescale: whether to put the completed values between 0 and 1 first, `b[]`, as
            `scaled_action_values` does.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.
        stop_target_gradients: whether the policy is a constant when differentiating,
            `b[]`.

    Returns:
        The probabilities, `f[...,A]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract, or `c_visit` or `c_scale` is a
            Python number out of range.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> q, visits = jnp.array([3.0, jnp.nan]), jnp.array([2, 0])
        >>> gumbel_improved_policy(jnp.zeros(2), 3.0, q, visits).tolist()
        [0.5, 0.5]
        >>> gumbel_improved_policy(jnp.zeros(2), 99.0, q, visits).tolist()
        [0.0, 1.0]

    References:
        Danihelka et al., `Policy improvement by planning with Gumbel
        <https://openreview.net/forum?id=bERaNdoegnO>`_, 2022.
    """
    q = completed_action_values(logits, v, q, visit_counts, mask=mask)
    constants = {"c_visit": c_visit, "c_scale": c_scale, "rescale": rescale}
    scaled = scaled_action_values(q, visit_counts, **constants, mask=mask)
    policy = jnp.exp(masked_log_softmax(logits + scaled, mask))
    return stop_gradient_if(stop_target_gradients, policy)


@checked
def gumbel_perturbed_logits(
    key: Annotated[Arg, "k[]"], logits: Actions, *, mask: Mask = None
) -> Annotated[Array, "f[...,A]"]:
    r"""Adds noise to logits, so that the largest are a sample without replacement.

    .. math::
        \text{logits} + g, \qquad g \sim \text{Gumbel}(0, 1)

    The action of the largest is a sample of :math:`\text{softmax}(\text{logits})`, the
    next a sample of what is left without that one, and so on: `jax.lax.top_k` finds as
    many as are wanted. A search draws this once, and uses it again to tell which action
    to take, in `gumbel_action_scores`.

    Args:
        key: a random key, `k[]`; one is enough for any number of states.
        logits: logits of the policy, `f[...,A]`; minus infinity rules an action out.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The perturbed logits, `f[...,A]`, in nats; minus infinity where not legal.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> logits = jnp.array([0.0, 90.0, -90.0, 180.0])
        >>> perturbed = gumbel_perturbed_logits(jax.random.key(0), logits)
        >>> jax.lax.top_k(perturbed, 2)[1].tolist()
        [3, 1]

    References:
        Danihelka et al., `Policy improvement by planning with Gumbel
        <https://openreview.net/forum?id=bERaNdoegnO>`_, 2022.
    """
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jnp.where(which_legal(logits, mask), logits + noise, -jnp.inf)


@checked
def gumbel_action_scores(
    perturbed_logits: Actions,
    scaled_q: Actions,
    visit_counts: Visits,
    considered_visits: Annotated[Arg | None, "i[...]"] = None,
    *,
    mask: Mask = None,
) -> Annotated[Array, "f[...,A]"]:
    r"""Scores the actions at the root that were visited a given number of times.

    .. math::
        \text{score}(a) = \begin{cases}
            \text{logits}(a) + g(a) + \sigma(q(a)) &
                n(a) = \text{considered\_visits} \\
            -\infty & \text{otherwise}
        \end{cases}

    While the search lasts, `considered_visits` are those of `sequential_halving_visits`
    at the number of this simulation, and the search follows the highest score. After
    it, the action to take has the highest score among the most visited.

    Args:
        perturbed_logits: logits with noise, `f[...,A]`, in nats, the same
            `gumbel_perturbed_logits` throughout a search.
        scaled_q: completed action values as they are now, `f[...,A]`, in nats, through
            `scaled_action_values`.
        visit_counts: visits :math:`n` of each action, `i[...,A]`, not negative.
        considered_visits: visits that an action must have had, `i[...]`. If `None`,
            those of the most visited legal action.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The scores, `f[...,A]`, in nats.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> perturbed, scaled_q = jnp.array([5.0, 1.0, 2.0]), jnp.array([0.0, 2.0, 2.0])
        >>> gumbel_action_scores(perturbed, scaled_q, jnp.array([1, 4, 4])).tolist()
        [-inf, 3.0, 4.0]

    References:
        Danihelka et al., `Policy improvement by planning with Gumbel
        <https://openreview.net/forum?id=bERaNdoegnO>`_, 2022.
    """
    legal, counts = which_legal(visit_counts, mask), visit_counts.astype(int)
    if considered_visits is None:
        considered_visits = jnp.max(jnp.where(legal, counts, 0), axis=-1)
    considered = legal & (counts == considered_visits.astype(int)[..., None])
    return jnp.where(considered, perturbed_logits + scaled_q, -jnp.inf)


def _rescaled(q: Array, legal: Array) -> Array:
    """Puts legal values between 0 and 1; all of them at 0 where they are the same."""
    high, low = (
        sign * greatest(sign * q, where=legal, initial=-jnp.inf, keepdims=True)
        for sign in (1, -1)
    )
    return jnp.where(legal, q - low, 0) / jnp.where(high <= low, 1, high - low)

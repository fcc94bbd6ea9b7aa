r"""Where a tree search looks next, and the policy that its visits amount to.

A search from a state visits actions again and again, and keeps for each a count of its
visits and an estimate of its value. These functions are what it computes from them, on
plain arrays: the tree is the caller's, in whatever form.

`puct_scores` weighs the value of an action against how little it was tried, and the
search of MuZero follows the action of the highest score. `visit_count_policy` turns the
counts at the root into probabilities: to act on, through `categorical_sample`, and to
train the policy towards, by `categorical_cross_entropy`.

Few visits are better planned. `sequential_halving_visits` is a schedule of those at the
root, and `interior_action_scores` make those below follow a policy, without chance.
`gumbel_planning` puts both to use.

Actions lie along the last axis, and any axes may lead. Every function of actions takes
a `mask` of legal ones, true where legal. The result is that of leaving the others out:
they have a score of minus infinity, a probability of zero, and their visits do not
count. Where no action is legal, all scores are minus infinity, and there is no policy:
its probabilities are NaN, with a gradient of zero.
"""

from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.categorical import masked_log_softmax, which_legal

__all__ = [
    "interior_action_scores",
    "puct_scores",
    "sequential_halving_visits",
    "visit_count_policy",
]

Actions = Annotated[Arg, "f[...,A]"]
Visits = Annotated[Arg, "i[...,A]"]
Mask = Annotated[Arg | None, "b[...,A]"]
# At this temperature and below, one visit less is worth nothing, as at 0.
COLD = 1e-15


@checked
def puct_scores(
    prior: Actions,
    q: Actions,
    visit_counts: Visits,
    *,
    c1: Annotated[Arg, "f[]", "[0, inf)"] = 1.25,
    c2: Annotated[Arg, "f[]", "(0, inf]"] = 19652.0,
    mask: Mask = None,
) -> Annotated[Array, "f[...,A]"]:
    r"""Adds to the value of each action a bonus for having been tried too little.

    .. math::
        q(a) + p(a) \, \frac{\sqrt{N}}{1 + n(a)}
            \left(c_1 + \log \frac{N + c_2 + 1}{c_2}\right),
        \qquad N = \sum_b n(b)

    The search follows the action of the highest score. :math:`N` is the number of
    visits of all actions together, as in the paper; before any, the prior has no
    effect. The package mctx takes the visits of the state itself, which are one more.

    Values should be on the scale of probabilities, between 0 and 1. Where no one knows
    their range, `update_min_max` keeps the one seen so far and `normalize_by_min_max`
    scales by it. An action without visits has the value that the caller gives it:
    often 0.

    Args:
        prior: probabilities :math:`p` of actions, `f[...,A]`, dimensionless, perhaps
            with noise from `add_dirichlet_noise`.
        q: estimated action values, `f[...,A]`, dimensionless once normalised.
        visit_counts: visits :math:`n` of each action, `i[...,A]`, not negative.
        c1: the weight of the bonus, `f[]`, in units of `q`, not negative.
        c2: the number of visits by which that weight has grown by about log 2, `f[]`,
            positive. With infinity it does not grow.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The scores, `f[...,A]`, in units of `q`; minus infinity where not legal.

    Raises:
        ValueError: if a shape breaks its contract, or `c1` or `c2` is a Python number
            out of range.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> from rlprims import MinMaxStatistics, normalize_by_min_max
        >>> prior, visits = jnp.array([0.5, 0.5]), jnp.array([4, 0])
        >>> state = MinMaxStatistics(jnp.array(-1.0), jnp.array(3.0))
        >>> q = normalize_by_min_max(state, jnp.array([3.0, 0.0]))
        >>> q.tolist()
        [1.0, 0.25]
        >>> puct_scores(prior, q, visits, c2=jnp.inf).tolist()  # the bonus: 0.25, 1.25
        [1.25, 1.5]

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    legal, counts = which_legal(q, mask), legal_counts(visit_counts, q, mask)
    total = jnp.sum(counts, axis=-1, keepdims=True)
    weight = jnp.sqrt(total) * (c1 + jnp.log1p((total + 1) / c2))
    return jnp.where(legal, q + prior * (weight / (1 + counts)), -jnp.inf)


@checked
def visit_count_policy(
    visit_counts: Visits,
    *,
    temperature: Annotated[Arg, "f[]", "[0, inf]"] = 1.0,
    mask: Mask = None,
) -> Annotated[Array, "f[...,A]"]:
    r"""Computes probabilities from how often a search visited each action.

    .. math::
        \pi(a) = \frac{n(a)^{1 / \tau}}{\sum_b n(b)^{1 / \tau}}

    Towards a temperature of 0 only the most visited action is left; at 0 those of
    equal visits share the probability. With 1 the policy is proportional to the
    visits, and with infinity uniform over what was visited. Where there were no visits,
    it is uniform over the legal actions, as it is wherever all have as many.

    Visits are compared as ratios and raised to the power as logarithms, so that no
    power overflows or vanishes.

    Args:
        visit_counts: visits :math:`n` of each action, `i[...,A]`, not negative.
        temperature: the temperature :math:`\tau`, `f[]`, dimensionless, not negative.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The probabilities, `f[...,A]`, dimensionless: a policy to act on, and the target
        of the policy to learn.

    Raises:
        ValueError: if a shape breaks its contract, or `temperature` is a Python number
            and negative.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> visits = jnp.array([6, 2, 2, 0])
        >>> visit_count_policy(visits, temperature=0.0).tolist()
        [1.0, 0.0, 0.0, 0.0]
        >>> rest = jnp.array([False, True, True, True])
        >>> visit_count_policy(visits, mask=rest).tolist()
        [0.0, 0.5, 0.5, 0.0]

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    legal = which_legal(visit_counts, mask)
    counts = jnp.where(legal, visit_counts, 0)
    most = jnp.max(counts, axis=-1, keepdims=True)
    ratio = (counts / jnp.maximum(most, 1)).astype(temperature.dtype)
    logs = jnp.where(counts == most, 0, jnp.log(ratio))
    cold = temperature < COLD
    left = legal & ~(cold & (counts < most))
    return jnp.exp(masked_log_softmax(logs, left, jnp.where(cold, 1, temperature)))


@checked
def interior_action_scores(
    probs: Actions, visit_counts: Visits, *, mask: Mask = None
) -> Annotated[Array, "f[...,A]"]:
    r"""Computes how far the visits of each action are behind a policy.

    .. math::
        \pi'(a) - \frac{n(a)}{1 + \sum_b n(b)}

    Below the root, the search follows the action of the highest score, so that its
    visits come to be as the `gumbel_improved_policy` :math:`\pi'` has it, without
    chance.

    Args:
        probs: probabilities of the improved policy, `f[...,A]`, dimensionless.
        visit_counts: visits :math:`n` of each action, `i[...,A]`, not negative.
        mask: whether each action is legal, `b[...,A]`; all are if `None`.

    Returns:
        The scores, `f[...,A]`, dimensionless; minus infinity where not legal.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> probs, visits = jnp.array([0.75, 0.25]), jnp.array([3, 0])
        >>> interior_action_scores(probs, visits).tolist()
        [0.0, 0.25]

    References:
        Danihelka et al., `Policy improvement by planning with Gumbel
        <https://openreview.net/forum?id=bERaNdoegnO>`_, 2022.
    """
    counts = legal_counts(visit_counts, probs, mask)
    shares = counts / (1 + jnp.sum(counts, axis=-1, keepdims=True))
    return jnp.where(which_legal(probs, mask), probs - shares, -jnp.inf)


@checked
def sequential_halving_visits(
    num_actions: Annotated[Arg, "i[...]"],
    num_simulations: int,
    *,
    max_num_considered_actions: int = 16,
) -> Annotated[Array, "i[...,N]"]:
    r"""Lists how often an action must have been visited to be the next one visited.

    The simulations are divided evenly among :math:`\lceil \log_2 m \rceil` rounds, and
    within a round among the actions still considered, of which the better half stays
    for the next:

    .. math::
        m_0 = \min(\text{num\_actions}, \text{max\_num\_considered\_actions}), \qquad
        m_{i+1} = \lceil m_i / 2 \rceil, \qquad
        \text{visits}_i = \max\left(1, \left\lfloor \frac{N}
            {m_i \lceil \log_2 m_0 \rceil} \right\rfloor\right)

    The two last stay until all simulations are spent, and take turns at what division
    leaves over. Nothing keeps track of who is considered: an action that was dropped
    has fewer visits than are asked for from then on. With fewer simulations than
    actions, only as many actions are visited, once each.

    The package mctx keeps :math:`\lfloor m_i / 2 \rfloor`, which is the same where
    :math:`m_0` is a power of two.

    Args:
        num_actions: the number of legal actions, `i[...]`.
        num_simulations: the number `N` of simulations, an `int`, not negative.
        max_num_considered_actions: the most actions to consider, an `int`, at least 1.

    Returns:
        The visits that an action must have had, `i[...,N]`, one for each simulation in
        turn, for `gumbel_action_scores`; -1, which no action has, where none is legal.

    Raises:
        ValueError: if `num_simulations` is negative or `max_num_considered_actions` not
            positive.
        TypeError: if `num_actions` is not an integer, or another argument no Python
            `int`.

    Example:
        >>> sequential_halving_visits(4, 8).tolist()
        [0, 0, 0, 0, 1, 1, 2, 2]
        >>> sequential_halving_visits(4, 8, max_num_considered_actions=2).tolist()
        [0, 0, 1, 1, 2, 2, 3, 3]

    References:
        Karnin, Koren and Somekh, `Almost Optimal Exploration in Multi-Armed Bandits
        <https://proceedings.mlr.press/v28/karnin13.html>`_, 2013.

        Danihelka et al., `Policy improvement by planning with Gumbel
        <https://openreview.net/forum?id=bERaNdoegnO>`_, 2022.
    """
    if num_simulations < 0 or max_num_considered_actions < 1:
        raise ValueError(
            "sequential_halving_visits: num_simulations must be at least 0 and "
            f"max_num_considered_actions at least 1, got {num_simulations} and "
            f"{max_num_considered_actions}."
        )
    rows = range(max_num_considered_actions + 1)
    table = jnp.asarray(np.stack([_schedule(m, num_simulations) for m in rows]))
    return table[jnp.clip(num_actions.astype(int), 0, max_num_considered_actions)]


# What a search counts


def legal_counts(visit_counts: Array, like: Array, mask: Array | None) -> Array:
    """Returns visits as numbers of the dtype of `like`, zero of what is not legal."""
    return jnp.where(which_legal(visit_counts, mask), visit_counts, 0).astype(
        like.dtype
    )


def _schedule(num_considered: int, num_simulations: int) -> np.ndarray:
    """Returns the visits that are asked for, of each simulation in turn."""
    if num_considered == 0:
        return np.full(num_simulations, -1, np.int32)
    rounds = max(1, (num_considered - 1).bit_length())  # the logarithm, rounded up
    considered, visits, schedule = num_considered, 0, []
    while len(schedule) < num_simulations:
        more = max(1, num_simulations // (considered * rounds))
        schedule += [visits + i for i in range(more) for _ in range(considered)]
        considered, visits = max(min(2, considered), -(-considered // 2)), visits + more
    return np.array(schedule[:num_simulations], np.int32)

"""Many estimates of one value, and what to make of them.

Critics that are trained apart agree where they have seen data, and differ where they
guess. A maximum over actions picks the guesses that are too high, so agents with
several critics value the next state by less than their mean: by the least of all, of a
random few, or by the mean less a multiple of the spread.

Estimates lie along the *first* axis, where `jax.vmap` over the parameters of critics
puts them; any axes may follow. What is made of them is the value of the next state, and
`ensemble_td_learning` moves every critic towards it:

>>> q_tm1, q_t = jnp.array([[1.0], [2.0]]), jnp.array([[4.0], [6.0]])
>>> v_t = lower_confidence_bound(q_t, beta=1.0)  # 5 - 1
>>> ensemble_td_learning(q_tm1, jnp.array([1.0]), jnp.array([0.5]), v_t).tolist()
[[2.0], [1.0]]

An estimate of NaN makes the result NaN, with no gradient. Behind a discount of zero
that is cut off.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import greatest, guarded, root, weighted
from rlprims.categorical import which_legal
from rlprims.gradients import td_error

__all__ = [
    "ensemble_td_learning",
    "lower_confidence_bound",
    "maxmin_value",
    "random_subset_minimum",
]


@checked
def ensemble_td_learning(
    q_tm1: Annotated[Arg, "f[N,...]"],
    r_t: Annotated[Arg, "f[...]"],
    discount_t: Annotated[Arg, "f[...]"],
    v_t: Annotated[Arg, "f[...]"],
    *,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[N,...]"]:
    r"""Computes the temporal-difference errors of an ensemble with one target for all.

    .. math::
        \delta_i = r_t + \gamma_t v_t - q_{i, t-1}

    The target is the same for each member :math:`i`, as in twin delayed deep
    deterministic policy gradients, soft actor-critic and their kin. For members that
    each have a target of their own, map `td_learning`.

    Args:
        q_tm1: predictions of each member, `f[N,...]`, in units of return.
        r_t: rewards that followed, `f[...]`.
        discount_t: discounts that followed, `f[...]`, dimensionless, in `[0, 1]`; 0 on
            termination, where `v_t` may be anything.
        v_t: values of the states reached, as made of an ensemble, `f[...]`, in units of
            return.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The errors of each member, target minus prediction, `f[N,...]`, in units of
        return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> q_tm1, number = jnp.array([1.0, 3.0]), jnp.float32(1.0)
        >>> ensemble_td_learning(q_tm1, number, 0.5 * number, 4 * number).tolist()
        [2.0, 0.0]

    References:
        Fujimoto et al., `Addressing Function Approximation Error in Actor-Critic
        Methods <https://arxiv.org/abs/1802.09477>`_, 2018, algorithm 1.
    """
    target = r_t + weighted(v_t, discount_t)
    targets = jnp.broadcast_to(target, q_tm1.shape)
    return td_error(q_tm1, targets, stop_target_gradients)


@checked
def lower_confidence_bound(
    values: Annotated[Arg, "f[N,...]"], *, beta: Annotated[Arg, "f[]|f[...]"]
) -> Annotated[Array, "f[...]"]:
    r"""Computes the mean of an ensemble, less a multiple of its standard deviation.

    .. math::
        \bar q - \beta \sigma, \qquad \bar q = \frac1N \sum_i q_i, \qquad
        \sigma^2 = \frac1N \sum_i (q_i - \bar q)^2

    The deviation is that of the members themselves, divided by :math:`N` and not by
    :math:`N - 1`, as code that calls a library's default may have it: one member alone
    has none. Where all agree its gradient is taken to be zero.

    A positive :math:`\beta` is cautious, as targets are; a negative one gives the upper
    bound that explorers act by.

    Args:
        values: estimates of each member, `f[N,...]`.
        beta: how many standard deviations to take off, :math:`\beta`, `f[]|f[...]`,
            dimensionless.

    Returns:
        The bound, `f[...]`, in the units of `values`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument is not floating-point.

    Example:
        >>> lower_confidence_bound(jnp.array([1.0, 3.0]), beta=0.5).item()  # 2 - 0.5
        1.5

    References:
        Lee et al., `SUNRISE: A Simple Unified Framework for Ensemble Learning in Deep
        Reinforcement Learning <https://arxiv.org/abs/2007.04938>`_, 2020, which adds
        the deviation, to explore.
    """
    spread = guarded(_standard_deviation, jnp.moveaxis(values, 0, -1))
    return jnp.mean(values, axis=0) - weighted(spread, beta)


@checked
def maxmin_value(
    q: Annotated[Arg, "f[N,...,A]"],
    *,
    mask: Annotated[Arg | None, "b[...,A]"] = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the value of the action whose least estimate is greatest.

    .. math::
        \max_a \min_i q_i(a)

    The more members, the lower it is: their number tunes how far a maximum over noisy
    values overestimates, or underestimates. With one member this is the target of
    Q-learning.

    Args:
        q: action values of each member, `f[N,...,A]`, in units of return.
        mask: whether each action is legal, `b[...,A]`; all are if `None`. Where none
            is, the value is minus infinity.

    Returns:
        The values, `f[...]`, in units of return.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if `q` is not floating-point, or `mask` is not boolean.

    Example:
        >>> maxmin_value(jnp.array([[1.0, 9.0], [2.0, 0.0]])).item()  # max(1, 0)
        1.0

    References:
        Lan, Pan, Fyshe and White, `Maxmin Q-learning: Controlling the Estimation Bias
        of Q-learning <https://arxiv.org/abs/2002.06487>`_, 2020.
    """
    least = minimum_of(q)
    legal = jnp.where(which_legal(least, mask), least, -jnp.inf)
    return guarded(greatest, legal)


@checked
def random_subset_minimum(
    key: Annotated[Arg, "k[]"],
    values: Annotated[Arg, "f[N,...]"],
    *,
    subset_size: int = 2,
) -> Annotated[Array, "f[...]"]:
    r"""Computes the least estimate of a few members, drawn at random.

    .. math::
        \min_{i \in \mathcal{M}} q_i, \qquad
        \mathcal{M} \subseteq \{1, \dots, N\}, \quad |\mathcal{M}| = M

    Members are drawn without replacement, all subsets with the same probability, and
    one subset is drawn for the whole call: a batch shares it. Map over keys for a
    subset each.

    Args:
        key: a random key, `k[]`.
        values: estimates of each member, `f[N,...]`.
        subset_size: how many members to draw, :math:`M`, a Python `int` in `[1, N]`.

    Returns:
        The least estimates, `f[...]`, in the units of `values`.

    Raises:
        ValueError: if a shape breaks its contract, or `subset_size` is not in `[1, N]`.
        TypeError: if `values` is not floating-point, `key` is not a random key, or
            `subset_size` no Python `int`.

    Example:
        >>> values = jnp.array([[4.0, 1.0], [3.0, 2.0]])
        >>> random_subset_minimum(jax.random.key(0), values, subset_size=2).tolist()
        [3.0, 1.0]

    References:
        Chen, Wang, Zhou and Ross, `Randomized Ensembled Double Q-Learning: Learning
        Fast Without a Model <https://arxiv.org/abs/2101.05982>`_, 2021, algorithm 1.
    """
    if not 1 <= subset_size <= len(values):
        raise ValueError(
            f"random_subset_minimum: subset_size must be in [1, N], got {subset_size} "
            f"with N = {len(values)}."
        )
    members = jax.random.choice(key, len(values), (subset_size,), replace=False)
    return minimum_of(values[members])


def minimum_of(values: Array) -> Array:
    """Returns the least of each ensemble, with no gradient where it is not finite."""
    members_last = jnp.moveaxis(values, 0, -1)
    return guarded(lambda values: -greatest(-values), members_last)


def _standard_deviation(values: Array) -> Array:
    """Along the last axis."""
    return root(jnp.var(values, axis=-1))

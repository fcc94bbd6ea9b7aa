r"""Categorical distributions of the return, and the losses that train them.

The return is modelled by probabilities of fixed numbers, its *atoms*, with a softmax
for the probabilities. A transition turns what is predicted for the next state, atoms
:math:`z` with probabilities :math:`p`, into a target for this one:

1.  Each atom is discounted and the reward added: :math:`r_t + \gamma_t z`.
2.  The moved atoms no longer fall on the atoms of the prediction, so the probability
    of each is shared between the two on either side of it (`categorical_l2_project`).
3.  The loss is the cross-entropy of the prediction from that.

The atoms of prediction and target may differ, in number too. They are shared by all
actions, whose logits are rows. Action values are the means of the distributions.
Targets from several rewards along a trajectory are made in the same way
(`categorical_n_step_targets`).

After a termination, where the discount is zero, the target is all on the reward,
whatever is predicted for the state reached.
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import batched_index, contain_nonfinite, greatest, keep_where
from rlprims.categorical import best_action, categorical_cross_entropy
from rlprims.gradients import stop_gradient_if
from rlprims.returns import n_step_bootstrapped_returns
from rlprims.two_hot import interpolation_weights, is_increasing

__all__ = [
    "categorical_double_q_learning",
    "categorical_l2_project",
    "categorical_n_step_targets",
    "categorical_q_learning",
    "categorical_td_learning",
]


@checked
def categorical_l2_project(
    z_p: Annotated[Arg, "f[M]"],
    probs: Annotated[Arg, "f[M]"],
    z_q: Annotated[Arg, "f[N]"],
) -> Annotated[Array, "f[N]"]:
    r"""Projects a categorical distribution onto other atoms.

    The probability of each atom is shared between the two of the other atoms that it
    lies between, the nearer one getting more, so that the mean stays the same. An atom
    outside goes to the nearer end.

    .. math::
        y_k = \sum_j p_j \, h_k\Bigl(\min\bigl(\max(z_j, z'_1), z'_N\bigr)\Bigr)

    where :math:`h_k` is 1 on atom :math:`z'_k`, 0 on its neighbours and beyond, and
    linear in between. Of all distributions on those atoms the result is nearest in the
    L2 distance of cumulative distributions, the Cramér distance.

    It is linear in `probs`, which need not sum to one: their sum stays the same. The
    derivatives with respect to atoms are those from above where an atom falls on
    another, and on the last one from below.

    Args:
        z_p: atoms :math:`z_j`, `f[M]`, in units of return, in any order. One of
            probability 0 counts for nothing, NaN included; an infinite one goes to
            the end.
        probs: their probabilities :math:`p_j`, `f[M]`, dimensionless.
        z_q: atoms :math:`z'_k` to project onto, `f[N]`, in units of return, in
            increasing order, else the result is NaN; evenly spaced is fastest. Of
            equal atoms, one gets all that falls on them.

    Returns:
        Probabilities of `z_q`, `f[N]`, dimensionless.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if an argument is not floating-point.

    Example:
        >>> z_p, probs = jnp.array([0.25, 7.0]), jnp.array([0.5, 0.5])
        >>> categorical_l2_project(z_p, probs, jnp.array([0.0, 1.0, 2.0])).tolist()
        [0.375, 0.125, 0.5]

    References:
        Bellemare, Dabney and Munos, `A Distributional Perspective on Reinforcement
        Learning <https://arxiv.org/abs/1707.06887>`_, 2017, eq. 7.
        Rowland, Bellemare, Dabney, Munos and Teh, `An Analysis of Categorical
        Distributional Reinforcement Learning <https://arxiv.org/abs/1802.08163>`_,
        2018.
    """
    z_p = jnp.where(jnp.isnan(z_p) & (probs == 0), 0, z_p)
    k = _last_at_or_below(z_p, z_q)
    p_low, p_high = interpolation_weights(
        z_p, z_q[k], z_q[jnp.minimum(k + 1, len(z_q) - 1)]
    )
    projected = (
        jnp.zeros_like(z_q).at[k].add(probs * p_low).at[k + 1].add(probs * p_high)
    )
    defined = ~jnp.isnan(z_p).any() & is_increasing(z_q)
    return jnp.where(defined, projected, jnp.nan)


@checked
def categorical_td_learning(
    v_atoms_tm1: Annotated[Arg, "f[N]"],
    v_logits_tm1: Annotated[Arg, "f[N]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    v_atoms_t: Annotated[Arg, "f[M]"],
    v_logits_t: Annotated[Arg, "f[M]"],
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the loss of a categorical state value in one transition.

    .. math::
        L = -\sum_k y_k \log p_{t-1,k}, \qquad
        y = \Pi\bigl(r_t + \gamma_t z_t, p_t\bigr), \quad
        p = \text{softmax}(\text{v\_logits})

    with :math:`\Pi` the projection onto the atoms of the prediction.

    Args:
        v_atoms_tm1: atoms of the prediction, in the state left, `f[N]`, in units of
            return, in increasing order, else the loss is NaN.
        v_logits_tm1: their logits, `f[N]`.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        v_atoms_t: atoms :math:`z_t` in the state reached, `f[M]`, in units of return.
        v_logits_t: their logits, `f[M]`.
        stop_target_gradients: whether to hold the target constant, `b[]`.

    Returns:
        The loss, `f[]`, in nats: a cross-entropy, so that it does not vanish where
        prediction and target agree.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> atoms, logits = jnp.array([0.0, 1.0]), jnp.array([0.0, 0.0])
        >>> loss = categorical_td_learning(atoms, logits, 1.0, 0.5, atoms, logits)
        >>> round(float(loss), 4)  # log 2
        0.6931

    References:
        Bellemare, Dabney and Munos, `A Distributional Perspective on Reinforcement
        Learning <https://arxiv.org/abs/1707.06887>`_, 2017.
    """
    target = _target(r_t, discount_t, v_atoms_t, v_logits_t, v_atoms_tm1)
    target = stop_gradient_if(stop_target_gradients, target)
    return categorical_cross_entropy(target, v_logits_tm1)


@checked
def categorical_q_learning(
    q_atoms_tm1: Annotated[Arg, "f[N]"],
    q_logits_tm1: Annotated[Arg, "f[A,N]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_atoms_t: Annotated[Arg, "f[M]"],
    q_logits_t: Annotated[Arg, "f[A,M]"],
    stop_target_gradients: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[A]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the categorical Q-learning loss of one transition, as in C51.

    .. math::
        L = -\sum_k y_k \log p_{t-1,k}(a_{t-1}), \qquad
        y = \Pi\bigl(r_t + \gamma_t z_t, p_t(a^*)\bigr), \quad
        a^* = \arg\max_a \sum_k p_{t,k}(a) \, z_{t,k}

    with :math:`p` the softmax of the logits of each action, and :math:`\Pi` the
    projection onto the atoms of the prediction.

    Args:
        q_atoms_tm1: atoms of the predictions, in the state left, `f[N]`, in units of
            return, in increasing order, else the loss is NaN.
        q_logits_tm1: their logits for each action, `f[A,N]`.
        a_tm1: action taken there, `i[]`, in `[0, A)`; outside, the loss is NaN.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        q_atoms_t: atoms :math:`z_t` in the state reached, `f[M]`, in units of return.
        q_logits_t: their logits for each action, `f[A,M]`; all minus infinity for an
            action that is not legal.
        stop_target_gradients: whether to hold the target constant, `b[]`.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`. If none is, the loss is NaN unless the discount is 0.

    Returns:
        The loss, `f[]`, in nats: a cross-entropy, so that it does not vanish where
        prediction and target agree.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> atoms, logits = jnp.array([0.0, 1.0]), jnp.array([[0.0, 0.0], [0.0, 90.0]])
        >>> args = atoms, logits, 0, 0.0, 1.0, atoms, logits
        >>> round(float(categorical_q_learning(*args)), 4)  # log 2
        0.6931

    References:
        Bellemare, Dabney and Munos, `A Distributional Perspective on Reinforcement
        Learning <https://arxiv.org/abs/1707.06887>`_, 2017, algorithm 1.
    """
    a_t = best_action(_means(q_atoms_t, q_logits_t), mask)
    return categorical_td_learning(
        q_atoms_tm1,
        _row(q_logits_tm1, a_tm1),
        r_t,
        discount_t,
        q_atoms_t,
        _row(q_logits_t, a_t),
        stop_target_gradients,
    )


@checked
def categorical_double_q_learning(
    q_atoms_tm1: Annotated[Arg, "f[N]"],
    q_logits_tm1: Annotated[Arg, "f[A,N]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    q_atoms_t: Annotated[Arg, "f[M]"],
    q_logits_t: Annotated[Arg, "f[A,M]"],
    q_t_selector: Annotated[Arg, "f[A]"],
    stop_target_gradients: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[A]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the categorical double Q-learning loss of one transition.

    Other action values select the next action, those of the online network as a rule,
    so that the maximum over noisy values does not overestimate.

    .. math::
        L = -\sum_k y_k \log p_{t-1,k}(a_{t-1}), \qquad
        y = \Pi\bigl(r_t + \gamma_t z_t, p_t(a^*)\bigr), \quad
        a^* = \arg\max_a q_t^\text{selector}(a)

    with :math:`p` the softmax of the logits of each action, and :math:`\Pi` the
    projection onto the atoms of the prediction.

    Args:
        q_atoms_tm1: atoms of the predictions, in the state left, `f[N]`, in units of
            return, in increasing order, else the loss is NaN.
        q_logits_tm1: their logits for each action, `f[A,N]`.
        a_tm1: action taken there, `i[]`, in `[0, A)`; outside, the loss is NaN.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        q_atoms_t: atoms :math:`z_t` in the state reached, `f[M]`, in units of return.
        q_logits_t: their logits for each action, `f[A,M]`.
        q_t_selector: action values in the state reached that select the action,
            `f[A]`, in units of return; the first of equals is selected. Minus infinity
            for an action that is not legal.
        stop_target_gradients: whether to hold the target constant, `b[]`.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`. If none is, the loss is NaN unless the discount is 0.

    Returns:
        The loss, `f[]`, in nats: a cross-entropy, so that it does not vanish where
        prediction and target agree.

    Raises:
        ValueError: if a shape breaks its contract; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> atoms, logits = jnp.array([0.0, 1.0]), jnp.array([[0.0, 0.0], [0.0, 90.0]])
        >>> args = atoms, logits, 1, 0.0, 1.0, atoms, logits, jnp.array([2.0, 3.0])
        >>> round(float(categorical_double_q_learning(*args)), 4)
        0.0

    References:
        Bellemare, Dabney and Munos, `A Distributional Perspective on Reinforcement
        Learning <https://arxiv.org/abs/1707.06887>`_, 2017.
        van Hasselt, Guez and Silver, `Deep Reinforcement Learning with Double
        Q-learning <https://arxiv.org/abs/1509.06461>`_, 2015.
    """
    a_t = best_action(q_t_selector, mask)
    return categorical_td_learning(
        q_atoms_tm1,
        _row(q_logits_tm1, a_tm1),
        r_t,
        discount_t,
        q_atoms_t,
        _row(q_logits_t, a_t),
        stop_target_gradients,
    )


@checked
def categorical_n_step_targets(
    atoms_tm1: Annotated[Arg, "f[N]"],
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    atoms_t: Annotated[Arg, "f[M]"],
    logits_t: Annotated[Arg, "f[T,M]"],
    n: Annotated[int | Array, "i[]", "[1, inf)"],
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T,N]"]:
    r"""Computes categorical targets from `n` rewards, then bootstrapped.

    .. math::
        y_{t-1} = \Pi\Bigl(\sum_{i=0}^{n-1} \Gamma_i \, r_{t+i}
            + \Gamma_n z_t, \; p_{t+n-1}\Bigr), \qquad
        \Gamma_i = \prod_{j=0}^{i-1} \gamma_{t+j}, \quad
        p = \text{softmax}(\text{logits})

    with :math:`\Pi` the projection onto the atoms of the prediction, done once for all
    rewards. The mean is that of `n_step_bootstrapped_returns` if no atom leaves the
    range. Near the end of the trajectory, targets bootstrap from the last distribution.

    Args:
        atoms_tm1: atoms of the prediction, `f[N]`, in units of return, in increasing
            order, else the targets are NaN.
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        atoms_t: atoms :math:`z_t` of the distributions to bootstrap from, `f[M]`, in
            units of return.
        logits_t: their logits at times `1..T`, `f[T,M]`: of state values, or of the
            action that is best or was taken.
        n: number of rewards in each target, `i[]`, at least 1; may exceed `T`. A
            Python `int` is fixed while tracing; an array may be traced, and is not
            checked.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `logits_t`, and no target sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        Probabilities of `atoms_tm1` from times `0..T-1`, `f[T,N]`, dimensionless; 0 at
        steps that do not count. `categorical_cross_entropy` makes a loss of them.

    Raises:
        ValueError: if a shape breaks its contract, or `n` is below 1; use `jax.vmap`
            for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> atoms, logits_t = jnp.arange(3.0), jnp.zeros((2, 3))
        >>> args = atoms, jnp.ones(2), jnp.array([1.0, 0.0]), atoms, logits_t, 2
        >>> categorical_n_step_targets(*args).tolist()  # of 1 + 1, and of 1
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]

    References:
        Bellemare, Dabney and Munos, `A Distributional Perspective on Reinforcement
        Learning <https://arxiv.org/abs/1707.06887>`_, 2017.
        Tang et al., `The Nature of Temporal Difference Errors in Multi-step
        Distributional Reinforcement Learning <https://arxiv.org/abs/2207.07570>`_,
        2022, which studies off-policy ones too.
    """
    bootstrapped = functools.partial(
        n_step_bootstrapped_returns, n=n, truncation_t=truncation_t, mask_t=mask_t
    )
    # An n-step return is linear: rewards alone, the discount of a bootstrap of 1, and
    # which step it bootstraps from, as the undiscounted return of the steps' numbers.
    # All are 0 at steps left out, whose logits then have no effect either.
    zero, one = jnp.zeros_like(r_t), jnp.ones_like(r_t)
    steps = jnp.arange(len(r_t), dtype=r_t.dtype)
    rewards = bootstrapped(r_t, discount_t, zero)
    discounts = bootstrapped(zero, discount_t, one)
    ends = bootstrapped(zero, one, steps).astype(int)
    targets = jax.vmap(_target, (0, 0, None, 0, None))(
        rewards, discounts, atoms_t, logits_t[ends], atoms_tm1
    )
    (targets,) = keep_where(mask_t, targets)
    return stop_gradient_if(stop_target_gradients, targets)


_row = jax.vmap(batched_index, in_axes=(-1, None))


def _means(atoms: Array, logits: Array) -> Array:
    """Returns action values: `-inf` where the logits say that it is not legal."""
    legal, finite = greatest(logits) != -jnp.inf, jnp.isfinite(atoms)
    columns = jnp.stack(
        [jnp.where(finite, atoms, 0), (~finite).astype(atoms.dtype)], -1
    )
    means, lost = jnp.matmul(jax.nn.softmax(logits), columns, precision="highest").T
    return jnp.where(legal, jnp.where(lost == 0, means, jnp.nan), -jnp.inf)


def _target(
    r_t: Array, discount_t: Array, atoms_t: Array, logits_t: Array, atoms: Array
) -> Array:
    """Returns probabilities of `atoms`: of the reward alone if the discount is 0."""
    undefined = ~jnp.isfinite(greatest(logits_t))
    logits_t = jnp.where(undefined & (discount_t == 0), 0, logits_t)
    probs_t = jax.nn.softmax(logits_t)
    atoms_t = contain_nonfinite(atoms_t, discount_t * probs_t)
    return categorical_l2_project(r_t + discount_t * atoms_t, probs_t, atoms)


def _last_at_or_below(x: Array, atoms: Array) -> Array:
    """Returns the index of the last atom not above `x`, but for the last of all.

    If each atom is near its place on an evenly spaced grid, the place of `x` on that
    grid is at most one off.
    """
    x, last = jnp.clip(x, atoms[0], atoms[-1]), max(len(atoms) - 2, 0)
    step = (atoms[-1] - atoms[0]) / (len(atoms) - 1 or 1)
    grid = atoms[0] + step * jnp.arange(len(atoms), dtype=atoms.dtype)

    def compute(x: Array) -> Array:
        k = jnp.clip(jnp.floor((x - atoms[0]) / step).astype(int), 0, last)
        return k - (x < atoms[k]).astype(int) + (x >= atoms[k + 1]).astype(int)

    def search(x: Array) -> Array:
        return jnp.searchsorted(atoms, x, side="right").astype(int) - 1

    even = jnp.all(jnp.abs(atoms - grid) < step / 4)
    return jnp.clip(jax.lax.cond(even, compute, search, x), 0, last)

r"""Quantiles of the return, and the losses that train them.

The return is modelled by numbers :math:`\theta_i`, each an estimate of the quantile at
a level :math:`\tau_i`, such as :math:`(i - \tfrac12) / N`. What is predicted for the
next state, discounted and with the reward added, is a sample of targets. Each estimate
is drawn to its quantile by a loss that counts targets above it with weight :math:`\tau`
and targets below it with weight :math:`1 - \tau` (`quantile_regression_loss`).

Estimates of all actions come as one array, quantiles along its first axis and actions
along its last. Action values are the means over quantiles.

After a termination, where the discount is zero, the only target is the reward, whatever
is predicted for the state reached.
"""

import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from rlprims._checks import Arg, Flag, checked
from rlprims.arrays import batched_index, contain_nonfinite
from rlprims.categorical import best_action
from rlprims.gradients import stop_gradient_if
from rlprims.returns import n_step_bootstrapped_returns

__all__ = [
    "quantile_expected_sarsa",
    "quantile_n_step_targets",
    "quantile_q_learning",
    "quantile_regression_loss",
]


@checked
def quantile_regression_loss(
    dist_src: Annotated[Arg, "f[N]"],
    tau_src: Annotated[Arg, "f[N]", "[0, 1]"],
    dist_target: Annotated[Arg, "f[M]"],
    huber_param: Annotated[Arg, "f[]", "[0, inf]"] = 0.0,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the loss whose minimum is at the quantiles of the targets.

    .. math::
        L = \sum_i \frac1M \sum_j \bigl|\tau_i - 1[u_{ij} < 0]\bigr| \, \ell(u_{ij}),
        \qquad u_{ij} = y_j - \theta_i, \qquad
        \ell(u) = \begin{cases}
            |u| & \kappa = 0 \\
            \tfrac12 u^2 & |u| \le \kappa \\
            \kappa \bigl(|u| - \tfrac12 \kappa\bigr) & \text{otherwise}
        \end{cases}

    As in the paper the Huber loss is not divided by :math:`\kappa`: as that gets
    small, the loss goes to zero and not to that of :math:`\kappa = 0`. Dividing by it
    gives the loss of implicit quantile networks (`quantile_huber_loss`).

    With the targets held constant, the gradient is computed along with the loss and
    nothing of the size of all pairs is kept.

    Args:
        dist_src: estimates :math:`\theta_i`, `f[N]`, in units of return.
        tau_src: their levels :math:`\tau_i`, `f[N]`, dimensionless, in `[0, 1]`.
        dist_target: targets :math:`y_j`, `f[M]`, in units of return, in any order.
        huber_param: where the loss turns linear, :math:`\kappa`, `f[]`, in units of
            return, not negative; 0 for linear everywhere.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        The loss, `f[]`, in units of return, squared unless :math:`\kappa = 0`.

    Raises:
        ValueError: if a shape breaks its contract, there are no targets, or
            `huber_param` is a Python number below 0; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> estimates, levels = jnp.array([1.0, 2.0]), jnp.array([0.25, 0.75])
        >>> targets = jnp.array([0.0, 4.0])
        >>> float(quantile_regression_loss(estimates, levels, targets))
        1.75

    References:
        Dabney, Rowland, Bellemare and Munos, `Distributional Reinforcement Learning
        with Quantile Regression <https://arxiv.org/abs/1710.10044>`_, 2017, eq. 10.
    """
    _refuse_no_targets("quantile_regression_loss", dist_target=dist_target)
    weights = jnp.full_like(dist_target, 1 / len(dist_target))
    targets = stop_gradient_if(stop_target_gradients, dist_target)
    return _loss(dist_src, tau_src, targets, weights, huber_param)


@checked
def quantile_q_learning(
    dist_q_tm1: Annotated[Arg, "f[N,A]"],
    tau_q_tm1: Annotated[Arg, "f[N]", "[0, 1]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    dist_q_t_selector: Annotated[Arg, "f[L,A]"],
    dist_q_t: Annotated[Arg, "f[M,A]"],
    huber_param: Annotated[Arg, "f[]", "[0, inf]"] = 0.0,
    stop_target_gradients: Flag = True,
    *,
    mask: Annotated[Arg | None, "b[A]"] = None,
) -> Annotated[Array, "f[]"]:
    r"""Computes the quantile Q-learning loss of one transition, as in QR-DQN.

    It is the `quantile_regression_loss` of the estimates for the action taken, from

    .. math::
        y_j = r_t + \gamma_t \, \theta_{t,j}(a^*), \qquad
        a^* = \arg\max_a \frac1L \sum_k \theta^\text{selector}_{t,k}(a)

    With another network's estimates as the selector this is double Q-learning.

    Args:
        dist_q_tm1: estimates in the state left, `f[N,A]`, in units of return.
        tau_q_tm1: their levels, `f[N]`, dimensionless, in `[0, 1]`.
        a_tm1: action taken there, `i[]`, in `[0, A)`; outside, the loss is NaN.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        dist_q_t_selector: estimates in the state reached whose means select the
            action, `f[L,A]`, in units of return; the first of equals is selected.
            Minus infinity for an action that is not legal.
        dist_q_t: estimates in the state reached, `f[M,A]`, in units of return.
        huber_param: where the loss turns linear, `f[]`, in units of return, not
            negative; 0 for linear everywhere.
        stop_target_gradients: whether to hold the targets constant, `b[]`.
        mask: whether each action is legal in the state reached, `b[A]`; all are if
            `None`. If none is, the loss is NaN unless the discount is 0.

    Returns:
        The loss, `f[]`, in units of return, squared unless `huber_param` is 0.

    Raises:
        ValueError: if a shape breaks its contract, there are no targets, or
            `huber_param` is a Python number below 0; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> dist_q = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> levels = jnp.array([0.25, 0.75])
        >>> args = dist_q, levels, 0, 1.0, 0.5, dist_q, dist_q
        >>> float(quantile_q_learning(*args))  # of 1 and 3 from 2 and 3
        0.5

    References:
        Dabney, Rowland, Bellemare and Munos, `Distributional Reinforcement Learning
        with Quantile Regression <https://arxiv.org/abs/1710.10044>`_, 2017.
    """
    _refuse_no_targets("quantile_q_learning", dist_q_t=dist_q_t)
    a_t = best_action(jnp.mean(dist_q_t_selector, axis=0), mask)
    dist_t = contain_nonfinite(_column(dist_q_t, a_t), discount_t)
    return quantile_regression_loss(
        _column(dist_q_tm1, a_tm1),
        tau_q_tm1,
        r_t + discount_t * dist_t,
        huber_param,
        stop_target_gradients,
    )


@checked
def quantile_expected_sarsa(
    dist_q_tm1: Annotated[Arg, "f[N,A]"],
    tau_q_tm1: Annotated[Arg, "f[N]", "[0, 1]"],
    a_tm1: Annotated[Arg, "i[]"],
    r_t: Annotated[Arg, "f[]"],
    discount_t: Annotated[Arg, "f[]"],
    dist_q_t: Annotated[Arg, "f[M,A]"],
    probs_a_t: Annotated[Arg, "f[A]"],
    huber_param: Annotated[Arg, "f[]", "[0, inf]"] = 0.0,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[]"]:
    r"""Computes the quantile Expected Sarsa loss of one transition.

    It is the mean of `quantile_regression_loss` over next actions :math:`a`, drawn from
    a policy :math:`\pi_t`, with targets :math:`r_t + \gamma_t \, \theta_{t,j}(a)`: the
    estimates go to the quantiles of the return that the policy earns, its own
    randomness included.

    .. math::
        L = \sum_a \pi_t(a) \, L_\text{QR}\bigl(\theta_{t-1}(a_{t-1}), \tau,
            r_t + \gamma_t \, \theta_t(a)\bigr)

    Args:
        dist_q_tm1: estimates in the state left, `f[N,A]`, in units of return.
        tau_q_tm1: their levels, `f[N]`, dimensionless, in `[0, 1]`.
        a_tm1: action taken there, `i[]`, in `[0, A)`; outside, the loss is NaN.
        r_t: reward that followed, `f[]`.
        discount_t: discount that followed, `f[]`, dimensionless, in `[0, 1]`; 0 on
            termination.
        dist_q_t: estimates in the state reached, `f[M,A]`, in units of return.
        probs_a_t: probabilities of the actions in the state reached, `f[A]`; an action
            of probability 0 counts for nothing, whatever its estimates. Where the
            discount is 0 they may be none at all: zeros, or NaN.
        huber_param: where the loss turns linear, `f[]`, in units of return, not
            negative; 0 for linear everywhere.
        stop_target_gradients: whether to hold the targets and their probabilities
            constant, `b[]`.

    Returns:
        The loss, `f[]`, in units of return, squared unless `huber_param` is 0.

    Raises:
        ValueError: if a shape breaks its contract, there are no targets, or
            `huber_param` is a Python number below 0; use `jax.vmap` for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> dist_q, probs = jnp.array([[1.0, 3.0]]), jnp.array([0.5, 0.5])
        >>> args = dist_q, jnp.array([0.5]), 0, 1.0, 1.0, dist_q, probs
        >>> float(quantile_expected_sarsa(*args))  # of 1 from 2 and 4
        1.0

    References:
        Dabney, Rowland, Bellemare and Munos, `Distributional Reinforcement Learning
        with Quantile Regression <https://arxiv.org/abs/1710.10044>`_, 2017.
        van Seijen, van Hasselt, Whiteson and Wiering, `A Theoretical and Empirical
        Analysis of Expected Sarsa <https://doi.org/10.1109/ADPRL.2009.4927542>`_, 2009.
    """
    _refuse_no_targets("quantile_expected_sarsa", dist_q_t=dist_q_t)
    none = ~(jnp.sum(probs_a_t) > 0) & (discount_t == 0)
    probs_a_t = jnp.where(none, 1 / len(probs_a_t), probs_a_t)
    weights = jnp.broadcast_to(probs_a_t / len(dist_q_t), dist_q_t.shape)
    targets = r_t + discount_t * contain_nonfinite(dist_q_t, discount_t * weights)
    targets, weights = stop_gradient_if(
        stop_target_gradients, (jnp.ravel(targets), jnp.ravel(weights))
    )
    dist_src = _column(dist_q_tm1, a_tm1)
    return _loss(dist_src, tau_q_tm1, targets, weights, huber_param)


@checked
def quantile_n_step_targets(
    r_t: Annotated[Arg, "f[T]"],
    discount_t: Annotated[Arg, "f[T]"],
    dist_t: Annotated[Arg, "f[T,M]"],
    n: Annotated[int | Array, "i[]", "[1, inf)"],
    *,
    truncation_t: Annotated[Arg | None, "b[T]"] = None,
    mask_t: Annotated[Arg | None, "b[T]"] = None,
    stop_target_gradients: Flag = True,
) -> Annotated[Array, "f[T,M]"]:
    r"""Computes targets of quantiles from `n` rewards, then bootstrapped.

    .. math::
        y_{t-1,j} = \sum_{i=0}^{n-1} \Gamma_i \, r_{t+i}
            + \Gamma_n \, \theta_{t+n-1,j}, \qquad
        \Gamma_i = \prod_{j=0}^{i-1} \gamma_{t+j}

    They are `n_step_bootstrapped_returns` of each estimate: near the end of the
    trajectory they bootstrap from the last estimates there.

    Args:
        r_t: rewards at times `1..T`, `f[T]`.
        discount_t: discounts at times `1..T`, `f[T]`, dimensionless, in `[0, 1]`; 0
            on termination.
        dist_t: estimates :math:`\theta_{t,j}` at times `1..T`, `f[T,M]`, in units of
            return: of state values, or of the action that is best or was taken.
        n: number of rewards in each target, `i[]`, at least 1; may exceed `T`. A
            Python `int` is fixed while tracing; an array may be traced, and is not
            checked.
        truncation_t: whether a time limit cut the episode after each step, `b[T]`:
            it then bootstraps from its own `dist_t`, and no target sees beyond. None
            was cut if `None`.
        mask_t: whether each step counts, `b[T]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        stop_target_gradients: whether to hold the targets constant, `b[]`.

    Returns:
        Targets from times `0..T-1`, `f[T,M]`, in units of return; 0 at steps that do
        not count. `quantile_regression_loss` makes a loss of each row.

    Raises:
        ValueError: if a shape breaks its contract, or `n` is below 1; use `jax.vmap`
            for batches.
        TypeError: if a dtype breaks its contract.

    Example:
        >>> dist_t = jnp.array([[2.0, 4.0], [4.0, 8.0]])
        >>> quantile_n_step_targets(jnp.ones(2), jnp.full(2, 0.5), dist_t, 2).tolist()
        [[2.5, 3.5], [3.0, 5.0]]

    References:
        Dabney, Rowland, Bellemare and Munos, `Distributional Reinforcement Learning
        with Quantile Regression <https://arxiv.org/abs/1710.10044>`_, 2017.
        Tang et al., `The Nature of Temporal Difference Errors in Multi-step
        Distributional Reinforcement Learning <https://arxiv.org/abs/2207.07570>`_,
        2022, which studies off-policy ones too.
    """
    targets = jax.vmap(
        lambda v_t: n_step_bootstrapped_returns(
            r_t, discount_t, v_t, n, truncation_t=truncation_t, mask_t=mask_t
        ),
        in_axes=1,
        out_axes=1,
    )(dist_t)
    return stop_gradient_if(stop_target_gradients, targets)


_column = jax.vmap(batched_index, in_axes=(0, None))


def _refuse_no_targets(name: str, **targets: Array) -> None:
    [(argument, array)] = targets.items()
    if len(array) == 0:
        raise ValueError(f"{name}: {argument} must have an entry, got {array.shape}.")


@jax.custom_jvp
def _loss(
    sources: Array, levels: Array, targets: Array, weights: Array, kappa: Array
) -> Array:
    """Returns the loss summed over pairs, which never exist all at once on a CPU."""
    losses, _ = _losses_and_slopes(sources, levels, targets, weights, kappa)
    return jnp.sum(losses)


@functools.partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    """Differentiates the loss: by the sources alone without keeping any pair."""
    if all(isinstance(tangent, SymbolicZero) for tangent in tangents[1:]):
        losses, slopes = _losses_and_slopes(*primals)
        return jnp.sum(losses), -jnp.vdot(slopes, tangents[0])
    dense = (
        jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
    )
    return jax.jvp(lambda *xs: jnp.sum(_all_pairs(*xs)[0]), primals, tuple(dense))


def _losses_and_slopes(*args: Array) -> tuple[Array, Array]:
    """Returns each source's loss, and minus its derivative."""
    return jax.lax.platform_dependent(*args, cpu=_one_by_one, default=_all_pairs)


def _one_by_one(
    sources: Array, levels: Array, targets: Array, weights: Array, kappa: Array
) -> tuple[Array, Array]:
    def of(target: Array, weight: Array) -> tuple[Array, Array]:
        return _pair(target - sources, levels, weight, kappa)

    def step(
        sums: tuple[Array, Array], pair: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        losses, slopes = of(*pair)
        return (sums[0] + losses, sums[1] + slopes), None

    first, rest = of(targets[0], weights[0]), (targets[1:], weights[1:])
    return jax.lax.scan(step, first, rest, unroll=2)[0]


def _all_pairs(
    sources: Array, levels: Array, targets: Array, weights: Array, kappa: Array
) -> tuple[Array, Array]:
    errors = targets[None, :] - sources[:, None]
    losses, slopes = _pair(errors, levels[:, None], weights[None, :], kappa)
    return jnp.sum(losses, axis=-1), jnp.sum(slopes, axis=-1)


def _pair(
    error: Array, level: Array, weight: Array, kappa: Array
) -> tuple[Array, Array]:
    """Returns the loss of an error, and its derivative."""
    size = jnp.where(error < 0, -error, error)
    near = jnp.where(size >= kappa, kappa, size)
    side = weight * jnp.where(error < 0, 1 - level, level)
    pull = side * (near + jnp.where(kappa > 0, 0, 1 + kappa))  # NaN where kappa is
    loss = pull * contain_nonfinite(size - near / 2, pull)
    return loss, jnp.where(error < 0, -pull, pull)

r"""Advantages on one scale: less their mean, over their standard deviation.

A policy loss moves the further the larger the advantages are, and their scale changes
from task to task and as an agent learns. Standardised over a batch they have a mean of
zero and a variance of one, whatever the units of reward: `standardize_advantages`.
Where returns of different tasks or prompts share a batch, each is compared with its
own: `standardize_advantages_by_group`.

The mean and the deviation are those of all devices along `axis_name`, as if the batch
were on one of them. Advantages are first shifted and scaled by the largest and the
smallest, which cancels out: so that neither a large mean nor large numbers cost digits,
and those that are all the same become exactly zero.
"""

from collections.abc import Callable, Hashable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import keep_where, root
from rlprims.collectives import AllSum, maximum_over

__all__ = ["standardize_advantages", "standardize_advantages_by_group"]


@checked
def standardize_advantages(
    adv_t: Annotated[Arg, "f[...]"],
    *,
    epsilon: Annotated[Arg, "f[]", "[0, inf]"] = 1e-8,
    ddof: Literal[0, 1] = 0,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[...]"]:
    r"""Shifts and scales advantages to a mean of zero and a variance of one.

    .. math::
        \hat A_t = \frac{A_t - m}{s + \epsilon}, \qquad
        m = \frac1n \sum_t A_t, \qquad
        s^2 = \frac{1}{n - \text{ddof}} \sum_t (A_t - m)^2

    Advantages that are all the same, one alone included, become zero, with a gradient
    of zero. Gradients flow, but the losses that advantages go into hold them constant.

    Args:
        adv_t: advantages :math:`A_t`, `f[...]`, in units of return.
        epsilon: what to add to the standard deviation, `f[]`, in units of return, not
            negative: it fades what is smaller out.
        ddof: 0 for the deviation of these very numbers, as NumPy has it, or 1 for the
            unbiased estimate that PyTorch, and popular code with it, has; a Python
            `int`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        axis_name: axis, or axes, of `jax.shard_map`, `jax.vmap` or `jax.pmap` that the
            advantages are spread over too; `None` if they are not.

    Returns:
        The standardised advantages, `f[...]`, dimensionless; 0 at steps that do not
        count.

    Raises:
        ValueError: if a shape breaks its contract, `epsilon` is a Python number below
            0, or `ddof` is neither 0 nor 1.
        TypeError: if `adv_t` is not floating-point.

    Example:
        >>> adv = jnp.array([1.0, 5.0, 5.0, 1.0])
        >>> standardize_advantages(adv, epsilon=0.0).tolist()
        [-1.0, 1.0, 1.0, -1.0]
        >>> standardize_advantages(jnp.array([0.1, 0.1, 0.1])).tolist()
        [0.0, 0.0, 0.0]

    References:
        Engstrom et al., `Implementation Matters in Deep Policy Gradients: A Case Study
        on PPO and TRPO <https://arxiv.org/abs/2005.12729>`_, 2020.
        Chan, Golub and LeVeque, `Algorithms for Computing the Sample Variance:
        Analysis and Recommendations
        <https://doi.org/10.1080/00031305.1983.10483115>`_, 1983.
    """

    def pooled(kind: str, x: Array) -> Array:
        whole = jnp.sum(x) if kind == "sum" else jnp.max(x, initial=-jnp.inf)
        return _on_all_devices(kind, whole, axis_name)

    return standardized(adv_t, pooled, epsilon, ddof, mask_t)


@checked
def standardize_advantages_by_group(
    adv_t: Annotated[Arg, "f[...]"],
    group_ids: Annotated[Arg, "i[...]"],
    *,
    num_groups: int,
    epsilon: Annotated[Arg, "f[]", "[0, inf]"] = 1e-8,
    ddof: Literal[0, 1] = 0,
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    axis_name: Hashable | None = None,
) -> Annotated[Array, "f[...]"]:
    r"""Shifts and scales the advantages of each group to mean zero and variance one.

    .. math::
        \hat A_t = \frac{A_t - m_g}{s_g + \epsilon}, \qquad g = \text{group\_ids}_t

    with the mean and the standard deviation over the steps of the same group, as in
    `standardize_advantages`. Groups may differ in size, be empty, and be spread over
    devices. NaN spoils its own group alone.

    Args:
        adv_t: advantages :math:`A_t`, `f[...]`, in units of return.
        group_ids: the group of each, `i[...]`, in `[0, num_groups)`; outside, the
            result is NaN.
        num_groups: the number of groups, a Python `int`.
        epsilon: what to add to the standard deviation, `f[]`, in units of return, not
            negative: it fades what is smaller out. The code of GRPO takes 1e-4.
        ddof: 0 for the deviation of these very numbers, as NumPy has it, or 1 for the
            unbiased estimate that PyTorch, and popular code with it, has; a Python
            `int`.
        mask_t: whether each step counts, `b[...]`: the others, padding say, are as if
            left out, NaN included. All count if `None`.
        axis_name: axis, or axes, of `jax.shard_map`, `jax.vmap` or `jax.pmap` that the
            advantages are spread over too; `None` if they are not.

    Returns:
        The standardised advantages, `f[...]`, dimensionless; 0 at steps that do not
        count.

    Raises:
        ValueError: if a shape breaks its contract, `num_groups` is not positive,
            `epsilon` is a Python number below 0, or `ddof` is neither 0 nor 1.
        TypeError: if `adv_t` is not floating-point, `group_ids` is not an integer, or
            `num_groups` no Python `int`.

    Example:
        >>> adv, group_ids = jnp.array([1.0, 5.0, 7.0]), jnp.array([0, 0, 1])
        >>> standardize_advantages_by_group(
        ...     adv, group_ids, num_groups=2, epsilon=0.0
        ... ).tolist()
        [-1.0, 1.0, 0.0]

    References:
        Shao et al., `DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open
        Language Models <https://arxiv.org/abs/2402.03300>`_, 2024.
    """
    if num_groups < 1:
        raise ValueError(
            "standardize_advantages_by_group: num_groups must be positive, got "
            f"{num_groups}."
        )
    ids = group_ids.astype(int)
    counted = jnp.ones(ids.shape, bool) if mask_t is None else mask_t
    known = (ids >= 0) & (ids < num_groups)
    groups = jnp.where(known, ids, num_groups)  # one more, for the others

    def pooled(kind: str, x: Array) -> Array:
        if kind == "sum":
            each = jnp.zeros(num_groups + 1, x.dtype).at[groups].add(x)
        else:
            each = jnp.full(num_groups + 1, -jnp.inf, x.dtype).at[groups].max(x)
        return _on_all_devices(kind, each, axis_name)[groups]

    result = standardized(adv_t, pooled, epsilon, ddof, mask_t)
    return jnp.where(counted & ~known, jnp.nan, result)


def standardized(
    adv: Array,
    pooled: Callable[[str, Array], Array],
    epsilon: Array,
    ddof: int,
    mask: Array | None,
) -> Array:
    """Standardises within what `pooled` adds up, or takes the maximum of."""
    (adv,) = keep_where(mask, adv)
    (one,) = keep_where(mask, jnp.ones_like(adv))
    known = jax.lax.stop_gradient(adv)
    high = pooled("max", jnp.where(one > 0, known, -jnp.inf))
    width = high + pooled("max", jnp.where(one > 0, -known, -jnp.inf))
    width = jnp.where(width <= 0, 1, width)
    (scaled,) = keep_where(mask, (adv - high) / width)  # in [-1, 0]
    count = pooled("sum", one)
    mean = pooled("sum", scaled) / jnp.maximum(count, 1)
    (errors,) = keep_where(mask, scaled - mean)
    deviation = root(pooled("sum", errors**2) / jnp.maximum(count - ddof, 1))
    same = deviation == 0
    return jnp.where(
        same, 0, errors / (jnp.where(same, 1, deviation) + epsilon / width)
    )


def _on_all_devices(kind: str, x: Array, axis_name: Hashable | None) -> Array:
    if kind == "sum":
        return AllSum(axis_name)(x, axis=())
    return maximum_over(axis_name, x)

r"""Bonuses for what was seen seldom, where it can be counted.

`count_bonus` is the reward: it falls with the square root of how often something was
seen. Where observations do not repeat exactly there are two ways to count them:

*   Similar ones count as the same. `simhash` gives those in nearly the same direction
    the same code, and `count_visits` counts codes in a table:

    >>> features = jnp.array([[3.0, 1.0]] * 3 + [[9.0, 3.1], [-3.0, 1.0]])
    >>> projection = jax.random.normal(jax.random.key(0), (2, 8))
    >>> codes, counts = simhash(features, projection), jnp.zeros(2**8, jnp.int32)
    >>> visits, counts = count_visits(counts, codes)
    >>> visits.tolist()
    [4.0, 4.0, 4.0, 4.0, 1.0]
    >>> count_bonus(visits, scale=1.0, offset=0.0).tolist()
    [0.5, 0.5, 0.5, 0.5, 1.0]

*   A model of their density learns from each, and `pseudo_count` tells how often it
    must have been seen, from how much more probable the model found it afterwards.
"""

from collections.abc import Hashable
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked
from rlprims.arrays import guarded, keep_where, weighted
from rlprims.collectives import AllSum

__all__ = ["count_bonus", "count_visits", "pseudo_count", "simhash"]

Mask = Annotated[Arg | None, "b[...]"]

# So many signs make a code that fits an integer of 32 bits, and so does their number.
_MOST_SIGNS = 30


@checked
def count_bonus(
    count: Annotated[Arg, "f[...]", "[0, inf]"],
    *,
    scale: Annotated[Arg, "f[]", "[0, inf)"],
    offset: Annotated[Arg, "f[]", "[0, inf)"] = 0.01,
    mask_t: Mask = None,
) -> Annotated[Array, "f[...]"]:
    r"""Computes rewards for what was seen seldom.

    .. math::
        r_t = \frac{\beta}{\sqrt{N_t + c}}

    Bellemare et al. add 0.01 to pseudo-counts, which may be 0. Tang et al. add nothing,
    as they count a visit before they reward it: that is an `offset` of 0.

    Args:
        count: how often it was seen :math:`N`, `f[...]`, not negative, infinity
            included, which is rewarded with 0.
        scale: :math:`\beta`, `f[]`, in units of reward, not negative.
        offset: :math:`c`, `f[]`, not negative. With 0, a count of 0 is rewarded with
            infinity, which has no gradient.
        mask_t: whether each step counts, `b[...]`: the others, padding say, have a
            reward of 0, whatever they hold. All count if `None`.

    Returns:
        The rewards, `f[...]`, in units of reward.

    Raises:
        ValueError: if a shape breaks its contract, or an argument is a negative Python
            number.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> count_bonus(jnp.array([1.0, 4.0]), scale=0.5, offset=0.0).tolist()
        [0.5, 0.25]

    References:
        Bellemare et al., `Unifying Count-Based Exploration and Intrinsic Motivation
        <https://arxiv.org/abs/1606.01868>`_, 2016.
        Tang et al., `#Exploration: A Study of Count-Based Exploration for Deep
        Reinforcement Learning <https://arxiv.org/abs/1611.04717>`_, 2016.
    """
    count = count if mask_t is None else jnp.where(mask_t, count, 1)
    bonus = weighted(guarded(jax.lax.rsqrt, count + offset), scale)
    return keep_where(mask_t, bonus)[0]


@checked
def count_visits(
    counts: Annotated[Arg, "i[S]"],
    indices: Annotated[Arg, "i[...]"],
    *,
    mask_t: Mask = None,
    axis_name: Hashable | None = None,
) -> tuple[Annotated[Array, "f[...]"], Annotated[Array, "i[S]"]]:
    r"""Counts visits in a table, and looks up how often each place was visited.

    .. math::
        n'(s) = n(s) + \sum_t 1[s_t = s], \qquad N_t = n'(s_t)

    All visits are counted before any is looked up, as by Tang et al., so that each
    counts itself, and equal indices in one batch get equal counts. Nothing is lost: a
    count that reaches the largest integer of its dtype stays there.

    Args:
        counts: how often each place was visited before, `i[S]`, not negative.
        indices: the places visited, `i[...]`, in `[0, S)`. One outside is not counted,
            and has a count of NaN.
        mask_t: whether each visit counts, `b[...]`: the others, padding say, are not
            counted, and have a count of 0. All count if `None`.
        axis_name: the name of a mapped axis, of `jax.vmap` or `jax.shard_map`, over
            which the visits are split, and the table is the same; `None` if it is not.

    Returns:
        The count of the place of each visit, `f[...]`, in single precision, for
        `count_bonus`; and the next table, `i[S]`.

    Raises:
        ValueError: if a shape breaks its contract.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> counts = jnp.array([5, 0, 0])
        >>> visits, counts = count_visits(counts, jnp.array([0, 2, 2, 7]))
        >>> visits.tolist(), counts.tolist()
        ([6.0, 2.0, 2.0, nan], [6, 0, 2])

    References:
        Tang et al., `#Exploration: A Study of Count-Based Exploration for Deep
        Reinforcement Learning <https://arxiv.org/abs/1611.04717>`_, 2016.
    """
    (size,), total = counts.shape, AllSum(axis_name)
    places = indices.astype(int)  # so that `size` fits, whatever the dtype was
    places = jnp.where((places >= 0) & (places < size), places, size)
    counted = places if mask_t is None else jnp.where(mask_t, places, size)
    new = total(jnp.zeros(size + 1, int).at[counted].add(1)[:size], axis=())
    counts = _added(counts, new)
    visits = jnp.append(counts.astype(jnp.float32), jnp.nan)[places]
    return keep_where(mask_t, visits)[0], counts


@checked
def pseudo_count(
    log_prob: Annotated[Arg, "f[...]", "[-inf, 0]"],
    recoding_log_prob: Annotated[Arg, "f[...]", "[-inf, 0]"],
) -> Annotated[Array, "f[...]"]:
    r"""Computes how often a density model must have seen something.

    .. math::
        \hat N = \frac{\rho \, (1 - \rho')}{\rho' - \rho}

    A model that counts raises the probability :math:`n / m` of what it is shown to
    :math:`(n + 1) / (m + 1)`, which gives back :math:`n`. It is computed from
    logarithms, as probabilities of whole images are too small to represent.

    Args:
        log_prob: logarithm of the probability :math:`\rho` of each observation, before
            the model learned from it, `f[...]`, in nats, not positive.
        recoding_log_prob: that of the probability :math:`\rho'` of the same observation
            afterwards, `f[...]`, in nats, not positive.

    Returns:
        The pseudo-counts, `f[...]`, from 0, as of what was impossible. It is infinity
        where :math:`\rho' \le \rho`: nothing was left to learn, and `count_bonus` is 0.

    Raises:
        ValueError: if a shape breaks its contract, or an argument is a positive Python
            number.
        TypeError: if an argument has the wrong dtype.

    Example:
        >>> round(pseudo_count(jnp.log(3 / 9), jnp.log(4 / 10)).item(), 3)
        3.0

    References:
        Bellemare et al., `Unifying Count-Based Exploration and Intrinsic Motivation
        <https://arxiv.org/abs/1606.01868>`_, 2016.
    """
    nothing = recoding_log_prob <= log_prob
    gain = jnp.where(nothing, 1, recoding_log_prob - log_prob)
    count = jnp.expm1(recoding_log_prob) * jnp.exp(-gain) / jnp.expm1(-gain)
    return jnp.where(nothing, jnp.inf, count)


@checked
def simhash(
    features: Annotated[Arg, "f[...,D]"],
    projection: Annotated[Arg, "f[D,K]"],
) -> Annotated[Array, "i[...]"]:
    r"""Hashes features so that those in nearly the same direction share a code.

    .. math::
        \sum_k 2^k \, 1[x_k \ge 0], \qquad x = \text{features} \cdot \text{projection}

    Draw the projection once, from a standard normal distribution, and keep it: each
    column is a plane through zero, and its sign tells the side. The more there are, the
    fewer features share a code. Two at an angle of :math:`\theta` differ in each sign
    with a probability of :math:`\theta / \pi`. Of features that all have the same sign,
    subtract a mean first.

    A table of counts has :math:`2^K` entries. Where that is too large, take the codes
    modulo a prime number: codes that collide are then counted together.

    Args:
        features: features of each observation, `f[...,D]`, in any units.
        projection: what to project them on, `f[D,K]`, where `K` is at most 30.

    Returns:
        The codes, `i[...]`, in :math:`[0, 2^K)`; -1, which `count_visits` does not
        count, where a projection is NaN.

    Raises:
        ValueError: if a shape breaks its contract, or `K` is above 30.
        TypeError: if an argument is not floating-point.

    Example:
        >>> projection = jnp.array([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> simhash(jnp.array([[2.0, 1.0], [-2.0, 1.0]]), projection).tolist()
        [3, 6]

    References:
        Tang et al., `#Exploration: A Study of Count-Based Exploration for Deep
        Reinforcement Learning <https://arxiv.org/abs/1611.04717>`_, 2016.
    """
    signs = projection.shape[1]
    if signs > _MOST_SIGNS:
        raise ValueError(
            f"simhash: projection has shape {projection.shape}, expected f[D,K] with "
            f"K <= {_MOST_SIGNS}, so that codes fit 32 bits."
        )
    projected = jnp.matmul(features, projection, precision="highest")
    powers = 2 ** jnp.arange(signs, dtype=jnp.int32)
    codes = jnp.matmul((projected >= 0).astype(jnp.int32), powers)
    return jnp.where(jnp.isnan(projected).any(axis=-1), -1, codes)


def _added(counts: Array, new: Array) -> Array:
    """Adds up to the largest integer of the dtype of `counts`, and no further."""
    largest = jnp.iinfo(counts.dtype).max
    new = jnp.minimum(new, min(largest, jnp.iinfo(new.dtype).max)).astype(counts.dtype)
    return counts + jnp.minimum(new, jnp.asarray(largest, counts.dtype) - counts)

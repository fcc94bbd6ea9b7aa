"""How much a penalty on a divergence counts: set so that it stays near a target.

A fixed weight that suits the start of training is too weak or too strong later. Both
functions are called once after each update, with the divergence that it led to, and
give the weight for the next: `adaptive_kl_coefficient` doubles or halves it,
`proportional_kl_coefficient` turns it up or down a little. `ppo_kl_penalty_loss` takes
the weight, and `approximate_kl` estimates the divergence.
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rlprims._checks import Arg, checked

__all__ = ["adaptive_kl_coefficient", "proportional_kl_coefficient"]


@checked
def adaptive_kl_coefficient(
    kl_coefficient: Annotated[Arg, "f[...]"],
    kl: Annotated[Arg, "f[...]"],
    *,
    target_kl: Annotated[Arg, "f[]|f[...]", "(0, inf)"],
    tolerance: Annotated[Arg, "f[]", "[1, inf)"] = 1.5,
    factor: Annotated[Arg, "f[]", "[1, inf)"] = 2.0,
) -> Annotated[Array, "f[...]"]:
    r"""Adapts the weight of a penalty, by a factor, to keep a divergence near a target.

    .. math::
        \beta' = \begin{cases}
            c \, \beta & d > b \, d_{\text{target}} \\
            \beta / c & d < d_{\text{target}} / b \\
            \beta & \text{otherwise}
        \end{cases}

    with tolerance :math:`b` and factor :math:`c`. Called once after each policy update,
    with the divergence that it led to.

    Args:
        kl_coefficient: weight :math:`\beta` so far, `f[...]`.
        kl: divergence :math:`d` of the last update, or an estimate, `f[...]`, in nats.
        target_kl: the divergence to aim at, `f[]|f[...]`, in nats, positive.
        tolerance: how many times the target the divergence may be, or what fraction of
            it, `f[]`, dimensionless, at least 1.
        factor: what to multiply or divide by, `f[]`, dimensionless, at least 1.

    Returns:
        The weight for the next update, `f[...]`; NaN if the divergence is.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of its range.
        TypeError: if an argument is not floating-point.

    Example:
        >>> kl = jnp.array([0.5, 1.0, 2.0])
        >>> adaptive_kl_coefficient(jnp.full(3, 8.0), kl, target_kl=1.0).tolist()
        [4.0, 8.0, 16.0]

    References:
        Schulman, Wolski, Dhariwal, Radford and Klimov, `Proximal Policy Optimization
        Algorithms <https://arxiv.org/abs/1707.06347>`_, 2017, section 4.
    """
    least, most = target_kl / tolerance, target_kl * tolerance
    cases = [kl > most, kl < least, (kl <= most) & (kl >= least)]
    scales = [factor, 1 / factor, jnp.ones_like(factor)]
    return kl_coefficient * jnp.select(cases, scales, jnp.nan)


@checked
def proportional_kl_coefficient(
    kl_coefficient: Annotated[Arg, "f[...]"],
    kl: Annotated[Arg, "f[...]"],
    *,
    target_kl: Annotated[Arg, "f[]|f[...]", "(0, inf)"],
    gain: Annotated[Arg, "f[]", "[0, inf)"] = 0.1,
    error_limit: Annotated[Arg, "f[]", "[0, inf)"] = 0.2,
) -> Annotated[Array, "f[...]"]:
    r"""Adapts the weight of a penalty in proportion to how far off a divergence is.

    .. math::
        \beta' = \beta \, (1 + K e), \qquad e = \text{clip}\Bigl(
            \frac{d - d_{\text{target}}}{d_{\text{target}}}, -e_{\max}, e_{\max}\Bigr)

    Smoother than `adaptive_kl_coefficient`, and slower: with the numbers of the paper a
    step changes the weight by 2 % at most. Its code scales the gain with the batch: the
    number of episodes in it over a horizon.

    Args:
        kl_coefficient: weight :math:`\beta` so far, `f[...]`.
        kl: divergence :math:`d` of the last update, or an estimate, `f[...]`, in nats.
        target_kl: the divergence to aim at, `f[]|f[...]`, in nats, positive.
        gain: how strongly to react, :math:`K`, `f[]`, dimensionless, not negative.
        error_limit: largest relative error to react to, :math:`e_{\max}`, `f[]`,
            dimensionless, not negative.

    Returns:
        The weight for the next update, `f[...]`; NaN if the divergence is.

    Raises:
        ValueError: if a shape breaks its contract, or a setting is a Python number out
            of its range.
        TypeError: if an argument is not floating-point.

    Example:
        >>> kl = jnp.array([0.0, 1.0, 9.0])
        >>> beta = proportional_kl_coefficient(jnp.ones(3), kl, target_kl=1.0)
        >>> [round(x, 4) for x in beta.tolist()]
        [0.98, 1.0, 1.02]

    References:
        Ziegler, Stiennon, Wu, Brown, Radford, Amodei, Christiano and Irving,
        `Fine-Tuning Language Models from Human Preferences
        <https://arxiv.org/abs/1909.08593>`_, 2019.
    """
    error = jnp.clip((kl - target_kl) / target_kl, -error_limit, error_limit)
    return kl_coefficient * (1 + gain * error)

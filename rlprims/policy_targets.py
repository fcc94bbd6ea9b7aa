"""Targets of a policy that consist of sampled actions and how much each one counts.

A policy too rich for a sum over its actions can still be moved towards another one, or
towards what a search has found: sample actions, weigh each by how much it is to be
liked, and raise the log-probabilities in proportion. `constant_policy_targets` is for
learning what another policy does, and `zero_policy_targets` stands in where there is
nothing to learn; for anything better, make a `PolicyTarget` with weights of your own.

A policy is a `Distribution`, in the manner of distrax and of TensorFlow Probability:
their classes are such, and so is any of yours that has these three members. It has a
shape of its own, `batch_shape`, such as one action for each of `T` steps. Of each it
draws `N` actions, so that actions have the shape `[N, *batch_shape, ...]`, where the
rest is the shape of one action, and weights and log-probabilities `[N, *batch_shape]`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlprims._checks import Arg, checked_as
from rlprims.arrays import contain_nonfinite, lhs_broadcast, weighted
from rlprims.gradients import stop_gradient_if
from rlprims.losses import Reduction, reduced

__all__ = [
    "Distribution",
    "PolicyTarget",
    "constant_policy_targets",
    "sampled_policy_distillation_loss",
    "zero_policy_targets",
]


class Distribution(Protocol):
    """A policy that can draw actions and tell how probable they are."""

    @property
    def batch_shape(self) -> Sequence[int]:
        """The shape of a log-probability of one action from each policy."""
        ...

    def sample(self, *, seed: Any, sample_shape: tuple[int, ...]) -> Array:
        """Draws actions, `[*sample_shape, *batch_shape, ...]`."""
        ...

    def log_prob(self, value: Any, /) -> Array:
        """Computes log-probabilities, in nats, of actions as `sample` draws them."""
        ...


class PolicyTarget(NamedTuple):
    """Actions, and how much each of them counts.

    Attributes:
        actions: `N` actions of each policy, `[N, *batch_shape, ...]`.
        weights: their weights, `f[...]`, of shape `[N, *batch_shape]`.
    """

    actions: Arg
    weights: Annotated[Arg, "f[...]"]


def constant_policy_targets(
    distribution: Distribution,
    rng_key: Arg,
    num_samples: int,
    weights_scale: Arg = 1.0,
) -> PolicyTarget:
    r"""Draws actions from a policy, which all count the same.

    .. math::
        a_i \sim \pi, \qquad w_i = \text{weights\_scale}

    To fit these is to learn what the policy does: with weights of 1, the
    `sampled_policy_distillation_loss` is an estimate of the cross-entropy from it.

    Args:
        distribution: the policy to draw from.
        rng_key: a random key, `k[]`.
        num_samples: how many actions to draw from each policy, an `int`, at least 1.
        weights_scale: the weight of every action, `f[]`, dimensionless.

    Returns:
        A `PolicyTarget` of `num_samples` actions. Its weights are in the dtype of
        `weights_scale` if that is an array, else in that of the actions, or float32 if
        they are not floating-point.

    Raises:
        ValueError: if `num_samples` is below 1, or `weights_scale` no scalar.
        TypeError: if `num_samples` is no Python `int`, or `rng_key` not a random key.

    Example:
        >>> import types
        >>> draw = lambda seed, sample_shape: jax.random.normal(seed, sample_shape)
        >>> policy = types.SimpleNamespace(batch_shape=(), sample=draw)
        >>> constant_policy_targets(policy, jax.random.key(0), 2, 0.5).weights.tolist()
        [0.5, 0.5]
    """
    return _targets(
        "constant_policy_targets", distribution, rng_key, num_samples, weights_scale
    )


def zero_policy_targets(
    distribution: Distribution,
    rng_key: Arg,
    num_samples: int,
    *,
    weights_scale: Arg = 0.0,
) -> PolicyTarget:
    r"""Draws actions from a policy, which do not count.

    .. math::
        a_i \sim \pi, \qquad w_i = 0

    They have the shapes and dtypes of `constant_policy_targets`, and can take their
    place where there is nothing to learn: a weight of 0 makes the loss and its
    gradient exactly 0.

    Args:
        distribution: the policy to draw from.
        rng_key: a random key, `k[]`.
        num_samples: how many actions to draw from each policy, an `int`, at least 1.
        weights_scale: the weight of every action, `f[]`, dimensionless.

    Returns:
        A `PolicyTarget` of `num_samples` actions.

    Raises:
        ValueError: if `num_samples` is below 1, or `weights_scale` no scalar.
        TypeError: if `num_samples` is no Python `int`, or `rng_key` not a random key.

    Example:
        >>> import types
        >>> draw = lambda seed, sample_shape: jax.random.normal(seed, sample_shape)
        >>> policy = types.SimpleNamespace(batch_shape=(), sample=draw)
        >>> zero_policy_targets(policy, jax.random.key(0), 2).weights.tolist()
        [0.0, 0.0]
    """
    return _targets(
        "zero_policy_targets", distribution, rng_key, num_samples, weights_scale
    )


def sampled_policy_distillation_loss(
    distribution: Distribution,
    policy_targets: PolicyTarget,
    stop_target_gradients: bool | Array = True,
    *,
    mask_t: Arg | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Computes minus the log-probabilities of target actions, by their weights.

    .. math::
        L = -\frac{1}{N} \sum_{i=1}^N w_i \log \pi(a_i)

    of each policy, and then the mean over policies. An action of weight 0 has no
    effect, even if it is NaN or impossible.

    Args:
        distribution: the policy :math:`\pi` to train.
        policy_targets: anything with `actions` :math:`a_i`, as the distribution takes
            them, and `weights` :math:`w_i` of the shape of their log-probabilities.
        stop_target_gradients: whether actions and weights are constants when
            differentiating: a `bool`, or a traced boolean scalar.
        mask_t: whether each policy is of a real step and not of padding, boolean in
            the shape `batch_shape`; all are if `None`. Actions and weights of padding
            have no effect. What the policy computes there is cut off as well, but its
            parameters must be finite for their gradients to be.
        reduction: `"mean"` over real steps, 0 if there is none; `"sum"`; or `"none"`,
            which gives the losses in the shape `batch_shape`, 0 for padding.

    Returns:
        The loss, `f[]`, or `f[...]` if `reduction` is `"none"`, in nats.

    Raises:
        ValueError: if the shape of the weights is not that of the log-probabilities,
            that of `mask_t` is not what is left without the leading axis, or
            `reduction` is none of the three.
        TypeError: if the weights are not floating-point, or `mask_t` not boolean.

    Example:
        >>> import types
        >>> policy = types.SimpleNamespace(log_prob=lambda action: -action)
        >>> targets = PolicyTarget(jnp.array([3.0, 4.0]), jnp.array([2.0, 0.5]))
        >>> sampled_policy_distillation_loss(policy, targets).item()  # (6 + 2) / 2
        4.0
    """
    fn = "sampled_policy_distillation_loss"
    if jnp.result_type(stop_target_gradients) != jnp.bool_:
        raise TypeError(
            f"{fn}: stop_target_gradients must be boolean, got "
            f"{jnp.result_type(stop_target_gradients)}."
        )
    given = policy_targets.actions, policy_targets.weights
    actions, weights = stop_gradient_if(
        stop_target_gradients, jax.tree.map(jnp.asarray, given)
    )
    if weights.shape != actions.shape[: weights.ndim]:
        expected = jnp.shape(distribution.log_prob(actions))
        _refuse_shape(f"{fn}: weights", weights, expected)
    if mask_t is not None:
        _refuse_shape(f"{fn}: mask_t", mask_t, weights.shape[1:])
        weights = jnp.where(jnp.asarray(mask_t)[None], weights, 0)
    actions = contain_nonfinite(actions, lhs_broadcast(weights, actions))
    log_probs = distribution.log_prob(actions)
    _refuse_shape(f"{fn}: weights", weights, jnp.shape(log_probs))
    log_probs, weights = (jnp.moveaxis(x, 0, -1) for x in (log_probs, weights))
    return _loss(log_probs, weights, mask_t, reduction=reduction)


@checked_as("sampled_policy_distillation_loss.loss")
def _loss(
    log_probs: Annotated[Arg, "f[...,N]"],
    weights: Annotated[Arg, "f[...,N]"],
    mask_t: Annotated[Arg | None, "b[...]"] = None,
    *,
    reduction: Reduction = "mean",
) -> Annotated[Array, "f[]|f[...]"]:
    losses = -jnp.mean(weighted(log_probs, weights), axis=-1)
    return reduced(losses, mask_t, reduction)


def _targets(
    fn: str,
    distribution: Distribution,
    rng_key: Arg,
    num_samples: int,
    weights_scale: Arg,
) -> PolicyTarget:
    if type(num_samples) is not int:
        kind = type(num_samples).__name__
        raise TypeError(f"{fn}: num_samples must be a Python int, got {kind}.")
    if num_samples < 1:
        raise ValueError(f"{fn}: num_samples must be at least 1, got {num_samples}.")
    if not _is_key(rng_key):
        raise TypeError(
            f"{fn}: rng_key must be a random key, got {type(rng_key).__name__}; make "
            "one with jax.random.key(seed)."
        )
    _refuse_shape(f"{fn}: weights_scale", weights_scale, ())
    actions = distribution.sample(seed=rng_key, sample_shape=(num_samples,))
    shape = num_samples, *distribution.batch_shape
    weights = jnp.full(shape, weights_scale, _weights_dtype(weights_scale, actions))
    return PolicyTarget(actions=actions, weights=weights)


def _is_key(x: Arg) -> bool:
    dtype = getattr(x, "dtype", np.dtype(bool))
    return dtype == np.uint32 or jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _weights_dtype(weights_scale: Arg, actions: Array) -> Any:
    """Returns the first floating dtype, so that a number adapts to the actions."""
    dtypes = [getattr(x, "dtype", None) for x in (weights_scale, actions)]
    floats = [x for x in dtypes if x and jnp.issubdtype(x, jnp.floating)]
    return jax.dtypes.canonicalize_dtype(floats[0]) if floats else jnp.float32


def _refuse_shape(what: str, x: Arg, expected: Sequence[int]) -> None:
    if jnp.shape(x) != tuple(expected):
        raise ValueError(
            f"{what} has shape {jnp.shape(x)}, expected {tuple(expected)}."
        )

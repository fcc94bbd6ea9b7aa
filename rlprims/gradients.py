"""Where gradients flow: every primitive stops or bends them here and nowhere else.

None of these functions changes a value. `stop_gradient_if` blocks the gradient,
`td_error` blocks it on one side, `clip_gradient` bounds it, and `scale_gradient`
multiplies it.
"""

import functools
import importlib
import numbers
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from rlprims._checks import Arg

__all__ = ["clip_gradient", "scale_gradient", "stop_gradient_if", "td_error"]

Tree = TypeVar("Tree")


def clip_gradient(x: Tree, gradient_min: Arg, gradient_max: Arg) -> Tree:
    r"""Returns `x` unchanged, clipping the gradient that flows back through it.

    Each element is clipped by itself, which changes the direction of the gradient.
    Forward mode is not affected: there this is the identity.

    .. math::
        y = x, \qquad \frac{\partial L}{\partial x} = \min\Bigl(
            \max\Bigl(\frac{\partial L}{\partial y}, \text{gradient\_min}\Bigr),
            \text{gradient\_max}\Bigr)

    The clipped gradient can itself be differentiated, by the bounds too. One that is
    NaN stays NaN.

    Args:
        x: an array, or a tree of arrays, floating-point of any shape.
        gradient_min: lower bound on each element of the gradient, `f[]`, in the units
            of the gradient.
        gradient_max: upper bound, `f[]`, in the same units; it wins if the bounds are
            traced and cross.

    Returns:
        `x`, with the same values and dtypes.

    Raises:
        ValueError: if a bound is not a scalar, or if both are Python numbers and
            `gradient_min` exceeds `gradient_max`.
        TypeError: if an array in `x` is not floating-point.

    Example:
        >>> jax.grad(lambda x: 3.0 * clip_gradient(x, -1.0, 1.0))(5.0).item()
        1.0
    """
    bounds = {"gradient_min": gradient_min, "gradient_max": gradient_max}
    for name, bound in bounds.items():
        _refuse_vector("clip_gradient", name, bound)
    known = all(isinstance(bound, numbers.Real) for bound in bounds.values())
    if known and not gradient_min <= gradient_max:
        raise ValueError(
            "clip_gradient: gradient_min must not exceed gradient_max, got "
            f"{gradient_min} and {gradient_max}."
        )

    def clip(leaf: Any) -> Array:
        leaf = _floating("clip_gradient", leaf)
        return _identity().bind(
            leaf,
            jnp.asarray(gradient_min, leaf.dtype),
            jnp.asarray(gradient_max, leaf.dtype),
        )

    return jax.tree.map(clip, x)


def scale_gradient(x: Tree, scale: Arg) -> Tree:
    r"""Returns `x` unchanged, multiplying the gradient that flows through it.

    MuZero halves the gradient at the start of every application of its model, and
    divides that of the losses of `K` unrolled steps by `K`. A negative scale reverses
    the gradient.

    .. math::
        y = x, \qquad \frac{\partial L}{\partial x}
            = \text{scale} \, \frac{\partial L}{\partial y}

    Forward mode multiplies too, so that both modes give the same. What is multiplied
    can itself be differentiated, as the numbers that it is, by the scale too. A scale
    of 0 stops the gradient as `stop_gradient_if` does: nothing gets through, not even
    NaN, whatever the scale would be next to 0.

    Args:
        x: an array, or a tree of arrays, floating-point of any shape.
        scale: what to multiply the gradient by, `f[]`, dimensionless.

    Returns:
        `x`, with the same values and dtypes.

    Raises:
        ValueError: if `scale` is not a scalar.
        TypeError: if an array in `x` is not floating-point.

    Example:
        >>> jax.grad(lambda x: 3.0 * scale_gradient(x, 0.5))(5.0).item()
        1.5

    References:
        Schrittwieser et al., `Mastering Atari, Go, Chess and Shogi by Planning with a
        Learned Model <https://arxiv.org/abs/1911.08265>`_, 2019.
    """
    _refuse_vector("scale_gradient", "scale", scale)

    def scaled(leaf: Any) -> Array:
        leaf = _floating("scale_gradient", leaf)
        wide = leaf.dtype if leaf.dtype.itemsize > 4 else jnp.float32
        return _scaled(leaf, jnp.asarray(scale).astype(wide))

    return jax.tree.map(scaled, x)


def stop_gradient_if(flag: bool | Array, tree: Tree) -> Tree:
    """Returns `tree` unchanged, blocking gradients through it where `flag` is true.

    Args:
        flag: a Python `bool`, resolved while tracing, or a traced boolean scalar,
            which selects at run time.
        tree: an array, or a tree of arrays.

    Returns:
        `tree`, with the same values.

    Example:
        >>> jax.grad(lambda x: x * stop_gradient_if(True, x))(3.0).item()
        3.0
    """
    if isinstance(flag, bool):
        return jax.lax.stop_gradient(tree) if flag else tree
    return jax.tree.map(lambda x: jnp.where(flag, jax.lax.stop_gradient(x), x), tree)


def td_error(
    prediction: Array, target: Array, stop_target_gradients: bool | Array
) -> Array:
    """Returns `target - prediction`, where the target may be held constant.

    Temporal-difference learning moves predictions towards targets and not the other
    way round, so the rules of this library stop the gradient through the target
    unless told otherwise.

    Args:
        prediction: the value to correct.
        target: what it should be, in the shape of `prediction`.
        stop_target_gradients: whether the target is a constant when differentiating.

    Returns:
        The error, in the shape of `prediction`.

    Example:
        >>> td_error(jnp.float32(1.0), jnp.float32(3.0), True).item()
        2.0
    """
    return stop_gradient_if(stop_target_gradients, target) - prediction


def _floating(fn: str, leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"{fn}: x must be floating-point, got {leaf.dtype}; "
            "convert it with jnp.asarray(x, jnp.float32)."
        )
    return leaf


def _refuse_vector(fn: str, name: str, number: Arg) -> None:
    if jnp.shape(number) != ():
        raise ValueError(f"{fn}: {name} has shape {jnp.shape(number)}, expected f[].")


@jax.custom_jvp
def _scaled(x: Array, scale: Array) -> Array:
    return x


@_scaled.defjvp
def _scaled_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Scales the tangent, and leaves the value free of it, as clipping does."""
    (x, scale), dx = primals, tangents[0]
    dx = scale * jnp.where(scale == 0, 0, dx).astype(scale.dtype)
    return x, dx.astype(x.dtype)


# Reverse mode transposes what forward mode computes, so an identity that is clipped in
# one and not in the other must be an operation of its own: `jax.custom_jvp` cannot say
# how to transpose, and `jax.custom_vjp` has no forward mode. Where values flow it is
# the identity of its first argument; where tangents flow its transpose clips.
@functools.cache
def _identity() -> Any:
    core = importlib.import_module("jax.extend.core")  # slow, and seldom wanted
    identity = core.Primitive("clip_gradient")
    identity.def_impl(lambda x, low, high: x)
    identity.def_abstract_eval(lambda x, low, high: x)
    mlir.register_lowering(identity, lambda context, x, low, high: [x])
    ad.primitive_jvps[identity] = _jvp
    ad.primitive_transposes[identity] = _transpose
    batching.primitive_batchers[identity] = _batch
    return identity


def _jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Any]:
    """Marks the tangent for its transpose, and leaves the value free of the mark."""
    (x, low, high), dx = primals, tangents[0]
    return x, dx if isinstance(dx, ad.Zero) else _identity().bind(dx, low, high)


def _transpose(cotangent: Any, x: Any, low: Array, high: Array) -> tuple[Any, ...]:
    zero = isinstance(cotangent, ad.Zero)
    return cotangent if zero else jnp.clip(cotangent, low, high), None, None


def _batch(args: tuple[Array, ...], axes: tuple[int | None, ...]) -> tuple[Array, int]:
    """Maps the leading axis; the bounds get the rank of `x`, so as to broadcast."""
    size = next(
        arg.shape[axis]
        for arg, axis in zip(args, axes, strict=True)
        if axis is not None
    )
    x, low, high = (
        jnp.broadcast_to(arg, (size, *arg.shape))
        if axis is None
        else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args, axes, strict=True)
    )
    low, high = (b.reshape(b.shape + (1,) * (x.ndim - b.ndim)) for b in (low, high))
    return _identity().bind(x, low, high), 0

"""Log-probabilities of actions of several parts, against sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.joint_actions import joint_log_prob


def test_adds_up_all_but_the_leading_axes(rng):
    parts = {"a": rng.normal(size=(4, 3)), "b": [rng.normal(size=(4, 3, 2, 5))]}
    parts = jax.tree.map(np.float32, parts)
    for batch_ndim, shape in ((0, ()), (1, (4,)), (2, (4, 3))):
        rest = [
            x.astype(np.float64).reshape(*shape, -1).sum(-1)
            for x in jax.tree.leaves(parts)
        ]
        result = joint_log_prob(parts, batch_ndim=batch_ndim)
        assert result.shape == shape
        np.testing.assert_allclose(result, sum(rest), rtol=1e-5)


def test_its_gradient_is_one_for_each_part():
    parts = jnp.zeros(2), jnp.zeros((2, 3))
    total = lambda parts: joint_log_prob(parts, batch_ndim=1).sum()
    for gradient in jax.jit(jax.grad(total))(parts):
        assert (gradient == 1).all()


def test_works_under_vmap_with_an_axis_less():
    parts = {"move": jnp.array([-1.0, -2.0]), "aim": jnp.full((2, 3), -0.5)}
    each = jax.vmap(lambda x: joint_log_prob(x, batch_ndim=0))(parts)
    assert each.tolist() == joint_log_prob(parts, batch_ndim=1).tolist() == [-2.5, -3.5]


def test_an_action_that_a_part_rules_out_is_impossible():
    parts = jnp.array([-jnp.inf, -1.0]), jnp.array([-1.0, -1.0])
    assert joint_log_prob(parts, batch_ndim=1).tolist() == [-jnp.inf, -2]


def test_rounds_half_precision_once_and_promotes_mixed_dtypes():
    small = jnp.bfloat16([256, 0.5, 0.5])
    result = joint_log_prob([small, jnp.bfloat16(-8)], batch_ndim=0)
    assert (result, result.dtype) == (249, jnp.bfloat16)
    mixed = joint_log_prob([small, jnp.float32(0.25)], batch_ndim=0)
    assert (mixed, mixed.dtype) == (257.25, jnp.float32)


@pytest.mark.parametrize(
    ("parts", "batch_ndim", "kind", "message"),
    [
        ({}, 0, ValueError, "log_probs has no array in it"),
        (jnp.zeros(2), 1.0, TypeError, "batch_ndim must be a Python int, got float"),
        (
            {"a": jnp.zeros(2), "b": jnp.zeros((3, 2))},
            1,
            ValueError,
            r"log_probs\['b'\] has shape \(3, 2\), expected 1 leading axes of \(2,\)",
        ),
        (
            jnp.zeros(2),
            2,
            ValueError,
            r"log_probs has shape \(2,\), expected 2 leading axes",
        ),
        (
            [jnp.zeros(2, int)],
            1,
            TypeError,
            r"log_probs\[0\] must be floating-point, got int",
        ),
    ],
)
def test_refuses_what_does_not_fit(parts, batch_ndim, kind, message):
    with pytest.raises(kind, match=f"joint_log_prob: {message}"):
        joint_log_prob(parts, batch_ndim=batch_ndim)

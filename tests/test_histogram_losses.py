"""Histograms of values, against the error function in double precision."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    hl_gauss_decode,
    hl_gauss_encode,
    hl_gauss_loss,
    transform_from_2hot_nonlinear,
    transform_to_2hot_nonlinear,
    two_hot_loss,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

INF, NAN = math.inf, math.nan
GRIDS = {
    "even": np.linspace(-10, 10, 9, dtype=np.float32),
    "uneven": np.float32([-3, -2.9, -1, 0, 0.01, 1, 7, 7.5, 20]),
    "far from zero": np.linspace(4096, 4097, 9, dtype=np.float32),
}
SIGMAS = [0.0, 1e-38, 1e-20, 1e-6, 0.1, 1.0, 30.0, 1e6, 1e30, INF]


def mass(low, high):
    """The standard Gaussian's, from the side where it is small."""
    if low > 0:
        return mass(-high, -low)
    return (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2


def histogram(x, edges, sigma):
    places = [(float(e) - float(x)) / float(sigma) for e in edges]
    masses = np.array([*map(mass, places[:-1], places[1:])])
    return masses / masses.sum()


@jax.jit
def encode(targets, edges, sigma):
    return hl_gauss_encode(targets, edges, sigma=sigma)


@jax.jit
def slopes(x, edges, sigma):
    """Derivatives of each probability, by each argument."""
    fn = lambda x, edges, sigma: hl_gauss_encode(x, edges, sigma=sigma)
    return jax.jacrev(fn, (0, 1, 2))(x, edges, sigma)


class TestEncode:
    @pytest.mark.parametrize("name", GRIDS)
    def test_agrees_with_the_definition_within_the_support_and_out_of_it(
        self, name, rng
    ):
        edges = GRIDS[name]
        size = edges[-1] - edges[0]
        sigma = np.float32(size * 10 ** rng.uniform(-3, 1, 200))
        targets = rng.uniform(edges[0], edges[-1], 200)
        targets[100:] += rng.choice([-1, 1], 100) * sigma[100:] * rng.uniform(0, 5, 100)
        targets = np.float32(targets)
        expected = [histogram(x, edges, s) for x, s in zip(targets, sigma, strict=True)]
        result = encode(targets, edges, sigma)
        np.testing.assert_allclose(result, expected, rtol=3e-4, atol=3e-7)

    def test_agrees_to_double_precision(self, rng):
        with jax.enable_x64(True):
            edges = GRIDS["uneven"].astype(float)
            sigma, targets = 10 ** rng.uniform(-2, 2, 100), rng.uniform(-20, 30, 100)
            near = np.maximum(edges[0] - targets, targets - edges[-1]) < 7 * sigma
            sigma, targets = sigma[near], targets[near]
            each = zip(targets, sigma, strict=True)
            expected = [histogram(x, edges, s) for x, s in each]
            result = np.asarray(encode(targets, edges, sigma))
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize("sigma", SIGMAS)
    @pytest.mark.parametrize("name", GRIDS)
    def test_sums_to_one_with_finite_gradients_whatever_the_numbers(self, name, sigma):
        edges = GRIDS[name]
        beyond = [edges[0] - 1, edges[-1] + 1, -3e38, 1e9, -INF, INF]
        targets = np.float32([*edges, *(edges[:-1] + edges[1:]) / 2, *beyond])
        sigmas = np.full(len(targets), sigma, np.float32)
        probs = np.asarray(encode(targets, edges, sigmas), float)
        assert (probs >= 0).all()
        np.testing.assert_allclose(probs.sum(axis=-1), 1, atol=4 * 2**-23)
        jacobians = jax.vmap(slopes, (0, None, 0))(targets, edges, sigmas)
        assert all(np.isfinite(x).all() for x in jacobians)

    def test_of_no_width_is_in_one_bin_or_half_in_each_of_two(self):
        edges = np.float32([0, 1, 2, 4])
        targets = np.float32([0.5, 3.9, 1, 0, 4, -1, 9])
        expected = [
            *([1, 0, 0], [0, 0, 1], [0.5, 0.5, 0], [1, 0, 0], [0, 0, 1]),
            *([1, 0, 0], [0, 0, 1]),
        ]
        assert encode(targets, edges, np.zeros(7, np.float32)).tolist() == expected

    def test_of_infinite_width_is_the_share_of_the_support(self):
        edges = np.float32([0, 1, 2, 4])
        probs = encode(np.float32([0.5]), edges, np.float32([INF]))
        np.testing.assert_allclose(probs[0], [0.25, 0.25, 0.5], rtol=1e-6)

    def test_keeps_its_digits_in_bins_much_narrower_than_sigma(self):
        """As it would not if erf were taken as it stands, off by 1e-4 here."""
        edges = np.linspace(-2, 2, 2049, dtype=np.float32)  # exact
        result = encode(np.float32([0.3]), edges, np.float32([1.7]))
        centres = (edges[1:] + edges[:-1]).astype(float) / 2
        density = np.exp(-(((centres - np.float32(0.3)) / np.float32(1.7)) ** 2) / 2)
        expected = density / density.sum()  # as straight as they are narrow
        np.testing.assert_allclose(result[0], expected, rtol=2e-6)

    @pytest.mark.parametrize("side", [-1, 1])
    def test_far_out_of_the_support_it_falls_exponentially(self, side):
        """Too far for the error function, whose values there are all the same."""
        edges, sigma, far = np.float32([0, 0.25, 1, 3]), np.float32(1e3), 1e6
        target = np.float32(far if side > 0 else 3 - far)
        edges = edges if side > 0 else 3 - edges[::-1]
        below = (3 - np.array([0, 0.25, 1, 3])) / 1e3 * ((far - 3) / 1e3)
        expected = np.diff(np.exp(-below)) / (1 - np.exp(-below[0]))
        result = encode(target[None], edges, sigma[None])[0]
        np.testing.assert_allclose(result[::side], expected, rtol=1e-5)

    def test_ends_in_the_outermost_bin(self):
        edges, targets = GRIDS["uneven"], np.float32([-1e9, 1e9, -INF, INF])
        first, last = np.eye(8)[[0, -1]]
        result = encode(targets, edges, np.ones(4, np.float32))
        np.testing.assert_array_equal(result, [first, last, first, last])

    def test_goes_on_smoothly_past_the_ends(self):
        edges = GRIDS["even"]
        steps = np.float32(edges[-1] + np.array([-0.01, 0, 0.01]))
        below, at, above = encode(steps, edges, np.full(3, 2, np.float32))
        np.testing.assert_allclose(above - at, at - below, atol=2e-5)
        assert (above - at)[-1] > 1e-4

    @pytest.mark.parametrize("x", [-3.0, 0.01, 0.5, 20.0, -4.0, 22.0])
    def test_has_the_derivative_of_a_truncated_gaussian(self, x):
        """At the ends and on an edge too: each edge's density, less the share."""
        with jax.enable_x64(True):
            edges, sigma = GRIDS["uneven"].astype(float), 1.5
            u = (edges - x) / sigma
            density = np.exp(-u * u / 2) / math.sqrt(2 * math.pi) / sigma
            masses = [*map(mass, u[:-1], u[1:])]
            rise, probs = -np.diff(density), np.array(masses) / sum(masses)
            by_target = (rise - probs * rise.sum()) / sum(masses)
            by_sigma = -np.diff(density * u)
            by_sigma = (by_sigma - probs * by_sigma.sum()) / sum(masses)
            result = [*map(np.asarray, slopes(x, edges, sigma))]
        np.testing.assert_allclose(result[0], by_target, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(result[2], by_sigma, rtol=1e-8, atol=1e-12)
        moved = result[1].sum(axis=1)  # all edges together, as the target the other way
        np.testing.assert_allclose(moved, -by_target, rtol=1e-8, atol=1e-12)

    def test_is_its_own_mirror_image(self):
        edges, targets = GRIDS["uneven"], np.float32([-5, -3, 0.3, 20, 21])
        sigma = np.full(5, 0.8, np.float32)
        mirrored = encode(-targets, -edges[::-1], sigma)
        result = encode(targets, edges, sigma)
        np.testing.assert_allclose(result, mirrored[:, ::-1], rtol=1e-5)

    def test_nan_stays_where_it_is(self):
        targets, sigma = np.float32([NAN, 1, 1]), np.float32([1, NAN, 1])
        result = np.isnan(encode(targets, GRIDS["even"], sigma))
        assert result.all(axis=-1).tolist() == [True, True, False]
        assert not result[2].any()

    def test_edges_out_of_order_make_no_bins(self):
        edges = np.float32([0, 2, 1])
        assert np.isnan(hl_gauss_encode(0.5, edges, sigma=1.0)).all()

    def test_one_edge_makes_no_bin(self):
        match = r"^hl_gauss_encode: edges must be at least 2, got 1\.$"
        with pytest.raises(ValueError, match=match):
            hl_gauss_encode(0.5, jnp.ones(1), sigma=1.0)

    def test_a_negative_sigma_is_refused(self):
        match = r"^hl_gauss_encode: sigma must be in \[0, inf\], got -1\.0\.$"
        with pytest.raises(ValueError, match=match):
            hl_gauss_encode(0.5, jnp.arange(3.0), sigma=-1.0)


class TestDecode:
    def test_is_the_mean_of_the_centres(self, rng):
        probs = rng.dirichlet(np.ones(8), size=(2, 3)).astype(np.float32)
        edges = GRIDS["uneven"].astype(float)
        centres = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        result = hl_gauss_decode(probs, GRIDS["uneven"])
        np.testing.assert_allclose(result, probs @ np.array(centres), rtol=1e-5)

    def test_undoes_encoding_within_the_support(self):
        """A spread over some bins averages out what centres round off."""
        edges = np.linspace(-10, 10, 81, dtype=np.float32)
        targets = np.linspace(-8, 8, 101, dtype=np.float32)
        probs = encode(targets, edges, np.full(101, 0.75 * 0.25, np.float32))
        np.testing.assert_allclose(hl_gauss_decode(probs, edges), targets, atol=1e-4)

    def test_balance_is_exactly_zero(self):
        probs = encode(np.zeros(1, np.float32), GRIDS["even"], np.float32([1.3]))
        assert hl_gauss_decode(probs, GRIDS["even"]).item() == 0

    def test_one_bin_is_its_centre(self):
        assert hl_gauss_decode(jnp.ones(1), jnp.array([1.0, 4.0])).item() == 2.5

    def test_one_edge_makes_no_bin(self):
        match = r"^hl_gauss_decode: edges must be at least 2, got 1\.$"
        with pytest.raises(ValueError, match=match):
            hl_gauss_decode(jnp.ones((2, 0)), jnp.ones(1))


def cross_entropy(probs, logits):
    logits = np.asarray(logits, float)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -(np.asarray(probs, float) * log_probs).sum(axis=-1)


def gaussian_loss(logits, targets, **options):
    return hl_gauss_loss(logits, targets, GRIDS["even"], sigma=1.9, **options)


def code_loss(logits, targets, **options):
    return two_hot_loss(logits, targets, GRIDS["even"][:-1], **options)


LOSSES = {
    gaussian_loss: lambda x: [histogram(x, GRIDS["even"], 1.9) for x in x],
    code_loss: lambda x: transform_to_2hot_nonlinear(x, GRIDS["even"][:-1]),
}


@pytest.mark.parametrize("loss", LOSSES)
class TestLosses:
    @pytest.fixture
    def sample(self, rng):
        logits = rng.normal(size=(4, 8)).astype(np.float32)
        return logits, rng.uniform(-12, 12, 4).astype(np.float32)

    def test_are_cross_entropies_reduced_as_asked(self, loss, sample):
        logits, targets = sample
        expected = cross_entropy(LOSSES[loss](targets), logits)
        options = dict.fromkeys(["none", "sum", "mean"])
        for reduction in options:
            options[reduction] = loss(logits, targets, reduction=reduction)
        np.testing.assert_allclose(options["none"], expected, rtol=1e-5)
        np.testing.assert_allclose(options["sum"], expected.sum(), rtol=1e-5)
        np.testing.assert_allclose(options["mean"], expected.mean(), rtol=1e-5)
        np.testing.assert_allclose(loss(*sample), expected.mean(), rtol=1e-5)

    def test_pull_the_prediction_to_the_code(self, loss, sample):
        logits, targets = sample
        result = jax.grad(lambda x: loss(x, targets, reduction="sum"))(logits)
        expected = jax.nn.softmax(logits) - np.float32(LOSSES[loss](targets))
        np.testing.assert_allclose(result, expected, atol=1e-6)

    def test_hold_the_target_constant_unless_told(self, loss, sample):
        logits, targets = sample
        targets = targets / 2
        grad = jax.grad(loss, argnums=1)
        assert not grad(logits, targets).any()
        assert grad(logits, targets, stop_target_gradients=False).all()

    def test_leave_out_what_is_masked(self, loss, sample):
        logits, targets = (x.copy() for x in sample)
        expected = loss(logits[:2], targets[:2])
        logits[2], targets[2:] = NAN, [NAN, INF]
        mask = np.array([True, True, False, False])
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(
            logits, targets, mask_t=mask, stop_target_gradients=False
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert all(np.isfinite(x).all() and not x[2:].any() for x in grads)
        assert loss(logits, targets, mask_t=np.zeros(4, bool)) == 0

    def test_an_impossible_bin_costs_nothing_where_there_is_no_mass(self, loss):
        logits = jnp.array([0.0, *[-INF] * 7])
        value, slope = jax.value_and_grad(loss)(logits, -1e6)
        assert value == 0
        assert np.isfinite(slope).all()

    def test_take_any_leading_axes(self, loss, rng):
        logits = rng.normal(size=(2, 3, 8)).astype(np.float32)
        targets = rng.normal(size=(2, 3)).astype(np.float32)
        assert loss(logits, targets, reduction="none").shape == (2, 3)


def test_what_two_hot_learns_decodes_to_the_mean_of_its_targets():
    """The minimum over logits of the loss is where softmax is the mean code."""
    bins, targets = jnp.array([-2.0, 0.0, 1.0, 5.0]), jnp.array([-1.0, 0.5, 4.0])
    mean_code = transform_to_2hot_nonlinear(targets, bins).mean(axis=0)
    logits = jnp.broadcast_to(jnp.log(mean_code), (3, 4))
    slope = jax.grad(lambda x: two_hot_loss(x, targets, bins))(logits).sum(axis=0)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    mean = transform_from_2hot_nonlinear(jax.nn.softmax(logits[0]), bins)
    np.testing.assert_allclose(mean, targets.mean(), rtol=1e-6)


def test_losses_without_bins_are_refused():
    match = r"^hl_gauss_loss: edges must be at least 2, got 1\.$"
    with pytest.raises(ValueError, match=match):
        hl_gauss_loss(jnp.ones((2, 0)), jnp.ones(2), jnp.ones(1), sigma=1.0)
    match = r"^two_hot_loss: bins must be at least 2, got 1\.$"
    with pytest.raises(ValueError, match=match):
        two_hot_loss(jnp.ones((2, 1)), jnp.ones(2), jnp.ones(1))

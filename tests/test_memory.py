"""Nearest neighbours, against sorting all distances in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims.memory import _bounds, _candidates, knn_query

K = 3


def query_by_hand(data, queries, number):
    """Indices and squared distances of the nearest, one query point at a time."""
    data, queries = np.asarray(data, np.float64), np.asarray(queries, np.float64)
    squares = np.stack([((data - q) ** 2).sum(axis=1) for q in queries])
    order = np.argsort(squares, axis=1, kind="stable")[:, :number]
    return order, np.take_along_axis(squares, order, axis=1)


def cloud(rng, size, dims=4, mean=0.0, std=1.0):
    return rng.normal(mean, std, size=(size, dims)).astype(np.float32)


def assert_nearest(result, data, queries, number=K, rtol=1e-5):
    indices, squares = query_by_hand(data, queries, number)
    np.testing.assert_array_equal(result.neighbor_indices, indices)
    np.testing.assert_array_equal(result.neighbors, np.asarray(data)[indices])
    np.testing.assert_allclose(-result.neighbor_neg_distances, squares, rtol=rtol)


class TestKnnQuery:
    @pytest.mark.parametrize("queries", [1, 6])
    @pytest.mark.parametrize("size", [K, 20, 21, 500])
    def test_finds_the_nearest_in_order(self, rng, size, queries):
        data, points = cloud(rng, size), cloud(rng, queries)
        assert_nearest(knn_query(data, points, K), data, points)

    @pytest.mark.parametrize("number", [1, 7, 40])
    def test_finds_as_many_as_asked(self, rng, number):
        data, points = cloud(rng, 40), cloud(rng, 5)
        assert_nearest(knn_query(data, points, number), data, points, number)

    def test_distances_are_exact_far_from_the_origin(self, rng):
        """Where those from a product of matrices have no digit left."""
        data, points = cloud(rng, 500, mean=1e4), cloud(rng, 6, mean=1e4)
        assert_nearest(knn_query(data, points, K), data, points)

    def test_an_outlier_does_no_harm(self, rng):
        data, points = cloud(rng, 500), cloud(rng, 6)
        data[7] = 1e9
        assert_nearest(knn_query(data, points, K), data, points)

    def test_finds_the_first_of_many_equals(self, rng):
        data, points = np.tile(cloud(rng, 5), (100, 1)), cloud(rng, 6)
        result = knn_query(data, points, K)
        assert_nearest(result, data, points)
        assert (result.neighbor_indices // 5).tolist() == [[0, 1, 2]] * 6

    def test_a_point_of_the_memory_is_its_own_neighbor(self, rng):
        data = cloud(rng, 500, dims=16)
        result = knn_query(data, data[40:50], K)
        assert result.neighbor_indices[:, 0].tolist() == list(range(40, 50))
        assert (result.neighbor_neg_distances[:, 0] == 0).all()

    def test_does_not_hold_all_differences_at_once(self):
        shapes = jnp.zeros((2000, 64)), jnp.zeros((100, 64))
        query = jax.jit(knn_query, static_argnums=2)
        memory = query.lower(*shapes, 5).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 100 * 2000 * 64

    @pytest.mark.parametrize("queries", [1, 6])
    @pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf, 1e30])
    def test_points_that_are_not_finite_are_the_farthest(self, rng, queries, spoilt):
        data, points = cloud(rng, 500), cloud(rng, queries)
        expected, _ = query_by_hand(data[200:], points, K)
        data[:200, 1] = spoilt
        result = knn_query(data, points, K)
        np.testing.assert_array_equal(result.neighbor_indices, expected + 200)
        assert np.isfinite(result.neighbor_neg_distances).all()

    def test_empty_slots_come_last(self, rng):
        data, points = cloud(rng, 500), cloud(rng, 6)
        data[2:] = np.inf
        result = knn_query(data, points, K)
        assert (np.sort(result.neighbor_indices[:, :2]) == [0, 1]).all()
        assert (result.neighbor_neg_distances[:, 2] == -np.inf).all()

    @pytest.mark.parametrize("queries", [1, 6])
    def test_a_query_point_that_is_not_a_number_is_near_nothing(self, rng, queries):
        data, points = cloud(rng, 500), cloud(rng, queries)
        points[0, 0] = np.nan
        result = knn_query(data, points, K)
        assert np.isnan(result.neighbor_neg_distances[0]).all()
        assert result.neighbor_indices[0].tolist() == [0, 1, 2]
        if queries > 1:
            indices, _ = query_by_hand(data, points[1:], K)
            np.testing.assert_array_equal(result.neighbor_indices[1:], indices)

    def test_huge_points_have_huge_neighbors(self, rng):
        data, points = 1e25 * cloud(rng, 500), np.zeros((6, 4), np.float32)
        points[:] = data[10:16]
        result = knn_query(data, points, 1)
        assert result.neighbor_indices[:, 0].tolist() == list(range(10, 16))

    def test_takes_a_metric_of_a_query_point_and_a_point(self, rng):
        data, points = cloud(rng, 30), cloud(rng, 6)
        result = knn_query(data, points, K, lambda q, x: jnp.abs(q - x).sum())
        sums = np.abs(points[:, None] - data[None]).sum(axis=-1)
        order = np.argsort(sums, axis=1)[:, :K]
        np.testing.assert_array_equal(result.neighbor_indices, order)
        nearest = np.take_along_axis(sums, order, axis=1)
        np.testing.assert_allclose(-result.neighbor_neg_distances, nearest, rtol=1e-5)
        one_sided = knn_query(
            jnp.array([[1.0], [5.0]]),
            jnp.array([[2.0]]),
            1,
            metric=lambda q, x: 10 * q[0] + x[0],
        )
        assert one_sided.neighbor_neg_distances.tolist() == [[-21]]

    @pytest.mark.parametrize("nan", [np.nan, -np.nan])
    def test_a_distance_that_is_no_number_is_the_farthest(self, nan):
        metric = lambda q, x: jnp.where(x[0] > 4, nan, jnp.abs(q[0] - x[0]))
        data, points = jnp.array([[0.0], [5.0], [1.0]]), jnp.zeros((1, 1))
        assert knn_query(data, points, 3, metric).neighbor_indices.tolist() == [
            [0, 2, 1]
        ]

    def test_gradients_skip_a_neighbor_at_infinity(self):
        def nearness(data, points):
            distances = knn_query(data, points, 2).neighbor_neg_distances
            return jnp.sum(jnp.where(jnp.isfinite(distances), distances, 0))

        data, points = jnp.array([[jnp.inf], [1.0]]), jnp.array([[0.0]])
        by_data, by_points = jax.grad(nearness, (0, 1))(data, points)
        assert (by_data.tolist(), by_points.tolist()) == ([[0], [-2]], [[2]])

    @pytest.mark.parametrize(
        ("metric", "message"),
        [
            ("l2", "be a function, got str"),
            (lambda q, x: q - x, r"return f\[\] for two points, got float32\[4\]"),
            (lambda q, x: jnp.sum(q != x), r"return f\[\] .*, got int32\[\]"),
            (lambda q, x: (q, x), r"return f\[\] for two points, got tuple"),
        ],
    )
    def test_refuses_what_is_no_metric(self, rng, metric, message):
        with (
            jax.enable_x64(False),
            pytest.raises(TypeError, match=rf"^knn_query: metric must .*{message}"),
        ):
            knn_query(cloud(rng, 6), cloud(rng, 2), 1, metric)

    @pytest.mark.parametrize("size", [10, 500])
    def test_gradients_are_those_of_the_distances(self, rng, size):
        data, points = cloud(rng, size), cloud(rng, 6)
        indices, _ = query_by_hand(data, points, K)
        total = lambda data, points: knn_query(data, points, K)[2].sum()
        by_data, by_points = jax.jit(jax.grad(total, (0, 1)))(data, points)
        differences = 2 * (points[:, None] - data[indices])
        np.testing.assert_allclose(by_points, -differences.sum(axis=1), rtol=1e-4)
        expected = np.zeros_like(data)
        np.add.at(expected, indices, differences)
        np.testing.assert_allclose(by_data, expected, rtol=1e-4, atol=1e-5)

    def test_gradients_skip_what_is_not_a_neighbor(self, rng):
        data, points = cloud(rng, 500), cloud(rng, 6)
        data[3:] = np.inf
        total = lambda data: knn_query(data, points, K)[2].sum()
        gradient = jax.grad(total)(data)
        assert np.isfinite(gradient).all()
        assert (gradient[3:] == 0).all()

    def test_vmap_is_a_loop_even_where_only_one_query_is_in_doubt(self, rng):
        data = np.stack([cloud(rng, 100), np.tile(cloud(rng, 4), (25, 1))])
        points = np.stack([cloud(rng, 6), cloud(rng, 6)])
        batched = jax.vmap(lambda x, q: knn_query(x, q, K))(data, points)
        for n in range(2):
            assert_nearest(
                jax.tree.map(lambda x, n=n: x[n], batched), data[n], points[n]
            )

    def test_half_precision_is_compared_in_single(self):
        data = jnp.array([[256.0], [258.0], [3.0]], jnp.bfloat16)
        result = knn_query(data, jnp.array([[257.5]], jnp.float32), 1)
        assert result.neighbor_indices.tolist() == [[1]]
        half = knn_query(data, data[1:2], 2)
        assert half.neighbors.dtype == half.neighbor_neg_distances.dtype == jnp.bfloat16
        assert half.neighbor_indices.tolist() == [[1, 0]]

    @pytest.mark.parametrize("number", [0, -1, 5])
    def test_refuses_more_neighbors_than_there_are(self, number):
        message = rf"num_neighbors must be in \[1, 4\].*, got {number}"
        with pytest.raises(ValueError, match=message):
            knn_query(jnp.zeros((4, 2)), jnp.zeros((1, 2)), number)

    @pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
    def test_refuses_integers_whose_differences_overflow(self, dtype):
        with pytest.raises(TypeError, match="data must be floating-point"):
            knn_query(jnp.zeros((4, 2), dtype), jnp.zeros((1, 2), dtype), 1)

    def test_refuses_points_in_another_number_of_dimensions(self):
        with pytest.raises(ValueError, match=r"query_points has shape \(3, 1\)"):
            knn_query(jnp.zeros((4, 2)), jnp.zeros((3, 1)), 1)


class TestBounds:
    @pytest.mark.parametrize("mean", [0.0, 10.0, 1e4])
    @pytest.mark.parametrize("dims", [1, 300])
    def test_the_distances_lie_between_them(self, rng, dims, mean):
        data, queries = cloud(rng, 200, dims, mean), cloud(rng, 20, dims, mean, 2.0)
        low, error = map(np.float64, jax.jit(_bounds)(data, queries))
        exact = np.float64(queries[:, None]) - np.float64(data[None])
        exact = (exact**2).sum(axis=-1)
        assert (low <= exact).all()
        assert (exact <= low + 2 * error).all()

    def test_decide_without_a_search_on_ordinary_data(self, rng):
        """Else the product of matrices would be no gain."""
        data, queries = cloud(rng, 3000, 64), cloud(rng, 8, 64)
        low, error = jax.jit(_bounds)(data, queries)
        count = 4 * K + 8
        order = np.argsort(low, axis=1)
        high = np.take_along_axis(low + 2 * error, order, axis=1)[:, :K].max(axis=1)
        assert (high < np.take_along_axis(low, order, axis=1)[:, count - 1]).all()
        expected, _ = query_by_hand(data, queries, K)
        found = _candidates(jnp.asarray(data), jnp.asarray(queries), K)
        assert found.shape == (8, count)
        assert all(np.isin(expected[n], found[n]).all() for n in range(8))

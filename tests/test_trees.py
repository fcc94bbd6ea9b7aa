"""Functions of trees, against the same thing done by hand to each array."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlprims import (
    transpose_first_axis_to_last,
    transpose_last_axis_to_first,
    tree_fn,
    tree_map_zipped,
    tree_replace_masked,
    tree_select,
    tree_split_key,
    tree_split_leaves,
)

F, T = False, True
TRANSPOSES = [transpose_first_axis_to_last, transpose_last_axis_to_first]


class Pair(typing.NamedTuple):
    """A container that must come out as it went in."""

    left: typing.Any
    right: typing.Any


def f(*values, dtype=jnp.float32):
    return jnp.array(values, dtype)


def nested(one, two, three):
    """A tree of three arrays, in four kinds of container and with nothing in one."""
    return {"a": one, "b": [Pair(two, None), (three,)]}


def assert_same(tree, expected):
    """Same structure, dtypes and values; NaN is itself."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(x, y)


class TestTransposes:
    def test_the_first_axis_goes_to_the_end(self, rng):
        x = rng.normal(size=(2, 3, 4)).astype(np.float32)
        moved = transpose_first_axis_to_last(nested(x, x[0], x[0, 0]))
        by_hand = np.array(
            [[[x[i, j, k] for i in range(2)] for k in range(4)] for j in range(3)]
        )
        assert_same(moved, nested(by_hand, np.moveaxis(x[0], 0, 1), x[0, 0]))

    def test_the_last_axis_goes_to_the_start(self, rng):
        x = rng.normal(size=(2, 3, 4)).astype(np.float32)
        moved = transpose_last_axis_to_first(nested(x, x[0], x[0, 0]))
        by_hand = np.array(
            [[[x[i, j, k] for j in range(3)] for i in range(2)] for k in range(4)]
        )
        assert_same(moved, nested(by_hand, np.moveaxis(x[0], 1, 0), x[0, 0]))

    def test_one_undoes_the_other(self, rng):
        tree = {"a": rng.normal(size=(2, 3, 4, 5)), "b": np.arange(3)}
        there = transpose_first_axis_to_last(tree)
        assert_same(transpose_last_axis_to_first(there), tree)

    @pytest.mark.parametrize("move", TRANSPOSES)
    def test_arrays_stay_with_numpy_or_jax(self, move):
        x = np.zeros((2, 3))
        moved = move({"numpy": x, "jax": jnp.asarray(x)})
        assert isinstance(moved["numpy"], np.ndarray)
        assert np.shares_memory(moved["numpy"], x)
        assert isinstance(moved["jax"], jax.Array)

    @pytest.mark.parametrize("move", TRANSPOSES)
    def test_keys_and_tracers_move_too(self, move):
        keys = jax.random.split(jax.random.key(0), (2, 3))
        assert move(keys).shape == (3, 2)
        assert jax.jit(move)({"a": jnp.zeros((2, 3))})["a"].shape == (3, 2)

    @pytest.mark.parametrize("move", TRANSPOSES)
    def test_an_empty_tree_stays_empty(self, move):
        assert (move({}), move(None), move([None])) == ({}, None, [None])

    @pytest.mark.parametrize("move", TRANSPOSES)
    def test_what_has_no_axis_is_named(self, move):
        for scalar in (1.0, jnp.float32(1)):
            with pytest.raises(
                ValueError, match=rf"^{move.__name__}: tree\['b'\]\[0\]"
            ):
                move({"a": jnp.ones(2), "b": [scalar]})


class TestTreeFn:
    def test_maps_over_trees_and_passes_the_rest_on(self):
        fn = tree_fn(lambda x, y, by, plus=0: (x + y) * by + plus, by=10, plus=1)
        assert fn(nested(1, 2, 3), nested(4, 5, 6)) == nested(51, 71, 91)

    def test_maps_over_one_tree(self):
        assert tree_fn(lambda x: (x, -x))({"a": 1}) == {"a": (1, -1)}

    def test_an_empty_tree_never_calls_the_function(self):
        assert tree_fn(lambda x: 1 / 0)({"a": None, "b": []}) == {"a": None, "b": []}

    def test_the_first_tree_decides_how_deep_to_go(self):
        fn = tree_fn(lambda x, y: x * y["c"])
        assert fn({"a": 2}, {"a": {"c": 3, "d": 4}}) == {"a": 6}

    def test_a_structure_that_does_not_fit_is_named(self):
        fn = tree_fn(lambda *xs: xs)
        for other in ({"b": 1}, {}, [1], 1, {"a": 1, "b": 1}):
            with pytest.raises(ValueError, match="tree_fn: tree 3 has structure"):
                fn({"a": 1}, {"a": 1}, other)
        with pytest.raises(ValueError, match="tree_fn: tree 2 has structure"):
            fn({"a": None}, {"a": 1})

    def test_errors_of_the_function_come_through(self):
        with pytest.raises(ZeroDivisionError):
            tree_fn(lambda x: 1 / x)({"a": 0})

    def test_works_under_jit_vmap_and_grad(self):
        fn = tree_fn(lambda x, y: x * y)
        x, y = {"a": f(1, 2)}, {"a": f(3, 4)}
        assert jax.jit(jax.vmap(fn))(x, y)["a"].tolist() == [3, 8]
        assert jax.grad(lambda x: fn(x, y)["a"].sum())(x)["a"].tolist() == [3, 4]


class TestTreeMapZipped:
    def test_takes_an_array_of_each_tree(self):
        nests = [nested(1, 2, 3), nested(10, 20, 30), nested(100, 200, 300)]
        zipped = tree_map_zipped(lambda *xs: list(xs), nests)
        assert zipped == nested([1, 10, 100], [2, 20, 200], [3, 30, 300])

    def test_stacks_trees(self):
        nests = [{"a": jnp.full(2, x)} for x in (1.0, 2.0, 3.0)]
        stacked = tree_map_zipped(lambda *xs: jnp.stack(xs), nests)
        assert stacked["a"].tolist() == [[1, 1], [2, 2], [3, 3]]

    @pytest.mark.parametrize("nests", [[], ()])
    def test_no_trees_are_given_back(self, nests):
        assert tree_map_zipped(max, nests) == nests

    def test_trees_with_nothing_in_them_stay_so(self):
        assert tree_map_zipped(max, [{"a": None}, {"a": None}]) == {"a": None}

    @pytest.mark.parametrize("other", [{"b": 1}, {"a": None}, {"a": {"c": 1}}, [1], 1])
    def test_a_structure_that_differs_is_named(self, other):
        message = (
            r"^tree_map_zipped: nests\[2\] has structure .*, that of nests\[0\]\.$"
        )
        with pytest.raises(ValueError, match=message):
            tree_map_zipped(lambda *xs: xs, [{"a": 1}, {"a": 1}, other])


class TestTreeReplaceMasked:
    mask = jnp.array([T, F])

    def test_covers_leading_axes_of_every_array(self, rng):
        images, counts = rng.normal(size=(2, 3, 4)).astype(np.float32), np.arange(5, 7)
        counts = counts.astype(np.int32)
        data = nested(images, counts, f(1, 2))
        replaced = tree_replace_masked(data, None, self.mask)
        zeroed = np.stack([np.zeros((3, 4), np.float32), images[1]])
        assert_same(replaced, nested(zeroed, np.array([0, 6], np.int32), f(0, 2)))

    def test_takes_a_tree_of_replacements(self):
        data = {"a": f(1, 2), "b": f(3, 4), "c": f(5, 6)}
        new = {"a": f(-1, -2), "b": 9.0, "c": None}
        replaced = tree_replace_masked(data, new, self.mask)
        assert_same(replaced, {"a": f(-1, 2), "b": f(9, 4), "c": f(0, 6)})

    def test_an_empty_tree_stays_empty(self):
        assert tree_replace_masked({}, None, self.mask) == {}
        assert tree_replace_masked([None], [None], self.mask) == [None]

    def test_what_is_replaced_does_not_leak(self):
        def total(data, new):
            tree = tree_replace_masked({"a": data}, {"a": new}, self.mask)
            return jnp.sum(tree["a"] ** 2)

        data, new = f(np.nan, 2), f(3, np.inf)
        value, slopes = jax.value_and_grad(total, (0, 1))(data, new)
        assert value == 13
        assert [slope.tolist() for slope in slopes] == [[0, 4], [6, 0]]

    @pytest.mark.parametrize(
        ("data", "new"),
        [
            ((2, 1), (2, 3)),  # data of length 1
            ((2, 3), (1, 2, 3)),  # a rank too many
            ((2, 3), (3,)),  # a rank too few
            ((2, 3), (1, 3)),  # length 1
            ((2, 3), (2, 1)),  # length 1 at the end
        ],
    )
    def test_a_replacement_never_broadcasts(self, data, new):
        message = (
            rf"^tree_replace_masked: replacement has shape \({new[0]}.*"
            r"This is so for tree_data\['a'\]\['data'\]\.$"
        )
        with pytest.raises(ValueError, match=message):
            tree_replace_masked(
                {"a": {"data": jnp.zeros(data)}},
                {"a": {"data": jnp.ones(new)}},
                self.mask,
            )

    @pytest.mark.parametrize("new", [{"b": f(1, 2)}, [f(1, 2)], 9.0, {}])
    def test_a_structure_that_differs_is_named(self, new):
        message = "^tree_replace_masked: tree_replacement has structure "
        with pytest.raises(ValueError, match=message):
            tree_replace_masked({"a": f(1, 2)}, new, self.mask)

    @pytest.mark.parametrize(
        ("data", "new", "mask", "message"),
        [
            ({"a": f(1, 2)}, None, f(1, 0), "mask must be boolean, got float32"),
            ({"a": f(1, 2)}, None, {"a": mask}, "mask must be an array, got dict"),
            ({"a": "x"}, None, mask, r"tree_data\['a'\] must be an array, got str"),
            (
                {"a": f(1, 2)},
                {"a": {"b": 1}},
                mask,
                r"tree_replacement\['a'\] must be an array, got dict",
            ),
        ],
    )
    def test_a_wrong_type_is_named(self, data, new, mask, message):
        with pytest.raises(TypeError, match=f"^tree_replace_masked: {message}"):
            tree_replace_masked(data, new, mask)

    def test_a_mask_that_does_not_fit_is_named(self):
        with pytest.raises(
            ValueError, match=r"^tree_replace_masked: mask .*\['b'\]\.$"
        ):
            tree_replace_masked({"a": f(1, 2), "b": f(1, 2, 3)}, None, self.mask)


class TestTreeSelect:
    def test_a_scalar_selects_a_whole_tree(self, rng):
        one, two = (
            nested(*(rng.normal(size=s).astype(np.float32) for s in [(), 2, (2, 3)]))
            for _ in range(2)
        )
        for pred in (True, np.True_, jnp.array(True)):
            assert_same(tree_select(pred, one, two), one)
            assert_same(tree_select(~np.bool_(pred), one, two), two)

    def test_a_mask_lines_up_from_the_left(self, rng):
        """Where shapes are square, NumPy would line it up from the right."""
        one, two = rng.normal(size=(2, 2, 2)).astype(np.float32)
        pred = np.array([T, F])
        selected = tree_select(pred, {"a": one, "b": one[0]}, {"a": two, "b": two[0]})
        by_hand = np.stack([one[0], two[1]])
        assert_same(selected, {"a": by_hand, "b": np.array([one[0, 0], two[0, 1]])})

    def test_a_mask_may_cover_every_axis(self):
        pred = jnp.array([[T, F], [F, T]])
        selected = tree_select(pred, jnp.ones((2, 2)), jnp.zeros((2, 2)))
        assert selected.tolist() == [[1, 0], [0, 1]]

    @pytest.mark.parametrize(
        "dtype", ["bfloat16", "float16", "float32", "int8", "uint32", "bool"]
    )
    def test_keeps_dtypes(self, dtype):
        one, two = jnp.ones(2, dtype), jnp.zeros(2, dtype)
        selected = tree_select(jnp.array([T, F]), one, two)
        assert (selected.dtype, selected.tolist()) == (dtype, [1, 0])

    def test_a_python_number_adapts(self):
        half = f(2, dtype=jnp.bfloat16)[0]
        for pred, value in ((True, 2), (False, 1)):
            selected = tree_select(pred, {"a": half}, {"a": 1.0})["a"]
            assert (selected.dtype, selected) == (jnp.bfloat16, value)
        assert tree_select(False, 1, half).dtype == jnp.bfloat16
        assert tree_select(True, 1, 2.5) == 1
        assert tree_select(True, 1, 2.5).dtype == jnp.result_type(float)

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            (f(1), f(1, dtype=jnp.bfloat16)),
            (f(1), f(1, dtype=jnp.int32)),
            (f(1, dtype=jnp.int32)[0], 1.5),
            (jax.random.key(0), 1.0),
            (f(1)[0], jax.random.key(0)),
            (jnp.array(True), 1),
        ],
    )
    def test_dtypes_that_differ_are_refused_and_not_promoted(self, one, two):
        message = (
            r"^tree_select: on_false\['a'\] has dtype .*, that of on_true\['a'\]; "
        )
        with pytest.raises(TypeError, match=message):
            tree_select(True, {"a": one}, {"a": two})

    def test_selects_random_keys_of_either_style(self):
        for make in (jax.random.key, jax.random.PRNGKey):
            one, two = make(1), make(2)
            keys = jnp.stack([one, two]), jnp.stack([two, one])
            selected = tree_select(jnp.array([T, F]), *keys)
            for key in selected:
                assert (jax.random.bits(key) == jax.random.bits(one)).all()

    @pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit])
    def test_what_is_not_selected_does_not_leak(self, transform):
        bad = f(np.nan, np.inf)

        def total(one, two, pred):
            return jnp.sum(tree_select(pred, {"a": one}, {"a": two})["a"] ** 2)

        slopes = transform(jax.value_and_grad(total, (0, 1)))
        value, (one, two) = slopes(bad, f(2, 3), jnp.array(False))
        assert (value, one.tolist(), two.tolist()) == (13, [0, 0], [4, 6])
        value, (one, two) = slopes(f(2, np.nan), f(np.inf, 3), jnp.array([T, F]))
        assert (value, one.tolist(), two.tolist()) == (13, [4, 0], [0, 6])

    def test_an_empty_tree_stays_empty(self):
        assert tree_select(True, {}, {}) == {}
        assert tree_select(jnp.array([T]), {"a": None}, {"a": None}) == {"a": None}

    @pytest.mark.parametrize("two", [{"b": 1.0}, {"a": None}, {"a": [1.0]}, 1.0, {}])
    def test_a_structure_that_differs_is_named(self, two):
        message = "^tree_select: on_false has structure .*, that of on_true.$"
        with pytest.raises(ValueError, match=message):
            tree_select(True, {"a": 1.0}, two)

    def test_shapes_never_broadcast(self):
        message = r"^tree_select: on_false\['a'\] has shape \(1, 3\), expected \(2, 3\)"
        with pytest.raises(ValueError, match=message):
            tree_select(True, {"a": jnp.ones((2, 3))}, {"a": jnp.ones((1, 3))})
        for shape in [(3,), (1,), (2, 1), (2, 3, 1), (0,)]:
            message = (
                "^tree_select: pred has shape .*leading axes of .*, the shape of on_t"
            )
            with pytest.raises(ValueError, match=message):
                tree_select(jnp.ones(shape, bool), jnp.ones((2, 3)), jnp.ones((2, 3)))
        trees = {"a": f(1, 2), "b": 1.0}
        with pytest.raises(ValueError, match=r"the shape of on_true\['b'\]\.$"):
            tree_select(jnp.array([T, F]), trees, trees)

    @pytest.mark.parametrize("pred", [1, 0.0, f(1, 0), np.int32(1)])
    def test_a_flag_that_is_not_boolean_is_refused(self, pred):
        with pytest.raises(TypeError, match="tree_select: pred must be boolean, got"):
            tree_select(pred, f(1, 2), f(3, 4))

    @pytest.mark.parametrize("leaf", ["x", object()])
    def test_what_is_no_array_is_named(self, leaf):
        with pytest.raises(
            TypeError, match=r"^tree_select: on_true\[0\] must be an arr"
        ):
            tree_select(True, [leaf], [1.0])

    def test_works_under_vmap(self):
        pred, one, two = jnp.array([T, F]), jnp.ones((2, 3)), jnp.zeros((2, 3))
        mapped = jax.vmap(tree_select)(pred, {"a": one}, {"a": two})
        assert mapped["a"].tolist() == [[1, 1, 1], [0, 0, 0]]


class TestTreeSplitKey:
    @pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
    def test_gives_a_key_to_go_on_with_and_one_for_each_array(self, make):
        following, keys = tree_split_key(make(3), nested(0.0, 0.0, jnp.ones(7)))
        expected = jax.random.split(make(3), 4)
        assert keys["b"][0].right is None
        for key, other in zip(
            [following, *jax.tree.leaves(keys)], expected, strict=True
        ):
            assert (key.shape, key.dtype) == (other.shape, other.dtype)
            assert jax.random.bits(key) == jax.random.bits(other)

    def test_the_draws_are_those_of_rlax(self):
        """As RLax 0.1.9 gives them."""
        key, keys = tree_split_key(jax.random.key(0), {"a": 1, "b": [2, 3]})
        data = [jax.random.key_data(x).tolist() for x in (key, keys["a"], *keys["b"])]
        assert data == [
            [1797259609, 2579123966],
            [928981903, 3453687069],
            [4146024105, 2718843009],
            [2467461003, 3840466878],
        ]

    def test_all_keys_differ(self):
        key = jax.random.key(0)
        following, keys = tree_split_key(key, dict.fromkeys("abcdef", 0))
        drawn = {jax.random.bits(k).item() for k in (key, following, *keys.values())}
        assert len(drawn) == 8

    @pytest.mark.parametrize("tree", [{}, None, [None]])
    def test_an_empty_tree_leaves_one_key_to_go_on_with(self, tree):
        following, keys = tree_split_key(jax.random.key(0), tree)
        assert keys == tree
        assert following == jax.random.split(jax.random.key(0), 1)[0]

    @pytest.mark.parametrize(
        "key",
        [
            0,
            "key",
            np.zeros(2, np.int32),
            np.zeros((), np.uint32),
            jax.random.split(jax.random.key(0), 2),
            jax.random.split(jax.random.PRNGKey(0), 2),
        ],
    )
    def test_what_is_not_one_key_is_refused(self, key):
        with pytest.raises(TypeError, match="tree_split_key: rng_key must be"):
            tree_split_key(key, {"a": 1})

    def test_works_under_vmap(self):
        keys = jax.random.split(jax.random.key(0), 3)
        _, mapped = jax.vmap(lambda key: tree_split_key(key, {"a": 0}))(keys)
        for key, split in zip(keys, mapped["a"], strict=True):
            assert split == tree_split_key(key, {"a": 0})[1]["a"]


STEPS = {"a": np.arange(24).reshape(2, 3, 4), "b": np.arange(6.0).reshape(2, 3)}


class TestTreeSplitLeaves:
    @pytest.mark.parametrize("where", [np, jnp])
    @pytest.mark.parametrize(("axis", "number"), [(0, 2), (1, 3), (-2, None)])
    def test_each_part_is_an_index_of_the_axis(self, where, axis, number):
        tree = {key: where.asarray(x) for key, x in STEPS.items()}
        if number is None:  # from the end, the axis is another for each array
            tree, number = {"a": tree["a"]}, 3
        parts = tree_split_leaves(tree, axis)
        assert isinstance(parts, tuple)
        assert len(parts) == number
        for index, part in enumerate(parts):
            assert_same(part, {k: x.take(index, axis) for k, x in tree.items()})

    def test_may_keep_the_axis(self):
        for axis in (0, 1):
            parts = tree_split_leaves(STEPS, axis, True)
            join = tree_fn(lambda *xs, axis: np.concatenate(xs, axis), axis=axis)
            assert_same(join(*parts), STEPS)

    def test_arrays_stay_with_numpy_or_jax(self):
        tree = {"numpy": np.arange(2.0), "jax": jnp.arange(2.0), "none": None}
        first, _ = tree_split_leaves(tree)
        assert isinstance(first["numpy"], np.ndarray)
        assert np.shares_memory(first["numpy"], tree["numpy"])
        assert isinstance(first["jax"], jax.Array)
        assert first["none"] is None

    def test_splits_keys(self):
        keys = jax.random.split(jax.random.key(0), 3)
        assert list(tree_split_leaves(keys)) == list(keys)

    @pytest.mark.parametrize(
        "tree", [{}, None, [None], np.zeros((0, 3)), jnp.ones((0,))]
    )
    def test_nothing_to_split_gives_no_parts(self, tree):
        assert tree_split_leaves(tree) == ()

    def test_lengths_that_differ_are_named(self):
        message = (
            r"^tree_split_leaves: tree_like\['b'\] has length 3 along axis 0, expected "
            r"2, that of tree_like\['a'\]\.$"
        )
        with pytest.raises(ValueError, match=message):
            tree_split_leaves({"a": np.ones(2), "b": np.ones(3)})

    @pytest.mark.parametrize(("leaf", "axis"), [(1.0, 0), (np.ones(2), 1), (f(1), -2)])
    def test_an_axis_that_is_not_there_is_named(self, leaf, axis):
        message = rf"^tree_split_leaves: tree_like\['a'\] has .* no axis {axis}\.$"
        with pytest.raises(ValueError, match=message):
            tree_split_leaves({"a": leaf}, axis)

    def test_works_under_jit_and_grad(self):
        late = lambda tree: tree_split_leaves(tree)[1]["a"].sum()
        assert jax.jit(jax.grad(late))({"a": jnp.ones((2, 2))})["a"].tolist() == [
            [0, 0],
            [1, 1],
        ]

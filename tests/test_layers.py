"""How the package hangs together: layers, dependencies, and the size of things."""

import ast
import importlib
import inspect
import itertools
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rlprims

LAYERS = [
    layer.split()
    for layer in (
        "_contracts _strata",
        "_hints",
        "_checks",
        "_constraints arrays collectives gaussians gradients joint_actions "
        "kl_coefficients memory risk_distortions sequences sum_trees transforms",
        "_segments categorical counts embeddings importance_weights losses "
        "moving_averages recurrences sampling squashing standardization trees two_hot",
        "action_values actor_critic advantages bandits best_of_k conservative "
        "curiosity distributions ensembles exploration group_advantages "
        "histogram_losses kl_estimators lagrange model_targets normalization "
        "off_policy planning policy_targets preference regret_policy_gradients replay "
        "returns running_statistics soft_action_values surrogates tokens "
        "transform_pairs updates v_trace world_models",
        "action_value_traces advantage_weights beta_policies diagnostics "
        "distributional gumbel_planning intrinsic_rewards mpo nonlinear_bellman "
        "offline policy_gradients quantile reference_preference return_normalization "
        "soft_actor_critic state_values temporally_extended token_losses transitions",
        "auxiliary control discrete_soft_actor_critic implicit_quantiles muesli "
        "off_policy_action_values selective_returns sequence_losses "
        "transformed_action_values truncated_normals vmpo",
        "__init__",
    )
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
DEPENDENCIES = {"jax", "jaxlib", "chex", "numpy", "dm-env"}
HEAVY = {"tensorflow", "optax", "flax", "distrax", "haiku", "tensorflow_probability"}
HEAVY |= {"scipy", "torch"}  # JAX imports some of SciPy: that much is free

PACKAGE = Path(inspect.getfile(rlprims)).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in SOURCES}
TOPICS = [name for name in TREES if not name.startswith("_")]


def imports(name):
    """Yields what a module imports, wherever in it: `rlprims.arrays`, `jax.numpy`."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            whole = node.module == "rlprims"
            names = [f"rlprims.{alias.name}" for alias in node.names]
            yield from names if whole else [str(node.module)]


@pytest.mark.parametrize("name", TREES)
def test_imports_point_downwards(name):
    for imported in imports(name):
        package, *topic = imported.split(".")
        if package == "rlprims":
            assert topic, f"{name} imports the whole package"
            assert all(LEVEL[t] < LEVEL[name] for t in topic), f"{name} -> {imported}"


def test_every_module_has_a_layer():
    assert TREES.keys() <= LEVEL.keys()


@pytest.mark.parametrize("name", TREES)
def test_imports_only_the_standard_library_and_the_dependencies(name):
    packages = {imported.split(".")[0] for imported in imports(name)}
    allowed = {dependency.replace("-", "_") for dependency in DEPENDENCIES}
    assert packages - sys.stdlib_module_names <= allowed | {"rlprims"}


def modules_after(statement):
    """The modules that a fresh interpreter holds after running `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_importing_the_package_stays_light():
    added = modules_after("import rlprims") - modules_after("import jax")
    assert "rlprims" in added
    assert not {module.split(".")[0] for module in added} & HEAVY


def test_dependencies_are_the_five():
    path = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"]
    names = [re.split(r"[^\w-]", entry)[0] for entry in project["dependencies"]]
    assert sorted(names) == sorted(DEPENDENCIES)


@pytest.mark.parametrize("name", TREES)
def test_has_a_docstring(name):
    assert ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", TOPICS)
def test_exports_are_listed_in_order(name):
    exports = importlib.import_module(f"rlprims.{name}").__all__
    assert exports == sorted(set(exports))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_fits_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("name", sorted(TREES.keys() - {"__init__"}))
def test_only_the_package_itself_star_imports(name):
    froms = [x for x in ast.walk(TREES[name]) if isinstance(x, ast.ImportFrom)]
    assert "*" not in {alias.name for node in froms for alias in node.names}


def body_lines(function):
    """Counts the lines of a function's statements, without the docstring."""
    body = function.body[ast.get_docstring(function) is not None :]
    return sum(node.end_lineno - node.lineno + 1 for node in body)


def test_the_median_body_is_a_few_lines():
    nodes = itertools.chain(*(TREES[name].body for name in TOPICS))
    functions = [x for x in nodes if isinstance(x, ast.FunctionDef)]
    public = [x for x in functions if not x.name.startswith("_")]
    assert statistics.median(map(body_lines, public)) <= 6

"""Settings for every test, and for the examples in docstrings."""

import gc
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# No silent promotion, and more than one device, so that sharded calls are sharded.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)
# Many compiled programs stay alive, which it takes long to look through.
gc.set_threshold(100_000, 50, 100)


ROOT = Path(__file__).parent
EXAMPLES = "|".join(path.stem for path in (ROOT / "examples").glob("*.py"))
IMPORTS_EXAMPLES = re.compile(rf"^(import|from) ({EXAMPLES})\b", re.MULTILINE)


def pytest_ignore_collect(collection_path):
    """Examples are programs for 32 bits: their tests are left out with 64."""
    if not (jax.config.jax_enable_x64 and collection_path.suffix == ".py"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    return True if IMPORTS_EXAMPLES.search(text) else None


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    """Each takes memory maps, of which a process may only have so many."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def ordinary_promotion():
    """For peers: dtypes and ranks are promoted as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def promotion_for_optax():
    """Adam raises floats to the power of counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def rlax(ordinary_promotion):
    """The peer, an extra."""
    return pytest.importorskip("rlax")


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace):
    doctest_namespace |= {"jax": jax, "jnp": jnp}


def is_fast(config):
    """Whether this is the fast suite, which compiles without optimisation."""
    return config.option.markexpr == "not slow"


def pytest_configure(config):
    jax.config.update("jax_disable_most_optimizations", is_fast(config))


@pytest.fixture(scope="module")
def quick_to_compile(pytestconfig):
    """For tests of many programs, of which it does not matter how fast they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", is_fast(pytestconfig))

"""Settings for every test: no silent promotion, and one seeded source of numbers."""

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)  # so that sharded calls are sharded


@pytest.fixture
def rng():
    return np.random.default_rng(0)

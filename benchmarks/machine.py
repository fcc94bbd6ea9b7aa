"""Names the machine and the versions that a figure was measured with."""

import platform
from importlib.metadata import version

import jax


def machine() -> dict[str, str]:
    """Returns what to print beside every figure."""
    return {
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
    }

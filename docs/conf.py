"""Settings of the documentation: `sphinx-build -n -T -W docs docs/_build/html`."""

from sphinx.application import Sphinx

import rlprims

project = "rlprims"
author = "The rlprims authors"
version = release = rlprims.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # so that `f[T]` in a docstring is set as code
add_module_names = False
autodoc_typehints = "none"  # the docstrings state each contract
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
exclude_patterns = ["_build"]
nitpick_ignore_regex = [(r"py:exc", r"\w+Error")]  # Python's own
html_theme = "furo"


def setup(app: Sphinx) -> None:
    """Leaves the fields of named tuples to the docstring of the class."""
    app.connect(
        "autodoc-skip-member",
        lambda app, what, name, obj, skip, options: (
            skip or str(obj.__doc__).startswith("Alias for field number")
        ),
    )

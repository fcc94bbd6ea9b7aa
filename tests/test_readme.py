"""What the README and the documentation say is run, and compared with what they show.

A `python` block is executed, each line of it that prints followed by the output as a
comment. A `pycon` block is a doctest. The blocks of one page share their names, as if
one program. The tables of `docs/migrating.md` are checked row by row.
"""

import contextlib
import doctest
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlprims

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MODULES = sorted(
    path.stem
    for path in (ROOT / "rlprims").glob("*.py")
    if not path.stem.startswith("_")
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)")
ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| `([^`]+)`", re.MULTILINE)


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, *languages):
    """The contents of the fenced blocks of a page in one of the languages."""
    found = FENCE.findall(path.read_text(encoding="utf-8"))
    return [(language, code) for language, code in found if language in languages]


def shell_lines():
    code = "".join(code for _, code in blocks(ROOT / "README.md", "sh"))
    return code.splitlines()


@pytest.fixture
def bare_errors():
    """Errors without the remark on tracebacks that JAX adds to them."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def run_python(code, page, namespace):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"<{page}>", "exec"), namespace)
    shown = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert printed.getvalue().splitlines() == shown


def run_doctest(code, page, namespace):
    test = doctest.DocTestParser().get_doctest(code, {}, page, page, 0)
    test.globs = namespace
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    results = runner.run(test, out=report.write, clear_globs=False)
    assert results.attempted > 0
    assert results.failed == 0, report.getvalue()


@pytest.mark.usefixtures("bare_errors")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_does_what_the_page_shows(page):
    namespace = {}
    for language, code in blocks(page, "python", "pycon"):
        run = run_python if language == "python" else run_doctest
        run(code, name(page), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    for link in links:
        if not re.match(r"[a-z]+:", link):
            assert (page.parent / link).exists(), link


def test_the_readme_runs_an_example_and_the_tests_in_one_line_each():
    commands = shell_lines()
    assert len(commands) == 2
    example, tests = (re.split(" && ", command) for command in commands)
    assert example == ['pip install -e ".[examples]"', "python examples/dqn.py"]
    assert tests[0] == 'pip install -e ".[test]"'
    assert tests[1].startswith("pytest")


def test_the_readme_shows_an_example():
    assert blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_page(module):
    page = (ROOT / "docs" / "api" / f"{module}.md").read_text(encoding="utf-8")
    assert f".. automodule:: rlprims.{module}\n   :members:" in page
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert f"\napi/{module}\n" in index


def test_every_page_has_a_module():
    pages = sorted(path.stem for path in (ROOT / "docs" / "api").glob("*.md"))
    assert pages == MODULES


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {rlprims.__version__}\n" in citation


def shown(call, library):
    """What a call gives, as the tables of differences write it."""

    def f(*values):
        return jnp.array(values, jnp.float32)

    names = {"f": f, "jax": jax, "jnp": jnp, "nan": np.nan, "inf": np.inf}
    names |= {"grad": jax.grad, "jit": jax.jit, "vmap": jax.vmap}
    try:
        result = eval(call, vars(library) | names)
    except Exception as error:
        message = " ".join(str(error).split())
        if library is rlprims:
            function, _, message = message.partition(": ")
            assert function in call
        return f"{type(error).__name__}: {message}"
    if not isinstance(result, jax.Array):
        return str(result)
    return " ".join(np.array2string(np.asarray(result), precision=4).split())


MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
DIFFERENCES = ROW.findall(MIGRATING)


def test_no_row_of_the_differences_from_rlax_is_overlooked():
    assert len(DIFFERENCES) == MIGRATING.count("\n| `") > 50


def is_shown_as(result, cell):
    cell = cell.replace("\\|", "|")
    if "Error: " in cell:  # the table may cut a message short
        return result.startswith(cell.removesuffix("…"))
    return result == cell


of_each_row = pytest.mark.parametrize(
    ("call", "theirs", "ours"), DIFFERENCES, ids=[call for call, _, _ in DIFFERENCES]
)


@pytest.mark.usefixtures("bare_errors")
@of_each_row
def test_differences_from_rlax_are_as_the_table_says(call, theirs, ours):
    assert is_shown_as(shown(call, rlprims), ours)
    assert theirs != ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("bare_errors")
@of_each_row
def test_rlax_is_as_the_table_says(call, theirs, ours, rlax):
    assert is_shown_as(shown(call, rlax), theirs)

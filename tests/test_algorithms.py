"""The index of algorithms is held against the package, so that neither can drift.

The tables of `docs/algorithms.md` are read row by row. Where they say what the package
says too, such as the module of a function or the year of a paper, the package decides.
"""

import collections
import importlib
import inspect
import itertools
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import rlprims

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "algorithms.md").read_text(encoding="utf-8")
RECIPES = (DOCS / "recipes.md").read_text(encoding="utf-8")
MODULES = {
    module.name: importlib.import_module(f"rlprims.{module.name}")
    for module in pkgutil.iter_modules(rlprims.__path__)
    if not module.name.startswith("_")
}
# The public functions, by module: what is exported, less types and constants.
FUNCTIONS = {
    name: [fn for fn in module.__all__ if inspect.isfunction(getattr(module, fn))]
    for name, module in MODULES.items()
}
ALGORITHMS, BLOCKS = PAGE.split("\n## Building blocks\n")
CODE = re.compile(r"`(\w+)`")
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"([^`.]*(?:et al\.)?[^`.]*?), `[^`<]+<(\S+)>`_,.*?(\d{4})")


class Row(NamedTuple):
    algorithm: str
    functions: str
    module: str
    equation: str
    paper: str


def cells(table):
    """The rows of the tables of a text, without those that head them."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    split = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    heads = {i + k for i, line in enumerate(lines) for k in (-1, 0) if "|--" in line}
    return [row for i, row in enumerate(split) if i not in heads]


ROWS = [Row(*row) for row in cells(ALGORITHMS)]
of_each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.algorithm)


def modules_of(cell):
    """The modules that a cell names, each with a link to its page."""
    links = LINK.findall(cell)
    assert all(page == f"api/{name.strip('`')}.md" for name, page in links)
    return [name.strip("`") for name, _ in links]


def papers_of(name):
    """The papers that a function cites: the link, and the authors and year."""
    references = inspect.getdoc(getattr(rlprims, name)).partition("References:")[2]
    found = REFERENCE.findall(" ".join(references.split()))
    return {link: f"{short(authors.strip())} {year}" for authors, link, year in found}


def short(authors):
    """The first of more than two authors, `et al.`"""
    first, *others = re.split(", | and ", authors)
    return f"{first} et al." if len(others) > 1 else authors


def blocks():
    """The functions that the building blocks name, once for each time."""
    for functions, module, reason in cells(BLOCKS):
        (name,) = modules_of(module)
        assert reason
        yield from FUNCTIONS[name] if functions == "all" else CODE.findall(functions)


def test_the_tables_are_read_whole():
    heads = PAGE.count("\n|--")
    assert len(ROWS) + len(cells(BLOCKS)) == PAGE.count("\n| ") - heads
    assert len(ROWS) > 90


@of_each_row
def test_functions_are_in_the_modules_that_their_row_names(row):
    functions, modules = CODE.findall(row.functions), modules_of(row.module)
    assert row.functions == ", ".join(f"`{name}`" for name in functions)
    homes = [name for name in MODULES if set(functions) & set(FUNCTIONS[name])]
    assert sorted(modules) == homes
    assert set(functions) <= set(
        itertools.chain.from_iterable(FUNCTIONS[name] for name in modules)
    )


@of_each_row
def test_papers_are_those_that_the_functions_cite(row):
    cited = [papers_of(name) for name in CODE.findall(row.functions)]
    links = LINK.findall(row.paper)
    assert row.paper == ", ".join(f"[{label}]({link})" for label, link in links) != ""
    for label, link in links:
        assert label in [papers.get(link) for papers in cited]


@of_each_row
def test_equations_are_one_formula_each(row):
    equation = row.equation.removeprefix("$").removesuffix("$")
    assert row.equation == f"${equation}$"
    assert "$" not in equation
    assert equation.count("{") == equation.count("}")
    assert equation.count("(") == equation.count(")")


def test_no_row_is_there_twice():
    for column in ("algorithm", "functions"):
        counts = collections.Counter(getattr(row, column) for row in ROWS)
        assert [name for name, count in counts.items() if count > 1] == []


def test_building_blocks_are_functions_of_their_modules():
    for functions, module, _ in cells(BLOCKS):
        (name,) = modules_of(module)
        assert functions == "all" or set(CODE.findall(functions)) <= set(
            FUNCTIONS[name]
        )


def test_every_public_function_is_an_algorithm_or_a_building_block():
    algorithms = {name for row in ROWS for name in CODE.findall(row.functions)}
    counts = collections.Counter(blocks()) + collections.Counter(algorithms)
    assert counts == collections.Counter(itertools.chain(*FUNCTIONS.values()))


def test_names_that_people_search_for_are_there():
    names = "DQN PPO SAC TD3 C51 IQN MPO V-MPO R2D2 GAE Retrace IMPALA GRPO DPO"
    plain = [LINK.sub(r"\1", row.algorithm) for row in ROWS]
    assert set(names.split()) <= {
        n for name in plain for n in re.split(r", | \(", name)
    }


def test_each_recipe_has_a_link():
    linked = re.findall(r"\| \[([\w-]+)\]\(recipes\.md#([\w-]+)\)", ALGORITHMS)
    assert all(slug == name.lower() for name, slug in linked)
    recipes = re.findall(r"^## (.+)$", RECIPES, re.MULTILINE)
    assert sorted(recipes) == sorted(name for name, _ in linked)

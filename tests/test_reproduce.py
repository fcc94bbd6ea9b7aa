import pytest
import reproduce
from reproduce import EXAMPLES, Promise, Result

SCRIPTS = [
    "anakin",
    "dnc_copy",
    "dqn",
    "impala",
    "ppo",
    "pqn",
    "q_lambda",
    "r2d2",
    "rainbow",
    "sac",
    "td3",
    "vmpo",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_agent_promises_what_a_command_reaches(script):
    promises = list(reproduce.promises(EXAMPLES / f"{script}.py"))
    assert promises
    for promise in promises:
        assert promise.script == script
        assert promise.command.startswith(f"python examples/{script}.py")
        assert "\\" not in promise.command
        assert bool(promise.paper) == (script != "anakin")  # whose agents name theirs


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(
    "promise",
    [p for script in SCRIPTS for p in reproduce.promises(EXAMPLES / f"{script}.py")],
    ids=lambda promise: promise.name,
)
def test_every_promise_is_kept(promise, tmp_path):
    assert promise.is_kept_by(reproduce.run(promise, 0, tmp_path).value)


def test_no_two_curves_have_the_same_name():
    found = [p.name for s in EXAMPLES.glob("*.py") for p in reproduce.promises(s)]
    assert len(set(found)) == len(found) >= len(SCRIPTS)


TEXT = '''"""Something.

    python examples/thing.py --env Here-v1 \\\\
        --core gru
        reaches a return of at least -2.5 in Here-v1, within 1 minute
    python examples/thing.py
        reaches bits of at most 0.1 in there, within 2 minutes

Paper: Some and Body, "A Title over
Lines", 2001, https://example.org/1. More.
"""
'''


@pytest.fixture
def promises(tmp_path):
    script = tmp_path / "thing.py"
    script.write_text(TEXT, "utf-8")
    return list(reproduce.promises(script))


def test_promises_are_read_from_the_top_of_a_file(promises):
    paper = "Some and Body, [A Title over Lines](https://example.org/1), 2001"
    assert promises == [
        Promise(
            "python examples/thing.py --env Here-v1 --core gru",
            "thing",
            "evaluation_return",
            "at least",
            -2.5,
            "Here-v1",
            1.0,
            paper,
        ),
        Promise(
            "python examples/thing.py",
            "thing",
            "evaluation_bits",
            "at most",
            0.1,
            "there",
            2.0,
            paper,
        ),
    ]
    assert [promise.name for promise in promises] == [
        "thing-here-v1-gru",
        "thing-there",
    ]


def test_a_promise_is_kept_on_its_side_of_the_bound(promises):
    at_least, at_most = promises
    assert [at_least.is_kept_by(x) for x in (-2.6, -2.5, -2.4)] == [False, True, True]
    assert [at_most.is_kept_by(x) for x in (0.0, 0.1, 0.2)] == [True, True, False]
    assert not any(p.is_kept_by(float("nan")) for p in promises)


def test_a_row_has_every_seed_and_the_slowest_time(promises):
    row = reproduce.row(promises[0], [Result(-1, 0.5, 900.0), Result(-2, 0.75, 1100.0)])
    assert "| return at least -2.5 | -1.00, -2.00 | 1,000 | 0.8 of 1 |" in row
    assert "curves/thing-here-v1-gru.png" in row


def test_the_table_replaces_what_is_between_the_marks():
    page = (EXAMPLES / "README.md").read_text("utf-8")
    written = reproduce.between_marks(page, "| a table |")
    before, _, after = page.partition("<!-- reproduce.py writes from here -->")
    assert written.startswith(before)
    assert written.endswith(after.partition("<!-- to here -->")[2])
    assert written.count("| a table |") == 1
    assert reproduce.between_marks(written, "| a table |") == written
    with pytest.raises(ValueError, match="the page has no"):
        reproduce.between_marks("nothing", "| a table |")

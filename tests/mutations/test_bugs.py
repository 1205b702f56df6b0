"""The list of bugs fits the code as it is; ``make mutations`` puts them in."""

import re
from pathlib import Path

import pytest

from tests.mutations import run
from tests.mutations.bugs import BUGS as MODEL_BUGS
from tests.mutations.bugs import Bug
from tests.mutations.every import EVERY_BUG
from tests.mutations.run import any_of, shard

ROOT = Path(__file__).parents[2]
NOT_RUN = re.compile(r"^pytestmark = pytest\.mark\.(vllm|verifiers|cluster|compiled)", re.MULTILINE)
"""A whole file's mark."""


@pytest.mark.parametrize("bug", EVERY_BUG, ids=lambda bug: bug.name)
def test_the_bug_can_be_put_in(bug: Bug) -> None:
    text = bug.put_into((ROOT / bug.file).read_text())
    compile(text, bug.file, "exec")
    file, _, expression = bug.tests.partition(" ")
    assert f"def {expression}" in (source := (ROOT / file).read_text()) or expression in source
    # Tests that need what make mutations does not start would end it: none would be selected.
    assert not NOT_RUN.search(source), f"{file} is not run with a bug"


def test_every_pitfall_has_bugs_and_tests() -> None:
    assert {bug.pitfall for bug in MODEL_BUGS} == set(range(1, 11))
    assert len({bug.name for bug in EVERY_BUG}) == len(EVERY_BUG) >= 25
    sources = "".join(path.read_text() for path in (ROOT / "tests/pitfalls").glob("test_*.py"))
    for number in range(1, 11):
        assert f"def test_{number:02d}_" in sources


def test_every_bug_is_in_one_shard() -> None:
    parts = [shard(EVERY_BUG, number, 4) for number in range(1, 5)]
    names = [bug.name for part in parts for bug in part]
    assert sorted(names) == sorted(bug.name for bug in EVERY_BUG)
    assert min(map(len, parts)) > len(EVERY_BUG) / 5


def test_tests_without_a_bug_are_those_of_all_its_bugs() -> None:
    assert any_of(["b and c", "a", "a"]) == "(a) or (b and c)"
    # pytest takes no empty brackets: a bug that any test of the file may catch selects all of them
    assert any_of(["a", "", "b"]) == ""


def test_a_bug_counts_only_where_its_tests_pass_without_it(monkeypatch, capsys) -> None:
    """With made-up outcomes: the bug's own tests fail with and without it, or pass without it."""
    one = EVERY_BUG[0]
    other = next(bug for bug in EVERY_BUG if bug.tests.split()[0] != one.tests.split()[0])
    broken = one.tests.split()[0]

    def forked(jobs, at_once):
        for (bug, file, folder), _, _ in jobs:
            folder.mkdir()
            (folder / "output.txt").write_text("what pytest said")
            tried.append((bug, file))
            yield (bug, file, folder), 1.0, None

    def outcome(folder):
        bug, file = tried[-1]
        return (bug is None and file != broken), "a_test"

    tried: list = []
    monkeypatch.setattr(run, "copy_of_the_code", lambda folder: folder)
    monkeypatch.setattr(run, "with_bug", lambda *given: None)
    monkeypatch.setattr(run, "forked", forked)
    monkeypatch.setattr(run, "outcome", outcome)
    assert run.try_bugs([one, other], at_once=1) == [one.name]
    assert f"without a bug: a_test failed in {broken}" in capsys.readouterr().out

"""The list of bugs fits the code as it is; ``make mutations`` puts them in."""

from pathlib import Path

import pytest

from tests.mutations.bugs import BUGS as MODEL_BUGS
from tests.mutations.bugs import Bug
from tests.mutations.every import EVERY_BUG
from tests.mutations.run import shard

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bug", EVERY_BUG, ids=lambda bug: bug.name)
def test_the_bug_can_be_put_in(bug: Bug) -> None:
    text = bug.put_into((ROOT / bug.file).read_text())
    compile(text, bug.file, "exec")
    file, _, expression = bug.tests.partition(" ")
    assert f"def {expression}" in (source := (ROOT / file).read_text()) or expression in source


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

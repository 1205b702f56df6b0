"""Density of the code: constructs are counted right, and every part stays in the field's range."""

import ast
import itertools
from pathlib import Path

import pytest

from benchmarks import code_density

ROOT = Path(__file__).parents[1]
# Constructs that text search would count wrongly: in strings and docstrings, nested, for tools.
SNIPPET = '''\
"""A docstring with # no comment in it, and one, if any, else none."""

# Why this is so.
a, b = 1, 2
lo, hi = bounds  # one thing unpacked
c = (x for x in range(3) if x)  # noqa: B007
d = {k: [v for v in ks] for k, ks in e.items()}
f = 1 if a else 2 if b else 3


def g():  # fmt: skip
    (h, i) = j = (1, 2)
    return "# not a comment"
'''


def test_every_construct_is_counted_once() -> None:
    found = code_density.constructs(SNIPPET)
    assert found == {
        "tuple assignments": 2,
        "ternaries": 2,
        "comprehensions": 3,
        "commented lines": 2,
        "non-blank lines": 10,
        "long lines": 0,
    }
    # 100 columns are not long, 101 are.
    assert code_density.constructs(f"x = '{'y' * 94}'\nx = '{'y' * 95}'")["long lines"] == 1
    assert list(code_density.function_lengths(SNIPPET)) == [3]


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("a, b = b, a", True),
        # A list on the left is not counted: nobody writes it.
        ("[a, b] = 1, 2", False),
        ("a, b = f(), g()", True),
        ("a = b = 1", False),
        ("pair = 1, 2", False),
        ("a, b = pair", False),
    ],
)
def test_what_a_tuple_assignment_is(line: str, counts: bool) -> None:
    (node,) = ast.parse(line).body
    assert code_density.is_tuple_assignment(node) is counts


def test_spread_of_lengths() -> None:
    lengths = list(range(10, 0, -1))
    assert code_density.spread(lengths) == {"count": 10, "median": 5.5, "p90": 9, "largest": 10}
    # Of 11 lengths, 10 are needed to have nine in ten.
    assert code_density.spread([*lengths, 11])["p90"] == 10
    assert code_density.spread([]) == {"count": 0, "median": 0, "p90": 0, "largest": 0}


def test_which_end_of_a_range_is_the_limit() -> None:
    assert code_density.within("ternaries", 25) and not code_density.within("ternaries", 25.1)
    # Below the field's lowest is better still, and so are more comments than anybody has.
    assert code_density.within("ternaries", 0)
    assert not code_density.within("commented lines", 49.9)
    assert code_density.within("commented lines", 200)


def test_a_part_is_counted_over_all_its_files(tmp_path: Path) -> None:
    for number, text in enumerate((SNIPPET, "x = 1\ny = 1 if x else 2\n")):
        (tmp_path / f"{number}.py").write_text(text)
    row = code_density.count_part(tmp_path, (".",))
    assert row["files"] == {"count": 2, "median": 7.5, "p90": 13, "largest": 13}
    # 10 lines of SNIPPET and 2, with 2 ternaries and 1.
    assert row["non-blank lines"] == 12
    assert row["ternaries"] == pytest.approx(1000 * 3 / 12)
    assert row["lines over 100 columns, %"] == 0


@pytest.mark.slow
def test_every_part_stays_within_the_range_of_the_field() -> None:
    counted = code_density.count_tree(ROOT)
    for part, name in itertools.product(code_density.PARTS, code_density.RANGES):
        value = counted[part][name]
        low, high = code_density.RANGES[name]
        assert code_density.within(name, value), f"{name} of {part}: {value}, want {low} to {high}"
    shown = code_density.table(counted)
    assert f"README: {counted['README']['words']:,} words" in shown


@pytest.mark.slow
def test_an_earlier_commit_is_counted_and_nothing_is_left() -> None:
    # The files of a commit, not of the working tree, which may be anything.
    assert code_density.count_revision("HEAD")["product"]["files"]["count"] > 100
    with pytest.raises(ValueError, match=r"--at no-such-commit: fatal"):
        code_density.count_revision("no-such-commit")

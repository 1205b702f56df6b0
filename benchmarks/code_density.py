"""Count how densely this repository is written, and compare it with codebases of the field.

    python -m benchmarks.code_density                       this tree
    python -m benchmarks.code_density --at REVISION         an earlier commit of it
    python -m benchmarks.code_density --out FILE.json       the same as JSON

Constructs are counted in syntax trees and tokens, not in text, per 1,000 non-blank lines of a part:
product code, benchmarks and tests. ``RANGES`` has what eight codebases of the field were found to
have in November 2026 by a count of the same constructs; which comments count may differ, ours leave
out those for tools.
"""

import argparse
import ast
import io
import json
import statistics
import subprocess
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = {
    "product": ("megalora", "kernels/megalora_kernels"),
    "benchmarks": ("benchmarks",),
    "tests": ("tests",),
}
"""Folders of each part."""
MAX_COLUMNS = 100
RANGES: dict[str, tuple[float, float]] = {
    "tuple assignments": (0.4, 6.7),
    "ternaries": (6, 25),
    "comprehensions": (1, 16),
    "commented lines": (50, 181),
    "lines over 100 columns, %": (0, 6),
}
"""Lowest and highest of the eight codebases, per 1,000 non-blank lines but for the last."""
GOALS = {
    "tuple assignments": "at most",
    "ternaries": "at most",
    "comprehensions": "at most",
    "commented lines": "at least",
    "lines over 100 columns, %": "at most",
}
"""Which end of a range is the limit: few constructs and many comments read well."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DIRECTIVES = ("# fmt:", "# noqa", "# type:", "# pyright:", "# ruff:", "#!")
"""Comments for tools, which explain nothing and do not count."""


def is_tuple_assignment(node: ast.AST) -> bool:
    """``a, b = x, y``: two assignments in a line. ``lo, hi = bounds`` unpacks one thing instead."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def constructs(text: str) -> Counter[str]:
    """How often each construct of ``RANGES`` occurs in a file, not yet divided by its lines."""
    found: Counter[str] = Counter()
    # A generator expression and a comprehension are one construct to a reader, so they are counted
    # together; a bool counts as 0 or 1.
    for node in ast.walk(ast.parse(text)):
        found["tuple assignments"] += is_tuple_assignment(node)
        found["ternaries"] += isinstance(node, ast.IfExp)
        found["comprehensions"] += isinstance(node, COMPREHENSIONS)
    # Comments are not in the syntax tree, and "#" in a string is none: tokens tell them apart.
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comment = token.type == tokenize.COMMENT and not token.string.startswith(DIRECTIVES)
        found["commented lines"] += comment
    lines = text.splitlines()
    found["non-blank lines"] = sum(bool(line.strip()) for line in lines)
    found["long lines"] = sum(len(line) > MAX_COLUMNS for line in lines)
    return found


def function_lengths(text: str) -> Iterator[int]:
    """Lines of each function, from ``def`` to its end."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1


def spread(lengths: list[int]) -> dict[str, float]:
    """Count, median, 90th percentile and largest of lengths in lines."""
    ordered = sorted(lengths)
    if not ordered:
        return {"count": 0, "median": 0, "p90": 0, "largest": 0}
    # The smallest length that at least nine in ten do not exceed.
    ninth = ordered[-(-9 * len(ordered) // 10) - 1]
    return {
        "count": len(ordered),
        "median": statistics.median(ordered),
        "p90": ninth,
        "largest": ordered[-1],
    }


def count_part(root: Path, folders: tuple[str, ...]) -> dict[str, Any]:
    """All numbers of one part of the tree under ``root``."""
    files: list[int] = []
    functions: list[int] = []
    total: Counter[str] = Counter()
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            files.append(len(text.splitlines()))
            functions.extend(function_lengths(text))
            total += constructs(text)
    lines = max(1, total["non-blank lines"])
    row: dict[str, Any] = {
        "files": spread(files),
        "functions": spread(functions),
        "non-blank lines": total["non-blank lines"],
    }
    for name in RANGES:
        row[name] = round(1000 * total[name] / lines, 1)
    # In percent of the lines; the loop above has put 0 here, as no construct has this name.
    row["lines over 100 columns, %"] = round(100 * total["long lines"] / lines, 2)
    return row


def count_tree(root: Path) -> dict[str, Any]:
    """Numbers of every part, and the length of the README."""
    counted: dict[str, Any] = {}
    for part, folders in PARTS.items():
        counted[part] = count_part(root, folders)
    readme = (root / "README.md").read_text()
    counted["README"] = {"words": len(readme.split()), "lines": len(readme.splitlines())}
    return counted


def count_revision(revision: str) -> dict[str, Any]:
    """``count_tree`` of a commit of this repository, unpacked beside it for the moment.

    Raises:
        ValueError: git knows no such revision.
    """
    # An archive, not a checkout: the working tree and the index stay as they are.
    packed = subprocess.run(
        ["git", "archive", "--format=tar", revision], capture_output=True, cwd=ROOT
    )
    if packed.returncode != 0:
        raise ValueError(f"--at {revision}: {packed.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        return count_tree(Path(folder))


def within(name: str, value: float) -> bool:
    """Whether a number is inside the field's range, or beyond its good end."""
    low, high = RANGES[name]
    return value <= high if GOALS[name] == "at most" else value >= low


def table(counted: dict[str, Any]) -> str:
    """The numbers as text, one row per construct, one column per part."""
    rows = [["", *PARTS, "field"]]
    for kind in ("files", "functions"):
        for what in ("count", "median", "p90", "largest"):
            numbers = [f"{counted[part][kind][what]:g}" for part in PARTS]
            rows.append([f"{kind}, {what}", *numbers, ""])
    for name, (low, high) in RANGES.items():
        row = [name]
        for part in PARTS:
            value = counted[part][name]
            mark = "" if within(name, value) else " !"
            row.append(f"{value:g}{mark}")
        rows.append([*row, f"{low:g} to {high:g}"])
    lines = []
    for name, *cells in rows:
        line = f"{name:<28}"
        for cell in cells:
            line += f"{cell:>14}"
        lines.append(line.rstrip())
    readme = counted["README"]
    lines.append(f"README: {readme['words']:,} words in {readme['lines']} lines")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--at", metavar="REVISION", help="a commit; default: the files as they are")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    try:
        counted = count_revision(options.at) if options.at else count_tree(ROOT)
    except ValueError as error:
        parser.error(str(error))
    print(table(counted))
    if options.out is not None:
        options.out.write_text(json.dumps(counted, indent=1) + "\n")


if __name__ == "__main__":
    main()

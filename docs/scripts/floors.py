"""Fill the floor plan of docs/code.md from the table that tests/test_architecture.py enforces."""

import ast
from pathlib import Path

from docs.scripts.sections import fill
from tests.test_architecture import FLOORS, ROOT

PAGE = ROOT / "docs/code.md"


def page() -> str:
    """docs/code.md with a current floor plan."""
    return fill(PAGE.read_text(), {"floors": plan})


def plan() -> str:
    """A table of all packages and modules at the top of megalora, highest floor first."""
    lines = ["| floor | part | what it does |", "|--:|---|---|"]
    # FLOORS begins with the ground floor; on the page, as in a house, it is at the bottom.
    for number, parts in reversed(list(enumerate(FLOORS, start=1))):
        for part in sorted(parts):
            path = _file(part)
            # The link of a package shows the folder with all its files.
            place = path.parent if path.name == "__init__.py" else path
            link = f"[`{part}`](../{place.relative_to(ROOT).as_posix()})"
            lines.append(f"| {number} | {link} | {_purpose(path)} |")
    return "\n".join(lines)


def _file(part: str) -> Path:
    """The file whose docstring says what a package or module is for."""
    package = ROOT / "megalora" / part / "__init__.py"
    return package if package.is_file() else ROOT / "megalora" / f"{part}.py"


def _purpose(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = paragraph.partition(". ")[0].rstrip(".")
    # Docstrings mark code as reStructuredText does, pages as Markdown does.
    return sentence.replace("``", "`")

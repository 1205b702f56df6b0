"""Write the generated pages and sections of the documentation anew.

python -m docs.scripts            write every file that is not current
python -m docs.scripts --check    write nothing; exit code 1 and the names of stale files
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from docs.scripts import chaos, config_fields, figures, floors, options, readme

ROOT = Path(__file__).parents[2]
GENERATED: dict[str, Callable[[], str]] = {
    "README.md": readme.page,
    "docs/base.md": config_fields.page,
    "docs/code.md": floors.page,
    "docs/options.md": options.page,
    "docs/runs.md": chaos.page,
    "docs/figures/path.svg": figures.path_svg,
    "docs/figures/quickstart-loss.svg": figures.loss_svg,
    "docs/figures/quickstart-reward.svg": figures.reward_svg,
}
"""Path from the root to the function that returns what the file must hold."""


def stale() -> dict[Path, str]:
    """Files that are not what their script writes, each with its new text."""
    found: dict[Path, str] = {}
    for name, make in GENERATED.items():
        path = ROOT / name
        text = make()
        # A file that is missing is stale too: a fresh page needs no empty file first.
        if not path.is_file() or path.read_text() != text:
            found[path] = text
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which files are stale")
    check = parser.parse_args(arguments).check
    found = stale()
    for path, text in found.items():
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is stale; run: make docs", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"wrote {name}")
    # After writing, nothing is stale any more: only --check fails on what it found.
    return int(bool(found) and check)


if __name__ == "__main__":
    sys.exit(main())

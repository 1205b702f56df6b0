"""Say with which versions a number was measured, and which ones are installed."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMPUTING = ("torch", "triton", "megatron-core", "megatron-bridge")
"""Packages that decide what a training step computes and how fast."""
SHOWN = (
    "megalora-kernels", "torch", "triton", "megatron-core", "megatron-bridge", "transformers",
    "peft",
)  # fmt: skip
"""Packages that ``megalora --version`` lists."""
COMMIT_FILE = Path(__file__).parent / "COMMIT"
"""Written into a wheel when it is built (``setup.py``); a checkout has none."""


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the code that runs, or None where nothing says it.

    MEGALORA_COMMIT names it for a copy of the tree, also for one that was committed again
    elsewhere. Without it, a checkout asks git, and a wheel has the commit in a file.
    """
    named = os.environ.get("MEGALORA_COMMIT")
    if named:
        return named
    if _is_checkout():
        return _git("rev-parse", "HEAD")
    return _built_from()


def versions(packages: Sequence[str] = COMPUTING) -> dict[str, str | None]:
    """Versions of Python and ``packages``, and the commit; None where one is not known.

    The commit has seven digits, and a plus where files of the checkout differ from it.
    """
    at = commit()
    if at is not None:
        # A commit from elsewhere may have its plus already.
        changed = _is_checkout() and _git("status", "--porcelain")
        at = at[:7] + "+" * bool(changed or at.endswith("+"))
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        found[name] = installed(name)
    found["commit"] = at
    return found


def version_text() -> str:
    """What ``megalora --version`` prints: megalora with its commit, then a line per package."""
    found = versions(SHOWN)
    at = found.pop("commit")
    ours = installed("megalora") or "not installed as a package"
    lines = [f"megalora {ours} (commit {at or 'unknown'})"]
    for name, number in found.items():
        lines.append(f"{name} {number or 'not installed'}")
    return "\n".join(lines)


def _built_from() -> str | None:
    try:
        return COMMIT_FILE.read_text().strip() or None
    except OSError:
        return None


def _is_checkout() -> bool:
    """Whether git tracks this very file.

    A wheel installed in an environment inside somebody else's repository must not take that
    repository's commit.
    """
    return bool(_git("ls-files", Path(__file__).name))


def _git(*arguments: str) -> str:
    """What git says in this folder; nothing where there is no git, or no repository."""
    try:
        asked = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return asked.stdout.strip()

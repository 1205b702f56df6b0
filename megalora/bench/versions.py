"""What a number was measured with."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout; a copy without .git may say it in MEGALORA_COMMIT."""
    return _git("rev-parse", "HEAD") or os.environ.get("MEGALORA_COMMIT")


def versions() -> dict[str, str | None]:
    """Of what computes, and the commit (with a plus where files differ from it); None: not
    installed, or no checkout."""
    packages = ("torch", "triton", "megatron-core", "megatron-bridge")
    at = commit()
    at = at and at[:7] + "+" * bool(_git("status", "--porcelain"))
    return {
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "commit": at,
    }


def _git(*arguments: str) -> str:
    """What git says of this checkout; nothing where there is no git, or no checkout."""
    try:
        asked = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return asked.stdout.strip()

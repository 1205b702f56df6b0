"""Write the commit that a wheel is built from into it; all else is in pyproject.toml."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def git(*arguments: str) -> str:
    """What git says of this folder; nothing where there is no git, or no repository."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class BuildWithCommit(build_py):
    """Adds ``megalora/COMMIT``, which ``megalora/versions.py`` reads.

    An editable install gets none: its code changes after it is built.
    """

    def run(self) -> None:
        super().run()
        # git ls-files: a copy inside another repository must not take that one's commit.
        if not self.editable_mode and git("ls-files", "setup.py"):
            changed = "+" * bool(git("status", "--porcelain"))
            commit = git("rev-parse", "HEAD") + changed
            Path(self.build_lib, "megalora", "COMMIT").write_text(f"{commit}\n")


setup(cmdclass={"build_py": BuildWithCommit})

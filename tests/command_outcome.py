"""Run a command in this process, and return what a user sees of it."""

from typing import Any

import pytest

from megalora.cli import main as cli


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``megalora ARGUMENTS``."""
    # Nothing that was printed before counts.
    capsys.readouterr()
    code: Any = 0
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err

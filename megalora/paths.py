"""Paths as users write them: ``~`` expanded."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def expand(text: str, option: str) -> str:
    """``~`` and ``~user`` at the beginning as home folders; raises ``ValueError`` where there is no
    such user.

    Args:
        option: what the user calls it, for the message.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(
            f"{option}={text}: {user} is not a user's home folder here; write ./{text} for a folder"
            " of that name"
        )
    return expanded


def user_path(text: str) -> Path:
    """A path on the command line."""
    return Path(expand(text, "the path"))

"""Expand paths as users write them, and check that files and folders can be written."""

import argparse
import os
from pathlib import Path


def expand(text: str, option: str) -> str:
    """Replace ``~`` and ``~user`` at the beginning by home folders; raises ``ValueError`` if there
    is no such user, or no text.

    Args:
        option: name of the option, for the message.
    """
    # Else the working directory would be taken for it.
    if not text.strip():
        raise ValueError(f"{option} is empty; name a file or a folder")
    expanded = os.path.expanduser(text)
    # expanduser leaves a name as it is that it does not know.
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(
            f"{option}={text}: {user} is not a user's home folder here; write ./{text} for a folder"
            " of that name"
        )
    return expanded


class NotAPath(argparse.ArgumentTypeError, ValueError):
    """A path on the command line that means nothing; argparse shows what is wrong with it."""


def user_path(text: str) -> Path:
    """A path on the command line; raises ``NotAPath`` where ``expand`` raises ``ValueError``."""
    try:
        return Path(expand(text, "the path"))
    except ValueError as error:
        raise NotAPath(str(error)) from None


def check_file_to_write(file: Path) -> None:
    """Raise ``ValueError`` unless ``file`` can be written, in a folder that exists or can be
    made."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name the file to write")
    _check_place(file.absolute().parent, f"{file} cannot be written")


def prepare_file(file: Path) -> None:
    """Check as ``check_file_to_write`` does, and make the folders above ``file``."""
    check_file_to_write(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror}") from None


def check_folder_to_write(folder: Path, option: str) -> None:
    """Raise ``ValueError`` unless ``folder`` exists or can be made, and can be written to.

    Args:
        option: name of the option, for the message.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option}={folder} is a file; choose a folder")
    _check_place(folder.absolute(), f"{option}={folder} cannot be written")


def _check_place(folder: Path, cannot: str) -> None:
    """Raise ``ValueError`` unless ``folder`` can be written to, or made and written to.

    Args:
        cannot: beginning of the message.
    """
    # What exists decides: folders below it would be made in it. "/" always exists.
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{cannot}: {there} is a file")
    # A new entry needs both permissions.
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{cannot}: no permission in {there}")

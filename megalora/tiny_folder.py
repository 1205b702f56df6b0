"""Say whether a folder may become a tiny model: a new or empty one, or one that held such a model
before. Needs no torch."""

import json
from pathlib import Path
from typing import Any

from megalora.json_text import read_json
from megalora.wording import shorten

MARKER = "megalora_tiny.json"
"""File that marks a folder as ours to overwrite, with the arguments it was made from."""


def check_folder(out: Path) -> None:
    """Raise ``ValueError`` unless the folder may be written to."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ValueError(
            f"{out} is not empty and was not written by make_tiny (no {MARKER} in it), so it is"
            " not overwritten.\n  Name a new folder, or remove this one."
        )


def check_not_in_use(out: Path, arguments: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a folder whose model was made from other arguments.

    Runs and adapters may depend on that model.
    """
    check_folder(out)
    try:
        before = read_json(out / MARKER)
    except (OSError, ValueError):
        # There is no model yet, or one that was not finished.
        return
    # The same arguments make the same files.
    if before != arguments:
        raise ValueError(
            f"{out} holds a tiny model made from other arguments ({_in_words(before)}), on which"
            " runs and adapters may depend.\n  Name a new folder, or remove this one."
        )


def _in_words(arguments: Any) -> str:
    """What the marker says of a model, on one line."""
    return shorten(arguments) if isinstance(arguments, dict) else "unknown"


def claim(out: Path, arguments: dict[str, Any]) -> None:
    """Make the folder, or accept one of an earlier call, whose old shards ``save_pretrained`` then
    removes."""
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(json.dumps(arguments, indent=2, default=str) + "\n")

"""Read the records of a results folder, and write tables of their numbers as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOT_MEASURED = "not yet measured on a GPU"
NOT_YET = "not yet"
"""Cell of a column that is headed ``measured``, where nothing was."""


class Results:
    """The JSON files of a results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, name: str) -> dict[str, Any]:
        """The record of this name; an empty one where there is none."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else {}

    def on_gpu(self, name: str) -> dict[str, Any]:
        """The record where it was measured on a GPU at full size, else an empty one."""
        found = self.of(name)
        # Some benchmarks note a dry run among their settings.
        dry = found.get("dry") or found.get("settings", {}).get("dry")
        on_cpu = str(found.get("device", "CPU")).startswith("CPU")
        return {} if dry or on_cpu else found


def origin(*records: dict[str, Any]) -> str:
    """Device, versions and commit of records, as a line above their table."""
    found = []
    for record in records:
        if record:
            commit = (record.get("commit") or "unknown")[:7]
            versions = f"torch {record['versions']['torch']}, triton {record['versions']['triton']}"
            found.append(f"Measured on {record['device']} ({versions}, commit {commit}).")
    # Each line once: two records of one run have the same origin.
    return "\n".join(dict.fromkeys(found)) or f"Measured: {NOT_MEASURED}."


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; columns after the first are aligned right."""
    text = []
    for line in (header, ["---", *["--:"] * (len(header) - 1)], *rows):
        cells = [str(cell) for cell in line]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def digits(value: float | None, form: str = ".4g") -> str:
    """A number as a cell."""
    return NOT_YET if value is None else format(value, form)

"""Read and write JSON Lines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(rows: Iterable[Any], name: str) -> list[Any]:
    return [row[name] for row in rows]

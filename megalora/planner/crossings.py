"""Read from how many rows per expert a GPU's layers run on torch's grouped GEMM: what weights get
room for depends on it.

The table is that of ``megalora_kernels.tuned_table``, of which this reads ``layers`` alone:
importing that package imports torch, which a plan does without.
"""

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEFAULT_ROWS = 1024.0
"""``megalora_kernels.tuned.RULE_VENDOR_FROM``: where no table says otherwise."""
NEARLY = 0.99
"""``megalora_kernels.backend.NEARLY``."""


@dataclass(frozen=True)
class Crossings:
    """What a table says of layers in bfloat16."""

    layers: tuple[tuple[int, int, int, float], ...] = ()
    """(hidden, intermediate of one rank, rank, rows per expert)."""

    def prefers_grouped_mm(
        self, rows_per_expert: float, hidden: int, intermediate: int, rank: int
    ) -> bool:
        """As ``megalora_kernels.prefers_grouped_mm`` on Hopper and datacentre Blackwell."""
        like = [layer for layer in self.layers if layer[:2] == (hidden, intermediate)]
        least = DEFAULT_ROWS
        if like:
            *_, least = min(like, key=lambda layer: (_doublings(layer[2], rank), layer[2]))
        return rows_per_expert >= NEARLY * least


NO_TABLE = Crossings()


def _doublings(a: int, b: int) -> int:
    """Between two ranks, rounded up to powers of two from 16 on; none counts as 8."""
    sizes = [(max(16, 1 << (rank - 1).bit_length()) if rank else 8).bit_length() for rank in (a, b)]
    return abs(sizes[0] - sizes[1])


def crossings_of(gpu: str) -> Crossings:
    """What is known of a GPU by its name or a part of it, such as ``H100``; nothing where it has no
    table.

    Raises:
        ValueError: ``MEGALORA_TUNED`` names no file, or a file has no such layers.
    """
    path = _table_of(gpu)
    if path is None:
        return Crossings()
    try:
        layers = [
            row for row in json.loads(path.read_text())["layers"] if row["dtype"] == "bfloat16"
        ]
        return Crossings(
            tuple((row["hidden"], row["intermediate"], row["R"], _rows(row)) for row in layers)
        )
    except (ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, no text or no number
        raise ValueError(
            f"{path}: no table of benchmarks.tune ({error!r}); unset MEGALORA_TUNED, or tune again"
        ) from None


def _rows(row: dict[str, Any]) -> float:
    return float("inf") if row["vendor_from"] is None else float(row["vendor_from"])


def _table_of(gpu: str) -> Path | None:
    named = os.environ.get("MEGALORA_TUNED") or None
    if named == "off":
        return None
    if named is not None:
        if not Path(named).is_file():
            raise ValueError(
                f"MEGALORA_TUNED is {named!r}, and there is no such file; unset it, or set it to"
                " 'off'"
            )
        return Path(named)
    spec = find_spec("megalora_kernels")
    assert spec is not None and spec.origin is not None
    words = gpu.replace("NVIDIA", "").split()
    files = sorted((Path(spec.origin).parent / "tuned").glob("*.json"))
    return next((file for file in files if words and words[0] in file.stem.split("_")), None)

"""Read from how many rows per expert a GPU runs experts on torch's grouped GEMM, which decides
whether their weights get room for adapters.

The table is that of ``megalora_kernels.tuned_table``, of which this reads ``layers`` alone:
importing that package imports torch, which a plan does without.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megalora.json_text import read_json

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
            # The nearest rank that was measured; of two equally near ones the smaller.
            *_, least = min(like, key=lambda layer: (_doublings(layer[2], rank), layer[2]))
        return rows_per_expert >= NEARLY * least


NO_TABLE = Crossings()
"""What is known of a GPU without a table: ``DEFAULT_ROWS`` for every layer."""


def _doublings(a: int, b: int) -> int:
    """How often one rank must double to be the other, as the kernels count it."""
    return abs(_log2_of_tile(a) - _log2_of_tile(b))


def _log2_of_tile(rank: int) -> int:
    """log2 of the columns that a rank takes in the kernels: a power of two from 16 on; no adapter
    counts as 8."""
    if rank == 0:
        return 3
    # bit_length of rank - 1 is log2(rank) rounded up.
    return max(4, (rank - 1).bit_length())


def crossings_of(gpu: str) -> Crossings:
    """The table of a GPU by its name or a part of it, such as ``H100``; ``NO_TABLE`` where there is
    none.

    Raises:
        ValueError: ``MEGALORA_TUNED`` names a file that does not exist, or the table cannot be
            read.
    """
    path = _table_of(gpu)
    if path is None:
        return NO_TABLE
    layers = []
    try:
        for row in read_json(path)["layers"]:
            if row["dtype"] == "bfloat16":
                layers.append((row["hidden"], row["intermediate"], row["R"], _rows(row)))
    # ValueError: not JSON, not text, or rows that are not a number.
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table that benchmarks.tune wrote ({error!r}); unset MEGALORA_TUNED,"
            " or tune again"
        ) from None
    return Crossings(tuple(layers))


def _rows(row: dict[str, Any]) -> float:
    """Rows per expert from which a layer runs on the grouped GEMM; infinite where it never does."""
    return float("inf") if row["vendor_from"] is None else float(row["vendor_from"])


def _table_of(gpu: str) -> Path | None:
    """The file that ``MEGALORA_TUNED`` names, else the one that the kernels ship for this GPU."""
    named = os.environ.get("MEGALORA_TUNED")
    if named == "off":
        return None
    if named:
        if not Path(named).is_file():
            raise ValueError(
                f"MEGALORA_TUNED is {named!r}, and there is no such file; unset it, or set it to"
                " 'off'"
            )
        return Path(named)
    spec = find_spec("megalora_kernels")
    assert spec is not None and spec.origin is not None
    # "NVIDIA H100 80GB HBM3" and "H100 SXM 80 GB" are both found by their first word, H100.
    words = gpu.replace("NVIDIA", "").split()
    for file in sorted((Path(spec.origin).parent / "tuned").glob("*.json")):
        if words and words[0] in file.stem.split("_"):
            return file
    return None

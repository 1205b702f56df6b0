"""Choose the variant of a grouped GEMM and the back end of a layer: from a table measured on this
GPU, else by the rule.

A product is looked up by its sizes and the nearest of ``BUCKETS`` to its rows per expert, then
under the neighbouring buckets, then with half or double the rank (a product without adapter: any
rank). Where all are silent ``variants.rule`` decides. Nothing is timed while training. Keys are
sizes that the host knows (M / E, not the counts), so a look-up never waits for the device, and
variants compute the same sums: ranks that choose differently have nothing to agree on.

The table of a card ships as ``tuned/NVIDIA_H100_80GB_HBM3.json`` (``tuned_table.py`` has its form).
``MEGALORA_TUNED`` names another file, or is ``off``; it is read once, when a device first asks.
"""

import math
import os
from bisect import bisect_right
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .tuned_table import BUCKETS, HOPPER_LIMITS, Key, LayerKey, Limits, Table, read_table
from .variants import (
    SQUARE_TILE_ROWS,
    WIDE_TILE_ROWS,
    Product,
    Variant,
    device_limits,
    problem,
    rule,
    tile_rank,
)

EDGES = tuple(math.sqrt(low * high) for low, high in pairwise(BUCKETS))
"""Between two buckets, where their ratios to the number of rows are equal."""
RULE_EDGES = (WIDE_TILE_ROWS, SQUARE_TILE_ROWS)
"""Rows per expert at which the rule changes its mind: between them an answer can be remembered."""
ENV_TABLE = "MEGALORA_TUNED"
FOLDER = Path(__file__).with_name("tuned")
RULE_VENDOR_FROM = 1024.0
"""Rows per expert from which torch's grouped GEMM is taken where no table says so: where tiles of
128 rows stop wasting a tenth. Predicted, not yet measured on a GPU."""


def bucket_of(rows_per_expert: float) -> int:
    """The nearest bucket by ratio."""
    return BUCKETS[bisect_right(EDGES, rows_per_expert)]


def file_name(gpu: str) -> str:
    """``NVIDIA H100 80GB HBM3`` to ``NVIDIA_H100_80GB_HBM3.json``."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in gpu) + ".json"


def gpu_name(device: torch.device) -> str:
    """The card's name; ``cpu`` where kernels are interpreted."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


class Choices:
    """Answers from one table, remembered: a look-up is part of every launch."""

    def __init__(self, table: Table, limits: Limits = HOPPER_LIMITS) -> None:
        self.table = table
        self.limits = limits
        self.known: dict[tuple[Any, ...], Variant] = {}

    def variant(self, product: Product) -> Variant:
        """As ``choose``."""
        p = product
        rows = product.rows_per_expert
        bucket = bucket_of(rows)
        asked = (
            p.op,
            p.dtype,
            p.N,
            p.K,
            p.rank,
            p.blocks,
            p.gathered,
            bucket,
            bisect_right(RULE_EDGES, rows),
        )
        found = self.known.get(asked)
        if found is None:
            found = self.known[asked] = self._look_up(product, bucket) or rule(
                product, *self.limits
            )
        return found

    def _look_up(self, product: Product, bucket: int) -> Variant | None:
        """The nearest row's variant; None: the rule's."""
        p = product
        dtype = str(product.dtype).removeprefix("torch.")
        wanted = Key(p.op, dtype, p.N, p.K, tile_rank(p.rank), p.blocks, p.gathered, bucket)
        near = {
            key: distance
            for key in self.table.variants
            if (distance := _distance(key, wanted)) is not None
        }
        if not near:
            return None
        found = self.table.variants[min(near, key=near.__getitem__)]
        # What runs with the row's rank need not run with this one.
        if found is None or problem(found, product, *self.limits) is not None:
            return None
        return found

    def vendor_from(self, dtype: torch.dtype, hidden: int, intermediate: int, rank: int) -> float:
        """As the function of this name."""
        key = LayerKey(str(dtype).removeprefix("torch."), hidden, intermediate, tile_rank(rank))
        # The rank hardly moves the crossing: another one's is nearer to the truth than the rule.
        like = [known for known in self.table.vendor_from if known[:3] == key[:3]]
        if not like:
            return RULE_VENDOR_FROM
        nearest = min(like, key=lambda known: (_rank_steps(known.R, key.R), known.R))
        return self.table.vendor_from[nearest]


def _rank_steps(a: int, b: int) -> int:
    """How many doublings lie between two padded ranks; 0 counts as 8."""
    return abs(max(a, 8).bit_length() - max(b, 8).bit_length())


def _distance(key: Key, wanted: Key) -> tuple[int, ...] | None:
    """How far a row is from what is wanted, the rank before the rows per expert; None: too far, or
    another product."""
    same = ("op", "dtype", "N", "K", "gathered")
    if any(getattr(key, name) != getattr(wanted, name) for name in same):
        return None
    rank_steps = _rank_steps(key.R, wanted.R)
    bucket_steps = abs(BUCKETS.index(key.rows_per_expert) - BUCKETS.index(wanted.rows_per_expert))
    if bucket_steps > 1 or (rank_steps > 1 and wanted.R > 0):
        return None
    # Of two neighbours the lower: its tiles waste fewer rows.
    return rank_steps, abs(key.blocks - wanted.blocks), bucket_steps, key.rows_per_expert


@cache
def choices_for(gpu: str, limits: Limits = HOPPER_LIMITS) -> Choices:
    """What is known of a card, by name: from ``MEGALORA_TUNED``, else from the file that ships.

    Raises:
        ValueError: ``MEGALORA_TUNED`` names no file; the file has a mistake (``read_table``).
    """
    named = os.environ.get(ENV_TABLE) or None
    if named == "off":
        return Choices(Table(), limits)
    path = FOLDER / file_name(gpu) if named is None else Path(named)
    if not path.is_file():
        if named is not None:
            raise ValueError(
                f"{ENV_TABLE} is {named!r}, and there is no such file; unset it, or set it to 'off'"
            )
        return Choices(Table(), limits)
    return Choices(read_table(path, gpu, limits), limits)


@cache
def _choices(device: torch.device) -> Choices:
    return choices_for(gpu_name(device), device_limits(device))


def choose(product: Product, device: torch.device) -> Variant:
    """The variant that a product is computed by: of its bucket's row, a neighbour's, or the
    rule's."""
    return _choices(device).variant(product)


def vendor_from(
    dtype: torch.dtype, hidden: int, intermediate: int, rank: int, device: torch.device
) -> float:
    """Rows per expert from which a layer's experts are faster by torch's grouped GEMM on joined
    operands than by Triton.

    Args:
        hidden, intermediate: of one expert on this rank.
        rank: the larger of the stacked ranks of gate_up and down; 0 without adapter.

    Returns:
        The table's number, infinity where it never is; ``RULE_VENDOR_FROM`` where the table has no
            such layer.
    """
    return _choices(device).vendor_from(dtype, hidden, intermediate, rank)


def forget() -> None:
    """Read ``MEGALORA_TUNED`` and the files anew."""
    choices_for.cache_clear()
    _choices.cache_clear()

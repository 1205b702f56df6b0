"""Variants of the Triton grouped GEMM: the tile, how operands reach it, how programs walk over the tiles.

All variants add the terms of K in the same order, BLOCK_K at a time, and the adapter's product after them: which one runs changes the
time and not what is computed. ``rule`` names one for every product; ``tuned.py`` has the better one where a GPU was measured.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank
"""

from dataclasses import dataclass
from typing import Literal

import torch

Operand = Literal["pointers", "tma"]
"""How an operand is read: by an address for each element (``cp.async``), or by tensor descriptor (TMA, Hopper and later)."""


@dataclass(frozen=True)
class Product:
    """One grouped product ``x [M, K] @ w [E, K, N]``, as far as the choice of a variant depends on it."""

    op: Literal["forward", "dgrad"]
    """``forward``: the weight is stored ``[E, N, K]``; ``dgrad``: ``[E, K, N]``. N and K are those of the product."""
    dtype: torch.dtype
    N: int
    K: int
    rank: int
    """R: columns of the adapter's product; 0 without one."""
    gathered: bool
    """Rows of x are taken through ``source_M`` and cannot be read by TMA on Hopper."""
    rows_per_expert: float
    """M / E: the mean, which the host knows; not the counts."""


@dataclass(frozen=True)
class Variant:
    """How one grouped GEMM is computed."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    weight: Operand = "pointers"
    rows: Operand = "pointers"
    persistent: bool = False
    """One program for each multiprocessor walks over the tiles, instead of one program for each tile."""
    roles: bool = False
    """One warp group loads and the others multiply (Triton 3.6 on Hopper; every operand by TMA)."""

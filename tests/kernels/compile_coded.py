"""List what is compiled of the grouped GEMM that decodes codes in its load path.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank
"""

from functools import partial
from typing import Any

import torch
from megalora_kernels import QuantisedWeight, Routing
from megalora_kernels import coded_gemm as coded

from tests.kernels.compile_cases import HALF, Case

SIZES = {"30B gate_up": (16, 1536, 2048), "235B down": (16, 4096, 1536)}
"""(E, N, K)"""
GRAINS = {"nf4": ((1, 64), (1, 32)), "fp8": ((128, 128), (64, 64), (32, 32))}
"""Of whole matrices, then of shards whose cut lies within a block."""


def product(
    form: Any, grain: tuple[int, int], sizes: tuple[int, int, int], rank: int, tile: Any
) -> None:
    """One launch, of which no number is ever read."""
    E, N, K = sizes
    p, q = grain
    M = E * 64
    codes = torch.empty(E, N, K // 2 if form == "nf4" else K, dtype=torch.uint8)
    weight = QuantisedWeight(form, codes, torch.empty(E, N // p, K // q), grain)
    x = torch.empty(M, K, dtype=HALF)
    source_M = torch.empty(M, dtype=torch.int32)
    routing = Routing(torch.empty(E, dtype=torch.int32), M)
    s_MR = None
    b = None
    if rank:
        s_MR = torch.empty(M, rank, dtype=HALF)
        blocks = [torch.empty(E, N // 2, rank // 2, dtype=HALF) for _ in range(2)]
        b = tuple(block.transpose(1, 2) for block in blocks)
    coded.coded_gemm_triton(x, weight, routing, s_MR, b, source_M, tile=tile)


def products(
    form: str, grain: tuple[int, int], sizes: str, rank: int, tile: Any, capability: int
) -> Case:
    q = grain[1] if form == "nf4" else min(grain[1], coded.MOST_K)
    facts = {
        "coded": form, "grain": grain[1], "rank": rank, "tile": [tile.block_m, tile.block_n],
        # Of one turn of the loop, for each thread.
        "weights": tile.block_n * q / (32 * tile.num_warps),
    }  # fmt: skip
    label = f"{form} codes, {grain}, {sizes}, rank {rank}, {tile}"
    call = partial(product, form, grain, SIZES[sizes], rank, tile)
    return Case(label, capability, call, facts)


def few(capability: int) -> list[Case]:
    """Each form once."""
    small, _, large = coded.TILES
    return [
        products("nf4", (1, 64), "30B gate_up", 32, large, capability),
        products("fp8", (128, 128), "30B gate_up", 32, small, capability),
    ]


def every(capability: int) -> list[Case]:
    """Each form, grain and tile; sizes and ranks take turns."""
    found = []
    for form, grains in GRAINS.items():
        for grain in grains:
            for i, tile in enumerate(coded.TILES):
                sizes = list(SIZES)[i % 2]
                rank = (32, 0, 128)[i]
                found.append(products(form, grain, sizes, rank, tile, capability))
    return found

"""List what is compiled without a GPU: layers through their launchers, variants of the grouped
GEMM, passes of SwiGLU.

Tensors are on the CPU and mostly never touched; sizes are those of Qwen3-30B-A3B.

Shape legend: T tokens   M routed rows   E experts   H hidden   I expert intermediate   K inputs
N outputs   R, Q ranks
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product as pairs
from typing import Any, NamedTuple

import torch
from megalora_kernels import (
    ExpertFactors,
    Routing,
    expert_mlp,
    join_blocks_triton,
    permute_shrink,
    read_logits_triton,
    route,
    softmax_gradient_triton,
)
from megalora_kernels import variants as choices
from megalora_kernels.destinations import places_triton
from megalora_kernels.gemm_kernel import grouped_gemm_triton
from megalora_kernels.regroup import Arrivals, regroup_triton
from megalora_kernels.route import route_triton, spread_triton
from megalora_kernels.row_gain import gain_gradient_triton, gain_rows_triton
from megalora_kernels.sums import TritonSums
from megalora_kernels.swiglu import swiglu_triton
from megalora_kernels.swiglu_backward import swiglu_backward_triton
from megalora_kernels.variants import Product, Variant, candidates, problem, shared_bytes

H = 2048
I = 768
E = 128
HALF = torch.bfloat16


class Case(NamedTuple):
    """Something to compile for one compute capability."""

    label: str
    capability: int
    call: Callable[[], object]
    facts: dict[str, Any] = {}
    """What is known beforehand: goes into every row."""


# ---- 1. everything that a layer launches ---------------------------------------------------------


def layer(dtype: torch.dtype, rank: int, tokens: int, whole: bool) -> None:
    """Forward and backward of two experts; values mean nothing. ``whole``: without adapters and
    with rows in order, too."""
    # Both experts get every token, so ``tokens`` is the number of rows of each: what tiles are
    # chosen by.
    new = {"dtype": dtype, "requires_grad": True}
    x = torch.zeros(tokens, H, **new)
    p = torch.zeros(tokens * 2, requires_grad=True)
    a1 = torch.zeros(2, 2 * rank, H, **new)
    b_gate = torch.zeros(2, I, rank, **new)
    b_up = torch.zeros(2, I, rank, **new)
    a2 = torch.zeros(2, rank, I, **new)
    b2 = torch.zeros(2, H, rank, **new)
    w1 = torch.zeros(2, 2 * I, H, dtype=dtype)
    w2 = torch.zeros(2, H, I, dtype=dtype)
    routing, _ = route(torch.ones(tokens, 2, dtype=torch.bool), 2)
    adapters = {
        "gate_up": ExpertFactors(a1, (b_gate, b_up), (2.0, 2.0)),
        "down": ExpertFactors(a2, (b2,), (2.0,)),
    }
    expert_mlp(x, w1, w2, p, routing, backend="triton", **adapters).sum().backward()
    if not whole:
        return
    expert_mlp(x, w1, w2, p, routing, backend="triton").sum().backward()
    in_order = Routing(routing.offsets_E, routing.num_rows)
    y = expert_mlp(
        torch.zeros(tokens * 2, H, **new), w1, w2, p, in_order, backend="triton", **adapters
    )
    y.sum().backward()
    # Both results in one loss, so that one backward pass launches the kernels of both.
    rows, s = permute_shrink(x, a1, routing, backend="triton")
    (rows.sum() + s.sum()).backward()


def routing_of_128(dtype: torch.dtype) -> None:
    """Routing of 128 experts, top 8, to 8 ranks, and of what 8 ranks send for 16 of them."""
    # Numbers of experts and top k are constants in the kernels; tokens are not.
    chosen_TE = torch.zeros(64, 128, dtype=torch.bool)
    p_TE = torch.zeros(64, 128, dtype=dtype)
    routing, expert_TK, moved_M = route_triton(chosen_TE, 8, p_TE)
    assert routing.slots_TK is not None and moved_M is not None
    spread_triton(moved_M, routing.slots_TK, expert_TK, 128)
    rows, *_ = route_triton(torch.zeros(64, 8, dtype=torch.bool), 8, exactly=False)
    places_M = places_triton(routing, expert_TK, rows, 16, 8)
    counts_RE = torch.zeros(8, 16, dtype=torch.int64)
    arrivals = Arrivals(counts_RE, torch.zeros(8, dtype=torch.int64), places_M, 300, 8)
    regroup_triton(arrivals, moved_M)


def scaled_rows(dtype: torch.dtype) -> None:
    """Rows of down's output times a number each, in place and gathered, and backward's sums."""
    u_MH = torch.zeros(4096, H, dtype=dtype)
    gain_EH = torch.zeros(E, H)
    source_M = torch.zeros(4096, dtype=torch.int32)
    routing = Routing(torch.zeros(E, dtype=torch.int32), 4096)
    for source in (None, source_M):
        gain_rows_triton(u_MH, gain_EH, routing, u_MH, source)
        gain_gradient_triton(u_MH, u_MH, routing, gain_EH, source)


def loss_of_chunk(dtype: torch.dtype) -> None:
    """A chunk's logits read, joined with those of another rank and turned into a gradient, plain
    and weighted."""
    logits_CV = torch.zeros(32, 151_936, dtype=dtype)
    targets_C = torch.zeros(32, dtype=torch.int64)
    ones_C = torch.ones(32)
    for with_mean in (False, True):
        parts = read_logits_triton(logits_CV, targets_C, 151_936, with_mean)
    join_blocks_triton(torch.cat([parts, parts]), 2 * 151_936)
    softmax_gradient_triton(logits_CV, targets_C, 151_936, ones_C, ones_C)
    softmax_gradient_triton(logits_CV, targets_C, 151_936, ones_C, ones_C, ones_C)
    softmax_gradient_triton(logits_CV, targets_C, 151_936, ones_C, ones_C, ones_C, ones_C)


def layers(capability: int, dtype: torch.dtype, rank: int, tokens: int, whole: bool = True) -> Case:
    label = f"layer, {str(dtype).removeprefix('torch.')}, rank {rank}, {tokens} rows per expert"
    return Case(label, capability, partial(layer, dtype, rank, tokens, whole))


# ---- 2. variants of the grouped GEMM -------------------------------------------------------------

PRODUCTS = {
    "gate_up": Product("forward", HALF, 2 * I, H, 0, gathered=True, rows_per_expert=512, blocks=2),
    "down": Product("forward", HALF, H, I, 0, gathered=False, rows_per_expert=512),
    "gate_up dgrad": Product("dgrad", HALF, H, 2 * I, 0, gathered=False, rows_per_expert=512),
    "down dgrad": Product("dgrad", HALF, I, H, 0, gathered=True, rows_per_expert=512),
}
"""The products of a layer."""
RANKS = (32, 0, 64, 128, 16)
"""Stacked ranks, one variant after the other: every pair with an operand's way to the tensor cores
occurs."""


def gemm(of: Product, variant: Variant) -> None:
    """One launch of this variant for E experts, of which no number is ever read."""
    # torch.empty reserves addresses alone: 128 experts' weights would be 800 MB.
    num_rows = int(E * of.rows_per_expert)
    w_EKN = torch.empty(E, of.K, of.N, dtype=of.dtype)
    if of.op == "forward":
        w_EKN = torch.empty(E, of.N, of.K, dtype=of.dtype).transpose(1, 2)
    x = torch.empty(num_rows, of.K, dtype=of.dtype)
    source_M = torch.empty(num_rows, dtype=torch.int32) if of.gathered else None
    s_MR = None
    b = None
    if of.rank:
        s_MR = torch.empty(num_rows, of.rank, dtype=of.dtype)
        width = of.N // of.blocks
        block_rank = of.rank // of.blocks
        blocks = []
        for _ in range(of.blocks):
            # Read as [E, r, N] in both; stored as [E, N, r], B's own order, in forward alone.
            if of.op == "forward":
                block = torch.empty(E, width, block_rank, dtype=of.dtype).transpose(1, 2)
            else:
                block = torch.empty(E, block_rank, width, dtype=of.dtype)
            blocks.append(block)
        b = tuple(blocks)
    routing = Routing(torch.empty(E, dtype=torch.int32), num_rows)
    grouped_gemm_triton(x, w_EKN, routing, s_MR, b, source_M, variant=variant)


def gemms(
    name: str, of: Product, variant: Variant, capability: int, refused: str | None = None
) -> Case:
    # Blocks are those of the adapter: without one there is a single product.
    if of.rank == 0 and of.blocks > 1:
        of = replace(of, blocks=1)
    facts = {
        "product": name, "rank": of.rank,
        "variant": f"{variant.block_m} x {variant.block_n} x {variant.block_k}",
        "num_warps": variant.num_warps, "num_stages": variant.num_stages, "weight": variant.weight,
        "rows": variant.rows, "persistent": variant.persistent,
        "estimate": shared_bytes(variant, of), "refused": refused,
    }  # fmt: skip
    call = partial(without_asking, of, variant) if refused else partial(gemm, of, variant)
    return Case(f"{name}, rank {of.rank}, {variant}", capability, call, facts)


def without_asking(of: Product, variant: Variant) -> None:
    """Compile what ``problem`` refuses."""
    from megalora_kernels import gemm_kernel

    gemm_kernel.problem = lambda *_: None  # in a process of its own
    gemm(of, variant)


def limits_of(capability: int) -> tuple[int, tuple[int, int]]:
    pair = (capability // 10, capability % 10)
    return choices.shared_limit_of(pair), pair


def every_candidate(capability: int) -> Iterator[Case]:
    """Every variant that is offered for a product of the layer at some rank; ranks take turns."""
    limits = limits_of(capability)
    for name, of in PRODUCTS.items():
        # Which ranks each variant is offered at; a dict keeps variants in the order offered.
        ranks_of: dict[Variant, list[int]] = {}
        for rank in RANKS:
            for variant in candidates(replace(of, rank=rank), *limits):
                ranks_of.setdefault(variant, []).append(rank)
        for i, (variant, ranks) in enumerate(ranks_of.items()):
            # All variants at all ranks would take five times as long.
            first = i % len(RANKS)
            turns = RANKS[first:] + RANKS[:first]
            rank = next(rank for rank in turns if rank in ranks)
            yield gemms(name, replace(of, rank=rank), variant, capability)


def refused_for_memory(capability: int) -> Iterator[Case]:
    """Tiles that ``problem`` refuses for their shared memory or their sums, and nothing else."""
    # With 4 warps a tile of 128 x 256 has 256 sums per thread, of 255 registers.
    tiles = [*choices.TILES, (128, 256, 4)]
    for (block_m, block_n, warps), stages in pairs(tiles, (2, 3, 4, 5)):
        variant = Variant(block_m, block_n, 64, warps, stages)
        of = replace(PRODUCTS["down"], rank=16)
        why = problem(variant, of, *limits_of(capability))
        if why is not None:
            yield gemms("down", of, variant, capability, why)


# ---- 3. SwiGLU's passes --------------------------------------------------------------------------

SWIGLU_RANKS = (
    (0, 0),
    (32, 0),
    (0, 16),
    (16, 8),
    (32, 16),
    (32, 32),
    (64, 32),
    (64, 64),
    (128, 64),
    (256, 128),
)
"""R of gate and up stacked, Q of down. From 128 on only the back end ``grouped_mm`` comes here."""


def swiglu(dtype: torch.dtype, rank: int, rank_down: int) -> None:
    """Both passes over rows of all experts."""
    # One row each: the number of rows is no constant of the kernels.
    y = torch.empty(E, 2 * I, dtype=dtype)
    h = torch.empty(E, I, dtype=dtype)
    p = torch.empty(E)
    s_MR = torch.empty(E, rank, dtype=dtype) if rank else None
    s_MQ = torch.empty(E, rank_down, dtype=dtype)
    a_EQI = torch.empty(E, rank_down, I, dtype=dtype)
    routing = Routing(torch.empty(E, dtype=torch.int32), E)
    swiglu_triton(y, p, a_EQI if rank_down else None, routing, h, s_MQ if rank_down else None, 2.0)
    of_down = (rank_down, I) if rank_down else None
    of_gate_up = [(I, rank // 2)] * 2 if rank else []
    sums = TritonSums(routing, y, [of_down, *of_gate_up])
    # Places for the gradients of down's A, then of gate's and up's B.
    da, *db = sums.places
    swiglu_backward_triton(
        h, y, p, routing, torch.empty_like(y), s_MR, s_MQ if rank_down else None, sums, da, db
    )  # fmt: skip


def swiglus(capability: int, dtype: torch.dtype, rank: int, rank_down: int) -> Case:
    label = f"SwiGLU, {str(dtype).removeprefix('torch.')}, ranks {rank} and {rank_down}"
    return Case(
        label, capability, partial(swiglu, dtype, rank, rank_down), {"ranks": [rank, rank_down]}
    )


# ---- 4. what to compile when ---------------------------------------------------------------------


def few(capability: int) -> list[Case]:
    """A layer, and each property of a variant once: what ``make test`` can afford."""
    forward = PRODUCTS["gate_up"]
    down = PRODUCTS["down"]
    dgrad = PRODUCTS["gate_up dgrad"]
    down_dgrad = PRODUCTS["down dgrad"]
    return [
        layers(capability, HALF, 16, 2048, whole=False),
        Case("routing", capability, partial(routing_of_128, HALF)),
        Case("scaled rows", capability, partial(scaled_rows, HALF)),
        Case("loss", capability, partial(loss_of_chunk, HALF)),
        swiglus(capability, HALF, 64, 32),
        swiglus(100, HALF, 32, 0),  # Blackwell's compiler refuses it where it is pipelined
        gemms(
            "gate_up", replace(forward, rank=128), Variant(128, 256, 64, 8, 4, "tma"), capability
        ),
        gemms(
            "down",
            replace(down, rank=64),
            Variant(128, 256, 64, 8, 4, "tma", "tma", persistent=True),
            capability,
        ),
        gemms(
            "gate_up dgrad",
            replace(dgrad, rank=128),
            Variant(128, 128, 64, 8, 3, "tma", "tma"),
            capability,
        ),
        gemms("down dgrad", replace(down_dgrad, rank=16), Variant(64, 128, 64, 4, 4), capability),
    ]


def every(capability: int) -> list[Case]:
    """All kernels, all variants offered, and those refused for memory."""
    return [
        layers(capability, HALF, 16, 64),
        layers(capability, HALF, 16, 2048),
        layers(capability, HALF, 64, 2048),
        layers(capability, torch.float16, 16, 2048),
        layers(capability, torch.float32, 16, 64),
        Case("loss, float32", capability, partial(loss_of_chunk, torch.float32)),
        Case("routing", capability, partial(routing_of_128, HALF)),
        Case("scaled rows", capability, partial(scaled_rows, HALF)),
        Case("loss", capability, partial(loss_of_chunk, HALF)),
        *[swiglus(capability, HALF, *ranks) for ranks in SWIGLU_RANKS],
        *every_candidate(capability),
        *refused_for_memory(capability),
    ]

"""Compute the grouped GEMM of ``grouped_gemm.py`` in Triton, in one of ``variants.py``'s ways.

    y[m] = x[source m] @ w[e] + s[m] @ b[e]        for the rows m of expert e

All variants add the terms of K first to last, BLOCK_K at a time, and the adapter's product after
them. Behind the loop it also costs no shared memory of its own: its operands reuse the buffers of
the pipeline.

A tile has BLOCK_M rows of one expert and BLOCK_N columns of one block of b. Where b has two blocks
(gate and up), no tile crosses from one to the other.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from .absent import pointer
from .descriptors import (
    by_columns,
    load_from_stack,
    rows_descriptor,
    stack_descriptor,
    why_not_described,
)
from .expert_factors import Factors
from .grouped_gemm import columns_and_ranks
from .routing import Routing
from .tiles import find_tile, max_tiles, tile_table
from .tuned import choose as choose_variant
from .variants import Product, Variant, device_limits, problem, rule, tile_rank

GROUP_TILES = 8
"""Tiles of rows that a persistent walk visits before it goes to the next block of columns: they
share columns of w in L2."""


# ---- 1. kernels ----------------------------------------------------------------------------------


@triton.jit
def _load_k(ptrs, k_ok, EVEN_K: tl.constexpr):
    """Values, or zeros beyond K. No mask where no tile reaches there: it would cost wide copies."""
    if EVEN_K:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=k_ok, other=0.0)


@triton.jit
def load_low_rank(
    s_ptr, stride_s, blocks, block, rows, cols, expert, RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr
):  # fmt: skip
    """s (rows, R) and b[expert] (R, cols): the b that belongs to ``block`` and its columns of s."""
    b_ptr, strides = blocks[0]
    stride_be, stride_br, stride_bn = strides
    first, rank = RANKS[0]
    # What blocks have in common, which is everything but the pointer where ranks are equal, folds
    # into constants.
    for i in tl.static_range(1, len(RANKS)):
        mine = block == i
        b_ptr = tl.where(mine, blocks[i][0], b_ptr)
        stride_be = tl.where(mine, blocks[i][1][0], stride_be)
        stride_br = tl.where(mine, blocks[i][1][1], stride_br)
        stride_bn = tl.where(mine, blocks[i][1][2], stride_bn)
        first = tl.where(mine, RANKS[i][0], first)
        rank = tl.where(mine, RANKS[i][1], rank)
    # Ranks up to BLOCK_R are padding: zeros on both sides, which add nothing.
    r = tl.arange(0, BLOCK_R)
    r_ok = r < rank
    s_ptrs = s_ptr + first + rows[:, None].to(tl.int64) * stride_s + r[None, :]
    b_ptrs = (
        b_ptr + expert.to(tl.int64) * stride_be + r[:, None] * stride_br + cols[None, :] * stride_bn
    )
    s = tl.load(s_ptrs, mask=r_ok[None, :], other=0.0)
    b = tl.load(b_ptrs, mask=r_ok[:, None], other=0.0)
    return s, b


@triton.jit
def _add_low_rank(
    acc, s_ptr, stride_s, blocks, block, rows, cols, expert, RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr
):  # fmt: skip
    """acc + s @ b[expert], of this tile's rows and columns."""
    s, b = load_low_rank(s_ptr, stride_s, blocks, block, rows, cols, expert, RANKS, BLOCK_R)
    return tl.dot(s, b, acc, input_precision="ieee")


@triton.jit
def _gemm_tile(
    x_ptr, w_ptr, s_ptr, blocks, y_ptr, source_ptr, expert, row0, end, column_tile, block_columns,
    K, stride_x, w_strides, w_pitch, stride_s, stride_y,
    RANKS: tl.constexpr, HAS_SOURCE: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr,
    W_NK: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute and store the tile of rows from ``row0`` on and of columns by their number."""
    # Tiles of columns go through block 0, then block 1; the last of each may be ragged.
    tiles_of_block = tl.cdiv(block_columns, BLOCK_N)
    block = column_tile // tiles_of_block
    n0 = (column_tile % tiles_of_block) * BLOCK_N
    first_col = block * block_columns  # of the block, in w and y
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)
    row_ok = rows < end
    col_ok = cols < block_columns
    # Rows and columns beyond the edge read a valid address and are never stored: loads need no
    # mask. Where there is no such column the compiler must see that: else it takes contiguous
    # weights element by element, through registers.
    rows = tl.where(row_ok, rows, row0)
    safe_cols = cols if EVEN_N else tl.where(col_ok, cols, 0)
    k = tl.arange(0, BLOCK_K)
    if not X_TMA:
        from_rows = tl.load(source_ptr + rows) if HAS_SOURCE else rows
        x_ptrs = x_ptr + from_rows[:, None].to(tl.int64) * stride_x + k[None, :]
    if not W_TMA:
        stride_we, stride_wk, stride_wn = w_strides
        w_expert = w_ptr + expert.to(tl.int64) * stride_we  # E K N overflows int32 on large models
        w_ptrs = w_expert + k[:, None] * stride_wk + (first_col + safe_cols)[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_ok = k0 + k < K
        x = x_ptr.load([row0, k0]) if X_TMA else _load_k(x_ptrs, k_ok[None, :], EVEN_K)
        if W_TMA:
            w = load_from_stack(w_ptr, expert * w_pitch, k0, first_col + n0, W_NK)
        else:
            w = _load_k(w_ptrs, k_ok[:, None], EVEN_K)
        # ieee: products of float32 are not rounded to TF32. For 16 bits it changes nothing.
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if not X_TMA:
            x_ptrs += BLOCK_K
        if not W_TMA:
            w_ptrs += BLOCK_K * stride_wk
    if BLOCK_R > 0:
        acc = _add_low_rank(
            acc, s_ptr, stride_s, blocks, block, rows, safe_cols, expert, RANKS, BLOCK_R
        )
    y_ptrs = y_ptr + rows[:, None].to(tl.int64) * stride_y + (first_col + cols)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def _gemm_kernel(
    # x (T or M, K), w (E, K, N), s (M, R), blocks of b: see _launch, y (M, N)
    x_ptr, w_ptr, s_ptr, blocks, y_ptr,
    offsets_ptr, source_ptr,             # (E,) and (M,) int32
    num_experts, block_columns, K, stride_x, w_strides, w_pitch, stride_s, stride_y,
    RANKS: tl.constexpr, HAS_SOURCE: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr,
    W_NK: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PERSISTENT: tl.constexpr, GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program owns one tile or, if persistent, every num_programs-th of them.

    x and w are descriptors where they are read by TMA: w over a matrix in which expert e begins at
    row e * w_pitch.
    """
    table = tile_table(offsets_ptr, num_experts, EXPERTS, BLOCK_M)
    tiles_n = tl.cdiv(block_columns, BLOCK_N) * len(RANKS)
    if PERSISTENT:
        num_tiles = tl.sum(table[3], 0)
        for t in range(tl.program_id(0), num_tiles * tiles_n, tl.num_programs(0)):
            # GROUP tiles of rows, of whatever experts, share a tile of columns before the next one
            # is read.
            group = t // (GROUP * tiles_n)
            within = t % (GROUP * tiles_n)
            size = tl.minimum(num_tiles - group * GROUP, GROUP)
            expert, row0, end = find_tile(
                table, group * GROUP + within % size, num_experts, BLOCK_M
            )
            _gemm_tile(
                x_ptr, w_ptr, s_ptr, blocks, y_ptr, source_ptr, expert, row0, end, within // size,
                block_columns, K,
                stride_x, w_strides, w_pitch, stride_s, stride_y, RANKS, HAS_SOURCE, X_TMA, W_TMA,
                W_NK,
                EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
    else:
        tile = tl.program_id(0) // tiles_n
        column_tile = tl.program_id(0) % tiles_n
        expert, row0, end = find_tile(table, tile, num_experts, BLOCK_M)
        # The grid is an upper bound of the tiles: programs beyond the last one have no expert.
        if expert < num_experts:
            _gemm_tile(
                x_ptr, w_ptr, s_ptr, blocks, y_ptr, source_ptr, expert, row0, end, column_tile,
                block_columns, K,
                stride_x, w_strides, w_pitch, stride_s, stride_y, RANKS, HAS_SOURCE, X_TMA, W_TMA,
                W_NK,
                EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip


# ---- 2. launcher ---------------------------------------------------------------------------------


def grouped_gemm_triton(
    x: torch.Tensor, w_EKN: torch.Tensor, routing: Routing,
    s_MR: torch.Tensor | None = None, b: Factors | None = None,
    source_M: torch.Tensor | None = None,
    *, variant: Variant | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute ``x[source] @ w[e] + s @ b[e]``.

    Args:
        x: ``[T, K]`` with unit stride in its last dimension; s too. w and b may have any strides.
        b: blocks, as in ``grouped_gemm.py``.
        variant: how to compute it; None: as ``tuned.choose`` says.

    Raises:
        ValueError: the variant asked for cannot run on these operands or this device.
    """
    product = product_of(x, w_EKN, routing, s_MR, b, source_M)
    limits = device_limits(x.device)
    if variant is None:
        variant = choose_variant(product, x.device)
        # Addresses and strides are not among the sizes that the choice was made by.
        if tma_problem(variant, x, w_EKN):
            variant = rule(product, *limits)
    elif why := problem(variant, product, *limits) or tma_problem(variant, x, w_EKN):
        raise ValueError(f"grouped_gemm_triton: {variant} cannot run: {why}")
    y_MN = x.new_empty(routing.num_rows, w_EKN.shape[2])
    if y_MN.numel():
        _launch(x, w_EKN, routing, s_MR, b, source_M, y_MN, product, variant)
    return y_MN


def _launch(
    x: torch.Tensor, w_EKN: torch.Tensor, routing: Routing, s_MR: torch.Tensor | None,
    b: Factors | None,
    source_M: torch.Tensor | None, y_MN: torch.Tensor, product: Product, variant: Variant,
) -> None:  # fmt: skip
    num_experts, K, N = w_EKN.shape
    stride_s, blocks, ranks = low_rank_operands(s_MR, b, N, x)
    block_columns = N // len(blocks)
    x_operand: Any = x
    w_operand: Any = w_EKN
    w_pitch = 0
    if variant.rows == "tma":
        x_operand = rows_descriptor(x, (variant.block_m, variant.block_k))
    if variant.weight == "tma":
        w_operand, w_pitch = stack_descriptor(w_EKN, variant.block_k, variant.block_n)
    tiles = max_tiles(routing.num_rows, num_experts, variant.block_m)
    # Columns vary fastest over programs, so that neighbours read the same rows of x from L2.
    programs = tiles * len(blocks) * triton.cdiv(block_columns, variant.block_n)
    if variant.persistent:
        programs = min(programs, num_multiprocessors(x.device))
    _gemm_kernel[(programs,)](
        x_operand, w_operand, pointer(s_MR, x), blocks, y_MN,
        routing.offsets_E, pointer(source_M, routing.offsets_E),
        num_experts, block_columns, K, x.stride(0), w_EKN.stride(), w_pitch, stride_s,
        y_MN.stride(0),
        RANKS=ranks, HAS_SOURCE=source_M is not None,
        X_TMA=variant.rows == "tma", W_TMA=variant.weight == "tma", W_NK=product.op == "forward",
        EVEN_K=K % variant.block_k == 0, EVEN_N=block_columns % variant.block_n == 0,
        PERSISTENT=variant.persistent, GROUP=GROUP_TILES,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_M=variant.block_m, BLOCK_N=variant.block_n, BLOCK_K=variant.block_k,
        BLOCK_R=tile_rank(max(rank for _, rank in ranks)),
        num_warps=variant.num_warps, num_stages=variant.num_stages,
    )  # fmt: skip


def low_rank_operands(
    s_MR: torch.Tensor | None, b: Factors | None, num_columns: int, anything: torch.Tensor
) -> tuple[int, tuple[Any, ...], tuple[tuple[int, int], ...]]:
    """Return the stride of s; then of every block b and its strides, and its first column of s and
    rank.

    Where nothing is there a kernel still wants a tensor, which it does not read: ``anything``.
    """
    if s_MR is None or b is None:
        return 0, ((anything, (0, 0, 0)),), ((0, 0),)
    # A block without adapter has rank 0: its loads are masked off, whatever they point at.
    operands: list[Any] = [(s_MR, (0, 0, 0))] * len(b)
    ranks = [(0, 0)] * len(b)
    block_columns = num_columns // len(b)
    for b_ErN, columns, columns_of_s in columns_and_ranks(b, num_columns):
        i = columns.start // block_columns
        operands[i] = (b_ErN, b_ErN.stride())
        ranks[i] = (columns_of_s.start, b_ErN.shape[1])
    return s_MR.stride(0), tuple(operands), tuple(ranks)


# ---- 3. what a launch depends on -----------------------------------------------------------------


def product_of(
    x: torch.Tensor, w_EKN: torch.Tensor, routing: Routing, s_MR: torch.Tensor | None,
    b: Factors | None,
    source_M: torch.Tensor | None,
) -> Product:  # fmt: skip
    """Return what the choice of a variant depends on."""
    num_experts, K, N = w_EKN.shape
    rank = 0
    blocks = 1
    if s_MR is not None and b is not None:
        rank = s_MR.shape[1]
        blocks = len(b)
    return Product(
        op="forward" if by_columns(w_EKN) else "dgrad", dtype=x.dtype, N=N, K=K, rank=rank,
        gathered=source_M is not None, rows_per_expert=routing.num_rows / num_experts,
        blocks=blocks,
    )  # fmt: skip


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many programs of one per multiprocessor run at once; a few for the interpreter."""
    if device.type == "cpu":
        # Fewer than tiles even in small tests, and odd, so that walks end at different places.
        return 5
    return torch.cuda.get_device_properties(device).multi_processor_count


def tma_problem(variant: Variant, x: torch.Tensor, w_EKN: torch.Tensor) -> str | None:
    """Return why TMA cannot read these operands, or None; ``problem`` judges the variant."""
    operands: list[tuple[str, torch.Tensor]] = []
    if variant.rows == "tma":
        operands.append(("x", x))
    if variant.weight == "tma":
        operands.append(("the weight", w_EKN))
    for name, operand in operands:
        if why := why_not_described(name, operand):
            return why
    return None

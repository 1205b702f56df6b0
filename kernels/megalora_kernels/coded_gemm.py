"""Compute the grouped GEMM from 4- and 8-bit codes, which are decoded while they are loaded.

    y[m] = x[source m] @ w[e]ᵀ + s[m] @ b[e]        for the rows m of expert e

Weights have the bits that ``QuantisedWeight.decode_into`` writes: the product of value and scale in
float32, rounded to x's dtype. Only the forward pass comes here; the input gradient decodes first.

A tile is computed transposed, ``yᵀ = w xᵀ``: the decoded weight is the first operand, which
Hopper's tensor cores take from the registers where it was made. x is the second, whose side may be
short, so that an expert with few rows wastes little.

Decoding in the load path is work for every tile of rows; decoding first is work once, and traffic.
Where an expert has few rows the former is less (``in_load``):

    experts of one layer of Qwen3-30B-A3B, 604 M weights, H100 (3.35 TB/s; 132 SMs issue 4
    instructions of 32 lanes at 1.755 GHz)                              nf4         fp8
    decoding first: codes read, bfloat16 written and read again         0.46 ms     0.54 ms
    the loop for a tile of 128 rows, instructions for a weight          9.4         6.8
    the loop, if nothing overlaps: 604 M n / (132 x 4 x 32 x 1.755e9)   0.19 ms     0.14 ms
    tiles of rows for which decoding in load costs less                 2.4         3.9

An expert of 256 rows on average has 2 to 3 such tiles, so codes are decoded in load up to there.
Instructions are counted in compiled code, times derived; not yet measured on a GPU.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank
p, q rows and columns of W with one scale
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from .absent import pointer
from .expert_factors import Factors
from .gemm_kernel import load_low_rank, low_rank_operands
from .grouped_gemm import grouped_gemm_ref
from .quantised_weight import NF4, QuantisedWeight
from .routing import Routing
from .tiles import max_tiles, tile_of
from .variants import HOPPER, device_limits, tile_rank

# ---- 1. reference --------------------------------------------------------------------------------


def coded_gemm_ref(
    x: torch.Tensor, weight: QuantisedWeight, routing: Routing,
    s_MR: torch.Tensor | None = None, b: Factors | None = None,
    source_M: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The specification: decoded whole, then multiplied."""
    w_EKN = weight.dequantised(x.dtype).transpose(1, 2)
    return grouped_gemm_ref(x, w_EKN, routing, s_MR, b, source_M)


# ---- 2. kernel -----------------------------------------------------------------------------------


@triton.jit
def _fp8_values(codes, NATIVE: tl.constexpr):
    """Float32 values of float8_e4m3fn bits."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    else:
        # The same sign, exponent and mantissa in a float16 are the value times 2^-8, below
        # float16's least normal number too. Exponent and mantissa all ones are NaN.
        bits = codes.to(tl.uint16)
        moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        values = moved.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), values)


@triton.jit
def _sum_over_k(
    x_ptrs, codes_ptrs, scales_ptrs, table_ptr, K,
    NF4: tl.constexpr, NATIVE_FP8: tl.constexpr, Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w xᵀ (BLOCK_N, BLOCK_M) from pointers at the first column.

    BLOCK_K bytes of codes a turn: one tile's columns at once where two are in a byte, else Q or
    a part of them.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if NF4:
        # Sixteen values in registers: a look-up is a shuffle within the warp.
        table = tl.load(table_ptr + tl.arange(0, 16))
        table = tl.broadcast_to(table[None, :], (BLOCK_N, 16))
    for k0 in range(0, K, Q if NF4 else BLOCK_K):
        codes = tl.load(codes_ptrs)
        scale = tl.load(scales_ptrs + k0 // Q)[:, None]
        x = tl.load(x_ptrs)
        if NF4:
            # The first half of the tile's columns, then the second.
            low = tl.gather(table, (codes & 15).to(tl.int32), 1)
            acc = tl.dot((low * scale).to(x.dtype), x, acc, input_precision="ieee")
            high = tl.gather(table, (codes >> 4).to(tl.int32), 1)
            x = tl.load(x_ptrs + BLOCK_K)
            acc = tl.dot((high * scale).to(x.dtype), x, acc, input_precision="ieee")
            x_ptrs += Q
        else:
            w = _fp8_values(codes, NATIVE_FP8) * scale
            acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
        codes_ptrs += BLOCK_K
    return acc


@triton.jit
def _coded_gemm_kernel(
    # x (T or M, K), codes (E, N, bytes), scales (E, N / p, K / q), s (M, R), blocks of b, y (M, N)
    x_ptr, codes_ptr, scales_ptr, table_ptr, s_ptr, blocks, y_ptr,
    offsets_ptr, source_ptr,             # (E,) and (M,) int32
    num_experts, block_columns, K, p, stride_x, stride_ce, stride_cn, stride_qe, stride_qn,
    stride_s, stride_y,
    NF4: tl.constexpr, NATIVE_FP8: tl.constexpr, Q: tl.constexpr,
    RANKS: tl.constexpr, HAS_SOURCE: tl.constexpr, EVEN_N: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of one expert and BLOCK_N columns of one block of b."""
    tiles_of_block = tl.cdiv(block_columns, BLOCK_N)
    tiles_n = tiles_of_block * len(RANKS)
    column_tile = tl.program_id(0) % tiles_n
    block = column_tile // tiles_of_block
    expert, row0, end = tile_of(
        offsets_ptr, tl.program_id(0) // tiles_n, num_experts, EXPERTS, BLOCK_M
    )
    # The grid is an upper bound of the tiles: programs beyond the last one have no expert.
    if expert < num_experts:
        rows = row0 + tl.arange(0, BLOCK_M)
        cols = (column_tile % tiles_of_block) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_ok = rows < end
        col_ok = cols < block_columns
        # Beyond the edges a valid address is read, and nothing is stored.
        rows = tl.where(row_ok, rows, row0)
        safe_cols = cols if EVEN_N else tl.where(col_ok, cols, 0)
        n = block * block_columns + safe_cols  # row of W
        from_rows = tl.load(source_ptr + rows) if HAS_SOURCE else rows
        k = tl.arange(0, BLOCK_K)
        expert_64 = expert.to(tl.int64)  # E N K overflows int32 on large models
        x_ptrs = x_ptr + from_rows[None, :].to(tl.int64) * stride_x + k[:, None]
        codes_ptrs = codes_ptr + expert_64 * stride_ce + n[:, None] * stride_cn + k[None, :]
        scales_ptrs = scales_ptr + expert_64 * stride_qe + (n // p) * stride_qn
        acc = _sum_over_k(
            x_ptrs, codes_ptrs, scales_ptrs, table_ptr, K, NF4, NATIVE_FP8, Q, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        if BLOCK_R > 0:
            s, b = load_low_rank(
                s_ptr, stride_s, blocks, block, rows, safe_cols, expert, RANKS, BLOCK_R
            )
            acc = tl.dot(tl.trans(b), tl.trans(s), acc, input_precision="ieee")
        cols += block * block_columns
        y_ptrs = y_ptr + rows[None, :].to(tl.int64) * stride_y + cols[:, None]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_ok[None, :] & col_ok[:, None])


# ---- 3. launcher ---------------------------------------------------------------------------------

FP8_UNITS = (8, 9)
"""Compute capability from which a GPU converts float8."""
MOST_K = 64
"""Columns of fp8 in one turn of the loop."""
LEAST_K = 16
"""Terms that tensor cores add at once."""


@dataclass(frozen=True)
class CodedTile:
    """How one product is computed."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


TILES = (CodedTile(32, 128, 4, 4), CodedTile(64, 128, 8, 4), CodedTile(128, 128, 8, 3))
"""Of half precision. 128 columns by 4 warps are 128 weights a thread and turn: 190 registers at 64
rows, where 8 warps take 128."""


def tile_for(
    dtype: torch.dtype, rows_per_expert: float, capability: tuple[int, int] = HOPPER
) -> CodedTile:
    """The tile whose rows are about twice an expert's mean, so that most experts are decoded
    once. Before Hopper warps share columns, and eight of them would decode a weight twice."""
    if dtype == torch.float32:  # no tensor cores in full precision
        return CodedTile(32, 32, num_warps=4, num_stages=2)
    if capability < HOPPER:
        return TILES[0]
    for tile in TILES[:-1]:
        if 2 * rows_per_expert <= tile.block_m:
            return tile
    return TILES[-1]


def coded_gemm_triton(
    x: torch.Tensor, weight: QuantisedWeight, routing: Routing,
    s_MR: torch.Tensor | None = None, b: Factors | None = None,
    source_M: torch.Tensor | None = None,
    *, tile: CodedTile | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute ``x[source] @ w[e]ᵀ + s @ b[e]``.

    Args:
        x: ``[T, K]`` with unit stride in its last dimension; s too. b may have any strides.
        b: blocks ``[E, R_i, N / n]``, as in ``grouped_gemm.py``.
        tile: how to compute it; None: as ``tile_for`` says.

    Raises:
        ValueError: the kernel cannot read these codes.
    """
    if why := why_not_in_load(weight):
        raise ValueError(f"coded_gemm_triton: {why}")
    weight = weight.with_scales()
    num_experts, N, K = weight.sizes
    y_MN = x.new_empty(routing.num_rows, N)
    if y_MN.numel() == 0:
        return y_MN
    capability = device_limits(x.device)[1]
    tile = tile or tile_for(x.dtype, routing.num_rows / num_experts, capability)
    stride_s, blocks, ranks = low_rank_operands(s_MR, b, N, x)
    block_columns = N // len(blocks)
    p, q = weight.grain
    nf4 = weight.form == "nf4"
    # Columns vary fastest over programs, so that neighbours read the same rows of x from L2.
    programs = max_tiles(routing.num_rows, num_experts, tile.block_m)
    programs *= len(blocks) * triton.cdiv(block_columns, tile.block_n)
    _coded_gemm_kernel[(programs,)](
        x, weight.codes, weight.scales, nf4_table(x.device) if nf4 else weight.scales,
        pointer(s_MR, x), blocks, y_MN,
        routing.offsets_E, pointer(source_M, routing.offsets_E),
        num_experts, block_columns, K, p, x.stride(0), *weight.codes.stride()[:2],
        *weight.scales.stride()[:2], stride_s, y_MN.stride(0),
        NF4=nf4, NATIVE_FP8=capability >= FP8_UNITS, Q=q,
        RANKS=ranks, HAS_SOURCE=source_M is not None,
        EVEN_N=block_columns % tile.block_n == 0,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=q // 2 if nf4 else min(q, MOST_K),
        BLOCK_R=tile_rank(max(rank for _, rank in ranks)),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y_MN


# ---- 4. which to take ----------------------------------------------------------------------------

IN_LOAD_ROWS = 256.0
"""Rows per expert, on average, up to which codes are decoded in the load path: derived above."""
IN_LOAD_ROWS_BEFORE_HOPPER = 64.0
"""The same where every 32 rows decode anew. A100 (108 SMs, 1.41 GHz, 2 TB/s): 8.0 instructions for
a weight of nf4, 15.3 of fp8 take 0.25 and 0.48 ms a tile; decoding first takes 1.4 and 1.5 ms."""
ENV_IN_LOAD = "MEGALORA_IN_LOAD_ROWS"
"""Variable of the environment with another number; 0: never."""


@cache
def nf4_table(device: torch.device) -> torch.Tensor:
    """Values of the 4-bit codes, once on each device."""
    return torch.tensor(NF4, device=device)


def why_not_in_load(weight: QuantisedWeight) -> str | None:
    """Return what keeps the kernel from reading these codes, or None."""
    q = weight.grain[1]
    # A turn of the loop has one scale for a row: two products of q / 2 terms, or one of q.
    least = 2 * LEAST_K if weight.form == "nf4" else LEAST_K
    if q < least or q & (q - 1):
        return (
            f"{weight.form} codes with a scale for each {q} columns: the kernel takes powers of two"
            f" from {least} on"
        )
    return None


def in_load(weight: QuantisedWeight, routing: Routing) -> bool:
    """Whether to decode while loading: M / E is known on the host, so nothing waits.

    Raises:
        ValueError: ``MEGALORA_IN_LOAD_ROWS`` is not a number of rows.
    """
    most = _most_rows(device_limits(weight.codes.device)[1])
    few = routing.num_rows <= most * routing.num_experts
    return most > 0 and few and why_not_in_load(weight) is None


def _most_rows(capability: tuple[int, int]) -> float:
    text = os.environ.get(ENV_IN_LOAD) or None
    usual = IN_LOAD_ROWS if capability >= HOPPER else IN_LOAD_ROWS_BEFORE_HOPPER
    if text is None:
        return usual
    if not text.isdecimal():
        raise ValueError(
            f"the environment variable {ENV_IN_LOAD} is {text!r}, want rows per expert up to which"
            f" codes are decoded while loading, 0 for never; unset it for {usual:g}"
        )
    return float(text)

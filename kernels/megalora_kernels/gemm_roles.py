"""Compute the grouped GEMM with roles: one warp group of a program copies, the others multiply.

Triton 3.6 divides the loop over K so on Hopper, under conditions that ``variants.problem`` checks:
every operand by TMA, the adapter's too, and a kernel that finds its tile by scalar loads alone. So
a small launch, once for each routing and tile height, lists the tiles.

Never taken by the rule, only where a table of measurements names it. Compiled, not yet run on a
GPU; its values are checked in the interpreter.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from .descriptors import by_columns, load_from_stack, rows_descriptor, stack_descriptor
from .routing import Routing
from .tiles import max_tiles, tile_of
from .variants import Variant

# ---- 1. kernels ----------------------------------------------------------------------------------


@triton.jit
def _tile_list_kernel(
    offsets_ptr, tiles_ptr, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr
):
    """Write (expert, first row, end row of the expert, 0) of one tile, zeros where there is
    none."""
    tile = tl.program_id(0)
    expert, row0, end = tile_of(offsets_ptr, tile, num_experts, EXPERTS, ROWS)
    there = expert < num_experts
    tiles_ptr += 4 * tile
    tl.store(tiles_ptr, tl.where(there, expert, 0))
    tl.store(tiles_ptr + 1, tl.where(there, row0, 0))
    tl.store(tiles_ptr + 2, tl.where(there, end, 0))
    tl.store(tiles_ptr + 3, 0)


@triton.jit
def _gemm_roles_kernel(
    x_desc, w_desc, s_desc, b_desc, y_ptr, tiles_ptr, N, K, w_pitch, b_pitch, stride_y,
    W_NK: tl.constexpr, B_NR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program owns one tile. Without a tile it takes no step of the loop and stores nothing."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    n0 = (tl.program_id(0) % blocks_n) * BLOCK_N
    tiles_ptr += 4 * tile
    expert = tl.load(tiles_ptr)
    row0 = tl.load(tiles_ptr + 1)
    end = tl.load(tiles_ptr + 2)
    k_end = tl.where(row0 < end, K, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in tl.range(0, k_end, BLOCK_K, warp_specialize=True):
        x = x_desc.load([row0, k0])
        w = load_from_stack(w_desc, expert * w_pitch, k0, n0, W_NK)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if BLOCK_R > 0:
        s = s_desc.load([row0, 0])
        b = load_from_stack(b_desc, expert * b_pitch, 0, n0, B_NR)
        acc = tl.dot(s, b, acc, input_precision="ieee")
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + rows[:, None].to(tl.int64) * stride_y + cols[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows < end)[:, None])


# ---- 2. launchers --------------------------------------------------------------------------------


def tile_list(routing: Routing, block_m: int) -> torch.Tensor:
    """Return int32 ``[tiles, 4]``: expert, first and end row of each; made once for a routing."""
    if block_m not in routing.tile_lists:
        num_experts = routing.num_experts
        tiles = max_tiles(routing.num_rows, num_experts, block_m)
        made = routing.offsets_E.new_empty(tiles, 4)
        _tile_list_kernel[(tiles,)](
            routing.offsets_E,
            made,
            num_experts,
            EXPERTS=triton.next_power_of_2(num_experts),
            ROWS=block_m,
        )
        routing.tile_lists[block_m] = made
    return routing.tile_lists[block_m]


def launch_with_roles(
    x_MK: torch.Tensor, w_EKN: torch.Tensor, routing: Routing, s_MR: torch.Tensor | None,
    b_ERN: torch.Tensor | None,
    y_MN: torch.Tensor, variant: Variant,
) -> None:  # fmt: skip
    """Fill ``y_MN`` from operands that fit the variant, as was checked before."""
    _, K, N = w_EKN.shape
    tiles = tile_list(routing, variant.block_m)
    x_desc = rows_descriptor(x_MK, (variant.block_m, variant.block_k))
    w_desc, w_pitch = stack_descriptor(w_EKN, variant.block_k, variant.block_n)
    rank = 0 if s_MR is None or b_ERN is None else s_MR.shape[1]
    # Without adapter the kernel reads neither s nor b, but its arguments must be descriptors.
    s_desc = x_desc
    b_desc = w_desc
    b_pitch = w_pitch
    if s_MR is not None and b_ERN is not None:
        s_desc = rows_descriptor(s_MR, (variant.block_m, rank))
        b_desc, b_pitch = stack_descriptor(b_ERN, rank, variant.block_n)
    _gemm_roles_kernel[(tiles.shape[0] * triton.cdiv(N, variant.block_n),)](
        x_desc, w_desc, s_desc, b_desc, y_MN, tiles, N, K, w_pitch, b_pitch, y_MN.stride(0),
        W_NK=by_columns(w_EKN), B_NR=b_ERN is not None and by_columns(b_ERN),
        BLOCK_M=variant.block_m, BLOCK_N=variant.block_n, BLOCK_K=variant.block_k, BLOCK_R=rank,
        num_warps=variant.num_warps, num_stages=variant.num_stages,
    )  # fmt: skip

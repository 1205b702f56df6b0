"""Which rows a program owns: tiles that never cross an expert, found on the device.

Rows are sorted by expert and ``offsets[e]`` is where expert e ends. Cut into tiles of ROWS rows, E experts have at most
``M / ROWS + E`` tiles: a bound the host knows without reading a count, so nothing waits for the device. Programs beyond the
last tile find no expert and return.
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and unpacks tuples in kernels: Python's
# rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl


def max_tiles(num_rows: int, num_experts: int, rows_per_tile: int) -> int:
    """Upper bound of the number of tiles, whatever the routing."""
    return int(triton.cdiv(num_rows, rows_per_tile)) + num_experts


@triton.jit
def tile_table(offsets_ptr, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Per expert: its number, first row, end row, number of tiles, number of tiles up to and including its own.

    EXPERTS is a power of two, at least num_experts.
    """
    i = tl.arange(0, EXPERTS)
    end = tl.load(offsets_ptr + i, mask=i < num_experts, other=0)
    start = tl.load(offsets_ptr + i - 1, mask=(i > 0) & (i < num_experts), other=0)
    tiles = tl.where(i < num_experts, (end - start + ROWS - 1) // ROWS, 0)
    return i, start, end, tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(table, tile, num_experts, ROWS: tl.constexpr):
    """(expert, first row of the tile, end row of the expert) of tile ``tile``; expert == num_experts: no such tile."""
    i, start, end, tiles, tiles_end = table
    expert = tl.sum(((tiles_end <= tile) & (i < num_experts)).to(tl.int32), 0)
    mine = i == expert
    first_tile = tl.sum(tl.where(mine, tiles_end - tiles, 0), 0)
    first_row = tl.sum(tl.where(mine, start, 0), 0) + (tile - first_tile) * ROWS
    return expert, first_row, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def tile_of(offsets_ptr, tile, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The same, where a program looks up one tile alone."""
    return find_tile(tile_table(offsets_ptr, num_experts, EXPERTS, ROWS), tile, num_experts, ROWS)


@triton.jit
def _sum_tiles_kernel(
    part_ptr, out_ptr, offsets_ptr, num_experts, D,  # part (tiles, D) float32, out (E, D), both row-major
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of part[t] over the tiles t of expert e, first to last: the same bits on every run."""
    expert, d = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, _start, _end, tiles, tiles_end = tile_table(offsets_ptr, num_experts, EXPERTS, ROWS)
    last = tl.sum(tl.where(i == expert, tiles_end, 0), 0)
    first = last - tl.sum(tl.where(i == expert, tiles, 0), 0)
    acc, part_ptrs = tl.zeros((BLOCK,), tl.float32), part_ptr + first.to(tl.int64) * D + d
    for _ in range(first, last):
        acc += tl.load(part_ptrs, mask=d < D, other=0.0)
        part_ptrs += D
    tl.store(out_ptr + expert.to(tl.int64) * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


def sum_tiles(part: torch.Tensor, offsets_E: torch.Tensor, rows_per_tile: int, dtype: torch.dtype) -> torch.Tensor:
    """Partial sums ``[tiles, ...]`` (float32) to ``[E, ...]`` in ``dtype``; an expert without tiles gets zeros."""
    num_experts, num_elements = offsets_E.numel(), part[0].numel()
    out = torch.empty(num_experts, *part.shape[1:], dtype=dtype, device=part.device)
    block = min(1024, triton.next_power_of_2(num_elements))
    _sum_tiles_kernel[(num_experts, triton.cdiv(num_elements, block))](
        part, out, offsets_E, num_experts, num_elements,
        EXPERTS=triton.next_power_of_2(num_experts), ROWS=rows_per_tile, BLOCK=block,
    )  # fmt: skip
    return out

"""Which rows a program owns: tiles that never cross an expert, found on the device.

Rows are sorted by expert and ``offsets[e]`` is where expert e ends. Cut into tiles of ROWS rows, E
experts have at most ``M / ROWS + E`` tiles: a bound the host knows without reading a count, so
nothing waits for the device. Programs beyond the last tile find no expert and return.
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

CHUNK_ROWS = 1024
"""Rows whose part of a weight gradient one program makes; see ``sums.py``."""


def max_tiles(num_rows: int, num_experts: int, rows_per_tile: int) -> int:
    """Upper bound of the number of tiles, whatever the routing."""
    return int(triton.cdiv(num_rows, rows_per_tile)) + num_experts


@triton.jit
def tile_table(offsets_ptr, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Per expert: its number, first row, end row, number of tiles, number of tiles up to and
    including its own.

    EXPERTS is a power of two, at least num_experts.
    """
    i = tl.arange(0, EXPERTS)
    end = tl.load(offsets_ptr + i, mask=i < num_experts, other=0)
    start = tl.load(offsets_ptr + i - 1, mask=(i > 0) & (i < num_experts), other=0)
    tiles = tl.where(i < num_experts, (end - start + ROWS - 1) // ROWS, 0)
    return i, start, end, tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(table, tile, num_experts, ROWS: tl.constexpr):
    """(expert, first row of the tile, end row of the expert) of tile ``tile``; expert ==
    num_experts: no such tile."""
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

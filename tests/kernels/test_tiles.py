"""Check that tiles cover every row exactly once, never cross an expert, and are no more than the
bound that the host knows."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from megalora_kernels.tiles import max_tiles, tile_of

from tests.kernels.oracle import expert_of_rows


@triton.jit
def _cover(
    offsets_ptr,
    covered_ptr,
    owner_ptr,
    seen_ptr,
    num_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What every kernel does: own ROWS rows of one expert, or return."""
    expert, row0, end = tile_of(offsets_ptr, tl.program_id(0), num_experts, EXPERTS, ROWS)
    tl.store(seen_ptr + tl.program_id(0), expert)
    if expert < num_experts:
        rows = row0 + tl.arange(0, ROWS)
        tl.atomic_add(covered_ptr + rows, 1, mask=rows < end)
        tl.store(owner_ptr + rows, expert, mask=rows < end)


def cover(counts: list[int], rows_per_tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(how often each row is owned, by which expert, the expert of each program)."""
    offsets = torch.tensor(counts).cumsum(0).int()
    num_rows = sum(counts)
    # three more than are ever launched
    programs = max_tiles(num_rows, len(counts), rows_per_tile) + 3
    # One row more than there are: a store beyond the last row lands there and is not lost.
    covered = torch.zeros(num_rows + 1, dtype=torch.int32)
    owner = torch.full((num_rows + 1,), -1, dtype=torch.int32)
    seen = torch.full((programs,), -1, dtype=torch.int32)
    experts = triton.next_power_of_2(len(counts))
    _cover[(programs,)](
        offsets, covered, owner, seen, len(counts), EXPERTS=experts, ROWS=rows_per_tile
    )
    return covered[:num_rows], owner[:num_rows], seen


COUNTS = st.lists(st.integers(0, 19), min_size=1, max_size=9)


@given(counts=COUNTS, rows_per_tile=st.sampled_from([1, 4, 16]))
def test_every_row_is_owned_once_by_its_own_expert(counts, rows_per_tile):
    covered, owner, seen = cover(counts, rows_per_tile)
    assert (covered == 1).all()
    assert owner.tolist() == expert_of_rows(counts)
    needed = [triton.cdiv(count, rows_per_tile) for count in counts]
    expected = expert_of_rows(needed)
    # Programs beyond the last tile see expert E, which there is not, and return.
    assert seen.tolist() == expected + [len(counts)] * (len(seen) - len(expected))
    assert sum(needed) <= max_tiles(sum(counts), len(counts), rows_per_tile)


# No rows; whole tiles; idle experts before and behind the only busy one; one row each.
@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [16], [0, 0, 5], [5, 0, 0], [1] * 8], ids=str)
def test_at_the_edges(counts):
    covered, owner, _ = cover(counts, 4)
    assert (covered == 1).all()
    assert owner.tolist() == expert_of_rows(counts)


def test_the_bound_is_reached_but_for_one_tile_an_expert():
    """E - 1 experts of one row and one of the rest need M / ROWS + E - 1 tiles at worst; M / ROWS
    would lose rows."""
    counts = [1, 1, 1, 29]
    rows = 8
    # A tile each for the experts of one row, four for the one of 29.
    needed = sum(triton.cdiv(count, rows) for count in counts)
    # 32 rows / 8 = 4 tiles would do without experts; the bound is 4 + 4 experts.
    assert needed == 7 > triton.cdiv(sum(counts), rows) == 4
    assert needed <= max_tiles(sum(counts), len(counts), rows) == 8

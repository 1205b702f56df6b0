"""Build the routing of rows that an all-to-all delivered once for each rank: this rank's experts
read them, sorted by expert, from where they are.

``destinations.py`` is the other end. Each rank sends rows, and for each pair of a row and one of
this rank's experts its place in the table of slots and its routing probability. Pairs come in
blocks, one for each rank and expert, whose lengths are known: a block's place in either order is
the sum of the lengths before it. One launch; every place is written by exactly one program, and
nothing waits for the device.

Shape legend: N received rows   M pairs   E experts of this rank   R ranks that send   S slots
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .routing import Routing, as_outputs, assembled, check_rows

SPLITS = 4
"""Programs that share one block of pairs."""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """What arrived with the rows."""

    counts_RE: torch.Tensor
    """int, pairs from each rank for each expert; on the device."""
    rows_R: torch.Tensor
    """int, rows from each rank; on the device."""
    places_M: torch.Tensor
    """int32: ``row S + j`` for the pair that is the j-th of its row, in the order in which pairs
    arrived: by rank, then by expert. Each rank numbers its own rows."""
    num_rows: int
    """N, known from the exchange."""
    num_slots: int
    """S: experts that a row goes to, at most."""

    @classmethod
    def single(cls, counts_RE: torch.Tensor, num_rows: int) -> "Arrivals":
        """Rows that go to one expert each: pairs and rows are the same."""
        rows_R = counts_RE.sum(1)
        row_M = torch.arange(num_rows, device=counts_RE.device)
        first_row_M = _exclusive(rows_R).repeat_interleave(rows_R, output_size=num_rows)
        return cls(counts_RE, rows_R, (row_M - first_row_M).int(), num_rows, 1)


# ---- 1. reference --------------------------------------------------------------------------------


def regroup_ref(arrivals: Arrivals) -> tuple[Routing, torch.Tensor]:
    """The specification: the routing, and int64 ``[M]`` where each pair that arrived has gone."""
    counts_RE = arrivals.counts_RE
    num_pairs = arrivals.places_M.shape[0]
    num_slots = arrivals.num_slots
    counts_ER = counts_RE.t()
    # Row-major over [R, E] is the order of arrival, over [E, R] the sorted one.
    start_RE = _exclusive(counts_RE)
    start_ER = _exclusive(counts_ER)  # of the same blocks once sorted by expert
    shift_RE = start_ER.t() - start_RE
    # All pairs of a block move by the same distance.
    pair_M = torch.arange(num_pairs, device=counts_RE.device)
    sorted_M = pair_M + shift_RE.reshape(-1).repeat_interleave(
        counts_RE.reshape(-1), output_size=num_pairs
    )
    # A rank's places begin behind the rows of the ranks before it.
    first_row_M = _exclusive(arrivals.rows_R).repeat_interleave(
        counts_RE.sum(1), output_size=num_pairs
    )
    slot_M = first_row_M * num_slots + arrivals.places_M
    slots = torch.full((arrivals.num_rows * num_slots,), -1, device=counts_RE.device)
    slots[slot_M] = sorted_M
    source_M = torch.empty_like(sorted_M)
    source_M[sorted_M] = slot_M // num_slots
    offsets_E = counts_RE.sum(0).cumsum(0).to(torch.int32)
    slots_NS = slots.view(arrivals.num_rows, num_slots).int()
    return Routing(offsets_E, num_pairs, source_M.int(), slots_NS), sorted_M


def _exclusive(counts: torch.Tensor) -> torch.Tensor:
    """Where each block starts when blocks follow each other in row-major order; the same shape."""
    return F.pad(counts.reshape(-1).cumsum(0), (1, -1)).view(counts.shape)


# ---- 2. kernel -----------------------------------------------------------------------------------
# ``debug`` makes the assertion one; the checks of every integer sum that come with it are turned
# off in the launch.


@triton.jit(debug=True)
def _regroup_kernel(
    # counts (R, E) int, rows (R,) int, places, values and moved (M,)
    counts_ptr, rows_ptr, places_ptr, values_ptr,
    # (E,), (M,), (N, S) and (M,) int32
    offsets_ptr, source_ptr, slots_ptr, sorted_ptr, moved_ptr,
    num_ranks, num_experts, num_rows, num_pairs, num_slots,
    stride_r, stride_e, stride_rows, stride_place, stride_value,
    RANKS: tl.constexpr, EXPERTS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SPLITS programs share the pairs that one rank sent for one expert."""
    rank = tl.program_id(0) // num_experts
    expert = tl.program_id(0) % num_experts
    split = tl.program_id(1)
    of_rank = tl.arange(0, RANKS)
    r = of_rank[:, None]
    e = tl.arange(0, EXPERTS)[None, :]
    ok = (r < num_ranks) & (e < num_experts)
    counts = tl.load(counts_ptr + r * stride_r + e * stride_e, mask=ok, other=0).to(tl.int32)
    rows = tl.load(rows_ptr + of_rank * stride_rows, mask=of_rank < num_ranks, other=0)
    rows = rows.to(tl.int32)
    tl.device_assert(
        (tl.sum(tl.sum(counts, 1), 0) == num_pairs) & (tl.sum(rows, 0) == num_rows),
        "counts do not add up to the number of rows",
    )
    # Blocks follow each other by rank as they arrive and by expert once sorted.
    arrived_before = (r < rank) | ((r == rank) & (e < expert))
    sorted_before = (e < expert) | ((e == expert) & (r < rank))
    arrived = tl.sum(tl.sum(tl.where(arrived_before, counts, 0), 1), 0)
    pair = tl.sum(tl.sum(tl.where(sorted_before, counts, 0), 1), 0)
    count = tl.sum(tl.sum(tl.where((r == rank) & (e == expert), counts, 0), 1), 0)
    first_row = tl.sum(tl.where(of_rank < rank, rows, 0), 0)
    if (tl.program_id(0) == 0) & (split == 0):
        ends = tl.cumsum(tl.sum(counts, 0), 0)
        which = tl.arange(0, EXPERTS)
        tl.store(offsets_ptr + which, ends, mask=which < num_experts)
    # SPLITS programs take turns at the block, BLOCK pairs at a time.
    for i0 in range(split * BLOCK, count, SPLITS * BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        mine = i < count
        # Places and values may lie beside each other, as they travelled; int64 before the stride.
        at = (arrived + i).to(tl.int64)
        place = tl.load(places_ptr + at * stride_place, mask=mine, other=0)
        slot = first_row * num_slots + place
        tl.store(source_ptr + pair + i, slot // num_slots, mask=mine)
        tl.store(slots_ptr + slot, pair + i, mask=mine)
        tl.store(sorted_ptr + arrived + i, pair + i, mask=mine)
        value = tl.load(values_ptr + at * stride_value, mask=mine, other=0.0)
        tl.store(moved_ptr + pair + i, value, mask=mine)


# ---- 3. launcher ---------------------------------------------------------------------------------


def regroup_triton(
    arrivals: Arrivals, values_M: torch.Tensor
) -> tuple[Routing, torch.Tensor, torch.Tensor]:
    """The routing, int32 ``[M]`` where each pair that arrived has gone, and the values (as they
    arrived) sorted by expert."""
    counts_RE = arrivals.counts_RE
    num_ranks, num_experts = counts_RE.shape
    num_pairs = values_M.shape[0]
    new = {"dtype": torch.int32, "device": counts_RE.device}
    offsets_E = torch.empty(num_experts, **new)
    source_M = torch.empty(num_pairs, **new)
    sorted_M = torch.empty(num_pairs, **new)
    # A row has as many slots as it goes to experts; the others stay empty.
    slots_NS = torch.full((arrivals.num_rows, arrivals.num_slots), -1, **new)
    moved_M = values_M.new_empty(num_pairs)
    _regroup_kernel[(num_ranks * num_experts, SPLITS)](
        counts_RE, arrivals.rows_R, arrivals.places_M, values_M, offsets_E, source_M, slots_NS,
        sorted_M, moved_M,
        num_ranks, num_experts, arrivals.num_rows, num_pairs, arrivals.num_slots,
        *counts_RE.stride(), *arrivals.rows_R.stride(), *arrivals.places_M.stride(),
        *values_M.stride(),
        RANKS=triton.next_power_of_2(num_ranks), EXPERTS=triton.next_power_of_2(num_experts),
        SPLITS=SPLITS, BLOCK=512, sanitize_overflow=False,
    )  # fmt: skip
    return Routing(offsets_E, num_pairs, source_M, slots_NS), sorted_M, moved_M


# ---- 4. autograd ---------------------------------------------------------------------------------


class _RegroupValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_M: torch.Tensor, arrivals: Arrivals) -> tuple[torch.Tensor, ...]:
        if values_M.is_cuda:
            routing, sorted_M, moved_M = regroup_triton(arrivals, values_M)
        else:
            routing, sorted_M = regroup_ref(arrivals)
            sorted_M = sorted_M.int()
            moved_M = torch.empty_like(values_M, memory_format=torch.contiguous_format)
            moved_M[sorted_M.long()] = values_M
        ctx.save_for_backward(sorted_M)
        return moved_M, *as_outputs(ctx, routing)  # pyright: ignore[reportReturnType]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dmoved_M: torch.Tensor | None, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if dmoved_M is None:
            return None, None
        # Forward scattered along a permutation, so backward gathers along it.
        (sorted_M,) = ctx.saved_tensors
        return dmoved_M.index_select(0, sorted_M), None


# ---- 5. public function --------------------------------------------------------------------------


def regroup_values(arrivals: Arrivals, values_M: torch.Tensor) -> tuple[Routing, torch.Tensor]:
    """Routing of received rows, and one value of each pair (its routing probability) sorted by
    expert.

    Args:
        arrivals: what arrived with the rows.
        values_M: in the order in which the pairs arrived.

    Returns:
        The routing, and the values ``[M]`` sorted by expert; differentiable once in ``values_M``.

    Raises:
        ValueError: more rows or slots than int32 numbers. On a GPU counts that do not add up to the
            rows and pairs that arrived are a device-side assertion.
    """
    check_rows(values_M.shape[0], f"{values_M.shape[0]} pairs of received rows and experts")
    num_slots = arrivals.num_rows * arrivals.num_slots
    check_rows(num_slots, f"{num_slots} slots of received rows")
    moved_M, *indexes = _RegroupValues.apply(values_M, arrivals)  # pyright: ignore
    return assembled(moved_M, indexes), moved_M

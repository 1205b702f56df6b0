"""Build the routing of rows that an all-to-all delivered: sorted by sending rank, to be read sorted
by expert.

Each rank sends its rows sorted by this rank's experts, so rows come in blocks, one for each rank
and expert, whose lengths are known: a block's place in either order is the sum of the lengths
before it. One launch; every place is written by exactly one program, and nothing waits for the
device. A value of each row (its routing probability) is moved in the same launch.

Shape legend: M received rows   E experts of this rank   R ranks that send
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .absent import pointer
from .routing import Routing, as_outputs, assembled, check_rows

SPLITS = 4
"""Programs that share one block of rows."""

# ---- 1. reference --------------------------------------------------------------------------------


def regroup_ref(counts_RE: torch.Tensor, num_rows: int) -> Routing:
    """The specification."""
    counts_ER = counts_RE.t()
    # Row-major over [R, E] is the order of arrival, over [E, R] the sorted one.
    start_RE = _exclusive(counts_RE)
    start_ER = _exclusive(counts_ER)  # of the same blocks once sorted by expert
    shift_ER = start_RE.t() - start_ER
    # All rows of a block move by the same distance, in one direction and back.
    row_M = torch.arange(num_rows, device=counts_RE.device)
    source_M = row_M + shift_ER.reshape(-1).repeat_interleave(
        counts_ER.reshape(-1), output_size=num_rows
    )
    slots_M = row_M - shift_ER.t().reshape(-1).repeat_interleave(
        counts_RE.reshape(-1), output_size=num_rows
    )
    offsets_E = counts_RE.sum(0).cumsum(0).to(torch.int32)
    return Routing(offsets_E, num_rows, source_M.int(), slots_M.int()[:, None].contiguous())


def _exclusive(counts: torch.Tensor) -> torch.Tensor:
    """Where each block starts when blocks follow each other in row-major order; the same shape."""
    return F.pad(counts.reshape(-1).cumsum(0), (1, -1)).view(counts.shape)


# ---- 2. kernel -----------------------------------------------------------------------------------
# ``debug`` makes the assertion one; the checks of every integer sum that come with it are turned
# off in the launch.


@triton.jit(debug=True)
def _regroup_kernel(
    # counts (R, E) int, values and moved (M,)
    counts_ptr, values_ptr, offsets_ptr, source_ptr, slots_ptr, moved_ptr,
    num_ranks, num_experts, num_rows, stride_r, stride_e,
    HAS_VALUES: tl.constexpr, RANKS: tl.constexpr, EXPERTS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """SPLITS programs share the rows that one rank sent for one expert."""
    rank = tl.program_id(0) // num_experts
    expert = tl.program_id(0) % num_experts
    split = tl.program_id(1)
    r = tl.arange(0, RANKS)[:, None]
    e = tl.arange(0, EXPERTS)[None, :]
    ok = (r < num_ranks) & (e < num_experts)
    counts = tl.load(counts_ptr + r * stride_r + e * stride_e, mask=ok, other=0).to(tl.int32)
    tl.device_assert(
        tl.sum(tl.sum(counts, 1), 0) == num_rows, "counts do not add up to the number of rows"
    )
    # Blocks follow each other by rank as they arrive and by expert once sorted.
    arrived_before = (r < rank) | ((r == rank) & (e < expert))
    sorted_before = (e < expert) | ((e == expert) & (r < rank))
    arrived = tl.sum(tl.sum(tl.where(arrived_before, counts, 0), 1), 0)
    row = tl.sum(tl.sum(tl.where(sorted_before, counts, 0), 1), 0)
    count = tl.sum(tl.sum(tl.where((r == rank) & (e == expert), counts, 0), 1), 0)
    if (tl.program_id(0) == 0) & (split == 0):
        ends = tl.cumsum(tl.sum(counts, 0), 0)
        place = tl.arange(0, EXPERTS)
        tl.store(offsets_ptr + place, ends, mask=place < num_experts)
    # SPLITS programs take turns at the block, BLOCK rows at a time.
    for i0 in range(split * BLOCK, count, SPLITS * BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        mine = i < count
        tl.store(source_ptr + row + i, arrived + i, mask=mine)
        tl.store(slots_ptr + arrived + i, row + i, mask=mine)
        if HAS_VALUES:
            tl.store(
                moved_ptr + row + i,
                tl.load(values_ptr + arrived + i, mask=mine, other=0.0),
                mask=mine,
            )


# ---- 3. launcher ---------------------------------------------------------------------------------


def regroup_triton(
    counts_RE: torch.Tensor, num_rows: int, values_M: torch.Tensor | None = None
) -> tuple[Routing, torch.Tensor | None]:
    """The routing, and the values (as they arrived) sorted by expert."""
    num_ranks, num_experts = counts_RE.shape
    new = {"dtype": torch.int32, "device": counts_RE.device}
    offsets_E = torch.empty(num_experts, **new)
    source_M = torch.empty(num_rows, **new)
    slots_MK = torch.empty(num_rows, 1, **new)
    moved_M = None
    if values_M is not None:
        moved_M = values_M.new_empty(num_rows)
    _regroup_kernel[(num_ranks * num_experts, SPLITS)](
        counts_RE, pointer(values_M, offsets_E), offsets_E, source_M, slots_MK,
        pointer(moved_M, offsets_E), num_ranks, num_experts, num_rows,
        *counts_RE.stride(),
        HAS_VALUES=values_M is not None, RANKS=triton.next_power_of_2(num_ranks),
        EXPERTS=triton.next_power_of_2(num_experts), SPLITS=SPLITS, BLOCK=512,
        sanitize_overflow=False,
    )  # fmt: skip
    return Routing(offsets_E, num_rows, source_M, slots_MK), moved_M


# ---- 4. autograd ---------------------------------------------------------------------------------


class _RegroupValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_M: torch.Tensor, counts_RE: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        routing, sorted_M = _regroup(counts_RE, values_M.shape[0], values_M)
        ctx.save_for_backward(routing.slots_TK)
        return sorted_M, *as_outputs(ctx, routing)  # pyright: ignore[reportReturnType]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dsorted_M: torch.Tensor | None, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if dsorted_M is None:
            return None, None
        # slots is the inverse of source, by which forward gathered.
        (slots_MK,) = ctx.saved_tensors
        return dsorted_M.index_select(0, slots_MK.view(-1)), None


def _regroup(
    counts_RE: torch.Tensor, num_rows: int, values_M: torch.Tensor | None = None
) -> tuple[Routing, torch.Tensor | None]:
    check_rows(num_rows, f"{num_rows} received rows")
    if counts_RE.is_cuda:
        if values_M is not None:
            values_M = values_M.contiguous()
        return regroup_triton(counts_RE, num_rows, values_M)
    routing = regroup_ref(counts_RE, num_rows)
    assert routing.source_M is not None
    if values_M is None:
        return routing, None
    return routing, values_M.index_select(0, routing.source_M)


# ---- 5. public functions -------------------------------------------------------------------------


def regroup(counts_RE: torch.Tensor, num_rows: int) -> Routing:
    """Routing of rows received from R ranks, each of which sends its rows sorted by this rank's
    experts.

    Args:
        counts_RE: int, rows from each rank for each expert; on the device.
        num_rows: M, known from the exchange.

    Raises:
        ValueError: more rows than int32 numbers. On a GPU counts that do not add up to ``num_rows``
            are a device-side assertion.
    """
    return _regroup(counts_RE, num_rows)[0]


def regroup_values(counts_RE: torch.Tensor, values_M: torch.Tensor) -> tuple[Routing, torch.Tensor]:
    """``regroup``, and one value of each row (its routing probability) sorted likewise.

    Args:
        counts_RE: int, rows from each rank for each expert; on the device.
        values_M: in the order in which the rows arrived.

    Returns:
        The routing, and the values ``[M]`` sorted by expert; differentiable once in ``values_M``.
    """
    sorted_M, *indexes = _RegroupValues.apply(values_M, counts_RE)  # pyright: ignore
    return assembled(sorted_M, indexes), sorted_M

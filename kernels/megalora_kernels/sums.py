"""Sums over each expert's rows that several kernels make in parts, added in one launch.

A kernel that owns a chunk of rows leaves its part of a weight gradient in float32. All parts of a
backward pass lie in one buffer, a row for each chunk: one launch adds an expert's rows first to
last, so the bits are the same on every run, and writes each gradient in the layout of its
parameter. SwiGLU's backward leaves parts of dp as well, one for each block of its columns; the same
launch adds them, first block to last.

Shape legend: M routed rows   E experts   P, Q rows and columns of one gradient
D elements of all gradients of an expert
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from . import tiles
from .routing import Routing
from .tiles import max_tiles, tile_table

Shapes = Sequence[tuple[int, int] | None]
"""(P, Q) of each gradient; None for one that nobody wants."""
MAX_GRADIENTS = 5
"""A twice and B three times: what an expert's three projections have."""

# ---- 1. reference --------------------------------------------------------------------------------


class TorchSums:
    """The same interface where kernels leave whole sums: nothing is left to add."""

    def __init__(self, routing: Routing, like: torch.Tensor, shapes: Shapes) -> None:
        self.places = [
            None if shape is None else like.new_empty(routing.num_experts, *shape)
            for shape in shapes
        ]
        """``[E, P, Q]`` of each gradient, to be filled."""
        self.dp_M: torch.Tensor | None = None

    def finish(self) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        return self.dp_M, self.places


# ---- 2. kernel -----------------------------------------------------------------------------------


@triton.jit
def _segment_of(d, end, start_1, start_2, start_3, start_4):
    """(first element, element behind the last) of the gradient that each element of a part belongs
    to."""
    first = tl.zeros_like(d)
    stop = tl.zeros_like(d) + end
    first = tl.where(d >= start_1, start_1, first)
    first = tl.where(d >= start_2, start_2, first)
    first = tl.where(d >= start_3, start_3, first)
    first = tl.where(d >= start_4, start_4, first)
    stop = tl.where(d < start_4, start_4, stop)
    stop = tl.where(d < start_3, start_3, stop)
    stop = tl.where(d < start_2, start_2, stop)
    stop = tl.where(d < start_1, start_1, stop)
    return first, stop


@triton.jit
def _sum_parts_kernel(
    # part (chunks, D) float32, out: the gradients (E, P, Q) one after the other
    part_ptr, out_ptr, offsets_ptr,
    dp_part_ptr, dp_ptr,             # (blocks, M) float32 and (M,)
    num_experts, D, num_rows, num_dp_blocks, start_1, start_2, start_3, start_4,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK elements of one expert, or of dp. Gradients start at 0 and start_1 to
    start_4 of a part."""
    blocks = tl.cdiv(D, BLOCK)
    program = tl.program_id(0)
    acc = tl.zeros((BLOCK,), tl.float32)
    if program < num_experts * blocks:
        expert = program // blocks
        d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        i, _start, _end, chunks, chunks_end = tile_table(offsets_ptr, num_experts, EXPERTS, ROWS)
        last = tl.sum(tl.where(i == expert, chunks_end, 0), 0)
        first = last - tl.sum(tl.where(i == expert, chunks, 0), 0)
        part_ptrs = part_ptr + first.to(tl.int64) * D + d
        for _ in range(first, last):
            acc += tl.load(part_ptrs, mask=d < D, other=0.0)
            part_ptrs += D
        start, stop = _segment_of(d, D, start_1, start_2, start_3, start_4)
        place = (
            start.to(tl.int64) * num_experts + expert.to(tl.int64) * (stop - start) + (d - start)
        )
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    else:
        rows = (program - num_experts * blocks) * BLOCK + tl.arange(0, BLOCK)
        dp_ptrs = dp_part_ptr + rows
        for _ in range(0, num_dp_blocks):
            acc += tl.load(dp_ptrs, mask=rows < num_rows, other=0.0)
            dp_ptrs += num_rows
        tl.store(dp_ptr + rows, acc.to(dp_ptr.dtype.element_ty), mask=rows < num_rows)


# ---- 3. launcher ---------------------------------------------------------------------------------


class TritonSums:
    """Gradients of one backward pass that kernels fill in parts."""

    def __init__(self, routing: Routing, like: torch.Tensor, shapes: Shapes) -> None:
        assert len([shape for shape in shapes if shape]) <= MAX_GRADIENTS
        self.routing = routing
        self.dtype = like.dtype
        self.shapes = shapes
        sizes = [0 if shape is None else shape[0] * shape[1] for shape in shapes]
        self.starts = [0, *accumulate(sizes)]
        chunks = max_tiles(routing.num_rows, routing.num_experts, tiles.CHUNK_ROWS)
        self.part = torch.empty(chunks, self.starts[-1], dtype=torch.float32, device=like.device)
        self.places = [
            None if shape is None else self.part[:, start : start + size].view(chunks, *shape)
            for shape, start, size in zip(shapes, self.starts, sizes, strict=False)
        ]
        """``[chunks, P, Q]`` of each gradient, float32, to be filled."""
        self.dp_part: torch.Tensor | None = None
        """``[blocks, M]`` float32."""
        self.dp_dtype = torch.float32

    def finish(self) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """dp ``[M]`` where parts of it were left, and each gradient ``[E, P, Q]``, zero for an
        expert without rows."""
        E = self.routing.num_experts
        D = self.starts[-1]
        num_rows = self.routing.num_rows
        out = torch.empty(E * D, dtype=self.dtype, device=self.part.device)
        dp_part = self.dp_part
        dp_M = (
            None
            if dp_part is None
            else torch.empty(num_rows, dtype=self.dp_dtype, device=self.part.device)
        )
        block = max(
            16, min(1024, int(triton.next_power_of_2(max(D, num_rows if dp_M is not None else 0))))
        )
        programs = E * int(triton.cdiv(D, block)) + (
            0 if dp_M is None else int(triton.cdiv(num_rows, block))
        )
        # Where each gradient after the first starts; the end of the part for those that are not
        # there.
        starts = sorted({start for start in self.starts if 0 < start < D})
        starts += [D] * (MAX_GRADIENTS - 1 - len(starts))
        if programs:
            _sum_parts_kernel[(programs,)](
                self.part, out, self.routing.offsets_E, self.part if dp_part is None else dp_part,
                out if dp_M is None else dp_M, E, D, num_rows,
                0 if dp_part is None else dp_part.shape[0], *starts,
                EXPERTS=triton.next_power_of_2(E), ROWS=tiles.CHUNK_ROWS, BLOCK=block,
            )  # fmt: skip
        # parts are no longer needed
        self.part = out
        self.places = []
        self.dp_part = None
        spans = zip(self.shapes, self.starts, self.starts[1:], strict=False)
        return dp_M, [None if s is None else out[E * i : E * j].view(E, *s) for s, i, j in spans]


Sums = TorchSums | TritonSums

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
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl

from . import tiles
from .absent import pointer
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
        self.places: list[torch.Tensor | None] = []
        """``[E, P, Q]`` of each gradient, to be filled."""
        for shape in shapes:
            place = None
            if shape is not None:
                place = like.new_empty(routing.num_experts, *shape)
            self.places.append(place)
        self.dp_M: torch.Tensor | None = None

    def finish(self) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        return self.dp_M, self.places


# ---- 2. kernel -----------------------------------------------------------------------------------


@triton.jit
def _segment_of(d, end, start_1, start_2, start_3, start_4):
    """(first element, element behind the last) of the gradient that each element of a part belongs
    to."""
    # Boundaries ascend: the last that is not beyond d is where its gradient starts, and the first
    # beyond d, looked for from the back, where that ends.
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
        # An expert's chunks are rows first to last of the buffer; none, and acc stays zero.
        part_ptrs = part_ptr + first.to(tl.int64) * D + d
        for _ in range(first, last):
            acc += tl.load(part_ptrs, mask=d < D, other=0.0)
            part_ptrs += D
        start, stop = _segment_of(d, D, start_1, start_2, start_3, start_4)
        # Out, gradient after gradient: [E, start..stop) each, so an expert's is that many
        # elements behind its neighbour's.
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
        # Elements of each gradient of one expert; a gradient that nobody wants takes no room.
        sizes = []
        for shape in shapes:
            num_rows, num_columns = shape or (0, 0)
            sizes.append(num_rows * num_columns)
        self.starts = [0, *accumulate(sizes)]
        chunks = max_tiles(routing.num_rows, routing.num_experts, tiles.CHUNK_ROWS)
        self.part = torch.empty(chunks, self.starts[-1], dtype=torch.float32, device=like.device)
        self.places: list[torch.Tensor | None] = []
        """``[chunks, P, Q]`` of each gradient, float32, to be filled."""
        for shape, (start, end) in zip(shapes, pairwise(self.starts), strict=True):
            place = None
            if shape is not None:
                place = self.part[:, start:end].view(chunks, *shape)
            self.places.append(place)
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
        dp_M = None
        dp_rows = 0
        num_dp_blocks = 0
        if dp_part is not None:
            dp_M = torch.empty(num_rows, dtype=self.dp_dtype, device=self.part.device)
            dp_rows = num_rows
            num_dp_blocks = dp_part.shape[0]
        # 1,024 elements for a program, fewer only where no sum is that long.
        block = max(16, min(1024, int(triton.next_power_of_2(max(D, dp_rows)))))
        # Blocks of each expert's gradients come first in the grid, then those of dp's rows.
        programs = E * int(triton.cdiv(D, block)) + int(triton.cdiv(dp_rows, block))
        # Where each gradient after the first starts; the end of the part for those that are not
        # there.
        starts = sorted({start for start in self.starts if 0 < start < D})
        starts += [D] * (MAX_GRADIENTS - 1 - len(starts))
        if programs:
            _sum_parts_kernel[(programs,)](
                self.part, out, self.routing.offsets_E, pointer(dp_part, self.part),
                pointer(dp_M, out), E, D, num_rows, num_dp_blocks, *starts,
                EXPERTS=triton.next_power_of_2(E), ROWS=tiles.CHUNK_ROWS, BLOCK=block,
            )  # fmt: skip
        # The parts are no longer needed: their memory is free for what backward does next.
        self.part = out
        self.places = []
        self.dp_part = None
        return dp_M, self._gradients(out)

    def _gradients(self, out: torch.Tensor) -> list[torch.Tensor | None]:
        """Views ``[E, P, Q]`` of the finished sums, which lie one gradient after the other."""
        E = self.routing.num_experts
        gradients: list[torch.Tensor | None] = []
        for shape, (start, end) in zip(self.shapes, pairwise(self.starts), strict=True):
            gradient = None
            if shape is not None:
                gradient = out[E * start : E * end].view(E, *shape)
            gradients.append(gradient)
        return gradients


Sums = TorchSums | TritonSums

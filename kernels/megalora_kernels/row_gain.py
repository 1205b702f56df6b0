"""Multiply every row of an expert by a number per output, as DoRA does, and differentiate that.

    y[m, n]  = g[e, n] u[source m, n]         for the rows m of expert e
    dg[e, n] = sum over the rows m of e of dy[source m, n] u[m, n]

g is float32: in bfloat16 a gain could not be told from 1. A program of the second kernel owns all
rows of an expert and adds them first to last, without atomics: the same bits on every run.

Shape legend: T source rows   M routed rows   E experts   N outputs
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .absent import pointer
from .routing import Routing
from .tiles import max_tiles, tile_of

ROWS = 16
"""Rows of one expert that a program of the product owns, and a step of a sum takes."""

# ---- 1. reference --------------------------------------------------------------------------------


def gain_rows_ref(
    u: torch.Tensor, g_EN: torch.Tensor, routing: Routing, source_M: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification, ``[M, N]`` in u's dtype; differentiable."""
    u_MN = u if source_M is None else u[source_M.long()]
    rows = []
    for e, i, j in routing.spans():
        # Rounded once: in the product's dtype, which is the wider of the two.
        rows.append((u_MN[i:j] * g_EN[e]).to(u.dtype))
    return torch.cat(rows)


# ---- 2. one product per expert -------------------------------------------------------------------


def gain_rows_loop(
    u: torch.Tensor, g_EN: torch.Tensor, routing: Routing, out_MN: torch.Tensor,
    source_M: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``out_MN``, which may be u itself where rows are not gathered."""
    for out, rows, g in zip(
        out_MN.split(routing.counts), _of_each(u, routing, source_M), g_EN.unbind(), strict=True
    ):
        torch.mul(rows, g, out=out)


def gain_gradient_loop(
    dy: torch.Tensor, u_MN: torch.Tensor, routing: Routing, out_EN: torch.Tensor,
    source_M: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``out_EN``, in its dtype; exact zeros where an expert has no rows."""
    for out, rows, u in zip(
        out_EN.unbind(),
        _of_each(dy, routing, source_M),
        u_MN.split(routing.counts),
        strict=True,
    ):
        # In the sum's dtype: a product of two bfloat16 is not one.
        torch.sum(rows.to(out.dtype) * u, 0, out=out)


def _of_each(
    x: torch.Tensor, routing: Routing, source_M: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """The rows of one expert after the other; gathered, they are copied for one at a time."""
    if source_M is None:
        yield from x.split(routing.counts)
        return
    for source in source_M.split(routing.counts):
        yield x.index_select(0, source)


# ---- 3. kernels ----------------------------------------------------------------------------------


@triton.jit
def _gain_rows_kernel(
    u_ptr, gain_ptr, offsets_ptr, source_ptr, out_ptr,
    num_experts, N, stride_u, stride_out,
    GATHERED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of one expert and BLOCK columns."""
    expert, first, end = tile_of(offsets_ptr, tl.program_id(0), num_experts, EXPERTS, ROWS)
    if expert < num_experts:
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row = first + tl.arange(0, ROWS)
        ok = (row < end)[:, None] & (n < N)[None, :]
        gain = tl.load(gain_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0.0)
        taken = row
        if GATHERED:
            taken = tl.load(source_ptr + row, mask=row < end, other=0)
        # int64 before the stride: M N exceeds 2^31 from 2^20 rows of 2,048 features on.
        u_ptrs = u_ptr + taken.to(tl.int64)[:, None] * stride_u + n[None, :]
        y = tl.load(u_ptrs, mask=ok, other=0.0).to(tl.float32) * gain[None, :]
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * stride_out + n[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _gain_gradient_kernel(
    dy_ptr, u_ptr, offsets_ptr, source_ptr, out_ptr,
    N, stride_dy, stride_u,
    GATHERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK columns of one expert."""
    # An expert's rows end where offsets say, and begin where those of the one before end.
    expert = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        ok = (row < end)[:, None] & (n < N)[None, :]
        taken = row
        if GATHERED:
            taken = tl.load(source_ptr + row, mask=row < end, other=0)
        dy_ptrs = dy_ptr + taken.to(tl.int64)[:, None] * stride_dy + n[None, :]
        u_ptrs = u_ptr + row.to(tl.int64)[:, None] * stride_u + n[None, :]
        dy = tl.load(dy_ptrs, mask=ok, other=0.0).to(tl.float32)
        u = tl.load(u_ptrs, mask=ok, other=0.0).to(tl.float32)
        acc += tl.sum(dy * u, 0)
    tl.store(out_ptr + expert.to(tl.int64) * N + n, acc, mask=n < N)


# ---- 4. launchers --------------------------------------------------------------------------------


def gain_rows_triton(
    u: torch.Tensor, g_EN: torch.Tensor, routing: Routing, out_MN: torch.Tensor,
    source_M: torch.Tensor | None = None,
) -> None:  # fmt: skip
    E, N = g_EN.shape
    if not routing.num_rows:  # a grid of no programs cannot be launched
        return
    # Rows are read once and gains once a tile: wide blocks.
    block = min(256, triton.next_power_of_2(N))
    grid = (max_tiles(routing.num_rows, E, ROWS), int(triton.cdiv(N, block)))
    _gain_rows_kernel[grid](
        u, g_EN.contiguous(), routing.offsets_E, pointer(source_M, routing.offsets_E), out_MN,
        E, N, u.stride(0), out_MN.stride(0),
        GATHERED=source_M is not None, EXPERTS=triton.next_power_of_2(E), ROWS=ROWS, BLOCK=block,
    )  # fmt: skip


def gain_gradient_triton(
    dy: torch.Tensor, u_MN: torch.Tensor, routing: Routing, out_EN: torch.Tensor,
    source_M: torch.Tensor | None = None,
) -> None:  # fmt: skip
    E, N = out_EN.shape
    # Narrow blocks: only as many programs as experts times blocks share the work.
    block = min(64, triton.next_power_of_2(N))
    _gain_gradient_kernel[(E, int(triton.cdiv(N, block)))](
        dy, u_MN, routing.offsets_E, pointer(source_M, routing.offsets_E), out_EN,
        N, dy.stride(0), u_MN.stride(0),
        GATHERED=source_M is not None, ROWS=ROWS, BLOCK=block,
    )  # fmt: skip

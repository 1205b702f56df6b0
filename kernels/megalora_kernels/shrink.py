"""Permute and shrink: gather rows and take them to rank space in the pass that reads them anyway.

    s[m] = x[source m] @ a[e]ᵀ        and, where a GEMM needs them in order, rows[m] = x[source m]

The copy is bound by memory, so the product rides along: S costs no traffic of its own. In backward the same kernel gathers
the output's gradient (the gradient of the combine) and makes dS = dy B.

Shape legend: T source rows   M routed rows   E experts   K features   R rank
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and unpacks tuples in kernels: Python's
# rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from .routing import Routing
from .tiles import max_tiles, tile_of

# ---- 1. reference ---------------------------------------------------------------------------------------------------


def shrink_ref(
    x: torch.Tensor, a_ERK: torch.Tensor, routing: Routing, source_M: torch.Tensor | None = None
) -> torch.Tensor:
    """S in x's dtype; differentiable."""
    x_MK = x if source_M is None else x[source_M.long()]
    return torch.cat([x_MK[i:j] @ a_ERK[e].T for e, i, j in routing.spans()])


# ---- 2. kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, s_ptr, rows_ptr,  # x (T or M, K), a (E, R, K), s (M, PAD), rows (M, K)
    offsets_ptr, source_ptr,        # (E,) and (M,) int32
    num_experts, K, stride_x, stride_ae, stride_ar, stride_ak, stride_s, stride_rows,
    R: tl.constexpr, PAD: tl.constexpr, HAS_SOURCE: tl.constexpr, COPY: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M rows of one expert. Columns R to PAD of s get zeros."""
    expert, row0, end = tile_of(offsets_ptr, tl.program_id(0), num_experts, EXPERTS, BLOCK_M)
    if expert < num_experts:
        rows = row0 + tl.arange(0, BLOCK_M)
        row_ok = rows < end
        from_rows = tl.load(source_ptr + rows, mask=row_ok, other=0) if HAS_SOURCE else rows
        r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
        a_ptr += expert.to(tl.int64) * stride_ae
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            ks = k0 + k
            ok = row_ok[:, None] & (ks < K)[None, :]
            x = tl.load(x_ptr + from_rows[:, None].to(tl.int64) * stride_x + ks[None, :], mask=ok, other=0.0)
            if COPY:
                tl.store(rows_ptr + rows[:, None].to(tl.int64) * stride_rows + ks[None, :], x, mask=ok)
            if R > 0:
                a_ok = (r < R)[None, :] & (ks < K)[:, None]
                a = tl.load(a_ptr + r[None, :] * stride_ar + ks[:, None] * stride_ak, mask=a_ok, other=0.0)
                acc = tl.dot(x, a, acc, input_precision="ieee")
        if R > 0:
            s_ptrs = s_ptr + rows[:, None].to(tl.int64) * stride_s + r[None, :]
            tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=row_ok[:, None] & (r < PAD)[None, :])


# ---- 3. launchers ---------------------------------------------------------------------------------------------------


def shrink_triton(
    x: torch.Tensor, a_ERK: torch.Tensor | None, routing: Routing, s_MP: torch.Tensor | None,
    source_M: torch.Tensor | None = None, rows_MK: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Fills ``s_MP`` (P >= R; the columns beyond R with zeros) and ``rows_MK``, either of which may be None."""
    num_experts, K = routing.num_experts, x.shape[1]
    rank, a, s = (0, x, x) if a_ERK is None or s_MP is None else (a_ERK.shape[1], a_ERK, s_MP)
    wide = x.dtype != torch.float32
    block_m, block_k = (64 if wide else 32), (128 if rank <= 64 else 64 if rank <= 128 else 32) // (1 if wide else 2)
    _shrink_kernel[(max_tiles(routing.num_rows, num_experts, block_m),)](
        x, a, s, x if rows_MK is None else rows_MK,
        routing.offsets_E, routing.offsets_E if source_M is None else source_M,
        num_experts, K, x.stride(0), *(a.stride() if rank else (0, 0, 0)), s.stride(0),
        0 if rows_MK is None else rows_MK.stride(0),
        R=rank, PAD=s.shape[1] if rank else 0, HAS_SOURCE=source_M is not None, COPY=rows_MK is not None,
        EXPERTS=triton.next_power_of_2(num_experts), BLOCK_M=block_m, BLOCK_K=block_k,
        BLOCK_R=max(16, triton.next_power_of_2(s.shape[1] if rank else 1)), num_warps=4 if rank <= 128 else 8, num_stages=3 if rank <= 128 else 2,
    )  # fmt: skip


def shrink_loop(
    x: torch.Tensor, a_ERK: torch.Tensor | None, routing: Routing, s_MP: torch.Tensor | None,
    source_M: torch.Tensor | None = None, rows_MK: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """The same, one GEMM per expert."""
    x_MK = x if source_M is None else x.index_select(0, source_M)
    if rows_MK is not None:
        rows_MK.copy_(x_MK)
    if a_ERK is None or s_MP is None:
        return
    rank = a_ERK.shape[1]
    if s_MP.shape[1] > rank:
        s_MP[:, rank:].zero_()
    counts = [j - i for _, i, j in routing.spans()]
    for s, rows, a in zip(
        s_MP[:, :rank].split(counts), x_MK.split(counts), a_ERK.transpose(1, 2).unbind(), strict=True
    ):
        torch.mm(rows, a, out=s)

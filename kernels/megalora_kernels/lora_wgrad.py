"""Weight gradients of the adapters: a product over each expert's rows.

    out[e] = g[rows of e]ᵀ x[source of those rows]        dA = outer(dS, X), dB = outer(S, dY)ᵀ

Rows are cut into chunks that never cross an expert; each chunk's product is kept in float32 and an
expert's chunks are added first to last. No atomics: the same bits on every run. An expert without
rows gets exact zeros.

Shape legend: T source rows   M routed rows   E experts   R rank   K features
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl

from . import tiles
from .absent import pointer
from .backend import choose_pass
from .each_expert import multiply_rows
from .gemm_kernel import grouped_gemm_triton
from .grouped_gemm import grouped_gemm_loop
from .routing import Routing, gather
from .shrink import shrink_loop, shrink_triton
from .sums import TorchSums, TritonSums
from .tiles import tile_of

# ---- 1. reference --------------------------------------------------------------------------------


def lora_wgrad_ref(
    g_MR: torch.Tensor, x: torch.Tensor, routing: Routing, source_M: torch.Tensor | None = None
) -> torch.Tensor:
    """``[E, R, K]`` in x's dtype; differentiable."""
    x_MK = gather(x, source_M)
    return torch.stack([g_MR[i:j].T @ x_MK[i:j] for _, i, j in routing.spans()])


# ---- 2. kernel -----------------------------------------------------------------------------------


@triton.jit
def _wgrad_kernel(
    # g (M, R), x (T or M, K), part (chunks, R, K) float32
    g_ptr, x_ptr, part_ptr, offsets_ptr, source_ptr,
    num_experts, K, stride_g, stride_x, stride_pc, stride_pr, stride_pk,
    R: tl.constexpr, HAS_SOURCE: tl.constexpr, EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program owns one chunk of rows and BLOCK_K features."""
    chunk = tl.program_id(0)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    expert, row0, end = tile_of(offsets_ptr, chunk, num_experts, EXPERTS, CHUNK)
    if expert < num_experts:
        r = tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for m0 in range(row0, tl.minimum(row0 + CHUNK, end), BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            row_ok = rows < end
            from_rows = rows
            if HAS_SOURCE:
                from_rows = tl.load(source_ptr + rows, mask=row_ok, other=0)
            # g is read transposed, (R, rows). Rows of the next expert and ranks beyond R must be
            # zeros: they are terms of the sum.
            g_ptrs = g_ptr + rows[None, :].to(tl.int64) * stride_g + r[:, None]
            g = tl.load(g_ptrs, mask=row_ok[None, :] & (r < R)[:, None], other=0.0)
            x_ptrs = x_ptr + from_rows[:, None].to(tl.int64) * stride_x + ks[None, :]
            x = tl.load(x_ptrs, mask=row_ok[:, None] & (ks < K)[None, :], other=0.0)
            acc = tl.dot(g, x, acc, input_precision="ieee")
        # A chunk has a place of its own, so no atomics; ``sums.py`` adds an expert's chunks.
        out = (
            part_ptr
            + chunk.to(tl.int64) * stride_pc
            + r[:, None] * stride_pr
            + ks[None, :] * stride_pk
        )
        tl.store(out, acc, mask=(r < R)[:, None] & (ks < K)[None, :])


# ---- 3. launchers --------------------------------------------------------------------------------


def lora_wgrad_triton(
    g_MR: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    part: torch.Tensor,
    source_M: torch.Tensor | None = None,
) -> None:
    """Fills ``part`` ``[chunks, R, K]``, any strides. g and x need unit stride in their last
    dimension."""
    num_experts = routing.num_experts
    rank = g_MR.shape[1]
    K = x.shape[1]
    # The accumulator (ranks, block_k) lives in registers: 64 float32 of a thread at rank 64.
    block_k = 64 if rank > 64 else 128
    _wgrad_kernel[(part.shape[0], triton.cdiv(K, block_k))](
        g_MR, x, part, routing.offsets_E, pointer(source_M, routing.offsets_E),
        num_experts, K, g_MR.stride(0), x.stride(0), *part.stride(), R=rank,
        HAS_SOURCE=source_M is not None,
        EXPERTS=triton.next_power_of_2(num_experts), CHUNK=tiles.CHUNK_ROWS,
        BLOCK_M=min(64, tiles.CHUNK_ROWS),
        BLOCK_K=block_k, BLOCK_R=max(16, triton.next_power_of_2(rank)), num_warps=4, num_stages=3,
    )  # fmt: skip


def lora_wgrad_loop(
    g_MR: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    out_ERK: torch.Tensor,
    source_M: torch.Tensor | None = None,
) -> None:
    """Fills ``out`` ``[E, R, K]``: one GEMM per expert; over no rows it gives exact zeros."""
    multiply_rows(g_MR, gather(x, source_M), routing, out_ERK)


# ---- 4. autograd ---------------------------------------------------------------------------------


class _LoRAWgrad(torch.autograd.Function):
    """Bilinear, so its gradients are a shrink and a grouped GEMM with the incoming gradient as the
    weight."""

    @staticmethod
    def forward(
        ctx: Any, g_MR: torch.Tensor, x_MK: torch.Tensor, offsets_E: torch.Tensor, triton_: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(g_MR, x_MK, offsets_E)
        ctx.triton = triton_
        routing = Routing(offsets_E, x_MK.shape[0])
        shapes = [(g_MR.shape[1], x_MK.shape[1])]
        # The kernel leaves one part per chunk of rows, the loop whole sums: ``finish`` adds parts.
        if triton_:
            sums = TritonSums(routing, x_MK, shapes)
            lora_wgrad_triton(g_MR, x_MK, routing, sums.places[0])  # pyright: ignore[reportArgumentType]
        else:
            sums = TorchSums(routing, x_MK, shapes)
            lora_wgrad_loop(g_MR, x_MK, routing, sums.places[0])  # pyright: ignore[reportArgumentType]
        _, (out_ERK,) = sums.finish()
        return out_ERK  # pyright: ignore[reportReturnType]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_ERK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g_MR, x_MK, offsets_E = ctx.saved_tensors
        routing = Routing(offsets_E, x_MK.shape[0])
        dg_MR = torch.empty_like(g_MR)
        # dg[m] = dout[e] x[m] is a shrink by dout; dx[m] = dout[e]ᵀ g[m] a product with it.
        if ctx.triton:
            shrink_triton(x_MK, (dout_ERK,), routing, dg_MR)
            dx_MK = grouped_gemm_triton(g_MR, dout_ERK, routing)
        else:
            shrink_loop(x_MK, (dout_ERK,), routing, dg_MR)
            dx_MK = grouped_gemm_loop(g_MR, dout_ERK, routing)
        return dg_MR, dx_MK, None, None


# ---- 5. public function --------------------------------------------------------------------------


def lora_wgrad(
    g_MR: torch.Tensor, x_MK: torch.Tensor, offsets_E: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Per-expert sum of outer products, deterministic. Differentiable once in g and x.

    Args:
        g_MR: gradients in rank space, rows sorted by expert; any strides.
        x_MK: what the adapter read, in g's dtype.
        offsets_E: int32, cumulative row ends.
        backend: "reference", "loop" or "triton"; None: triton on a GPU, loop elsewhere.

    Returns:
        ``[E, R, K]`` in x's dtype, summed in float32; zeros for experts without rows.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a back end that cannot run here.
    """
    if (
        g_MR.dim() != 2
        or x_MK.dim() != 2
        or g_MR.shape[0] != x_MK.shape[0]
        or g_MR.dtype != x_MK.dtype
    ):
        raise ValueError(
            "lora_wgrad: want g [M, R] and x [M, K] of one dtype; "
            f"got {g_MR.dtype} {tuple(g_MR.shape)} and {x_MK.dtype} {tuple(x_MK.shape)}"
        )
    if offsets_E.dim() != 1 or offsets_E.dtype != torch.int32:
        raise ValueError(
            f"lora_wgrad: offsets must be int32 [E]; got {offsets_E.dtype} {tuple(offsets_E.shape)}"
        )
    name = choose_pass(backend, "lora_wgrad", x_MK, g_MR.shape[1])
    if name == "reference":
        return lora_wgrad_ref(g_MR, x_MK, Routing(offsets_E, x_MK.shape[0]))
    return _LoRAWgrad.apply(
        g_MR.contiguous(), x_MK.contiguous(), offsets_E.contiguous(), name == "triton"
    )  # pyright: ignore

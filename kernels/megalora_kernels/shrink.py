"""Permute and shrink: gather rows and take them to rank space in the pass that reads them anyway.

    s[m] = scale * x[source m] @ a[e]ᵀ
    rows[m] = x[source m], where a GEMM needs the rows in order

The copy is bound by memory, so the product rides along: S costs no traffic of its own. In backward
the same kernel gathers the output's gradient (the gradient of the combine) and makes dS = scale dy
B.

Several projections of one fused weight have a factor each: factor i reads its own equal share of
x's columns and makes its own columns of S, one projection's ranks after the other's. So no
block-diagonal factor is built.

Shape legend: T source rows   M routed rows   E experts   K features   R rank, of all factors
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from .absent import pointer, row_stride, strides_of, width
from .each_expert import multiply
from .expert_factors import UNSCALED, Factors, RankScale
from .routing import Routing, gather
from .tiles import max_tiles, tile_of

# ---- 1. reference --------------------------------------------------------------------------------


def shrink_ref(
    x: torch.Tensor, a_ERK: torch.Tensor, routing: Routing, source_M: torch.Tensor | None = None
) -> torch.Tensor:
    """S in x's dtype, unscaled and of one factor; differentiable."""
    x_MK = gather(x, source_M)
    return torch.cat([x_MK[i:j] @ a_ERK[e].T for e, i, j in routing.spans()])


# ---- 2. kernel -----------------------------------------------------------------------------------


@triton.jit
def _add_factor(
    # x and rows (BLOCK_M, 1) at the first column
    acc, x_ptrs, rows_ptrs, row_ok, a_ptr, r, K, stride_ar, stride_ak,
    R: tl.constexpr, COPY: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add x @ aᵀ to the columns of acc whose r is in [0, R)."""
    k = tl.arange(0, BLOCK_K)
    # A projection without adapter has rank 0: its share of x is still copied, where rows are.
    if COPY or R > 0:
        for k0 in range(0, K, BLOCK_K):
            ks = k0 + k
            ok = row_ok[:, None] & (ks < K)[None, :]
            x = tl.load(x_ptrs + ks[None, :], mask=ok, other=0.0)
            if COPY:
                tl.store(rows_ptrs + ks[None, :], x, mask=ok)
            if R > 0:
                # Columns of acc outside [0, R) are the other factor's: zeros leave them alone.
                a_ok = ((r >= 0) & (r < R))[None, :] & (ks < K)[:, None]
                a = tl.load(
                    a_ptr + r[None, :] * stride_ar + ks[:, None] * stride_ak, mask=a_ok, other=0.0
                )
                acc = tl.dot(x, a, acc, input_precision="ieee")
    return acc


@triton.jit
def _shrink_kernel(
    # x (T or M, K), a and a2 (E, R, K), s (M, PAD), rows (M, K)
    x_ptr, a_ptr, a2_ptr, s_ptr, rows_ptr,
    offsets_ptr, source_ptr,                # (E,) and (M,) int32
    num_experts, K, stride_x, stride_ae, stride_ar, stride_ak, stride_a2e, stride_a2r, stride_a2k,
    stride_s, stride_rows,
    scale, scale2,                          # of columns before SPLIT, and of the rest
    FACTORS: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, SPLIT: tl.constexpr,
    PAD: tl.constexpr,
    HAS_SOURCE: tl.constexpr, COPY: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M rows of one expert. K counts the columns of one factor; columns R +
    R2 to PAD of s get zeros."""
    expert, row0, end = tile_of(offsets_ptr, tl.program_id(0), num_experts, EXPERTS, BLOCK_M)
    if expert < num_experts:
        rows = row0 + tl.arange(0, BLOCK_M)
        row_ok = rows < end
        from_rows = rows
        if HAS_SOURCE:
            from_rows = tl.load(source_ptr + rows, mask=row_ok, other=0)
        r = tl.arange(0, BLOCK_R)
        x_ptrs = x_ptr + from_rows[:, None].to(tl.int64) * stride_x
        rows_ptrs = rows_ptr + rows[:, None].to(tl.int64) * stride_rows
        # int64: E R K exceeds 2^31 on large models.
        expert_64 = expert.to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        a_ptr += expert_64 * stride_ae
        acc = _add_factor(
            acc, x_ptrs, rows_ptrs, row_ok, a_ptr, r, K, stride_ar, stride_ak, R, COPY, BLOCK_K
        )
        if FACTORS == 2:
            # The second projection's share of x begins K columns on, and its ranks come behind R.
            x_ptrs = x_ptrs + K
            rows_ptrs = rows_ptrs + K
            r2 = r - R
            a2_ptr += expert_64 * stride_a2e
            acc = _add_factor(
                acc, x_ptrs, rows_ptrs, row_ok, a2_ptr, r2, K, stride_a2r, stride_a2k, R2, COPY,
                BLOCK_K,
            )  # fmt: skip
        if R + R2 > 0:
            # In float32, before S is rounded: no scaled copy of a factor is made.
            acc *= tl.where(r < SPLIT, scale, scale2)[None, :]
            s_ptrs = s_ptr + rows[:, None].to(tl.int64) * stride_s + r[None, :]
            tl.store(
                s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=row_ok[:, None] & (r < PAD)[None, :]
            )


# ---- 3. launchers --------------------------------------------------------------------------------


def shrink_triton(
    x: torch.Tensor, factors: Factors, routing: Routing, s_MP: torch.Tensor | None,
    source_M: torch.Tensor | None = None, rows_MK: torch.Tensor | None = None,
    scale: RankScale = UNSCALED,
) -> None:  # fmt: skip
    """Fills ``s_MP`` (P >= R; the columns beyond R with zeros) and ``rows_MK``, either of which may
    be None."""
    num_experts = routing.num_experts
    K = x.shape[1] // len(factors)
    ranks = [0] * len(factors)
    padded = 0
    if s_MP is not None:
        ranks = [width(a) for a in factors]
        padded = s_MP.shape[1]
    rank = sum(ranks)
    if rank == 0:  # only the copy is made: nothing is written to S
        padded = 0
    s = pointer(s_MP, x)
    tile = _tile(rank, x.dtype)
    _shrink_kernel[(max_tiles(routing.num_rows, num_experts, tile["BLOCK_M"]),)](
        x, pointer(factors[0], x), pointer(factors[-1], x), s, pointer(rows_MK, x),
        routing.offsets_E, pointer(source_M, routing.offsets_E),
        num_experts, K, x.stride(0), *strides_of(factors[0]), *strides_of(factors[-1]),
        s.stride(0), row_stride(rows_MK),
        scale.first, scale.second,
        FACTORS=len(factors), R=ranks[0], R2=sum(ranks[1:]), SPLIT=scale.split,
        PAD=padded,
        HAS_SOURCE=source_M is not None, COPY=rows_MK is not None,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_R=max(16, triton.next_power_of_2(max(1, padded))), **tile,
    )  # fmt: skip


def _tile(rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Read what compiling showed: rows, features, warps and stages for ranks that fit registers.

    A tile of ``BLOCK_M`` rows has all rank columns, and the pipeline holds ``num_stages`` blocks of
    x and of A: the higher the rank, the fewer features at once.
    """
    if rank <= 64:
        block_k = 128
    elif rank <= 128:
        block_k = 64
    else:
        block_k = 32
    block_m = 64
    if dtype == torch.float32:  # twice the bytes, so half of each
        block_m = 32
        block_k //= 2
    warps, stages = (4, 3) if rank <= 128 else (8, 2)
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


def shrink_loop(
    x: torch.Tensor, factors: Factors, routing: Routing, s_MP: torch.Tensor | None,
    source_M: torch.Tensor | None = None, rows_MK: torch.Tensor | None = None,
    scale: RankScale = UNSCALED,
) -> None:  # fmt: skip
    """The same, one GEMM per expert and factor."""
    x_MK = gather(x, source_M)
    if rows_MK is not None:
        rows_MK.copy_(x_MK)
    if s_MP is None:
        return
    # Factor i reads its share of x's columns and makes the next columns of S.
    column = 0
    for x_MC, a_ERC in zip(x_MK.chunk(len(factors), 1), factors, strict=True):
        if a_ERC is None:
            continue
        s_MR = s_MP[:, column : column + a_ERC.shape[1]]
        column += a_ERC.shape[1]
        multiply(x_MC, a_ERC.transpose(1, 2), routing, out=s_MR)
    if s_MP.shape[1] > column:
        s_MP[:, column:].zero_()
    scale_columns(s_MP[:, :column], scale)


def scale_columns(s_MR: torch.Tensor, scale: RankScale) -> None:
    """S times its scale, in place."""
    if scale.first == scale.second:
        parts = ((s_MR, scale.first),)
    else:
        parts = ((s_MR[:, : scale.split], scale.first), (s_MR[:, scale.split :], scale.second))
    for s, factor in parts:
        if factor != 1:
            s.mul_(factor)

"""Grouped GEMM whose accumulator starts from the adapter's product.

    y[m] = x[source m] @ w[e] + s[m] @ b[e]        for the rows m of expert e

With w = Wᵀ, s = S = x Aᵀ, b = Bᵀ it is the forward pass of a LoRA linear; with w = W, s = dS = dy B, b = A its input
gradient. Three ways to compute it: one GEMM per expert on the host's loop, torch's grouped GEMM (CUTLASS on Hopper), Triton.

torch's grouped GEMM cannot start from an accumulator, but a product over [x | s] and [w ; b] is the same sum: ``Joined`` keeps
the frozen weight with room behind its rows and columns for B and A, so that this is one vendor GEMM with r more terms.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank (of both when gate and up are stacked)
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and unpacks tuples in kernels: Python's
# rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .routing import Routing
from .tiles import max_tiles, tile_of

ALIGN_BYTES = 16  # grouped_mm reads rows by TMA: row strides and start addresses are multiples of this
DELTA_COLUMNS = (
    256  # without room in the weight, the delta is added in pieces of this many columns: bounds the temporary
)
GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


# ---- 1. reference ---------------------------------------------------------------------------------------------------


def grouped_gemm_ref(
    x: torch.Tensor, w_EKN: torch.Tensor, routing: Routing,
    s_MR: torch.Tensor | None = None, b_ERN: torch.Tensor | None = None, source_M: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The specification; differentiable."""
    x_MK, rows = x if source_M is None else x[source_M.long()], []
    for e, i, j in routing.spans():
        y = x_MK[i:j] @ w_EKN[e]
        rows.append(y if s_MR is None or b_ERN is None else y + s_MR[i:j] @ b_ERN[e])
    return torch.cat(rows)


# ---- 2. Triton ------------------------------------------------------------------------------------------------------


@triton.jit
def _gemm_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr,  # x (T or M, K), w (E, K, N), s (M, R), b (E, R, N), y (M, N)
    offsets_ptr, source_ptr,            # (E,) and (M,) int32
    num_experts, N, K,
    stride_x, stride_we, stride_wk, stride_wn, stride_s, stride_be, stride_br, stride_bn, stride_y,
    R: tl.constexpr, HAS_SOURCE: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M rows of one expert and BLOCK_N columns."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    tile, n0 = tl.program_id(0) // blocks_n, (tl.program_id(0) % blocks_n) * BLOCK_N
    expert, row0, end = tile_of(offsets_ptr, tile, num_experts, EXPERTS, BLOCK_M)
    if expert < num_experts:
        rows, cols = row0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        row_ok, col_ok = rows < end, cols < N
        # Rows and columns beyond the edge read a valid address and are never stored: loads need no mask. Where there is no
        # such column the compiler must see that: else it takes contiguous weights element by element, through registers.
        rows, safe_cols = tl.where(row_ok, rows, row0), cols if EVEN_N else tl.where(col_ok, cols, 0)
        from_rows = tl.load(source_ptr + rows) if HAS_SOURCE else rows
        w_ptr += expert.to(tl.int64) * stride_we  # E K N overflows int32 on large models
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if R > 0:
            r = tl.arange(0, BLOCK_R)
            s = tl.load(s_ptr + rows[:, None].to(tl.int64) * stride_s + r[None, :], mask=(r < R)[None, :], other=0.0)
            b_ptr += expert.to(tl.int64) * stride_be
            b = tl.load(
                b_ptr + r[:, None] * stride_br + safe_cols[None, :] * stride_bn, mask=(r < R)[:, None], other=0.0
            )
            acc = tl.dot(s, b, acc, input_precision="ieee")
        k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + from_rows[:, None].to(tl.int64) * stride_x + k[None, :]
        w_ptrs = w_ptr + k[:, None] * stride_wk + safe_cols[None, :] * stride_wn
        for k0 in range(0, K, BLOCK_K):
            if EVEN_K:
                x, w = tl.load(x_ptrs), tl.load(w_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(k0 + k < K)[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=(k0 + k < K)[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
        y_ptrs = y_ptr + rows[:, None].to(tl.int64) * stride_y + cols[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


# ---- 3. launchers ---------------------------------------------------------------------------------------------------


def gemm_blocks(dtype: torch.dtype, rows_per_expert: float) -> dict[str, int]:
    """Tile shape. 128 rows waste a quarter of the work at 512 rows per expert; 64 an eighth."""
    if dtype == torch.float32:  # no tensor cores in full precision
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if rows_per_expert < 384:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}


def grouped_gemm_triton(
    x: torch.Tensor, w_EKN: torch.Tensor, routing: Routing,
    s_MR: torch.Tensor | None = None, b_ERN: torch.Tensor | None = None, source_M: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x and s need unit stride in their last dimension; w and b may have any strides."""
    num_experts, K, N = w_EKN.shape
    y_MN = x.new_empty(routing.num_rows, N)
    rank = 0 if s_MR is None else s_MR.shape[1]
    s, b = (x, w_EKN) if s_MR is None or b_ERN is None else (s_MR, b_ERN)
    blocks = gemm_blocks(x.dtype, routing.num_rows / num_experts)
    grid = (max_tiles(routing.num_rows, num_experts, blocks["BLOCK_M"]) * triton.cdiv(N, blocks["BLOCK_N"]),)
    _gemm_kernel[grid](
        x, w_EKN, s, b, y_MN, routing.offsets_E, routing.offsets_E if source_M is None else source_M,
        num_experts, N, K, x.stride(0), *w_EKN.stride(), s.stride(0), *b.stride(), y_MN.stride(0),
        R=rank, HAS_SOURCE=source_M is not None, EVEN_K=K % blocks["BLOCK_K"] == 0,
        EVEN_N=N % blocks["BLOCK_N"] == 0, EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_R=max(16, triton.next_power_of_2(rank)), **blocks,
    )  # fmt: skip
    return y_MN


def grouped_gemm_loop(
    x: torch.Tensor, w_EKN: torch.Tensor, routing: Routing,
    s_MR: torch.Tensor | None = None, b_ERN: torch.Tensor | None = None, source_M: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One GEMM per expert, written into its rows of one preallocated output. Any device and dtype."""
    y_MN = x.new_empty(routing.num_rows, w_EKN.shape[2])
    x_MK = x if source_M is None else x.index_select(0, source_M)
    # One split instead of a slice per expert: a third of the calls.
    counts = [j - i for _, i, j in routing.spans()]
    for y, rows, w in zip(y_MN.split(counts), x_MK.split(counts), w_EKN.unbind(), strict=True):
        torch.mm(rows, w, out=y)
    if s_MR is not None and b_ERN is not None:
        for y, s, b in zip(y_MN.split(counts), s_MR.split(counts), b_ERN.unbind(), strict=True):
            y.addmm_(s, b)
    return y_MN


def grouped_gemm_vendor(x_MK: torch.Tensor, w_EKN: torch.Tensor, routing: Routing) -> torch.Tensor:
    """torch's grouped GEMM. The offsets stay on the device; rows beyond the last offset would be garbage."""
    if x_MK.shape[0] == 0:  # it may reject an empty problem
        return x_MK.new_empty(0, w_EKN.shape[2])
    return _grouped_mm(x_MK, w_EKN, offs=routing.offsets_E)


def add_delta_vendor(y_MN: torch.Tensor, s_MR: torch.Tensor, b_ERN: torch.Tensor, routing: Routing) -> None:
    """``y[m] += s[m] @ b[e]`` where the weight has no room for b."""
    for y_MC, b_ERC in zip(y_MN.split(DELTA_COLUMNS, 1), b_ERN.split(DELTA_COLUMNS, 2), strict=True):
        y_MC.add_(grouped_gemm_vendor(s_MR, b_ERC, routing))


def aligned(t: torch.Tensor) -> torch.Tensor:
    """t itself where torch's grouped GEMM can read it, else a copy (.sum().backward() has stride 0)."""
    steps = (*t.stride()[:-1], t.storage_offset())
    fits = all(n * t.element_size() % ALIGN_BYTES == 0 for n in steps)
    if t.stride(-1) == 1 and t.stride(-2) >= t.shape[-1] and fits:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """The rank with which rows of S are a multiple of 16 bytes."""
    return rank + -rank % (ALIGN_BYTES // dtype.itemsize)


def why_not_grouped_mm(x: torch.Tensor, weight_ENK: torch.Tensor) -> str | None:
    """What keeps torch's grouped GEMM from running, or None. Looks at dtypes and strides only, so it never waits."""
    if _grouped_mm is None:
        return f"torch {torch.__version__} has no grouped_mm"
    if x.dtype not in GROUPED_MM_DTYPES:
        return f"{x.dtype} is not one of {', '.join(map(str, GROUPED_MM_DTYPES))}"
    size, (_, N, K) = x.element_size(), weight_ENK.shape
    if N * size % ALIGN_BYTES or K * size % ALIGN_BYTES:
        return f"rows of K={K} and N={N} take {K * size} and {N * size} bytes, not multiples of {ALIGN_BYTES}"
    expert, row, col = weight_ENK.stride()
    pitch = row if col == 1 and row >= K else col if row == 1 and col >= N else None
    if pitch is None or any(n * size % ALIGN_BYTES for n in (pitch, expert, weight_ENK.storage_offset())):
        return f"weight strides {weight_ENK.stride()} are not those of dense rows aligned to {ALIGN_BYTES} bytes"
    return None


class Joined:
    """A frozen weight and room for its adapter in one buffer ``[[W, B], [A, .]]`` of shape ``[E, N + R, K + R]``.

    ``[x | s] [W | B]ᵀ`` and ``[dy | ds] [W ; A]`` then are single grouped GEMMs. R is padded to 16, S with zeros.
    The room is written anew by every call, so one stream at a time may use a weight. Costs ``(1 + R / N) (1 + R / K)`` times the weight: 3.7 % for gate_up of Qwen3-30B at rank 16.
    """

    def __init__(self, weight_ENK: torch.Tensor, rank: int) -> None:
        E, self.N, self.K = weight_ENK.shape
        self.room = rank + -rank % 16  # Triton vectorises only strides that are multiples of 16 elements
        self.buffer = weight_ENK.new_zeros(E, self.N + self.room, self.K + self.room)
        self.weight.copy_(weight_ENK)

    @property
    def weight(self) -> torch.Tensor:
        """``[E, N, K]``, a view."""
        return self.buffer[:, : self.N, : self.K]

    def with_b(self, b_ENR: torch.Tensor) -> torch.Tensor:
        """``[W | B]`` transposed, ``[E, K + R, N]``; overwrites the room behind the columns."""
        self.buffer[:, : self.N, self.K : self.K + b_ENR.shape[2]].copy_(b_ENR)
        return self.buffer[:, : self.N].transpose(1, 2)

    def with_a(self, a_ERK: torch.Tensor) -> torch.Tensor:
        """``[W ; A]`` ``[E, N + R, K]``; overwrites the room below the rows."""
        self.buffer[:, self.N : self.N + a_ERK.shape[1], : self.K].copy_(a_ERK)
        return self.buffer[:, :, : self.K]

"""Grouped GEMM with the adapter's product added to it.

    y[m] = x[source m] @ w[e] + s[m] @ b[e]        for the rows m of expert e

With w = Wᵀ, s = S = x Aᵀ, b = Bᵀ it is the forward pass of a LoRA linear; with w = W, s = dS = dy
B, b = A its input gradient. Three ways to compute it: one GEMM per expert on the host's loop and
torch's grouped GEMM (CUTLASS on Hopper) are here, Triton's is in ``gemm_kernel.py``.

b comes in blocks: of n blocks ``[E, R_i, N / n]``, block i adds the product with its own columns of
s to its own n-th of the columns of y. An ordinary adapter is one block; gate and up, fused in one
weight, are two, and no block-diagonal b is built.

Shape legend: M routed rows   E experts   K inputs   N outputs
R rank (sum of ranks where b has several blocks)
"""

from typing import Any

import torch

from .each_expert import (
    ALIGN_BYTES,
    GROUPED_MM_DTYPES,
    add_in_pieces,
    add_product,
    grouped_mm,
    has_dense_rows,
    multiply,
)
from .expert_factors import Factors
from .routing import Routing

_grouped_mm: Any = grouped_mm
"""A name of its own, in whose place a benchmark puts another library's."""


def columns_and_ranks(b: Factors, num_columns: int) -> list[tuple[torch.Tensor, slice, slice]]:
    """Return (block, its columns of y, its columns of s) for the blocks that are there."""
    width = num_columns // len(b)
    start = 0
    places = []
    for i, b_ErN in enumerate(b):
        if b_ErN is None:
            continue
        rank = b_ErN.shape[1]
        places.append((b_ErN, slice(i * width, (i + 1) * width), slice(start, start + rank)))
        start += rank
    return places


# ---- 1. reference --------------------------------------------------------------------------------


def grouped_gemm_ref(
    x: torch.Tensor, w_EKN: torch.Tensor, routing: Routing,
    s_MR: torch.Tensor | None = None, b: Factors | None = None,
    source_M: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The specification; differentiable."""
    x_MK = x if source_M is None else x[source_M.long()]
    num_columns = w_EKN.shape[2]
    rows = []
    for e, i, j in routing.spans():
        y = x_MK[i:j] @ w_EKN[e]
        if s_MR is not None and b is not None:
            delta = torch.zeros_like(y)
            for b_ErN, columns, ranks in columns_and_ranks(b, num_columns):
                delta[:, columns] = s_MR[i:j, ranks] @ b_ErN[e]
            y = y + delta
        rows.append(y)
    return torch.cat(rows)


# ---- 2. one GEMM per expert ----------------------------------------------------------------------


def grouped_gemm_loop(
    x: torch.Tensor, w_EKN: torch.Tensor, routing: Routing,
    s_MR: torch.Tensor | None = None, b: Factors | None = None,
    source_M: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One GEMM per expert. Any device and dtype."""
    x_MK = x if source_M is None else x.index_select(0, source_M)
    y_MN = multiply(x_MK, w_EKN, routing)
    if s_MR is not None and b is not None:
        for b_ErN, columns, ranks in columns_and_ranks(b, y_MN.shape[1]):
            add_product(y_MN[:, columns], s_MR[:, ranks], b_ErN, routing)
    return y_MN


# ---- 3. torch's grouped GEMM ---------------------------------------------------------------------


def grouped_gemm_vendor(x_MK: torch.Tensor, w_EKN: torch.Tensor, routing: Routing) -> torch.Tensor:
    """torch's grouped GEMM. The offsets stay on the device; rows beyond the last offset would be
    garbage."""
    if x_MK.shape[0] == 0:  # it may reject an empty problem
        return x_MK.new_empty(0, w_EKN.shape[2])
    return _grouped_mm(x_MK, w_EKN, offs=routing.offsets_E)


def add_delta_vendor(
    y_MN: torch.Tensor, s_MR: torch.Tensor, b_ERN: torch.Tensor, routing: Routing
) -> None:
    """``y[m] += s[m] @ b[e]`` where the weight has no room for b."""
    add_in_pieces(y_MN, s_MR, b_ERN, lambda s, b: grouped_gemm_vendor(s, b, routing))


def aligned(t: torch.Tensor) -> torch.Tensor:
    """t itself where torch's grouped GEMM can read it, else a copy (a sum's gradient has stride
    0)."""
    steps = (*t.stride()[:-1], t.storage_offset())
    fits = all(n * t.element_size() % ALIGN_BYTES == 0 for n in steps)
    if t.stride(-1) == 1 and t.stride(-2) >= t.shape[-1] and fits:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """The rank with which rows of S are a multiple of 16 bytes."""
    return rank + -rank % (ALIGN_BYTES // dtype.itemsize)


def why_not_grouped_mm(x: torch.Tensor, weight_ENK: torch.Tensor) -> str | None:
    """What keeps torch's grouped GEMM from running, or None. Looks at dtypes and strides only, so
    it never waits."""
    if _grouped_mm is None:
        return f"torch {torch.__version__} has no grouped_mm"
    if x.dtype not in GROUPED_MM_DTYPES:
        return f"{x.dtype} is not one of {', '.join(map(str, GROUPED_MM_DTYPES))}"
    size = x.element_size()
    _, N, K = weight_ENK.shape
    if N * size % ALIGN_BYTES or K * size % ALIGN_BYTES:
        return (
            f"rows of K={K} and N={N} take {K * size} and {N * size} bytes, not multiples of"
            f" {ALIGN_BYTES}"
        )
    if not has_dense_rows(weight_ENK):
        return (
            f"weight strides {weight_ENK.stride()} are not those of dense rows aligned to"
            f" {ALIGN_BYTES} bytes"
        )
    return None

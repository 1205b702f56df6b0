"""One product per expert, called from the host: the loop back end's only kind of work.

Where experts have few rows on a CPU, calling from Python takes as long as computing. torch's
grouped GEMM is the same loop in C++ there: it is taken where it can read the operands (no float64,
rows of whole 16 bytes).

Shape legend: M rows sorted by expert   E experts   K inputs   N outputs   R rank
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .routing import Routing

ALIGN_BYTES = 16  # grouped_mm wants row strides and start addresses that are multiples of this
GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
DELTA_COLUMNS = 256
"""A product that torch's grouped GEMM has to add is made in pieces of this many columns: it bounds
the temporary."""
FEW_ROWS = 64
"""From so many rows per expert on, the loop is here: it can add a product in place and write where
it is told."""


def multiply(
    x_MK: torch.Tensor, w_EKN: torch.Tensor, routing: Routing, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``y[m] = x[m] @ w[e]``, ``[M, N]``; written to ``out`` where it is given."""
    if _in_one_call(x_MK, w_EKN, routing):
        y_MN = grouped_mm(x_MK, w_EKN, offs=routing.offsets_E)
        return y_MN if out is None else out.copy_(y_MN)
    y_MN = x_MK.new_empty(routing.num_rows, w_EKN.shape[2]) if out is None else out
    # One split instead of a slice per expert: a third of the calls.
    for y, rows, w in zip(
        y_MN.split(routing.counts), x_MK.split(routing.counts), w_EKN.unbind(), strict=True
    ):
        torch.mm(rows, w, out=y)
    return y_MN


def add_product(
    y_MN: torch.Tensor, s_MR: torch.Tensor, b_ERN: torch.Tensor, routing: Routing
) -> None:
    """``y[m] += s[m] @ b[e]``."""
    if _in_one_call(s_MR, b_ERN, routing):
        add_in_pieces(y_MN, s_MR, b_ERN, lambda s, b: grouped_mm(s, b, offs=routing.offsets_E))
        return
    for y, s, b in zip(
        y_MN.split(routing.counts), s_MR.split(routing.counts), b_ERN.unbind(), strict=True
    ):
        y.addmm_(s, b)


def add_in_pieces(
    y_MN: torch.Tensor, s_MR: torch.Tensor, b_ERN: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:  # fmt: skip
    """``y += product(s, b)``, ``DELTA_COLUMNS`` columns at a time."""
    for y_MC, b_ERC in zip(
        y_MN.split(DELTA_COLUMNS, 1), b_ERN.split(DELTA_COLUMNS, 2), strict=True
    ):
        y_MC.add_(product(s_MR, b_ERC))


def multiply_rows(
    g_MR: torch.Tensor, x_MK: torch.Tensor, routing: Routing, out_ERK: torch.Tensor
) -> None:
    """``out[e] = g[rows of e]ᵀ @ x[rows of e]``; exact zeros where an expert has no rows."""
    if _in_one_call(g_MR.t(), x_MK, routing):
        out_ERK.copy_(grouped_mm(g_MR.t(), x_MK, offs=routing.offsets_E))
        return
    for out, g, rows in zip(
        out_ERK.unbind(), g_MR.t().split(routing.counts, 1), x_MK.split(routing.counts), strict=True
    ):
        torch.mm(g, rows, out=out)


def _in_one_call(a: torch.Tensor, b: torch.Tensor, routing: Routing) -> bool:
    """Whether torch's grouped GEMM takes these operands and gains by it. Raises ``ValueError``
    where offsets are wrong."""
    # read, and so checked: beyond the last offset it would leave garbage
    num_rows = sum(routing.counts)
    few_rows = 0 < num_rows < FEW_ROWS * routing.num_experts
    if a.device.type != "cpu" or grouped_mm is None or not few_rows:
        return False
    return (
        a.dtype in GROUPED_MM_DTYPES
        and a.dtype == b.dtype
        and has_dense_rows(a)
        and has_dense_rows(b)
    )


def has_dense_rows(t: torch.Tensor) -> bool:
    """Whether torch's grouped GEMM can read a matrix or a stack of them: dense rows, or columns, at
    a distance of whole 16 bytes."""
    row, column = t.stride()[-2:]
    num_rows, num_columns = t.shape[-2:]
    if column == 1 and row >= num_columns:
        pitch = row
    elif row == 1 and column >= num_rows:
        pitch = column
    else:
        return False
    return all(
        n * t.element_size() % ALIGN_BYTES == 0
        for n in (pitch, *t.stride()[:-2], t.storage_offset())
    )

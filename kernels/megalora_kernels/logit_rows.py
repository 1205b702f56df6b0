"""Read rows of logits once for what a loss needs of them, and turn them into a gradient in place.

The vocabulary is cut into blocks, and over ranks. Of each block b and row c

    m[b, c] = max_v l[c, v]        s[b, c] = sum_v exp(l[c, v] - m[b, c])
    y[b, c] = l[c, target], 0 where the target is in another block        t[b, c] = sum_v l[c, v]

which joined over all blocks are, with m = max_b m[b] and s = sum_b s[b] exp(m[b] - m),

    logprob = y - m - log s        lse = m + log s        mean = t / V

and a second pass writes d[c, v] = exp(l[c, v] - shift[c]) factor[c] (+ add[c]), at the target with
at_target[c] added, in the logits' dtype over the logits. d = p - onehot has shift m, factor 1 / s
and at_target -1. Sums are float32 whatever the dtype of the logits, d is rounded once, and nothing
but the logits is as large as they are.

Shape legend: C rows   V entries of this rank's vocabulary   P blocks, of all ranks once joined
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from .absent import pointer
from .backend import choose_pass

BLOCK = 8192
"""Entries of a row that a program has: 32 values in each thread's registers."""
ROWS = 32
"""Rows that a program joins the blocks of."""

# ---- 1. reference --------------------------------------------------------------------------------


def read_logits_ref(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, first: int, with_mean: bool
) -> torch.Tensor:
    """The specification: one block, ``[1, 4, C]`` with m, s, y and t, in float32 or wider."""
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    width = logits_CV.shape[1]
    columns_C = targets_C - first
    here_C = (columns_C >= 0) & (columns_C < width)
    # Any valid column where the target is another rank's.
    found_C1 = columns_C.clamp(0, width - 1)[:, None]
    largest_C = logits_CV.amax(1)
    sum_C = (logits_CV - largest_C[:, None]).exp().sum(1)
    target_C = logits_CV.gather(1, found_C1)[:, 0].masked_fill(~here_C, 0.0)
    total_C = logits_CV.sum(1) if with_mean else torch.zeros_like(target_C)
    return torch.stack([largest_C, sum_C, target_C, total_C])[None]


def join_blocks_ref(parts_P4C: torch.Tensor, vocab: int) -> torch.Tensor:
    """The specification: ``[5, C]`` with logprob, lse, mean, m and 1 / s."""
    largest, sums, targets, totals = parts_P4C.unbind(1)
    m_C = largest.amax(0)
    s_C = (sums * (largest - m_C).exp()).sum(0)
    log_s = s_C.log()
    # y - m first: lse itself is rounded at the size of the logits, which may be large.
    logprob = targets.sum(0) - m_C - log_s
    return torch.stack([logprob, m_C + log_s, totals.sum(0) / vocab, m_C, 1 / s_C])


def softmax_gradient_ref(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, first: int,
    shift_C: torch.Tensor, factor_C: torch.Tensor,
    at_target_C: torch.Tensor | None = None, add_C: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The specification: d ``[C, V]`` in a tensor of its own."""
    wide = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    d_CV = (wide - shift_C[:, None]).exp() * factor_C[:, None]
    if add_C is not None:
        d_CV += add_C[:, None]
    columns_V = torch.arange(first, first + wide.shape[1], device=wide.device)
    onehot_CV = targets_C[:, None] == columns_V
    at_target_C = -torch.ones_like(shift_C) if at_target_C is None else at_target_C
    # Added before rounding: p rounded to bfloat16 is 1 where the model is sure.
    return (d_CV + onehot_CV * at_target_C[:, None]).to(logits_CV.dtype)


# ---- 2. kernels ----------------------------------------------------------------------------------


@triton.jit
def _read_logits_kernel(
    logits_ptr, targets_ptr, parts_ptr, C, V, first, stride,
    WITH_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK entries of one row."""
    row = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    v = start + tl.arange(0, BLOCK)
    # int64 before the stride: C V exceeds 2^31 from 14,135 rows of 151,936 entries on.
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    logits = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, 0)
    # A block of -inf alone has no size to subtract, and its sum is 0.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    exponentials = tl.sum(tl.exp(logits - shift), 0)
    # One block of one rank has the target; the others add 0.
    column = tl.load(targets_ptr + row).to(tl.int64) - first
    here = (column >= start) & (column < start + BLOCK) & (column < V)
    target = tl.load(row_ptr + column, mask=here, other=0.0).to(tl.float32)
    part_ptr = parts_ptr + tl.program_id(1).to(tl.int64) * 4 * C + row
    tl.store(part_ptr, largest)
    tl.store(part_ptr + C, exponentials)
    tl.store(part_ptr + 2 * C, target)
    total = 0.0
    if WITH_MEAN:
        total = tl.sum(tl.where(v < V, logits, 0.0), 0)
    tl.store(part_ptr + 3 * C, total)


@triton.jit
def _join_blocks_kernel(
    parts_ptr, rows_ptr, C, num_parts, vocab, PARTS: tl.constexpr, ROWS: tl.constexpr
):
    """One program joins all blocks of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    ok = (part < num_parts)[:, None] & (row < C)[None, :]
    # [parts, rows]; the four numbers of a block lie C apart.
    at = parts_ptr + part.to(tl.int64)[:, None] * 4 * C + row[None, :]
    largest = tl.load(at, mask=ok, other=float("-inf"))
    sums = tl.load(at + C, mask=ok, other=0.0)
    target = tl.sum(tl.load(at + 2 * C, mask=ok, other=0.0), 0)
    total = tl.sum(tl.load(at + 3 * C, mask=ok, other=0.0), 0)
    m = tl.max(largest, 0)
    # Rows behind the last have no block at all: -inf less -inf would be no number.
    m = tl.where(row < C, m, 0.0)
    s = tl.sum(sums * tl.exp(largest - m[None, :]), 0)
    s = tl.where(row < C, s, 1.0)
    log_s = tl.log(s)
    out = rows_ptr + row
    tl.store(out, target - m - log_s, mask=row < C)
    tl.store(out + C, m + log_s, mask=row < C)
    tl.store(out + 2 * C, total / vocab, mask=row < C)
    tl.store(out + 3 * C, m, mask=row < C)
    tl.store(out + 4 * C, 1.0 / s, mask=row < C)


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr, targets_ptr, shift_ptr, factor_ptr, at_target_ptr, add_ptr, V, first, stride,
    WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK entries of one row, which it reads and writes."""
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ptrs = logits_ptr + row.to(tl.int64) * stride + v
    logits = tl.load(ptrs, mask=v < V, other=float("-inf")).to(tl.float32)
    d = tl.exp(logits - tl.load(shift_ptr + row)) * tl.load(factor_ptr + row)
    if ADDED:
        d += tl.load(add_ptr + row)
    at_target = -1.0
    if WEIGHTED:
        at_target = tl.load(at_target_ptr + row)
    # Before rounding: p rounded to bfloat16 is 1 where the model is sure.
    column = tl.load(targets_ptr + row).to(tl.int64) - first
    d += tl.where(v == column, at_target, 0.0)
    tl.store(ptrs, d.to(logits_ptr.dtype.element_ty), mask=v < V)


# ---- 3. launchers --------------------------------------------------------------------------------


def read_logits_triton(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, first: int, with_mean: bool
) -> torch.Tensor:
    """``[P, 4, C]`` float32."""
    C, V = logits_CV.shape
    assert logits_CV.stride(1) == 1, "entries of a row lie side by side"
    block, num_blocks = _blocks(V)
    parts_P4C = logits_CV.new_empty(num_blocks, 4, C, dtype=torch.float32)
    if C == 0:  # a grid of no programs cannot be launched
        return parts_P4C
    _read_logits_kernel[(C, num_blocks)](
        logits_CV, targets_C.contiguous(), parts_P4C, C, V, first, logits_CV.stride(0),
        WITH_MEAN=with_mean, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return parts_P4C


def join_blocks_triton(parts_P4C: torch.Tensor, vocab: int) -> torch.Tensor:
    """``[5, C]`` float32."""
    num_parts, _, C = parts_P4C.shape
    rows_5C = parts_P4C.new_empty(5, C)
    if C == 0:
        return rows_5C
    _join_blocks_kernel[(triton.cdiv(C, ROWS),)](
        parts_P4C, rows_5C, C, num_parts, vocab,
        PARTS=triton.next_power_of_2(num_parts), ROWS=ROWS,
    )  # fmt: skip
    return rows_5C


def softmax_gradient_triton(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, first: int,
    shift_C: torch.Tensor, factor_C: torch.Tensor,
    at_target_C: torch.Tensor | None = None, add_C: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """d over the logits, ``[C, V]`` in their dtype."""
    C, V = logits_CV.shape
    assert logits_CV.stride(1) == 1, "entries of a row lie side by side"
    if C == 0:
        return
    # The gradient of a plain sum is one number for all rows.
    at_target_C = None if at_target_C is None else at_target_C.contiguous()
    block, num_blocks = _blocks(V)
    _softmax_gradient_kernel[(C, num_blocks)](
        logits_CV, targets_C.contiguous(), shift_C, factor_C, pointer(at_target_C, shift_C),
        pointer(add_C, shift_C), V, first, logits_CV.stride(0),
        WEIGHTED=at_target_C is not None, ADDED=add_C is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip


def _blocks(width: int) -> tuple[int, int]:
    """(entries of a block, blocks) of a row."""
    block = min(BLOCK, int(triton.next_power_of_2(width)))
    return block, int(triton.cdiv(width, block))


# ---- 4. choice -----------------------------------------------------------------------------------


def takes_logit_kernels(x: torch.Tensor) -> bool:
    """Whether logits in x's dtype on its device are read by these kernels, by the rule of
    ``backend``; elsewhere whoever asks computes in torch.

    Raises:
        ValueError: MEGALORA_BACKEND names a back end that does not exist or cannot run.
    """
    return choose_pass(None, "the loss", x, 0) == "triton"

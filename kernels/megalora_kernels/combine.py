"""Combine: each token's output is the sum of its experts' rows.

    out[t] = sum over j of y[slots[t, j]], slots below 0 left out

It is also the gradient of the permutation that copied tokens to rows. A scatter-add would need
atomics, whose order changes from run to run; each token gathering its own rows needs none.

Shape legend: T tokens   k rows per token   M routed rows   H features
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

# ---- 1. reference --------------------------------------------------------------------------------


def combine_ref(y_MH: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
    """Slot after slot into one output, in float32 (float64 for float64)."""
    wide = torch.promote_types(y_MH.dtype, torch.float32)
    # Every row has one slot: as many of both means that no slot is empty.
    all_filled = slots_TK.numel() == y_MH.shape[0]
    # A token has at least one row, and its rows stand first.
    out_TH = y_MH.index_select(0, slots_TK[:, 0]).to(wide)
    for j in range(1, slots_TK.shape[1]):
        slot_T = slots_TK[:, j]
        if all_filled:
            out_TH += y_MH.index_select(0, slot_T)
        else:
            # Without a name, which would keep one slot's rows while the next one's are gathered.
            found = slot_T.clamp(min=0)
            out_TH += y_MH.index_select(0, found).masked_fill_(slot_T[:, None] < 0, 0)
    return out_TH.to(y_MH.dtype)


# ---- 2. kernel -----------------------------------------------------------------------------------


@triton.jit
def _combine_kernel(
    y_ptr, slots_ptr, out_ptr, H, stride_y, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program owns BLOCK columns of one token."""
    token = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Slots ascend with the expert's number: the order of the sum is the same on every run.
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(SLOTS):
        # int64 before the stride: M H exceeds 2^31 from 2^20 rows of 2,048 features on.
        row = tl.load(slots_ptr + token.to(tl.int64) * SLOTS + j).to(tl.int64)
        filled = (cols < H) & (row >= 0)
        acc += tl.load(y_ptr + row * stride_y + cols, mask=filled, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + token.to(tl.int64) * H + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < H
    )


# ---- 3. launcher ---------------------------------------------------------------------------------


def combine_triton(y_MH: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
    num_tokens, num_slots = slots_TK.shape
    H = y_MH.shape[1]
    if y_MH.stride(1) != 1:
        # The kernel steps along H by one element, as an expanded gradient does not.
        y_MH = y_MH.contiguous()
    slots_TK = slots_TK.contiguous()
    out_TH = y_MH.new_empty(num_tokens, H)
    if num_tokens == 0:  # a grid of no programs cannot be launched
        return out_TH
    block = min(1024, triton.next_power_of_2(H))
    _combine_kernel[(num_tokens, triton.cdiv(H, block))](
        y_MH, slots_TK, out_TH, H, y_MH.stride(0), SLOTS=num_slots, BLOCK=block
    )
    return out_TH


def combine(y_MH: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
    """Sum of each token's rows: ``[M, H]``, int32 ``[T, k]`` -> ``[T, H]`` in y's dtype. Not
    differentiable by itself.

    A token may have fewer than k rows: its slots behind the last one are -1.
    """
    # The kernel sums in float32, too coarsely for float64.
    if y_MH.is_cuda and y_MH.dtype != torch.float64:
        return combine_triton(y_MH, slots_TK)
    return combine_ref(y_MH, slots_TK)

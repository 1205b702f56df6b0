"""SwiGLU with routing probabilities between the two linears of an expert, and the adapter's part of
it.

    h[m] = silu(gate[m]) * up[m] * p[m]        [gate | up] = y[m]
    s[m] = scale * h[m] @ a[e]ᵀ                what down's adapter reads, in the same pass

The backward pass is in ``swiglu_backward.py``.

Shape legend: M routed rows   E experts   I expert intermediate   Q rank of down
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton import knobs

from .absent import pointer, strides_of
from .each_expert import multiply
from .routing import Routing
from .tiles import max_tiles, tile_of

# Read once: kernels are decorated when this module is imported.
COMPILED: bool = not knobs.runtime.interpret

# ---- 1. reference --------------------------------------------------------------------------------


def swiglu_ref(y_MJ: torch.Tensor, p_M: torch.Tensor) -> torch.Tensor:
    """``[M, I]`` in y's dtype from ``[M, 2I]``, computed in float32 (float64 for float64);
    differentiable."""
    gate_MI, up_MI = y_MJ.to(torch.promote_types(y_MJ.dtype, torch.float32)).chunk(2, dim=1)
    return (F.silu(gate_MI) * up_MI * p_M[:, None]).to(y_MJ.dtype)


# ---- 2. kernels ----------------------------------------------------------------------------------


@triton.jit
def load_float32(ptrs, col_ok, EVEN: tl.constexpr):
    """Read in float32; columns beyond the edge as zeros. A mask where no column is beyond it costs
    instructions."""
    if EVEN:
        return tl.load(ptrs).to(tl.float32)
    else:
        return tl.load(ptrs, mask=col_ok, other=0.0).to(tl.float32)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + e^-x) by 2^(-x log2 e): four instructions fewer than ``tl.sigmoid``, and on a GPU
    the same bits.

    ``tl.exp`` is that power too, with a detour for powers below 2^-126, which vanish beside the 1
    here. Rounding the product costs |x| 2^-24 of the power's size: nothing where a result is
    rounded to 16 bits, but float32 (EXACT) keeps ``tl.sigmoid``.
    """
    if EXACT:
        return tl.sigmoid(x)
    else:
        return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def computed_once(x, OPAQUE: tl.constexpr):
    """Return x as it is, through a step that the compiler can neither see through nor repeat.

    x goes to memory in one layout and into a product in another. Instead of exchanging it between
    threads, the compiler computes it again from the loads on, three times in all. The interpreter
    has no inline assembly: OPAQUE is False there.
    """
    if OPAQUE:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;",
            "=r,r",
            [x],
            dtype=x.dtype,
            is_pure=False,
            pack=32 // x.dtype.primitive_bitwidth,
        )
    return x


@triton.jit
def _swiglu_kernel(
    # y (M, 2I), p (M,), a (E, Q, I), h (M, I), s (M, PAD)
    y_ptr, p_ptr, a_ptr, h_ptr, s_ptr, offsets_ptr,
    num_experts, I, stride_y, stride_ae, stride_aq, stride_ai, stride_h, stride_s, scale,
    Q: tl.constexpr, PAD: tl.constexpr, EXPERTS: tl.constexpr, EVEN_I: tl.constexpr,
    OPAQUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M rows of one expert. Columns Q to PAD of s get zeros."""
    expert, row0, end = tile_of(offsets_ptr, tl.program_id(0), num_experts, EXPERTS, BLOCK_M)
    if expert < num_experts:
        rows = row0 + tl.arange(0, BLOCK_M)
        row_ok = rows < end
        # Rows beyond the edge read the tile's first row and are never stored: loads need no mask.
        safe = tl.where(row_ok, rows, row0)
        dtype = h_ptr.dtype.element_ty
        i = tl.arange(0, BLOCK_I)
        q = tl.arange(0, BLOCK_Q)
        p = tl.load(p_ptr + safe).to(tl.float32)[:, None]
        y_ptrs = y_ptr + safe[:, None].to(tl.int64) * stride_y + i[None, :]
        h_ptrs = h_ptr + safe[:, None].to(tl.int64) * stride_h + i[None, :]
        a_expert = a_ptr + expert.to(tl.int64) * stride_ae
        a_ptrs = a_expert + q[None, :] * stride_aq + i[:, None] * stride_ai
        acc = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
        for i0 in range(0, I, BLOCK_I):
            col_ok = i0 + i < I
            # A row of y is [gate | up]: up lies I elements behind gate.
            gate = load_float32(y_ptrs + i0, col_ok[None, :], EVEN_I)
            up = load_float32(y_ptrs + I + i0, col_ok[None, :], EVEN_I)
            # Rounded here already: S is the product of what down reads, bit for bit.
            h = (gate * sigmoid(gate, dtype == tl.float32) * up * p).to(dtype)
            h = computed_once(h, OPAQUE and Q > 0)
            if EVEN_I:
                tl.store(h_ptrs + i0, h, mask=row_ok[:, None])
            else:
                tl.store(h_ptrs + i0, h, mask=row_ok[:, None] & col_ok[None, :])
            if Q > 0:
                a_ok = (q < Q)[None, :]
                if not EVEN_I:
                    a_ok = a_ok & col_ok[:, None]
                a = tl.load(a_ptrs + i0 * stride_ai, mask=a_ok, other=0.0)
                acc = tl.dot(h, a, acc, input_precision="ieee")
        if Q > 0:
            s_ptrs = s_ptr + rows[:, None].to(tl.int64) * stride_s + q[None, :]
            s_ok = row_ok[:, None] & (q < PAD)[None, :]
            tl.store(s_ptrs, (acc * scale).to(s_ptr.dtype.element_ty), mask=s_ok)


# ---- 3. launchers --------------------------------------------------------------------------------


def swiglu_triton(
    y_MJ: torch.Tensor, p_M: torch.Tensor, a_EQI: torch.Tensor | None, routing: Routing,
    h_MI: torch.Tensor, s_MP: torch.Tensor | None, scale: float = 1.0,
) -> None:  # fmt: skip
    """Fills ``h_MI`` and, with an adapter, ``s_MP`` (P >= Q; the columns beyond Q with zeros)."""
    rank = 0
    padded = 0
    if a_EQI is None or s_MP is None:
        a_EQI = s_MP = None  # one is of no use without the other
    else:
        rank = a_EQI.shape[1]
        padded = s_MP.shape[1]
    s = pointer(s_MP, y_MJ)
    block_m = 32
    # 128 columns of gate, up and A at once, as far as registers hold the sums beside them.
    block_i = 128 if y_MJ.dtype != torch.float32 and rank <= 64 else 64
    _swiglu_kernel[(max_tiles(routing.num_rows, routing.num_experts, block_m),)](
        y_MJ, p_M, pointer(a_EQI, y_MJ), h_MI, s, routing.offsets_E, routing.num_experts,
        h_MI.shape[1],
        y_MJ.stride(0), *strides_of(a_EQI), h_MI.stride(0), s.stride(0), scale,
        Q=rank, PAD=padded, EXPERTS=triton.next_power_of_2(routing.num_experts),
        EVEN_I=h_MI.shape[1] % block_i == 0, OPAQUE=COMPILED,
        BLOCK_M=block_m, BLOCK_I=block_i,
        BLOCK_Q=max(16, triton.next_power_of_2(max(1, padded))),
        num_warps=4, num_stages=2,
    )  # fmt: skip


def swiglu_loop(
    y_MJ: torch.Tensor, p_M: torch.Tensor, a_EQI: torch.Tensor | None, routing: Routing,
    h_MI: torch.Tensor, s_MP: torch.Tensor | None, scale: float = 1.0,
) -> None:  # fmt: skip
    """The same in torch."""
    if y_MJ.dtype in (torch.float32, torch.float64):  # no cast: straight into the output
        gate_MI, up_MI = y_MJ.chunk(2, dim=1)
        torch.mul(F.silu(gate_MI), up_MI, out=h_MI).mul_(p_M[:, None].to(h_MI.dtype))
    else:
        h_MI.copy_(swiglu_ref(y_MJ, p_M))
    if a_EQI is None or s_MP is None:
        return
    # Columns that pad S are operands of down's GEMM as well: zeros, not memory as it was found.
    if s_MP.shape[1] > a_EQI.shape[1]:
        s_MP[:, a_EQI.shape[1] :].zero_()
    s_MQ = multiply(h_MI, a_EQI.transpose(1, 2), routing, out=s_MP[:, : a_EQI.shape[1]])
    if scale != 1:
        s_MQ.mul_(scale)

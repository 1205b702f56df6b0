"""Backward pass of SwiGLU between the two linears of an expert, and the adapter's sums over rows.

It goes once over dh, gate and up and makes from values in registers, besides dgate, dup and dp,
what sums over rows of them: dB of gate and up, dA of down. Sums are kept in float32 per chunk of
rows (dp: per block of columns) and added in a fixed order: no atomics, the same bits on every run.
dS of gate_up sums over columns; a shrink of [dgate | dup] makes it. The reference is the gradient
of ``swiglu_ref``.

Shape legend: M routed rows   E experts   I expert intermediate   R rank of gate and up stacked
Q rank of down
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import tiles
from .absent import pointer, row_stride, width
from .each_expert import multiply_rows
from .lora_wgrad import lora_wgrad_loop
from .routing import Routing
from .sums import TorchSums, TritonSums
from .swiglu import COMPILED, computed_once, load_float32, sigmoid
from .tiles import max_tiles, tile_of
from .variants import device_limits

LOOP_ELEMENTS = 2**16
"""What the loop's element-wise operations take at once, or one expert's rows: many small experts
cost few calls then, and operands stay in a CPU's L2."""

# ---- 1. kernels ----------------------------------------------------------------------------------


@triton.jit
def _gradients(gate, up, dh, p, EXACT: tl.constexpr):
    """silu(gate) up, and the gradients of gate and of up."""
    # silu(g) = g σ(g), so silu'(g) = σ(g) (1 + g (1 - σ(g))).
    share = sigmoid(gate, EXACT)
    silu = gate * share
    d_gate = dh * p * up * share * (1 + gate * (1 - share))
    return silu * up, d_gate, dh * p * silu


@triton.jit
def _add_to_db(
    db_gate, db_up, d_gate, d_up, s_ptr, stride_s, rows_64, row_ok, r, R: tl.constexpr
):  # fmt: skip
    """dB += dYᵀ S over a block of rows; rows of S beyond the expert's are zeros."""
    s_ok = row_ok[:, None] & (r < R)[None, :]
    s = tl.load(s_ptr + rows_64[:, None] * stride_s + r[None, :], mask=s_ok, other=0.0)
    db_gate = tl.dot(tl.trans(d_gate), s, db_gate, input_precision="ieee")
    db_up = tl.dot(tl.trans(d_up), s, db_up, input_precision="ieee")
    return db_gate, db_up


@triton.jit
def _add_to_da(
    da, product, p, ds_ptr, stride_ds, rows_64, row_ok, q, Q: tl.constexpr, OPAQUE: tl.constexpr
):
    """dA += dSᵀ h over a block of rows; rows of dS beyond the expert's are zeros."""
    # The load comes before h: with the opaque step first, a program takes registers that leave
    # room for two on a multiprocessor instead of three (compiled).
    ds_ptrs = ds_ptr + rows_64[None, :] * stride_ds + q[:, None]
    ds = tl.load(ds_ptrs, mask=row_ok[None, :] & (q < Q)[:, None], other=0.0)
    h = computed_once((product * p).to(ds.dtype), OPAQUE)
    return tl.dot(ds, h, da, input_precision="ieee")


@triton.jit
def _load_rows(
    dh_ptr, y_ptr, p_ptr, rows_64, i, i_ok, I, stride_dh, stride_y, EVEN_I: tl.constexpr
):  # fmt: skip
    """Gate, up and dh of a block of rows, and their probabilities as a column."""
    y_ptrs = y_ptr + rows_64[:, None] * stride_y + i[None, :]
    gate = load_float32(y_ptrs, i_ok[None, :], EVEN_I)
    up = load_float32(y_ptrs + I, i_ok[None, :], EVEN_I)
    dh = load_float32(dh_ptr + rows_64[:, None] * stride_dh + i[None, :], i_ok[None, :], EVEN_I)
    p = tl.load(p_ptr + rows_64).to(tl.float32)[:, None]
    return gate, up, dh, p


@triton.jit
def _store_dy(dy_ptrs, d_gate, d_up, row_ok, i_ok, I, EVEN_I: tl.constexpr):
    """Write a block of [dgate | dup]."""
    # As in forward: a mask over columns only where some are beyond the edge.
    ok = row_ok[:, None]
    if not EVEN_I:
        ok = ok & i_ok[None, :]
    tl.store(dy_ptrs, d_gate, mask=ok)
    tl.store(dy_ptrs + I, d_up, mask=ok)


@triton.jit
def _store_sums(
    da, db_gate, db_up, da_ptr, db_gate_ptr, db_up_ptr, part, i, i_ok, I, r, q,
    R: tl.constexpr, R_GATE: tl.constexpr, UP_FROM: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Write a chunk's parts of dA and dB, ``part`` elements behind the first; ``i`` are the
    program's columns.

    Gate's B has the columns of S before R_GATE, up's those from UP_FROM on.
    """
    if R > 0:
        gate_ptrs = db_gate_ptr + part + i[:, None] * R_GATE + r[None, :]
        tl.store(gate_ptrs, db_gate, mask=i_ok[:, None] & (r < R_GATE)[None, :])
        up_ptrs = db_up_ptr + part + i[:, None] * (R - UP_FROM) + (r - UP_FROM)[None, :]
        tl.store(up_ptrs, db_up, mask=i_ok[:, None] & ((r >= UP_FROM) & (r < R))[None, :])
    if Q > 0:
        da_ptrs = da_ptr + part + q[:, None] * I + i[None, :]
        tl.store(da_ptrs, da, mask=(q < Q)[:, None] & i_ok[None, :])


@triton.jit
def _swiglu_backward_kernel(
    dh_ptr, y_ptr, p_ptr, s_ptr, ds_ptr, # dh (M, I), y (M, 2I), p (M,), s (M, R), ds (M, Q)
    # dy (M, 2I); float32 parts: (blocks, M), (chunks, Q, I), (chunks, I, r)
    dy_ptr, dp_ptr, da_ptr, db_gate_ptr, db_up_ptr,
    offsets_ptr, num_rows, num_experts, I, stride_dh, stride_y, stride_s, stride_ds, stride_dy,
    stride_part,
    R: tl.constexpr, R_GATE: tl.constexpr, UP_FROM: tl.constexpr, Q: tl.constexpr,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, EVEN_I: tl.constexpr, OPAQUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program owns a chunk of rows and BLOCK_I columns of gate and the same of up. A chunk's
    blocks follow each other in the grid: they read the same rows of s and ds, mostly from L2."""
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    expert, row0, end = tile_of(offsets_ptr, chunk, num_experts, EXPERTS, CHUNK)
    if expert < num_experts:
        i = block * BLOCK_I + tl.arange(0, BLOCK_I)
        i_ok = i < I
        r = tl.arange(0, BLOCK_R)
        q = tl.arange(0, BLOCK_Q)
        dtype = dy_ptr.dtype.element_ty
        da = tl.zeros((BLOCK_Q, BLOCK_I), tl.float32)
        db_gate = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
        db_up = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
        for m0 in range(row0, tl.minimum(row0 + CHUNK, end), BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            row_ok = rows < end
            # Rows beyond the edge read the block's first: never stored, and zeros in s and ds.
            rows_64 = tl.where(row_ok, rows, m0).to(tl.int64)
            gate, up, dh, p = _load_rows(
                dh_ptr, y_ptr, p_ptr, rows_64, i, i_ok, I, stride_dh, stride_y, EVEN_I
            )
            product, d_gate, d_up = _gradients(gate, up, dh, p, dtype == tl.float32)
            dp_ptrs = dp_ptr + block.to(tl.int64) * num_rows + rows
            # dp sums over all columns, of which this program has a block: a part for ``sums.py``.
            tl.store(dp_ptrs, tl.sum(dh * product, 1), mask=row_ok)
            d_gate = computed_once(d_gate.to(dtype), OPAQUE and R > 0)
            d_up = computed_once(d_up.to(dtype), OPAQUE and R > 0)
            dy_ptrs = dy_ptr + rows_64[:, None] * stride_dy + i[None, :]
            _store_dy(dy_ptrs, d_gate, d_up, row_ok, i_ok, I, EVEN_I)
            if R > 0:
                db_gate, db_up = _add_to_db(
                    db_gate, db_up, d_gate, d_up, s_ptr, stride_s, rows_64, row_ok, r, R
                )
            if Q > 0:
                da = _add_to_da(da, product, p, ds_ptr, stride_ds, rows_64, row_ok, q, Q, OPAQUE)
        _store_sums(
            da, db_gate, db_up, da_ptr, db_gate_ptr, db_up_ptr, chunk.to(tl.int64) * stride_part,
            i, i_ok, I, r, q, R, R_GATE, UP_FROM, Q,
        )  # fmt: skip


# ---- 2. launchers --------------------------------------------------------------------------------


def backward_blocks(dtype: torch.dtype, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """Read what compiling showed: the tile of ``_swiglu_backward_kernel`` for ranks padded to
    powers of two.

    The sums dA and dB grow with the rank and live in registers. 168 of them let three programs of
    four warps share a multiprocessor, with 36 KB of loads under way; the compiler would take four
    more. Loads are not pipelined from rank 64 on, for want of registers, and on Blackwell: beside
    its tensor cores Triton cannot pipeline an opaque step.
    """
    if dtype == torch.float32:  # no tensor cores in full precision
        return {"BLOCK_M": 16, "BLOCK_I": 32, "num_warps": 4 if rank <= 64 else 8, "num_stages": 1}
    if rank <= 32:
        stages = 2 if capability < (10, 0) else 1
        return {"BLOCK_M": 32, "BLOCK_I": 64, "num_warps": 4, "num_stages": stages, "maxnreg": 168}
    if rank <= 128:
        return {"BLOCK_M": 32, "BLOCK_I": 64, "num_warps": 4 if rank <= 64 else 8, "num_stages": 1}
    return {"BLOCK_M": 16, "BLOCK_I": 32, "num_warps": 8, "num_stages": 1}


def swiglu_backward_triton(
    dh_MI: torch.Tensor, y_MJ: torch.Tensor, p_M: torch.Tensor, routing: Routing,
    dy_MJ: torch.Tensor,
    s_MR: torch.Tensor | None, ds_MQ: torch.Tensor | None,
    sums: TritonSums, da: torch.Tensor | None, db: Sequence[torch.Tensor | None],
) -> None:  # fmt: skip
    """Fills ``dy_MJ``, leaves parts of dp in ``sums``, of dA of down in ``da`` and of dB of gate_up
    in ``db``, which are places there. ``s_MR`` is S of gate_up, ``ds_MQ`` dS of down; None without
    that adapter."""
    M, I = dh_MI.shape
    E = routing.num_experts
    new = {"dtype": torch.float32, "device": dh_MI.device}
    R = width(s_MR)
    Q = width(ds_MQ)
    s = pointer(s_MR, y_MJ)
    ds = pointer(ds_MQ, y_MJ)
    # A side of a product has at least 16 elements, also where a rank is smaller or 0.
    block_r = max(16, triton.next_power_of_2(R))
    block_q = max(16, triton.next_power_of_2(Q))
    tile = backward_blocks(dh_MI.dtype, max(block_r, block_q), device_limits(dh_MI.device)[1])
    chunks = max_tiles(M, E, tiles.CHUNK_ROWS)
    blocks = int(triton.cdiv(I, tile["BLOCK_I"]))
    dp = torch.empty(blocks, M, **new)
    db_gate, db_up, rank_gate, up_from = _db_places(db, I, R)
    places = [pointer(t, dp) for t in (da, db_gate, db_up)]
    # All gradients' parts lie in one row for each chunk: those that are there share this stride.
    stride_part = max(row_stride(t) for t in (da, db_gate, db_up))
    _swiglu_backward_kernel[(blocks, chunks)](
        dh_MI, y_MJ, p_M, s, ds, dy_MJ, dp, *places,
        routing.offsets_E, M, E, I, dh_MI.stride(0), y_MJ.stride(0), s.stride(0), ds.stride(0),
        dy_MJ.stride(0),
        stride_part, R=R, R_GATE=rank_gate, UP_FROM=up_from, Q=Q, EXPERTS=triton.next_power_of_2(E),
        CHUNK=tiles.CHUNK_ROWS,
        EVEN_I=I % tile["BLOCK_I"] == 0, OPAQUE=COMPILED, BLOCK_R=block_r, BLOCK_Q=block_q, **tile,
    )  # fmt: skip
    sums.dp_part = dp
    sums.dp_dtype = p_M.dtype


def _db_places(
    db: Sequence[torch.Tensor | None], I: int, rank: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """dB of gate and of up, and the columns of S that are theirs: before the third value, from the
    fourth on."""
    if not db:
        return None, None, 0, 0
    if len(db) == 1:
        # One B over gate's and up's rows: both halves take every column of S.
        whole = db[0]
        if whole is None:
            return None, None, rank, 0
        return whole, whole[:, I:], rank, 0
    gate, up = db
    rank_gate = 0
    if gate is not None:
        rank_gate = gate.shape[2]
    return gate, up, rank_gate, rank_gate


def _blocks(spans: list[tuple[int, int, int]], num_rows: int) -> list[list[tuple[int, int, int]]]:
    """Cut a list of experts' rows into pieces that end with the first expert to reach
    ``num_rows``."""
    blocks: list[list[tuple[int, int, int]]] = [[]]
    for span in spans:
        if blocks[-1] and blocks[-1][-1][2] - blocks[-1][0][1] >= num_rows:
            blocks.append([])
        blocks[-1].append(span)
    return blocks


def swiglu_backward_loop(
    dh_MI: torch.Tensor, y_MJ: torch.Tensor, p_M: torch.Tensor, routing: Routing,
    dy_MJ: torch.Tensor,
    s_MR: torch.Tensor | None, ds_MQ: torch.Tensor | None,
    sums: TorchSums, da: torch.Tensor | None, db: Sequence[torch.Tensor | None],
) -> None:  # fmt: skip
    """The same, a few experts at a time: temporaries hold LOOP_ELEMENTS or the rows of one
    expert."""
    I = dh_MI.shape[1]
    wide = torch.promote_types(dh_MI.dtype, torch.float32)
    sums.dp_M = dp_M = torch.empty_like(p_M)
    for experts in _blocks(routing.spans(), LOOP_ELEMENTS // I):
        first = experts[0][1]
        end = experts[-1][2]
        gate = y_MJ[first:end, :I].to(wide)
        up = y_MJ[first:end, I:].to(wide)
        dh = dh_MI[first:end].to(wide)
        p = p_M[first:end, None].to(wide)
        dy = dy_MJ[first:end]
        silu = F.silu(gate)
        d_act = dh * p
        # From here on d_act and silu are overwritten as soon as they were read: no third buffer.
        dy[:, I:] = d_act * silu
        dy[:, :I] = torch.ops.aten.silu_backward(d_act.mul_(up), gate)
        h = silu.mul_(up)
        dp_M[first:end] = torch.mul(dh, h, out=d_act).sum(1)
        if ds_MQ is not None and da is not None:
            h = h.mul_(p).to(dh_MI.dtype)
            block = slice(experts[0][0], experts[-1][0] + 1)
            rows = Routing(routing.offsets_E[block] - first, end - first)
            multiply_rows(ds_MQ[first:end], h, rows, da[block])
    # Each projection's B has its share of dy's columns and the next columns of S.
    column = 0
    for dy_MC, place in zip(dy_MJ.chunk(max(1, len(db)), 1), db, strict=False):
        if s_MR is not None and place is not None:
            lora_wgrad_loop(dy_MC, s_MR[:, column : column + place.shape[2]], routing, place)
            column += place.shape[2]

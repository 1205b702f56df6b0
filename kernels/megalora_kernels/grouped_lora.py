"""Grouped LoRA linear: every routed token goes through its own expert's frozen weight and adapter.

    y[m] = W[e] x[m] + B[e] (A[e] x[m])    for offsets[e - 1] <= m < offsets[e]   (offsets[-1] := 0)

Backward, with S = X A^T and dS = dY B (W is frozen, so there is no dW):

    dX = dY W + dS A        dA[e] = dS[e]^T X[e]        dB[e] = dY[e]^T S[e]

Shape legend (letters are local to this file):
    M  routed rows on this rank, sorted by expert     E  experts on this rank
    K  input features     N  output features          R  rank, gate and up stacked count as one
"""

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

BACKENDS = ("reference", "loop", "grouped_mm")
ENV_BACKEND = "MEGALORA_GROUPED_LORA"
GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGN_BYTES = 16  # grouped_mm reads rows by TMA: row strides and start addresses are multiples of this
DELTA_COLUMNS = 256  # grouped_mm cannot add into its output; this bounds its temporary to M x 256


def _row_bounds(offsets_E: torch.Tensor, num_rows: int) -> list[int]:
    """[0, end of expert 0, ..., M] on the host. Reading a device tensor waits for the device."""
    bounds = [0, *offsets_E.tolist()]
    if bounds[-1] != num_rows or any(start > end for start, end in pairwise(bounds)):
        raise ValueError(
            f"grouped_lora: offsets must never decrease and end at M={num_rows}, the rows of x; got {bounds[1:]}"
        )
    return bounds


# ---- 1. reference: the specification, read this first -------------------------------------------


def grouped_lora_ref(
    x_MK: torch.Tensor, weight_ENK: torch.Tensor, offsets_E: torch.Tensor,
    a_ERK: torch.Tensor | None = None, b_ENR: torch.Tensor | None = None, x_lora_MK: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The same function in plain PyTorch; autograd derives the gradients. Slow, and the only spec."""
    rows, source_MK = [], x_MK if x_lora_MK is None else x_lora_MK
    for e, (i, j) in enumerate(pairwise(_row_bounds(offsets_E, x_MK.shape[0]))):
        y = x_MK[i:j] @ weight_ENK[e].T
        if a_ERK is not None and b_ENR is not None:
            y = y + (source_MK[i:j] @ a_ERK[e].T) @ b_ENR[e].T
        rows.append(y)
    return torch.cat(rows)


# ---- 2. launchers: grouped GEMMs, tensors in, tensors out, no autograd --------------------------


class _Loop:
    """One GEMM per expert, written into its rows of one preallocated output. Any device and dtype."""

    def __init__(self, offsets_E: torch.Tensor, num_rows: int) -> None:
        self.spans = list(enumerate(pairwise(_row_bounds(offsets_E, num_rows))))

    def dense(self, t: torch.Tensor) -> torch.Tensor:
        return t  # torch.mm reads any strides

    def pad_rank(self, t: torch.Tensor, dim: int) -> torch.Tensor:
        return t  # and any rank

    def matmul(self, x_MK: torch.Tensor, w_EKN: torch.Tensor) -> torch.Tensor:
        """x[m] @ w[e] -> y_MN."""
        y_MN = x_MK.new_empty(x_MK.shape[0], w_EKN.shape[2])
        for e, (i, j) in self.spans:
            torch.mm(x_MK[i:j], w_EKN[e], out=y_MN[i:j])
        return y_MN

    def matmul_add_(self, y_MN: torch.Tensor, s_MR: torch.Tensor, w_ERN: torch.Tensor) -> None:
        """y[m] += s[m] @ w[e], in place."""
        for e, (i, j) in self.spans:
            y_MN[i:j].addmm_(s_MR[i:j], w_ERN[e])

    def outer(self, g_MR: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
        """g[rows of e].T @ x[rows of e] -> out_ERK. No rows: a GEMM over nothing, so exact zeros."""
        out_ERK = x_MK.new_empty(len(self.spans), g_MR.shape[1], x_MK.shape[1])
        for e, (i, j) in self.spans:
            torch.mm(g_MR[i:j].T, x_MK[i:j], out=out_ERK[e])
        return out_ERK


def _find_grouped_mm() -> Callable[..., torch.Tensor] | None:
    """The public name where torch has it, else the private one it grew out of."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


_grouped_mm: Any = _find_grouped_mm()


class _GroupedMM:
    """torch's grouped GEMM for every product; same methods as _Loop. The offsets stay on the device."""

    def __init__(self, offsets_E: torch.Tensor, num_rows: int) -> None:
        if offsets_E.device.type == "cpu":  # free there; on a device it would wait for the device
            _row_bounds(offsets_E, num_rows)
        self.offsets_E = offsets_E

    def dense(self, t: torch.Tensor) -> torch.Tensor:
        """t itself where grouped_mm can read it, else an aligned copy (.sum().backward() has stride 0)."""
        steps = (*t.stride()[:-1], t.storage_offset())
        aligned = all(n * t.element_size() % ALIGN_BYTES == 0 for n in steps)
        if t.stride(-1) == 1 and t.stride(-2) >= t.shape[-1] and aligned:
            return t
        return t.clone(memory_format=torch.contiguous_format)

    def pad_rank(self, t: torch.Tensor, dim: int) -> torch.Tensor:
        """Zero rank rows up to the alignment: they add nothing, and their gradients are dropped."""
        pad = -t.shape[dim] % (ALIGN_BYTES // t.element_size())
        return self.dense(F.pad(t, (0, pad) if dim == 2 else (0, 0, 0, pad)) if pad else t)

    def matmul(self, x_MK: torch.Tensor, w_EKN: torch.Tensor) -> torch.Tensor:
        if x_MK.shape[0] == 0:  # grouped GEMM kernels may reject an empty problem
            return x_MK.new_empty(0, w_EKN.shape[2])
        return _grouped_mm(x_MK, w_EKN, offs=self.offsets_E)

    def matmul_add_(self, y_MN: torch.Tensor, s_MR: torch.Tensor, w_ERN: torch.Tensor) -> None:
        for y_MC, w_ERC in zip(y_MN.split(DELTA_COLUMNS, 1), w_ERN.split(DELTA_COLUMNS, 2), strict=True):
            y_MC.add_(self.matmul(s_MR, w_ERC))

    def outer(self, g_MR: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
        if x_MK.shape[0] == 0:
            return x_MK.new_zeros(self.offsets_E.numel(), g_MR.shape[1], x_MK.shape[1])
        out_ERK = _grouped_mm(g_MR.T, x_MK, offs=self.offsets_E)
        # An expert without rows comes back as garbage on B200 (pytorch#172439); zero it everywhere.
        empty_E = torch.diff(self.offsets_E, prepend=self.offsets_E.new_zeros(1)) == 0
        return out_ERK.masked_fill_(empty_E[:, None, None], 0)


# ---- 3. autograd --------------------------------------------------------------------------------


class _GroupedLoRA(torch.autograd.Function):
    """Keeps x and the rank-wide S for backward, nothing else of activation size.

    The offsets are saved as a tensor: autograd then notices a caller that overwrites them before backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MK: torch.Tensor, weight_ENK: torch.Tensor, offsets_E: torch.Tensor, a_ERK: torch.Tensor | None,
        b_ENR: torch.Tensor | None, x_lora_MK: torch.Tensor | None, gemms_type: type[_Loop] | type[_GroupedMM],
    ) -> torch.Tensor:  # fmt: skip
        gemms, s_MR = gemms_type(offsets_E, x_MK.shape[0]), None
        source_MK = x_MK if x_lora_MK is None else x_lora_MK
        dense_MK = gemms.dense(x_MK)
        y_MN = gemms.matmul(dense_MK, weight_ENK.transpose(1, 2))
        if a_ERK is not None and b_ENR is not None:
            dense_MK = dense_MK if x_lora_MK is None else gemms.dense(x_lora_MK)
            s_MR = gemms.matmul(dense_MK, gemms.pad_rank(a_ERK, 1).transpose(1, 2))
            gemms.matmul_add_(y_MN, s_MR, gemms.pad_rank(b_ENR, 2).transpose(1, 2))
        da_needs_x, db_needs_s = ctx.needs_input_grad[3:5]
        kept = (source_MK if da_needs_x else None, s_MR if db_needs_s else None)
        ctx.save_for_backward(*kept, weight_ENK, offsets_E, a_ERK, b_ENR)
        ctx.gemms_type, ctx.has_x_lora = gemms_type, x_lora_MK is not None
        return y_MN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MK, s_MR, weight_ENK, offsets_E, a_ERK, b_ENR = ctx.saved_tensors
        need_dx, _, _, need_da, need_db, need_dx_lora, _ = ctx.needs_input_grad
        gemms = ctx.gemms_type(offsets_E, dy_MN.shape[0])
        dy_MN = gemms.dense(dy_MN)
        dx_MK = gemms.matmul(dy_MN, weight_ENK) if need_dx else None
        da_ERK = db_ENR = dx_lora_MK = None
        if a_ERK is not None and (need_dx or need_da or need_dx_lora):
            ds_MR = gemms.matmul(dy_MN, gemms.pad_rank(b_ENR, 2))
            if need_dx_lora:
                dx_lora_MK = gemms.matmul(ds_MR, gemms.pad_rank(a_ERK, 1))
            elif dx_MK is not None and not ctx.has_x_lora:
                gemms.matmul_add_(dx_MK, ds_MR, gemms.pad_rank(a_ERK, 1))
            if need_da:
                da_ERK = gemms.outer(ds_MR, gemms.dense(x_MK))[:, : a_ERK.shape[1]]
        if need_db:
            db_ENR = gemms.outer(dy_MN, s_MR)[:, :, : b_ENR.shape[2]]
        return dx_MK, None, None, da_ERK, db_ENR, dx_lora_MK, None


# ---- 4. public function -------------------------------------------------------------------------


def _check_base(x_MK: torch.Tensor, weight_ENK: torch.Tensor, offsets_E: torch.Tensor) -> None:
    x, w = tuple(x_MK.shape), tuple(weight_ENK.shape)
    if len(x) != 2 or len(w) != 3 or w[0] == 0:
        raise ValueError(f"grouped_lora: want x [M, K] and weight [E, N, K] with E >= 1; got x {x} and weight {w}")
    if x[1] != w[2]:
        raise ValueError(
            f"grouped_lora: x has {x[1]} features but weight {w[2]}; want x {x} = [M, K], weight {w} = [E, N, K]"
        )
    if offsets_E.shape != w[:1] or offsets_E.dtype != torch.int32:
        raise ValueError(
            f"grouped_lora: offsets must be int32 of shape ({w[0]},), one end row per expert; "
            f"got {offsets_E.dtype} of shape {tuple(offsets_E.shape)}"
        )
    if weight_ENK.requires_grad:
        raise ValueError(
            "grouped_lora: weight is frozen, but weight.requires_grad is True; call weight.requires_grad_(False)"
        )


def _check_adapter(weight_ENK: torch.Tensor, a_ERK: torch.Tensor | None, b_ENR: torch.Tensor | None) -> None:
    if (a_ERK is None) != (b_ENR is None):
        given, missing = ("b", "a") if a_ERK is None else ("a", "b")
        raise ValueError(f"grouped_lora: {given} was given without {missing}; pass both, or neither for the base alone")
    if a_ERK is None or b_ENR is None:
        return
    (E, N, K), a, b = weight_ENK.shape, tuple(a_ERK.shape), tuple(b_ENR.shape)
    if len(a) != 3 or a[0] != E or a[2] != K or a[1] == 0:
        raise ValueError(f"grouped_lora: a is {a}, want [E, R, K] = ({E}, R, {K}) with R >= 1")
    if b != (E, N, a[1]):
        raise ValueError(f"grouped_lora: b is {b}, want [E, N, R] = ({E}, {N}, {a[1]}), R taken from a")


def _check_placement(x_MK: torch.Tensor, offsets_E: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.dtype != x_MK.dtype:
            raise ValueError(f"grouped_lora: {name} is {t.dtype} but x is {x_MK.dtype}; cast {name} before the call")
    for name, t in {**others, "offsets": offsets_E}.items():
        if t is not None and t.device != x_MK.device:
            raise ValueError(f"grouped_lora: {name} is on {t.device} but x is on {x_MK.device}")


def _why_not_grouped_mm(x_MK: torch.Tensor, weight_ENK: torch.Tensor) -> str | None:
    """What keeps grouped_mm from running here, or None. Looks at dtypes and strides only, so it never waits."""
    if _grouped_mm is None:
        return f"torch {torch.__version__} has no grouped_mm"
    if x_MK.dtype not in GROUPED_MM_DTYPES:
        return f"{x_MK.dtype} is not one of {', '.join(map(str, GROUPED_MM_DTYPES))}"
    size, (_, N, K) = x_MK.element_size(), weight_ENK.shape
    if N * size % ALIGN_BYTES or K * size % ALIGN_BYTES:
        return f"rows of K={K} and N={N} take {K * size} and {N * size} bytes, not multiples of {ALIGN_BYTES}"
    expert, row, col = weight_ENK.stride()
    pitch = row if col == 1 and row >= K else col if row == 1 and col >= N else None
    if pitch is None or any(n * size % ALIGN_BYTES for n in (pitch, expert, weight_ENK.storage_offset())):
        return f"weight strides {weight_ENK.stride()} are not those of dense rows aligned to {ALIGN_BYTES} bytes"
    return None


def _select_backend(backend: str | None, x_MK: torch.Tensor, weight_ENK: torch.Tensor) -> str:
    name = backend if backend is not None else os.environ.get(ENV_BACKEND) or None
    if name is not None and name not in BACKENDS:
        source = "backend" if backend is not None else f"the environment variable {ENV_BACKEND}"
        raise ValueError(f"grouped_lora: {source} is {name!r}, want one of {', '.join(BACKENDS)}")
    if name in ("reference", "loop") or (name is None and not x_MK.is_cuda):
        return name or "loop"
    problem = _why_not_grouped_mm(x_MK, weight_ENK)
    if name is not None and problem is not None:
        raise ValueError(f"grouped_lora: backend 'grouped_mm' cannot run: {problem}; use 'loop' or 'reference'")
    return "loop" if problem else "grouped_mm"


def grouped_lora(
    x_MK: torch.Tensor, weight_ENK: torch.Tensor, offsets_E: torch.Tensor,
    a_ERK: torch.Tensor | None = None, b_ENR: torch.Tensor | None = None,
    *, x_lora_MK: torch.Tensor | None = None, backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Per-expert frozen linear plus LoRA (Hu et al. 2021, eq. 3). Differentiable once in x, a, b and x_lora.

    Args:
        x_MK: routed rows sorted by expert, any strides.
        weight_ENK: frozen base weights in x's dtype.
        offsets_E: int32, cumulative row ends; the last one equals M. Checked where the offsets are on the host or
            read there anyway; with grouped_mm on a device it is the caller's promise, and rows beyond it are garbage.
        a_ERK, b_ENR: the adapter in x's dtype, scaling folded into b. Two adapters that share x (gate and up) are
            one: A stacked to [E, 2r, K], B block-diagonal [E, N, 2r]. Neither: the base alone.
        x_lora_MK: what A reads in place of x: x after dropout. The base reads x.
        backend: "reference", "loop" or "grouped_mm". None reads MEGALORA_GROUPED_LORA, and without it takes
            grouped_mm on CUDA where dtype and strides allow, else loop.

    Returns:
        y_MN in x's dtype. GEMMs accumulate in float32 (float64 for float64); experts without rows get exact zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a weight that requires a gradient, half an adapter,
            an unknown back end or one that cannot run here.
    """
    _check_base(x_MK, weight_ENK, offsets_E)
    _check_adapter(weight_ENK, a_ERK, b_ENR)
    _check_placement(x_MK, offsets_E, weight=weight_ENK, a=a_ERK, b=b_ENR, x_lora=x_lora_MK)
    if x_lora_MK is not None and (a_ERK is None or x_lora_MK.shape != x_MK.shape):
        raise ValueError(
            f"grouped_lora: x_lora is {tuple(x_lora_MK.shape)}; it needs a, b and x's shape {tuple(x_MK.shape)}"
        )
    name = _select_backend(backend, x_MK, weight_ENK)
    if name == "reference":
        return grouped_lora_ref(x_MK, weight_ENK, offsets_E, a_ERK, b_ENR, x_lora_MK)
    return _GroupedLoRA.apply(
        x_MK, weight_ENK, offsets_E, a_ERK, b_ENR, x_lora_MK, _Loop if name == "loop" else _GroupedMM
    )

"""Grouped LoRA linear: every routed token goes through its own expert's frozen weight and adapter.

    y[m] = W[e] x[m] + B[e] (A[e] x[m])    for offsets[e - 1] <= m < offsets[e]   (offsets[-1] := 0)

Backward, with S = X A^T and dS = dY B (W is frozen, so there is no dW):

    dX = dY W + dS A        dA[e] = dS[e]^T X[e]        dB[e] = dY[e]^T S[e]

Shape legend: M routed rows, sorted by expert   E experts on this rank   K inputs   N outputs
R rank; gate and up stacked count as one
"""

from typing import Any

import torch

from .augmented_weight import AugmentedWeight
from .backend import choose
from .checks import check_adapter, check_base, check_placement
from .engine import Weight, make_engine
from .grouped_gemm import grouped_gemm_ref
from .routing import Routing
from .shrink import shrink_ref

# ---- 1. reference: the specification, read this first --------------------------------------------


def grouped_lora_ref(
    x_MK: torch.Tensor, weight_ENK: torch.Tensor, offsets_E: torch.Tensor,
    a_ERK: torch.Tensor | None = None, b_ENR: torch.Tensor | None = None,
    x_lora_MK: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The same function in plain PyTorch; autograd derives the gradients. Slow, and the only
    spec."""
    routing = Routing(offsets_E, x_MK.shape[0])
    w_EKN = weight_ENK.transpose(1, 2)
    if a_ERK is None or b_ENR is None:
        return grouped_gemm_ref(x_MK, w_EKN, routing)
    s_MR = shrink_ref(x_MK if x_lora_MK is None else x_lora_MK, a_ERK, routing)
    return grouped_gemm_ref(x_MK, w_EKN, routing, s_MR, (b_ENR.transpose(1, 2),))


# ---- 2. autograd ---------------------------------------------------------------------------------


class _GroupedLoRA(torch.autograd.Function):
    """Keeps x and the rank-wide S for backward, nothing else of activation size.

    The offsets are saved as a tensor: autograd then notices a caller that overwrites them before
    backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MK: torch.Tensor, weight_ENK: torch.Tensor | None, offsets_E: torch.Tensor,
        a_ERK: torch.Tensor | None,
        b_ENR: torch.Tensor | None, x_lora_MK: torch.Tensor | None, joined: AugmentedWeight | None,
        backend: str,
    ) -> torch.Tensor:  # fmt: skip
        routing = Routing(offsets_E, x_MK.shape[0])
        weight = Weight(joined or weight_ENK)  # pyright: ignore[reportArgumentType]
        engine = make_engine(backend, routing)
        rows = engine.shrink(x_MK, None if a_ERK is None else (a_ERK,), weight, x_lora=x_lora_MK)
        y_MN = engine.linear(rows, weight, None if b_ENR is None else (b_ENR.transpose(1, 2),))
        da_needs_x, db_needs_s = ctx.needs_input_grad[3:5]
        x_kept = (x_MK if x_lora_MK is None else x_lora_MK) if da_needs_x else None
        s_kept = rows.s_MR.contiguous() if rows.s_MR is not None and db_needs_s else None
        ctx.save_for_backward(x_kept, s_kept, weight_ENK, offsets_E, a_ERK, b_ENR)
        ctx.backend = backend
        ctx.joined = joined
        ctx.has_x_lora = x_lora_MK is not None
        return y_MN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MK, s_MR, weight_ENK, offsets_E, a_ERK, b_ENR = ctx.saved_tensors
        need_dx, _, _, need_da, need_db, need_dx_lora, *_ = ctx.needs_input_grad
        weight = Weight(ctx.joined or weight_ENK)
        routing = Routing(offsets_E, dy_MN.shape[0])
        engine = make_engine(ctx.backend, routing)
        dx_MK = da_ERK = db_ENR = dx_lora_MK = None
        b_ERN = (
            b_ENR.transpose(1, 2)
            if a_ERK is not None and (need_dx or need_da or need_dx_lora)
            else None
        )
        rows = engine.shrink(dy_MN, None if b_ERN is None else (b_ERN,), weight)
        ds_MR: Any = rows.s_MR
        if need_dx and ctx.has_x_lora:
            dx_MK = engine.dgrad(engine.shrink(dy_MN, None, weight), weight, None)
        elif need_dx:
            dx_MK = engine.dgrad(rows, weight, a_ERK)
        if need_dx_lora:
            dx_lora_MK = engine.from_rank(ds_MR, a_ERK)  # pyright: ignore[reportArgumentType]
        shapes = [
            None if t is None else t.shape[1:]
            for t in (a_ERK if need_da else None, b_ENR if need_db else None)
        ]
        sums = engine.sums(dy_MN, shapes)
        if need_da:
            engine.wgrad(ds_MR, x_MK, sums.places[0])
        if need_db:
            engine.wgrad(s_MR, dy_MN, sums.places[1].transpose(1, 2))  # pyright: ignore[reportOptionalMemberAccess]
        _, (da_ERK, db_ENR) = sums.finish()
        return dx_MK, None, None, da_ERK, db_ENR, dx_lora_MK, None, None


# ---- 3. public function --------------------------------------------------------------------------


def grouped_lora(
    x_MK: torch.Tensor, weight_ENK: torch.Tensor | AugmentedWeight, offsets_E: torch.Tensor,
    a_ERK: torch.Tensor | None = None, b_ENR: torch.Tensor | None = None,
    *, x_lora_MK: torch.Tensor | None = None, backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Per-expert frozen linear plus LoRA (Hu et al. 2021, eq. 3). Differentiable once in x, a, b
    and x_lora.

    Args:
        x_MK: routed rows sorted by expert, any strides.
        weight_ENK: frozen base weights in x's dtype, or ``AugmentedWeight`` ones with room for an
            adapter of this rank.
        offsets_E: int32, cumulative row ends; the last one equals M. Checked where the offsets are
            on the host or read there anyway; else it is the caller's promise, and rows beyond it
            are garbage.
        a_ERK, b_ENR: the adapter in x's dtype, scaling folded into b. Two adapters that share x
            (gate and up) are one: A stacked to [E, 2r, K], B block-diagonal [E, N, 2r]. Neither:
            the base alone.
        x_lora_MK: what A reads in place of x: x after dropout. The base reads x.
        backend: "reference", "loop", "grouped_mm" or "triton". None reads MEGALORA_BACKEND, and
            without it follows the rule in ``backend.py``.

    Returns:
        y_MN in x's dtype. GEMMs accumulate in float32 (float64 for float64); gradients of experts
        without rows are zero.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a weight that requires a gradient,
            half an adapter, an unknown back end or one that cannot run here.
    """
    weight = _checked(x_MK, weight_ENK, offsets_E, a_ERK, b_ENR, x_lora_MK)
    rank = 0 if a_ERK is None else a_ERK.shape[1]
    num_rows = x_MK.shape[0]
    has_room = weight.joined is not None
    name = choose(backend, "grouped_lora", x_MK, num_rows, rank, [weight.like_ENK], has_room)
    if name == "reference":
        return grouped_lora_ref(x_MK, weight.own_copy(), offsets_E, a_ERK, b_ENR, x_lora_MK)
    return _GroupedLoRA.apply(  # pyright: ignore
        x_MK, weight.kept, offsets_E.contiguous(), a_ERK, b_ENR, x_lora_MK, weight.not_kept, name
    )


def _checked(
    x_MK: torch.Tensor, weight_ENK: torch.Tensor | AugmentedWeight, offsets_E: torch.Tensor,
    a_ERK: torch.Tensor | None, b_ENR: torch.Tensor | None, x_lora_MK: torch.Tensor | None,
) -> Weight:  # fmt: skip
    """The weight, once all operands are known to fit each other; else ``ValueError``."""
    weight = Weight(weight_ENK)
    check_base("grouped_lora", x_MK, weight.like_ENK, offsets_E)
    check_adapter("grouped_lora", weight.like_ENK, a_ERK, b_ENR)
    check_placement(
        "grouped_lora", x_MK, offsets_E, weight=weight.like_ENK, a=a_ERK, b=b_ENR, x_lora=x_lora_MK
    )
    if x_lora_MK is not None and (a_ERK is None or x_lora_MK.shape != x_MK.shape):
        raise ValueError(
            f"grouped_lora: x_lora is {tuple(x_lora_MK.shape)}; it needs a, b and x's shape"
            f" {tuple(x_MK.shape)}"
        )
    weight.check_room("grouped_lora", 0 if a_ERK is None else a_ERK.shape[1])
    return weight

"""LoRA of a dense linear whose delta is accumulated into the base's output.

    y = x Wᵀ + h Bᵀ,  h = x Aᵀ        dx = dy W + dh A,  dh = dy B,  dA = dhᵀ x,  dB = dyᵀ h

``add_low_rank`` is the part behind h alone: under tensor parallelism h travels between the two
halves.

Shape legend: the last dimension is features, all before it are rows   K inputs   N outputs   R rank
"""

from typing import Any

import torch
import torch.nn.functional as F

# ---- 1. reference --------------------------------------------------------------------------------


def dense_lora_ref(
    x: torch.Tensor, weight_NK: torch.Tensor, a_RK: torch.Tensor, b_NR: torch.Tensor
) -> torch.Tensor:
    """The specification; differentiable. Makes the delta as wide as y."""
    return F.linear(x, weight_NK) + F.linear(F.linear(x, a_RK), b_NR)


# ---- 2. autograd ---------------------------------------------------------------------------------


class _AddLowRank(torch.autograd.Function):
    """``base + h b^T`` written into ``base``'s memory by one GEMM.

    ``base`` is the output of a frozen linear, which saves only its weight for backward, so nothing
    needs the old value; sharing its version counter makes autograd refuse should that ever change.
    """

    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, h: torch.Tensor, b_NR: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h, b_NR)
        # detach() shares memory and version counter, and leaves base's own graph behind.
        out = base.detach()
        out.view(-1, out.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), b_NR.t())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h, b_NR = ctx.saved_tensors
        flat = grads[0].reshape(-1, grads[0].shape[-1])
        return grads[0], (flat @ b_NR).view_as(h), flat.t() @ h.reshape(-1, h.shape[-1])


class _DenseLoRA(torch.autograd.Function):
    """One node: keeps x and h, and adds dh A into dx where autograd would make and add a second
    dx."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: torch.Tensor,
        weight_NK: torch.Tensor,
        a_RK: torch.Tensor,
        b_NR: torch.Tensor,
    ) -> torch.Tensor:
        h_MR = x_MK @ a_RK.t()
        need_da, need_db = ctx.needs_input_grad[2:4]
        # dA = dhᵀ x needs x, dB = dyᵀ h needs h [M, R]; dx needs neither.
        ctx.save_for_backward(
            x_MK if need_da else None, h_MR if need_db else None, weight_NK, a_RK, b_NR
        )
        return (x_MK @ weight_NK.t()).addmm_(h_MR, b_NR.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MK, h_MR, weight_NK, a_RK, b_NR = ctx.saved_tensors
        need_dx, _, need_da, need_db = ctx.needs_input_grad
        dh_MR = dy_MN @ b_NR
        dx_MK = da_RK = db_NR = None
        if need_dx:
            # The base's product first, as wide as x; the adapter's is added in its memory.
            dx_MK = (dy_MN @ weight_NK).addmm_(dh_MR, a_RK)
        if need_da:
            da_RK = dh_MR.t() @ x_MK
        if need_db:
            db_NR = dy_MN.t() @ h_MR
        return dx_MK, None, da_RK, db_NR


# ---- 3. public functions -------------------------------------------------------------------------


def dense_lora(
    x: torch.Tensor, weight_NK: torch.Tensor, a_RK: torch.Tensor, b_NR: torch.Tensor
) -> torch.Tensor:
    """Frozen dense linear plus LoRA (Hu et al. 2021, eq. 3). Differentiable once in x, a and b.

    Args:
        x: ``[..., K]``.
        weight_NK: frozen, in x's dtype.
        a_RK, b_NR: the adapter in x's dtype, scaling folded into b.

    Returns:
        ``[..., N]`` in x's dtype; no temporary as wide as the output is made beside it.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a weight that requires a gradient.
    """
    N, K = weight_NK.shape
    R, a_in = a_RK.shape
    b = tuple(b_NR.shape)
    if x.shape[-1] != K or a_in != K or b != (N, R):
        raise ValueError(
            "dense_lora: want x [..., K], weight [N, K], a [R, K], b [N, R]; "
            f"got {tuple(x.shape)}, {(N, K)}, {(R, a_in)}, {b}"
        )
    for name, t in {"weight": weight_NK, "a": a_RK, "b": b_NR}.items():
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"dense_lora: {name} is {t.dtype} on {t.device} but x is {x.dtype} on {x.device}"
            )
    if weight_NK.requires_grad:
        raise ValueError("dense_lora: weight is frozen, but weight.requires_grad is True")
    y_MN: Any = _DenseLoRA.apply(x.reshape(-1, K), weight_NK, a_RK, b_NR)
    return y_MN.view(*x.shape[:-1], N)


def add_low_rank(base: torch.Tensor, h: torch.Tensor, b_NR: torch.Tensor) -> torch.Tensor:
    """``base [..., N] + h [..., R] bᵀ``, in place. ``base`` must not be saved for anyone's
    backward."""
    return _AddLowRank.apply(base.contiguous(), h, b_NR)  # pyright: ignore[reportReturnType]

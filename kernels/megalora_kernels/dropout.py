"""Experts whose adapters read a dropped-out input: two grouped LoRA linears around SwiGLU, not one
node.

A reads x after dropout and the base reads x whole, so that both are kept, permuted. The mask is
torch's, from its generator.

Shape legend: T tokens or rows of x   M routed rows   E experts   H hidden   I intermediate   J = 2I
"""

from typing import Any

import torch
import torch.nn.functional as F

from .augmented_weight import AugmentedWeight
from .engine import make_engine
from .expert_factors import ExpertFactors
from .grouped_lora import grouped_lora
from .routing import Routing, permute, unpermute


class _SwiGLU(torch.autograd.Function):
    """SwiGLU alone, for experts with dropout: keeps y and p, not the float32 values between."""

    @staticmethod
    def forward(
        ctx: Any, y_MJ: torch.Tensor, p_M: torch.Tensor, routing: Routing, backend: str
    ) -> torch.Tensor:
        engine = make_engine(backend, routing)
        ctx.save_for_backward(y_MJ, p_M, routing.offsets_E)
        ctx.backend = backend
        h_MI = y_MJ.new_empty(y_MJ.shape[0], y_MJ.shape[1] // 2)
        engine.passes.swiglu(y_MJ, p_M, None, routing, h_MI, None)
        return h_MI

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh_MI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y_MJ, p_M, offsets_E = ctx.saved_tensors
        engine = make_engine(ctx.backend, Routing(offsets_E, y_MJ.shape[0]))
        dy_MJ = torch.empty_like(y_MJ)
        sums = engine.sums(y_MJ, [])
        engine.passes.swiglu_backward(
            engine.dense(dh_MI), y_MJ, p_M, engine.routing, dy_MJ, None, None, sums, None, ()
        )
        dp_M, _ = sums.finish()
        return dy_MJ, dp_M, None, None


def experts_with_dropout(
    x_TH: torch.Tensor,
    gate_up_EJH: torch.Tensor | AugmentedWeight,
    down_EHI: torch.Tensor | AugmentedWeight,
    p_M: torch.Tensor,
    routing: Routing,
    gate_up: ExpertFactors | None,
    down: ExpertFactors | None,
    dropout: float,
    backend: str,
) -> torch.Tensor:
    """``expert_mlp`` for dropout > 0; operands are as there, and checked there."""

    def linear(
        x: torch.Tensor, weight: torch.Tensor | AugmentedWeight, adapter: ExpertFactors | None
    ) -> torch.Tensor:
        if adapter is None:
            return grouped_lora(x, weight, routing.offsets_E, backend=backend)
        num_rows = weight.N if isinstance(weight, AugmentedWeight) else weight.shape[1]
        if adapter.gain is not None:
            raise ValueError(f"expert_mlp: gains go with dropout 0, got {dropout}")
        b = adapter.whole_b(num_rows)
        dropped = F.dropout(x, dropout)
        return grouped_lora(
            x, weight, routing.offsets_E, adapter.a, b, x_lora_MK=dropped, backend=backend
        )

    y_MJ = linear(permute(x_TH, routing), gate_up_EJH, gate_up)
    h_MI: Any = _SwiGLU.apply(y_MJ, p_M.contiguous(), routing, backend)
    return unpermute(linear(h_MI, down_EHI, down), routing)

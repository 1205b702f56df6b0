"""LoRA for the router of a mixture-of-experts layer."""

from typing import Any

from megalora_kernels import add_low_rank
from torch import Tensor, nn

from megalora.lora.factors import LoRAFactors


class RouterLoRA(nn.Module):
    """A top-k router whose logits get a delta before the choice of experts.

    tensor   shape on one rank   across TP     gradient across TP
    A        [R, H]              replicated    partial: each rank saw S/t tokens
    B        [E, R]              replicated    partial: each rank saw S/t tokens
    x        [S/t, B, H]         dim 0
    """

    def __init__(self, base: Any, factors: LoRAFactors, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.factors = factors
        self.dropout = dropout
        factors.base_weight = lambda: base.weight

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # TopKRouter.forward in two steps, with the delta between them.
        logits = self.base.gating(x)
        h = self.factors.times_a(x, self.dropout if self.training else 0.0)
        # Logits are float32 where a family routes in float32, whatever the adapter's dtype.
        logits = add_low_rank(logits, h.to(logits.dtype), self.factors.stacked_b().to(logits.dtype))
        return self.base.routing(logits, padding_mask=padding_mask)

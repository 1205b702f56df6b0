"""LoRA for routed experts: each expert has its own adapters on gate, up and down."""

from typing import Any

from torch import Tensor, nn

from megalora.lora.factors import LoRAFactors
from megalora.model.lowrank import LowRank


class ExpertsLoRA(nn.Module):
    """Fused experts with per-expert adapters; either of ``gate_up`` and ``down`` may be None.

        tensor     shape on one rank    split                        gradient
        gate_up A  [E/ep, R, H]         dim 0 over EP                partial over ETP
        gate_up B  [E/ep, I/n, r] each  dim 0 over EP, 1 over ETP    whole
        down A     [E/ep, r, I/n]       dim 0 over EP, 2 over ETP    whole
        down B     [E/ep, H, r]         dim 0 over EP                partial over ETP

    Under ETP the experts' output is a partial sum that the dispatcher reduces; so is the delta. Nothing is communicated here.
    """

    def __init__(self, base: Any, gate_up: LoRAFactors | None, down: LoRAFactors | None, dropout: float) -> None:
        super().__init__()
        self.base, self.gate_up, self.down, self.dropout = base, gate_up, down, dropout

    def forward(self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """x ``[M, H]`` sorted by local expert, tokens_per_expert ``[E/ep]``, probs ``[M]``; returns ``[M, H]``, None."""
        deltas = {"gate_up": self._delta(self.gate_up), "down": self._delta(self.down)}
        return self.base.compute(x, tokens_per_expert, probs, **deltas), None

    def _delta(self, factors: LoRAFactors | None) -> LowRank | None:
        if factors is None:
            return None
        return LowRank(factors.lora_A, factors.stacked_b(), self.dropout if self.training else 0.0)

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; LoRA's are never delayed."""

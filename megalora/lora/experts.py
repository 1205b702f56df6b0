"""LoRA for routed experts: each expert has its own adapters on gate, up and down."""

from typing import Any

from megalora_kernels import Routing
from torch import Tensor, nn

from megalora.lora.factors import LoRAFactors


class ExpertsLoRA(nn.Module):
    """Fused experts with per-expert adapters; either of ``gate_up`` and ``down`` may be None.

        tensor     shape on one rank    split                        gradient
        gate_up A  [E/ep, R, H]         dim 0 over EP                partial over ETP
        gate_up B  [E/ep, I/n, r] each  dim 0 over EP, 1 over ETP    whole
        down A     [E/ep, r, I/n]       dim 0 over EP, 2 over ETP    whole
        down B     [E/ep, H, r]         dim 0 over EP                partial over ETP

    Under ETP the experts' output is a partial sum that the dispatcher reduces; so is the delta.
    Nothing is communicated here.
    """

    def __init__(
        self, base: Any, gate_up: LoRAFactors | None, down: LoRAFactors | None, dropout: float,
        rows_per_expert: float = 0.0,
    ) -> None:  # fmt: skip
        """``rows_per_expert``: expected of a microbatch, which decides whether the weights get room
        for the adapters."""
        super().__init__()
        self.base = base
        self.gate_up = gate_up
        self.down = down
        self.dropout = dropout
        ranks = [0 if factors is None else factors.lora_A.shape[1] for factors in (gate_up, down)]
        if base.gains_from_room(rows_per_expert, max(ranks)):
            base.reserve_adapter_columns(*ranks)

    def forward(self, x: Tensor, routing: Routing, probs: Tensor) -> tuple[Tensor, None]:
        """x ``[T, H]`` as the dispatcher delivers it, probs ``[M]``; returns ``[T, H]``, None."""
        gate_up, down = (
            None if factors is None else factors.adapter() for factors in (self.gate_up, self.down)
        )
        dropout = self.dropout if self.training else 0.0
        return self.base.compute(x, routing, probs, gate_up, down, dropout), None

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; LoRA's are never delayed."""

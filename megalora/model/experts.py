"""Routed experts as two fused, frozen tensors, computed with grouped matrix products.

Shape legend (local to this rank):
    M  routed tokens, sorted by expert      E  experts      H  hidden      I  expert intermediate / etp      R  LoRA rank
"""

from typing import Any

import torch
import torch.nn.functional as F
from megalora_kernels import grouped_lora
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megalora import host
from megalora.model.lowrank import LowRank


def grouped_linear(x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, delta: LowRank | None) -> Tensor:
    """``x W_e^T``, plus the delta where there is one; rows belong to experts as ``offsets_E`` (row ends, int32) says."""
    if delta is None:
        return grouped_lora(x_MK, weight_ENK, offsets_E)
    dropped = F.dropout(x_MK, delta.dropout) if delta.dropout else None
    return grouped_lora(x_MK, weight_ENK, offsets_E, delta.a, delta.b, x_lora_MK=dropped)


class FusedExperts(MegatronModule):
    """This rank's experts; takes and returns what Megatron's token dispatcher hands out and expects.

    tensor      shape on one rank     split
    gate_up     [E/ep, 2I/etp, H]     dim 0 over EP; gate rows first, then up rows, each over ETP
    down        [E/ep, H, I/etp]      dim 0 over EP, dim 2 over ETP
    output      [M, H]                under ETP a partial sum, which the dispatcher reduces
    """

    def __init__(self, num_local_experts: int, config: Any, *, pg_collection: Any, name: str | None = None) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        features, hidden = config.moe_ffn_hidden_size // pg_collection.expt_tp.size(), config.hidden_size
        empty = {"dtype": config.params_dtype, "device": host.device()}
        self.gate_up = nn.Parameter(torch.empty(num_local_experts, 2 * features, hidden, **empty), requires_grad=False)
        self.down = nn.Parameter(torch.empty(num_local_experts, hidden, features, **empty), requires_grad=False)

    def forward(self, x_MH: Tensor, tokens_per_expert: Tensor, probs_M: Tensor) -> tuple[Tensor, None]:
        return self.compute(x_MH, tokens_per_expert, probs_M), None

    def compute(
        self, x_MH: Tensor, tokens_per_expert: Tensor, probs_M: Tensor,
        gate_up: LowRank | None = None, down: LowRank | None = None,
    ) -> Tensor:  # fmt: skip
        """``down(silu(gate(x)) * up(x) * probs)`` for every row, with optional low-rank deltas."""
        offsets_E = tokens_per_expert.cumsum(0).to(x_MH.device, torch.int32)
        gate_MI, up_MI = grouped_linear(x_MH, self.gate_up, offsets_E, gate_up).chunk(2, dim=-1)
        hidden_MI = (F.silu(gate_MI) * up_MI * probs_M.unsqueeze(-1)).to(x_MH.dtype)
        return grouped_linear(hidden_MI, self.down, offsets_E, down)

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; frozen weights have none."""

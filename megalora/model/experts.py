"""Routed experts as two fused, frozen tensors, computed as one node.

Shape legend (local to this rank):
    T  tokens or received rows      M  routed rows, sorted by expert      E  experts      H  hidden
    I  expert intermediate / etp
"""

from typing import Any

import torch
from megalora_kernels import AugmentedWeight, ExpertFactors, Routing, expert_mlp, prefers_grouped_mm
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megalora import host


class FusedExperts(MegatronModule):
    """This rank's experts; takes and returns what the token dispatcher hands out and expects.

    tensor      shape on one rank     split
    gate_up     [E/ep, 2I/etp, H]     dim 0 over EP; gate rows first, then up rows, each over ETP
    down        [E/ep, H, I/etp]      dim 0 over EP, dim 2 over ETP
    output      [T, H]                under ETP a partial sum, which the dispatcher reduces
    """

    def __init__(
        self, num_local_experts: int, config: Any, *, pg_collection: Any, name: str | None = None
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        features = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        hidden = config.hidden_size
        empty = {"dtype": config.params_dtype, "device": host.device()}
        self.gate_up = nn.Parameter(
            torch.empty(num_local_experts, 2 * features, hidden, **empty), requires_grad=False
        )
        self.down = nn.Parameter(
            torch.empty(num_local_experts, hidden, features, **empty), requires_grad=False
        )
        self.recompute = False
        """Compute gate_up again in backward instead of keeping it."""
        self.joined: dict[str, AugmentedWeight] = {}

    def gains_from_room(self, rows_per_expert: float, rank: int) -> bool:
        """Whether the back end that wants adapters beside the weights will be the one taken here.

        All ranks of a run decide alike: rows are those expected of the config, not those of a
        microbatch.

        Args:
            rows_per_expert: expected of a microbatch (``ModelShape.rows_per_expert``).
            rank: the larger of the stacked ranks of gate_up and down.
        """
        weight = self.down
        layer = (weight.shape[1], weight.shape[2])
        return weight.is_cuda and prefers_grouped_mm(
            weight.dtype, weight.device, rows_per_expert, rank, layer
        )

    def reserve_adapter_columns(self, gate_up_rank: int, down_rank: int) -> None:
        """Move the weights to where adapters of these ranks (0: none) can lie beside them.

        The parameters become views of the larger buffers. One weight at a time exists twice.
        """
        for name, rank in (("gate_up", gate_up_rank), ("down", down_rank)):
            if rank:
                parameter = getattr(self, name)
                self.joined[name] = AugmentedWeight(parameter.data, rank)
                parameter.data = self.joined[name].weight

    def forward(self, x_TH: Tensor, routing: Routing, probs_M: Tensor) -> tuple[Tensor, None]:
        return self.compute(x_TH, routing, probs_M), None

    def compute(
        self,
        x_TH: Tensor,
        routing: Routing,
        probs_M: Tensor,
        gate_up: ExpertFactors | None = None,
        down: ExpertFactors | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """``down(silu(gate(x)) * up(x) * probs)`` for every row and summed per token, with optional
        adapters."""
        for name, joined in self.joined.items():
            assert getattr(self, name).data_ptr() == joined.weight.data_ptr(), (
                f"{name} was moved out of its buffer"
            )
        return expert_mlp(
            x_TH, self.joined.get("gate_up", self.gate_up), self.joined.get("down", self.down),
            probs_M, routing,
            gate_up=gate_up, down=down, dropout=dropout, recompute=self.recompute and self.training,
        )  # fmt: skip

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; frozen weights have none."""

"""Hold routed experts as two fused, frozen tensors and compute them as one autograd node.

Shape legend (local to this rank):
    T  tokens or received rows      M  routed rows, sorted by expert      E  experts      H  hidden
    I  expert intermediate / etp
"""

from typing import Any

from megalora_kernels import AugmentedWeight, ExpertFactors, Routing, expert_mlp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megalora import host
from megalora.model.formats import BOTH_PLAIN, ExpertFormats, WeightFormat
from megalora.model.held_codes import HeldCodes


def as_matrix(stored: Tensor | AugmentedWeight) -> Tensor:
    """``[E, N, K]``: the weight, which loading writes to."""
    return stored.weight if isinstance(stored, AugmentedWeight) else stored


class FusedExperts(MegatronModule):
    """This rank's experts; takes and returns what the token dispatcher hands out and expects.

    tensor      shape on one rank     split
    gate_up     [E/ep, 2I/etp, H]     dim 0 over EP; gate rows first, then up rows, each over ETP
    down        [E/ep, H, I/etp]      dim 0 over EP, dim 2 over ETP
    output      [T, H]                under ETP a partial sum, which the dispatcher reduces
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        *,
        pg_collection: Any,
        name: str | None = None,
        formats: ExpertFormats = BOTH_PLAIN,
    ) -> None:
        """``formats``: how the two weights lie in memory for as long as the model lives."""
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        # I/etp: features of an expert that this rank holds.
        features = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        hidden = config.hidden_size
        sizes = {
            "gate_up": (num_local_experts, 2 * features, hidden),
            "down": (num_local_experts, hidden, features),
        }
        self.stored: dict[str, Any] = {}
        """Plain weights as the kernels take them; the parameters are views of these."""
        # Allocated first and registered as views: loading writes to where the weights stay.
        for weight, of_weight in sizes.items():
            how: WeightFormat = getattr(formats, weight)
            self.stored[weight] = how.allocate(of_weight, config.params_dtype, host.device())
            if isinstance(self.stored[weight], HeldCodes):
                # A module of this name, in place of a parameter.
                self.add_module(weight, self.stored.pop(weight))
                continue
            matrix = as_matrix(self.stored[weight])
            self.register_parameter(weight, nn.Parameter(matrix, requires_grad=False))
        self.recompute = False
        """Compute gate_up again in backward instead of keeping it."""

    def check_room(self, name: str, rank: int) -> None:
        """Raise ``RuntimeError`` where weight ``name`` has room, but not for an adapter of this
        rank."""
        stored = self._operand(name)
        room = stored.room if isinstance(stored, AugmentedWeight) else 0
        if 0 < room < rank:
            raise RuntimeError(
                f"{name} was built with room for rank {room}, its adapter has {rank}. This"
                " is a bug; please report it."
            )

    def _operand(self, name: str) -> Any:
        """Weight ``name`` as the kernels take it."""
        parameter = getattr(self, name)
        if isinstance(parameter, HeldCodes):
            return parameter.operand()
        stored = self.stored[name]
        if not isinstance(stored, AugmentedWeight):
            # The parameter may have been moved or replaced since it was made, ``stored`` was not.
            return parameter
        assert parameter.data_ptr() == stored.weight.data_ptr(), f"{name} left its buffer"
        return stored

    def weight(self, name: str) -> Tensor:
        """``[E/ep, N, K]``; of codes, valid until another weight is decoded."""
        found = getattr(self, name)
        return found.decoded() if isinstance(found, HeldCodes) else found

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
        return expert_mlp(
            x_TH, self._operand("gate_up"), self._operand("down"),
            probs_M, routing,
            gate_up=gate_up, down=down, dropout=dropout, recompute=self.recompute and self.training,
        )  # fmt: skip

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; frozen weights have none."""

"""LoRA for routed experts: each expert has its own adapters on gate, up and down."""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from megalora_kernels import ExpertFactors, Routing, prefers_grouped_mm
from torch import Tensor, nn

from megalora.lora.factors import LoRAFactors
from megalora.lora.magnitude import gains
from megalora.lora.spec import Adapted
from megalora.model.formats import ExpertFormats, WeightFormat
from megalora.model.formats.augmented import Augmented
from megalora.model.formats.plain import PLAIN
from megalora.model.shape import ModelShape


def expert_formats(
    adapted: Iterable[Adapted],
    shape: ModelShape,
    *,
    etp: int,
    dtype: torch.dtype,
    device: torch.device,
    rows_per_expert: float,
) -> dict[int, ExpertFormats]:
    """Formats of the experts of every layer whose weights gain from room for their adapters.

    All ranks of a run decide alike, because rows are counted from the config, not in a microbatch.

    Args:
        etp: expert tensor parallel size.
        dtype: dtype of the weights.
        device: device of the weights.
        rows_per_expert: rows expected in a microbatch (``ModelShape.rows_per_expert``); 0 for a
            model that is not trained.
    """
    ranks: dict[int, dict[str, int]] = defaultdict(lambda: {"gate_up": 0, "down": 0})
    for a in adapted:
        if a.projection.is_expert and a.layer is not None:
            # Gate and up are one fused weight whose A's are stacked: their ranks add up.
            ranks[a.layer][a.projection.module.rpartition(".")[2]] += a.product_rank
    # Of one rank, as the kernels will see it.
    features = shape.expert_intermediate // etp
    formats: dict[int, ExpertFormats] = {}
    for layer, of_layer in ranks.items():
        largest = max(of_layer.values())
        if gains_from_room((shape.hidden, features), dtype, device, rows_per_expert, largest):
            formats[layer] = ExpertFormats(_format(of_layer["gate_up"]), _format(of_layer["down"]))
    return formats


def _format(rank: int) -> WeightFormat:
    """Room for an adapter of this rank; plain for a weight without an adapter."""
    return Augmented(rank) if rank else PLAIN


def gains_from_room(
    layer: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    rows_per_expert: float,
    rank: int,
) -> bool:
    """Whether the kernels will choose the back end that wants adapters beside the weights.

    Args:
        layer: hidden size, and features of an expert on one rank.
        rank: the larger of the stacked ranks of gate_up and down.
    """
    return device.type != "cpu" and prefers_grouped_mm(dtype, device, rows_per_expert, rank, layer)


class ExpertsLoRA(nn.Module):
    """Fused experts with per-expert adapters; either of ``gate_up`` and ``down`` may be None.

        tensor     shape on one rank    split                        gradient
        gate_up A  [E/ep, R, H]         dim 0 over EP                partial over ETP
        gate_up B  [E/ep, I/n, r] each  dim 0 over EP, 1 over ETP    whole
        down A     [E/ep, r, I/n]       dim 0 over EP, 2 over ETP    whole
        down B     [E/ep, H, r]         dim 0 over EP                partial over ETP
        M          as B, without r      as B                         as B

    Under ETP the experts' output is a partial sum that the dispatcher reduces, and the delta is a
    part of it. Nothing is communicated here.
    """

    def __init__(
        self, base: Any, gate_up: LoRAFactors | None, down: LoRAFactors | None, dropout: float
    ) -> None:
        """``base``: ``FusedExperts``, built with room for these adapters or plain; it is not
        changed."""
        super().__init__()
        self.base = base
        self.gate_up = gate_up
        self.down = down
        self.dropout = dropout
        for name, factors in (("gate_up", gate_up), ("down", down)):
            if factors is not None:
                base.check_room(name, sum(a.product_rank for a in factors.adapted))
                # Looked up when it is needed: the parameter may still be moved or replaced.
                factors.base_weight = partial(base.weight, name)

    def forward(self, x: Tensor, routing: Routing, probs: Tensor) -> tuple[Tensor, None]:
        """x ``[T, H]`` as the dispatcher delivers it, probs ``[M]``; returns ``[T, H]``, None."""
        gate_up = _operands(self.gate_up)
        down = _operands(self.down)
        # The kernels draw dropout masks themselves and do not know of ``training``.
        dropout = self.dropout if self.training else 0.0
        return self.base.compute(x, routing, probs, gate_up, down, dropout), None

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; LoRA's are never delayed."""


def _operands(factors: LoRAFactors | None) -> ExpertFactors | None:
    """What the kernels take of an adapter, DoRA's gains included."""
    if factors is None:
        return None
    return factors.adapter(gains(factors) if len(factors.lora_M) else None)

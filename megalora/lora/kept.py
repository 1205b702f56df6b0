"""Hold the adapters of earlier cycles, frozen, beside the one that trains: ``train.relora`` on a
base that is a folder's codes, which nothing can be merged into without rounding it away.

    y = W x + s B A x + s [B_1 ... B_t] [A_1; ...; A_t] x

    parameter       dense, on one rank       experts, on one rank            holds
    lora_A.NAME     [k r, in(/t)]            [E/ep, k r, in(/n)]             A's of k cycles
    lora_B.NAME     [out_NAME(/t), k r]      [E/ep, out_NAME(/n), k r]       their B's

They are cut as the factors that train (``factors.py``). Memory is for all k cycles that a run keeps
and there from its beginning, so that it does not run out in a later one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megalora.lora.shards import cut
from megalora.lora.spec import SHARDINGS, Adapted, FactorName

_RANKS: Mapping[FactorName, int] = {"A": 0, "B": 1}
"""The dimension of each factor that its rank is."""


class KeptFactors(nn.Module):
    """Factors of earlier cycles of the projections of one Megatron module."""

    def __init__(
        self,
        adapted: Sequence[Adapted],
        parameters: Mapping[FactorName, Mapping[str, nn.Parameter]],
    ) -> None:
        """``parameters``: factor -> projection -> its memory, marked as the factor that trains."""
        super().__init__()
        self.adapted = adapted
        self.count = 0
        """t: cycles that are kept so far."""
        self.lora_A = nn.ParameterDict(parameters["A"])
        self.lora_B = nn.ParameterDict(parameters["B"])
        self.requires_grad_(False)

    @torch.no_grad()
    def fill(
        self,
        cycles: Sequence[Mapping[str, Tensor]],
        tensors_of: Mapping[FactorName, Sequence[tuple[tuple[int, ...], int | None]]],
    ) -> None:
        """Keep these cycles and no others.

        Args:
            cycles: whole factors of each by tensor name.
            tensors_of: what ``LoRAFactors.tensors_of`` returns of A and of B.
        """
        for adapted in self.adapted:
            for factor, dim in _RANKS.items():
                memory = getattr(self, f"lora_{factor}")[adapted.name]
                split = SHARDINGS[adapted.projection.kind].split(factor)
                for place, expert in tensors_of[factor]:
                    name = adapted.tensor_name(factor, expert)
                    parts = []
                    for cycle in cycles:
                        parts.append(cut(cycle[name], split, memory.num_shards, memory.shard))
                    rank = adapted.rank * len(cycles)
                    memory[place].narrow(dim, 0, rank).copy_(torch.cat(parts, dim))
        self.count = len(cycles)

    def a(self, adapted: Adapted) -> Tensor:
        """``[..., t r, in]`` of a projection."""
        return self.lora_A[adapted.name][..., : adapted.rank * self.count, :]

    def b(self, adapted: Adapted) -> Tensor:
        """``[..., out, t r]`` of a projection."""
        return self.lora_B[adapted.name][..., : adapted.rank * self.count]

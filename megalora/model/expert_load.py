"""Count how many tokens of a training step go to each expert of each layer, from what the
dispatchers know anyway.

Every token is routed on exactly one rank of the stage that has the layer: data, context and (by the
sequence) tensor parallelism share tokens out. So the sum over the world is the count of the whole
step. Nothing is launched in a layer unless its row has filler, which does not count, and nothing
waits for the device.

Shape legend: L layers of the model   E experts   M microbatches   T tokens of this rank
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.model.dispatcher import RoutedMoELayer


class ExpertLoad:
    """Counts of one step at a time, over this rank's model chunks."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        config: Any = chunks[0].config
        self.num_layers: int = config.num_layers
        self.num_experts: int = config.num_moe_experts or 0
        """0 where no layer has experts, and nothing can be counted."""
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, RoutedMoELayer):
                    module.load = self
        self.active = False
        """Whether the step that runs is counted."""
        self._filler: int | None = None
        self._ends: dict[int, list[Tensor]] = {}
        self._of_filler: dict[int, list[Tensor]] = {}

    @contextmanager
    def microbatch(self, filler: int) -> Iterator[None]:
        """Around the forward pass of a microbatch; what is recomputed in backward is outside of it,
        and is not counted twice.

        Args:
            filler: how many of this rank's tokens are filler, the last ones.
        """
        self._filler = filler if self.active else None
        yield
        self._filler = None

    def add(self, layer: int, pair_ends_E: Tensor, map_TE: Tensor) -> None:
        """Take note of a layer's choices in the microbatch that runs.

        Args:
            layer: its number in the model, from 0.
            pair_ends_E: ends of each expert's pairs among this rank's pairs of token and expert.
            map_TE: bool, the choices themselves.
        """
        if self._filler is None:
            return
        # Read at the end of the step: a reference costs nothing here.
        self._ends.setdefault(layer, []).append(pair_ends_E)
        if self._filler:
            of_filler_E = map_TE[-self._filler :].sum(0)
            self._of_filler.setdefault(layer, []).append(of_filler_E)

    def total(self) -> Tensor:
        """int64 ``[L, E]`` on the device: tokens of the whole step, zeros for layers without
        experts; collective over the world. Ends the counting of this step."""
        rows = [torch.zeros(self.num_experts, dtype=torch.int64, device=host.device())]
        rows *= self.num_layers
        if self._ends:
            ends_LE = _summed(self._ends)
            counts_LE = ends_LE.diff(dim=1, prepend=ends_LE.new_zeros(len(ends_LE), 1))
            if self._of_filler:
                counts_LE = counts_LE - _summed(self._of_filler)
            for layer, counts_E in zip(sorted(self._ends), counts_LE.unbind(0), strict=True):
                rows[layer] = counts_E
        self._ends = {}
        self._of_filler = {}
        self.active = False
        total_LE = torch.stack(rows)
        dist.all_reduce(total_LE)
        return total_LE


def _summed(of_layers: dict[int, list[Tensor]]) -> Tensor:
    """int64 ``[layers in order, E]``: the sum over microbatches, of which each layer had the same
    number."""
    flat: list[Tensor] = []
    for layer in sorted(of_layers):
        flat += of_layers[layer]
    # [layers, M, E]
    stacked = torch.stack(flat).unflatten(0, (len(of_layers), -1))
    return stacked.sum(1, dtype=torch.int64)

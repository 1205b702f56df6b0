"""Say which rows of a fused weight of Megatron's belong to which projection.

The fused q, k, v weight repeats [q heads of a group, its k, its v] for each query group of a rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megalora.lora.spec import make_adapted
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape


@dataclass(frozen=True)
class FusedRows:
    """The rows of a fused weight on one rank: ``row_groups`` times a block of every projection."""

    row_groups: int
    block_rows: Mapping[str, int]
    """Projection -> rows of its block, in their order."""

    def stacked(self, parts: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """``[out]``: vectors ``[out_NAME]`` of projections in the order of the fused rows, zero for
        those without one; dtype and device as those of ``like``."""
        blocks: list[Tensor] = []
        for name, rows in self.block_rows.items():
            sizes = (self.row_groups, rows)
            part = parts.get(name)
            blocks.append(like.new_zeros(sizes) if part is None else part.view(sizes))
        # Side by side within each row group, then the groups one below the other.
        return torch.cat(blocks, dim=-1).flatten()

    def part(self, fused_O: Tensor, name: str) -> Tensor:
        """``[out_NAME]``: the rows of one projection."""
        sizes = list(self.block_rows.values())
        blocks = fused_O.unflatten(0, (self.row_groups, -1)).split(sizes, dim=1)
        return blocks[list(self.block_rows).index(name)].flatten()


def fused_rows(
    fused: list[Projection], layer: int | None, shape: ModelShape, group_size: int
) -> FusedRows:
    """The rows of a weight on one of ``group_size`` ranks; ``fused``: its projections, in order."""
    row_groups = max(1, fused[0].row_groups(shape) // group_size)
    blocks: dict[str, int] = {}
    for projection in fused:
        # Rank and scale do not matter for the sizes of the weight.
        whole = make_adapted(projection, layer, 0, 0.0, 0.0, shape)
        rows = whole.out_features // whole.num_shards("B", group_size)
        blocks[projection.name] = rows // row_groups
    return FusedRows(row_groups, blocks)

"""Fill what a rank holds of a model from a checkpoint's training state, one tensor at a time."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megalora.adapters.saved_tensors import SavedTensors
from megalora.lora.shards import FactorShard


@torch.no_grad()
def read_shards(
    saved: SavedTensors,
    key: str,
    shards: Iterable[FactorShard],
    values: Mapping[nn.Parameter, Tensor],
) -> None:
    """Copy this rank's part of every tensor of ``key`` into ``values``, which has the shapes of
    parameters. Raises ``ValueError`` when one is missing, misshapen or damaged."""
    for shard in shards:
        target = shard.of(values)
        target.copy_(saved.read(key, shard.name, shard.slice).view(target.shape))

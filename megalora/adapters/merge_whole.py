"""Put weights that were trained whole, and trained rows of the embedding, in place of a merged
folder's own."""

from pathlib import Path

import torch
from torch import Tensor

from megalora.adapters.merge_head import Shard, stored_at
from megalora.adapters.merge_score import DTYPES
from megalora.adapters.read.linears import Adapter
from megalora.hf.safetensors import Stored
from megalora.hf.tensor_names import LM_HEAD
from megalora.lora.trained_weight import TrainedWeight, trained_weights
from megalora.model.shape import ModelShape


def replace_whole(
    folder: Path, shards: dict[str, Shard], adapter: Adapter, shape: ModelShape
) -> list[str]:
    """Let ``shards`` write what was trained whole, each rounded once to the base's dtype; returns a
    line about it.

    Raises:
        ValueError: the base lacks such a weight, or has it in another size or quantised.
    """
    at = stored_at(shards)
    weights = trained_weights(adapter.shape_of(shape))
    replaced: list[str] = []
    for weight in weights:
        names = [weight.stored]
        # A tied base has it under either name, or under both.
        if weight.tied:
            names = [name for name in (*names, LM_HEAD) if name in at] or names
        for name in names:
            if name not in at:
                raise ValueError(
                    f"{folder} has no {name}, which was trained; merge into the model that was"
                    " trained, as published or as save_pretrained writes it"
                )
            shard, stored = at[name]
            values = _values(folder / shard, stored, weight, adapter.tensors[weight.tensor], shape)
            shards[shard].added[stored.name] = values
            replaced.append(f"{weight.module}.bias" if weight.is_bias else weight.module)
    if not replaced:
        return []
    return [f"trained whole, and in place of the base's: {', '.join(dict.fromkeys(replaced))}"]


def _values(
    shard: Path, stored: Stored, weight: TrainedWeight, trained: Tensor, shape: ModelShape
) -> Tensor:
    """What is stored of a weight, in the base's dtype."""
    size = (shape.vocab, shape.hidden) if weight.tokens else weight.size
    if stored.dtype not in DTYPES or stored.shape != size:
        raise ValueError(
            f"{shard}: {stored.name} is {stored.dtype} of shape {stored.shape}; what was trained of"
            f" it needs {', '.join(DTYPES)} and {size}. Merge into the model that was trained"
        )
    dtype = DTYPES[stored.dtype]
    if not weight.tokens:
        return trained.to(dtype).contiguous()
    with shard.open("rb") as file:
        file.seek(stored.start)
        # A bytearray, because torch wants memory that may be written to.
        raw = bytearray(file.read(stored.num_bytes))
    rows = torch.frombuffer(raw, dtype=dtype).view(size)
    rows[list(weight.tokens)] = trained.to(dtype)
    return rows

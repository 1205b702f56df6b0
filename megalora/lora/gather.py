"""Adapter folder (PEFT's ``adapter_config.json`` + ``adapter_model.safetensors``) <-> adapters
sharded over ranks.

Files hold whole tensors under Hugging Face names, so they do not depend on the layout that wrote
them; each rank contributes, and takes, its own part.
"""

import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megalora import host
from megalora.comm import gather_dim
from megalora.lora.shards import FactorShard


def gather_tensors(
    shards: list[FactorShard], values: Mapping[nn.Parameter, Tensor], groups: Any
) -> dict[str, Tensor] | None:
    """Whole CPU tensors of all ranks, by name, on global rank 0; None elsewhere. Collective over
    the world."""
    mine: dict[str, Tensor] = {}
    for shard in shards:
        whole = shard.of(values)
        group = groups.named(shard.group)
        if shard.split_dim is not None:
            whole = gather_dim(whole, shard.split_dim, group, shard.num_shards)
        # Every rank of the group has the whole now, and so has every data-parallel replica of it:
        # the first of them sends it.
        replicas = groups.edp if shard.group == "etp" else groups.dp_cp
        if group.rank() == 0 and replicas.rank() == 0:
            mine[shard.name] = whole
    return _send_to_first(mine)


def _send_to_first(mine: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Send each rank's tensors to rank 0 as one flat buffer of bytes: dtypes may differ."""
    # Rank 0 must know what it receives: (name, shape, dtype) of every tensor of every rank.
    own: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, tensor in mine.items():
        own.append((name, tuple(tensor.shape), tensor.dtype))
    meta: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(meta, own)
    rank = dist.get_rank()
    if rank != 0:
        if mine:
            dist.send(_flattened(mine), 0)
        return None
    everything: dict[str, Tensor] = {}
    for source in range(len(meta)):
        if not meta[source]:
            continue
        sizes = [math.prod(shape) * dtype.itemsize for _, shape, dtype in meta[source]]
        if source == 0:
            flat = _flattened(mine)
        else:
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=host.device())
            dist.recv(flat, source)
        # One copy to the host per rank, not per tensor, because each waits for the device.
        parts = flat.cpu().split(sizes)
        for (name, shape, dtype), part in zip(meta[source], parts, strict=True):
            # A clone, so that no tensor keeps the whole buffer alive, and begins where its dtype
            # may begin.
            everything[name] = part.clone().view(dtype).view(shape)
    return dict(sorted(everything.items()))


def _flattened(tensors: Mapping[str, Tensor]) -> Tensor:
    """The bytes of all tensors one after the other."""
    flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    return torch.cat(flat)


def read_tensors(
    path: Path, shards: list[FactorShard], values: Mapping[nn.Parameter, Tensor], prefix: str = ""
) -> None:
    """Copy this rank's part of every tensor in ``path`` into ``values``; raises ``ValueError`` when
    one is missing or misshapen."""
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            take_parts(names, file.get_tensor, shards, values, where=str(path), prefix=prefix)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def take_parts(
    names: Container[str], get: Callable[[str], Tensor], shards: list[FactorShard],
    values: Mapping[nn.Parameter, Tensor],
    *, where: str, prefix: str = "",
) -> None:  # fmt: skip
    """As ``read_tensors``, from whole tensors that ``get`` returns by name; ``where`` names their
    source in messages."""
    for shard in shards:
        name = prefix + shard.name
        if name not in names:
            raise ValueError(
                f"{where} has no tensor {name}; it was made with other target_modules or layers"
            )
        target = shard.of(values)
        whole = get(name)
        part = shard.cut(whole)
        # Compared after the cut: a whole tensor of another size is cut into parts of another size.
        if part.shape != target.shape:
            raise ValueError(
                f"{where}: {name} is {tuple(whole.shape)}, which does not fit this run's model and"
                " ranks"
            )
        target.copy_(part)

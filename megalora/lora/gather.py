"""Adapter folder (PEFT's ``adapter_config.json`` + ``adapter_model.safetensors``) <-> adapters
sharded over ranks.

Files hold whole tensors under Hugging Face names, so they do not depend on the layout that wrote
them; each rank contributes, and takes, its own part.
"""

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
    pieces: list[FactorShard], values: Mapping[nn.Parameter, Tensor], groups: Any
) -> dict[str, Tensor] | None:
    """Whole CPU tensors of all ranks, by name, on global rank 0; None elsewhere. Collective over
    the world."""
    mine: dict[str, Tensor] = {}
    for piece in pieces:
        part = piece.of(values)
        group = groups.named(piece.group)
        whole = (
            part
            if piece.split_dim is None
            else gather_dim(part, piece.split_dim, group, piece.num_shards)
        )
        replicas = groups.edp if piece.group == "etp" else groups.dp
        if group.rank() == 0 and replicas.rank() == 0:
            mine[piece.name] = whole
    return _send_to_first(mine)


def _send_to_first(mine: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Each rank's tensors travel to rank 0 as one flat buffer."""
    meta: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(meta, [(name, tuple(t.shape), t.dtype) for name, t in mine.items()])
    rank = dist.get_rank()
    if rank != 0:
        if mine:
            dist.send(torch.cat([t.reshape(-1) for t in mine.values()]), 0)
        return None
    everything: dict[str, Tensor] = {}
    for source in range(len(meta)):
        if not meta[source]:
            continue
        sizes = [torch.Size(shape).numel() for _, shape, _ in meta[source]]
        if source == 0:
            flat = torch.cat([t.detach().reshape(-1) for t in mine.values()])
        else:
            flat = torch.empty(sum(sizes), dtype=meta[source][0][2], device=host.device())
            dist.recv(flat, source)
        # One copy to the host a rank, not one a tensor, each of which waits for the device.
        for (name, shape, _), part in zip(meta[source], flat.cpu().split(sizes), strict=True):
            everything[name] = part.view(shape).clone()
    return dict(sorted(everything.items()))


def read_tensors(
    path: Path, pieces: list[FactorShard], values: Mapping[nn.Parameter, Tensor], prefix: str = ""
) -> None:
    """Copy this rank's part of every tensor in ``path`` into ``values``; raises ``ValueError`` when
    one is missing or misshapen."""
    try:
        with safe_open(str(path), framework="pt") as file:
            take_parts(
                set(file.keys()), file.get_tensor, pieces, values, where=str(path), prefix=prefix
            )
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def take_parts(
    names: Container[str], get: Callable[[str], Tensor], pieces: list[FactorShard],
    values: Mapping[nn.Parameter, Tensor],
    *, where: str, prefix: str = "",
) -> None:  # fmt: skip
    """The same from whole tensors that ``get`` returns by name."""
    for piece in pieces:
        name = prefix + piece.name
        if name not in names:
            raise ValueError(
                f"{where} has no tensor {name}; it was made with other target_modules or layers"
            )
        target = piece.of(values)
        whole = get(name)
        part = piece.cut(whole)
        if part.shape != target.shape:
            raise ValueError(
                f"{where}: {name} is {tuple(whole.shape)}, which does not fit this run's model and"
                " ranks"
            )
        target.copy_(part)

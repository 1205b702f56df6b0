"""Adapter folder (PEFT's ``adapter_config.json`` + ``adapter_model.safetensors``) <-> adapters sharded over ranks.

Files hold whole tensors under Hugging Face names, so they do not depend on the layout that wrote them; each rank
contributes, and takes, its own part.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megalora.comm import gather_dim
from megalora.lora.factors import Piece
from megalora.lora.spec import Adapted, tensor_name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def gather_tensors(pieces: list[Piece], values: Mapping[nn.Parameter, Tensor], groups: Any) -> dict[str, Tensor] | None:
    """Whole CPU tensors of all ranks, by name, on global rank 0; None elsewhere. Collective over the world."""
    mine: dict[str, Tensor] = {}
    for piece in pieces:
        part, group = piece.of(values), groups.named(piece.group)
        whole = part if piece.split_dim is None else gather_dim(part, piece.split_dim, group)
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
    everything = {name: t.detach().cpu().clone() for name, t in mine.items()}
    device = next(iter(mine.values())).device if mine else None
    for source in range(1, len(meta)):
        if not meta[source]:
            continue
        sizes = [torch.Size(shape).numel() for _, shape, _ in meta[source]]
        flat = torch.empty(sum(sizes), dtype=meta[source][0][2], device=device)
        dist.recv(flat, source)
        for (name, shape, _), part in zip(meta[source], flat.cpu().split(sizes), strict=True):
            everything[name] = part.view(shape).clone()
    return dict(sorted(everything.items()))


def read_tensors(path: Path, pieces: list[Piece], values: Mapping[nn.Parameter, Tensor], groups: Any, prefix: str = "") -> None:
    """Copy this rank's part of every tensor in ``path`` into ``values``; raises ``ValueError`` when one is missing or misshapen."""
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            for piece in pieces:
                if prefix + piece.name not in names:
                    raise ValueError(f"{path} has no tensor {prefix + piece.name}; it was made with other target_modules or layers")
                target, group = piece.of(values), groups.named(piece.group)
                whole = file.get_tensor(prefix + piece.name)
                part = whole if piece.split_dim is None else whole.chunk(group.size(), piece.split_dim)[group.rank()]
                if part.shape != target.shape:
                    raise ValueError(f"{path}: {prefix + piece.name} is {tuple(whole.shape)}, which does not fit this run's model and ranks")
                target.copy_(part)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def peft_config(adapted: list[Adapted], base: str) -> dict[str, Any]:
    """``adapter_config.json``. Scales (rsLoRA's too) are folded into alpha; deviations become rank and alpha patterns."""
    by_name: dict[str, set[tuple[int, float]]] = {}
    for a in adapted:
        by_name.setdefault(a.name, set()).add((a.rank, _alpha(a)))
    settings = [(a.rank, _alpha(a)) for a in adapted]
    rank, alpha = max(set(settings), key=settings.count)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for a in adapted:
        # One key per projection where all layers agree, else one per layer; PEFT anchors keys at the end of the name.
        key = a.name if len(by_name[a.name]) == 1 else re.sub(r"\.experts\.\d+\.", r".experts.\\d+.", a.hf_module(0))
        if a.rank != rank:
            rank_pattern[key] = a.rank
        if _alpha(a) != alpha:
            alpha_pattern[key] = _alpha(a)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        "target_modules": sorted(by_name), "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
    }  # fmt: skip


def _alpha(a: Adapted) -> float | int:
    alpha = a.scale * a.rank
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def expected_tensors(adapted: list[Adapted]) -> dict[str, tuple[int, int]]:
    """Name -> shape of every tensor the adapter file must hold."""
    return {tensor_name(m, factor): a.shape(factor) for a in adapted for m in a.hf_modules() for factor in ("A", "B")}


def read_config(adapter: Path) -> dict[str, Any]:
    """A PEFT LoRA folder's ``adapter_config.json``; raises ``ValueError`` when it is none."""
    path = adapter / CONFIG
    if not path.is_file():
        raise ValueError(f"{adapter} is not an adapter folder: it has no {CONFIG}")
    config = json.loads(path.read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; megalora reads LORA only")
    return config

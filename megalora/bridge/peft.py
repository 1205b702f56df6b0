"""Adapter folder (PEFT's ``adapter_config.json`` + ``adapter_model.safetensors``) <-> adapters sharded over ranks.

Files hold whole tensors under Hugging Face names, so they do not depend on the layout that wrote them; each rank
contributes, and takes, its own part.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megalora import host
from megalora.comm import gather_dim
from megalora.config import LoRAConfig
from megalora.lora.factors import Piece
from megalora.lora.spec import (
    DENSE_MLP,
    MOE,
    SHARED_EXPERT,
    Adapted,
    expected_tensors,
    make_adapted,
    resolve,
    tensor_name,
)
from megalora.model.shape import ModelShape, read_json_object

_LAYER = "model.layers.{layer}."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def gather_tensors(pieces: list[Piece], values: Mapping[nn.Parameter, Tensor], groups: Any) -> dict[str, Tensor] | None:
    """Whole CPU tensors of all ranks, by name, on global rank 0; None elsewhere. Collective over the world."""
    mine: dict[str, Tensor] = {}
    for piece in pieces:
        part, group = piece.of(values), groups.named(piece.group)
        whole = part if piece.split_dim is None else gather_dim(part, piece.split_dim, group, piece.num_shards)
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
    for source in range(1, len(meta)):
        if not meta[source]:
            continue
        sizes = [torch.Size(shape).numel() for _, shape, _ in meta[source]]
        flat = torch.empty(sum(sizes), dtype=meta[source][0][2], device=host.device())
        dist.recv(flat, source)
        for (name, shape, _), part in zip(meta[source], flat.cpu().split(sizes), strict=True):
            everything[name] = part.view(shape).clone()
    return dict(sorted(everything.items()))


def read_tensors(path: Path, pieces: list[Piece], values: Mapping[nn.Parameter, Tensor], prefix: str = "") -> None:
    """Copy this rank's part of every tensor in ``path`` into ``values``; raises ``ValueError`` when one is missing or misshapen."""
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            for piece in pieces:
                if prefix + piece.name not in names:
                    raise ValueError(
                        f"{path} has no tensor {prefix + piece.name}; it was made with other target_modules or layers"
                    )
                target, whole = piece.of(values), file.get_tensor(prefix + piece.name)
                part = whole if piece.split_dim is None else whole.chunk(piece.num_shards, piece.split_dim)[piece.shard]
                if part.shape != target.shape:
                    raise ValueError(
                        f"{path}: {prefix + piece.name} is {tuple(whole.shape)}, which does not fit this run's model and ranks"
                    )
                target.copy_(part)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def export_form(adapted: list[Adapted], shape: ModelShape) -> list[tuple[Adapted, Adapted | None]]:
    """(as written, as trained) for every projection in the file; as trained is None where the file holds zeros.

    What loads is narrower than what trains. Scales, rsLoRA's too, are folded into alpha. For experts, PEFT 0.21 fuses gate
    and up into one adapter: it needs both with one rank and one scale, ignores them silently unless down is there as well,
    and reads neither pattern for them; vLLM wants all three projections. So all three are written, gate and up padded with
    zeros to one rank, their scale the default's, any difference folded into B.
    """
    experts = [a for a in adapted if a.projection.is_expert]
    fused = [a for a in experts if a.projection.kind == "expert_column"] or experts
    rank = max((a.rank for a in fused), default=0)
    scale = _most_common([a.scale for a in fused]) if fused else 0.0
    trained = {(a.layer, a.projection.hf): a for a in experts}
    pairs: list[tuple[Adapted, Adapted | None]] = []
    for a in adapted:
        if not a.projection.is_expert:
            pairs.append((replace(a, alpha=a.scale * a.rank), a))
        elif a is next(e for e in experts if e.layer == a.layer):
            for projection in (p for p in MOE if p.is_expert):
                own = trained.get((a.layer, projection.hf))
                free = own is not None and own.projection.kind == "expert_row"
                r, s = (own.rank, own.scale) if free and own else (rank, scale)
                pairs.append((make_adapted(projection, a.layer, r, s * r, s, shape), own))
    return pairs


def peft_config(written: list[Adapted], base: str, *, moe: bool) -> dict[str, Any]:
    """``adapter_config.json`` for projections in export form; what deviates from r and lora_alpha becomes a pattern.

    In a MoE model PEFT reads gate_proj, up_proj and down_proj as the experts' fused parameters, so those of dense MLP layers
    and of shared experts are named as parameters, which ``target_parameters`` can do.
    """
    beside = {a.projection for a in written if moe and a.projection in DENSE_MLP + SHARED_EXPERT}
    fused = [a for a in written if a.projection.kind == "expert_column"]
    rank, alpha = _most_common([(a.rank, _number(a.alpha)) for a in fused or written])
    by_name: dict[str, set[tuple[int, float]]] = {}
    for a in written:
        by_name.setdefault(a.name, set()).add((a.rank, a.alpha))
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for a in written:
        # One key per projection where all layers agree, else one per layer; PEFT anchors keys at the end of the name.
        # PEFT has no expert number in the name it looks up, and ends the router's and other parameters' with ".weight".
        module = re.escape(a.hf_module(0)).replace(r"experts\.0\.", r"experts\.(\d+\.)?")
        as_parameter = a.projection.kind == "router" or a.projection in beside
        key = (a.name if len(by_name[a.name]) == 1 else module) + (r"(\.weight)?" if as_parameter else "")
        if a.rank != rank:
            rank_pattern[key] = a.rank
        if _number(a.alpha) != alpha:
            alpha_pattern[key] = _number(a.alpha)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        "target_modules": sorted({a.name for a in written if a.projection not in beside}),
        "target_parameters": sorted(f"{p.hf.removeprefix(_LAYER)}.weight" for p in beside) or None,
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
    }  # fmt: skip


def peft_tensors(pairs: list[tuple[Adapted, Adapted | None]], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors from the trained ones, padded and folded as ``export_form`` says."""
    dtype = next(iter(trained.values())).dtype
    tensors: dict[str, Tensor] = {}
    for written, own in pairs:
        for module in written.hf_modules():
            for factor in ("A", "B"):
                name = tensor_name(module, factor)
                if own is None:
                    tensors[name] = torch.zeros(written.shape(factor), dtype=dtype)
                    continue
                missing = written.rank - own.rank
                value = (
                    trained[name]
                    if factor == "A" or own.scale == written.scale
                    else trained[name] * (own.scale / written.scale)
                )
                tensors[name] = F.pad(value, (0, 0, 0, missing) if factor == "A" else (0, missing))
    return tensors


def write_adapter(
    folder: Path, adapted: list[Adapted], shape: ModelShape, trained: dict[str, Tensor], base: str
) -> None:
    """The two files PEFT loads, from whole trained tensors by HF name."""
    pairs = export_form(adapted, shape)
    config = peft_config([w for w, _ in pairs], base, moe=bool(shape.moe_layers))
    save_file(peft_tensors(pairs, trained), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def copy_adapter(checkpoint: Path, out: Path) -> None:
    """The adapter of a checkpoint without its training state."""
    read_config(checkpoint)
    if not (checkpoint / WEIGHTS).is_file():
        raise ValueError(f"{checkpoint} has no {WEIGHTS}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another")
    out.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(checkpoint / name, out / name)


def _most_common(values: list[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)


def _number(alpha: float) -> float | int:
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def adapted_in(adapter: Path, shape: ModelShape) -> list[Adapted]:
    """What a per-expert PEFT LoRA folder adapts, from its config and tensor names; ``ValueError`` where the two disagree."""
    config = read_config(adapter)
    shapes = tensor_shapes(adapter / WEIGHTS)
    try:
        lora = LoRAConfig(
            rank=config["r"], alpha=float(config["lora_alpha"]), target_modules=_targets(config),
            rank_pattern=config.get("rank_pattern") or {}, use_rslora=config.get("use_rslora", False),
            alpha_pattern={k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        )  # fmt: skip
        targeted = resolve(lora, shape)
    except ValueError as error:
        raise ValueError(f"{adapter / CONFIG} does not fit this base model: {error}") from None
    present = [
        a for a in targeted if tensor_name(a.hf_modules()[0], "A") in shapes
    ]  # PEFT's config may not name layers
    if absent := {a.name for a in targeted} - {a.name for a in present}:
        raise ValueError(
            f"{adapter / WEIGHTS} has no tensors for {', '.join(sorted(absent))}, which its config targets"
        )
    expected = expected_tensors(present)
    for what, names in (
        ("lacks", expected.keys() - shapes.keys()),
        ("has, but its config does not target,", shapes.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{adapter / WEIGHTS} {what} {len(names)} tensors, such as {min(names)}")
    for name, size in expected.items():
        if shapes[name] != size:
            raise ValueError(f"{adapter / WEIGHTS}: {name} is {shapes[name]}, but this base model and rank need {size}")
    return present


def _targets(config: dict[str, Any]) -> str | list[str]:
    modules, parameters = config.get("target_modules") or [], config.get("target_parameters") or []
    if not all(name.endswith(".weight") for name in parameters):
        raise ValueError(
            f"target_parameters {parameters} mean the stacked layout; megalora reads one A and B per expert"
        )
    return modules if isinstance(modules, str) else [*modules, *(name.removesuffix(".weight") for name in parameters)]


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file, read from its header."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def read_config(adapter: Path) -> dict[str, Any]:
    """A PEFT LoRA folder's ``adapter_config.json``; raises ``ValueError`` when it is none."""
    path = adapter / CONFIG
    if not path.is_file():
        raise ValueError(f"{adapter} is not an adapter folder: it has no {CONFIG}")
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; megalora reads LORA only")
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float):
            raise ValueError(f"{path}: {key} must be a number, got {config.get(key)!r}")
    return config

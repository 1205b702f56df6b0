"""What is in an adapter folder, from its config and tensors alone: no base model is needed."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from megalora.bridge.files import WEIGHTS, read_config, tensor_shapes

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PLACE = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<path>.*?)(?:\.(?P<expert>\d+))?\.(?P<leaf>\w+)")


@dataclass
class _Row:
    """One projection over all layers, and over all experts if it is theirs."""

    layers: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    parameters: int = 0
    norms: dict[str, list[float]] = field(default_factory=lambda: {"A": [], "B": []})


def describe(adapter: Path) -> str:
    """A table with a row per projection: ranks, sizes, coverage, norms of A and B; then what looks wrong."""
    config, path = read_config(adapter), adapter / WEIGHTS
    tensor_shapes(path)  # refuses an unreadable file with its name
    rows: dict[tuple[str, bool], _Row] = defaultdict(_Row)
    other: list[str] = []
    num_bytes, zero_b, not_finite = 0, 0, []
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            num_bytes += tensor.numel() * tensor.element_size()
            match = _NAME.fullmatch(name)
            if not match or tensor.dim() != 2:
                other.append(name)
                continue
            norm = _add(rows, match["module"], match["factor"], tensor)
            zero_b += match["factor"] == "B" and norm == 0
            not_finite += [] if norm < float("inf") else [name]
    lines = [
        f"{adapter}: LoRA for {config.get('base_model_name_or_path')}, r={config['r']}, alpha={config['lora_alpha']}, "
        f"{sum(r.parameters for r in rows.values()):,} parameters, {num_bytes / 1e6:,.1f} MB",
        f"{'projection':<12}{'rank':>6}{'out x in':>16}{'layers':>8}{'experts':>9}{'parameters':>14}{'mean |A|':>10}{'mean |B|':>10}",
        *(_line(name, row) for (name, _), row in rows.items()),
    ]
    lines += [f"B is zero in {zero_b} tensors: these adapters do nothing"] if zero_b else []
    lines += [f"NaN or infinite in {len(not_finite)} tensors, such as {not_finite[0]}"] if not_finite else []
    lines += [f"{len(other)} tensors are no LoRA factor, such as {other[0]}"] if other else []
    return "\n".join(lines)


def _add(rows: dict[tuple[str, bool], _Row], module: str, factor: str, tensor: torch.Tensor) -> float:
    place = _PLACE.fullmatch(module)
    row = rows[(place["leaf"], bool(place["expert"])) if place else (module, False)]
    if place:
        row.layers.add(int(place["layer"]))
        row.experts |= {int(place["expert"])} if place["expert"] else set()
    row.ranks.add(tensor.shape[0 if factor == "A" else 1])
    row.sizes.add((0, tensor.shape[1]) if factor == "A" else (tensor.shape[0], 0))
    row.parameters += tensor.numel()
    norm = torch.linalg.vector_norm(tensor.float()).item()
    row.norms[factor].append(norm)
    return norm


def _line(name: str, row: _Row) -> str:
    out, into = (max(size[i] for size in row.sizes) for i in (0, 1))
    means = [sum(v) / max(1, len(v)) for v in row.norms.values()]
    ranks = "/".join(str(r) for r in sorted(row.ranks))
    return (
        f"{name:<12}{ranks:>6}{f'{out} x {into}':>16}{len(row.layers) or '-':>8}{len(row.experts) or '-':>9}"
        f"{row.parameters:>14,}{means[0]:>10.3f}{means[1]:>10.3f}"
    )

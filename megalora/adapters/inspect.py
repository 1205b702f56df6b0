"""Say what is in an adapter folder, from its config and tensors alone: no base model is needed."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalora.adapters.files import CONFIG, adapters_below, read_config
from megalora.adapters.read.options import not_followed, not_plain
from megalora.adapters.read.weights import FLOATS, AdapterWeights
from megalora.adapters.write.engines import ENGINES
from megalora.hf.tensor_names import (
    described,
    is_of_experts,
    is_training_only,
    parse_factor,
    parse_in_layer,
    parse_weight,
)
from megalora.wording import shorten

NAMED = 4
"""Tensors of one sort that are named before the rest is counted."""


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
    """A table with a row per projection: ranks, sizes, coverage, norms of A and B; then what looks
    wrong."""
    config = read_config(adapter)
    weights = AdapterWeights(adapter)
    rows: dict[tuple[str, bool], _Row] = defaultdict(_Row)
    other: list[str] = []
    num_bytes = 0
    zero_b = 0
    not_finite = []
    for name, info in weights.info.items():
        tensor = weights.tensor(name)
        num_bytes += tensor.numel() * tensor.element_size()
        factor = parse_factor(name)
        if factor is None or tensor.dim() != 2 or info.dtype not in FLOATS:
            other.append(name)
            continue
        norm = _add(rows, *factor, tensor)
        zero_b += factor[1] == "B" and norm == 0
        not_finite += [] if norm < float("inf") else [name]
    lines = [
        (
            f"{adapter}: LoRA for {config.get('base_model_name_or_path')}, r={config['r']},"
            f" alpha={config['lora_alpha']}, {sum(r.parameters for r in rows.values()):,}"
            f" parameters, {num_bytes / 1e6:,.1f} MB"
        ),
        (
            f"{'projection':<12}{'rank':>6}{'out x in':>16}{'layers':>8}{'experts':>9}"
            f"{'parameters':>14}{'mean |A|':>10}{'mean |B|':>10}"
        ),
        *(_line(name, row) for (name, _), row in rows.items()),
    ]
    lines += [f"B is zero in {zero_b} tensors: these adapters do nothing"] if zero_b else []
    lines += (
        [f"NaN or infinite in {len(not_finite)} tensors, such as {not_finite[0]}"]
        if not_finite
        else []
    )
    lines += _other_lines(other, weights) + _config_lines(config) + weights.notes
    if below := adapters_below(adapter):
        lines.append(f"sub-folders with adapters of their own: {', '.join(below)}")
    return "\n".join(lines)


def _other_lines(names: list[str], weights: AdapterWeights) -> list[str]:
    """What the tensors are that are no factor of a linear, a line for each sort."""
    sorts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        sorts[_sort(name, weights)].append(name)
    lines = []
    for what, of_sort in sorts.items():
        more = f" and {len(of_sort) - NAMED} more" if len(of_sort) > NAMED else ""
        lines.append(f"{what}: {', '.join(of_sort[:NAMED])}{more}")
    return lines


def _sort(name: str, weights: AdapterWeights) -> str:
    info = weights.info[name]
    if parse_factor(name) is not None and len(info.shape) == 3 and is_of_experts(name):
        return "3-D factors of all experts of a layer, which import, merge and export read"
    if parse_factor(name) is not None:
        return f"no factor of a linear, being {info.dtype} of {len(info.shape)} dimensions"
    if is_training_only(name):
        return "needed by training in PEFT alone"
    if parse_weight(name) is not None:
        return "weights of the base, not compared with it here (import, merge and export do)"
    return f"no LoRA factor but {described(name)}, which import, merge and export refuse"


def _config_lines(config: dict[str, Any]) -> list[str]:
    lines = [
        f"{CONFIG}: {key}={shorten(config[key])} is not plain LoRA, so that import, merge and"
        f" export refuse it: {why}"
        for key, why in not_plain(config).items()
    ]
    for name, engine in ENGINES.items():
        lines += [
            f"{CONFIG}: {key}={shorten(config[key])} is not followed by {engine.title}, which"
            f" {does}; megalora export --for {name} writes the adapter without it"
            for key, does in not_followed(config, name).items()
        ]
    return lines


def _add(
    rows: dict[tuple[str, bool], _Row], module: str, factor: str, tensor: torch.Tensor
) -> float:
    place = parse_in_layer(module)
    row = rows[(module, False) if place is None else (place.leaf, place.expert is not None)]
    if place is not None:
        row.layers.add(place.layer)
        if place.expert is not None:
            row.experts.add(place.expert)
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
        f"{name:<12}{ranks:>6}{f'{out} x {into}':>16}"
        f"{len(row.layers) or '-':>8}{len(row.experts) or '-':>9}"
        f"{row.parameters:>14,}{means[0]:>10.3f}{means[1]:>10.3f}"
    )

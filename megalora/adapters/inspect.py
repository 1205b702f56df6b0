"""Describe an adapter folder from its config and tensors alone; no base model is needed."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalora.adapters.files import (
    CONFIG,
    PART_DORA,
    STATE_JSON,
    adapters_below,
    parts_of,
    read_config,
)
from megalora.adapters.read.options import (
    has_score,
    not_followed,
    not_plain,
    refused_options,
)
from megalora.adapters.read.weights import FLOATS, AdapterWeights
from megalora.adapters.trained_on import trained_on
from megalora.adapters.training_state import read_state
from megalora.adapters.write.engines import ENGINES
from megalora.hf.tensor_names import (
    SCORE,
    described,
    is_of_experts,
    is_training_only,
    parse_bias,
    parse_factor,
    parse_in_layer,
    parse_tokens,
    parse_weight,
    within_layer,
)
from megalora.wording import shorten

NAMED = 4
"""Number of tensors of one sort that are named before the rest is counted."""


@dataclass
class _Row:
    """One projection over all layers, and over all experts if it is theirs."""

    layers: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)
    parameters: int = 0
    norms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class _Counted:
    """What the tensors of a folder are, counted as they come in."""

    config: dict[str, Any]
    rows: dict[tuple[str, bool], _Row] = field(default_factory=lambda: defaultdict(_Row))
    heads: list[str] = field(default_factory=list)
    """A line about each score head."""
    whole: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Name without the layer -> sizes of weights of the base that are trained themselves."""
    other: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    num_bytes: int = 0
    num_parameters: int = 0
    zero_b: int = 0

    def take(self, name: str, tensor: torch.Tensor, dtype: str) -> None:
        """Count a tensor, whose dtype the file calls so."""
        self.num_bytes += tensor.nbytes
        factor = parse_factor(name)
        # The head of a classifier or reward model has a line of its own, below the table.
        if has_score(self.config) and parse_weight(name) == SCORE and tensor.dim() == 2:
            self.num_parameters += tensor.numel()
            self.heads.append(_head_line(tensor))
            return
        if part := _trained_part(name, self.config):
            self.num_parameters += tensor.numel()
            self.whole[part].append(tensor.numel())
            if not torch.isfinite(tensor).all():
                self.not_finite.append(name)
            return
        dims = 1 if factor is not None and factor[1] in ("M", "C") else 2
        if factor is None or tensor.dim() != dims or dtype not in FLOATS:
            self.other.append(name)
            return
        self.num_parameters += tensor.numel()
        norm = _add(self.rows, *factor, tensor)
        if factor[1] == "B" and norm == 0:
            self.zero_b += 1
        if not norm < float("inf"):  # NaN too
            self.not_finite.append(name)

    def lines(self) -> list[str]:
        """The table's rows, and what looks wrong."""
        lines = [_line(name, row) for (name, _), row in self.rows.items()]
        lines += self.heads
        for part, sizes in self.whole.items():
            lines.append(f"{part}: {len(sizes)} tensors, {sum(sizes):,} parameters, trained whole")
        if self.zero_b:
            lines.append(f"B is zero in {self.zero_b} tensors: these adapters do nothing")
        if self.not_finite:
            first = self.not_finite[0]
            lines.append(f"NaN or infinite in {len(self.not_finite)} tensors, such as {first}")
        return lines


def describe(adapter: Path) -> str:
    """A table with a row per projection: ranks, sizes, coverage, norms of A and B; then what looks
    wrong."""
    config = read_config(adapter)
    if parts := parts_of(adapter):
        return "\n\n".join(describe(part) for part in parts)
    weights = AdapterWeights(adapter)
    counted = _Counted(config)
    # One tensor at a time: an adapter of all experts is larger than some hosts' memory.
    for name, info in weights.info.items():
        counted.take(name, weights.tensor(name), info.dtype)
    lines = _title(adapter, config, counted.num_parameters, counted.num_bytes) + counted.lines()
    lines += _other_lines(counted.other, weights) + _config_lines(config) + weights.notes
    lines += _state_lines(adapter) + _base_lines(adapter)
    return "\n".join(lines + _below_lines(adapter))


def _base_lines(adapter: Path) -> list[str]:
    """A line about the base that the adapter was trained on, where it says so."""
    known = trained_on(adapter)
    if known is None:
        return []
    digest = f", weights {known.digest[:12]}" if known.digest else ""
    return [f"trained on a base that was {known.words()}{digest}"]


def _below_lines(adapter: Path) -> list[str]:
    """A line about adapters in sub-folders, where there are any."""
    below = adapters_below(adapter)
    return [f"sub-folders with adapters of their own: {', '.join(below)}"] if below else []


def _trained_part(name: str, config: dict[str, Any]) -> str:
    """What a tensor is of the base that is trained itself, by its name without the layer; nothing
    for other tensors."""
    if (module := parse_tokens(name)) is not None:
        return f"rows of {within_layer(module)}"
    if (module := parse_bias(name)) is not None and config.get("bias") in ("all", "lora_only"):
        return f"{within_layer(module)}.bias"
    module = parse_weight(name)
    if module is None:
        return ""
    entries = config.get("modules_to_save")
    # Inspected is whatever a folder says; what is no list of names, reading refuses.
    if not isinstance(entries, list):
        entries = []
    # By PEFT's rule, from the end of the name; a tied head is there beside the embedding.
    is_tied_head = module == "lm_head" and bool(config.get("ensure_weight_tying"))
    is_saved = is_tied_head or any(module.endswith(str(entry)) for entry in entries)
    return within_layer(module) if is_saved else ""


def _head_line(score: torch.Tensor) -> str:
    """A line about the head of a classifier or reward model."""
    rows, columns = score.shape
    # NaN shows as such.
    norm = torch.linalg.vector_norm(score.float()).item()
    return (
        f"{SCORE}.weight: {rows} x {columns}, norm {norm:.3f}: a score head in place of lm_head,"
        " trained whole"
    )


def _title(adapter: Path, config: dict[str, Any], num_parameters: int, num_bytes: int) -> list[str]:
    """What the folder is in a line, and the head of the table."""
    return [
        (
            f"{adapter}: LoRA for {config.get('base_model_name_or_path')}, r={config['r']},"
            f" alpha={config['lora_alpha']}, {num_parameters:,} parameters,"
            f" {num_bytes / 1e6:,.1f} MB"
        ),
        (
            f"{'projection':<12}{'rank':>6}{'out x in':>16}{'layers':>8}{'experts':>9}"
            f"{'parameters':>14}{'mean |A|':>10}{'mean |B|':>10}"
        ),
    ]


def _state_lines(adapter: Path) -> list[str]:
    """A line for a checkpoint whose ranks are not those that are trained."""
    if not (adapter / STATE_JSON).is_file():
        return []
    # Their ranks are in the table as one, so that its size would be a riddle.
    state = read_state(adapter)
    cycles = state.cycles
    init = state.config.get("lora", {}).get("init", "lora")
    if init != "lora":
        return [
            f"lora.init={init}: A holds A0 + dA and dA, B holds dB and B0; dA and dB are trained"
        ]
    if not cycles:
        return []
    return [f"the sum of {cycles + 1} adapters, of which {cycles} were merged into the base before"]


def _other_lines(names: list[str], weights: AdapterWeights) -> list[str]:
    """A line for each sort of tensors that are not a factor of a linear."""
    sorts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        sorts[_sort(name, weights)].append(name)
    lines = []
    for what, of_sort in sorts.items():
        more = f" and {len(of_sort) - NAMED} more" if len(of_sort) > NAMED else ""
        lines.append(f"{what}: {', '.join(of_sort[:NAMED])}{more}")
    return lines


def _sort(name: str, weights: AdapterWeights) -> str:
    """What a tensor is that is not a factor of a linear, and what the other commands do with it."""
    info = weights.info[name]
    if parse_factor(name) is not None and len(info.shape) == 3 and is_of_experts(name):
        return "3-D factors of all experts of a layer, which import, merge and export read"
    if parse_factor(name) is not None:
        return f"not a factor of a linear, being {info.dtype} of {len(info.shape)} dimensions"
    if is_training_only(name):
        return "needed by training in PEFT alone"
    if parse_weight(name) is not None:
        return "weights of the base, not compared with it here (import, merge and export do)"
    return f"no LoRA factor but {described(name)}, which import, merge and export refuse"


def _config_lines(config: dict[str, Any]) -> list[str]:
    """Options that megalora refuses, and those that an engine reads and does not follow."""
    lines = []
    if config["peft_type"] == PART_DORA:
        lines.append(
            f"{CONFIG}: some linears have DoRA, which PEFT has on all of a folder or on none;"
            " megalora export writes two folders that it loads together"
        )
    for key, why in not_plain(config).items():
        lines.append(
            f"{CONFIG}: {key}={shorten(config[key])} is not plain LoRA, so that import, merge and"
            f" export refuse it: {why}"
        )
    for name, engine in ENGINES.items():
        for key in refused_options(config, name):
            lines.append(
                f"{CONFIG}: {engine.title} does not load an adapter with {key}; merge it into the"
                " base for that: megalora merge"
            )
        for key, does in not_followed(config, name).items():
            lines.append(
                f"{CONFIG}: {key}={shorten(config[key])} is not followed by {engine.title}, which"
                f" {does}; megalora export --for {name} writes the adapter without it"
            )
    return lines


def _add(
    rows: dict[tuple[str, bool], _Row], module: str, factor: str, tensor: torch.Tensor
) -> float:
    """Count a factor in its projection's row; return its norm."""
    place = parse_in_layer(module)
    if place is None:
        row = rows[module, False]
    else:
        # gate_proj of experts and of a dense MLP are two rows.
        row = rows[place.leaf, place.expert is not None]
        row.layers.add(place.layer)
        if place.expert is not None:
            row.experts.add(place.expert)
    # A is [rank, in], B is [out, rank], M is [out].
    if factor == "A":
        row.ranks.add(tensor.shape[0])
        row.inputs.add(tensor.shape[1])
    elif factor == "B":
        row.ranks.add(tensor.shape[1])
        row.outputs.add(tensor.shape[0])
    row.parameters += tensor.numel()
    norm = torch.linalg.vector_norm(tensor.float()).item()
    row.norms[factor].append(norm)
    return norm


def _line(name: str, row: _Row) -> str:
    """A projection as a line of the table."""
    # 0 where one of the factors is missing.
    size = f"{max(row.outputs, default=0)} x {max(row.inputs, default=0)}"
    ranks = "/".join(map(str, sorted(row.ranks)))
    return (
        f"{name:<12}{ranks:>6}{size:>16}"
        f"{len(row.layers) or '-':>8}{len(row.experts) or '-':>9}"
        f"{row.parameters:>14,}{_mean(row.norms['A']):>10.3f}{_mean(row.norms['B']):>10.3f}"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))

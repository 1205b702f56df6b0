"""The table: every linear LoRA can adapt, its names, shapes and splits, and which gradients must be
summed.

Layers, initialisation, checkpoints, export, parameter counts and the planner read it; nothing else
knows names.

A factor is split over its kind's group along one dimension, or it is replicated. A replicated
factor sees only part of the sum that makes its gradient (S/t tokens under sequence parallelism, I/n
features under expert tensor parallelism), so its gradient is summed over the very group it is
replicated on. Expert factors exist once per expert, and experts are shared out over EP.

    kind            group   A [r, in]    B [out, r]
    column          tp      replicated   dim 0         (k, v: into KV heads at most)
    row             tp      dim 1        replicated
    router          tp      replicated   replicated
    expert_column   etp     replicated   dim 0
    expert_row      etp     dim 1        replicated
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megalora.config import LoRAConfig, ParallelConfig
from megalora.model.shape import ModelShape

Kind = Literal["column", "row", "router", "expert_column", "expert_row"]
FactorName = Literal["A", "B"]


@dataclass(frozen=True)
class Layout:
    group: Literal["tp", "etp"]
    split_a: int | None
    split_b: int | None

    def split(self, factor: FactorName) -> int | None:
        return self.split_a if factor == "A" else self.split_b


LAYOUTS: dict[Kind, Layout] = {
    "column": Layout("tp", None, 0),
    "row": Layout("tp", 1, None),
    "router": Layout("tp", None, None),
    "expert_column": Layout("etp", None, 0),
    "expert_row": Layout("etp", 1, None),
}


@dataclass(frozen=True)
class Projection:
    """One HF linear. Projections with the same ``module`` are rows of one fused Megatron weight, in
    table order."""

    hf: str
    module: str
    kind: Kind
    features: Callable[[ModelShape], tuple[int, int]]
    """(out, in) of the whole weight."""
    row_groups: Callable[[ModelShape], int] = lambda s: 1
    """The fused weight repeats its projections this many times over TP: query groups, or 1 for one
    block a rank."""
    max_shards: Callable[[ModelShape], int] | None = None
    """B can be cut into at most so many parts; with more ranks than that, several hold the same
    part."""

    @property
    def name(self) -> str:
        return self.hf.rsplit(".", 1)[-1]

    @property
    def is_expert(self) -> bool:
        return self.kind.startswith("expert")


def _qkv(name: str, heads: Callable[[ModelShape], int]) -> Projection:
    return Projection(
        f"model.layers.{{layer}}.self_attn.{name}", "self_attention.linear_qkv", "column",
        lambda s: (heads(s) * s.head_dim, s.hidden), lambda s: s.num_kv_heads, heads,
    )  # fmt: skip


_MLP = "model.layers.{layer}.mlp"
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}"
_SHARED = "model.layers.{layer}.mlp.shared_expert"
ATTENTION = (
    _qkv("q_proj", lambda s: s.num_heads),
    _qkv("k_proj", lambda s: s.num_kv_heads),
    _qkv("v_proj", lambda s: s.num_kv_heads),
    Projection("model.layers.{layer}.self_attn.o_proj", "self_attention.linear_proj", "row",
               lambda s: (s.hidden, s.num_heads * s.head_dim)),
)  # fmt: skip
DENSE_MLP = (
    Projection(
        f"{_MLP}.gate_proj", "mlp.linear_fc1", "column", lambda s: (s.intermediate, s.hidden)
    ),
    Projection(f"{_MLP}.up_proj", "mlp.linear_fc1", "column", lambda s: (s.intermediate, s.hidden)),
    Projection(f"{_MLP}.down_proj", "mlp.linear_fc2", "row", lambda s: (s.hidden, s.intermediate)),
)
MOE = (
    Projection(f"{_MLP}.gate", "mlp.router", "router", lambda s: (s.num_experts, s.hidden)),
    Projection(
        f"{_EXPERT}.gate_proj",
        "mlp.experts.gate_up",
        "expert_column",
        lambda s: (s.expert_intermediate, s.hidden),
    ),
    Projection(
        f"{_EXPERT}.up_proj",
        "mlp.experts.gate_up",
        "expert_column",
        lambda s: (s.expert_intermediate, s.hidden),
    ),
    Projection(
        f"{_EXPERT}.down_proj",
        "mlp.experts.down",
        "expert_row",
        lambda s: (s.hidden, s.expert_intermediate),
    ),
)
SHARED_EXPERT = (
    Projection(f"{_SHARED}.gate_proj", "mlp.shared_experts.linear_fc1", "column",
               lambda s: (s.shared_intermediate, s.hidden)),
    Projection(f"{_SHARED}.up_proj", "mlp.shared_experts.linear_fc1", "column",
               lambda s: (s.shared_intermediate, s.hidden)),
    Projection(f"{_SHARED}.down_proj", "mlp.shared_experts.linear_fc2", "row",
               lambda s: (s.hidden, s.shared_intermediate)),
)  # fmt: skip
HEAD = (Projection("lm_head", "output_layer", "column", lambda s: (s.vocab, s.hidden)),)

ALIASES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
ALL_LINEAR_EXCEPT = ("lm_head", "gate")
"""As in PEFT not the output layer; unlike in PEFT 0.21 not the router either, because vLLM and
SGLang do not honour it."""


@dataclass(frozen=True)
class Adapted:
    """One projection of one layer with its adapter; for routed experts, of all experts of that
    layer."""

    projection: Projection
    layer: int | None
    """None outside the decoder layers (lm_head)."""
    rank: int
    alpha: float
    scale: float
    out_features: int
    in_features: int
    num_experts: int
    """Whole model; 0 where there are no experts."""
    max_shards: int | None = None
    """Into how many parts B can be cut; None for as many as there are ranks."""

    @property
    def name(self) -> str:
        return self.projection.name

    def hf_module(self, expert: int | None = None) -> str:
        """Full HF module name, such as ``model.layers.3.mlp.experts.7.gate_proj``."""
        return self.projection.hf.format(layer=self.layer, expert=expert)

    def hf_modules(self) -> list[str]:
        return (
            [self.hf_module(e) for e in range(self.num_experts)]
            if self.num_experts
            else [self.hf_module()]
        )

    def shape(self, factor: FactorName) -> tuple[int, int]:
        """Of the whole factor (of one expert)."""
        return (self.rank, self.in_features) if factor == "A" else (self.out_features, self.rank)

    def num_shards(self, factor: FactorName, group_size: int) -> int:
        """Into how many parts the factor is cut over a group of ``group_size`` ranks; 1 where every
        rank holds all of it.

        With fewer parts than ranks, neighbours hold the same part and each has a partial gradient
        of it.
        """
        if LAYOUTS[self.projection.kind].split(factor) is None:
            return 1
        return min(group_size, self.max_shards) if factor == "B" and self.max_shards else group_size

    def num_parameters(self) -> int:
        return max(1, self.num_experts) * self.rank * (self.in_features + self.out_features)


def tensor_name(hf_module: str, factor: FactorName) -> str:
    """Key in ``adapter_model.safetensors``."""
    return f"base_model.model.{hf_module}.lora_{factor}.weight"


def expected_tensors(adapted: list[Adapted]) -> dict[str, tuple[int, int]]:
    """Name -> shape of every adapter tensor there must be."""
    return {
        tensor_name(m, factor): a.shape(factor)
        for a in adapted
        for m in a.hf_modules()
        for factor in ("A", "B")
    }


def layer_projections(shape: ModelShape, layer: int) -> tuple[Projection, ...]:
    if not shape.is_moe(layer):
        return ATTENTION + DENSE_MLP
    return ATTENTION + MOE + (SHARED_EXPERT if shape.shared_intermediate else ())


def plan(
    lora: LoRAConfig, parallel: ParallelConfig, folder: Path
) -> tuple[ModelShape, list[Adapted]]:
    """What will be adapted, from the base's config.json and the headers of its weights: errors come
    before weights are read."""
    from megalora.bridge.account import open_folder  # its account of tensors reads this table

    shape = open_folder(folder).shape
    shape.check_layout(parallel)
    return shape, resolve(lora, shape)


def resolve(lora: LoRAConfig, shape: ModelShape) -> list[Adapted]:
    """Every adapted projection of the model, in layer order; raises ``ValueError`` for anything
    that matches nothing."""
    layers = _selected_layers(lora.layers, shape.num_layers)
    places = [
        (p, layer) for layer in range(shape.num_layers) for p in layer_projections(shape, layer)
    ]
    places += [(p, None) for p in HEAD]
    wanted = None if lora.target_modules == "all-linear" else _patterns(lora.target_modules)
    used: set[str] = set()
    adapted = []
    for projection, layer in places:
        base = make_adapted(projection, layer, 0, 0.0, 0.0, shape)
        if wanted is None:
            hit = projection.name not in ALL_LINEAR_EXCEPT
        else:
            hit = _matches("lora.target_modules", wanted, base, used)
        excluded = _matches("lora.exclude_modules", _patterns(lora.exclude_modules), base, used)
        rank = _pattern_value("lora.rank_pattern", lora.rank_pattern, base, used)
        alpha = _pattern_value("lora.alpha_pattern", lora.alpha_pattern, base, used)
        if hit and not excluded and (layer is None or layer in layers):
            rank = int(
                rank
                or (lora.expert_rank if projection.is_expert and lora.expert_rank else lora.rank)
            )
            alpha = float(alpha or lora.alpha)
            adapted.append(
                make_adapted(
                    projection, layer, rank, alpha, _scale(alpha, rank, lora.use_rslora), shape
                )
            )
    for option in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(lora, option)
        _check_used(
            f"lora.{option}",
            [] if value == "all-linear" else [value] if isinstance(value, str) else value,
            used,
            shape,
        )
    if not adapted:
        raise ValueError(
            "lora: nothing is left to adapt after target_modules, exclude_modules and layers; widen"
            " one of them"
        )
    return adapted


def make_adapted(
    projection: Projection, layer: int | None, rank: int, alpha: float, scale: float, s: ModelShape
) -> Adapted:
    """``projection`` of one layer of the model ``s``, with these adapter settings."""
    out_features, in_features = projection.features(s)
    experts = s.num_experts if projection.is_expert else 0
    max_shards = projection.max_shards(s) if projection.max_shards else None
    return Adapted(
        projection, layer, rank, alpha, scale, out_features, in_features, experts, max_shards
    )


def _scale(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def _patterns(entries: str | Iterable[str]) -> dict[str, tuple[str, ...]]:
    entries = [entries] if isinstance(entries, str) else entries
    return {entry: ALIASES.get(entry, (entry,)) for entry in entries}


def _matches(
    option: str, patterns: dict[str, tuple[str, ...]], adapted: Adapted, used: set[str]
) -> bool:
    hits = [
        entry for entry, expressions in patterns.items() if _match(option, expressions, adapted)
    ]
    used.update(f"{option}/{entry}" for entry in hits)
    return bool(hits)


def _match(option: str, expressions: Iterable[str], adapted: Adapted) -> bool:
    """PEFT's rule: the expression matches the end of the module name, from a dot on."""
    # A plain name cannot tell experts apart, so one stands for all of them: 128 times fewer
    # matches.
    modules = (
        [adapted.hf_module(0)]
        if all(e.isidentifier() for e in expressions)
        else adapted.hf_modules()
    )
    try:
        hits = [m for m in modules if any(re.fullmatch(rf"(.*\.)?({e})", m) for e in expressions)]
    except re.error as error:
        raise ValueError(
            f"{option}: {' '.join(expressions)!r} is neither a name nor a regular expression"
            f" ({error.msg})"
        ) from None
    if hits and len(hits) < len(modules):
        raise ValueError(
            f"{option}: {' '.join(expressions)!r} matches {len(hits)} of the {len(modules)} experts"
            f" in layer {adapted.layer} ({hits[0]}, ...); experts of one layer share one setting,"
            " so match all or none."
        )
    return bool(hits)


def _pattern_value(option: str, values: dict, adapted: Adapted, used: set[str]) -> float | None:
    """The value of the first matching key, as in PEFT."""
    found = [entry for entry in values if _match(option, ALIASES.get(entry, (entry,)), adapted)]
    used.update(f"{option}/{entry}" for entry in found)
    return values[found[0]] if found else None


def _check_used(option: str, entries: Iterable[str], used: set[str], shape: ModelShape) -> None:
    names = {
        p.name for layer in range(shape.num_layers) for p in layer_projections(shape, layer)
    } | {"lm_head"}
    for entry in entries:
        if f"{option}/{entry}" not in used:
            close = difflib.get_close_matches(entry, [*sorted(names), *ALIASES], n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(
                f"{option}: {entry!r} matches nothing in this model{hint} Adaptable:"
                f" {', '.join(sorted(names))}"
            )


def _selected_layers(layers: list[int] | str | None, num_layers: int) -> set[int]:
    if layers is None:
        return set(range(num_layers))
    selected: set[int] = set()
    for part in layers.split(",") if isinstance(layers, str) else [str(n) for n in layers]:
        match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d*))?\s*", part)
        if not match:
            raise ValueError(
                f"lora.layers: {part!r} is neither a layer nor a range such as 0-3 or 8-"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[3]) if match[3] else num_layers - 1
        if last >= num_layers or first > last:
            raise ValueError(
                f"lora.layers: {part.strip()} is outside this model's layers 0-{num_layers - 1}"
            )
        selected.update(range(first, last + 1))
    return selected

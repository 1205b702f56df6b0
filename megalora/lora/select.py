"""Which linears a ``lora`` section selects, and with what rank and scale."""

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path

from megalora.config import LoRAConfig, ParallelConfig
from megalora.lora.spec import Adapted, make_adapted
from megalora.model.account import open_folder
from megalora.model.families import layer_projections
from megalora.model.projections import HEAD
from megalora.model.shape import ModelShape

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


def plan(
    lora: LoRAConfig, parallel: ParallelConfig, folder: Path
) -> tuple[ModelShape, list[Adapted]]:
    """What will be adapted, from the base's config.json and the headers of its weights: errors come
    before weights are read."""

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

"""Write ``adapter_config.json`` as PEFT reads it: which modules are adapted, and with what rank and
alpha where these differ.
"""

import re
from dataclasses import dataclass
from typing import Any

from megalora.adapters.files import LORA
from megalora.hf.tensor_names import within_layer
from megalora.lora.section import most_common, without_noise
from megalora.lora.spec import Adapted
from megalora.model.projections import DENSE_MLP, SHARED_EXPERT, SHARED_EXPERTS
from megalora.model.shape import ModelShape


@dataclass(frozen=True)
class Entry:
    """Settings of one module or parameter in the config: its target, and the keys under which
    patterns find it."""

    target: str
    is_parameter: bool
    name: str
    """Entries of one name share a key in patterns where all agree, else each gets its own."""
    short: str
    """Regular expression for it in every layer. PEFT anchors keys at the end of the name."""
    full: str
    """Regular expression for it in its own layer alone."""
    rank: int
    alpha: float
    decides_default: bool
    """Whether PEFT reads its rank and scale from r and lora_alpha alone."""


def module_entries(written: list[Adapted], shape: ModelShape) -> list[Entry]:
    """In a MoE model PEFT reads gate_proj, up_proj and down_proj as the experts' fused parameters,
    so those of dense MLP layers and of shared experts are named as parameters, which
    ``target_parameters`` can do."""
    entries = []
    for a in written:
        beside = (
            bool(shape.moe_layers) and a.projection in DENSE_MLP + SHARED_EXPERT + SHARED_EXPERTS
        )
        # PEFT has no expert number in the name it looks up, and ends the router's and other
        # parameters' with ".weight".
        end = r"(\.weight)?" if beside or a.projection.kind == "router" else ""
        # PEFT looks up what transformers calls the linear, vLLM what it is published as.
        published = a.projection.hf.format(layer=a.layer, expert=0)
        loaded = a.projection.loaded.format(layer=a.layer, expert=0)
        full = _either(published, loaded).replace(r"experts\.0\.", r"experts\.(\d+\.)?") + end
        target = a.name
        short = _either(a.name, a.projection.role) + end
        if beside:
            target = f"{within_layer(a.projection.hf)}.weight"
            short = re.escape(within_layer(a.projection.hf)) + end
        # PEFT reads neither pattern for the fused parameter: these must be the default.
        fused = a.projection.kind == "expert_column"
        entries.append(
            Entry(target, beside, a.name, short, full, a.rank, plain_number(a.alpha), fused)
        )
    return entries


def _either(name: str, other: str) -> str:
    """A regular expression for both names, which may be the same."""
    if name == other:
        return re.escape(name)
    return f"({re.escape(name)}|{re.escape(other)})"


def peft_config(
    entries: list[Entry],
    base: str,
    *,
    use_dora: bool = False,
    peft_type: str = LORA,
) -> dict[str, Any]:
    """``adapter_config.json``; what deviates from r and lora_alpha becomes a pattern.

    Args:
        peft_type: one of ``files.py``.
    """
    default = [e for e in entries if e.decides_default] or entries
    rank, alpha = most_common([(e.rank, e.alpha) for e in default])
    settings: dict[str, set[tuple[int, float]]] = {}
    targets: set[str] = set()
    parameters: set[str] = set()
    for e in entries:
        settings.setdefault(e.name, set()).add((e.rank, e.alpha))
        if e.is_parameter:
            parameters.add(e.target)
        else:
            targets.add(e.target)
    # Where all layers agree, one key serves for all of them.
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for e in entries:
        key = e.short if len(settings[e.name]) == 1 else e.full
        if e.rank != rank:
            rank_pattern[key] = e.rank
        if e.alpha != alpha:
            alpha_pattern[key] = e.alpha
    return {
        "peft_type": peft_type, "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": False,
        "use_dora": use_dora,
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        "target_modules": sorted(targets), "target_parameters": sorted(parameters) or None,
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
    }  # fmt: skip


def plain_number(alpha: float) -> float | int:
    """An alpha as JSON should show it: 32, not 32.000000000000004 or 32.0."""
    alpha = without_noise(alpha)
    return int(alpha) if alpha.is_integer() else alpha

"""Every option of PEFT's LoraConfig, and what it does to the adapter: a closed list.

An adapter is read as ``W + scale * B A``. An option either is honoured in that, or changes nothing
once training is over, or makes the adapter something else; then it is refused where it is set. So
is a key that nobody here knows.

The keys are those of PEFT 0.18, 0.19 and 0.21, and what other tools write into
``adapter_config.json``.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalora.wording import shorten

HONOURED = frozenset(
    {
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "target_parameters",
        "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights",
        "peft_type", "peft_version",
        "auto_mapping",
        "lora_B_layout",  # Unsloth: how the columns of a stacked B run
    }
)  # fmt: skip
"""Read by ``rules.py``, ``stacked.py`` or below."""

WITHOUT_EFFECT = frozenset(
    {
        "task_type", "inference_mode", "base_model_name_or_path", "revision",
        # Training only: a saved adapter is A and B, however they came to be.
        "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "runtime_config",
        "velora_config",  # compresses what backward keeps; forward is plain LoRA
        # Nothing without the option that they belong to.
        "megatron_core", "qalora_group_size",
        # ms-swift's: learning rates and the dtype of training.
        "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
        # PEFT before 0.5.
        "merge_weights", "enable_lora",
    }
)  # fmt: skip

REFUSED = {
    "use_dora": "DoRA scales every row of the adapted weight by a trained magnitude",
    "lora_bias": "it trains a bias beside B",
    "modules_to_save": "it trains whole weights beside the factors",
    "trainable_token_indices": "it trains rows of the embedding",
    "layer_replication": "it repeats layers of the base",
    "fan_in_fan_out": "it is for weights stored as [in, out], which this base has none of",
    "use_qalora": "QALoRA pools the input of A",
    "alora_invocation_tokens": "activated LoRA acts from an invocation text on",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA truncates the base and scales between A and B",
    "monteclora_config": "MonteCLoRA samples its factors",
    "megatron_config": "it is for Megatron's own linears",
    "ensure_weight_tying": "it ties what is trained of the embedding and of lm_head",
}
"""Option -> why a value other than PEFT's default (nothing, or false) is not ``W + scale * B
A``."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""PEFT's named initialisations that leave the base as it is, so that the saved adapter is a plain
LoRA."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
LARGEST = 2**53
"""Integers up to here are exact as float64, as any rank or alpha is."""


def not_plain(config: dict[str, Any]) -> dict[str, str]:
    """Option -> why it is not plain LoRA, for those that are set; empty for an adapter that
    megalora and vLLM compute."""
    found = {key: why for key, why in REFUSED.items() if config.get(key)}
    if config.get("bias", "none") not in ("none", None):
        found["bias"] = "it trains biases of the base"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        found["init_lora_weights"] = (
            "it changed the base model too. Convert the adapter with PEFT's"
            " path_initial_model_for_weight_conversion first"
            if init.lower().startswith(CHANGES_THE_BASE)
            else f"megalora knows true, false, {', '.join(PLAIN_INITS)}"
        )
    known = HONOURED | WITHOUT_EFFECT | REFUSED.keys()
    for key in sorted(config.keys() - known):  # one order on all ranks
        if config[key]:
            found[key] = (
                "megalora does not know this option, which may change what the adapter computes"
            )
    return found


def refuse_variants(where: Path, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` for the first option that makes the adapter something else than plain
    LoRA."""
    for key, why in not_plain(config).items():
        raise ValueError(
            f"{where}: {key}={shorten(config[key])} is not plain LoRA, which is all megalora"
            f" computes: {why}"
        )


def check_types(where: Path, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless every option that is honoured has a value that means
    something."""
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    if not _is_rank(rank) or not _is_alpha(alpha):
        raise ValueError(
            f"{where}: r={shorten(rank)} and lora_alpha={shorten(alpha)} must be a rank"
            " of at least 1 and a number above 0"
        )
    for key, (fits, what) in _TYPES.items():
        if config.get(key) is not None and not fits(config[key]):
            raise ValueError(f"{where}: {key} must be {what}, got {shorten(config[key])}")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _is_alpha(value: Any) -> bool:
    # An int of 400 digits is no float: compare before anything converts it.
    return type(value) in (int, float) and 0 < value <= LARGEST and math.isfinite(value)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _name_or_names(value: Any) -> bool:
    return isinstance(value, str) or _strings(value)


def _maps(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(fits(v) for v in value.values())


def _layers(value: Any) -> bool:
    return _is_layer(value) or (isinstance(value, list) and all(_is_layer(v) for v in value))


def _is_layer(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank_pattern": (_maps(_is_rank), "names and ranks of at least 1"),
    "alpha_pattern": (_maps(_is_alpha), "names and numbers above 0"),
    "auto_mapping": (lambda v: isinstance(v, dict), "an object"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "bias": (lambda v: isinstance(v, str), "none, all or lora_only"),
    "init_lora_weights": (lambda v: isinstance(v, bool | str), "true, false or a name"),
    "target_modules": (_name_or_names, "a name, or a list of names"),
    "target_parameters": (_strings, "a list of names"),
    "exclude_modules": (_name_or_names, "a name, or a list of names"),
    "layers_to_transform": (_layers, "a layer's number, or a list of them"),
    "layers_pattern": (_name_or_names, "a name, or a list of names"),
    "peft_version": (lambda v: isinstance(v, str), "text"),
}

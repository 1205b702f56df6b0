"""List every option of PEFT's LoraConfig, what it does to the adapter, and who does not honour it.

An adapter is read as ``W + scale * B A``, each row of which DoRA scales. An option is honoured in
that, or has no effect once training is over, or makes the adapter something else. megalora reads
every folder by this table, so that import, merge and export refuse the last kind where it is set; a
server is asked to load only what is left. A key that is not in the table is refused too.

``Option.elsewhere`` says which engine accepts an option and then does not follow it: adapters
written by megalora express the option in another way for it (``write/form.py``).

The keys are those of PEFT 0.18, 0.19 and 0.21, and what other tools write into
``adapter_config.json``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megalora.hf.tensor_names import SCORE
from megalora.wording import shorten


@dataclass(frozen=True)
class Option:
    """What an option does to an adapter, and who does not follow it."""

    effect: Literal["honoured", "none", "refused"]
    why: str = ""
    """Why a value other than PEFT's default (nothing, or false) is not ``W + scale * B A``."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Engine (``write/engines.py``) -> what it does in place of honouring the option."""
    refused_by: tuple[str, ...] = ()
    """Engines that do not load an adapter with it."""


HONOURED = Option("honoured")
"""Read by ``rules.py``, ``stacked.py`` or below. vLLM 0.32 and SGLang 0.5.23 honour it too, or need
not: which modules are adapted follows from the tensors."""
TRAINING_ONLY = Option("none")
"""A saved adapter is A and B, however they came to be."""
WITHOUT_EFFECT = Option("none")


def _refused(why: str) -> Option:
    return Option("refused", why)


_ONE_RANK = {"sglang": "reads one rank and one alpha for all modules"}
OPTIONS: dict[str, Option] = {
    "r": HONOURED,
    "lora_alpha": HONOURED,
    "use_rslora": Option("honoured", elsewhere={"sglang": "scales by alpha / r"}),
    "use_dora": Option("honoured", refused_by=("vllm", "sglang")),
    "lora_bias": Option("honoured", refused_by=("vllm", "sglang")),
    "rank_pattern": Option("honoured", elsewhere=_ONE_RANK),
    "alpha_pattern": Option("honoured", elsewhere=_ONE_RANK),
    "target_modules": HONOURED,
    "target_parameters": HONOURED,
    "exclude_modules": HONOURED,
    "layers_to_transform": HONOURED,
    "layers_pattern": HONOURED,
    "bias": Option("honoured", refused_by=("vllm", "sglang")),
    "init_lora_weights": HONOURED,
    "peft_type": HONOURED,
    "peft_version": HONOURED,
    "auto_mapping": HONOURED,
    "lora_B_layout": HONOURED,  # Unsloth: how the columns of a stacked B run
    "task_type": WITHOUT_EFFECT,
    "inference_mode": WITHOUT_EFFECT,
    "base_model_name_or_path": WITHOUT_EFFECT,
    "revision": WITHOUT_EFFECT,
    "lora_dropout": TRAINING_ONLY,
    "loftq_config": TRAINING_ONLY,
    "eva_config": TRAINING_ONLY,
    "corda_config": TRAINING_ONLY,
    "lora_ga_config": TRAINING_ONLY,
    "runtime_config": TRAINING_ONLY,
    "velora_config": TRAINING_ONLY,  # compresses what backward keeps; forward is plain LoRA
    # Nothing without the option that they belong to.
    "megatron_core": WITHOUT_EFFECT,
    "qalora_group_size": WITHOUT_EFFECT,
    # ms-swift's: learning rates and the dtype of training.
    "lora_dtype": TRAINING_ONLY,
    "lorap_lr_ratio": TRAINING_ONLY,
    "lorap_emb_lr": TRAINING_ONLY,
    # PEFT before 0.5.
    "merge_weights": WITHOUT_EFFECT,
    "enable_lora": WITHOUT_EFFECT,
    "modules_to_save": Option("honoured", refused_by=("vllm", "sglang")),
    "trainable_token_indices": Option("honoured", refused_by=("vllm", "sglang")),
    "ensure_weight_tying": HONOURED,
    "layer_replication": _refused("it repeats layers of the base"),
    "fan_in_fan_out": _refused(
        "it is for weights stored as [in, out], which this base has none of"
    ),
    "use_qalora": _refused("QALoRA pools the input of A"),
    "alora_invocation_tokens": _refused("activated LoRA acts from an invocation text on"),
    "use_bdlora": _refused("BD-LoRA's factors are block-diagonal"),
    "arrow_config": _refused("Arrow routes between several adapters"),
    "kasa_config": _refused("KaSA truncates the base and scales between A and B"),
    "monteclora_config": _refused("MonteCLoRA samples its factors"),
    "megatron_config": _refused("it is for Megatron's own linears"),
}

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""PEFT's named initialisations that leave the base as it is, so that the saved adapter is a plain
LoRA."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
LARGEST = 2**53
"""Integers up to here are exact as float64, as any rank or alpha is."""


def not_plain(config: dict[str, Any]) -> dict[str, str]:
    """Option -> why it is not plain LoRA, for those that are set; empty for an adapter that
    megalora and vLLM compute."""
    found: dict[str, str] = {}
    for key, option in OPTIONS.items():
        # What is false or empty is PEFT's default, which leaves the adapter as it is.
        if option.effect == "refused" and config.get(key):
            found[key] = option.why
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        why = f"megalora knows true, false, {', '.join(PLAIN_INITS)}"
        # pissa_niter_16 and the like too.
        if init.lower().startswith(CHANGES_THE_BASE):
            why = (
                "it changed the base model too. Convert the adapter with PEFT's"
                " path_initial_model_for_weight_conversion first"
            )
        found["init_lora_weights"] = why
    for key in sorted(config.keys() - OPTIONS.keys()):  # one order on all ranks
        if config[key]:
            found[key] = (
                "megalora does not know this option, which may change what the adapter computes"
            )
    return found


def has_score(config: dict[str, Any]) -> bool:
    """Whether the adapter has a score head, as PEFT saves those of classifiers and reward models,
    and trains no other weight whole."""
    saved = config.get("modules_to_save")
    if config.get("task_type") != "SEQ_CLS" or not isinstance(saved, list) or SCORE not in saved:
        return False
    # PEFT lists both names that such a head has in any model.
    return all(name in (SCORE, "classifier") for name in saved)


def not_followed(config: dict[str, Any], engine: str) -> dict[str, str]:
    """Option -> what the engine does instead, for those that are set and that it does not
    follow."""
    found: dict[str, str] = {}
    for key, option in OPTIONS.items():
        if config.get(key) and engine in option.elsewhere:
            found[key] = option.elsewhere[engine]
    return found


def refused_options(config: dict[str, Any], engine: str) -> list[str]:
    """Options that are set and with which the engine does not load an adapter that megalora
    computes."""
    found: list[str] = []
    for key, option in OPTIONS.items():
        # The one option whose default is a text.
        is_set = config.get(key) and not (key == "bias" and config[key] == "none")
        if is_set and engine in option.refused_by:
            found.append(key)
    return found


def refuse_variants(where: Path, config: dict[str, Any], *, score: bool = False) -> None:
    """Raise ``ValueError`` for the first option that makes the adapter something else than plain
    LoRA.

    Args:
        score: whether a score head is read.
    """
    if has_score(config) and not score:
        raise ValueError(
            f"{where}: a classifier or reward model (task_type SEQ_CLS): it has a score head in"
            " place of lm_head and writes no text. Load it with PEFT, as its README.md says,"
            " serve it for scores with megalora serve, or merge it: megalora merge"
        )
    saved = config.get("modules_to_save") or ()
    if SCORE in saved and not has_score(config):
        raise ValueError(
            f"{where}: modules_to_save={shorten(saved)}: megalora reads a score head where it is"
            " all that is trained whole and task_type is SEQ_CLS. Merge the adapter with PEFT"
            " (merge_and_unload)"
        )
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
    "use_dora": (lambda v: isinstance(v, bool), "true or false"),
    "lora_bias": (lambda v: isinstance(v, bool), "true or false"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda v: isinstance(v, bool | str), "true, false or a name"),
    "target_modules": (_name_or_names, "a name, or a list of names"),
    "target_parameters": (_strings, "a list of names"),
    "exclude_modules": (_name_or_names, "a name, or a list of names"),
    "modules_to_save": (_strings, "a list of names"),
    "trainable_token_indices": (lambda v: isinstance(v, list | dict), "a list of token ids"),
    "ensure_weight_tying": (lambda v: isinstance(v, bool), "true or false"),
    "layers_to_transform": (_layers, "a layer's number, or a list of them"),
    "layers_pattern": (_name_or_names, "a name, or a list of names"),
    "peft_version": (lambda v: isinstance(v, str), "text"),
}

"""Compare every field of a ``config.json`` with a closed list, family by family.

A field is in one of three sets, or the file is rejected with the field's name and value:

    family     it changes what the model computes. The family's rule says which values megalora
               computes (``families/``).
    HARMLESS   it changes nothing in a training step: bookkeeping, generation settings, initial
               values.
    rotary     ``rope_fields.py`` reads these together.

A field in none of them passes only if it is null, false, zero or empty. ``check_sizes`` looks at
sizes and their types alone, for callers that only need a model's shape: serving, merging,
exporting.
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from megalora.model.families import family_of
from megalora.model.families.family import Family
from megalora.model.families.rules import Rule
from megalora.model.quantised.config import read_scheme
from megalora.model.quantised.scheme import QUANTISED, Scheme
from megalora.model.rope_fields import ROPE_FIELDS, check_whole_heads, read_rope
from megalora.model.shape import ModelShape

_BOOKKEEPING = (
    "model_type", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version",
    "torch_dtype", "dtype",
    "tokenizer_class", "prefix", "finetuning_task", "task_specific_params", "problem_type",
    "id2label", "label2id",
    "num_labels", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "cls_token_id",
    "mask_token_id", "decoder_start_token_id", "unsloth_fixed", "unsloth_version", "model_name",
    "model_max_length",
)  # fmt: skip
_HOW_IT_RUNS = (
    "use_cache", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states",
    "torchscript",
    "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "pretraining_tp",
    "gradient_checkpointing",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_experts_implementation", "_experts_implementation_internal", "initializer_range",
    "router_aux_loss_coef",
    "sliding_window", "max_window_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers",
)  # fmt: skip
"""sliding_window and max_window_layers take effect only with use_sliding_window, which must be
false; layers for predicting several tokens ahead are not part of the model that is trained."""
_GENERATION = (
    "max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping",
    "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "bad_words_ids", "num_return_sequences", "output_scores",
    "output_logits",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "renormalize_logits",
    "cache_implementation", "use_model_defaults", "generation_config",
)  # fmt: skip
HARMLESS = frozenset((*_BOOKKEEPING, *_HOW_IT_RUNS, *_GENERATION))
_QUANTISED_OTHERWISE = ("compression_config", "quantization")
"""Fields of quantised models that are not read: compressed-tensors wrote the first before it had
the name of all others, MLX writes the second."""
MAX_EXPERT_BLOCKS = 1_000_000
_TOGETHER = ("architectures", "layer_types")
"""Fields whose right values depend on others of the file."""


def check_sizes(hf: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless every size is there and a number that a model can have."""
    family = family_of(hf)
    experts_names = [name for name in family.num_experts_names if name in hf]
    named = set(hf)
    # Any one of the names for the number of experts will do.
    if experts_names:
        named.update(family.num_experts_names)
    missing = [name for name in family.required if name not in named]
    if missing:
        raise ValueError(
            f"config.json of a {hf['model_type']} model must have {', '.join(missing)}"
        )
    _check_rules(hf, family.sizes)
    counts: set[int] = {hf[name] for name in experts_names}
    if len(counts) > 1:
        given = " and ".join(f"{name}={hf[name]}" for name in experts_names)
        raise ValueError(f"config.json has {given}; they are one field under two names")
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads={heads} is not a multiple of"
            f" num_key_value_heads={kv_heads}"
        )
    # Without head_dim a head has hidden_size / heads features, and rotary embeddings turn pairs.
    if not hf.get("head_dim") and hf["hidden_size"] % (2 * heads):
        raise ValueError(
            f"config.json has no head_dim, and hidden_size={hf['hidden_size']} makes no even number"
            f" for each of num_attention_heads={heads}"
        )
    experts = max(counts, default=0)
    # Every linear of every expert is a row of some table.
    if experts * hf["num_hidden_layers"] > MAX_EXPERT_BLOCKS:
        raise ValueError(
            f"config.json: {experts:,} experts in each of {hf['num_hidden_layers']:,} layers; they"
            f" must be {MAX_EXPERT_BLOCKS:,} in all at most"
        )
    if experts and hf["num_experts_per_tok"] > experts:
        raise ValueError(
            f"config.json: num_experts_per_tok={hf['num_experts_per_tok']} is more than"
            f" {family.num_experts_names[0]}={experts}"
        )


def model_shape(hf: Mapping[str, Any]) -> ModelShape:
    """Sizes from a parsed ``config.json``.

    Other fields are not looked at: see ``check_fields``.

    Raises:
        ValueError: megalora does not know the family, or no model can have these sizes.
    """
    check_sizes(hf)
    return family_of(hf).shape(hf)


def check_fields(hf: Mapping[str, Any], source: str = "") -> None:
    """Raise ``ValueError`` unless megalora computes exactly the model that a parsed ``config.json``
    describes.

    Args:
        source: hub name or folder that it is from, to name the unquantised model where that can be
            told.
    """
    check_sizes(hf)
    family = family_of(hf)
    # What explains most comes first: a quantised model has other odd fields besides.
    scheme_of(hf, source)
    _check_rules(hf, family.others)
    _check_rope(hf, family)
    family.check(hf)
    _check_architecture(hf, family)
    _check_layer_types(hf)
    # With one expert per token, softmax over the chosen is the constant 1, and Megatron rejects it.
    if hf.get("norm_topk_prob") and hf.get("num_experts_per_tok") == 1:
        raise ValueError(
            "config.json has norm_topk_prob=true with num_experts_per_tok=1: every weight of an"
            " expert would be 1, and the router could not matter; set norm_topk_prob to false if"
            " the model was trained so"
        )
    # Last, because a field of another feature often comes with one that says more.
    known = {*family.sizes, *family.others, *HARMLESS, *ROPE_FIELDS, *_TOGETHER, QUANTISED}
    for name, value in hf.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise ValueError(_unknown(hf["model_type"], name, value, known))


def _check_rules(hf: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise ``ValueError`` for the first field whose value its rule does not accept."""
    for name, rule in rules.items():
        # A rule returns what it wants instead, empty where it accepts the value.
        if name in hf and (wanted := rule(hf[name])):
            raise ValueError(f"config.json has {name}={_shown(hf[name])}; it must be {wanted}")


def _check_rope(hf: Mapping[str, Any], family: Family) -> None:
    kind = read_rope(hf).kind
    if family.turns_whole_heads:
        check_whole_heads(hf)
    if kind not in family.rope_kinds:
        raise ValueError(
            f"config.json asks for rotary embeddings of type {kind!r}; for {family.model_type},"
            f" megalora computes {', '.join(family.rope_kinds)}"
        )


def _check_architecture(hf: Mapping[str, Any], family: Family) -> None:
    names = hf.get("architectures") or []
    # Also the class without a head, which some folders name.
    bare = family.causal_lm.replace("ForCausalLM", "Model")
    if names not in ([], [family.causal_lm], [bare]):
        raise ValueError(
            f"config.json has architectures={_shown(names)}; a {hf['model_type']} model is trained"
            f" as {family.causal_lm}"
        )


def _check_layer_types(hf: Mapping[str, Any]) -> None:
    types = hf.get("layer_types")
    if types is not None and types != ["full_attention"] * hf["num_hidden_layers"]:
        raise ValueError(
            f"config.json has layer_types={_shown(types)}; it must be full_attention for each of"
            f" the {hf['num_hidden_layers']} layers: attention sees the whole sequence"
        )


def _unknown(model_type: str, name: str, value: Any, known: set[str]) -> str:
    # 0.8: one letter or two may differ.
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
    hint = f" Did you mean {close[0]}?" if close else ""
    return (
        f"config.json has {name}={_shown(value)}, a field megalora does not know for {model_type};"
        f" what it does to the model would be ignored.{hint} If it does nothing, remove it from"
        " config.json"
    )


def _shown(value: Any) -> str:
    """The value as JSON, cut to what fits into a line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."


# How published names say that a model is quantised: Qwen3-30B-A3B-FP8, ...-GPTQ-Int4, ...-4bit
_FORMATS = re.compile(
    r"[-_.](fp8|gptq|awq|int[48]|w\d+a\d+|nvfp4|mxfp4|fp4|nf4|bnb|unsloth-bnb|quantized|mlx|\d-?bit|exl2|autoround)"
    r"([-_.].*)?$",
    re.IGNORECASE,
)


def scheme_of(hf: Mapping[str, Any], source: str = "") -> Scheme | None:
    """How a model's linears are quantised by its ``config.json``; None where they are plain.

    Raises:
        ValueError: they are quantised in a way that is not read.
    """
    source = source or str(hf.get("_name_or_path", ""))
    for name in _QUANTISED_OTHERWISE:
        if hf.get(name):
            raise ValueError(
                f"config.json has {name}: these weights are quantised in a way that megalora does"
                f" not read; {instead_of_quantised(source)}"
            )
    settings = hf.get(QUANTISED)
    if not settings:
        return None
    try:
        if not isinstance(settings, dict):
            raise ValueError(f"it is {_shown(settings)}, not an object")
        return read_scheme(settings)
    except ValueError as error:
        raise ValueError(
            f"config.json has {QUANTISED}, of which megalora does not read this: {error};"
            f" {instead_of_quantised(source)}"
        ) from None


def instead_of_quantised(source: str) -> str:
    """Advice on what to use in place of a quantised model, by its hub name or folder:
    ``Qwen/Qwen3-30B-A3B-FP8``."""
    path = source.rstrip("/")
    # A folder in the hub's cache has owner and model in its name.
    if cached := re.search(r"models--([^/]+?)--([^/]+)", source):
        path = "/".join(cached.groups())
    owner, _, model = path.rpartition("/")
    plain = _FORMATS.sub("", model)
    # The name does not say from what it was made.
    if plain == model or not plain:
        return "use the model they were quantised from"
    # Qwen quantises its own models; others' are under names of their makers.
    if owner == "Qwen":
        return f"use Qwen/{plain}"
    return f"use the model they were quantised from, {plain} by this one's name"

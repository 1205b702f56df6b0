"""Build and parse the names of tensors in base and adapter folders.

    model.layers.N.PATH.weight                  a linear of layer N, as models are published
    model.layers.N.mlp.experts.E.LEAF.weight    a linear of one routed expert
    model.layers.N.mlp.experts.WHICH            one tensor for all experts of a layer
    base_model.model.MODULE.lora_A.weight       an adapter's factor for one of them

Base folders also come without ``model.`` or with ``model.language_model.`` (``published_name``).
Stacks other than PEFT write more around an adapter's names that means nothing: no prefix at all;
the wrappers of FSDP, DDP, activation checkpointing and torch.compile anywhere in the path; PEFT's
adapter name after the factor, which ``state_dict()`` has and ``save_pretrained`` removes. Tinker
calls lm_head ``model.unembed_tokens``.
"""

import re
from dataclasses import dataclass
from typing import Literal

FactorName = Literal["A", "B", "M", "C", "A0", "B0"]
"""A and B of LoRA; M, the magnitude of DoRA; C, the bias of B; A0 and B0, what PiSSA or OLoRA began
with, which no file of PEFT's has apart."""

LM_HEAD = "lm_head.weight"
SCORE = "score"
"""Module of the head of ``...ForSequenceClassification``."""
EMBED_TOKENS = "model.embed_tokens"
EMBEDDING = f"{EMBED_TOKENS}.weight"
TINKER_HEAD = "model.unembed_tokens"
PEFT_PREFIX = "base_model.model."
LAYER = "model.layers.{layer}."
"""Template of what stands before a layer's own names."""

# N.self_attn.q_proj, N.mlp.experts.E.up_proj
_IN_LAYER = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?P<path>.*?)(?:\.(?P<expert>\d+))?\.(?P<leaf>\w+)"
)
_EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)")
_STACK = re.compile(r"(?P<block>model\.layers\.\d+\.\w+\.experts)(?:\.(?P<which>[a-z]\w*))?")
# FP8 and compressed-tensors, GPTQ and AWQ, bitsandbytes, MXFP4.
_OF_QUANTISED = re.compile(
    r"\.(weight_scale_inv|weight_scale|weight_scale_2|weight_packed|weight_shape|weight_zero_point|"
    r"weight_global_scale|input_scale|input_global_scale|qweight|qzeros|scales|g_idx|absmax|"
    r"quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.|_(blocks|scales|scale_inv)$"
)
_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
# An adapter's name, such as .default, may stand before .weight.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<factor>[AB]|magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<part>weight|bias))?"
)
_FACTOR_OF: dict[str, FactorName] = {"A": "A", "B": "B", "magnitude_vector": "M"}
# Embeddings have factors of their own, without .weight.
_PLAIN_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
# PEFT calls the base's own linear base_layer inside its wrapper.
_COPY = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.weight")
_COPY_OF_VOCABULARY = re.compile(r".*\.(?:embed_tokens|lm_head)\.base_layer\.weight")

_BIAS = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.bias")
_TOKENS = re.compile(
    r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?"  # an adapter's name
)
_OTHER = {
    r"lora_embedding_[AB](\..+)?": "an adapter of an embedding",
    r"(trainable_tokens|token_adapter).*": "trained rows of an embedding (trainable_token_indices)",
    r"modules_to_save\..+": "a whole trained weight (modules_to_save)",
    r"lora_(E|ranknum)(\..+)?|ranknum(\..+)?": "a part of AdaLoRA",
    r"lora_diag(\..+)?": "the diagonal of KaSA (kasa_config)",
    r"(hada|lokr|oft|vera|ia3|boft)_.+": "a factor of another method than LoRA",
    r"weight": "a whole weight",
    r"bias": "a bias of the base (bias=all or lora_only)",
}
"""What a tensor is by the end of its name, as a regular expression; the first that matches."""


def tensor_name(hf_module: str, factor: FactorName) -> str:
    """Name of an adapter's factor in ``adapter_model.safetensors``.

    >>> tensor_name("lm_head", "A")
    'base_model.model.lm_head.lora_A.weight'
    >>> tensor_name("lm_head", "M")
    'base_model.model.lm_head.lora_magnitude_vector'
    """
    # PEFT keeps the magnitude in a module of its own, and drops that module's ".weight" on saving.
    if factor == "M":
        return f"{PEFT_PREFIX}{hf_module}.lora_magnitude_vector"
    if factor == "C":
        return f"{PEFT_PREFIX}{hf_module}.lora_B.bias"
    return f"{PEFT_PREFIX}{hf_module}.lora_{factor}.weight"


def weight_name(hf_module: str) -> str:
    """Name of a weight that is trained whole (``modules_to_save``) in an adapter's file.

    >>> weight_name("score")
    'base_model.model.score.weight'
    """
    return f"{PEFT_PREFIX}{hf_module}.weight"


def bias_name(hf_module: str, *, is_adapted: bool = False) -> str:
    """Name of a trained bias of the base (``bias=all``, ``bias=lora_only``) in an adapter's file.

    >>> bias_name("model.layers.0.self_attn.q_proj", is_adapted=True)
    'base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias'
    """
    # PEFT's wrapper of an adapted linear keeps the base's own linear under this name.
    inner = ".base_layer" if is_adapted else ""
    return f"{PEFT_PREFIX}{hf_module}{inner}.bias"


def tokens_name(hf_module: str) -> str:
    """Name of the trained rows of an embedding (``trainable_token_indices``) in an adapter's file.

    >>> tokens_name("model.embed_tokens")
    'base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta'
    """
    # Called a delta, and yet the rows themselves.
    return f"{PEFT_PREFIX}{hf_module}.token_adapter.trainable_tokens_delta"


def experts_block(layer: int) -> str:
    """``model.layers.N.mlp.experts``, transformers' module of a layer's routed experts."""
    return f"{LAYER.format(layer=layer)}mlp.experts"


@dataclass(frozen=True)
class InLayer:
    """A module of a layer."""

    layer: int
    expert: int | None
    """Number of the expert; None outside the experts."""
    leaf: str
    """Last part of the name."""


def parse_in_layer(module: str) -> InLayer | None:
    """Layer, expert and last part of a module's name; None outside the layers."""
    match = _IN_LAYER.fullmatch(module)
    if match is None:
        return None
    expert = None if match["expert"] is None else int(match["expert"])
    return InLayer(int(match["layer"]), expert, match["leaf"])


@dataclass(frozen=True)
class OfExpert:
    """A linear of one routed expert."""

    block: str
    """Name up to ``experts``."""
    number: int
    leaf: str
    """Last part of the name."""


def parse_expert(module: str) -> OfExpert | None:
    """Block, number and last part of the name of an expert's module; None for others.

    >>> parse_expert("model.layers.0.mlp.experts.7.up_proj")
    OfExpert(block='model.layers.0.mlp.experts', number=7, leaf='up_proj')
    """
    match = _EXPERT.fullmatch(module)
    if match is None:
        return None
    return OfExpert(match["block"], int(match["number"]), match["leaf"])


def parse_stack(module: str) -> tuple[str, str] | None:
    """``(name up to experts, what follows it)`` of a name for all experts of a layer; None for
    others.

    >>> parse_stack("model.layers.0.mlp.experts.base_layer")
    ('model.layers.0.mlp.experts', 'base_layer')
    """
    match = _STACK.fullmatch(module)
    if match is None:
        return None
    return match["block"], match["which"] or ""


def is_of_experts(name: str) -> bool:
    """Whether a tensor belongs to one expert or to all experts of a layer."""
    return ".experts." in name


def within_layer(name: str) -> str:
    """A name, or a template of names, without its layer: ``self_attn.q_proj``."""
    return re.sub(r"^model\.layers\.(\d+|\{layer\})\.", "", name)


def published_name(name: str) -> str:
    """A stored tensor's name as models are published: ``model.layers...``, ``lm_head.weight``."""
    # Multimodal models, and models saved with a wrapper around them.
    for prefix in ("model.language_model.", "model.model."):
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    if name == f"model.{LM_HEAD}":
        return LM_HEAD
    # Saved from the model without its head, which has no ``model.``.
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        return f"model.{name}"
    return name


def is_of_quantised(name: str) -> bool:
    """Whether a tensor belongs to a quantised weight: its scales, blocks, zero points."""
    return _OF_QUANTISED.search(name) is not None


def parse_factor(name: str) -> tuple[str, FactorName] | None:
    """``(HF module name, "A", "B", "M" or "C")``; None for a name that is not a linear layer's
    factor.

    >>> module = "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj"
    >>> parse_factor(f"{module}.lora_B.default.weight")
    ('model.layers.0.self_attn.q_proj', 'B')
    """
    match = _FACTOR.fullmatch(_WRAPPERS.sub("", name))
    if match is None:
        return None
    # M is called lora_magnitude_vector, C lora_B.bias; nothing else has a bias.
    factor = _FACTOR_OF[match["factor"]]
    if match["part"] == "bias":
        if factor != "B":
            return None
        factor = "C"
    module = match["module"].removeprefix(PEFT_PREFIX)
    return "lm_head" if module == TINKER_HEAD else module, factor


def parse_weight(name: str) -> str | None:
    """The HF module whose base weight has this name, also under PEFT's wrapper; None for other
    names.

    >>> parse_weight("base_model.model.lm_head.base_layer.weight")
    'lm_head'
    """
    plain = _WRAPPERS.sub("", name)
    # A factor's name ends with .weight as well.
    if ".lora_" in plain:
        return None
    match = _COPY.fullmatch(plain)
    if match is None:
        return None
    return match["module"].removeprefix(PEFT_PREFIX)


def parse_bias(name: str) -> str | None:
    """The HF module whose own bias has this name, also under PEFT's wrapper; None for other names.

    >>> parse_bias("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias")
    'model.layers.0.self_attn.q_proj'
    """
    plain = _WRAPPERS.sub("", name)
    # The bias of a B is a factor.
    if ".lora_" in plain:
        return None
    match = _BIAS.fullmatch(plain)
    return None if match is None else match["module"].removeprefix(PEFT_PREFIX)


def parse_tokens(name: str) -> str | None:
    """The HF module some of whose rows a tensor holds, trained; None for other names.

    >>> parse_tokens("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta")
    'model.embed_tokens'
    """
    match = _TOKENS.fullmatch(_WRAPPERS.sub("", name))
    return None if match is None else match["module"].removeprefix(PEFT_PREFIX)


def parse_plain_factor(name: str) -> tuple[str, FactorName] | None:
    """``parse_factor`` for the names that PEFT itself writes and vLLM reads, those of an
    embedding's factors included."""
    match = _PLAIN_FACTOR.fullmatch(name)
    if match is None:
        return None
    factor = match["factor"] or match["embedding"]
    return match["module"], "A" if factor == "A" else "B"


def module_before_factor(name: str) -> str:
    """The module in the name of any LoRA tensor."""
    return name.removeprefix(PEFT_PREFIX).split(".lora_")[0]


def is_copy_of_vocabulary(name: str) -> bool:
    """Whether a tensor of an adapter's file is the base's own embedding or head, which vLLM
    ignores."""
    return _COPY_OF_VOCABULARY.fullmatch(name) is not None


def is_training_only(name: str) -> bool:
    """Whether PEFT uses a tensor in backward only, so that it does not change what the adapter
    computes."""
    # VeLoRA compresses the activations that it keeps for backward.
    return ".lora_velora_embed" in name


def described(name: str) -> str:
    """What a tensor is that is not a linear layer's factor, in words for a message."""
    plain = _WRAPPERS.sub("", name)
    for ending, what in _OTHER.items():
        if re.fullmatch(rf"(.+\.)?({ending})", plain):
            return what
    return "unknown to megalora"

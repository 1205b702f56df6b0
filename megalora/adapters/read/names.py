"""Tensor names as other stacks write them, taken apart: which module, which factor; and what a
tensor is that is no factor.

All stacks mean ``base_model.model.MODULE.lora_A.weight``. What is found around it and means
nothing: no prefix at all; the wrappers of FSDP, DDP, activation checkpointing and torch.compile
anywhere in the path; PEFT's adapter name after the factor, which ``state_dict()`` has and
``save_pretrained`` removes. Tinker calls lm_head ``model.unembed_tokens``.
"""

import re

from megalora.lora.spec import FactorName

_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
)
_COPY = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.weight")
TINKER_HEAD = "model.unembed_tokens"

_OTHER = {
    r"lora_embedding_[AB](\..+)?": "an adapter of an embedding",
    r"lora_magnitude_vector(\..+)?": "the magnitude of DoRA (use_dora)",
    r"lora_B(\..+)?\.bias": "a bias beside B (lora_bias)",
    r"(trainable_tokens|token_adapter).*": "trained rows of an embedding (trainable_token_indices)",
    r"modules_to_save\..+": "a whole trained weight (modules_to_save)",
    r"lora_(E|ranknum)(\..+)?|ranknum(\..+)?": "a part of AdaLoRA",
    r"lora_diag(\..+)?": "the diagonal of KaSA (kasa_config)",
    r"(hada|lokr|oft|vera|ia3|boft)_.+": "a factor of another method than LoRA",
    r"weight": "a whole weight",
    r"bias": "a bias of the base (bias=all or lora_only)",
}
"""End of a name -> what the tensor is."""


def parse(name: str) -> tuple[str, FactorName] | None:
    """``(HF module name, "A" or "B")``, or None where the name is no LoRA factor of a linear layer.

    >>> module = "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj"
    >>> parse(f"{module}.lora_B.default.weight")
    ('model.layers.0.self_attn.q_proj', 'B')
    """
    match = _FACTOR.fullmatch(_WRAPPERS.sub("", name))
    if match is None:
        return None
    factor: FactorName = "A" if match["factor"] == "A" else "B"
    module = match["module"].removeprefix(_PREFIX)
    return "lm_head" if module == TINKER_HEAD else module, factor


def parse_weight(name: str) -> str | None:
    """The HF module of which a name is the base's own weight, also under PEFT's wrapper; None for
    other names.

    >>> parse_weight("base_model.model.lm_head.base_layer.weight")
    'lm_head'
    """
    plain = _WRAPPERS.sub("", name)
    match = None if ".lora_" in plain else _COPY.fullmatch(plain)
    return match["module"].removeprefix(_PREFIX) if match else None


def is_training_only(name: str) -> bool:
    """Whether PEFT uses the tensor in backward alone, so that it changes nothing that the adapter
    computes."""
    return ".lora_velora_embed" in name


def described(name: str) -> str:
    """What a tensor is that is no factor of a linear layer, in words for a message."""
    plain = _WRAPPERS.sub("", name)
    for ending, what in _OTHER.items():
        if re.fullmatch(rf"(.+\.)?({ending})", plain):
            return what
    return "unknown to megalora"

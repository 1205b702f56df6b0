"""Tensor names as other stacks write them, taken apart: which module, which factor.

All stacks mean ``base_model.model.MODULE.lora_A.weight``. What is found around it and means nothing: no prefix at all; the
wrappers of FSDP, DDP, activation checkpointing and torch.compile anywhere in the path; PEFT's adapter name after the factor,
which ``state_dict()`` has and ``save_pretrained`` removes.
"""

import re

from megalora.lora.spec import FactorName

_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?")


def parse(name: str) -> tuple[str, FactorName] | None:
    """``(HF module name, "A" or "B")``, or None where the name is no LoRA factor of a linear layer.

    >>> parse("base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_B.default.weight")
    ('model.layers.0.self_attn.q_proj', 'B')
    """
    match = _FACTOR.fullmatch(_WRAPPERS.sub("", name))
    if match is None:
        return None
    factor: FactorName = "A" if match["factor"] == "A" else "B"
    return match["module"].removeprefix(_PREFIX), factor

"""Families of models: one file each, registered here.

Everything else iterates over ``FAMILIES`` or looks a family up by ``model_type``: a family that
stands in this table is in the grid of layouts, the dry run, the planner's counts and the table of
what is supported.
"""

from collections.abc import Mapping
from typing import Any

from megalora.model.families import (
    glm4_moe,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from megalora.model.families.family import Family
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape
from megalora.wording import shorten

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (qwen3_moe, qwen3, qwen2_moe, llama, mistral, glm4_moe, olmoe, mixtral)
}
"""By ``model_type``."""


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a parsed ``config.json``; raises ``ValueError`` for one megalora does not
    know."""
    # A file without model_type is rejected in the same words.
    kind = hf.get("model_type", "nothing")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type {shorten(kind)} is not supported; megalora knows {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def layer_projections(shape: ModelShape, layer: int) -> tuple[Projection, ...]:
    """The linears of a decoder layer that LoRA can adapt, fused ones beside each other."""
    return FAMILIES[shape.model_type].projections(shape, layer)

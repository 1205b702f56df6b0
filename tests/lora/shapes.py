"""Sizes of four small models, and what a ``lora`` section adapts in them."""

from dataclasses import replace
from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape

# Every size differs, and 6 heads of 32 are not the hidden size: a dimension that is taken for
# another shows.
MOE_SHAPE = ModelShape(
    model_type="qwen3_moe", num_layers=4, hidden=96, num_heads=6, num_kv_heads=2, head_dim=32,
    intermediate=144,
    vocab=512, tied_embeddings=False, num_experts=5, top_k=3, expert_intermediate=40,
    moe_layers=frozenset(range(4)),
)  # fmt: skip
# As mlp_only_layers=[1] of config.json says it.
MIXED_SHAPE = replace(MOE_SHAPE, moe_layers=frozenset({0, 2, 3}))
SHARED_SHAPE = replace(
    MIXED_SHAPE, model_type="qwen2_moe", shared_intermediate=112, qk_norm=False, qkv_bias=True
)
DENSE_SHAPE = replace(MOE_SHAPE, model_type="qwen3", num_experts=0, top_k=0, moe_layers=frozenset())
ATTENTION_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP_NAMES = ["gate_proj", "up_proj", "down_proj"]


def adapt(shape: ModelShape = MOE_SHAPE, **options: Any) -> list[Adapted]:
    """What a ``lora`` section with these options adapts."""
    return resolve(LoRAConfig(**options), shape)


def places(adapted: list[Adapted]) -> list[tuple[int | None, str]]:
    """(layer, name) of each; None for a linear outside the layers."""
    return [(a.layer, a.name) for a in adapted]


def refusal(shape: ModelShape = MOE_SHAPE, **options: Any) -> str:
    """What a ``lora`` section with these options is refused with."""
    with pytest.raises(ValueError) as caught:
        adapt(shape, **options)
    return str(caught.value)

"""Qwen2-MoE: biases on q, k and v, no norms on them, and a shared expert behind a gate beside the
routed ones. Published as Qwen/Qwen1.5-MoE-A2.7B and Qwen/Qwen2-57B-A14B."""

from typing import Any

from megalora.model.families import decoder
from megalora.model.families.family import Config, ExtraTensor, Family, PeftSupport
from megalora.model.families.rules import flag, whole
from megalora.model.shape import ModelShape


def _shape(hf: Config) -> ModelShape:
    return decoder.decoder_shape(
        hf,
        num_experts=hf["num_experts"],
        top_k=hf["num_experts_per_tok"],
        expert_intermediate=hf["moe_intermediate_size"],
        shared_intermediate=hf["shared_expert_intermediate_size"],
        # num_experts=0 makes all layers dense, whatever the step says.
        moe_layers=decoder.sparse_layers(hf) if hf["num_experts"] else frozenset(),
        qk_norm=False,
        # True is transformers' default.
        qkv_bias=hf.get("qkv_bias", True),
        softmax_over_all=decoder.softmax_over_all(hf),
    )


def _extras(shape: ModelShape, layer: int) -> tuple[ExtraTensor, ...]:
    return decoder.SHARED_GATE if shape.is_moe(layer) else ()


def _settings(shape: ModelShape, hf: Config) -> dict[str, Any]:
    settings = decoder.router_settings(shape, hf)
    if shape.moe_layers:
        settings["moe_shared_expert_intermediate_size"] = shape.shared_intermediate
        settings["moe_shared_expert_gate"] = True
    return settings


FAMILY = Family(
    model_type="qwen2_moe",
    causal_lm="Qwen2MoeForCausalLM",
    title="Qwen2-MoE",
    required=(*decoder.SIZES, *decoder.EXPERT_SIZES, "shared_expert_intermediate_size"),
    sizes={
        **decoder.SIZES,
        **decoder.MORE_SIZES,
        **decoder.EXPERT_SIZES,
        **decoder.EXPERT_LAYERS,
        "shared_expert_intermediate_size": whole(1),
        "qkv_bias": flag,
    },
    others={**decoder.OTHERS, **decoder.ROUTER},
    num_experts_names=("num_experts",),
    shape=_shape,
    projections=decoder.decoder_projections,
    extras=_extras,
    settings=_settings,
    tiny=decoder.TINY
    | decoder.TINY_EXPERTS
    | {"shared_expert_intermediate_size": 112, "norm_topk_prob": False, "qkv_bias": True},
    # PEFT's table of models whose experts' adapters it converts lacks qwen2_moe; it converts
    # Qwen3-MoE's under that name.
    peft=PeftSupport(per_expert=False),
)

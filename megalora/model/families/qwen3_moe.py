"""Qwen3-MoE: norms on each head's q and k, routed experts, dense layers where the config asks for
them. Published as Qwen/Qwen3-30B-A3B and Qwen/Qwen3-235B-A22B."""

from megalora.model.families import decoder
from megalora.model.families.family import Config, ExtraTensor, Family
from megalora.model.families.rules import flag, or_null, whole
from megalora.model.shape import ModelShape

# transformers 5 calls this family's number of experts num_local_experts.
_NUM_EXPERTS = ("num_experts", "num_local_experts")


def _shape(hf: Config) -> ModelShape:
    experts = decoder.num_experts(hf, _NUM_EXPERTS)
    attention_bias = bool(hf.get("attention_bias"))
    return decoder.decoder_shape(
        hf,
        num_experts=experts,
        top_k=hf["num_experts_per_tok"],
        expert_intermediate=hf["moe_intermediate_size"],
        moe_layers=decoder.sparse_layers(hf) if experts else frozenset(),
        softmax_over_all=decoder.softmax_over_all(hf),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
    )


def _extras(shape: ModelShape, layer: int) -> tuple[ExtraTensor, ...]:
    return decoder.HEAD_NORMS


FAMILY = Family(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    title="Qwen3-MoE",
    required=(*decoder.SIZES, *decoder.EXPERT_SIZES),
    sizes={
        **decoder.SIZES,
        **decoder.MORE_SIZES,
        **decoder.EXPERT_SIZES,
        **decoder.EXPERT_LAYERS,
        "num_local_experts": whole(0),
        "attention_bias": or_null(flag),
    },
    others={**decoder.OTHERS, **decoder.ROUTER, **decoder.QK_NORM},
    num_experts_names=_NUM_EXPERTS,
    shape=_shape,
    projections=decoder.decoder_projections,
    extras=_extras,
    settings=decoder.router_settings,
    tiny=decoder.TINY | decoder.TINY_EXPERTS | {"attention_bias": False},
)

"""OLMoE: norms over all heads' queries and keys at once, and experts only. Published as
allenai/OLMoE-1B-7B-0924."""

from megalora.model.families import decoder
from megalora.model.families.family import Config, ExtraTensor, Family, LayerParts
from megalora.model.families.rules import MAX_EXPERTS, only, or_null, whole
from megalora.model.shape import ModelShape

# intermediate_size is that of an expert: the family has no dense MLP.
_EXPERT_SIZES = {"num_experts": whole(1, MAX_EXPERTS), "num_experts_per_tok": whole(1)}
_WIDE_NORMS = (
    ExtraTensor(
        "self_attn.q_norm.weight",
        "self_attention.q_layernorm.weight",
        lambda s: (s.num_heads * s.head_dim,),
        split="column",
    ),
    ExtraTensor(
        "self_attn.k_norm.weight",
        "self_attention.k_layernorm.weight",
        lambda s: (s.num_kv_heads * s.head_dim,),
        split="column",
    ),
)


def _check_heads(hf: Config) -> None:
    """The norm of all queries has as many weights as there are hidden features."""
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if heads * head_dim != hf["hidden_size"]:
        raise ValueError(
            f"config.json: num_attention_heads={heads} times head_dim={head_dim} must be"
            f" hidden_size={hf['hidden_size']}: the norm of all queries is as wide"
        )


def _shape(hf: Config) -> ModelShape:
    return decoder.decoder_shape(
        hf,
        num_experts=hf["num_experts"],
        top_k=hf["num_experts_per_tok"],
        expert_intermediate=hf["intermediate_size"],
        moe_layers=frozenset(range(hf["num_hidden_layers"])),
        full_width_norms=True,
        softmax_over_all=decoder.softmax_over_all(hf),
    )


def _extras(shape: ModelShape, layer: int) -> tuple[ExtraTensor, ...]:
    return _WIDE_NORMS


def _parts() -> LayerParts:
    # Imports Megatron, which this package does not need otherwise.
    from megalora.model.full_width_norm import KeyNorm, QueryNorm

    return LayerParts(q_norm=QueryNorm, k_norm=KeyNorm)


FAMILY = Family(
    model_type="olmoe",
    causal_lm="OlmoeForCausalLM",
    has_classifier=False,
    title="OLMoE",
    required=(*decoder.SIZES, *_EXPERT_SIZES),
    sizes={**decoder.SIZES, **decoder.MORE_SIZES, **_EXPERT_SIZES},
    others={
        **decoder.OTHERS,
        **decoder.ROUTER,
        "attention_bias": or_null(only(False, because="attention has no biases here")),
        "clip_qkv": only(None, because="queries, keys and values are not clipped here"),
    },
    num_experts_names=("num_experts",),
    check=_check_heads,
    shape=_shape,
    projections=decoder.decoder_projections,
    extras=_extras,
    settings=decoder.router_settings,
    layer_parts=_parts,
    # 6 heads of 32 features are as wide as the hidden states, as ``_check_heads`` wants.
    tiny=decoder.TINY
    | {
        "hidden_size": 192,
        "intermediate_size": 80,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    },
)

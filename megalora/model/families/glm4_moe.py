"""GLM-4.5 and its successors with grouped-query attention: dense first layers, then routed experts
chosen by corrected sigmoid scores beside shared experts; half of each head is turned. Published as
zai-org/GLM-4.5, GLM-4.5-Air, GLM-4.6 and GLM-4.7."""

from typing import Any

from megalora.model.families import decoder
from megalora.model.families.family import Config, ExtraTensor, Family, PeftSupport
from megalora.model.families.rules import MAX_EXPERTS, flag, only, or_null, positive, whole
from megalora.model.projections import ATTENTION, DENSE_MLP, MOE, SHARED_EXPERTS, Projection
from megalora.model.rope_fields import rotary_dim
from megalora.model.shape import ModelShape

_EXPERT_SIZES = {
    "n_routed_experts": whole(1, MAX_EXPERTS),
    "num_experts_per_tok": whole(1),
    "moe_intermediate_size": whole(1),
    "n_shared_experts": whole(1),
    "first_k_dense_replace": whole(0),
}
_ROUTER = {
    "routed_scaling_factor": positive,
    "n_group": whole(1),
    "topk_group": whole(1),
}


def _check_groups(hf: Config) -> None:
    """A token chooses from ``topk_group`` groups of experts; a group is rated by its best two."""
    experts = hf["n_routed_experts"]
    groups = hf["n_group"]
    allowed = hf["topk_group"]
    # One group of all experts: nothing to choose among groups.
    if groups == 1:
        return
    if experts % groups or experts < 2 * groups:
        raise ValueError(
            f"config.json: n_group={groups} must divide n_routed_experts={experts} into groups of"
            " two or more: a group is rated by its two best experts"
        )
    choice = min(allowed, groups) * experts // groups
    if allowed > groups or choice < hf["num_experts_per_tok"]:
        raise ValueError(
            f"config.json: topk_group={allowed} of n_group={groups} leaves {choice} experts to"
            f" choose num_experts_per_tok={hf['num_experts_per_tok']} from; topk_group must be"
            " larger, and at most n_group"
        )


def _shape(hf: Config) -> ModelShape:
    # Twice: numbers of layers and heads are needed for the sizes that are the family's own.
    base = decoder.decoder_shape(hf)
    return decoder.decoder_shape(
        hf,
        num_experts=hf["n_routed_experts"],
        top_k=hf["num_experts_per_tok"],
        expert_intermediate=hf["moe_intermediate_size"],
        # Several shared experts, whose outputs are added, are one of their joint width.
        shared_intermediate=hf["n_shared_experts"] * hf["moe_intermediate_size"],
        shared_gate=False,
        moe_layers=frozenset(range(hf["first_k_dense_replace"], base.num_layers)),
        correction_bias=True,
        qk_norm=bool(hf.get("use_qk_norm")),
        qkv_bias=bool(hf.get("attention_bias")),
        rotary_dim=rotary_dim(hf, base.head_dim, default=0.5),
    )


def _projections(shape: ModelShape, layer: int) -> tuple[Projection, ...]:
    if shape.is_moe(layer):
        return ATTENTION + MOE + SHARED_EXPERTS
    return ATTENTION + DENSE_MLP


def _extras(shape: ModelShape, layer: int) -> tuple[ExtraTensor, ...]:
    norms = decoder.HEAD_NORMS if shape.qk_norm else ()
    return norms + (decoder.CORRECTION_BIAS if shape.is_moe(layer) else ())


def _settings(shape: ModelShape, hf: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"rotary_percent": shape.turned_features / shape.head_dim}
    if not shape.moe_layers:
        return settings
    settings |= {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        # Hidden states and weight are widened before their product.
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
        "moe_router_num_groups": hf["n_group"],
        "moe_router_group_topk": hf["topk_group"],
        "moe_shared_expert_intermediate_size": shape.shared_intermediate,
    }
    # One group of all experts is none, but Bridge sets both from the file.
    if hf["n_group"] == 1:
        settings |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
    return settings


def _layers_ahead(shape: ModelShape) -> str:
    """The layer after the last predicts several tokens ahead (``num_nextn_predict_layers``)."""
    return f"model.layers.{shape.num_layers}."


FAMILY = Family(
    model_type="glm4_moe",
    causal_lm="Glm4MoeForCausalLM",
    has_classifier=False,
    title="GLM-4.5 MoE",
    required=(*decoder.SIZES, *_EXPERT_SIZES, *_ROUTER),
    sizes={
        **decoder.SIZES,
        **decoder.MORE_SIZES,
        **_EXPERT_SIZES,
        "attention_bias": or_null(flag),
        "use_qk_norm": or_null(flag),
    },
    others={
        **decoder.OTHERS,
        **decoder.ROUTER,
        **_ROUTER,
        "norm_topk_prob": only(True, because="weights of the chosen experts are normed to 1"),
    },
    num_experts_names=("n_routed_experts",),
    rope_kinds=("default",),
    turns_whole_heads=False,
    check=_check_groups,
    shape=_shape,
    projections=_projections,
    extras=_extras,
    unused=_layers_ahead,
    settings=_settings,
    # transformers reads the bias through the router, and PEFT's wrapper around it has none
    peft=PeftSupport(not_honoured={"gate": "fails at the first forward pass"}),
    tiny=decoder.TINY
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
        },
        "attention_bias": True,
        "use_qk_norm": True,
        "moe_intermediate_size": 80,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
)

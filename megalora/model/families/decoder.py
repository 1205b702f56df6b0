"""Collect what families of decoders with grouped-query attention and gated MLPs share: config
fields, sizes, tensors and Megatron settings, which each family's file chooses from."""

from typing import Any

from megalora.model.families.family import Config, ExtraTensor
from megalora.model.families.rules import (
    MAX_EXPERTS,
    MAX_LAYERS,
    Rule,
    flag,
    layer_numbers,
    only,
    or_null,
    positive,
    whole,
)
from megalora.model.projections import ATTENTION, DENSE_MLP, MOE, SHARED_EXPERT, Projection
from megalora.model.shape import ModelShape

SIZES: dict[str, Rule] = {
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_attention_heads": whole(1),
    "num_key_value_heads": or_null(whole(1)),
    "hidden_size": whole(1),
    "intermediate_size": whole(1),
    "vocab_size": whole(1),
}
"""Fields that every config must have."""
MORE_SIZES: dict[str, Rule] = {
    # Rotary embeddings turn pairs of features.
    "head_dim": or_null(whole(2, even=True)),
    "tie_word_embeddings": or_null(flag),
}
EXPERT_SIZES: dict[str, Rule] = {
    "num_experts": whole(0, MAX_EXPERTS),
    "num_experts_per_tok": whole(1),
    "moe_intermediate_size": whole(1),
}
EXPERT_LAYERS: dict[str, Rule] = {
    "decoder_sparse_step": or_null(whole(1)),
    "mlp_only_layers": or_null(layer_numbers),
}
OTHERS: dict[str, Rule] = {
    "max_position_embeddings": whole(1),
    "rms_norm_eps": positive,
    "hidden_act": only("silu", "swish", because="MLPs and experts compute no other activation"),
    "attention_dropout": or_null(
        only(0, because="attention has no dropout here; lora.dropout is the adapters'")
    ),
    "use_sliding_window": or_null(only(False, because="attention sees the whole sequence")),
    "is_causal": only(
        True,
        because="every token sees the tokens before it alone; transformers takes null for false",
    ),
}
ROUTER: dict[str, Rule] = {
    "norm_topk_prob": flag,
    "output_router_logits": or_null(
        only(False, because="it adds a balancing loss, which is not computed")
    ),
}
QK_NORM: dict[str, Rule] = {
    "use_qk_norm": or_null(only(True, because="this family has norms on q and k")),
    "qk_norm": or_null(only(True, because="this family has norms on q and k")),
}


def num_experts(hf: Config, names: tuple[str, ...]) -> int:
    """The number of experts under whichever of ``names`` it stands; 0 where there is none."""
    return next((hf[name] for name in names if name in hf), 0)


def sparse_layers(hf: Config) -> frozenset[int]:
    """Layers with experts: every ``decoder_sparse_step``-th that ``mlp_only_layers`` leaves."""
    # transformers' defaults where a file leaves them out: every layer.
    step = hf.get("decoder_sparse_step") or 1
    dense = set(hf.get("mlp_only_layers") or [])
    layers = range(hf["num_hidden_layers"])
    return frozenset(i for i in layers if i not in dense and (i + 1) % step == 0)


def decoder_shape(hf: Config, **more: Any) -> ModelShape:
    """Sizes that every family names alike; ``more`` adds fields of ``ModelShape`` or replaces
    them. Sizes of experts are left out of a model that has no layer with experts."""
    heads = hf["num_attention_heads"]
    # transformers' defaults: as many key/value heads as heads, which share the hidden features.
    values: dict[str, Any] = {
        "model_type": hf["model_type"],
        "num_layers": hf["num_hidden_layers"],
        "hidden": hf["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "intermediate": hf["intermediate_size"],
        "vocab": hf["vocab_size"],
        "tied_embeddings": bool(hf.get("tie_word_embeddings")),
        "initializer_range": _initializer_range(hf),
    } | more
    # Two configs of one dense model must have equal shapes, whatever they say about experts.
    if not values.get("moe_layers"):
        of_experts = (
            "num_experts", "top_k", "expert_intermediate", "shared_intermediate",
            "softmax_over_all",
        )  # fmt: skip
        for name in of_experts:
            values.pop(name, None)
    return ModelShape(**values)


def _initializer_range(hf: Config) -> float:
    """The standard deviation of new weights; transformers' default where the field says nothing."""
    found = hf.get("initializer_range")
    if isinstance(found, int | float) and 0 < found < 1:
        return float(found)
    return ModelShape.initializer_range


def decoder_projections(shape: ModelShape, layer: int) -> tuple[Projection, ...]:
    """Attention, then the dense MLP or router, experts and shared expert."""
    if not shape.is_moe(layer):
        return ATTENTION + DENSE_MLP
    return ATTENTION + MOE + (SHARED_EXPERT if shape.shared_intermediate else ())


_MISTRAL_POSITIONS = 32 * 4096
"""``max_position_embeddings`` that transformers takes where the field is missing."""


def check_window(hf: Config, *, default: int | None, hint: str) -> None:
    """Raise ``ValueError`` where Mistral's or Mixtral's ``sliding_window`` would hide tokens: one
    at least as long as the model's positions hides none.

    Args:
        default: the window that transformers takes where the field is missing.
        hint: which releases have no window.
    """
    window = hf.get("sliding_window", default)
    positions = hf.get("max_position_embeddings", _MISTRAL_POSITIONS)
    if window is None or window >= positions:
        return
    where = f"sliding_window={window}"
    if "sliding_window" not in hf:
        where = f"no sliding_window, for which transformers takes {window}"
    raise ValueError(
        f"config.json has {where} with max_position_embeddings={positions}: attention would see"
        f" {window} tokens alone, and megalora computes it over the whole sequence. Take a release"
        f" without a window ({hint})"
    )


HEAD_NORMS = (
    ExtraTensor(
        "self_attn.q_norm.weight", "self_attention.q_layernorm.weight", lambda s: (s.head_dim,)
    ),
    ExtraTensor(
        "self_attn.k_norm.weight", "self_attention.k_layernorm.weight", lambda s: (s.head_dim,)
    ),
)
"""Norms of q and k, one weight for all heads."""
SHARED_GATE = (
    ExtraTensor(
        "mlp.shared_expert_gate.weight",
        "mlp.shared_experts.gate_weight",
        lambda s: (1, s.hidden),
    ),
)
"""The scalar gate of the shared expert."""


CORRECTION_BIAS = (
    ExtraTensor(
        "mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", lambda s: (s.num_experts,)
    ),
)
"""The bias that a router with sigmoid scores adds to them for the choice of experts only."""


def softmax_over_all(hf: Config) -> bool:
    """Whether the router's softmax runs over all experts. Where probabilities of the chosen ones
    are normed again, a softmax over these alone is the same."""
    # False is transformers' default.
    return not hf.get("norm_topk_prob", False)


def router_settings(shape: ModelShape, hf: Config) -> dict[str, Any]:
    """Megatron's settings for a router with softmax scores; none for a dense model."""
    if not shape.moe_layers:
        return {}
    return {"moe_router_pre_softmax": shape.softmax_over_all}


# No two sizes are equal, so that a transposed or mixed-up matrix does not fit.
TINY: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
TINY_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 80,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.0,
}

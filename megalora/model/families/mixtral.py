"""Mixtral: Mistral's attention and experts only, which checkpoints and adapters name in their own
way. Published as mistralai/Mixtral-8x7B-v0.1 and Mixtral-8x22B-v0.1.

    published under block_sparse_moe.      transformers' model        computes
    gate                                   mlp.gate                   logits of experts
    experts.E.w1, experts.E.w3             mlp.experts.gate_up_proj   silu(w1 x) * (w3 x)
    experts.E.w2                           mlp.experts.down_proj      w2 of that
"""

from dataclasses import replace
from typing import Any

from megalora.model.families import decoder
from megalora.model.families.family import Config, Family
from megalora.model.families.rules import MAX_EXPERTS, only, or_null, whole
from megalora.model.projections import ATTENTION, MOE, Projection
from megalora.model.shape import ModelShape

_EXPERT_SIZES = {"num_local_experts": whole(1, MAX_EXPERTS), "num_experts_per_tok": whole(1)}
_PUBLISHED_LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "gate": "gate"}


def _published(projection: Projection) -> Projection:
    """A linear of an MoE layer under the name that Mixtral's checkpoints have for it."""
    stem, _, leaf = projection.hf.rpartition(".")
    stem = stem.replace(".mlp", ".block_sparse_moe")
    return replace(projection, hf=f"{stem}.{_PUBLISHED_LEAVES[leaf]}", in_memory=projection.hf)


_LAYER = ATTENTION + tuple(_published(projection) for projection in MOE)


def _check(hf: Config) -> None:
    decoder.check_window(
        hf, default=None, hint="mistralai/Mixtral-8x7B-v0.1 and 8x22B-v0.1 have null"
    )
    # A softmax over one chosen expert is the constant 1, and Megatron rejects it.
    if hf["num_experts_per_tok"] == 1:
        raise ValueError(
            "config.json has num_experts_per_tok=1: weights of the chosen experts are normed to 1,"
            " so that the router could not matter; megalora computes 2 or more"
        )


def _shape(hf: Config) -> ModelShape:
    return decoder.decoder_shape(
        hf,
        qk_norm=False,
        num_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        # There is no dense MLP: the field is the size of an expert.
        expert_intermediate=hf["intermediate_size"],
        moe_layers=frozenset(range(hf["num_hidden_layers"])),
    )


def _projections(shape: ModelShape, layer: int) -> tuple[Projection, ...]:
    return _LAYER


def _settings(shape: ModelShape, hf: Config) -> dict[str, Any]:
    # Norming the probabilities of the chosen experts again is a softmax over these alone.
    return {"moe_router_pre_softmax": False}


FAMILY = Family(
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    title="Mixtral",
    required=(*decoder.SIZES, *_EXPERT_SIZES),
    sizes={**decoder.SIZES, **decoder.MORE_SIZES, **_EXPERT_SIZES},
    others={
        **decoder.OTHERS,
        "sliding_window": or_null(whole(1)),
        "output_router_logits": decoder.ROUTER["output_router_logits"],
        "router_jitter_noise": or_null(
            only(0, because="hidden states are not multiplied with noise before the router")
        ),
    },
    num_experts_names=("num_local_experts",),
    check=_check,
    shape=_shape,
    projections=_projections,
    settings=_settings,
    tiny=decoder.TINY
    | {
        "intermediate_size": 80,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
    },
)

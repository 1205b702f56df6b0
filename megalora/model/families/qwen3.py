"""Qwen3, dense: norms on each head's q and k. Published as Qwen/Qwen3-0.6B to Qwen/Qwen3-32B."""

from megalora.model.families import decoder
from megalora.model.families.family import Config, ExtraTensor, Family
from megalora.model.families.rules import flag, or_null, whole
from megalora.model.shape import ModelShape


def _shape(hf: Config) -> ModelShape:
    # One field for the biases of q, k, v and o together.
    bias = bool(hf.get("attention_bias"))
    return decoder.decoder_shape(hf, qkv_bias=bias, o_bias=bias)


def _extras(shape: ModelShape, layer: int) -> tuple[ExtraTensor, ...]:
    return decoder.HEAD_NORMS


FAMILY = Family(
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    title="Qwen3",
    required=(*decoder.SIZES, "head_dim"),
    sizes={
        **decoder.SIZES,
        **decoder.MORE_SIZES,
        "head_dim": whole(2, even=True),
        "attention_bias": or_null(flag),
    },
    others={**decoder.OTHERS, **decoder.QK_NORM},
    shape=_shape,
    projections=decoder.decoder_projections,
    extras=_extras,
    tiny=decoder.TINY | {"attention_bias": False},
)

"""Llama, dense: no norms on q and k, biases on attention's linears where the config asks for them.
Published as meta-llama/Llama-2-7b-hf, meta-llama/Llama-3.1-8B and many others; Llama 3.1 scales its
rotary embeddings by type "llama3"."""

from megalora.model.families import decoder
from megalora.model.families.family import Config, Family
from megalora.model.families.rules import flag, only, or_null
from megalora.model.shape import ModelShape


def _shape(hf: Config) -> ModelShape:
    bias = bool(hf.get("attention_bias"))
    return decoder.decoder_shape(hf, qk_norm=False, qkv_bias=bias, o_bias=bias)


FAMILY = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    title="Llama",
    # Files of the first Llama have no num_key_value_heads: as many as query heads.
    required=tuple(name for name in decoder.SIZES if name != "num_key_value_heads"),
    sizes={**decoder.SIZES, **decoder.MORE_SIZES, "attention_bias": or_null(flag)},
    others={
        **decoder.OTHERS,
        "mlp_bias": or_null(only(False, because="linears of the MLP have no bias here")),
    },
    shape=_shape,
    projections=decoder.decoder_projections,
    tiny=decoder.TINY | {"attention_bias": False, "mlp_bias": False},
)

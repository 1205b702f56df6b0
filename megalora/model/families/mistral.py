"""Mistral, dense: Llama's layers without any bias. Published as mistralai/Mistral-7B-v0.3; the
window over which attention slides in v0.1 is not computed."""

from megalora.model.families import decoder
from megalora.model.families.family import Config, Family
from megalora.model.families.rules import or_null, whole
from megalora.model.shape import ModelShape

# What transformers takes where config.json does not name the field.
_DEFAULT_WINDOW = 4096


def _shape(hf: Config) -> ModelShape:
    return decoder.decoder_shape(hf, qk_norm=False)


def _check(hf: Config) -> None:
    without_window = "mistralai/Mistral-7B-v0.2 and later have null"
    decoder.check_window(hf, default=_DEFAULT_WINDOW, hint=without_window)


FAMILY = Family(
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    title="Mistral",
    required=tuple(decoder.SIZES),
    sizes={**decoder.SIZES, **decoder.MORE_SIZES},
    others={
        **decoder.OTHERS,
        "sliding_window": or_null(whole(1)),
    },
    check=_check,
    shape=_shape,
    projections=decoder.decoder_projections,
    tiny=decoder.TINY | {"sliding_window": None},
)

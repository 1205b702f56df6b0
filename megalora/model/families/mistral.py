"""Mistral, dense: Llama's layers without any bias. Published as mistralai/Mistral-7B-v0.3; the
window over which attention slides in v0.1 is not computed."""

from megalora.model.families import decoder
from megalora.model.families.family import Config, Family
from megalora.model.families.rules import or_null, whole
from megalora.model.shape import ModelShape

# What transformers takes where config.json does not name the field.
_DEFAULT_WINDOW = 4096
_DEFAULT_POSITIONS = 32 * 4096


def _shape(hf: Config) -> ModelShape:
    return decoder.decoder_shape(hf, qk_norm=False)


def _check(hf: Config) -> None:
    """A window at least as long as the model's positions hides nothing."""
    window = hf.get("sliding_window", _DEFAULT_WINDOW)
    positions = hf.get("max_position_embeddings", _DEFAULT_POSITIONS)
    if window is None or window >= positions:
        return
    where = f"sliding_window={window}"
    if "sliding_window" not in hf:
        where = f"no sliding_window, for which transformers takes {window}"
    raise ValueError(
        f"config.json has {where} with max_position_embeddings={positions}: attention would see"
        f" {window} tokens alone, and megalora computes it over the whole sequence. Take a release"
        " without a window (mistralai/Mistral-7B-v0.2 and later have null)"
    )


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

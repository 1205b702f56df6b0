"""Read architectures for planning without a download: a Hugging Face ``config.json`` as YAML, as in
``configs/models``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megalora.config import ModelConfig, ParallelConfig, RunConfig
from megalora.config.yaml_limits import check_yaml
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import check_fields, model_shape, scheme_of
from megalora.model.held import Held, held_of, kept_cycles
from megalora.model.quantised.scheme import QUANTISED
from megalora.model.shape import ModelShape
from megalora.planner.weights import layer_parameters


def read_architecture(path: Path) -> dict[str, Any]:
    """The fields of a model's ``config.json`` from a YAML file; raises ``ValueError`` that names
    the file."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; configs/models/*.yaml are the architectures that come along"
        )
    try:
        check_yaml(path.read_text(encoding="utf-8"))
        fields = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    # ValueError: not UTF-8, too large, or a number that is none.
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ValueError(
            f"{path}: not a YAML file of a model's config.json ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path}: must hold the fields of a model's config.json, got a {type(fields).__name__}"
        )
    return {str(name): value for name, value in fields.items()}


ARCHITECTURES = Path(__file__).with_name("architectures")
"""The folder of architectures: part of the package, so that an installed one has it;
``configs/models`` is a link to it."""


SAME_SIZES = {
    "qwen3_30b_a3b_base": "qwen3_30b_a3b",
    "qwen3_30b_a3b_instruct_2507": "qwen3_30b_a3b",
    "qwen3_30b_a3b_thinking_2507": "qwen3_30b_a3b",
    "qwen3_coder_30b_a3b_instruct": "qwen3_30b_a3b",
    "qwen3_235b_a22b_instruct_2507": "qwen3_235b_a22b",
    "qwen3_235b_a22b_thinking_2507": "qwen3_235b_a22b",
}
"""Models of the same architecture as one of ``ARCHITECTURES``. Their rotary base and their longest
text differ, which a plan does not count."""


FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "mlp.gate"],
}  # fmt: skip
"""``quantization_config`` of Qwen's models whose names end in -FP8; the published list also has the
norms, which are no linears."""
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "mlp.gate"],
}  # fmt: skip
"""The same of Unsloth's models whose names end in -bnb-4bit, as far as a plan goes."""


def held_by_config(model: ModelConfig, hf: Mapping[str, Any]) -> Held | None:
    """Weights that stay codes, as far as ``config.json`` says; raises ``ValueError`` as
    ``held_of`` does."""
    return held_of(model, scheme_of(hf, model.path), model_shape(dict(hf)))


def find_architecture(path: str) -> dict[str, Any]:
    """The fields of ``config.json`` for a ``model.path``, without a download.

    ``path`` is a folder with a ``config.json``, a YAML file such as those of ``configs/models``, or
    a hub name of which there is one: ``Qwen/Qwen3-30B-A3B`` is ``qwen3_30b_a3b.yaml``, and
    ``Qwen/Qwen3-Coder-30B-A3B-Instruct`` has the same sizes.

    Raises:
        ValueError: ``path`` is none of them, or its config asks for something that megalora does
            not compute.
    """
    hf = _read_fields(path)
    check_fields(hf, path)
    return hf


def _read_fields(path: str) -> dict[str, Any]:
    """``find_architecture`` without its check of the fields."""
    if (Path(path) / "config.json").is_file():
        return read_hf_config(Path(path))
    if path.endswith((".yaml", ".yml")):
        return read_architecture(Path(path))
    # "Qwen/Qwen3-30B-A3B" and a mirror's "anybody/qwen3-30b-a3b" are the same model.
    name = path.rsplit("/", 1)[-1].lower().replace("-", "_")
    plain = name.removesuffix("_fp8").removesuffix("_bnb_4bit")
    known = ARCHITECTURES / f"{SAME_SIZES.get(plain, plain)}.yaml"
    if known.is_file():
        fields = read_architecture(known)
        if plain != name:
            fields[QUANTISED] = FP8 if name.endswith("_fp8") else NF4
        return fields
    there = ", ".join(sorted(file.name for file in ARCHITECTURES.glob("*.yaml")))
    raise ValueError(
        f"model.path={path} is neither a folder with a config.json nor a model of {ARCHITECTURES}"
        f" ({there}). To plan for it, download its config.json alone and give its folder."
    )


def shape_in(config: RunConfig) -> ModelShape:
    """The sizes of what a config trains, its score head included, without a download."""
    hf = find_architecture(config.model.path)
    held = held_by_config(config.model, hf)
    cycles = kept_cycles(config.train, held, scheme_of(hf, config.model.path))
    return replace(model_shape(hf), num_scores=config.objective.num_scores, kept_cycles=cycles)


def load_shape(path: Path) -> ModelShape:
    """The sizes of an architecture in ``configs/models``; raises ``ValueError`` that names the
    file."""
    try:
        return model_shape(read_architecture(path))
    except ValueError as error:
        # Messages of the reader name the file; those about sizes know no file.
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None


def active_parameters(shape: ModelShape) -> int:
    """Base parameters that one token meets: all but the experts it is not sent to; embeddings and
    router count whole."""
    # An expert is gate, up and down: 3 H I.
    unused = (shape.num_experts - shape.top_k) * 3 * shape.hidden * shape.expert_intermediate
    return shape.num_parameters() - len(shape.moe_layers) * unused


def active_layer_parameters(shape: ModelShape, layer: int) -> int:
    """The same of one decoder layer."""
    is_moe = shape.is_moe(layer)
    # On one rank: whole.
    total = layer_parameters(shape, ParallelConfig(), is_moe)
    if is_moe:
        unused = shape.num_experts - shape.top_k
        total -= unused * 3 * shape.hidden * shape.expert_intermediate
    return total

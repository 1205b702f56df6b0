"""Architectures written down in ``configs/models``: a Hugging Face ``config.json`` as YAML, for planning without a download."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megalora.model.shape import ModelShape, model_shape


def read_architecture(path: Path) -> dict[str, Any]:
    """The fields of a model's ``config.json`` from a YAML file; raises ``ValueError`` that names the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; architectures are written down in configs/models/*.yaml")
    try:
        fields = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file of a model's config.json ({str(error).splitlines()[0]})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: must hold the fields of a model's config.json, got a {type(fields).__name__}")
    return {str(name): value for name, value in fields.items()}


def load_shape(path: Path) -> ModelShape:
    """The sizes of an architecture in ``configs/models``; raises ``ValueError`` that names the file."""
    try:
        return model_shape(read_architecture(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def active_parameters(shape: ModelShape) -> int:
    """Base parameters that one token meets: all but the experts it is not sent to; embeddings and router count whole."""
    unused = (shape.num_experts - shape.top_k) * 3 * shape.hidden * shape.expert_intermediate
    return shape.num_parameters() - len(shape.moe_layers) * unused

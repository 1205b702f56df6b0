"""Say what a tensor of an adapter's file is by its name, and check what it holds."""

from typing import Any

import torch
from torch import Tensor

from megalora.adapters.read.options import has_score
from megalora.adapters.read.weights import FLOATS, AdapterWeights
from megalora.hf.tensor_names import (
    SCORE,
    FactorName,
    described,
    module_before_factor,
    parse_factor,
    parse_weight,
    weight_name,
)
from megalora.model.shape import ModelShape


def factor_of(weights: AdapterWeights, name: str) -> tuple[str, FactorName]:
    parsed = parse_factor(name)
    if parsed is not None:
        return parsed
    module = module_before_factor(name)
    where = (
        f"{weights.path_of(name)}: {name} is no LoRA factor of a linear layer, which is all"
        " megalora reads"
    )
    if ".lora_embedding_" in name:
        raise ValueError(
            f"{where}: {module} has an adapter; megalora does not adapt embeddings. Merge it with"
            " PEFT (merge_and_unload), or train without it"
        )
    raise ValueError(
        f"{where}: it is {described(name)}. Merge the adapter with PEFT (merge_and_unload), or"
        " train without"
    )


def checked(weights: AdapterWeights, name: str, dims: int) -> Tensor:
    """The tensor, if it is a factor's: of floats, all finite, with so many dimensions, or two where
    ``dims`` are three."""
    info = weights.info[name]
    path = weights.path_of(name)
    if info.dtype not in FLOATS or len(info.shape) not in (min(dims, 2), dims):
        what = "this factor is a vector" if dims == 1 else "a factor is a matrix"
        raise ValueError(
            f"{path}: {name} is {info.dtype} of shape {info.shape}; {what} in {', '.join(FLOATS)}"
        )
    tensor = weights.tensor(name)
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{path}: {name} has NaN or infinite values; the training that wrote it had diverged"
        )
    return tensor


def score_of(
    weights: AdapterWeights, config: dict[str, Any], shape: ModelShape
) -> dict[str, Tensor]:
    """The score head's weight by its canonical name; nothing where the config has no head."""
    if not has_score(config):
        return {}
    # Once, whatever wrappers the name has around it.
    names = [name for name in weights.info if parse_weight(name) == SCORE]
    # PEFT warns of a lost head and goes on with a new one.
    if len(names) != 1:
        raise ValueError(
            f"{weights.where} has {len(names)} tensors for {SCORE}.weight, which its config saves"
            " (modules_to_save): it was lost, or saving went wrong"
        )
    tensor = checked(weights, names[0], 2)
    if tensor.shape[1] != shape.hidden or not len(tensor):
        raise ValueError(
            f"{weights.path_of(names[0])}: {names[0]} is {tuple(tensor.shape)}, but this base model"
            f" needs (number of labels, {shape.hidden})"
        )
    return {weight_name(SCORE): tensor.contiguous()}

"""Build a base on this rank, and return what the layer check says of it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megalora.config import ModelConfig, ParallelConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.build import build_model
from megalora.model.fields import model_shape
from megalora.parallel import parallel_groups
from megalora.verify.layer import check_layers

Chunks = list[Any]


@contextlib.contextmanager
def loaded(
    base: Path, parallel: dict[str, int] | None = None, dtype: str = "float32"
) -> Iterator[tuple[Chunks, Any]]:
    """This rank's chunks of a base in a layout, and the groups."""
    p = ParallelConfig(**(parallel or {}))
    shape = model_shape(read_hf_config(base))
    with parallel_groups(p) as groups:
        yield build_model(ModelConfig(path=str(base), dtype=dtype), p, shape, base), groups  # type: ignore[arg-type]


def said(chunks: Chunks, groups: Any, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """The check's line, or the error's text."""
    try:
        return check_layers(chunks, groups, folder, dtype)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def said_in(base: Path, parallel: dict[str, int], dtype: str) -> str:
    """What the check says of a base as it is loaded in a layout."""
    with loaded(base, parallel, dtype) as (chunks, groups):
        return said(chunks, groups, base, getattr(torch, dtype))


def layer_of(chunks: Chunks, number: int) -> Any:
    """The layer of this number, from 0, on whichever stage it is."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            # Megatron counts from 1.
            if layer.layer_number - 1 == number:
                return layer
    raise LookupError(f"no layer {number} here")


def dense_gate_and_up(chunks: Chunks) -> None:
    """Exchange gate and up of layer 1: both are [I, H], so that no shape gives it away."""
    weight = layer_of(chunks, 1).mlp.linear_fc1.weight
    weight.data.copy_(torch.cat(weight.data.chunk(2)[::-1]))

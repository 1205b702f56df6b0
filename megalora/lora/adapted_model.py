"""From a config to a base model with adapters on this rank: what training, resuming and verifying
share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.lora.coverage import check_coverage
from megalora.lora.gather import take_parts
from megalora.lora.inject import inject
from megalora.lora.shards import FactorShard
from megalora.lora.spec import Adapted
from megalora.model.build import build_model
from megalora.model.shape import ModelShape
from megalora.parallel import Groups


@dataclass
class AdaptedModel:
    """A frozen base model with adapters on this rank."""

    chunks: list[nn.Module]
    adapted: list[Adapted]
    pieces: list[FactorShard]
    shape: ModelShape
    groups: Groups

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every adapter parameter of this rank, once."""
        return list(dict.fromkeys(piece.parameter for piece in self.pieces))


def build_adapted(
    folder: Path, shape: ModelShape, adapted: list[Adapted], groups: Groups,
    *, model: ModelConfig, parallel: ParallelConfig, lora: LoRAConfig, seed: int,
    rows_per_expert: float = 0.0,
) -> AdaptedModel:  # fmt: skip
    """Load the base for this rank, put the adapters in, and prove that all are there; collective.

    ``rows_per_expert`` as in ``inject``.
    """
    chunks = build_model(model, parallel, shape, folder)
    dtype = getattr(torch, model.dtype)
    pieces = inject(
        chunks,
        adapted,
        shape,
        lora,
        groups,
        seed=seed,
        dtype=dtype,
        rows_per_expert=rows_per_expert,
    )
    check_coverage(adapted, pieces)
    return AdaptedModel(chunks, adapted, pieces, shape, groups)


def load_adapter(model: AdaptedModel, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapters from whole tensors by name; raises ``ValueError`` when one is missing or
    does not fit."""
    with torch.no_grad():
        values = {p: p.data for p in model.parameters}
        take_parts(tensors.keys(), tensors.__getitem__, model.pieces, values, where="the adapter")

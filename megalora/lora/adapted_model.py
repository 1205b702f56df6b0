"""Build a frozen base with adapters on this rank: what training, verifying and the planner's dry
run share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalora import host
from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.lora.coverage import check_coverage
from megalora.lora.experts import expert_formats
from megalora.lora.gather import take_parts
from megalora.lora.inject import inject
from megalora.lora.shards import FactorShard
from megalora.lora.spec import Adapted
from megalora.model.build import MakeBase
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


def adapt_base(
    make_base: MakeBase, shape: ModelShape, adapted: list[Adapted], groups: Groups,
    *, model: ModelConfig, parallel: ParallelConfig, lora: LoRAConfig, seed: int,
    rows_per_expert: float = 0.0,
) -> AdaptedModel:  # fmt: skip
    """Make the base of this rank and put its adapters in; no rank hears of another's.

    Args:
        make_base: makes the frozen chunks, their weights read, drawn or left empty.
        seed: of the initial adapters.
        rows_per_expert: as in ``expert_formats``.
    """
    dtype = getattr(torch, model.dtype)
    formats = expert_formats(
        adapted,
        shape,
        etp=parallel.etp,
        dtype=dtype,
        device=host.device(),
        rows_per_expert=rows_per_expert,
    )
    chunks = make_base(model, parallel, shape, formats=formats)
    pieces = inject(chunks, adapted, shape, lora, groups, seed=seed, dtype=dtype)
    return AdaptedModel(chunks, adapted, pieces, shape, groups)


def build_adapted(
    make_base: MakeBase, shape: ModelShape, adapted: list[Adapted], groups: Groups, **settings: Any
) -> AdaptedModel:
    """``adapt_base``, and the proof that all ranks together hold every adapter tensor; collective.

    Raises:
        RuntimeError: a tensor is missing or surplus, which is a bug of ours.
    """
    model = adapt_base(make_base, shape, adapted, groups, **settings)
    check_coverage(model.adapted, model.pieces)
    return model


def load_adapter(model: AdaptedModel, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapters from whole tensors by name; raises ``ValueError`` when one is missing or
    does not fit."""
    with torch.no_grad():
        values = {p: p.data for p in model.parameters}
        take_parts(tensors.keys(), tensors.__getitem__, model.pieces, values, where="the adapter")

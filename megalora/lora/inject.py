"""Replace modules of a frozen model by modules with adapters."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from megalora import host
from megalora.config import LoRAConfig
from megalora.lora.dense import ColumnLoRA, RowLoRA
from megalora.lora.experts import ExpertsLoRA
from megalora.lora.factors import LoRAFactors
from megalora.lora.router import RouterLoRA
from megalora.lora.shards import FactorShard
from megalora.lora.spec import Adapted
from megalora.lora.unfrozen import unfreeze
from megalora.model.families import layer_projections
from megalora.model.projections import HEAD
from megalora.model.shape import ModelShape
from megalora.parallel import Groups

DENSE = {"column": ColumnLoRA, "row": RowLoRA}


def inject(
    chunks: list[nn.Module], adapted: list[Adapted], shape: ModelShape, lora: LoRAConfig,
    groups: Groups,
    *, seed: int, dtype: torch.dtype, keeps_base: bool = False,
) -> list[FactorShard]:  # fmt: skip
    """Replace every adapted module of this rank's chunks, and let weights train that are to be
    trained whole; returns this rank's shards of adapter tensors.

    Args:
        keeps_base: as in ``unfreeze``.
    """
    wanted: dict[tuple[int | None, str], list[Adapted]] = defaultdict(list)
    for a in adapted:
        wanted[a.layer, a.projection.module].append(a)
    settings = {"seed": seed, "dtype": dtype, "device": host.device()}

    def factors(layer: int | None, module: str) -> LoRAFactors | None:
        if (layer, module) not in wanted:
            return None
        candidates = HEAD if layer is None else layer_projections(shape, layer)
        fused = [p for p in candidates if p.module == module]
        return LoRAFactors(wanted[layer, module], fused, shape, groups, **settings)

    for chunk in chunks:
        for layer in chunk.decoder.layers:  # pyright: ignore
            # Megatron counts layers of the whole model from 1.
            _adapt_layer(layer, layer.layer_number - 1, shape, factors, groups, lora.dropout)
        # Only the last pipeline stage has an output layer.
        output: Any = getattr(chunk, "output_layer", None)
        if output is not None and (head := factors(None, "output_layer")):
            chunk.output_layer = ColumnLoRA(output, head, groups.tp, lora.dropout)
    shards: list[FactorShard] = []
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAFactors):
                shards.extend(module.shards())
    shards += unfreeze(chunks, shape, groups.tp, seed=seed, dtype=dtype, keeps_base=keeps_base)
    return shards


def _adapt_layer(
    layer: Any,
    number: int,
    shape: ModelShape,
    factors: Any,
    groups: Groups,
    dropout: float,
) -> None:
    # Several projections share a fused module: a dict has each module once.
    for module, kind in {p.module: p.kind for p in layer_projections(shape, number)}.items():
        if kind in DENSE and (found := factors(number, module)):
            owner, _, name = module.rpartition(".")
            parent = layer.get_submodule(owner)
            setattr(parent, name, DENSE[kind](getattr(parent, name), found, groups.tp, dropout))
    mlp = layer.mlp
    if router := factors(number, "mlp.router"):
        mlp.router = RouterLoRA(mlp.router, router, dropout)
    gate_up = factors(number, "mlp.experts.gate_up")
    down = factors(number, "mlp.experts.down")
    if gate_up or down:
        mlp.experts = ExpertsLoRA(mlp.experts, gate_up, down, dropout)

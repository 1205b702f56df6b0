"""Build a frozen base with adapters on this rank: what training, verifying and the planner's dry
run share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megalora_kernels import Scratch
from torch import Tensor, nn

from megalora import host
from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.lora.base_factors import begin_from_base
from megalora.lora.coverage import check_coverage
from megalora.lora.experts import expert_formats
from megalora.lora.gather import take_parts
from megalora.lora.inject import inject
from megalora.lora.magnitude import refresh_norms
from megalora.lora.shards import FactorShard
from megalora.lora.spec import Adapted, has_start
from megalora.lora.trained_weight import TrainedWeight, trained_weights
from megalora.model.build import MakeBase
from megalora.model.formats import BOTH_PLAIN, ExpertFormats, LayerFormats
from megalora.model.formats.coded import Coded
from megalora.model.held import Held, held_formats
from megalora.model.shape import ModelShape
from megalora.parallel import Groups


@dataclass
class AdaptedModel:
    """A frozen base model with adapters on this rank."""

    chunks: list[nn.Module]
    adapted: list[Adapted]
    shards: list[FactorShard]
    """What this rank holds of each adapter tensor, by the tensor's name in an adapter file."""
    shape: ModelShape
    groups: Groups

    @property
    def whole(self) -> list[TrainedWeight]:
        """Weights that are trained whole."""
        return trained_weights(self.shape)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every adapter parameter of this rank, once; also those that are not trained."""
        return list(dict.fromkeys(shard.parameter for shard in self.shards))

    @property
    def trained(self) -> list[FactorShard]:
        """``shards`` without those of what stays as it began."""
        return [shard for shard in self.shards if shard.parameter.requires_grad]

    @property
    def frozen(self) -> list[FactorShard]:
        """The other ones."""
        return [shard for shard in self.shards if not shard.parameter.requires_grad]

    def values(self) -> dict[nn.Parameter, Tensor]:
        """The adapter's values by parameter: what is read and written without autograd."""
        return {parameter: parameter.data for parameter in self.parameters}


def with_held(
    formats: LayerFormats, held: Held, shape: ModelShape, parallel: ParallelConfig
) -> LayerFormats:
    """Formats in which the held weights are codes, decoded into the memory of one ``Scratch`` for
    each of gate_up, down and dense linears."""
    found: dict[int, ExpertFormats] = dict(formats)
    for layer, modules in held_formats(held, shape, parallel, formats, Scratch).items():
        linears: dict[str, Coded] = {}
        experts: dict[str, Coded] = {}
        for module, how in modules.items():
            if module.startswith("mlp.experts."):
                experts[module.rpartition(".")[2]] = how
            else:
                linears[module] = how
        found[layer] = found.get(layer, BOTH_PLAIN)._replace(linears=linears, **experts)
    return found


def adapt_base(
    make_base: MakeBase, shape: ModelShape, adapted: list[Adapted], groups: Groups,
    *, model: ModelConfig, parallel: ParallelConfig, lora: LoRAConfig, seed: int,
    rows_per_expert: float = 0.0, keeps_base: bool = False, held: Held | None = None,
) -> AdaptedModel:  # fmt: skip
    """Make the base of this rank and put its adapters in, without any communication.

    Args:
        make_base: makes the frozen chunks, their weights read, drawn or left empty.
        seed: seed of the initial adapters.
        rows_per_expert: as in ``expert_formats``.
        keeps_base: as in ``unfreeze``.
        held: weights that stay codes.
    """
    dtype = getattr(torch, model.dtype)
    # Formats come first: weights are loaded to where they stay, with or without room beside them.
    formats = expert_formats(
        adapted,
        shape,
        etp=parallel.etp,
        dtype=dtype,
        device=host.device(),
        rows_per_expert=rows_per_expert,
    )
    if held is not None:
        formats = with_held(formats, held, shape, parallel)
    chunks = make_base(model, parallel, shape, formats=formats)
    shards = inject(
        chunks, adapted, shape, lora, groups, seed=seed, dtype=dtype, keeps_base=keeps_base
    )
    return AdaptedModel(chunks, adapted, shards, shape, groups)


def build_adapted(
    make_base: MakeBase, shape: ModelShape, adapted: list[Adapted], groups: Groups,
    *, resumed: bool = False, **settings: Any,
) -> AdaptedModel:  # fmt: skip
    """``adapt_base``, then check that all ranks together hold every adapter tensor; collective.

    Args:
        resumed: the adapter will be filled in, so that nothing has to be computed for its start.
    Raises:
        RuntimeError: a tensor is missing or surplus, which is a bug of ours.
    """
    model = adapt_base(make_base, shape, adapted, groups, **settings)
    # Before anything is computed with them: a missing tensor is a bug of ours.
    check_coverage(model.adapted, model.shards, model.whole)
    refresh_norms(model.chunks, groups, start=True)
    if has_start(adapted) and not resumed:
        begin_from_base(model.chunks, groups, settings["lora"].init, settings["seed"])
    return model


def load_adapter(model: AdaptedModel, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapters from whole tensors by name; collective where there are magnitudes. Raises
    ``ValueError`` when a tensor is missing or does not fit."""
    names = tensors.keys()
    # Values are copied into parameters, which autograd must not see.
    with torch.no_grad():
        take_parts(names, tensors.__getitem__, model.shards, model.values(), where="the adapter")
    refresh_norms(model.chunks, model.groups)

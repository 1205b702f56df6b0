"""What one rank holds of a factor: which part of the whole tensor, which experts, and which ranks
hold the same part.

A factor is split over a group along one dimension, or replicated on it (``SHARDINGS`` in
``spec.py``). With fewer parts than ranks, neighbours hold the same part: ``size / num_shards`` of
them are replicas of each other, and rank ``r`` of the group holds part ``r // replicas``.

Reductions read this off a parameter:

    attribute                 meaning
    num_shards, shard         number of parts over the group, and which of them this is
    sum_group                 the group its gradient must be summed over; None where it is whole
    allreduce                 False where its data-parallel group is that of experts
    tensor_model_parallel     True where the gradient norm must count it on this rank too
    partition_dim, _stride    Megatron's: the split dimension of the parameter, and 1
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora.comm import sum_bucket
from megalora.lora.slices import Slice
from megalora.lora.spec import SHARDINGS, Adapted, FactorName
from megalora.lora.trained_weight import TrainedWeight


def cut(whole: Tensor, dim: int | None, num_shards: int, shard: int) -> Tensor:
    """Part ``shard`` of ``whole`` cut into ``num_shards`` along ``dim``; all of it without a
    ``dim``."""
    if dim is None:
        return whole
    return whole.chunk(num_shards, dim)[shard]


def local_experts(num_experts: int, ep: ProcessGroup) -> range:
    """Numbers of the experts on this rank; empty where there are no experts (``num_experts`` is
    0)."""
    count = num_experts // ep.size()
    return range(ep.rank() * count, (ep.rank() + 1) * count)


@dataclass(frozen=True)
class FactorShard:
    """One HF adapter tensor as this rank holds it: part of a parameter, or of anything shaped like
    that parameter."""

    name: str
    """Full name of the tensor in an adapter file."""
    module: str
    """HF name of its linear."""
    factor: FactorName | None
    """None for a weight that is trained whole."""
    parameter: nn.Parameter
    index: tuple[Any, ...]
    """Place of the tensor in the parameter: an expert's number on this rank, rows of stacked
    A's."""
    split_dim: int | None
    """Dimension of the tensor that is cut over the group; None where it is replicated."""
    group: str
    """Name of that group: "tp" or "etp"."""
    num_shards: int
    """Number of parts over the group; ranks with the same ``shard`` are replicas."""
    shard: int
    """Which of these parts this rank holds."""

    @property
    def is_expert(self) -> bool:
        """Whether its parameter stacks the tensors of several experts."""
        return self.group == "etp"

    def of(self, values: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The tensor's view of ``values[parameter]``, which is the parameter's data, its gradient
        or an optimizer moment."""
        return values[self.parameter][self.index]

    @property
    def slice(self) -> Slice:
        """The elements of the whole tensor that this rank holds."""
        shape = list(self.parameter.data[self.index].shape)
        if self.split_dim is None or self.num_shards == 1:
            return Slice.whole(tuple(shape))
        numel = math.prod(shape)
        shape[self.split_dim] *= self.num_shards
        return Slice(tuple(shape), self.split_dim, self.num_shards, self.shard, 0, numel)

    @property
    def first_element(self) -> int:
        """Where its elements begin in the flattened parameter, of which they are one run."""
        whole = self.parameter.data
        part = whole[self.index]
        assert part.is_contiguous(), self.name
        return int(part.storage_offset()) - int(whole.storage_offset())

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole tensor."""
        return cut(whole, self.split_dim, self.num_shards, self.shard)


def mark_parameter(parameter: Any, factor: FactorName, adapted: Adapted, groups: Any) -> None:
    """Set the attributes of the table above on a factor of ``adapted``."""
    sharding = SHARDINGS[adapted.projection.kind]
    # What experts share is a dense parameter.
    is_expert = adapted.projection.is_expert and factor != adapted.shared
    group_name = adapted.group(factor)
    group = groups.named(group_name)
    split = sharding.split(factor)
    num_shards = adapted.num_shards(factor, group.size())
    # Ranks 0 .. replicas - 1 hold shard 0, the next ones shard 1, as Megatron shares out KV heads.
    replicas = group.size() // num_shards
    parameter.num_shards = num_shards
    parameter.shard = group.rank() // replicas
    # Ranks that hold the same values saw different tokens or features, and each has part of the
    # gradient.
    parameter.sum_group = group_name if replicas > 1 else None
    parameter.allreduce = not (is_expert and groups.experts_reduce_separately)
    # Megatron's gradient norm counts marked parameters on every rank and all others on the group's
    # first rank. One replica of each part is marked, so that each part counts once.
    parameter.tensor_model_parallel = split is not None and group.rank() % replicas == 0
    # Experts are stacked along a leading dimension of the parameter.
    parameter.partition_dim = -1 if split is None else split + int(is_expert)
    parameter.partition_stride = 1


def shard_of_whole(weight: TrainedWeight, parameter: nn.Parameter) -> FactorShard:
    """What a rank holds of a weight that is trained whole, whose parameter ``weight.mark`` has
    marked."""
    marked: Any = parameter
    split = 0 if weight.split else None
    return FactorShard(
        weight.tensor, weight.module, None, parameter, (slice(None),), split, "tp",
        marked.num_shards, marked.shard,
    )  # fmt: skip


def sum_partial_gradients(parameters: Iterable[Any], group: ProcessGroup) -> None:
    """Sum each ``main_grad`` in place over the ranks of ``group`` that hold the same shard; one
    collective.

    Shards that several ranks share travel as a table with a row for each shard: a group for each
    set of replicas would cost more than the few rows of a B.
    """
    # Zero in the rows of other shards, so that the sum over the group leaves each row the sum over
    # its own replicas: [num_shards, *shape].
    parameters = list(parameters)
    tables = [p.main_grad.new_zeros(p.num_shards, *p.main_grad.shape) for p in parameters]
    for table, parameter in zip(tables, parameters, strict=True):
        table[parameter.shard] = parameter.main_grad
    sum_bucket(tables, group)
    for table, parameter in zip(tables, parameters, strict=True):
        parameter.main_grad.copy_(table[parameter.shard])

"""The adapter parameters of one Megatron module, cut for this rank as the table in ``spec.py``
says.

    parameter      dense, on one rank       experts, on one rank            holds
    lora_A         [R, in(/t)]              [E/ep, R, in(/n)]               the A's of all projections, stacked: R = sum of ranks
    lora_B.NAME    [out_NAME(/t), r_NAME]   [E/ep, out_NAME(/n), r_NAME]    one B per projection

With more ranks than key/value heads, several ranks hold the same part of k's and v's B.

Each parameter carries what reductions need: ``sum_group`` (the group its gradient must be summed
over, or None), ``num_shards`` and ``shard`` (ranks of that group with the same shard are replicas),
``allreduce`` (False where its data-parallel group is that of experts) and Megatron's
tensor-parallel attributes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megalora_kernels import ExpertFactors
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora.comm import sum_bucket
from megalora.lora.init import initial_a
from megalora.lora.spec import SHARDINGS, Adapted, FactorName, make_adapted, tensor_name
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape


@dataclass(frozen=True)
class FactorShard:
    """One HF adapter tensor as this rank holds it: part of a parameter, or of anything shaped like
    that parameter."""

    name: str
    parameter: nn.Parameter
    index: tuple[Any, ...]
    split_dim: int | None
    group: str
    num_shards: int
    """Into how many parts the tensor is cut over the group; ranks with the same ``shard`` are
    replicas."""
    shard: int

    def of(self, values: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The 2-D view of ``values[parameter]`` (the parameter's data, its gradient, an optimizer
        moment)."""
        return values[self.parameter][self.index]


class LoRAFactors(nn.Module):
    """Parameters, initial values and names; the layers in ``dense.py``, ``router.py`` and
    ``experts.py`` compute with them."""

    def __init__(
        self, adapted: list[Adapted], fused: list[Projection], shape: ModelShape, groups: Any,
        *, seed: int, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """``fused``: every projection of the base weight, in row order; ``adapted``: those that get
        an adapter."""
        super().__init__()
        self.adapted = adapted
        self.seed = seed
        kind = adapted[0].projection.kind
        self.sharding, self.is_expert = SHARDINGS[kind], kind.startswith("expert")
        group = groups.named(self.sharding.group)
        self.group_rank, self.group_size = group.rank(), group.size()
        self.experts = self._local_experts(adapted[0].num_experts, groups)
        self.row_groups = max(1, fused[0].row_groups(shape) // self.group_size)
        whole = [make_adapted(p, adapted[0].layer, 0, 0.0, 0.0, shape) for p in fused]
        self.block_rows = [
            a.out_features // a.num_shards("B", self.group_size) // self.row_groups for a in whole
        ]
        self.names = [p.name for p in fused]
        lead = (len(self.experts),) if self.is_expert else ()
        empty = {"dtype": dtype, "device": device}
        in_local = adapted[0].in_features // adapted[0].num_shards("A", self.group_size)
        self.lora_A = nn.Parameter(
            torch.empty(*lead, sum(a.rank for a in adapted), in_local, **empty)
        )
        self.lora_B = nn.ParameterDict()
        self._mark(self.lora_A, "A", adapted[0], groups)
        for a in adapted:
            out_local = a.out_features // a.num_shards("B", self.group_size)
            self.lora_B[a.name] = nn.Parameter(torch.zeros(*lead, out_local, a.rank, **empty))
            self._mark(self.lora_B[a.name], "B", a, groups)
        self.reset_parameters()

    def _local_experts(self, num_experts: int, groups: Any) -> range:
        if not self.is_expert:
            return range(0)
        count = num_experts // groups.ep.size()
        return range(groups.ep.rank() * count, (groups.ep.rank() + 1) * count)

    def _mark(self, parameter: Any, factor: FactorName, adapted: Adapted, groups: Any) -> None:
        split = self.sharding.split(factor)
        num_shards = adapted.num_shards(factor, self.group_size)
        replicas = self.group_size // num_shards
        parameter.num_shards = num_shards
        parameter.shard = self.group_rank // replicas
        parameter.sum_group = self.sharding.group if replicas > 1 else None
        parameter.allreduce = not (self.is_expert and groups.experts_reduce_separately)
        # The gradient norm counts what is marked, and on the group's first rank everything: each
        # part once.
        parameter.tensor_model_parallel = split is not None and self.group_rank % replicas == 0
        parameter.partition_dim = -1 if split is None else split + int(self.is_expert)
        parameter.partition_stride = 1

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A from (seed, tensor name), B zero: the same adapter under every layout."""
        # on the host: one copy for all experts
        drawn = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype)
        for adapted, rows in self._rows():
            for at, expert in enumerate(self.experts) if self.is_expert else [(..., None)]:
                whole = initial_a(
                    self.seed, adapted.hf_module(expert), adapted.rank, adapted.in_features
                )
                drawn[at][rows] = self._shard(whole, self.sharding.split_a)
        self.lora_A.copy_(drawn)
        for b in self.lora_B.values():
            b.zero_()

    def _shard(self, whole: Tensor, dim: int | None) -> Tensor:
        return whole if dim is None else whole.chunk(self.group_size, dim)[self.group_rank]

    def _rows(self) -> Iterator[tuple[Adapted, slice]]:
        start = 0
        for adapted in self.adapted:
            yield adapted, slice(start, start + adapted.rank)
            start += adapted.rank

    def pieces(self) -> Iterator[FactorShard]:
        """Every HF adapter tensor of which this rank holds a part, A before B, experts in order."""
        for adapted, rows in self._rows():
            for at, expert in enumerate(self.experts) if self.is_expert else [(None, None)]:
                lead = () if at is None else (at,)
                module = adapted.hf_module(expert)
                yield self._piece(module, "A", self.lora_A, (*lead, rows))
                yield self._piece(module, "B", self.lora_B[adapted.name], lead or (slice(None),))

    def _piece(
        self, module: str, factor: FactorName, parameter: nn.Parameter, index: tuple[Any, ...]
    ) -> FactorShard:
        num_shards = parameter.num_shards  # type: ignore
        shard = parameter.shard  # type: ignore
        split = self.sharding.split(factor)
        return FactorShard(
            tensor_name(module, factor),
            parameter,
            index,
            split,
            self.sharding.group,
            num_shards,
            shard,
        )

    def adapter(self) -> ExpertFactors:
        """The factors as the expert kernels take them: A's stacked, the B's and scales of all fused
        projections."""
        scales = {a.name: a.scale for a in self.adapted}
        b = tuple(self.lora_B[name] if name in scales else None for name in self.names)
        return ExpertFactors(self.lora_A, b, tuple(scales.get(name, 0.0) for name in self.names))

    def stacked_b(self) -> Tensor:
        """``[..., out, R]``: the scaled B's as one block matrix in the base weight's row order;
        zero where not adapted."""
        rows_of = {adapted.name: (adapted, rows) for adapted, rows in self._rows()}
        total = self.lora_A.shape[-2]
        lead = self.lora_A.shape[:-2]
        blocks = []
        for name, block_rows in zip(self.names, self.block_rows, strict=True):
            if name not in rows_of:
                blocks.append(self.lora_A.new_zeros(*lead, self.row_groups, block_rows, total))
                continue
            adapted, rows = rows_of[name]
            b = (self.lora_B[name] * adapted.scale).view(
                *lead, self.row_groups, block_rows, adapted.rank
            )
            blocks.append(F.pad(b, (rows.start, total - rows.stop)))
        return torch.cat(blocks, dim=-2).flatten(-3, -2)


def sum_partial_gradients(parameters: Iterable[Any], group: ProcessGroup) -> None:
    """Sum each ``main_grad`` in place over the ranks of ``group`` that hold the same shard; one
    collective.

    Shards that several ranks share travel as a table with a row for each shard: a group for each
    set of replicas would cost more than the few rows of a B.
    """
    parameters = list(parameters)
    tables = [p.main_grad.new_zeros(p.num_shards, *p.main_grad.shape) for p in parameters]
    for table, parameter in zip(tables, parameters, strict=True):
        table[parameter.shard] = parameter.main_grad
    sum_bucket(tables, group)
    for table, parameter in zip(tables, parameters, strict=True):
        parameter.main_grad.copy_(table[parameter.shard])

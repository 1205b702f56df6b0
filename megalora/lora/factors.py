"""The adapter parameters of one Megatron module, cut for this rank as the table in ``spec.py``
says.

    parameter      dense, on one rank       experts, on one rank            holds
    lora_A         [R, in(/t)]              [E/ep, R, in(/n)]               all A's stacked (R rows)
    lora_B.NAME    [out_NAME(/t), r_NAME]   [E/ep, out_NAME(/n), r_NAME]    one B per projection

With more ranks than key/value heads, several ranks hold the same part of k's and v's B.

What a rank holds of a factor, and what reductions read off a parameter, is in ``shards.py``.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megalora_kernels import ExpertFactors
from torch import Tensor, nn

from megalora.lora.init import initial_a
from megalora.lora.shards import FactorShard, cut, local_experts, mark_parameter
from megalora.lora.spec import SHARDINGS, Adapted, FactorName, make_adapted, tensor_name
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape


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
        self.sharding = SHARDINGS[kind]
        self.is_expert = adapted[0].projection.is_expert
        group = groups.named(self.sharding.group)
        self.group_rank = group.rank()
        self.group_size = group.size()
        self.experts = local_experts(adapted[0].num_experts, groups.ep)
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
        mark_parameter(self.lora_A, "A", adapted[0], groups)
        for a in adapted:
            out_local = a.out_features // a.num_shards("B", self.group_size)
            self.lora_B[a.name] = nn.Parameter(torch.zeros(*lead, out_local, a.rank, **empty))
            mark_parameter(self.lora_B[a.name], "B", a, groups)
        self.reset_parameters()

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
                drawn[at][rows] = cut(
                    whole, self.sharding.split_a, self.group_size, self.group_rank
                )
        self.lora_A.copy_(drawn)
        for b in self.lora_B.values():
            b.zero_()

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

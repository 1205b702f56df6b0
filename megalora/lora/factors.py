"""The adapter parameters of one Megatron module, cut for this rank as the table in ``spec.py``
says.

    parameter      dense, on one rank       experts, on one rank            holds
    lora_A         [R, in(/t)]              [E/ep, R, in(/n)]               all A's stacked (R rows)
    lora_B.NAME    [out_NAME(/t), r_NAME]   [E/ep, out_NAME(/n), r_NAME]    one B per projection
    lora_M.NAME    [out_NAME(/t)]           [E/ep, out_NAME(/n)]            its magnitude, for DoRA
    lora_C.NAME    [out_NAME(/t)]           nothing                         the bias of its B
    lora_A0, _B0   as lora_A, lora_B        as lora_A, lora_B               factors of the base,
                                                                            frozen (PiSSA, OLoRA);
                                                                            lora_A and lora_B are
                                                                            the differences to them

Where experts share a factor (``Adapted.shared``), 1 stands for E/ep: A of gate and up, B of down.

With more ranks than key/value heads, several ranks hold the same part of k's and v's B.

``shards.py`` describes what a rank holds of a factor, and what reductions read off a parameter.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megalora_kernels import ExpertFactors
from torch import Tensor, nn

from megalora.lora.fused_rows import fused_rows
from megalora.lora.init import initial_a
from megalora.lora.kept import KeptFactors
from megalora.lora.shards import FactorShard, cut, local_experts, mark_parameter
from megalora.lora.spec import FACTORS, SHARDINGS, Adapted, FactorName
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape


class LoRAFactors(nn.Module):
    """The parameters with their initial values and names; the layers in ``dense.py``,
    ``router.py`` and ``experts.py`` compute with them."""

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
        self._lay_out(fused, shape)
        self.shared = adapted[0].shared
        # All projections of a fused weight read the same input, so their A's are split alike.
        _, in_local = adapted[0].shard_shape("A", self.group_size)
        self.stacked_rank = sum(a.rank for a in adapted)
        place = (dtype, device, groups)
        self.lora_A = self._parameter("A", adapted[0], (self.stacked_rank, in_local), *place)
        self.lora_B = nn.ParameterDict()
        self.lora_M = nn.ParameterDict()
        self.lora_C = nn.ParameterDict()
        self.lora_A0: nn.Parameter | None = None
        self.lora_B0 = nn.ParameterDict()
        if "A0" in adapted[0].factors:
            sizes = (self.stacked_rank, in_local)
            self.lora_A0 = self._parameter("A0", adapted[0], sizes, *place)
        self.kept = self._make_kept(*place) if adapted[0].kept else None
        # Of DoRA alone; ``magnitude.py`` fills them in.
        self.norms: dict[str, Tensor] = {}
        self.squares: Tensor | None = None
        self.base_weight: Callable[[], Any] | None = None
        for a in adapted:
            for factor in a.factors:
                if FACTORS[factor].like == "B":
                    sizes = a.shard_shape(factor, self.group_size)
                    self.of(factor)[a.name] = self._parameter(factor, a, sizes, *place)
        self.reset_parameters()

    def _lay_out(self, fused: list[Projection], shape: ModelShape) -> None:
        """Find which rows of the fused weight belong to which projection."""
        self.fused = fused_rows(fused, self.adapted[0].layer, shape, self.group_size)
        self.row_groups = self.fused.row_groups
        self.names = list(self.fused.block_rows)
        self.block_rows = list(self.fused.block_rows.values())

    def of(self, factor: FactorName) -> Any:
        """The parameters of a factor: one where those of all projections are stacked, else a dict
        by projection."""
        return getattr(self, f"lora_{factor}")

    def _parameter(
        self, factor: FactorName, adapted: Adapted, sizes: Iterable[int],
        dtype: torch.dtype, device: torch.device, groups: Any,
    ) -> nn.Parameter:  # fmt: skip
        """A parameter without values; ``sizes``: of one expert where there are several."""
        row = FACTORS[factor]
        values = torch.empty(
            *self._lead(factor),
            *sizes,
            dtype=torch.float32 if row.float32 else dtype,
            device=device,
        )
        parameter = nn.Parameter(values, requires_grad=row.trained)
        mark_parameter(parameter, factor, adapted, groups)
        return parameter

    def _make_kept(self, *place: Any) -> KeptFactors:
        """Memory for the factors of all cycles that will be kept."""
        memory: dict[FactorName, dict[str, nn.Parameter]] = {"A": {}, "B": {}}
        for a in self.adapted:
            rank = a.kept * a.rank
            _, in_local = a.shard_shape("A", self.group_size)
            out_local, _ = a.shard_shape("B", self.group_size)
            memory["A"][a.name] = self._parameter("A", a, (rank, in_local), *place)
            memory["B"][a.name] = self._parameter("B", a, (out_local, rank), *place)
        return KeptFactors(self.adapted, memory)

    def keep(self, cycles: Sequence[Mapping[str, Tensor]]) -> None:
        """Let the adapters of these cycles, whole factors by tensor name, lie beside the one that
        trains, frozen; and no others."""
        assert self.kept is not None, "ModelShape.kept_cycles makes room for them"
        self.kept.fill(cycles, {factor: self.tensors_of(factor) for factor in ("A", "B")})

    @torch.no_grad()
    def reset_parameters(self, cycle: int = 0) -> None:
        """A from (seed, cycle, tensor name), B zero: the same adapter under every layout. A
        magnitude is 1 until the weight is there whose norms it starts as.

        Args:
            cycle: how often an adapter was merged and begun anew.
        """
        # Differences to A0 and B0, which ``base_factors.py`` fills in, are zero at the start.
        if self.lora_A0 is not None:
            for parameter in self.parameters():
                parameter.zero_()
            return
        # Drawn on the host and copied once, because a copy per expert would wait for the device
        # each time.
        drawn = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype)
        for adapted, rows in self._rows():
            for lead, expert in self.tensors_of("A"):
                # Every rank draws the whole A and keeps its own part.
                module = adapted.factor_module("A", expert)
                whole = initial_a(self.seed, module, adapted.rank, adapted.in_features, cycle)
                if adapted.expert_ranks:
                    assert expert is not None, (
                        "lora/factor_checks.py refuses factors of all experts"
                    )
                    # A row that is zero, whose column of B is zero too, has no gradient: both stay.
                    whole[adapted.expert_ranks[expert] :] = 0
                part = cut(whole, self.sharding.split_a, self.group_size, self.group_rank)
                drawn[lead][rows] = part
        self.lora_A.copy_(drawn)
        for b in self.lora_B.values():
            b.zero_()
        for m in self.lora_M.values():
            m.fill_(1)
        for c in self.lora_C.values():
            c.zero_()

    def _lead(self, factor: FactorName) -> tuple[int, ...]:
        """Leading dimensions of a factor's parameter."""
        if not self.is_expert:
            return ()
        return (1,) if factor == self.shared else (len(self.experts),)

    def tensors_of(self, factor: FactorName) -> list[tuple[tuple[int, ...], int | None]]:
        """(index of the leading dimension, expert's number in the whole model) of each tensor of
        the factor on this rank; for a dense linear, one entry with neither, and without a number
        for a factor that experts share."""
        if not self.is_expert:
            return [((), None)]
        if factor == self.shared:
            return [((0,), None)]
        return [((at,), expert) for at, expert in enumerate(self.experts)]

    def _rows(self) -> Iterator[tuple[Adapted, slice]]:
        """Each adapted projection with its rows of the stacked A."""
        start = 0
        for adapted in self.adapted:
            yield adapted, slice(start, start + adapted.rank)
            start += adapted.rank

    def shards(self) -> Iterator[FactorShard]:
        """Every adapter tensor of which this rank holds a part, A's before B's of each projection,
        experts in order."""
        for adapted, rows in self._rows():
            for factor in adapted.factors:
                parameters = self.of(factor)
                for lead, expert in self.tensors_of(factor):
                    if FACTORS[factor].like == "A":
                        yield self._shard(adapted, expert, factor, parameters, (*lead, rows))
                        continue
                    # A dense B belongs to one tensor whole.
                    index = lead or (slice(None),)
                    yield self._shard(adapted, expert, factor, parameters[adapted.name], index)

    def _shard(
        self, adapted: Adapted, expert: int | None, factor: FactorName, parameter: Any,
        index: tuple[Any, ...],
    ) -> FactorShard:  # fmt: skip
        """The shard that ``parameter[index]`` is, as ``mark_parameter`` has described it."""
        return FactorShard(
            adapted.tensor_name(factor, expert),
            adapted.factor_module(factor, expert),
            factor,
            parameter,
            index,
            self.sharding.split(factor),
            adapted.group(factor),
            parameter.num_shards,
            parameter.shard,
        )

    def adapter(self, gain: Tensor | None = None) -> ExpertFactors:
        """The factors as the expert kernels take them: A's stacked, the B's and scales of all fused
        projections; of a factor that experts share, a copy for each expert.

        Args:
            gain: DoRA's of every row, float32 ``[E/ep, out]``; None without magnitudes.
        """
        if self.lora_A0 is not None or self._keeps:
            return self._adapter_of_parts()
        # In the row order of the fused weight; a projection without an adapter keeps None and 0.
        b: dict[str, Tensor | None] = dict.fromkeys(self.names)
        scales = dict.fromkeys(self.names, 0.0)
        for a in self.adapted:
            b[a.name] = self._for_each_expert(self.lora_B[a.name], "B")
            scales[a.name] = a.scale
        a_ERK = self._for_each_expert(self.lora_A, "A")
        return ExpertFactors(a_ERK, tuple(b.values()), tuple(scales.values()), gain)

    @property
    def _keeps(self) -> bool:
        """Whether adapters of earlier cycles lie beside this one by now."""
        return self.kept is not None and self.kept.count > 0

    def _adapter_of_parts(self) -> ExpertFactors:
        """An adapter of the sum of the ranks of each projection's parts, of which some are
        frozen."""
        b: dict[str, Tensor | None] = dict.fromkeys(self.names)
        scales = dict.fromkeys(self.names, 0.0)
        stack: list[Tensor] = []
        for adapted, rows in self._rows():
            own_a = self.lora_A[:, rows]
            own_b = self.lora_B[adapted.name]
            if self.lora_A0 is not None:
                # A and B are differences: [A0 + dA; dA] and [dB, B0].
                parts = [self.lora_A0[:, rows] + own_a, own_a]
                beside = self.lora_B0[adapted.name]
            else:
                assert self.kept is not None
                parts = [own_a, self.kept.a(adapted)]
                beside = self.kept.b(adapted)
            stack += parts
            b[adapted.name] = torch.cat([own_b, beside], dim=-1)
            scales[adapted.name] = adapted.scale
        return ExpertFactors(torch.cat(stack, dim=1), tuple(b.values()), tuple(scales.values()))

    def weight_of(self, name: str, place: int | None) -> Tensor:
        """This rank's ``[out, in]`` of one projection's base weight, of the expert at ``place``
        where there are several."""
        assert self.base_weight is not None, "whoever wraps the base's module sets it"
        weight = self.base_weight()
        if place is not None:
            weight = weight[place]
        # Side by side within each row group, as in ``stacked_b``.
        blocks = weight.unflatten(0, (self.row_groups, -1)).split(self.block_rows, dim=1)
        # A copy: what is decoded from codes gives way to the next weight.
        return blocks[self.names.index(name)].flatten(0, 1).clone()

    def _for_each_expert(self, parameter: Tensor, factor: FactorName) -> Tensor:
        """``[E/ep, ...]`` of a factor's parameter."""
        if factor != self.shared:
            return parameter
        # The kernels step from expert to expert through memory, so each has a copy, whose gradients
        # autograd sums.
        return parameter.expand(len(self.experts), -1, -1).contiguous()

    def times_a(self, x: Tensor, dropout: float) -> Tensor:
        """``A dropout(x)`` ``[..., R]`` of a linear's input x ``[..., in]``, for ``stacked_b``.

        With a frozen A0 ``[..., 2 R]``: that of A0 + dA, and that of dA behind it. With t kept
        cycles ``[..., (1 + t) R]``: theirs, of x itself, behind it."""
        dropped = F.dropout(x, dropout)
        h = F.linear(dropped, self.lora_A)
        if self.kept is not None and self._keeps:
            # One by one: stacked they would be a copy, which autograd keeps for x's gradient.
            kept = [F.linear(x, self.kept.a(adapted)) for adapted in self.adapted]
            return torch.cat([h, *kept], dim=-1)
        if self.lora_A0 is None:
            return h
        whole = F.linear(dropped, self.lora_A0) + h
        # B0 A0 takes away from what W makes of all of x, and not of what is left after dropout.
        if dropout:
            h = h + F.linear(dropped - x, self.lora_A0)
        return torch.cat([whole, h], dim=-1)

    def stacked_bias(self) -> Tensor:
        """``[out]``: the scaled biases of the B's in the base weight's row order."""
        scales = {adapted.name: adapted.scale for adapted in self.adapted}
        biases = {name: c * scales[name] for name, c in self.lora_C.items()}
        return self.fused.stacked(biases, self.lora_A)

    def stacked_b(self) -> Tensor:
        """``[..., out, R]``: the scaled B's as one block matrix in the base weight's row order;
        zero where not adapted. With frozen B0's ``[..., out, 2 R]``: dB's, and B0's behind them;
        with kept cycles ``[..., out, (1 + t) R]``, as ``times_a``.
        """
        own = self._block_matrix(self.lora_B)
        if self.lora_A0 is not None:
            return torch.cat([own, self._block_matrix(self.lora_B0)], -1)
        if self.kept is not None and self._keeps:
            kept = {adapted.name: self.kept.b(adapted) for adapted in self.adapted}
            return torch.cat([own, self._block_matrix(kept, self.kept.count)], -1)
        return own

    def _block_matrix(self, of: Mapping[str, Tensor] | nn.ParameterDict, times: int = 1) -> Tensor:
        """``[..., out, R]`` of the B's or B0's; ``[..., out, times R]`` of those of several
        cycles."""
        rows_of = {adapted.name: (adapted, rows) for adapted, rows in self._rows()}
        total = self.lora_A.shape[-2] * times
        lead = self.lora_A.shape[:-2]
        blocks = []
        for name, block_rows in zip(self.names, self.block_rows, strict=True):
            if name not in rows_of:
                blocks.append(self.lora_A.new_zeros(*lead, self.row_groups, block_rows, total))
                continue
            adapted, rows = rows_of[name]
            # [out, r] -> [row_groups, block_rows, r]
            rank = adapted.rank * times
            b = (of[name] * adapted.scale).view(*lead, self.row_groups, block_rows, rank)
            # r columns at their place among the R of the stacked A; zeros elsewhere
            blocks.append(F.pad(b, (rows.start * times, total - rows.stop * times)))
        # Side by side within each row group, then the groups one below the other: [..., out, R]
        return torch.cat(blocks, dim=-2).flatten(-3, -2)

"""Parameters of one rank: what ``build_model`` and ``inject`` leave there, counted from sizes
alone.

Each count is exact: ``dryrun.py`` builds the same rank on the meta device and finds the same
number.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megalora.config import LoRAConfig, ParallelConfig
from megalora.config.checks import require
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape


@dataclass(frozen=True)
class PlannedModel:
    """A model's sizes with what LoRA adapts in it: resolved once, asked for every layout."""

    shape: ModelShape
    adapted: tuple[Adapted, ...]

    @classmethod
    def of(cls, shape: ModelShape, lora: LoRAConfig) -> "PlannedModel":
        """Raises ``ValueError`` for targets that match nothing, and for dropout, whose masks and
        copies nobody counts."""
        require(
            lora.dropout == 0,
            f"lora.dropout={lora.dropout}: what dropout keeps for backward is not counted. Plan"
            " with lora.dropout=0; training with it takes more memory, most of it in experts,"
            " whose rows are then permuted and kept.",
        )
        return cls(shape, tuple(resolve(lora, shape)))

    @cached_property
    def by_layer(self) -> dict[int | None, dict[str, list[Adapted]]]:
        """Layer (None: outside) -> Megatron module -> its adapted projections, in table order."""
        found: dict[int | None, dict[str, list[Adapted]]] = {}
        for a in self.adapted:
            found.setdefault(a.layer, {}).setdefault(a.projection.module, []).append(a)
        return found

    @cached_property
    def kinds(self) -> list[int]:
        """A layer number that stands for each layer: the first that is like it. Models have one or
        two kinds."""
        first: dict[object, int] = {}
        out = []
        for layer in range(self.shape.num_layers):
            modules = self.by_layer.get(layer, {})
            ranks = tuple(
                (m, tuple((a.name, a.rank) for a in found)) for m, found in modules.items()
            )
            out.append(first.setdefault((self.shape.is_moe(layer), ranks), layer))
        return out

    @cached_property
    def memo(self) -> dict[tuple[object, ...], Any]:
        """What was counted before, by name and sizes: layers of one kind, and layouts that cut them
        alike, are many."""
        return {}

    @cached_property
    def first_adapted(self) -> int:
        """The first layer with an adapter; nothing below it takes part in backward."""
        return min(
            (layer for layer in self.by_layer if layer is not None), default=self.shape.num_layers
        )


@dataclass(frozen=True)
class Chunk:
    """One model chunk of a pipeline stage."""

    layers: range
    has_embedding: bool
    has_head: bool


def chunks_of(shape: ModelShape, p: ParallelConfig, stage: int) -> list[Chunk]:
    """The ``vpp`` chunks of a stage: chunk v of stage s is the (v * pp + s)th piece of the
    layers."""
    assert 0 <= stage < p.pp, f"stage {stage} of {p.pp}"
    size = shape.num_layers // (p.pp * p.vpp)
    found = []
    for v in range(p.vpp):
        piece = v * p.pp + stage
        layers = range(piece * size, (piece + 1) * size)
        found.append(Chunk(layers, piece == 0, piece == p.pp * p.vpp - 1))
    return found


def base_parameters(shape: ModelShape, p: ParallelConfig, chunk: Chunk) -> int:
    """Frozen parameters of a chunk on one rank.

    Layers as in ``layer_parameters``; embedding and head V H / tp each (one of them where both are
    on this rank and tied); the final norm H with the head.
    """
    num_moe = sum(map(shape.is_moe, chunk.layers))
    total = num_moe and num_moe * layer_parameters(shape, p, True)
    if num_moe < len(chunk.layers):
        total += (len(chunk.layers) - num_moe) * layer_parameters(shape, p, False)
    embedding = shape.vocab // p.tp * shape.hidden
    total += embedding * chunk.has_embedding
    shares = shape.tied_embeddings and chunk.has_embedding
    return total + chunk.has_head * (shape.hidden + (0 if shares else embedding))


def layer_parameters(shape: ModelShape, p: ParallelConfig, is_moe: bool) -> int:
    """Frozen parameters of one decoder layer on one rank.

    Attention: (q + 2 kv) (H + bias) + (q + bias) H with q = heads d / tp and kv = max(kv heads, tp)
        d / tp, for a head is repeated on ranks beyond the number of heads; two norms 2 H, and 2 d
        of q and k (q + kv where these norms run over all heads). MoE: router E H, experts
        (E / ep) 3 H I / etp, shared expert 3 H I_s / tp and H where it has a gate. Dense:
        3 H I / tp.
    """
    h, q, kv = shape.hidden, *attention_widths(shape, p)
    total = (q + 2 * kv) * (h + shape.qkv_bias) + (q + shape.o_bias) * h + 2 * h
    if shape.qk_norm:
        total += q + kv if shape.full_width_norms else 2 * shape.head_dim
    if not is_moe:
        return total + 3 * h * (shape.intermediate // p.tp)
    total += shape.num_experts * h + shape.num_experts // p.ep * 3 * h * (
        shape.expert_intermediate // p.etp
    )
    if shape.shared_intermediate:
        total += 3 * h * (shape.shared_intermediate // p.tp) + shape.shared_gate * h
    return total


def attention_widths(shape: ModelShape, p: ParallelConfig) -> tuple[int, int]:
    """(features of q, features of k and of v) on one rank."""
    return (
        shape.num_heads // p.tp * shape.head_dim,
        max(shape.num_kv_heads, p.tp) // p.tp * shape.head_dim,
    )


@dataclass(frozen=True)
class AdapterCount:
    """Adapter parameters of a chunk on one rank, by the data-parallel group that reduces them.

    A buffer starts every tensor at a multiple of 64 elements; the numbers with ``_padded`` count
    that.
    """

    dense: int = 0
    expert: int = 0
    dense_padded: int = 0
    expert_padded: int = 0

    def __add__(self, other: "AdapterCount") -> "AdapterCount":
        return AdapterCount(
            self.dense + other.dense, self.expert + other.expert,
            self.dense_padded + other.dense_padded, self.expert_padded + other.expert_padded,
        )  # fmt: skip

    def times(self, n: int) -> "AdapterCount":
        return AdapterCount(
            n * self.dense, n * self.expert, n * self.dense_padded, n * self.expert_padded
        )


def adapter_parameters(model: PlannedModel, p: ParallelConfig, chunk: Chunk) -> AdapterCount:
    """Adapter parameters of a chunk on one rank, as ``LoRAFactors`` cuts them."""
    total = AdapterCount()
    for place, times in _places(model, chunk).items():
        key = ("adapters", place, p.tp, p.ep, p.etp)
        if key not in model.memo:
            model.memo[key] = _adapters_of(model, p, place)
        total += model.memo[key].times(times)
    return total


def _places(model: PlannedModel, chunk: Chunk) -> dict[int | None, int]:
    """How many layers of each kind there are, and None, what is outside of layers, with the
    head."""
    found: dict[int | None, int] = {}
    for layer in chunk.layers:
        found[model.kinds[layer]] = found.get(model.kinds[layer], 0) + 1
    return found | ({None: 1} if chunk.has_head else {})


def _adapters_of(model: PlannedModel, p: ParallelConfig, layer: int | None) -> AdapterCount:
    """One layer's, or with None the head's: per module one stack of A's, and a B for each
    projection."""
    total = AdapterCount()
    separate = p.ep > 1 or p.etp != p.tp
    for adapted in model.by_layer.get(layer, {}).values():
        is_expert = adapted[0].projection.is_expert
        group, lead = (p.etp, adapted[0].num_experts // p.ep) if is_expert else (p.tp, 1)
        in_local = adapted[0].in_features // adapted[0].num_shards("A", group)
        tensors = [lead * sum(a.rank for a in adapted) * in_local]
        tensors += [lead * (a.out_features // a.num_shards("B", group)) * a.rank for a in adapted]
        whole = sum(tensors)
        padded = sum(64 * math.ceil(n / 64) for n in tensors)
        own = is_expert and separate
        total += (
            AdapterCount(expert=whole, expert_padded=padded)
            if own
            else AdapterCount(whole, 0, padded, 0)
        )
    return total


def shared_elements(model: PlannedModel, p: ParallelConfig, chunk: Chunk) -> tuple[int, int]:
    """Elements that ``sum_partial_gradients`` sums over TP and over ETP: of factors that several
    ranks of the group hold, a table with one row for each shard."""
    dense = expert = 0
    for place, times in _places(model, chunk).items():
        key = ("shared", place, p.tp, p.ep, p.etp)
        if key not in model.memo:
            model.memo[key] = _shared_of(model, p, place)
        found = model.memo[key]
        dense = dense + times * found[0]
        expert = expert + times * found[1]
    return dense, expert


def _shared_of(model: PlannedModel, p: ParallelConfig, layer: int | None) -> tuple[int, int]:
    totals = {False: 0, True: 0}
    for a in (a for adapted in model.by_layer.get(layer, {}).values() for a in adapted):
        is_expert = a.projection.is_expert
        group, lead = (p.etp, a.num_experts // p.ep) if is_expert else (p.tp, 1)
        of_a = a.rank * a.in_features
        of_b = a.rank * a.out_features
        for shards, size in ((a.num_shards("A", group), of_a), (a.num_shards("B", group), of_b)):
            # size / shards elements, shards rows
            totals[is_expert] += lead * size if shards < group else 0
    return totals[False], totals[True]


def first_of_their_like(model: PlannedModel, p: ParallelConfig) -> list[tuple[int, int]]:
    """(stage, number of such stages) for stages that differ in what they hold; of those alike the
    first, which has the most microbatches in flight."""
    if ("alike", p) in model.memo:
        return model.memo["alike", p]
    found: dict[tuple[object, ...], list[int]] = {}
    for stage in range(p.pp):
        chunks = chunks_of(model.shape, p, stage)
        # adapters
        below = tuple(
            min(max(model.first_adapted - c.layers.start, 0), len(c.layers)) for c in chunks
        )
        kinds = tuple(tuple(model.kinds[layer] for layer in c.layers) for c in chunks)
        key = (kinds, below, tuple((c.has_embedding, c.has_head) for c in chunks))
        found.setdefault(key, []).append(stage)
    model.memo["alike", p] = [(stages[0], len(stages)) for stages in found.values()]
    return model.memo["alike", p]

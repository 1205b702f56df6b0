"""Count a rank's adapter parameters, and weights that are trained whole, by who reduces their
gradients."""

import math
from dataclasses import dataclass

from megalora.config import ParallelConfig
from megalora.hf.tensor_names import SCORE
from megalora.lora.spec import FACTORS, Adapted, trained_sizes
from megalora.lora.trained_weight import TrainedWeight
from megalora.planner.weights import Chunk, PlannedModel

ALIGNMENT = 64
"""Elements: Megatron's parameter and gradient buffers start every tensor at a multiple of this."""


@dataclass(frozen=True)
class AdapterCount:
    """Adapter parameters of a chunk on one rank, by the data-parallel group that reduces them.

    A buffer starts every tensor at a multiple of ``ALIGNMENT``; the numbers with ``_padded`` count
    the gaps too.
    """

    dense: int = 0
    expert: int = 0
    dense_padded: int = 0
    expert_padded: int = 0
    tied: int = 0
    """Of a tied embedding that the first and the last stage each hold: dense too, in a bucket of
    its own."""

    def __add__(self, other: "AdapterCount") -> "AdapterCount":
        return AdapterCount(
            self.dense + other.dense, self.expert + other.expert,
            self.dense_padded + other.dense_padded, self.expert_padded + other.expert_padded,
            self.tied + other.tied,
        )  # fmt: skip

    def times(self, n: int) -> "AdapterCount":
        return AdapterCount(
            n * self.dense, n * self.expert, n * self.dense_padded, n * self.expert_padded,
            n * self.tied,
        )  # fmt: skip

    @property
    def elements(self) -> int:
        """All of them, without gaps."""
        return self.dense + self.expert + self.tied


def adapter_parameters(model: PlannedModel, p: ParallelConfig, chunk: Chunk) -> AdapterCount:
    """Parameters of a chunk on one rank that are trained: adapters, as ``LoRAFactors`` cuts them,
    and weights that are trained whole."""
    # A weight that two stages hold is one whose gradients they add up.
    on_border = chunk.has_embedding != chunk.has_head
    total = AdapterCount()
    for weight in outside_of_layers(model, chunk):
        total += _count_of(weight, p, apart=weight.tied and on_border)
    for place, times in _places(model, chunk).items():
        key = ("adapters", place, p.tp, p.ep, p.etp)
        if key not in model.memo:
            model.memo[key] = _adapters_of(model, p, place)
        total += model.memo[key].times(times)
    return total


def _places(model: PlannedModel, chunk: Chunk) -> dict[int | None, int]:
    """Kind of layer -> how many a chunk has of it; None -> 1 on the chunk with the head, the only
    place outside of layers that LoRA adapts."""
    found: dict[int | None, int] = {}
    for layer in chunk.layers:
        kind = model.kinds[layer]
        found[kind] = found.get(kind, 0) + 1
    if chunk.has_head:
        found[None] = 1
    return found


def _adapters_of(model: PlannedModel, p: ParallelConfig, layer: int | None) -> AdapterCount:
    """One layer's, or with None the adapter's of the head: per module one stack of A's, and a B for
    each projection; weights of a layer that are trained whole."""
    total = AdapterCount()
    if layer is not None:
        for weight in model.whole.get(layer, []):
            total += _count_of(weight, p)
    # Where experts are replicated over the same ranks as all else, Megatron reduces them with the
    # dense parameters.
    separate = p.ep > 1 or p.etp != p.tp
    for adapted in model.modules_of(layer).values():
        is_expert = adapted[0].projection.is_expert
        group, lead = group_and_experts(adapted[0], p)
        for factor, size in trained_sizes(adapted, group):
            # What experts share is there once, whole, and reduced as a dense parameter.
            is_shared = factor == adapted[0].shared
            n = size if is_shared else lead * size
            padded = n + -n % ALIGNMENT
            own = is_expert and separate
            if own and not is_shared:
                total += AdapterCount(expert=n, expert_padded=padded)
            else:
                total += AdapterCount(dense=n, dense_padded=padded)
    return total


def group_and_experts(a: Adapted, p: ParallelConfig) -> tuple[int, int]:
    """(size of the group that splits an adapter's factors, how many experts' factors a rank holds
    in one tensor: 1 outside of experts)."""
    if a.projection.is_expert:
        return p.etp, a.num_experts // p.ep
    return p.tp, 1


def shared_elements(model: PlannedModel, p: ParallelConfig, chunk: Chunk) -> tuple[int, int]:
    """Elements that ``sum_partial_gradients`` sums over TP and over ETP: of factors that several
    ranks of the group hold, a table with one row for each shard."""
    dense = sum(_partial_elements(weight, p) for weight in outside_of_layers(model, chunk))
    expert = 0
    for place, times in _places(model, chunk).items():
        key = ("shared", place, p.tp, p.ep, p.etp)
        if key not in model.memo:
            model.memo[key] = _shared_of(model, p, place)
        dense_in_place, expert_in_place = model.memo[key]
        dense += times * dense_in_place
        expert += times * expert_in_place
    return dense, expert


def _shared_of(model: PlannedModel, p: ParallelConfig, layer: int | None) -> tuple[int, int]:
    """``shared_elements`` of one layer, or with None of the head's adapter."""
    dense = 0
    expert = 0
    if layer is not None:
        dense += sum(_partial_elements(weight, p) for weight in model.whole.get(layer, []))
    for adapted in model.modules_of(layer).values():
        for a in adapted:
            group, lead = group_and_experts(a, p)
            for factor in a.factors:
                size = math.prod(a.shape(factor)) if FACTORS[factor].trained else 0
                # Whole on every rank of the stage, and summed over TP as a dense one.
                if factor == a.shared:
                    dense += size if p.tp > 1 else 0
                    continue
                # A factor in as many shards as the group has ranks is nobody else's. Otherwise the
                # table has `shards` rows of size / shards elements: `size` whatever the number.
                shards = a.num_shards(factor, group)
                table = lead * size if shards < group else 0
                if a.projection.is_expert:
                    expert += table
                else:
                    dense += table
    return dense, expert


def outside_of_layers(model: PlannedModel, chunk: Chunk) -> list[TrainedWeight]:
    """Weights that a chunk trains whole beside those of its layers: of the embedding, of its copy
    where a tied head is, of the last norm and of the head."""
    found: list[TrainedWeight] = []
    for weight in model.whole.get(None, []):
        here = chunk.has_head
        if weight.path.startswith("embedding"):
            here = chunk.has_embedding or (weight.tied and chunk.has_head)
        if here:
            found.append(weight)
    return found


def of_base_elements(model: PlannedModel, p: ParallelConfig, chunk: Chunk) -> int:
    """Elements on a rank of what is trained of the base, which are then none of its frozen ones."""
    weights = list(outside_of_layers(model, chunk))
    for layer in chunk.layers:
        weights += model.whole.get(layer, [])
    total = 0
    for weight in weights:
        # Trained rows are copies and so are biases, and a score head is new.
        if not weight.tokens and not weight.is_bias and weight.module != SCORE:
            total += _on_rank(weight, p)
    return total


def with_base_value(model: PlannedModel, p: ParallelConfig, chunk: Chunk) -> int:
    """Elements on a rank of what has a value in the base: the same, biases and trained rows."""
    total = of_base_elements(model, p, chunk)
    for weight in outside_of_layers(model, chunk):
        total += _on_rank(weight, p) if weight.tokens else 0
    for layer in chunk.layers:
        for weight in model.whole.get(layer, []):
            total += _on_rank(weight, p) if weight.is_bias else 0
    return total


def _on_rank(weight: TrainedWeight, p: ParallelConfig) -> int:
    return weight.num_parameters // weight.num_shards(p.tp)


def _count_of(weight: TrainedWeight, p: ParallelConfig, apart: bool = False) -> AdapterCount:
    """One such weight; ``apart``: in a bucket of its own."""
    n = _on_rank(weight, p)
    if apart:
        return AdapterCount(tied=n)
    return AdapterCount(dense=n, dense_padded=n + -n % ALIGNMENT)


def _partial_elements(weight: TrainedWeight, p: ParallelConfig) -> int:
    """Elements that are summed over TP: of a weight that several ranks hold the same part of, each
    of which saw its own tokens, heads or entries of the vocabulary alone."""
    return weight.num_parameters if weight.num_shards(p.tp) < p.tp else 0

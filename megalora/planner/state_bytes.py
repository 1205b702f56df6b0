"""Bytes that do not depend on a microbatch: gradient buffers, optimizer state, room for adapters.

Symbols as in ``activations.py``; P adapter parameters of this rank.
"""

import math

from megalora.model.formats.augmented import Augmented
from megalora.model.formats.plain import PLAIN
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.weights import AdapterCount, Chunk, PlannedModel, shared_elements

GRADIENT = 4
"""Bytes of a float32 gradient."""
STATE = 4
"""Bytes of a float32 master parameter or moment."""


def buffers(count: AdapterCount, layout: ParallelLayout) -> tuple[int, int]:
    """Elements of a chunk's two gradient buffers, dense and expert: tensors at multiples of 64, the
    end at a multiple of lcm(data-parallel size, 128)."""

    def padded(n: int, replicas: int) -> int:
        return n + -n % math.lcm(replicas, 128)

    return padded(count.dense_padded, layout.dp), padded(count.expert_padded, layout.edp)


def optimizer_bytes(count: AdapterCount, layout: ParallelLayout, work: Workload) -> int:
    """Adam over the rank's share of each buffer, ``min(P, buffer / data-parallel size)``: two
    moments of 4 bytes, and with bfloat16 a master of 4. A share that is partly padding has less;
    none has more."""
    return sum(owned_elements(count, layout)) * STATE * (3 if work.dtype == "bfloat16" else 2)


def owned_elements(count: AdapterCount, layout: ParallelLayout) -> tuple[int, int]:
    dense, expert = buffers(count, layout)
    return min(count.dense, dense // layout.dp), min(count.expert, expert // layout.edp)


def step_bytes(
    model: PlannedModel, layout: ParallelLayout, chunks: list[Chunk], counts: list[AdapterCount]
) -> int:
    """``sum_partial_gradients`` puts factors replicated over TP, then those over ETP, into tables,
    one row for each shard, and those into one bucket: 8 bytes an element; then Adam (torch's,
    tensor lists), for dense factors, then for experts', has the square root of its second moments,
    4 bytes for each of its share."""
    replicated = [
        sum(of)
        for of in zip(*(shared_elements(model, layout.parallel, c) for c in chunks), strict=True)
    ]
    shares = zip(*(owned_elements(count, layout) for count in counts), strict=True)
    return max(2 * GRADIENT * max(replicated), STATE * max(sum(of_chunks) for of_chunks in shares))


def has_room(model: PlannedModel, layout: ParallelLayout, work: Workload) -> bool:
    """Whether the experts' weights get room for adapters beside them, as
    ``lora.experts.gains_from_room`` says on Hopper and datacentre
    Blackwell: by the rows per expert to be expected; float32 goes without, and so do other GPUs."""
    s = model.shape
    p = layout.parallel
    if not s.moe_layers or work.dtype == "float32":
        return False
    rows = s.expected_rows(p, layout.micro_batch_size * work.sequence_length)
    return work.crossings.prefers_grouped_mm(
        rows, s.hidden, s.expert_intermediate // p.etp, _stacked_rank(model)
    )


def room_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunks: list[Chunk]
) -> int:
    """What augmented weights of experts have more than plain ones."""
    s = model.shape
    p = layout.parallel
    e = work.element_bytes
    if not has_room(model, layout, work):
        return 0
    experts = s.num_experts // p.ep
    i = s.expert_intermediate // p.etp
    total = 0
    for layer in (layer for chunk in chunks for layer in chunk.layers):
        for module, n, k in (("gate_up", 2 * i, s.hidden), ("down", s.hidden, i)):
            rank = sum(
                a.rank for a in model.by_layer.get(layer, {}).get(f"mlp.experts.{module}", [])
            )
            if rank:
                sizes = (experts, n, k)
                total += Augmented(rank).num_bytes(sizes, e) - PLAIN.num_bytes(sizes, e)
    return total


def _stacked_rank(model: PlannedModel) -> int:
    """The larger of the stacked ranks of gate_up and down, in the layer where it is largest."""
    if ("stacked rank",) not in model.memo:
        modules = [
            adapted
            for layer in model.by_layer.values()
            for name, adapted in layer.items()
            if name.startswith("mlp.experts.")
        ]
        model.memo["stacked rank",] = max(
            (sum(a.rank for a in adapted) for adapted in modules), default=0
        )
    return model.memo["stacked rank",]

"""Count the bytes that do not depend on a microbatch: gradient buffers, optimizer state, room for
adapters.

Symbols as in ``activations.py``; P adapter parameters of this rank.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from megalora.config import ParallelConfig
from megalora.hf.tensor_names import FactorName
from megalora.lora.spec import FACTORS, Adapted
from megalora.model.formats.augmented import Augmented
from megalora.model.formats.plain import PLAIN
from megalora.planner.adapter_count import AdapterCount, group_and_experts, shared_elements
from megalora.planner.layouts import ParallelLayout
from megalora.planner.magnitudes import magnitudes_on_rank
from megalora.planner.weights import (
    Chunk,
    PlannedModel,
    content_of,
    stacked_rank,
)
from megalora.planner.workload import Workload

GRADIENT = 4
"""Bytes of a float32 gradient."""
STATE = 4
"""Bytes of a float32 master parameter or moment."""
BUFFER_END = 128
"""Megatron's distributed optimizer pads a buffer to a multiple of this and of the ranks that share
it."""


def buffers(count: AdapterCount, layout: ParallelLayout) -> tuple[int, int]:
    """Elements of a chunk's two gradient buffers, dense and expert: tensors at multiples of 64, the
    end at a multiple of lcm(data-parallel size, 128). So is that of a tied embedding's own
    bucket."""
    multiple = math.lcm(layout.dp_cp, BUFFER_END)
    # -n % m is what n lacks to the next multiple of m.
    dense = count.dense_padded
    dense += -dense % multiple
    dense += count.tied + -count.tied % multiple
    # Experts have a buffer of their own, shared out over their data-parallel ranks.
    expert = count.expert_padded
    expert += -expert % math.lcm(layout.edp, BUFFER_END)
    return dense, expert


def optimizer_bytes(count: AdapterCount, layout: ParallelLayout, work: Workload) -> int:
    """Adam over the rank's share of each buffer, ``min(P, buffer / data-parallel size)``: two
    moments of 4 bytes, and with bfloat16 a master of 4. A share that is partly padding has less;
    none has more."""
    # With float32 the parameters are their own masters.
    states = 3 if work.dtype == "bfloat16" else 2
    return sum(owned_elements(count, layout)) * STATE * states


def owned_elements(count: AdapterCount, layout: ParallelLayout) -> tuple[int, int]:
    """Elements of the dense and of the expert buffer that this rank's optimizer updates."""
    # Each bucket is shared out by itself.
    tied, _ = buffers(AdapterCount(tied=count.tied), layout)
    dense, expert = buffers(replace(count, tied=0), layout)
    own_dense = min(count.dense, dense // layout.dp_cp) + min(count.tied, tied // layout.dp_cp)
    return own_dense, min(count.expert, expert // layout.edp)


def step_bytes(model: PlannedModel, p: ParallelConfig, chunks: list[Chunk]) -> int:
    """``sum_partial_gradients`` puts factors replicated over TP, then those over ETP, into tables,
    one row for each shard, and those into one bucket: 8 bytes an element. Adam, fused, needs
    nothing."""
    # A step sums all chunks of the stage at once.
    over_tp = 0
    over_etp = 0
    for chunk in chunks:
        dense, expert = shared_elements(model, p, chunk)
        over_tp += dense
        over_etp += expert
    # The first is freed before the second begins. A table and its bucket are two copies.
    return 2 * GRADIENT * max(over_tp, over_etp)


def magnitude_bytes(model: PlannedModel, p: ParallelConfig, chunks: list[Chunk], e: int) -> int:
    """What DoRA holds beside the adapters' ``e`` bytes a parameter: float32 magnitudes, and two
    float32 numbers for each of them, its row's norm and the square of the base's."""
    # A magnitude for each row of a weight, cut as B is.
    rows = 0
    for layer, number in _layers_of(model, chunks):
        for adapted in model.modules_of(layer).values():
            for a in adapted:
                if "M" in a.factors:
                    rows += number * magnitudes_on_rank(a, p)
    return rows * (3 * STATE - e)


def frozen_elements(model: PlannedModel, p: ParallelConfig, chunks: list[Chunk]) -> int:
    """Elements of factors that are not trained: those of the base weights."""
    return _elements(model, p, chunks, lambda a, factor: not FACTORS[factor].trained)


def kept_elements(model: PlannedModel, p: ParallelConfig, chunks: list[Chunk]) -> int:
    """Elements of the adapters of earlier cycles that lie beside the one that trains at the end of
    a run."""
    return _elements(model, p, chunks, lambda a, factor: a.kept)


def _elements(
    model: PlannedModel,
    p: ParallelConfig,
    chunks: list[Chunk],
    times: Callable[[Adapted, FactorName], int],
) -> int:
    """Elements of a rank's factors, each as often as ``times`` says."""
    total = 0
    heads = sum(chunk.has_head for chunk in chunks)
    for layer, number in (*_layers_of(model, chunks), (None, heads)):
        for adapted in model.modules_of(layer).values():
            # A rank holds its shard of a factor once for each of its experts.
            group, experts = group_and_experts(adapted[0], p)
            for a in adapted:
                for factor in a.factors:
                    size = math.prod(a.shard_shape(factor, group))
                    total += number * experts * times(a, factor) * size
    return total


def _layers_of(model: PlannedModel, chunks: list[Chunk]) -> Iterator[tuple[int, int]]:
    """(layer, how many layers it stands for): of layers in a row that are alike, one."""
    for chunk in chunks:
        runs, *_ = content_of(model, chunk)
        yield from runs


def has_room(model: PlannedModel, layout: ParallelLayout, work: Workload) -> bool:
    """Whether the experts' weights get room for adapters beside them, as
    ``lora.experts.gains_from_room`` says on Hopper and datacentre Blackwell: by the rows per expert
    to be expected. With float32 they get none, and neither on other GPUs."""
    s = model.shape
    p = layout.parallel
    if not s.moe_layers or work.dtype == "float32":
        return False
    key = ("room", layout.cut(work))
    if key not in model.memo:
        # Training decides when it builds the model, before it sees a batch: by samples of full
        # length.
        rows = s.expected_rows(p, layout.capacity(work))
        model.memo[key] = work.crossings.prefers_grouped_mm(
            rows, s.hidden, s.expert_intermediate // p.etp, _stacked_rank(model)
        )
    return model.memo[key]


def room_bytes(
    model: PlannedModel,
    layout: ParallelLayout,
    work: Workload,
    chunks: list[Chunk],
    beside_decoded: int = 0,
) -> int:
    """Bytes by which the experts' augmented weights exceed plain ones.

    Args:
        beside_decoded: those of the memory that codes are decoded into.
    """
    s = model.shape
    p = layout.parallel
    if not has_room(model, layout, work):
        return 0
    experts = s.num_experts // p.ep
    i = s.expert_intermediate // p.etp
    # gate and up are one matrix of 2 I rows.
    weights = {
        "mlp.experts.gate_up": (experts, 2 * i, s.hidden),
        "mlp.experts.down": (experts, s.hidden, i),
    }
    total = beside_decoded
    for layer, number in _layers_of(model, chunks):
        modules = model.modules_of(layer)
        for name, sizes in weights.items():
            rank = stacked_rank(modules.get(name, []))
            # A weight without an adapter stays plain, and codes have no room beside them.
            if rank and (work.held is None or (layer, name) not in work.held.modules):
                total += number * Augmented(rank).num_bytes(sizes, work.element_bytes)
                total -= number * PLAIN.num_bytes(sizes, work.element_bytes)
    return total


def _stacked_rank(model: PlannedModel) -> int:
    """The larger of the stacked ranks of gate_up and down, in the layer where it is largest."""
    key = ("stacked rank",)
    if key not in model.memo:
        largest = 0
        for modules in model.by_layer.values():
            for name, adapted in modules.items():
                if name.startswith("mlp.experts."):
                    largest = max(largest, stacked_rank(adapted))
        model.memo[key] = largest
    return model.memo[key]

"""Bytes of one rank while it trains, part by part, each with how it is known.

    measured   a formula that the tests compare with tensors of a real model or training step (on the CPU)
    derived    follows from the code that allocates; no run has been counted
    assumed    a constant nobody here can count

Symbols as in ``activations.py``; P adapter parameters of this rank, e bytes per element.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megalora.config import LoRAConfig
from megalora.model.shape import ModelShape
from megalora.planner import activations
from megalora.planner.activations import Microbatch
from megalora.planner.layouts import Layout, Workload
from megalora.planner.schedule import in_flight
from megalora.planner.weights import (
    AdapterCount,
    Chunk,
    PlannedModel,
    adapter_parameters,
    attention_widths,
    base_parameters,
    chunks_of,
)

Basis = Literal["measured", "derived", "assumed"]
When = Literal["always", "pass", "step"]
GRADIENT = STATE = 4
"""Bytes of a float32 gradient, and of a float32 master or moment."""
ROOM_EXPERTS, ROOM_STEP = 32, 16
"""As ``FusedExperts.gains_from_room`` and ``Joined`` have them: at most so many experts; ranks in steps of so much."""
CONTEXT_BYTES = 3 * 2**29
"""CUDA context, cuBLAS workspaces and NCCL's buffers: 1.5 GiB."""


@dataclass(frozen=True)
class Part:
    """One component of a rank's memory."""

    name: str
    num_bytes: int
    basis: Basis
    when: When = "always"
    """``pass``: during forward and backward; ``step``: while gradients are reduced and the optimizer runs."""


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank of a pipeline stage needs."""

    stage: int
    parts: tuple[Part, ...]

    def __getitem__(self, name: str) -> int:
        """Bytes of the part of that name."""
        found = {part.name: part.num_bytes for part in self.parts}
        if name not in found:
            raise KeyError(f"no part {name!r}; there are {', '.join(found)}")
        return found[name]

    def sum_of(self, when: When) -> int:
        return sum(part.num_bytes for part in self.parts if part.when == when)

    @property
    def peak_bytes(self) -> int:
        """What is always there, and the larger of what forward and backward and what the optimizer step add."""
        return self.sum_of("always") + max(self.sum_of("pass"), self.sum_of("step"))

    def table(self) -> str:
        """One line for each part, in GiB, and the peak."""
        lines = [f"{p.name:<22} {p.num_bytes / 2**30:9.3f} GiB  {p.when:<6}  {p.basis}" for p in self.parts]
        return "\n".join([*lines, f"{'peak':<22} {self.peak_bytes / 2**30:9.3f} GiB"])


def memory_of(
    shape: ModelShape, lora: LoRAConfig, layout: Layout, work: Workload, stage: int = 0
) -> MemoryPlan:  # fmt: skip
    """Memory of a rank of one pipeline stage. For many layouts resolve once: ``memory_of_model(PlannedModel.of(...), ...)``."""
    return memory_of_model(PlannedModel.of(shape, lora), layout, work, stage)


def memory_of_model(model: PlannedModel, layout: Layout, work: Workload, stage: int = 0) -> MemoryPlan:
    """Memory of a rank of one pipeline stage; ranks of a stage differ by routing alone.

    Raises:
        ValueError: there is no such stage.
    """
    p, e = layout.parallel, work.element_bytes
    if not 0 <= stage < p.pp:
        raise ValueError(f"stage {stage} is none of parallel.pp={p.pp}; stages count from 0 to {p.pp - 1}")
    chunks = chunks_of(model.shape, p, stage)
    counts = [adapter_parameters(model, p, chunk) for chunk in chunks]
    whole = sum(c.dense + c.expert for c in counts)
    padded = sum(sum(buffers(c, layout)) for c in counts)
    has_head = chunks[-1].has_head
    return MemoryPlan(stage, (
        Part("weights", sum(base_parameters(model.shape, p, c) for c in chunks) * e, "measured"),
        Part("room for adapters", room_bytes(model, layout, work, chunks), "derived"),
        Part("adapters", whole * e, "measured"),
        Part("buffer padding", (padded - whole) * e, "measured"),
        Part("gradients", padded * GRADIENT, "measured"),
        Part("optimizer", sum(optimizer_bytes(c, layout, work) for c in counts), "measured"),
        Part("activations", activation_bytes(model, layout, work, chunks), "measured", "pass"),
        Part("loss", activations.head_bytes(model, layout, work) if has_head else 0, "measured", "pass"),
        Part("logits", logits_bytes(model, layout, work) if has_head else 0, "derived", "pass"),
        Part("workspace", workspace_bytes(model, layout, work, chunks), "derived", "pass"),
        Part("all-to-all", all_to_all_bytes(model, layout, work, chunks), "derived", "pass"),
        Part("pipeline", pipeline_bytes(model, layout, work), "derived", "pass"),
        Part("optimizer step", step_bytes(model, layout, chunks, counts), "derived", "step"),
        Part("CUDA context, NCCL", CONTEXT_BYTES, "assumed"),
    ))  # fmt: skip


def fullest_stage(model: PlannedModel, layout: Layout, work: Workload) -> MemoryPlan:
    """The plan of the pipeline stage with the highest peak, which decides whether a layout fits."""
    stages = range(layout.parallel.pp)
    return max((memory_of_model(model, layout, work, stage) for stage in stages), key=lambda plan: plan.peak_bytes)


def buffers(count: AdapterCount, layout: Layout) -> tuple[int, int]:
    """Elements of a chunk's two gradient buffers, dense and expert: tensors at multiples of 64, the end at a multiple of
    lcm(data-parallel size, 128)."""

    def padded(n: int, replicas: int) -> int:
        return n + -n % math.lcm(replicas, 128)

    return padded(count.dense_padded, layout.dp), padded(count.expert_padded, layout.edp)


def optimizer_bytes(count: AdapterCount, layout: Layout, work: Workload) -> int:
    """Adam over the rank's share of each buffer, ``min(P, buffer / data-parallel size)``: two moments of 4 bytes, and with bfloat16
    a master of 4. A share that is partly padding has less; none has more."""
    dense, expert = buffers(count, layout)
    share = min(count.dense, dense // layout.dp) + min(count.expert, expert // layout.edp)
    return share * STATE * (3 if work.dtype == "bfloat16" else 2)


def room_bytes(model: PlannedModel, layout: Layout, work: Workload, chunks: list[Chunk]) -> int:
    """Beside the bfloat16 weights [N, K] of at most 32 experts: (N + R)(K + R) - N K each, R padded to 16. On Hopper and
    datacentre Blackwell; other GPUs and float32 go without."""
    s, p, e = model.shape, layout.parallel, work.element_bytes
    experts, i = (s.num_experts // p.ep if s.moe_layers else 0), s.expert_intermediate // p.etp
    if not 0 < experts <= ROOM_EXPERTS or work.dtype == "float32":
        return 0
    total = 0
    for layer in (layer for chunk in chunks for layer in chunk.layers):
        for module, n, k in (("gate_up", 2 * i, s.hidden), ("down", s.hidden, i)):
            rank = sum(a.rank for a in model.by_layer.get(layer, {}).get(f"mlp.experts.{module}", []))
            room = rank + -rank % ROOM_STEP
            total += experts * ((n + room) * (k + room) - n * k) * e
    return total


def activation_bytes(model: PlannedModel, layout: Layout, work: Workload, chunks: list[Chunk]) -> int:
    """What the decoder layers keep for one microbatch, times the microbatches in flight, chunk by chunk."""
    kept = [activations.chunk_bytes(model, layout, work, chunk) for chunk in chunks]
    stage = chunks[0].layers.start // len(chunks[0].layers)
    held = in_flight(layout.parallel, stage, layout.num_microbatches(work.global_batch_size))
    return max(sum(n * k for n, k in zip(counts, kept, strict=True)) for counts in held)


def logits_bytes(model: PlannedModel, layout: Layout, work: Workload) -> int:
    """Beside the float32 softmax that the loss keeps: with bfloat16 the logits themselves, later their gradient, T V / t 2."""
    if work.dtype == "float32":
        return 0  # the softmax is written over the logits
    return Microbatch.of(model, layout, work).tokens * (model.shape.vocab // layout.parallel.tp) * work.element_bytes


def workspace_bytes(model: PlannedModel, layout: Layout, work: Workload, chunks: list[Chunk]) -> int:
    """The largest of a layer's temporaries in backward, and what recomputing it brings back.

    Experts: gradients of the output and of the rows 2 M H, of [gate | up] and of the activation M 3 I / n. Attention: gradients of
    q, k, v, of qkv's output and of the result T (3 q + 4 g) d, of its whole input T H. Dense MLP: T 4 I / t and T H.
    """
    s, p, batch = model.shape, layout.parallel, Microbatch.of(model, layout, work)
    width, kv = attention_widths(s, p)
    largest = 0
    for layer in {model.kinds[layer] for chunk in chunks for layer in chunk.layers}:
        attention = batch.tokens * (3 * width + 4 * kv + s.hidden)
        if s.is_moe(layer):
            mlp = batch.rows * (2 * s.hidden + 3 * s.expert_intermediate // p.etp)
        else:
            mlp = batch.tokens * (4 * s.intermediate // p.tp + s.hidden)
        again = 0
        if layout.recompute != "off":
            whole = activations.kept(model, layout, batch, layer, True, selective=False)
            again = whole.total
            if layout.recompute == "selective":
                again = whole.mlp - activations.kept(model, layout, batch, layer, True, selective=True).mlp
        largest = max(largest, max(attention, mlp) * batch.element_bytes + again)
    return largest


def all_to_all_bytes(model: PlannedModel, layout: Layout, work: Workload, chunks: list[Chunk]) -> int:
    """Rows sent (T / t) k H and received M H, where experts are shared out and this stage has any."""
    s, p, batch = model.shape, layout.parallel, Microbatch.of(model, layout, work)
    if p.ep * p.etp == 1 or not any(s.is_moe(layer) for chunk in chunks for layer in chunk.layers):
        return 0
    return (batch.own_tokens * s.top_k + batch.rows) * s.hidden * batch.element_bytes


def pipeline_bytes(model: PlannedModel, layout: Layout, work: Workload) -> int:
    """Hidden states and gradients on their way in and out: 4 (T / t) H e. Inputs of microbatches in flight count as activations;
    outputs are freed once sent."""
    batch = Microbatch.of(model, layout, work)
    return 4 * batch.own_tokens * model.shape.hidden * batch.element_bytes * (layout.parallel.pp > 1)


def step_bytes(model: PlannedModel, layout: Layout, chunks: list[Chunk], counts: list[AdapterCount]) -> int:
    """``sum_partial_gradients`` puts replicated factors into tables, one row for each shard, and those into one bucket: 8 bytes
    an element; then Adam (torch's, tensor lists) has the square root of its second moments, 4 bytes for each of its share."""
    replicated = sum(_replicated(model, layout, chunk) for chunk in chunks)
    share = sum(d // layout.dp + x // layout.edp for d, x in (buffers(c, layout) for c in counts))
    return max(2 * GRADIENT * replicated, STATE * share)


def _replicated(model: PlannedModel, layout: Layout, chunk: Chunk) -> int:
    """Elements of those tables: factors held by several ranks of their group, times their number of shards."""
    p, total = layout.parallel, 0
    places = [*chunk.layers, *([None] if chunk.has_head else [])]
    for a in (a for place in places for found in model.by_layer.get(place, {}).values() for a in found):
        expert = a.projection.is_expert
        group, lead = (p.etp, a.num_experts // p.ep) if expert else (p.tp, 1)
        for factor, size in (("A", a.rank * a.in_features), ("B", a.rank * a.out_features)):
            shards = a.num_shards("A" if factor == "A" else "B", group)
            total += lead * size if shards < group else 0  # size / shards elements, shards rows
    return total

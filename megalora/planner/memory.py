"""Bytes of one rank while it trains, part by part, each with how it is known.

    measured   a formula that tests and benchmarks/planner_accuracy.py compare with the tensors of real training steps on CPU ranks
    assumed    follows from the code that allocates on a GPU, or is a constant; nobody has counted it

A GPU holds more than is counted here: what one operation allocates and frees inside (float32
partial sums of the Triton passes: 1024 rows' share of a factor each; attention's backward), and
gaps between the blocks of its allocator.

Symbols as in ``activations.py``; P adapter parameters of this rank, e bytes per element.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megalora.config import LoRAConfig
from megalora.model.shape import ModelShape
from megalora.planner import activations
from megalora.planner.activations import Microbatch
from megalora.planner.hardware import Basis
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.schedule import in_flight
from megalora.planner.weights import (
    AdapterCount,
    Chunk,
    PlannedModel,
    adapter_parameters,
    attention_widths,
    base_parameters,
    chunks_of,
    first_of_their_like,
    shared_elements,
)

When = Literal["always", "pass", "loss", "layer", "step"]
"""``pass``: during forward and backward, and there either at the ``loss`` or while a ``layer`` runs
backward; ``step``: while gradients are reduced and the optimizer runs."""
GRADIENT = STATE = 4
"""Bytes of a float32 gradient, and of a float32 master or moment."""
ROOM_STEP = 16
"""As ``AugmentedWeight`` has it: room comes in steps of so many ranks."""
CONTEXT = "CUDA context, NCCL"
ROOM = "room for adapters"
"""Parts that no count of tensors sees: not an allocator's, and only on some GPUs."""
CONTEXT_BYTES = 3 * 2**29
"""CUDA context, cuBLAS workspaces and NCCL's buffers: 1.5 GiB."""


@dataclass(frozen=True)
class Part:
    """One component of a rank's memory."""

    name: str
    num_bytes: int
    basis: Basis
    when: When = "always"


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

    def at_peak(self) -> tuple[Part, ...]:
        """What is always there, and the largest of what the loss, a layer's backward and the
        optimizer step add."""
        moments: tuple[tuple[When, ...], ...] = (("pass", "loss"), ("pass", "layer"), ("step",))
        fullest = max(moments, key=lambda moment: sum(map(self.sum_of, moment)))
        return tuple(part for part in self.parts if part.when in ("always", *fullest))

    @property
    def peak_bytes(self) -> int:
        return sum(part.num_bytes for part in self.at_peak())

    def table(self) -> str:
        """One line for each part, in GiB, and the peak."""
        lines = [
            f"{p.name:<22} {p.num_bytes / 2**30:9.3f} GiB  {p.when:<6}  {p.basis}"
            for p in self.parts
        ]
        return "\n".join([*lines, f"{'peak':<22} {self.peak_bytes / 2**30:9.3f} GiB"])


def memory_of(
    shape: ModelShape, lora: LoRAConfig, layout: ParallelLayout, work: Workload, stage: int = 0
) -> MemoryPlan:  # fmt: skip
    """Memory of a rank of one pipeline stage. For many layouts resolve once:
    ``memory_of_model(PlannedModel.of(...), ...)``."""
    return memory_of_model(PlannedModel.of(shape, lora), layout, work, stage)


def memory_of_model(
    model: PlannedModel, layout: ParallelLayout, work: Workload, stage: int = 0
) -> MemoryPlan:
    """Memory of a rank of one pipeline stage; ranks of a stage differ by routing alone.

    Raises:
        ValueError: there is no such stage.
    """
    p = layout.parallel
    if not 0 <= stage < p.pp:
        raise ValueError(
            f"stage {stage} is none of parallel.pp={p.pp}; stages count from 0 to {p.pp - 1}"
        )
    chunks, always, step = _state(model, layout, work, stage)
    has_head = chunks[-1].has_head
    workspace, recomputed, moved = backward_bytes(model, layout, work, chunks)
    return MemoryPlan(stage, (
        *always,
        Part("activations", activation_bytes(model, layout, work, chunks), "measured", "pass"),
        Part("pipeline", pipeline_bytes(model, layout, work, stage), "measured", "pass"),
        Part("loss", activations.head_bytes(model, layout, work) if has_head else 0, "measured",
             "loss"),
        Part("logits", logits_bytes(model, layout, work, chunks[-1]) if has_head else 0, "measured",
             "loss"),
        Part("workspace", workspace, "measured", "layer"),
        Part("recomputed", recomputed, "measured", "layer"),
        Part("all-to-all", moved, "measured", "layer"),
        step,
        Part(CONTEXT, CONTEXT_BYTES, "assumed"),
    ))  # fmt: skip


def _state(
    model: PlannedModel, layout: ParallelLayout, work: Workload, stage: int
) -> tuple[list[Chunk], tuple[Part, ...], Part]:  # fmt: skip
    """(chunks, what is always there, what the optimizer step adds): but for room, the same for
    every microbatch and recomputation."""
    p = layout.parallel
    e = work.element_bytes
    key = ("state", p, layout.num_ranks, e, stage, has_room(model, layout, work))
    if key not in model.memo:
        chunks = chunks_of(model.shape, p, stage)
        counts = [adapter_parameters(model, p, chunk) for chunk in chunks]
        whole = sum(c.dense + c.expert for c in counts)
        padded = sum(sum(buffers(c, layout)) for c in counts)
        always = (
            Part(
                "weights", sum(base_parameters(model.shape, p, c) for c in chunks) * e, "measured"
            ),
            Part(ROOM, room_bytes(model, layout, work, chunks), "assumed"),
            Part("adapters", whole * e, "measured"),
            Part("buffer padding", (padded - whole) * e, "measured"),
            Part("gradients", padded * GRADIENT, "measured"),
            Part("optimizer", sum(optimizer_bytes(c, layout, work) for c in counts), "measured"),
        )
        step = Part("optimizer step", step_bytes(model, layout, chunks, counts), "measured", "step")
        model.memo[key] = chunks, always, step
    return model.memo[key]


def fullest_stage(model: PlannedModel, layout: ParallelLayout, work: Workload) -> MemoryPlan:
    """The plan of the pipeline stage with the highest peak, which decides whether a layout fits."""
    stages = (stage for stage, _ in first_of_their_like(model, layout.parallel))
    return max(
        (memory_of_model(model, layout, work, stage) for stage in stages),
        key=lambda plan: plan.peak_bytes,
    )


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
    return sum(_share(count, layout)) * STATE * (3 if work.dtype == "bfloat16" else 2)


def _share(count: AdapterCount, layout: ParallelLayout) -> tuple[int, int]:
    dense, expert = buffers(count, layout)
    return min(count.dense, dense // layout.dp), min(count.expert, expert // layout.edp)


def has_room(model: PlannedModel, layout: ParallelLayout, work: Workload) -> bool:
    """Whether the experts' weights get room for adapters beside them, as
    ``FusedExperts.gains_from_room`` says on Hopper and datacentre
    Blackwell: by the rows per expert to be expected; float32 goes without, and so do other GPUs."""
    s = model.shape
    p = layout.parallel
    if not s.moe_layers or work.dtype == "float32":
        return False
    rows = s.expected_rows(p, layout.micro_batch_size * work.sequence_length)
    return work.crossings.prefers_grouped_mm(
        rows, s.hidden, s.expert_intermediate // p.etp, _stacked_rank(model)
    )


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


def room_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunks: list[Chunk]
) -> int:
    """Beside weights [N, K] that get room: (N + R)(K + R) - N K for each expert, R padded to 16."""
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
            room = rank + -rank % ROOM_STEP
            total += experts * ((n + room) * (k + room) - n * k) * e
    return total


def activation_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunks: list[Chunk]
) -> int:
    """What the decoder layers keep for one microbatch, times the microbatches in flight, chunk by
    chunk."""
    kept = [activations.chunk_bytes(model, layout, work, chunk) for chunk in chunks]
    stage = chunks[0].layers.start // len(chunks[0].layers)
    held = in_flight(layout.parallel, stage, layout.num_microbatches(work.global_batch_size))
    angles = sum(activations.angles_bytes(model, layout, work, chunk) for chunk in chunks)
    return angles + max(sum(n * k for n, k in zip(counts, kept, strict=True)) for counts in held)


def logits_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk) -> int:
    """Beside the float32 softmax that the loss keeps: with bfloat16 the logits themselves, later
    their gradient, T V / t 2 (with float32 the softmax is written over them); the head's input (T /
    t) H; and the embedding's output, if on this stage, which ``forward`` still holds (recomputing
    whole layers keeps it anyway)."""
    batch = Microbatch.of(model, layout, work)
    s = model.shape
    logits = batch.tokens * (s.vocab // layout.parallel.tp) * (work.dtype != "float32")
    hidden = (
        batch.own_tokens * s.hidden * (1 + (chunk.has_embedding and layout.recompute != "full"))
    )
    return (logits + hidden) * batch.element_bytes


def backward_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunks: list[Chunk]
) -> tuple[int, int, int]:  # fmt: skip
    """(workspace, what recomputation brings back, all-to-all) of the layer whose backward needs
    most beside all that is kept."""
    first = model.first_adapted
    live = [n for chunk in chunks for n in chunk.layers if n >= first or not chunk.has_embedding]
    found = [
        _layer_backward(model, layout, work, n) for n in {model.kinds[n]: n for n in live}.values()
    ]
    return max(found, key=sum, default=(0, 0, 0))


def _layer_backward(
    model: PlannedModel, layout: ParallelLayout, work: Workload, layer: int
) -> tuple[int, int, int]:
    """The MLP's backward with all of the layer kept, or attention's, when what the MLP kept is
    gone.

    Attention: gradients of q, k, v, of qkv's output and of the result T (3 q + 4 g) d, of its input
        and of the layer's output (T + T / t) H.
    """
    s = model.shape
    batch = Microbatch.of(model, layout, work)
    width, kv = attention_widths(s, layout.parallel)
    e = batch.element_bytes
    own = batch.own_tokens
    attention = (batch.tokens * (3 * width + 4 * kv + s.hidden) + own * s.hidden) * e
    whole = activations.kept(model, layout, batch, layer, True, selective=False)
    held = (
        activations.kept(model, layout, batch, layer, True, selective=True)
        if layout.recompute == "selective"
        else whole
    )
    if s.is_moe(layer):
        mlp, again, moved = _experts_backward(model, layout, work, layer)
    else:
        mlp = _dense_backward(model, layout, batch, layer)
        again = whole.mlp - held.mlp
        moved = 0
    if layout.recompute == "full":
        again = whole.total - own * s.hidden * e  # its input was kept
        return max((mlp, again, moved), (attention, again - whole.mlp, 0), key=sum)
    back = again if layout.recompute == "selective" else 0
    return max(
        (mlp, back, moved), (attention - held.mlp, whole.attention - held.attention, 0), key=sum
    )


def _experts_backward(
    model: PlannedModel, layout: ParallelLayout, work: Workload, layer: int
) -> tuple[int, int, int]:
    """While the rows' gradients are summed for each token: gradients of the layer's output and of
    the experts' input 2 (T / t) H, in torch's form the term that is added (T / t) H, the rows M H,
    of [gate | up] with its dS M (2 I / n + R), of the layer's factors. grouped_mm, which weights
    with room stand for, has more a moment before: the output's gradient gathered M H beside dH M I
    / n.

    Behind an all-to-all the output's and the input's gradients are M rows: 2 M H - (T / t) H more.
    Recomputed: [gate | up], S.
    """
    s = model.shape
    p = layout.parallel
    batch = Microbatch.of(model, layout, work)
    e = batch.element_bytes
    own = batch.own_tokens * s.hidden
    rows = batch.rows
    i = s.expert_intermediate // p.etp
    modules = model.by_layer.get(layer, {})
    gate_up, down = (modules.get(f"mlp.experts.{name}", []) for name in ("gate_up", "down"))
    rank = sum(a.rank for a in gate_up)
    q = sum(a.rank for a in down)
    joined = has_room(model, layout, work) and bool(gate_up or down)
    result = max(2 * own, rows * i) if joined else 2 * own
    # each gradient once, as its parameter is
    factors = s.num_experts // p.ep * (s.hidden + i) * (rank + q)
    moved = 2 * rows * s.hidden - result if p.ep * p.etp > 1 else 0
    again = rows * (2 * i + rank)
    return (own + rows * (s.hidden + 2 * i + rank) + result + factors) * e, again * e, moved * e


def _dense_backward(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, layer: int
) -> int:
    """Gradients of the product, of its two factors T 3 I / t, and of the layer's output (T / t) H;
    by then the product itself is gone, which was kept if fc2 has an adapter."""
    s = model.shape
    features = model.shape.intermediate // layout.parallel.tp
    gradients = 3 - bool(model.by_layer.get(layer, {}).get("mlp.linear_fc2"))
    return (batch.tokens * gradients * features + batch.own_tokens * s.hidden) * batch.element_bytes


def pipeline_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, stage: int) -> int:
    """Of size (T / t) H: the gradient sent for the microbatch before, which every stage but the
    first still holds; interleaved also inputs and gradients that came ahead of their turn, one on
    the first stage, three on the others. Inputs of microbatches in flight count as activations;
    outputs are freed once sent."""
    batch = Microbatch.of(model, layout, work)
    number = (1 if stage == 0 else 4) if layout.parallel.vpp > 1 else int(stage > 0)
    return number * batch.own_tokens * model.shape.hidden * batch.element_bytes


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
    shares = zip(*(_share(count, layout) for count in counts), strict=True)
    return max(2 * GRADIENT * max(replicated), STATE * max(sum(of_chunks) for of_chunks in shares))

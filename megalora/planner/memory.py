"""Add up the bytes of one rank while it trains, part by part, each with how it is known.

    measured   a formula that tests and benchmarks/planner_accuracy.py compare with the tensors of
               real training steps on CPU ranks
    assumed    follows from the code that allocates on a GPU, or is a constant; not yet counted

A GPU holds more than is counted here: what one operation allocates and frees inside (float32
partial sums of the Triton passes: 1024 rows' share of a factor each; attention's backward), and
gaps between the blocks of its allocator.

Symbols as in ``activations.py``; P adapter parameters of this rank, e bytes per element.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megalora.config import LoRAConfig
from megalora.model.shape import ModelShape
from megalora.planner import teacher_bytes
from megalora.planner.adapter_count import (
    AdapterCount,
    adapter_parameters,
    of_base_elements,
    with_base_value,
)
from megalora.planner.hardware import Basis
from megalora.planner.held_bytes import held_bytes
from megalora.planner.layouts import ParallelLayout
from megalora.planner.microbatch import STATISTIC
from megalora.planner.pass_bytes import (
    activation_bytes,
    backward_bytes,
    loss_bytes,
    of_chunks,
    pipeline_bytes,
    row_bytes,
)
from megalora.planner.state_bytes import (
    GRADIENT,
    buffers,
    frozen_elements,
    has_room,
    kept_elements,
    magnitude_bytes,
    optimizer_bytes,
    room_bytes,
    step_bytes,
)
from megalora.planner.weights import (
    Chunk,
    PlannedModel,
    base_parameters,
    first_of_their_like,
    stage_chunks,
)
from megalora.planner.workload import Workload

When = Literal["always", "teacher", "pass", "loss", "layer", "step"]
"""``teacher``: while a second model runs forward; ``pass``: during forward and backward, and there
either at the ``loss`` or while a ``layer`` runs backward; ``step``: while gradients are reduced and
the optimizer runs."""
GIB = 2**30
CONTEXT = "CUDA context, NCCL"
ROOM = "room for adapters"
"""Parts that no count of tensors sees: not an allocator's, and only on some GPUs."""
START = "adapter at the start"
AVERAGE = "average of adapters"
TEACHER = "teacher"
DECODED = "decoded weights"
BASE_VALUES = "the base's own values"
CONTEXT_BYTES = 3 * 2**29
"""CUDA context, cuBLAS workspaces and NCCL's buffers: 1.5 GiB."""

MOMENTS: tuple[tuple[When, ...], ...] = (
    ("teacher",),
    ("pass", "loss"),
    ("pass", "layer"),
    ("step",),
)
"""What is there together, beside what always is: the peak is one of these moments."""


@dataclass(frozen=True)
class Part:
    """One component of a rank's memory."""

    name: str
    num_bytes: int
    basis: Basis
    when: When = "always"


def gib_by_name(parts: Iterable[Part]) -> dict[str, float]:
    """Name of each part -> its GiB."""
    return {part.name: part.num_bytes / GIB for part in parts}


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank of a pipeline stage needs."""

    stage: int
    parts: tuple[Part, ...]

    def __getitem__(self, name: str) -> int:
        """Bytes of the part of that name."""
        for part in self.parts:
            if part.name == name:
                return part.num_bytes
        raise KeyError(f"no part {name!r}; there are {', '.join(p.name for p in self.parts)}")

    def sum_of(self, when: When) -> int:
        """Bytes of the parts that are there at that time."""
        return sum(part.num_bytes for part in self.parts if part.when == when)

    def at_peak(self) -> tuple[Part, ...]:
        """What is always there, and the largest of what the loss, a layer's backward and the
        optimizer step add."""
        # The loss's tensors are gone before a layer runs backward, and what a pass keeps is gone
        # before the step: the peak is one of three moments, not the sum of all.
        fullest = max(MOMENTS, key=lambda moment: sum(map(self.sum_of, moment)))
        return tuple(part for part in self.parts if part.when in ("always", *fullest))

    @cached_property
    def peak_bytes(self) -> int:
        """Bytes at the fullest moment, which a search asks for several times."""
        sums: dict[When, int] = {}
        for part in self.parts:
            sums[part.when] = sums.get(part.when, 0) + part.num_bytes
        adds = [sum(sums.get(when, 0) for when in moment) for moment in MOMENTS]
        return sums.get("always", 0) + max(adds)

    def table(self) -> str:
        """One line for each part, in GiB, and the peak."""
        lines = []
        for part in self.parts:
            gib = part.num_bytes / GIB
            lines.append(f"{part.name:<22} {gib:9.3f} GiB  {part.when:<6}  {part.basis}")
        lines.append(f"{'peak':<22} {self.peak_bytes / GIB:9.3f} GiB")
        return "\n".join(lines)


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
            f"there is no pipeline stage {stage}: parallel.pp={p.pp} has stages 0 to {p.pp - 1}"
        )
    chunks, always, step = _state(model, layout, work, stage)
    rows = row_bytes(model, layout, work, chunks)
    states = teacher_bytes.state_bytes(model, layout, work, chunks)
    if work.teacher is not None:
        always += (Part(TEACHER, teacher_bytes.weight_bytes(layout, work, stage), "measured"),)
    # Its states are there until the end of the pass that learns from them.
    of_teacher = rows + teacher_bytes.pass_bytes(layout, work, chunks, states)
    # What a pass adds: each chunk's bytes for one microbatch, times the microbatches that are held.
    found = of_chunks(model, layout, work, chunks)
    kept = activation_bytes(layout, work, chunks, found)
    transfers = pipeline_bytes(model, layout, work, stage)
    # The loss and a layer's backward are moments of their own, as ``MOMENTS`` says.
    loss, logits = loss_bytes(model, layout, work, chunks, found)
    workspace, recomputed, moved = backward_bytes(layout, work, chunks, found)
    parts = (
        *always,
        Part("activations", kept, "measured", "pass"),
        Part("rows", rows, "measured", "pass"),
        Part("pipeline", transfers, "measured", "pass"),
        Part("loss", loss, "measured", "loss"),
        Part("logits", logits, "measured", "loss"),
        Part("workspace", workspace, "measured", "layer"),
        Part("recomputed", recomputed, "measured", "layer"),
        Part("all-to-all", moved, "measured", "layer"),
        step,
        Part(CONTEXT, CONTEXT_BYTES, "assumed"),
    )
    if work.teacher is not None:
        parts += (
            Part("teacher's states", states, "measured", "pass"),
            Part("teacher's pass", of_teacher, "measured", "teacher"),
        )
    return MemoryPlan(stage, parts)


def _state(
    model: PlannedModel, layout: ParallelLayout, work: Workload, stage: int
) -> tuple[list[Chunk], tuple[Part, ...], Part]:  # fmt: skip
    """(chunks, what is always there, what the optimizer step adds): but for room, the same for
    every microbatch and recomputation."""
    p = layout.parallel
    e = work.element_bytes
    copied = (work.holds_start, work.averaged, work.asks_base, work.held)
    # Everything that decides about these bytes; a search asks for each key dozens of times.
    key = ("state", p, layout.num_ranks, copied, e, stage, has_room(model, layout, work))
    if key in model.memo:
        return model.memo[key]
    chunks = stage_chunks(model, p, stage)
    counts: list[AdapterCount] = []
    base = 0
    # The base's own values of what is trained of it, which passes of the base read.
    put_aside = 0
    adapters = 0
    padded = 0
    optimizer = 0
    for chunk in chunks:
        base += base_parameters(model.shape, p, chunk) - of_base_elements(model, p, chunk)
        put_aside += with_base_value(model, p, chunk)
        count = adapter_parameters(model, p, chunk)
        counts.append(count)
        adapters += count.elements
        padded += sum(buffers(count, layout))
        optimizer += optimizer_bytes(count, layout, work)
    # Frozen factors lie outside of Megatron's buffers.
    held = adapters + frozen_elements(model, p, chunks) + kept_elements(model, p, chunks)
    codes = held_bytes(work.held, model, p, chunks, e)
    always: tuple[Part, ...] = (
        Part("weights", base * e - codes.plain + codes.codes, "measured"),
        Part(ROOM, room_bytes(model, layout, work, chunks, codes.room), "assumed"),
        Part("adapters", held * e + magnitude_bytes(model, p, chunks, e), "measured"),
        # Megatron keeps parameters, too, in a buffer of the size of that of their gradients.
        Part("buffer padding", (padded - adapters) * e, "measured"),
        Part("gradients", padded * GRADIENT, "measured"),
        Part("optimizer", optimizer, "measured"),
        *_decoded(work, codes.scratch),
    )
    if work.averaged:
        always += (Part(AVERAGE, adapters * STATISTIC, "measured"),)
    if work.holds_start:
        always += (Part(START, adapters * e, "measured"),)
    if work.asks_base and put_aside:
        always += (Part(BASE_VALUES, put_aside * e, "measured"),)
    step = Part("optimizer step", step_bytes(model, p, chunks), "measured", "step")
    model.memo[key] = chunks, always, step
    return chunks, always, step


def _decoded(work: Workload, num_bytes: int) -> tuple[Part, ...]:
    """Memory that weights are decoded into; without codes there is none."""
    return () if work.held is None else (Part(DECODED, num_bytes, "measured"),)


def fullest_stage(model: PlannedModel, layout: ParallelLayout, work: Workload) -> MemoryPlan:
    """The plan of the pipeline stage with the highest peak, which decides whether a layout fits."""
    plans = []
    for stage in _fullest_of_their_like(model, layout):
        plans.append(memory_of_model(model, layout, work, stage))
    # Of equal peaks the first: the stage that holds the most microbatches.
    return max(plans, key=lambda plan: plan.peak_bytes)


def fullest_within(
    model: PlannedModel, layout: ParallelLayout, work: Workload, limit_bytes: float
) -> MemoryPlan | None:
    """``fullest_stage``, or None where a stage needs more than ``limit_bytes``: the others are not
    asked then."""
    fullest = None
    for stage in _fullest_of_their_like(model, layout):
        plan = memory_of_model(model, layout, work, stage)
        if plan.peak_bytes > limit_bytes:
            return None
        # The first of equal peaks stays, as ``max`` in ``fullest_stage`` has it.
        if fullest is None or plan.peak_bytes > fullest.peak_bytes:
            fullest = plan
    return fullest


def _fullest_of_their_like(model: PlannedModel, layout: ParallelLayout) -> list[int]:
    """Of stages with the same content the first, which holds the most microbatches: it stands for
    all."""
    return [stage for stage, _ in first_of_their_like(model, layout.parallel)]

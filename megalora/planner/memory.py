"""Bytes of one rank while it trains, part by part, each with how it is known.

    measured   a formula that tests and benchmarks/planner_accuracy.py compare with the tensors of
               real training steps on CPU ranks
    assumed    follows from the code that allocates on a GPU, or is a constant; not yet counted

A GPU holds more than is counted here: what one operation allocates and frees inside (float32
partial sums of the Triton passes: 1024 rows' share of a factor each; attention's backward), and
gaps between the blocks of its allocator.

Symbols as in ``activations.py``; P adapter parameters of this rank, e bytes per element.
"""

from dataclasses import dataclass
from typing import Literal

from megalora.config import LoRAConfig
from megalora.model.shape import ModelShape
from megalora.planner.activations import head_bytes
from megalora.planner.hardware import Basis
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.pass_bytes import (
    activation_bytes,
    backward_bytes,
    logits_bytes,
    pipeline_bytes,
)
from megalora.planner.state_bytes import (
    GRADIENT,
    buffers,
    has_room,
    optimizer_bytes,
    room_bytes,
    step_bytes,
)
from megalora.planner.weights import (
    Chunk,
    PlannedModel,
    adapter_parameters,
    base_parameters,
    chunks_of,
    first_of_their_like,
)

When = Literal["always", "pass", "loss", "layer", "step"]
"""``pass``: during forward and backward, and there either at the ``loss`` or while a ``layer`` runs
backward; ``step``: while gradients are reduced and the optimizer runs."""
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
        Part("loss", head_bytes(model, layout, work) if has_head else 0, "measured",
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

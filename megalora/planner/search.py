"""Every layout of a number of ranks, with its memory and its time, the fastest that fits first, and
why the others are out."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megalora.config import LoRAConfig
from megalora.config.checks import require
from megalora.model.shape import ModelShape
from megalora.planner.cost import step_time
from megalora.planner.hardware import Machine
from megalora.planner.layouts import (
    LEVELS,
    ParallelLayout,
    Recompute,
    Rejected,
    Workload,
    enumerate_layouts,
)
from megalora.planner.ledger import StepTime
from megalora.planner.memory import MemoryPlan, fullest_stage
from megalora.planner.weights import PlannedModel

FULL = 0.9
"""Of a device's memory: above it a plan is warned of, for fragments, uneven routing and what nobody
counted need some."""
CLOSE = 0.03
"""Predictions that differ by less are taken for equal."""
GIB = 2**30


@dataclass(frozen=True)
class Planned:
    """A layout with what it needs and what it takes."""

    layout: ParallelLayout
    lora_rank: int
    memory: MemoryPlan
    """Of the fullest stage."""
    time: StepTime

    def tokens_per_second(self, work: Workload) -> float:
        """Per rank, padding included: global batch x sequence / seconds / ranks."""
        return (
            work.global_batch_size
            * work.sequence_length
            / self.time.seconds
            / self.layout.num_ranks
        )


@dataclass(frozen=True)
class Plan:
    """What a search found."""

    work: Workload
    machine: Machine
    lora_rank: int
    """The config's own; others were tried beside it."""
    fitting: list[Planned]
    """Every variant, fastest first."""
    rejected: list[Rejected]
    """Cannot be laid out, or do not fit, in the order of enumeration."""

    def layouts(self) -> list[Planned]:
        """One for each way to split the model (tp, pp, ep, etp, LoRA rank), fastest first: of its
        variants in chunks, microbatch and recomputation below ``FULL``, if any are, and within
        ``CLOSE`` of the fastest of them, the one that needs least memory."""
        groups: dict[tuple[int, ...], list[Planned]] = {}
        for found in self.fitting:
            p = found.layout.parallel
            groups.setdefault((p.tp, p.pp, p.ep, p.etp, found.lora_rank), []).append(found)
        chosen = []
        for variants in groups.values():
            safe = [v for v in variants if self.share(v) <= FULL] or variants
            chosen.append(_leanest(safe))
        return sorted(chosen, key=lambda found: found.time.seconds)

    def share(self, found: Planned) -> float:
        """Of the device's memory that its fullest rank needs."""
        return found.memory.peak_bytes / self.machine.memory_bytes

    def reasons(self) -> list[tuple[str, int]]:
        """Reasons with numbers left out, and how many layouts each rejects, the most frequent
        first."""
        return Counter(_kind(r.reason) for r in self.rejected).most_common()

    def best(self) -> Planned:
        """The fastest layout of the config's own LoRA rank, if that fits at all, below ``FULL``,
        or, where there is none, the fastest.

        Raises:
            ValueError: none fits; says how much the smallest lacks.
        """
        if self.fitting:
            layouts = [
                found for found in self.layouts() if found.lora_rank == self.lora_rank
            ] or self.layouts()
            return next((found for found in layouts if self.share(found) <= FULL), layouts[0])
        smallest = min(
            (r for r in self.rejected if r.num_bytes), key=lambda r: r.num_bytes or 0, default=None
        )
        if smallest is None:
            raise ValueError(
                f"no layout is possible; the first of {len(self.rejected)} reasons:"
                f" {self.rejected[0].reason}"
            )
        raise ValueError(f"no layout fits; the smallest is {smallest.layout}: {smallest.reason}")


def search(
    shape: ModelShape, lora: LoRAConfig, num_ranks: int, work: Workload, machine: Machine,
    *, lora_ranks: Sequence[int] = (), micro_batch_sizes: Sequence[int] = (1, 2, 4, 8),
    recompute: Sequence[Recompute] = LEVELS,
) -> Plan:  # fmt: skip
    """Plan every legal layout of ``num_ranks`` ranks.

    Args:
        lora_ranks: ``lora.rank`` values to try beside the config's own.

    Raises:
        ValueError: targets that match nothing, dropout, fewer than one rank, rates of another
            dtype.
    """
    check_dtype(work, machine)
    found = enumerate_layouts(
        shape, num_ranks, work, micro_batch_sizes=micro_batch_sizes, recompute=recompute
    )
    plan = Plan(work, machine, lora.rank, [], list(found.rejected))
    for rank in dict.fromkeys((lora.rank, *lora_ranks)):
        model = PlannedModel.of(shape, replace(lora, rank=rank))
        _fill(plan, model, rank, found.legal)
    plan.fitting.sort(key=lambda p: p.time.seconds)
    return plan


def evaluate(
    model: PlannedModel, lora_rank: int, layout: ParallelLayout, work: Workload, machine: Machine
) -> Planned:
    """One layout, whether it fits or not; raises ``ValueError`` where rates are of another
    dtype."""
    check_dtype(work, machine)
    return Planned(
        layout,
        lora_rank,
        fullest_stage(model, layout, work),
        step_time(model, layout, work, machine),
    )


def check_dtype(work: Workload, machine: Machine) -> None:
    """Raise ``ValueError`` unless rates are those of the dtype that is trained in."""
    require(
        work.dtype == machine.dtype,
        f"model.dtype={work.dtype}, but the rates of {machine.name} are those of {machine.dtype}."
        f" Set model.dtype={machine.dtype}, or calibrate: python -m megalora.bench.calibrate"
        f" FILE.json --dtype {work.dtype}",
    )


def _fill(
    plan: Plan, model: PlannedModel, lora_rank: int, layouts: Iterable[ParallelLayout]
) -> None:
    """Time only what fits. A stage whose weights alone are too much is too much with every
    microbatch and recomputation."""
    limit = plan.machine.memory_bytes
    hopeless = {}
    for layout in layouts:
        p = layout.parallel
        if p in hopeless:
            plan.rejected.append(
                replace(hopeless[p], layout=layout, micro_batch_size=layout.micro_batch_size)
            )
            continue
        memory = fullest_stage(model, layout, plan.work)
        if memory.peak_bytes <= limit:
            plan.fitting.append(
                Planned(
                    layout, lora_rank, memory, step_time(model, layout, plan.work, plan.machine)
                )
            )
            continue
        always = memory.sum_of("always")
        needs, what = (
            (always, "weights, adapters and optimizer alone")
            if always > limit
            else (memory.peak_bytes, "in all")
        )
        reason = (
            f"does not fit: {needs / GIB:.1f} GiB {what} on stage {memory.stage}, of"
            f" {limit / GIB:.1f} GiB"
        )
        rejected = Rejected(p, layout.micro_batch_size, reason, layout, needs)
        plan.rejected.append(rejected)
        if always > limit:
            hopeless[p] = rejected


def _leanest(variants: list[Planned]) -> Planned:
    """Of those, fastest first, that are as good as the first: least memory, then fewest chunks."""
    close = [v for v in variants if v.time.seconds <= (1 + CLOSE) * variants[0].time.seconds]
    least = min(v.memory.peak_bytes for v in close)
    lean = [v for v in close if v.memory.peak_bytes <= (1 + CLOSE) * least]
    return min(lean, key=lambda v: (v.layout.parallel.vpp, v.memory.peak_bytes))


def _kind(reason: str) -> str:
    """A reason without its numbers."""
    out = "".join(
        "#" if c.isdigit() or (c == "." and i and reason[i - 1].isdigit()) else c
        for i, c in enumerate(reason)
    )
    while "##" in out:
        out = out.replace("##", "#")
    return out

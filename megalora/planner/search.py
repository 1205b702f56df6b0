"""Search all layouts of a number of ranks for those that fit, the fastest first, with the memory
and time of each and the reasons against the others."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

from megalora.config import LEVELS, Level, LoRAConfig, ParallelConfig
from megalora.config.checks import require
from megalora.model.shape import ModelShape
from megalora.planner.cost import step_time
from megalora.planner.hardware import Machine
from megalora.planner.layouts import ParallelLayout, Rejected, enumerate_layouts
from megalora.planner.ledger import StepTime
from megalora.planner.memory import GIB, MemoryPlan, fullest_stage
from megalora.planner.recompute_layers import between_levels
from megalora.planner.scenarios import scenarios
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

FULL = 0.9
"""Share of a device's memory above which a plan comes with a warning: fragments, uneven routing and
what nobody counted need some."""
CLOSE = 0.03
"""Predictions that differ by a smaller share than this are taken for equal."""
FAR = 1.5
"""A layout that takes so many times as long as the fastest at the middle of the rates is taken for
slower in every scenario. Of equal stages it was, for all models and numbers of GPUs of
``configs/sft``."""
LESS = 0.05
"""Share of the device's memory from which on a layout counts as one that needs less."""


@dataclass(frozen=True)
class Planned:
    """A layout with its memory and its time."""

    layout: ParallelLayout
    lora_rank: int
    memory: MemoryPlan
    """Memory of the fullest stage."""
    time: StepTime
    """Time of a step, as the slowest stage has it."""
    asked: tuple[PlannedModel, Workload, Machine] = field(compare=False, repr=False)
    """What was planned."""

    @cached_property
    def by_scenario(self) -> tuple[float, ...]:
        """Seconds of a step in each of the scenarios of the machine; those of ``time`` alone where
        every rate was measured. Computed when first asked for: a search has thousands of layouts
        and asks of tens."""
        model, work, machine = self.asked
        seconds = []
        for scenario in scenarios(machine):
            seconds.append(step_time(model, self.layout, work, scenario).seconds)
        return tuple(seconds) or (self.time.seconds,)

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the most seconds of a step, over the scenarios and at the rates' middle."""
        every = (self.time.seconds, *self.by_scenario)
        return min(every), max(every)

    def is_surely_slower(self, other: "Planned") -> bool:
        """Whether it takes longer than ``other`` in every scenario, by more than ``CLOSE``."""
        pairs = zip(self.by_scenario, other.by_scenario, strict=True)
        return all(own > (1 + CLOSE) * others for own, others in pairs)

    def tokens_per_second(self, work: Workload, seconds: float | None = None) -> float:
        """Tokens of samples per rank, as long as ``work`` has them: filler does not count.

        Args:
            seconds: of a step, in place of those at the rates' middle.
        """
        length = work.packing.mean if work.packing else work.sample_tokens
        tokens = work.global_batch_size * length
        return tokens / (seconds or self.time.seconds) / self.layout.num_ranks


@dataclass(frozen=True)
class Plan:
    """The result of a search."""

    work: Workload
    machine: Machine
    lora_rank: int
    fitting: list[Planned]
    """Layouts that fit, in every variant, fastest first."""
    rejected: list[Rejected]
    """Layouts that are not possible or do not fit, in the order of enumeration."""

    def layouts(self) -> list[Planned]:
        """One layout for each way to split the model (tp, cp, pp, ep, etp): the choice, its rivals
        and then the others, the fastest first.

        Of the variants in chunks, microbatch and recomputation that stay below ``FULL``, or of all
        where none does, those within ``CLOSE`` of the fastest count as equally fast; of these it is
        the one with the fewest chunks, then that which needs least memory.
        """
        ways = self._ways
        rivals = self.rivals()
        if not rivals:
            return []
        choice, _ = self.choose(rivals)
        rest = [found for found in rivals if found is not choice]
        # Layouts are compared by identity: nothing else says so cheaply which are rivals.
        known = {id(found) for found in rivals}
        return [choice, *rest, *(found for found in ways if id(found) not in known)]

    @cached_property
    def _ways(self) -> list[Planned]:
        """The layouts of ``layouts``, fastest first."""
        groups: dict[tuple[int, ...], list[Planned]] = {}
        for found in self.fitting:
            groups.setdefault(way_of(found.layout), []).append(found)
        chosen = []
        # self.fitting is sorted by time, and so is every group.
        for variants in groups.values():
            safe = [v for v in variants if self.share(v) <= FULL] or variants
            chosen.append(_leanest(safe))
        return sorted(chosen, key=lambda found: found.time.seconds)

    def rivals(self) -> list[Planned]:
        """Layouts each of which may be the fastest, by assumed rates: those that no other one beats
        in every scenario. Of layouts below ``FULL`` where there are any; fastest first."""
        safe = [found for found in self._ways if self.share(found) <= FULL] or self._ways
        near = []
        for found in safe:
            if found.time.seconds <= FAR * safe[0].time.seconds:
                near.append(found)
        return [found for found in near if not any(map(found.is_surely_slower, near))]

    def choose(self, rivals: list[Planned]) -> tuple[Planned, list[str]]:
        """Of layouts that may each be the fastest, fastest first, the one to take: fewest parts of
        the model (chunks of all pipeline stages), then least memory, then the fastest, without ETP
        where that is within ``CLOSE``. And those of these rules that left any out, in words."""
        rules: tuple[tuple[str, Callable[[Planned], float], float], ...] = (
            # Every microbatch is sent across all borders between parts, and waits at each.
            ("fewest parts of the model", lambda found: found.layout.parallel.num_chunks, 0),
            ("least memory", self.share, LESS),
        )
        reasons: list[str] = []
        left = rivals
        for reason, measure, slack in rules:
            least = min(map(measure, left))
            kept = [found for found in left if measure(found) <= least + slack]
            if len(kept) < len(left):
                reasons.append(reason)
            left = kept
        if len(left) > 1:
            reasons.append("least time at the middle of the rates")
        # ETP gathers unequal numbers of rows: without a gain there is no reason.
        close = [f for f in left if f.time.seconds <= (1 + CLOSE) * left[0].time.seconds]
        return min(close, key=lambda found: found.layout.parallel.etp), reasons

    def share(self, found: Planned) -> float:
        """Share of the device's memory that the fullest rank needs."""
        return found.memory.peak_bytes / self.machine.memory_bytes

    def reasons(self) -> list[tuple[str, int]]:
        """Reasons with numbers left out, and how many layouts each rejects, the most frequent
        first."""
        return Counter(_kind(r.reason) for r in self.rejected).most_common()

    def best(self) -> Planned:
        """The first of ``layouts``: one below ``FULL``, where there is any.

        Raises:
            ValueError: no layout fits; the message says how much the smallest needs.
        """
        if not self.fitting:
            raise ValueError(self.why_nothing_fits())
        return self.layouts()[0]

    def why_nothing_fits(self) -> str:
        """Of the layouts that are possible the one that needs least, or that none is possible."""
        possible = [r for r in self.rejected if r.num_bytes]
        if not possible:
            return (
                f"no layout is possible; the first of {len(self.rejected)} reasons:"
                f" {self.rejected[0].reason}"
            )
        smallest = min(possible, key=lambda r: r.num_bytes or 0)
        assert smallest.layout is not None  # possible, so that its bytes are known
        return (
            f"{smallest.layout.num_ranks} x {self.machine.name} are too few: the smallest layout is"
            f" {smallest.layout}: {smallest.reason}"
        )


def search(
    shape: ModelShape, lora: LoRAConfig, num_ranks: int, work: Workload, machine: Machine,
    *, micro_batch_sizes: Sequence[int] = (1, 2, 4, 8), recompute: Sequence[Level] = LEVELS,
) -> Plan:  # fmt: skip
    """Plan every legal layout of ``num_ranks`` ranks.

    Raises:
        ValueError: targets that match nothing, fewer than one rank, rates of another dtype.
    """
    plans = search_ranks(
        shape, lora, num_ranks, work, machine,
        micro_batch_sizes=micro_batch_sizes, recompute=recompute,
    )  # fmt: skip
    return plans[lora.rank]


def search_ranks(
    shape: ModelShape, lora: LoRAConfig, num_ranks: int, work: Workload, machine: Machine,
    *, lora_ranks: Sequence[int] = (), micro_batch_sizes: Sequence[int] = (1, 2, 4, 8),
    recompute: Sequence[Level] = LEVELS,
) -> dict[int, Plan]:  # fmt: skip
    """A plan for each LoRA rank, the config's own first; what is legal is the same for all.

    Args:
        lora_ranks: ``lora.rank`` values to try beside the config's own.

    Raises:
        ValueError: as ``search``.
    """
    check_dtype(work, machine)
    found = enumerate_layouts(
        shape, num_ranks, work, micro_batch_sizes=micro_batch_sizes, recompute=recompute
    )
    plans: dict[int, Plan] = {}
    # dict.fromkeys: each rank once, in the order given.
    for rank in dict.fromkeys((lora.rank, *lora_ranks)):
        plan = Plan(work, machine, rank, [], list(found.rejected))
        _fill(plan, PlannedModel.of(shape, replace(lora, rank=rank)), found.legal)
        plan.fitting.sort(key=lambda p: p.time.seconds)
        plans[rank] = plan
    return plans


def evaluate(
    model: PlannedModel, lora_rank: int, layout: ParallelLayout, work: Workload, machine: Machine
) -> Planned:
    """Memory and time of one layout, whether it fits or not; raises ``ValueError`` where the rates
    are of another dtype."""
    check_dtype(work, machine)
    memory = fullest_stage(model, layout, work)
    time = step_time(model, layout, work, machine)
    return Planned(layout, lora_rank, memory, time, (model, work, machine))


def check_dtype(work: Workload, machine: Machine) -> None:
    """Raise ``ValueError`` unless rates are those of the dtype that is trained in."""
    require(
        work.dtype == machine.dtype,
        f"model.dtype={work.dtype}, but the rates of {machine.name} are those of {machine.dtype}."
        f" Set model.dtype={machine.dtype}, or calibrate: python -m megalora.bench.calibrate"
        f" FILE.json --dtype {work.dtype}",
    )


@dataclass(frozen=True)
class TooBig:
    """How much memory a layout needs beyond what there is."""

    num_bytes: int
    is_hopeless: bool
    """Weights, adapters and optimizer alone are too much: no microbatch and no recomputation
    helps."""
    reason: str


def why_too_big(memory: MemoryPlan, limit_bytes: int) -> TooBig | None:
    """What a layout needs and by how much that is too much; None where it fits."""
    if memory.peak_bytes <= limit_bytes:
        return None
    # What is there whatever the microbatch: if that is too much, recomputation cannot help.
    always = memory.sum_of("always")
    if always > limit_bytes:
        needs = always
        what = "weights, adapters and optimizer alone"
    else:
        needs = memory.peak_bytes
        what = "in all"
    reason = (
        f"does not fit: {needs / GIB:.1f} GiB {what} on stage {memory.stage}, of"
        f" {limit_bytes / GIB:.1f} GiB: {(needs - limit_bytes) / GIB:.1f} GiB too many"
    )
    return TooBig(needs, always > limit_bytes, reason)


def _fill(plan: Plan, model: PlannedModel, layouts: Iterable[ParallelLayout]) -> None:
    """Add each layout to ``plan.fitting`` or ``plan.rejected``, and to the former those between the
    levels of recomputation. Only what fits is timed."""
    limit = plan.machine.memory_bytes
    # Sizes whose weights alone are too much: too much with every microbatch and recomputation.
    hopeless: dict[ParallelConfig, Rejected] = {}
    fitting: list[tuple[ParallelLayout, MemoryPlan]] = []
    peaks: dict[ParallelLayout, int] = {}
    for layout in layouts:
        p = layout.parallel
        micro = layout.micro_batch_size
        if p in hopeless:
            plan.rejected.append(replace(hopeless[p], layout=layout, micro_batch_size=micro))
            continue
        memory = fullest_stage(model, layout, plan.work)
        peaks[layout] = memory.peak_bytes
        too_big = why_too_big(memory, limit)
        if too_big is None:
            fitting.append((layout, memory))
            continue
        rejected = Rejected(p, micro, too_big.reason, layout, too_big.num_bytes)
        plan.rejected.append(rejected)
        if too_big.is_hopeless:
            hopeless[p] = rejected
    asked = (model, plan.work, plan.machine)
    # The fastest layout of each way to split the model, of those below FULL.
    fastest: dict[tuple[int, ...], float] = {}

    def may_be_shown(layout: ParallelLayout) -> bool:
        """Whether a layout that is slower than this one could still be the one of its way."""
        seconds = step_time(model, layout, plan.work, plan.machine).seconds
        return seconds <= (1 + CLOSE) * fastest.get(way_of(layout), math.inf)

    between = between_levels(model, plan.work, peaks, FULL * limit, may_be_shown)
    for layout, memory in chain(fitting, between):
        time = step_time(model, layout, plan.work, plan.machine)
        found = Planned(layout, plan.lora_rank, memory, time, asked)
        plan.fitting.append(found)
        if plan.share(found) <= FULL:
            way = way_of(layout)
            fastest[way] = min(time.seconds, fastest.get(way, math.inf))


def way_of(layout: ParallelLayout) -> tuple[int, ...]:
    """Sizes of the groups that split the model, of which a plan shows one layout each."""
    p = layout.parallel
    return p.tp, p.cp, p.pp, p.ep, p.etp


def _leanest(variants: list[Planned]) -> Planned:
    """Of variants, fastest first, that are as good as the first: fewest chunks, then least
    memory."""
    fastest = variants[0].time.seconds
    close = [v for v in variants if v.time.seconds <= (1 + CLOSE) * fastest]
    # Chunks shorten the bubble but send more messages: without a gain there is no reason for them.
    return min(close, key=lambda v: (v.layout.parallel.vpp, v.memory.peak_bytes))


def _kind(reason: str) -> str:
    """A reason with # for each number, so that reasons of one kind count as one."""
    return re.sub(r"(?:\d\.?)+", "#", reason)

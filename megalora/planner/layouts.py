"""Enumerate every way to lay N ranks out for a model, and say why the others are not possible.

Candidates fill both grids, ``world = tp * cp * pp * dp`` and ``world = etp * ep * pp * edp``. What
is legal is decided by the checks a run itself makes: ``ParallelConfig``,
``ModelShape.check_layout`` and ``RunConfig.check_world``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from megalora.config import (
    LEVELS,
    DataConfig,
    Level,
    ModelConfig,
    ParallelConfig,
    Recompute,
    RunConfig,
    TrainConfig,
)
from megalora.config.checks import require
from megalora.model.shape import ModelShape
from megalora.planner.divisions import divisions
from megalora.planner.packing import Packing, RowUse
from megalora.planner.workload import Workload

MAX_RANKS = 2**20
"""Beyond any machine; with more, the rates that a plan rests on mean nothing."""


LEAST_CP_TOKENS = 4096
"""A rank's tokens of a sample from which on context parallelism is worth trying: a part is two
chunks, and what is shorter gives attention too few queries for the keys that it gathers."""


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """One way to run a workload on a number of ranks."""

    parallel: ParallelConfig
    num_ranks: int
    micro_batch_size: int = 1
    """Samples of full length that a row has room for."""
    micro_batch_tokens: int | None = None
    """Tokens that a row of packed samples has room for, in place of the former."""
    recompute: Recompute = "off"
    dp: int = field(init=False)
    """Data-parallel ranks with samples of their own, which the other sizes leave."""
    edp: int = field(init=False)
    """Data-parallel ranks of experts."""

    def __post_init__(self) -> None:
        # Computed once: counting bytes and seconds asks for them again and again.
        dp, edp = self.parallel.data_parallel_sizes(self.num_ranks)
        object.__setattr__(self, "dp", dp)
        object.__setattr__(self, "edp", edp)

    @classmethod
    def of(cls, config: RunConfig, num_ranks: int) -> "ParallelLayout":
        """The layout of a run's config."""
        return cls(
            parallel=config.parallel,
            num_ranks=num_ranks,
            micro_batch_size=config.train.micro_batch_size,
            micro_batch_tokens=config.train.micro_batch_tokens,
            recompute=config.train.recompute,
        )

    @property
    def dp_cp(self) -> int:
        """Ranks that share out the optimizer of attention's adapters: all replicas of them."""
        return self.dp * self.parallel.cp

    def capacity(self, work: Workload) -> int:
        """Tokens that a row has room for, on all ranks that share it out."""
        return self.micro_batch_tokens or self.micro_batch_size * work.sample_tokens

    def cut(self, work: Workload) -> tuple[object, ...]:
        """What decides about the bytes and the work of a layer on a rank. Pipeline stages, chunks
        and data-parallel ranks do not: what is counted for one layout holds for many."""
        p = self.parallel
        return p.tp, p.cp, p.ep, p.etp, self.capacity(work), work

    def use(self, work: Workload) -> RowUse:
        """How samples fill the rows of a step, on each data-parallel rank."""
        if work.packing is None and self.micro_batch_tokens is None:
            row = self.micro_batch_size * work.sample_tokens
            return RowUse(work.global_batch_size // (self.micro_batch_size * self.dp), row, 1.0)
        full = (work.sample_tokens,) * work.global_batch_size
        packing = work.packing or Packing(full, "full length")
        per_row = self.micro_batch_size if self.micro_batch_tokens is None else None
        return packing.use(self.capacity(work), self.dp, self.parallel, per_row)

    def num_microbatches(self, work: Workload) -> int:
        """Per optimizer step and data-parallel rank."""
        return self.use(work).num_rounds

    def __str__(self) -> str:
        p = self.parallel
        # Everything that training needs to know, in the config's own words.
        grids = f"tp={p.tp} cp={p.cp} {p.stages} dp={self.dp}"
        experts = f"ep={p.ep} etp={p.etp} edp={self.edp}"
        rows = f"micro={self.micro_batch_size}"
        if self.micro_batch_tokens is not None:
            rows = f"row={self.micro_batch_tokens}"
        return f"{grids} {experts} {rows} recompute={self.recompute}"


@dataclass(frozen=True)
class Rejected:
    """Layouts that are not possible or do not fit, with the reason on one line."""

    parallel: ParallelConfig
    micro_batch_size: int | None
    """None: the reason holds for every microbatch."""
    reason: str
    layout: "ParallelLayout | None" = None
    """The layout, where it is possible but does not fit."""
    num_bytes: int | None = None
    """Bytes that it needs."""


@dataclass(frozen=True)
class Enumeration:
    """Layouts that a run would accept, and those that it would refuse."""

    legal: list[ParallelLayout]
    rejected: list[Rejected]


def enumerate_layouts(
    shape: ModelShape, num_ranks: int, work: Workload,
    *, micro_batch_sizes: Sequence[int] = (1, 2, 4, 8), recompute: Sequence[Level] = LEVELS,
) -> Enumeration:  # fmt: skip
    """Every legal layout of ``num_ranks`` ranks, and the reason for each that is not.

    Args:
        micro_batch_sizes: samples per forward pass to try.
        recompute: levels to try; all are legal everywhere.

    Raises:
        ValueError: fewer than one rank, or an empty or impossible choice.
    """
    _check_choices(num_ranks, micro_batch_sizes, recompute)
    found = Enumeration([], [])
    # The batch's checks look at tp, cp, pp, vpp and the microbatch alone: asked once for all ep,
    # etp.
    why_not_batch: dict[tuple[int, int, int, int, int], str | None] = {}
    for p in candidates(shape, num_ranks, work.sequence_length):
        # What no microbatch can mend is said once for all of them.
        reason = _why_not_cp(work, p) or _why_not_model(shape, p)
        if reason := reason or _why_not_teacher(shape, work, p):
            found.rejected.append(Rejected(p, None, reason))
            continue
        for micro in micro_batch_sizes:
            key = (p.tp, p.cp, p.pp, p.vpp, micro)
            if key not in why_not_batch:
                why_not_batch[key] = _why_not_batch(work, p, num_ranks, micro)
            if reason := why_not_batch[key]:
                found.rejected.append(Rejected(p, micro, reason))
                continue
            rows = {"micro_batch_size": micro}
            if work.packing is not None:
                rows = {"micro_batch_tokens": micro * work.sample_tokens}
            # Every level is legal everywhere. Which of them fit is the search's to find.
            for level in recompute:
                layout = ParallelLayout(parallel=p, num_ranks=num_ranks, recompute=level, **rows)
                found.legal.append(layout)
    return found


def _check_choices(
    num_ranks: int, micro_batch_sizes: Sequence[int], recompute: Sequence[Level]
) -> None:
    """Raise ``ValueError`` for choices that no layout could satisfy."""
    require(num_ranks >= 1, f"a run needs at least 1 rank, got {num_ranks}")
    require(
        num_ranks <= MAX_RANKS, f"{num_ranks:,} ranks: the planner lays out up to {MAX_RANKS:,}"
    )
    require(
        bool(micro_batch_sizes) and min(micro_batch_sizes) >= 1,
        f"a microbatch has at least 1 sample; sizes to try: {list(micro_batch_sizes)}",
    )
    require(
        bool(recompute) and set(recompute) <= set(LEVELS),
        f"recompute levels are {', '.join(LEVELS)}; got {list(recompute)}",
    )


def candidates(shape: ModelShape, num_ranks: int, sequence_length: int) -> Iterator[ParallelConfig]:
    """Every (tp, cp, pp, vpp, ep, etp) whose two grids fill ``num_ranks``; experts' sizes are 1
    where there are none.

    A size that the model or a sample cannot be split by, whatever the others are, comes once, with
    all others at 1: otherwise a number of ranks with many divisors has billions of candidates.
    """
    sizes = divisors(num_ranks)
    cps = []
    for size in sizes:
        if size == 1 or sequence_length >= size * LEAST_CP_TOKENS:
            cps.append(size)
        else:
            yield ParallelConfig(cp=size)
    # Sizes that can split the model, each tried alone.
    possible = {"tp": [1], "ep": [1], "etp": [1]}
    for name in possible if shape.moe_layers else ("tp",):
        for size in sizes[1:]:  # a size of 1 is always possible
            alone = replace(ParallelConfig(), **{name: size})
            if _why_not_model(shape, alone):
                yield alone
            else:
                possible[name].append(size)
    for pp in sizes:
        per_stage = num_ranks // pp
        for stages in divisions(shape.num_layers, pp):
            if _why_not_model(shape, stages):
                yield stages
                continue
            # The two grids are filled independently: tp * cp * dp and etp * ep * edp ranks of a
            # stage.
            for tp, cp in product(possible["tp"], cps):
                for ep, etp in product(possible["ep"], possible["etp"]):
                    if per_stage % (tp * cp) == 0 and per_stage % (ep * etp) == 0:
                        yield replace(stages, tp=tp, cp=cp, ep=ep, etp=etp)


def check(shape: ModelShape, layout: ParallelLayout, work: Workload) -> None:
    """Raise ``ValueError`` when the model or the workload cannot run as ``layout`` says."""
    reason = _why_not_model(shape, layout.parallel, layout.recompute)
    reason = reason or _why_not_teacher(shape, work, layout.parallel)
    reason = reason or _why_not_row(work, layout.parallel)
    reason = reason or _why_not_batch(
        work, layout.parallel, layout.num_ranks, layout.micro_batch_size
    )
    if reason:
        raise ValueError(f"{layout}: {reason}")


def divisors(n: int) -> list[int]:
    """All of them in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    # Each divisor up to the root has a partner beyond it; a square's root is its own.
    large = [n // d for d in reversed(small) if d * d != n]
    return small + large


def _why_not_model(
    shape: ModelShape, p: ParallelConfig, recompute: Recompute = "off"
) -> str | None:
    """The reason why these sizes cannot split the model, on one line; None where they can."""
    try:
        shape.check_layout(p, recompute)
    except ValueError as error:
        return _one_line(error)
    return None


def _why_not_teacher(shape: ModelShape, work: Workload, p: ParallelConfig) -> str | None:
    """The reason why the teacher cannot be cut as the model is, on one line; None where it can."""
    try:
        if work.teacher is not None:
            work.teacher.check(shape, p)
    except ValueError as error:
        return _one_line(error)
    return None


def _why_not_cp(work: Workload, p: ParallelConfig) -> str | None:
    """The reason why context parallelism is not tried, on one line; None where it is."""
    part = work.sequence_length // p.cp
    if p.cp == 1 or part >= LEAST_CP_TOKENS:
        return None
    return (
        f"parallel.cp={p.cp} leaves a rank {part:,} tokens of a sample of"
        f" {work.sequence_length:,}; it is tried from {LEAST_CP_TOKENS:,} on"
    )


def _why_not_row(work: Workload, p: ParallelConfig) -> str | None:
    """The reason why a row cannot be cut so, on one line; None where it can."""
    if p.cp == 1 or work.sequence_length >= p.row_multiple:
        return None
    return (
        f"parallel.tp={p.tp} and parallel.cp={p.cp} cut a row into {p.row_multiple:,} parts, and a"
        f" sample has {work.sequence_length:,} tokens"
    )


def _why_not_batch(work: Workload, p: ParallelConfig, num_ranks: int, micro: int) -> str | None:
    """The reason why the global batch cannot be divided so, on one line; None where it can."""
    if work.packing is not None:
        return None  # the number of rows is made to fit
    train = TrainConfig(steps=1, global_batch_size=work.global_batch_size, micro_batch_size=micro)
    # A run's own check, in a config whose paths nobody reads.
    config = RunConfig(
        model=ModelConfig(path="planned"), data=DataConfig(train="planned"), train=train, parallel=p
    )
    try:
        config.check_world(num_ranks)
    except ValueError as error:
        return _one_line(error)
    return None


def _one_line(error: ValueError) -> str:
    return " ".join(str(error).split())

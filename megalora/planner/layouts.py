"""Every way to lay N ranks out for a model, and why the others are none.

Candidates fill both grids, ``world = tp * pp * dp`` and ``world = etp * ep * pp * edp``. What is
legal is decided by the checks a run itself makes: ``ParallelConfig``, ``ModelShape.check_layout``
and ``RunConfig.check_world``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megalora.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megalora.config.checks import require
from megalora.model.shape import ModelShape
from megalora.planner.crossings import NO_TABLE, Crossings

Recompute = Literal["off", "selective", "full"]
MAX_RANKS = 2**20
"""Beyond any machine; with more, the rates that a plan rests on mean nothing."""
LEVELS: tuple[Recompute, ...] = ("off", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, whatever the layout."""

    sequence_length: int
    """Tokens per sample: the longest, which decides whether memory suffices."""
    global_batch_size: int
    """Samples per optimizer step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights, adapters and activations."""
    imbalance: float = 1.0
    """Rows of the fullest expert-parallel rank over the mean. Assumed: only routing knows."""
    crossings: Crossings = NO_TABLE
    """From how many rows per expert the GPU runs experts on torch's grouped GEMM, with adapters
    beside the weights."""

    def __post_init__(self) -> None:
        require(
            self.sequence_length >= 2,
            f"a sample needs at least 2 tokens, got {self.sequence_length}",
        )
        require(
            self.global_batch_size >= 1,
            f"a step needs at least 1 sample, got {self.global_batch_size}",
        )
        require(
            self.imbalance >= 1,
            f"imbalance is the fullest over the mean, so at least 1, got {self.imbalance}",
        )

    @classmethod
    def of(cls, config: RunConfig, imbalance: float = 1.0) -> "Workload":
        """What a run's config says."""
        return cls(
            sequence_length=config.data.max_length,
            global_batch_size=config.train.global_batch_size,
            dtype=config.model.dtype, imbalance=imbalance,
        )  # fmt: skip

    @property
    def element_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """One way to run a workload on a number of ranks."""

    parallel: ParallelConfig
    num_ranks: int
    micro_batch_size: int = 1
    recompute: Recompute = "off"
    dp: int = field(init=False)
    edp: int = field(init=False)

    def __post_init__(self) -> None:
        dp, edp = self.parallel.data_parallel_sizes(self.num_ranks)
        object.__setattr__(self, "dp", dp)
        object.__setattr__(self, "edp", edp)

    @classmethod
    def of(cls, config: RunConfig, num_ranks: int) -> "ParallelLayout":
        """What a run's config says."""
        train = config.train
        return cls(
            parallel=config.parallel, num_ranks=num_ranks, micro_batch_size=train.micro_batch_size,
            recompute=train.recompute
        )  # fmt: skip

    def num_microbatches(self, global_batch_size: int) -> int:
        """Per optimizer step and data-parallel rank."""
        return global_batch_size // (self.micro_batch_size * self.dp)

    def __str__(self) -> str:
        p = self.parallel
        grids = f"tp={p.tp} pp={p.pp} vpp={p.vpp} dp={self.dp} ep={p.ep} etp={p.etp} edp={self.edp}"
        return f"{grids} micro={self.micro_batch_size} recompute={self.recompute}"


@dataclass(frozen=True)
class Rejected:
    """Layouts that cannot be, with the reason on one line."""

    parallel: ParallelConfig
    micro_batch_size: int | None
    """None: whatever the microbatch."""
    reason: str
    layout: "ParallelLayout | None" = None
    """Where it could be laid out but does not fit, with the bytes it needs."""
    num_bytes: int | None = None


@dataclass(frozen=True)
class Enumeration:
    legal: list[ParallelLayout]
    rejected: list[Rejected]


def enumerate_layouts(
    shape: ModelShape, num_ranks: int, work: Workload,
    *, micro_batch_sizes: Sequence[int] = (1, 2, 4, 8), recompute: Sequence[Recompute] = LEVELS,
) -> Enumeration:  # fmt: skip
    """Every legal layout of ``num_ranks`` ranks, and the reason for each that is not.

    Args:
        micro_batch_sizes: samples per forward pass to try.
        recompute: levels to try; all are legal everywhere.

    Raises:
        ValueError: fewer than one rank, or an empty or impossible choice.
    """
    require(num_ranks >= 1, f"a run needs at least 1 rank, got {num_ranks}")
    require(
        num_ranks <= MAX_RANKS, f"{num_ranks:,} ranks: the planner lays out up to {MAX_RANKS:,}"
    )
    require(
        bool(micro_batch_sizes) and min(micro_batch_sizes) >= 1,
        f"microbatches of {micro_batch_sizes} samples",
    )
    unknown = [level for level in recompute if level not in LEVELS]
    require(
        bool(recompute) and not unknown,
        f"recompute levels are {', '.join(LEVELS)}; got {list(recompute)}",
    )
    found = Enumeration([], [])
    fits_batch: dict[tuple[int, int, int, int], str | None] = {}
    for p in candidates(shape, num_ranks):
        if reason := _why_not_model(shape, p):
            found.rejected.append(Rejected(p, None, reason))
            continue
        for micro in micro_batch_sizes:
            key = (p.tp, p.pp, p.vpp, micro)  # all that the batch's checks look at
            if key not in fits_batch:
                fits_batch[key] = _why_not_batch(work, p, num_ranks, micro)
            if reason := fits_batch[key]:
                found.rejected.append(Rejected(p, micro, reason))
                continue
            found.legal.extend(
                ParallelLayout(parallel=p, num_ranks=num_ranks, micro_batch_size=micro, recompute=r)
                for r in recompute
            )
    return found


def candidates(shape: ModelShape, num_ranks: int) -> Iterator[ParallelConfig]:
    """Every (tp, pp, vpp, ep, etp) whose two grids fill ``num_ranks``; experts' sizes are 1 where
    there are none.

    A size that the model cannot be split by, whatever the others are, comes once, with all others
    at 1: otherwise a number of ranks with many divisors has billions of candidates.
    """
    sizes = divisors(num_ranks)
    possible = {"tp": [1], "ep": [1], "etp": [1]}
    for name in possible if shape.moe_layers else ("tp",):
        for size in sizes[1:]:
            alone = ParallelConfig(**{name: size})
            if _why_not_model(shape, alone):
                yield alone
            else:
                possible[name].append(size)
    for pp in sizes:
        per_stage = num_ranks // pp
        for vpp in _chunks(shape, pp):
            stages = ParallelConfig(pp=pp, vpp=vpp)
            if _why_not_model(shape, stages):
                yield stages
                continue
            for tp in possible["tp"]:
                for ep in possible["ep"]:
                    for etp in possible["etp"]:
                        if per_stage % tp == 0 and per_stage % (ep * etp) == 0:
                            yield ParallelConfig(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp)


def _chunks(shape: ModelShape, pp: int) -> list[int]:
    """Numbers of model chunks of a stage that could divide the layers."""
    if pp == 1:
        return [1]
    most = max(1, shape.num_layers // pp)
    return [v for v in range(1, most + 1) if v == 1 or shape.num_layers % v == 0]


def check(shape: ModelShape, layout: ParallelLayout, work: Workload) -> None:
    """Raise ``ValueError`` when the model or the workload cannot run as ``layout`` says."""
    reason = _why_not_model(shape, layout.parallel)
    reason = reason or _why_not_batch(
        work, layout.parallel, layout.num_ranks, layout.micro_batch_size
    )
    if reason:
        raise ValueError(f"{layout}: {reason}")


def divisors(n: int) -> list[int]:
    """In ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def _why_not_model(shape: ModelShape, p: ParallelConfig) -> str | None:
    try:
        shape.check_layout(p)
    except ValueError as error:
        return _one_line(error)
    return None


def _why_not_batch(work: Workload, p: ParallelConfig, num_ranks: int, micro: int) -> str | None:
    train = TrainConfig(steps=1, global_batch_size=work.global_batch_size, micro_batch_size=micro)
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

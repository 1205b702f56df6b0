"""Run a sweep over variants of kernels on a machine whose clock, kernels and compiler are made up.

Sizes are small; what decides is the made-up time of each variant, in microseconds, and the noise on
it.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megalora_kernels import tuned
from megalora_kernels.variants import Variant

from benchmarks.expert_case import Sizes, Spec
from benchmarks.tune_compile import Job
from benchmarks.tune_points import (
    Group,
    Operands,
    Point,
    gemms_of,
    reference,
    variant_label,
)
from benchmarks.tune_record import Record
from benchmarks.tune_sweep import Sweep, Tools

CPU = torch.device("cpu")
SIZES = Sizes("tiny", 32, 16, num_experts=4, top_k=2)
# The products of one layer, forward and backward.
GATE_UP, DOWN, DOWN_DGRAD, GATE_UP_DGRAD = gemms_of(SIZES, rank=4)
# Block sizes of M, N and K, warps, stages. The first is what ``rule`` takes without a table.
RULE = Variant(64, 128, 64, 4, 4)
OTHERS = [
    Variant(64, 128, 64, 4, 3),
    Variant(128, 128, 64, 8, 3),
    Variant(128, 128, 64, 8, 4),
    Variant(128, 256, 64, 8, 3, weight="tma"),
    Variant(128, 256, 64, 8, 4, weight="tma"),
]
VARIANTS = [RULE, *OTHERS]
# Two products at two sizes: experts, then rows of each.
POINTS = (
    Point(GATE_UP, 2, 64),
    Point(DOWN, 2, 64),
    Point(GATE_UP, 2, 128),
    Point(DOWN, 2, 128),
)
# Tokens, experts, rank: with the top 2 of 4 experts, 256, 128 and 64 rows each.
LAYERS = (
    Spec(SIZES, 512, 4, 4, "balanced"),
    Spec(SIZES, 256, 4, 4, "balanced"),
    Spec(SIZES, 128, 4, 4, "balanced"),
)


def by_torch(o: Operands, variant: Variant) -> torch.Tensor:
    """What every right variant computes. Its memory is not cleared, as the launcher's is not: a
    variant that leaves rows unwritten must show."""
    y_MN = o.x.new_empty(o.routing.num_rows, o.w_EKN.shape[2])
    return y_MN.copy_(reference(o))


def place_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a sweep may write; a fixture's body: afterwards no table of it is in use."""
    # A sweep sets this variable itself; monkeypatch puts it back after the test.
    monkeypatch.setenv(tuned.ENV_TABLE, "off")
    tuned.forget()
    # Asking git at every save would take seconds in all.
    monkeypatch.setattr("benchmarks.gpu_timing.commit", lambda: "abc")
    yield tmp_path / "tuned.json"
    tuned.forget()


class Bench:
    """A made-up machine: variants take ``cost(variant, call number)`` microseconds, and time passes
    only by them."""

    def __init__(
        self, cost: Callable[[Variant], float], noise: float = 0.001, run: Any = by_torch
    ) -> None:
        self.cost = cost
        self.noise = noise
        self.run = run
        self.seconds = 0.0
        self.random = random.Random(0)
        self.compiled: list[Job] = []
        self.timed: list[tuple[str, int]] = []
        self.no_compile: dict[Variant, str] = {}
        self.too_slow: set[Variant] = set()
        """Variants that the compiler never reaches."""
        self.reach = 10**6
        """How many jobs of a call it reaches."""
        self.alive = True
        self.layer_us: dict[int, tuple[float | None, float | None]] = {}

    def timer(self, calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        # Calls come by label; the cost goes by variant.
        by_label = {variant_label(v): v for v in VARIANTS}
        found: dict[str, list[float]] = {}
        for label in calls:
            self.timed.append((label, repeats))
            us = self.cost(by_label[label])
            found[label] = []
            for _ in range(repeats):
                found[label].append(us * (1 + self.random.gauss(0, self.noise)))
            # Far more than the microseconds: a budget of seconds is spent by counting repeats.
            self.seconds += 0.01 * repeats
        return found

    def compiler(self, jobs: Sequence[Job], seconds: float) -> dict[Job, str | None]:
        self.compiled += jobs
        self.seconds += 1
        # Job -> why it does not compile, or None; jobs that time did not reach are absent.
        outcomes = {}
        for job in jobs[: self.reach]:
            if job.variant not in self.too_slow:
                outcomes[job] = self.no_compile.get(job.variant)
        return outcomes

    def layer(self, spec: Spec) -> dict[str, Any]:
        triton, vendor = self.layer_us[spec.num_rows // spec.experts]
        self.seconds += 1
        return {"triton_us": triton, "grouped_mm_us": vendor, "spread": 0.01, "problems": []}

    def tools(self, **changed: Any) -> Tools:
        how = dict(
            device=CPU, dtype=torch.float32, timer=self.timer, compiler=self.compiler,
            layer=self.layer, uneven=(0, 1, 5, 2),
            run=self.run, alive=lambda: self.alive, now=lambda: self.seconds,
            variants=lambda *_: VARIANTS,
        )  # fmt: skip
        return Tools(**{**how, **changed})


def sweep(
    out: Path,
    bench: Bench,
    points: Sequence[Point] = POINTS,
    seconds: float = 1e6,
    layers: Any = (),
) -> dict[str, Any]:
    """Sweep over one group; returns the record that was written, which a second call continues."""
    record = Record(out, CPU, dry=True)
    group = Group(tuple(points), tuple(layers))
    Sweep(record, bench.tools(), seconds).measure([group])
    return json.loads(out.read_text())


def rows_of(found: dict[str, Any], kind: str = "rows") -> list[int]:
    """Rows per expert of what the table says."""
    return [row["rows_per_expert"] for row in found[kind]]


def variants_of(found: dict[str, Any]) -> list[Variant]:
    """The variants that the table's rows name."""
    return [Variant(**row["variant"]) for row in found["rows"]]


def costs(**by_position: float) -> Callable[[Variant], float]:
    """Microseconds of variants by their position in VARIANTS, such as ``v2=50``, where v0 is the
    rule's own; 200 of those that are not given."""

    def cost(variant: Variant) -> float:
        return by_position.get(f"v{VARIANTS.index(variant)}", 200.0)

    return cost

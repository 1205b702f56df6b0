"""Sweep over variants of the grouped GEMM: compile, check, time, write. The tools that measure are
passed in, so that tests bring a clock of their own.

1. compile   every variant of a group of points in child processes; a point is begun when all of
             its variants were tried
2. check     each variant on uneven experts, then at the sizes of the point: each row against
             float32, with NaN in the memory that it allocates; the same bits twice
3. round 1   all that passed, three times each, interleaved
4. round 2   the best four and the rule's own, 20 times, interleaved: median and spread
5. write     a row where the best beats the rule's by 2 % and by twice the spread, else that the
             rule stands
6. layers    forward and backward of whole layers, by Triton with the rows found so far and by
             torch's grouped GEMM
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megalora_kernels import tuned
from megalora_kernels.variants import Product, Variant, candidates, device_limits, rule

from benchmarks.expert_case import Spec
from benchmarks.gpu_timing import first_line
from benchmarks.tune_compile import Job
from benchmarks.tune_points import (
    Gemm,
    Group,
    Launch,
    Operands,
    Point,
    launch,
    make_operands,
    mistake,
    reference,
    variant_label,
)
from benchmarks.tune_record import DTYPE_NAMES, Record, beats, key_of, layer_key, row_of

Timer = Callable[[Mapping[str, Callable[[], object]], int], dict[str, list[float]]]
"""(calls by name, repeats) to microseconds of each repeat, interleaved."""
Compiler = Callable[[Sequence[Job], float], dict[Job, str | None]]
"""(jobs, seconds) to what ``tune_compile.compile_all`` returns."""
LayerTimer = Callable[[Spec], dict[str, Any]]
"""A layer to its microseconds by ``triton_us`` and ``grouped_mm_us`` (None: it could not run), and
``spread``."""

FINALISTS = 4
"""Number of variants that go from the first round into the second, beside the rule's own."""
COMPILE_SHARE = 0.4
"""Share of the time left that compiling a group may take."""
LEAST_SECONDS = 3.0
"""Seconds without which no point is begun."""


def worth_measuring(product: Product, device: torch.device) -> list[Variant]:
    """The rule's own variant first, then every other that can run."""
    limits = device_limits(device)
    # Through a dict, which keeps the order and drops the second of equals.
    return list(dict.fromkeys([rule(product, *limits), *candidates(product, *limits)]))


class DeadDevice(Exception):
    """The device answers no more in this process, as after an access out of bounds."""


class OutOfTime(Exception):
    """Not all of a point's variants can be measured in this call."""


@dataclass(frozen=True)
class Tools:
    """What the sweep measures with."""

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    compiler: Compiler
    layer: LayerTimer
    uneven: tuple[int, ...]
    """Rows of each expert for the first check."""
    run: Launch = launch
    alive: Callable[[], bool] = lambda: True
    """Whether the device still answers after an error."""
    now: Callable[[], float] = time.monotonic
    variants: Callable[[Product, torch.device], list[Variant]] = worth_measuring
    """Variants to try for a product, the rule's own first."""
    repeats: tuple[int, int] = (3, 20)
    """Number of times that a variant runs in each of the two rounds."""


class Sweep:
    """Measures groups of points into a record, until its time is over."""

    def __init__(self, record: Record, tools: Tools, seconds: float) -> None:
        self.record = record
        self.tools = tools
        self.end = tools.now() + seconds
        self.compiled: set[Job] = set()
        """Kernels that were tried, whether they compiled or were refused."""
        self.checked: set[str] = set()
        """``GEMM: variant`` of all that passed on uneven experts."""
        self.longest: dict[str, float] = {}
        """Seconds of the slowest point and the slowest layer so far."""

    def left(self) -> float:
        return self.end - self.tools.now()

    def measure(self, groups: Sequence[Group]) -> None:
        """Measure all that time allows, in order, but for what is on record already."""
        record = self.record
        tried = {*record.points, *record.crossing, *record.failures}
        remaining = []
        for group in groups:
            points = [point for point in group.points if point.label not in tried]
            layers = [spec for spec in group.layers if spec.label not in tried]
            remaining.append(Group(tuple(points), tuple(layers)))
        # All of it first: a process that is killed leaves a file that says what it did not reach.
        record.not_reached = []
        for group in remaining:
            record.not_reached += [what.label for what in (*group.points, *group.layers)]
        record.save()
        for number, group in enumerate(remaining):
            points = group.points
            if points and self.left() > LEAST_SECONDS:
                self._timed(f"compile group {number}", lambda points=points: self._compile(points))
            for point in points:
                self._if_time("point", point.label, lambda point=point: self._point(point))
            for spec in group.layers:
                self._if_time("layer", spec.label, lambda spec=spec: self._layer(spec))
        record.save()

    def _if_time(self, kind: str, label: str, call: Callable[[], None]) -> None:
        # A fifth more than the slowest so far: one that is cut off has measured nothing.
        if self.left() < max(LEAST_SECONDS, 1.2 * self.longest.get(kind, 0.0)):
            return
        try:
            seconds = self._timed(label, call)
            self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)
        except DeadDevice:
            # Not a failure of this point: the process must end, and another go on.
            raise
        except OutOfTime as error:
            print(f"not reached: {error}", flush=True)
            return
        except Exception as error:
            # Out of memory, say: the next may well fit; this one is reported and recorded.
            self.record.failures[label] = first_line(error)
            print(f"FAILED {label}: {first_line(error)}", flush=True)
            self._check_alive(label)
        self.record.not_reached.remove(label)
        self.record.save()

    def _check_alive(self, label: str) -> None:
        if not self.tools.alive():
            self.record.save()
            raise DeadDevice(label)

    def _timed(self, label: str, call: Callable[[], None]) -> float:
        before = self.tools.now()
        call()
        seconds = self.tools.now() - before
        self.record.seconds[label] = round(seconds, 2)
        return seconds

    # ---- variants that can run -------------------------------------------------------------------

    def variants(self, point: Point) -> list[Variant]:
        """Variants to try at a point, the rule's own first."""
        return self.tools.variants(
            point.gemm.product(self.tools.dtype, point.rows), self.tools.device
        )

    def _compile(self, points: Sequence[Point]) -> None:
        wanted = self._uncompiled(points)
        if not wanted:
            return
        # A kernel that was not begun in time has no entry; None says that it compiles.
        found = self.tools.compiler(wanted, COMPILE_SHARE * self.left())
        self.compiled |= found.keys()
        for job, why in found.items():
            if why is not None:
                name = _name(job.gemm, job.variant)
                self.record.refused[name] = f"does not compile: {why}"
        self.record.save()

    def _uncompiled(self, points: Sequence[Point]) -> list[Job]:
        """Kernels of these points that were not tried yet, each once."""
        dtype = DTYPE_NAMES[self.tools.dtype]
        jobs: dict[Job, None] = {}
        for point in points:
            for variant in self.variants(point):
                if _name(point.gemm, variant) in self.record.refused:
                    continue
                for experts in self._experts(point):
                    jobs[Job(point.gemm, experts, variant, dtype)] = None
        return [job for job in jobs if job not in self.compiled]

    def _experts(self, point: Point) -> list[int]:
        """Numbers of experts that it runs with: that of the check on uneven experts, and its
        own."""
        return list(dict.fromkeys([len(self.tools.uneven), point.experts]))

    def _passed(self, gemm: Gemm, variants: Sequence[Variant], operands: Operands) -> list[Variant]:
        """The variants that give the right rows; the others are refused."""
        want_MN = reference(operands)
        passed = []
        for variant in variants:
            name = _name(gemm, variant)
            if name in self.record.refused:
                continue

            def check(variant: Variant = variant) -> str | None:
                return mistake(operands, want_MN, variant, self.tools.run)

            try:
                why = self.record.run(name, check)
            except Exception as error:
                # Whatever a launch raises: the variant is refused, the others go on.
                why = f"does not run: {first_line(error)}"
            if why is None:
                passed.append(variant)
                continue
            self.record.refused[name] = why
            self._check_alive(f"{name}: {why}")
        return passed

    # ---- a point ---------------------------------------------------------------------------------

    def _point(self, point: Point) -> None:
        tools = self.tools
        gemm = point.gemm
        # The group's share of the time may not have sufficed for all of this point's kernels.
        self._compile([point])
        if left := self._uncompiled([point]):
            # The fastest of some is not the fastest: neither a row nor that the rule stands.
            raise OutOfTime(f"{point.label}: {len(left)} kernels are not compiled yet")
        variants = self.variants(point)
        new = [v for v in variants if _name(gemm, v) not in self.checked]
        # Once for each product and variant, for all points that share the product.
        uneven = make_operands(gemm, tools.uneven, tools.device, tools.dtype)
        for variant in self._passed(gemm, new, uneven):
            self.checked.add(_name(gemm, variant))
        # Again at the sizes of the point: some mistakes, such as offsets past 2^31, need many rows.
        operands = make_operands(gemm, [point.rows] * point.experts, tools.device, tools.dtype)
        variants = [v for v in variants if _name(gemm, v) in self.checked]
        passed = self._passed(gemm, variants, operands)
        if not passed:
            raise RuntimeError(
                f"{point.label}: no variant computes it; see 'refused' in {self.record.path}"
            )
        own = self.variants(point)[0]
        first = self._time(operands, passed, tools.repeats[0])
        best = sorted(passed, key=lambda v: first[v][0])[:FINALISTS]
        # The rule's own first: of equals it wins.
        finalists = list(dict.fromkeys([v for v in (own, *best) if v in passed]))
        second = self._time(operands, finalists, tools.repeats[1])
        self.record.points[point.label] = self._outcome(point, own, first, second)

    def _time(
        self, o: Operands, variants: Sequence[Variant], repeats: int
    ) -> dict[Variant, tuple[float, float]]:
        """Median in µs and spread of each: half the distance from the 10th to the 90th percentile,
        relative to the median."""
        calls = {variant_label(v): lambda v=v: self.tools.run(o, v) for v in variants}
        samples = self.tools.timer(calls, repeats)
        found = {}
        for v in variants:
            us = samples[variant_label(v)]
            # Quantiles need two samples; a dry run has one.
            tenths = us
            if len(us) > 1:
                tenths = statistics.quantiles(us, n=10, method="inclusive")
            median = statistics.median(us)
            found[v] = median, (tenths[-1] - tenths[0]) / 2 / median
        return found

    def _outcome(
        self, point: Point, own: Variant, first: dict[Variant, tuple[float, float]],
        second: dict[Variant, tuple[float, float]],
    ) -> dict[str, Any]:  # fmt: skip
        """What the record keeps of a point: its row, if one is worth it, and all times."""
        best = min(second, key=lambda v: second[v][0])
        us, spread = second[best]
        # The rule's own was refused where it has no time; then any other is better.
        rule_us, rule_spread = second.get(own, (None, 0.0))
        spread = max(spread, rule_spread)
        row = None
        if rule_us is None or beats(us, rule_us, spread):
            times = {
                "us": round(us, 2),
                "rule_us": rule_us and round(rule_us, 2),
                "spread": round(spread, 4),
            }
            row = row_of(point, self.tools.dtype, best, times)
        first_us = {}
        for variant, (median, _) in first.items():
            first_us[variant_label(variant)] = round(median, 2)
        second_us = {}
        for variant, (median, width) in second.items():
            second_us[variant_label(variant)] = [round(median, 2), round(width, 4)]
        print(
            f"{point.label}: rule {_text(rule_us)} us, best {us:.1f} us ± {100 * spread:.1f} %"
            f" ({point.flops() / us / 1e6:.0f} TFLOP/s):"
            f" {variant_label(best) if row else 'the rule stands'}",
            flush=True,
        )
        return {
            "row": row,
            "key": key_of(point.gemm.product(self.tools.dtype, point.rows), point.rows),
            "experts": point.experts,
            "rule": variant_label(own),
            "best": variant_label(best),
            "tflops": round(point.flops() / us / 1e6, 1),
            "first_us": first_us,
            "second_us": second_us,
        }

    # ---- a layer ---------------------------------------------------------------------------------

    def _layer(self, spec: Spec) -> None:
        """Time both back ends on one layer, Triton by the table as it is now."""
        os.environ[tuned.ENV_TABLE] = str(self.record.path)
        # A table is read once in a process, and this one has grown since.
        tuned.forget()
        rows = spec.num_rows // spec.experts
        found = self.tools.layer(spec)
        self.record.crossing[spec.label] = {
            "layer": spec.sizes.name,
            "key": layer_key(spec.sizes, self.tools.dtype, 2 * spec.rank),
            "experts": spec.experts,
            "rows_per_expert": rows,
            **found,
        }
        times = (
            f"triton {_text(found['triton_us'])} us, grouped_mm {_text(found['grouped_mm_us'])} us"
        )
        print(f"layer {spec.label}, {rows} rows per expert: {times}", flush=True)


def _name(gemm: Gemm, variant: Variant) -> str:
    return f"{gemm.name}: {variant_label(variant)}"


def _text(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"

"""Judge the measurements of the kernels by their goals, and find from how many rows on torch's
grouped GEMM is faster than Triton."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.compare import Row, faster, find
from benchmarks.expert_case import Spec
from benchmarks.gpu_timing import number, table
from benchmarks.linear_case import PEFT_GB, PEFT_MS, LinearCase, LinearSpec

OURS = ("ours auto", "ours auto, gate+up")
"""One adapter on gate_up, as others have it and the goals suppose; and one each on gate and up, as
megalora trains."""


@dataclass(frozen=True)
class Goal:
    """A limit that must be kept, and a better one that would be good."""

    name: str
    must: float
    good: float
    at_least: bool = False
    """Whether more is better."""


FORWARD = Goal("forward over the base", 1.20, 1.08)
TRAIN = Goal("forward + backward over the base", 1.30, 1.15)
SPLIT = Goal("times faster than split grouped_mm", 1.7, 2.0, at_least=True)
LOOP = Goal("times faster than a loop over experts", 5.0, 7.0, at_least=True)
BASE = Goal("TFLOP/s of the base's GEMM", 550, 550, at_least=True)
CHOICE = Goal("auto over the fastest back end", 1.10, 1.03)
QUACK = Goal("times faster than torch's grouped_mm: quack", 1.10, 1.10, at_least=True)
"""Speed from which on quack is worth being the base behind the same function. There is no verdict
where it is not installed."""
PEFT_TIME = Goal("ms in PEFT's case (2.56 on its H100)", PEFT_MS, PEFT_MS)
PEFT_MEMORY = Goal("GB in PEFT's case", PEFT_GB, PEFT_GB)
PEFT_SPEED = Goal("times faster than PEFT's merge", 1.0, 2.0, at_least=True)
EVERY = (FORWARD, TRAIN, SPLIT, LOOP, BASE, CHOICE, QUACK, PEFT_TIME, PEFT_MEMORY, PEFT_SPEED)


@dataclass(frozen=True)
class Verdict:
    """A goal with the value that was measured; ``miss`` also where none was."""

    goal: str
    case: str
    value: float | None
    must: float
    good: float
    verdict: str

    @classmethod
    def of(cls, goal: Goal, case: str, value: float | None) -> "Verdict":
        return cls(goal.name, case, value, goal.must, goal.good, verdict_of(goal, value))


def verdict_of(goal: Goal, value: float | None) -> str:
    """``good``, ``pass`` or ``miss``."""
    # A goal without a value is missed: a crashed arm must not look like a success.
    if value is None:
        return "miss"
    # Turned round where more is better, so that less is.
    sign = -1 if goal.at_least else 1
    if sign * value <= sign * goal.good:
        return "good"
    if sign * value <= sign * goal.must:
        return "pass"
    return "miss"


def of_layer(spec: Spec, rows: Sequence[Row]) -> list[Verdict]:
    """Verdicts on a layer's case; the goals are for rank 16."""
    if spec.rank != 16:
        return []
    found = []
    for arm in OURS:
        row = find(rows, arm)
        label = spec.label + ("" if arm == OURS[0] else ", gate+up")
        found.append(Verdict.of(FORWARD, label, row and row.ratio_forward))
        found.append(Verdict.of(TRAIN, label, row and row.ratio_train))
    found.append(Verdict.of(SPLIT, spec.label, faster(rows, OURS[0], "split eager")))
    # The goal for the loop supposes this case: with fewer experts it launches fewer kernels.
    if (spec.tokens, spec.experts) == (8192, 128):
        found.append(Verdict.of(LOOP, spec.label, faster(rows, OURS[0], "ours loop")))
    found.append(Verdict.of(CHOICE, spec.label, _over_fastest(rows)))
    return found + of_quack(spec.label, rows)


def of_quack(label: str, rows: Sequence[Row]) -> list[Verdict]:
    """The better of its tiles against torch's GEMM, everything around it being ours in both."""
    speeds = []
    for row in rows:
        if not row.arm.startswith("quack") or row.train is None:
            continue
        speed = faster(rows, row.arm, "ours grouped_mm joined")
        if speed is not None:
            speeds.append(speed)
    # Where quack is not installed there is no arm: that is no miss of ours.
    if not speeds:
        return []
    return [Verdict.of(QUACK, label, max(speeds))]


def _over_fastest(rows: Sequence[Row]) -> float | None:
    """Time of the automatic choice over that of the best back end with the same adapters."""
    largest = None
    for name in ("ours triton", "ours grouped_mm joined", "ours grouped_mm"):
        speed = faster(rows, name, OURS[0])
        if speed is not None:
            largest = speed if largest is None else max(largest, speed)
    return largest


def of_linear(spec: LinearSpec, rows: Sequence[Row]) -> list[Verdict]:
    """Verdicts on the single linear: LoRA's cost with nothing around it, and the base's speed with
    few experts, as under EP 8."""
    row = find(rows, OURS[0])
    found = []
    # The rank that the goals suppose.
    if spec.rank == 16:
        found = [
            Verdict.of(FORWARD, spec.label, row and row.ratio_forward),
            Verdict.of(TRAIN, spec.label, row and row.ratio_train),
            Verdict.of(SPLIT, spec.label, faster(rows, OURS[0], "split eager")),
        ]
    # 128 experts over 8 ranks.
    if spec.experts == 16:
        fastest = None
        for base in rows:
            if base.kind == "base" and base.tflops_forward is not None:
                fastest = max(fastest or 0.0, base.tflops_forward)
        found.append(Verdict.of(BASE, spec.label, fastest))
    return found + of_quack(spec.label, rows)


def of_peft_case(case: LinearCase, rows: Sequence[Row]) -> list[Verdict]:
    """Verdicts against the numbers that PEFT published, and against its method in this run. Memory
    counts the operands too."""
    row = find(rows, OURS[0])
    label = case.spec.label
    milliseconds = None
    if row and row.train:
        milliseconds = row.train.median_ms
    gigabytes = None
    if row and row.peak_bytes is not None:
        # The arm's peak is counted above the operands, which lay on the GPU before it began.
        tensors = (case.w, case.dout, *case.leaves.values())
        operands = sum(t.numel() * t.element_size() for t in tensors)
        gigabytes = (row.peak_bytes + row.room_bytes + operands) / 1e9
    return [
        Verdict.of(PEFT_TIME, label, milliseconds),
        Verdict.of(PEFT_MEMORY, label, gigabytes),
        Verdict.of(PEFT_SPEED, label, faster(rows, OURS[0], "peft merge")),
    ]


def show_verdicts(verdicts: Iterable[Verdict]) -> str:
    """A table of the goals, each with its limits and the verdict."""
    rows = []
    for v in verdicts:
        rows.append((v.goal, v.case, number(v.value), v.must, v.good, v.verdict))
    return table(("goal", "case", "measured", "must", "good", "verdict"), rows)


@dataclass(frozen=True)
class Crossing:
    """Times of forward and backward of one layer by both back ends, at a number of rows for each
    expert."""

    experts: int
    rows: int
    triton_ms: float | None
    grouped_mm_ms: float | None

    @classmethod
    def of(cls, spec: Spec, rows: Sequence[Row]) -> "Crossing":
        times = []
        for name in ("ours triton", "ours grouped_mm joined"):
            row = find(rows, name)
            times.append(row.train.median_ms if row and row.train else None)
        return cls(spec.experts, spec.num_rows // spec.experts, *times)


def vendor_rows(points: Iterable[Crossing]) -> int | None:
    """The fewest rows per expert from which on grouped_mm was never slower; None where Triton won
    even at the most."""
    found = None
    # From the most rows downwards, where grouped_mm is at its best, up to its first defeat.
    for point in sorted(points, key=lambda p: (-p.rows, p.experts)):
        if point.triton_ms is None or point.grouped_mm_ms is None:
            break
        if point.grouped_mm_ms > point.triton_ms:
            break
        found = point.rows
    return found


def show_crossing(points: Sequence[Crossing]) -> str:
    """A table of the points; below it the crossing for each number of experts."""
    lines = []
    by_experts: defaultdict[int, list[Crossing]] = defaultdict(list)
    for p in points:
        lines.append((p.experts, p.rows, number(p.triton_ms), number(p.grouped_mm_ms)))
        by_experts[p.experts].append(p)
    named = []
    for experts, mine in sorted(by_experts.items()):
        named.append(f"{experts} experts: {vendor_rows(mine)}")
    header = ("experts", "rows per expert", "triton ms", "grouped_mm joined ms")
    return (
        table(header, lines)
        + f"\ngrouped_mm from these rows per expert on, by these times: {'; '.join(named)} (None:"
        " Triton throughout)"
    )

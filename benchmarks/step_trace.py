"""Summarise training steps that torch's profiler has recorded: kernels, gaps between them, and
waits of the host.

A trace is the JSON that ``torch.profiler`` exports (Chrome's trace format, times in microseconds).
Only work that was launched inside the annotations ``STEP`` counts, which leaves out the warm-up and
the measuring itself.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "benchmark: step"
UPDATE = "benchmark: update"
"""Names that ``record_function`` gives to a whole step, and inside it to the optimizer's part."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
BACKWARD = "autograd::engine::evaluate_function"
"""Beginning of the name that autograd's engine gives to its work on a node of the graph, on
whichever thread."""
PHASES = ("forward", "backward", "after backward", "update")
"""``after backward`` is work of the thread that called backward, before the update: it reduces
gradients."""
NOTABLE_GAP_US = 10.0
TOP = 10
Gap = tuple[float, str, str]
"""Microseconds, and the names of what ran before and after the gap."""


@dataclass(frozen=True)
class Span:
    """An event of the trace that took time, on a thread of the host or on the device."""

    name: str
    begin: float
    end: float
    category: str
    thread: Any
    correlation: int | None
    """Number that a call of the host shares with the work of the device that it caused."""

    @property
    def us(self) -> float:
        return self.end - self.begin


def read_trace(path: Path) -> list[Span]:
    """Return all events that have a duration.

    Raises:
        ValueError: the file is not a trace.
    """
    spans = []
    try:
        for event in json.loads(path.read_text())["traceEvents"]:
            # "X" is a complete event; others mark instants, arrows and names of threads.
            if event.get("ph") == "X":
                spans.append(_span(event))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a trace of torch's profiler ({error!r})") from None
    return spans


def _span(event: dict[str, Any]) -> Span:
    begin = float(event["ts"])
    correlation = event.get("args", {}).get("correlation")
    end = begin + float(event["dur"])
    return Span(event["name"], begin, end, event.get("cat", ""), event["tid"], correlation)


@dataclass(frozen=True)
class Call:
    """A call of CUDA inside a step, and where it was made."""

    span: Span
    phase: str
    operation: str
    """The innermost operation of torch around it."""


def calls_of(spans: Sequence[Span], step: Span) -> list[Call]:
    """Return the calls of CUDA that were made during a step, on all threads, in their order."""
    by_thread: defaultdict[Any, list[Span]] = defaultdict(list)
    made = []
    for span in spans:
        if span.category in ("cpu_op", "user_annotation"):
            by_thread[span.thread].append(span)
        # Calls between two steps are the measurement's own: it synchronizes there.
        elif span.category in CALLS and step.begin <= span.begin <= step.end:
            made.append(span)
    made.sort(key=lambda span: span.begin)
    around = _spans_around(made, by_thread)
    found = []
    backward_seen = False
    for span in made:
        phase = _phase_within(around[id(span)], backward_seen)
        backward_seen = backward_seen or phase == "backward"
        operation = "none"
        for outer in around[id(span)]:
            # Outermost first, so the last one is the innermost.
            if outer.category == "cpu_op":
                operation = outer.name
        found.append(Call(span, phase, operation))
    return found


def enclosing(spans: Iterable[Span], inner: Sequence[Span]) -> Iterator[list[Span]]:
    """Yield for each of ``inner``, sorted by beginning, the spans of the same thread around it,
    outermost first."""
    # Of two that begin together the longer one is the outer.
    ordered = sorted(spans, key=lambda span: (span.begin, -span.end))
    # Spans that are open at the present moment: on a thread they nest like calls of functions.
    stack: list[Span] = []
    i = 0
    for call in inner:
        # Open all that begin before this call, and close on the way what has ended.
        while i < len(ordered) and ordered[i].begin <= call.begin:
            while stack and stack[-1].end <= ordered[i].begin:
                stack.pop()
            stack.append(ordered[i])
            i += 1
        while stack and stack[-1].end < call.begin:
            stack.pop()
        yield list(stack)


def _spans_around(made: Sequence[Span], by_thread: dict[Any, list[Span]]) -> dict[int, list[Span]]:
    """Return what encloses each call, outermost first, by the ``id`` of its span."""
    calls: defaultdict[Any, list[Span]] = defaultdict(list)
    for call in made:
        calls[call.thread].append(call)
    around = {}
    for thread, mine in calls.items():
        outer = enclosing(by_thread.get(thread, []), mine)
        for call, spans in zip(mine, outer, strict=True):
            around[id(call)] = spans
    return around


def _phase_within(outer: Sequence[Span], backward_seen: bool) -> str:
    """Return which of ``PHASES`` a call enclosed by these spans belongs to.

    Args:
        outer: spans around the call.
        backward_seen: whether an earlier call of this step was made in backward.
    """
    phase = "after backward" if backward_seen else "forward"
    for span in outer:
        # What the update launches is the update's, however deep it is nested.
        if span.name == UPDATE:
            return "update"
        if span.name.startswith(BACKWARD):
            phase = "backward"
    return phase


def analyse(spans: Sequence[Span], layers: int) -> dict[str, Any]:
    """Return what the steps of a trace did, per step.

    Args:
        layers: number of layers of the model; a kernel that runs n times a step runs
            ``n // layers`` times in each of them, and the rest outside.

    Raises:
        ValueError: there is no annotated step.
    """
    steps = [s for s in spans if s.category == "user_annotation" and s.name == STEP]
    if not steps:
        raise ValueError(f"no step is annotated as {STEP!r}")
    # One call may cause several kernels, and a replayed graph many.
    device: defaultdict[int | None, list[Span]] = defaultdict(list)
    for span in spans:
        if span.category in ON_DEVICE:
            device[span.correlation].append(span)
    work: list[tuple[str, Span]] = []
    waits: list[Call] = []
    busy = idle = 0.0
    gaps: list[Gap] = []
    for step in steps:
        mine = []
        for call in calls_of(spans, step):
            for span in device.get(call.span.correlation, []):
                mine.append((call.phase, span))
            if is_wait(call.span.name):
                waits.append(call)
        work += mine
        # Step by step: the time between two steps is not a gap of either.
        covered, between = busy_and_gaps([span for _, span in mine])
        busy += covered
        for us, _, _ in between:
            idle += us
        gaps += between
    count = len(steps)
    return {
        "steps": count,
        "layers": layers,
        "host_us": sum(step.us for step in steps) / count,
        "phases": {phase: _phase(work, phase, count, layers) for phase in PHASES},
        "kernels": _kernels(work, count, layers),
        "copies": _copies(work, count),
        "busy_us": busy / count,
        "idle_us": idle / count,
        "idle_share": idle / (busy + idle) if busy + idle else None,
        **_notable(gaps, count),
        "waits": _waits(waits, count),
    }


def is_wait(name: str) -> bool:
    """Whether the host waits for the device in this call."""
    # cudaStreamSynchronize, cudaDeviceSynchronize, cudaEventSynchronize; and copies that are not
    # asynchronous.
    return name.endswith("Synchronize") or name in ("cudaMemcpy", "cudaMemset", "cuMemcpyDtoH_v2")


def _notable(gaps: list[Gap], steps: int) -> dict[str, Any]:
    """Return the number of gaps that are worth a look, and the largest ones of all steps."""
    notable = 0
    for us, _, _ in gaps:
        # Launching a kernel takes the host several microseconds: shorter gaps are ordinary.
        notable += us >= NOTABLE_GAP_US
    largest = []
    for us, after, before in sorted(gaps, reverse=True)[:TOP]:
        largest.append({"us": us, "after": after, "before": before})
    return {"notable_gaps": notable / steps, "largest_gaps": largest}


def busy_and_gaps(spans: Sequence[Span]) -> tuple[float, list[Gap]]:
    """Return how long the device was busy, with overlapping work counted once, and each gap."""
    if not spans:
        return 0.0, []
    ordered = sorted(spans, key=lambda span: span.begin)
    # The span that ends last so far: not always the latest to begin, as streams overlap.
    last = ordered[0]
    busy = last.us
    gaps = []
    for span in ordered[1:]:
        if span.begin > last.end:
            gaps.append((span.begin - last.end, last.name, span.name))
        # Only what lies beyond the end so far is new.
        busy += max(0.0, span.end - max(span.begin, last.end))
        if span.end > last.end:
            last = span
    return busy, gaps


def _phase(
    work: Sequence[tuple[str, Span]], phase: str, steps: int, layers: int
) -> dict[str, float]:
    """Kernels of a phase: their number, their number in each layer, and their time."""
    names: Counter[str] = Counter()
    us = 0.0
    for of, span in work:
        if of == phase and span.category == "kernel":
            names[span.name] += 1
            us += span.us
    # By name, rounded down: a kernel outside the layers (embedding, loss) runs once or twice a
    # step, which is less than once per layer.
    per_layer = 0
    for num_launches in names.values():
        per_layer += num_launches // steps // layers
    return {"count": names.total() / steps, "per_layer": per_layer, "us": us / steps}


def _kernels(work: Sequence[tuple[str, Span]], steps: int, layers: int) -> list[dict[str, Any]]:
    """Kernels by name and phase, the longest in sum first."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for phase, span in work:
        if span.category == "kernel":
            found[span.name, phase].append(span.us)
    whole = sum(map(sum, found.values()))
    rows = []
    for (name, phase), times in found.items():
        row = {
            "name": name,
            "phase": phase,
            "count": len(times) / steps,
            "per_layer": len(times) // steps // layers,
            "us": sum(times) / steps,
            "share": sum(times) / whole if whole else 0.0,
        }
        rows.append(row)
    return sorted(rows, key=lambda row: -row["us"])


def _copies(work: Sequence[tuple[str, Span]], steps: int) -> dict[str, dict[str, float]]:
    """Copies and fills by their names, with number and time."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _, span in work:
        if span.category != "kernel":
            found[span.name].append(span.us)
    copies = {}
    for name, times in found.items():
        copies[name] = {"count": len(times) / steps, "us": sum(times) / steps}
    return copies


def _waits(waits: Sequence[Call], steps: int) -> dict[str, dict[str, Any]]:
    """Waits by call, with the operations of torch that made them."""
    by_name: defaultdict[str, list[Call]] = defaultdict(list)
    for wait in waits:
        by_name[wait.span.name].append(wait)
    found: dict[str, dict[str, Any]] = {}
    for name, mine in sorted(by_name.items()):
        us = 0.0
        operations: Counter[str] = Counter()
        for wait in mine:
            us += wait.span.us
            operations[f"{wait.phase}: {wait.operation}"] += 1
        found[name] = {"count": len(mine) / steps, "us": us / steps, "in": dict(operations)}
    return found

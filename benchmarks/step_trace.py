"""Read what torch's profiler recorded of training steps: kernels, gaps between them, and waits of
the host.

A trace is the JSON that ``torch.profiler`` exports (Chrome's trace format, times in microseconds).
Of it only what was asked for inside the annotations ``STEP`` counts, so that neither warming up nor
the measuring itself is seen.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "benchmark: step"
UPDATE = "benchmark: update"
"""``record_function`` around a whole step, and inside it around the optimizer's part."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
BACKWARD = "autograd::engine::evaluate_function"
"""How autograd's engine names its work on a node of the graph, on whichever thread."""
PHASES = ("forward", "backward", "after backward", "update")
"""``after backward``: on the thread that called it, before the update; this reduces gradients."""
NOTABLE_GAP_US = 10.0
TOP = 10


@dataclass(frozen=True)
class Span:
    """Something that took time, on a thread of the host or on the device."""

    name: str
    begin: float
    end: float
    category: str
    thread: Any
    correlation: int | None
    """The same for a call of the host and for what the device did because of it."""

    @property
    def us(self) -> float:
        return self.end - self.begin


def read_trace(path: Path) -> list[Span]:
    """Return all that has a duration. Raises ``ValueError`` where the file is no trace."""
    try:
        events = json.loads(path.read_text())["traceEvents"]
        return [_span(event) for event in events if event.get("ph") == "X"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a trace of torch's profiler ({error!r})") from None


def _span(event: dict[str, Any]) -> Span:
    begin = float(event["ts"])
    correlation = event.get("args", {}).get("correlation")
    end = begin + float(event["dur"])
    return Span(event["name"], begin, end, event.get("cat", ""), event["tid"], correlation)


@dataclass(frozen=True)
class Call:
    """A call of CUDA inside a step: where it was made."""

    span: Span
    phase: str
    operation: str
    """The innermost operation of torch around it."""


def calls_of(spans: Sequence[Span], step: Span) -> list[Call]:
    """Return the calls of CUDA that were made during a step, on all threads, in their order."""
    by_thread: defaultdict[Any, list[Span]] = defaultdict(list)
    for span in spans:
        if span.category in ("cpu_op", "user_annotation"):
            by_thread[span.thread].append(span)
    made = sorted(
        (s for s in spans if s.category in CALLS and step.begin <= s.begin <= step.end),
        key=lambda span: span.begin,
    )
    around = {}
    for thread in {span.thread for span in made}:
        mine = [span for span in made if span.thread == thread]
        around |= dict(zip(map(id, mine), enclosing(by_thread[thread], mine), strict=True))
    found = []
    backward_seen = False
    for span in made:
        names = [outer.name for outer in around[id(span)]]
        if UPDATE in names:
            phase = "update"
        elif any(name.startswith(BACKWARD) for name in names):
            phase = "backward"
            backward_seen = True
        else:
            phase = "after backward" if backward_seen else "forward"
        operations = [outer.name for outer in around[id(span)] if outer.category == "cpu_op"]
        found.append(Call(span, phase, operations[-1] if operations else "none"))
    return found


def enclosing(spans: Iterable[Span], inner: Sequence[Span]) -> Iterator[list[Span]]:
    """Yield for each of ``inner``, sorted by beginning, the spans of the same thread around it,
    outermost first."""
    ordered = sorted(spans, key=lambda span: (span.begin, -span.end))
    stack: list[Span] = []
    i = 0
    for call in inner:
        while i < len(ordered) and ordered[i].begin <= call.begin:
            while stack and stack[-1].end <= ordered[i].begin:
                stack.pop()
            stack.append(ordered[i])
            i += 1
        while stack and stack[-1].end < call.begin:
            stack.pop()
        yield list(stack)


def analyse(spans: Sequence[Span], layers: int) -> dict[str, Any]:
    """Return what the steps of a trace did, per step.

    Args:
        layers: of the model; a kernel that runs n times a step runs ``n // layers`` times in each,
        the rest outside.

    Raises:
        ValueError: there is no annotated step.
    """
    steps = [s for s in spans if s.category == "user_annotation" and s.name == STEP]
    if not steps:
        raise ValueError(f"no step is annotated as {STEP!r}")
    device: defaultdict[int | None, list[Span]] = defaultdict(list)
    for span in spans:
        if span.category in ON_DEVICE:
            device[span.correlation].append(span)
    work: list[tuple[str, Span]] = []
    waits: list[Call] = []
    busy = idle = 0.0
    gaps: list[tuple[float, str, str]] = []
    for step in steps:
        mine = []
        for call in calls_of(spans, step):
            mine += [(call.phase, span) for span in device.get(call.span.correlation, [])]
            if is_wait(call.span.name):
                waits.append(call)
        work += mine
        covered, between = busy_and_gaps([span for _, span in mine])
        busy += covered
        idle += sum(us for us, *_ in between)
        gaps += between
    count = len(steps)
    return {
        "steps": count, "layers": layers, "host_us": sum(step.us for step in steps) / count,
        "phases": {phase: _phase(work, phase, count, layers) for phase in PHASES},
        "kernels": _kernels(work, count, layers), "copies": _copies(work, count),
        "busy_us": busy / count, "idle_us": idle / count,
        "idle_share": idle / (busy + idle) if busy + idle else None,
        "notable_gaps": sum(us >= NOTABLE_GAP_US for us, *_ in gaps) / count,
        "largest_gaps": [
            {"us": us, "after": after, "before": before} for us, after,
            before in sorted(gaps, reverse=True)[:TOP]
        ],
        "waits": _waits(waits, count),
    }  # fmt: skip


def is_wait(name: str) -> bool:
    """Whether the host stands still in this call until the device has got somewhere."""
    return name.endswith("Synchronize") or name in ("cudaMemcpy", "cudaMemset", "cuMemcpyDtoH_v2")


def busy_and_gaps(spans: Sequence[Span]) -> tuple[float, list[tuple[float, str, str]]]:
    """Return how long the device did anything, overlapping work counted once; and (us, after,
    before) of each gap."""
    if not spans:
        return 0.0, []
    ordered = sorted(spans, key=lambda span: span.begin)
    last = ordered[0]
    busy = last.us
    gaps = []
    for span in ordered[1:]:
        if span.begin > last.end:
            gaps.append((span.begin - last.end, last.name, span.name))
        busy += max(0.0, span.end - max(span.begin, last.end))
        if span.end > last.end:
            last = span
    return busy, gaps


def _phase(
    work: Sequence[tuple[str, Span]], phase: str, steps: int, layers: int
) -> dict[str, float]:
    """Kernels of a phase: how many, how many of them in each layer, and their time."""
    names = Counter(span.name for of, span in work if of == phase and span.category == "kernel")
    us = sum(span.us for of, span in work if of == phase and span.category == "kernel")
    per_layer = sum(n // steps // layers for n in names.values())
    return {"count": names.total() / steps, "per_layer": per_layer, "us": us / steps}


def _kernels(work: Sequence[tuple[str, Span]], steps: int, layers: int) -> list[dict[str, Any]]:
    """Kernels by name and phase, the longest in sum first."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for phase, span in work:
        if span.category == "kernel":
            found[span.name, phase].append(span.us)
    whole = sum(map(sum, found.values()))
    rows = [
        {
            "name": name, "phase": phase, "count": len(times) / steps,
            "per_layer": len(times) // steps // layers,
            "us": sum(times) / steps, "share": sum(times) / whole if whole else 0.0,
        }
        for (name, phase), times in found.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["us"])


def _copies(work: Sequence[tuple[str, Span]], steps: int) -> dict[str, dict[str, float]]:
    """Copies and fills by kind."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _, span in work:
        if span.category != "kernel":
            found[span.name].append(span.us)
    return {name: {"count": len(us) / steps, "us": sum(us) / steps} for name, us in found.items()}


def _waits(waits: Sequence[Call], steps: int) -> dict[str, dict[str, Any]]:
    """Waits by call, with the operations of torch that made them."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({wait.span.name for wait in waits}):
        mine = [wait for wait in waits if wait.span.name == name]
        us = sum(wait.span.us for wait in mine) / steps
        operations = dict(Counter(f"{wait.phase}: {wait.operation}" for wait in mine))
        found[name] = {"count": len(mine) / steps, "us": us, "in": operations}
    return found

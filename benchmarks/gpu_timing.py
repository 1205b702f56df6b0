"""Time calls on a GPU, and write the record that goes with the times. This needs torch alone, so it
runs where Megatron is not installed.

To take a sample, the L2 cache is emptied, the host runs ahead of the device, and two events stand
around the call. Calls are interleaved, and their order is reversed every other round, so that the
clocks and other users of the machine affect all of them alike.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from megalora.versions import commit, installed

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "megatron-core",
    "megatron-bridge",
    "unsloth",
    "numpy",
)
FLUSH_BYTES = 256 * 2**20
"""Five times the L2 of an H100 (50 MB), four times that of an H200 (60 MB)."""
HEAD_START_CYCLES = 2_000_000
"""Clock cycles for which the device sleeps before a call, about a millisecond. In a training step
the host is layers ahead of the device; so it is here, if no call waits."""
STARTED = "MEGALORA_BENCHMARK_STARTED"
"""Variable with the time at which gpu_all.sh started this script, in seconds of the clock."""
FRESH = timedelta(hours=12)
"""Age up to which a record is continued."""
NEEDS_GPU = "needs a CUDA device; what it computes is tested on a CPU by tests/test_benchmarks.py"


@dataclass(frozen=True)
class Stats:
    """Milliseconds over the samples of one call."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    host_ms: float
    """Median of the host's time to issue the call, with its wait where the call waits."""

    @classmethod
    def of(cls, samples_ms: Sequence[float], host_ms: Sequence[float]) -> "Stats":
        # Tenths, not the extremes: one interrupt of the host must not widen the range.
        tenths = samples_ms
        if len(samples_ms) > 1:  # a dry run takes one
            tenths = statistics.quantiles(samples_ms, n=10, method="inclusive")
        return cls(statistics.median(samples_ms), tenths[0], tenths[-1], statistics.median(host_ms))

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} [{self.p10_ms:.3f}, {self.p90_ms:.3f}]"


class _Watch(Protocol):
    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        """(milliseconds of the call, milliseconds of the host)."""
        ...


class _CudaWatch:
    """Times calls by events on the device's stream."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self.sleep: Callable[[int], None] | None = getattr(torch.cuda, "_sleep", None)

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # The device sleeps while the host issues the call, so that launching is not what is timed.
        if self.sleep is not None:
            self.sleep(HEAD_START_CYCLES)
        # Written after the sleep, right before the call: its weights come from HBM, as in a step.
        self.flush.zero_()
        start.record()
        before = time.perf_counter()
        result = call()
        host_ms = 1e3 * (time.perf_counter() - before)
        end.record()
        torch.cuda.synchronize()
        # Kept until here: to free memory may take the host as long as a launch.
        del result
        return start.elapsed_time(end), host_ms


class _HostWatch:
    """Times calls by the host's clock: for tests of the scripts on a CPU."""

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        before = time.perf_counter()
        call()
        ms = 1e3 * (time.perf_counter() - before)
        return ms, ms


def measure(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int = 20,
    warmup: int = 3,
) -> dict[str, Stats]:
    """Time every call ``repeats`` times, interleaved, after ``warmup`` rounds that do not count."""
    samples = sample(calls, device, repeats, warmup)
    stats = {}
    for name, pairs in samples.items():
        device_ms, host_ms = zip(*pairs, strict=True)
        stats[name] = Stats.of(device_ms, host_ms)
    return stats


def sample(
    calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int
) -> dict[str, list[tuple[float, float]]]:
    """As ``measure``, but every sample: (milliseconds of the call, milliseconds of the host)."""
    watch: _Watch = _CudaWatch(device) if device.type == "cuda" else _HostWatch()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        # Reversed every other round, so that no call always follows the same one.
        direction = 1 if i % 2 == 0 else -1
        for name in list(calls)[::direction]:
            taken = watch.time(calls[name])
            if i >= warmup:
                samples[name].append(taken)
    return samples


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Largest device memory that a call has at once, beyond what was allocated before it; None on a
    CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # The result counts too: it lives when the peak may be reached.
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


class Budget:
    """Seconds that a script may take from its start, which gpu_all.sh has noted; else from now.

    Importing torch and Megatron takes up to 15 seconds, which pass before a script can make a
    budget.
    """

    def __init__(self, seconds: float | None) -> None:
        # Without a noted start it is taken to be infinitely late, so that no time is gone.
        gone = max(0.0, time.time() - float(os.environ.get(STARTED, "inf")))
        self.end = None if seconds is None else time.monotonic() + seconds - gone

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()

    def part(self, share: float) -> "Budget":
        """Return a budget that ends when this share of the time left now has passed."""
        part = Budget(None)
        if self.end is not None:
            part.end = time.monotonic() + share * self.left()
        return part


def the_gpu(parser: argparse.ArgumentParser, dry: bool = False) -> torch.device:
    """Return the device to measure on, the CPU in a dry run; leave with one line and exit code 2
    where there is no GPU."""
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: {NEEDS_GPU}\n")
    return torch.device("cuda", torch.cuda.current_device())


def environment(device: torch.device) -> dict[str, Any]:
    """Where a number was measured. Null: not installed, or not known here."""
    versions = {package: installed(package) for package in PACKAGES}
    # With the build, such as +cu128, which the package's metadata may leave out.
    versions["torch"] = torch.__version__
    found: dict[str, Any] = {
        "device": f"CPU ({platform.machine()})",
        "versions": versions,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        l2_bytes = getattr(card, "L2_cache_size", None)
        found |= {
            "device": card.name,
            "processors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
        }
        found |= {
            "l2_bytes": l2_bytes,
            "capability": list(torch.cuda.get_device_capability(device)),
        }
    return found


def save(path: Path, benchmark: str, device: torch.device, **content: Any) -> None:
    """Write the record as JSON, whole or not at all: a run may be cut off at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"benchmark": benchmark, "when": when, **environment(device), **content}
    # Renaming is atomic; a write that is cut off would leave half a record.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def earlier(
    path: Path, benchmark: str, device: torch.device, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the record that an earlier call left at ``path`` for a second one to continue; None
    where there is none.

    A record of another device, other versions, another commit, other settings or another day is not
    continued: the call begins anew and says so. ``settings`` are those that were given to ``save``
    under that name.

    Raises:
        ValueError: the file is no record of this benchmark, so it must not be overwritten.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); move it away, or name another --out"
        ) from None
    found = record.get("benchmark") if isinstance(record, dict) else None
    if found != benchmark:
        raise ValueError(
            f"{path} is a record of {found!r}, not of {benchmark!r}; name another --out"
        )
    # As JSON has them: tuples have become lists.
    now = json.loads(json.dumps({**environment(device), "settings": settings}))
    other = [name for name, value in now.items() if record.get(name) != value]
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(record["when"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} does not say when it was measured ({error!r}); move it away"
        ) from None
    # A checkout without git has no commit to tell its code from another day's.
    if age > FRESH:
        other.append(f"day ({record['when']})")
    if other:
        print(f"{path} was measured with another {', '.join(other)}: beginning anew", flush=True)
        return None
    return record


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their widest cell; the first is aligned left, the others right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    # Turned round, rows become columns.
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            padded.append(cell.rjust(width))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """A cell of a table: the number rounded, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def first_line(error: BaseException) -> str:
    """An exception as a cell of a table: its type and the first line of its message."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:200]

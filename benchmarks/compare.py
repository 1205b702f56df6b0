"""Arms of one case side by side: correct first, then ours the same bits and no waiting, then times
and memory."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.arms import Arm, Build
from benchmarks.expert_case import Tensors, relative_errors, wrong
from benchmarks.gpu_timing import Stats, first_line, measure, number, peak_bytes, table

GIB = 2**30


@dataclass
class Row:
    """What was found about one arm of one case. No times unless ``status`` is ``ok``."""

    case: str
    arm: str
    kind: str
    status: str = "ok"
    failed: bool = False
    """Whether the exit code must say so: a wrong result of anyone, or ours not doing what it
    promises."""
    errors: dict[str, float | None] = field(default_factory=dict)
    """Relative to float32; null where there was no number."""
    forward: Stats | None = None
    train: Stats | None = None
    """Forward and backward."""
    peak_bytes: int | None = None
    """Of forward and backward, on top of the operands."""
    room_bytes: int = 0
    """Of weights with room for adapters, beyond the weights themselves."""
    ratio_forward: float | None = None
    ratio_train: float | None = None
    """To the fastest of our bases in this case."""
    tflops_forward: float | None = None
    tflops_train: float | None = None
    """Of the base's GEMMs alone."""


def compare(
    label: str, ours: Mapping[str, Build], theirs: Mapping[str, Build],
    references: Callable[[], dict[str, Tensors]],
    base_flops: int, device: torch.device, dtype: torch.dtype, repeats: int = 20, warmup: int = 3,
) -> list[Row]:  # fmt: skip
    """One row per arm. ``references`` computes ``adapted`` and ``base``; they are let go before
    anything is timed."""
    want = references()
    rows = []
    arms = {}
    for builders, kind in ((ours, "ours"), (theirs, "theirs")):
        for name, build in builders.items():
            row = Row(label, name, kind)
            rows.append(row)
            arm = _examine(row, build, want, device, dtype)
            if arm is not None:
                arms[name] = (row, arm)
    del want
    calls: dict[str, Callable[[], Any]] = {}
    for name, (row, arm) in arms.items():
        row.peak_bytes = peak_bytes(arm.train, device)
        calls |= {f"{name}/forward": arm.forward, f"{name}/train": arm.train}
    stats = measure(calls, device, repeats, warmup)
    for name, (row, _) in arms.items():
        row.forward = stats[f"{name}/forward"]
        row.train = stats[f"{name}/train"]
    derive(rows, base_flops)
    return rows


def _examine(
    row: Row, build: Build, want: dict[str, Tensors], device: torch.device, dtype: torch.dtype
) -> Arm | None:
    """The arm, if what it gives is right. One that cannot run is a row that says why."""
    try:
        arm = build()
        row.kind = arm.kind
        row.room_bytes = arm.room_bytes
        found = arm.train()
        if arm.gives is not None:
            errors = relative_errors(arm.common(found), want[arm.gives])
            row.errors = {
                name: error if math.isfinite(error) else None for name, error in errors.items()
            }
            if problem := wrong(errors, dtype):
                row.status = f"wrong: {problem}"
                row.failed = True
        if row.status == "ok" and arm.kind in ("ours", "base"):
            _check_promises(row, arm, found, device)
        return arm if row.status == "ok" else None
    except torch.OutOfMemoryError:
        row.status = "out of memory"
    except ModuleNotFoundError as error:
        row.status = f"not installed: {error.name}"
        row.failed = row.kind in ("ours", "base")
    except (
        Exception
    ) as error:  # whatever a compiler or another library raises belongs into the table
        row.status = f"cannot run: {first_line(error)}"
        row.failed = row.kind in ("ours", "base")
    return None


def _check_promises(row: Row, arm: Arm, found: Tensors, device: torch.device) -> None:
    """The same bits on every run, and no wait for the device."""
    again = arm.train()
    if different := [name for name, t in found.items() if not torch.equal(t, again[name])]:
        row.status = f"wrong: other bits in a second run of {', '.join(different)}"
        row.failed = True
    elif device.type == "cuda" and not arm.waits and (problem := waiting(arm.train)):
        row.status = f"wrong: waits for the device ({problem})"
        row.failed = True


def waiting(call: Callable[[], object]) -> str | None:
    """How a call that was run before waits for the device, or None."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def derive(rows: Sequence[Row], base_flops: int) -> None:
    """Ratios and TFLOP/s from the medians; forward and backward hold twice the base's GEMMs of
    forward alone."""
    timed = [row for row in rows if row.forward and row.train]
    bases = [row for row in timed if row.kind == "base"]
    for row in timed:
        assert row.forward and row.train
        row.tflops_forward = base_flops / row.forward.median_ms / 1e9
        row.tflops_train = 2 * base_flops / row.train.median_ms / 1e9
        if bases:
            row.ratio_forward = row.forward.median_ms / min(
                b.forward.median_ms for b in bases if b.forward
            )
            row.ratio_train = row.train.median_ms / min(b.train.median_ms for b in bases if b.train)


def find(rows: Iterable[Row], arm: str) -> Row | None:
    """The arm's row, if it was timed."""
    return next((row for row in rows if row.arm == arm and row.train is not None), None)


def faster(rows: Sequence[Row], arm: str, than: str) -> float | None:
    """How many times faster forward and backward of an arm are than another's."""
    one = find(rows, arm)
    other = find(rows, than)
    return (
        other.train.median_ms / one.train.median_ms
        if one and other and one.train and other.train
        else None
    )


def show(rows: Sequence[Row]) -> str:
    """A table of one case; below it why an arm has no times."""
    header = ("arm", "fwd ms [p10, p90]", "fwd+bwd ms [p10, p90]", "host ms", "ratio fwd",
              "ratio f+b",
              "TFLOP/s fwd", "f+b", "vs split", "peak GiB", "room GiB", "worst error")  # fmt: skip
    lines = []
    for row in rows:
        if row.forward and row.train:
            split = faster(rows, row.arm, "split eager")
            worst = max((e for e in row.errors.values() if e is not None), default=None)
            memory = [
                number(b / GIB if b is not None else None, 2)
                for b in (row.peak_bytes, row.room_bytes)
            ]
            rates = [number(value, 0) for value in (row.tflops_forward, row.tflops_train)]
            error = "-" if worst is None else f"{worst:.1e}"
            ratios = [number(row.ratio_forward), number(row.ratio_train)]
            host = number(row.train.host_ms)
            lines.append(
                (
                    row.arm,
                    row.forward,
                    row.train,
                    host,
                    *ratios,
                    *rates,
                    number(split, 2),
                    *memory,
                    error,
                )
            )
    without = [f"  {row.arm}: {row.status}" for row in rows if row.train is None]
    return "\n".join([rows[0].case if rows else "", table(header, lines), *without])


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]

"""Compare the arms of one case: check their results, check that ours give the same bits in every
run and do not wait, then take times and memory."""

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
    """Findings about one arm of one case. It has times only where ``status`` is ``ok``."""

    case: str
    arm: str
    kind: str
    status: str = "ok"
    failed: bool = False
    """Whether the exit code must be 1: a result of any arm was wrong, or ours breaks a promise."""
    errors: dict[str, float | None] = field(default_factory=dict)
    """Deviation of each tensor from float32, relative; null where it was no number."""
    forward: Stats | None = None
    train: Stats | None = None
    """Times of forward and backward."""
    peak_bytes: int | None = None
    """Memory of forward and backward at its highest, on top of the operands."""
    room_bytes: int = 0
    """Bytes that weights with room for adapters take beyond the weights themselves."""
    ratio_forward: float | None = None
    ratio_train: float | None = None
    """Time over that of the fastest of our bases in this case."""
    tflops_forward: float | None = None
    tflops_train: float | None = None
    """Rate that counts the base's GEMMs alone."""


def compare(
    label: str, ours: Mapping[str, Build], theirs: Mapping[str, Build],
    references: Callable[[], dict[str, Tensors]],
    base_flops: int, device: torch.device, dtype: torch.dtype, repeats: int = 20, warmup: int = 3,
) -> list[Row]:  # fmt: skip
    """One row per arm. ``references`` computes ``adapted`` and ``base``, which are freed before
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
    # The references in float32 are twice as large as an arm's own results, and would leave it less
    # memory.
    del want
    calls: dict[str, Callable[[], Any]] = {}
    for name, (row, arm) in arms.items():
        row.peak_bytes = peak_bytes(arm.train, device)
        calls |= {f"{name}/forward": arm.forward, f"{name}/train": arm.train}
    # All arms in turns, not one after another: clocks fall as the GPU warms up.
    stats = measure(calls, device, repeats, warmup)
    for name, (row, _) in arms.items():
        row.forward = stats[f"{name}/forward"]
        row.train = stats[f"{name}/train"]
    derive(rows, base_flops)
    return rows


def _examine(
    row: Row, build: Build, want: dict[str, Tensors], device: torch.device, dtype: torch.dtype
) -> Arm | None:
    """The arm if its results are right, else None; its row says why."""
    try:
        arm = build()
        row.kind = arm.kind
        row.room_bytes = arm.room_bytes
        found = arm.train()
        if arm.gives is not None:
            errors = relative_errors(arm.common(found), want[arm.gives])
            for name, error in errors.items():
                # JSON has no NaN.
                row.errors[name] = error if math.isfinite(error) else None
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
    except Exception as error:
        # Whatever a compiler or another library raises belongs in the table.
        row.status = f"cannot run: {first_line(error)}"
        row.failed = row.kind in ("ours", "base")
    return None


def _check_promises(row: Row, arm: Arm, found: Tensors, device: torch.device) -> None:
    """Note in the row where an arm of ours gives other bits in a second run, or waits for the
    device."""
    again = arm.train()
    different = [name for name, t in found.items() if not torch.equal(t, again[name])]
    # The first call may wait (it compiles and tunes), so the second one is watched.
    if different:
        row.status = f"wrong: other bits in a second run of {', '.join(different)}"
        row.failed = True
    elif device.type == "cuda" and not arm.waits and (problem := waiting(arm.train)):
        row.status = f"wrong: waits for the device ({problem})"
        row.failed = True


def waiting(call: Callable[[], object]) -> str | None:
    """How a call that was run before waits for the device, or None."""
    torch.cuda.synchronize()
    # In this mode torch raises where it would make the host wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def derive(rows: Sequence[Row], base_flops: int) -> None:
    """Fill in ratios and TFLOP/s from the medians. Forward and backward together have twice the
    base's GEMMs of forward alone, since frozen weights get no gradient."""
    # The fastest of our bases, separately for forward and for both: adapters are to cost little
    # over the best that the same layer does without them. Infinite where no base was timed.
    base_forward_ms = math.inf
    base_train_ms = math.inf
    for row in rows:
        if row.kind == "base" and row.forward and row.train:
            base_forward_ms = min(base_forward_ms, row.forward.median_ms)
            base_train_ms = min(base_train_ms, row.train.median_ms)
    for row in rows:
        if row.forward is None or row.train is None:
            continue
        # FLOPs per millisecond are 1e-9 TFLOP/s.
        row.tflops_forward = base_flops / row.forward.median_ms / 1e9
        row.tflops_train = 2 * base_flops / row.train.median_ms / 1e9
        if base_train_ms < math.inf:
            row.ratio_forward = row.forward.median_ms / base_forward_ms
            row.ratio_train = row.train.median_ms / base_train_ms


def find(rows: Iterable[Row], arm: str) -> Row | None:
    """The arm's row, if it was timed."""
    for row in rows:
        if row.arm == arm and row.train is not None:
            return row
    return None


def faster(rows: Sequence[Row], arm: str, than: str) -> float | None:
    """How many times faster forward and backward of an arm are than another's."""
    one = find(rows, arm)
    other = find(rows, than)
    if one is None or other is None or one.train is None or other.train is None:
        return None
    return other.train.median_ms / one.train.median_ms


def show(rows: Sequence[Row]) -> str:
    """A table of one case; below it why an arm has no times."""
    header = ("arm", "fwd ms [p10, p90]", "fwd+bwd ms [p10, p90]", "host ms", "ratio fwd",
              "ratio f+b",
              "TFLOP/s fwd", "f+b", "vs split", "peak GiB", "room GiB", "worst error")  # fmt: skip
    lines = []
    without = []
    for row in rows:
        if row.train is None:
            without.append(f"  {row.arm}: {row.status}")
        elif row.forward:
            split = faster(rows, row.arm, "split eager")
            errors = [error for error in row.errors.values() if error is not None]
            peak = None if row.peak_bytes is None else row.peak_bytes / GIB
            cells = (
                row.arm,
                row.forward,
                row.train,
                number(row.train.host_ms),
                number(row.ratio_forward),
                number(row.ratio_train),
                number(row.tflops_forward, 0),
                number(row.tflops_train, 0),
                number(split, 2),
                number(peak, 2),
                number(row.room_bytes / GIB, 2),
                # A bound computes something else, so it has no reference and no error.
                f"{max(errors):.1e}" if errors else "-",
            )
            lines.append(cells)
    return "\n".join([rows[0].case if rows else "", table(header, lines), *without])


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]

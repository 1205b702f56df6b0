"""Run the sweep in this process, on its GPU or dry on its CPU; ``tune.py`` starts it, and starts it
again where a variant ended it."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megalora_kernels import tuned
from megalora_kernels.variants import Product, Variant, device_limits, rule

from benchmarks.arms import ours_separate
from benchmarks.compare import compare
from benchmarks.expert_case import Spec, make_case, reference
from benchmarks.gpu_timing import Stats, sample, table
from benchmarks.tune import DEAD_DEVICE, HUNG, MISTAKE
from benchmarks.tune_compile import Job, compile_all
from benchmarks.tune_points import UNEVEN, UNEVEN_DRY, dry_groups, groups
from benchmarks.tune_record import MEANINGLESS, Record
from benchmarks.tune_sweep import DeadDevice, Sweep, Tools

HANG_SECONDS = 30
"""Seconds after which a variant in its check is taken to wait for something that never comes."""
LAYER_REPEATS = 10


def timer_on(device: torch.device) -> Callable[..., dict[str, list[float]]]:
    """Times on a device: L2 emptied before each, the host ahead, one round of warming up."""

    def timer(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        found = sample(calls, device, repeats, warmup=1)
        us = {}
        for name, pairs in found.items():
            # The device's time alone: here the host launches one kernel, whichever variant it is.
            us[name] = [1e3 * ms for ms, _host_ms in pairs]
        return us

    return timer


def compiler_for(capability: tuple[int, int]) -> Callable[..., dict[Job, str | None]]:
    """Compiles for the GPU that this process has, on all of its cores but two."""

    def compiler(jobs: Sequence[Job], seconds: float) -> dict[Job, str | None]:
        # 90 for compute capability 9.0.
        sm = 10 * capability[0] + capability[1]
        command = [sys.executable, "-m", "benchmarks.tune_compile", str(sm)]
        # Two cores stay free: for this process and the driver.
        num_workers = max(1, (os.cpu_count() or 1) - 2)
        return compile_all(jobs, command, num_workers, seconds)

    return compiler


def time_layer(
    spec: Spec, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Time forward and backward of a layer with an adapter on each projection, by both back ends,
    after a check of their results."""
    case = make_case(spec, device, dtype)
    # Triton reads adapters beside the weights; torch's GEMM needs them in one tensor, [W | B], with
    # room for the two stacked ranks of gate_up.
    builds = {
        "triton": lambda: ours_separate(case, "triton", (case.w1, case.w2)),
        "grouped_mm": lambda: ours_separate(case, "grouped_mm", case.joined(2 * spec.rank)),
    }
    rows = compare(
        spec.label,
        builds,
        {},
        lambda: {"adapted": reference(case, True)},
        spec.base_flops(),
        device,
        dtype,
        repeats,
    )
    found: dict[str, Any] = {}
    spread = 0.0
    problems = []
    for row in rows:
        found[f"{row.arm}_us"] = None
        if row.train:
            found[f"{row.arm}_us"] = round(1e3 * row.train.median_ms, 2)
            # The noisier of the two decides how much faster one has to be.
            spread = max(spread, _spread(row.train))
        if row.status != "ok":
            problems.append(f"{row.arm}: {row.status}")
    return found | {"spread": spread, "problems": problems}


def _spread(stats: Stats) -> float:
    """Half the distance from the 10th to the 90th percentile, relative to the median."""
    return round((stats.p90_ms - stats.p10_ms) / 2 / stats.median_ms, 4)


def gpu_tools() -> Tools:
    """Tools for the GPU of this process, in bfloat16."""
    device = torch.device("cuda", torch.cuda.current_device())

    def alive() -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            # After an access out of bounds every call of this process fails.
            return False
        return True

    return Tools(
        device=device, dtype=torch.bfloat16, timer=timer_on(device), uneven=UNEVEN, alive=alive,
        compiler=compiler_for(torch.cuda.get_device_capability(device)),
        layer=lambda spec: time_layer(spec, device, torch.bfloat16, LAYER_REPEATS),
    )  # fmt: skip


def dry_tools() -> Tools:
    """Tools for a CPU: kernels run through Triton's interpreter, with the speed-ups of the tests;
    one kernel is compiled in earnest, for an H100."""
    import pytest

    from tests.kernels import interpreter

    interpreter.improve(pytest.MonkeyPatch())
    device = torch.device("cpu")
    compile_h100 = compiler_for((9, 0))

    def compiler(jobs: Sequence[Job], seconds: float) -> dict[Job, str | None]:
        return dict.fromkeys(jobs) | compile_h100(jobs[:1], seconds)

    def variants(product: Product, device: torch.device) -> list[Variant]:
        small = [Variant(16, 32, 32, 4, 2), Variant(16, 32, 32, 4, 2, weight="tma")]
        return [rule(product, *device_limits(device)), *small]

    return Tools(
        device=device, dtype=torch.float32, timer=timer_on(device), compiler=compiler,
        uneven=UNEVEN_DRY,
        layer=lambda spec: time_layer(spec, device, torch.float32, 1), variants=variants,
        repeats=(1, 2),
    )  # fmt: skip


def watch(record: Record) -> None:
    """End the process where a variant hangs: CUDA has no way to stop a kernel that waits for
    ever."""

    def look() -> None:
        while True:
            time.sleep(1)
            since = record.running_since
            if since is not None and time.monotonic() - since > HANG_SECONDS:
                print(
                    f"hung for {HANG_SECONDS} s: {record.running.read_text()}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HUNG)

    threading.Thread(target=look, daemon=True).start()


def show(record: Record) -> str:
    """The table that was found, and what is missing from it."""
    header = ("point", "rule us", "best us", "spread", "TFLOP/s", "variant")
    lines = []
    for label, point in record.points.items():
        row = point["row"]
        second = point["second_us"]
        best_us, spread = second[point["best"]]
        rule_us = second.get(point["rule"], ["-"])[0]
        says = point["best"] if row else "the rule stands"
        lines.append((label, rule_us, best_us, spread, point["tflops"], says))
    text = [table(header, lines)]
    for name, why in record.refused.items():
        text.append(f"refused {name}: {why}")
    for label, why in record.failures.items():
        text.append(f"FAILED {label}: {why}")
    if record.not_reached:
        text.append(f"not reached: {'; '.join(record.not_reached)}")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--end", type=float, required=True, help="of time.monotonic(): begin nothing after it"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    # It would overrule the back end that an arm asks for.
    os.environ.pop("MEGALORA_BACKEND", None)
    # References are float32; TF32 would round their inputs to 10 bits.
    torch.set_float32_matmul_precision("highest")
    tools = dry_tools() if args.dry else gpu_tools()
    try:
        record = Record(args.out, tools.device, args.dry)
    except ValueError as error:
        print(f"benchmarks.tune: {error}", file=sys.stderr)
        return MISTAKE
    watch(record)
    record.note_clocks("at the start")
    sweep = Sweep(record, tools, args.end - time.monotonic())
    try:
        sweep.measure(dry_groups() if args.dry else groups())
    except DeadDevice as error:
        print(f"the device answers no more after {error}", file=sys.stderr)
        return DEAD_DEVICE
    record.note_clocks("at the end")
    record.save()
    print(f"\n{show(record)}")
    ships = f"to ship it: kernels/megalora_kernels/tuned/{tuned.file_name(record.gpu)}"
    if args.dry:
        ships = MEANINGLESS
    print(f"wrote {args.out} ({ships})")
    return 1 if record.failures else 0


if __name__ == "__main__":
    sys.exit(main())

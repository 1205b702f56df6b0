"""Time a training step of a Qwen3-30B-A3B-shaped model with random weights on one GPU: megalora,
stock PEFT, Unsloth.

    python -m benchmarks.bench_train_gpu --layers 8 --budget-seconds 150

Our arms also run under torch's profiler, which counts kernels of each layer, gaps between them and
waits of the host (``step_trace.py``); and megalora's own step is set beside what the planner
predicts for the same configuration.

Every arm runs in a process of its own (Unsloth changes transformers as it is imported), on the same
sequence, with LoRA on attention and experts. TFLOP/s count 4 P + 6 A + 6 S h d L per token
(``benchmarks/train_case.py``). An arm whose packages are missing is a row that says so; where one
of ours fails, the exit code is 1. A second call with the same ``--out`` runs the arms for which
there was no time. ``--dry`` trains a tiny model on a CPU; its times mean nothing.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import Budget, earlier, first_line, number, save, table, the_gpu
from benchmarks.model_plan import error_percent, machine_of, planned
from benchmarks.profile_step import profile_steps
from benchmarks.train_arms import Setup, Training
from benchmarks.train_case import (
    QWEN3_30B_A3B,
    TINY_MODEL,
    adapter_parameters,
    flops_per_token,
    layers_that_fit,
)

FITS = "megalora, all that fits"
ARMS = {
    "peft": "benchmarks.train_arms:peft",
    "megalora": "benchmarks.train_megalora:megalora",
    "kernels": "benchmarks.train_arms:kernels",
    "one of 8 ranks": "benchmarks.train_arms:share",
    FITS: "benchmarks.train_megalora:megalora",
    "unsloth": "benchmarks.train_arms:unsloth",
}
"""Arm to the function that builds it. Those that tell most in a second come first, as time may run
out: PEFT's is the yardstick and has no profile; a model that fills the memory takes a minute."""
OURS = ("megalora", "kernels", "one of 8 ranks", FITS)
PLANNED = ("megalora", FITS)
"""Arms that the planner knows: megalora's own step."""
CUT_OFF = ("not reached", "stopped")
"""Beginnings of the status of an arm that a second call runs again."""
LEAST_SECONDS = 20
"""Seconds without which no arm is begun."""
FORMULA = "4 P + 6 A + 6 S h d L: see benchmarks/train_case.py"
WARMUP = 2
"""Steps that are not measured: they compile kernels and fill the allocator's cache."""


def measure_steps(training: Training, device: torch.device, steps: int) -> dict[str, Any]:
    """Milliseconds of whole steps and of forward and backward alone, peak memory, and the losses,
    which must fall."""
    step_ms = []
    passes_ms = []
    losses = []
    for i in range(WARMUP + steps):
        # Compiling and tuning kernels may take memory that no later step needs.
        if i == WARMUP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = _now(device)
        losses.append(training.forward_backward())
        middle = _now(device)
        training.update()
        end = _now(device)
        if i >= WARMUP:
            step_ms.append(1e3 * (end - start))
            passes_ms.append(1e3 * (middle - start))
    # The same sequence in each step: a step that trains lowers its loss. A speed is worth nothing
    # where gradients reach no adapter.
    first = float(losses[0])
    last = float(losses[-1])
    status = "ok"
    if not (math.isfinite(last) and last < first):
        status = f"wrong: the loss went from {first:.3f} to {last:.3f}"
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "status": status,
        "loss": [first, last],
        "step_ms": statistics.median(step_ms),
        "step_ms_range": [min(step_ms), max(step_ms)],
        "forward_backward_ms": statistics.median(passes_ms),
        "peak_bytes": peak,
    }


def _now(device: torch.device) -> float:
    """Seconds of the clock at which the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(name: str, setup: Setup, steps: int) -> dict[str, Any]:
    """Train one arm and return its row."""
    module, function = ARMS[name].split(":")
    layers = setup.config["num_hidden_layers"]
    row: dict[str, Any] = {"arm": name, "layers": layers, "tokens": setup.num_tokens}
    row |= {"rank": setup.rank, "status": "ok"}
    try:
        with getattr(importlib.import_module(module), function)(setup) as training:
            found = measure_steps(training, setup.device, steps)
            fused = training.gate_up_is_one
            row |= {
                "note": training.note,
                "adapter_parameters": training.num_adapter_parameters,
                **found,
            }
            if name in OURS and row["status"] == "ok":
                row["profile"] = profile_steps(training, setup.device, layers)
    except ModuleNotFoundError as error:
        return row | {"status": f"not installed: {error}"}
    except torch.OutOfMemoryError:
        return row | {"status": "out of memory"}
    except Exception as error:
        # Another library's failure is what its row says.
        traceback.print_exc()
        return row | {"status": f"cannot run: {first_line(error)}"}
    # The speed of a step that does not train means nothing.
    if row["status"] != "ok":
        return without_times(row)
    flops = flops_per_token(setup.config, setup.rank, setup.num_tokens, fused)
    seconds = row["step_ms"] / 1e3
    row |= {"tokens_per_s": setup.num_tokens / seconds, "flops_per_token": flops}
    row |= {"tflops": flops * setup.num_tokens / seconds / 1e12}
    row |= {"whole_adapter_parameters": adapter_parameters(setup.config, setup.rank, fused)}
    if name in PLANNED:
        row |= beside_the_planner(row, setup)
    return row


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row without any field that tells how long something took."""
    kept = {}
    for name, value in row.items():
        if not name.endswith("_ms") and name != "step_ms_range":
            kept[name] = value
    return kept


def beside_the_planner(row: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """The planner's prediction for the row's configuration, and its errors in percent of what was
    measured."""
    name = ""
    if setup.device.type == "cuda":
        name = torch.cuda.get_device_name(setup.device)
    said = planned(setup, machine_of(name))
    errors = {}
    for quantity in ("step_ms", "peak_bytes"):
        errors[quantity] = error_percent(said[quantity], row[quantity])
    return {"planned": said, "error_percent": errors}


def child(name: str, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm in a process of its own and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.bench_train_gpu"]
        command += ["--arm", name, "--layers", str(layers), "--tokens", str(args.tokens)]
        command += ["--rank", str(args.rank), "--steps", str(args.steps), "--row", str(out)]
        if args.dry:
            command.append("--dry")
        # Without a budget there is no limit: ``subprocess`` takes no infinity.
        left = args.budget.left()
        limit = None if left == math.inf else max(1.0, left)
        row = {"arm": name, "layers": layers, "tokens": args.tokens, "rank": args.rank}
        try:
            code = subprocess.run(command, cwd=Path(__file__).parents[1], timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return row | {"status": f"stopped after {limit:.0f} s: out of time"}
        if not out.is_file():
            return row | {"status": f"cannot run: its process ended with {code}"}
        return json.loads(out.read_text())


def arms_to_run(device: torch.device, args: argparse.Namespace) -> list[tuple[str, int]]:
    """Each arm to run with the number of its layers, the most telling first. A dry run tries our
    arms and PEFT's."""
    if args.dry:
        tried = [name for name in ARMS if name in OURS or name == "peft"]
        # At one size two arms that train megalora's own step are one.
        tried.remove("megalora")
        layers = TINY_MODEL["num_hidden_layers"]
        return [(name, layers) for name in tried]
    free = torch.cuda.get_device_properties(device).total_memory
    most = layers_that_fit(QWEN3_30B_A3B, args.rank, args.tokens, free)
    layers = {"one of 8 ranks": args.share_layers, FITS: most}
    # All others have the same depth, so that they can be compared.
    return [(name, layers.get(name, args.layers)) for name in ARMS]


def run(device: torch.device, args: argparse.Namespace) -> int:
    """Train every arm that time allows and no earlier call has done; the exit code."""
    settings = {
        "tokens": args.tokens,
        "rank": args.rank,
        "layers": args.layers,
        "steps": args.steps,
    }
    settings |= {"dry": args.dry, "tuned": os.environ.get("MEGALORA_TUNED", "")}
    record = earlier(args.out, "train_gpu", device, settings) or {"rows": []}
    rows = [row for row in record["rows"] if not row["status"].startswith(CUT_OFF)]
    done = {row["arm"] for row in rows}
    for name, layers in arms_to_run(device, args):
        if name in done:
            continue
        if args.budget.left() < LEAST_SECONDS:
            rows.append({"arm": name, "layers": layers, "status": "not reached: out of time"})
        else:
            rows.append(child(name, layers, args))
        print(f"{name}: {rows[-1]['status']}", flush=True)
        # After each arm: the script may be ended at any time.
        left = [row["arm"] for row in rows if row["status"].startswith(CUT_OFF)]
        config = TINY_MODEL if args.dry else QWEN3_30B_A3B
        content = {"flops_per_token": FORMULA, "config": config, "rows": rows, "not_reached": left}
        save(args.out, "train_gpu", device, settings=settings, **content)
    print(f"\n{show(rows)}\nwrote {args.out}")
    # A peer that fails is a row of the table; only an arm of ours is a failure.
    harmless = ("ok", "not installed", "out of memory", *CUT_OFF)
    for row in rows:
        if row["arm"] in OURS and not row["status"].startswith(harmless):
            return 1
    return 0


def show(rows: Sequence[dict[str, Any]]) -> str:
    """A table; below it why an arm has no numbers."""
    header = (
        "arm",
        "layers",
        "tokens/s",
        "TFLOP/s",
        "step ms",
        "fwd+bwd ms",
        "peak GiB",
        "adapters M",
        "loss",
        "over peft",
    )
    # PEFT's milliseconds by number of layers: only a model of the same depth compares.
    peft = {}
    for row in rows:
        if row["arm"] == "peft" and row["status"] == "ok":
            peft[row["layers"]] = row["step_ms"]
    lines = []
    without = []
    for row in rows:
        if row["status"] == "ok":
            lines.append(cells_of(row, peft.get(row["layers"])))
        else:
            without.append(f"  {row['arm']}: {row['status']}")
    return "\n".join([table(header, lines), *without])


def cells_of(row: dict[str, Any], peft_ms: float | None) -> tuple[object, ...]:
    """An arm's line of the table.

    Args:
        row: the row of an arm that trained.
        peft_ms: time of PEFT's step with as many layers; None where there is none.
    """
    # The other arms train another model: a share of the experts, or all layers that fit.
    speedup = None
    if peft_ms is not None and row["arm"] in ("megalora", "kernels", "peft", "unsloth"):
        speedup = peft_ms / row["step_ms"]
    peak = row["peak_bytes"]
    return (
        row["arm"],
        row["layers"],
        number(row["tokens_per_s"], 0),
        number(row["tflops"], 0),
        number(row["step_ms"], 1),
        number(row["forward_backward_ms"], 1),
        number(None if peak is None else peak / 2**30, 1),
        number(row["adapter_parameters"] / 1e6, 1),
        "{:.2f} to {:.2f}".format(*row["loss"]),
        number(speedup, 2),
    )


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=8,
        help="layers out of the model's 48; 8 leave room for PEFT's merged weights",
    )
    parser.add_argument(
        "--share-layers",
        type=int,
        default=48,
        help="layers of the model that holds 16 of 128 experts",
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens of a step, which has one sequence"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--steps", type=int, default=6, help=f"steps to measure, after {WARMUP} that are not"
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="begin no arm with less than 20 s left of these"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_model.json"))
    parser.add_argument(
        "--dry", action="store_true", help="a tiny model on a CPU: to try the script itself"
    )
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    device = the_gpu(parser, args.dry)
    if args.dry:
        args.tokens = 32
        args.rank = 8
        args.steps = 2
    if args.arm is None:
        args.budget = Budget(args.budget_seconds)
        return run(device, args)
    config = {**(TINY_MODEL if args.dry else QWEN3_30B_A3B), "num_hidden_layers": args.layers}
    # A dry run has the GPU's dtype, too: in float32 autocast does nothing.
    setup = Setup(config, args.rank, args.tokens, device, torch.bfloat16)
    args.row.write_text(json.dumps(train(args.arm, setup, args.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

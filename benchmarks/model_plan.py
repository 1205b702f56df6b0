"""Predict with the planner the steps that ``bench_train_gpu`` measures, and show how far off it is.

python -m benchmarks.model_plan            compare megalora's measured steps with the planner,
                                           by the table of its GPU and by its calibration;
                                           writes benchmarks/results/gpu_planner.json
python -m benchmarks.model_plan --check    exit code 1 where that record is stale
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import table
from benchmarks.train_arms import ALPHA_OVER_RANK, Setup
from megalora.config import Level, LoRAConfig, ParallelConfig
from megalora.model.fields import model_shape
from megalora.planner.gpus import GPUS, read_machine
from megalora.planner.hardware import Machine
from megalora.planner.known_gpus import known_gpu
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import CONTEXT
from megalora.planner.search import evaluate
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload


def machine_of(device_name: str) -> Machine:
    """Return the table of the GPU that the device's name contains; that of an H100 for any
    other."""
    # Such as "NVIDIA H100 80GB HBM3".
    return known_gpu(device_name) or GPUS["h100"]


def planned(setup: Setup, machine: Machine, recompute: Level = "off") -> dict[str, Any]:
    """Return the planner's prediction for one rank that trains this model with one sequence a step.

    ``peak_bytes`` leaves the CUDA context out, which no allocator sees. Rates are those of
    bfloat16.
    """
    lora = LoRAConfig(rank=setup.rank, alpha=ALPHA_OVER_RANK * setup.rank)
    model = PlannedModel.of(model_shape(setup.config), lora)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1, recompute=recompute)
    work = Workload(sequence_length=setup.num_tokens, global_batch_size=1)
    found = evaluate(model, setup.rank, layout, work, machine)
    # Parts of one name are added up, as forward and backward of the same work.
    parts: dict[str, float] = {}
    for part in found.time.parts:
        parts[part.name] = parts.get(part.name, 0.0) + 1e3 * part.seconds
    memory_parts: dict[str, float] = {}
    for part in found.memory.parts:
        if part.name != CONTEXT:
            memory_parts[part.name] = part.num_bytes
    return {
        "machine": machine.name,
        "basis": machine.note,
        "step_ms": 1e3 * found.time.seconds,
        "limits_ms": [1e3 * seconds for seconds in found.limits],
        "parts_ms": parts,
        "peak_bytes": found.memory.peak_bytes - found.memory[CONTEXT],
        "memory_parts": memory_parts,
    }


def error_percent(predicted: float, measured: float | None) -> float | None:
    """Return how much more was predicted than measured, in percent of what was measured."""
    return None if not measured else 100 * (predicted / measured - 1)


# ---- what was measured, beside the planner of today ----------------------------------------------

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "gpu_planner.json"


def with_whole_logits(said: dict[str, Any], setup: Setup) -> float:
    """The peak of ``planned``, were the loss Megatron's own, as it was when the steps in
    ``gpu_model.json`` were measured: the planner knows the chunked head alone.

    In bfloat16, for T tokens, hidden H and vocabulary V: a float32 softmax, a mask, an int64 target
    and the loss mask a token; the final norm's input and rms; logits, and the head's and the
    embedding's output.
    """
    tokens = setup.num_tokens
    hidden = setup.config["hidden_size"]
    vocab = setup.config["vocab_size"]
    kept = tokens * (4 * vocab + 1 + 8 + 4) + tokens * (2 * hidden + 4)
    logits = 2 * (tokens * vocab + 2 * tokens * hidden)
    parts = said["memory_parts"]
    return said["peak_bytes"] - parts["loss"] - parts["logits"] + kept + logits


def beside_measured() -> list[dict[str, Any]]:
    """Return megalora's measured steps, each beside a prediction from the table of its GPU and one
    from the calibration of that machine."""
    measured = json.loads((RESULTS / "gpu_model.json").read_text())
    calibration = RESULTS / "gpu_calibration.json"
    machines = {
        "table": machine_of(measured["device"]),
        "calibrated": read_machine(calibration),
    }
    found = []
    for row in measured["rows"]:
        # The planner knows megalora's own step alone.
        if row["status"] != "ok" or not row["arm"].startswith("megalora"):
            continue
        config = {**measured["config"], "num_hidden_layers": row["layers"]}
        setup = Setup(config, row["rank"], row["tokens"], torch.device("cpu"))
        for rates, machine in machines.items():
            said = planned(setup, machine)
            said["peak_bytes"] = with_whole_logits(said, setup)
            case: dict[str, Any] = {"layers": row["layers"], "rates": rates}
            case["limits_ms"] = [round(limit, 3) for limit in said["limits_ms"]]
            for name in ("step_ms", "peak_bytes"):
                error = error_percent(said[name], row[name])
                assert error is not None, f"{row['arm']} was not measured on a GPU: no {name}"
                # Rounded, so that the record stays when the planner adds the same parts in another
                # order.
                case[name] = {
                    "measured": row[name],
                    "predicted": round(said[name], 3),
                    "error_percent": round(error, 4),
                }
            found.append(case)
    return found


def show(cases: list[dict[str, Any]]) -> str:
    """A table of the cases with the planner's errors."""
    rows = []
    for case in cases:
        step = case["step_ms"]
        peak = case["peak_bytes"]
        rows.append(
            (
                f"{case['layers']} layers, {case['rates']}",
                f"{step['measured']:.1f}",
                f"{step['predicted']:.1f}",
                limits_text(*case["limits_ms"]),
                f"{step['error_percent']:+.1f} %",
                f"{peak['measured'] / 2**30:.2f}",
                f"{peak['error_percent']:+.2f} %",
            )
        )
    head = ("case", "step ms", "predicted", "limits", "error", "peak GiB", "error of peak")
    return table(head, rows)


def limits_text(low: float, high: float) -> str:
    """The limits of a prediction on assumed rates; ``-`` where it has none."""
    return f"{low:.0f}-{high:.0f}" if low < high else "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    cases = beside_measured()
    print(show(cases))
    text = json.dumps(cases, indent=1) + "\n"
    if check:
        if not RECORD.is_file() or RECORD.read_text() != text:
            print(f"{RECORD.name} is stale; run: python -m benchmarks.model_plan", file=sys.stderr)
            return 1
        return 0
    RECORD.write_text(text)
    print(f"wrote {RECORD}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

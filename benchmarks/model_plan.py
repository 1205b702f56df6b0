"""Say what the planner predicts of the model that ``bench_train_gpu`` trains, and how far that is
from the measurement."""

from typing import Any

from benchmarks.train_arms import ALPHA_OVER_RANK, Setup
from megalora.config import LoRAConfig, ParallelConfig
from megalora.model.fields import model_shape
from megalora.planner.gpus import GPUS
from megalora.planner.hardware import Machine
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.memory import CONTEXT
from megalora.planner.search import evaluate
from megalora.planner.weights import PlannedModel


def machine_of(device_name: str) -> Machine:
    """Return the table of the GPU that the device's name contains; that of an H100 for any
    other."""
    lower = device_name.lower()
    return next((machine for name, machine in GPUS.items() if name in lower), GPUS["h100"])


def planned(setup: Setup, device_name: str) -> dict[str, Any]:
    """Return the planner's word on one rank that trains this model with one sequence a step.

    ``peak_bytes`` leaves the CUDA context out, which no allocator sees. Rates are those of
    bfloat16.
    """
    machine = machine_of(device_name)
    lora = LoRAConfig(rank=setup.rank, alpha=ALPHA_OVER_RANK * setup.rank)
    model = PlannedModel.of(model_shape(setup.config), lora)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    work = Workload(sequence_length=setup.num_tokens, global_batch_size=1)
    found = evaluate(model, setup.rank, layout, work, machine)
    parts: dict[str, float] = {}
    for part in found.time.parts:
        parts[part.name] = parts.get(part.name, 0.0) + 1e3 * part.seconds
    return {
        "machine": machine.name,
        "basis": machine.note,
        "step_ms": 1e3 * found.time.seconds,
        "parts_ms": parts,
        "peak_bytes": found.memory.peak_bytes - found.memory[CONTEXT],
        "memory_parts": {
            part.name: part.num_bytes for part in found.memory.parts if part.name != CONTEXT
        },
    }


def error_percent(predicted: float, measured: float | None) -> float | None:
    """Return how much more was predicted than measured, in percent of what was measured."""
    return None if not measured else 100 * (predicted / measured - 1)

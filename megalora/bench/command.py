"""Run ``megalora bench``: measure layouts one after the other, and compare with the planner.

The layouts are given in words, or are the planner's best.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megalora.bench.rows import PARTS, BenchOptions, Predicted, Row
from megalora.config import RunConfig
from megalora.config.checks import require
from megalora.config.file import load_config
from megalora.data.logits_header import is_logits_folder
from megalora.paths import prepare_file
from megalora.planner.crossings import crossings_of
from megalora.planner.gpus import find_machine
from megalora.planner.hardware import Machine
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import CONTEXT
from megalora.planner.models import find_architecture, held_by_config, shape_in
from megalora.planner.prices import BEHIND_WAITS
from megalora.planner.search import evaluate, search
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

MEASURED_AS = {"pipeline transfers": "bubble", "host": "other", BEHIND_WAITS: "other"}
"""Parts in which the clocks of ``timers.py`` count what the planner keeps apart. The host's time is
inside each part there."""


@dataclass(frozen=True)
class Asked:
    """Arguments of the command beside the config."""

    num_ranks: int
    gpu: str
    """Name of the machine that predictions are made for."""
    out: Path
    """Folder of the results."""
    layouts: Sequence[str] = ()
    top: int | None = None
    """Number of layouts to take from the planner, instead of ``layouts``."""
    imbalance: float = 1.2
    """Rows of the fullest expert-parallel rank over the mean that predictions assume for natural
    routing; balanced routing has 1."""
    timeout_minutes: float = 30
    """Limit for one layout."""


def bench_command(
    path: Path,
    overrides: Sequence[str],
    asked: Asked,
    options: BenchOptions,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure, print the table and write ``asked.out``; a row for each layout, failed ones too.
    Raises ``ValueError`` for mistakes."""
    from megalora.bench.launch import Nodes, ended_by_signals
    from megalora.bench.results import table, write_results
    from megalora.bench.runs import parse_layout, run_layouts

    require(asked.num_ranks >= 1, f"--nproc must be at least 1, got {asked.num_ranks}")
    require(
        bool(asked.layouts) != (asked.top is not None),
        "give either --layouts, such as tp=2,ep=4 ep=8, or --top K",
    )
    # Before hours of measuring: the results can be written.
    prepare_file(asked.out / "results.json")
    config = load_config(path, overrides)
    # Samples of a benchmark have neither rewards nor what a sampler said of them.
    require(
        config.objective.name != "grpo",
        "bench does not measure objective.name=grpo yet: it makes no rollouts with rewards. Measure"
        " with objective.name=sft",
    )
    check_teacher(config)
    machine = find_machine(asked.gpu)
    imbalance = 1.0 if options.routing == "balanced" else asked.imbalance
    if asked.top is None:
        layouts = [parse_layout(text, asked.num_ranks, config) for text in asked.layouts]
    else:
        layouts = fastest(config, asked.num_ranks, asked.top, machine, imbalance)

    def predict(of_layout: RunConfig, num_ranks: int) -> Predicted:
        return predicted(of_layout, num_ranks, machine, imbalance)

    with ended_by_signals():
        rows = run_layouts(
            path, overrides, layouts, num_ranks=asked.num_ranks, out=asked.out, predict=predict,
            options=options,
            timeout_s=60 * asked.timeout_minutes, say=say,
        )  # fmt: skip
    # Of several nodes, only one has the measurements.
    if Nodes.of(os.environ).writes:
        written = write_results(rows, asked.out)
        say(f"\n{table(rows)}\n\nwrote {', '.join(str(file) for file in written.values())}")
    return rows


def fastest(
    config: RunConfig, num_ranks: int, top: int, machine: Machine, imbalance: float = 1.0
) -> list[ParallelLayout]:
    """The ``top`` layouts that the planner puts first, of those that fit; raises ``ValueError``
    where none does."""
    require(top >= 1, f"--top must be at least 1, got {top}")
    shape = shape_in(config)
    plan = search(shape, config.lora, num_ranks, workload(config, imbalance, machine), machine)
    # Raises where no layout fits, and says why.
    plan.best()
    return [found.layout for found in plan.layouts()[:top]]


def check_teacher(config: RunConfig) -> None:
    """Raise ``ValueError`` for a teacher that cannot be asked about a benchmark's samples."""
    teacher = config.objective.teacher
    require(
        teacher is None or not is_logits_folder(teacher),
        f"objective.teacher={teacher} has logits of the samples of a data set, and a benchmark"
        " trains on samples of its own. Name the teacher's model, or base",
    )


def workload(config: RunConfig, imbalance: float, machine: Machine) -> Workload:
    """What a benchmark trains: samples of exactly ``data.max_length`` tokens."""
    # The last token of a sequence is only predicted, unless it is scored.
    length = max(config.data.max_length - config.objective.unread_tokens, 2)
    return replace(
        Workload.of(config, imbalance), sequence_length=length,
        crossings=crossings_of(machine.name), on_cpu=machine.is_cpu,
        held=held_by_config(config.model, find_architecture(config.model.path)),
    )  # fmt: skip


def predicted(
    config: RunConfig, num_ranks: int, machine: Machine, imbalance: float = 1.0
) -> Predicted:
    """What the planner predicts for one layout, as far as a benchmark can measure it."""
    layout = ParallelLayout.of(config, num_ranks)
    model = PlannedModel.of(shape_in(config), config.lora)
    found = evaluate(model, config.lora.rank, layout, workload(config, imbalance, machine), machine)
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for part in found.time.parts:
        # A timer counts a part's recomputation and communication as the part itself.
        name = part.name
        for prefix in ("recompute ", "tensor parallel ", "context parallel "):
            name = name.removeprefix(prefix)
        parts[MEASURED_AS.get(name, name)] += part.seconds
    return Predicted(
        step_seconds=found.time.seconds,
        # No allocator sees the CUDA context.
        peak_bytes=found.memory.peak_bytes - found.memory[CONTEXT],
        parts=parts,
        basis=f"{machine.name}, {machine.note}",
    )

"""``megalora plan``: from a config and a number of GPUs to a table, a picture and a config that
runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megalora.config import RunConfig
from megalora.config.checks import require
from megalora.config.file import load_config
from megalora.model.fields import model_shape
from megalora.paths import prepare_file
from megalora.planner import report
from megalora.planner.crossings import crossings_of
from megalora.planner.gpus import find_machine, with_ranks_per_node
from megalora.planner.layouts import ParallelLayout, Workload, check
from megalora.planner.memory import memory_of
from megalora.planner.models import find_architecture
from megalora.planner.packing import packing_of
from megalora.planner.search import CLOSE, Plan, Planned, search
from megalora.planner.weights import chunks_of, router_buffer_bytes


@dataclass(frozen=True)
class PlanOptions:
    """Options of the command line, beside the config."""

    gpus: int
    """Number of GPUs, one rank each."""
    gpu: str
    """Name of a GPU or path of a calibration file."""
    top: int = 10
    """Number of layouts to show."""
    imbalance: float = 1.2
    """Rows of the fullest expert-parallel rank over the mean: assumed; ``megalora bench`` measures
    it."""
    mean_length: float | None = None
    """Tokens of a sample on average. None: those of the config's data, if it is on this machine;
    else all samples are of full length."""
    lora_ranks: Sequence[int] = ()
    """LoRA ranks to try beside the config's own."""
    gpus_per_node: int | None = None
    """None: as many as the machine has."""
    out: Path | None = None
    """File for a config of the best layout."""
    figure: Path | None = None
    """File for a picture of the plan."""
    rejected: Path | None = None
    """File for the list of rejected layouts."""


def make_plan(config: RunConfig, options: PlanOptions) -> Plan:
    """Search for a config; raises ``ValueError`` for a mistake in it."""
    require(
        math.isfinite(options.imbalance),
        f"--imbalance {options.imbalance}: must be a finite number, 1 or more",
    )
    require(options.top >= 1, f"--top {options.top}: show at least 1 layout")
    smallest = min(options.lora_ranks, default=1)
    require(smallest >= 1, f"--lora-rank {smallest}: a rank is at least 1")
    machine = find_machine(options.gpu)
    if options.gpus_per_node is not None:
        machine = with_ranks_per_node(machine, options.gpus_per_node)
    shape = model_shape(find_architecture(config.model.path))
    # The table of the GPU that is planned for, whatever this machine is.
    work = replace(
        Workload.of(config, options.imbalance),
        crossings=crossings_of(machine.name),
        packing=packing_of(config, options.mean_length),
    )
    return search(shape, config.lora, options.gpus, work, machine, lora_ranks=options.lora_ranks)


def plan_command(
    path: Path, overrides: Sequence[str], options: PlanOptions, say: Callable[[str], None] = print
) -> None:
    """Print the plan of ``path``; write config, picture and the list of rejected layouts where they
    were asked for."""
    _check_options(options)
    config = load_config(path, overrides)
    plan = make_plan(config, options)
    # Before best(), which raises where nothing fits: that is when the reasons are wanted most.
    if options.rejected:
        lines = [f"{report.rejected_line(r)}\n" for r in plan.rejected]
        options.rejected.write_text("".join(lines))
    best = plan.best()
    _say_plan(config, options, plan, best, say)
    if options.out:
        options.out.write_text(report.config_text(config, plan, best))
        # The file as train will read it: a config that does not run must not be announced.
        load_config(options.out).check_world(options.gpus)
        say(f"wrote {options.out}: megalora train {options.out}, or launch/ for several nodes")
    if options.figure:
        # Late: importing matplotlib takes longer than the plan.
        from megalora.planner.figure import draw

        title = f"{config.model.path} on {options.gpus} x {plan.machine.name}"
        draw(plan, options.top, options.figure, title)
        say(f"wrote {options.figure}")


def _check_options(options: PlanOptions) -> None:
    """Raise ``ValueError`` for a file that cannot be written; make the folders above the others."""
    for file in (options.out, options.figure, options.rejected):
        if file:
            prepare_file(file)
    if options.figure:
        require(
            options.figure.suffix in (".png", ".pdf", ".svg"),
            f"--figure {options.figure}: end it in .png, .pdf or .svg",
        )


def _say_plan(
    config: RunConfig, options: PlanOptions, plan: Plan, best: Planned, say: Callable[[str], None]
) -> None:
    """The plan from its assumptions down to the reasons against other layouts."""
    work = plan.work
    say(
        f"{config.model.path} on {options.gpus} x {plan.machine.name}, {work.global_batch_size}"
        f" samples of {work.sequence_length:,} tokens a step, {work.dtype}, LoRA rank"
        f" {config.lora.rank} on {config.lora.target_modules}"
    )
    rates = f"rates {plan.machine.note}"
    # A dense model routes nothing.
    if best.time["experts"] > 0:
        rates += f"; routing {work.imbalance:g} times the mean on the fullest rank: assumed"
    say(rates)
    say(
        f"\nlayouts that fit: {len(plan.fitting):,}. The fastest ways to split the model, each with"
        f" the microbatch, chunks and recomputation that need least memory within {100 * CLOSE:.0f}"
        f" % of its best:\n{report.table(plan, options.top)}\n{report.LEGEND}"
    )
    say(f"\nthe choice: {best.layout}\n{report.breakdown(plan, best)}\n")
    if text := report.packing_line(plan, best):
        say(f"{text}\n")
    if text := report.waits(best):
        say(f"{text}\n")
    say(report.rejections(plan))
    if text := report.warning(plan, best):
        say(text)


def dry_run_command(
    path: Path, overrides: Sequence[str], gpus: int, rank: int, say: Callable[[str], None] = print
) -> bool:
    """Build one rank of the config's own layout on the meta device and compare its bytes with the
    plan's; False where they differ."""
    config = load_config(path, overrides)
    require(1 <= gpus <= 4096, f"--gpus {gpus}: a dry run builds a rank of 1 to 4,096")
    require(0 <= rank < gpus, f"--dry-run {rank}: ranks of {gpus} GPUs count from 0 to {gpus - 1}")
    hf = find_architecture(config.model.path)
    p = config.parallel
    layout = ParallelLayout.of(config, gpus)
    shape = model_shape(hf)
    work = Workload.of(config)
    check(shape, layout, work)
    # Pipeline stages are consecutive blocks of ranks.
    stage = rank // (gpus // p.pp)
    planned = memory_of(shape, config.lora, layout, work, stage)
    buffer_bytes = 0
    for chunk in chunks_of(shape, p, stage):
        buffer_bytes += router_buffer_bytes(shape, chunk)
    # Late: a mistake above is answered without the ten seconds that importing Megatron takes.
    from megalora import host
    from megalora.planner.dryrun import dry_run

    with host.fake_world(rank, gpus):
        built = dry_run(hf, config.lora, p, config.model)
    say(
        f"rank {rank} of {gpus}, stage {stage}: {len(built.shapes):,} parameters' tensors, parts of"
        f" {built.num_tensors:,} adapter tensors"
    )
    rows = (
        ("base weights", built.base_bytes, planned["weights"]),
        ("adapters", built.adapter_bytes, planned["adapters"]),
        ("buffers", built.buffer_bytes, buffer_bytes),
    )
    agrees = True
    for name, found, expected in rows:
        verdict = "the same" if found == expected else "DIFFERENT"
        say(f"{name:<13} built {found:>16,} bytes   planned {expected:>16,}   {verdict}")
        agrees = agrees and found == expected
    return agrees

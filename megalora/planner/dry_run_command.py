"""``megalora plan --dry-run``: build one rank on the meta device and compare its bytes with the
plan's."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megalora.config import ParallelConfig, RunConfig
from megalora.config.checks import require
from megalora.config.file import load_config
from megalora.lora.whole import with_trained
from megalora.model.shape import ModelShape
from megalora.planner.layouts import ParallelLayout, check
from megalora.planner.memory import DECODED, TEACHER, memory_of
from megalora.planner.models import find_architecture, held_by_config, shape_in
from megalora.planner.teacher_bytes import second_layout
from megalora.planner.weights import chunks_of, router_buffer_bytes, token_buffer_bytes
from megalora.planner.workload import Workload


def dry_run_command(
    path: Path,
    overrides: Sequence[str],
    counts: Sequence[int],
    rank: int,
    say: Callable[[str], None] = print,
) -> bool:
    """Build one rank of the config's own layout on the meta device and compare its bytes with the
    plan's; False where they differ."""
    require(len(counts) == 1, f"--dry-run builds a rank of one number of GPUs, got {len(counts)}")
    (gpus,) = counts
    config = load_config(path, overrides)
    require(1 <= gpus <= 4096, f"--gpus {gpus}: a dry run builds a rank of 1 to 4,096")
    require(0 <= rank < gpus, f"--dry-run {rank}: ranks of {gpus} GPUs count from 0 to {gpus - 1}")
    hf = find_architecture(config.model.path)
    p = config.parallel
    layout = ParallelLayout.of(config, gpus)
    shape = with_trained(config.lora, shape_in(config))
    work = replace(Workload.of(config), held=held_by_config(config.model, hf))
    check(shape, layout, work)
    # Pipeline stages are consecutive blocks of ranks.
    stage = rank // (gpus // p.pp)
    planned = memory_of(shape, config.lora, layout, work, stage)
    buffer_bytes = _buffer_bytes(shape, p, stage, rank)
    # Late: a mistake above is answered without the ten seconds that importing Megatron takes.
    from megalora.fake_world import fake_world
    from megalora.planner.dryrun import dry_run

    with fake_world(rank, gpus):
        built = dry_run(hf, config.lora, p, config.model, shape.num_scores, shape.kept_cycles)
    of_teacher = _teacher_bytes(config, layout, work, rank)
    say(
        f"rank {rank} of {gpus}, stage {stage}: {len(built.shapes):,} parameters' tensors, parts of"
        f" {built.num_tensors:,} adapter tensors"
    )
    rows = [
        ("base weights", built.base_bytes, planned["weights"]),
        ("adapters", built.adapter_bytes, planned["adapters"]),
        ("buffers", built.buffer_bytes, buffer_bytes),
        *([("decoded", built.scratch_bytes, planned[DECODED])] if work.held else []),
    ]
    if work.teacher is not None:
        rows.append(("teacher", of_teacher, planned[TEACHER]))
    agrees = True
    for name, found, expected in rows:
        verdict = "the same" if found == expected else "DIFFERENT"
        say(f"{name:<13} built {found:>16,} bytes   planned {expected:>16,}   {verdict}")
        agrees = agrees and found == expected
    return agrees


def _buffer_bytes(shape: ModelShape, p: ParallelConfig, stage: int, rank: int) -> int:
    """Planned bytes of what is no parameter: routers' counters, and indexes of trained rows."""
    total = 0
    for chunk in chunks_of(shape, p, stage):
        total += router_buffer_bytes(shape, chunk)
        # Ranks of a tensor-parallel group are neighbours.
        total += token_buffer_bytes(shape, p, chunk, rank % p.tp)
    return total


def _teacher_bytes(config: RunConfig, layout: ParallelLayout, work: Workload, rank: int) -> int:
    """Bytes of a second model as built on this rank; 0 where there is none."""
    if work.teacher is None or work.teacher.model is None:
        return 0
    # Late, as above.
    from megalora.fake_world import fake_world
    from megalora.planner.dryrun import second_model_bytes

    parallel = second_layout(work.teacher, layout).parallel
    # In a world of its own: groups of the first model may be of other sizes.
    with fake_world(rank, layout.num_ranks):
        return second_model_bytes(find_architecture(work.teacher.name), parallel, config.model)

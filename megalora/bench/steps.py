"""Measure one layout inside its ranks: training's own step, its parts and its memory.

After steps to warm up come steps of which only the ends are timed, which give the speed; then steps
with every part timed (``timers.py``); on a CPU one more whose live tensors are counted.
"""

import gc
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalora import host
from megalora.bench.flops import flops_per_token
from megalora.bench.live import LiveTensors
from megalora.bench.passes_before import watch_passes_before
from megalora.bench.routing import count_rows, make_even
from megalora.bench.rows import BenchOptions, Measured
from megalora.bench.samples import full_samples
from megalora.bench.timers import Timeline, attach
from megalora.config import RunConfig
from megalora.lora.adapted_model import AdaptedModel
from megalora.model.account import open_folder
from megalora.model.build import build_model, build_random
from megalora.model.fields import model_shape
from megalora.model.held import held_in
from megalora.planner.layouts import ParallelLayout
from megalora.planner.models import find_architecture, held_by_config
from megalora.planner.weights import PlannedModel
from megalora.train.assemble import Inputs, Run, assemble
from megalora.train.teacher import SecondModel
from megalora.versions import versions

MARKED_STEPS = 3
"""Steps timed part by part, at most."""


@contextmanager
def training(config: RunConfig, options: BenchOptions) -> Iterator[Run]:
    """The run of ``config`` on the ranks of this world; ``options`` decides whether the base
    weights are read or drawn."""
    hf = find_architecture(config.model.path)
    shape = replace(model_shape(hf), num_scores=config.objective.num_scores)
    # With what is trained of the base, so that the plan and the measurement are of one model.
    model = PlannedModel.of(shape, config.lora)
    shape = model.shape
    shape.check_layout(config.parallel, config.train.recompute)
    shape.check_balance(config.train.router_aux_loss_coef)
    # Random tokens say little of routing: only natural routing reads text.
    tokenizer, split = full_samples(config, shape.vocab, natural=options.routing == "natural")

    def prepare(model: AdaptedModel) -> None:
        if options.routing == "balanced":
            make_even(model.chunks, model.groups)

    if has_weights(config, options):
        folder = Path(config.model.path)
        make_base = partial(build_model, folder=folder)
        held = held_in(config.model, open_folder(folder))
    else:
        held = held_by_config(config.model, hf)
        make_base = partial(build_random, hf, seed=config.train.seed)
    inputs = Inputs(shape, list(model.adapted), tokenizer, split, None)
    with assemble(config, inputs, make_base=make_base, prepare=prepare, held=held) as run:
        teacher = run.stepper.teacher
        # Its weights are always read, and it routes like the model.
        if isinstance(teacher, SecondModel) and options.routing == "balanced":
            make_even(teacher.chunks, run.groups)
        yield run


def one_step(run: Run, number: int, timeline: Timeline | None = None) -> float:
    """One optimizer step; returns the loss. Raises ``RuntimeError`` where it is not finite."""
    loss, _ = run.step(number, run.config.train.lr, timeline and timeline.around("optimizer"))
    if not math.isfinite(loss):
        raise RuntimeError(
            f"step {number + 1}: the loss is {loss}, so nothing measured here would mean anything"
        )
    return loss


def has_weights(config: RunConfig, options: BenchOptions) -> bool:
    """Whether the base's weights are read; raises ``ValueError`` where they are asked for but
    missing."""
    folder = Path(config.model.path)
    found = folder.is_dir() and any(folder.glob("*.safetensors"))
    if options.weights == "real" and not found:
        raise ValueError(
            f"--weights real: {folder} has no *.safetensors files; download the model, or use"
            " --weights random"
        )
    return found and options.weights != "random"


def measure_layout(config: RunConfig, options: BenchOptions) -> Measured | None:
    """Train and measure; collective. Rank 0 returns what all found, the others None.

    Raises:
        ValueError: what training with this config would raise.
        RuntimeError: the loss is not finite, or an adapter cannot learn or did not.
    """
    with training(config, options) as run:
        for number in range(options.warmup):
            one_step(run, number)
        # The peak is that of a step, not that of reading the weights.
        host.reset_peak_memory()
        seconds, loss = timed_steps(run, options.warmup, options.steps)
        # Before parts are timed: hooks and markers hold tensors of their own.
        peak = host.peak_memory_bytes()
        reserved = _reserved_bytes()
        done = options.warmup + options.steps
        num_marked = min(options.steps, MARKED_STEPS)
        parts, imbalance = timed_parts(run, done, num_marked)
        # A CPU's allocator does not count.
        if not peak:
            peak = live_bytes(run, done + num_marked)
        _check_moved(run)
        mine = {
            "seconds": seconds,
            "parts": parts,
            "peak": peak,
            "reserved": reserved,
            "stage": run.model.groups.pp.rank(),
        }
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        if dist.get_rank() != 0:
            return None
        return _measured(run, options, ranks, imbalance, loss)


def timed_steps(run: Run, first: int, count: int) -> tuple[list[float], float]:
    """Seconds of each step on this rank, from one step's end to the next one's, and the last
    loss."""
    # No rank's first step may include another's lag.
    host.synchronize()
    dist.barrier()
    moments = [host.Stopwatch.mark()]
    loss = math.nan
    for number in range(first, first + count):
        loss = one_step(run, number)
        moments.append(host.Stopwatch.mark())
    # Only now, because reading a moment waits for the device.
    seconds = []
    for begin, end in pairwise(moments):
        seconds.append(host.seconds_between(begin, end))
    return seconds, loss


def timed_parts(
    run: Run, first: int, count: int
) -> tuple[dict[str, float], tuple[float, float] | None]:
    """Mean seconds of each part of a step on this rank, and how unevenly experts got rows.

    The second is (mean, worst), or None without expert parallelism.
    """
    timeline = Timeline()
    steps: list[dict[str, float]] = []
    attach(timeline, run.model.chunks, run.model.groups.pp.size())
    watch_passes_before(run.stepper, timeline)
    imbalance = count_rows(run.model.chunks, run.model.groups)
    for number in range(first, first + count):
        # All ranks begin together, or one's lag would count as another's bubble.
        host.synchronize()
        dist.barrier()
        timeline.start()
        one_step(run, number, timeline)
        steps.append(timeline.seconds())
    return _mean(steps), imbalance()


def live_bytes(run: Run, number: int) -> int:
    """Peak bytes of tensors that are alive at once in a step, earlier ones included."""
    # Garbage that nobody has collected yet would count as alive.
    gc.collect()
    # All that this process has: parameters, gradient buffers and optimizer state, as an allocator
    # would count them.
    already = []
    for found in gc.get_objects():
        # isinstance would ask an object for its __class__, and proxies may fail at that.
        if issubclass(type(found), Tensor) and found.layout is torch.strided:
            already.append(found)
    with LiveTensors(already) as live:
        one_step(run, number)
    return live.peak_bytes


def _reserved_bytes() -> int | None:
    """Peak bytes that the caching allocator reserved; None on a CPU, which has none."""
    if host.device().type == "cpu":
        return None
    return torch.accelerator.max_memory_reserved()


def _check_moved(run: Run) -> None:
    """B starts at zero; raises ``RuntimeError`` if it is still zero on all ranks."""
    moved = torch.zeros((), device=host.device())
    for shard in run.model.shards:
        if ".lora_B." in shard.name and shard.parameter[shard.index].count_nonzero():
            moved.fill_(1)
    # The largest over all ranks, because a pipeline stage may have no adapter at all.
    dist.all_reduce(moved, op=dist.ReduceOp.MAX)
    if not moved:
        raise RuntimeError(
            "no adapter has changed: every B is still zero, so what was measured was not training"
        )


def _measured(
    run: Run,
    options: BenchOptions,
    ranks: list[Any],
    imbalance: tuple[float, float] | None,
    loss: float,
) -> Measured:
    """Summarise what each rank found: seconds, parts, peak, reserved, stage."""
    config = run.config
    world = len(ranks)
    # A step lasts until the slowest rank is through.
    # Of each rank a list of steps, whose slowest rank is the step's time.
    seconds_of_rank = [rank["seconds"] for rank in ranks]
    steps = list(map(max, zip(*seconds_of_rank, strict=True)))
    median = statistics.median(steps)
    # n tokens give n - 1 predictions, or a score at the last of n.
    positions = config.data.max_length - config.objective.unread_tokens
    flops = flops_per_token(
        run.model.shape, run.model.adapted, positions, config.train.recompute, config.parallel
    )
    # Sequences per second and GPU; a pair is two.
    sequences = config.train.global_batch_size * config.objective.sequences / median / world
    parts = [rank["parts"] for rank in ranks]
    stages = [rank["stage"] for rank in ranks]
    of_stage = _mean_by_stage(parts, stages)
    slowest = max(of_stage, key=lambda stage: _busy_seconds(of_stage[stage]))
    reserved = None
    memory_from = "live tensors"
    if host.device().type != "cpu":
        reserved = [rank["reserved"] for rank in ranks]
        memory_from = "allocator"
    mean_imbalance, worst_imbalance = imbalance or (None, None)
    return Measured(
        layout=str(ParallelLayout.of(config, world)), num_ranks=world, routing=options.routing,
        weights="real" if has_weights(config, options) else "random",
        tokens=run.batches.train.source,
        sequence_length=positions, global_batch_size=config.train.global_batch_size,
        step_seconds=median, step_seconds_min=min(steps), step_seconds_max=max(steps),
        tokens_per_second_per_gpu=sequences * config.data.max_length,
        model_tflops=sequences * positions * flops.model / 1e12,
        hardware_tflops=sequences * positions * flops.hardware / 1e12,
        parts=of_stage[slowest], slowest_stage=slowest, parts_mean=_mean(parts),
        parts_per_rank=parts,
        marked_step_seconds=max(sum(part.values()) for part in parts), stages=stages,
        peak_bytes=[rank["peak"] for rank in ranks], reserved_bytes=reserved,
        memory_from=memory_from,
        imbalance=mean_imbalance, imbalance_worst=worst_imbalance,
        loss=loss, device=host.device_name(), versions=versions(),
    )  # fmt: skip


def _mean_by_stage(parts: list[dict[str, float]], stages: list[int]) -> dict[int, dict[str, float]]:
    """Seconds of each part by pipeline stage, a mean over the stage's ranks."""
    of_stage: dict[int, list[dict[str, float]]] = {}
    for part, stage in zip(parts, stages, strict=True):
        of_stage.setdefault(stage, []).append(part)
    means = {}
    for stage in sorted(of_stage):
        means[stage] = _mean(of_stage[stage])
    return means


def _busy_seconds(parts: dict[str, float]) -> float:
    """Time of a step in which a stage computes; in the rest it waits for other stages."""
    return sum(parts.values()) - parts["bubble"]


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    """Mean over several steps or ranks, part by part."""
    means = {}
    for name in parts[0]:
        means[name] = statistics.fmean(seconds[name] for seconds in parts)
    return means

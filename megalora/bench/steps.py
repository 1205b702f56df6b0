"""One layout, inside its ranks: the model and the step that training has, timed, and its memory.

First steps to warm up, then steps with nothing but their ends noted, which give the speed; then
steps with every part's beginning noted (``timers.py``), which give the parts; on a CPU one more
with its live tensors counted.
"""

import gc
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
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
from megalora.bench.routing import count_rows, make_even
from megalora.bench.rows import BenchOptions, Measured
from megalora.bench.samples import full_samples
from megalora.bench.timers import Timeline, attach
from megalora.bench.versions import versions
from megalora.config import RunConfig
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.select import resolve
from megalora.model.build import build_model, build_random
from megalora.model.fields import model_shape
from megalora.planner.layouts import ParallelLayout
from megalora.planner.models import find_architecture
from megalora.train.assemble import Inputs, Run, assemble

MARKED_STEPS = 3
"""Steps timed part by part, at most."""


@contextmanager
def training(config: RunConfig, options: BenchOptions) -> Iterator[Run]:
    """The run of ``config`` on the ranks of this world, base weights read or drawn as ``options``
    says."""
    hf = find_architecture(config.model.path)
    shape = model_shape(hf)
    shape.check_layout(config.parallel)
    adapted = resolve(config.lora, shape)
    tokenizer, split = full_samples(config, shape.vocab, natural=options.routing == "natural")

    def prepare(model: AdaptedModel) -> None:
        if options.routing == "balanced":
            make_even(model.chunks, model.groups)

    with assemble(
        config,
        Inputs(shape, adapted, tokenizer, split, None),
        make_base=(
            partial(build_model, folder=Path(config.model.path))
            if has_weights(config, options)
            else partial(build_random, hf, seed=config.train.seed)
        ),
        prepare=prepare,
    ) as run:
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
    """Whether the base's weights are read; raises ``ValueError`` where they are asked for and not
    there."""
    folder = Path(config.model.path)
    found = folder.is_dir() and any(folder.glob("*.safetensors"))
    if options.weights == "real" and not found:
        raise ValueError(
            f"--weights real: {folder} is no folder with *.safetensors; download it, or use"
            " --weights random"
        )
    return found and options.weights != "random"


def measure_layout(config: RunConfig, options: BenchOptions) -> Measured | None:
    """Train and measure; collective. Rank 0 returns what all found, the others None.

    Raises:
        ValueError: what training with this config would raise.
        RuntimeError: a loss that is no number, or an adapter that cannot or did not learn.
    """
    with training(config, options) as run:
        for number in range(options.warmup):
            one_step(run, number)
        host.reset_peak_memory()
        seconds, loss = timed_steps(run, options.warmup, options.steps)
        peak = (host.peak_memory_bytes(), _reserved_bytes())
        done = options.warmup + options.steps
        parts, imbalance = timed_parts(run, done, min(options.steps, MARKED_STEPS))
        done += min(options.steps, MARKED_STEPS)
        if not peak[0]:
            peak = (live_bytes(run, done), None)
        _check_moved(run)
        mine = {
            "seconds": seconds,
            "parts": parts,
            "peak": peak,
            "stage": run.model.groups.pp.rank(),
        }
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        return None if dist.get_rank() else _measured(run, options, ranks, imbalance, loss)


def timed_steps(run: Run, first: int, count: int) -> tuple[list[float], float]:
    """Seconds of each step on this rank, from one step's end to the next one's, and the last
    loss."""
    host.synchronize()
    dist.barrier()
    moments = [host.Stopwatch.mark()]
    loss = math.nan
    for number in range(first, first + count):
        loss = one_step(run, number)
        moments.append(host.Stopwatch.mark())
    return [host.seconds_between(a, b) for a, b in pairwise(moments)], loss


def timed_parts(
    run: Run, first: int, count: int
) -> tuple[dict[str, float], tuple[float, float] | None]:
    """Mean seconds of each part of a step on this rank; and of the experts' rows, how uneven (mean,
    worst)."""
    timeline = Timeline()
    parts = []
    attach(timeline, run.model.chunks, run.model.groups.pp.size())
    imbalance = count_rows(run.model.chunks, run.model.groups)
    for number in range(first, first + count):
        host.synchronize()
        dist.barrier()
        timeline.start()
        one_step(run, number, timeline)
        parts.append(timeline.seconds())
    return {name: statistics.fmean(step[name] for step in parts) for name in parts[0]}, imbalance()


def live_bytes(run: Run, number: int) -> int:
    """The most bytes of tensors alive at once in a step, those included that were there before
    it."""
    gc.collect()
    # All that this process has: parameters, gradient buffers and optimizer state, as an allocator
    # would count them.
    already = [
        o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.layout is torch.strided
    ]
    with LiveTensors(already) as live:
        one_step(run, number)
    return live.peak_bytes


def _reserved_bytes() -> int | None:
    return torch.accelerator.max_memory_reserved() if host.device().type != "cpu" else None


def _check_moved(run: Run) -> None:
    """B starts at zero; raises ``RuntimeError`` if it is all zero still."""
    factors = [p.parameter[p.index] for p in run.model.shards if ".lora_B." in p.name]
    moved = torch.tensor(float(any(bool(b.count_nonzero()) for b in factors)), device=host.device())
    dist.all_reduce(moved, op=dist.ReduceOp.MAX)
    if not moved:
        raise RuntimeError(
            "no adapter has moved: every B is still zero, so what was measured is no training"
        )


def _measured(
    run: Run,
    options: BenchOptions,
    ranks: list[Any],
    imbalance: tuple[float, float] | None,
    loss: float,
) -> Measured:
    """From what each rank found (seconds, parts, peak, stage) to the whole."""
    config = run.config
    world = len(ranks)
    steps = [max(step) for step in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    median = statistics.median(steps)
    positions = config.data.max_length - 1
    flops = flops_per_token(run.model.shape, run.model.adapted, positions, config.train.recompute)
    samples = config.train.global_batch_size / median / world  # per second and GPU
    parts = [rank["parts"] for rank in ranks]
    stages = [rank["stage"] for rank in ranks]
    of_stage = {
        s: _mean([p for p, stage in zip(parts, stages, strict=True) if stage == s])
        for s in sorted(set(stages))
    }
    slowest = max(of_stage, key=lambda s: sum(of_stage[s].values()) - of_stage[s]["bubble"])
    gpu = host.device().type != "cpu"
    return Measured(
        layout=str(ParallelLayout.of(config, world)), num_ranks=world, routing=options.routing,
        weights="real" if has_weights(config, options) else "random",
        tokens=run.batches.train.source,
        sequence_length=positions, global_batch_size=config.train.global_batch_size,
        step_seconds=median, step_seconds_min=min(steps), step_seconds_max=max(steps),
        tokens_per_second_per_gpu=samples * config.data.max_length,
        model_tflops=samples * positions * flops.model / 1e12,
        hardware_tflops=samples * positions * flops.hardware / 1e12,
        parts=of_stage[slowest], slowest_stage=slowest, parts_mean=_mean(parts),
        parts_per_rank=parts,
        marked_step_seconds=max(sum(p.values()) for p in parts), stages=stages,
        peak_bytes=[rank["peak"][0] for rank in ranks],
        reserved_bytes=[rank["peak"][1] for rank in ranks] if gpu else None,
        memory_from="allocator" if gpu else "live tensors",
        imbalance=imbalance[0] if imbalance else None,
        imbalance_worst=imbalance[1] if imbalance else None,
        loss=loss, device=host.device_name(), versions=versions(),
    )  # fmt: skip


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(p[name] for p in parts) for name in parts[0]}

"""The training loop: a straight line from a config to an adapter folder."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalora import host
from megalora.config import RunConfig
from megalora.config.file import save_config
from megalora.data.probe_text import probe_tokens
from megalora.data.splits import load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.hf.folder import local_folder
from megalora.lora.adapted_model import AdaptedModel, build_adapted
from megalora.lora.coverage import GradientCheck, trainable_summary, write_manifest
from megalora.lora.select import plan
from megalora.model.recompute import apply_recompute
from megalora.parallel import parallel_groups
from megalora.serve.live_sync import serving
from megalora.train import duration
from megalora.train.batches import Batches
from megalora.train.checkpoint.identity import Identity, Samples, identify
from megalora.train.checkpoint.load import load_checkpoint
from megalora.train.checkpoint.same_run import check_same_run, check_same_samples
from megalora.train.checkpoint.save import save_checkpoint
from megalora.train.checkpoint.state import SavedState
from megalora.train.checkpoint.where import find_checkpoint
from megalora.train.drift import DriftCheck
from megalora.train.metrics import Metrics
from megalora.train.optim import (
    build_optimizer,
    clip_and_step,
    learning_rate,
    set_learning_rate,
    wrap_chunks,
)
from megalora.train.probe import Probe
from megalora.train.run_folder import opened
from megalora.train.signals import terminated
from megalora.train.step import Stepper
from megalora.verify.first_loss import compare_losses
from megalora.verify.layer import check_layers


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    identity: Identity
    samples: Samples
    state: SavedState | None
    """Of the checkpoint to go on from."""
    notes: list[str]
    """Lines for the user."""


def train(config: RunConfig, job: str | None = None) -> Path | None:
    """Fine-tune as ``config`` says, on the ranks of the initialised world.

    Args:
        job: names torchrun's call: when it starts the ranks again, they go on from the last
            checkpoint.
    Returns:
        The last checkpoint's folder, or None when a signal stopped the run before its first step.
    Raises:
        ValueError: for anything the user can mend, before weights are read where that is possible.
    """
    config.check_world(dist.get_world_size())
    with opened(Path(config.checkpoint.dir), job) as run_folder:
        found = find_checkpoint(config, restarted=run_folder.same_job)
        folder = local_folder(config.model.path)
        shape, adapted = plan(config.lora, config.parallel, folder)
        identity = identify(config, folder)
        notes = [*run_folder.notes, *found.notes]
        if found.state:
            notes += check_same_run(found.state, config, identity, adapted)
        tokenizer = load_tokenizer(folder)
        splits = load_data(config.data, tokenizer)
        samples = Samples.of(splits[0].samples)
        check_agreement("training samples", samples)
        # refuses a warm-up that is longer, before weights are read
        duration.num_steps(config.train, samples.count)
        if found.state:
            check_same_samples(found.state, config, samples)
        with parallel_groups(config.parallel, config.train.seed) as groups:
            model = build_adapted(
                folder, shape, adapted, groups,
                model=config.model, parallel=config.parallel, lora=config.lora,
                seed=config.train.seed,
                rows_per_expert=shape.rows_per_expert(config),
            )  # fmt: skip
            apply_recompute(model.chunks, config.train.recompute)
            probe = Probe(probe_tokens(tokenizer), config.model.dtype, config.parallel)
            batches = Batches(config, tokenizer, groups, *splits)
            return _fit(config, model, batches, probe, Start(identity, samples, found.state, notes))


def _fit(
    config: RunConfig, model: AdaptedModel, batches: Batches, probe: Probe, at: Start
) -> Path | None:
    options = config.train
    num_steps = batches.num_steps
    chunks = wrap_chunks(model.chunks)
    optimizer = build_optimizer(options, getattr(torch, config.model.dtype), chunks)
    stepper = Stepper(chunks, model.groups, GradientCheck(model.adapted, model.pieces))
    drift = DriftCheck(model.adapted, model.pieces, model.groups)
    saved, step = (at.state.folder, at.state.step) if at.state else (None, 0)
    notes = [*at.notes, *(load_checkpoint(at.state, model, optimizer) if at.state else [])]
    check_agreement("number of finished steps", step)
    start = step
    saved_step = evaluated_step = step if saved else -1
    with (
        Metrics(
            Path(config.checkpoint.dir), config.log, num_steps, step, active=dist.get_rank() == 0
        ) as metrics,
        serving(config, model, metrics.say, saved) as serve,
        terminated() as stop,
    ):
        for note in notes:
            metrics.say(note)
        _open(config, model, stepper, batches, metrics, step, saved)
        while True:
            stopped = stop()
            done = stopped or step >= num_steps
            saving = step and step != saved_step and (done or _due(step, config.checkpoint.every))
            if (every := options.check_replicas_every) and (
                saving or step <= start + 1 or _due(step, every)
            ):
                drift.run(step, saved)
            if saving:
                probed = probe.run(stepper)
                saved = save_checkpoint(
                    step, at.samples, at.identity, config, model, optimizer, probed
                )
                saved_step = step
                serve(saved)
                metrics.restart_clock()
            due = step in (0, num_steps) or _due(step, options.eval_every)
            if batches.eval and due and step != evaluated_step and not stopped:
                metrics.evaluation(step, *stepper.evaluate(batches.of_eval()))
            if done:
                break
            values = _train_step(
                stepper,
                optimizer,
                batches,
                step,
                lr=learning_rate(options, step, num_steps),
                saved=saved,
            )
            step += 1
            metrics.train_step(step, **values, num_tokens=batches.num_tokens(step - 1))
    metrics.say(_closing(step, num_steps, saved))
    return saved


def _open(
    config: RunConfig,
    model: AdaptedModel,
    stepper: Stepper,
    batches: Batches,
    metrics: Metrics,
    step: int,
    saved: Path | None,
) -> None:
    """Write down what runs, say it, and compare the base with transformers' before it is trained
    on."""
    if dist.get_rank() == 0:
        run = Path(config.checkpoint.dir)
        save_config(config, run / "config.yaml")
        write_manifest(run / "manifest.json", model.adapted)
    metrics.say(_opening(config, model, batches, saved))
    check = config.train.check_base if step < batches.num_steps else "off"
    if check != "off":
        folder = local_folder(config.model.path)
        dtype = getattr(torch, config.model.dtype)
        metrics.say(check_layers(model.chunks, model.groups, folder, dtype))
    if check == "loss":
        metrics.say(_check_first_loss(config, model, stepper, batches, step, saved))


def _train_step(
    stepper: Stepper, optimizer: Any, batches: Batches, step: int, *, lr: float, saved: Path | None
) -> dict[str, float]:
    """One optimizer step; what there is to report of it."""
    set_learning_rate(optimizer, lr)
    sum_and_count = stepper.forward_backward(batches.of_step(step), optimizer)
    norm = clip_and_step(optimizer)
    # The only wait for the device in a step; what is not finite by now goes no further than this
    # process.
    total, count, grad_norm = torch.cat([sum_and_count, norm]).tolist()
    loss = total / max(count, 1)
    check_finite(step + 1, "loss", loss, saved)
    check_finite(step + 1, "gradient norm", grad_norm, saved)
    stepper.b_has_moved |= lr > 0
    return {"loss": loss, "lr": lr, "grad_norm": grad_norm}


def _check_first_loss(
    config: RunConfig,
    model: AdaptedModel,
    stepper: Stepper,
    batches: Batches,
    step: int,
    adapter: Path | None,
) -> str:
    """Every rank evaluates the first microbatch of the first data-parallel rank; see
    ``first_loss.py``."""
    batch = batches.first(step)
    p = config.parallel
    ours, _ = stepper.evaluate([batch] * (p.pp if p.vpp > 1 else 1), own=True)
    folder = local_folder(config.model.path)
    dtype = config.model.dtype
    return compare_losses(
        ours, batch, folder=folder, adapter=adapter, dtype=dtype, shape=model.shape
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_finite(step: int, name: str, value: float, saved: Path | None) -> None:
    """Raise ``ValueError`` rather than train on, and save, numbers that are none; the value is the
    same on every rank."""
    if not math.isfinite(value):
        last = f"the last checkpoint is {saved}" if saved else "no checkpoint was saved"
        raise ValueError(
            f"step {step}: the {name} is {value}. Lower train.lr or lengthen train.warmup; {last}."
        )


def check_agreement(name: str, value: Hashable) -> None:
    """Raise ``ValueError`` unless every rank has the same value: files may differ between
    machines."""
    values: list[Hashable] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise ValueError(
            f"ranks disagree about the {name}: {sorted(set(values), key=str)}. Data and"
            " checkpoint.dir must be the same files on every machine."
        )


def _opening(
    config: RunConfig, model: AdaptedModel, batches: Batches, resume_from: Path | None
) -> str:
    p = config.parallel
    world = dist.get_world_size()
    dp, edp = p.data_parallel_sizes(world)
    lines = [
        (
            f"{config.model.path} ({model.shape.model_type}) on {world} x {host.device_name()}:"
            f" tp={p.tp} pp={p.pp} vpp={p.vpp} dp={dp}, experts etp={p.etp} ep={p.ep} edp={edp}"
        ),
        trainable_summary(model.adapted, model.shape),
        f"train: {batches.train.summary()}",
    ]
    lines += [f"eval: {batches.eval.summary()}"] if batches.eval else []
    if rounded := duration.rounding(config.train, len(batches.train.samples)):
        lines.append(rounded)
    lines += [f"continuing from {resume_from}"] if resume_from else []
    return "\n".join(lines)


def _closing(step: int, num_steps: int, saved: Path | None) -> str:
    how = "finished" if step >= num_steps else "stopped by a signal"
    memory = (
        f" (peak memory of a rank: {peak / 2**30:.1f} GiB)"
        if (peak := host.peak_memory_bytes())
        else ""
    )
    return (
        f"{how} at step {step}{memory};"
        f" {f'the adapter is {saved}' if saved else 'nothing was trained or saved'}"
    )

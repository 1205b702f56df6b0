"""The training loop: a straight line from a config to an adapter folder."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megalora import host
from megalora.config import RunConfig, save_config
from megalora.data.loader import (
    Batch,
    Split,
    collate,
    eval_micro_batches,
    global_batch_indices,
    load_split,
    micro_batches,
    split_off_eval,
)
from megalora.lora.inject import GradientCheck, trainable_summary, write_manifest
from megalora.lora.spec import Adapted, resolve
from megalora.model.build import local_folder
from megalora.model.recompute import apply_recompute
from megalora.model.shape import ModelShape, model_shape, read_hf_config
from megalora.parallel import Groups
from megalora.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from megalora.train.metrics import Metrics
from megalora.train.optim import build_optimizer, learning_rate, set_learning_rate, wrap_chunks
from megalora.train.setup import AdaptedModel, build_adapted, parallel_groups
from megalora.train.step import Stepper


def train(config: RunConfig) -> Path:
    """Fine-tune as ``config`` says, on the ranks of the initialised world; returns the last checkpoint's folder."""
    config.check_world(dist.get_world_size())
    folder, resume_from = local_folder(config.model.path), find_checkpoint(config)
    shape, adapted = plan(config, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    splits = load_data(config, tokenizer)
    with parallel_groups(config.parallel, config.train.seed) as groups:
        model = build_adapted(
            folder, shape, adapted, groups,
            model=config.model, parallel=config.parallel, lora=config.lora, seed=config.train.seed,
        )  # fmt: skip
        apply_recompute(model.chunks, config.train.recompute)
        return _run(config, model, Batches(config, tokenizer, groups), *splits, resume_from)


def plan(config: RunConfig, folder: Path) -> tuple[ModelShape, list[Adapted]]:
    """What will be adapted, from the base's config.json alone; every error about it comes before weights are read."""
    shape = model_shape(read_hf_config(folder))
    shape.check_layout(config.parallel)
    return shape, resolve(config.lora, shape)


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, Split | None]:
    """The training samples and, where asked for, the evaluation samples."""
    data, how = config.data, {"format": config.data.format, "max_length": config.data.max_length}
    whole = load_split(data.train, tokenizer, **how)
    if data.eval is None:
        return whole, None
    return (
        (whole, load_split(data.eval, tokenizer, **how))
        if isinstance(data.eval, str)
        else split_off_eval(whole, data.eval, data.seed)
    )


def _run(
    config: RunConfig,
    model: AdaptedModel,
    batches: "Batches",
    train_split: Split,
    eval_split: Split | None,
    resume_from: Path | None,
) -> Path:
    options, groups, run = config.train, model.groups, Path(config.checkpoint.dir)
    chunks = wrap_chunks(model.chunks)
    optimizer = build_optimizer(options, getattr(torch, config.model.dtype), chunks)
    stepper = Stepper(chunks, groups, GradientCheck(model.adapted, model.pieces))
    num_steps = options.steps or round(options.epochs * len(train_split.samples) / options.global_batch_size)  # type: ignore
    step = load_checkpoint(resume_from, config, model, optimizer) if resume_from else 0
    first = dist.get_rank() == 0
    metrics = Metrics(run, config.log, num_steps, step, active=first)
    if first:
        save_config(config, run / "config.yaml")
        write_manifest(run / "manifest.json", model.adapted)
    metrics.say(_opening(config, model, train_split, eval_split, resume_from))

    def save() -> Path:
        return save_checkpoint(step, config, model, optimizer)

    def evaluate() -> None:
        if eval_split:
            metrics.evaluation(step, *stepper.evaluate(batches.of_eval(eval_split)))

    if step == 0:
        evaluate()
    saved: Path | None = resume_from
    metrics.progress.start()
    with terminated() as stop:
        while step < num_steps and not stop():
            lr = learning_rate(options, step, num_steps)
            set_learning_rate(optimizer, lr)
            batch = batches.of_step(step, train_split)
            loss, _ = stepper.train(batch, optimizer)
            _, grad_norm, _ = optimizer.step()
            stepper.b_has_moved |= lr > 0
            step += 1
            tokens = batches.num_tokens(step - 1, train_split)
            metrics.train_step(step, loss=loss, lr=lr, grad_norm=float(grad_norm), num_tokens=tokens)
            if options.eval_every and step % options.eval_every == 0 and step < num_steps:
                evaluate()
            if config.checkpoint.every and step % config.checkpoint.every == 0 and step < num_steps:
                saved = save()
        if step >= num_steps:
            evaluate()
        saved = save() if step and (saved is None or saved.name != f"step_{step:06d}") else saved
    metrics.close()
    metrics.say(f"{'finished' if step >= num_steps else 'stopped by a signal'} at step {step}; the adapter is {saved}")
    assert saved is not None
    return saved


class Batches:
    """This data-parallel rank's microbatches of any step, and of an evaluation."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, groups: Groups) -> None:
        self.config, self.dp_rank, self.dp_size, self.tp_size = (
            config,
            groups.dp.rank(),
            groups.dp.size(),
            groups.tp.size(),
        )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_id = pad if isinstance(pad, int) else 0

    def _indices(self, step: int, split: Split) -> Any:
        return global_batch_indices(
            step, self.config.train.global_batch_size, len(split.samples), self.config.data.seed
        )

    def of_step(self, step: int, split: Split) -> list[Batch]:
        size = self.config.train.micro_batch_size
        mine = micro_batches(
            self._indices(step, split), micro_batch_size=size, dp_rank=self.dp_rank, dp_size=self.dp_size
        )
        return self._collate([[split.samples[i] for i in indices] for indices in mine])

    def of_eval(self, split: Split) -> list[Batch]:
        """Every sample once over all ranks, empty fillers where the count does not divide."""
        size, p = self.config.train.micro_batch_size, self.config.parallel
        mine = eval_micro_batches(
            len(split.samples), size, self.dp_rank, self.dp_size, multiple=p.pp if p.vpp > 1 else 1
        )
        return self._collate([[None if i is None else split.samples[i] for i in indices] for indices in mine])

    def num_tokens(self, step: int, split: Split) -> int:
        """Tokens of the whole global batch, padding left out."""
        return sum(len(split.samples[i].input_ids) for i in self._indices(step, split))

    def _collate(self, groups_of_samples: list[list[Any]]) -> list[Batch]:
        """Padded to each microbatch's longest sample; to the longest of all where the interleaved schedule needs one length."""
        how = {"pad_id": self.pad_id, "multiple_of": self.tp_size}
        batches = [collate(samples, **how) for samples in groups_of_samples]
        if self.config.parallel.vpp == 1:
            return batches
        longest = max(batch.tokens.shape[1] for batch in batches)
        return [collate(samples, **{**how, "multiple_of": longest}) for samples in groups_of_samples]


def _opening(
    config: RunConfig, model: AdaptedModel, train_split: Split, eval_split: Split | None, resume_from: Path | None
) -> str:
    p, world = config.parallel, dist.get_world_size()
    dp, edp = p.data_parallel_sizes(world)
    lines = [
        f"{config.model.path} ({model.shape.model_type}) on {world} x {host.device_name()}: tp={p.tp} pp={p.pp} vpp={p.vpp} "
        f"dp={dp}, experts etp={p.etp} ep={p.ep} edp={edp}",
        trainable_summary(model.adapted, model.shape),
        f"train: {train_split.summary()}",
    ]
    lines += [f"eval: {eval_split.summary()}"] if eval_split else []
    lines += [f"continuing from {resume_from}"] if resume_from else []
    return "\n".join(lines)


@contextmanager
def terminated() -> Iterator[Any]:
    """Yields a function that tells, on every rank alike, whether any rank has been asked to stop (SIGTERM)."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(1))

    def stop() -> bool:
        flag = torch.tensor(len(asked), device=host.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)

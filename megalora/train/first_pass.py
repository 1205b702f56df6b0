"""What is compared and timed on this run's own ranks before its first step."""

import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from megalora import host
from megalora.hf.folder import local_folder
from megalora.lora.without_dropout import without_dropout
from megalora.model.held import rounded_names
from megalora.train.assemble import Run
from megalora.verify.first_loss import compare_losses
from megalora.verify.layer import check_layers

ROUNDS = 3
"""Passes with dropout and as many without are timed, in turn."""


def compare_layers(run: Run, *, is_over: bool) -> list[str]:
    """Compare the base with transformers before it is trained on; returns lines about it.
    Collective.

    Args:
        is_over: whether the run resumes at its end and trains no more.
    """
    config = run.config
    if config.train.check_base == "off" or is_over:
        return []
    folder = local_folder(config.model.path)
    dtype = getattr(torch, config.model.dtype)
    return [
        check_layers(
            run.model.chunks, run.model.groups, folder, dtype, rounded_names(config.model, folder)
        )
    ]


def check_first_loss(run: Run, step: int, adapter: Path | None) -> str:
    """Every rank evaluates the first microbatch of the first data-parallel rank; see
    ``first_loss.py``."""
    config = run.config
    batch = run.batches.first(step)
    # As many copies as the schedule wants: their mean is that of one.
    copies = config.parallel.round_multiple
    losses = run.stepper.token_losses([batch] * copies).cpu()
    ours = losses[batch.loss_mask > 0].double().mean().item()
    folder = local_folder(config.model.path)
    dtype = config.model.dtype
    return compare_losses(
        ours, batch, folder=folder, adapter=adapter, dtype=dtype, shape=run.model.shape,
        nf4=rounded_names(config.model, folder),
    )  # fmt: skip


def time_dropout(run: Run, step: int) -> str:
    """One line: how much longer a forward and backward pass takes with ``lora.dropout`` than
    without it, on the first rows of ``step``; collective.

    Nothing of the run changes: the next step zeroes the gradients, and draws the masks that it
    would have drawn.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    state = host.rng_state()
    # The first pair pays for compilation and for memory that is not reserved yet.
    for pair in range(1 + ROUNDS):
        for has_dropout in (True, False):
            taken = _time_pass(run, step, has_dropout=has_dropout)
            if pair:
                seconds[has_dropout].append(taken)
    host.set_rng_state(state)
    with_it, without = (statistics.median(seconds[which]) for which in (True, False))
    return (
        f"lora.dropout={run.config.lora.dropout:g} makes a forward and backward pass"
        f" {with_it / without:.2f} x as long, measured on the first rows: {with_it:.3g} s in place"
        f" of {without:.3g} s"
    )


def _time_pass(run: Run, step: int, *, has_dropout: bool) -> float:
    """Seconds of the slowest rank for one round of microbatches."""
    count = run.config.parallel.round_multiple
    rows = run.batches.of_step(step)[:count]
    mismatched = run.batches.mismatched_of_step(step)[:count]
    host.synchronize()
    dist.barrier()
    begun = time.perf_counter()
    with nullcontext() if has_dropout else without_dropout(run.model.chunks):
        run.stepper.forward_backward(rows, run.optimizer, mismatched)
    host.synchronize()
    taken = torch.tensor(time.perf_counter() - begun, dtype=torch.float64, device=host.device())
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item()

"""Count the live tensors of one rank in a real training step: what is always there, what forward
and backward add and keep, and what the optimizer adds."""

import gc
import itertools
import math
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
from megalora_kernels import each_expert, swiglu_backward
from torch import Tensor, nn

from megalora.bench.live import LiveTensors
from megalora.config import ObjectiveConfig, RunConfig
from megalora.data.batch import Batch
from megalora.train.assemble import Run
from megalora.train.optim import _parts, clip_and_step, fuse
from megalora.train.teacher import SecondModel
from tests.lora.held import norms_of
from tests.parity.built import built

SFT = ObjectiveConfig()
SEQUENCE = 192
"""Tokens of every sample."""
MICROBATCHES = 4
"""Microbatches of a rank; more than the two pipeline stages of the cases, so that all are full."""


def count_step(config: RunConfig, top_k: int) -> dict[str, int]:
    """Bytes of one rank by category, after a step in which the optimizer made its state.

    Args:
        config: a run on the CPU.
        top_k: experts of a token; 0 for a dense model.
    """
    # Experts one at a time, as ``counted.py`` says: for few rows the CPU has a single call, whose
    # temporaries GPUs' kernels do without.
    with (
        mock.patch.object(each_expert, "FEW_ROWS", 0),
        mock.patch.object(swiglu_backward, "LOOP_ELEMENTS", 0),
        built(config) as run,
    ):
        if top_k:
            route_evenly(run, top_k)
        # As on GPUs; on the CPU, AdamW would go from tensor to tensor.
        fuse(run.optimizer)
        batches = make_batches(config.train.micro_batch_size, config.objective)
        # The step that makes the moments; the next one is counted.
        run.stepper.train(batches, run.optimizer)
        clip_and_step(run.optimizer)
        there = tensors_of(run)
        found = {name: num_bytes(tensors) for name, tensors in there.items()}
        already = list(itertools.chain.from_iterable(there.values()))
        # On a busy machine a step of two tensor-parallel ranks was seen to take 1.2 % more, for a
        # reason that nobody has found: the smaller count of two equal steps.
        first = peaks(run, batches, already)
        second = peaks(run, batches, already)
        for name in first:
            found[name] = min(first[name], second[name])
        return found | {"activations": kept(run, batches, already)}


def even_choice(tokens: int, experts: int, top_k: int) -> Tensor:
    """``[tokens, top_k]``: experts in turn, seven apart, so that all get equally many rows and a
    token's lie on different ranks."""
    assert math.gcd(7, experts) == 1
    turn = torch.arange(tokens)[:, None] * top_k + torch.arange(top_k)
    return turn * 7 % experts


def ranks_of_tokens(tokens: int, experts: int, top_k: int, ep: int) -> float:
    """Expert-parallel ranks of a token that ``even_choice`` gives it, on average."""
    ranks = even_choice(tokens, experts, top_k) // (experts // ep)
    return sum(len(set(row)) for row in ranks.tolist()) / tokens


def route_evenly(run: Run, top_k: int) -> None:
    """Token t goes to the experts of ``even_choice``: the router's own logits decide the weights
    alone."""

    def evenly(gating: Any) -> Any:
        def even(x: Tensor) -> Tensor:
            logits = gating(x)
            tokens = logits.numel() // logits.shape[-1]
            experts = logits.shape[-1]
            chosen = even_choice(tokens, experts, top_k)
            # Logits are of the order of 1: no expert without the bonus comes before one with it.
            bonus = torch.zeros(tokens, experts, dtype=logits.dtype).scatter_(1, chosen, 64.0)
            return logits.add_(bonus.view_as(logits))

        return even

    for module in modules_of(run):
        # Never twice, or the bonus would count twice.
        if hasattr(module, "gating") and "gating" not in vars(module):
            module.gating = evenly(module.gating)


def make_batches(micro: int, objective: ObjectiveConfig = SFT) -> list[Batch]:
    """Samples of one length, as the plan has them: every token is a target, or with a score head
    the last one is scored."""
    sequences = micro * objective.sequences
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(MICROBATCHES):
        tokens = torch.randint(0, 256, (sequences, SEQUENCE), generator=generator)
        mask = torch.ones(sequences, SEQUENCE)
        if objective.num_scores:
            mask[:, :-1] = 0
        batch = Batch.of_equal(tokens, tokens.roll(-1, 1), mask)
        # Labels, or margins.
        labels = torch.randint(0, objective.num_scores or 1, (sequences,), generator=generator)
        found.append(replace(batch, values=tuple(map(float, labels.tolist()))))
    return found


def tensors_of(run: Run) -> dict[str, list[Tensor]]:
    """What a rank always holds: frozen weights, parameter and gradient buffers, the optimizer's
    state."""
    # Megatron keeps dense and routed adapters in buffers of their own.
    buffers = []
    for chunk in run.stepper.chunks:
        buffers += chunk.buffers + chunk.expert_parallel_buffers
    state: list[Any] = []
    for part in _parts(run.optimizer):
        for moments in part.optimizer.state.values():
            for tensor in moments.values():
                # Moments are vectors; the number of the step, a scalar, is not worth counting.
                if torch.is_tensor(tensor) and tensor.dim():
                    state.append(tensor)
        # Masters of parameters in half precision.
        for group in part.shard_fp32_from_float16_groups:
            state += group
    frozen: list[Tensor] = []
    # Of adapters what lies outside of buffers.
    others: list[Tensor] = list({shard.parameter for shard in run.model.frozen})
    own = {id(parameter) for parameter in others}
    for chunk in chunks_of_teacher(run):
        frozen += list(chunk.parameters())
    for chunk in run.model.chunks:
        others += norms_of(chunk)
        for parameter in chunk.parameters():
            # The base's own value of what is trained whole, where passes of the base need it.
            kept: Tensor | None = getattr(parameter, "base_value", None)
            if kept is not None:
                others.append(kept)
            if not parameter.requires_grad and id(parameter) not in own:
                frozen.append(parameter)
    # Parameters and gradients of adapters are views of Megatron's buffers, padding included.
    return {
        "weights": frozen, "adapters": [b.param_data for b in buffers] + others,
        "gradients": [b.grad_data for b in buffers],
        "optimizer": state,
    }  # fmt: skip


def chunks_of_teacher(run: Run) -> list[nn.Module]:
    """Those of a second model; empty where there is none."""
    teacher = run.stepper.teacher
    return teacher.chunks if isinstance(teacher, SecondModel) else []


def modules_of(run: Run) -> Iterator[nn.Module]:
    for chunk in [*run.model.chunks, *chunks_of_teacher(run)]:
        yield from chunk.modules()


def num_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages that the tensors lie in."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peaks(run: Run, batches: list[Batch], already: list[Tensor]) -> dict[str, int]:
    """``pass``: most that forward and backward add; ``step``: most that reduction or optimizer add
    to what is left then."""
    settings = run.stepper.chunks[0].config
    # What the first step left in cycles would be counted, and freed at some time.
    gc.collect()
    # Megatron's schedule calls this between the last backward pass and the optimizer.
    finalize = settings.finalize_model_grads_func
    live = LiveTensors(already)
    found = {}
    always = live.now_bytes
    left = 0

    def reduce(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        found["pass"] = live.peak_bytes - always
        left = live.now_bytes
        live.reset_peak()
        finalize(*args, **kwargs)
        found["step"] = live.peak_bytes - left

    settings.finalize_model_grads_func = reduce
    with live:
        run.stepper.train(batches, run.optimizer)
        found["peak"] = max(always + found["pass"], live.peak_bytes)
        # The same for clipping and the optimizer, which come after the schedule.
        left = live.now_bytes
        live.reset_peak()
        clip_and_step(run.optimizer)
    settings.finalize_model_grads_func = finalize
    found["step"] = max(found["step"], live.peak_bytes - left)
    found["peak"] = max(found["peak"], live.peak_bytes)
    return found


class Saved:
    """A tensor that a node keeps for backward; gone when the node is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_beside(own: Container[int], saved: Iterable[Saved]) -> list[Tensor]:
    """Saved tensors but those that lie in storages of ``own``, named by their addresses."""
    tensors = []
    for holder in saved:
        if holder.tensor.untyped_storage().data_ptr() not in own:
            tensors.append(holder.tensor)
    return tensors


def kept(run: Run, batches: list[Batch], already: list[Tensor]) -> int:
    """Most bytes that nodes keep for backward, looked at whenever a forward pass ended and a
    backward pass begins."""
    own = {t.untyped_storage().data_ptr() for t in already}
    # Weak, so that a holder is gone when autograd frees its node.
    saved: WeakSet[Saved] = WeakSet()
    # Whether a tensor was saved since one was last asked for: only then may there be more.
    forward = True
    most = 0

    def pack(tensor: Tensor) -> Saved:
        nonlocal forward
        forward = True
        saved.add(holder := Saved(tensor))
        return holder

    def unpack(holder: Saved) -> Tensor:
        nonlocal forward, most
        if forward:
            most = max(most, num_bytes(kept_beside(own, saved)))
        forward = False
        return holder.tensor

    with collecting(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run.stepper.train(batches, run.optimizer)
    return most


@contextmanager
def collecting() -> Iterator[None]:
    """A node whose output is kept by a hook is a cycle, which the collector alone frees: often, so
    that none counts twice."""
    before = gc.get_threshold()
    gc.set_threshold(200, 1, 1)
    yield
    gc.set_threshold(*before)

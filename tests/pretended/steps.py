"""One rank's training on the pretended GPU, through the product's own functions, in a world whose
other ranks do not exist."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import megatron.core.tensor_parallel.random as megatron_random
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalora import host
from megalora.config import RunConfig
from megalora.data.chat import Encoded
from megalora.data.splits import Split
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.model.build import make_chunks
from megalora.model.dispatcher import AllToAllDispatcher, Splits
from megalora.model.fields import model_shape
from megalora.planner.microbatch import ranks_per_token
from megalora.train.assemble import Inputs, Run, assemble, build_for_training
from megalora.train.checkpoint.pieces import OwnedPieces
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.drift import DriftCheck
from megalora.train.probe import Probe
from tests.pretended.device import pretended_gpu
from tests.pretended.recorder import NAME, Recorder, on_gpu
from tests.pretended.scenarios import Scenario


class Tokenizer:
    """What batching asks of a tokenizer: the ids that fill and end a row."""

    pad_token_id = 0
    eos_token_id = 1


def _samples(scenario: Scenario, count: int) -> Split:
    samples = []
    for number in range(count):
        length = scenario.tokens
        if scenario.row_tokens is not None:
            # Of four lengths, so that documents end inside of chunks and rows need filler.
            length -= 5 * (number % 4)
        # Every token is a target, and all are alike: no value is ever computed with.
        ids = np.ones(length, dtype=np.int32)
        mask = np.ones(length, dtype=bool)
        second = 0
        if scenario.pairs:
            ids, mask = np.tile(ids, 2), np.tile(mask, 2)
            second = length
        samples.append(Encoded(ids, mask, second=second))
    return Split("pretended", 4096, samples, pairs=scenario.pairs)


@contextlib.contextmanager
def world(scenario: Scenario, recorder: Recorder) -> Iterator[None]:
    """A fake process group for both devices; what objects are exchanged, each rank would have sent
    as this one does."""
    # torch's "fake" backend is registered for real devices; this one is new to it.
    for name in ("cpu", NAME):
        dist.Backend.default_device_backend_map[name] = "fake"
    dist.Backend.backend_capability["fake"] = ["cpu", NAME]
    dist.init_process_group(
        f"cpu:fake,{NAME}:fake", store=FakeStore(), rank=scenario.rank, world_size=scenario.world
    )

    # The fake backend writes nothing, so nothing could be unpickled from what it returns.
    def all_gather_object(out: list[Any], value: Any, group: Any = None) -> None:
        recorder.wait("exchange of objects")
        out[:] = [value] * len(out)

    try:
        with (
            mock.patch.object(dist, "all_gather_object", all_gather_object),
            mock.patch.object(param_and_grad_buffer, "_coalescing_manager", _one_by_one),
            # Reaches into torch.cuda's generators, of which there are none.
            mock.patch.object(megatron_random, "_set_cuda_rng_state"),
            mock.patch.object(host, "device", return_value=torch.device(NAME, 0)),
        ):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _one_by_one(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """Collectives that Megatron would send as one; a fake group has no such operation."""
    yield mock.Mock()


@contextlib.contextmanager
def even_routing() -> Iterator[None]:
    """What the dispatcher reads on the host: every rank sends as many rows and pairs as every other
    rank, and as many rows as the planner expects of choices among experts that are all alike."""
    read = AllToAllDispatcher._exchange_counts

    def answered(self: Any, sending: Any) -> tuple[Splits, Splits]:
        # The host waits where it reads, and what it reads is nothing.
        read(self, sending)
        num_tokens = sending.slots_TD.shape[0]
        num_pairs = num_tokens * self.config.moe_router_topk
        spread = ranks_per_token(
            self.config.num_moe_experts, self.config.moe_router_topk, self.ep_size
        )
        num_rows = round(num_tokens * spread)
        return _even(self, num_rows), _even(self, num_pairs)

    with mock.patch.object(AllToAllDispatcher, "_exchange_counts", answered):
        yield


def _even(dispatcher: Any, count: int) -> Splits:
    """``count`` in equal parts, the first with what is left over."""
    shares = [count // dispatcher.ep_size] * dispatcher.ep_size
    shares[0] += count % dispatcher.ep_size
    return Splits(shares, shares, [count] * dispatcher.tp_size)


def _move(chunk: Any) -> None:
    """``chunk.to(device)``, which cannot exchange the data of fake parameters."""
    for module in chunk.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not on_gpu(parameter):
                moved = torch.nn.Parameter(
                    parameter.data.to(host.device()), requires_grad=parameter.requires_grad
                )
                # Megatron keeps marks on parameters (allreduce, tensor_model_parallel, ...), which
                # decide how their gradients are reduced.
                for attribute, value in vars(parameter).items():
                    vars(moved).setdefault(attribute, value)
                module._parameters[name] = moved


def _make_base(hf: dict[str, Any], *where: Any, **how: Any) -> list[Any]:
    """The base without its weights, on the pretended GPU."""
    chunks = make_chunks(hf, *where, **how)
    for chunk in chunks:
        _move(chunk)
    return chunks


def build(
    config: RunConfig, hf: dict[str, Any], groups: Any, adapted: list[Adapted] | None = None
) -> AdaptedModel:
    """The model as training has it, but for its weights; ``adapted`` in place of what the config
    selects."""
    shape = model_shape(dict(hf))
    adapted = adapted or resolve(config.lora, shape)
    return build_for_training(config, shape, adapted, groups, partial(_make_base, hf))


def run(scenario: Scenario, recorder: Recorder) -> None:
    """A training step as it is once training runs; where the scenario asks for it, what comes
    before and between steps too."""
    config = scenario.config()
    shape = model_shape(dict(scenario.hf))
    samples = _samples(scenario, config.train.global_batch_size)
    inputs = Inputs(shape, resolve(config.lora, shape), Tokenizer(), samples, samples)
    make_base = partial(_make_base, scenario.hf)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended_gpu(recorder))
        stack.enter_context(world(scenario, recorder))
        stack.enter_context(even_routing())
        with recorder.phase("build"):
            made = stack.enter_context(assemble(config, inputs, make_base=make_base))
        # B is zero at first and A gets no gradient: two steps are checked, the third is like all
        # others.
        names = ("first step", "second step", "step")
        if not scenario.whole_run:
            made.stepper.check = None  # it looks at the first steps alone
            names = ("step",)
        for number, name in enumerate(names):
            with recorder.phase(name):
                # Counting tokens per expert must not cost a wait or a copy either.
                made.step(number, lr=1e-3, count_experts=name == "step")
        if scenario.whole_run:
            _between_steps(scenario, recorder, made)


def _between_steps(scenario: Scenario, recorder: Recorder, made: Run) -> None:
    config = made.config
    model = made.model
    probe = Probe([1] * scenario.tokens, config.model.dtype, config.parallel)
    drift = DriftCheck(model.adapted, model.shards, made.groups)
    with recorder.phase("drift"):
        drift.run(3, None)
    with recorder.phase("evaluate"):
        made.stepper.evaluate(made.batches.of_eval())
    with recorder.phase("probe"):
        probe.run(made.stepper)
    pieces = OwnedPieces(model, made.optimizer)
    with recorder.phase("save"):
        # What the training thread does of it.
        Snapshot().take(pieces.blocks(), {})

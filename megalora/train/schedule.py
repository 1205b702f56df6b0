"""Run microbatches through this rank's chunks of a model by Megatron's pipeline schedules: the
model that trains, or a teacher beside it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megalora import host
from megalora.data.batch import Batch
from megalora.model.balance import Balance
from megalora.model.expert_load import ExpertLoad
from megalora.model.head import Outputs, Wanted, project
from megalora.model.head_chunk import CHUNK_BYTES
from megalora.model.vocab_logits import Reader
from megalora.parallel import Groups, megatron_groups
from megalora.train.inputs import DeviceBatch
from megalora.train.known_shapes import KnownShapes

Report = Callable[[Outputs, DeviceBatch], tuple[Tensor, Tensor, Any]]
"""Makes of what the head has read of a microbatch (loss, 1, what to report)."""
Want = Callable[[DeviceBatch], Mapping[str, Reader]]
"""What the head reads of a microbatch's labels."""


@dataclass(frozen=True, eq=False)
class Ending:
    """How a model ends in a pass."""

    want: Want
    report: Report
    processor: Callable[..., Outputs] | None = None
    """Stands in place of ``project``, as ``GPTModel`` calls it."""
    chunk_bytes: int = CHUNK_BYTES
    """As in ``Wanted``."""


def run_schedule(
    chunks: list[Any],
    groups: Groups,
    load: ExpertLoad,
    batches: list[Batch],
    inputs: list[DeviceBatch],
    ending: Ending,
    *,
    forward_only: bool,
    balance: Balance | None = None,
) -> list[Any]:
    """What ``ending`` reports of each microbatch, in their order, on the last pipeline stage; an
    empty list elsewhere. Collective over the stages and over the groups within them.

    Args:
        load: counts tokens of these chunks' experts.
        inputs: what of ``batches`` this rank reads, on its device.
    """
    # Every chunk reads each microbatch once. Megatron wants lists for several chunks alone.
    iterators = [iter(inputs) for _ in chunks]
    several = len(chunks) > 1
    communication: dict[str, Any] = {}
    if groups.pp.size() > 1 and not several:
        communication = _stages(chunks[0].config, groups, batches)
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, ending=ending, load=load, balance=balance),
        data_iterator=iterators if several else iterators[0],
        model=chunks if several else chunks[0],
        num_microbatches=len(batches),
        # Of a whole row: Megatron divides it by the context-parallel size.
        seq_length=len(batches[0].tokens),
        micro_batch_size=1,
        forward_only=forward_only,
        **communication,
    )


def _stages(config: Any, groups: Groups, batches: list[Batch]) -> dict[str, Any]:
    """Arguments of the plain schedule for stages that exchange microbatches of any length, which
    every stage knows by itself."""
    # Hidden states [T/(c t), 1, H] under sequence parallelism
    parts = groups.cp.size()
    if groups.sequence_parallel:
        parts *= groups.tp.size()
    shapes: list[tuple[int, ...]] = []
    for batch in batches:
        shapes.append((len(batch.tokens) // parts, 1, config.hidden_size))
    return {
        "p2p_communicator": KnownShapes(groups.pp, config, shapes),
        "pg_collection": megatron_groups(),
    }


def one() -> Tensor:
    """The number of tokens that Megatron's schedules ask for, to divide by what they add up to."""
    return torch.ones((), dtype=torch.int, device=host.device())


def _forward_step(
    inputs: Iterator[DeviceBatch],
    model: nn.Module,
    ending: Ending,
    load: ExpertLoad,
    balance: Balance | None,
) -> tuple[Any, Any]:
    """One microbatch: (what the head has read, what makes a report of it), as Megatron's schedules
    take them; only the last stage calls the second."""
    batch = next(inputs)
    wanted = None
    if batch.labels is not None:
        wanted = Wanted(batch.labels, batch.positions, ending.want(batch), ending.chunk_bytes)
    # Megatron takes [B, T]. Without position ids and attention mask: rotary positions and causality
    # come from the documents.
    counted = nullcontext() if balance is None else balance.microbatch()
    with load.microbatch(batch.filler), counted:
        outputs = model(
            _with_batch(batch.tokens), None, None, packed_seq_params=batch.documents,
            output_processor=ending.processor or project, output_processor_context=wanted,
        )  # fmt: skip
    return outputs, lambda read: ending.report(read, batch)


def _with_batch(row: Tensor | None) -> Tensor | None:
    """A row as a batch of one; None where this stage has none."""
    return None if row is None else row[None]

"""Make the model that of a reference for a while: for a pass that comes before a step's own."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora import host
from megalora.data.batch import Batch
from megalora.lora.switched_off import adapters_off, adapters_with
from megalora.model.expert_load import ExpertLoad
from megalora.objectives.objective import Reference, WhichModel


@dataclass(frozen=True)
class Found:
    """What the passes before a step have found."""

    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    """Name of a reference -> its ``[Q]`` of each microbatch; empty lists before the last stage."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """As ``Sequences.means``."""
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    """Name of a reference by token -> its ``[N]`` of each microbatch; likewise."""

    def add(
        self, reference: Reference, sums: list[Tensor], mismatched: list[Batch], dp: ProcessGroup
    ) -> None:
        """Take what a reference's pass has found.

        Args:
            sums: ``[Q]`` of each microbatch, or ``[N]`` by token, without any before the last
                stage.
            mismatched: this data-parallel rank's rows of such sequences.
            dp: ranks that share the global batch; collective over them.
        """
        if reference.by_token:
            self.tokens[reference.name] = sums
            return
        if not reference.mismatched:
            self.sums[reference.name] = sums
            return
        # Of all sequences of the global batch, whatever rank or microbatch they are in.
        total = torch.zeros(2, dtype=torch.float64, device=host.device())
        for of_row in sums:
            total[0] += of_row.sum()
        total[1:].fill_(sum(batch.num_sequences for batch in mismatched))
        dist.all_reduce(total, group=dp)
        self.means[reference.name] = total[0] / total[1].clamp(min=1)


Start = Mapping[nn.Parameter, Tensor]
"""Parameter of this rank -> its value when the run began."""


@contextmanager
def set_apart(chunks: list[nn.Module], load: ExpertLoad) -> Iterator[None]:
    """A block for passes that leave no traces: experts are counted in the step's own pass, and
    dropout is drawn for it alone."""
    training = chunks[0].training
    counting = load.active
    load.active = False
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        load.active = counting
        for chunk in chunks:
            chunk.train(training)


def model_of(
    reference: Reference, chunks: Iterable[nn.Module], kept: Mapping[WhichModel, Start]
) -> AbstractContextManager[None]:
    """In its block the chunks are the reference's model.

    Args:
        kept: the adapters that references may be, but for the base and the current one.
    """
    if reference.model == "current":
        return nullcontext()
    if reference.model == "base":
        return adapters_off(chunks)
    return adapters_with(kept[reference.model])

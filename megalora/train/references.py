"""Make the model that of a reference for a while: for a pass that comes before a step's own."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from megalora.lora.switched_off import adapters_off, adapters_with
from megalora.model.expert_load import ExpertLoad
from megalora.objectives.objective import Reference

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
    reference: Reference, chunks: Iterable[nn.Module], start: Start | None
) -> AbstractContextManager[None]:
    """In its block the chunks are the reference's model.

    Args:
        start: the adapter that the run began with; needed where the reference is that.
    """
    if not reference.start:
        return adapters_off(chunks)
    assert start is not None, "whoever makes the stepper gives it the start"
    return adapters_with(start)

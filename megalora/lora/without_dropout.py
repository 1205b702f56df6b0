"""Switch dropout off while a model trains."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from megalora.lora.dense import ColumnLoRA, RowLoRA
from megalora.lora.experts import ExpertsLoRA
from megalora.lora.router import RouterLoRA

_WITH_DROPOUT = (ColumnLoRA, RowLoRA, ExpertsLoRA, RouterLoRA)


@contextmanager
def without_dropout(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block no adapter draws a mask, whether the model trains or not."""
    probabilities: list[tuple[ColumnLoRA | RowLoRA | ExpertsLoRA | RouterLoRA, float]] = []
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, _WITH_DROPOUT):
                probabilities.append((module, module.dropout))
                module.dropout = 0.0
    try:
        yield
    finally:
        for module, probability in probabilities:
            module.dropout = probability

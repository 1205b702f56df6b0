"""Switch adapters off for a while: the model is the base then, without a second copy of it."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from megalora.lora.factors import LoRAFactors


@contextmanager
def adapters_off(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block the model is the base, bit for bit: every B is zero, and so is B A x.

    Values are put aside, not overwritten: the parameters point to one shared buffer of zeros, so
    that the block needs the memory of the largest B alone. Nothing may train in it.
    """
    kept: dict[nn.Parameter, Tensor] = {}
    largest = 0
    for chunk in chunks:
        for module in chunk.modules():
            if not isinstance(module, LoRAFactors):
                continue
            for parameter in module.lora_B.values():
                kept[parameter] = parameter.data
                largest = max(largest, parameter.numel())
    # A rank without any adapter has nothing to switch off.
    if not kept:
        yield
        return
    zeros = next(iter(kept)).data.new_zeros(largest)
    try:
        # Not in place: optimizer and reductions know the values by where they lie in memory.
        for parameter in kept:
            parameter.data = _first(zeros, parameter.shape)
        yield
    finally:
        for parameter, values in kept.items():
            parameter.data = values


def _first(zeros: Tensor, shape: Iterable[int]) -> Tensor:
    """The first of ``zeros``, in this shape."""
    sizes = tuple(shape)
    return zeros[: math.prod(sizes)].view(sizes)

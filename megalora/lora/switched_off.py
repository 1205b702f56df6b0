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
    parameters: list[nn.Parameter] = []
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAFactors):
                parameters.extend(module.lora_B.values())
    kept = [parameter.data for parameter in parameters]
    # A rank without any adapter has nothing to switch off.
    if not parameters:
        yield
        return
    zeros = parameters[0].data.new_zeros(max(values.numel() for values in kept))
    try:
        for parameter in parameters:
            parameter.data = _first(zeros, parameter.shape)
        yield
    finally:
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.data = values


def _first(zeros: Tensor, shape: Iterable[int]) -> Tensor:
    """The first of ``zeros``, in this shape."""
    sizes = tuple(shape)
    return zeros[: math.prod(sizes)].view(sizes)

"""Switch adapters off, or to other values, for a while: the model is the base then, or another
adapter on it, without a second copy of the base."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from megalora.lora.factors import LoRAFactors
from megalora.lora.kept import KeptFactors


@contextmanager
def adapters_off(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block the model is the base, bit for bit: every B, B0, kept B and bias of B is
    zero, and so are B A x and B0 A0 x; every magnitude is its norm, which scales by 1; and what is
    trained whole has the base's values, which whoever built the model has asked to be kept.

    Values are put aside, not overwritten: the parameters point to one shared buffer of zeros, so
    that the block needs the memory of the largest B alone. Nothing may train in it.
    """
    parameters: list[nn.Parameter] = []
    values: dict[nn.Parameter, Tensor] = {}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAFactors):
                for off in (module.lora_B, module.lora_B0, module.lora_C):
                    parameters += off.values()
                for name, magnitude in module.lora_M.items():
                    values[magnitude] = module.norms[name]
            elif isinstance(module, KeptFactors):
                parameters += module.lora_B.values()
        for parameter in chunk.parameters():
            # Set on what is trained of the base.
            if hasattr(parameter, "base_value"):
                kept: Tensor | None = parameter.base_value  # pyright: ignore
                assert kept is not None, "whoever built the model keeps the base"
                values[parameter] = kept
    # A rank without any adapter has none to switch off.
    if parameters:
        largest = max(parameter.numel() for parameter in parameters)
        zeros = parameters[0].data.new_zeros(largest)
        for parameter in parameters:
            values[parameter] = _first(zeros, parameter.shape)
    with adapters_with(values):
        yield


@contextmanager
def adapters_with(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside the block these parameters have other values, of the same shapes; nothing may train in
    it."""
    kept = {parameter: parameter.data for parameter in values}
    try:
        # Not in place: optimizer and reductions know the values by where they lie in memory.
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value


def _first(zeros: Tensor, shape: Iterable[int]) -> Tensor:
    """The first of ``zeros``, in this shape."""
    sizes = tuple(shape)
    return zeros[: math.prod(sizes)].view(sizes)

"""Tell what stands beside a model which row its layers compute."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn


def before_each_layer(chunks: Sequence[nn.Module], enter: Callable[[Any], None]) -> None:
    """Have ``enter`` called with a row's ``Documents``, or None, before each layer computes it,
    also where backward computes it once more: another microbatch may have gone forward since."""

    def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        enter(kwargs.get("packed_seq_params"))

    # On every layer, not on what is in it: Megatron hands the row to the layer alone.
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                module.register_forward_pre_hook(hook, with_kwargs=True)

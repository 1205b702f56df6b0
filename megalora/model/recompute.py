"""Recompute activations: parts of a layer keep only their input for backward.

PyTorch's non-reentrant checkpoint is used, not Megatron's: Megatron's gives no gradient to adapters
inside a block whose input needs none, which is what the first block above a frozen embedding is.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megalora.config import Recompute
from megalora.config.recompute import level_of


class Recomputed(nn.Module):
    """Runs ``module`` again in backward instead of keeping its activations."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        # Megatron reads attributes of the module that is wrapped here.
        if name in self.__dict__ or name == "module":
            return super().__getattr__(name)
        return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.module(*args, **kwargs)
        # Stopping early could leave one rank's collectives out of the recomputation and not
        # another's.
        with set_checkpoint_early_stop(False):
            # Generators (dropout) are kept only for the devices of tensors passed by position;
            # Megatron passes keywords.
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            return checkpoint(
                lambda *_: self.module(*args, **kwargs), *tensors, use_reentrant=False
            )


def apply_recompute(chunks: list[nn.Module], recompute: Recompute) -> None:
    """Wrap whole layers (``full``), or core attention and dense MLPs while experts drop gate_up
    (``selective``); in place. ``off`` changes nothing.

    Args:
        chunks: all chunks of this rank, in their order: layers are counted through them.
    """
    position = 0
    for chunk in chunks:
        layers: Any = chunk.decoder.layers  # pyright: ignore
        for i, layer in enumerate(layers):
            level = level_of(recompute, position)
            position += 1
            if level == "full":
                layers[i] = Recomputed(layer)
            elif level == "selective":
                layer.self_attention.core_attention = Recomputed(
                    layer.self_attention.core_attention
                )
                if hasattr(layer.mlp, "experts"):
                    # ``base`` where the experts have adapters. The experts' own node drops gate_up
                    # and computes that alone again, not down.
                    getattr(layer.mlp.experts, "base", layer.mlp.experts).recompute = True
                    if layer.mlp.shared_experts is not None:
                        layer.mlp.shared_experts = Recomputed(layer.mlp.shared_experts)
                else:
                    layer.mlp = Recomputed(layer.mlp)

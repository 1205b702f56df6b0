"""Find what adapters hold beside their parameters."""

from collections.abc import Iterator

from torch import Tensor, nn

from megalora.lora.factors import LoRAFactors


def norms_of(chunk: nn.Module) -> Iterator[Tensor]:
    """Norms of rows, and squares of the base's: there between microbatches too (DoRA)."""
    for module in chunk.modules():
        if isinstance(module, LoRAFactors):
            yield from module.norms.values()
            if module.squares is not None and len(module.lora_M):
                yield module.squares

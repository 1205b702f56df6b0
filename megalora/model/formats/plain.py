"""A weight as one contiguous tensor."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Plain:
    """``[E, N, K]`` and nothing beside it."""

    def num_bytes(self, sizes: tuple[int, int, int], item_bytes: int) -> int:
        return math.prod(sizes) * item_bytes

    def allocate(
        self, sizes: tuple[int, int, int], dtype: "torch.dtype", device: "torch.device"
    ) -> "torch.Tensor":
        import torch

        return torch.empty(*sizes, dtype=dtype, device=device)


PLAIN = Plain()

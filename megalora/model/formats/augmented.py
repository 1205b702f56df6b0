"""A weight with room for its adapter: both are one operand of torch's grouped GEMM."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from megalora_kernels import AugmentedWeight

RANK_STEP = 16
"""The kernels' ``AugmentedWeight`` pads ranks to a multiple of this."""


@dataclass(frozen=True)
class Augmented:
    """``[E, N + R, K + R]``, of which the first N rows and K columns are the weight."""

    rank: int
    """The adapter's rank: the sum of ranks where gate and up are fused."""

    @property
    def room(self) -> int:
        """R: rows and columns beside the weight."""
        # -rank % 16 is what the rank lacks to the next multiple of 16.
        return self.rank + -self.rank % RANK_STEP

    def num_bytes(self, sizes: tuple[int, int, int], item_bytes: int) -> int:
        experts, n, k = sizes
        # The corner [room, room] is stored too, though nothing uses it: one operand is rectangular.
        return experts * (n + self.room) * (k + self.room) * item_bytes

    def allocate(
        self, sizes: tuple[int, int, int], dtype: "torch.dtype", device: "torch.device"
    ) -> "AugmentedWeight":
        from megalora_kernels import AugmentedWeight

        return AugmentedWeight.empty(sizes, self.rank, dtype=dtype, device=device)

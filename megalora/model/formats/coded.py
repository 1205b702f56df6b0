"""A weight as codes and scales, decoded into memory that all layers share.

The layout in memory is that of ``megalora_kernels.QuantisedWeight``.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megalora.model.formats.augmented import Augmented

if TYPE_CHECKING:
    import torch

    from megalora.model.held_codes import HeldCodes

HeldForm = Literal["fp8", "nf4"]
NF4_BLOCK = 64
"""Columns that share a scale before a matrix is cut."""
SCALE_BYTES = 4


@dataclass(frozen=True)
class Coded:
    """``[E, N, K]`` as codes; 1 expert stands for a dense linear."""

    form: HeldForm
    grain: tuple[int, int]
    """(p, q): rows and columns that share a scale; they divide those of the rank's part."""
    rank: int = 0
    """The adapter's, where decoded values have room for it beside them."""
    scratch: Any = field(default=None, compare=False)
    """``megalora_kernels.Scratch`` that all layers of a model share; None where bytes are
    counted alone."""

    def num_bytes(self, sizes: tuple[int, int, int], item_bytes: int) -> int:
        """Bytes of codes and scales, whatever the dtype of decoded values."""
        experts, n, k = sizes
        p, q = self.grain
        return experts * (n * self.width(k) + n // p * (k // q) * SCALE_BYTES)

    def width(self, columns: int) -> int:
        """Bytes of a row of codes: blocks of nf4 end in a whole byte."""
        q = self.grain[1]
        return columns if self.form == "fp8" else columns // q * -(-q // 2)

    def scratch_elements(self, sizes: tuple[int, int, int]) -> int:
        """Elements that the decoded weight takes, with room beside it."""
        return Augmented(self.rank).num_bytes(sizes, 1)

    def allocate(
        self, sizes: tuple[int, int, int], dtype: "torch.dtype", device: "torch.device"
    ) -> "HeldCodes":
        """Memory for codes and scales, and for decoded values unless another layer has asked."""
        # Late: planning needs no torch.
        from megalora.model.held_codes import HeldCodes

        return HeldCodes(self, sizes, dtype, device)


def grain_of(form: HeldForm, block: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that share a scale in a part of a matrix.

    Args:
        block: rows and columns of a block of the whole matrix (fp8).
        rows, columns: sizes of the rank's parts, each of which begins at a multiple of its size.
    """
    if form == "nf4":
        return 1, math.gcd(NF4_BLOCK, columns)
    return math.gcd(block[0], rows), math.gcd(block[1], columns)

"""A weight as codes and scales, decoded into memory that all layers share.

The layout in memory is that of ``megalora_kernels.QuantisedWeight``.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megalora.model.formats.augmented import Augmented

if TYPE_CHECKING:
    import torch

    from megalora.model.held_codes import HeldCodes

HeldForm = Literal["fp8", "nf4"]
NF4_BLOCK = 64
"""Columns that share a scale before a matrix is cut."""
SCALE_BYTES = 4
NESTED_BLOCK = 256
"""Scales that share a second one, in the order of the flattened matrix."""
NESTED_VALUES = 256
"""Values of the table of scales."""


class Double(NamedTuple):
    """Scales of nf4 as codes of a byte, with scales and offsets of their own (bitsandbytes'
    double quantisation)."""

    rows: int
    """Rows of the weight that share a second scale."""
    scales: int
    """Scales of a row that share it."""
    run: int
    """Rows of the weight that share an offset: those of one matrix that lie together."""

    def num_floats(self, experts: int, n: int, scales: int) -> int:
        """Values in float32: the table, second scales and offsets of ``[experts, n, scales]``."""
        second = n // self.rows * (scales // self.scales)
        return NESTED_VALUES + experts * (second + n // self.run)


@dataclass(frozen=True)
class Coded:
    """``[E, N, K]`` as codes; 1 expert stands for a dense linear."""

    form: HeldForm
    grain: tuple[int, int]
    """(p, q): rows and columns that share a scale; they divide those of the rank's part."""
    double: "Double | None" = None
    """How scales lie in memory that are codes themselves; None where they are float32."""
    rank: int = 0
    """The adapter's, where decoded values have room for it beside them."""
    scratch: Any = field(default=None, compare=False)
    """``megalora_kernels.Scratch`` that all layers of a model share; None where bytes are
    counted alone."""

    def num_bytes(self, sizes: tuple[int, int, int], item_bytes: int) -> int:
        """Bytes of codes and scales, whatever the dtype of decoded values."""
        experts, n, k = sizes
        p, q = self.grain
        scales = experts * (n // p) * (k // q)
        if self.double is None:
            return experts * n * self.width(k) + scales * SCALE_BYTES
        floats = self.double.num_floats(experts, n, k // q)
        return experts * n * self.width(k) + scales + floats * SCALE_BYTES

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


def double_of(columns: int, part: tuple[int, int]) -> Double | None:
    """How doubly quantised scales lie in memory, for parts of matrices of so many columns; None
    where float32 scales take no more.

    A second scale is for 16,384 elements of the flattened matrix: for whole rows where the columns
    divide that, otherwise for part of a row. A cut repeats it, as it repeats those of fp8.

    Args:
        part: rows and columns of the rank's part, which begins at a multiple of both.
    """
    rows, own = part
    # A block that a cut divides has several places for its code.
    if own % NF4_BLOCK:
        return None
    span = NESTED_BLOCK * NF4_BLOCK
    if span % columns == 0:
        found = Double(math.gcd(span // columns, rows), own // NF4_BLOCK, rows)
    else:
        found = Double(1, math.gcd(span, columns, own) // NF4_BLOCK, rows)
    return found if found.rows * found.scales > 1 else None

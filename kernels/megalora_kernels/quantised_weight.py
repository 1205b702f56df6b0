"""A frozen stack of matrices held as codes and scales: the layout in memory, and its values.

    W[e, n, k] = dtype( value(code[e, n, k]) * scale[e, n // p, k // q] )

One product in float32, rounded once to the dtype of what it is multiplied with. Whoever reads the
codes, plain torch or a kernel, gets the same bits.

    nf4   two codes to a byte, codebook of QLoRA (Dettmers et al. 2023, appendix E); p = 1, q = 64
    fp8   code is a float8_e4m3fn; p = q = 128

A matrix that was cut has a finer grid: q = gcd(64, columns of the shard), p and q = gcd(128, rows
or columns of the shard), so that no block crosses a cut and values are those of the whole matrix.
p always divides N and q divides K: no block is short. Rows of gate lie above those of up, and each
has scales of its own; p divides the rows of either.

Byte j of a block of q nf4 codes holds elements j (low nibble) and j + ceil(q / 2) (high nibble): a
mask and a shift split a tile of bytes into two tiles of consecutive k. Files of bitsandbytes hold 2
j and 2 j + 1, high nibble first. Where q is odd, the high nibble of a block's last byte is 0 and
means nothing.

Shape legend: E experts, 1 for a dense linear   N outputs   K inputs   P, Q rows and columns of the
grid of scales   h = ceil(q / 2) bytes of a block of nf4
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

Form = Literal["nf4", "fp8"]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of the codes 0 to 15."""
AT_ONCE = 2**24
"""Elements decoded at a time: each needs up to 8 bytes of temporaries."""


class Nested(NamedTuple):
    """Scales that are codes themselves: scale = values[code] * scales + offsets.

    Product and sum are rounded each, as bitsandbytes computes them. Rows and columns of these
    tensors are divisors of P and Q: each stands for as many neighbours.
    """

    values: torch.Tensor
    """float32 ``[256]``."""
    scales: torch.Tensor
    """float32 ``[E, P2, Q2]``."""
    offsets: torch.Tensor
    """float32 ``[E, P3]``."""


@dataclass(frozen=True)
class QuantisedWeight:
    """Frozen ``[E, N, K]`` as it lies in memory; codes and scales are contiguous."""

    form: Form
    codes: torch.Tensor
    """uint8: nf4 ``[E, N, Q h]``, which is ``[E, N, K / 2]`` where q is even; fp8 ``[E, N, K]``.
    Not float8: casts of a module skip integers, and gloo moves them."""
    scales: torch.Tensor
    """float32 ``[E, P, Q]``."""
    grain: tuple[int, int]
    """(p, q): rows and columns of W for each scale."""
    nested: Nested | None = None
    """What ``scales`` mean, if they are codes: uint8 then."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        num_experts, N, _ = self.codes.shape
        return num_experts, N, self.scales.shape[2] * self.grain[1]

    def check(self, what: str) -> None:
        """Raises ``ValueError`` where codes, scales and grain do not fit each other."""
        E, N, K = self.sizes
        rows, columns = self.grain
        width = self.scales.shape[2] * block_bytes(columns) if self.form == "nf4" else K
        of_scales = torch.float32 if self.nested is None else torch.uint8
        if self.codes.dtype != torch.uint8 or self.scales.dtype != of_scales:
            raise ValueError(
                f"{what}: codes are {self.codes.dtype} and scales {self.scales.dtype}, want"
                f" torch.uint8 and {of_scales}"
            )
        fits = self.codes.shape[2] == width and self.scales.shape[:2] == (E, N // rows)
        if not fits or N % rows or self.scales.device != self.codes.device:
            raise ValueError(
                f"{what}: codes {tuple(self.codes.shape)} on {self.codes.device} and scales"
                f" {tuple(self.scales.shape)} on {self.scales.device} do not belong together: a"
                f" scale is for {rows} x {columns} of {self.form}"
            )

    def experts(self, first: int, end: int) -> "QuantisedWeight":
        """Views of some experts."""
        nested = self.nested
        if nested is not None:
            scales, offsets = (t[first:end] for t in nested[1:])
            nested = Nested(nested.values, scales, offsets)
        return replace(
            self, codes=self.codes[first:end], scales=self.scales[first:end], nested=nested
        )

    def with_scales(self) -> "QuantisedWeight":
        """The same with float32 scales, made of their codes if they are stored as such."""
        if self.nested is None:
            return self
        values, scales, offsets = self.nested
        _, P, Q = self.scales.shape
        found = values.index_select(0, self.scales.flatten().int()).view(self.scales.shape)
        by = scales.repeat_interleave(P // scales.shape[1], 1)
        found *= by.repeat_interleave(Q // scales.shape[2], 2)
        found += offsets.repeat_interleave(P // offsets.shape[1], 1).unsqueeze(-1)
        return replace(self, scales=found, nested=None)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """``[E, N, K]``: the values in a tensor of their own."""
        out_ENK = self.codes.new_empty(self.sizes, dtype=dtype)
        self.decode_into(out_ENK)
        return out_ENK

    def decode_into(self, out_ENK: torch.Tensor) -> None:
        """Write the values into ``out_ENK``, whose rows are dense, in its dtype."""
        E, N, K = self.sizes
        at_once = max(1, AT_ONCE // (N * K))
        for first in range(0, E, at_once):
            end = min(first + at_once, E)
            _decode(self.experts(first, end), out_ENK[first:end])


def block_bytes(columns: int) -> int:
    """h: bytes of a block of q columns of nf4."""
    return -(-columns // 2)


def pack_nf4(codes_NK: torch.Tensor, columns: int) -> torch.Tensor:
    """4-bit codes, one to a byte, in the layout above: uint8 ``[..., K] -> [..., Q h]``.

    Args:
        columns: q.
    """
    blocks = codes_NK.unflatten(-1, (-1, columns))
    h = block_bytes(columns)
    # A clone, as blocks are a view of the caller's codes.
    packed = blocks[..., :h].clone()
    # Where q is odd, q - h = h - 1: the last byte keeps a high nibble of 0.
    packed[..., : columns - h] |= blocks[..., h:] << 4
    return packed.flatten(-2)


def _decode(weight: QuantisedWeight, out_ENK: torch.Tensor) -> None:
    """``decode_into`` for a few experts at once."""
    weight = weight.with_scales()
    p, q = weight.grain
    # [E, P, Q] -> [E, N, Q, 1]
    scale = weight.scales.repeat_interleave(p, 1).unsqueeze(-1)
    out = out_ENK.unflatten(-1, (-1, q))
    if weight.form == "fp8":
        values = weight.codes.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, q))
        # The product is in float32; ``out`` rounds it once, to its own dtype.
        torch.mul(values, scale, out=out)
        return
    h = block_bytes(q)
    table = torch.tensor(NF4, device=weight.codes.device)
    # Tables of whole bytes spare masks and shifts. ``index_select`` takes an index of 4 bytes,
    # which ``table[...]`` would widen to 8.
    index = weight.codes.flatten().int()
    # [E, N, Q, h]
    blocks = (*weight.codes.shape[:2], -1, h)
    low = table.repeat(16).index_select(0, index).view(blocks)
    torch.mul(low, scale, out=out[..., :h])
    high = table.repeat_interleave(16).index_select(0, index).view(blocks)
    # Where q is odd, the last byte of a block has one value.
    torch.mul(high[..., : q - h], scale, out=out[..., h:])

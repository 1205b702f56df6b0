"""Quantise plain matrices to nf4, as bitsandbytes does where 64 divides their columns: codes,
scales and decoded values are then bitsandbytes' to the bit.

Doubly quantised, the scales of a whole matrix lose their mean, and are quantised in blocks of 256:

    absmax ~ scale_values()[code] * scale[i // 256] + offset        i = n G + g

Shape legend: N rows   K columns   G = ceil(K / 64)
"""

from typing import NamedTuple

import torch
from megalora_kernels import NF4
from torch import Tensor
from torch.nn.functional import pad

from megalora.model.formats.coded import NESTED_BLOCK, NF4_BLOCK

_TABLE = torch.tensor(NF4)
_BOUNDS = (_TABLE[1:] + _TABLE[:-1]) / 2
"""Between neighbouring codes, in float32; a value on a bound takes the lower code."""
_LEAST = 1e-38
"""Scale by which zeros are divided in a block of zeros."""


class CodedScales(NamedTuple):
    """Scales of a whole matrix as codes."""

    codes: Tensor
    """uint8 ``[N, G]``."""
    scales: Tensor
    """float32 ``[ceil(N G / 256)]``: of the scales, in the order of the flattened matrix."""
    offset: float
    """Mean of the scales, in float32."""

    def decoded(self) -> Tensor:
        """float32 ``[N, G]``; product and sum are rounded each."""
        scale = self.scales.repeat_interleave(NESTED_BLOCK)[: self.codes.numel()]
        values = scale_values()[self.codes.flatten().int()] * scale + self.offset
        return values.view(self.codes.shape)


def scale_values() -> Tensor:
    """The values of 256 codes of scales in float32, ascending: bitsandbytes' dynamic map.

    Decade i of seven below 1 has 2^i values of either sign; then there are 0 and 1.
    """
    positive: list[Tensor] = []
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        positive.append(10 ** (i - 6) * ((bounds[1:] + bounds[:-1]) / 2))
    of_one_sign = torch.cat(positive)
    return torch.cat([of_one_sign, -of_one_sign, torch.tensor([0.0, 1.0])]).sort().values


def quantise_scales(absmax_NG: Tensor) -> CodedScales:
    """Quantise all scales of a matrix: each gets the nearest code, the lower one of two."""
    flat = absmax_NG.flatten()
    offset = flat.mean()
    centred = flat - offset
    blocks = pad(centred, (0, -len(flat) % NESTED_BLOCK)).unflatten(0, (-1, NESTED_BLOCK))
    largest = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / largest.clamp(min=_LEAST)).unsqueeze(-1)).clamp(-1, 1)
    values = scale_values()
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2, out_int32=True)
    codes = codes.to(torch.uint8).flatten()[: len(flat)].view(absmax_NG.shape)
    return CodedScales(codes, largest, offset.item())


def scales_of(w_NK: Tensor) -> Tensor:
    """absmax float32 ``[N, G]`` of blocks of 64 columns, of which the last may be short."""
    return _blocks(w_NK).abs().amax(-1)


def quantise(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """nf4 of whole rows in blocks of 64 columns, of which the last may be short.

    Returns:
        codes uint8 ``[N, K]``, one to a byte, and absmax float32 ``[N, G]``.
    """
    columns = w_NK.shape[1]
    blocks = _blocks(w_NK)
    absmax = blocks.abs().amax(-1)
    # bitsandbytes multiplies by the reciprocal: dividing gives another code now and then.
    scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST)).unsqueeze(-1)).clamp(-1, 1)
    codes = torch.bucketize(scaled, _BOUNDS, out_int32=True).to(torch.uint8)
    return codes.flatten(1)[:, :columns], absmax


def _blocks(w_NK: Tensor) -> Tensor:
    """float32 ``[N, G, 64]``."""
    # Zeros raise no absmax, and ``quantise`` cuts their codes off again.
    padded = pad(w_NK.float(), (0, -w_NK.shape[1] % NF4_BLOCK))
    return padded.unflatten(1, (-1, NF4_BLOCK))


def rounded(w_NK: Tensor, doubly: bool = False) -> Tensor:
    """The values, in float32, that a matrix has once it is quantised, or doubly quantised."""
    codes, absmax = quantise(w_NK)
    if doubly:
        absmax = quantise_scales(absmax).decoded()
    scale = absmax.repeat_interleave(NF4_BLOCK, 1)[:, : w_NK.shape[1]]
    return _TABLE[codes.long()] * scale

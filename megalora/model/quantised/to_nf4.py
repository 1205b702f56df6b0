"""Quantise plain matrices to nf4, as bitsandbytes does where 64 divides their columns: codes,
scales and decoded values are then bitsandbytes' to the bit.

Shape legend: N rows   K columns   G = ceil(K / 64)
"""

import torch
from megalora_kernels import NF4
from torch import Tensor
from torch.nn.functional import pad

from megalora.model.formats.coded import NF4_BLOCK

_TABLE = torch.tensor(NF4)
_BOUNDS = (_TABLE[1:] + _TABLE[:-1]) / 2
"""Between neighbouring codes, in float32; a value on a bound takes the lower code."""
_LEAST = 1e-38
"""Scale by which zeros are divided in a block of zeros."""


def quantise(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """nf4 of whole rows in blocks of 64 columns, of which the last may be short.

    Returns:
        codes uint8 ``[N, K]``, one to a byte, and absmax float32 ``[N, G]``.
    """
    columns = w_NK.shape[1]
    # Zeros raise no absmax, and their codes are cut off again below.
    padded = pad(w_NK.float(), (0, -columns % NF4_BLOCK))
    blocks = padded.unflatten(1, (-1, NF4_BLOCK))
    absmax = blocks.abs().amax(-1)
    # bitsandbytes multiplies by the reciprocal: dividing gives another code now and then.
    scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST)).unsqueeze(-1)).clamp(-1, 1)
    codes = torch.bucketize(scaled, _BOUNDS, out_int32=True).to(torch.uint8)
    return codes.flatten(1)[:, :columns], absmax


def rounded(w_NK: Tensor) -> Tensor:
    """The values, in float32, that a matrix has once it is quantised."""
    codes, absmax = quantise(w_NK)
    scale = absmax.repeat_interleave(NF4_BLOCK, 1)[:, : w_NK.shape[1]]
    return _TABLE[codes.long()] * scale

"""Decode mxfp4 of the Open Compute Project, as compressed-tensors and gpt-oss store it.

    W[n, k] = E2M1[code[n, k]] * 2 ** (scale[n, k // 32] - 127)

    weight_packed   uint8 [N, K / 2], the low nibble first
    weight_scale    uint8 [N, K / 32], or the same bytes as float8_e8m0fnu

gpt-oss has one tensor for all experts of a layer: ``_blocks`` [E, N, K / 32, 16] is the first of
these for every expert, its two last dimensions in one.
"""

import torch
from torch import Tensor

from megalora.model.quantised.nvfp4 import decode_e2m1
from megalora.model.quantised.part import Part, Stored, covering

GROUP = 32


def decode(stored: Stored, part: Part) -> Tensor:
    """``part`` of the matrix in float32."""
    n0, n1, k0, k1 = part
    exponent = stored["weight_scale"][n0:n1, covering(k0, k1, GROUP)]
    # The dtype of exponents alone, of which 255 is NaN.
    scale = exponent.view(torch.float8_e8m0fnu).float()
    return decode_e2m1(stored["weight_packed"], scale, part, GROUP)

"""Unpack 4-bit codes from words and bytes."""

import torch
from torch import Tensor

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([_E2M1, -_E2M1])
"""Value of each 4-bit float code: a sign, two bits of exponent and one of mantissa."""


def of_words(words: Tensor) -> Tensor:
    """Eight codes of every int32, low bits first: ``[..., W]`` -> uint8 ``[..., 8 W]``."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    # The shift keeps the sign, which the mask takes off.
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(-2)


def low_first(packed: Tensor) -> Tensor:
    """Two codes of every byte, the low nibble first: uint8 ``[..., B]`` -> ``[..., 2 B]``."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def high_first(packed: Tensor) -> Tensor:
    """Two codes of every byte, the high nibble first: uint8 ``[..., B]`` -> ``[..., 2 B]``."""
    return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)

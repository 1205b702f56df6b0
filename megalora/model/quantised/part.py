"""Say which part of a stored matrix is asked for, and how its stored tensors are reached."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

type Stored = Mapping[str, Any]
"""Ending of a stored tensor's name, such as ``weight_scale`` -> the tensor, or a slice of
safetensors, which reads from the file what it is indexed with."""


class Part(NamedTuple):
    """Rows ``[n0, n1)`` and columns ``[k0, k1)`` of a matrix ``[N, K]``."""

    n0: int
    n1: int
    k0: int
    k1: int

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "Part":
        """All of a matrix of ``size``."""
        return cls(0, size[0], 0, size[1])


def covering(first: int, end: int, step: int) -> slice:
    """The groups of ``step`` that hold ``[first, end)``."""
    return slice(first // step, -(-end // step))


def group_of(first: int, end: int, step: int) -> Tensor:
    """For each of ``[first, end)`` its group's place among those of ``covering``."""
    return torch.arange(first, end) // step - first // step

"""Stand in for operands that a launch does not have.

A kernel is given a tensor for every pointer, also for one that its constexprs keep it from reading.

Shape legend: E experts   R rank   K features
"""

import torch


def pointer(t: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """Return t, or the stand-in, which the kernel will neither read nor write."""
    if t is None:
        return stand_in
    return t


def row_stride(t: torch.Tensor | None) -> int:
    """Return the elements from one row to the next; 0 for a matrix that is not there."""
    if t is None:
        return 0
    return t.stride(0)


def strides_of(factor_ERK: torch.Tensor | None) -> tuple[int, ...]:
    """Return the strides of a factor of all experts; zeros for one that is not there."""
    if factor_ERK is None:
        return 0, 0, 0
    return factor_ERK.stride()


def width(t: torch.Tensor | None) -> int:
    """Return the columns of a matrix, or the rank of a factor ``[E, R, K]``; 0 for none."""
    if t is None:
        return 0
    return t.shape[1]

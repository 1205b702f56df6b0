"""Compute one grouped LoRA linear in float64, row by row, and the bound that a back end must
keep."""

from typing import Any

import torch
from megalora_kernels import AugmentedWeight, grouped_lora

from tests.kernels.oracle import ULP, expert_of_rows, one_addition

# No powers of two, but rows of whole 16 bytes in every dtype, as grouped_mm needs them.
K = 24
N = 40
COUNTS = [0, 5, 0, 7, 1, 0]  # an expert without rows first, in the middle and last
Operands = tuple[torch.Tensor, ...]


def make(
    counts: list[int] = COUNTS,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    k: int = K,
    n: int = N,
) -> Operands:
    """x, weight, offsets, a, b, dy; x, a and b are leaves that want gradients."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    rows = sum(counts)
    experts = len(counts)
    offsets = torch.tensor(counts).cumsum(0).int()
    x = normal(rows, k)
    # Over k = 24 inputs, A / 4 and W / 4 give sums of order 1, and so does B / 2 over rank 8.
    a = normal(experts, rank, k) / 4
    b = normal(experts, n, rank) / 2
    weight = normal(experts, n, k) / 4
    dy = normal(rows, n)
    return x.requires_grad_(), weight, offsets, a.requires_grad_(), b.requires_grad_(), dy


def row_by_row(counts: list[int], x: Any, w: Any, a: Any, b: Any, dy: Any) -> Operands:
    """y, dx, da, db in float64: one row at a time, the chain rule by hand, no autograd and no
    slicing by offset."""
    x = x.detach().double()
    w = w.detach().double()
    a = a.detach().double()
    b = b.detach().double()
    dy = dy.detach().double()
    y = torch.zeros_like(dy)
    dx = torch.zeros_like(x)
    da = torch.zeros_like(a)
    db = torch.zeros_like(b)
    for m, e in enumerate(expert_of_rows(counts)):
        s = a[e] @ x[m]
        ds = dy[m] @ b[e]
        # y = W x + B A x; every row of an expert adds to the gradients of its A and B.
        y[m] = w[e] @ x[m] + b[e] @ s
        dx[m] = dy[m] @ w[e] + ds @ a[e]
        da[e] += torch.outer(ds, x[m])
        db[e] += torch.outer(dy[m], s)
    return y, dx, da, db


def call(
    arm: str,
    x: torch.Tensor,
    w: torch.Tensor,
    offsets: torch.Tensor,
    a: Any = None,
    b: Any = None,
    **how: Any,
) -> torch.Tensor:
    """``grouped_lora`` by one of ``oracle.ARMS``; ``room`` is a joined weight's, by default what a
    needs."""
    room = how.pop("room", 1 if a is None else a.shape[1])
    if arm != "joined":
        return grouped_lora(x, w, offsets, a, b, backend=arm, **how)
    return grouped_lora(x, AugmentedWeight(w, room), offsets, a, b, backend="grouped_mm", **how)


def run(
    arm: str,
    x: torch.Tensor,
    w: torch.Tensor,
    offsets: torch.Tensor,
    a: Any,
    b: Any,
    dy: torch.Tensor,
    **how: Any,
) -> Operands:
    """y, dx, da, db."""
    y = call(arm, x, w, offsets, a, b, **how)
    return y, *torch.autograd.grad(y, (x, a, b), dy)


def assert_within_rounding(
    actual: Operands, counts: list[int], x: Any, w: Any, a: Any, b: Any, dy: Any
) -> None:
    """|error| <= (4 u + n 2^-24) * (the same expression over absolute values), elementwise.

    4: S or dS, the base, the delta and their sum are each rounded once to the dtype (u = half an
        ulp of 1). n 2^-24: float32 accumulation over n terms (2^-53 for float64). 1.1 covers the
        products of the two.
    """
    dtype = x.dtype
    terms = max(x.shape[0], x.shape[1], dy.shape[1]) + a.shape[1]
    expected = row_by_row(counts, x, w, a, b, dy)
    # Terms of either sign may cancel in a result, but their rounding errors do not.
    magnitude = row_by_row(counts, x.abs(), w.abs(), a.abs(), b.abs(), dy.abs())
    accumulation = terms * one_addition(dtype)
    for name, got, want, size in zip(
        ("y", "dx", "da", "db"), actual, expected, magnitude, strict=True
    ):
        assert got.dtype == dtype and got.shape == want.shape, name
        excess = (got.double() - want).abs() - 1.1 * (4 * ULP[dtype] + accumulation) * size
        assert excess.numel() == 0 or excess.max() <= 0, (
            f"{name} exceeds the bound by {excess.max():.3g}"
        )

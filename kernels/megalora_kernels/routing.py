"""Where routed rows come from and where they go, and moving them there.

Each of T tokens is copied to k experts: ``M = T k`` rows, sorted by expert. Row m is a copy of
token ``source[m]``; token t's rows are ``slots[t, 0..k)``. Expert parallelism needs the same twice
more, with at most k rows per token: a sender copies a token to each rank that has an expert of it,
and a receiver copies what it was sent to those of its experts that the token chose.

Shape legend: T tokens   k rows per token, at most   M routed rows   E experts   H features
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from .combine import combine

MAX_ROWS = 2**31 - 1
"""Rows are numbered in int32."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Rows of experts, and how they relate to tokens."""

    offsets_E: torch.Tensor
    """int32 ``[E]``: the row at which each expert ends; the last one is M."""
    num_rows: int
    """M."""
    source_M: torch.Tensor | None = None
    """int32 ``[M]``: the token of each row; None where the rows are given sorted by expert
    already."""
    slots_TK: torch.Tensor | None = None
    """int32 ``[T, k]``: the rows of each token, at least one, then -1 where it has fewer than k;
    None together with ``source_M``."""

    @cached_property
    def bounds(self) -> list[int]:
        """[0, end of expert 0, ..., M] on the host. Reading a device tensor waits for the device.

        Raises:
            ValueError: the offsets decrease somewhere or do not end at M.
        """
        bounds = [0, *self.offsets_E.tolist()]
        # Expert e has the rows from bounds[e] up to bounds[e + 1].
        decreases = any(start > end for start, end in pairwise(bounds))
        if decreases or bounds[-1] != self.num_rows:
            raise ValueError(
                f"routing: offsets must never decrease and end at M={self.num_rows}, the number of"
                f" rows; got {bounds[1:]}"
            )
        return bounds

    @property
    def num_experts(self) -> int:
        return self.offsets_E.numel()

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end row), for every expert; reads the offsets on the host."""
        return [(e, i, j) for e, (i, j) in enumerate(pairwise(self.bounds))]

    @cached_property
    def counts(self) -> list[int]:
        """Rows of every expert; reads the offsets on the host."""
        return [j - i for _, i, j in self.spans()]


def gather(x: torch.Tensor, source_M: torch.Tensor | None) -> torch.Tensor:
    """Return ``x[source]`` ``[M, K]``; x itself where its rows are in order already."""
    if source_M is None:
        return x
    return x.index_select(0, source_M)


def check_rows(num_rows: int, what: str) -> None:
    """Raises ``ValueError`` where rows cannot be numbered."""
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"routing: {what} are {num_rows} rows, more than int32 numbers ({MAX_ROWS}); use fewer"
            " tokens"
        )


def as_outputs(ctx: Any, routing: Routing) -> tuple[torch.Tensor | None, ...]:
    """Offsets, source and slots as outputs of an autograd function, without gradients;
    ``assembled`` is the way back."""
    indexes = (routing.offsets_E, routing.source_M, routing.slots_TK)
    ctx.mark_non_differentiable(*indexes)
    ctx.set_materialize_grads(False)  # autograd would make three tensors of zeros for the indexes
    return indexes


def assembled(values_M: torch.Tensor, indexes: list[torch.Tensor]) -> Routing:
    """The routing from the outputs of an autograd function: a value of each row, and offsets,
    source and slots."""
    offsets_E, source_M, slots_TK = indexes
    return Routing(offsets_E, values_M.shape[0], source_M, slots_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, source_M: torch.Tensor, slots_TK: torch.Tensor
    ) -> torch.Tensor:
        # Both directions' indexes: the gradient of a gather sums each token's k rows.
        ctx.save_for_backward(source_M, slots_TK)
        return x_TH.index_select(0, source_M)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source_M, slots_TK = ctx.saved_tensors
        return (
            _Unpermute.apply(grads[0], source_M, slots_TK),
            None,
            None,
        )  # pyright: ignore[reportReturnType]


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_MH: torch.Tensor, source_M: torch.Tensor, slots_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(source_M, slots_TK)
        return combine(y_MH, slots_TK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source_M, slots_TK = ctx.saved_tensors
        return (
            _Permute.apply(grads[0], source_M, slots_TK),
            None,
            None,
        )  # pyright: ignore[reportReturnType]


class _PermuteValues(torch.autograd.Function):
    """Slots are a permutation: forward scatters along it, backward gathers."""

    @staticmethod
    def forward(ctx: Any, p_TK: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
        slots = slots_TK.reshape(-1).long()
        ctx.save_for_backward(slots)
        # M = T k: every row gets exactly one value, so nothing is left uninitialised.
        p_M = p_TK.new_empty(slots.shape[0])
        p_M[slots] = p_TK.reshape(-1)
        ctx.shape = p_TK.shape
        return p_M

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return grads[0].index_select(0, slots).view(ctx.shape), None


def permute(x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """``x[source]`` ``[M, H]``; x itself where the routing has no source. Its gradient is
    ``unpermute``: no atomics."""
    if routing.source_M is None or routing.slots_TK is None:
        return x_TH
    return _Permute.apply(x_TH, routing.source_M, routing.slots_TK)  # pyright: ignore[reportReturnType]


def unpermute(y_MH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum of each token's rows ``[T, H]``, accumulated in float32 in the order of its slots; the
    inverse of ``permute``."""
    if routing.source_M is None or routing.slots_TK is None:
        return y_MH
    return _Unpermute.apply(y_MH, routing.source_M, routing.slots_TK)  # pyright: ignore[reportReturnType]


def permute_values(p_TK: torch.Tensor, routing: Routing) -> torch.Tensor:
    """One value per slot (a routing probability) ``[T, k]`` to one value per row ``[M]``;
    differentiable."""
    assert routing.slots_TK is not None and p_TK.shape == routing.slots_TK.shape
    return _PermuteValues.apply(p_TK, routing.slots_TK)  # pyright: ignore[reportReturnType]

"""Where routed rows come from and where they go, and moving them there.

Each of T tokens is copied to k experts: ``M = T k`` rows, sorted by expert. Row m is a copy of token ``source[m]``; token t's
rows are ``slots[t, 0..k)``. Expert parallelism needs the same for received rows: they arrive sorted by sending rank, and
``source`` is the permutation that sorts them by expert (k = 1).

Shape legend: T tokens   k rows per token   M routed rows   E experts   H features
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from .combine import combine


@dataclass(frozen=True, eq=False)
class Routing:
    """Rows of experts, and how they relate to tokens."""

    offsets_E: torch.Tensor
    """int32 ``[E]``: the row at which each expert ends; the last one is M."""
    num_rows: int
    """M."""
    source_M: torch.Tensor | None = None
    """int32 ``[M]``: the token of each row; None where the rows are given sorted by expert already."""
    slots_TK: torch.Tensor | None = None
    """int32 ``[T, k]``: the rows of each token; None together with ``source_M``."""

    @cached_property
    def bounds(self) -> list[int]:
        """[0, end of expert 0, ..., M] on the host. Reading a device tensor waits for the device.

        Raises:
            ValueError: the offsets decrease somewhere or do not end at M.
        """
        bounds = [0, *self.offsets_E.tolist()]
        if bounds[-1] != self.num_rows or any(start > end for start, end in pairwise(bounds)):
            raise ValueError(
                f"routing: offsets must never decrease and end at M={self.num_rows}, the number of rows; got {bounds[1:]}"
            )
        return bounds

    @property
    def num_experts(self) -> int:
        return self.offsets_E.numel()

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end row), for every expert; reads the offsets on the host."""
        return [(e, i, j) for e, (i, j) in enumerate(pairwise(self.bounds))]


def route(routing_map_TE: torch.Tensor, top_k: int) -> tuple[Routing, torch.Tensor]:
    """Routing of a top-k router, without waiting for the device.

    Args:
        routing_map_TE: bool, exactly ``top_k`` experts per token.
        top_k: k.

    Returns:
        The routing, and ``expert_TK`` int64: each token's experts in ascending order, as its slots are.

    Raises:
        ValueError: a token with another number of experts; on a GPU that is a device-side assertion.
    """
    num_tokens, num_experts = routing_map_TE.shape
    whole = (routing_map_TE.sum(1) == top_k).all()
    if routing_map_TE.device.type == "cpu" and not bool(whole):
        raise ValueError(f"routing: every token must have exactly top_k={top_k} experts")
    if routing_map_TE.is_cuda:
        torch._assert_async(whole)  # fails later and less politely, but waits for nothing
    rank_TE = torch.arange(num_experts, 0, -1, device=routing_map_TE.device, dtype=torch.int32) * routing_map_TE
    expert_TK = rank_TE.topk(top_k, dim=1, sorted=True).indices
    # Rows go expert by expert, tokens in order within one: a running count over the transposed map numbers them.
    row_ET = routing_map_TE.t().reshape(-1).cumsum(0, dtype=torch.int32) - 1
    slots_TK = row_ET.view(num_experts, num_tokens).t().gather(1, expert_TK).contiguous()
    token_TK = torch.arange(num_tokens, device=slots_TK.device, dtype=torch.int32)[:, None].expand(-1, top_k)
    source_M = torch.empty(num_tokens * top_k, dtype=torch.int32, device=slots_TK.device)
    source_M[slots_TK.reshape(-1).long()] = token_TK.reshape(-1)
    offsets_E = routing_map_TE.sum(0).cumsum(0).to(torch.int32)
    return Routing(offsets_E, num_tokens * top_k, source_M, slots_TK), expert_TK


def regroup(counts_RE: torch.Tensor, num_rows: int) -> Routing:
    """Routing of rows received from R ranks, each of which sends its rows sorted by this rank's experts.

    Args:
        counts_RE: int, rows from each rank for each expert; on the device.
        num_rows: M, known from the exchange.
    """
    counts_ER = counts_RE.t()
    start_RE = _exclusive(counts_RE)
    start_ER = _exclusive(counts_ER)  # of the same blocks once sorted by expert
    shift_ER = start_RE.t() - start_ER
    row_M = torch.arange(num_rows, device=counts_RE.device)
    source_M = row_M + shift_ER.reshape(-1).repeat_interleave(counts_ER.reshape(-1), output_size=num_rows)
    slots_M = row_M - shift_ER.t().reshape(-1).repeat_interleave(counts_RE.reshape(-1), output_size=num_rows)
    offsets_E = counts_RE.sum(0).cumsum(0).to(torch.int32)
    if counts_RE.is_cuda:
        torch._assert_async(offsets_E[-1] == num_rows)
    return Routing(offsets_E, num_rows, source_M.int(), slots_M.int()[:, None].contiguous())


def _exclusive(counts: torch.Tensor) -> torch.Tensor:
    """Where each block starts when blocks follow each other in row-major order; the same shape."""
    return F.pad(counts.reshape(-1).cumsum(0), (1, -1)).view(counts.shape)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, source_M: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(source_M, slots_TK)
        return x_TH.index_select(0, source_M)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source_M, slots_TK = ctx.saved_tensors
        return _Unpermute.apply(grads[0], source_M, slots_TK), None, None  # pyright: ignore[reportReturnType]


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MH: torch.Tensor, source_M: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(source_M, slots_TK)
        return combine(y_MH, slots_TK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source_M, slots_TK = ctx.saved_tensors
        return _Permute.apply(grads[0], source_M, slots_TK), None, None  # pyright: ignore[reportReturnType]


class _PermuteValues(torch.autograd.Function):
    """Slots are a permutation: forward scatters along it, backward gathers."""

    @staticmethod
    def forward(ctx: Any, p_TK: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
        slots = slots_TK.reshape(-1).long()
        ctx.save_for_backward(slots)
        p_M = p_TK.new_empty(slots.shape[0])
        p_M[slots] = p_TK.reshape(-1)
        ctx.shape = p_TK.shape
        return p_M

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return grads[0].index_select(0, slots).view(ctx.shape), None


def permute(x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """``x[source]`` ``[M, H]``; x itself where the routing has no source. Its gradient is ``unpermute``: no atomics."""
    if routing.source_M is None or routing.slots_TK is None:
        return x_TH
    return _Permute.apply(x_TH, routing.source_M, routing.slots_TK)  # pyright: ignore[reportReturnType]


def unpermute(y_MH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum of each token's rows ``[T, H]``, accumulated in float32 in the order of its slots; the inverse of ``permute``."""
    if routing.source_M is None or routing.slots_TK is None:
        return y_MH
    return _Unpermute.apply(y_MH, routing.source_M, routing.slots_TK)  # pyright: ignore[reportReturnType]


def permute_values(p_TK: torch.Tensor, routing: Routing) -> torch.Tensor:
    """One value per slot (a routing probability) ``[T, k]`` to one value per row ``[M]``; differentiable."""
    assert routing.slots_TK is not None and p_TK.shape == routing.slots_TK.shape
    return _PermuteValues.apply(p_TK, routing.slots_TK)  # pyright: ignore[reportReturnType]

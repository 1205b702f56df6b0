"""Send each token once to every rank that has experts of it.

A token with several of its k experts on one rank is one row of the all-to-all. Rows are sorted by
rank, tokens in order within one. Beside the rows travels what a rank must know of each pair of
token and expert: the routing probability, and the pair's place in a table ``[rows, S]`` of the rank
that receives it, in which each row has the experts that it goes to there. Pairs are sorted by
expert, so that those for one rank lie together as well. ``regroup.py`` is the other end.

Of k choices among E experts that are all alike, a rank with E / R of them is hit with probability
``1 - C(E - E / R, k) / C(E, k)``.

Shape legend: T tokens   k experts per token   E experts   R ranks that receive   M = T k pairs
D = min(k, R) ranks of a token, at most   S = min(k, E / R) experts of a token on one rank, at most
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .route import route_ref, route_triton, route_with_experts, spread
from .routing import Routing

BLOCK_T = 128
"""Tokens of one program that places pairs."""


@dataclass(frozen=True, eq=False)
class Destinations:
    """What this rank sends where; all of it on the device."""

    pair_ends_E: torch.Tensor
    """int32 ``[E]``: the pair behind the last one of each expert."""
    places_M: torch.Tensor
    """int32 ``[M]``: ``row S + j`` for the pair that is the j-th of its row; rows are numbered anew
    for each rank."""
    row_ends_R: torch.Tensor
    """int32 ``[R]``: the row behind the last one for each rank."""
    sources: torch.Tensor
    """int32 ``[T D]``: the token of each row; undefined behind the last row."""
    slots_TD: torch.Tensor
    """int32 ``[T, D]``: the rows of each token, -1 behind the last one."""

    def ends(self) -> torch.Tensor:
        """``[1 + E + R]``: 0, the ends of each expert's pairs and, counted on, of each rank's rows.
        Differences of neighbours are numbers of pairs and of rows."""
        num_pairs = self.places_M.shape[0]
        return torch.cat(
            (self.pair_ends_E.new_zeros(1), self.pair_ends_E, self.row_ends_R + num_pairs)
        )

    def rows(self, num_rows: int) -> Routing:
        """The rows, once the host knows how many they are: "experts" of this routing are ranks."""
        return Routing(self.row_ends_R, num_rows, self.sources[:num_rows], self.slots_TD)


# ---- 1. reference --------------------------------------------------------------------------------


def places_ref(
    pairs: Routing, expert_TK: torch.Tensor, rows: Routing, per_rank: int, num_slots: int
) -> torch.Tensor:
    """The specification: int32 ``[M]``.

    Args:
        pairs: rows of experts, as ``route`` sorts them.
        expert_TK: each token's experts, ascending.
        rows: rows of ranks.
        per_rank: E / R.
        num_slots: S.
    """
    assert pairs.slots_TK is not None and rows.slots_TK is not None
    rank_TK = expert_TK.long() // per_rank
    # Experts ascend, so those on one rank stand together: a run of equal ranks.
    starts_run = torch.ones_like(rank_TK, dtype=torch.bool)
    starts_run[:, 1:] = rank_TK[:, 1:] != rank_TK[:, :-1]
    # Which of the token's ranks, and which of its experts there: 0, 0, 1, ... and 0, 1, 0, ...
    nth_rank_TK = starts_run.cumsum(1) - 1
    position_K = torch.arange(rank_TK.shape[1], device=rank_TK.device)
    first_TK = (position_K * starts_run).cummax(1).values
    nth_expert_TK = position_K - first_TK
    row_TK = rows.slots_TK.gather(1, nth_rank_TK)
    first_row_R = F.pad(rows.offsets_E, (1, -1))
    place_TK = (row_TK - first_row_R[rank_TK]) * num_slots + nth_expert_TK
    places_M = place_TK.new_empty(pairs.num_rows, dtype=torch.int32)
    places_M[pairs.slots_TK.reshape(-1).long()] = place_TK.reshape(-1).int()
    return places_M


# ---- 2. kernel -----------------------------------------------------------------------------------


@triton.jit
def _places_kernel(
    # pairs' slots and experts (T, k), rows' slots (T, D), ends of ranks' rows (R,), places (M,)
    slots_ptr, expert_ptr, row_slots_ptr, row_ends_ptr, places_ptr,
    num_tokens, per_rank, num_slots,
    TOP_K: tl.constexpr, RANKS_OF_TOKEN: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program owns the pairs of BLOCK_T tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = t < num_tokens
    t_64 = t.to(tl.int64)
    last_rank = tl.full((BLOCK_T,), -1, tl.int32)
    nth_rank = tl.full((BLOCK_T,), -1, tl.int32)
    nth_expert = tl.zeros((BLOCK_T,), tl.int32)
    # Experts ascend, so those on one rank come one after the other.
    for j in tl.static_range(TOP_K):
        rank = tl.load(expert_ptr + t_64 * TOP_K + j, mask=ok, other=0) // per_rank
        is_new = rank != last_rank
        nth_rank += is_new.to(tl.int32)
        nth_expert = tl.where(is_new, 0, nth_expert + 1)
        row = tl.load(row_slots_ptr + t_64 * RANKS_OF_TOKEN + nth_rank, mask=ok, other=0)
        first_row = tl.load(row_ends_ptr + rank - 1, mask=ok & (rank > 0), other=0)
        pair = tl.load(slots_ptr + t_64 * TOP_K + j, mask=ok, other=0)
        tl.store(places_ptr + pair, (row - first_row) * num_slots + nth_expert, mask=ok)
        last_rank = rank


# ---- 3. launcher ---------------------------------------------------------------------------------


def places_triton(
    pairs: Routing, expert_TK: torch.Tensor, rows: Routing, per_rank: int, num_slots: int
) -> torch.Tensor:
    """As ``places_ref``. At least one token."""
    assert pairs.slots_TK is not None and rows.slots_TK is not None
    num_tokens, top_k = expert_TK.shape
    places_M = expert_TK.new_empty(pairs.num_rows)
    _places_kernel[(triton.cdiv(num_tokens, BLOCK_T),)](
        pairs.slots_TK, expert_TK, rows.slots_TK, rows.offsets_E, places_M, num_tokens, per_rank,
        num_slots, TOP_K=top_k, RANKS_OF_TOKEN=rows.slots_TK.shape[1], BLOCK_T=BLOCK_T,
    )  # fmt: skip
    return places_M


# ---- 4. autograd ---------------------------------------------------------------------------------


class _SendValues(torch.autograd.Function):
    """Keeps where each value went: two int32 a pair."""

    @staticmethod
    def forward(
        ctx: Any,
        values_TE: torch.Tensor,
        routing_map_TE: torch.Tensor,
        top_k: int,
        num_ranks: int,
    ) -> tuple[torch.Tensor, ...]:
        num_tokens, num_experts = routing_map_TE.shape
        pairs, expert_TK, values_M = route_with_experts(routing_map_TE, top_k, values_TE)
        ctx.save_for_backward(pairs.slots_TK, expert_TK)
        ctx.num_experts = num_experts
        per_rank = num_experts // num_ranks
        # Whether a token has an expert on a rank: a routing over ranks instead of experts.
        hit_TR = routing_map_TE.unflatten(1, (num_ranks, per_rank)).any(2)
        shape = (per_rank, min(top_k, per_rank))
        if routing_map_TE.is_cuda and num_tokens:
            rows, *_ = route_triton(hit_TR, min(top_k, num_ranks), exactly=False)
            places_M = places_triton(pairs, expert_TK, rows, *shape)
        else:
            rows, _ = route_ref(hit_TR, min(top_k, num_ranks), exactly=False)
            places_M = places_ref(pairs, expert_TK, rows, *shape)
        indexes = (pairs.offsets_E, places_M, rows.offsets_E, rows.source_M, rows.slots_TK)
        ctx.mark_non_differentiable(*indexes)
        ctx.set_materialize_grads(False)  # autograd would make zeros for the indexes
        return values_M, *indexes  # pyright: ignore[reportReturnType]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dvalues_M: torch.Tensor | None, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if dvalues_M is None:  # nobody used the values
            return None, None, None, None
        return spread(dvalues_M, *ctx.saved_tensors, ctx.num_experts), None, None, None


# ---- 5. public function --------------------------------------------------------------------------


def route_to_ranks(
    routing_map_TE: torch.Tensor, values_TE: torch.Tensor, top_k: int, num_ranks: int
) -> tuple[Destinations, torch.Tensor]:
    """What to send where so that each token travels once to each rank, without waiting for the
    device.

    Args:
        routing_map_TE: bool, exactly ``top_k`` experts per token.
        values_TE: routing probabilities; those that were not chosen are not read.
        top_k: k.
        num_ranks: R; rank r has experts ``r E / R`` up to ``(r + 1) E / R``.

    Returns:
        The destinations, and the values ``[M]`` in the order of the pairs; differentiable once in
        ``values_TE``.

    Raises:
        ValueError: as ``route``, and where ranks cannot have equally many experts.
    """
    num_experts = routing_map_TE.shape[1]
    if num_experts % num_ranks:
        raise ValueError(
            f"routing: {num_experts} experts are not a multiple of {num_ranks} ranks; use a number"
            " of ranks that divides them"
        )
    values_M, *indexes = _SendValues.apply(values_TE, routing_map_TE, top_k, num_ranks)  # pyright: ignore
    return Destinations(*indexes), values_M

"""Build the routing of a router's choice of experts: a counting sort.

Rows are numbered expert by expert, tokens in order within one: an expert's rows start behind those
of all experts before it, and a token's row behind those of all tokens before it. Two launches do
it: one counts each expert's rows in chunks of tokens, one adds the counts before its own chunk and
places the rows. Every place is written by exactly one program, and nothing waits for the device. A
value of each row (its routing probability) is moved in the same launch.

Shape legend: T tokens   k rows per token   M routed rows   E experts
"""

# A @triton.jit function is called with a grid, options and plain numbers for constexprs, and
# unpacks tuples in kernels: Python's rules for calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl

from .absent import pointer
from .routing import Routing, as_outputs, assembled, check_rows

CHUNKS = 128
"""Chunks of tokens that are counted apart, at most: every placing program reads all counts."""

# ---- 1. reference --------------------------------------------------------------------------------


def route_ref(
    routing_map_TE: torch.Tensor, top_k: int, exactly: bool = True
) -> tuple[Routing, torch.Tensor]:
    """The specification; about 20 operations of torch. Not ``exactly``: as ``route_triton``."""
    num_tokens, num_experts = routing_map_TE.shape
    # On a GPU this would wait for the device: there a kernel asserts it.
    whole = (routing_map_TE.sum(1) == top_k).all()
    if exactly and routing_map_TE.device.type == "cpu" and not bool(whole):
        raise ValueError(f"routing: every token must have exactly top_k={top_k} experts")
    # E, E - 1, ... for the chosen, 0 for others: the largest k are the experts in ascending order.
    rank_TE = (
        torch.arange(num_experts, 0, -1, device=routing_map_TE.device, dtype=torch.int32)
        * routing_map_TE
    )
    largest_TK, expert_TK = rank_TE.topk(top_k, dim=1, sorted=True)
    is_chosen_TK = largest_TK > 0
    # Rows go expert by expert, tokens in order within one: a running count over the transposed map
    # numbers them.
    row_ET = routing_map_TE.t().reshape(-1).cumsum(0, dtype=torch.int32) - 1
    slots_TK = row_ET.view(num_experts, num_tokens).t().gather(1, expert_TK)
    slots_TK = torch.where(is_chosen_TK, slots_TK, -1)
    token_TK = torch.arange(num_tokens, device=slots_TK.device, dtype=torch.int32)[:, None].expand(
        -1, top_k
    )
    # An empty slot counts from the back: to the one place behind the last row.
    source = torch.zeros(num_tokens * top_k + 1, dtype=torch.int32, device=slots_TK.device)
    source[slots_TK.reshape(-1).long()] = token_TK.reshape(-1)
    source_M = source[:-1]
    offsets_E = routing_map_TE.sum(0).cumsum(0).to(torch.int32)
    return Routing(offsets_E, num_tokens * top_k, source_M, slots_TK), expert_TK.int()


# ---- 2. kernels ----------------------------------------------------------------------------------
# ``debug`` is what makes an assertion on the device one; checks of every integer sum come with it
# and are turned off.


@triton.jit
def _chosen(map_ptr, t, e, num_tokens, num_experts, stride_t, stride_e):
    """The map of some tokens as int32 0 and 1; 0 beyond its edges."""
    ok = (t < num_tokens)[:, None] & (e < num_experts)[None, :]
    places = map_ptr + t[:, None].to(tl.int64) * stride_t + e[None, :] * stride_e
    return tl.load(places, mask=ok, other=0).to(tl.int32)


@triton.jit(debug=True)
def _count_kernel(
    map_ptr, counts_ptr,  # map (T, E) bool, counts (chunks, E) int32
    num_tokens, num_experts, chunk_tokens, stride_t, stride_e,
    TOP_K: tl.constexpr, EXACTLY: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program counts the rows that each expert gets from one chunk of tokens."""
    first = tl.program_id(0) * chunk_tokens
    e = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), tl.int32)
    for t0 in range(first, tl.minimum(first + chunk_tokens, num_tokens), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        chosen = _chosen(map_ptr, t, e, num_tokens, num_experts, stride_t, stride_e)
        if EXACTLY:
            tl.device_assert(
                (tl.sum(chosen, 1) == TOP_K) | (t >= num_tokens),
                "a token without exactly top_k experts",
            )
        count += tl.sum(chosen, 0)
    tl.store(counts_ptr + tl.program_id(0) * num_experts + e, count, mask=e < num_experts)


@triton.jit
def _place_kernel(
    map_ptr, counts_ptr, values_ptr,  # map (T, E) bool, counts (chunks, E) int32, values (T, E)
    # (E,), (M,), (T, k), (T, k) int32; values (M,)
    offsets_ptr, source_ptr, slots_ptr, expert_ptr, moved_ptr,
    num_tokens, num_experts, chunk_tokens, num_chunks, stride_t, stride_e, stride_vt, stride_ve,
    TOP_K: tl.constexpr, HAS_VALUES: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program places the rows of one chunk of tokens."""
    chunk = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for c0 in range(0, num_chunks, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        ok = (c < num_chunks)[:, None] & (e < num_experts)[None, :]
        counts = tl.load(counts_ptr + c[:, None] * num_experts + e[None, :], mask=ok, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((c < chunk)[:, None], counts, 0), 0)
    ends = tl.cumsum(total, 0)
    if chunk == 0:
        tl.store(offsets_ptr + e, ends, mask=e < num_experts)
    # Where each expert's rows of this chunk begin: behind other experts' rows and earlier chunks'.
    next_row = ends - total + before
    first = chunk * chunk_tokens
    for t0 in range(first, tl.minimum(first + chunk_tokens, num_tokens), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        chosen = _chosen(map_ptr, t, e, num_tokens, num_experts, stride_t, stride_e)
        hit = chosen != 0
        # Running counts without the element itself: over tokens for its row, over experts for its
        # slot.
        row = next_row[None, :] + tl.cumsum(chosen, 0) - chosen
        slot = t[:, None].to(tl.int64) * TOP_K + tl.cumsum(chosen, 1) - chosen
        tl.store(slots_ptr + slot, row, mask=hit)
        tl.store(expert_ptr + slot, tl.broadcast_to(e[None, :], (BLOCK_T, EXPERTS)), mask=hit)
        tl.store(source_ptr + row, tl.broadcast_to(t[:, None], (BLOCK_T, EXPERTS)), mask=hit)
        if HAS_VALUES:
            places = values_ptr + t[:, None].to(tl.int64) * stride_vt + e[None, :] * stride_ve
            tl.store(moved_ptr + row, tl.load(places, mask=hit, other=0.0), mask=hit)
        next_row += tl.sum(chosen, 0)


@triton.jit
def _spread_kernel(
    # values (M,), slots and expert (T, k) int32, out (T, E)
    values_ptr, slots_ptr, expert_ptr, out_ptr,
    num_tokens, num_experts, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out[t, expert[t, j]] = values[slots[t, j]], zero elsewhere; one program owns BLOCK_T
    tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, EXPERTS)
    t_ok = t < num_tokens
    t_64 = t.to(tl.int64)
    out = tl.zeros((BLOCK_T, EXPERTS), out_ptr.dtype.element_ty)
    for j in tl.static_range(TOP_K):
        row = tl.load(slots_ptr + t_64 * TOP_K + j, mask=t_ok, other=0)
        expert = tl.load(expert_ptr + t_64 * TOP_K + j, mask=t_ok, other=-1)
        value = tl.load(values_ptr + row, mask=t_ok, other=0.0)
        out = tl.where(expert[:, None] == e[None, :], value[:, None], out)
    ok = t_ok[:, None] & (e < num_experts)[None, :]
    tl.store(out_ptr + t_64[:, None] * num_experts + e[None, :], out, mask=ok)


# ---- 3. launchers --------------------------------------------------------------------------------


def _tokens_at_once(num_experts: int) -> tuple[int, int]:
    """(experts, tokens) of the tile of the map that a program reads at once, powers of two."""
    experts = int(triton.next_power_of_2(num_experts))
    # 4,096 elements of a tile spilled at 255 registers; 2,048 do not.
    return experts, max(1, min(64, 2048 // experts))


def route_triton(
    routing_map_TE: torch.Tensor,
    top_k: int,
    values_TE: torch.Tensor | None = None,
    exactly: bool = True,
) -> tuple[Routing, torch.Tensor, torch.Tensor | None]:
    """The routing, int32 ``expert_TK``, and the values in the order of the rows. At least one
    token.

    Args:
        exactly: every token has ``top_k`` experts. Else it has that many at most: slots behind its
            last row are -1, and rows behind the last expert's are undefined. How many rows there
            are only the device knows; the routing has ``T k`` of them.
    """
    num_tokens, num_experts = routing_map_TE.shape
    num_rows = routing_map_TE.shape[0] * top_k
    experts, block_t = _tokens_at_once(num_experts)
    # Whole tiles, as few as make at most CHUNKS chunks.
    chunk_tokens = block_t * int(triton.cdiv(num_tokens, block_t * CHUNKS))
    num_chunks = int(triton.cdiv(num_tokens, chunk_tokens))
    new = {"dtype": torch.int32, "device": routing_map_TE.device}
    counts = torch.empty(num_chunks, num_experts, **new)
    offsets_E = torch.empty(num_experts, **new)
    source_M = torch.empty(num_rows, **new)
    if exactly:
        slots_TK = torch.empty(num_tokens, top_k, **new)
    else:
        slots_TK = torch.full((num_tokens, top_k), -1, **new)
    expert_TK = torch.empty(num_tokens, top_k, **new)
    moved_M = None
    if values_TE is not None:
        moved_M = values_TE.new_empty(num_rows)
    stride_vt = stride_ve = 0
    if values_TE is not None:
        stride_vt, stride_ve = values_TE.stride()
    tile = {"TOP_K": top_k, "EXPERTS": experts, "BLOCK_T": block_t}
    sizes = (num_tokens, num_experts, chunk_tokens)
    _count_kernel[(num_chunks,)](
        routing_map_TE, counts, *sizes, *routing_map_TE.stride(), EXACTLY=exactly, **tile,
        sanitize_overflow=False,
    )  # fmt: skip
    _place_kernel[(num_chunks,)](
        routing_map_TE, counts, pointer(values_TE, offsets_E), offsets_E, source_M, slots_TK,
        expert_TK, pointer(moved_M, offsets_E),
        *sizes, num_chunks, *routing_map_TE.stride(), stride_vt, stride_ve,
        HAS_VALUES=values_TE is not None, BLOCK_C=block_t, **tile,
    )  # fmt: skip
    return Routing(offsets_E, num_rows, source_M, slots_TK), expert_TK, moved_M


def spread_triton(
    values_M: torch.Tensor, slots_TK: torch.Tensor, expert_TK: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """``[T, E]``: each row's value at its token and expert, zeros elsewhere. At least one token."""
    num_tokens, top_k = slots_TK.shape
    out_TE = values_M.new_empty(num_tokens, num_experts)
    experts, block_t = _tokens_at_once(num_experts)
    _spread_kernel[(triton.cdiv(num_tokens, block_t),)](
        values_M,
        slots_TK,
        expert_TK,
        out_TE,
        num_tokens,
        num_experts,
        TOP_K=top_k,
        EXPERTS=experts,
        BLOCK_T=block_t,
    )
    return out_TE


# ---- 4. autograd ---------------------------------------------------------------------------------


class _RouteValues(torch.autograd.Function):
    """Keeps where each value went: two int32 a row, one of which everyone else who moves rows keeps
    as well."""

    @staticmethod
    def forward(
        ctx: Any, values_TE: torch.Tensor, routing_map_TE: torch.Tensor, top_k: int
    ) -> tuple[torch.Tensor, ...]:
        routing, expert_TK, values_M = route_with_experts(routing_map_TE, top_k, values_TE)
        ctx.save_for_backward(routing.slots_TK, expert_TK)
        ctx.num_experts = routing_map_TE.shape[1]
        return values_M, *as_outputs(ctx, routing)  # pyright: ignore[reportReturnType]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dvalues_M: torch.Tensor | None, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if dvalues_M is None:  # nobody used the values
            return None, None, None
        return spread(dvalues_M, *ctx.saved_tensors, ctx.num_experts), None, None


def spread(
    values_M: torch.Tensor, slots_TK: torch.Tensor, expert_TK: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """``[T, E]``: each row's value at its token and expert, zeros elsewhere."""
    if values_M.is_cuda and slots_TK.shape[0]:
        return spread_triton(values_M.contiguous(), slots_TK, expert_TK, num_experts)
    values_TE = values_M.new_zeros(slots_TK.shape[0], num_experts)
    found_TK = values_M.index_select(0, slots_TK.reshape(-1)).view(slots_TK.shape)
    return values_TE.scatter_(1, expert_TK.long(), found_TK)


def route_with_experts(
    routing_map_TE: torch.Tensor, top_k: int, values_TE: torch.Tensor | None = None
) -> tuple[Routing, torch.Tensor, torch.Tensor | None]:
    """The routing, int32 ``expert_TK``, and the values in the order of the rows."""
    check_rows(
        routing_map_TE.shape[0] * top_k,
        f"{routing_map_TE.shape[0]} tokens with {top_k} experts each",
    )
    if routing_map_TE.is_cuda and routing_map_TE.shape[0]:
        return route_triton(routing_map_TE, top_k, values_TE)
    routing, expert_TK = route_ref(routing_map_TE, top_k)
    if values_TE is None or routing.source_M is None or routing.slots_TK is None:
        return routing, expert_TK, None
    values_M = values_TE.new_empty(routing.num_rows)
    values_M[routing.slots_TK.reshape(-1).long()] = values_TE.gather(1, expert_TK.long()).reshape(
        -1
    )
    return routing, expert_TK, values_M


# ---- 5. public functions -------------------------------------------------------------------------


def route(routing_map_TE: torch.Tensor, top_k: int) -> tuple[Routing, torch.Tensor]:
    """Routing of a top-k router, without waiting for the device.

    Args:
        routing_map_TE: bool, exactly ``top_k`` experts per token.
        top_k: k.

    Returns:
        The routing, and ``expert_TK`` int64: each token's experts in ascending order, as its slots
        are.

    Raises:
        ValueError: a token with another number of experts (on a GPU that is a device-side
            assertion), or more rows than int32
            numbers.
    """
    routing, expert_TK, _ = route_with_experts(routing_map_TE, top_k)
    return routing, expert_TK.long()


def route_values(
    routing_map_TE: torch.Tensor, values_TE: torch.Tensor, top_k: int
) -> tuple[Routing, torch.Tensor]:
    """``route``, and one value of each chosen pair of token and expert moved to its row.

    Args:
        routing_map_TE: bool, exactly ``top_k`` experts per token.
        values_TE: routing probabilities; those that were not chosen are not read.
        top_k: k.

    Returns:
        The routing, and the values ``[M]`` in the order of the rows; differentiable once in
        ``values_TE``.

    Raises:
        ValueError: as ``route``.
    """
    values_M, *indexes = _RouteValues.apply(values_TE, routing_map_TE, top_k)  # pyright: ignore
    return assembled(values_M, indexes), values_M

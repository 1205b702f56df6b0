"""Compare route and regroup with sorted lists of Python pairs, and permute and unpermute with each
other."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megalora_kernels import (
    Arrivals,
    Routing,
    permute,
    permute_values,
    regroup_values,
    route,
    route_to_ranks,
    unpermute,
)

from tests.kernels.measure import no_reads_on_the_host
from tests.kernels.oracle import ULP, arrivals_of, as_map, last_rows, sorted_pairs


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """(experts of each token, E, k)."""
    num_experts = draw(st.integers(1, 7))
    k = draw(st.integers(1, num_experts))
    chosen = []
    for _ in range(draw(st.integers(0, 9))):
        # The first k of a permutation are k different experts; a token's come sorted.
        order = draw(st.permutations(range(num_experts)))
        chosen.append(sorted(order[:k]))
    return chosen, num_experts, k


@given(case=choices())
def test_route_against_a_sorted_list(case):
    chosen, num_experts, k = case
    routing, expert_TK = route(as_map(chosen, num_experts), k)
    rows = sorted_pairs(chosen)
    assert routing.num_rows == len(rows) and routing.num_experts == num_experts
    assert routing.source_M.tolist() == [t for _, t in rows]
    ends = last_rows([e for e, _ in rows], num_experts)
    assert routing.offsets_E.tolist() == ends
    assert expert_TK.tolist() == chosen
    # A token's slots are the places of its rows, in the order of its experts.
    for t, experts in enumerate(chosen):
        assert routing.slots_TK[t].tolist() == [rows.index((e, t)) for e in experts]
    # int32 is what the kernels read; int64 is what torch's gather wants.
    for index in (routing.offsets_E, routing.source_M, routing.slots_TK):
        assert index.dtype == torch.int32 and index.is_contiguous()
    assert expert_TK.dtype == torch.int64
    # (expert, first row, end), also of experts without rows
    starts = [0, *ends[:-1]]
    assert routing.spans() == list(zip(range(num_experts), starts, ends, strict=True))


@st.composite
def sent_rows(draw: st.DrawFn) -> tuple[list[list[list[int]]], int]:
    """(for each rank the experts of each row that it sends, E)."""
    num_experts = draw(st.integers(1, 5))
    row = st.sets(st.integers(0, num_experts - 1), min_size=1).map(sorted)
    ranks = st.lists(st.lists(row, max_size=4), min_size=1, max_size=4)
    return draw(ranks), num_experts


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@given(case=sent_rows())
def test_regroup_against_a_sorted_list(dtype, case):
    chosen_RT, num_experts = case
    arrivals = arrivals_of(chosen_RT, num_experts)
    arrivals = replace(arrivals, counts_RE=arrivals.counts_RE.to(dtype))
    chosen = list(itertools.chain.from_iterable(chosen_RT))
    rows = sorted_pairs(chosen)
    # Values name the pairs, in the order in which they arrive.
    routing, sorted_M = regroup_values(arrivals, torch.arange(len(rows)).double())
    assert routing.source_M.tolist() == [row for _, row in rows]
    assert routing.num_rows == len(rows)
    for row, experts in enumerate(chosen):
        slots = [rows.index((e, row)) for e in experts]
        assert routing.slots_TK[row].tolist() == slots + [-1] * (arrivals.num_slots - len(slots))
    assert routing.offsets_E.tolist() == last_rows([e for e, _ in rows], num_experts)
    # Ranks send their pairs by expert: sorted over all ranks, those of one rank stay in order.
    of_rank = torch.tensor([rank for rank, sent in enumerate(chosen_RT) for _ in sent])
    rank_of_pair = of_rank[routing.source_M.long()]
    for rank in range(len(chosen_RT)):
        mine = sorted_M[rank_of_pair == rank]
        assert mine.tolist() == sorted(mine.tolist())
    assert sorted(sorted_M.tolist()) == list(range(len(rows)))
    for index in (routing.source_M, routing.slots_TK, routing.offsets_E):
        assert index.dtype == torch.int32


@given(case=choices())
def test_permute_unpermute_and_values(case):
    chosen, num_experts, k = case
    routing, _ = route(as_map(chosen, num_experts), k)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(chosen), 3, generator=g)
    p_TK = torch.rand(len(chosen), k, generator=g)
    rows = permute(x, routing)
    p_M = permute_values(p_TK, routing)
    for m, t in enumerate(routing.source_M.tolist()):
        assert torch.equal(rows[m], x[t])
        # the token's probability for the very expert whose row this is
        assert p_M[m] == p_TK[t, routing.slots_TK[t].tolist().index(m)]
    back = unpermute(rows * p_M[:, None], routing)
    # Every row is its token's x times a probability, so their sum is x times the sum of those.
    # k <= 7 terms in float32: default tolerance
    torch.testing.assert_close(back, x * p_TK.sum(1, keepdim=True))


SINGLE = Arrivals.single(torch.tensor([[2, 0, 3], [1, 4, 0]]), 10)
"""Rows of two ranks for one of three experts each."""


def test_unpermute_is_the_exact_inverse_where_every_token_has_one_row():
    routing, _ = regroup_values(SINGLE, torch.zeros(10))
    x = torch.randn(10, 3)
    assert torch.equal(unpermute(permute(x, routing), routing), x)
    assert torch.equal(permute(unpermute(x, routing), routing), x)
    p = torch.rand(10, 1)
    assert torch.equal(permute_values(p, routing), permute(p, routing)[:, 0])


def example() -> Routing:
    return route(as_map([[1, 2], [4, 5], [1, 4], [1, 2], [2, 4]], 6), 2)[0]


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_once_and_twice(check):
    routing = example()
    # 5 tokens with k = 2 experts each: 10 rows
    x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    y = torch.randn(10, 3, dtype=torch.float64).requires_grad_()
    p = torch.randn(5, 2, dtype=torch.float64).requires_grad_()
    assert check(lambda x: permute(x, routing), (x,))
    assert check(lambda y: unpermute(y, routing), (y,))
    assert check(lambda p: permute_values(p, routing), (p,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_made_in_float32(dtype):
    """1 + 2^-8 + 2^-8 in slot order: bfloat16, whose neighbours above 1 are 2^-7 apart, would lose
    both; float32 keeps them for one rounding at the end."""
    routing, _ = route(torch.ones(1, 3, dtype=torch.bool), 3)
    half = ULP[dtype]
    y = torch.tensor([[1.0], [half], [half]], dtype=dtype)
    assert unpermute(y, routing).item() == 1 + 2 * half
    x = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    permute(x, routing).backward(y)
    assert x.grad.item() == 1 + 2 * half and x.grad.dtype == dtype


def test_rows_that_are_sorted_already_pass_through():
    routing = Routing(torch.tensor([1, 4], dtype=torch.int32), 4)
    x = torch.randn(4, 3)
    assert permute(x, routing) is x and unpermute(x, routing) is x


# ---- nothing waits for a device ----------------------------------------------------------------


def test_on_meta_tensors_there_is_nothing_to_read():
    routing, expert_TK = route(torch.empty(5, 6, dtype=torch.bool, device="meta"), 2)
    counts = torch.empty(3, 6, dtype=torch.int64, device="meta")
    again, _ = regroup_values(Arrivals.single(counts, 11), torch.empty(11, device="meta"))
    sending, _ = route_to_ranks(
        torch.empty(5, 6, dtype=torch.bool, device="meta"), torch.empty(5, 6, device="meta"), 2, 3
    )
    assert routing.source_M.shape == (10,) and routing.slots_TK.shape == expert_TK.shape == (5, 2)
    # An arrived row is a token of its own, with a single slot.
    assert again.source_M.shape == (11,) and again.slots_TK.shape == (11, 1)
    assert again.offsets_E.shape == (6,)
    # Ten pairs of a token and an expert; two ranks of a token at most.
    assert sending.places_M.shape == (10,) and sending.slots_TD.shape == (5, 2)
    x = torch.empty(5, 3, device="meta", requires_grad=True)
    rows = permute(x, routing) * permute_values(torch.empty(5, 2, device="meta"), routing)[:, None]
    (dx,) = torch.autograd.grad(unpermute(rows, routing).sum(), x)
    assert rows.shape == (10, 3) and dx.shape == (5, 3)


def test_and_on_others_nothing_is_read():
    routing = example()
    x = torch.randn(5, 3, requires_grad=True)
    with no_reads_on_the_host():
        regroup_values(SINGLE, torch.zeros(10))
        rows = permute(x, routing) * permute_values(torch.ones(5, 2), routing)[:, None]
        (dx,) = torch.autograd.grad(unpermute(rows, routing).sum(), x)
    # Two rows for each token, each with probability 1.
    assert torch.equal(dx, torch.full((5, 3), 2.0))


# ---- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [[[0, 1], [2]], [[0, 1], [0, 1, 2]], [[], [0, 1]]], ids=str)
def test_a_token_with_another_number_of_experts(chosen):
    with pytest.raises(ValueError, match="routing: every token must have exactly top_k=2 experts"):
        route(as_map(chosen, 3), 2)


# A decrease, a row too few, a row too many, a negative end.
@pytest.mark.parametrize("ends", [[3, 2, 5], [1, 2, 4], [1, 2, 6], [-1, 2, 5]], ids=str)
def test_offsets_that_do_not_cover_the_rows(ends):
    message = re.escape(
        f"routing: offsets must never decrease and end at M=5, the number of rows; got {ends}"
    )
    with pytest.raises(ValueError, match=message):
        Routing(torch.tensor(ends, dtype=torch.int32), 5).spans()

"""Compare the Triton forms of route and regroup, and the values that move along, with sorted lists
of Python pairs."""

import importlib
import itertools
import re

import pytest
import torch
from megalora_kernels import (
    Routing,
    permute_values,
    regroup,
    regroup_values,
    route,
    route_values,
)

from tests.kernels.oracle import as_map, expert_of_arrivals, last_rows, sorted_pairs

# The package re-exports functions under their modules' names, so attribute access finds functions.
route_module = importlib.import_module("megalora_kernels.route")
regroup_module = importlib.import_module("megalora_kernels.regroup")


def chosen_experts(
    num_tokens: int, num_experts: int, k: int, idle: tuple[int, ...] = ()
) -> list[list[int]]:
    """k experts of each token, none of them idle."""
    g = torch.Generator().manual_seed(num_tokens)
    busy = [e for e in range(num_experts) if e not in idle]
    chosen = []
    for _ in range(num_tokens):
        # The first k of a permutation are k different experts; a token's come sorted.
        first = torch.randperm(len(busy), generator=g)[:k].tolist()
        chosen.append(sorted(busy[i] for i in first))
    return chosen


# (experts of each token, E, k). Tiles have 4 tokens here: 13 are four chunks of a tile, the last of
# them ragged, and 57 are five chunks of three tiles.
ROUTES = {
    "one token": (chosen_experts(1, 5, 5), 5, 5),
    "one expert": (chosen_experts(9, 1, 1), 1, 1),
    "a ragged block": (chosen_experts(13, 6, 2, idle=(0, 3, 5)), 6, 2),
    "several blocks and chunks": (chosen_experts(57, 7, 3, idle=(2,)), 7, 3),
}


@pytest.mark.usefixtures("uninitialised_is_nan", "any_order")
@pytest.mark.parametrize("name, strided", itertools.product(ROUTES, [False, True]))
def test_route(name, strided, monkeypatch):
    """At most five chunks of four tokens or more."""
    monkeypatch.setattr(route_module, "CHUNKS", 5)
    monkeypatch.setattr(route_module, "_tokens_at_once", lambda experts: (8, 4))
    chosen, num_experts, k = ROUTES[name]
    routing_map = as_map(chosen, num_experts)
    values = torch.rand(len(chosen), num_experts)
    if strided:
        # The same values column by column in memory: kernels must not assume rows.
        routing_map = routing_map.t().contiguous().t()
        values = values.t().contiguous().t()
    rows = sorted_pairs(chosen)
    routing, expert_TK, values_M = route_module.route_triton(routing_map, k, values)
    assert routing.source_M.tolist() == [t for _, t in rows]
    assert routing.offsets_E.tolist() == last_rows([e for e, _ in rows], num_experts)
    assert expert_TK.tolist() == chosen
    # A token's slots are the places of its rows, in the order of its experts.
    for t, experts in enumerate(chosen):
        assert routing.slots_TK[t].tolist() == [rows.index((e, t)) for e in experts]
    assert values_M.tolist() == [values[t, e].item() for e, t in rows]
    # Backward: each row's gradient goes to the one entry it came from, zeros to all others.
    dvalues_M = torch.rand(len(rows))
    dvalues_TE = route_module.spread_triton(dvalues_M, routing.slots_TK, expert_TK, num_experts)
    want = torch.zeros(len(chosen), num_experts)
    for m, (e, t) in enumerate(rows):
        want[t, e] = dvalues_M[m]
    assert torch.equal(dvalues_TE, want)


def test_tiles_as_on_a_gpu_and_no_values():
    """128 experts: 16 tokens at once, and more than one chunk of them."""
    chosen = chosen_experts(70, 128, 8)
    routing, expert_TK, values_M = route_module.route_triton(as_map(chosen, 128), 8)
    want, want_TK = route_module.route_ref(as_map(chosen, 128), 8)
    assert torch.equal(routing.source_M, want.source_M)
    assert torch.equal(routing.slots_TK, want.slots_TK)
    assert torch.equal(routing.offsets_E, want.offsets_E)
    assert torch.equal(expert_TK, want_TK)
    assert values_M is None


@pytest.mark.parametrize("chosen", [[[0, 1], [2]], [[0, 1], [0, 1, 2]], [[], [0, 1]]], ids=str)
def test_a_token_with_another_number_of_experts_is_an_assertion_on_the_device(chosen):
    with pytest.raises(Exception, match="a token without exactly top_k experts"):
        route_module.route_triton(as_map(chosen, 3), 2)


COUNTS = {
    "one rank": [[3, 0, 2]],
    "one expert": [[3], [0], [4]],
    "idle ranks and experts": [[0, 2, 1, 0, 3], [0, 0, 0, 0, 0], [0, 1, 5, 0, 0]],
    # 512 at a time.
    "more rows than a program takes at once": [[2100, 3], [1, 600]],
}


@pytest.mark.usefixtures("uninitialised_is_nan", "any_order")
@pytest.mark.parametrize("name, strided", itertools.product(COUNTS, [False, True]))
def test_regroup(name, strided):
    counts_RE = COUNTS[name]
    arriving = expert_of_arrivals(counts_RE)
    # Python's sort is stable: rows of one expert stay in the order in which they arrived.
    order = sorted(range(len(arriving)), key=arriving.__getitem__)
    counts = torch.tensor(counts_RE)
    if strided:
        # Column by column in memory, and of the other dtype that may come.
        counts = counts.int().t().contiguous().t()
    values = torch.rand(len(arriving))
    routing, values_M = regroup_module.regroup_triton(counts, len(arriving), values)
    assert routing.source_M.tolist() == order
    # Slots say where an arrived row went, the inverse of where a sorted row came from.
    assert routing.slots_TK.reshape(-1).argsort().tolist() == order
    assert routing.slots_TK.shape == (len(arriving), 1)
    assert routing.offsets_E.tolist() == last_rows(arriving, len(counts_RE[0]))
    assert torch.equal(values_M, values[order])
    assert regroup_module.regroup_triton(counts, len(arriving))[1] is None


def test_counts_that_do_not_add_up_are_an_assertion_on_the_device():
    # 5 rows by the counts, 6 by what arrived.
    with pytest.raises(Exception, match="counts do not add up to the number of rows"):
        regroup_module.regroup_triton(torch.tensor([[3, 0], [1, 1]]), 6)


# ---- the public functions, on a CPU -------------------------------------------------------------


def assert_same(routing: Routing, want: Routing) -> None:
    """All indexes are equal, and no gradient is asked of them."""
    for name in ("offsets_E", "source_M", "slots_TK"):
        found = getattr(routing, name)
        assert torch.equal(found, getattr(want, name)), name
        assert not found.requires_grad, name


def test_values_of_a_route_move_as_permute_values_moves_them():
    routing_map = as_map(chosen_experts(11, 6, 2, idle=(4,)), 6)
    values = torch.rand(11, 6, dtype=torch.float64, requires_grad=True)
    routing, values_M = route_values(routing_map, values, 2)
    want, expert_TK = route(routing_map, 2)
    assert torch.equal(values_M, permute_values(values.gather(1, expert_TK), want))
    assert_same(routing, want)
    assert torch.autograd.gradcheck(lambda v: route_values(routing_map, v, 2)[1], (values,))


def test_values_of_received_rows_move_as_permute_values_moves_them():
    counts = torch.tensor([[2, 0, 3], [1, 4, 0]])
    values = torch.rand(10, dtype=torch.float64, requires_grad=True)
    routing, values_M = regroup_values(counts, values)
    want = regroup(counts, 10)
    assert torch.equal(values_M, permute_values(values[:, None], want))
    assert_same(routing, want)
    assert torch.autograd.gradcheck(lambda v: regroup_values(counts, v)[1], (values,))


def test_no_tokens_and_no_rows():
    routing, values_M = route_values(torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, 3), 2)
    assert routing.offsets_E.tolist() == [0, 0, 0] and values_M.shape == (0,)
    routing, values_M = regroup_module.regroup_triton(
        torch.zeros(2, 3, dtype=torch.int64), 0, torch.zeros(0)
    )
    assert routing.offsets_E.tolist() == [0, 0, 0] and values_M.shape == (0,)


def test_more_rows_than_int32_numbers_are_refused():
    # 2^28 tokens with 8 experts each are 2^31 rows; meta tensors have shapes and no memory.
    tokens = 2**28
    message = "are 2147483648 rows, more than int32 numbers (2147483647)"
    with pytest.raises(
        ValueError, match=re.escape(f"routing: {tokens} tokens with 8 experts each {message}")
    ):
        route(torch.empty(tokens, 8, dtype=torch.bool, device="meta"), 8)
    with pytest.raises(ValueError, match=re.escape(f"routing: 2147483648 received rows {message}")):
        regroup(torch.empty(2, 3, dtype=torch.int64, device="meta"), 2**31)

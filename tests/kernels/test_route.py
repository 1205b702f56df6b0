"""Compare the Triton forms of what routes and regroups rows, and the values that move along, with
sorted lists of Python pairs."""

import importlib
import itertools
import re
from dataclasses import replace

import pytest
import torch
from megalora_kernels import (
    Arrivals,
    Routing,
    permute_values,
    regroup_values,
    route,
    route_to_ranks,
    route_values,
)

from tests.kernels.oracle import arrivals_of, as_map, last_rows, sorted_pairs

# The package re-exports functions under their modules' names, so attribute access finds functions.
route_module = importlib.import_module("megalora_kernels.route")
destinations_module = importlib.import_module("megalora_kernels.destinations")
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


def places_of(token: int, experts: list[int], rows: list[tuple[int, int]]) -> list[int]:
    """Where the token's pairs stand among the rows, in the order of its experts."""
    return [rows.index((e, token)) for e in experts]


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
    expert_M, token_M = map(list, zip(*rows, strict=True))
    routing, expert_TK, values_M = route_module.route_triton(routing_map, k, values)
    assert routing.source_M.tolist() == token_M
    assert routing.offsets_E.tolist() == last_rows(expert_M, num_experts)
    assert expert_TK.tolist() == chosen
    # A token's slots are the places of its rows, in the order of its experts.
    for t, experts in enumerate(chosen):
        assert routing.slots_TK[t].tolist() == places_of(t, experts, rows)
    assert values_M.tolist() == values[token_M, expert_M].tolist()
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


def on_ranks(chosen: list[list[int]], per_rank: int) -> list[list[int]]:
    """Ranks that each token is sent to, ascending."""
    return [sorted({e // per_rank for e in experts}) for experts in chosen]


def wanted_places(chosen: list[list[int]], per_rank: int, num_slots: int) -> list[int]:
    """The place of each pair, pairs by expert: its token's row among those that its rank gets, and
    which of the token's experts there it is."""
    found = []
    ranks = on_ranks(chosen, per_rank)
    for e, t in sorted_pairs(chosen):
        rank = e // per_rank
        # Rows for a rank are the tokens with an expert on it, in order.
        tokens = [u for u, of_token in enumerate(ranks) if rank in of_token]
        there = [x for x in chosen[t] if x // per_rank == rank]
        found.append(tokens.index(t) * num_slots + there.index(e))
    return found


# (experts of each token, experts, k, ranks)
SENT = {
    "one token": (chosen_experts(1, 6, 4), 6, 4, 3),
    "one rank": (chosen_experts(9, 6, 2), 6, 2, 1),
    "one expert a rank": (chosen_experts(13, 5, 3), 5, 3, 5),
    "a rank without tokens": (chosen_experts(13, 8, 3, idle=(2, 3)), 8, 3, 4),
    "all experts": (chosen_experts(5, 6, 6), 6, 6, 2),
    "several blocks and chunks": (chosen_experts(57, 12, 5, idle=(7,)), 12, 5, 3),
}


@pytest.mark.usefixtures("uninitialised_is_nan", "any_order")
@pytest.mark.parametrize("name", SENT)
def test_a_token_is_sent_once_to_each_rank(name, monkeypatch):
    monkeypatch.setattr(route_module, "CHUNKS", 5)
    monkeypatch.setattr(route_module, "_tokens_at_once", lambda experts: (16, 4))
    monkeypatch.setattr(destinations_module, "BLOCK_T", 8)
    chosen, num_experts, k, num_ranks = SENT[name]
    per_rank = num_experts // num_ranks
    ranks = on_ranks(chosen, per_rank)
    rows = sorted_pairs(ranks)
    rank_M, token_M = map(list, zip(*rows, strict=True))
    pairs, expert_TK, _ = route_module.route_triton(as_map(chosen, num_experts), k)
    most = min(k, num_ranks)
    hits = as_map(ranks, num_ranks)
    of_rows, *_ = route_module.route_triton(hits, most, exactly=False)
    assert of_rows.offsets_E.tolist() == last_rows(rank_M, num_ranks)
    assert of_rows.source_M[: len(rows)].tolist() == token_M
    for t, of_token in enumerate(ranks):
        slots = places_of(t, of_token, rows)
        assert of_rows.slots_TK[t].tolist() == slots + [-1] * (most - len(slots))
    num_slots = min(k, per_rank)
    places_M = destinations_module.places_triton(pairs, expert_TK, of_rows, per_rank, num_slots)
    assert places_M.tolist() == wanted_places(chosen, per_rank, num_slots)
    # The public function, on a CPU, says the same.
    sending, _ = route_to_ranks(
        as_map(chosen, num_experts), torch.zeros(hits.shape[0], num_experts), k, num_ranks
    )
    assert torch.equal(sending.places_M, places_M)
    for field in ("offsets_E", "slots_TK"):
        assert torch.equal(getattr(sending.rows(len(rows)), field), getattr(of_rows, field))
    assert sending.rows(len(rows)).source_M.tolist() == token_M
    per_expert = as_map(chosen, num_experts).sum(0).tolist()
    assert sending.ends().diff().tolist() == per_expert + hits.sum(0).tolist()


def test_experts_that_ranks_cannot_share_evenly():
    with pytest.raises(ValueError, match="6 experts are not a multiple of 4 ranks; use a number"):
        route_to_ranks(torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6), 6, 4)


# What each rank sends: the experts of each of its rows.
ARRIVALS = {
    "one rank": ([[[0], [2], [0, 2], [0]]], 3),
    "one expert": ([[[0], [0], [0]], [], [[0]] * 4], 1),
    "idle ranks and experts": ([[[1, 2], [4], [1, 4], [4]], [], [[1, 2], [2]] * 3], 5),
    # 512 pairs at a time.
    "more rows than a program takes at once": ([[[0]] * 2100 + [[0, 1]], [[1], [0, 1]] * 300], 2),
}


@pytest.mark.usefixtures("uninitialised_is_nan", "any_order")
@pytest.mark.parametrize("name, strided", itertools.product(ARRIVALS, [False, True]))
def test_regroup(name, strided):
    chosen_RT, num_experts = ARRIVALS[name]
    arrivals = arrivals_of(chosen_RT, num_experts)
    chosen = list(itertools.chain.from_iterable(chosen_RT))
    rows = sorted_pairs(chosen)
    expert_M, row_M = map(list, zip(*rows, strict=True))
    # Pairs arrive by rank, then by expert: (expert, row), rows numbered over all ranks.
    arriving = []
    first = 0
    for of_rank in chosen_RT:
        for e, row in sorted_pairs(of_rank):
            arriving.append((e, first + row))
        first += len(of_rank)
    if strided:
        # Column by column in memory, and of the other dtype that may come.
        counts = arrivals.counts_RE.int().t().contiguous().t()
        apart = torch.stack((arrivals.rows_R, arrivals.rows_R), 1)[:, 0]
        arrivals = replace(arrivals, counts_RE=counts, rows_R=apart)
        # As they travel: a place beside each value.
        pairs = torch.stack((arrivals.places_M, arrivals.places_M + 9), 1)
        arrivals = replace(arrivals, places_M=pairs[:, 0])
    values = torch.rand(len(rows))
    if strided:
        values = torch.stack((values, values + 9), 1)[:, 0]
    routing, sorted_M, values_M = regroup_module.regroup_triton(arrivals, values)
    assert routing.source_M.tolist() == row_M
    assert routing.offsets_E.tolist() == last_rows(expert_M, num_experts)
    assert sorted_M.tolist() == list(map(rows.index, arriving))
    # A row's slots are the places of its pairs, in the order of its experts.
    for row, experts in enumerate(chosen):
        slots = places_of(row, experts, rows)
        assert routing.slots_TK[row].tolist() == slots + [-1] * (arrivals.num_slots - len(slots))
    arrived_as = list(map(arriving.index, rows))
    assert values_M.tolist() == values[arrived_as].tolist()


@pytest.mark.parametrize("rows", [6, 4])
def test_counts_that_do_not_add_up_are_an_assertion_on_the_device(rows):
    arrivals = Arrivals.single(torch.tensor([[3, 0], [1, 1]]), 5)
    # 5 rows and pairs by the counts, another number by what arrived.
    with pytest.raises(Exception, match="counts do not add up to the number of rows"):
        regroup_module.regroup_triton(replace(arrivals, num_rows=rows), torch.zeros(5))
    with pytest.raises(Exception, match="counts do not add up to the number of rows"):
        regroup_module.regroup_triton(arrivals, torch.zeros(rows))


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


def test_values_move_through_a_whole_exchange():
    """Two ranks send to two; each pair's value ends up with its expert, and its gradient in the
    entry that it came from."""
    chosen_RT = [chosen_experts(7, 6, 3), chosen_experts(11, 6, 3, idle=(1,))]
    maps = []
    tables = []
    for chosen in chosen_RT:
        maps.append(as_map(chosen, 6))
        tables.append(torch.rand(len(chosen), 6, dtype=torch.float64, requires_grad=True))

    def exchanged(*tables: torch.Tensor) -> torch.Tensor:
        counts = []
        # [sender][receiver]
        values = []
        places = []
        for routing_map, table in zip(maps, tables, strict=True):
            sending, values_M = route_to_ranks(routing_map, table, 3, 2)
            counts.append(sending.ends().diff())
            # A receiver gets the pairs of its three experts.
            splits = counts[-1][:6].view(2, 3).sum(1).tolist()
            values.append(values_M.split(splits))
            places.append(sending.places_M.split(splits))
        # Of each sender, pairs of six experts and rows of two receivers.
        counts_RC = torch.stack(counts)
        found = []
        for rank in (0, 1):
            counts_RE = counts_RC[:, 3 * rank : 3 * rank + 3].contiguous()
            rows_R = counts_RC[:, 6 + rank].contiguous()
            places_M = torch.cat([of_sender[rank] for of_sender in places])
            values_M = torch.cat([of_sender[rank] for of_sender in values])
            arrivals = Arrivals(counts_RE, rows_R, places_M, int(rows_R.sum()), 3)
            found.append(regroup_values(arrivals, values_M)[1])
        return torch.cat(found)

    want = []
    for e in range(6):
        for table, routing_map in zip(tables, maps, strict=True):
            want.append(table[routing_map[:, e], e])
    assert torch.equal(exchanged(*tables), torch.cat(want))
    assert torch.autograd.gradcheck(exchanged, tuple(tables))


def test_no_tokens_and_no_rows():
    routing, values_M = route_values(torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, 3), 2)
    assert routing.offsets_E.tolist() == [0, 0, 0] and values_M.shape == (0,)
    sending, values_M = route_to_ranks(torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, 4), 3, 2)
    assert sending.ends().diff().tolist() == [0] * 6 and values_M.shape == (0,)
    assert sending.rows(0).slots_TK.shape == (0, 2)
    nothing = Arrivals.single(torch.zeros(2, 3, dtype=torch.int64), 0)
    routing, _, values_M = regroup_module.regroup_triton(nothing, torch.zeros(0))
    assert routing.offsets_E.tolist() == [0, 0, 0] and values_M.shape == (0,)


def test_more_rows_than_int32_numbers_are_refused():
    # 2^28 tokens with 8 experts each are 2^31 rows; meta tensors have shapes and no memory.
    tokens = 2**28
    message = "are 2147483648 rows, more than int32 numbers (2147483647)"
    with pytest.raises(
        ValueError, match=re.escape(f"routing: {tokens} tokens with 8 experts each {message}")
    ):
        route(torch.empty(tokens, 8, dtype=torch.bool, device="meta"), 8)
    counts = torch.empty(2, 3, dtype=torch.int64, device="meta")
    arrivals = replace(Arrivals.single(counts, 2**28), num_slots=8)
    with pytest.raises(
        ValueError, match=re.escape(f"routing: 2147483648 slots of received rows {message}")
    ):
        regroup_values(arrivals, torch.empty(2**28, device="meta"))

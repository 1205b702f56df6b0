"""Dispatch of tokens alone: each travels once to every rank that has experts of it. Bytes of every
exchange against those counted from the routing; values and gradients against a plain layer of
experts in float64, of which every rank computes its own tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megalora_kernels import ExpertFactors, expert_mlp
from torch import Tensor

from megalora import host
from megalora.model.dispatcher import AllToAllDispatcher, LocalDispatcher
from tests.distributed.ranks import run_ranks

# All different, so that none is taken for another. INNER is divided by two ranks of ETP.
E, K, H, INNER, R = 12, 5, 6, 8, 2
TOKENS = (7, 1, 0, 11)
"""Tokens of each rank. One rank has none, one a single one."""
SCALE = 1.5


def plain(x_TH: Tensor, p_TE: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The layer in loops; an expert without a probability is not chosen."""
    y_TH = torch.zeros_like(x_TH)
    for t, e in (p_TE > 0).nonzero().tolist():
        x = x_TH[t]
        gate, up = (w["gate_up"][e] @ x).chunk(2)
        h = F.silu(gate) * up * p_TE[t, e]
        of_expert = w["down"][e] @ h + SCALE * (w["b"][e] @ (w["a"][e] @ h))
        y_TH = y_TH.index_add(0, torch.tensor([t]), of_expert[None])
    # A rank without tokens has a graph all the same.
    return y_TH + 0 * x_TH


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def whole_weights() -> dict[str, Tensor]:
    """The same on every rank; ``a`` and ``b`` are an adapter of down."""
    w = {
        "gate_up": drawn(E, 2 * INNER, H, seed=1), "down": drawn(E, H, INNER, seed=2),
        "a": drawn(E, R, INNER, seed=3), "b": drawn(E, H, R, seed=4),
    }  # fmt: skip
    return {name: t / t.shape[-1] ** 0.5 for name, t in w.items()}


def probabilities(num_tokens: int, busy: list[int], seed: int) -> Tensor:
    """``[T, E]``: K of the busy experts for each token, with probabilities that add up to 1."""
    scores = drawn(num_tokens, E, seed=seed).softmax(-1)
    idle = [e for e in range(E) if e not in busy]
    scores[:, idle] = 0
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(K).indices, 1.0)
    return scores * chosen / (scores * chosen).sum(-1, keepdim=True)


def groups(ep: int, etp: int) -> Any:
    """This rank's groups; ranks of ETP are neighbours. Every rank makes all of them."""
    found: dict[str, Any] = {}
    rank = dist.get_rank()
    for of in range(etp):
        members = list(range(of, ep * etp, etp))
        group = dist.new_group(members)
        if rank in members:
            found["ep"] = group
    for of in range(ep):
        members = list(range(etp * of, etp * (of + 1)))
        group = dist.new_group(members)
        if rank in members:
            found["expt_tp"] = group
    return SimpleNamespace(**found, tp_ep=dist.group.WORLD)


@contextmanager
def counting(group: Any) -> Iterator[list[int]]:
    """Bytes that this rank brings to each all-to-all of a group, in order."""
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(output: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is group:
            sent.append(given.numel() * given.element_size())
        return exchange(output, given, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield sent


def local(w: dict[str, Tensor], pg: Any) -> dict[str, Tensor]:
    """This rank's experts, and its part of their features."""
    experts = slice(pg.ep.rank() * E // pg.ep.size(), (pg.ep.rank() + 1) * E // pg.ep.size())
    part = INNER // pg.expt_tp.size()
    features = slice(pg.expt_tp.rank() * part, (pg.expt_tp.rank() + 1) * part)
    gate, up = w["gate_up"][experts].chunk(2, 1)
    return {
        "gate_up": torch.cat((gate[:, features], up[:, features]), 1),
        "down": w["down"][experts][..., features],
        "a": w["a"][experts][..., features], "b": w["b"][experts],
    }  # fmt: skip


def through(
    dispatcher: Any, w: dict[str, Tensor], x: Tensor, p_TE: Tensor, routing_map: Tensor
) -> Tensor:
    """Megatron's MoE layer behind the router."""
    rows, p = dispatcher.dispatch_preprocess(x[:, None], routing_map, p_TE)
    rows, routing, p = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(rows, p))
    down = ExpertFactors(w["a"], (w["b"],), (SCALE,))
    y = expert_mlp(rows, w["gate_up"], w["down"], p, routing, down=down)
    y = dispatcher.token_combine(dispatcher.combine_preprocess(y))
    return dispatcher.combine_postprocess(y)[:, 0]


def run(ep: int, etp: int, busy: list[int]) -> dict[str, Any]:
    """In each rank: what it computes, what the plain layer does, and bytes."""
    host.install()
    pg = groups(ep, etp)
    rank = dist.get_rank()
    config: Any = SimpleNamespace(moe_router_topk=K)
    if ep * etp == 1:
        dispatcher: Any = LocalDispatcher(config=config, pg_collection=pg)
    else:
        dispatcher = AllToAllDispatcher(E // ep, config=config, pg_collection=pg)
    x = drawn(TOKENS[rank], H, seed=10 + rank).requires_grad_()
    p = probabilities(TOKENS[rank], busy, seed=20 + rank).requires_grad_()
    dy = drawn(TOKENS[rank], H, seed=30 + rank)
    routing_map = p > 0
    w = local(whole_weights(), pg)
    factors = [w[name].requires_grad_() for name in ("a", "b")]
    leaves = [x, p, *factors]
    ways = []
    for _ in range(2):
        with counting(pg.ep) as sent:
            y = through(dispatcher, w, x, p, routing_map)
            gradients = torch.autograd.grad(y, leaves, dy)
        ways.append([y.detach(), *gradients])
    # The same function of this rank's own tokens; factors get gradients of all ranks' tokens.
    whole = whole_weights()
    for name in ("a", "b"):
        whole[name].requires_grad_()
    y = plain(x, p, whole)
    dx, dp, da, db = torch.autograd.grad(
        y, [x, p, whole["a"], whole["b"]], dy, materialize_grads=True
    )
    for gradient in (da, db):
        dist.all_reduce(gradient)
    wanted = local({**whole, "a": da, "b": db}, pg)
    # B is whole on every rank of ETP, and each finds the part of its features.
    db = ways[0][4].clone()
    dist.all_reduce(db, group=pg.expt_tp)
    return {
        "ours": [t.detach() for t in (*ways[0][:4], db)],
        "plain": [t.detach() for t in (y, dx, dp, wanted["a"], wanted["b"])],
        "repeats": all(torch.equal(a, b) for a, b in zip(*ways, strict=True)),
        "sent": sent, "map": routing_map,
    }  # fmt: skip


def run_all(layouts: list[tuple[int, int, list[int]]]) -> list[dict[str, Any]]:
    """One layout after the other in the same ranks: starting them takes as long as all of it."""
    return [run(*layout) for layout in layouts]


ALL = list(range(E))
# The last quarter idle: rank 3 of EP 4 receives nothing.
LAYOUTS = {
    1: [(1, 1, ALL)],
    2: [(2, 1, ALL), (1, 2, ALL)],
    4: [(4, 1, ALL), (4, 1, ALL[:9]), (2, 2, ALL[1:])],
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(ranks, number of the layout) -> what each rank found."""
    by_layout = {}
    for world, layouts in LAYOUTS.items():
        of_ranks = run_ranks(run_all, world, layouts)
        for number in range(len(layouts)):
            by_layout[world, number] = [of_rank[number] for of_rank in of_ranks]
    return by_layout


CASES: list[tuple[int, int]] = []
for world, layouts in LAYOUTS.items():
    for number in range(len(layouts)):
        CASES.append((world, number))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_a_plain_layer(case, found) -> None:
    """Output, and gradients of tokens, probabilities and both factors; the same bits twice."""
    for of_rank in found[case]:
        assert of_rank["repeats"]
        for ours, plain_one in zip(of_rank["ours"], of_rank["plain"], strict=True):
            # Sums of at most a hundred terms of order 1, in float64.
            torch.testing.assert_close(ours, plain_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_token_travels_once_to_each_rank(case, found) -> None:
    """Bytes of each exchange, forward and backward, against ranks and experts counted from the
    routing."""
    world, number = case
    ep, etp, _ = LAYOUTS[world][number]
    maps = [of_rank["map"] for of_rank in found[case]]
    # [tokens, ranks of EP]: whether the rank has an expert of the token.
    hits = [m.view(-1, ep, E // ep).any(2) for m in maps]
    for rank, of_rank in enumerate(found[case]):
        if ep == 1:
            assert of_rank["sent"] == []
            continue
        # Ranks of ETP are neighbours; all-to-alls are among ranks with the same place in ETP.
        peers = range(rank % etp, world, etp)
        rows_out = int(hits[rank].sum())
        per_rank = slice(rank // etp * E // ep, (rank // etp + 1) * E // ep)
        pairs_out = int(maps[rank].sum())
        rows_in = 0
        pairs_in = 0
        for peer in peers:
            rows_in += int(hits[peer][:, rank // etp].sum())
            pairs_in += int(maps[peer][:, per_rank].sum())
        assert pairs_out == K * TOKENS[rank] and rows_out <= pairs_out
        # float64: a row of H, a probability beside a place.
        out = (rows_out * H * 8, pairs_out * 16)
        back = (rows_in * H * 8, pairs_in * 16)
        # Tokens and pairs, then results; in backward the results' gradients, and those of both.
        forward = [*out, back[0]]
        assert of_rank["sent"][:3] == forward
        assert of_rank["sent"][3] == out[0] and sorted(of_rank["sent"][4:]) == sorted(back)
    # The layouts show what they are for: fewer rows than pairs, and a rank that gets none.
    if case == (4, 1):
        assert found[case][3]["sent"][2] == 0
    if ep > 1:
        assert torch.cat(hits).sum() < torch.cat(maps).sum()

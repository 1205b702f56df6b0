"""The parts of calibration: the clock, the computations, the groups and the order of sizes."""

import math
from collections import Counter
from itertools import chain, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalora import host
from megalora.bench import calibrate as calibration
from megalora.bench import calibrate_cases as cases
from megalora.bench import calibrate_collectives as collectives
from megalora.bench import clock
from megalora.bench.calibrate_grid import GPU, coarse_first, extremes_first, interleaved
from megalora.bench.clock import Clock
from tests.bench.made_up_clock import MadeUpClock
from tests.distributed.ranks import run_ranks


def _calls_on_uneven_ranks() -> tuple[float, int]:
    """Run in each rank: seconds of a call that is 40 times as slow on rank 1, and how often it was
    called."""
    calls = []
    clock = MadeUpClock(tick=0.0)
    pause = 4e-3 if dist.get_rank() == 1 else 1e-4

    def call() -> None:
        calls.append(None)
        clock.pass_time(pause)

    return Clock().seconds([call], collective=False), len(calls)


def test_the_slowest_rank_counts_and_all_call_as_often() -> None:
    (seconds, num_calls), other = run_ranks(_calls_on_uneven_ranks, 2)
    assert (seconds, num_calls) == other
    assert seconds == pytest.approx(4e-3)


def test_calls_go_round_cold_copies() -> None:
    # Not by __init__, which makes the buffer that empties the cache on GPUs only.
    watch = Clock.__new__(Clock)
    order = []
    watch.flush = torch.ones(5)
    watch._sample([lambda: order.append("a"), lambda: order.append("b")], 5, collective=False)
    # Five calls over two copies, after the cache was emptied: the buffer was written.
    assert order == [*"ababa"] and watch.flush.eq(0).all()
    # As many copies as push each other out of the cache, at most eight. Three of a
    # third, rounded down, are a byte too few, so it takes four.
    assert clock.copies(1, True) == 8
    assert clock.copies(clock.FLUSH_BYTES // 3, True) == 4
    assert clock.copies(clock.FLUSH_BYTES, True) == 1
    assert clock.copies(10**10, True) == 1
    # A CPU is calibrated as it is used, warm caches included.
    assert clock.copies(1, False) == 1


def _largest_that_fit(free_bytes: int) -> dict[str, int]:
    """Run in each rank: the most bytes of a case of each kind."""
    host.free_memory_bytes = lambda: free_bytes // (1 + dist.get_rank())
    largest: Counter[str] = Counter()
    for case in calibration._in_order(torch.float32, dist.get_world_size(), 2, None, print):
        largest[case.kind] = max(largest[case.kind], case.num_bytes)
    return dict(largest)


def test_sizes_that_do_not_fit_are_left_out_on_every_rank() -> None:
    """Rank 1 has half of 20 MB free, of which each of two ranks takes a half, and of that four
    fifths: 4 MB."""
    first, second = run_ranks(_largest_that_fit, 2, 20_000_000)
    assert first == second
    for kind, num_bytes in first.items():
        assert 0 < num_bytes <= 4_000_000, kind
    # Both grids go in steps of 4, and 1 MiB is the last that fits, of a collective twice: the count
    # allows for a buffer of what is received.
    assert first["memory"] == 2**20 // 12 * 12 and first["all_reduce"] == 2 * 2**20


def _exchanged() -> float:
    """Run in each rank: the number that its neighbour sent, which is that one's rank."""
    sent = torch.tensor([float(dist.get_rank())])
    received = torch.tensor([-1.0])
    collectives._exchange(sent, received, dist.group.WORLD)()  # type: ignore
    # gloo fails those that are still receiving when one leaves.
    dist.barrier()
    return received.item()


# With the rank half the group away. Of three ranks that is not mutual: they pass on in a ring.
@pytest.mark.parametrize("world, expected", [(2, [1, 0]), (3, [2, 0, 1]), (4, [2, 3, 0, 1])])
def test_neighbours_exchange(world: int, expected: list[int]) -> None:
    assert run_ranks(_exchanged, world) == expected


def _bytes_seen() -> dict[str, tuple[int, list[int]]]:
    """Run in each rank: for each collective, the size it records, and those of the tensors it
    passes."""
    seen: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> None:
        for t in args:
            if torch.is_tensor(t):
                seen.append(t.numel() * t.element_size())

    for name in (
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_reduce",
        "all_to_all_single",
    ):
        setattr(dist, name, spy)

    def spy_on_sends(ops: list[dist.P2POp]) -> list[Any]:
        spy(*[op.tensor for op in ops])
        # no request to wait for
        return []

    dist.batch_isend_irecv = spy_on_sends
    (members,) = collectives.cuts(3, 3)
    found = {}
    for (case,) in collectives.Collectives(members, torch.bfloat16).series([1000]):
        case.prepare()["seconds"]()
        found[case.kind] = (case.sizes["bytes"], seen[:])
        seen.clear()
    return found


def test_bytes_are_those_of_the_whole() -> None:
    """1,000 bytes are 166 elements for each of three ranks: 332 and 996 bytes."""
    # (size in the record, sizes of the arguments in their order: output before input)
    expected = {
        "all_gather": (996, [996, 332]),
        "reduce_scatter": (996, [332, 996]),
        "all_reduce": (996, [996]),
        "all_to_all": (996, [996, 996]),
        "send": (996, [996, 996]),
    }
    assert run_ranks(_bytes_seen, 3) == [expected] * 3


def test_groups() -> None:
    def labels(world: int, per_node: int) -> list[tuple[int, int]]:
        """(ranks, nodes) of each kind of group."""
        cuts = collectives.cuts(world, per_node)
        return [(len(members.groups[0]), members.nodes) for members in cuts]

    # Nobody to communicate with.
    assert labels(1, 1) == []
    assert labels(12, 12) == [(2, 1), (3, 1), (4, 1), (6, 1), (12, 1)]
    # On two nodes also pairs with a rank on each, as data parallelism between nodes has them.
    assert labels(16, 8) == [(2, 1), (4, 1), (8, 1), (16, 2), (2, 2)]
    assert labels(4, 1) == [(2, 2), (4, 4)]
    # Pairs of three ranks a node: (2, 3) spans both, and so the kind counts as two nodes.
    assert labels(6, 3) == [(2, 2), (3, 1), (6, 2)]
    across = collectives.cuts(8, 2)[-2:]
    # Four nodes of two ranks: node by node 0 1, 2 3, 4 5, 6 7.
    assert across[0].groups == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert across[1].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    # Groups of a kind work side by side, so each rank is in exactly one.
    for members in collectives.cuts(24, 4):
        assert sorted(chain.from_iterable(members.groups)) == list(range(24))


def test_what_is_timed_computes_what_it_says() -> None:
    def result(case: cases.Case, key: str = "seconds") -> Any:
        torch.manual_seed(0)
        return case.prepare()[key]()

    def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        """The operands that ``prepare`` draws after the same seed, in the same order."""
        torch.manual_seed(0)
        return [torch.randn(shape) for shape in shapes]

    x, w = drawn((6, 16), (8, 16))
    torch.testing.assert_close(result(cases.gemm(6, 8, 16, torch.float32)), x @ w.t())
    x, w = drawn((6, 16), (3, 8, 16))
    # Six rows, two of each of three experts.
    of_experts = [x[:2] @ w[0].t(), x[2:4] @ w[1].t(), x[4:] @ w[2].t()]
    expected = torch.cat(of_experts)
    torch.testing.assert_close(result(cases.grouped_gemm(3, 6, 8, 16, torch.float32)), expected)
    # 1,024 bytes in three tensors of float32: 85 elements each.
    a, b = drawn((85,), (85,))
    torch.testing.assert_close(result(cases.memory_pass(1024, torch.float32)), a + b)

    case = cases.attention(2, 5, 4, 2, 8, torch.float32)
    # [S, B, heads, d]: four query heads over two key/value heads
    q, k, v = drawn((5, 2, 4, 8), (5, 2, 2, 8), (5, 2, 2, 8))
    # [B, heads, S, d], each key/value head once for each of its two query heads
    query = q.permute(1, 2, 0, 3)
    key = k.repeat_interleave(2, 2).permute(1, 2, 0, 3)
    value = v.repeat_interleave(2, 2).permute(1, 2, 0, 3)
    future = ~torch.ones(5, 5).tril().bool()
    scores = (query @ key.transpose(2, 3) / math.sqrt(8)).masked_fill(future, -math.inf)
    out = (F.softmax(scores, -1) @ value).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(result(case, "forward_seconds"), out)
    torch.manual_seed(0)
    calls: dict[str, Any] = case.prepare()
    gradients = calls["backward_seconds"]()
    # A clock calls it many times: backward must not free what it needs.
    for gradient, again in zip(gradients, calls["backward_seconds"](), strict=True):
        assert torch.equal(gradient, again)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_a_coarse_grid_comes_first() -> None:
    points = coarse_first(range(9), "abc")
    assert Counter(points) == Counter(product(range(9), "abc"))
    # Corners first, then halves, then quarters: wherever time runs out, the grid is even.
    assert set(points[:4]) == {(0, "a"), (0, "c"), (8, "a"), (8, "c")}
    assert {i for i, _ in points[:9]} == {0, 4, 8}
    assert {i for i, _ in points[:15]} == {0, 2, 4, 6, 8}
    assert points == coarse_first(range(9), "abc"), "the same on every rank"
    assert extremes_first([3, 1, 2, 5, 4], lambda n: n) == [1, 5, 3, 2, 4]
    assert extremes_first([7], lambda n: n) == [7]


def test_series_of_different_lengths_advance_together() -> None:
    merged = interleaved(["a" * 100, "b" * 10, ""])
    assert len(merged) == 110
    for n in range(11, 110):
        done = Counter(merged[:n])
        # A tenth is one step of the shorter series, a hundredth one of the longer.
        assert abs(done["a"] / 100 - done["b"] / 10) <= 0.11


def test_the_gpus_grid_has_the_sizes_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.host, "device", lambda: torch.device("cuda"))
    found = cases.compute_cases(GPU, torch.bfloat16)
    sizes = []
    for series in found:
        sizes.append({tuple(case.sizes.values()) for case in series})
    dense, experts, attention, memory = sizes
    # Rows, outputs, inputs: q, k and v of Qwen3-30B-A3B, its o, and of Qwen3-235B-A22B the head
    # over 8 ranks and q over 4.
    assert {
        (4096, 5120, 2048),
        (4096, 2048, 4096),
        (256, 151936 // 8, 4096),
        (32768, 8192 // 4, 4096),
    } <= dense
    # Experts on a rank, rows of all, outputs, inputs: gate_up of the 30B with all its 128 experts
    # on one rank, its down with 16, and gate_up of the 235B over 8 ranks of ETP.
    assert {
        (128, 128 * 32, 1536, 2048),
        (16, 16 * 2048, 2048, 768),
        (4, 4 * 8192, 2 * 1536 // 8, 4096),
    } <= experts
    # Sequences, their length, query heads, key/value heads, head dim.
    assert {(1, 32768, 32, 4, 128), (8, 4096, 64, 4, 128), (1, 512, 4, 1, 128)} <= attention
    # 1 GiB, rounded down to three equal tensors.
    (largest,) = max(memory)
    assert largest > 0.99 * 2**30
    # A fifth of a GPU of 80 GB, so that no size is left out for its memory.
    for case in chain.from_iterable(found):
        assert case.num_bytes < 16 * 2**30

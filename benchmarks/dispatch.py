"""Count and time an MoE layer's exchange: a token sent once to each rank, or once to each expert.

    python -m benchmarks.dispatch [--tokens 512] [--repeats 7] [--out FILE.json]

Router sizes of Qwen3-30B-A3B (128 experts, 8 a token), choices drawn at random, 2, 4 and 8 ranks of
this machine over gloo, forward and backward of dispatch, experts (small ones) and combine, in
float32. Bytes are those that ranks bring to all-to-alls of rows and pairs, and are compared with
``ep (1 - C(E - E / ep, k) / C(E, k)) / k`` of the other way's rows. Both ways take turns; a time is
the median of the slowest rank's, and on shared cores says little.

Shape legend: T tokens of a rank   E experts   M pairs of token and expert   H hidden
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megalora_kernels import Arrivals, expert_mlp, permute, regroup_values, route_values, unpermute
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor

from benchmarks.harness import save
from megalora import host
from megalora.model.dispatcher import AllToAllDispatcher
from megalora.planner.microbatch import PAIR, ranks_per_token

E, K, H, INNER = 128, 8, 256, 96
RANKS = (2, 4, 8)
FLOAT = 4


class OncePerExpert:
    """The other way: a row for each of a token's experts, sorted by expert before it is sent."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, x: Tensor, p_TE: Tensor, chosen_TE: Tensor, weights: list[Tensor]) -> Tensor:
        R = self.group.size()
        sending, p_M = route_values(chosen_TE, p_TE, K)
        counts = chosen_TE.sum(0).view(R, -1)
        counts_RE = torch.empty_like(counts)
        dist.all_to_all_single(counts_RE, counts, group=self.group)
        sent = counts.sum(1).tolist()
        received = counts_RE.sum(1).tolist()
        rows = all_to_all(self.group, permute(x, sending), received, sent)
        p_M = all_to_all(self.group, p_M, received, sent)
        routing, p_M = regroup_values(Arrivals.single(counts_RE, sum(received)), p_M)
        y = expert_mlp(rows, *weights, p_M, routing)
        return unpermute(all_to_all(self.group, y, sent, received), sending)


class OncePerRank:
    """The product's dispatcher around the same experts."""

    def __init__(self, group: Any) -> None:
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        groups = SimpleNamespace(ep=group, expt_tp=alone, tp_ep=group)
        config: Any = SimpleNamespace(moe_router_topk=K)
        self.dispatcher = AllToAllDispatcher(E // group.size(), config=config, pg_collection=groups)

    def __call__(self, x: Tensor, p_TE: Tensor, chosen_TE: Tensor, weights: list[Tensor]) -> Tensor:
        d = self.dispatcher
        rows, routing, p_M = d.dispatch_postprocess(
            *d.token_dispatch(*d.dispatch_preprocess(x, chosen_TE, p_TE))
        )
        y = expert_mlp(rows, *weights, p_M, routing)
        return d.combine_postprocess(d.token_combine(d.combine_preprocess(y)))


ARMS = {"once per expert": OncePerExpert, "once per rank": OncePerRank}


def one_rank(rank: int, ranks: int, folder: str, tokens: int, repeats: int) -> None:
    """Run both ways in turns; rank 0 writes what all found."""
    torch.set_num_threads(1)
    host.install()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    arms = {name: arm(dist.group.WORLD) for name, arm in ARMS.items()}
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, H, generator=generator).requires_grad_()
    scores = torch.rand(tokens, E, generator=generator)
    chosen = torch.zeros(tokens, E, dtype=torch.bool).scatter(1, scores.topk(K).indices, True)
    p = (scores * chosen / (scores * chosen).sum(1, keepdim=True)).requires_grad_()
    local = slice(rank * E // ranks, (rank + 1) * E // ranks)
    weights = [torch.randn(E, 2 * INNER, H) / 16, torch.randn(E, H, INNER) / 10]
    # The same weights on every rank, of which it has its part.
    for weight in weights:
        dist.broadcast(weight, 0)
    weights = [weight[local].contiguous() for weight in weights]
    dy = torch.randn(tokens, H, generator=generator)
    found: dict[str, Any] = {name: {"seconds": [], "bytes": 0} for name in arms}
    results = {}
    for _ in range(repeats):
        for name, arm in arms.items():
            dist.barrier()
            with counted_bytes() as sent:
                start = time.perf_counter()
                y = arm(x, p, chosen, weights)
                dx, dp = torch.autograd.grad(y, [x, p], dy)
                found[name]["seconds"].append(time.perf_counter() - start)
            found[name]["bytes"] = sum(sent)
            results[name] = (y.detach(), dx, dp)
    # No speed of a way that computes something else.
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, found)
    if rank == 0:
        torch.save(everywhere, f"{folder}/found.pt")
    dist.destroy_process_group()


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes of floating-point tensors that this rank brings to all-to-alls meanwhile."""
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(output: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        if given.is_floating_point():
            sent.append(given.numel() * given.element_size())
        return exchange(output, given, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield sent


def measure(ranks: int, tokens: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            one_rank, (ranks, folder, tokens, repeats), nprocs=ranks, start_method="fork"
        )
        everywhere = torch.load(f"{folder}/found.pt")
    row: dict[str, Any] = {"ep": ranks, "tokens": tokens}
    for name in ARMS:
        num_bytes = 0
        seconds: list[list[float]] = []
        for found in everywhere:
            num_bytes += found[name]["bytes"]
            seconds.append(found[name]["seconds"])
        # Ranks wait for each other: a pass takes as long as on the slowest.
        slowest = list(map(max, zip(*seconds, strict=True)))
        row[name] = {
            "bytes": num_bytes,
            # The first pass allocates.
            "milliseconds": 1e3 * statistics.median(slowest[1:]),
        }
    pairs = ranks * tokens * K
    spread = ranks_per_token(E, K, ranks)
    # Rows go out and back, forward and backward; beside them a probability (and a place) each way.
    row["once per expert"]["formula"] = pairs * (4 * H * FLOAT + 2 * FLOAT)
    row["once per rank"]["formula"] = pairs * (4 * H * FLOAT * spread / K + 2 * PAIR)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a rank")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dispatch.json"))
    options = parser.parse_args()
    rows = [measure(ranks, options.tokens, options.repeats) for ranks in RANKS]
    print("ep  way              bytes     formula   of once per expert      ms")
    for row in rows:
        for name in ARMS:
            way = row[name]
            share = way["bytes"] / row["once per expert"]["bytes"]
            print(
                f"{row['ep']:2}  {name:15} {way['bytes'] / 1e6:7.2f} MB {way['formula'] / 1e6:7.2f}"
                f" MB {share:10.1%} {way['milliseconds']:14.1f}"
            )
    save("dispatch", rows, options.out)


if __name__ == "__main__":
    main()

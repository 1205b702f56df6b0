"""The collectives that calibration times, in groups of every size that a layout may have.

All groups of one size are at work at the same time, as in training, where they share the links.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from megalora import host
from megalora.bench.calibrate_cases import Case
from megalora.bench.calibrate_grid import coarse_first
from megalora.bench.clock import Call

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")


@dataclass(frozen=True)
class Members:
    """The world cut into groups of one size."""

    groups: tuple[tuple[int, ...], ...]
    """Ranks of each; together every rank once."""
    nodes: int
    """That a group spans; the most, where they differ."""


def cuts(world: int, ranks_per_node: int) -> list[Members]:
    """Contiguous groups of every size that divides the world, then groups with one rank of each of
    several nodes.

    Ranks are numbered node by node, as torchrun numbers them. No two have the same size and number
    of nodes: a record could not tell them apart.
    """
    ways = [
        tuple(tuple(range(i, i + size)) for i in range(0, world, size))
        for size in range(2, world + 1)
        if world % size == 0
    ]
    num_nodes = world // ranks_per_node
    for size in range(2, num_nodes + 1):
        if num_nodes % size == 0:
            block = size * ranks_per_node
            starts = [start + i for start in range(0, world, block) for i in range(ranks_per_node)]
            ways.append(tuple(tuple(range(i, i + block, ranks_per_node)) for i in starts))
    found: dict[tuple[int, int], Members] = {}
    for groups in ways:
        nodes = max(len({rank // ranks_per_node for rank in group}) for group in groups)
        found.setdefault((len(groups[0]), nodes), Members(groups, nodes))
    return list(found.values())


def make_group(members: Members) -> dist.ProcessGroup:
    """This rank's. All ranks must call it in the same order; the groups end with the world."""
    if len(members.groups) == 1:
        return cast(dist.ProcessGroup, dist.group.WORLD)
    timeout = timedelta(minutes=host.timeout_minutes())
    mine, _ = dist.new_subgroups_by_enumeration([list(g) for g in members.groups], timeout=timeout)
    return cast(dist.ProcessGroup, mine)


def collective_cases(
    members: Members, num_bytes: Sequence[int], dtype: torch.dtype
) -> list[list[Case]]:
    """Every collective in these groups at these sizes, a coarse grid first."""
    group = make_group(members)
    ranks = len(members.groups[0])

    def case(name: str, wanted_bytes: int) -> Case:
        part = max(1, wanted_bytes // (ranks * dtype.itemsize))
        sizes = {"ranks": ranks, "nodes": members.nodes, "bytes": part * ranks * dtype.itemsize}
        held = 2 * sizes["bytes"]
        return Case(
            name, sizes, held, lambda: {"seconds": _call(name, part, group, dtype)}, collective=True
        )

    return [[case(name, n) for (n,) in coarse_first(num_bytes)] for name in COLLECTIVES]


def _call(name: str, part: int, group: dist.ProcessGroup, dtype: torch.dtype) -> Call:
    """``part``: elements of one rank's share. Zeros, because sums of anything else would run off to
    infinity."""
    share, whole = (
        torch.zeros(n, dtype=dtype, device=host.device()) for n in (part, part * group.size())
    )
    if name == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, share, group=group)
    if name == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(share, whole, group=group)
    if name == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    received = torch.empty_like(whole)
    if name == "all_to_all":
        return lambda: dist.all_to_all_single(received, whole, group=group)
    return _exchange(whole, received, group)


def _exchange(sent: torch.Tensor, received: torch.Tensor, group: dist.ProcessGroup) -> Call:
    """Each rank with the one half the group away, which is on another node wherever the group spans
    several.

    In a group of odd size, each sends to one and receives from another.
    """
    size = group.size()
    me = group.rank()
    to, source = (
        dist.get_global_rank(group, (me + step) % size) for step in (size // 2, -(size // 2))
    )

    def call() -> None:
        both = [
            dist.P2POp(dist.isend, sent, to, group=group),
            dist.P2POp(dist.irecv, received, source, group=group),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return call

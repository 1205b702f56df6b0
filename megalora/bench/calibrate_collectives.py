"""Make the collectives that calibration times, in groups of every size that a layout may have.

All groups of one size work at the same time, as in training, where they share the links.
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
    """Ranks of each group; together they hold every rank once."""
    nodes: int
    """Number of nodes that a group spans; the most, where groups differ."""


type _Groups = tuple[tuple[int, ...], ...]


def cuts(world: int, ranks_per_node: int) -> list[Members]:
    """Contiguous groups of every size that divides the world, then groups with one rank of each of
    several nodes.

    Ranks are numbered node by node, as torchrun numbers them. No two have the same size and number
    of nodes: a record could not tell them apart.
    """
    ways: list[_Groups] = []
    for size in range(2, world + 1):
        if world % size == 0:
            ways.append(_neighbours(world, size))
    num_nodes = world // ranks_per_node
    for size in range(2, num_nodes + 1):
        if num_nodes % size == 0:
            ways.append(_across_nodes(world, size, ranks_per_node))
    found: dict[tuple[int, int], Members] = {}
    for groups in ways:
        nodes = max(_num_nodes(group, ranks_per_node) for group in groups)
        # The first way to make groups of this size over so many nodes stays.
        found.setdefault((len(groups[0]), nodes), Members(groups, nodes))
    return list(found.values())


def _neighbours(world: int, size: int) -> _Groups:
    """Groups of ranks in a row: of size 2 in a world of 4, (0, 1) and (2, 3)."""
    groups: list[tuple[int, ...]] = []
    for start in range(0, world, size):
        groups.append(tuple(range(start, start + size)))
    return tuple(groups)


def _across_nodes(world: int, size: int, ranks_per_node: int) -> _Groups:
    """Groups with one rank of each of ``size`` nodes, as data parallelism makes them.

    Of size 2 in a world of two nodes with two ranks each, (0, 2) and (1, 3).
    """
    groups: list[tuple[int, ...]] = []
    block = size * ranks_per_node
    for start in range(0, world, block):
        for local_rank in range(ranks_per_node):
            first = start + local_rank
            groups.append(tuple(range(first, first + block, ranks_per_node)))
    return tuple(groups)


def _num_nodes(group: tuple[int, ...], ranks_per_node: int) -> int:
    return len({rank // ranks_per_node for rank in group})


def make_group(members: Members) -> dist.ProcessGroup:
    """This rank's group. All ranks must call it in the same order; groups end with the world."""
    # The world's own group is there already; each more would take memory and connections.
    if len(members.groups) == 1:
        return cast(dist.ProcessGroup, dist.group.WORLD)
    timeout = timedelta(minutes=host.timeout_minutes())
    mine, _ = dist.new_subgroups_by_enumeration([list(g) for g in members.groups], timeout=timeout)
    return cast(dist.ProcessGroup, mine)


class Collectives:
    """Makes collectives in groups of one size. All ranks must make it in the same order."""

    def __init__(self, members: Members, dtype: torch.dtype) -> None:
        self.ranks = len(members.groups[0])
        self.nodes = members.nodes
        self.dtype = dtype
        self.group = make_group(members)

    def case(self, name: str, wanted_bytes: int) -> Case:
        """One size of one collective."""
        # Every rank has an equal share of at least one element, so sizes are rounded down to that.
        part = max(1, wanted_bytes // (self.ranks * self.dtype.itemsize))
        whole_bytes = part * self.ranks * self.dtype.itemsize
        sizes = {"ranks": self.ranks, "nodes": self.nodes, "bytes": whole_bytes}

        def prepare() -> dict[str, Call]:
            return {"seconds": _call(name, part, self.group, self.dtype)}

        # An all-to-all holds what it sends and what it receives.
        return Case(name, sizes, 2 * whole_bytes, prepare, collective=True)

    def series(self, num_bytes: Sequence[int]) -> list[list[Case]]:
        """Every collective at these sizes, a coarse grid first."""
        series = []
        for name in COLLECTIVES:
            cases = []
            for (size,) in coarse_first(num_bytes):
                cases.append(self.case(name, size))
            series.append(cases)
        return series


def _call(name: str, part: int, group: dist.ProcessGroup, dtype: torch.dtype) -> Call:
    """A collective on buffers of its own.

    Args:
        part: elements of one rank's share.
    """
    # Zeros, because a sum of anything else, summed again and again, would run off to infinity.
    share = torch.zeros(part, dtype=dtype, device=host.device())
    whole = torch.zeros(part * group.size(), dtype=dtype, device=host.device())
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
    """Exchange with the rank half the group away, which is on another node wherever the group spans
    several.

    In a group of odd size, each sends to one and receives from another.
    """
    size = group.size()
    me = group.rank()
    half = size // 2
    # Point-to-point operations take ranks of the world, also with a group.
    to = dist.get_global_rank(group, (me + half) % size)
    source = dist.get_global_rank(group, (me - half) % size)

    def call() -> None:
        # As one batch: two ranks that both send first would wait for each other.
        both = [
            dist.P2POp(dist.isend, sent, to, group=group),
            dist.P2POp(dist.irecv, received, source, group=group),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return call

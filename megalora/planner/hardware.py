"""Estimate how fast a machine does what a training step asks of it, and say how that is known.

measured       by ``megalora bench --calibrate`` on the machine, at these very sizes
interpolated   between sizes measured there
extrapolated   beyond the sizes measured there
assumed        from the tables of ``known_gpus.py``: not measured on this machine
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

Basis = Literal["measured", "interpolated", "extrapolated", "assumed"]
BASES: tuple[Basis, ...] = ("measured", "interpolated", "extrapolated", "assumed")
"""From the best known to the least."""


def weakest(bases: Sequence[Basis]) -> Basis:
    """How a number made of several is known: as the least known of them is."""
    worst: Basis = "measured"
    for basis in bases:
        if BASES.index(basis) > BASES.index(worst):
            worst = basis
    return worst


class Estimate(NamedTuple):
    """A rate or a number of seconds, and how it is known."""

    value: float
    basis: Basis


class Rate(Protocol):
    def at(self, *sizes: float) -> Estimate:
        """FLOP/s or bytes/s at these sizes."""
        ...


@dataclass(frozen=True)
class Roofline:
    """FLOP/s of a bfloat16 GEMM of sizes ([groups,] rows, outputs, inputs) that takes the longer of
    its arithmetic and its traffic. Assumed."""

    flops_per_s: float
    bytes_per_s: float

    def at(self, *sizes: float) -> Estimate:
        rows, outputs, inputs = sizes[-3:]
        groups = sizes[0] if len(sizes) > 3 else 1
        flops = 2 * rows * outputs * inputs
        # 2 bytes an element: every row is read and written, every group's weight read once.
        moved = 2 * (rows * (outputs + inputs) + groups * outputs * inputs)
        seconds = max(flops / self.flops_per_s, moved / self.bytes_per_s)
        return Estimate(flops / seconds, "assumed")


@dataclass(frozen=True)
class Constant:
    """A rate that is the same at every size. Assumed."""

    value: float

    def at(self, *sizes: float) -> Estimate:
        return Estimate(self.value, "assumed")


NEIGHBOURS = 4
"""How many measured points an interpolation looks at."""


@dataclass(frozen=True)
class Table:
    """Rates measured at some sizes; between them a mean of the nearest in logarithms, weighted by
    the inverse squared distance."""

    points: tuple[tuple[tuple[float, ...], float], ...]
    found: dict[tuple[float, ...], Estimate] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Answers given before: layouts ask for the same sizes again and again."""

    def at(self, *sizes: float) -> Estimate:
        if sizes not in self.found:
            self.found[sizes] = self._interpolated(sizes)
        return self.found[sizes]

    def _interpolated(self, sizes: tuple[float, ...]) -> Estimate:
        where = _logs(sizes)
        near = sorted((math.dist(where, _logs(point)), rate) for point, rate in self.points)
        distance, rate = near[0]
        # Zero but for rounding: these very sizes were measured.
        if distance < 1e-9:
            return Estimate(rate, "measured")
        # Shepard's method: weights fall with the square of the distance.
        total = 0.0
        weighted = 0.0
        for distance, rate in near[:NEIGHBOURS]:
            weight = 1 / distance**2
            total += weight
            weighted += weight * math.log(rate)
        mean = weighted / total
        inside = self._covers(sizes)
        return Estimate(math.exp(mean), "interpolated" if inside else "extrapolated")

    def _covers(self, sizes: tuple[float, ...]) -> bool:
        """Whether every size lies between the smallest and the largest measured."""
        for axis, size in enumerate(sizes):
            measured = [point[axis] for point, _ in self.points]
            if not min(measured) <= size <= max(measured):
                return False
        return True


def _logs(sizes: Sequence[float]) -> list[float]:
    return [math.log(max(size, 1)) for size in sizes]


Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")


class Network(Protocol):
    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        """One collective of a group of ``ranks`` that spans ``nodes``.

        ``num_bytes``: all_gather, of its output; reduce_scatter, of its input; all_reduce, of the
        buffer; all_to_all, what one rank sends in all, its own part included; send, of the message.
        """
        ...


@dataclass(frozen=True)
class Links:
    """Bandwidth and latency of one GPU's links, inside a node and out of it. Assumed.

    Rings cross each node's border once, through the adapters of all GPUs that the group has there.
    In an all-to-all each GPU sends through its own adapter what is for other nodes.
    """

    inside_bytes_per_s: float
    outside_bytes_per_s: float
    inside_latency_s: float = 20e-6
    outside_latency_s: float = 40e-6

    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        if ranks == 1:
            return Estimate(0.0, "measured")
        latency = self._latency(kind, ranks, nodes)
        per_node = ranks / nodes
        if kind == "send":
            rate = self.inside_bytes_per_s if nodes == 1 else self.outside_bytes_per_s
            moving = num_bytes / rate
        elif kind == "all_to_all":
            # Both ways at once: what stays in the node, and what leaves it by the GPU's adapter.
            inside = num_bytes * (per_node - 1) / ranks / self.inside_bytes_per_s
            outside = num_bytes * (ranks - per_node) / ranks / self.outside_bytes_per_s
            moving = max(inside, outside)
        else:
            rate = self.inside_bytes_per_s
            if nodes > 1:
                rate = min(rate, self.outside_bytes_per_s * per_node)
            # A ring moves (n - 1) / n of the buffer; an all-reduce scatters, then gathers.
            rings = 2 if kind == "all_reduce" else 1
            moving = num_bytes * (ranks - 1) / ranks / rate * rings
        return Estimate(latency + moving, "assumed")

    def _latency(self, kind: Kind, ranks: int, nodes: int) -> float:
        """Seconds before the first byte: more for larger groups. Three times for a message between
        pipeline stages, whose receiver waits for it."""
        latency = self.inside_latency_s if nodes == 1 else self.outside_latency_s
        if kind == "send":
            return 3 * latency
        return latency * max(1.0, math.log2(ranks) / 2)


@dataclass(frozen=True)
class MeasuredNetwork:
    """Seconds as measured by kind, group and size: linear between sizes.

    A group of a size nobody measured is scaled from the nearest with as many ranks in each node, by
    what it moves: ``(n - 1) / n`` in a ring, in an all-to-all over nodes what leaves the node.
    Where none is like it, ``beyond`` answers.
    """

    points: Mapping[str, Mapping[tuple[int, int], Sequence[tuple[float, float]]]]
    """Kind -> (ranks, nodes) -> (bytes, seconds), ascending."""
    beyond: Network | None

    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        if ranks == 1:
            return Estimate(0.0, "measured")
        measured = self.points.get(kind, {})
        alike = [group for group in measured if _alike(group, (ranks, nodes))]
        if not alike:
            if self.beyond is None:
                raise ValueError(
                    f"the calibration has no {kind} like that of {ranks} ranks over {nodes}"
                    " node(s); calibrate with more ranks"
                )
            return self.beyond.seconds(kind, ranks, nodes, num_bytes)
        near = min(alike, key=lambda group: abs(math.log(group[0] / ranks)))
        found = _line(measured[near], num_bytes)
        if near == (ranks, nodes) or kind == "send":
            return found
        # Of a buffer, (n - stay) / n moves: all but a rank's own part in a ring, all but its node's
        # part in an all-to-all over nodes, where links between nodes are what takes time.
        stay = ranks / nodes if kind == "all_to_all" and nodes > 1 else 1
        near_ranks, _ = near
        scale = ((ranks - stay) / ranks) / ((near_ranks - stay) / near_ranks)
        sizes = [size for size, _ in alike]
        between = min(sizes) < ranks < max(sizes)
        return Estimate(found.value * scale, "interpolated" if between else "extrapolated")


def _alike(group: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two groups (ranks, nodes) share links alike: both inside a node, or both over several
    with as many ranks in each."""
    ranks, nodes = group
    other_ranks, other_nodes = other
    if nodes == 1 or other_nodes == 1:
        return nodes == other_nodes
    # ranks / nodes == other_ranks / other_nodes without division
    return ranks * other_nodes == other_ranks * nodes


def _line(points: Sequence[tuple[float, float]], x: float) -> Estimate:
    """Seconds of x bytes on the line through its neighbours; beyond the ends on that of the nearest
    two, never below the smallest measured."""
    for size, seconds in points:
        if size == x:
            return Estimate(seconds, "measured")
    smallest, at_smallest = points[0]
    if len(points) == 1:
        # One point: a latency for what is smaller, a rate for what is larger.
        return Estimate(at_smallest * max(1.0, x / smallest), "extrapolated")
    largest, _ = points[-1]
    # The first point beyond x, or the last one; never the first, which has none before it.
    after = 1
    while after < len(points) - 1 and points[after][0] <= x:
        after += 1
    x0, y0 = points[after - 1]
    x1, y1 = points[after]
    y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    least = min(seconds for _, seconds in points)
    inside = smallest < x < largest
    return Estimate(max(y, least), "interpolated" if inside else "extrapolated")


@dataclass(frozen=True)
class Overhead:
    """Seconds that the host needs to start operations."""

    layer_forward_s: float
    layer_backward_s: float
    step_s: float
    """Once per step: clipping, the optimizer's launches, reading the loss."""
    hidden: bool
    """Whether the host's time counts only as far as it exceeds the device's work: True on a GPU; on
    a CPU both take turns."""
    basis: Basis
    exposed: float = 1.0
    """Share of the host's time behind a wait that the device does not hide."""


# Compared by identity: results are looked up by the machine that they hold for.
@dataclass(frozen=True, eq=False)
class Machine:
    """Rates of one rank's device, and of what connects it to others."""

    name: str
    memory_bytes: int
    ranks_per_node: int
    gemm: Rate
    """(rows, outputs, inputs) -> FLOP/s."""
    grouped_gemm: Rate
    """(experts, rows of all of them, outputs, inputs) -> FLOP/s."""
    attention: Rate
    """(sequences, sequence, heads, key/value heads, head width) -> FLOP/s of causal attention
    forward."""
    attention_backward: Rate
    """The same FLOPs, those of forward, per second of backward."""
    memory: Rate
    """(bytes read and written) -> bytes/s of an element-wise pass."""
    network: Network
    overhead: Overhead
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype that the rates were taken with."""
    note: str = ""
    """Where the numbers come from, for the user."""

    @property
    def is_cpu(self) -> bool:
        """Whether its ranks compute on the CPU: a calibration is named after what it measured."""
        return "cpu" in self.name.lower()

    def nodes_of(self, ranks: int, stride: int) -> int:
        """How many nodes a group spans whose ``ranks`` members are ``stride`` ranks apart."""
        # Members in one node: every stride-th of its ranks, at least this one.
        inside = max(1, min(ranks, self.ranks_per_node // stride))
        return math.ceil(ranks / inside)

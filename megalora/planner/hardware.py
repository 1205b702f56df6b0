"""How fast a machine does what a training step asks of it, and how that is known.

measured       by ``megalora bench --calibrate`` on the machine, at these very sizes
interpolated   between sizes measured there
assumed        beyond them, or from the tables of ``gpus.py``: not measured on this machine
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

Basis = Literal["measured", "interpolated", "assumed"]
BASES: tuple[Basis, ...] = ("measured", "interpolated", "assumed")
"""From the best known to the least."""


def weakest(bases: Sequence[Basis]) -> Basis:
    """What may be said of a number made of several."""
    return BASES[max((BASES.index(basis) for basis in bases), default=0)]


class Estimate(NamedTuple):
    value: float
    basis: Basis


class Rate(Protocol):
    def at(self, *sizes: float) -> Estimate:
        """FLOP/s or bytes/s at these sizes."""
        ...


@dataclass(frozen=True)
class Roofline:
    """A GEMM of known sizes (..., rows, outputs, inputs) in bfloat16: the longer of its arithmetic
    and its traffic. Assumed."""

    flops_per_s: float
    bytes_per_s: float

    def at(self, *sizes: float) -> Estimate:
        rows, outputs, inputs = sizes[-3:]
        groups = sizes[0] if len(sizes) > 3 else 1
        flops = 2 * rows * outputs * inputs
        moved = 2 * (rows * (outputs + inputs) + groups * outputs * inputs)
        return Estimate(flops / max(flops / self.flops_per_s, moved / self.bytes_per_s), "assumed")


@dataclass(frozen=True)
class Constant:
    """The same at every size. Assumed."""

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
        where = [math.log(max(size, 1)) for size in sizes]
        near = sorted((_distance(where, point), rate) for point, rate in self.points)
        if near[0][0] < 1e-9:
            return Estimate(near[0][1], "measured")
        axes = list(zip(*(point for point, _ in self.points), strict=True))
        inside = all(min(axis) <= size <= max(axis) for axis, size in zip(axes, sizes, strict=True))
        weights = [(1 / distance**2, rate) for distance, rate in near[:NEIGHBOURS]]
        mean = sum(w * math.log(rate) for w, rate in weights) / sum(w for w, _ in weights)
        return Estimate(math.exp(mean), "interpolated" if inside else "assumed")


def _distance(where: Sequence[float], point: Sequence[float]) -> float:
    return math.dist(where, [math.log(max(size, 1)) for size in point])


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
        latency = self.inside_latency_s if nodes == 1 else self.outside_latency_s
        # a stage waits for what it gets
        latency *= 3 if kind == "send" else max(1.0, math.log2(ranks) / 2)
        per_node = ranks / nodes
        if kind == "send":
            moving = num_bytes / (
                self.inside_bytes_per_s if nodes == 1 else self.outside_bytes_per_s
            )
        elif kind == "all_to_all":
            inside = num_bytes * (per_node - 1) / ranks / self.inside_bytes_per_s
            moving = max(inside, num_bytes * (ranks - per_node) / ranks / self.outside_bytes_per_s)
        else:
            outside = min(self.inside_bytes_per_s, self.outside_bytes_per_s * per_node)
            rate = self.inside_bytes_per_s if nodes == 1 else outside
            moving = num_bytes * (ranks - 1) / ranks / rate * (2 if kind == "all_reduce" else 1)
        return Estimate(latency + moving, "assumed")


@dataclass(frozen=True)
class MeasuredNetwork:
    """Seconds measured by kind, group and size: linear between sizes.

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
        groups = {
            g: sizes for g, sizes in self.points.get(kind, {}).items() if _alike(g, (ranks, nodes))
        }
        if not groups:
            if self.beyond is None:
                raise ValueError(
                    f"the calibration has no {kind} like that of {ranks} ranks over {nodes}"
                    " node(s); calibrate with more ranks"
                )
            return self.beyond.seconds(kind, ranks, nodes, num_bytes)
        near = min(groups, key=lambda g: abs(math.log(g[0] / ranks)))
        found = _line(groups[near], num_bytes)
        if near == (ranks, nodes) or kind == "send":
            return found
        stay = ranks / nodes if kind == "all_to_all" and nodes > 1 else 1
        scale = ((ranks - stay) / ranks) / ((near[0] - stay) / near[0])
        between = min(g[0] for g in groups) < ranks < max(g[0] for g in groups)
        return Estimate(found.value * scale, "interpolated" if between else "assumed")


def _alike(group: tuple[int, int], other: tuple[int, int]) -> bool:
    """Both inside a node, or both over several with as many ranks in each: then they share links
    alike."""
    if group[1] == 1 or other[1] == 1:
        return group[1] == other[1]
    return group[0] * other[1] == other[0] * group[1]


def _line(points: Sequence[tuple[float, float]], x: float) -> Estimate:
    """Through the neighbours of x; beyond the ends the nearest two go on, never below the smallest
    measured."""
    for size, seconds in points:
        if size == x:
            return Estimate(seconds, "measured")
    if len(points) == 1:
        return Estimate(points[0][1] * max(1.0, x / points[0][0]), "assumed")
    after = next((i for i, (size, _) in enumerate(points) if size > x), len(points) - 1)
    x0, y0 = points[max(after - 1, 0)]
    x1, y1 = points[max(after, 1)]
    y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    inside = points[0][0] < x < points[-1][0]
    return Estimate(max(y, min(s for _, s in points)), "interpolated" if inside else "assumed")


@dataclass(frozen=True)
class Overhead:
    """What the host needs to start a layer's operations."""

    layer_forward_s: float
    layer_backward_s: float
    step_s: float
    """Once per step: clipping, the optimizer's launches, reading the loss."""
    hidden: bool
    """True on a GPU, where it counts only as far as it exceeds the device's work; on a CPU both
    take turns."""
    basis: Basis


@dataclass(frozen=True)
class Machine:
    """One rank's device, and what connects it to others."""

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
    """Of what its rates were taken with."""
    note: str = ""
    """Where its numbers come from."""

    def nodes_of(self, ranks: int, stride: int) -> int:
        """How many nodes a group spans whose ``ranks`` members are ``stride`` ranks apart."""
        inside = max(1, min(ranks, self.ranks_per_node // stride))
        return math.ceil(ranks / inside)

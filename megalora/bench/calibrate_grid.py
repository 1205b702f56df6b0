"""Which sizes calibration measures, and in which order: a coarse grid first, then finer ones,
because time may run out."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

KIB = 2**10
MIB = 2**20


@dataclass(frozen=True)
class Grid:
    """Values along each axis, ascending. Features are (outputs, inputs) of ``y = x Wᵀ``."""

    gemm_rows: tuple[int, ...]
    gemm_features: tuple[tuple[int, int], ...]
    experts: tuple[int, ...]
    rows_per_expert: tuple[int, ...]
    expert_features: tuple[tuple[int, int], ...]
    most_expert_rows: int
    """Of all experts together."""
    sequences: tuple[int, ...]
    sequence: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    """(query heads, key/value heads) on a rank."""
    head_dim: tuple[int, ...]
    most_tokens: int
    """Of all sequences together, in attention."""
    memory_bytes: tuple[int, ...]
    collective_bytes: tuple[int, ...]


def _powers(first: int, last: int, step: int = 2) -> tuple[int, ...]:
    """first, first * step, ... up to last, which is always in."""
    values = itertools.takewhile(
        lambda value: value < last, (first * step**i for i in itertools.count())
    )
    return (*values, last)


def _both_ways(pairs: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Forward, and the gradient of the inputs, which has inputs and outputs the other way round."""
    return tuple(
        sorted(pairs | {(n, m) for m, n in pairs}, key=lambda pair: (pair[0] * pair[1], pair))
    )


def _qwen3_dense() -> set[tuple[int, int]]:
    """Linears of Qwen3-30B-A3B and Qwen3-235B-A22B, whole and cut by tensor parallelism, and the
    A's of an adapter of rank 32."""
    found: set[tuple[int, int]] = set()
    for hidden, query in ((2048, 4096), (4096, 8192)):
        for tp in (1, 2, 4, 8):
            found |= {
                ((query + 2 * 512) // tp, hidden),
                (hidden, query // tp),
                (151936 // tp, hidden),
            }
        found |= {(32, hidden), (32, query)}
    return found


def _qwen3_experts() -> set[tuple[int, int]]:
    """gate_up and down of their experts, whole and cut by expert tensor parallelism."""
    return {
        pair
        for hidden, inner in ((2048, 768), (4096, 1536))
        for etp in (1, 2, 4, 8)
        for pair in ((2 * inner // etp, hidden), (hidden, inner // etp))
    }


GPU = Grid(
    gemm_rows=_powers(256, 32768),
    gemm_features=_both_ways(_qwen3_dense()),
    experts=_powers(4, 128),
    rows_per_expert=_powers(32, 8192),
    expert_features=_both_ways(_qwen3_experts()),
    most_expert_rows=32768 * 8,
    sequences=(1, 2, 4, 8),
    sequence=_powers(512, 32768),
    heads=((4, 1), (8, 1), (16, 1), (16, 2), (32, 2), (32, 4), (64, 4)),
    head_dim=(128,),
    most_tokens=32768,
    memory_bytes=_powers(MIB, 1024 * MIB),
    collective_bytes=_powers(4 * KIB, 256 * MIB, 4),
)

CPU = Grid(
    gemm_rows=(32, 128, 512, 2048),
    gemm_features=_both_ways({(n, k) for n in (32, 128, 384, 1024) for k in (32, 128, 384, 1024)}),
    experts=(2, 4, 8),
    rows_per_expert=(4, 16, 64, 256),
    expert_features=_both_ways({(64, 32), (192, 64), (512, 256)}),
    most_expert_rows=2048,
    sequences=(1, 4),
    sequence=(32, 64, 128, 256),
    heads=((1, 1), (4, 2), (8, 2)),
    head_dim=(16, 64),
    most_tokens=1024,
    memory_bytes=_powers(64 * KIB, 64 * MIB, 4),
    collective_bytes=_powers(KIB, 4 * MIB, 4),
)


def coarse_first(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every combination of the axes' values: first of their ends, then of these and the middles,
    then of the quarters.

    Within such a step the order is arbitrary but always the same, so that wherever time runs out no
    axis was preferred.
    """
    points = list(itertools.product(*(zip(_steps(len(axis)), axis, strict=True) for axis in axes)))
    random.Random(0).shuffle(points)
    points.sort(key=lambda point: max(step for step, _ in point))
    return [tuple(value for _, value in point) for point in points]


def _steps(n: int) -> list[int]:
    """For each of n values in order, at which halving it comes in."""
    steps = [0] * n
    spans = [(0, n - 1)]
    step = 0
    while spans := [(a, b) for a, b in spans if b - a > 1]:
        step += 1
        for a, b in spans:
            steps[(a + b) // 2] = step
        spans = [half for a, b in spans for half in ((a, (a + b) // 2), ((a + b) // 2, b))]
    return steps


def extremes_first[T](items: Sequence[T], size: Callable[[T], int]) -> list[T]:
    """The smallest, the largest, then the others as they were: two points span a series even where
    no more are taken."""
    if len(items) < 2:
        return list(items)
    low = min(items, key=size)
    high = max(reversed(items), key=size)
    return [low, high, *(item for item in items if item is not low and item is not high)]


def interleaved[T](series: Sequence[Sequence[T]]) -> list[T]:
    """All items in one list, in which every series is through the same share of its own at any
    point."""
    placed = [
        ((i + 0.5) / len(items), k, item)
        for k, items in enumerate(series)
        for i, item in enumerate(items)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]

"""Choose the sizes that calibration measures, and their order.

A coarse grid comes first, then finer ones, because time may run out.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

KIB = 2**10
MIB = 2**20


@dataclass(frozen=True)
class Grid:
    """Ascending values along each axis. Features are (outputs, inputs) of ``y = x Wᵀ``."""

    gemm_rows: tuple[int, ...]
    gemm_features: tuple[tuple[int, int], ...]
    experts: tuple[int, ...]
    rows_per_expert: tuple[int, ...]
    expert_features: tuple[tuple[int, int], ...]
    most_expert_rows: int
    """Largest number of rows of all experts together."""
    sequences: tuple[int, ...]
    sequence: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    """(query heads, key/value heads) on a rank."""
    head_dim: tuple[int, ...]
    most_tokens: int
    """Largest number of tokens of all sequences together, in attention."""
    memory_bytes: tuple[int, ...]
    collective_bytes: tuple[int, ...]


def _powers(first: int, last: int, step: int = 2) -> tuple[int, ...]:
    """first, first * step, ... up to last, which is always included."""
    values = []
    value = first
    while value < last:
        values.append(value)
        value *= step
    return (*values, last)


def _both_ways(pairs: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Features of the forward products and of the gradients of their inputs.

    ``dx = dy W`` has the inputs and outputs of ``y = x Wᵀ`` exchanged.
    """
    exchanged = {(inputs, outputs) for outputs, inputs in pairs}

    def elements(pair: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        # The pair itself decides between weights with equally many elements.
        return pair[0] * pair[1], pair

    return tuple(sorted(pairs | exchanged, key=elements))


def _qwen3_dense() -> set[tuple[int, int]]:
    """Linears of Qwen3-30B-A3B and Qwen3-235B-A22B, whole and cut by tensor parallelism, and the
    A's of an adapter of rank 32."""
    found: set[tuple[int, int]] = set()
    for hidden, query in ((2048, 4096), (4096, 8192)):
        for tp in (1, 2, 4, 8):
            # q, k and v are one product; 4 key/value heads of 128 make 512 features.
            found.add(((query + 2 * 512) // tp, hidden))
            found.add((hidden, query // tp))
            # The head: 151,936 tokens in the vocabulary.
            found.add((151936 // tp, hidden))
        found |= {(32, hidden), (32, query)}
    return found


def _qwen3_experts() -> set[tuple[int, int]]:
    """gate_up and down of their experts, whole and cut by expert tensor parallelism."""
    found: set[tuple[int, int]] = set()
    for hidden, inner in ((2048, 768), (4096, 1536)):
        for etp in (1, 2, 4, 8):
            # gate and up are one product.
            found.add((2 * inner // etp, hidden))
            found.add((hidden, inner // etp))
    return found


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

_CPU_FEATURES: tuple[int, ...] = (32, 128, 384, 1024)

CPU = Grid(
    gemm_rows=(32, 128, 512, 2048),
    # Every pair of these sizes as outputs and inputs.
    gemm_features=_both_ways(set(itertools.product(_CPU_FEATURES, _CPU_FEATURES))),
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
    with_steps: list[list[tuple[int, Any]]] = []
    for axis in axes:
        with_steps.append(list(zip(_steps(len(axis)), axis, strict=True)))
    # A point has (step, value) for each axis.
    points = list(itertools.product(*with_steps))
    random.Random(0).shuffle(points)
    # It comes in with the latest of its values. Sorting is stable, so points of one step stay
    # shuffled.
    points.sort(key=lambda point: max(step for step, _ in point))
    ordered = []
    for point in points:
        ordered.append(tuple(value for _, value in point))
    return ordered


def _steps(n: int) -> list[int]:
    """At which halving each of n values comes in: [0, 2, 1, 2, 0] for five.

    The ends are there from the beginning.
    """
    steps = [0] * n
    spans = [(0, n - 1)]
    step = 0
    while spans:
        step += 1
        halves = []
        for first, last in spans:
            # Nothing lies between neighbours.
            if last - first <= 1:
                continue
            middle = (first + last) // 2
            steps[middle] = step
            halves += [(first, middle), (middle, last)]
        spans = halves
    return steps


def extremes_first[T](items: Sequence[T], size: Callable[[T], int]) -> list[T]:
    """The smallest, the largest, then the others as they were.

    Two points span a series even where no more are taken.
    """
    if len(items) < 2:
        return list(items)
    low = min(items, key=size)
    # The last of the largest: where all are of one size, it is another item than ``low``.
    high = max(reversed(items), key=size)
    others = [item for item in items if item is not low and item is not high]
    return [low, high, *others]


def interleaved[T](series: Sequence[Sequence[T]]) -> list[T]:
    """All items in one list, in which every series is through the same share of its own at any
    point."""
    placed: list[tuple[float, T]] = []
    for items in series:
        for i, item in enumerate(items):
            # The middle of the item's share: one of two stands at 1/4, one of four at 1/8.
            placed.append(((i + 0.5) / len(items), item))
    # Sorting is stable: of items at the same place, that of the earlier series comes first.
    placed.sort(key=lambda entry: entry[0])
    return [item for _, item in placed]

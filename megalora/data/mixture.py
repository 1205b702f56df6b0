"""Say which samples a step trains on where ``data.train`` is several sources with weights.

Places in the endless row of samples are dealt to sources as seats are to parties by Webster's
method (Sainte-Lague). With weight w_i, a source's j-th sample, j = 0, 1, ..., is due at the time

    t_i(j) = (j + 1/2) / w_i

and samples take their places by these times; of equal times, the source that stands first in the
list comes first. With weights that sum to 1 and S sources, a source has had n w_i of the first n
places, up to 1/2 + w_i S / 2: its share, not a draw by chance. Each source is shuffled anew for
each of its own epochs, so that it is repeated at its own rate.

All of it is a function of (seed, place): a step at any place costs as much as the first.
"""

import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from math import lcm

import numpy as np

from megalora.data.permutation import permutation


def mixture_indices(
    step: int, global_batch_size: int, sizes: Sequence[int], weights: Sequence[float], seed: int
) -> np.ndarray:
    """[global_batch_size] int64: the samples of a step (from 0), as numbers into all sources one
    behind the other.

    Args:
        sizes: number of samples of each source, at least 1.
        weights: one of each source, above 0.
    """
    sources, turns = deal(step * global_batch_size, global_batch_size, tuple(weights))
    indices = np.zeros(global_batch_size, np.int64)
    offset = 0
    for source, size in enumerate(sizes):
        # Places of this source, and then those of one of its epochs.
        mine = sources == source
        for epoch in np.unique(turns[mine] // size):
            now = mine & (turns // size == epoch)
            shuffled = _orders(size, seed, source).of_epoch(int(epoch))
            indices[now] = offset + shuffled[turns[now] % size]
        offset += size
    return indices


def deal(first: int, count: int, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which source has each of the places from ``first`` on, and how many it had before that place.

    Returns:
        [count] int64 numbers of sources, and [count] int64 turns of the source, from 0.
    """
    shares = _whole_numbers(weights)
    turns = turns_by(first, weights)
    dealt = np.zeros(count, np.int64)
    taken = np.zeros(count, np.int64)
    for place, source in enumerate(islice(_next_sources(turns, shares), count)):
        dealt[place] = source
        taken[place] = turns[source]
        turns[source] += 1
    return dealt, taken


def turns_by(num_places: int, weights: tuple[float, ...]) -> list[int]:
    """How many of the first ``num_places`` places each source has."""
    shares = _whole_numbers(weights)
    turns = _turns_at_least(num_places, shares)
    # At most some 2 S places are left to deal, so that the millionth step is as cheap as the first.
    for source in islice(_next_sources(turns, shares), num_places - sum(turns)):
        turns[source] += 1
    return turns


def _next_sources(turns: Sequence[int], shares: Sequence[int]) -> Iterator[int]:
    """The sources of the places behind those that ``turns`` counts, without end."""
    # Times in whole numbers, without rounding: t_i(j) = (2 j + 1) * scale / share_i.
    scale = lcm(*shares)
    queue = []
    for source, (turn, share) in enumerate(zip(turns, shares, strict=True)):
        queue.append(((2 * turn + 1) * (scale // share), source))
    heapq.heapify(queue)
    while True:
        # The earliest time; of equal ones the smallest number of a source, as tuples compare.
        time, source = queue[0]
        yield source
        heapq.heapreplace(queue, (time + 2 * (scale // shares[source]), source))


def _whole_numbers(weights: tuple[float, ...]) -> list[int]:
    """Whole numbers in the ratio of the weights as they are written: 0.1 is a tenth."""
    fractions = [Fraction(repr(weight)) for weight in weights]
    denominator = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * denominator) for fraction in fractions]


def _turns_at_least(num_places: int, shares: list[int]) -> list[int]:
    """Turns that each source has had in the first n places at least: all but a few of them.

    At the time T of place n every source has had floor(w_i T + 1/2) turns, or one less where times
    are equal. Together they are n, and rounding adds at most 1/2 for each of the S sources, so that
    T >= n - S / 2 for weights that sum to 1. So no source has had less than
    floor(w_i (n - S / 2) - 1/2).
    """
    total = sum(shares)
    turns = []
    for share in shares:
        # w_i = share / total, with the whole bound over 2 * total.
        least = (share * (2 * num_places - len(shares)) - total) // (2 * total)
        turns.append(max(0, least))
    return turns


class _Orders:
    """Shuffled orders of one source. A step needs one epoch of it or two that follow each other."""

    def __init__(self, size: int, seed: int, source: int) -> None:
        self.size = size
        self.seed = seed
        self.source = source
        self.kept: dict[int, np.ndarray] = {}

    def of_epoch(self, epoch: int) -> np.ndarray:
        """[size] int64: numbers of the source's samples."""
        if epoch not in self.kept:
            # The words behind the epoch keep this apart from the order of a single source.
            shuffled = permutation(self.size, self.seed, epoch, 2, self.source)
            # Of all earlier ones only the last: sources may be large.
            newest = max(self.kept, default=epoch)
            self.kept = {newest: self.kept[newest]} if self.kept else {}
            self.kept[epoch] = shuffled
        return self.kept[epoch]


@lru_cache(maxsize=256)
def _orders(size: int, seed: int, source: int) -> _Orders:
    return _Orders(size, seed, source)

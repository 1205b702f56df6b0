"""Name a run of elements of a tensor that is cut over ranks, and copy between two such runs.

A tensor-parallel rank holds one of ``num_shards`` parts of a tensor, cut along ``dim``; under the
distributed optimizer it owns elements ``[start, end)`` of that part, flattened. In the whole
tensor, flattened, these are one run of elements, or one in each row where ``dim`` is not the first.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

type Run = tuple[int, int]
"""(first element, number of elements) of the flattened whole tensor."""


@dataclass(frozen=True)
class Slice:
    """Elements ``[start, end)`` of one part of a tensor."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dim: int | None
    """Dimension along which it is cut; None for a tensor in one part."""
    num_shards: int
    shard: int
    """Number of the part, from 0."""
    start: int
    end: int

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Slice":
        """All elements of a tensor."""
        return cls(shape, None, 1, 0, 0, math.prod(shape))

    def part(self, start: int, end: int) -> "Slice":
        """Elements ``[start, end)`` of these."""
        return replace(self, start=self.start + start, end=self.start + end)

    @property
    def numel(self) -> int:
        return self.end - self.start

    def fault(self) -> str | None:
        """What is wrong with these numbers, which may come from a file; None where nothing is."""
        numbers = (*self.shape, self.num_shards, self.shard, self.start, self.end)
        # ``type``, because true is an int to Python.
        if any(type(number) is not int or number < 0 for number in numbers):
            return "has a number that is not a count"
        if self.dim is None:
            is_cut = self.num_shards == 1
        else:
            is_cut = type(self.dim) is int and 0 <= self.dim < len(self.shape)
            is_cut = is_cut and self.num_shards > 0
            # Megatron cuts into equal parts alone.
            is_cut = is_cut and self.shape[self.dim or 0] % self.num_shards == 0
        if not is_cut or self.shard >= self.num_shards:
            return "is not a part of the tensor"
        if not self.start < self.end <= math.prod(self.shape) // self.num_shards:
            return "is not a run of elements of its part"
        return None

    def runs(self) -> list[Run]:
        """The same elements in the whole tensor, in ascending order."""
        if self.dim is None:
            return [(self.start, self.numel)]
        # The part holds ``block`` elements of every ``stride`` of the whole.
        stride = math.prod(self.shape[self.dim :])
        block = stride // self.num_shards
        runs: list[Run] = []
        place = self.start
        # A run ends with its row of the part: other ranks' elements come next in the whole.
        while place < self.end:
            row, inside = divmod(place, block)
            length = min(block - inside, self.end - place)
            runs.append((row * stride + self.shard * block + inside, length))
            place += length
        return runs


def overlaps(source: Slice, target: Slice) -> Iterator[tuple[int, int, int]]:
    """(place in source, place in target, number of elements) of what both have, by runs."""
    sources = source.runs()
    targets = target.runs()
    source_place = 0
    target_place = 0
    i = 0
    j = 0
    # Both lists ascend, so that n and m runs take n + m steps and not n m.
    while i < len(sources) and j < len(targets):
        a, a_length = sources[i]
        b, b_length = targets[j]
        first = max(a, b)
        last = min(a + a_length, b + b_length)
        if first < last:
            yield source_place + first - a, target_place + first - b, last - first
        # Whichever ends first has no more to give.
        if a + a_length <= b + b_length:
            source_place += a_length
            i += 1
        else:
            target_place += b_length
            j += 1


def copy_overlap(source: Slice, values: Tensor, target: Slice, out: Tensor) -> int:
    """Copy what two slices of one tensor have in common; returns the number of elements.

    Args:
        values: ``[source.numel]``.
        out: ``[target.numel]``, written where ``source`` has its elements.
    """
    copied = 0
    for place, to, length in overlaps(source, target):
        out[to : to + length].copy_(values[place : place + length])
        copied += length
    return copied


def cover_fault(shape: tuple[int, ...], slices: Iterable[Slice]) -> str | None:
    """What keeps slices from having every element of a tensor exactly once; None where nothing
    does."""
    runs: list[Run] = []
    for piece in slices:
        runs.extend(piece.runs())
    place = 0
    # In order, each run must begin where the last one ended: no mask of all elements is needed.
    for first, length in sorted(runs):
        if first > place:
            return f"elements {place:,} to {first - 1:,} are in no piece"
        if first < place:
            return f"element {first:,} is in two pieces"
        place = first + length
    total = math.prod(shape)
    if place != total:
        return f"elements {place:,} to {total - 1:,} are in no piece"
    return None

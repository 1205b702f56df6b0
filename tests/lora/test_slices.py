"""Copy between slices of tensors that two layouts cut, against indexing with numbers."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megalora.lora.slices import Slice, copy_overlap, cover_fault

SHAPE = (4, 6, 2)


def all_parts() -> Iterator[tuple[int | None, int, int]]:
    """(dim, number of shards, shard) of every way to cut ``SHAPE``."""
    yield None, 1, 0
    for dim, count in ((0, 2), (0, 4), (1, 2), (1, 3), (2, 2)):
        for shard in range(count):
            yield dim, count, shard


def numbers_of(part: Slice) -> Tensor:
    """The elements' places in the flattened whole tensor."""
    numbers = torch.arange(math.prod(part.shape)).view(part.shape)
    if part.dim is not None:
        numbers = numbers.chunk(part.num_shards, part.dim)[part.shard]
    return numbers.flatten()[part.start : part.end]


def some_slices() -> list[Slice]:
    found: list[Slice] = []
    for dim, count, shard in all_parts():
        size = math.prod(SHAPE) // count
        # All of a part, its beginning, its end, and a run within.
        for start, end in ((0, size), (0, 5), (size - 3, size), (3, size - 2)):
            found.append(Slice(SHAPE, dim, count, shard, start, end))
    return found


def test_what_two_slices_have_in_common_is_copied() -> None:
    slices = some_slices()
    for source, target in itertools.product(slices, slices):
        assert source.fault() is None
        have = numbers_of(source)
        want = numbers_of(target)
        out = torch.full((target.numel,), -1)
        copied = copy_overlap(source, have, target, out)
        common = torch.isin(want, have)
        assert copied == int(common.sum())
        assert torch.equal(out, torch.where(common, want, -1))


def test_every_element_must_be_there_once() -> None:
    whole = [Slice(SHAPE, 1, 3, shard, 0, 16) for shard in range(3)]
    assert cover_fault(SHAPE, whole) is None
    # The same elements, cut otherwise.
    mixed = [*whole[:2], whole[2].part(0, 7), whole[2].part(7, 16)]
    assert cover_fault(SHAPE, mixed[::-1]) is None
    assert cover_fault(SHAPE, whole[:2]) == "elements 8 to 11 are in no piece"
    assert cover_fault(SHAPE, [*whole[1:], whole[0].part(1, 16)]) == (
        "elements 0 to 0 are in no piece"
    )
    assert cover_fault(SHAPE, [*whole[:2], whole[2].part(0, 15)]) == (
        "elements 47 to 47 are in no piece"
    )
    assert cover_fault(SHAPE, [*whole, whole[1].part(3, 4)]) == "element 7 is in two pieces"


def test_numbers_of_a_file_that_are_no_slice() -> None:
    for numbers in (
        (1, 3, 3, 0, 4), (1, 3, 0, 4, 4), (1, 3, 0, 0, 17), (1, 5, 0, 0, 4), (3, 2, 0, 0, 4),
        (None, 2, 0, 0, 4), (1, 0, 0, 0, 4), (1, 3, -1, 0, 4), (0, True, 0, 0, 4),
        (1, 3, 0, 0.0, 4),
    ):  # fmt: skip
        assert Slice(SHAPE, *numbers).fault(), numbers  # pyright: ignore[reportArgumentType]

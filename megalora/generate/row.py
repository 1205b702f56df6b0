"""Lay the new tokens of several sequences out in one row, with what attention needs to know.

    row        | prompt of c      | a | b | filler |        T tokens, a multiple of t
    keys       | prompt of c      | a's so far | b's so far | filler |     K rows of the cache

Legend: as in ``cache.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megalora.generate.cache import CachedDocuments, on_device
from megalora.generate.sequences import Active
from megalora.model.documents import Chunk


@dataclass(frozen=True, eq=False)
class Row:
    """What one pass reads, on the device."""

    tokens: Tensor
    """[T] int64."""
    documents: CachedDocuments
    last: Tensor
    """[N] int64: places of the sequences' last tokens, whose next ones are wanted; the first token
    where the row is filler alone."""


def lay_out(sequences: Sequence[Active], *, num_slots: int, length: int, multiple_of: int) -> Row:
    """The row of a pass; filler alone where there are no sequences.

    Args:
        num_slots: slots of the cache, ``length`` tokens each; behind them lie ``multiple_of`` rows
            for filler.
        multiple_of: what T must be a multiple of.
    """
    tokens: list[int] = []
    positions: list[int] = []
    write: list[int] = []
    read: list[int] = []
    last: list[int] = []
    query_ends = [0]
    key_ends = [0]

    def add(new: Sequence[int], first_row: int, num_cached: int) -> None:
        """A document of these new tokens behind ``num_cached`` earlier ones."""
        stop = num_cached + len(new)
        tokens.extend(new)
        positions.extend(range(num_cached, stop))
        write.extend(range(first_row + num_cached, first_row + stop))
        read.extend(range(first_row, first_row + stop))
        query_ends.append(len(tokens))
        key_ends.append(len(read))

    for sequence in sequences:
        add(sequence.new_tokens, sequence.slot * length, sequence.num_cached)
        last.append(len(tokens) - 1)
    # Sequence parallelism divides the row; and a pass without sequences is a pass all the same.
    num_filler = -len(tokens) % multiple_of
    if not tokens:
        num_filler = multiple_of
    if num_filler:
        # A document of its own: any token will do.
        add([0] * num_filler, num_slots * length, 0)
    num_queries = len(tokens)
    num_keys = len(read)
    # As if the new tokens stood at the end of all: attention cuts the keys from the first to
    # the last query's, which are all of them.
    chunk = Chunk(num_keys - num_queries, num_keys, 0, tuple(query_ends), tuple(key_ends))
    documents = CachedDocuments(
        chunks=(chunk,),
        positions=on_device(positions),
        bounds=((on_device(query_ends).int(), on_device(key_ends).int()),),
        write=on_device(write),
        read=on_device(read),
    )
    return Row(on_device(tokens), documents, on_device(last or [0]))

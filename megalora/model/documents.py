"""Say which tokens of a row attend to which, for this rank's part of the row.

A row of T tokens holds documents one after another. Context parallelism cuts it into 2 c equal
chunks, c its size, of which rank i holds chunks i and 2c - 1 - i: a late chunk has much to attend
to, an early one little, so that all ranks compute as much (zigzag).

    row       | document 0 |     document 1      | document 2 |
    chunks    |  0   |  1   |  2   |  3   |     c = 2
    rank         0      1      1      0

The queries of chunk [a, b) need the keys from the beginning of the document that holds a, up to b:
one slice of the row. In it every piece, the part of one document in this chunk, is a causal block
whose last query sees the last key: what variable-length flash attention computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Queries [start, stop) of the row, and the keys that they see."""

    start: int
    stop: int
    first_key: int
    """Beginning of the document that holds ``start``; keys are those of [first_key, stop)."""
    query_ends: tuple[int, ...]
    """(0, end of piece 0, ...), counted from ``start``."""
    key_ends: tuple[int, ...]
    """(0, end of the keys of piece 0, ...), counted from ``first_key``."""

    @property
    def longest_query(self) -> int:
        return max(end - start for start, end in pairwise(self.query_ends))

    @property
    def longest_key(self) -> int:
        return max(end - start for start, end in pairwise(self.key_ends))


@dataclass(frozen=True, eq=False)
class RowSequences:
    """The sequences of a row, for the tokens that this rank routes to experts."""

    numbers: Tensor
    """[T / (c t)] int64 on the device: the sequence of each token. All filler is one, the last."""
    lengths: Tensor
    """[Q + 1] int64 on the device: tokens of each sequence of the whole row, and 0 for filler."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a row for one rank's attention and rotary embedding.

    It travels through Megatron's modules as their ``packed_seq_params``, of which they read the
    last three fields. Their own format for packed rows ("thd") is not used: it rotates queries and
    keys document by document with a wait for the device in each layer, and under context
    parallelism every document would have to be padded.
    """

    chunks: tuple[Chunk, ...]
    """This rank's part of the row, in order."""
    positions: Tensor
    """[T / c] int64 on the device: place of each of this rank's tokens in its document."""
    bounds: tuple[tuple[Tensor, Tensor], ...]
    """``query_ends`` and ``key_ends`` of each chunk, int32 on the device."""
    sequences: RowSequences | None = None
    """Given where routing is balanced by sequences."""
    routes: Tensor | None = None
    """[T / (c t), layers of this rank, K] int64 on the device: experts that the tokens have to go
    to, -1 where they choose by themselves; given where routing is replayed."""
    qkv_format: str = "sbhd"
    cp_group: Any = None
    tokens_per_sample: Any = None


def local_ranges(num_tokens: int, rank: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) of this rank's chunks of a row; raises ``ValueError`` where it does not divide
    into chunks."""
    if size == 1:
        return [(0, num_tokens)]
    num_chunks = 2 * size
    if num_tokens % num_chunks:
        raise ValueError(f"a row of {num_tokens} tokens does not divide into {num_chunks} chunks")
    step = num_tokens // num_chunks
    # The i-th chunk from the beginning and the i-th from the end: together always as much to do.
    return [(i * step, (i + 1) * step) for i in (rank, num_chunks - 1 - rank)]


def local_chunks(ends: Sequence[int], rank: int, size: int) -> tuple[Chunk, ...]:
    """This rank's chunks of a row.

    Args:
        ends: (0, end of document 0, ..., T).
    """
    return tuple(_cut(ends, *bounds) for bounds in local_ranges(ends[-1], rank, size))


def _cut(ends: Sequence[int], start: int, stop: int) -> Chunk:
    # A document that ends on the chunk's own border ends a piece there anyway.
    inside = [end for end in ends if start < end < stop]
    # The document of the first query may begin before the chunk, and its keys are seen from there.
    first_key = max(end for end in ends if end <= start)
    query_ends = [0]
    key_ends = [0]
    # Pieces after the first begin inside the chunk: as many keys as queries.
    for end in (*inside, stop):
        query_ends.append(end - start)
        key_ends.append(end - first_key)
    return Chunk(start, stop, first_key, tuple(query_ends), tuple(key_ends))


def positions_of(ends: Sequence[int]) -> Tensor:
    """[T] int64: place of every token of a row in its document."""
    # For every token the place where its document begins
    starts = np.repeat(ends[:-1], np.diff(ends))
    return torch.from_numpy(np.arange(ends[-1]) - starts)


def zigzag(row: Tensor, rank: int, size: int) -> Tensor:
    """This rank's chunks, one after the other, of what is whole along its first dimension."""
    if size == 1:
        return row
    parts = [row[start:stop] for start, stop in local_ranges(len(row), rank, size)]
    return torch.cat(parts)


def unzigzag(gathered: Tensor, size: int) -> Tensor:
    """``[T, ...]`` in the order of the row, from the parts of all ranks one after the other."""
    if size == 1:
        return gathered
    # [ranks, early or late chunk, tokens of a chunk, ...]; late chunks come in falling order.
    parts = gathered.unflatten(0, (size, 2, -1))
    return torch.cat([parts[:, 0], parts[:, 1].flip(0)]).flatten(0, 1)

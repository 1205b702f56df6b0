"""Keep keys and values of earlier tokens, so that a pass computes new tokens alone.

The model's attention is left as it is. It gets the new tokens' queries, and keys and values of all
tokens, taken from the cache sequence by sequence; its documents say how many queries and keys each
sequence has. A prompt, a next token and several tokens behind a longer text are thus the same
thing, and one pass may hold all of them.

    new tokens' k, v [T, g/t, d]  ->  written to rows of the cache
    rows of every sequence so far  ->  k, v [K, g/t, d]  ->  attention of T queries over K keys

Legend: T new tokens of a pass, K tokens of its sequences so far, n slots, S tokens of a slot, g
key/value heads, d head dim, t tensor-parallel size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalora import host
from megalora.model.documents import Documents
from megalora.model.shape import ModelShape


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedDocuments(Documents):
    """Documents of a pass, and where their keys and values lie in the cache."""

    write: Tensor
    """[T] int64: row of the cache for each new token."""
    read: Tensor
    """[K] int64: rows of all tokens so far, sequence by sequence."""


def cache_bytes(
    shape: ModelShape, *, tp: int, num_slots: int, length: int, dtype_bytes: int
) -> int:
    """Bytes of a rank's cache: 2 L (n S + t) max(g, t)/t d e, with L layers and e bytes a number.

    With more ranks than key/value heads each rank has a copy of one head. The last t rows are for
    filler. A pass adds a copy of the rows it reads, of one layer at a time.
    """
    heads = max(shape.num_kv_heads, tp) // tp
    return 2 * shape.num_layers * (num_slots * length + tp) * heads * shape.head_dim * dtype_bytes


class CachedAttention(nn.Module):
    """Core attention over what is in the cache, in place of the layer's own while it generates."""

    def __init__(self, attention: Any, num_rows: int) -> None:
        """
        Args:
            attention: the layer's core attention.
            num_rows: rows of the cache.
        """
        super().__init__()
        self.attention = attention
        self.num_rows = num_rows
        self.stored: tuple[Tensor, Tensor] | None = None
        """Keys and values, ``[rows, g/t, d]`` each."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: CachedDocuments,
        **kwargs: Any,
    ) -> Tensor:
        """As the layer's own attention, of query ``[T, 1, h/t, d]`` and key and value ``[T, 1, g/t,
        d]`` of the new tokens."""
        documents = packed_seq_params
        if self.stored is None:
            # Sizes and dtype are known best from the first pass.
            rows = (self.num_rows, *key.shape[2:])
            self.stored = (key.new_empty(rows), value.new_empty(rows))
        every = []
        for new, stored in zip((key, value), self.stored, strict=True):
            # Written first, so that new tokens see themselves and each other.
            stored.index_copy_(0, documents.write, new[:, 0])
            every.append(stored.index_select(0, documents.read)[:, None])
        return self.attention(query, *every, *args, packed_seq_params=documents, **kwargs)


@contextmanager
def cached(chunk: Any, num_rows: int) -> Iterator[list[CachedAttention]]:
    """Let a model's layers attend through a cache of so many rows while the block runs; yields the
    layers' caches."""
    # Around each layer's own attention, whatever that is: recomputed, or on flash kernels.
    places = [layer.self_attention for layer in chunk.decoder.layers]
    own = [place.core_attention for place in places]
    caches: list[CachedAttention] = []
    try:
        for place, attention in zip(places, own, strict=True):
            place.core_attention = CachedAttention(attention, num_rows)
            caches.append(place.core_attention)
        chunk.eval()
        with torch.no_grad():
            yield caches
    finally:
        for place, attention in zip(places, own, strict=True):
            place.core_attention = attention
        # Training needs the memory, whoever still refers to the list of caches.
        for cache in caches:
            cache.stored = None


def on_device(numbers: list[int]) -> Tensor:
    """int64 numbers on this rank's device."""
    return host.to_device(torch.tensor(numbers, dtype=torch.int64))

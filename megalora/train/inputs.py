"""Bring a step's rows to the device in one copy, from page-locked memory and without waiting for
it.

Only what a rank reads travels: of each row its context-parallel part; tokens to the first pipeline
stage, labels and loss mask to the last, and to all of them where documents begin.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megalora import host
from megalora.data.batch import Batch
from megalora.model.documents import Chunk, Documents, local_chunks, positions_of, zigzag
from megalora.parallel import Groups


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """This rank's part of a row on its device; None where its pipeline stage has no use for it."""

    documents: Documents
    tokens: Tensor | None
    """[T / c] int64."""
    labels: Tensor | None
    """[T / c] int64."""
    loss_mask: Tensor | None
    """[T / c] float32."""


@dataclass(frozen=True)
class Part:
    """What this rank reads of every row."""

    first: bool
    """Whether it is a first pipeline stage, which reads tokens."""
    last: bool
    """Whether it is a last pipeline stage, which reads labels."""
    cp_rank: int = 0
    cp_size: int = 1

    @classmethod
    def of(cls, groups: Groups) -> "Part":
        stage = groups.pp.rank()
        return cls(
            first=stage == 0,
            last=stage == groups.pp.size() - 1,
            cp_rank=groups.cp.rank(),
            cp_size=groups.cp.size(),
        )


def to_device(batches: list[Batch], part: Part) -> list[DeviceBatch]:
    """This rank's part of every row, in one copy to the device.

    Token ids fit into int32, and a label outside of the loss travels as its complement, so that the
    mask needs no room: 12 bytes a token where a stage is both first and last.
    """
    chunks = [local_chunks(batch.ends, part.cp_rank, part.cp_size) for batch in batches]
    pieces: list[Tensor] = []
    for batch, of_batch in zip(batches, chunks, strict=True):
        pieces += _host_pieces(batch, of_batch, part)
    sizes = [len(piece) for piece in pieces]
    flat = host.to_device(torch.cat(pieces).int())
    parts = iter(flat.split(sizes))
    return [_unpack(of_batch, parts, part) for of_batch in chunks]


def _host_pieces(batch: Batch, chunks: tuple[Chunk, ...], part: Part) -> list[Tensor]:
    """What travels of one row, in the order in which ``_unpack`` takes it."""
    rows = [positions_of(batch.ends)]
    if part.first:
        rows.append(batch.tokens)
    if part.last:
        # ~label is -label - 1: negative, and its own inverse.
        rows.append(torch.where(batch.loss_mask > 0, batch.labels, ~batch.labels))
    pieces = [zigzag(row, part.cp_rank, part.cp_size) for row in rows]
    for chunk in chunks:
        pieces.append(torch.tensor(chunk.query_ends))
        pieces.append(torch.tensor(chunk.key_ends))
    return pieces


def _unpack(chunks: tuple[Chunk, ...], parts: Iterator[Tensor], part: Part) -> DeviceBatch:
    """The next row of those that ``to_device`` sent, on the device."""
    positions = next(parts).long()
    tokens = labels = loss_mask = None
    if part.first:
        tokens = next(parts).long()
    if part.last:
        packed = next(parts).long()
        in_loss = packed >= 0
        labels = torch.where(in_loss, packed, ~packed)
        loss_mask = in_loss.float()
    bounds = tuple((next(parts), next(parts)) for _ in chunks)
    return DeviceBatch(Documents(chunks, positions, bounds), tokens, labels, loss_mask)

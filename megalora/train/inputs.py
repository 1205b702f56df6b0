"""Bring a step's rows to the device in one copy, from page-locked memory and without waiting for
it.

Only what a rank reads travels: of each row its context-parallel part; tokens to the first pipeline
stage, target tokens and their places to the last, and to all of them where documents begin.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megalora import host
from megalora.data.batch import Batch
from megalora.data.top_logits import TopLogits
from megalora.model.documents import (
    Chunk,
    Documents,
    RowSequences,
    local_chunks,
    local_ranges,
    positions_of,
    zigzag,
)
from megalora.parallel import Groups


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """This rank's part of a row on its device; None where its pipeline stage has no use for it."""

    documents: Documents
    tokens: Tensor | None
    """[T / c] int64."""
    labels: Tensor | None
    """[N] int64: the tokens that the head is asked about."""
    positions: Tensor | None
    """[N] int64: where in this rank's part of the row each of them is predicted; None for the
    labels of every place."""
    filler: int = 0
    """How many of the tokens that this rank routes to experts are filler; they are the last."""
    number: int = 0
    """Its place among the microbatches of this rank."""
    sequences: Tensor | None = None
    """[N] int64: the sequence that each of ``labels`` belongs to; None unless it was asked for."""
    targets: Tensor | None = None
    """[Q] int64: target tokens of each sequence of the whole row; likewise."""
    values: Tensor | None = None
    """[Q] float32: the label, value or margin of each sequence; likewise."""
    taught: tuple[Tensor, Tensor, Tensor] | None = None
    """(ids [N, k] int64, logprobs [N, k], rest [N] float32) that a teacher's file gives for
    ``labels``; None where there is none."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> [N] float32, a number that the data gives for each of ``labels``; with
    ``sequences``."""


@dataclass(frozen=True)
class Asked:
    """What a pass wants to know of a row, beside its target tokens."""

    every_token: bool = False
    """The labels of all places, in the loss or not."""
    sequences: bool = False
    """Which sequence a target token belongs to."""
    taught: int = 0
    """Tokens that a teacher's file gives at each target token; 0 where there is none."""
    routed: bool = False
    """Which sequence each token belongs to that this rank routes to experts."""
    replayed: tuple[int, ...] = ()
    """Of which layers of a row's ``routes`` the experts are wanted, where it has such: those of
    this rank."""


TARGETS = Asked()


@dataclass(frozen=True)
class Part:
    """What this rank reads of every row."""

    first: bool
    """Whether it is a first pipeline stage, which reads tokens."""
    last: bool
    """Whether it is a last pipeline stage, which reads labels."""
    cp_rank: int = 0
    cp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1

    @classmethod
    def of(cls, groups: Groups) -> "Part":
        stage = groups.pp.rank()
        return cls(
            first=stage == 0,
            last=stage == groups.pp.size() - 1,
            cp_rank=groups.cp.rank(),
            cp_size=groups.cp.size(),
            tp_rank=groups.tp.rank(),
            tp_size=groups.tp.size(),
        )

    def filler(self, batch: Batch) -> int:
        """How many of the tokens between this rank's layers are filler.

        Filler ends the row, so it ends each of a rank's chunks. It also ends their concatenation: a
        late chunk with a token that is none lies behind an early one, which has no filler then.
        """
        first = len(batch.tokens) - batch.filler
        of_part = 0
        held = 0
        for start, stop in local_ranges(len(batch.tokens), self.cp_rank, self.cp_size):
            held += stop - start
            of_part += max(0, stop - max(start, first))
        # Sequence parallelism gives each rank of tensor parallelism one slice of that.
        slice_ = held // self.tp_size
        return min(slice_, max(0, of_part - (self.tp_size - 1 - self.tp_rank) * slice_))


def to_device(batches: list[Batch], part: Part, asked: Asked = TARGETS) -> list[DeviceBatch]:
    """This rank's part of every row, in one copy to the device.

    The host picks the target tokens, so that it knows their number and need not ask the device.
    All numbers fit into int32.
    """
    # Few objectives have mismatched sequences.
    if not batches:
        return []
    chunks = [local_chunks(batch.ends, part.cp_rank, part.cp_size) for batch in batches]
    pieces: list[Tensor] = []
    for batch, of_batch in zip(batches, chunks, strict=True):
        pieces += _host_pieces(batch, of_batch, part, asked)
    # One copy of many kilobytes; a copy for each piece would cost a launch for each.
    sizes = [len(piece) for piece in pieces]
    flat = host.to_device(torch.cat(pieces).int())
    parts = iter(flat.split(sizes))
    found: list[DeviceBatch] = []
    for number, (batch, of_batch) in enumerate(zip(batches, chunks, strict=True)):
        top_k = 0 if batch.routes is None else batch.routes.shape[2]
        device_batch = _unpack(of_batch, parts, part, asked, part.filler(batch), number, top_k)
        if part.last and asked.sequences:
            columns: dict[str, Tensor] = {}
            for name in batch.columns:
                columns[name] = next(parts).clone().view(torch.float32)
            device_batch = replace(device_batch, columns=columns)
        found.append(device_batch)
    return found


def _host_pieces(batch: Batch, chunks: tuple[Chunk, ...], part: Part, asked: Asked) -> list[Tensor]:
    """What travels of one row, in the order in which ``_unpack`` takes it."""

    def own(row: Tensor) -> Tensor:
        return zigzag(row, part.cp_rank, part.cp_size)

    # Every stage rotates queries and keys by positions.
    pieces = [own(positions_of(batch.ends))]
    if part.first:
        pieces.append(own(batch.tokens))
    if part.last:
        labels = own(batch.labels)
        # numpy: torch's nonzero cannot be traced without data.
        places = torch.from_numpy(np.flatnonzero(own(batch.loss_mask).numpy()))
        if not asked.every_token:
            labels = labels[places]
            pieces.append(places)
        pieces.append(labels)
        if asked.sequences:
            pieces.append(own(batch.sequence_numbers)[places])
            pieces.append(torch.tensor(batch.targets))
            # As the bits that an integer has: all of a row travels as one array.
            values = torch.zeros(batch.num_sequences)
            values[: len(batch.values)] = torch.tensor(batch.values)
            pieces.append(values.view(torch.int32))
        if asked.taught and batch.taught is not None:
            pieces += _taught_pieces(batch.taught, _numbers_of_targets(batch, own))
    # Every stage has routers, so that each gets them.
    if asked.routed:
        pieces.append(_of_tp_rank(own(_without_filler(batch)), part))
        lengths = np.diff(batch.ends[: batch.num_sequences + 1])
        pieces.append(torch.tensor([*lengths.tolist(), 0]))
    if asked.replayed and batch.routes is not None:
        of_layers = torch.from_numpy(batch.routes)[:, list(asked.replayed)]
        pieces.append(_of_tp_rank(own(of_layers), part).flatten())
    for chunk in chunks:
        pieces.append(torch.tensor(chunk.query_ends))
        pieces.append(torch.tensor(chunk.key_ends))
    if part.last and asked.sequences:
        chosen = _numbers_of_targets(batch, own)
        for values in batch.columns.values():
            pieces.append(torch.from_numpy(values[chosen].view(np.int32)))
    return pieces


def _numbers_of_targets(batch: Batch, own: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Number of each of this rank's target tokens among those of the row."""
    numbers = torch.cumsum(batch.loss_mask > 0, 0) - 1
    return own(numbers).numpy()[own(batch.loss_mask).numpy() > 0]


def _taught_pieces(taught: TopLogits, chosen: np.ndarray) -> list[Tensor]:
    """ids, logprobs and rest of these target tokens, flat; floats as the bits of integers."""
    floats = (taught.logprobs[chosen].ravel(), taught.rest[chosen])
    return [
        torch.from_numpy(taught.ids[chosen].ravel()),
        *(torch.from_numpy(values.view(np.int32)) for values in floats),
    ]


def _without_filler(batch: Batch) -> Tensor:
    """[T] int64: the sequence of each token; all filler has the number behind the last one."""
    return batch.sequence_numbers.clamp(max=batch.num_sequences)


def _of_tp_rank(part_of_row: Tensor, part: Part) -> Tensor:
    """The slice between this rank's layers, where sequence parallelism cuts up rows."""
    return part_of_row.chunk(part.tp_size)[part.tp_rank]


def _unpack(
    chunks: tuple[Chunk, ...],
    parts: Iterator[Tensor],
    part: Part,
    asked: Asked,
    filler: int,
    number: int,
    top_k: int,
) -> DeviceBatch:
    """The next row of those that ``to_device`` sent, on the device; ``top_k`` is that of its
    ``routes``, 0 without any."""
    positions = next(parts).long()
    tokens = labels = places = sequences = targets = values = taught = None
    if part.first:
        tokens = next(parts).long()
    if part.last:
        if not asked.every_token:
            places = next(parts).long()
        labels = next(parts).long()
        if asked.sequences:
            sequences = next(parts).long()
            targets = next(parts).long()
            # A part of one array, which a view of other numbers must not be.
            values = next(parts).clone().view(torch.float32)
        if asked.taught:
            ids = next(parts).long().view(len(labels), asked.taught)
            logprobs = next(parts).clone().view(torch.float32).view(ids.shape)
            taught = (ids, logprobs, next(parts).clone().view(torch.float32))
    of_row = None
    if asked.routed:
        of_row = RowSequences(next(parts).long(), next(parts).long())
    routes = None
    if asked.replayed and top_k:
        routes = next(parts).long().view(-1, len(asked.replayed), top_k)
    bounds = tuple((next(parts), next(parts)) for _ in chunks)
    documents = Documents(chunks, positions, bounds, of_row, routes)
    return DeviceBatch(
        documents, tokens, labels, places, filler, number, sequences, targets, values, taught
    )

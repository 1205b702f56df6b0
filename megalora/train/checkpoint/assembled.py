"""Bring whole tensors to the first rank, a few at a time, from the pieces that ranks hold.

Every rank sends what it has of a batch of tensors, rounded to the dtype of the adapter's files; the
first rank puts the tensors together and passes them on in the order in which the file needs them.
All is in host memory and goes over a group of the host's own.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalora.adapters.state_index import Indexed, Piece, check_pieces
from megalora.first_rank import on_first_rank
from megalora.lora.slices import Slice, copy_overlap
from megalora.train.checkpoint.snapshot import Held, Snapshot

BATCH_BYTES = 1 << 25
"""Bytes of whole tensors that ranks send at once; a larger tensor is a batch of its own."""


@dataclass(frozen=True)
class Table:
    """What all ranks hold, as the first rank knows it."""

    tensors: dict[str, Indexed]
    dtypes: dict[str, torch.dtype]
    """Tensor name -> dtype of its parameter."""


@dataclass
class _Row:
    """What one rank holds of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    keys: list[str]
    slices: list[Slice]


def table_of(
    snapshot: Snapshot, dtypes: Mapping[str, torch.dtype], group: dist.ProcessGroup | None
) -> Table | None:
    """The table on the first rank, None elsewhere; collective.

    Args:
        dtypes: of the parameters of this rank's tensors.
    Raises:
        ValueError: on every rank, where together they lack an element, or have one twice; a bug of
            ours.
    """
    own = _own_rows(snapshot, dtypes)
    rows: list[dict[str, _Row]] = [own]
    if group is not None:
        found: list[dict[str, _Row]] | None = None
        if dist.get_rank() == 0:
            found = [{}] * dist.get_world_size()
        dist.gather_object(own, found, dst=0, group=group)
        # None but on the first rank, which alone looks at them.
        rows = found or []
    made: list[Table] = []
    # Raised on the first rank alone, a fault would leave the others waiting in the next collective.
    on_first_rank(lambda: made.append(_merged(rows)), "a checkpoint's table", group)
    return made[0] if made else None


def own_tensors(
    snapshot: Snapshot, dtypes: Mapping[str, torch.dtype], rank: int
) -> dict[str, Indexed]:
    """What this rank holds, with its number: no whole tensors, where others hold parts of them."""
    found: dict[str, Indexed] = {}
    for name, row in _own_rows(snapshot, dtypes).items():
        pieces = tuple(Piece(rank, part) for part in row.slices)
        found[name] = Indexed(row.shape, tuple(row.keys), pieces)
    return found


def _own_rows(snapshot: Snapshot, dtypes: Mapping[str, torch.dtype]) -> dict[str, _Row]:
    own: dict[str, _Row] = {}
    for key, of_key in snapshot.held.items():
        for held in of_key:
            new = _Row(held.slice.shape, dtypes[held.name], [], [])
            row = own.setdefault(held.name, new)
            if key not in row.keys:
                row.keys.append(key)
            # All that has the shape of a parameter is cut alike.
            if key == row.keys[0]:
                row.slices.append(held.slice)
    return own


def _merged(rows: list[dict[str, _Row]]) -> Table:
    """The table of what each rank holds."""
    pieces: dict[str, list[Piece]] = {}
    first: dict[str, _Row] = {}
    for rank, of_rank in enumerate(rows):
        for name, row in of_rank.items():
            known = first.setdefault(name, row)
            assert known.keys == row.keys and known.shape == row.shape, name
            parts = [Piece(rank, part) for part in row.slices]
            pieces.setdefault(name, []).extend(parts)
    tensors: dict[str, Indexed] = {}
    for name, row in sorted(first.items()):
        tensors[name] = Indexed(row.shape, tuple(row.keys), tuple(pieces[name]))
    check_pieces(tensors, "the ranks' pieces")
    return Table(tensors, {name: row.dtype for name, row in first.items()})


def batches_of(table: Table, names: Iterable[str]) -> list[list[str]]:
    """Names in batches of ``BATCH_BYTES``, in their order."""
    batches: list[list[str]] = []
    # As if full, so that the first name opens a batch.
    size = BATCH_BYTES
    for name in names:
        num_bytes = math.prod(table.tensors[name].shape) * table.dtypes[name].itemsize
        if size + num_bytes > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size += num_bytes
    return batches


def send(
    held: list[Held],
    dtypes: Mapping[str, torch.dtype],
    batches: list[list[str]],
    group: dist.ProcessGroup,
) -> None:
    """Send this rank's pieces of every batch to the first rank, which receives them by
    ``Assembled``."""
    by_name = _by_name(held)
    for batch in batches:
        # A rank that has nothing of a batch sends nothing, which the first rank's table says, too.
        if parts := list(_rounded(by_name, dtypes, batch)):
            # One message a batch: an A of rank 16 with 2,048 inputs has only 64 KB in bfloat16.
            dist.send(torch.cat(parts), 0, group=group)


def _by_name(held: list[Held]) -> dict[str, list[Held]]:
    by_name: dict[str, list[Held]] = {}
    for piece in held:
        by_name.setdefault(piece.name, []).append(piece)
    return by_name


def _rounded(
    by_name: Mapping[str, list[Held]], dtypes: Mapping[str, torch.dtype], batch: list[str]
) -> Iterator[Tensor]:
    """Bytes of this rank's pieces of a batch, uint8, in the order of names and pieces."""
    for name in batch:
        for piece in by_name.get(name, []):
            # A parameter in training is its master, rounded to the parameter's dtype.
            yield piece.tensor.to(dtypes[name]).view(torch.uint8)


class Assembled:
    """Whole tensors on the first rank, by name; a tensor is let go of when it has been asked for as
    often as announced."""

    def __init__(
        self,
        table: Table,
        held: list[Held],
        batches: list[list[str]],
        uses: Mapping[str, int],
        group: dist.ProcessGroup | None,
    ) -> None:
        """
        Args:
            held: this rank's own pieces.
            batches: as all other ranks send them.
            uses: tensor name -> how often it will be asked for.
        """
        self.table = table
        self._own = _by_name(held)
        self._coming = iter(batches)
        self._left = dict(uses)
        self._group = group
        self._whole: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """A whole tensor in the dtype of its parameter."""
        while name not in self._whole:
            self._receive(next(self._coming))
        tensor = self._whole[name]
        self._left[name] -= 1
        if not self._left[name]:
            del self._whole[name]
        return tensor

    def drain(self) -> None:
        """Receive what is still being sent and drop it: the other ranks must not wait for ever."""
        self._whole.clear()
        for batch in self._coming:
            self._receive(batch)
            self._whole.clear()

    def _receive(self, batch: list[str]) -> None:
        expected: dict[int, list[tuple[str, Slice]]] = {}
        for name in batch:
            tensor = self.table.tensors[name]
            self._whole[name] = torch.empty(tensor.shape, dtype=self.table.dtypes[name])
            for piece in tensor.pieces:
                expected.setdefault(piece.rank, []).append((name, piece.slice))
        for rank, pieces in sorted(expected.items()):
            dtypes = [self.table.dtypes[name] for name, _ in pieces]
            sizes = [
                part.numel * dtype.itemsize for (_, part), dtype in zip(pieces, dtypes, strict=True)
            ]
            if rank == 0:
                parts = tuple(_rounded(self._own, self.table.dtypes, batch))
            else:
                flat = torch.empty(sum(sizes), dtype=torch.uint8)
                dist.recv(flat, rank, group=self._group)
                parts = flat.split(sizes)
            for (name, part), dtype, content in zip(pieces, dtypes, parts, strict=True):
                whole = self._whole[name].view(-1)
                # A clone begins where its dtype may begin.
                values = content.clone().view(dtype)
                copy_overlap(part, values, Slice.whole(part.shape), whole)

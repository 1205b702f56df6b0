"""Write the adapter in training into one file, whole tensors under their own names, while ranks
send their pieces of it: no rank ever holds all of it."""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megalora.adapters.files import STATE_KEYS
from megalora.first_rank import on_first_rank
from megalora.train.checkpoint.assembled import Assembled, Table, batches_of, send, table_of
from megalora.train.checkpoint.save import Pieces
from megalora.train.checkpoint.snapshot import Snapshot

type Write = Callable[[Mapping[str, Tensor], Iterable[tuple[str, Tensor]]], None]
"""Writes a file of announced shapes and dtypes from (name, tensor) of each, as they are made."""


def write_whole(pieces: Pieces, write: Write, what: str, group: dist.ProcessGroup | None) -> None:
    """Let the first rank write all that is trained and what is frozen beside it, in the dtypes of
    the parameters. Collective over the group, which is the host's own.

    Args:
        write: called on the first rank.
        what: has failed where the file cannot be written, for the message.
    Raises:
        ValueError: on every rank, if so.
    """
    key = STATE_KEYS[0]
    snapshot = Snapshot()
    snapshot.take((block for block in pieces.blocks(None, None) if block.key == key), {})
    snapshot.wait()
    held = snapshot.held.get(key, [])
    table = table_of(snapshot, pieces.dtypes, group)
    batches = on_first_rank(lambda: _batches(table), what, group)
    fault: Exception | None = None
    if table is None:
        # A world of one has the table.
        assert group is not None
        send(held, pieces.dtypes, batches, group)
    else:
        arriving = Assembled(table, held, batches, dict.fromkeys(table.tensors, 1), group)
        announced: dict[str, Tensor] = {}
        for name, tensor in table.tensors.items():
            dtype = table.dtypes[name]
            announced[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        try:
            write(announced, ((name, arriving.get(name)) for name in announced))
        except Exception as error:
            # The others send everything in any case.
            arriving.drain()
            fault = error
    on_first_rank(lambda: _raise(fault), what, group)


def _batches(table: Table | None) -> list[list[str]]:
    assert table is not None, "only the first rank has the table"
    return batches_of(table, table.tensors)


def _raise(fault: Exception | None) -> None:
    if fault is not None:
        raise fault

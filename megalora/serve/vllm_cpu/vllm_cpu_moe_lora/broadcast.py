"""Send a message from one training to several servers at once, over gloo, outside torch's default
group.

torch's backend classes are used as they are. They know ranks of their group alone, so that nothing
global is touched on either side; both environments need the same minor version of torch.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SENDER = 0
CHUNK_BYTES = 256 << 20


class Group:
    """One sender (rank 0) and one receiver for each server.

    A group is made for an epoch: a server that died or came back is let in by the next epoch, which
    leaves the group before behind.
    """

    def __init__(
        self, host: str, port: int, epoch: int, rank: int, size: int, timeout_s: float
    ) -> None:
        """Join; returns when all have.

        Args:
            host, port: where the sender keeps the store; it opens it, others connect.
            timeout_s: seconds that joining and every broadcast may take, since a member that is
                missing is known by nothing else.
        """
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(
            host, port, is_master=rank == SENDER, wait_for_workers=False, timeout=timeout
        )
        self.port = store.port
        # Keys of an epoch of their own, should the store live longer.
        scoped = dist.PrefixStore(f"megalora/{epoch}", store)
        self._store = store
        self._group: Any = dist.ProcessGroupGloo(scoped, rank, size, timeout)

    def send(self, header: Tensor, buffer: Tensor) -> None:
        """Broadcast a message, whose two parts are uint8."""
        self._broadcast(torch.tensor([header.numel(), buffer.numel()], dtype=torch.int64))
        self._broadcast_in_chunks(header)
        self._broadcast_in_chunks(buffer)

    def receive_lengths(self) -> tuple[int, int]:
        """Number of bytes of the next message's header and buffer."""
        lengths = torch.zeros(2, dtype=torch.int64)
        self._broadcast(lengths)
        header, buffer = lengths.tolist()
        return header, buffer

    def receive(self, into: Tensor, header_bytes: int) -> None:
        """Fill ``into``, uint8, with the message whose lengths came before."""
        # Cut where the sender cuts.
        self._broadcast_in_chunks(into[:header_bytes])
        self._broadcast_in_chunks(into[header_bytes:])

    def _broadcast_in_chunks(self, tensor: Tensor) -> None:
        # gloo's time-out is of one broadcast, not of the whole message.
        for chunk in tensor.split(CHUNK_BYTES):
            self._broadcast(chunk)

    def _broadcast(self, tensor: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        self._group.broadcast([tensor], options).wait()

"""Keep replicas of a neighbour's snapshots, and hand snapshots to other nodes.

Each node forks one such process, which serves in threads, because the parent itself must have none.
It writes into memory that it shares with the parent (``memory.py``):

    put  rank, step, lengths, digests, then the snapshot: takes a replica from the node before
    get  rank, step: sends a snapshot, of this node's ranks or a replica

A replica is committed once its bytes have the digest that was announced; until then its slot holds
nothing, and the slot beside it holds the replica before. One of another job, of an attempt that has
ended, of a rank that is not the neighbour's, or for which there is no room is refused before any of
it is sent.
"""

import contextlib
import hashlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO, FileIO
from typing import Any

from megalora.train.warm.link import Link, LinkLost, accepted, connected
from megalora.train.warm.memory import SnapshotMemory
from megalora.verify.host_memory import free_host_memory_bytes

DESCRIBED_BYTES = 1 << 28
"""Limit of what is beside a snapshot; a rank with all 37,000 tensors of Qwen3-30B has 5 MB."""
CONNECTIONS = 64
"""Served at a time."""
COUNT = struct.Struct("<q")


class Attempt:
    """Number of the attempt that runs, shared by the processes of a node that are forked behind
    this."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, COUNT.size)
        self.number = -1

    @property
    def number(self) -> int:
        return int(COUNT.unpack_from(self._memory)[0])

    @number.setter
    def number(self, value: int) -> None:
        COUNT.pack_into(self._memory, 0, value)


@dataclass(frozen=True)
class Address:
    """Where another node's keeper listens, and what it is asked with."""

    host: str
    port: int
    token: bytes
    job: str

    def link(self) -> Link:
        return connected(self.host, self.port, self.token)


class Keeper:
    """Serves one node's memory."""

    def __init__(
        self, listener: socket.socket, token: bytes, job: str, attempt: Attempt,
        own: SnapshotMemory, replicas: SnapshotMemory,
    ) -> None:  # fmt: skip
        """
        Args:
            own: snapshots of this node's ranks.
            replicas: those of the ranks of the node before.
        """
        self.listener = listener
        self.token = token
        self.job = job
        self.attempt = attempt
        self.own = own
        self.replicas = replicas
        self._served = threading.Semaphore(CONNECTIONS)
        # A sender that tries again may meet its own earlier try.
        self._writing = {rank: threading.Lock() for rank in replicas.ranks}

    def serve(self) -> None:
        """Without end."""
        while True:
            try:
                connection, _ = self.listener.accept()
            # Whoever came has gone again.
            except OSError:
                continue
            # Whoever comes when too many are here waits in the system's queue.
            self._served.acquire()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # Who has asked sees that nothing comes; this process goes on for all others.
        with contextlib.suppress(OSError), connection:
            try:
                link = accepted(connection, self.token)
                message = link.receive()
                try:
                    self._answer(link, message)
                except (ValueError, KeyError, TypeError) as error:
                    link.send(kind="refused", why=str(error))
            finally:
                self._served.release()

    def _answer(self, link: Link, message: dict[str, Any]) -> None:
        # Of a run on the same hosts with the same token.
        if message["job"] != self.job:
            raise ValueError("this node belongs to another run")
        rank, step = message["rank"], message["step"]
        if message["kind"] == "get":
            memory = self.replicas if rank in self.replicas.ranks else self.own
            send_snapshot(link, memory, rank, step, kind="snapshot")
            return
        # A node that was taken for lost may still send what it has trained alone.
        if message["attempt"] != self.attempt.number:
            raise ValueError(f"attempt {message['attempt']} has ended")
        # Its slots would be those of another rank, or none.
        if rank not in self._writing:
            raise ValueError(f"rank {rank} is not one of {self.replicas.ranks}")
        with self._writing[rank]:
            _check_room(message)
            link.send(kind="go")
            receive_snapshot(link, self.replicas, message)
        link.send(kind="kept")


def offer_replica(link: Link, memory: SnapshotMemory, rank: int, step: int, **message: Any) -> None:
    """Have a keeper take a replica; returns when it is whole there.

    Raises:
        KeyError: there is no such snapshot here.
        OSError: the keeper is gone, or does not take it.
    """
    send_snapshot(link, memory, rank, step, kind="put", is_offer=True, **message)
    _expect(link, "kept")


def send_snapshot(
    link: Link, memory: SnapshotMemory, rank: int, step: int, *, is_offer: bool = False,
    **message: Any,
) -> None:  # fmt: skip
    """Send a snapshot behind a message that announces it, once the other side takes it where it is
    an offer. Raises ``KeyError`` where there is none."""
    entry = memory.entry(rank, step)
    descriptor = memory.descriptor(rank, step)
    described = memory.described(rank, step)
    link.send(
        rank=rank, step=step, bytes=entry.num_bytes, sha256=entry.sha256,
        described_bytes=len(described), described_sha256=hashlib.sha256(described).hexdigest(),
        **message,
    )  # fmt: skip
    if is_offer:
        _expect(link, "go")
    link.socket.sendall(described)
    link.send_file(descriptor, entry.num_bytes)


def receive_snapshot(link: Link, memory: SnapshotMemory, announced: dict[str, Any]) -> None:
    """Put what ``send_snapshot`` sends into memory, if it is what was announced.

    Raises:
        ValueError: it is not; nothing of it counts.
    """
    # A few megabytes, held until the file behind them has come.
    described = BytesIO()
    _, digest = link.receive_file(described, announced["described_bytes"])
    if digest != announced["described_sha256"]:
        raise ValueError("what is beside a snapshot has another SHA-256 than was announced")

    def write(file: FileIO) -> tuple[int, str]:
        made = link.receive_file(file, announced["bytes"])
        # The slot has been cleared, and is not committed behind this.
        if made[1] != announced["sha256"]:
            raise ValueError("a snapshot has another SHA-256 than was announced")
        return made

    memory.write(announced["rank"], announced["step"], write, described.getvalue())


def _expect(link: Link, kind: str) -> dict[str, Any]:
    """The next message, which is of a kind; raises ``LinkLost`` with the reason where it is not."""
    answer = link.receive()
    if answer.get("kind") != kind:
        raise LinkLost(str(answer.get("why")))
    return answer


def _check_room(announced: dict[str, Any]) -> None:
    """Raise ``ValueError`` before memory is taken for what does not fit."""
    # The slot that it replaces is not counted as free, which errs on the safe side.
    limits = {"bytes": free_host_memory_bytes(), "described_bytes": DESCRIBED_BYTES}
    for name, limit in limits.items():
        size = announced[name]
        if type(size) is not int or not 0 <= size <= limit:
            raise ValueError(f"a snapshot of {name}={size} was announced; the limit is {limit:,}")


def fetch(
    wanted: Iterable[tuple[int, Address]], step: int, memory_of: dict[int, SnapshotMemory]
) -> None:
    """Get snapshots of a step from other nodes, several at a time; in a process of its own.

    Args:
        wanted: ranks, and who has each.
        memory_of: where to put each rank's.
    Raises:
        OSError, ValueError: one of them cannot be had.
    """

    def get(rank: int, address: Address) -> None:
        link = address.link()
        with link.socket:
            link.send(kind="get", job=address.job, rank=rank, step=step)
            answer = _expect(link, "snapshot")
            if (answer["rank"], answer["step"]) != (rank, step):
                raise LinkLost(f"{address.host} sends another snapshot than was asked for")
            _check_room(answer)
            receive_snapshot(link, memory_of[rank], answer)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Raises what one of them has raised.
        list(pool.map(lambda pair: get(*pair), wanted))

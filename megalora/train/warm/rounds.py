"""Bring snapshots to the neighbour node in the background, in rounds that all ranks agree on.

A node that is lost takes its ranks' newest snapshots along. What the others go on from is a step
that its neighbour has of its ranks, and that they have of their own. So all ranks begin a round at
the same step, and the next one when every rank's replica of the last has been taken
(``Rounds.begin``, one small collective at each step where a round may begin). Nobody waits: while
one replica is on its way, steps go by without a round.

Own slots are four: the last complete round and the one on its way, which are not written over, and
two that take turns as without replicas.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable

from megalora.train.warm.keeper import Address, offer_replica
from megalora.train.warm.memory import SnapshotMemory

SLOTS = 4
REQUEST = struct.Struct("<qq")
"""Rank and step; written at once, so that requests of several ranks do not mix."""
WORD = struct.Struct("<q")
RETRY_S = 1.0
PATIENCE_S = 60.0
"""Seconds without success after which a line says so."""


class Outbox:
    """What ranks and the process that sends (``Sender``) share: requests, and what was taken."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._places = {rank: WORD.size * number for number, rank in enumerate(sorted(ranks))}
        self._taken = mmap.mmap(-1, WORD.size * max(1, len(self._places)))
        # At most one request of each rank is in it, so that writing never waits.
        self.requests, self._to_send = os.pipe()

    def ask(self, rank: int, step: int) -> None:
        """Have a snapshot sent, which is in memory."""
        os.write(self._to_send, REQUEST.pack(rank, step))

    def taken(self, rank: int) -> int:
        """The step of the last replica of a rank that the neighbour has taken, plus 1; 0 before."""
        (word,) = WORD.unpack_from(self._taken, self._places[rank])
        return int(word)

    def take_note(self, rank: int, step: int) -> None:
        WORD.pack_into(self._taken, self._places[rank], step + 1)

    def close(self) -> None:
        os.close(self.requests)
        os.close(self._to_send)
        self._taken.close()


class Rounds:
    """The rounds of one rank."""

    def __init__(
        self, every: int, rank: int, outbox: Outbox, start: int | None,
        any_rank: Callable[[list[bool]], list[bool]],
    ) -> None:  # fmt: skip
        """
        Args:
            every: a round may begin at multiples of this step.
            start: the step that these ranks go on from, of which all nodes have all snapshots; None
                where they begin from the disk, or afresh.
            any_rank: collective: each flag, true where it is on any rank.
        """
        self.every = every
        self.rank = rank
        self.outbox = outbox
        self.complete = start
        """Step of the last round whose replicas have all been taken."""
        self.under_way: int | None = None
        self._any_rank = any_rank

    def begin(self, step: int) -> bool:
        """Whether a round begins at this step: the same on all ranks. Collective where one may."""
        if step % self.every:
            return False
        is_busy = self.under_way is not None and self.outbox.taken(self.rank) != self.under_way + 1
        # One rank alone would keep a step that others write over.
        if self._any_rank([is_busy])[0]:
            return False
        if self.under_way is not None:
            self.complete = self.under_way
        self.under_way = step
        return True

    @property
    def kept(self) -> set[int]:
        """Steps whose snapshots must stay."""
        return {step for step in (self.complete, self.under_way) if step is not None}


class Sender:
    """Sends what ranks ask for to the neighbour's keeper; the work of a process of its own."""

    def __init__(
        self, outbox: Outbox, memory: SnapshotMemory, neighbour: Address, attempt: int,
        silent: Callable[[str], None],
    ) -> None:  # fmt: skip
        """
        Args:
            silent: told once where the neighbour takes nothing for a minute.
        """
        self.outbox = outbox
        self.memory = memory
        self.neighbour = neighbour
        self.attempt = attempt
        self.silent = silent
        self._said = False

    def serve(self) -> None:
        """Until this process is ended."""
        while True:
            # Waits until a rank asks.
            rank, step = REQUEST.unpack(os.read(self.outbox.requests, REQUEST.size))
            threading.Thread(target=self._send_until_taken, args=(rank, step), daemon=True).start()

    def _send_until_taken(self, rank: int, step: int) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        # A rank asks for no other one before this one is taken.
        while True:
            try:
                self._send(rank, step)
                self.outbox.take_note(rank, step)
                return
            # Asked for by ranks of an attempt that has ended: the snapshot is forgotten.
            except KeyError:
                return
            except OSError as error:
                if time.monotonic() > deadline_s and not self._said:
                    self._said = True
                    self.silent(
                        f"no replica has reached {self.neighbour.host} for {PATIENCE_S:.0f} s"
                        f" ({error}); a node that is lost now takes more steps along"
                    )
            time.sleep(RETRY_S)

    def _send(self, rank: int, step: int) -> None:
        link = self.neighbour.link()
        with link.socket:
            job = self.neighbour.job
            offer_replica(link, self.memory, rank, step, job=job, attempt=self.attempt)

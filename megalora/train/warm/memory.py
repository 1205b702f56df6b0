"""Hold the newest snapshots of ranks in memory that outlives them.

The memory is anonymous files (``memfd``) of the parent that forks the ranks: a rank that dies takes
none of it along, and all of it is gone with the parent. Every rank has two slots, which take turns
(four where replicas go to other nodes, see ``rounds.py``):

    file       the rank's part of a training state, as a checkpoint has it (``snapshot.py``)
    described  JSON beside it: what the state belongs to, and which pieces the file has
    entry      step, lengths, SHA-256 of the file, and the commit word, step + 1

The commit word is set to 0 before the first byte of a slot changes, and written behind the last
one. So a slot that a killed rank has left half written has none, and the other slot is whole.
"""

import mmap
import os
import struct
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

ENTRY = struct.Struct("<qqq32s")
"""Step, bytes of the file, bytes of what is beside it, SHA-256 of the file."""
WORD = struct.Struct("<q")
ENTRY_BYTES = 64
"""Room of an entry with its commit word: one line of the processor's cache."""
SLOTS = 2

type Write = Callable[[FileIO], tuple[int, str]]
"""Writes a file from its beginning; returns its bytes and their SHA-256 in hexadecimal digits."""


class Entry(NamedTuple):
    """What a slot holds."""

    step: int
    num_bytes: int
    described_bytes: int
    sha256: str


@dataclass(frozen=True)
class _Slot:
    file: int
    """Descriptor."""
    described: int
    place: int
    """Of its entry."""


class SnapshotMemory:
    """Slots of some ranks. Processes that are forked behind this have the same ones."""

    def __init__(self, ranks: Iterable[int], num_slots: int = SLOTS) -> None:
        numbers = sorted(ranks)
        # Shared with every forked process, and zeros: no slot is committed.
        self._entries = mmap.mmap(-1, max(1, len(numbers)) * num_slots * ENTRY_BYTES)
        self._slots: dict[int, list[_Slot]] = {}
        place = 0
        for rank in numbers:
            slots: list[_Slot] = []
            for _ in range(num_slots):
                name = f"megalora-rank-{rank}"
                slots.append(_Slot(os.memfd_create(name), os.memfd_create(name), place))
                place += ENTRY_BYTES
            self._slots[rank] = slots

    @property
    def ranks(self) -> list[int]:
        return list(self._slots)

    def close(self) -> None:
        """Give the memory back, as far as no forked process holds it."""
        for slots in self._slots.values():
            for slot in slots:
                os.close(slot.file)
                os.close(slot.described)
        self._slots = {}
        self._entries.close()

    def write(
        self, rank: int, step: int, write: Write, described: bytes, kept: Container[int] = ()
    ) -> None:
        """Put a snapshot into the slot of a rank that has no other or the oldest one. Raises
        ``OSError`` where there is no memory for it.

        Args:
            kept: steps whose snapshots are not written over; at least one slot has none of them.
        """
        slot = self._oldest(rank, kept)
        self._commit(slot, 0)
        with open(slot.file, "r+b", buffering=0, closefd=False) as file:
            file.seek(0)
            num_bytes, sha256 = write(file)
            # In place: pages of the snapshot before are used again.
            file.truncate(num_bytes)
        os.ftruncate(slot.described, 0)
        with open(slot.described, "r+b", closefd=False) as file:
            file.seek(0)
            file.write(described)
        entry = (step, num_bytes, len(described), bytes.fromhex(sha256))
        ENTRY.pack_into(self._entries, slot.place, *entry)
        # Behind all else.
        self._commit(slot, step + 1)

    def steps(self, rank: int) -> set[int]:
        """Steps of which there is a whole snapshot of a rank."""
        found: set[int] = set()
        for slot in self._slots.get(rank, ()):
            if (entry := self._entry(slot)) is not None:
                found.add(entry.step)
        return found

    def newest_common(self, ranks: Iterable[int]) -> int | None:
        """The newest step of which there is a snapshot of each of these ranks."""
        common: set[int] | None = None
        for rank in ranks:
            steps = self.steps(rank)
            common = steps if common is None else common & steps
        return max(common) if common else None

    def forget_but(self, step: int | None) -> None:
        """Forget the snapshots of all other steps. What one rank has of a later step must not meet
        what another makes of it after a restart."""
        for slots in self._slots.values():
            for slot in slots:
                entry = self._entry(slot)
                if entry is None or entry.step != step:
                    self._commit(slot, 0)

    def empty(self) -> None:
        """Give the pages back, while others may still have the files open; nobody reads them."""
        self.forget_but(None)
        for slots in self._slots.values():
            for slot in slots:
                os.ftruncate(slot.file, 0)
                os.ftruncate(slot.described, 0)

    def entry(self, rank: int, step: int) -> Entry:
        """Entry of a snapshot that is there."""
        return self._found(rank, step)[1]

    def path(self, rank: int, step: int) -> Path:
        """Where this process and those forked from it open the file of a snapshot."""
        return Path(f"/proc/self/fd/{self._found(rank, step)[0].file}")

    def descriptor(self, rank: int, step: int) -> int:
        """Descriptor of the file of a snapshot, whose place is shared by all who have it."""
        return self._found(rank, step)[0].file

    def described(self, rank: int, step: int) -> bytes:
        """What lies beside the file of a snapshot."""
        slot, entry = self._found(rank, step)
        return os.pread(slot.described, entry.described_bytes, 0)

    def _found(self, rank: int, step: int) -> tuple[_Slot, Entry]:
        for slot in self._slots[rank]:
            entry = self._entry(slot)
            if entry is not None and entry.step == step:
                return slot, entry
        raise KeyError(f"no snapshot of rank {rank} at step {step}")

    def _entry(self, slot: _Slot) -> Entry | None:
        """What a slot holds; None where it is not whole."""
        (word,) = WORD.unpack_from(self._entries, slot.place + ENTRY.size)
        step, num_bytes, described_bytes, digest = ENTRY.unpack_from(self._entries, slot.place)
        if word != step + 1:
            return None
        return Entry(step, num_bytes, described_bytes, digest.hex())

    def _oldest(self, rank: int, kept: Container[int]) -> _Slot:
        """The slot to write to next: one that holds nothing, or the oldest snapshot."""
        steps: list[int] = []
        slots: list[_Slot] = []
        for slot in self._slots[rank]:
            entry = self._entry(slot)
            if entry is None or entry.step not in kept:
                steps.append(-1 if entry is None else entry.step)
                slots.append(slot)
        return slots[steps.index(min(steps))]

    def _commit(self, slot: _Slot, word: int) -> None:
        WORD.pack_into(self._entries, slot.place + ENTRY.size, word)

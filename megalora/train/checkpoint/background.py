"""Write checkpoints in a thread while training goes on."""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from megalora.train.checkpoint.snapshot import Snapshot

REST = 20
"""``checkpoint.every=auto`` begins a save at the earliest after so many times as long as the loop
stood still for the one before."""


class Pace:
    """How often saves may begin where the disk alone decides (``checkpoint.every=auto``)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # So long ago that the first save need not wait.
        self._begun = -math.inf
        self._blocked_s = 0.0

    def begin(self) -> None:
        """The loop stops for a save."""
        self._begun = self._clock()

    def end(self) -> None:
        """The loop goes on."""
        self._blocked_s = self._clock() - self._begun

    @property
    def rests(self) -> bool:
        """Whether it is too early for another one."""
        # From begin to begin: the loop then stands still for at most 1 / 20 of the time.
        return self._clock() - self._begun < REST * self._blocked_s


@dataclass
class Save:
    """A save that has begun."""

    step: int
    write: Callable[[], None]
    snapshot: Snapshot
    error: BaseException | None = None
    done: bool = False


class Background:
    """A thread that writes one save after the other, from two snapshots in turn.

    All ranks begin the same saves in the same order, so that their threads meet in the collectives
    of each.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """``say``: called with lines for the user."""
        self._say = say
        self._free: queue.Queue[Snapshot] = queue.Queue()
        # One is filled while the other is written; each takes as much memory as a rank's file.
        for _ in range(2):
            self._free.put(Snapshot())
        self._work: queue.Queue[Save | None] = queue.Queue()
        self.pending: list[Save] = []
        """Saves that this rank has begun and not yet taken note of the end of."""
        self._thread: threading.Thread | None = None

    def snapshot(self, step: int) -> Snapshot:
        """Host memory for the save of ``step``; waits while both are still being written."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            pass
        begun = time.monotonic()
        snapshot = self._free.get()
        waited = time.monotonic() - begun
        self._say(
            f"step {step}: waited {waited:.1f} s for the save of step {self.pending[0].step}: the"
            " disk is too slow for checkpoint.every"
        )
        return snapshot

    def begin(self, save: Save) -> None:
        """Let the thread write."""
        # Most runs of tests save once: the thread starts when it is needed.
        if self._thread is None:
            # A daemon, which cannot keep a process from ending whose peers are lost.
            self._thread = threading.Thread(target=self._run, name="save", daemon=True)
            self._thread.start()
        self.pending.append(save)
        self._work.put(save)

    def finish(self, timeout_s: float | None = None) -> None:
        """Return when all saves are written, or have failed, or the time is over; begin none
        behind it."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(timeout_s)
            self._thread = None

    def _run(self) -> None:
        while (save := self._work.get()) is not None:
            try:
                save.write()
            # Training hears of it at its next step, whatever it is.
            except BaseException as error:
                save.error = error
            # First the memory, then the word: who sees the word may begin the next save.
            self._free.put(save.snapshot)
            save.done = True

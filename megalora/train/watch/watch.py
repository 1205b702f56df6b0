"""Watch over the ranks of a run under any back end: a thread per rank, a beat in the store.

A collective that waits for a dead or stopped rank blocks the main thread, by default for half an
hour, but not Python's other threads. Each rank's thread writes a beat and reads the verdict; rank
0's also reads all beats and judges, and the others judge rank 0 alone. So a rank makes two
operations in a period, however large the world. The store is in torchrun's agent, so it outlives
rank 0.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megalora.rendezvous import Met
from megalora.train.lost_peer import line
from megalora.train.watch.judge import Beat, Judge, Verdict
from megalora.train.watch.pulse import Pulse
from megalora.train.watch.stacks import STACK, place_of, write_stacks
from megalora.user_error import LOST_PEER


@dataclass(frozen=True)
class Times:
    """Seconds of a watch."""

    period: float = 2.0
    """Between two beats."""
    silent: float = 15.0
    """Without a beat after which a rank is lost."""
    alarmed: float = 5.0
    """The same once a back end has reported an error."""
    store: float = 25.0
    """That the store may take to answer."""


class Watch:
    """The watch of one rank; ``watching`` starts and ends it."""

    def __init__(
        self, store: dist.Store, rank: int, world: int, pulse: Pulse, run: Path, times: Times
    ) -> None:  # fmt: skip
        # A connection of its own: one on which the main thread waits is locked meanwhile.
        own = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.store = dist.PrefixStore("watch", own)
        self.store.set_timeout(timedelta(seconds=times.store))
        self.rank = rank
        self.world = world
        self.pulse = pulse
        self.run = run
        self.times = times
        self.host = os.environ.get("LOCAL_ADDR") or socket.gethostname()
        self.main = threading.get_ident()
        self.closing = threading.Event()
        self.alarm_raised = False
        self.count = 0
        self.answered_s = time.monotonic()
        """When the store answered last."""
        # Rank 0 judges everyone, itself not excluded; everyone else judges rank 0, later than it
        # would judge others, so that one verdict is made.
        patience = 1.0 if rank == 0 else 1.5
        self.judged = list(range(world)) if rank == 0 else [0]
        self.judge = Judge(
            patience * times.silent, patience * times.alarmed, 3 * times.period, sees_all=rank == 0
        )

    def start(self) -> None:
        # Everybody has a beat before anybody reads one.
        self._beat()
        for work in (self._look, self._look_at_store):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def alarm(self) -> None:
        """A back end has reported that a rank is gone: give the watch the time to find out which.
        Ends the process if it does."""
        # torchrun has seen the same death, and tells the ranks of this node to end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.alarm_raised = True
        # Rank 0 may be lost: its judges take longest, and look twice.
        time.sleep(1.5 * self.times.alarmed + 3 * self.times.period)
        # Another thread has a verdict and ends the process.
        if self.closing.is_set():
            threading.Event().wait()

    def close(self) -> None:
        """End in peace: the last beat says that this rank has left."""
        if not self.closing.is_set():
            self.closing.set()
            # Node 0 may have gone already, with the store.
            with contextlib.suppress(RuntimeError):
                self._beat(left=True)

    def _beat(self, *, left: bool = False) -> None:
        place, waits = place_of(self.main)
        pulse = self.pulse
        self.count += 1
        beat = Beat(
            self.count, self.host, pulse.moves, pulse.step, pulse.phase, pulse.limit_s,
            place, waits, left,
        )  # fmt: skip
        self.store.set(str(self.rank), beat.encode())

    def _look(self) -> None:
        """The thread that beats and judges."""
        try:
            while not self.closing.wait(self.times.period):
                self._beat()
                if verdict := self._find_verdict():
                    self._end(verdict)
                self.answered_s = time.monotonic()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            self._end(Verdict([], f"the node of rank 0 no longer answers ({reason[:80]})"))

    def _find_verdict(self) -> Verdict | None:
        """A verdict that was made elsewhere, or here."""
        if self.store.check(["verdict"]):
            return Verdict.decode(self.store.get("verdict"))
        if self.alarm_raised:
            self.store.set("alarm", "")
        if self.judged == [0] or self.store.check([str(rank) for rank in self.judged]):
            beats = self.store.multi_get([str(rank) for rank in self.judged])
            decoded = {
                rank: Beat.decode(beat) for rank, beat in zip(self.judged, beats, strict=True)
            }
            verdict = self.judge.look(
                decoded, time.monotonic(), alarmed=self.store.check(["alarm"])
            )
            if verdict:
                self.store.set("verdict", verdict.encode())
                return verdict
        return None

    def _look_at_store(self) -> None:
        """The thread that ends the run where the other waits for a store that does not answer: of a
        host that is cut off, no error ever comes."""
        looked_s = time.monotonic()
        while not self.closing.wait(self.times.period):
            now_s = time.monotonic()
            # This process was stopped itself, and has not asked meanwhile.
            if now_s - looked_s > 3 * self.times.period:
                self.answered_s += now_s - looked_s
            looked_s = now_s
            if now_s - self.answered_s > self.times.store:
                seconds = f"{now_s - self.answered_s:.0f} s"
                self._end(Verdict([], f"the node of rank 0 has not answered for {seconds}"))

    def _end(self, verdict: Verdict) -> None:
        """End this process, whose main thread waits for another one."""
        # The run has just ended in peace, or another thread ends the process.
        if self.closing.is_set():
            return
        self.closing.set()
        where = self._stacks() if verdict.hangs else ""
        if self._speaks(verdict):
            print(line(self.run, verdict.text + where), file=sys.stderr, flush=True)
        # The store may be in this process: the others read the verdict first.
        if self.rank == 0:
            time.sleep(2 * self.times.period)
        sys.stdout.flush()
        os._exit(LOST_PEER)

    def _speaks(self, verdict: Verdict) -> bool:
        """Whether this is the first rank of its node that can."""
        first = self.rank - int(os.environ.get("LOCAL_RANK", 0))
        silent = {*verdict.lost, *self.judge.late}
        return silent.issuperset(range(first, self.rank))

    def _stacks(self) -> str:
        """Write the stacks; returns words for the line."""
        try:
            write_stacks(self.run, self.rank)
        except OSError as error:
            return f" (its stacks cannot be written: {error.strerror})"
        return f" (stacks in {self.run / STACK.format(rank='*')})"


@contextlib.contextmanager
def watching(
    met: Met, pulse: Pulse, run: Path, times: Times = Times()
) -> Iterator[Callable[[], None]]:
    """Watch over the ranks of the initialised world in the block.

    Yields what is called when a back end reports that a rank is gone; it ends this process if the
    watch finds out which, and returns otherwise.
    """
    # Alone, a rank waits for nobody.
    if dist.get_world_size() == 1:
        yield lambda: None
        return
    watch = Watch(met.store, dist.get_rank(), dist.get_world_size(), pulse, run, times)
    watch.start()
    try:
        yield watch.alarm
    finally:
        watch.close()

"""Watch over the ranks of a run under any back end: a thread per rank, a beat in the store.

A collective that waits for a dead or stopped rank blocks the main thread, by default for half an
hour, but not Python's other threads. Each rank's thread writes a beat and reads the verdict; rank
0's also reads all beats and judges, and the others judge rank 0 alone. So a rank makes a few
operations in a period, however large the world. The store is in torchrun's agent, so it outlives
rank 0.

Silence takes long to tell from a slow network. That a process of this node has ended is seen at
once, in the system's table of processes.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megalora.process_table import born, runs, table_here
from megalora.rendezvous import Met
from megalora.train.lost_peer import line
from megalora.train.watch.judge import Beat, Judge, Verdict, verdict_on_dead
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
        self._table = table_here()
        self._born = born(os.getpid()) or ""
        first = rank - int(os.environ.get("LOCAL_RANK", 0))
        self._neighbours = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        """Ranks of this node."""
        # torchrun holds the store, and ends when all ranks of this node have.
        is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store_outlives = is_agents and len(self._neighbours) == world
        self._processes: dict[int, Beat] = {}
        """A beat of each, once all have written one."""
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
        # A process that has closed its sockets ends within milliseconds.
        deadline_s = time.monotonic() + self.times.period / 2
        # The store may be gone, too, which the other thread reports.
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline_s and not self.closing.is_set():
                if verdict := self._find_dead():
                    self._end(verdict)
                time.sleep(0.02)
        # Rank 0 may be lost: its judges take longest, and look twice.
        time.sleep(1.5 * self.times.alarmed + 3 * self.times.period)
        # Another thread has a verdict and ends the process.
        if self.closing.is_set():
            threading.Event().wait()
        # This rank ends by itself: nobody may take it for the one that was lost first.
        self.close()

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
            place, waits, left, self._table, os.getpid(), self._born,
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
        if verdict := self._find_dead():
            return verdict
        beats = self._beats_of(self.judged)
        if not beats:
            return None
        alarmed = self.store.check(["alarm"])
        verdict = self.judge.look(beats, time.monotonic(), alarmed=alarmed)
        if verdict:
            self.store.set("verdict", verdict.encode())
        return verdict

    def _find_dead(self) -> Verdict | None:
        """A verdict on ranks of this node whose processes have ended without a word."""
        # Once: each has one process for as long as this one lives.
        self._processes = self._processes or self._beats_of(self._neighbours)
        ended: list[int] = []
        for rank, beat in self._processes.items():
            if self._table and beat.table == self._table and not runs(beat.pid, beat.born):
                ended.append(rank)
        # Who leaves says so before its process ends, so its beat is read behind that.
        verdict = verdict_on_dead(self._beats_of(ended)) if ended else None
        if verdict is None:
            return None
        # The first verdict counts: the next to end do so because of it.
        return Verdict.decode(self.store.compare_set("verdict", "", verdict.encode()))

    def _beats_of(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """The last beats of these ranks; none while one of them has not written any."""
        keys = [str(rank) for rank in ranks]
        if not self.store.check(keys):
            return {}
        written = self.store.multi_get(keys)
        return {rank: Beat.decode(beat) for rank, beat in zip(ranks, written, strict=True)}

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
        # The store may end with this process or this node: the others read the verdict first.
        if self.rank == 0 and not self._store_outlives:
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

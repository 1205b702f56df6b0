"""Start a node's ranks by forking, and again from their snapshots when one has failed.

The parent has imported everything, so that a forked rank begins at once. It holds the snapshots
(``memory.py``), uses neither threads nor CUDA, and learns of a rank's end from the system, at once.
Hangs are left to the ranks' own watch (``train/watch``), which ends them.
"""

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megalora.train.warm.memory import SnapshotMemory
from megalora.train.warm.processes import GRACE_S, Children, check_may_fork, fork, fork_helper
from megalora.train.warm.restore import InMemory, as_checkpoint
from megalora.user_error import LOST_PEER, MISTAKE, guarded

STORE = "store"
"""Name of the process that holds the ranks' store, among those of ranks, which are numbers."""

type Work = Callable[[InMemory], None]
"""What each rank does."""


class Parent:
    """Forks the ranks of one node, which is alone."""

    def __init__(self, work: Work, num_ranks: int, max_restarts: int) -> None:
        """
        Args:
            work: called in each rank, whose place is in the environment as torchrun has it.
            max_restarts: how often ranks may start again.
        """
        self.work = work
        self.num_ranks = num_ranks
        self.max_restarts = max_restarts
        self.memory = SnapshotMemory(range(num_ranks))
        self.job = os.urandom(16).hex()
        self._stopped_by = 0
        self._ranks: Children | None = None

    def run(self) -> int:
        """Train; returns the exit code of the launcher."""
        with self._passing_signals():
            for attempt in range(self.max_restarts + 1):
                step = self.memory.newest_common(range(self.num_ranks))
                # Of later steps some ranks have none, and they will be trained again.
                self.memory.forget_but(step)
                ranks = self._attempt(step)
                if self._stopped_by:
                    # The ranks have said where they stopped.
                    return 128 + self._stopped_by
                code = exit_code(ranks)
                if code in (0, MISTAKE) or attempt == self.max_restarts:
                    return code
                self._say_what_failed(ranks, attempt)
        raise AssertionError("the last attempt returns")

    def _attempt(self, step: int | None) -> Children:
        """Let ranks train until all have ended; returns them.

        Args:
            step: of the snapshots to go on from.
        """
        check_may_fork()
        shown = Path(tempfile.mkdtemp(prefix="megalora-snapshots-"))
        try:
            newest = None
            if step is not None:
                memory_of = dict.fromkeys(self.memory.ranks, self.memory)
                newest = as_checkpoint(memory_of, step, self.num_ranks, shown)
            store, port = start_store(self.job)
            try:
                given = InMemory(self.memory, newest)
                self._ranks = Children(self._fork_ranks(given, port))
                # Told while they were forked: the handler did not know them yet.
                if self._stopped_by:
                    self._ranks.signal(signal.SIGTERM)
                self._attend(self._ranks)
                return self._ranks
            finally:
                Children({STORE: store}).end(0)
        finally:
            shutil.rmtree(shown)

    def _fork_ranks(self, given: InMemory, port: int) -> dict[str, int]:
        return fork_ranks(self.work, given, self.num_ranks, ("127.0.0.1", port))

    def _attend(self, ranks: Children) -> None:
        """Wait until all ranks have ended; when one fails, the others are ended, too."""
        while ranks.alive:
            if any(ranks.codes[name] for name in ranks.wait(60.0)):
                # They may be waiting for it, without end.
                ranks.end(GRACE_S)

    def _say_what_failed(self, ranks: Children, attempt: int) -> None:
        step = self.memory.newest_common(range(self.num_ranks))
        where = "the last checkpoint on disk" if step is None else f"step {step} in memory"
        print(
            f"megalora on {socket.gethostname()}: {what_failed(ranks)}; starting all ranks again"
            f" ({attempt + 1} of {self.max_restarts}) from {where}",
            file=sys.stderr,
            flush=True,
        )

    @contextmanager
    def _passing_signals(self) -> Iterator[None]:
        """Tell ranks to stop when this process is told to."""

        def stop(number: int, _: object) -> None:
            self._stopped_by = number
            # Not SIGINT, of which a second one ends a rank that saves: a terminal has sent one.
            if self._ranks is not None:
                self._ranks.signal(signal.SIGTERM)

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def fork_ranks(
    work: Work, given: InMemory, num_ranks: int, store: tuple[str, int],
    node: int = 0, num_nodes: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Fork the ranks of a node; returns their process ids by rank.

    Args:
        num_ranks: of each node.
        store: host and port of the store where all ranks meet.
    """
    pids: dict[str, int] = {}
    for local in range(num_ranks):
        rank = node * num_ranks + local
        place = {
            "RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": num_nodes * num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks, "GROUP_RANK": node,
            "MASTER_ADDR": store[0], "MASTER_PORT": store[1],
            # The store outlives ranks, as torchrun's does.
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }  # fmt: skip
        variables = {name: str(value) for name, value in place.items()}

        def begin(variables: dict[str, str] = variables) -> None:
            os.environ.update(variables)
            guarded(lambda _: work(given), [])

        pids[str(rank)] = fork(begin, f"rank {rank}")
    return pids


def exit_code(ranks: Children) -> int:
    """Exit code of a launcher whose ranks have ended so."""
    codes = set(ranks.codes.values())
    if codes == {0}:
        return 0
    # A rank has said it, and would make it again.
    if MISTAKE in codes:
        return MISTAKE
    return LOST_PEER if LOST_PEER in codes or min(codes) < 0 else 1


def what_failed(ranks: Children) -> str:
    """Which ranks have failed by themselves, in words."""
    said: list[str] = []
    for name, code in ranks.codes.items():
        # The first ones by a signal of ours, the others because of another rank.
        if name in ranks.killed or code in (0, LOST_PEER):
            continue
        how = (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        said.append(f"rank {name} {how}")
    return ", ".join(said) or "ranks have lost contact"


def start_store(job: str) -> tuple[int, int]:
    """Fork a process that holds a store for one attempt; returns its id and the store's port.

    Args:
        job: name that ranks find there; the same in all attempts.
    """
    read, write = os.pipe()

    def hold() -> None:
        os.close(read)
        # A store serves in a thread, which this process alone has.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist.PrefixStore("megalora", store).set("job", job)
        os.write(write, str(store.port).encode())
        # Who waits for the port reads to the end of the pipe.
        os.close(write)
        signal.pause()

    pid = fork_helper(hold, STORE)
    os.close(write)
    with os.fdopen(read) as port:
        answer = port.read()
    return pid, int(answer)

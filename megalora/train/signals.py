"""Stop all ranks at the same step when one is told to: by a scheduler, by torchrun when another
rank failed, or by Ctrl-C."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megalora import host

GRACE_S = 120.0
"""Seconds that a rank that was told to stop may take to its next step before it gives up; three
steps, if they are longer."""


class Stopped(Exception):
    """A run was told to stop in the middle of work that it can leave; raised on every rank."""


@contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Yields a function that says, on every rank alike, whether any rank has been asked to stop;
    call it once a step, and in between where a step may take minutes.

    SIGTERM and the first SIGINT ask; a second SIGINT kills. When another rank has failed, this one
    waits in a collective without end, where no Python signal handler runs: a thread ends the
    process when the next call does not come.
    """
    asked: list[int] = []
    reached = threading.Event()
    step = _Longest()

    def ask(number: int, _: object) -> None:
        asked.append(number)
        # The second Ctrl-C is a KeyboardInterrupt again.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop() -> bool:
        step.tick()
        # One rank's signal stops them all: the maximum over ranks.
        flag = torch.tensor(len(asked), device=host.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item():
            reached.set()
        return reached.is_set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in numbers}
    # Python's C-level handler writes the signal's number into the pipe even while the main thread
    # is inside a collective.
    read, write = os.pipe()
    os.set_blocking(write, False)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, reached, step), daemon=True).start()
    try:
        yield stop
    except RuntimeError:
        # Perhaps of a lost rank, of which torchrun knows, too: its SIGTERM, which ends ranks that
        # do not work any more, must not come before this one has said so.
        del before[signal.SIGTERM]
        raise
    finally:
        # The thread ends: it finds the event set, or the pipe closed.
        reached.set()
        signal.set_wakeup_fd(wakeup)
        os.close(write)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Longest:
    """The longest time between two steps, in seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.seconds = 0.0

    def tick(self) -> None:
        """A step begins."""
        now = time.monotonic()
        self.seconds = max(self.seconds, now - self.last)
        self.last = now


def _watch(read: int, reached: threading.Event, step: _Longest) -> None:
    """Wait for a signal's number in the pipe, then for the loop; end the process when it does not
    come."""
    # Nothing arrives where the pipe is closed instead.
    arrived = os.read(read, 1)
    os.close(read)
    if arrived and not reached.wait(max(GRACE_S, 3 * step.seconds)):
        print(
            "megalora: told to stop, but stuck in a step (has another rank failed?); ending without"
            " saving",
            file=sys.stderr,
        )
        # A normal exit would wait for the main thread, which is stuck.
        os._exit(1)

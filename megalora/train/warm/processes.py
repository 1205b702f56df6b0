"""Fork processes from one that has imported everything, and see how they end.

What is forked has none of its parent's threads, whose locks would stay taken, and cannot use CUDA
if its parent has: so the parent must have neither.
"""

import ctypes
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from megalora import host

DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
SET_NAME = 15
"""PR_SET_NAME."""
GRACE_S = 2.0
"""Seconds that survivors of a rank may take to say what they know. What they hold is whole."""


def check_may_fork() -> None:
    """Raise ``ValueError`` where forked ranks might hang: this process has threads, or CUDA."""
    threads = [path.name for path in Path("/proc/self/task").iterdir()]
    if len(threads) > 1:
        raise ValueError(
            f"ranks cannot be forked: the launcher has {len(threads)} threads, which a library has"
            " started. Set OMP_NUM_THREADS=1, or leave out checkpoint.snapshots"
        )
    if host.uses_gpu():
        raise ValueError(
            "ranks cannot be forked: a library has begun to use CUDA as it was imported. Leave out"
            " checkpoint.snapshots"
        )


def fork(work: Callable[[], None], name: str) -> int:
    """Do ``work`` in a forked process that ends with this one; returns its id.

    Args:
        name: shown by ``ps`` and ``top``, up to 15 letters of it.
    """
    parent = os.getpid()
    # What is in buffers would be written twice.
    sys.stdout.flush()
    sys.stderr.flush()
    # Until the child has handlers of its own: its parent's would keep the signal from it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:
        system = ctypes.CDLL(None)
        system.prctl(SET_NAME, name.encode())
        system.prctl(DIE_WITH_PARENT, signal.SIGKILL)
        # The parent may have died before that was asked for.
        if os.getppid() == parent:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            work()
            code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without what the parent has registered for its own exit.
        os._exit(code)


def fork_helper(work: Callable[[], None], name: str) -> int:
    """``fork`` for a process that is ended by its parent alone: a signal to the whole job must not
    take from ranks what they need while they save."""

    def begin() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        work()

    return fork(begin, name)


def readable(descriptors: Iterable[int], timeout_s: float | None) -> list[int]:
    """Those that become readable within the time, as soon as there are any. Their numbers may be
    larger than ``select`` takes: snapshots have two files each."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    found = poll.poll(None if timeout_s is None else 1000 * timeout_s)
    return [descriptor for descriptor, _ in found]


class Children:
    """Forked processes by name, and the exit codes of those that have ended: as ``subprocess`` has
    them, the negative number of a signal."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.pids = dict(pids)
        self.codes: dict[str, int] = {}
        self.killed: list[str] = []
        """Those that ``end`` has killed."""
        self._watched: dict[int, str] = {}
        for name, pid in self.pids.items():
            # It becomes readable when the process ends.
            self._watched[os.pidfd_open(pid)] = name

    @property
    def alive(self) -> list[str]:
        return [name for name in self.pids if name not in self.codes]

    def descriptors(self) -> list[int]:
        """Each becomes readable when a process ends; ``reap`` then takes note."""
        return list(self._watched)

    def reap(self) -> list[str]:
        """Take note of processes that have ended; returns their names."""
        ended: list[str] = []
        for descriptor, name in list(self._watched.items()):
            pid, status = os.waitpid(self.pids[name], os.WNOHANG)
            if pid:
                self.codes[name] = os.waitstatus_to_exitcode(status)
                del self._watched[descriptor]
                os.close(descriptor)
                ended.append(name)
        return ended

    def wait(self, timeout_s: float) -> list[str]:
        """Names of processes that end within the time, as soon as there is one."""
        readable(self.descriptors(), timeout_s)
        return self.reap()

    def signal(self, number: int) -> None:
        """Send a signal to all that live."""
        for name in self.alive:
            os.kill(self.pids[name], number)

    def end(self, grace_s: float) -> None:
        """Let all end by themselves within the time, and kill those that do not."""
        deadline_s = time.monotonic() + grace_s
        while self.alive and (left_s := deadline_s - time.monotonic()) > 0:
            self.wait(left_s)
        self.killed = self.alive
        # SIGKILL ends a stopped process, too.
        self.signal(signal.SIGKILL)
        while self.alive:
            self.wait(1.0)

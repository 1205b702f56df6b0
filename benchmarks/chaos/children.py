"""Do something in a forked child that may be killed, hang or crash, and see how it ends."""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megalora.process_table import stat_fields

LIMIT_S = 60.0
"""Of processor time that a child may take, and of time that it may sleep without taking any. One
takes less than a second: how long that is on a clock says how busy the machine is."""
PATIENCE = 20
"""Times ``LIMIT_S`` on a clock, after which a child counts as hung whatever it does."""


@dataclass(frozen=True)
class Ended:
    """How a child has ended."""

    seconds: float
    answer: dict[str, Any] = field(default_factory=dict)
    """What the action returned; ``{"refused": line}`` after a ``ValueError``, and
    ``{"crashed": line}`` after any other error."""
    signal: int = 0
    """The signal that ended it."""
    hung: bool = False


def in_child(action: Callable[[], dict[str, Any]], limit_s: float = LIMIT_S) -> Ended:
    """Call ``action`` in a forked child; it returns what JSON can hold."""
    # The child must not finalise what this process has left behind.
    gc.collect()
    begun = time.monotonic()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _answer(action, write)
    # Or reading would wait for this process itself.
    os.close(write)
    hung = not _ends(pid, limit_s)
    if hung:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - begun
    # Nothing, where it was killed before it answered.
    with os.fdopen(read) as answers:
        text = answers.read()
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Ended(seconds, json.loads(text) if text else {}, number, hung)


def _answer(action: Callable[[], dict[str, Any]], write: int) -> None:
    """Call ``action``, write its answer, and end this process."""
    try:
        torch.set_num_threads(1)
        # Lines for the user of a run are not the driver's.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.dup2(null, sys.stderr.fileno())
        try:
            answer = action()
        except ValueError as error:
            answer = {"refused": str(error)}
        except BaseException as error:
            answer = {"crashed": f"{type(error).__name__}: {error}"}
        # A few lines fit into the pipe, so that nobody has to read meanwhile.
        os.write(write, json.dumps(answer).encode()[:60_000])
    finally:
        os._exit(0)


def _ends(pid: int, limit_s: float) -> bool:
    """Whether a child ends in time; its exit code is left to be asked for."""
    begun = time.monotonic()
    moved = begun
    taken = -1.0
    while time.monotonic() < begun + PATIENCE * limit_s:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        state, now_taken = _state(pid)
        # One that could run and is not let has no less to do; so has one whose own child works.
        if now_taken != taken or state == "R":
            moved = time.monotonic()
            taken = now_taken
        if taken > limit_s or time.monotonic() > moved + limit_s:
            return False
        time.sleep(0.002)
    return False


def _state(pid: int) -> tuple[str, float]:
    """State of a process, and the seconds of processor time that it has taken; nothing of one that
    has just ended."""
    fields = stat_fields(pid)
    if not fields:
        return "", 0.0
    # utime and stime: the 14th and 15th of proc(5), whose third is the first here.
    ticks = int(fields[11]) + int(fields[12])
    return fields[0], ticks / os.sysconf("SC_CLK_TCK")

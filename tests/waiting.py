"""Wait for what a thread or a process does, however long that takes."""

import itertools
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

PATIENCE_S = 600.0
"""Only so that a test that would never end fails; no machine is this slow."""


def wait_until(happened: Callable[[], Any]) -> None:
    """Return as soon as ``happened()`` is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def time_is_up_when(
    monkeypatch: pytest.MonkeyPatch,
    happened: Callable[[], Any],
    limit_s: float | None = None,
) -> None:
    """Let a wait with a limit for a process run out as soon as something has happened.

    Args:
        happened: what must happen first, such as that the process has started its children.
        limit_s: the limit to replace; waits with other limits stay as they are. None for all.
    """

    class Popen(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            # To a hundredth: some of a limit has passed before it is waited for.
            if timeout is None or not math.isclose(timeout, limit_s or timeout, rel_tol=0.01):
                return super().wait(timeout)
            # A process that ends by itself meanwhile would be waited for in vain.
            wait_until(lambda: happened() or self.poll() is not None)
            assert self.poll() is None, "it ended before its time was up"
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)


class Clock:
    """A made-up clock in place of a module's ``time``: it stands still until a test advances it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.now_s = 0.0
        # A namespace, not the real module: nobody else's clock may stand still.
        stand_in = SimpleNamespace(monotonic=lambda: self.now_s, sleep=time.sleep, time=time.time)
        monkeypatch.setattr(module, "time", stand_in)


def deadline_passes_when(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, happened: Callable[[], Any]
) -> None:
    """Let every deadline that a module takes from ``time.monotonic`` pass soon after ``happened()``
    is true, and none before."""

    leaps = itertools.count()

    def monotonic() -> float:
        if not happened():
            return 0.0
        # Each look leaps ahead, for a deadline may be set after it has happened.
        return 1e9 * next(leaps)

    stand_in = SimpleNamespace(monotonic=monotonic, sleep=time.sleep, time=time.time)
    monkeypatch.setattr(module, "time", stand_in)


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie has ended, though nobody has asked for its exit code yet."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def said_by(path: Path) -> Callable[[], str]:
    """A call that returns what a program has written into a file so far, nothing before it has."""

    def said() -> str:
        if not path.is_file():
            return ""
        return path.read_text().strip()

    return said

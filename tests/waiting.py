"""Wait for what a thread or a process does, however long that takes."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 600.0
"""Only so that a test that would never end fails; no machine is this slow."""


def wait_until(happened: Callable[[], Any]) -> None:
    """Return as soon as ``happened()`` is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)

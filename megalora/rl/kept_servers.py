"""Start servers of a run again that end by themselves, while the run goes on.

Nothing else is needed: a server that was started again has none of the run's versions, and whoever
asks it next brings them back and has them proved (``serve/live/publisher.py``).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from megalora.serve.errors import ServerError
from megalora.serve.server import Server
from megalora.thread_work import in_thread

STARTS = 3
WITHIN_S = 3600.0
"""A server is started again so many times within so many seconds: one that ends again and again
has a reason, which another start does not remove."""
LOOK_S = 1.0
"""Seconds between two looks."""


@contextmanager
def keep_running(servers: Sequence[Server], say: Callable[[str], None]) -> Iterator[None]:
    """Keep started servers running inside the block; whoever has started them stops them behind it.

    Args:
        say: called with a line when a server is started again or given up, by any thread.
    """
    ending = threading.Event()
    kept = []
    for server in servers:
        kept.append((server, in_thread(partial(_keep, server, say, ending), "servers")))
    try:
        yield
    finally:
        ending.set()
        for server, over in kept:
            # One that is being started ends as soon as its process is gone.
            while not over.done():
                server.stop()
                time.sleep(0.05)
            # Nobody else would hear of what went wrong in its thread.
            over.result()


def _keep(server: Server, say: Callable[[str], None], ending: threading.Event) -> None:
    starts: list[float] = []
    # Why it has to be started again; empty while it runs.
    reason = ""
    while not ending.wait(LOOK_S):
        code = server.ended()
        if code is not None:
            reason = f"ended with exit code {code}"
        if not reason:
            continue
        now = time.monotonic()
        starts = [start for start in starts if now - start < WITHIN_S]
        if len(starts) == STARTS:
            say(f"rl: {server.url} {reason}; it is not started again after {STARTS} times")
            return
        starts.append(now)
        # Engine and workers may be left, with the memory that the next ones need.
        server.stop()
        say(
            f"rl: {server.url} {reason}; it is started again ({len(starts)} of {STARTS} times), its"
            f" log is kept in {_keep_log(server)}"
        )
        reason = _start(server)
        if not reason:
            say(f"rl: {server.url} is ready again after {time.monotonic() - now:.0f} s")


def _start(server: Server) -> str:
    """Start it; returns why that failed, or nothing."""
    try:
        server.start()
    except ServerError as error:
        return f"did not start: {error}"
    return ""


def _keep_log(server: Server) -> Path:
    """Rename the log, which the next start would overwrite; returns its new place."""
    assert server.log is not None
    log = server.log
    for number in count(1):
        place = log.with_name(f"{log.stem}-ended-{number}{log.suffix}")
        if not place.exists():
            return log.rename(place)
    raise AssertionError("there is always another number")

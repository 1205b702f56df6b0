"""Explain in one line that a rank has lost contact with another; the back end's own error names
sockets only."""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megalora.adapters.latest import read_latest
from megalora.user_error import LOST_PEER

_SIGNS = re.compile(
    r"Timed out waiting .*|Connection (closed|reset) by peer.*|Broken pipe.*|No route to host.*|"
    r"Network is unreachable.*|[Ww]ait timeout.*|remote process exited.*|"
    r"Watchdog caught collective operation timeout|NCCL communicator was aborted"
)
"""What gloo, the store and nccl say when a peer no longer answers."""


@contextlib.contextmanager
def explained(run: Path, alarm: Callable[[], None] | None = None) -> Iterator[None]:
    """Turn a back end's error about a lost peer into a line and exit code 3; every other error
    passes.

    The process ends at once, because leaving the process group would wait for the lost rank.

    Args:
        alarm: asks the watch which rank it is, and returns only if the watch does not know.
    """
    try:
        yield
    except RuntimeError as error:
        sign = _SIGNS.search(str(error))
        if not sign:
            raise
        if alarm is not None:
            alarm()
        print(
            line(
                run,
                f"lost contact with another rank ({sign[0].rstrip(' .')}). Its host or the network"
                " between them is down, or it failed and says why itself",
            ),
            file=sys.stderr,
            flush=True,
        )
        # os._exit flushes nothing.
        sys.stdout.flush()
        os._exit(LOST_PEER)


def line(run: Path, reason: str) -> str:
    """What a rank says when the loss of another one ends its run."""
    rank = os.environ.get("RANK", "0")
    here = os.environ.get("LOCAL_ADDR") or socket.gethostname()
    try:
        latest = read_latest(run)
        saved = f"the last checkpoint is {latest}" if latest else "nothing was saved"
    # A damaged file must not hide why the run ends.
    except ValueError as error:
        saved = str(error)
    return (
        f"megalora (rank {rank} on {here}): {reason}. This run ends; {saved}. Start it again on"
        " every host with checkpoint.resume=true."
    )

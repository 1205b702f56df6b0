"""A rank that no longer hears from another says so in one line; the back end only shows its own
sockets."""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from megalora.train.checkpoint.writer import read_latest
from megalora.user_error import LOST_PEER

_SIGNS = re.compile(
    r"Timed out waiting .*|Connection (closed|reset) by peer.*|Broken pipe.*|No route to host.*|"
    r"Network is unreachable.*|[Ww]ait timeout.*|remote process exited.*|"
    r"Watchdog caught collective operation timeout|NCCL communicator was aborted"
)
"""How gloo, the store and nccl put it that nothing more comes from a peer."""


@contextlib.contextmanager
def explained(run: Path) -> Iterator[None]:
    """Turn a back end's error about a lost peer into a line and exit code 3; every other error
    passes.

    The process ends here and now: leaving the process group would wait for the rank that is gone.
    """
    try:
        yield
    except RuntimeError as error:
        sign = _SIGNS.search(str(error))
        if not sign:
            raise
        print(_line(run, sign[0].rstrip(" .")), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(LOST_PEER)


def _line(run: Path, sign: str) -> str:
    rank = os.environ.get("RANK", "0")
    here = os.environ.get("LOCAL_ADDR") or socket.gethostname()
    try:
        latest = read_latest(run)
        saved = f"the last checkpoint is {latest}" if latest else "nothing was saved"
    except ValueError as error:
        saved = str(error)
    return (
        f"megalora (rank {rank} on {here}): lost contact with another rank ({sign}). Its host or"
        f" the network between is down, or it failed and says why itself. This run ends; {saved}."
        " When all hosts are back, start it again on each with checkpoint.resume=true."
    )

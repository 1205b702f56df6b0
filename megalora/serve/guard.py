"""Run a command, and end it when its owner is gone.

    python guard.py GRACE_S COMMAND...

Standard input is a pipe from the owner, which the system closes whichever way the owner ends. An
owner that is killed cannot clean up, and a vLLM without one would keep its memory, a GPU's too,
until somebody finds it. Standard library only; started as a file, so that importing it takes
nothing.
"""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable


def main(grace_s: float, command: list[str]) -> int:
    """Run the command; returns its exit code, or 128 + N where signal N ended it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end(*_: object) -> None:
        process.terminate()
        # A daemon: once the command has ended, nobody waits for the timer.
        timer = threading.Timer(grace_s, process.kill)
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    orphaned = threading.Event()
    threading.Thread(target=_watch_the_owner, args=[orphaned, end], daemon=True).start()
    code = process.wait()
    if orphaned.is_set() and os.getpgrp() == os.getpid():
        # Whatever the command has started and left; this process with it. Only if the group is
        # ours: otherwise it is that of the shell that started us.
        os.killpg(0, signal.SIGKILL)
    # Popen has -N for signal N.
    return code if code >= 0 else 128 - code


def _watch_the_owner(orphaned: threading.Event, end: Callable[[], None]) -> None:
    # Nobody writes into the pipe, so that readable means closed.
    select.select([sys.stdin], [], [])
    orphaned.set()
    end()


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))

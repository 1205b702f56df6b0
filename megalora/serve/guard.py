"""Runs a command and ends it when its owner is gone: ``python guard.py GRACE_S COMMAND...``, with a
pipe from the owner as standard input.

An owner that is killed cannot clean up, and a vLLM without one would keep its memory, a GPU's too,
until somebody finds it. The system closes the pipe whichever way the owner ends. Standard library
only; started as a file, so that importing it takes nothing.
"""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable


def main(grace_s: float, command: list[str]) -> int:
    """The command's exit code, 128 + N where signal N ended it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end(*_: object) -> None:
        process.terminate()
        timer = threading.Timer(grace_s, process.kill)
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    orphaned = threading.Event()
    threading.Thread(target=_watch_the_owner, args=[orphaned, end], daemon=True).start()
    code = process.wait()
    if orphaned.is_set() and os.getpgrp() == os.getpid():
        # whatever the command has started and left; this process with it
        os.killpg(0, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _watch_the_owner(orphaned: threading.Event, end: Callable[[], None]) -> None:
    select.select([sys.stdin], [], [])  # nobody writes: readable means closed
    orphaned.set()
    end()


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))

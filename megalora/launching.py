"""Run torchrun without its tracebacks where a line says it all.

    python -m megalora.launching ARGUMENTS

torchrun ends a job that was told to stop, or in which a rank has failed, with a traceback of its
own below whatever the ranks have said.
"""

import logging
import os
import signal
import sys

from megalora.user_error import LOST_PEER, MISTAKE, guarded


def ranks_here(nproc: int) -> list[str]:
    """torchrun's arguments for so many ranks on this machine alone.

    They get one thread each unless the user has said otherwise, as torchrun itself does, with a
    warning, for several.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return ["--standalone", "--nproc-per-node", str(nproc)]


def torchrun(arguments: list[str]) -> None:
    """Run torchrun in this process.

    Raises:
        SystemExit: 128 plus the signal's number after a signal, such as 130 after Ctrl-C: the ranks
            have said where they stopped. 2 after a user's mistake and 3 after a lost rank, which
            the ranks have reported.
        ChildFailedError: a rank has crashed; torchrun's report names it.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # These log a failure before it is raised.
    for name in (
        "torch.distributed.elastic.multiprocessing.api",
        "torch.distributed.elastic.agent.server.api",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.main(arguments)
    except SignalException as stopped:
        # An impatient second Ctrl-C must not spoil the exit.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        # The others failed because of it.
        _, first = error.get_first_failure()
        if first.exitcode in (MISTAKE, LOST_PEER):
            sys.exit(first.exitcode)
        # A rank was killed, and another one has said which.
        if any(failure.exitcode == LOST_PEER for failure in error.failures.values()):
            sys.exit(LOST_PEER)
        raise


if __name__ == "__main__":
    guarded(torchrun, sys.argv[1:])

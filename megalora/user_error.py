"""Turn a user's mistake, and Ctrl-C, into one line and an exit code."""

import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from megalora.wording import printable

MISTAKE = 2
"""Exit code of a user's mistake, argparse's too."""
LOST_PEER = 3
"""Exit code of a run that another host's loss has ended."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended, as shells have it."""
PATIENCE_S = 30
"""Seconds that the other ranks wait for rank 0 to speak."""


def guarded(action: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run ``action``; a ``ValueError`` is the user's to correct, so one rank shows it without a
    traceback.

    What is wrong for one rank is nearly always wrong for all. When the first rank ends, torchrun
    ends the others, so these wait for rank 0 to speak; if it does not, something is wrong on this
    machine alone, and the rank here reports it.
    """
    rank = int(os.environ.get("RANK", 0))
    # The message was shown in an earlier attempt.
    if _mistaken_before():
        sys.exit(MISTAKE)
    try:
        action(arguments)
    except ValueError as error:
        if os.environ.get("MEGALORA_TRACEBACK"):
            raise
        who = "megalora"
        if rank:
            # torchrun ends this rank meanwhile if rank 0 has the same mistake to report.
            time.sleep(PATIENCE_S)
            who = f"megalora (rank {rank})"
        # It may name what a file or a server says.
        print(printable(f"{who}: {error}{_whose(error)}"), file=sys.stderr)
        _leave_mark()
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        if os.environ.get("MEGALORA_TRACEBACK"):
            raise
        if rank == 0:
            print("megalora: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _whose(error: ValueError) -> str:
    """A hint where the error was raised in a library: it may not be the user's."""
    frame = error.__traceback__
    if frame is None:
        return ""
    # The innermost frame is the one that raised.
    while frame.tb_next is not None:
        frame = frame.tb_next
    where = Path(frame.tb_frame.f_code.co_filename)
    # An installed megalora lies among the libraries.
    is_ours = where.is_relative_to(Path(__file__).parent)
    if is_ours or not where.is_relative_to(sysconfig.get_path("purelib")):
        return ""
    return "\n  (raised in a library; MEGALORA_TRACEBACK=1 shows where)"


# torchrun starts ranks again after any failure (--max-restarts), a mistake of the user's too, which
# would only be made again. It gives each rank a file for its error, attempt_N/LOCAL_RANK/error.json
# in one folder: a mark beside it tells later attempts.


def _mark() -> Path | None:
    """The file by which this rank records, in this attempt, that it met a mistake; None without
    torchrun."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).with_name("mistake") if error_file else None


def _leave_mark() -> None:
    mark = _mark()
    if mark:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mistaken_before() -> bool:
    """Whether a rank of this node has reported a mistake in an earlier attempt."""
    mark = _mark()
    if mark is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    return any(mark.parents[2].glob("attempt_*/*/mistake"))

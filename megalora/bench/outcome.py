"""Summarise what the ranks of a failed run wrote as a status of one line."""

import re

_REFUSED = re.compile(r"^megalora(?: \(rank \d+\))?: (.*)$", re.MULTILINE)
"""A user's mistake, as ``user_error.guarded`` prints a ``ValueError``."""
_NO_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|Cuda failure \d+ 'out of"
    r" memory'"
    r"|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory"
)
_KILLED = re.compile(r"exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)")
"""torchrun's report of a rank that the system killed: Linux kills the largest process when memory
runs out."""
_ERROR = re.compile(
    r"^(?:\[rank\d+\]:)?\s*((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Signal)(?:: .*)?)$",
    re.MULTILINE,
)
_ECHO = re.compile(
    r"ChildFailedError|DistBackendError|DistNetworkError|DistStoreError|Connection"
    r" (?:closed|reset)|ncclRemoteError|gloo",
    re.IGNORECASE,
)
"""Errors that follow from another rank's end: of ranks that communicate with it, and of torchrun.
"""


def status_of(log: str) -> str:
    """``refused: ...``, ``out of memory`` or ``failed: ...``, of a run that ended with another exit
    code than 0.

    Args:
        log: all that its ranks and torchrun wrote, of all nodes.
    """
    found = _REFUSED.search(log)
    if found:
        return f"refused: {found[1].strip()}"
    if _NO_MEMORY.search(log) or _KILLED.search(log):
        return "out of memory"
    errors: list[str] = _ERROR.findall(log)
    # The cause is an error that no other rank's end explains; the last one is the outermost.
    own = [error for error in errors if not _ECHO.search(error)]
    if own or errors:
        return f"failed: {(own or errors)[-1].strip()}"
    # No Python error at all, as when a signal ends a process.
    lines = log.strip().splitlines()
    return f"failed: {lines[-1].strip() if lines else 'the log is empty'}"

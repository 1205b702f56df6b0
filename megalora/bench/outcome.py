"""From what the ranks of a run said before they ended to a status of one line."""

import re

_REFUSED = re.compile(r"^megalora(?: \(rank \d+\))?: (.*)$", re.MULTILINE)
"""As ``user_error.guarded`` says a ``ValueError``."""
_NO_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|Cuda failure \d+ 'out of"
    r" memory'"
    r"|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory"
)
_KILLED = re.compile(r"exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)")
"""By torchrun: a rank the system killed, which it does to the largest process when memory runs
out."""
_ERROR = re.compile(
    r"^(?:\[rank\d+\]:)?\s*((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Signal)(?:: .*)?)$",
    re.MULTILINE,
)
_ECHO = re.compile(
    r"ChildFailedError|DistBackendError|DistNetworkError|DistStoreError|Connection"
    r" (?:closed|reset)|ncclRemoteError|gloo",
    re.IGNORECASE,
)
"""What ranks say when another one has ended, and torchrun when any has."""


def status_of(log: str) -> str:
    """``refused: ...``, ``out of memory`` or ``failed: ...``, of a run that ended with another exit
    code than 0.

    Args:
        log: all that its ranks and torchrun wrote, of all nodes.
    """
    if found := _REFUSED.search(log):
        return f"refused: {found[1].strip()}"
    if _NO_MEMORY.search(log) or _KILLED.search(log):
        return "out of memory"
    errors = [match.strip() for match in _ERROR.findall(log)]
    own = [error for error in errors if not _ECHO.search(error)]
    if own or errors:
        return f"failed: {(own or errors)[-1]}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"failed: {lines[-1] if lines else 'nothing was said'}"

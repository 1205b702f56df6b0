"""Tell whether a process that somebody has named still runs."""

import os
import socket
from pathlib import Path

ENDED = ("Z", "X")
"""States of a process that has ended, though its parent has not asked for its exit code yet."""


def born(pid: int) -> str | None:
    """When a process of this host started, in ticks since the system did; None when it is not
    there. Process ids are used again, and this is not."""
    fields = stat_fields(pid)
    return fields[19] if fields else None


def runs(pid: int, since: str) -> bool:
    """Whether the process that started at ``since``, as ``born`` says, has not ended."""
    fields = stat_fields(pid)
    return bool(fields) and fields[19] == since and fields[0] not in ENDED


def table_here() -> str:
    """Name of the table that has this process, since containers of one host have their own; empty
    on systems without /proc."""
    link = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{os.readlink(link)}" if link.exists() else ""


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third, the state, on; empty where there is no process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # They count from 3 behind the command's name, which may hold spaces and parentheses. The 22nd
    # is starttime.
    return stat.rpartition(")")[2].split()

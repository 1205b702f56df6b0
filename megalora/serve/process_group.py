"""Say which processes of a group are still alive, and wait until none is. Reads Linux's /proc."""

import time
from pathlib import Path

POLL_S = 0.02


def living_processes(group: int) -> list[int]:
    """Pids of a group's processes that still hold memory, sockets or GPUs.

    A process that has ended stays in the table, as a zombie, until its parent has asked for its
    exit code. It holds nothing, and an init that never asks must not be waited for.
    """
    living = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text()
        except OSError:
            # It has ended since the folder was listed.
            continue
        # proc_pid_stat(5): PID (NAME) STATE PPID PGRP ... NUM_THREADS; NAME may hold anything.
        fields = text.rpartition(")")[2].split()
        state = fields[0]
        # A leader may be a zombie whose other threads are not gone, and files close with the last.
        has_ended = state in "ZX" and int(fields[17]) <= 1
        if int(fields[2]) == group and not has_ended:
            living.append(int(folder.name))
    return living


def wait_until_ended(group: int, limit_s: float) -> list[int]:
    """Wait until no process of a group is alive; returns those that are after ``limit_s``.

    SIGKILL is not the end of a process. The kernel frees its memory first, which takes seconds for
    gigabytes, and closes its sockets after that: until then its port is in use.
    """
    deadline = time.monotonic() + limit_s
    while True:
        living = living_processes(group)
        if not living or time.monotonic() >= deadline:
            return living
        time.sleep(POLL_S)

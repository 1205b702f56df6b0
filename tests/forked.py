"""Run jobs in forked processes of a parent that has imported everything, a few at once; each may
fork ranks of its own."""

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch


def fork(work: Callable[[], None]) -> int:
    """Do ``work`` in a forked process, which ends with 0, 1 after an error, or the code that it
    asks for; returns its id."""
    # A child must not finalise what its parent has left behind, and gloo's threads do not survive a
    # fork: no group of this process may be left over.
    gc.collect()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        finally:
            os._exit(code)
    return pid


def speak_into(log: Path) -> None:
    """Have all that this forked process says behind the end of a file."""
    said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    # Those of a test that is captured lead elsewhere.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def forked[K](
    jobs: Iterable[tuple[K, Callable[..., None], tuple[Any, ...]]], at_once: int
) -> Iterator[tuple[K, float, int]]:
    """Run ``(key, function, arguments)``; yields (key, seconds, exit code) as they end. What a job
    finds, it writes to a file."""
    context = multiprocessing.get_context("fork")
    waiting = iter(jobs)
    running = []
    more = True
    while more or running:
        while more and len(running) < at_once:
            job = next(waiting, None)
            if more := job is not None:
                key, function, arguments = job
                process = context.Process(target=_on_one_thread, args=(function, arguments))
                # A child must not finalise what its parent has left behind; see run_ranks.
                gc.collect()
                process.start()
                running.append((key, process, time.perf_counter()))
        time.sleep(0.1)
        # A copy, because entries are removed.
        for entry in list(running):
            key, process, start = entry
            if process.is_alive():
                continue
            running.remove(entry)
            yield key, time.perf_counter() - start, int(process.exitcode or 0)


def _on_one_thread(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # A forked process has none of its parent's threads, and would wait for them.
    torch.set_num_threads(1)
    function(*arguments)

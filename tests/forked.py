"""Run jobs in forked processes of a parent that has imported everything, a few at once; each may
fork ranks of its own."""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


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

"""Fork a launcher from the tests' process, which has imported everything, and see how it ends."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megalora.train.__main__ import begin
from megalora.train.on_ranks import on_ranks
from megalora.train.warm.memory import SnapshotMemory
from megalora.train.warm.node import NodeParent
from megalora.train.warm.parent import Parent
from megalora.train.warm.restore import InMemory
from megalora.train.warm.together import Together
from megalora.user_error import guarded
from tests.forked import fork, speak_into

LIMIT_S = 120.0
"""A launcher takes a few seconds of an idle machine."""


def launcher(work: Callable[[InMemory], None], ranks: int, restarts: int, log: Path) -> int:
    """Fork a parent of ranks that do this; returns its process id."""

    def lead() -> None:
        speak_into(log)
        torch.set_num_threads(1)
        sys.exit(Parent(work, ranks, restarts).run())

    return fork(lead)


def exit_code_of(pid: int) -> int:
    """Exit code of a forked process, once it has ended; an assertion fails where it does not."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError(f"the launcher did not end within {LIMIT_S:.0f} s")


type Then = Callable[[int, int, InMemory], None]


def working(folder: Path, then: Then) -> Callable[[InMemory], None]:
    """Ranks that note that they have begun, and then do something by (rank, attempt)."""

    def work(given: InMemory) -> None:
        rank = int(os.environ["RANK"])
        attempt = len(list(folder.glob(f"{rank}.*")))
        (folder / f"{rank}.{attempt}").touch()
        then(rank, attempt, given)

    return work


def training(arguments: list[str]) -> Callable[[InMemory], None]:
    """What ``megalora train`` has each rank do."""
    return lambda given: on_ranks(arguments, "megalora.train", begin, given)


def put(memory: SnapshotMemory, rank: int, step: int, content: bytes, described: bytes) -> None:
    """Put a snapshot of made-up content into a rank's older slot."""
    import hashlib

    def write(file) -> tuple[int, str]:
        file.write(content)
        return len(content), hashlib.sha256(content).hexdigest()

    memory.write(rank, step, write, described)


TOKEN = b"a token of these tests"


def node(
    work: Callable[[InMemory], None], port: int, log: Path, *, num_nodes: int = 2, ranks: int = 1,
    restarts: int = 3, replicate: int = 1, wait_s: float = 60.0, token: bytes = TOKEN,
    started: dict[str, Any] | None = None,
) -> int:  # fmt: skip
    """Fork the parent of one of several "nodes", all of them on this machine; returns its process
    id."""

    def lead() -> None:
        speak_into(log)
        torch.set_num_threads(1)
        os.environ["LOCAL_ADDR"] = log.stem
        together = Together(
            num_nodes, "127.0.0.1", port, token, wait_s, replicate, started or {"nodes": num_nodes}
        )
        guarded(lambda _: sys.exit(NodeParent(work, ranks, restarts, together).run()), [])

    return fork(lead)


def wait_for_words(log: Path, words: str) -> None:
    """Return once a log has these words; an assertion shows it where they do not come."""
    deadline = time.monotonic() + LIMIT_S
    while words not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, f"{words!r} is not in {log}:\n{log.read_text()}"
        time.sleep(0.02)

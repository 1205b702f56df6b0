"""Parents of several "nodes" on this machine: they meet, start their ranks again together from the
newest step that all have, and a spare takes the place of a node that is killed."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalora.adapters.files import STATE
from megalora.adapters.state_index import rank_file
from megalora.serve.server import free_port
from megalora.train.saver import Progress, Saver
from megalora.train.warm import node as node_module
from megalora.train.warm.meeting import newest_common
from megalora.train.warm.restore import InMemory
from tests.train.warm.scenes import (
    exit_code_of,
    node,
    put,
    wait_for_words,
    working,
)


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of these tests have nothing to say when another one is lost."""
    monkeypatch.setattr(node_module, "GRACE_S", 0.1)


def hold(given: InMemory, rank: int, step: int, *, sent: bool) -> None:
    """Put a made-up snapshot into memory, and have the neighbour take a replica."""
    described = {"rank": rank, "step": step, "state": {"step": step}, "tensors": {}}
    content = bytes([rank, step]) * 1000
    put(given.memory, rank, step, content, json.dumps(described).encode())
    if sent:
        assert given.outbox is not None
        given.outbox.ask(rank, step)
        while given.outbox.taken(rank) != step + 1:
            time.sleep(0.005)


def found_by(given: InMemory, world: int) -> str:
    """The step that a rank is given to go on from, and whose snapshots it is made of."""
    if given.newest is None:
        return "nothing"
    parts: list[str] = []
    for rank in range(world):
        content = (given.newest / STATE / rank_file(rank)).read_bytes()
        assert content == content[:2] * 1000
        parts.append(f"{content[0]}@{content[1]}")
    return f"{given.newest.name} {' '.join(parts)}"


def test_the_newest_step_that_every_rank_has_somewhere() -> None:
    first = {0: [4, 6, 7], 1: [4, 5], 3: [2, 4]}
    second = {2: [4, 6, 7, 8], 3: [5, 6, 7], 0: [2, 4], 1: [6, 7]}
    assert newest_common([first, second], 4) == 7
    # The second node is lost with rank 2; of rank 3 there are replicas.
    assert newest_common([first], 4) is None
    # A rank that is a step ahead of another.
    assert newest_common([{0: [3, 4]}, {1: [4, 5]}], 2) == 4


def test_a_rank_then_a_node_is_lost_and_a_spare_goes_on(tmp_path: Path) -> None:
    def then(rank: int, attempt: int, given: InMemory) -> None:
        (tmp_path / f"found.{rank}.{attempt}").write_text(found_by(given, 2))
        if attempt == 0:
            for step in (3, 4, 5)[: 2 + rank]:
                hold(given, rank, step, sent=step < 5)
            if rank == 0:
                time.sleep(600)
            while given.memory.steps(1) != {3, 4, 5} or not (tmp_path / "spare is there").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 1:
            hold(given, rank, 5, sent=True)
            # Without a replica.
            hold(given, rank, 6, sent=False)
            (tmp_path / f"{rank} has step 6").touch()
            time.sleep(600)

    port = free_port("127.0.0.1")
    work = working(tmp_path, then)
    logs = [tmp_path / f"node-{letter}" for letter in "abc"]
    first = node(work, port, logs[0])
    wait_for_words(logs[0], "this is node 0 of 2")
    second = node(work, port, logs[1])
    wait_for_words(logs[1], "this is node 1 of 2")
    spare = node(work, port, logs[2])
    wait_for_words(logs[2], "waits as a spare")
    (tmp_path / "spare is there").touch()
    while len(list(tmp_path.glob("* has step 6"))) < 2:
        time.sleep(0.01)
    os.kill(second, signal.SIGKILL)
    assert exit_code_of(second) == -signal.SIGKILL
    said = "\n".join(log.read_text() for log in logs)
    assert [exit_code_of(first), exit_code_of(spare)] == [0, 0], said
    for rank in (0, 1):
        found = [(tmp_path / f"found.{rank}.{attempt}").read_text() for attempt in range(3)]
        assert found == ["nothing", "step_000004 0@4 1@4", "step_000005 0@5 1@5"]


def end_of(pids: list[int], logs: list[Path]) -> tuple[list[int], str]:
    """Exit codes of all nodes, and what they have said."""
    codes = [exit_code_of(pid) for pid in pids]
    return codes, "\n".join(log.read_text() for log in logs)


def test_a_node_that_is_not_of_this_run_is_told_why(tmp_path: Path) -> None:
    """And where no node comes for a free place, all end."""
    work = working(tmp_path, lambda *_: None)
    port = free_port("127.0.0.1")
    logs = [tmp_path / name for name in ("first", "other", "stranger", "nobody", "alone")]
    first = node(work, port, logs[0], started={"train.lr": 1, "--nproc": 1})
    wait_for_words(logs[0], "this is node 0 of 2")
    other = node(work, port, logs[1], started={"train.lr": 2, "--nproc": 1})
    stranger = node(work, port, logs[2], token=b"another token than")
    # Taken, so that no meeting can be held there, and nobody listens.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        elsewhere = taken.getsockname()[1]
        nobody = node(work, elsewhere, logs[3], wait_s=0.2)
        alone = node(work, free_port("127.0.0.1"), logs[4], wait_s=0.5)
        codes, said = end_of([other, stranger, nobody, alone], logs)
    assert codes == [2, 2, 2, 3], said
    # Told to stop while it waits.
    os.kill(first, signal.SIGTERM)
    assert exit_code_of(first) == 128 + signal.SIGTERM
    assert "started otherwise than the first one: train.lr is 2 here and 1 there" in said
    assert f"127.0.0.1:{port} refuses this node" in said and "give all nodes the same token" in said
    assert f"no node answers at 127.0.0.1:{elsewhere} within 0.2 s" in said
    assert "no node came for place 1 within 0.5 s. Start again" in said
    assert not list(tmp_path.glob("0.*"))


def test_a_mistake_or_a_restart_too_many_ends_all(tmp_path: Path) -> None:
    for code, expected, attempts in ((2, 2, 1), (1, 1, 2)):
        folder = tmp_path / str(code)
        folder.mkdir()

        def then(rank: int, attempt: int, given: InMemory, code: int = code) -> None:
            if rank == 1:
                raise SystemExit(code)
            time.sleep(600)

        port = free_port("127.0.0.1")
        logs = [folder / "log-a", folder / "log-b"]
        pids = [node(working(folder, then), port, log, restarts=1) for log in logs]
        codes, said = end_of(pids, logs)
        assert codes == [expected, expected], said
        assert len(list(folder.glob("1.*"))) == attempts
        assert f"rank 1 ended with code {code} on log-" in said


def test_snapshots_are_settled_before_a_collective() -> None:
    """Else a snapshot is copied over while it is written, and what could not be held is silent."""
    told: list[str] = []
    snapshots = SimpleNamespace(settle=lambda: told.append("settled"))
    saver = SimpleNamespace(snapshots=snapshots, background=SimpleNamespace(pending=[]))
    Saver.take_note(saver, Progress(start=0, step=1, saved=None))  # type: ignore[arg-type]
    assert told == ["settled"]

"""Replicas at the neighbour node: what is torn, too large, of a stranger, of an attempt that has
ended or of another node's ranks never counts, and what a round needs is not written over."""

import dataclasses
import hashlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from megalora.train.warm.keeper import Address, Attempt, Keeper, fetch, offer_replica
from megalora.train.warm.link import LENGTH, LinkLost, connected
from megalora.train.warm.memory import SnapshotMemory
from megalora.train.warm.rounds import SLOTS, Outbox, Rounds, Sender
from tests.forked import fork
from tests.train.warm.scenes import TOKEN, put

OWN = (2, 3)
"""Ranks of the node that keeps."""
BEFORE = (0, 1)
"""Ranks of the node before it."""
ATTEMPT = 5


@dataclasses.dataclass
class Kept:
    """A node's memory, which a keeper serves, and where."""

    own: SnapshotMemory
    replicas: SnapshotMemory
    address: Address


@pytest.fixture
def kept() -> Iterator[Kept]:
    own, replicas = SnapshotMemory(OWN), SnapshotMemory(BEFORE)
    attempt = Attempt()
    attempt.number = ATTEMPT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = fork(Keeper(listener, TOKEN, "job", attempt, own, replicas).serve)
        port = listener.getsockname()[1]
    yield Kept(own, replicas, Address("127.0.0.1", port, TOKEN, "job"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def content_of(rank: int, step: int) -> bytes:
    # More than is received at once, and no multiple of it.
    return bytes([rank, step, 7]) * 2_000_001


def filled(ranks: tuple[int, ...], *steps: int) -> SnapshotMemory:
    memory = SnapshotMemory(ranks)
    for rank in ranks:
        for step in steps:
            put(memory, rank, step, content_of(rank, step), f"described {rank} {step}".encode())
    return memory


def offer(to: Address, memory: SnapshotMemory, rank: int, step: int, **other: object) -> str:
    """Put a replica as the sender does; returns the answer's kind, or why it was refused."""
    message = {"job": "job", "attempt": ATTEMPT, **other}
    link = to.link()
    with link.socket:
        try:
            offer_replica(link, memory, rank, step, **message)
        except LinkLost as error:
            return str(error)
    return "kept"


def test_a_replica_is_kept_and_handed_out(kept: Kept) -> None:
    sent = filled(BEFORE, 4)
    put(kept.own, 3, 4, content_of(3, 4), b"own")
    for rank in BEFORE:
        assert offer(kept.address, sent, rank, 4) == "kept"
        assert kept.replicas.entry(rank, 4) == sent.entry(rank, 4)
    fetched = SnapshotMemory([0, 1, 3], 1)
    wanted = [(rank, kept.address) for rank in fetched.ranks]
    fetch(wanted, 4, dict.fromkeys(fetched.ranks, fetched))
    for rank in fetched.ranks:
        assert fetched.path(rank, 4).read_bytes() == content_of(rank, 4)
        described = b"own" if rank == 3 else f"described {rank} 4".encode()
        assert fetched.described(rank, 4) == described
    with pytest.raises(LinkLost, match="no snapshot of rank 1 at step 3"):
        fetch([(1, kept.address)], 3, {1: fetched})


def announce(content: bytes, **changed: object) -> dict[str, Any]:
    """What ``offer_replica`` says of rank 0's step 6, with changes."""
    return {
        "kind": "put", "job": "job", "attempt": ATTEMPT, "rank": 0, "step": 6,
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        "described_bytes": 2, "described_sha256": hashlib.sha256(b"{}").hexdigest(), **changed,
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["cut", "changed", "beside it"])
def test_a_torn_replica_is_never_used(fault: str, kept: Kept) -> None:
    sent = filled(BEFORE, 4, 5)
    for step in (4, 5):
        assert offer(kept.address, sent, 0, step) == "kept"
    content = content_of(0, 6)
    link = kept.address.link()
    with link.socket:
        link.send(**announce(content))
        assert link.receive() == {"kind": "go"}
        link.socket.sendall(b"{]" if fault == "beside it" else b"{}")
        torn = b"x" + content[1:] if fault == "changed" else content
        if fault == "cut":
            link.socket.sendall(torn[:1_000_000])
        else:
            # What is beside it comes first, and the keeper may have closed the link already.
            with suppress(OSError):
                link.socket.sendall(torn)
                assert "another SHA-256 than was announced" in link.receive()["why"]
    # The newer one stays; the slot of the older one may be lost with the torn one.
    assert offer(kept.address, sent, 1, 5) == "kept"
    assert kept.replicas.steps(0) == ({4, 5} if fault == "beside it" else {5})
    assert kept.replicas.path(0, 5).read_bytes() == content_of(0, 5)
    # What comes whole is taken.
    assert offer(kept.address, filled(BEFORE, 6), 0, 6) == "kept"
    assert kept.replicas.steps(0) == {5, 6}


def test_what_is_not_the_neighbours_is_refused(kept: Kept) -> None:
    sent = filled((*BEFORE, *OWN), 4)
    assert offer(kept.address, sent, 0, 4, attempt=ATTEMPT - 1) == "attempt 4 has ended"
    assert offer(kept.address, sent, 2, 4) == "rank 2 is not one of [0, 1]"
    assert offer(kept.address, sent, 0, 4, job="other") == "this node belongs to another run"
    assert kept.replicas.steps(0) == kept.own.steps(2) == set()


def test_a_stranger_is_refused(kept: Kept) -> None:
    with pytest.raises(LinkLost):
        dataclasses.replace(kept.address, token=b"another token").link()
    # One that announces four gigabytes, one that sends no message of ours, and one whose proof is
    # none, who goes on as if he had been let in.
    proof = json.dumps({"nonce": "n", "proof": "0"}).encode()
    message = json.dumps({"kind": "get", "job": "job", "rank": 0, "step": 4}).encode()
    guess = LENGTH.pack(len(proof)) + proof + LENGTH.pack(len(message)) + message
    for sent in (LENGTH.pack(2**32 - 1), LENGTH.pack(4) + b"GET ", guess):
        with socket.create_connection((kept.address.host, kept.address.port)) as stranger:
            stranger.sendall(sent)
            (length,) = LENGTH.unpack(stranger.recv(4, socket.MSG_WAITALL))
            assert json.loads(stranger.recv(length, socket.MSG_WAITALL)).keys() == {"nonce"}
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    assert offer(kept.address, filled(BEFORE, 4), 0, 4) == "kept"


def test_a_server_without_the_token_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            connection, _ = listener.accept()

            def say(message: dict[str, str]) -> None:
                text = json.dumps(message).encode()
                connection.sendall(LENGTH.pack(len(text)) + text)

            say({"nonce": "n"})
            (length,) = LENGTH.unpack(connection.recv(4, socket.MSG_WAITALL))
            answer = json.loads(connection.recv(length, socket.MSG_WAITALL))
            # All that it knows is the client's own proof.
            say({"proof": answer["proof"]})
            connection.recv(1)

        pid = fork(pretend)
        with pytest.raises(LinkLost, match="token"):
            connected("127.0.0.1", listener.getsockname()[1], TOKEN)
        os.waitpid(pid, 0)


def test_more_than_fits_is_refused_before_it_is_sent(kept: Kept) -> None:
    sizes = (("bytes", 1 << 50), ("bytes", -1), ("bytes", "9"), ("described_bytes", 1 << 40))
    for name, size in sizes:
        link = kept.address.link()
        with link.socket:
            link.send(**announce(b"x", **{name: size}))
            why = link.receive()["why"]
        assert f"a snapshot of {name}={size} was announced; the limit is" in why
    assert kept.replicas.steps(0) == set()


def test_rounds_begin_together_and_keep_what_they_need(kept: Kept) -> None:
    outbox = Outbox(BEFORE)
    memory = SnapshotMemory(BEFORE, SLOTS)
    busy_elsewhere = False

    def any_rank(flags: list[bool]) -> list[bool]:
        return [flags[0] or busy_elsewhere]

    rounds = Rounds(1, 0, outbox, None, any_rank)

    def step_taken(step: int) -> bool:
        begun = rounds.begin(step)
        put_kept(memory, step, rounds.kept)
        assert rounds.kept <= memory.steps(0)
        # Two more take turns, as without replicas.
        assert step in memory.steps(0) and (step == 1 or step - 1 in memory.steps(0))
        return begun

    assert step_taken(1) and rounds.kept == {1}
    # The replica is on its way, for many steps.
    assert [step_taken(step) for step in range(2, 9)] == [False] * 7
    outbox.take_note(0, 1)
    busy_elsewhere = True
    assert not step_taken(9)
    busy_elsewhere = False
    assert step_taken(10) and rounds.kept == {1, 10}
    assert [step_taken(step) for step in range(11, 16)] == [False] * 5
    assert {1, 10} <= memory.steps(0)
    # A process that sends takes what is asked for to the neighbour, and says so.
    pid = fork(Sender(outbox, memory, kept.address, ATTEMPT, print).serve)
    outbox.ask(0, 10)
    while outbox.taken(0) != 11:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert kept.replicas.path(0, 10).read_bytes() == memory.path(0, 10).read_bytes()
    assert step_taken(16) and rounds.kept == {10, 16}
    assert Rounds(3, 0, outbox, 4, any_rank).kept == {4}
    every_third = Rounds(3, 1, outbox, 4, any_rank)
    assert [step for step in range(5, 12) if every_third.begin(step)] == [6]


def put_kept(memory: SnapshotMemory, step: int, kept: set[int]) -> None:
    content = content_of(0, step)[:100]
    digest = hashlib.sha256(content).hexdigest()

    def write(file) -> tuple[int, str]:
        file.write(content)
        return len(content), digest

    memory.write(0, step, write, b"{}", kept)

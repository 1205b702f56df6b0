"""Slots of snapshots: what a killed rank leaves half written is never taken, and the other slot is
whole."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from megalora.adapters.saved_tensors import SavedTensors, digest_fault
from megalora.adapters.state_index import Indexed, Piece, rank_file, rows_of
from megalora.lora.slices import Slice
from megalora.train.checkpoint.pieces import Block
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.checkpoint.where import Found, newer_of, read_whole
from megalora.train.warm.memory import SnapshotMemory
from megalora.train.warm.restore import as_checkpoint
from megalora.train.warm.snapshots import Snapshots
from tests.forked import fork
from tests.train.folders import SECTIONS, save_filled
from tests.train.warm.scenes import exit_code_of, put

WORLD = 2
HALF = 3
"""Elements of the tensor that each rank has."""


def content_of(rank: int, step: int) -> bytes:
    return bytes([rank, step]) * (10 + step)


def described_of(rank: int, step: int) -> bytes:
    """What a rank says of its snapshot: its half of one tensor."""
    part = Slice((WORLD * HALF,), None, 1, 0, rank * HALF, (rank + 1) * HALF)
    tensors = rows_of({"a": Indexed(part.shape, ("param",), (Piece(rank, part),))})
    state = {"step": step, "num_samples": 7, "world_size": WORLD, "config": SECTIONS}
    described = {"rank": rank, "step": step, "state": state, "tensors": tensors}
    return json.dumps(described).encode()


def put_half(memory: SnapshotMemory, rank: int, step: int, described: bytes | None = None) -> None:
    """Put a rank's half of a tensor, whose elements are 100 times the step, plus the rank."""
    part = Slice((WORLD * HALF,), None, 1, 0, rank * HALF, (rank + 1) * HALF)
    values = torch.full((HALF,), 100.0 * step + rank)
    snapshot = Snapshot()
    snapshot.take([Block("param", values, (("a", part),))], {})
    memory.write(rank, step, snapshot.write_to, described or described_of(rank, step))


def test_two_slots_take_turns() -> None:
    memory = SnapshotMemory([0])
    for step in (1, 2, 3, 7):
        put(memory, 0, step, content_of(0, step), described_of(0, step))
    assert memory.steps(0) == {3, 7}
    for step in (3, 7):
        content = content_of(0, step)
        assert memory.path(0, step).read_bytes() == content
        assert memory.described(0, step) == described_of(0, step)
        digest = hashlib.sha256(content).hexdigest()
        assert memory.entry(0, step)[:] == (step, len(content), len(described_of(0, step)), digest)


@pytest.mark.parametrize("bytes_before", [0, 5, 40])
def test_a_slot_that_a_kill_leaves_half_written_holds_nothing(bytes_before: int) -> None:
    memory = SnapshotMemory([0])
    for step in (1, 2):
        put(memory, 0, step, content_of(0, step), described_of(0, step))

    def write(file) -> tuple[int, str]:
        file.write(b"x" * bytes_before)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("has been killed")

    killed = fork(lambda: memory.write(0, 3, write, b"{}"))
    assert exit_code_of(killed) == -signal.SIGKILL
    # Neither the new one nor the one that it was written over.
    assert memory.steps(0) == {2}
    assert memory.path(0, 2).read_bytes() == content_of(0, 2)
    # What comes next is written over the torn one.
    put(memory, 0, 4, content_of(0, 4), described_of(0, 4))
    assert memory.steps(0) == {2, 4}


def test_the_newest_step_that_all_have() -> None:
    memory = SnapshotMemory(range(3))
    assert memory.newest_common(range(3)) is None
    for rank, steps in enumerate([(4, 5), (5, 6), (4, 5)]):
        for step in steps:
            put(memory, rank, step, b"x", b"{}")
    assert memory.newest_common(range(3)) == 5
    memory.forget_but(5)
    assert list(map(memory.steps, range(3))) == [{5}, {5}, {5}]
    # A rank without it: the disk has to do.
    assert memory.newest_common(range(4)) is None
    memory.forget_but(None)
    assert memory.newest_common([0]) is None


def test_snapshots_are_read_as_a_checkpoint(tmp_path: Path) -> None:
    memory = SnapshotMemory(range(WORLD))
    for rank in range(WORLD):
        for step in (4, 5):
            put_half(memory, rank, step)
    folder = as_checkpoint(dict.fromkeys(range(WORLD), memory), 5, WORLD, tmp_path)
    with SavedTensors(folder) as saved:
        assert saved.index is not None
        found = saved.whole("param", "a", (WORLD * HALF,))
        assert found.tolist() == [500.0] * HALF + [501.0] * HALF
        for rank in range(WORLD):
            assert digest_fault(folder, saved.index, rank_file(rank)) is None


def test_a_snapshot_of_another_rank_or_step_is_refused(tmp_path: Path) -> None:
    for number, wrong in enumerate([described_of(0, 5), described_of(1, 4)]):
        memory = SnapshotMemory(range(WORLD))
        put_half(memory, 0, 5)
        put_half(memory, 1, 5, wrong)
        with pytest.raises(ValueError, match="snapshot of rank 1 at step 5 is that of rank"):
            as_checkpoint(dict.fromkeys(range(WORLD), memory), 5, WORLD, tmp_path / str(number))


def test_the_newer_of_memory_and_disk(tmp_path: Path) -> None:
    memory = SnapshotMemory(range(WORLD))
    for rank in range(WORLD):
        put_half(memory, rank, 5)
    snapshots = as_checkpoint(dict.fromkeys(range(WORLD), memory), 5, WORLD, tmp_path)
    nothing = Found(None)
    assert newer_of(nothing, None) is nothing
    for on_disk in (4, 5, 6):
        checkpoint = tmp_path / "run" / f"step_{on_disk:06d}"
        checkpoint.parent.mkdir(exist_ok=True)
        save_filled(checkpoint)
        found = newer_of(Found(read_whole(checkpoint, "it")), snapshots)
        assert found.state is not None
        is_newer = on_disk > 5
        assert (found.state.step, found.state.in_memory) == (max(5, on_disk), not is_newer)
        assert (found.on_disk is None) == is_newer
    fresh = newer_of(nothing, snapshots)
    assert fresh.state is not None and fresh.state.in_memory and fresh.on_disk is None


class _Writer:
    """Stands for the run's writer: one tensor, whose values the test changes."""

    def __init__(self) -> None:
        self.values = torch.zeros(4)
        self.pieces = self
        self.dtypes = {"a": torch.float32}

    def take(self, snapshot: Snapshot, beside: object) -> None:
        whole = Slice.whole((4,))
        snapshot.take([Block("param", self.values, (("a", whole),))], {})


def test_settle_returns_when_the_snapshot_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SnapshotMemory([0])
    writer = _Writer()
    snapshots = Snapshots(memory, 1, writer, 0)  # type: ignore[arg-type]
    for step in (1, 2, 3):
        writer.values.fill_(step)
        snapshots.take(step, None, {"step": step})  # type: ignore[arg-type]
        # Training goes on at once, and changes what is copied.
        writer.values.fill_(-1)
        snapshots.settle()
        assert step in memory.steps(0)
        described = json.loads(memory.described(0, step))
        assert (described["rank"], described["step"], list(described["tensors"])) == (
            0,
            step,
            ["a"],
        )
        values = memory.path(0, step).read_bytes()[-16:]
        assert torch.frombuffer(bytearray(values), dtype=torch.float32).tolist() == [step] * 4

    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "write", full)
    snapshots.take(4, None, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank 0 cannot hold its snapshot in memory .*allocate"):
        snapshots.settle()

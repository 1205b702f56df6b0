"""The order in which a save of two ranks writes and forces to disk: at every rename, what it makes
visible must have outlived a loss of power already. And faults of one rank that all must hear of."""

import errno
import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megalora.adapters.write.stream import write_tensors
from megalora.parallel import host_group
from megalora.train.checkpoint import save
from megalora.train.checkpoint.adapter_file import AdapterFile
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.checkpoint.whole_file import write_whole
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl
from tests.train.made_up_state import MadeUpPieces, described, texts_of, writer_of


def content_of(path: Path) -> Any:
    """What forcing a file or folder to disk keeps: its bytes, or its entries by inode."""
    if path.is_dir():
        return {entry.name: entry.stat().st_ino for entry in sorted(path.iterdir())}
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Disk:
    """What would be there after a loss of power: of every inode what it held when it was last
    forced to disk, by any rank. All else may be lost."""

    def __init__(self, log: Path) -> None:
        self.log = log
        fsync = os.fsync

        def force(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            row = [dist.get_rank(), path.stat().st_ino, path.name, content_of(path)]
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")

        os.fsync = force

    def rows(self) -> list[Any]:
        return read_jsonl(self.log)

    def entries(self, folder: Path) -> dict[str, int]:
        """Name -> inode of what a folder has on disk."""
        found: dict[str, int] = {}
        for _, inode, _, content in self.rows():
            if inode == folder.stat().st_ino:
                found = content
        return found

    def lacks(self, path: Path) -> list[str]:
        """Files and folders from ``path`` down that are not on disk as they are now."""
        kept = {inode: content for _, inode, _, content in self.rows()}
        paths = [path, *path.rglob("*")] if path.is_dir() else [path]
        return [p.name for p in paths if kept.get(p.stat().st_ino) != content_of(p)]


class Watch:
    """Looks at the disk whenever the first rank renames or removes something."""

    def __init__(self, run: Path, disk: Disk) -> None:
        self.run = run
        self.disk = disk
        self.faults: list[str] = []
        self.seen: list[str] = []
        # Python tells a hook of a change before it makes it.
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if dist.get_rank() != 0:
            return
        if event == "os.rename":
            self._renamed(Path(str(arguments[0])), Path(str(arguments[1])))
        if event == "shutil.rmtree" and Path(str(arguments[0])).exists():
            self._removed(Path(str(arguments[0])))

    def _renamed(self, source: Path, target: Path) -> None:
        self.seen.append(target.name)
        if lacking := self.disk.lacks(source):
            self.faults.append(f"{target.name} with {lacking}")
        if target.name == "latest":
            named = source.read_text().strip()
            if named not in self.disk.entries(self.run):
                self.faults.append(f"latest before the entry of {named}")

    def _removed(self, folder: Path) -> None:
        self.seen.append(f"no {folder.name}")
        old = folder.name[1:].removesuffix(".gone")
        # Its name must be gone before the first of its files.
        if old in self.disk.entries(self.run):
            self.faults.append(f"{old} loses files under its name")


def _faults_of_saves(run: Path) -> list[str]:
    """Save two steps, of which one checkpoint is kept; what was made visible too early."""
    disk = Disk(run.with_name("disk.jsonl"))
    watch = Watch(run, disk)
    model = described(2, 4, tiny=True)
    pieces = MadeUpPieces(model, dist.get_rank(), dist.get_world_size())
    with host_group() as group:
        writer = writer_of(run, model, pieces, group, keep=1)
        snapshot = Snapshot()
        for step in (1, 2):
            pieces.values["param"] += 1
            writer.take(snapshot, save.Beside())
            writer.write(snapshot, texts_of(writer, step))
            # Who returns from a save may say that it is there. A name too many is no loss.
            if dist.get_rank() == 0 and disk.lacks(run / "latest"):
                watch.faults.append("latest at the end")
            named = {f"step_{step:06d}": None, "latest": None}
            if dist.get_rank() == 0 and not named.keys() <= disk.entries(run).keys():
                watch.faults.append("the run folder at the end")
    # A watch that sees nothing finds no fault.
    saved = ["step_000001", "latest", "step_000002", "latest"]
    removed = [".step_000001.gone", "no .step_000001.gone"]
    assert watch.seen == ([*saved, *removed] if dist.get_rank() == 0 else [])
    own = [dist.get_rank(), f"rank_{dist.get_rank():05d}.safetensors"]
    # On a network disk nobody else can force what a rank has written.
    if [row[0] for row in disk.rows() if [row[0], row[2]] == own] == []:
        watch.faults.append(f"{own[1]} by its own rank")
    return watch.faults


def test_everything_is_on_disk_before_it_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert run_ranks(_faults_of_saves, 2, run) == [[], []]


def _save_with_a_fault(run: Path, kind: str) -> list[str]:
    """What a rank says of two saves, where something goes wrong on one rank in the first."""
    model = described(1, 4, tiny=True)
    rank = dist.get_rank()
    pieces = MadeUpPieces(model, rank, dist.get_world_size())
    write = Snapshot.write
    form = AdapterFile._form
    if kind == "form" and rank == 0:
        AdapterFile._form = _refuse
    if kind == "unseen" and rank == 1:
        Snapshot.write = _write_elsewhere
    said: list[str] = []
    # Ranks that do not hear of it wait for half an hour.
    signal.alarm(120)
    with host_group() as group:
        writer = writer_of(run, model, pieces, group, keep=1)
        if kind == "twice" and rank == 1:
            # As a wrong rank in a group would do it.
            writer.pieces = MadeUpPieces(model, 0, dist.get_world_size())
        for step in (1, 2):
            snapshot = Snapshot()
            writer.take(snapshot, save.Beside())
            try:
                writer.write(snapshot, texts_of(writer, step))
                said.append("saved")
            except ValueError as error:
                said.append(str(error))
            Snapshot.write = write
            AdapterFile._form = form
            writer.pieces = pieces
    return said


def _refuse(*_: Any) -> None:
    raise ValueError("this adapter has no form")


def _write_elsewhere(snapshot: Snapshot, path: Path) -> tuple[int, str]:
    """As on a node whose folder of that name is its own."""
    other = path.parents[2] / path.name
    with other.open("wb") as file:
        file.write(b"1")
    return snapshot.num_bytes, "0" * 64


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("twice", "element 0 is in two pieces"),
        ("form", "this adapter has no form"),
        ("unseen", "rank_00001.safetensors is not there, and its rank has written [0-9,]+"),
    ],
)
def test_what_one_rank_finds_wrong_all_hear(kind: str, message: str, tmp_path: Path) -> None:
    """Otherwise the others wait for it, or take the next save's messages for this one's."""
    for said in run_ranks(_save_with_a_fault, 2, tmp_path, kind):
        assert re.search(message, said[0]) and said[1:] == ["saved"], said
    assert (tmp_path / "latest").read_text() == "step_000002\n"
    # Nothing of what failed is left.
    assert not list(tmp_path.glob(".*"))


def _keep_whole(path: Path) -> tuple[str, bool]:
    """What a rank says where the first one cannot write a file of whole tensors, and whether it
    then has all of them."""
    model = described(1, 4, tiny=True)
    rank = dist.get_rank()
    pieces = MadeUpPieces(model, rank, dist.get_world_size())
    said = "nothing"

    def full(announced: Any, tensors: Any) -> None:
        next(iter(tensors))
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(announced: Any, tensors: Any) -> None:
        write_tensors(path, announced, tensors, {"format": "pt"})

    signal.alarm(120)
    with host_group() as group:
        try:
            write_whole(pieces, full, "could not keep it", group)
        except ValueError as error:
            said = str(error)
        write_whole(pieces, write, "could not keep it", group)
    found = load_file(path)
    own = pieces.values["param"].bfloat16()
    parts = [found[name].view(-1)[part.start : part.end] for name, part in pieces.pieces]
    return said, torch.equal(torch.cat(parts), own)


def test_ranks_write_one_file_of_whole_tensors(tmp_path: Path) -> None:
    full = "could not keep it ([Errno 28] No space left on device)"
    assert run_ranks(_keep_whole, 2, tmp_path / "file") == [(full, True)] * 2

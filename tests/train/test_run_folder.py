"""Check that one run at a time uses a run folder: the second is told who is there, and a dead one
is in nobody's way."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megalora.train import run_folder
from megalora.train.run_folder import LOCK, opened, take_lock
from tests.distributed.ranks import run_ranks


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a process that takes the lock of ``tmp_path`` and keeps it until it is killed; returns
    its id."""
    started: list[int] = []

    def start(job: str | None = None) -> int:
        # The pipe says when the lock is taken.
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                take_lock(tmp_path, job)
                os.write(write, b"x")
                signal.pause()
            finally:
                os._exit(1)
        assert os.read(read, 1) == b"x"
        started.append(pid)
        return pid

    yield start
    for pid in started:
        end(pid)


def end(pid: int) -> None:
    """Kill a holder, unless that has been done before."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def no_locks(*_: object) -> None:
    """What ``flock`` does on NFS without its lock service."""
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_second_run_is_told_who_is_there(holder: Callable[..., int], tmp_path: Path) -> None:
    pid = holder()
    # Twice, because being refused must change nothing.
    for _ in range(2):
        with pytest.raises(ValueError, match="another run is writing to") as caught:
            take_lock(tmp_path, None)
        who = (
            rf"; it is process {pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d"
            r" \d\d:\d\d:\d\d\. "
        )
        assert re.search(who, str(caught.value)), caught.value
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == pid


def test_a_killed_run_is_in_nobody_s_way(holder: Callable[..., int], tmp_path: Path) -> None:
    end(holder("one job"))
    descriptor, answer = take_lock(tmp_path, "another job")
    assert (answer.same_job, answer.notes) == (False, [])
    os.close(descriptor)


def test_a_job_s_next_attempt_knows_the_folder(holder: Callable[..., int], tmp_path: Path) -> None:
    end(holder("this job"))
    descriptor, answer = take_lock(tmp_path, "this job")
    assert answer.same_job
    os.close(descriptor)
    # The same folder, but started by hand: no job, so no attempt before this one.
    descriptor, answer = take_lock(tmp_path, None)
    assert not answer.same_job
    os.close(descriptor)


def test_a_job_s_next_attempt_waits_for_the_last_one(
    holder: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = holder("this job")
    waits: list[float] = []

    # Nobody sleeps: the process of the last attempt ends while the next one waits the third time.
    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            end(pid)

    monkeypatch.setattr(run_folder.time, "sleep", sleep)
    descriptor, answer = take_lock(tmp_path, "this job")
    assert len(waits) >= 3 and answer.same_job
    os.close(descriptor)
    holder("this job")
    so_far = len(waits)
    with pytest.raises(ValueError, match="another run is writing"):
        take_lock(tmp_path, "another job")
    assert len(waits) == so_far, "another job is refused at once"
    # A process that does not end within the time is another run after all.
    monkeypatch.setattr(run_folder, "SUCCESSION_S", 0.0)
    with pytest.raises(ValueError, match="another run is writing"):
        take_lock(tmp_path, "this job")


# Empty after a crash between opening and writing, cut, of an older version, or not ours at all.
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"pid": 1}', b"\xff" * 9, b'{"host": 1, "pid": "x"}']
)
def test_a_lock_file_of_anything_is_taken(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    descriptor, answer = take_lock(tmp_path, "job")
    assert not answer.same_job
    with pytest.raises(ValueError, match=f"it is process {os.getpid()} on"):
        take_lock(tmp_path, "another")
    os.close(descriptor)


def test_without_locks_a_run_of_this_host_is_still_noticed(
    holder: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    pid = holder()
    with pytest.raises(ValueError, match=f"another run is writing to .*; it is process {pid} on"):
        take_lock(tmp_path, None)
    end(pid)
    descriptor, answer = take_lock(tmp_path, None)
    (note,) = answer.notes
    assert "is on a file system without locks (" in note and "No locks available" in note
    os.close(descriptor)
    # A process on another host cannot be looked up from here; it is only named.
    token = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**token, "host": "node-b"}))
    descriptor, answer = take_lock(tmp_path, None)
    assert f"the last to write there was process {os.getpid()} on node-b since" in answer.notes[0]
    os.close(descriptor)


def test_another_error_of_the_lock_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not one of the errors that say that a file system has no locks.
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        take_lock(tmp_path, None)


def test_a_file_is_not_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="checkpoint.dir=.*run is a file; choose a folder"):
        take_lock(tmp_path / "run", None)


def _open_twice(run: Path) -> list[str]:
    """On every rank: what is said when a folder is opened inside its own block, and afterwards."""
    said = []
    with opened(run):
        try:
            with opened(run):
                said.append("both")
        except ValueError as error:
            said.append(str(error))
    with opened(run) as again:
        said.append(str(again.notes))
    return said


def test_every_rank_is_refused_and_left_overs_go(tmp_path: Path) -> None:
    # What a save that was killed has left; opening the folder removes it.
    (tmp_path / ".step_000007.tmp").mkdir()
    for said in run_ranks(_open_twice, 2, tmp_path):
        assert said[0].startswith(f"another run is writing to {tmp_path}; it is process ")
        assert said[1] == "[]"
    assert not (tmp_path / ".step_000007.tmp").exists()

"""Let one run at a time write to a run folder: its first rank holds a lock there, and the lock file
says who it is.

The lock is ``flock`` on ``.lock``, so it ends with its process, however that ends. Its content is
for people, and for the same job's next attempt: torchrun starts ranks again under one job
(``rendezvous.py``), and then the folder's checkpoints are its own.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megalora.first_rank import on_every_rank, on_first_rank
from megalora.json_text import parse_json
from megalora.process_table import born
from megalora.train.checkpoint.identity import KEPT
from megalora.train.checkpoint.writer import make_run_folder, recover

LOCK = ".lock"
SUCCESSION_S = 60.0
"""How long a job's next attempt waits for a process of the last one to end."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""Errors of flock on file systems without locks, such as NFS without its lock service."""


@dataclass(frozen=True)
class Opened:
    """A run folder that no other run writes to."""

    same_job: bool
    """True where an earlier attempt of this job was the last to write to the folder."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user."""


@dataclass(frozen=True)
class Holder:
    """Content of the lock file."""

    host: str
    pid: int
    since: str
    born: str
    """Start of the process in the system's ticks, because process ids are used again."""
    job: str | None
    """Name of torchrun's job; None without torchrun."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def opened(run: Path, job: str | None = None) -> Iterator[Opened]:
    """Keep other runs out of the run folder while the block runs; collective over the world.

    Args:
        job: name of torchrun's call, the same in all its attempts; None without torchrun.
    Raises:
        ValueError: on every rank, when another run holds the folder or it cannot be written to.
    """
    held: list[int] = []
    is_new = not run.exists()

    def take() -> Opened:
        descriptor, answer = take_lock(run, job)
        held.append(descriptor)
        recover(run)
        return answer

    try:
        answer = on_first_rank(take, f"checkpoint.dir={run} cannot be used")
        # Every rank writes its part of a checkpoint.
        on_every_rank(lambda: _check_seen(run), f"checkpoint.dir={run} cannot be used")
        yield answer
    except BaseException:
        # A typing error in checkpoint.dir must leave no folder behind.
        if held and is_new:
            _leave_nothing(run)
        raise
    finally:
        for descriptor in held:
            os.close(descriptor)


def _check_seen(run: Path) -> None:
    """Raise ``ValueError`` where this rank does not see the first rank's run folder."""
    if not (run / LOCK).is_file():
        raise ValueError(
            f"checkpoint.dir={run} is not the same folder on every node: {socket.gethostname()}"
            " does not see what the first rank has written there, and every rank writes its part of"
            " a checkpoint. Choose a folder that all nodes share."
        )


def _leave_nothing(run: Path) -> None:
    """Remove a folder that was made for a run that did not begin; the lock is held."""
    begun = {path.name for path in run.iterdir()} - {LOCK, KEPT}
    if not begun:
        (run / KEPT).unlink(missing_ok=True)
        (run / LOCK).unlink()
        run.rmdir()


def take_lock(run: Path, job: str | None) -> tuple[int, Opened]:
    """Lock the lock file; returns its descriptor and who held it before. Raises ``ValueError`` when
    another run holds it."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"checkpoint.dir={run} is a file; choose a folder")
    while True:
        make_run_folder(run)
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            notes = _lock(descriptor, run, job)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_still_there(descriptor, run):
            break
        # A run that was refused has removed the file between our open and our lock: a lock on a
        # file that is gone keeps nobody out.
        os.close(descriptor)
    try:
        # Only now, under the lock, does the content say who was here before.
        before = _read(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(asdict(_this_process(job))) + "\n").encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    same_job = before is not None and job is not None and before.job == job
    return descriptor, Opened(same_job, notes)


def _is_still_there(descriptor: int, run: Path) -> bool:
    """Whether the open file is the folder's lock file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(run / LOCK))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, run: Path, job: str | None) -> list[str]:
    """Lock the file, waiting only for an earlier attempt of the same job; returns lines for the
    user."""
    deadline = time.monotonic() + SUCCESSION_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return []
        except BlockingIOError:
            holder = _read(descriptor)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return _without_locks(descriptor, run, job, str(error))
        # torchrun may start the next attempt before the last one's process has ended.
        succession = holder is not None and job is not None and holder.job == job
        if not succession or time.monotonic() > deadline:
            raise _taken(run, holder)
        time.sleep(0.1)


def _without_locks(descriptor: int, run: Path, job: str | None, reason: str) -> list[str]:
    """Compare with the last holder instead: only a process of this host can be looked up."""
    holder = _read(descriptor)
    same_job = holder is not None and job is not None and holder.job == job
    if (
        holder
        and not same_job
        and holder.host == socket.gethostname()
        and holder.born == born(holder.pid)
    ):
        raise _taken(run, holder)
    last = ""
    if holder and holder.host != socket.gethostname():
        last = f"; the last to write there was {holder}"
    return [
        f"checkpoint.dir={run} is on a file system without locks ({reason}): a second run that is"
        f" started in it on another host would not be noticed{last}"
    ]


def _taken(run: Path, holder: Holder | None) -> ValueError:
    who = f"it is {holder}" if holder else "it has not said yet which process it is"
    return ValueError(
        f"another run is writing to {run}; {who}. Let it end or stop it (SIGTERM saves), or choose"
        " another checkpoint.dir."
    )


def _this_process(job: str | None) -> Holder:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return Holder(socket.gethostname(), os.getpid(), since, born(os.getpid()) or "", job)


def _read(descriptor: int) -> Holder | None:
    """Who wrote the lock file; None where nobody has, or where its content is not ours."""
    try:
        holder = Holder(**parse_json(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None
    texts = (holder.host, holder.since, holder.born, holder.job or "")
    if type(holder.pid) is not int or not all(isinstance(text, str) for text in texts):
        return None
    return holder

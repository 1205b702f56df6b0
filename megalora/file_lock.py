"""Let one process of a machine at a time do something, by a lock on a file."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, fix: str = "") -> Iterator[bool]:
    """Hold an exclusive lock on ``path`` for one block; yields whether another process held it.

    The lock ends with its process, however that ends. The empty file stays: a lock on a file that
    somebody has removed would keep nobody out.

    Args:
        fix: what the user can do where that fails, for the message.
    Raises:
        ValueError: the file cannot be made, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"{path} cannot be made ({error.strerror or error}){fix}") from None
    try:
        waited = False
        # First without waiting, to know whether somebody else was at work.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(f"{path} cannot be locked ({error.strerror or error}){fix}") from None
        yield waited
    finally:
        os.close(descriptor)

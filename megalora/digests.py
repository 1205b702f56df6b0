"""Keep digests of files, so that a file that has not changed since is not read again.

A file counts as unchanged while its path, inode, size and times stay the same. The digest of a file
that changed within the last seconds is never kept: it could change once more within one tick of the
file system's clock.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from megalora.json_text import read_json

SETTLED_NS = 2 * 10**9
"""A file must have been left alone for this long for its digest to be kept."""
BLOCK_BYTES = 16 * 2**20


class Digests:
    """Digests by file and by what was digested of it."""

    def __init__(self, known: dict[str, str] | None = None) -> None:
        self.known = known or {}
        self.used: dict[str, str] = {}
        """Digests that were asked for and may be kept."""

    @classmethod
    def load(cls, path: Path) -> "Digests":
        """Read what ``save`` wrote; no digests where the file is missing or damaged."""
        try:
            known = read_json(path)
        except (OSError, ValueError):
            # Without them, files are read again, which only takes time.
            return cls()
        if not isinstance(known, dict):
            return cls()
        if not all(isinstance(value, str) for value in known.values()):
            return cls()
        return cls(known)

    def save(self, path: Path) -> None:
        """Write the digests that were used; others are of files that nobody asks for any more."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(self.used, indent=1) + "\n")
        temporary.replace(path)

    def of(self, path: Path, kind: str, compute: Callable[[Path], str]) -> str:
        """``compute(path)``, or its result when the file was the same.

        Args:
            kind: name of what is computed; a file may have digests of several kinds.
        Raises:
            ValueError: the file changed while it was read.
        """
        before = path.stat()
        key = f"{kind} {os.path.realpath(path)} {_times(before)}"
        digest = self.known.get(key)
        if digest is None:
            now = time.time_ns()
            digest = compute(path)
            if _times(path.stat()) != _times(before):
                raise ValueError(
                    f"{path} changed while it was read; start again when nobody writes to it"
                )
            # Used now, but not kept.
            if now - max(before.st_mtime_ns, before.st_ctime_ns) < SETTLED_NS:
                return digest
        self.used[key] = digest
        return digest


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _times(stat: os.stat_result) -> str:
    """Inode, size and times of a file. st_ctime changes also where st_mtime is set back."""
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"

"""List the token stores of a cache with their sizes and ages, and remove those that are not used.

A store was last used when it was last opened: ``mark_used`` sets the time of its header. In a cache
that a run may not write to, that stays the time at which the store was built.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megalora.data.tokens import HEADER
from megalora.file_lock import locked
from megalora.json_text import read_json

# A store is named after its digest; one that is being built, or was left by a killed process, has
# the name of ``whole_or_gone``.
_STORE = re.compile(r"\.?([0-9a-f]{32})(\.tmp)?")
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class StoreOnDisk:
    """A folder of a cache, whether or not it can still be read."""

    folder: Path
    source: str
    """What the source was called when the store was built; says so where it was not finished."""
    num_bytes: int
    last_used: float
    """Seconds since 1970."""

    @property
    def lock(self) -> Path:
        """The file that a process holds a lock on while it builds or removes the store."""
        match = _STORE.fullmatch(self.folder.name)
        assert match is not None
        return self.folder.with_name(f"{match[1]}.lock")

    def days_unused(self) -> float:
        # A clock may have been set back since.
        return max(0.0, time.time() - self.last_used) / _SECONDS_PER_DAY

    def line(self) -> str:
        """One line for the user: age, size, source, folder."""
        unused = f"{self.days_unused():8.1f} days"
        return f"{unused} {self.num_bytes / 1e6:12,.1f} MB  {self.source}  ({self.folder.name})"


def mark_used(folder: Path) -> None:
    """Note that a store was opened just now."""
    # It may be somebody else's, or on a disk that is only read: then it keeps its time.
    with suppress(OSError):
        os.utime(folder / HEADER)


def stores_in(cache: Path) -> list[StoreOnDisk]:
    """The stores of a cache, the one that was not used for longest first."""
    found = []
    if cache.is_dir():
        for folder in cache.iterdir():
            # Locks, digests, and whatever else somebody keeps there are left alone.
            if _STORE.fullmatch(folder.name) and (store := _look_at(folder)):
                found.append(store)
    return sorted(found, key=lambda store: store.last_used)


def _look_at(folder: Path) -> StoreOnDisk | None:
    """A store as it is now; None where another process has removed or renamed it."""
    try:
        # A store has no folders in it.
        files = [path.stat() for path in folder.iterdir()]
        last_used = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
        if (folder / HEADER).is_file():
            last_used = (folder / HEADER).stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    num_bytes = sum(file.st_size for file in files)
    return StoreOnDisk(folder, _source_of(folder), num_bytes, last_used)


def _source_of(folder: Path) -> str:
    """The name in a store's header, which may be damaged or of another version."""
    if not (folder / HEADER).is_file():
        return "unfinished"
    # Without the header's digest: a name for a list need not be proof against damage.
    try:
        header = read_json(folder / HEADER)
        return str(header["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def remove_unused(cache: Path, days: float) -> Iterator[StoreOnDisk]:
    """Remove the stores that were not used for so many days; yields each one that is gone.

    A process that has such a store open goes on reading it; the next one tokenises anew.

    Raises:
        ValueError: a number of days that is none, or a store that cannot be removed.
    """
    if not 0 <= days < math.inf:
        raise ValueError(f"--remove-unused must be 0 days or more, got {days}")
    return _removed(cache, days)


def _removed(cache: Path, days: float) -> Iterator[StoreOnDisk]:
    for store in stores_in(cache):
        if store.days_unused() < days:
            continue
        # Nobody builds it meanwhile, and who asks for it waits until it is gone.
        with locked(store.lock, "; only its owner can remove stores from this cache"):
            now = _look_at(store.folder)
            # While this process waited somebody may have finished it, or used it.
            if now is None or now.days_unused() < days:
                continue
            try:
                shutil.rmtree(store.folder)
            except OSError as error:
                raise ValueError(
                    f"{store.folder} cannot be removed ({error.strerror or error})"
                ) from None
        yield now


def show_stores(cache: Path, remove_days: float | None = None) -> None:
    """Print the stores of a cache, or remove and print those not used for ``remove_days``."""
    if remove_days is None:
        stores = stores_in(cache)
        print(f"token stores in {cache} (days since the last use, size, source, folder):")
    else:
        # Refuses a wrong number before anything is printed.
        stores = remove_unused(cache, remove_days)
        print(f"removed from {cache}, not used for {remove_days:g} days or more:")
    count = 0
    num_bytes = 0
    for store in stores:
        # Each as it goes, so that an error does not hide what was removed before it.
        print(store.line())
        count += 1
        num_bytes += store.num_bytes
    print(f"{count:,} stores, {num_bytes / 1e6:,.1f} MB")

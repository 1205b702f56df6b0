"""Write a new folder whole or not at all, whatever happens meanwhile."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def check_new(out: Path, source: Path) -> None:
    """Raise ``ValueError`` unless ``whole_or_gone`` can make the folder ``out`` from ``source``."""
    if out == source.resolve():
        raise ValueError(f"{out} is the folder that is read; choose another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another")
    if out.is_mount():
        raise ValueError(
            f"{out} is a mount point, which cannot be replaced by a finished folder; choose one"
            " in it"
        )
    if _unfinished(out).exists():
        raise ValueError(
            f"{_unfinished(out)} exists: another process is writing {out}, or was killed while it"
            " did. Remove it"
        )


def check_space(out: Path, num_bytes: int) -> None:
    """Raise ``ValueError`` unless so much is free on the disk of ``out``, whose folders need not
    exist."""
    # The nearest folder above that exists; "/" always does.
    disk = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if free < num_bytes:
        raise ValueError(
            f"{out} needs {num_bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there; free"
            " some or choose another disk"
        )


@contextmanager
def whole_or_gone(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` to fill, which becomes ``out`` at the end of the block.

    After any failure nothing is left of it.
    """
    # Beside it, because a rename is atomic within a file system only.
    temporary = _unfinished(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"could not make {temporary} ({error})") from None
    try:
        yield temporary
        # The contents first: after a power failure, a folder of this name must not be empty.
        force_tree_to_disk(temporary)
        temporary.rename(out)
        force_to_disk(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors raises an error of its own for a full disk.
        if isinstance(error, OSError | SafetensorError):
            raise ValueError(f"could not write {out}, of which nothing is left ({error})") from None
        raise


def _unfinished(out: Path) -> Path:
    return out.with_name(f".{out.name}.tmp")


def force_tree_to_disk(folder: Path) -> None:
    """Force everything below a folder to disk, then the folder itself."""
    for path in (*folder.rglob("*"), folder):
        force_to_disk(path)


def force_to_disk(path: Path) -> None:
    """Force a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Write a checkpoint folder whole or not at all, whenever the process is killed."""

import shutil
from collections.abc import Callable
from pathlib import Path

from megalora.bridge.output import force_to_disk


def checkpoint_name(step: int) -> str:
    """Name of a step's folder in its run folder."""
    return f"step_{step:06d}"


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder beside ``target``, force it to disk, then rename; ``latest`` follows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            force_to_disk(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    pointer = target.with_name(".latest.tmp")
    pointer.write_text(target.name + "\n")
    force_to_disk(pointer)
    pointer.rename(target.with_name("latest"))
    force_to_disk(target.parent)

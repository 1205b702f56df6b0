"""Find the adapter that a user means by a folder: the folder itself, or a run's latest
checkpoint."""

import re
from pathlib import Path

from megalora.adapters.files import CONFIG

LATEST = "latest"
"""File in a run folder that names its newest checkpoint."""
CHECKPOINT_NAME = re.compile(r"step_\d{6,18}")


def read_latest(run: Path) -> Path | None:
    """The folder that ``latest`` names, which may not exist; None without ``latest``.

    Raises:
        ValueError: it cannot be read, or holds anything but the plain name of a checkpoint.
    """
    path = run / LATEST
    try:
        with path.open("rb") as file:
            # A name has 23 characters at most; whatever else the file may be is not read whole.
            content = file.read(100)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    name = content.decode("ascii", errors="replace").strip()
    if not CHECKPOINT_NAME.fullmatch(name):
        raise ValueError(
            f"{path} holds {name[:40]!r}, which is not the name of a checkpoint such as step_000050"
        )
    return run / name


def checkpoints(run: Path) -> list[Path]:
    """Folders with the name of a checkpoint, in order of steps, whether they are whole or not."""
    if not run.is_dir():
        return []
    named = [
        path for path in run.iterdir() if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))


def latest_adapter(folder: Path) -> Path:
    """``folder`` if it is an adapter, else the checkpoint that its ``latest`` names; ``folder`` too
    where it is neither, which whoever reads it will say.

    Raises:
        ValueError: ``latest`` is damaged, or names a checkpoint that is not there.
    """
    if (folder / CONFIG).is_file() or not folder.is_dir():
        return folder
    named = read_latest(folder)
    if named is None:
        return folder
    # An older checkpoint in its place would be another adapter than the user thinks.
    if not named.is_dir():
        raise ValueError(
            f"{folder / LATEST} names {named.name}, which is not there; give one of the run's"
            " checkpoints"
        )
    return named

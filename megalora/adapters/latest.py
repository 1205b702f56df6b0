"""Find the adapter that a user means by a path: an adapter's folder, a run's latest checkpoint, or
the one that RUN/best or RUN/latest names."""

import re
from pathlib import Path

from megalora.adapters.files import CONFIG

LATEST = "latest"
"""File in a run folder that names its newest checkpoint."""
BEST = "best"
"""File in a run folder that names its checkpoint of the lowest evaluation loss."""
CHECKPOINT_NAME = re.compile(r"step_\d{6,18}")


def read_latest(run: Path) -> Path | None:
    """The folder that ``latest`` names; see ``read_pointer``."""
    return read_pointer(run / LATEST)


def read_pointer(path: Path) -> Path | None:
    """The folder that ``latest`` or ``best`` of a run folder names, which may not exist; None
    without such a file.

    Raises:
        ValueError: it cannot be read, or holds anything but the plain name of a checkpoint.
    """
    try:
        # To open a pipe would wait for a writer, for ever.
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file")
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
    return path.with_name(name)


def checkpoints(run: Path) -> list[Path]:
    """Folders with the name of a checkpoint, in order of steps, whether they are whole or not."""
    if not run.is_dir():
        return []
    named = [
        path for path in run.iterdir() if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))


def is_pointer(path: Path) -> bool:
    """Whether a path is the file ``latest`` or ``best``, which names a checkpoint beside it."""
    return path.name in (LATEST, BEST) and path.is_file()


def latest_adapter(folder: Path) -> Path:
    """``folder`` if it is an adapter, else the checkpoint that its ``latest`` names, or that it
    names itself as RUN/best does; ``folder`` too where it is none of these, which whoever reads it
    will say.

    Raises:
        ValueError: the file that names a checkpoint is damaged, or the checkpoint is not there.
    """
    pointer = folder if is_pointer(folder) else folder / LATEST
    if (folder / CONFIG).is_file() or not (folder.is_dir() or pointer == folder):
        return folder
    named = read_pointer(pointer)
    if named is None:
        return folder
    # An older checkpoint in its place would be another adapter than the user thinks.
    if not named.is_dir():
        raise ValueError(
            f"{pointer} names {named.name}, which is not there; give one of the run's checkpoints"
        )
    return named


def taken_note(given: Path, taken: Path) -> str | None:
    """A line for the user where another folder is taken than the one that was given."""
    if taken == given:
        return None
    if is_pointer(given):
        return f"{given}: taking {taken.name}, which it names"
    return f"{given} is a run folder: taking {taken.name}, its latest checkpoint"

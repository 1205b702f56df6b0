"""Write and check ``training_state/SHA256SUMS``, the digests of all files of a checkpoint.

It is written last, in the form of ``sha256sum``, which checks it as well:

    cd step_000050 && sha256sum -c training_state/SHA256SUMS

Checkpoints of earlier versions have none; ``state.json`` of later ones says that there must be one.
"""

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from megalora.adapters.files import STATE
from megalora.digests import sha256_of_file

SUMS = Path(STATE) / "SHA256SUMS"
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>[\w./-]+)", re.ASCII)
_LARGEST = 2**24
"""Bytes of a list of 100,000 files; a larger one is damaged."""


def write_sums(checkpoint: Path, known: Mapping[str, str]) -> dict[str, str]:
    """List all files that the folder has; returns name -> SHA-256.

    Args:
        known: digests of files that need not be read for it.
    """
    sums: dict[str, str] = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            name = path.relative_to(checkpoint).as_posix()
            sums[name] = known.get(name) or sha256_of_file(path)
    lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
    (checkpoint / SUMS).write_text("".join(lines))
    return sums


def check_sums(checkpoint: Path, needed: Iterable[Path], unread: Container[str]) -> None:
    """Compare every listed file with its digest.

    Args:
        needed: files that must be listed, since a cut list is a shorter one.
        unread: names of files that somebody else compares.
    Raises:
        ValueError: a file is not what was written, or not there, or the list is damaged.
    """
    where = checkpoint / SUMS
    if not where.is_file():
        raise ValueError(f"it has no {SUMS}")
    try:
        sums = _read(where)
        for name in needed:
            if name.as_posix() not in sums:
                raise ValueError(f"{where} is damaged: it does not list {name}")
        for name, digest in sums.items():
            path = checkpoint / name
            # A pipe in its place would be read for ever.
            if not path.is_file():
                raise ValueError(f"it has no {name}, which {SUMS} lists")
            if name not in unread and sha256_of_file(path) != digest:
                raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {SUMS}")
    except OSError as error:
        raise ValueError(f"{checkpoint} cannot be read ({error})") from None


def _read(path: Path) -> dict[str, str]:
    """Name -> SHA-256."""
    size = path.stat().st_size
    if size > _LARGEST:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes")
    sums: dict[str, str] = {}
    # Latin-1 reads any byte; those that no name has are refused below.
    lines = path.read_bytes().decode("latin-1").split("\n")
    # A list ends with the end of a line, unless it was cut.
    if lines.pop() != "":
        raise ValueError(f"{path} is damaged: it ends in the middle of a line")
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        # Names lead nowhere but down.
        if match is None or match["name"].startswith("/") or ".." in match["name"]:
            raise ValueError(f"{path} is damaged: line {number} is not a digest and a name")
        if match["name"] in sums:
            raise ValueError(f"{path} is damaged: line {number} names a file once more")
        sums[match["name"]] = match["digest"]
    return sums

"""Take the name of a source apart: a file or a data set of the Hugging Face hub, and a slice of its
rows, which ``rows.py`` reads."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from datasets import Dataset

_SLICE = re.compile(r"(?P<name>.*)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Location:
    """Where a source is; nothing has been read yet."""

    name: str
    """The source without its slice."""
    start: int | None
    """First row of the slice; None, and negative numbers, as in Python."""
    stop: int | None
    file: Path | None = None
    """The file; None for a hub data set."""
    hub: tuple[str, str | None, str] = ("", None, "")
    """(name, config, split) of a hub data set, where ``file`` is None."""

    @property
    def slice_text(self) -> str:
        """``[start:stop]``, empty where all rows are taken."""
        if self.start is None and self.stop is None:
            return ""
        start = "" if self.start is None else self.start
        stop = "" if self.stop is None else self.stop
        return f"[{start}:{stop}]"


def locate(source: str) -> Location:
    """Take the text of ``data.train`` or ``data.eval`` apart.

    Args:
        source: a .jsonl, .json or .parquet file, or a hub data set ``org/name[/config][:split]``
            (split ``train`` by default). May end in a slice, as in ``train.jsonl[:200]`` or
            ``org/name:test[100:200]``.
    Raises:
        ValueError: the file does not exist, or its type cannot be read.
    """
    name = source
    start = None
    stop = None
    # The slice is taken off first: what is left is a path or a name.
    if source.endswith("]"):
        match = _SLICE.fullmatch(source)
        if match is None:
            raise ValueError(
                f"{source}: the slice at the end is not understood; use [:200], [100:] or [10:20]"
            )
        name = match["name"]
        start = int(match["start"]) if match["start"] else None
        stop = int(match["stop"]) if match["stop"] else None
    path = _looked_up(name)
    # A folder of shards has no order of rows that anybody has said.
    if path.is_dir():
        raise ValueError(f"{name}: this is a folder; name one {', '.join(_SUFFIXES)} file in it")
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"{name}: files of type {path.suffix!r} are not read; use {', '.join(_SUFFIXES)}"
            )
        return Location(name, start, stop, file=path)
    # Nobody's data set is called train.jsonl: a wrong path must not become a question to the hub.
    if path.suffix in _SUFFIXES:
        raise ValueError(
            f"{name}: no such file (looked in {path.parent.resolve()}); correct data.train or"
            " data.eval"
        )
    match = _HUB.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is neither a file nor the name of a hub data set.\n  Use a path ending in"
            f" {', '.join(_SUFFIXES)}, or org/name, org/name:split, org/name/config:split."
        )
    # The hub's own default: data sets without splits call theirs train.
    hub = (match["name"], match["config"], match["split"] or "train")
    return Location(name, start, stop, hub=hub)


def _looked_up(name: str) -> Path:
    """A path that the file system can be asked about; raises ``ValueError`` for others."""
    try:
        path = Path(name).expanduser()
        path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # A name that is too long, an unknown user behind ~, a zero byte.
        raise ValueError(f"{name[:200]!r} is not a path that can be looked up ({error})") from error
    return path


def read_hub(source: str, name: str, config: str | None, split: str) -> "Dataset":
    """A data set of the hub, from the local cache where it has been downloaded before."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return cast("Dataset", datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"{source}: no such file, and the hub data set {name} (config {config or 'default'},"
            f" split {split}) could not be loaded:\n  {error}"
        ) from error

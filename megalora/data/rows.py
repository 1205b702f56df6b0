"""Open a source, whatever kind it is, and hand out its rows in chunks: no process ever holds all of
them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megalora.data.arrow_rows import Parquet, Table
from megalora.data.chunk import Chunk, Reader
from megalora.data.json_rows import Lines, read_json
from megalora.data.sources import locate, read_hub

_READERS: dict[str, Callable[[Path], Reader]] = {
    ".jsonl": Lines,
    ".json": read_json,
    ".parquet": Parquet,
}
"""What reads a file, by its suffix."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source that its slice selects."""

    reader: Reader
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def chunks(self) -> Iterator[Chunk]:
        return self.reader.chunks(self.start, self.stop)


def open_rows(source: str) -> Rows:
    """Find the rows of a source, and count them.

    Args:
        source: see ``locate``.
    Raises:
        ValueError: no such file or data set, unreadable content (with file and line), or no rows.
    """
    found = locate(source)
    if found.file is None:
        reader: Reader = Table(read_hub(source, *found.hub))
    else:
        reader = _READERS[found.file.suffix](found.file)
    # Counted first, for slices from the end and for the progress bar; nothing is decoded for it.
    num_rows = reader.count()
    if not num_rows:
        raise ValueError(f"{found.name}: there are no rows in it")
    # As Python slices a list, negative numbers included.
    start, stop, _ = slice(found.start, found.stop).indices(num_rows)
    if start >= stop:
        raise ValueError(f"{source}: the slice is empty; {found.name} has {num_rows} rows")
    return Rows(reader, start, stop)

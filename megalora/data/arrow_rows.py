"""Read rows from Parquet files and from data sets of the hub, of which parts are in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalora.data.chunk import CHUNK_ROWS, Chunk, Reader, Row

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ArrowChunk(Chunk):
    stream: Any
    """Arrow's stream format. Pickling a part of a table would copy the whole table."""
    path: Path | None = None
    """The Parquet file that it comes from; None for a data set of the hub."""

    def rows(self) -> Iterator[Row]:
        import pyarrow

        with pyarrow.ipc.open_stream(self.stream) as reader:
            table = reader.read_all()
        if self.path is None:
            return iter(table.to_pylist())
        # A damaged text or date is found only now.
        with _reading_parquet(self.path):
            return iter(table.to_pylist())


def _arrow_chunk(first: int, table: Any, path: Path | None = None) -> ArrowChunk:
    """A chunk of the rows of a table or record batch."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    return ArrowChunk(first, sink.getvalue(), path)


class Table(Reader):
    """A data set of the hub, which lies memory-mapped in the library's cache."""

    def __init__(self, dataset: "Dataset") -> None:
        # Arrow's values as they are stored: no images are decoded.
        self.dataset = dataset.with_format("arrow")

    def count(self) -> int:
        return len(self.dataset)

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        for at in range(start, stop, CHUNK_ROWS):
            rows = self.dataset[at : min(stop, at + CHUNK_ROWS)]
            yield _arrow_chunk(1 + at - start, rows)


class Parquet(Reader):
    """A Parquet file, of which parts of row groups are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _open(self) -> Any:
        import pyarrow.parquet

        # With a buffer, or a whole row group is read at once: there may be only one.
        return pyarrow.parquet.ParquetFile(self.path, buffer_size=2**20)

    def count(self) -> int:
        with _reading_parquet(self.path), self._open() as file:
            return file.metadata.num_rows

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        # Number of the batch's first row in the file.
        at = 0
        with _reading_parquet(self.path), self._open() as file:
            for batch in file.iter_batches(batch_size=CHUNK_ROWS):
                low = max(start, at)
                high = min(stop, at + batch.num_rows)
                if low < high:
                    part = batch.slice(low - at, high - low)
                    yield _arrow_chunk(1 + low - start, part, self.path)
                at += batch.num_rows
                if at >= stop:
                    return


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    """Turn whatever pyarrow raises in the block into a ``ValueError`` of one line."""
    import pyarrow

    try:
        yield
    # pyarrow has no single error for damaged files: it raises OSError for a cut or changed page,
    # UnicodeDecodeError for a name, ValueError and OverflowError for a date, KeyError for a column.
    except (
        pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError,
        RecursionError, MemoryError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not readable as Parquet ({reason})") from error

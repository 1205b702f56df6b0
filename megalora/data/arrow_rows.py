"""Read rows from Parquet files and from data sets of the hub, of which parts are in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megalora.data.chunk import CHUNK_ROWS, Chunk, Reader, Row

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_BYTES = 2**26
"""Decoded bytes at which a chunk of a Parquet file ends, unless one batch has more."""
BATCH_BYTES = 2**28
"""Decoded bytes that a batch may have where all its values are the longest ones."""
BOMB_BYTES = 2**30
BOMB_RATIO = 1_000
"""What has so many decoded bytes, and so many for each byte of the file, is refused. Text that is
repeated in every row of a long file comes to 10 to 100."""


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
        import pyarrow

        # Number of the first row of the parts in the file, and of the row behind them.
        first = at = 0
        parts: list[Any] = []
        part_bytes = 0
        with _reading_parquet(self.path), self._open() as file:
            for batch, num_bytes in self._batches(file):
                parts.append(batch)
                part_bytes += num_bytes
                at += batch.num_rows
                is_whole = at - first >= CHUNK_ROWS or part_bytes >= CHUNK_BYTES
                if not is_whole and at < min(stop, file.metadata.num_rows):
                    continue
                low = max(start, first)
                high = min(stop, at)
                if low < high:
                    table = pyarrow.Table.from_batches(parts).slice(low - first, high - low)
                    yield _arrow_chunk(1 + low - start, table, self.path)
                first = at
                parts = []
                part_bytes = 0
                if at >= stop:
                    return

    def _batches(self, file: Any) -> Iterator[tuple[Any, int]]:
        """Record batches of few enough rows for their decoded values to fit into memory, each with
        the bytes of these; raises ``ValueError`` where a small file holds too many."""
        size = self.path.stat().st_size
        decoded = 0
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            # A row first: where the footer of a column is damaged reading says so, and pyarrow ends
            # the process when it is only asked for that footer.
            next(file.iter_batches(batch_size=1, row_groups=[number]), None)
            rows = _rows_at_once(self.path, group) if group.num_rows else 1
            # The pages of a batch are decompressed before anything is known of its values.
            _check_ratio(size, group.total_byte_size)
            for batch in file.iter_batches(batch_size=rows, row_groups=[number]):
                num_bytes = sum(map(_decoded_bytes, batch.columns))
                decoded += num_bytes
                _check_ratio(size, decoded)
                yield batch, num_bytes


def _check_ratio(file_bytes: int, decoded: int) -> None:
    if decoded > max(BOMB_BYTES, BOMB_RATIO * file_bytes):
        raise ValueError(
            f"its {file_bytes:,} bytes hold {decoded:,} bytes of values or more; take out what its"
            " rows repeat, or write it as JSON lines"
        )


def _decoded_bytes(column: Any) -> int:
    """Bytes of a column's values, each as long as it is to a reader."""
    import pyarrow

    is_numbers = pyarrow.types.is_dictionary(column.type)
    return (column.dictionary_decode() if is_numbers else column).nbytes


def _rows_at_once(path: Path, group: Any) -> int:
    """Rows of a row group whose values have ``BATCH_BYTES`` at most; one at least.

    A row of plain values is no longer than what the file has of them. One value of a dictionary,
    or of deltas, may be meant a million times: each counts as the longest that there can be.
    """
    row_bytes = 1
    with path.open("rb") as file:
        for number in range(group.num_columns):
            column = group.column(number)
            # The mean, of a column of lists.
            per_row = -(-column.num_values // max(1, group.num_rows))
            row_bytes += _longest_repeated(file, column) * per_row
    return max(1, min(CHUNK_ROWS, BATCH_BYTES // row_bytes))


def _longest_repeated(file: BinaryIO, column: Any) -> int:
    """Bytes that a value may have which its column names by a number or a prefix; 0 where none may.

    Raises ``OSError`` where the file cannot be read."""
    if "BYTE_ARRAY" not in column.physical_type:
        return 0
    encodings = set(column.encodings)
    if "DELTA_BYTE_ARRAY" in encodings:
        return column.total_uncompressed_size
    if not encodings & {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}:
        return 0
    # The first page of a column is its dictionary, where it has one.
    file.seek(column.dictionary_page_offset or column.data_page_offset)
    length = _page_bytes(file.read(12))
    return column.total_uncompressed_size if length is None else length


def _page_bytes(header: bytes) -> int | None:
    """Uncompressed bytes of the page that begins with this header; None where that is not one.

    In Thrift's compact protocol a page's type and size are its first fields: each the byte 0x15,
    for "the next field, 32 bits", and a number of 7 bits a byte, whose lowest bit is the sign.
    """
    place = 0
    number = 0
    for _ in ("type", "uncompressed_page_size"):
        if header[place : place + 1] != b"\x15":
            return None
        place += 1
        number = shift = 0
        while place < len(header):
            number |= (header[place] & 0x7F) << shift
            shift += 7
            place += 1
            if header[place - 1] < 0x80:
                break
    return number >> 1


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

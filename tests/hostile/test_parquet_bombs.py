"""Small Parquet files whose values fill the memory: refused in a line, and read in parts until
then."""

import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megalora.data import arrow_rows
from megalora.data.arrow_rows import Parquet
from tests.hostile.one_line import refused

ROWS = 1500
LENGTH = 2**16
WAYS: dict[str, dict[str, Any]] = {
    "dictionary": {"compression": "zstd", "store_schema": False},
    "dictionary that stays one": {"compression": "zstd"},
    "deltas": {
        "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"},
        "compression": "none",
    },
    "compressed": {"use_dictionary": False, "compression": "zstd"},
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test's files reach soon."""
    monkeypatch.setattr(arrow_rows, "BOMB_BYTES", 2**25)
    monkeypatch.setattr(arrow_rows, "BATCH_BYTES", 2**22)
    monkeypatch.setattr(arrow_rows, "CHUNK_BYTES", 2**21)


def bomb(path: Path, rows: int, length: int, way: dict[str, Any]) -> Path:
    """So many rows of the same text."""
    indices = pyarrow.array([0] * rows, pyarrow.int32())
    column: Any = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * length]))
    if "store_schema" in way or "use_dictionary" in way:
        column = column.cast(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, **way)
    return path


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", WAYS)
def test_a_bomb_is_refused_before_it_fills_the_memory(way: str, tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.parquet", ROWS, LENGTH, WAYS[way])
    assert path.stat().st_size < 2**19
    reader = Parquet(path)
    largest: list[int] = []

    def read() -> None:
        for chunk in reader.chunks(0, reader.count()):
            rows = [row["text"] for row in chunk.rows()]
            assert set(map(len, rows)) == {LENGTH}
            largest.append(sum(map(len, rows)))

    assert "bytes of values or more" in refused(read)
    # By what has come, not by what might: of those that are compressed the footer tells.
    assert largest or way in ("compressed", "deltas")
    assert max(largest, default=0) <= arrow_rows.BATCH_BYTES


def test_four_gigabytes_in_fifty_kilobytes(tmp_path: Path) -> None:
    """At the limits that there are."""
    path = bomb(tmp_path / "a.parquet", 4, 2**20, WAYS["dictionary that stays one"])
    table = pyarrow.parquet.read_table(path)
    # The indices alone are written a thousand times.
    rows = pyarrow.table({"text": pyarrow.concat_arrays(table["text"].chunks * 1024)})
    pyarrow.parquet.write_table(rows, path, compression="zstd")
    assert path.stat().st_size < 60_000
    reader = Parquet(path)
    said = refused(lambda: [chunk.first for chunk in reader.chunks(0, reader.count())])
    assert said.startswith(f"{path}: not readable as Parquet (its {path.stat().st_size:,} bytes")


@pytest.mark.usefixtures("small")
def test_what_rows_repeat_is_read(tmp_path: Path) -> None:
    """A long file of chats that all begin alike, and lists of texts: the same rows as pyarrow's."""
    rows = [
        {"messages": [{"role": "system", "content": "y" * 5000},
                      {"role": "user", "content": os.urandom(40).hex()}]}
        for _ in range(300)
    ]  # fmt: skip
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=170)
    for start, stop in ((0, 300), (3, 160), (169, 171), (299, 300)):
        chunks = [*Parquet(path).chunks(start, stop)]
        found = [row for chunk in chunks for row in chunk.rows()]
        assert found == rows[start:stop]
        firsts = [chunk.first for chunk in chunks]
        assert firsts[0] == 1 and firsts == sorted(set(firsts))
    assert found == pyarrow.parquet.read_table(path).to_pylist()[299:]


@pytest.mark.parametrize("length", [1, 60, 200, 20_000, 3_000_000])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_size_of_a_dictionary(length: int, compression: str, tmp_path: Path) -> None:
    """That of its page: four bytes of length before each value."""
    path = tmp_path / "a.parquet"
    texts = ["x" * length, "y" * length] * 5
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(
        table, path, compression=compression, dictionary_pagesize_limit=2**24
    )
    column = pyarrow.parquet.read_metadata(path).row_group(0).column(0)
    with path.open("rb") as file:
        assert arrow_rows._longest_repeated(file, column) == 2 * (4 + length)
    assert arrow_rows._page_bytes(b"PAR1") is None

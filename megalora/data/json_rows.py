"""Read rows from JSON Lines, line by line, and from a JSON file with one list.

The list is read whole, because nothing in the file says where a row begins: it needs about ten
times the file's size in memory. Errors name the file and the line that is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.data.chunk import CHUNK_BYTES, CHUNK_ROWS, Chunk, Reader, Row
from megalora.json_text import NotJson, parse_json
from megalora.wording import typed


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an error of the file system in the block into a ``ValueError``."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


@dataclass(frozen=True)
class LineChunk(Chunk):
    path: Path
    lines: list[tuple[int, bytes]]
    """(number of the line in the file, its bytes)"""

    def rows(self) -> Iterator[Row]:
        for number, line in self.lines:
            try:
                # Windows programs put a byte order mark at the beginning.
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path}:{number}: not UTF-8 ({error.reason}, byte {error.start + 1})"
                ) from error
            row = _parsed(text, self.path, number)
            if type(row) is not dict:
                raise ValueError(f"{self.path}:{number}: must be a JSON object, got {typed(row)}")
            yield row


class Lines(Reader):
    """A file with one JSON object per line. Blank lines are no rows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        first = 1
        num_bytes = 0
        lines: list[tuple[int, bytes]] = []
        for index, line in enumerate(self._lines()):
            if index >= stop:
                break
            if index < start:
                continue
            # Undecoded: whoever tokenises the chunk parses it.
            lines.append(line)
            num_bytes += len(line[1])
            if len(lines) == CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
                yield LineChunk(first, self.path, lines)
                first += len(lines)
                num_bytes = 0
                lines = []
        if lines:
            yield LineChunk(first, self.path, lines)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of every line that is not blank."""
        with _reading(self.path), self.path.open("rb") as file:
            # As bytes: lines end at \n alone, and a bad byte is reported with its line.
            for number, line in enumerate(file, 1):
                if _holds_something(line):
                    yield number, line


def _holds_something(line: bytes) -> bool:
    """Whether a line is more than white space and a byte order mark."""
    # Nearly all lines are decided by their first bytes.
    if line[:1] == b"{":
        return True
    try:
        return bool(line.decode("utf-8-sig").strip())
    except UnicodeDecodeError:
        # It is refused, with its number, where it is decoded.
        return True


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text; a ``ValueError`` names the file and the line.

    Args:
        line: the text's line; None for a whole file, where the parser knows the line.
    """
    try:
        # Numbers as they are: a column that nobody reads may hold ids of 64 bits, or NaN.
        return parse_json(text, exact_numbers=False)
    except NotJson as error:
        number = line or error.line
        where = f"{path}:{number}" if number else f"{path}"
        raise ValueError(f"{where}: {error}") from error


@dataclass(frozen=True)
class ListChunk(Chunk):
    items: list[Row]

    def rows(self) -> Iterator[Row]:
        return iter(self.items)


class Whole(Reader):
    """A JSON file with a list of rows, which is read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path):
            self.rows = _listed(path)

    def count(self) -> int:
        return len(self.rows)

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        for at in range(start, stop, CHUNK_ROWS):
            yield ListChunk(1 + at - start, self.rows[at : min(stop, at + CHUNK_ROWS)])


def read_json(path: Path) -> Reader:
    """Reads a list, or one object per line: ``datasets`` writes JSON Lines to any name."""
    return Lines(path) if _has_objects_in_lines(path) else Whole(path)


def _has_objects_in_lines(path: Path) -> bool:
    """Whether the first line is a JSON object, whole, and something follows it."""
    with _reading(path), path.open("rb") as file:
        # The first line alone decides: a list over many lines begins with a bracket.
        try:
            first = parse_json(file.readline(), exact_numbers=False)
        except NotJson:
            return False
        return isinstance(first, dict) and any(map(_holds_something, file))


def _listed(path: Path) -> list[Row]:
    """The rows of a JSON list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}, byte {error.start + 1})") from error
    tree = _parsed(text, path)
    if isinstance(tree, dict):
        # As SQuAD and many APIs write it: {"version": ..., "data": [...]}.
        lists = [key for key, value in tree.items() if isinstance(value, list)]
        if len(lists) != 1:
            found = ", ".join(lists) or "none"
            raise ValueError(
                f"{path}: a JSON object must hold exactly one list, the rows (lists found: {found})"
            )
        tree = tree[lists[0]]
    if type(tree) is not list:
        raise ValueError(f"{path}: must be a list of objects, got {type(tree).__name__}")
    for number, row in enumerate(tree, 1):
        if type(row) is not dict:
            raise ValueError(f"{path}: item {number} must be a JSON object, got {typed(row)}")
    return tree

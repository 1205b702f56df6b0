"""What the readers of rows have in common: they hand out chunks.

A chunk carries rows as they lie in the source: lines, or Arrow's bytes. They are decoded where they
are tokenised, in other processes where there are several.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""Values by column."""
CHUNK_ROWS = 128
CHUNK_BYTES = 4 * 2**20
"""A chunk of lines ends where it has this many rows or bytes: several chunks wait for a process
each, and a row may be a book."""


@dataclass(frozen=True)
class Chunk(ABC):
    """Consecutive rows of a source; can be sent to another process."""

    # Rows are counted within the slice, as messages to the user count them.
    first: int
    """Number of its first row, from 1."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows, decoded; raises ``ValueError`` at one that cannot be."""


class Reader(ABC):
    """Reads one file or data set from its beginning, as often as it is asked to."""

    @abstractmethod
    def count(self) -> int:
        """Number of rows."""

    @abstractmethod
    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """Rows ``start`` to ``stop`` (from 0), of which the first gets number 1."""

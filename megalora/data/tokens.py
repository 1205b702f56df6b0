"""Read a token store: a folder with the tokenised samples of one source.

    header.json   what the store was made of, its sizes and digests
    tokens.bin    the tokens of all samples, one behind the other (``encode_rows.py``)
    samples.bin   one record of every sample: length, target tokens, what the notes need, digest

Records are memory-mapped, so that all ranks of a node share them. Tokens are read sample by sample
with ``pread``: pages of a mapping that a rank has touched count as its memory until the kernel
takes them back, which in a container may look like a leak of the size of the data. Nothing is
trusted unseen: records are checked by their digest when a store is opened, and the tokens of a
sample by its own whenever it is read.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from megalora.data.chat import Encoded, Rollout
from megalora.data.encode_rows import SAMPLE, TOKEN, digest_of, names_of_floats, unpack
from megalora.json_text import read_json

HEADER = "header.json"
TOKENS = "tokens.bin"
SAMPLES = "samples.bin"


class DamagedStore(ValueError):
    """A store is not what was written."""


@dataclass(frozen=True)
class Header:
    """Content of header.json, beside its own digest."""

    made_of: dict[str, Any]
    """What the samples depend on; the folder is named after its digest."""
    source: str
    """What the source was called when the store was built; it may have moved since."""
    num_samples: int
    num_tokens: int
    """The numbers that belong to tokens included."""
    columns: dict[str, str]
    """Column that each part of the conversation is read from."""
    unused_columns: list[str]
    """Columns of the source that nothing is read from."""
    left_out: list[list[str]]
    """The different values of ``Encoded.left_out``."""
    samples_sha256: str
    """Digest of samples.bin. Each of its records has the digest of a sample's tokens."""

    def write(self, folder: Path) -> None:
        content = asdict(self)
        text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
        (folder / HEADER).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises ``DamagedStore`` for a header that is not whole."""
        try:
            content = read_json(folder / HEADER)
            # The digest is that of all other fields.
            expected = content.pop("sha256")
            is_whole = expected == _digest(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedStore(f"{folder / HEADER} cannot be read ({error})") from None
        if not is_whole:
            raise DamagedStore(f"{folder / HEADER} was changed after it was written")
        return cls(**content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TokenStore:
    """The samples of a source, in the order of its rows."""

    def __init__(self, folder: Path) -> None:
        """Open and check a store; raises ``DamagedStore``."""
        self.folder = folder
        self.header = Header.read(folder)
        self.num_samples = self.header.num_samples
        path = folder / SAMPLES
        # Sizes first: a mapping beyond the end of a file is a bus error when it is read.
        _require_size(path, self.num_samples * SAMPLE.itemsize)
        self.records: np.ndarray = np.memmap(path, SAMPLE, mode="r", shape=(self.num_samples,))
        if hashlib.sha256(self.records.data).hexdigest() != self.header.samples_sha256:
            raise DamagedStore(f"{path} was changed after it was written")
        self.lengths: np.ndarray = self.records["length"].astype(np.int64)
        """[num_samples] tokens in each sample."""
        # The second sequence of a pair ends with the sample; a sample of one begins at 0 with it.
        second = self.records["second"].astype(np.int64)
        self.longest: np.ndarray = np.maximum(second, self.lengths - second)
        """[num_samples] tokens in the longest sequence of each sample."""
        self.floats = names_of_floats(self.header.columns)
        """Names of the numbers that each token has."""
        # Most data has no numbers, and the lengths of a million samples once are enough.
        self.sizes: np.ndarray = self.lengths
        if self.floats:
            self.sizes = self.lengths * (1 + len(self.floats))
        """[num_samples] tokens in each sample, and their numbers."""
        # The first token of each sample is where the one before it ends.
        self.starts: np.ndarray = np.cumsum(self.sizes) - self.sizes
        """[num_samples] place of each sample's first token in the file."""
        _require_size(folder / TOKENS, self.header.num_tokens * TOKEN.itemsize)
        # Not checked as a whole, which would read all of it at every start.
        self._file = (folder / TOKENS).open("rb", buffering=0)

    def give_values(self, values: np.ndarray, rewards: np.ndarray) -> None:
        """Let samples have other values and rewards than those that were stored, in this process
        alone: ``[num_samples]`` each."""
        # A copy in memory; the file and its digest stay as they are.
        records = np.array(self.records)
        records["value"] = values
        records["reward"] = rewards
        self.records = records

    def packed(self, index: int) -> np.ndarray:
        """What ``pack`` has made of a sample, read-only."""
        size = int(self.sizes[index]) * TOKEN.itemsize
        # At a place of its own, so that forked processes may share the open file.
        content = os.pread(self._file.fileno(), size, int(self.starts[index]) * TOKEN.itemsize)
        packed = np.frombuffer(content, TOKEN) if len(content) == size else None
        if packed is None or digest_of(packed) != self.records["digest"][index].tobytes():
            raise DamagedStore(
                f"{self.folder / TOKENS}: the tokens of sample {index + 1} are not those that were"
                " written. Remove the folder; the next start tokenises the data again"
            )
        return packed

    def sample(self, index: int) -> Encoded:
        """A sample as it was tokenised."""
        ids, mask, floats = unpack(self.packed(index), self.floats)
        record = self.records[index]
        return Encoded(
            ids,
            mask,
            tuple(self.header.left_out[record["left_out"]]),
            stops=bool(record["stops"]),
            num_open=int(record["open"]),
            num_unmarked=int(record["unmarked"]),
            second=int(record["second"]),
            value=float(record["value"]),
            rollout=Rollout(
                float(record["reward"]),
                int(record["group"]),
                int(record["version"]),
                bool(record["truncated"]),
            ),
            floats=floats,
        )


def _require_size(path: Path, size: int) -> None:
    """Raise ``DamagedStore`` unless a file has so many bytes."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DamagedStore(f"{path} cannot be read ({error.strerror or error})") from None
    if found != size:
        raise DamagedStore(f"{path} has {found:,} bytes instead of {size:,}")

"""Read and write ``training_state/index.json``: which rank's file holds which part of each tensor.

    {"format": 2, "world_size": W,
     "files": {"rank_00000.safetensors": [bytes, SHA-256], ...},
     "tensors": {NAME: {"shape": [16, 2048], "keys": ["param", "exp_avg", "exp_avg_sq"],
                        "pieces": [[rank, dim, num_shards, shard, start, end], ...]}, ...}}

``slices.py`` says what a piece's last five numbers mean. The file of its rank has one flat tensor
``KEY.NAME`` of ``end - start`` elements for each key. The pieces of a tensor have every element
exactly once, which is checked when the index is written and when it is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.adapters.files import INDEX
from megalora.hf.json_file import read_json_object
from megalora.lora.slices import Slice, cover_fault
from megalora.wording import shorten

FORMAT = 2


@dataclass(frozen=True)
class Piece:
    """Part of a tensor in the file of one rank."""

    rank: int
    slice: Slice


@dataclass(frozen=True)
class Indexed:
    """One tensor of a training state."""

    shape: tuple[int, ...]
    keys: tuple[str, ...]
    """What the state has of it: float32 master, moments, ..."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Index:
    """Content of index.json."""

    world_size: int
    files: dict[str, tuple[int, str]]
    """Name of a file -> its length in bytes and its SHA-256 in hexadecimal digits."""
    tensors: dict[str, Indexed]


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def check_pieces(tensors: Mapping[str, Indexed], where: str) -> None:
    """Raise ``ValueError`` unless every tensor's pieces have each of its elements exactly once."""
    for name, tensor in tensors.items():
        if fault := cover_fault(tensor.shape, [piece.slice for piece in tensor.pieces]):
            raise ValueError(f"{where}: {name}: {fault}")


def write_index(path: Path, index: Index) -> None:
    """Write index.json; ``check_pieces`` has been called with its tensors."""
    content = {
        "format": FORMAT,
        "world_size": index.world_size,
        "files": index.files,
        "tensors": rows_of(index.tensors),
    }
    # Without spaces: 48 layers of 128 experts have 36,864 factors, each with a row or more.
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def rows_of(tensors: Mapping[str, Indexed]) -> dict[str, Any]:
    """Tensors as index.json has them."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        rows: list[list[int | None]] = []
        for piece in tensor.pieces:
            part = piece.slice
            rows.append([piece.rank, part.dim, part.num_shards, part.shard, part.start, part.end])
        found[name] = {"shape": tensor.shape, "keys": tensor.keys, "pieces": rows}
    return found


def read_index(folder: Path) -> Index:
    """The index of a checkpoint.

    Raises:
        ValueError: it is not what ``write_index`` writes, or its pieces miss or repeat an element.
    """
    path = folder / INDEX
    try:
        content = read_json_object(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {shorten(content.get('format'))}; this version of megalora reads"
            f" {FORMAT}"
        )
    world_size = content.get("world_size")
    # Bounded, since ``_files`` makes a name for each rank: a damaged number may say 10**15.
    if type(world_size) is not int or not 1 <= world_size < 2**20:
        raise _damaged(path, "world_size", world_size)
    files = _files(path, content.get("files"), world_size)
    tensors: dict[str, Indexed] = {}
    rows = content.get("tensors")
    if not isinstance(rows, dict):
        raise _damaged(path, "tensors", rows)
    for name, row in rows.items():
        tensors[name] = _tensor(path, name, row, world_size)
    check_pieces(tensors, str(path))
    return Index(world_size, files, tensors)


def _files(path: Path, files: Any, world_size: int) -> dict[str, tuple[int, str]]:
    names = {rank_file(rank) for rank in range(world_size)}
    # Names too: a path out of the folder would be opened.
    if not isinstance(files, dict) or files.keys() != names:
        raise _damaged(path, "files", files)
    found: dict[str, tuple[int, str]] = {}
    for name, row in files.items():
        if not isinstance(row, list) or [type(value) for value in row] != [int, str]:
            raise _damaged(path, f"files.{name}", row)
        found[name] = (row[0], row[1])
    return found


def _tensor(path: Path, name: str, row: Any, world_size: int) -> Indexed:
    if not isinstance(row, dict) or row.keys() != {"shape", "keys", "pieces"}:
        raise _damaged(path, name, row)
    lists: list[Sequence[Any]] = [row["shape"], row["keys"], row["pieces"]]
    if not all(isinstance(value, list) for value in lists):
        raise _damaged(path, name, row)
    if not all(isinstance(key, str) for key in row["keys"]):
        raise _damaged(path, name, row)
    shape = tuple(row["shape"])
    # A tensor without pieces has nobody else who looks at its sizes.
    if any(type(size) is not int or size < 0 for size in shape):
        raise _damaged(path, name, row["shape"])
    pieces: list[Piece] = []
    for numbers in row["pieces"]:
        if not isinstance(numbers, list) or len(numbers) != 6:
            raise _damaged(path, name, numbers)
        rank, *part = numbers
        found = Slice(shape, *part)
        # ``fault`` looks at the numbers of the shape, too.
        if type(rank) is not int or not 0 <= rank < world_size or found.fault():
            raise _damaged(path, name, numbers)
        pieces.append(Piece(rank, found))
    return Indexed(shape, tuple(row["keys"]), tuple(pieces))


def _damaged(path: Path, key: str, value: Any) -> ValueError:
    # A damaged list may have thousands of rows, of which a message needs the beginning.
    shown = repr(value)
    return ValueError(f"{path} is damaged: {key} is {shown[:60]}")

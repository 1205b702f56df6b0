"""Read tensors of a checkpoint's training state, whole or in part, whatever layout saved them.

Format 2 has a file for each rank and an index (``state_index.py``); format 1, of earlier versions,
has whole tensors in one file for each kind. Files are mapped into memory: only those that hold
something of what is asked for are opened, and only that is read of them.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalora.adapters.files import (
    AVERAGE,
    AVERAGE_KEY,
    INDEX,
    OPTIMIZER,
    START,
    START_KEY,
    STATE,
    STATE_KEYS,
)
from megalora.adapters.state_index import Index, rank_file, read_index
from megalora.hf.safetensors import read_header
from megalora.lora.slices import Slice, copy_overlap, overlaps

_BLOCK_BYTES = 1 << 24
OLD_FILES: dict[Path, tuple[tuple[str, ...], bool]] = {
    OPTIMIZER: (STATE_KEYS, True),
    START: ((START_KEY,), False),
    AVERAGE: ((AVERAGE_KEY,), False),
}
"""Files of format 1 -> the keys of their tensors, and whether names begin with them."""


def state_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that say which format its tensors have, of which one must be there."""
    return [folder / INDEX, folder / OPTIMIZER]


def has_state(folder: Path) -> bool:
    """Whether a folder holds the tensors of a training state."""
    return any(path.is_file() for path in state_files(folder))


class SavedTensors:
    """The tensors of one checkpoint by key and name, such as ("exp_avg", NAME); a context that
    closes its files."""

    def __init__(self, folder: Path) -> None:
        """Raises ``ValueError`` where the state is not whole; contents are not read."""
        self.folder = folder
        self.index: Index | None = None
        self._pieces: dict[tuple[str, str], list[tuple[Path, str, Slice]]] = {}
        """(key, name) -> file, name in the file, and slice of each piece."""
        self._files: dict[Path, Any] = {}
        self._open = ExitStack()
        if (folder / INDEX).is_file():
            self.index = read_index(folder)
            self._take_index(self.index)
        else:
            self._take_whole_tensors()

    def __enter__(self) -> "SavedTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._open.close()

    @property
    def says(self) -> Path:
        """The file that says which tensors there are, for messages."""
        return self.folder / (OPTIMIZER if self.index is None else INDEX)

    def shape(self, key: str, name: str) -> tuple[int, ...] | None:
        """Shape of a whole tensor; None where the state has no such tensor."""
        pieces = self._pieces.get((key, name))
        return pieces[0][2].shape if pieces else None

    def names(self, key: str) -> list[str]:
        """Names of all tensors of a key."""
        return [name for of, name in self._pieces if of == key]

    def read(self, key: str, name: str, wanted: Slice) -> Tensor:
        """``[wanted.numel]`` elements, in the dtype that was saved.

        Raises:
            ValueError: there is no such tensor, or it has another shape, or a file is damaged.
        """
        pieces = self._pieces.get((key, name))
        if pieces is None:
            raise ValueError(
                f"{self.says} has no tensor {key}.{name}; it was made with other target_modules or"
                " layers"
            )
        if pieces[0][2].shape != wanted.shape:
            raise ValueError(
                f"{self.says}: {name} is {pieces[0][2].shape}, which does not fit this run's model"
                f" and ranks ({wanted.shape})"
            )
        out: Tensor | None = None
        copied = 0
        for path, stored, piece in pieces:
            # Without this a rank would open every rank's file.
            if next(overlaps(piece, wanted), None) is None:
                continue
            values = self._tensor(path, stored, piece.numel)
            # Most often, in the layout that saved: no copy but the caller's.
            if piece == wanted:
                return values
            if out is None:
                out = torch.empty(wanted.numel, dtype=values.dtype)
            copied += copy_overlap(piece, values, wanted, out)
        # The index has every element once, so that this is a bug of ours.
        assert out is not None and copied == wanted.numel, (name, wanted)
        return out

    def whole(self, key: str, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor, which must have this shape; raises as ``read`` does."""
        return self.read(key, name, Slice.whole(shape)).view(shape)

    def generators(self, rank: int) -> dict[str, Tensor]:
        """States of the generators of a rank of the world that saved, by name."""
        assert self.index is not None
        path = self.folder / STATE / rank_file(rank)
        file = self._file(path)
        prefix = "rng."
        found: dict[str, Tensor] = {}
        for name in file.keys():  # noqa: SIM118  not a mapping
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = file.get_tensor(name).clone()
        return found

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            try:
                opened = safe_open(str(path), framework="pt")
                self._files[path] = self._open.enter_context(opened)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        return self._files[path]

    def _tensor(self, path: Path, stored: str, numel: int) -> Tensor:
        try:
            values = self._file(path).get_tensor(stored).reshape(-1)
        except SafetensorError as error:
            raise ValueError(f"{path} has no tensor {stored} ({error})") from None
        if values.numel() != numel:
            raise ValueError(
                f"{path}: {stored} has {values.numel():,} elements, and {self.says.name} says"
                f" {numel:,}"
            )
        return values

    def _take_index(self, index: Index) -> None:
        for name, tensor in index.tensors.items():
            # Master and moments are cut alike: one list of pieces serves all keys.
            for key in tensor.keys:
                places: list[tuple[Path, str, Slice]] = []
                for piece in tensor.pieces:
                    path = self.folder / STATE / rank_file(piece.rank)
                    places.append((path, f"{key}.{name}", piece.slice))
                self._pieces[key, name] = places

    def _take_whole_tensors(self) -> None:
        """Format 1, whose files are index enough."""
        for file, (keys, has_prefix) in OLD_FILES.items():
            path = self.folder / file
            # The other two come with some runs only.
            if file != OPTIMIZER and not path.is_file():
                continue
            try:
                _, tensors = read_header(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error.strerror})") from None
            for tensor in tensors:
                key, _, name = tensor.name.partition(".") if has_prefix else (keys[0], "", "")
                name = name or tensor.name
                # Of another file, these would be dropped in silence.
                if key not in keys:
                    raise ValueError(f"{path}: {tensor.name} is none of {', '.join(keys)}")
                whole = Slice.whole(tensor.shape)
                self._pieces[key, name] = [(path, tensor.name, whole)]


def digest_fault(folder: Path, index: Index, name: str) -> str | None:
    """What is wrong with a file of the index, all of which is read; None where nothing is."""
    path = folder / STATE / name
    num_bytes, expected = index.files[name]
    digest = hashlib.sha256()
    length = 0
    with path.open("rb") as file:
        # 16 MiB at a time: the file of a rank may have gigabytes.
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            length += len(block)
    # First, since a file cut short is the commoner fault, and numbers say by how much.
    if length != num_bytes:
        return f"{path} has {length:,} bytes, and {INDEX.name} says {num_bytes:,}"
    if digest.hexdigest() != expected:
        return f"{path} is damaged: its SHA-256 is not the one in {INDEX.name}"
    return None

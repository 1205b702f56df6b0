"""Copy what this rank saves into host memory that is kept, laid out as the file that it becomes.

Training goes on as soon as the copies are begun; a thread writes the file from here
(``background.py``). On a GPU the buffer is page-locked and copies are queued on the stream that
trains, so that the next optimizer step comes behind them; nobody waits but the thread.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megalora import host
from megalora.adapters.write.stream import DTYPE_NAMES
from megalora.hf.safetensors import header_bytes
from megalora.lora.slices import Slice
from megalora.train.checkpoint.pieces import Block

WRITE_BYTES = 1 << 26
"""Bytes that are handed to the system, and to SHA-256, at once."""
GENERATOR = "rng."
"""Prefix of the states of generators in a rank's file."""


@dataclass(frozen=True)
class Held:
    """One piece in a snapshot."""

    name: str
    slice: Slice
    tensor: Tensor
    """``[slice.numel]``."""


class Snapshot:
    """Host memory of one rank's file; it is used again for every other save."""

    def __init__(self) -> None:
        self._signature: list[Any] = []
        self._header = b""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._places: list[Tensor] = []
        self._arrival: host.Arrival | None = None
        self.held: dict[str, list[Held]] = {}
        """Key -> its pieces."""

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel()

    @torch.no_grad()
    def take(self, blocks: Iterable[Block], generators: Mapping[str, Tensor]) -> None:
        """Begin to copy; what is launched behind this may change the tensors."""
        # The widest dtype first, so that every tensor begins where its dtype may.
        ordered = sorted(blocks, key=lambda block: -block.tensor.element_size())
        signature: list[Any] = [(block.key, block.pieces, block.tensor.dtype) for block in ordered]
        signature += [(name, state.numel()) for name, state in generators.items()]
        # The same in every save of a run, unless it began with other generators.
        if signature != self._signature:
            self._lay_out(ordered, generators)
            self._signature = signature
        states = list(generators.values())
        sources = [block.tensor for block in ordered]
        for place, source in zip(self._places, [*sources, *states], strict=True):
            place.copy_(source, non_blocking=True)
        self._arrival = host.Arrival()

    def wait(self) -> None:
        """Return when all copies have arrived."""
        if self._arrival is not None:
            self._arrival.wait()

    def write(self, path: Path) -> tuple[int, str]:
        """Write the file and force it to disk; returns its bytes and their SHA-256."""
        with path.open("wb") as file:
            made = self.write_to(file)
            file.flush()
            os.fsync(file.fileno())
        return made

    def write_to(self, file: IO[bytes]) -> tuple[int, str]:
        """Write the file's content; returns its bytes and their SHA-256."""
        digest = hashlib.sha256(self._header)
        # Slices of a memoryview are no copies.
        content = memoryview(self._buffer.numpy())
        _write_all(file, memoryview(self._header))
        for place in range(0, len(content), WRITE_BYTES):
            part = content[place : place + WRITE_BYTES]
            # Both release the interpreter, which the training thread needs.
            _write_all(file, part)
            digest.update(part)
        return len(self._header) + len(content), digest.hexdigest()

    def _lay_out(self, blocks: list[Block], generators: Mapping[str, Tensor]) -> None:
        """Make the header, the buffer, and views of it to copy into."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        sizes: list[tuple[int, torch.dtype]] = []
        place = 0

        def enter(name: str, numel: int, dtype: torch.dtype) -> None:
            nonlocal place
            end = place + numel * dtype.itemsize
            # The second one would hide the first.
            assert name not in header, f"{name} twice in one file"
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": [numel],
                "data_offsets": [place, end],
            }
            place = end

        for block in blocks:
            for name, part in block.pieces:
                enter(f"{block.key}.{name}", part.numel, block.tensor.dtype)
            sizes.append((block.tensor.numel(), block.tensor.dtype))
        # Their states are bytes, which may begin anywhere: so they come last.
        for name, state in generators.items():
            enter(f"{GENERATOR}{name}", state.numel(), state.dtype)
            sizes.append((state.numel(), state.dtype))
        self._header = header_bytes(header)
        # The old buffer goes first: both at once may not fit.
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._places = []
        self.held = {}
        self._buffer = host.kept_buffer(place)
        place = 0
        for numel, dtype in sizes:
            end = place + numel * dtype.itemsize
            self._places.append(self._buffer[place:end].view(dtype))
            place = end
        for block, values in zip(blocks, self._places[: len(blocks)], strict=True):
            parts = values.split([part.numel for _, part in block.pieces])
            of_key = self.held.setdefault(block.key, [])
            for (name, part), tensor in zip(block.pieces, parts, strict=True):
                of_key.append(Held(name, part, tensor))


def _write_all(file: IO[bytes], part: memoryview) -> None:
    # A file without a buffer of its own may take a part only.
    while part:
        part = part[file.write(part) :]

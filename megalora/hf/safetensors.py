"""Read the header of a safetensors file: which tensors it holds, and where."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.json_text import parse_json

LARGEST_HEADER = 100_000_000
"""Limit in bytes, that of the safetensors library."""
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """Dtype as the format spells it: F32, BF16, F16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""
    num_bytes: int
    """Number of bytes of its values."""


def read_header(shard: Path) -> tuple[dict[str, Any], list[Stored]]:
    """A whole safetensors file's header, and its tensors in the order in which they lie behind it,
    without a gap.

    The format: the header's length in 8 bytes (little-endian), the header as JSON, then the
    tensors' bytes, of which the header gives each one's ``[begin, end)``.
    https://github.com/huggingface/safetensors#format

    Raises:
        ValueError: the file is not that, or ends early.
    """
    num_bytes = shard.stat().st_size
    try:
        header, first_byte = _header_of(shard, num_bytes)
        tensors = []
        for name, entry in header.items():
            if name != "__metadata__":
                tensors.append(_stored(name, entry, first_byte))
        # An empty tensor begins where the next one does, and comes first.
        tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
        end = first_byte
        for tensor in tensors:
            if tensor.start != end:
                raise ValueError(f"{tensor.name} does not begin where the tensor before it ends")
            end += tensor.num_bytes
        if end != num_bytes:
            raise ValueError(f"its tensors end at byte {end:,}, the file at {num_bytes:,}")
    except ValueError as error:
        # Broken JSON is a ValueError, too.
        raise ValueError(
            f"{shard} is not a whole safetensors file ({error}); download it again"
        ) from None
    return header, tensors


def _header_of(shard: Path, num_bytes: int) -> tuple[dict[str, Any], int]:
    """The header of a file of ``num_bytes``, and the byte at which tensors begin."""
    with shard.open("rb") as file:
        start = file.read(8)
        # "version https://git-lfs.github.com/spec/v1": a clone without Git LFS has such files.
        if start == b"version ":
            raise ValueError("it is a pointer of Git LFS, in place of the file: run git lfs pull")
        length = int.from_bytes(start, "little")
        if not 2 <= length <= num_bytes - 8:
            raise ValueError(f"its header would have {length:,} bytes, the file has {num_bytes:,}")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header would have {length:,} bytes, more than 100 MB")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, 8 + length


def _stored(name: str, entry: Any, first_byte: int) -> Stored:
    """The tensor of a header's entry; raises ``ValueError`` for one that describes none.

    Args:
        first_byte: place in the file that offsets count from.
    """
    try:
        dtype = entry["dtype"]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        num_bytes = end - begin
        fits = num_bytes >= 0 and begin >= 0 and all(size >= 0 for size in shape)
        # Formats newer than this table, such as 4-bit ones, are taken at their word.
        if dtype in _ITEM_BYTES:
            fits = fits and num_bytes == math.prod(shape) * _ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{name} is described as {entry!r}")
    return Stored(name, dtype, shape, first_byte + begin, num_bytes)  # pyright: ignore[reportPossiblyUnbound]


def header_bytes(header: dict[str, Any]) -> bytes:
    """The bytes before the tensors of a file with this header.

    For the header of a file that safetensors wrote, they are the very same.
    """
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Tensors begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

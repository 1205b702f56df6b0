"""What is in an adapter folder, read without torch: config, names, shapes, contents' hash, and whether numbers are finite."""

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from megalora.bridge.files import CONFIG, WEIGHTS
from megalora.model.shape import read_json_object
from megalora.serve.errors import AdapterInvalid, AdapterNotFound

HASH_DIGITS = 12
"""Of SHA-256 in a model id: 48 bits, so that among a million versions two are alike with probability 0.002."""
_BFLOAT16_EXPONENT = 0x7F80
"""All eight bits set: infinite or not a number."""


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, F16, BF16."""


@dataclass(frozen=True)
class AdapterFiles:
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_adapter_files(folder: Path) -> AdapterFiles:
    """Config and tensor headers.

    Raises:
        AdapterNotFound: no folder, or a file is missing.
        AdapterInvalid: a file is cut short or is something else.
    """
    if not folder.is_dir():
        raise AdapterNotFound(f"{folder} is no folder; name one with {CONFIG} and {WEIGHTS}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterNotFound(f"{folder} is not an adapter folder: it has no {name}")
    try:
        config = read_json_object(folder / CONFIG)
    except ValueError as error:
        raise AdapterInvalid(str(error)) from None
    return AdapterFiles(folder, config, _headers(folder / WEIGHTS))


def content_hash(folder: Path) -> str:
    """First 12 hex digits of SHA-256 over the weights, then the config: what a version's name says about its contents."""
    digest = hashlib.sha256()
    try:
        for name in (WEIGHTS, CONFIG):
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise AdapterNotFound(f"{folder} is not an adapter folder: {error.strerror} ({error.filename})") from None
    return digest.hexdigest()[:HASH_DIGITS]


def tensor_count(folder: Path) -> int:
    """Number of tensors in the weights file."""
    return len(read_adapter_files(folder).tensors)


def _headers(path: Path) -> dict[str, TensorInfo]:
    """Opening compares the header with the file's length, so that a file cut short is noticed."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterInvalid(
            f"{path}: not a readable safetensors file ({error}); is it cut short, or still being written?"
        ) from None


def first_not_finite(path: Path) -> str | None:
    """Name of the first tensor with a NaN or an infinite number, or None. ``path`` has passed ``read_adapter_files``.

    Reads the bytes where they lie: NumPy has no bfloat16, and importing torch takes seconds.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            if not _is_finite(data[start:end], entry["dtype"]):
                return name
    return None


def _is_finite(data: bytes, dtype: str) -> bool:
    if dtype == "BF16":
        return not ((np.frombuffer(data, np.uint16) & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
    return bool(
        np.isfinite(np.frombuffer(data, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])).all()
    )

"""Read an adapter folder without torch: config, tensor names, shapes, and a hash of its files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.adapters.files import CONFIG, WEIGHTS, NotAnAdapter, check_regular
from megalora.adapters.read.weights import AdapterWeights, TensorInfo, find_weight_files
from megalora.hf.json_file import read_json_object
from megalora.serve.errors import AdapterInvalid, AdapterNotFound

HASH_DIGITS = 12
"""Digits of a SHA-256 in a model id: 48 bits, so that two of a million versions have the same ones
with probability 0.002."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder whose config and headers have been read."""

    folder: Path
    config: dict[str, Any]
    weights: AdapterWeights

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.weights.info


def read_adapter_files(folder: Path) -> AdapterFiles:
    """Read config and tensor headers.

    Raises:
        AdapterNotFound: the folder or a file is missing.
        AdapterInvalid: a file is cut short or is something else.
    """
    try:
        files, _ = find_weight_files(folder)
        config = read_json_object(folder / CONFIG, exact_numbers=False)
        # A server reads the folder on its own: what is checked and copied must be what it reads.
        if [path.name for path in files] == [WEIGHTS]:
            return AdapterFiles(folder, config, AdapterWeights(folder))
    except NotAnAdapter as error:
        raise AdapterNotFound(str(error)) from None
    except ValueError as error:
        raise AdapterInvalid(str(error)) from None
    raise AdapterInvalid(
        f"{folder} holds {files[0].name}; megalora checks, copies and serves {WEIGHTS}, which"
        f" megalora export {folder} OUT writes"
    )


def content_hash(folder: Path) -> str:
    """First 12 hex digits of SHA-256 over the weights, then the config: they name a version."""
    digest = hashlib.sha256()
    try:
        for name in (WEIGHTS, CONFIG):
            check_regular(folder / name)
            with (folder / name).open("rb") as file:
                # 1 MiB at a time: an adapter of all experts may have gigabytes.
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise AdapterNotFound(
            f"{folder} is not an adapter folder: {error.strerror} ({error.filename})"
        ) from None
    return digest.hexdigest()[:HASH_DIGITS]


def tensor_count(folder: Path) -> int:
    """Number of tensors in the weights file."""
    return len(read_adapter_files(folder).tensors)

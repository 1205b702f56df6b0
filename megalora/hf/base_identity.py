"""Identify a base model, whatever its folder is called: its config.json, and a digest of its
tensors.

The digest covers every tensor's name, dtype and shape and a sample of its bytes, so it takes
seconds for any model. It does not depend on which file a tensor lies in. A change of a few elements
in the middle of a large tensor can go unnoticed; other weights, a merged adapter or another
training step cannot.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megalora.digests import Digests
from megalora.hf.folder import weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.hf.safetensors import Stored, read_header

SAMPLE_BYTES = 4096
"""Bytes that are read at a tensor's beginning, at its end, and at a place between them that follows
from its name."""
NEUTRAL = {
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
"""Fields of config.json that do not change what is trained: ``model.dtype`` decides the dtype."""
_MODULUS = 2**256


def base_config(folder: Path) -> dict[str, Any]:
    """Fields of ``config.json`` that may change what is trained."""
    return {key: value for key, value in read_hf_config(folder).items() if key not in NEUTRAL}


def weights_digest(folder: Path, digests: Digests) -> str:
    """Digest of all tensors of a base folder, whose shards must all be there."""
    total = 0
    # A sum, so that the same tensors in other files have the same digest.
    for name in weight_shards(folder):
        total += int(digests.of(folder / name, "sampled tensors", shard_digest), 16)
    return f"{total % _MODULUS:064x}"


def values_digest(folder: Path, digests: Digests) -> str:
    """Digest of what a folder's tensors mean: of plain ones ``weights_digest``."""
    digest = weights_digest(folder, digests)
    settings = read_hf_config(folder).get("quantization_config")
    # The same codes are other values under other settings.
    if settings:
        text = f"{digest} {json.dumps(settings, sort_keys=True)}"
        digest = hashlib.sha256(text.encode()).hexdigest()
    return digest


def shard_digest(shard: Path) -> str:
    """The sum of all tensors' SHA-256 as numbers, so that the order of tensors makes no
    difference."""
    _, tensors = read_header(shard)
    total = 0
    # A descriptor, from which samples can be read without seeking.
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        for tensor in tensors:
            total += int.from_bytes(_tensor_digest(descriptor, tensor), "big")
    finally:
        os.close(descriptor)
    return f"{total % _MODULUS:064x}"


def _tensor_digest(descriptor: int, tensor: Stored) -> bytes:
    """SHA-256 of a tensor's name, dtype and shape, and of a sample of its bytes."""
    about = f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.num_bytes}".encode()
    digest = hashlib.sha256(about)
    # A small tensor is read whole.
    if tensor.num_bytes <= 3 * SAMPLE_BYTES:
        digest.update(os.pread(descriptor, tensor.num_bytes, tensor.start))
        return digest.digest()
    last = tensor.num_bytes - SAMPLE_BYTES
    # A place that is the same in every run and another in every tensor.
    between = int.from_bytes(hashlib.sha256(about).digest()[:8], "big") % last
    for place in (0, between, last):
        digest.update(os.pread(descriptor, SAMPLE_BYTES, tensor.start + place))
    return digest.digest()

"""A base model's folder: where it is, whether its weights arrived whole, and where each tensor lies
in them. Needs no torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.model.shape import read_json_object
from megalora.paths import expand

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """As the format spells it: F32, BF16, F16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""
    num_bytes: int


_NO_WEIGHTS = (
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scheduler.pt",
)
"""What trainers leave beside a model."""
_WITHOUT_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model"]


def local_folder(path: str, option: str = "model.path", *, weights: bool = True) -> Path:
    """``path`` if it is a folder, else the hub snapshot of that name; the hub's file locks let one
    rank of a machine download.

    Args:
        option: what the user calls it, for messages.
        weights: download them too.
    """
    path = expand(path, option)
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise ValueError(f"{option}={path}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(path, allow_patterns=_WITHOUT_WEIGHTS + ["*.safetensors"] * weights)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{option}={path}: neither a folder here nor to be had from the hub ({reason})"
        ) from None


def weight_shards(folder: Path) -> list[str]:
    """Names of the files that hold the weights: the one file there is, else those that the index
    names.

    As in transformers, ``model.safetensors`` comes before an index of other files.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return [SINGLE]
    shards = sorted(set(read_index(index).values()))
    if elsewhere := [name for name in shards if Path(name).name != name]:
        raise ValueError(f"{index} names {elsewhere[0]!r}, which is not in its folder")
    return shards


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file, as an index says; raises ``ValueError`` for a file that is no index."""
    names = read_json_object(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(file, str) for file in names.values())
    ):
        raise ValueError(f"{index} has no weight_map from tensor names to files; download it again")
    return names


def check_base_folder(folder: Path) -> None:
    """Raise ``ValueError`` unless every weight shard the folder announces is there, whole."""
    for name in shards_that_are_there(folder):
        read_header(folder / name)


def shards_that_are_there(folder: Path) -> list[str]:
    """``weight_shards``; raises ``ValueError`` unless each of them is a file."""
    shards = weight_shards(folder)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        advice = _other_weights(folder) if missing == shards else ""
        raise ValueError(
            f"{folder}: {len(missing)} of {len(shards)} weight shards are missing"
            f" ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''});"
            f" {advice or 'download the model again'}"
        )
    return shards


def _other_weights(folder: Path) -> str:
    """What to do about weights that are there in another form; nothing where there are none."""
    if (folder / "adapter_model.safetensors").is_file():
        return "adapter_model.safetensors is an adapter, which needs its base model here"
    if unnamed := sorted(folder.glob("*.safetensors")):
        return (
            f"{unnamed[0].name} is named by no {INDEX}: save or download the model again with its"
            " index"
        )
    kinds = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack")
    others = [
        path.name
        for kind in kinds
        for path in sorted(folder.glob(kind))
        if path.name not in _NO_WEIGHTS
    ]
    return f"{others[0]} is not read: save the model as safetensors" if others else ""


_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


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
        with shard.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise ValueError(
                    "it is a pointer of Git LFS, in place of the file: run git lfs pull"
                )
            length = int.from_bytes(start, "little")
            if not 2 <= length <= num_bytes - 8:
                raise ValueError(
                    f"its header would have {length:,} bytes, the file has {num_bytes:,}"
                )
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = [_stored(name, entry, 8 + length) for name, entry in entries.items()]
        tensors.sort(key=lambda t: (t.start, t.num_bytes))
        end = 8 + length
        for tensor in tensors:
            if tensor.start != end:
                raise ValueError(f"{tensor.name} does not begin where the tensor before it ends")
            end += tensor.num_bytes
        if end != num_bytes:
            raise ValueError(f"its tensors end at byte {end:,}, the file at {num_bytes:,}")
    except (ValueError, RecursionError) as error:  # JSON that is broken is a ValueError too
        raise ValueError(
            f"{shard} is not a whole safetensors file ({error}); download it again"
        ) from None
    return header, tensors


def _stored(name: str, entry: Any, first_byte: int) -> Stored:
    """One entry of a header; raises ``ValueError`` for one that describes no tensor."""
    try:
        dtype = entry["dtype"]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        num_bytes = end - begin
        fits = num_bytes >= 0 and begin >= 0 and all(size >= 0 for size in shape)
        if dtype in _ITEM_BYTES:
            fits = fits and num_bytes == math.prod(shape) * _ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{name} is described as {entry!r}")
    return Stored(name, dtype, shape, first_byte + begin, num_bytes)  # pyright: ignore[reportPossiblyUnbound]


def header_bytes(header: dict[str, Any]) -> bytes:
    """What stands before the tensors of a file with this header; for one that safetensors wrote,
    the very same bytes."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text

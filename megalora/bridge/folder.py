"""A base model's folder: where it is, whether its weights arrived whole, and where each tensor lies in them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megalora.model.shape import read_json_object
from megalora.paths import expand

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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


_WITHOUT_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model"]


def local_folder(path: str, option: str = "model.path", *, weights: bool = True) -> Path:
    """``path`` if it is a folder, else the hub snapshot of that name; the hub's file locks let one rank of a machine download.

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
        return Path(snapshot_download(path, allow_patterns=_WITHOUT_WEIGHTS + ["*.safetensors"] * weights))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{option}={path}: neither a folder here nor to be had from the hub ({reason})") from None


def weight_shards(folder: Path) -> list[str]:
    """Names of the files that hold the weights: those in the index, else the one file there is without."""
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    shards = sorted(set(read_json_object(index).get("weight_map", {}).values()))
    if elsewhere := [name for name in shards if Path(name).name != name]:
        raise ValueError(f"{index} names {elsewhere[0]!r}, which is not in its folder")
    return shards


def check_base_folder(folder: Path) -> None:
    """Raise ``ValueError`` unless every weight shard the folder announces is there, whole."""
    shards = weight_shards(folder)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(shards)} weight shards are missing ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); download the model again"
        )
    for name in shards:
        _check_whole(folder / name)


def _check_whole(shard: Path) -> None:
    try:
        with safe_open(str(shard), framework="pt"):  # compares the header's offsets with the file's length
            pass
    except SafetensorError as error:
        raise ValueError(f"{shard} is not a whole safetensors file ({error}); download it again") from None


def read_header(shard: Path) -> tuple[dict[str, Any], list[Stored]]:
    """A whole safetensors file's header, and its tensors in the order in which they lie behind it, without a gap.

    The format: the header's length in 8 bytes (little-endian), the header as JSON, then the tensors' bytes, of which the
    header gives each one's ``[begin, end)``. https://github.com/huggingface/safetensors#format
    """
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = []
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors.append(Stored(name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin))
    return header, sorted(tensors, key=lambda t: (t.start, t.num_bytes))


def header_bytes(header: dict[str, Any]) -> bytes:
    """What stands before the tensors of a file with this header; for one that safetensors wrote, the very same bytes."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text

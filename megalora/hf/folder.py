"""A base model's folder: where it is, whether its weights arrived whole, and where each tensor lies
in them. Needs no torch."""

from pathlib import Path

from megalora.hf.json_file import read_json_object
from megalora.hf.safetensors import read_header
from megalora.paths import expand
from megalora.wording import first_few

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
            f" ({first_few(missing)});"
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

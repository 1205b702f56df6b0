"""Find a base model's folder, its weight files, and what is missing of them. Needs no torch."""

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
"""Files that trainers leave beside a model and that look like weights."""
_WITHOUT_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model"]
"""Patterns of the files of a model that are not its weights."""


def local_folder(path: str, option: str = "model.path", *, weights: bool = True) -> Path:
    """``path`` if it is a folder, else the hub snapshot of that name.

    Args:
        option: name of the option, for messages.
        weights: whether to download the weights, too.
    Raises:
        ValueError: there is no such folder, or the hub does not give the model.
    """
    path = expand(path, option)
    if Path(path).is_dir():
        return Path(path)
    if is_written_as_path(path):
        raise ValueError(f"{option}={path}: no such folder")
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = list(_WITHOUT_WEIGHTS)
    if weights:
        patterns.append("*.safetensors")
    try:
        # All ranks of a machine may ask at once: the hub's file locks let one of them download.
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        # Its first line says what is wrong, the others what one could try.
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{option}={path}: there is no such folder, and the hub does not give it ({reason})"
        ) from None


def is_written_as_path(name: str) -> bool:
    """Whether a base is named by a path: a name on the hub is NAME or OWNER/NAME."""
    return name.startswith((".", "/")) or name.count("/") > 1


def weight_shards(folder: Path) -> list[str]:
    """Names of the files that hold the weights: a single file, else those that the index names."""
    index = folder / INDEX
    # As in transformers, model.safetensors comes before an index of other files.
    if (folder / SINGLE).is_file() or not index.is_file():
        return [SINGLE]
    shards = sorted(set(read_index(index).values()))
    for name in shards:
        # A path out of the folder would read files that nobody meant.
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not in its folder")
    return shards


def read_index(index: Path) -> dict[str, str]:
    """File of each tensor by its name; raises ``ValueError`` if this is not an index."""
    names = read_json_object(index).get("weight_map")
    # Read from a file, so that anything may stand there.
    if isinstance(names, dict) and names and all(isinstance(file, str) for file in names.values()):
        return names
    raise ValueError(f"{index} has no weight_map from tensor names to files; download it again")


def check_base_folder(folder: Path) -> None:
    """Raise ``ValueError`` unless every weight shard that the folder announces is there, whole."""
    # A header says where the file has to end.
    for name in shards_that_are_there(folder):
        read_header(folder / name)


def shards_that_are_there(folder: Path) -> list[str]:
    """``weight_shards``; raises ``ValueError`` unless each of them is a file."""
    shards = weight_shards(folder)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        advice = "download the model again"
        # None of them is there: the weights may have another form.
        if missing == shards:
            advice = _advice_on_other_weights(folder) or advice
        raise ValueError(
            f"{folder}: {len(missing)} of {len(shards)} weight shards are missing"
            f" ({first_few(missing)}); {advice}"
        )
    return shards


def _advice_on_other_weights(folder: Path) -> str | None:
    """What to do about weights that are there in another form; None if there are none."""
    if (folder / "adapter_model.safetensors").is_file():
        return "adapter_model.safetensors is an adapter, which needs its base model here"
    unnamed = sorted(folder.glob("*.safetensors"))
    if unnamed:
        return (
            f"{unnamed[0].name} is named by no {INDEX}: save or download the model again with its"
            " index"
        )
    for kind in ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack"):
        for path in sorted(folder.glob(kind)):
            if path.name not in _NO_WEIGHTS:
                return f"{path.name} is not read: save the model as safetensors"
    return None

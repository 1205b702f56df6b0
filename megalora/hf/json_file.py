"""Read the JSON files of Hugging Face folders: one object per file, of a reasonable size."""

from pathlib import Path
from typing import Any

from megalora.json_text import read_json


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a Hugging Face checkpoint folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    return read_json_object(path, exact_numbers=False)


def stored_dtype(hf: dict[str, Any]) -> str | None:
    """The dtype that a ``config.json`` names; transformers 4 has another key for it than 5."""
    return hf.get("dtype") or hf.get("torch_dtype")


def read_json_object(path: Path, *, exact_numbers: bool = True) -> dict[str, Any]:
    """The object in a JSON file; a ``ValueError`` names the file and the place.

    Args:
        exact_numbers: as for ``parse_json``; false for files that hold more than is read, such as
            tokenizer_config.json with a length of 10**30.
    """
    content = read_json(path, exact_numbers=exact_numbers)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content

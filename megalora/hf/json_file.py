"""Read JSON files that others wrote: one object per file, of a reasonable size."""

import json
from pathlib import Path
from typing import Any

LARGEST_JSON = 2**26
"""Limit in bytes. The index of a model with 36,000 tensors has 3 MB."""


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a Hugging Face checkpoint folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    return read_json_object(path)


def stored_dtype(hf: dict[str, Any]) -> str | None:
    """The dtype that a ``config.json`` names; transformers 4 has another key for it than 5."""
    return hf.get("dtype") or hf.get("torch_dtype")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ``ValueError`` names the file and the place."""
    size = path.stat().st_size
    # Python's objects take many times the memory of their text.
    if size > LARGEST_JSON:
        raise ValueError(
            f"{path}: {size / 1e6:,.0f} MB; megalora reads JSON files of up to"
            f" {LARGEST_JSON / 1e6:,.0f} MB"
        )
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}, byte {error.start + 1})") from None
    except RecursionError:
        raise ValueError(f"{path}: not readable (nested too deeply)") from None
    except ValueError as error:
        # An integer of more digits than Python converts.
        raise ValueError(f"{path}: not readable ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content

"""Load a base model's tokenizer, or say in a line why it cannot be."""

from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path, option: str = "model.path") -> Any:
    """The tokenizer that transformers makes of a model folder.

    Args:
        option: what the user calls the folder, for messages.
    Raises:
        ValueError: there is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # files of others: what transformers trips over can be anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{option}={folder}: no tokenizer can be read there ({type(error).__name__}: {reason})"
        ) from error

"""Load a base model's tokenizer, or say in one line why that failed."""

from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path, option: str = "model.path") -> Any:
    """The tokenizer that transformers makes of a model folder.

    Args:
        option: name of the option that the folder was given by, for messages.
    Raises:
        ValueError: the folder has no tokenizer, or its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # Damaged files can make transformers raise anything. Its first line says what is wrong.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{option}={folder}: no tokenizer can be read there ({type(error).__name__}: {reason})"
        ) from error

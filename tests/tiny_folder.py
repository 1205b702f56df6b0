"""Read back a folder that ``make_tiny`` wrote: its JSON files, and its model through
transformers."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

VOCAB = 512
"""Vocabulary of a tiny model unless another is asked for."""


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def load(folder: Path) -> Any:
    """The model, of which every tensor must be in the folder, and none besides."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], key
    return model.eval()

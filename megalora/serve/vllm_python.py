"""Find the Python interpreter that has vLLM."""

import os
import sys
from pathlib import Path


def vllm_python(python: str | Path | None = None) -> Path:
    """The interpreter that has vLLM: ``python``, else $MEGALORA_VLLM_PYTHON, else .venv-vllm here
    or beside megalora's own environment.

    Raises:
        ValueError: there is no such interpreter.
    """
    named = python or os.environ.get("MEGALORA_VLLM_PYTHON")
    if named:
        places = [Path(named)]
    else:
        # In a checkout, .venv and .venv-vllm stand side by side.
        folders = (Path.cwd(), Path(sys.prefix).parent)
        places = [folder / ".venv-vllm/bin/python" for folder in folders]
    for place in places:
        if place.is_file():
            # Not resolved: a virtual environment's python is a link, and known by its place.
            return place.absolute()
    # Both places may be the same folder.
    missing = " or ".join(map(str, dict.fromkeys(places)))
    raise ValueError(
        f"no vLLM: there is no {missing}; make vllm builds .venv-vllm in a checkout (elsewhere:"
        " docs/install.md), and MEGALORA_VLLM_PYTHON names another environment's python"
    )

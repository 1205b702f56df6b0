"""Ask whether the hub gives a model or a data set, before ranks start that would download it.
Needs no torch."""

import os
from pathlib import Path
from typing import Literal

TIMEOUT_S = 20.0
"""How long an answer may take: a network that drops packets gives none."""


def check_model(name: str, option: str) -> None:
    """Raise ``ValueError`` unless a model's config is in the hub's cache, or the hub has the model.

    Args:
        name: OWNER/NAME, or NAME.
        option: name of the option that names it, for the message.
    """
    from huggingface_hub import try_to_load_from_cache

    # A path, where the file has been downloaded before; then ranks need no network.
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        _ask(name, "model", option)


def check_data_set(name: str, option: str) -> None:
    """Raise ``ValueError`` unless ``datasets`` has prepared a data set before, or the hub has it.

    Args:
        name: OWNER/NAME, without configuration and split.
        option: name of the option that names it, for the message.
    """
    if not is_prepared(name):
        _ask(name, "dataset", option)


def is_prepared(name: str) -> bool:
    """Whether the cache of the package ``datasets``, which takes seconds to import, has it."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    # One folder per configuration, version and hash: org/GSM8K is org___gsm8_k/main/0.0.0/HASH.
    for info in cache.expanduser().glob("*___*/*/*/*/dataset_info.json"):
        folder = info.parents[3].name
        if _letters(folder) == _letters(name):
            return True
    return False


def _letters(name: str) -> str:
    """A name in small letters without separators, which ``datasets`` adds between its words."""
    return "".join(filter(str.isalnum, name.lower()))


def _ask(name: str, kind: Literal["model", "dataset"], option: str) -> None:
    """Raise ``ValueError`` unless the hub answers for ``name``."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    what = "model" if kind == "model" else "data set"
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
    except RepositoryNotFoundError:
        # Its own text has an id of the request, and several lines.
        reason = f"it has no such {what}, or one that is not open to you: see hf auth login"
    # OSError: offline mode, and failures below HTTP. Errors of the server are of both kinds.
    except (httpx.HTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    else:
        return
    here = "a folder" if kind == "model" else "a file"
    raise ValueError(f"{option}={name} is not {here} here, and the hub does not give it ({reason})")

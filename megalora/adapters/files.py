"""Names of the files in an adapter folder and in a checkpoint, which is one with training state,
and checks that a folder is an adapter."""

import stat
from pathlib import Path
from typing import Any

from megalora.hf.json_file import read_json_object
from megalora.wording import shorten

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""The two files that PEFT, vLLM and SGLang load."""
LORA = "LORA"
"""``peft_type`` of an adapter that PEFT reads, all linears of which have DoRA or none."""
PART_DORA = "LORA_PART_DORA"
"""``peft_type`` of an adapter with DoRA on some linears. PEFT has ``use_dora`` for all that a
folder adapts: it would give the others magnitudes of its own. It does not load this name."""
PARTS = ("dora", "plain")
"""Two folders with the same adapter as PEFT loads it: linears with DoRA, and all others. They are
PEFT's names for the two as well, which warns of one called "lora"."""
PART_OF = "part_of"
"""Key in the metadata of a part's weights, so that it is not taken for the whole adapter; the value
is ``PARTS``, joined by commas."""
CARD = "README.md"
"""Model card: what the adapter is and how to load it."""
PROBE = "probe.json"
"""Log-probabilities of the training side that a server must repeat."""

STATE = "training_state"
STATE_JSON = Path(STATE) / "state.json"
INDEX = Path(STATE) / "index.json"
"""Which rank's file holds which part of each tensor (``state_index.py``)."""
OPTIMIZER = Path(STATE) / "optimizer.safetensors"
RNG = Path(STATE) / "rng.safetensors"
START = Path(STATE) / "start.safetensors"
AVERAGE = Path(STATE) / "average.safetensors"
"""Files of format 1, of earlier versions: whole tensors, and the generators of all ranks."""
AVERAGED = "ema"
"""Folder in a checkpoint with that average as an adapter of its own."""
LORA_SECTION = "lora.yaml"
"""The ``lora`` section with which a config trains an imported adapter on."""
STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""Keys of tensors in the training state: float32 masters and Adam's moments."""
START_KEY = "start"
"""Key of the adapter that the run began with, where its objective compares with that."""
AVERAGE_KEY = "average"
"""Key of the moving average of the adapter in float32, where a run keeps one."""
SEVERAL = 8
"""Number of adapters in sub-folders that a message names."""


class NotAnAdapter(ValueError):
    """The path is not a folder, or lacks a file that every adapter has."""


def adapters_below(folder: Path) -> list[str]:
    """Names of the sub-folders that are adapters, as ``save_pretrained`` leaves them for named
    ones."""
    return sorted(child.name for child in folder.iterdir() if (child / CONFIG).is_file())


def parts_of(folder: Path) -> list[Path]:
    """The folders of an adapter that lies in two (``PARTS``); empty for any other."""
    if (folder / CONFIG).is_file():
        return []
    parts = [folder / part for part in PARTS]
    return parts if all((part / CONFIG).is_file() for part in parts) else []


def check_adapter_folder(folder: Path) -> None:
    """Raise ``NotAnAdapter`` unless the folder has an adapter's config."""
    if folder.is_file():
        raise NotAnAdapter(f"{folder} is a file; name the folder that it lies in")
    if not folder.is_dir():
        raise NotAnAdapter(f"{folder} is not a folder; name one with {CONFIG} and {WEIGHTS}")
    if (folder / CONFIG).is_file():
        return
    # PEFT's save_pretrained puts every adapter but the one called "default" into a sub-folder.
    below = adapters_below(folder)
    hint = ""
    if len(below) == 1:
        hint = (
            ", but its sub-folder has, as PEFT saves an adapter with a name: give"
            f" {folder / below[0]}"
        )
    elif below:
        more = f" and {len(below) - SEVERAL} more" if len(below) > SEVERAL else ""
        hint = (
            f", but {len(below)} of its sub-folders have: {', '.join(below[:SEVERAL])}{more}. Give"
            " one of them"
        )
    raise NotAnAdapter(f"{folder} is not an adapter folder: it has no {CONFIG}{hint}")


def check_regular(path: Path) -> None:
    """Raise ``ValueError`` for a path that is there and is not a file: opening a pipe or a device
    may wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(
            f"{path} is not a regular file but a pipe, a socket, a device or a folder; put the file"
            " itself there"
        )


def read_config(adapter: Path) -> dict[str, Any]:
    """A PEFT LoRA folder's ``adapter_config.json``; raises ``ValueError`` for another folder.

    Of an adapter in two parts it is that of the part with DoRA, as ``PART_DORA``."""
    if parts := parts_of(adapter):
        configs = [read_config(part) for part in parts]
        names = {config.get("base_model_name_or_path") for config in configs}
        if len(names) > 1:
            raise ValueError(
                f"{adapter}: {' and '.join(PARTS)} name different bases:"
                f" {', '.join(sorted(map(str, names)))}"
            )
        return {**configs[0], "peft_type": PART_DORA}
    check_adapter_folder(adapter)
    path = adapter / CONFIG
    # Numbers are checked with the names of their keys (``read/options.py``).
    config = read_json_object(path, exact_numbers=False)
    if config.get("peft_type") not in (LORA, PART_DORA):
        raise ValueError(
            f"{path}: peft_type is {shorten(config.get('peft_type'))}; megalora reads LORA only"
        )
    # ``type``, not isinstance: true is an int to Python, and not a rank.
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float):
            raise ValueError(f"{path}: {key} must be a number, got {shorten(config.get(key))}")
    return config
